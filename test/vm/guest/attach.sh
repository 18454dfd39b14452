# Two devices are attached and detached at the same time, over and over; all their
# connections answer. (In emulation the kernel is slow to start threads.)

step 'nbd driver' modprobe nbd
step 'cnbd installed' install_cnbd
step 'service started' systemctl start cnbd.service

each() { # COMMAND... of each device, at once
	local fs pids=() pid
	for fs in ext4 xfs; do "$1" "$fs" & pids+=($!); done
	for pid in "${pids[@]}"; do wait "$pid" || return; done
}
attach() { cnbd attach --connections 2 "/dev/nbd$(index "$1")" "$(uri "$1")"; }
detach() { cnbd detach "/dev/nbd$(index "$1")"; }
many() {
	local n
	for ((n = 1; n <= vm_count; n++)); do
		each attach && each detach || { echo "the $n. time"; return 1; }
	done
}
step "attached and detached $vm_count times" many
grep 'attaching again' /tmp/step # to the console
say "note attached again $(grep -c 'attaching again' /tmp/step) times"
step 'no failed unit' no_failed_units
