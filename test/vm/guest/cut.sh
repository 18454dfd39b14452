# The power goes while three filesystems are written to: the host ends the emulator
# when it has been told of enough durable files. The boots after the first have the
# numbers of them, and what was durable must be there.

attach_all() {
	local fs
	for fs in "${filesystems[@]}"; do
		mkdir -p "/mnt/$fs" && cnbd attach "/dev/nbd$(index "$fs")" "$(uri "$fs")" || return
	done
}
mount_all() {
	local fs
	for fs in "${filesystems[@]}"; do
		mount "/dev/nbd$(index "$fs")" "/mnt/$fs" || return
	done
}
verify_all() {
	verify ext4 "$vm_ext4" && verify xfs "$vm_xfs" && verify btrfs "$vm_btrfs"
}
check_all() {
	local fs
	for fs in "${filesystems[@]}"; do
		umount "/mnt/$fs" && check_filesystem "$fs" "/dev/nbd$(index "$fs")" || return
	done
}
detach_all() {
	cnbd detach /dev/nbd0 && cnbd detach /dev/nbd1 && cnbd detach /dev/nbd2
}
make_all() {
	local fs
	for fs in "${filesystems[@]}"; do
		make_filesystem "$fs" "/dev/nbd$(index "$fs")" || return
	done
}

step 'nbd driver' modprobe nbd
if [ "$vm_boot" = 1 ]; then
	step 'cnbd installed' install_cnbd
	step 'service started and enabled' systemctl enable --now cnbd.service
	step 'attached' attach_all
else
	step 'service is up' systemctl is-active cnbd.service
	step 'attached' attach_all
	step 'mounted after the cut' mount_all
	step "synced files are right ($vm_ext4, $vm_xfs, $vm_btrfs)" verify_all
	step 'filesystems are sound' check_all
fi
if [ "$vm_last" = yes ]; then
	step 'detached' detach_all
	step 'service stopped' systemctl stop cnbd.service
	step 'stores are sound' stores_sound
	step 'no failed unit' no_failed_units
else
	step 'made anew' make_all
	step 'mounted' mount_all
	sync -f / # the machine's own disk is not what is tested
	for fs in "${filesystems[@]}"; do writer "$fs" & done
	wait
	say 'fail writers: they have ended'
	exit 1
fi
