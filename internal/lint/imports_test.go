package lint

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "cnbd"

// leaves are the packages that may be imported by all that hold data. Among
// themselves they import only those of base.
var leaves = []string{"internal/block", "internal/buffer", "internal/compression", "internal/disk", "internal/invariants", "internal/mutant", "metrics"}

// base are the leaves of the leaves.
var base = []string{"internal/block", "internal/invariants", "internal/mutant"}

// all stands for every package but those for tests.
var all = []string{"*"}

// allowed is the package map: for each package, those of ours that it may
// import. Data goes one way, so imports do. A package that is not here fails the
// test: give it its place first.
var allowed = map[string][]string{
	"cmd/cnbd":       all,
	"bench":          all,
	"bench/churn":    all,
	"bench/extents":  all,
	"bench/loop":     nil,
	"bench/pipeline": nil,

	"export": {"device", "nbd"},

	"device":    and(leaves, "asyncq", "delalloc", "extents", "pagecache", "store"),
	"delalloc":  and(leaves, "asyncq", "extents"),
	"store":     and(leaves, "extents"),
	"nbd":       leaves,
	"pagecache": leaves,
	"asyncq":    leaves,
	"extents":   leaves,

	"internal/picture":  nil,                                                 // for cmd/cnbd alone
	"internal/transfer": {"nbd"},                                             // for cmd/cnbd alone
	"internal/estimate": {"internal/block", "internal/compression", "store"}, // for cmd/cnbd alone
	"internal/monitor":  {"device", "internal/block", "nbd", "store"},        // for cmd/cnbd alone

	"internal/buffer":      base,
	"internal/compression": base,
	"internal/disk":        base,
	"internal/control":     nil, // for cmd/cnbd alone: leaves does not have it
	"internal/nbdkernel":   nil, // likewise
	"internal/block":       nil,
	"internal/invariants":  nil,
	"internal/mutant":      nil,
	"metrics":              nil,
	"config":               nil,

	"internal/certtest":   nil,
	"internal/disktest":   leaves,
	"internal/lint":       nil,
	"test/vm":             nil,
	"scripts/testsummary": nil,
}

// forTests are the packages that only tests import.
var forTests = []string{"internal/certtest", "internal/disktest"}

func and(list []string, more ...string) []string { return append(slices.Clone(list), more...) }

// listed is what go list tells of a package.
type listed struct {
	ImportPath string
	Imports    []string
	// Of the tests inside the package and of those in package foo_test.
	TestImports, XTestImports []string
}

// list runs go list over the module.
func list(t *testing.T, args ...string) []listed {
	t.Helper()
	args = append([]string{"list", "-e", "-json=ImportPath,Imports,TestImports,XTestImports"}, args...)
	cmd := exec.Command("go", append(args, "./...")...)
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	var ps []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := d.Decode(&p); err == io.EOF {
			return ps
		} else if err != nil {
			t.Fatal(err)
		}
		ps = append(ps, p)
	}
}

// root is the directory of the module.
func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// ours is the path of a package of ours below the module.
func ours(importPath string) (string, bool) {
	if importPath == module {
		return ".", true
	}
	return strings.CutPrefix(importPath, module+"/")
}

func TestImports(t *testing.T) {
	for _, tags := range []string{"", "invariants"} {
		ps := list(t, "-tags="+tags)
		if len(ps) < 5 {
			t.Fatalf("go list finds %d packages", len(ps))
		}
		for _, p := range ps {
			for _, fault := range importFaults(p) {
				t.Errorf("tags %q: %s", tags, fault)
			}
		}
	}
}

// importFaults are the imports of p that the package map does not allow.
func importFaults(p listed) (faults []string) {
	from, _ := ours(p.ImportPath)
	may, known := allowed[from]
	if !known {
		return []string{from + " is not in the package map of internal/lint"}
	}
	judge := func(importPath string, inTest bool) {
		to, isOurs := ours(importPath)
		fault := ""
		switch {
		case !isOurs && inTest:
		case !isOurs:
			if (to == "testing" || strings.HasPrefix(to, "testing/")) && !slices.Contains(forTests, from) {
				fault = "outside tests"
			} else if to == "C" {
				fault = "but the program is built without cgo"
			}
		case slices.Contains(forTests, to):
			if !inTest {
				fault = "outside tests"
			}
		case to == from && inTest:
		case !slices.Contains(may, to) && !slices.Equal(may, all):
			fault = "against the package map"
		}
		if fault != "" {
			faults = append(faults, from+" imports "+to+", "+fault)
		}
	}
	for _, i := range p.Imports {
		judge(i, false)
	}
	for _, i := range slices.Concat(p.TestImports, p.XTestImports) {
		judge(i, true)
	}
	return faults
}

// TestImportFaults checks that the check itself sees what it is for.
func TestImportFaults(t *testing.T) {
	for _, tc := range []struct {
		from, imports, testImports string
		want                       string // part of the one fault; empty for none
	}{
		{"nbd", "cnbd/internal/block", "", ""},
		{"nbd", "golang.org/x/sys/unix", "testing", ""},
		{"nbd", "cnbd/pagecache", "", "nbd imports pagecache, against"},
		{"nbd", "", "cnbd/pagecache", "nbd imports pagecache, against"},
		{"nbd", "", "cnbd/nbd", ""},
		{"asyncq", "cnbd/extents", "", "asyncq imports extents"},
		{"delalloc", "cnbd/asyncq", "", ""},
		{"delalloc", "cnbd/store", "", "delalloc imports store"},
		{"store", "cnbd/extents", "cnbd/internal/disktest", ""},
		{"store", "cnbd/internal/disktest", "", "outside tests"},
		{"store", "testing", "", "outside tests"},
		{"store", "testing/iotest", "", "outside tests"},
		{"store", "C", "", "without cgo"},
		{"device", "cnbd/nbd", "", "device imports nbd"},
		{"cmd/cnbd", "cnbd/nbd", "", ""},
		{"cmd/cnbd", "cnbd/internal/control", "", ""},
		{"device", "cnbd/internal/control", "", "device imports internal/control"},
		{"cmd/cnbd", "cnbd/internal/disktest", "", "outside tests"},
		{"config", "cnbd/internal/block", "", "config imports internal/block"},
		{"metrics", "cnbd/internal/invariants", "", "metrics imports internal/invariants"},
		{"internal/buffer", "cnbd/internal/invariants", "", ""},
		{"internal/buffer", "cnbd/metrics", "", "internal/buffer imports metrics"},
		{"internal/disktest", "testing", "", ""},
		{"util", "", "", "util is not in the package map"},
	} {
		p := listed{ImportPath: module + "/" + tc.from}
		if tc.imports != "" {
			p.Imports = []string{tc.imports}
		}
		if tc.testImports != "" {
			p.XTestImports = []string{tc.testImports}
		}
		got := strings.Join(importFaults(p), "; ")
		if (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
			t.Errorf("%s with %s %s: %q, want %q", tc.from, tc.imports, tc.testImports, got, tc.want)
		}
	}
}
