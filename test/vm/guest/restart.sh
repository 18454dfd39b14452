# Below a mounted filesystem that is written to: an export of the device is one moment of
# it; a clean restart of the server is a pause, by cnbd attach --reconnect; and the
# device grows in use.

step 'cnbd installed' install_cnbd
attach_unit 0 ext4
step 'attached' systemctl start cnbd.service cnbd-attach@nbd0.service
mkdir -p /mnt/ext4
step 'made and mounted' eval 'make_filesystem ext4 /dev/nbd0 && mount /dev/nbd0 /mnt/ext4'

start_writer
more() { written $(($(cat /tmp/synced) + 10)); }
step 'files are synced' more
copy=/var/tmp/copy.img
export_live() {
	local before
	before=$(cat /tmp/synced)
	cnbd export /var/lib/cnbd/ext4.cnbd "$copy" && mkdir -p /mnt/copy && mount -o loop "$copy" /mnt/copy || return
	echo "$before synced before, $(cat /tmp/synced) after"
	[ "$(cat /tmp/synced)" -gt "$before" ] && verify ext4 "$before" /mnt/copy && umount /mnt/copy &&
		check_filesystem ext4 "$copy" && rm "$copy"
}
step 'exported in use, what was synced before is in it, sound' export_live
# Requests that are always on their way: writes of some hundred KiB, and small reads.
loads=()
load_writes() {
	while [ ! -e /tmp/stop-loads ]; do
		dd if=/usr/lib/x86_64-linux-gnu/libc.so.6 of="/mnt/ext4/load-$1" bs=256k oflag=direct status=none || return
	done
}
load_reads() {
	while [ ! -e /tmp/stop-loads ]; do
		dd if=/dev/nbd0 of=/dev/null bs=4k count=500 skip=$((RANDOM * 3)) iflag=direct status=none || return
	done
}
for n in 1 2; do
	load_writes "$n" & loads+=($!)
	load_reads & loads+=($!)
done
for n in 1 2 3; do
	step "restart $n" systemctl restart cnbd.service
	step 'files are synced' more
	sleep 0.$((n * 3))
done
step 'restarted with SIGTERM to the server alone' eval 'systemctl kill --kill-whom=main cnbd.service; sleep 1; systemctl start cnbd.service'
step 'files are synced' more
journalctl -b -u cnbd-attach@nbd0.service -o cat --no-pager | grep 'connected again' | while read -r line; do say "note $line"; done
again() { [ "$(journalctl -b -u cnbd-attach@nbd0.service -o cat --no-pager | grep -c 'connected again')" -ge 4 ]; }
step 'connected again each time' again

touch /tmp/stop-loads
loaded() { for pid in "${loads[@]}"; do wait "$pid" || return; done; }
step 'the loads have met no error' loaded

grow() {
	cnbd resize --size 800MiB --config /etc/cnbd/cnbd.yaml ext4 && cnbd attach --resize /dev/nbd0 "$(uri ext4)" &&
		resize2fs /dev/nbd0 && [ "$(df --output=size -m /mnt/ext4 | tail -n 1)" -ge 700 ] &&
		dd if=/dev/urandom of=/mnt/ext4/large bs=1M count=400 status=none conv=fsync
}
step 'grown in use' grow
step 'files are synced' more
touch /tmp/stop
step 'the writer has met no error' wait "$writer"
count=$(cat /tmp/synced)
step "synced files are right ($count)" verify ext4 "$count"
step 'unmounted, sound' eval 'umount /mnt/ext4 && check_filesystem ext4 /dev/nbd0'
watching() { [ "$(systemctl show -P ActiveState cnbd-attach@nbd0.service)" = active ]; }
step 'still watched' watching
step 'detached' systemctl stop cnbd-attach@nbd0.service
step 'no failed unit' no_failed_units
