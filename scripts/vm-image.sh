#!/usr/bin/env bash
# Makes what the tests in a virtual machine boot (make test-vm), in DIR (default
# build/vm): vmlinuz and initrd, and root.img, a small Debian with systemd as init,
# Debian's kernel for clouds, which has nbd.ko, nbd-client and the makers of
# filesystems. It needs root, apt-get and a few minutes; what is there already is
# kept as long as this script has not changed.
#
# The machine runs /payload/run from its second disk, with the words of the kernel's
# command line that begin with vm. as its environment, and is then powered off.
set -eu
cd "$(dirname "$0")/.."
dir=${1:-build/vm}
suite=bookworm # whose nbd-client is 3.24
stamp=$(sha256sum scripts/vm-image.sh)
[ "$(cat "$dir/stamp" 2>/dev/null)" != "$stamp" ] || exit 0

missing=()
command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86)
command -v qemu-img >/dev/null || missing+=(qemu-utils)
command -v cpio >/dev/null || missing+=(cpio)
((!${#missing[@]})) || apt-get -qq install -y --no-install-recommends "${missing[@]}"

mkdir -p "$dir"
tree=$dir/_tree # a name that go passes over
rm -rf "$tree" "$dir/_initrd" "$dir/stamp"
packages=systemd-sysv,udev,kmod,mount,busybox-static,nbd-client,e2fsprogs,xfsprogs,btrfs-progs,fio,procps
# The package of the kernel wants an initrd of Debian's making, which is large and
# slow to boot here: it is unpacked instead, and not over /lib, which is a link.
mmdebstrap --quiet --variant=minbase --include="$packages" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='Acquire::Retries "3"' \
	--customize-hook='chroot "$1" sh -ec "
		mkdir /kernel
		cd /kernel
		apt-get -qq -o APT::Sandbox::User=root download \$(apt-cache depends linux-image-cloud-amd64 | sed -n \"s/.*Depends: //p\")
		dpkg -x linux-image-*.deb .
		cp -a lib/modules /usr/lib
		depmod \$(ls lib/modules)"' \
	"$suite" "$tree"

kernel=$(ls "$tree/lib/modules")
mv "$tree/kernel/boot/vmlinuz-$kernel" "$dir/vmlinuz"
rm -r "$tree/kernel"

# The initrd: what is needed to mount /dev/vda, for ext4 is in the kernel.
i=$dir/_initrd
mkdir -p "$i"/{bin,dev,proc,sys,root,modules}
cp "$tree/bin/busybox" "$i/bin/busybox"
n=10
for m in virtio_pci virtio_blk; do
	while read -r _ path _; do
		cp -n "$tree$path" "$i/modules/$n-$(basename "$path")"
		n=$((n + 1))
	done < <(chroot "$tree" modprobe --set-version "$kernel" --show-depends $m | grep ^insmod)
done
cat >"$i/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for m in /modules/*; do
	/bin/busybox insmod "$m" 2>/dev/null # some come twice
done
/bin/busybox mount -t ext4 /dev/vda /root || exec /bin/busybox sh
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
INIT
chmod +x "$i/init"
(cd "$i" && find . | cpio --quiet -o -H newc) | gzip -1 >"$dir/initrd"

# The machine.
echo '/dev/vda / ext4 defaults 0 0' >"$tree/etc/fstab"
echo vm >"$tree/etc/hostname"
echo '127.0.0.1 localhost vm' >"$tree/etc/hosts"
: >"$tree/etc/machine-id"
mkdir -p "$tree/payload" "$tree/var/log/journal" "$tree/etc/systemd/journald.conf.d" "$tree/etc/systemd/system.conf.d"
printf '[Journal]\nStorage=persistent\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nMaxLevelConsole=info\n' >"$tree/etc/systemd/journald.conf.d/vm.conf"
# Software emulation beside other work is slow: a minute is not much.
printf '[Manager]\nDefaultTimeoutStartSec=300\nDefaultTimeoutStopSec=300\nDefaultDeviceTimeoutSec=300\n' >"$tree/etc/systemd/system.conf.d/vm.conf"
cat >"$tree/etc/systemd/system/vm-run.service" <<'UNIT'
[Unit]
Description=The test of this boot
# What the boot starts is up or has failed before it; mounts with _netdev are not ordered
# before multi-user.target.
After=multi-user.target remote-fs.target
SuccessAction=poweroff
FailureAction=poweroff

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/vm-run
StandardOutput=journal
StandardError=journal
TimeoutStartSec=infinity
UNIT
cat >"$tree/usr/local/sbin/vm-run" <<'RUN'
#!/bin/bash
# Runs the test of this boot; what it tells the host goes to /dev/ttyS1.
for word in $(cat /proc/cmdline); do
	case $word in vm.*=*) word=${word#vm.}; export "vm_${word%%=*}=${word#*=}" ;; esac
done
stty -F /dev/ttyS1 raw -echo
mountpoint -q /payload || mount -o ro /dev/vdb /payload || exit
exec /payload/run
RUN
chmod +x "$tree/usr/local/sbin/vm-run"
# Nobody is there for a shell when a boot fails.
printf '[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/systemctl --force poweroff\n' >"$tree/etc/systemd/system/emergency.service"
mkdir -p "$tree/etc/systemd/system/graphical.target.wants"
ln -sf /lib/systemd/system/graphical.target "$tree/etc/systemd/system/default.target"
ln -sf ../vm-run.service "$tree/etc/systemd/system/graphical.target.wants/vm-run.service"
for unit in getty.target apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
	e2scrub_reap.service fstrim.timer nbd-client.service systemd-update-utmp.service \
	systemd-update-utmp-runlevel.service systemd-hwdb-update.service systemd-pstore.service; do
	ln -sf /dev/null "$tree/etc/systemd/system/$unit"
done

rm -f "$dir/root.img"
truncate -s 6G "$dir/root.img"
mke2fs -q -t ext4 -O ^has_journal -d "$tree" "$dir/root.img"
tune2fs -O has_journal "$dir/root.img" >/dev/null # quicker than with it from the start
rm -rf "$tree" "$i"
echo "$stamp" >"$dir/stamp"
