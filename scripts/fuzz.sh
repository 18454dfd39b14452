#!/usr/bin/env bash
# Runs every fuzz target of the packages given (all of them by default) for
# FUZZTIME each (3s), with the events of go test -json if FUZZ_JSON is set. A failing input is kept
# in testdata/fuzz of its package, where every later test run tries it.
set -u
cd "$(dirname "$0")/.." || exit
(($#)) || set -- ./...

status=0 names=()
list=$(go test -list '^Fuzz' "$@") || { printf '%s\n' "$list"; status=1; }
# The list is the names of a package, then "ok PACKAGE TIME".
while read -r word package _; do
	case $word in
	Fuzz*) names+=("$word") ;;
	ok)
		for name in "${names[@]}"; do
			# Minimizing what is merely interesting would eat the time of a short run.
			go test ${FUZZ_JSON:+-json} -run '^$' -fuzz "^$name\$" -fuzztime "${FUZZTIME:-3s}" -fuzzminimizetime 20x "$package" || status=1
		done
		names=()
		;;
	esac
done <<<"$list"
exit $status
