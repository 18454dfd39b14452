#!/usr/bin/env bash
# Compares the benchmarks beside the code of a revision with those of the working
# tree, by benchstat: BASE (default HEAD), BENCH, PACKAGES, COUNT, BENCHTIME. The
# two take turns, so that what else the machine does hits both alike. See README.md.
set -eu
cd "$(dirname "$0")/.."
go=${GO:-go}
base=$(git rev-parse --verify --quiet "${BASE:-HEAD}^{commit}") || { echo "bench-compare: no revision ${BASE:-HEAD}"; exit 2; }
count=${COUNT:-6} benchtime=${BENCHTIME:-0.3s} bench=${BENCH:-.}
read -ra patterns <<<"${PACKAGES:-./...}"

dir=$(mktemp -d)
trap 'git worktree remove --force "$dir/tree" 2>/dev/null; rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
git worktree add --quiet --detach "$dir/tree" "$base"

# A test binary for each package of both that has benchmarks.
packages=()
for p in $($go list -f '{{.ImportPath}} {{.Dir}}' "${patterns[@]}" | tr ' ' '='); do
	path=${p%%=*} here=${p#*=}
	there=$dir/tree${here#"$PWD"}
	grep -qs '^func Benchmark' "$here"/*_test.go && grep -qs '^func Benchmark' "$there"/*_test.go || continue
	$go test -c -o "$dir/new${#packages[@]}" "$path"
	(cd "$dir/tree" && $go test -c -o "$dir/old${#packages[@]}" "$path")
	packages+=("$here")
done

for ((i = 0; i < count; i++)); do
	for ((p = 0; p < ${#packages[@]}; p++)); do
		order=(old new)
		((i % 2)) && order=(new old)
		for which in "${order[@]}"; do
			# A test's working directory is that of its package.
			home=${packages[p]}
			[ $which = new ] || home=$dir/tree${home#"$PWD"}
			(cd "$home" && "$dir/$which$p" -test.run '^$' -test.bench "$bench" -test.benchmem -test.benchtime "$benchtime") >"$dir/out" ||
				{ cat "$dir/out"; echo "bench-compare: the $which benchmarks of ${packages[p]#"$PWD"/} fail"; exit 1; }
			cat "$dir/out" >>"$dir/$which"
		done
	done
	echo "bench-compare: round $((i + 1)) of $count" >&2
done
$go tool -modfile=bench/tools.mod benchstat "${base:0:12}=$dir/old" "working tree=$dir/new"
