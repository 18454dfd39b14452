#!/usr/bin/env bash
# Installs what `make build pages` has made below $DESTDIR$PREFIX, and a configuration
# in $DESTDIR$SYSCONFDIR/cnbd unless there is one. BIN is the program (bin/cnbd).
#
# On a system that runs, `systemd-sysusers && systemd-tmpfiles --create && systemctl
# daemon-reload` makes the rest.
set -eu
cd "$(dirname "$0")/.."
at=${DESTDIR:-}$PREFIX
etc=${DESTDIR:-}${SYSCONFDIR:-/etc}/cnbd

install -D -m 0755 "${BIN:-bin/cnbd}" "$at/bin/cnbd"
install -d "$at/share/man/man1"
install -m 0644 build/pages/man/*.gz "$at/share/man/man1"
install -D -m 0644 build/pages/completion/bash "$at/share/bash-completion/completions/cnbd"
install -D -m 0644 build/pages/completion/zsh "$at/share/zsh/site-functions/_cnbd"
install -D -m 0644 build/pages/completion/fish "$at/share/fish/vendor_completions.d/cnbd.fish"

# The units name the program, the documents and the configuration by where packages have them.
for unit in systemd/cnbd*.*; do
	install -D -m 0644 "$unit" "$at/lib/systemd/system/${unit##*/}"
	sed -i "s|/usr/bin/cnbd|$PREFIX/bin/cnbd|; s|/usr/share/doc|$PREFIX/share/doc|; s|/etc/cnbd|${SYSCONFDIR:-/etc}/cnbd|" "$at/lib/systemd/system/${unit##*/}"
done
install -D -m 0644 systemd/sysusers.d/cnbd.conf "$at/lib/sysusers.d/cnbd.conf"
install -D -m 0644 systemd/tmpfiles.d/cnbd.conf "$at/lib/tmpfiles.d/cnbd.conf"

install -d "$at/share/doc/cnbd/docs"
install -m 0644 README.md "$at/share/doc/cnbd"
cp -r --no-preserve=mode docs/. "$at/share/doc/cnbd/docs"
[ -e "$etc/cnbd.yaml" ] || install -D -m 0644 docs/examples/cnbd.yaml "$etc/cnbd.yaml"
