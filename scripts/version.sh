#!/usr/bin/env bash
# Prints the version of the source: that of the tag, 1.2.3; behind one, 1.2.3+4.gabcdef; with
# no tag, 0.0.0+20060102.gabcdef. It is one that Debian and RPM understand.
cd "$(dirname "$0")/.." || exit
if v=$(git describe --tags --match 'v[0-9]*' 2>/dev/null); then
	v=$(sed -E 's/^v//; s/-([0-9]+)-g([0-9a-f]+)$/+\1.g\2/; s/-/~/g' <<<"$v")
elif v=$(git show -s --format=%cd.g%h --date=format:%Y%m%d 2>/dev/null); then
	v=0.0.0+$v
else
	v=0.0.0+unknown
fi
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || v=$v.dirty
echo "$v"
