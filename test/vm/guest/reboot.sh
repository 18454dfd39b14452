# Filesystems in fstab, on devices that units attach: mounted at the start of the
# system, unmounted and detached in order at its end, with no failed unit.

entries=(ext4 xfs)
mounted_all() {
	local fs
	for fs in "${entries[@]}"; do
		mountpoint "/srv/$fs" || return
		[ "$(findmnt -n -o SOURCE "/srv/$fs")" = "/dev/nbd$(index "$fs")" ] || return
	done
}
right() { # what the earlier boots have written is there
	local fs n
	for fs in "${entries[@]}"; do
		for ((n = 1; n < vm_boot; n++)); do text "$n" "$fs" | cmp - "/srv/$fs/$n" || return; done
	done
}
put() { # not synced: the end of the system does that
	local fs
	for fs in "${entries[@]}"; do text "$vm_boot" "$fs" >"/srv/$fs/$vm_boot" || return; done
}
last_end() { # as the journal of the boot before has it
	journalctl -b -1 --no-pager -o short-monotonic -u 'cnbd*' | tail -n 30
	[ "$(journalctl -b -1 --no-pager -o cat -u cnbd.service | grep -c 'everything is committed"')" -ge 2 ] || return
	local log
	log=$(journalctl -b -1 --no-pager -o cat)
	# A device that was attached again, because a connection of it did not answer, has
	# failed the reads of udev. It was of no use to anybody yet.
	if grep -q 'attaching again' <<<"$log"; then log=$(grep -v 'op 0x0:(READ)\|async page read' <<<"$log"); fi
	! grep -E 'cut off|Failed with result|I/O error|status=1' <<<"$log"
}

if [ "$vm_boot" = 1 ]; then
	step 'cnbd installed' install_cnbd
	step 'server enabled' systemctl enable --now cnbd.service
	for fs in "${entries[@]}"; do
		i=$(index "$fs")
		attach_unit "$i" "$fs"
		step "$fs attached by its unit" systemctl enable --now "cnbd-attach@nbd$i.service"
		step "$fs made" make_filesystem "$fs" "/dev/nbd$i"
		mkdir -p "/srv/$fs"
		echo "/dev/nbd$i /srv/$fs $fs defaults,_netdev,x-systemd.requires=cnbd-attach@nbd$i.service 0 0" >>/etc/fstab
	done
	systemctl daemon-reload
	for fs in "${entries[@]}"; do step "$fs mounted by fstab" mount "/srv/$fs"; done
	# Stopping the unit of a mounted device unmounts it first, since the mount requires it.
	stop_and_start() {
		systemctl stop cnbd-attach@nbd0.service && ! mountpoint -q /srv/ext4 && ! [ -e /sys/block/nbd0/pid ] &&
			systemctl start srv-ext4.mount && mountpoint /srv/ext4
	}
	step 'stopping the unit unmounts, detaches; starting the mount attaches' stop_and_start
	server_stopped() {
		systemctl stop cnbd.service && ! mountpoint -q /srv/ext4 && ! mountpoint -q /srv/xfs &&
			! [ -e /sys/block/nbd0/pid ] && ! [ -e /sys/block/nbd1/pid ] &&
			systemctl start cnbd.service srv-ext4.mount srv-xfs.mount && mounted_all
	}
	step 'stopping the server unmounts and detaches first' server_stopped
else
	step 'mounted at the start' mounted_all
	step 'what was written is right' right
	step 'the last end was in order' last_end
fi
step 'written' put
step 'no failed unit' no_failed_units
