#!/usr/bin/env bash
# Makes the man pages and the completions of shells in build/pages. The program writes
# them, built for this machine.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}
version=${VERSION:-$(scripts/version.sh)}
dir=build/pages
rm -rf $dir
mkdir -p $dir/man $dir/completion
GOOS='' GOARCH='' CGO_ENABLED=0 $go build -tags pages -ldflags "-X main.version=$version" -o $dir/cnbd ./cmd/cnbd
$dir/cnbd pages --date "$(date -u -d "@$(scripts/epoch.sh)" +%Y-%m-%d)" $dir/man
for shell in bash zsh fish; do
	$dir/cnbd completion $shell >$dir/completion/$shell
done
gzip -9n $dir/man/*.1
rm $dir/cnbd
