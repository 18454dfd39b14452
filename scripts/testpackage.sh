#!/usr/bin/env bash
# Looks at the packages that `make package` has made: lintian, what is in them, the
# program for arm64 under emulation, and whether building them again, elsewhere and
# from nothing, gives the same bytes. Then the .deb is installed, removed and purged in a
# tree of Debian in build/package-root, which is made first. Root, and a few minutes.
set -eu
cd "$(dirname "$0")/.."
dir=build/package tree=build/package-root
version=${VERSION:-$(scripts/version.sh)}
deb=$dir/cnbd_$version-1_amd64.deb
say() { printf -- '-- %s\n' "$*"; }
fail() { printf 'testpackage: %s\n' "$*" >&2; exit 1; }
same() { diff <(printf '%s\n' "$2") <(printf '%s\n' "$3") >&2 || fail "$1"; }

say lintian
said=$(lintian --allow-root "$dir"/*.deb) || true
[ -z "$said" ] || fail "lintian says
$said"

say 'the .deb and the .rpm have the same files'
of_deb() { dpkg-deb -c "$1" | awk '$1 !~ /^d/ {print $1, substr($6, 2)}' | grep -v ' /usr/share/\(lintian\|zsh\|doc/cnbd/c\)' | sort -k2; }
of_rpm() { rpm -qp --qf '[%{FILEMODES:perms} %{FILENAMES}\n]' "$1" | grep -v '^d\| /usr/share/zsh' | sort -k2; }
same 'x86_64: .deb (<) and .rpm (>) differ' "$(of_deb "$deb")" "$(of_rpm "$dir/cnbd-$version-1.x86_64.rpm")"
same 'aarch64: .deb (<) and .rpm (>) differ' "$(of_deb "$dir/cnbd_$version-1_arm64.deb")" "$(of_rpm "$dir/cnbd-$version-1.aarch64.rpm")"
[ "$(rpm -qp --configfiles "$dir/cnbd-$version-1.x86_64.rpm")" = /etc/cnbd/cnbd.yaml ] || fail 'the .rpm does not mark its configuration'

say 'static programs; that for arm64 runs'
for arch in amd64 arm64; do
	! readelf -l $dir/cnbd-$arch | grep -q INTERP || fail "cnbd-$arch is not static"
done
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
arm=(qemu-aarch64-static $dir/cnbd-arm64)
[ "$("${arm[@]}" version)" = "cnbd $version ($(go env GOVERSION), linux/arm64)" ] || fail "arm64: $("${arm[@]}" version)"
# In memory: the emulator says of files on disks that they have no direct I/O.
shm=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$tmp" "$shm"' EXIT
"${arm[@]}" create --size 64MiB "$shm/s"
"${arm[@]}" serve --log-level error "$shm/s" >"$shm/uri" &
arm_pid=$!
for ((i = 0; i < 300; i++)); do [ ! -s "$shm/uri" ] || break; sleep 0.1; done
head -c 1M /dev/urandom >"$shm/data"
nbdcopy "$shm/data" "$(cat "$shm/uri")"
nbdcopy "$(cat "$shm/uri")" - | cmp -n 1048576 - "$shm/data" || fail 'the server for arm64 returns something else'
kill $arm_pid
wait $arm_pid || fail "the server for arm64 ended with status $?"
$dir/cnbd-amd64 check --data "$shm/s" >/dev/null # the same format

say 'built again, elsewhere and from nothing: the same bytes'
mkdir "$tmp/again"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tmp/again"
(cd "$tmp/again" && GOCACHE=$tmp/cache GOFLAGS=-p=1 VERSION=$version SOURCE_DATE_EPOCH=$(cd "$OLDPWD" && scripts/epoch.sh) \
	ARCHES=amd64 scripts/package.sh >/dev/null)
for f in "${deb##*/}" "cnbd-$version-1.x86_64.rpm"; do
	cmp "$dir/$f" "$tmp/again/$dir/$f" || fail "$f is not the same again"
done

say 'install, remove, purge'
if [ ! -e $tree/etc/debian_version ]; then
	rm -rf $tree
	mmdebstrap --quiet --variant=minbase --include=systemd trixie $tree
fi
mount -t proc proc $tree/proc
trap 'umount $tree/proc; rm -rf "$tmp" "$shm"' EXIT
in_tree() { chroot $tree "$@"; }
package() { dpkg --root=$tree "$@" >"$tmp/dpkg" 2>&1 || { cat "$tmp/dpkg" >&2; fail "dpkg $*"; }; }
# systemd-analyze leaves the first of these in a tree where it is run for the first time.
files() { (cd $tree && find . -xdev ! -type d ! -path './run/systemd/systemd-units-load' ! -path './var/lib/dpkg/*' ! -path './var/log/*' ! -path './etc/*-' ! -path './etc/.pwd.lock' | sort); }
package --purge cnbd
rm -rf $tree/var/lib/cnbd $tree/etc/cnbd
before=$(files)
package -i "$deb"
[ "$(in_tree cnbd version)" = "cnbd $version ($(go env GOVERSION), linux/amd64)" ] || fail 'the installed program is not this one'
[ "$(in_tree stat -c '%U:%G %a' /var/lib/cnbd)" = 'cnbd:cnbd 700' ] || fail "/var/lib/cnbd is $(in_tree stat -c '%U:%G %a' /var/lib/cnbd)"
[ "$(in_tree stat -c '%U:%G %a' /etc/cnbd/cnbd.yaml)" = 'root:root 644' ] || fail 'wrong mode of the configuration'
! find $tree/etc/systemd -name '*cnbd*' | grep . || fail 'it enables a unit'
in_tree systemd-analyze verify --man=no /usr/lib/systemd/system/cnbd.service >"$tmp/verify" 2>&1 || { cat "$tmp/verify" >&2; fail 'the installed unit'; }
in_tree setpriv --reuid cnbd --regid cnbd --clear-groups cnbd create --size 64MiB /var/lib/cnbd/disk.cnbd
sum=$(sha256sum <$tree/var/lib/cnbd/disk.cnbd)
echo '# ours' >>$tree/etc/cnbd/cnbd.yaml
package -i "$deb" # as an upgrade does
grep -q '# ours' $tree/etc/cnbd/cnbd.yaml || fail 'an upgrade has lost the configuration'
package -r cnbd
[ ! -e $tree/usr/bin/cnbd ] && grep -q '# ours' $tree/etc/cnbd/cnbd.yaml || fail 'remove leaves the program, or takes the configuration'
package -P cnbd
[ "$sum" = "$(sha256sum <$tree/var/lib/cnbd/disk.cnbd)" ] || fail 'purge has touched a store'
same 'purge leaves (>), or takes (<)' "$before" "$(files | grep -v '^./var/lib/cnbd/disk.cnbd$')"
package -i "$deb"
[ "$(in_tree stat -c %U /var/lib/cnbd/disk.cnbd)" = cnbd ] || fail 'after a new install the store is not its own'
in_tree cnbd check --data /var/lib/cnbd/disk.cnbd >/dev/null
package -P cnbd
rm -rf $tree/var/lib/cnbd
say 'packages: passed'
