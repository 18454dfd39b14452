#!/usr/bin/env bash
# Installs, from Debian's packages, what bench/peers.py compares and uses.
set -eu
cd "$(dirname "$0")"
# A PostgreSQL server that is installed for its programs need not run.
if ! [ -e /etc/postgresql-common/createcluster.conf ] && [ "$(id -u)" = 0 ]; then
	mkdir -p /etc/postgresql-common
	echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
fi
missing=()
for package in python3 python3-libnbd libnbd-bin nbdkit qemu-utils fio btrfs-progs e2fsprogs mount util-linux postgresql; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' $package 2>/dev/null)" = installed ] || missing+=("$package")
done
((${#missing[@]})) || exit 0
echo "bench: installing ${missing[*]}"
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo -n)
apt=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
"${apt[@]}" update </dev/null >/dev/null
"${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >/dev/null
