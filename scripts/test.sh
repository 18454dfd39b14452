#!/usr/bin/env bash
# The whole test run (make test). Checks, then stages of tests, whose events are
# kept in build/test/STAGE.json; then what failed, what was skipped and why, and
# the counts. A stage that fails does not keep the next from running.
#
#   STAGES            which stages, of: plain invariants race mutants fuzz
#   PACKAGES          which packages (./...)
#   FUZZTIME          time for each fuzz target (3s)
#   TEST_TIMEOUT      longest time for the tests of one package (10m)
#   CNBD_TEST_SCALE   multiplier of random, crash and stress counts (1)
#   CI=true           no cached results, and a missing tool is a failure
set -u
cd "$(dirname "$0")/.." || exit
PATH=$PATH:/usr/sbin:/sbin

stages=${STAGES:-plain invariants race mutants fuzz}
read -ra packages <<<"${PACKAGES:-./...}"
flags=(-timeout "${TEST_TIMEOUT:-10m}")
[ "${CI:-}" = true ] && flags+=(-count=1)

dir=build/test
rm -rf $dir && mkdir -p $dir || exit
go build -o build/testsummary ./scripts/testsummary || exit

say() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }

# check NAME COMMAND... counts the command as one test.
check() {
	local result=pass
	say "$1"
	"${@:2}" || result=fail
	build/testsummary add $dir/checks.json $result "$1"
}

# stage NAME COMMAND... shows and keeps the events that the command prints.
stage() {
	say "stage $1"
	"${@:2}" 2>&1 | build/testsummary watch "$dir/$1.json"
	local codes=("${PIPESTATUS[@]}")
	# The command can fail where no test does.
	[ "${codes[*]}" = '0 0' ] || grep -q '"Action":"fail"' "$dir/$1.json" || build/testsummary add "$dir/checks.json" fail "stage $1"
}

formatted() {
	local files
	files=$(gofmt -l .) || return
	[ -z "$files" ] && return
	printf 'not as gofmt has it:\n%s\n' "$files"
	false
}

shell_syntax() {
	local f
	for f in scripts/*.sh packaging/p{ost,re}* test/vm/guest/* .ci/run; do bash -n "$f" || return; done
}

check gofmt formatted
check vet go vet "${packages[@]}"
check staticcheck go tool staticcheck "${packages[@]}"
check 'shell syntax' shell_syntax

for s in $stages; do
	case $s in
	plain) stage plain go test -json "${flags[@]}" "${packages[@]}" ;;
	invariants) stage invariants go test -json -tags invariants "${flags[@]}" "${packages[@]}" ;;
	race)
		if command -v "$(go env CC)" >/dev/null; then
			CGO_ENABLED=1 stage race go test -json -race "${flags[@]}" "${packages[@]}"
		else
			build/testsummary add $dir/race.json skip race "MISSING TOOL: $(go env CC), for the race detector"
		fi
		;;
	# That the tests of crashes and damage find the mistakes of internal/mutant.
	mutants) stage mutants go test -json -tags mutant -run '^TestMutants$' "${flags[@]}" "${packages[@]}" ;;
	fuzz) FUZZ_JSON=1 stage fuzz scripts/fuzz.sh "${packages[@]}" ;;
	*) echo "no stage $s"; exit 2 ;;
	esac
done

say summary
build/testsummary total $dir/*.json
