package config

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the documents that are generated")

// The documents that are generated from the code, and what makes each.
var documents = map[string]func(docs map[string]string) string{
	"../docs/configuration.md":   reference,
	"../docs/examples/cnbd.yaml": example,
}

// TestDocuments holds the documents to the settings: their names, defaults, and
// the comments of Config and Export.
func TestDocuments(t *testing.T) {
	docs := comments(t)
	for path, generate := range documents {
		want := generate(docs)
		if *update {
			if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s is not what the code says: go test ./config -run TestDocuments -update", path)
		}
	}
}

// TestCommentsTellDefaults: the comment of a setting names the default that holds.
func TestCommentsTellDefaults(t *testing.T) {
	docs := comments(t)
	for _, s := range allSettings() {
		if s.key == "exports" || s.key == "path" {
			continue // has none
		}
		value := s.defaultText()
		if value == `""` || value == "[]" {
			value = "empty"
		}
		value = strings.TrimSuffix(value, "s")
		if ok, _ := regexp.MatchString(`Default [^.]*`+regexp.QuoteMeta(value), docs[s.id]); !ok && value != "empty" {
			t.Errorf("%s has the default %s, its comment is: %s", s.id, value, docs[s.id])
		}
	}
}

// A setting is one key of the file.
type setting struct {
	id     string // of its field, such as Config.Cache
	key    string
	single string // name of the flag and the variable; empty if there is none
	field
}

func allSettings() (all []setting) {
	add := func(p any, of, single string) {
		v := reflect.TypeOf(p).Elem()
		i := 0
		for key, f := range settings(p, "key") {
			s := setting{of + "." + v.Field(i).Name, key, f.tag.Get(single), f}
			if key == "exports" {
				s.single = ""
			}
			all = append(all, s)
			i++
		}
	}
	add(Default(), "Config", "key")
	add(&Export{}, "Export", "single")
	return all
}

// defaultText is the default as it stands in the file.
func (s setting) defaultText() string {
	switch p := s.ptr.(type) {
	case *string:
		if *p == "" {
			return `""`
		}
	case *[]string, *[]Export:
		return "[]"
	case *time.Duration:
		text := strings.TrimSuffix(p.String(), "m0s")
		if text != p.String() {
			text += "m"
		}
		return text
	}
	return encode(s.ptr)
}

// comments are the comments of the fields of Config and Export as running text, in
// the words of a user: with keys for the names of fields.
func comments(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	constants, raw := map[string]string{}, map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			if len(n.Values) == 1 {
				if text, ok := n.Values[0].(*ast.BasicLit); ok {
					constants[n.Names[0].Name] = strings.Trim(text.Value, `"`)
				}
			}
		case *ast.TypeSpec:
			fields, ok := n.Type.(*ast.StructType)
			if !ok || n.Name.Name != "Config" && n.Name.Name != "Export" {
				return true
			}
			for _, f := range fields.Fields.List {
				for _, name := range f.Names {
					raw[n.Name.Name+"."+name.Name] = strings.Join(strings.Fields(f.Doc.Text()), " ")
				}
			}
		}
		return true
	})
	keys := map[string]string{}
	for _, s := range allSettings() {
		if raw[s.id] == "" {
			t.Errorf("%s has no comment", s.id)
		}
		of, name, _ := strings.Cut(s.id, ".")
		keys[of+" "+name] = "`" + s.key + "`"
	}
	docs := map[string]string{}
	for id, text := range raw {
		of, _, _ := strings.Cut(id, ".")
		text = regexp.MustCompile(` ?See \[[^\]]*\]\.`).ReplaceAllString(text, "") // of programmers
		text = regexp.MustCompile(`\[([A-Za-z]+)\]`).ReplaceAllStringFunc(text, func(link string) string {
			value, ok := constants[strings.Trim(link, "[]")]
			if !ok {
				t.Errorf("the comment of %s has %s, which is no constant here", id, link)
			}
			return "`" + value + "`"
		})
		first, rest, _ := strings.Cut(text, " ")
		docs[id] = keys[of+" "+first] + " " + regexp.MustCompile(`\b[A-Z][A-Za-z]*\b`).ReplaceAllStringFunc(rest, func(word string) string {
			if key := keys[of+" "+word]; key != "" && word != "TLS" { // the protocol
				return key
			}
			return word
		})
	}
	return docs
}

const generated = "Made from config/config.go by `go test ./config -run TestDocuments -update`"

// reference is docs/configuration.md.
func reference(docs map[string]string) string {
	var b strings.Builder
	b.WriteString(`<!-- ` + generated + ` -->
# Configuration

Every setting of ` + "`cnbd serve`" + ` is a key in a YAML file (` + "`--config FILE`" + `), a variable of the environment, and a flag. Flags win
over the environment, the environment over the file, and the file over the defaults. An unknown key is an error, and all
errors are reported at once. [examples/cnbd.yaml](examples/cnbd.yaml) is a file with all keys, to be filled in.

* A **size** is bytes, or a number and a unit: ` + "`KiB MiB GiB TiB` (or `K M G T`) are powers of 1024, `kB MB GB TB`" + ` of 1000.
* A **duration** is a number and a unit: ` + "`ms`, `s`, `m`, `h`" + `, or several: ` + "`1m30s`" + `.
* A **list** in a variable has commas between its entries; its flag is given again for each.

On SIGHUP a server that was started with a file reads it again. ` + "`log-level`" + ` changes at once; what else has changed is named in the
log and waits for a restart.

## Settings of the server
`)
	for _, s := range allSettings() {
		if s.id == "Export.Name" {
			b.WriteString("\n## Settings of an export\n\nIn the file they stand in an entry of the list `exports`. " +
				"On the command line, and in the\nenvironment, they describe the one export of the argument BACKING.\n")
		}
		kind := s.tag.Get("type")
		switch s.ptr.(type) {
		case *bool:
			kind = "true|false"
		case *[]string:
			kind = "list of " + strings.TrimPrefix(kind, "list of ")
		case *[]Export:
			kind = "list"
		}
		if kind == "" {
			kind = "path"
		}
		fmt.Fprintf(&b, "\n### %s\n\n*%s*", s.key, strings.ReplaceAll(kind, "|", " | "))
		if s.key != "exports" && s.key != "path" {
			fmt.Fprintf(&b, ", default `%s`", s.defaultText())
		}
		if s.single == backingKey {
			fmt.Fprintf(&b, ". On the command line the argument BACKING")
		} else if s.single != "" {
			fmt.Fprintf(&b, ". `--%s`, `%s`", s.single, EnvName(s.single))
		}
		fmt.Fprintf(&b, "\n\n%s\n", wrap(docs[s.id], "", 118))
	}
	return b.String()
}

// example is docs/examples/cnbd.yaml, in which every setting stands as a comment,
// `#key: default`, and every explanation as `# text`.
func example(docs map[string]string) string {
	var b strings.Builder
	b.WriteString(`# Configuration of "cnbd serve --config FILE".
#
# Every setting stands here with its default, as a comment "#key: value": take the # away
# and change the value. Each can also be given in the environment (cache: CNBD_CACHE) or
# as a flag (--cache), which win over this file, flags over the environment. An unknown
# key is an error.
#
# Sizes are bytes, or a number and a unit: KiB, MiB, GiB, TiB (or K, M, G, T) are powers of
# 1024; kB, MB, GB, TB are powers of 1000. Durations are a number and a unit: ms, s, m, h.
#
# ` + generated + `.
`)
	var server, export []setting
	for _, s := range allSettings() {
		switch {
		case strings.HasPrefix(s.id, "Export."):
			export = append(export, s)
		case s.key != "exports":
			server = append(server, s)
		}
	}
	plain := func(id string) string { return strings.ReplaceAll(docs[id], "`", "") }
	b.WriteString("\n" + wrap(plain("Config.Exports"), "# ", 88) + "\n#exports:\n")
	for i, s := range export {
		value, mark := s.defaultText(), "  "
		switch s.key {
		case "path":
			value = "/var/lib/cnbd/disk.cnbd"
		case "size":
			value = "100GiB"
		}
		if i == 0 {
			mark = "- "
		}
		b.WriteString("\n" + wrap(plain(s.id), "#    # ", 88) + "\n")
		fmt.Fprintf(&b, "#  %s%s: %s\n", mark, s.key, value)
	}
	for _, s := range server {
		b.WriteString("\n" + wrap(plain(s.id), "# ", 88) + "\n")
		fmt.Fprintf(&b, "#%s: %s\n", s.key, s.defaultText())
	}
	return b.String()
}

// filledIn is an example with its settings taken out of their comments.
func filledIn(example string) string {
	return regexp.MustCompile(`(?m)^#( {2,}|[a-z])`).ReplaceAllString(example, "$1")
}

// wrap breaks text into lines that begin with prefix and have at most width bytes.
func wrap(text, prefix string, width int) string {
	lines, line := []string{}, prefix
	for _, w := range strings.Fields(text) {
		if line != prefix && len(line)+1+len(w) > width {
			lines, line = append(lines, line), prefix
		}
		if line != prefix {
			line += " "
		}
		line += w
	}
	return strings.Join(append(lines, line), "\n")
}
