#!/usr/bin/env bash
# Installs the programs that tests use as strangers to cnbd: NBD clients and
# servers of others, load makers and filesystems. Only what is missing is
# installed, with apt-get. Where that cannot be done (another distribution, no
# root), it says what is missing and ends well: the tests that need it are then
# skipped, by name.
set -u

# The tools, and the Debian package of each.
tools=(
	nbdinfo=libnbd-bin nbdcopy=libnbd-bin nbdfuse=libnbd-bin nbdsh=python3-libnbd
	qemu-img=qemu-utils qemu-io=qemu-utils qemu-nbd=qemu-utils
	nbdkit=nbdkit nbd-client=nbd-client fio=fio strace=strace
	mkfs.ext4=e2fsprogs e2fsck=e2fsprogs debugfs=e2fsprogs
	mkfs.xfs=xfsprogs xfs_repair=xfsprogs mkfs.btrfs=btrfs-progs btrfs=btrfs-progs
	losetup=mount mount=mount umount=mount fstrim=util-linux fallocate=util-linux setpriv=util-linux
	gcc=gcc
	systemd-analyze=systemd systemd-sysusers=systemd systemd-tmpfiles=systemd
	lintian=lintian rpm=rpm readelf=binutils qemu-aarch64-static=qemu-user-static mmdebstrap=mmdebstrap mandoc=mandoc
)

# Debian keeps mkfs and friends where a user's PATH has them not.
PATH=$PATH:/usr/sbin:/sbin

# missing prints those of tools that are not there.
missing() {
	local t
	for t in "${tools[@]}"; do
		command -v "${t%=*}" >/dev/null || printf '%s\n' "$t"
	done
}

install() {
	local sudo=() packages
	mapfile -t packages < <(missing | sed 's/.*=//' | sort -u)
	((${#packages[@]})) || return 0
	command -v apt-get >/dev/null || { echo "setup: no apt-get here"; return 1; }
	if [ "$(id -u)" != 0 ]; then
		sudo -n true 2>/dev/null || { echo "setup: neither root nor sudo without a password"; return 1; }
		sudo=(sudo -n)
	fi
	echo "setup: installing ${packages[*]}"
	local apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
	"${apt[@]}" update </dev/null >/dev/null || echo "setup: apt-get update failed, going on with the lists there are"
	"${apt[@]}" install -y --no-install-recommends "${packages[@]}" </dev/null >/dev/null && return
	# One package that is not to be had must not keep the others away.
	local p
	for p in "${packages[@]}"; do
		"${apt[@]}" install -y --no-install-recommends "$p" </dev/null >/dev/null
	done
}

install
for t in $(missing); do
	echo "setup: MISSING TOOL: ${t%=*} (Debian package ${t#*=})"
done

# What no package brings.
[ -r /dev/fuse ] && [ -w /dev/fuse ] || echo "setup: MISSING: /dev/fuse, for tests that mount through FUSE"
losetup -f >/dev/null 2>&1 || echo "setup: MISSING: a free loop device, for tests that mount filesystems"
exit 0
