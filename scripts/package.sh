#!/usr/bin/env bash
# Builds cnbd_*.deb and cnbd-*.rpm for each of ARCHES in build/package, the same byte for
# byte wherever and whenever it is done (by one version of Go). nfpm is fetched as a Go
# module, whose contents packaging/tools.sum fixes.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}
export VERSION=${VERSION:-$(scripts/version.sh)}
export MAINTAINER=${MAINTAINER:-cnbd maintainers <maintainers@cnbd.invalid>}
SOURCE_DATE_EPOCH=$(scripts/epoch.sh)
export SOURCE_DATE_EPOCH
dir=build/package
umask 022 # modes are packaged as they are found

rm -rf $dir
mkdir -p $dir
scripts/pages.sh
for ARCH in ${ARCHES:-amd64 arm64}; do
	export ARCH ROOT=$dir/$ARCH
	GOOS=linux GOARCH=$ARCH CGO_ENABLED=0 $go build -trimpath -buildvcs=false \
		-ldflags "${LDFLAGS:--s -w} -X main.version=$VERSION" -o $dir/cnbd-$ARCH ./cmd/cnbd
	DESTDIR=$ROOT PREFIX=/usr BIN=$dir/cnbd-$ARCH scripts/install.sh
	# What Debian wants to know of every package.
	install -D -m 0644 packaging/copyright "$ROOT/debian/copyright"
	gzip -9nc CHANGELOG.md >"$ROOT/debian/changelog.gz"
	gzip -9nc >"$ROOT/debian/changelog.Debian.gz" <<-EOF
		cnbd ($VERSION-1) unstable; urgency=medium

		  * What has changed for users is in changelog.gz.

		 -- $MAINTAINER  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
	EOF
	for kind in rpm deb; do
		if [ $kind = deb ]; then # has a place of its own for zsh
			mkdir -p "$ROOT/usr/share/zsh/vendor-completions"
			mv "$ROOT/usr/share/zsh/site-functions/_cnbd" "$ROOT/usr/share/zsh/vendor-completions/"
			rmdir "$ROOT/usr/share/zsh/site-functions"
		fi
		find "$ROOT" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
		$go tool -modfile=packaging/tools.mod nfpm package --config packaging/nfpm.yaml --packager $kind --target $dir/ >/dev/null
	done
done
ls -l $dir/*.deb $dir/*.rpm
