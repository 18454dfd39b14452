#!/usr/bin/env bash
# Runs every fuzz target of the packages given (all of them by default) for
# FUZZTIME each (3s), with the events of go test -json if FUZZ_JSON is set. A failing input is kept
# in testdata/fuzz of its package, where every later test run tries it.
set -u
cd "$(dirname "$0")/.." || exit
(($#)) || set -- ./...

status=0 names=()
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# fuzz PACKAGE NAME. Go up to 1.26 may fail a target when its time is up, with nothing
# found, on a machine that is busy (golang/go#75804): that alone is tried again.
fuzz() {
	local try
	for try in 1 2 3; do
		# Minimizing what is merely interesting would eat the time of a short run.
		go test ${FUZZ_JSON:+-json} -run '^$' -fuzz "^$2\$" -fuzztime "${FUZZTIME:-3s}" -fuzzminimizetime 20x "$1" >"$out" 2>&1
		local failed=$?
		if ((failed)) && ((try < 3)) && grep -q '    context deadline exceeded' "$out" && ! grep -q 'testdata/fuzz' "$out"; then
			continue
		fi
		cat "$out"
		return $failed
	done
}

list=$(go test -list '^Fuzz' "$@") || { printf '%s\n' "$list"; status=1; }
# The list is the names of a package, then "ok PACKAGE TIME".
while read -r word package _; do
	case $word in
	Fuzz*) names+=("$word") ;;
	ok)
		for name in "${names[@]}"; do
			fuzz "$package" "$name" || status=1
		done
		names=()
		;;
	esac
done <<<"$list"
exit $status
