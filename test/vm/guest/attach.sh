# Two devices are attached and detached at the same time, over and over: none waits.

step 'nbd driver' modprobe nbd
step 'cnbd installed' install_cnbd
step 'service started' systemctl start cnbd.service

in_time() { # COMMAND... of each device, at once
	local fs pids=() pid n
	for fs in ext4 xfs; do "$1" "$fs" & pids+=($!); done
	for ((n = 0; n < 150; n++)); do # 15 s: half of the kernel's time-out
		jobs -rp | grep -q . || break
		sleep 0.1
	done
	if jobs -rp | grep -q .; then
		stuck
		return 1
	fi
	for pid in "${pids[@]}"; do wait "$pid" || return; done
}
stuck() { # tells where server and kernel stand
	mount -t debugfs none /sys/kernel/debug
	grep -r . /sys/kernel/debug/block/nbd[01]/ 2>/dev/null | grep -v ':0$\|poll_stat\|zone\|pm_only'
	grep -H . /proc/[0-9]*/comm 2>/dev/null | grep 'cnbd\|nbd\|udev'
	for pid in $(pgrep -f 'cnbd attach|udevd'); do echo "$pid $(tr '\0' ' ' <"/proc/$pid/cmdline")"; cat "/proc/$pid"/task/*/stack; done
	systemctl kill --signal=QUIT --kill-whom=main cnbd.service
	sleep 5
}
attach() { cnbd attach --connections 2 "/dev/nbd$(index "$1")" "$(uri "$1")"; }
detach() { cnbd detach "/dev/nbd$(index "$1")"; }
many() {
	local n
	for ((n = 1; n <= vm_count; n++)); do
		in_time attach && in_time detach || { echo "the $n. time"; return 1; }
	done
}
step "attached and detached $vm_count times" many
step 'no failed unit' no_failed_units
