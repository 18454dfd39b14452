package lint

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestDependencies holds docs/dependencies.md to go.mod: each module that our
// code imports, and each tool, is a row of its tables, and no other is.
func TestDependencies(t *testing.T) {
	cmd := exec.Command("go", "mod", "edit", "-json")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go mod edit: %v", err)
	}
	var mod struct {
		Require []struct{ Path string }
		Tool    []struct{ Path string }
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	moduleOf := func(importPath string) string {
		longest := ""
		for _, r := range mod.Require {
			if (importPath == r.Path || strings.HasPrefix(importPath, r.Path+"/")) && len(r.Path) > len(longest) {
				longest = r.Path
			}
		}
		return longest
	}
	used := map[string]bool{}
	for _, p := range list(t) {
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if m := moduleOf(i); m != "" {
				used[m] = true
			}
		}
	}
	for _, tool := range mod.Tool {
		used[moduleOf(tool.Path)] = true
	}

	doc, err := os.ReadFile(filepath.Join(root(t), "docs/dependencies.md"))
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllSubmatch(doc, -1) {
		named[string(row[1])] = true
	}
	for m := range used {
		if !named[m] {
			t.Errorf("docs/dependencies.md has no row for %s", m)
		}
	}
	for m := range named {
		if !used[m] {
			t.Errorf("docs/dependencies.md has a row for %s, which nothing uses", m)
		}
	}
}

// places are strings that tell of a machine of ours and mean nothing on
// another. They are put together so that this file has none.
var places = []string{"/" + "work/", "GO" + "PROXY", "proxy." + "golang", "registry." + "npmjs", "deb." + "debian"}

func TestNoMachinePlaces(t *testing.T) {
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = root(t)
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("not a checkout of git: %v", err)
	}
	files := strings.FieldsFunc(string(out), func(r rune) bool { return r == 0 })
	if !slices.Contains(files, "go.mod") {
		t.Fatalf("git lists %d files and no go.mod", len(files))
	}
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(root(t), f))
		if err != nil {
			if os.IsNotExist(err) {
				continue // deleted, not yet committed
			}
			t.Error(err)
		}
		for _, p := range places {
			if i := bytes.Index(data, []byte(p)); i >= 0 {
				t.Errorf("%s:%d has %q", f, 1+bytes.Count(data[:i], []byte("\n")), p)
			}
		}
	}
}
