# Server, writer and page cache share 256 MiB of memory (control group, version 2), and
# much more than that is written to a filesystem on the server's own device. Neither
# may wait for the other for ever, and nothing is killed for want of memory.

configure() {
	install_cnbd || return
	cat >/etc/cnbd/cnbd.yaml <<-YAML
		exports: [{name: memory, path: /var/lib/cnbd/memory.cnbd, size: $((vm_mib + 512))MiB}]
		listen: ["unix:$socket"]
		cache: 32MiB
	YAML
	printf '[Slice]\nMemoryMax=256M\nMemorySwapMax=0\n' >/etc/systemd/system/short.slice
	printf '[Service]\nSlice=short.slice\n' >/etc/systemd/system/cnbd.service.d/slice.conf
	systemctl daemon-reload
}
step 'cnbd installed' configure
attach_unit 0 memory
step 'attached' systemctl start cnbd.service cnbd-attach@nbd0.service
mkdir -p /mnt/memory
step 'made and mounted' eval 'make_filesystem ext4 /dev/nbd0 && mount /dev/nbd0 /mnt/memory'

cgroup=/sys/fs/cgroup/short.slice
short() { # FIO-OPTION... in the same memory
	systemd-run --quiet --scope --slice=short.slice fio --name=memory --filename=/mnt/memory/file \
		--size="${vm_mib}M" --bs=1M --rw=write --ioengine=psync --verify=crc32c --verify_fatal=1 --randseed="$vm_seed" --minimal "$@"
}
began=$SECONDS
step "$vm_mib MiB written" short --do_verify=0 --end_fsync=1
pid=$(systemctl show -P MainPID cnbd.service)
say "note $vm_mib MiB of random data in $((SECONDS - began)) s, at most $(($(cat $cgroup/memory.peak) >> 20)) MiB in use in the group," \
	"the server $(sed -n 's/^VmHWM:[[:space:]]*//p' "/proc/$pid/status"); $(tr '\n' ' ' <$cgroup/memory.events)"
pressed() { # the limit has been met, and nobody was killed
	cat $cgroup/memory.events
	! grep -q '^max 0$' $cgroup/memory.events && grep -q '^oom_kill 0$' $cgroup/memory.events &&
		[ "$(systemctl show -P NRestarts cnbd.service)" = 0 ]
}
step 'memory was short, nothing was killed' pressed
step 'unmounted, sound' eval 'umount /mnt/memory && check_filesystem ext4 /dev/nbd0'
step 'mounted again' mount /dev/nbd0 /mnt/memory
step 'what was written is right' short --verify_only
step 'unmounted, detached' eval 'umount /mnt/memory && systemctl stop cnbd-attach@nbd0.service'
step 'service stopped' systemctl stop cnbd.service
step 'store is sound' cnbd check /var/lib/cnbd/memory.cnbd
step 'no failed unit' no_failed_units
