#!/usr/bin/env bash
# Makes a tree of Debian 13 with its libnbd, newer than that of Debian 12, in DIR
# (default build/debian13), for the test TestLibnbdOfDebian13. It needs root,
# apt-get and a minute.
set -eu
cd "$(dirname "$0")/.."
dir=${1:-build/debian13}
if [ -x "$dir/usr/bin/nbdsh" ]; then
	exit 0
fi
command -v mmdebstrap >/dev/null || apt-get -qq install -y --no-install-recommends mmdebstrap
mkdir -p "$dir"
mmdebstrap --quiet --variant=minbase --include=libnbd-bin,python3-libnbd trixie - | tar -C "$dir" -x --exclude='./dev/*'
