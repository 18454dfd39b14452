# Each filesystem over each way to attach: made, used, trimmed, unmounted, detached.

step 'nbd driver' modprobe nbd
step 'cnbd installed' install_cnbd
step 'service started' systemctl start cnbd.service

attach() { # HOW FS DEVICE
	case $1 in
	'nbd-client, unix') nbd-client -unix "$socket" -N "$2" "$3" ;;
	'nbd-client, tcp') nbd-client -N "$2" 127.0.0.1 10809 "$3" ;;
	'cnbd attach') cnbd attach --connections 2 "$3" "$(uri "$2")" ;;
	'cnbd attach, tcp') cnbd attach --connections 1 --block-size 4096 "$3" "nbd://127.0.0.1/$2" ;;
	esac
}

detach() { # HOW DEVICE
	case $1 in
	# udev keeps away meanwhile; then it looks, and while it has the device open the
	# kernel has it in use for the next nbd-client.
	nbd-client*) flock "$2" nbd-client -d "$2" && udevadm settle ;;
	*) cnbd detach "$2" ;;
	esac
	! [ -e "/sys/block/${2#/dev/}/pid" ]
}

use() { # FS DEVICE
	local dir=/mnt/$1
	make_filesystem "$1" "$2" && mkdir -p "$dir" && mount "$2" "$dir" || return
	fio --name=verify --directory="$dir" --size=12M --bsrange=512-128k --rw=randwrite \
		--ioengine=psync --fsync=64 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed="$vm_seed" --minimal || return
	rm "$dir"/verify* && fstrim -v "$dir" && umount "$dir" && check_filesystem "$1" "$2"
}

for how in 'nbd-client, unix' 'nbd-client, tcp' 'cnbd attach' 'cnbd attach, tcp'; do
	for fs in "${filesystems[@]}"; do
		step "$how: $fs attached" attach "$how" "$fs" /dev/nbd0
		step "$how: $fs used" use "$fs" /dev/nbd0
		step "$how: $fs detached" detach "$how" /dev/nbd0
	done
done

mounted() { # what must not be detached is not
	cnbd attach /dev/nbd0 "$(uri ext4)" || return
	refused 'attached already.*socket=' cnbd attach /dev/nbd0 "$(uri ext4)" || return
	make_filesystem ext4 /dev/nbd0 && mount /dev/nbd0 /mnt/ext4 || return
	refused 'nbd0 is mounted on /mnt/ext4' cnbd detach /dev/nbd0 || return
	touch /mnt/ext4/alive && umount /mnt/ext4 || return
	# With Btrfs the numbers of the mount are not the device's.
	make_filesystem btrfs /dev/nbd0 && mount /dev/nbd0 /mnt/btrfs || return
	refused 'nbd0 is mounted on /mnt/btrfs' cnbd detach /dev/nbd0 || return
	umount /mnt/btrfs && mkswap -q /dev/nbd0 && swapon /dev/nbd0 || return
	refused 'nbd0 is swapped to' cnbd detach /dev/nbd0 || return
	swapoff /dev/nbd0 && cnbd detach /dev/nbd0 || return
	refused 'nothing is attached' cnbd detach /dev/nbd0
}
step 'a device in use is not detached' mounted

open_meanwhile() { # as udev has it for a moment
	exec 9</dev/nbd0 || return
	(sleep 2) & # the one that keeps it open
	exec 9<&-
	cnbd attach /dev/nbd0 "$(uri ext4)" && wait $! && cnbd detach /dev/nbd0
}
step 'attached when nobody has it open any more' open_meanwhile

settings() {
	cnbd attach --connections 2 --block-size 4096 --request-max 512KiB --timeout 40s --dead-connection-timeout 7s /dev/nbd0 "$(uri ext4)" || return
	grep -H . /sys/block/nbd0/queue/{logical_block_size,max_sectors_kb,write_cache,fua,discard_granularity,nr_requests} /sys/block/nbd0/{size,backend}
	[ "$(cat /sys/block/nbd0/queue/logical_block_size)" = 4096 ] && [ "$(cat /sys/block/nbd0/queue/max_sectors_kb)" = 512 ] &&
		[ "$(cat /sys/block/nbd0/queue/write_cache)" = 'write back' ] && [ "$(cat /sys/block/nbd0/size)" = 1228800 ] &&
		[ "$(ls /sys/block/nbd0/mq | wc -l)" = 2 ] && cnbd detach /dev/nbd0
}
step 'settings reach the kernel' settings

refusals() {
	refused 'no such export\|unknown\|not found\|does not exist' cnbd attach /dev/nbd0 "$(uri nothing)" &&
		refused 'no such file' cnbd attach /dev/nbd0 'nbd+unix:///?socket=/nowhere' &&
		refused 'not permitted' setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin cnbd attach /dev/nbd0 "$(uri ext4)" &&
		rmmod nbd && refused 'modprobe nbd' cnbd attach /dev/nbd0 "$(uri ext4)" && modprobe nbd
}
step 'refusals are clear' refusals

step 'restart with nothing mounted' systemctl restart cnbd.service
step 'attached again' cnbd attach /dev/nbd0 "$(uri xfs)"
step 'xfs as it was left' check_filesystem xfs /dev/nbd0
step 'detached again' cnbd detach /dev/nbd0
step 'service stopped' systemctl stop cnbd.service
step 'stores are sound' stores_sound
step 'no failed unit' no_failed_units
