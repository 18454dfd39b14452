# SIGKILL of the server below a mounted filesystem: the device fails like a dead
# disk, it is not connected again behind the filesystem's back, and after it has been
# attached anew everything that was synced is there.

step 'cnbd installed' install_cnbd
attach_unit 0 ext4
step 'attached' systemctl start cnbd.service cnbd-attach@nbd0.service
mkdir -p /mnt/ext4
echo '/dev/nbd0 /mnt/ext4 ext4 noauto,_netdev,x-systemd.requires=cnbd-attach@nbd0.service 0 0' >>/etc/fstab
systemctl daemon-reload
step 'made and mounted' eval 'make_filesystem ext4 /dev/nbd0 && mount /mnt/ext4'

protected() { # as docs/host.md says
	local pid stat flags
	pid=$(systemctl show -P MainPID cnbd.service)
	grep -E 'VmLck|VmRSS|Threads' "/proc/$pid/status"
	grep -q 'VmLck:[[:space:]]*[1-9]' "/proc/$pid/status" || return
	[ "$(cat "/proc/$pid/oom_score_adj")" -le -999 ] || return
	for stat in /proc/"$pid"/task/*/stat; do
		flags=$(sed 's/.*) //' "$stat" | cut -d' ' -f7)
		# PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE
		((flags & 0x80000 && flags & 0x100000)) || { echo "$stat: $flags"; return 1; }
	done
	[ "$(cat "/proc/$pid/comm")" = cnbd ] || return
	! journalctl -b -u cnbd.service -o cat --no-pager | grep 'may hang when memory is short'
}
step 'all threads are IO flushers, memory is locked, the OOM killer kept away' protected

start_writer
step '20 files are synced' written 20
step 'server killed' systemctl kill --signal=KILL --kill-whom=main cnbd.service
ended() { # the writer, with an error
	wait "$writer"
	local status=$?
	cat /tmp/writer
	[ "$status" != 0 ] && grep -qi 'input/output error\|read-only' /tmp/writer
}
step 'the writer has an error' ended
count=$(cat /tmp/synced)
restarted() {
	local n
	for ((n = 0; n < 120; n++)); do
		systemctl is-active -q cnbd.service && [ "$(systemctl show -P NRestarts cnbd.service)" -ge 1 ] && return
		sleep 1
	done
	return 1
}
step 'the service has restarted the server' restarted
stays_dead() {
	refused 'Input/output error' dd if=/dev/nbd0 of=/dev/null bs=4096 count=1 skip=1000 iflag=direct &&
		refused 'Input/output error\|Read-only' sh -c 'echo new >/mnt/ext4/new && sync /mnt/ext4/new'
}
step 'the device stays dead' stays_dead
# A mount that went away by itself would leave programs to write to the directory below.
step 'nothing has been unmounted' mountpoint /mnt/ext4
told() { # by the unit, which has given the device up
	local n
	for ((n = 0; n < 30; n++)); do
		! systemctl is-failed cnbd-attach@nbd0.service || break
		sleep 1
	done
	systemctl is-failed cnbd-attach@nbd0.service && journalctl -b -u cnbd-attach@nbd0.service -o cat --no-pager | grep 'answers with errors from now on'
}
step 'the log of the unit says why' told
anew() { # as docs/attach.md says: the mount, which requires the unit, goes with it
	local n
	systemctl restart cnbd-attach@nbd0.service || return
	for ((n = 0; n < 60; n++)); do # it is not waited for
		! mountpoint /mnt/ext4 || break
		sleep 1
	done
	touch /mnt/ext4/alive && findmnt /dev/nbd0
}
step 'unmounted, detached, attached, mounted by one restart of the unit' anew
step "synced files are right ($count)" verify ext4 "$count"
step 'unmounted, sound' eval 'umount /mnt/ext4 && check_filesystem ext4 /dev/nbd0'
step 'no failed unit' no_failed_units

removal() { # not while a device is in use; stores are kept
	local mount=/root/mount # none of fstab, which would be unmounted
	mkdir -p $mount && mount /dev/nbd0 $mount || return
	refused 'nbd0 is in use' dpkg --remove cnbd && touch $mount/alive && systemctl is-active cnbd.service || return
	umount $mount && cnbd detach /dev/nbd0 && cp /usr/bin/cnbd /tmp && dpkg --remove cnbd || return
	! [ -e /usr/bin/cnbd ] && ! pgrep -x cnbd && dpkg --purge cnbd && /tmp/cnbd check --data /var/lib/cnbd/ext4.cnbd
}
step 'the package is removed when no device is in use, stores are kept' removal
