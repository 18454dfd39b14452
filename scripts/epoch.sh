#!/usr/bin/env bash
# Prints SOURCE_DATE_EPOCH: the time of the last commit, or, without git, of the changelog.
cd "$(dirname "$0")/.." || exit
echo "${SOURCE_DATE_EPOCH:-$(git show -s --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}"
