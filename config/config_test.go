package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// write puts a configuration file into a directory of the test's.
func write(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cnbd.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// commandLine are the flags of a server, parsed.
func commandLine(t testing.TB, args ...string) *pflag.FlagSet {
	t.Helper()
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return fs
}

// faultsOf are the faults joined in err, by key.
func faultsOf(t testing.TB, err error) map[string]*Fault {
	t.Helper()
	got := map[string]*Fault{}
	if err == nil {
		return got
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("error of type %T, want joined faults: %v", err, err)
	}
	for _, e := range joined.Unwrap() {
		var f *Fault
		if !errors.As(e, &f) {
			t.Fatalf("%v is no Fault", e)
		}
		if got[f.Key] != nil {
			t.Errorf("two faults for %s: %v and %v", f.Key, got[f.Key], f)
		}
		got[f.Key] = f
	}
	return got
}

// wantFaults checks that err has just these faults: of each, by key, a part of
// its text.
func wantFaults(t testing.TB, err error, want map[string]string) {
	t.Helper()
	got := faultsOf(t, err)
	for key, text := range want {
		if f := got[key]; f == nil {
			t.Errorf("no fault for %s, want %q", key, text)
		} else if !strings.Contains(f.Error(), text) {
			t.Errorf("fault of %s is %q, want %q in it", key, f, text)
		}
		delete(got, key)
	}
	for _, f := range got {
		t.Errorf("unexpected fault, key %s: %v", f.Key, f)
	}
}

// TestExampleIsDefault holds docs/examples/cnbd.yaml to its word: as it is it sets
// nothing, and filled in, it has every key with its default.
func TestExampleIsDefault(t *testing.T) {
	text, err := os.ReadFile("../docs/examples/cnbd.yaml")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cnbd.yaml")
	load := func(text string) (*Config, error) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Load(file, nil)
	}
	_, err = load(string(text))
	wantFaults(t, err, map[string]string{"exports": "none"})

	got, err := load(filledIn(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Exports = []Export{{Path: "/var/lib/cnbd/disk.cnbd", Size: 100 * GiB, Allow: []string{}}}
	want.Listen = []string{} // written as []
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the example is\n%+v, the defaults are\n%+v", got, want)
	}
}

func TestDefault(t *testing.T) {
	c := Default()
	c.Exports = []Export{{Path: "disk"}}
	if err := c.Validate(); err != nil {
		t.Errorf("the defaults are invalid: %v", err)
	}
	if c.DirtyLimit() != 128*MiB || c.BackgroundLimit() != 32*MiB {
		t.Errorf("limits are %v, %v; want half and an eighth of 256MiB", c.DirtyLimit(), c.BackgroundLimit())
	}
	if n := c.WorkerCount(); n < 1 || n > 8 {
		t.Errorf("%d workers, want 1 to 8", n)
	}

	c.DirtyMax = 16 * MiB
	if c.DirtyLimit() != 16*MiB || c.BackgroundLimit() != 4*MiB {
		t.Errorf("with dirty-max 16MiB the limits are %v, %v", c.DirtyLimit(), c.BackgroundLimit())
	}
	c.Background, c.Workers = 3*MiB, 5
	if c.BackgroundLimit() != 3*MiB || c.WorkerCount() != 5 {
		t.Errorf("background 3MiB and workers 5 become %v and %d", c.BackgroundLimit(), c.WorkerCount())
	}
}

// TestFlagDefaults checks that a flag's help shows the default that holds, and
// that giving it changes nothing.
func TestFlagDefaults(t *testing.T) {
	args := []string{"disk"}
	commandLine(t).VisitAll(func(f *pflag.Flag) {
		if f.Value.Type() != "stringArray" { // no text form of none
			args = append(args, "--"+f.Name+"="+f.DefValue)
		}
		if f.Usage == "" {
			t.Errorf("--%s has no help", f.Name)
		}
	})
	got, err := Load("", commandLine(t, args...))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Exports = []Export{{Path: "disk"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}

// TestSources gives each setting a value of its own in the file, the
// environment and the flags, and takes the sources away from the highest down.
func TestSources(t *testing.T) {
	type values struct{ file, env, flag string }
	given := map[string]values{
		"listen":              {"unix:/f,unix:/g", "unix:/e,unix:/h", "unix:/c"},
		"socket-mode":         {"0660", "0666", "0777"},
		"allow-plaintext":     {"true", "false", "true"},
		"socket-owner":        {"root", "1000", "nbd"},
		"socket-group":        {"disk", "6", "nbd"},
		"exit-with-parent":    {"true", "false", "true"},
		"tls":                 {"on", "require", "off"},
		"tls-certificates":    {"/file", "/env", "/flag"},
		"tls-verify-peer":     {"false", "true", "false"},
		"default-export":      {"file", "env", "flag"},
		"list-exports":        {"false", "true", "false"},
		"stall-timeout":       {"11s", "12s", "14s"},
		"idle-timeout":        {"1h0m0s", "2h0m0s", "3h0m0s"},
		"busy-poll":           {"10µs", "20µs", "30µs"},
		"cache":               {"100MiB", "200MiB", "300MiB"},
		"dirty-max":           {"10MiB", "20MiB", "30MiB"},
		"background":          {"1MiB", "2MiB", "3MiB"},
		"payload":             {"70MiB", "80MiB", "90MiB"},
		"map-cache":           {"4MiB", "5MiB", "6MiB"},
		"extent":              {"32KiB", "128KiB", "64KiB"},
		"workers":             {"1", "2", "3"},
		"commit-interval":     {"1s", "2s", "3s"},
		"checkpoint-interval": {"32MiB", "64MiB", "128MiB"},
		"writeback-period":    {"1s", "2s", "3s"},
		"writeback-expire":    {"10s", "20s", "35s"},
		"handshake-timeout":   {"11s", "12s", "13s"},
		"connections-max":     {"10", "20", "30"},
		"requests-max":        {"11", "21", "31"},
		"io-flusher":          {"false", "true", "false"},
		"lock-memory":         {"false", "true", "false"},
		"oom-score-adjust":    {"-1000", "-500", "0"},
		"log-level":           {"warn", "error", "debug"},
		"log-format":          {"json", "console", "auto"},
		"metrics":             {"tcp:127.0.0.1:1", "unix:/m", "tcp::2"},
		"pprof":               {"true", "false", "true"},
	}
	var file strings.Builder
	var args []string
	for key, v := range given {
		if key == "listen" {
			v.file = "[\"" + strings.ReplaceAll(v.file, ",", "\", \"") + "\"]"
		}
		file.WriteString(key + ": " + v.file + "\n")
		args = append(args, "--"+key+"="+v.flag)
	}
	file.WriteString("exports: [{path: a, name: file}, {path: b, name: env}, {path: c, name: flag}]\n")
	path := write(t, file.String())

	check := func(source string, flags *pflag.FlagSet, pick func(values) string) {
		got, err := Load(path, flags)
		if err != nil {
			t.Fatalf("%s: %v", source, err)
		}
		for key, f := range settings(got, "key") {
			if key == "exports" {
				continue
			}
			v, ok := given[key]
			if !ok {
				t.Errorf("the test lacks %s", key)
				continue
			}
			text := encode(f.ptr)
			if list, ok := f.ptr.(*[]string); ok {
				text = strings.Join(*list, ",")
			}
			if d, ok := f.ptr.(*time.Duration); ok {
				text = d.String()
			}
			if text != pick(v) {
				t.Errorf("%s: %s is %s, want %s", source, key, text, pick(v))
			}
		}
	}
	check("file", commandLine(t), func(v values) string { return v.file })
	check("file without flags", nil, func(v values) string { return v.file })
	for key, v := range given {
		t.Setenv(EnvName(key), v.env)
	}
	check("environment", commandLine(t), func(v values) string { return v.env })
	check("flags", commandLine(t, args...), func(v values) string { return v.flag })
}

// TestOneExport checks that a BACKING with flags, one with variables, and a
// list of one in a file are the same configuration.
func TestOneExport(t *testing.T) {
	want := Default()
	want.Exports = []Export{{Name: "vm", Path: "/srv/vm.cnbd", Size: 10 * GiB, Capacity: 4 * GiB,
		Codec: "zstd", Level: 3, Recompress: "zstd:best", ReadOnly: true, Description: "a, b", Lazy: true, ConnectionsMax: 3, Allow: []string{"alice", "bob"}}}
	want.TLS, want.TLSCertificates = TLSOn, "/certs"
	check := func(source string, got *Config, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", source, err)
		} else if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got\n%+v, want\n%+v", source, got, want)
		}
	}

	got, err := Load("", commandLine(t, "--export", "vm", "--size", "10G", "--capacity", "4GiB", "--codec=zstd",
		"--level=3", "--recompress=zstd:best", "--read-only", "/srv/vm.cnbd", "--description", "a, b", "--lazy", "--export-connections-max=3",
		"--allow=alice", "--allow=bob", "--tls=on", "--tls-certificates=/certs"))
	check("flags", got, err)
	got, err = Load(write(t, `
exports:
  - {name: vm, path: /srv/vm.cnbd, size: 10737418240, capacity: 4 GiB, codec: zstd, level: 3, recompress: "zstd:best", read-only: true, description: "a, b",
     lazy: true, connections-max: 3, allow: [alice, bob]}
tls: on
tls-certificates: /certs
`), commandLine(t))
	check("file", got, err)
	for key, v := range map[string]string{"export": "vm", "backing": "/srv/vm.cnbd", "size": "10GiB", "capacity": "4GiB",
		"codec": "zstd", "level": "3", "recompress": "zstd:best", "read-only": "true", "description": "a, b", "lazy": "true", "export-connections-max": "3",
		"allow": "alice, bob", "tls": "on", "tls-certificates": "/certs"} {
		t.Setenv(EnvName(key), v)
	}
	got, err = Load("", commandLine(t))
	check("environment", got, err)
	t.Setenv("CNBD_BACKING", "/elsewhere")
	t.Setenv("CNBD_LEVEL", "1")
	got, err = Load("", commandLine(t, "--level", "3", "/srv/vm.cnbd"))
	check("flags over environment", got, err)
}

func TestManyExports(t *testing.T) {
	got, err := Load(write(t, `
exports:
  - path: a
  - name: b
    path: b
    size: 4097
    level: 2
`), commandLine(t, "--cache", "1GiB"))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Cache = GiB
	want.Exports = []Export{{Path: "a"}, {Name: "b", Path: "b", Size: 4097, Level: 2}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v, want\n%+v", got, want)
	}
}

// TestFaultsTogether gives many wrong values from all sources and wants all of
// them reported, each with key and place, and nothing else.
func TestFaultsTogether(t *testing.T) {
	path := write(t, `
cache: 10XB
cahce: 1GiB
Payload: 64MiB
map_cache:
nested: {}
workers: 1.5
tls: true
log-level: loud
commit-interval: 5
listen: [1, 2]
socket-mode: 600
exports:
  - {path: a, szie: 1}
  - {path: ./a, name: "x\ny", size: 1.5, codec: lz4, level: 9}
  - oops
  - {codec: s2, level: 4, read-only: maybe}
  - {path: c, codec: none, level: 1, description: 5, recompress: "zstd:9"}
`)
	t.Setenv("CNBD_HANDSHAKE_TIMEOUT", "soon")
	t.Setenv("CNBD_WRITEBACK_PERIOD", "1ms")
	_, err := Load(path, commandLine(t, "--payload", "1KiB", "--extent=48K", "--requests-max=x"))
	wantFaults(t, err, map[string]string{
		"cache":                  path + `: cache: "10XB" is not a size`,
		"cahce":                  path + ": cahce: unknown key",
		"Payload":                path + ": Payload: unknown key, the name is payload",
		"map_cache":              path + ": map_cache: unknown key, the name is map-cache",
		"nested":                 path + ": nested: unknown key",
		"workers":                path + ": workers: 1.5 is not a whole number",
		"tls":                    path + ": tls: true is not text",
		"log-level":              path + ": log-level: loud is not allowed: give one of trace, debug, info, warn, error",
		"commit-interval":        path + ": commit-interval: 5 is not a duration",
		"listen":                 path + ": listen: 1 is not text",
		"socket-mode":            path + ": socket-mode: 1130 is out of range",
		"exports[0].szie":        path + ": exports[0].szie: unknown key",
		"exports[1].path":        path + ": exports[1].path: a is the path of exports[0] too",
		"exports[1].name":        "control characters",
		"exports[1].size":        "1.5 has no unit",
		"exports[1].codec":       "lz4 is not allowed: give one of auto, zstd, s2, none",
		"exports[1].level":       "9 is out of range: give 0 to 4",
		"exports[2]":             "an entry with a path is expected",
		"exports[3].name":        "is the name of exports[0] too",
		"exports[3].path":        "needed",
		"exports[3].level":       "4 is out of range: give 0 to 2",
		"exports[3].read-only":   "maybe is neither true nor false",
		"exports[4].name":        "is the name of exports[0] too",
		"exports[4].level":       "1 with codec none, which has no levels",
		"exports[4].recompress":  "zstd:9 is not allowed: give one of auto, off, zstd:fastest",
		"exports[4].description": "5 is not text",
		"handshake-timeout":      "CNBD_HANDSHAKE_TIMEOUT: soon is not a duration",
		"writeback-period":       "CNBD_WRITEBACK_PERIOD: 1ms is out of range: give 10ms to 1h0m0s",
		"payload":                "--payload: 1KiB is out of range: give 64MiB to",
		"extent":                 "--extent: 48KiB is not allowed: give one of 32KiB, 64KiB, 128KiB",
		"requests-max":           "--requests-max: x is not a whole number",
	})
}

// TestEveryKey has a row for each key: its default, and a value that is refused.
func TestEveryKey(t *testing.T) {
	rows := map[string]struct {
		value string // the default, as it stands in a file
		bad   string // as it stands there
		fault string // a part of it
		more  string // keys that it takes for bad to be wrong, in front
	}{
		"exports":             {value: "[]", bad: "[]", fault: "none: name a BACKING"},
		"listen":              {value: "[]", bad: "[localhost]", fault: `"localhost" is not an address`},
		"socket-mode":         {value: "0600", bad: "0444", fault: "0444 is out of range: give 0600 to 0777"},
		"socket-owner":        {value: `""`, bad: "a:b", fault: `"a:b" is not a name or a number`},
		"socket-group":        {value: `""`, bad: "a b", fault: `"a b" is not a name or a number`},
		"exit-with-parent":    {value: "false", bad: "never", fault: "never is neither true nor false"},
		"allow-plaintext":     {value: "false", bad: "2", fault: "2 is neither true nor false"},
		"tls":                 {value: "off", bad: "maybe", fault: "maybe is not allowed: give one of off, on, require"},
		"tls-certificates":    {value: `""`, bad: `""`, fault: "needed with tls on", more: "tls: on"},
		"tls-verify-peer":     {value: "true", bad: "perhaps", fault: "perhaps is neither true nor false"},
		"default-export":      {value: `""`, bad: "x", fault: `"x" is the name of no export`},
		"list-exports":        {value: "true", bad: "maybe", fault: "maybe is neither true nor false"},
		"cache":               {value: "256MiB", bad: "1MiB", fault: "1MiB is out of range: give 16MiB to"},
		"dirty-max":           {value: "0", bad: "200MiB", fault: "200MiB is out of range: give 4MiB to 192MiB"},
		"background":          {value: "0", bad: "97MiB", fault: "97MiB is out of range: give 0 to 96MiB"},
		"payload":             {value: "64MiB", bad: "32MiB", fault: "32MiB is out of range: give 64MiB to"},
		"map-cache":           {value: "32MiB", bad: "1KiB", fault: "1KiB is out of range: give 1MiB to"},
		"extent":              {value: "0", bad: "16KiB", fault: "16KiB is not allowed: give one of 32KiB, 64KiB, 128KiB"},
		"workers":             {value: "0", bad: "257", fault: "257 is out of range: give 0 to 256"},
		"commit-interval":     {value: "5s", bad: "1ms", fault: "1ms is out of range: give 10ms to 1h0m0s"},
		"checkpoint-interval": {value: "256MiB", bad: "8MiB", fault: "8MiB is out of range: give 16MiB to 64GiB"},
		"writeback-period":    {value: "5s", bad: "2h", fault: "2h0m0s is out of range: give 10ms to 1h0m0s"},
		"writeback-expire":    {value: "30s", bad: "25h", fault: "25h0m0s is out of range: give 10ms to 24h0m0s"},
		"handshake-timeout":   {value: "10s", bad: "10ms", fault: "10ms is out of range: give 100ms to 10m0s"},
		"stall-timeout":       {value: "5m", bad: "10ms", fault: "10ms is out of range: give 1s to 24h0m0s"},
		"idle-timeout":        {value: "0s", bad: "-1s", fault: "-1s is out of range: give 0s to 8760h0m0s"},
		"connections-max":     {value: "128", bad: "0", fault: "0 is out of range: give 1 to 65536"},
		"requests-max":        {value: "128", bad: "4097", fault: "4097 is out of range: give 1 to 4096"},
		"busy-poll":           {value: "50µs", bad: "2ms", fault: "2ms is out of range: give 0s to 1ms"},
		"io-flusher":          {value: "true", bad: "2", fault: "2 is neither true nor false"},
		"lock-memory":         {value: "true", bad: "[no]", fault: "neither true nor false"},
		"oom-score-adjust":    {value: "-999", bad: "-1001", fault: "-1001 is out of range: give -1000 to 0"},
		"log-level":           {value: "info", bad: "loud", fault: "loud is not allowed: give one of trace, debug, info, warn, error"},
		"log-format":          {value: "auto", bad: "xml", fault: "xml is not allowed: give one of auto, json, console"},
		"metrics":             {value: `""`, bad: "tcp:localhost", fault: "has no port"},
		"pprof":               {value: "false", bad: "true", fault: "metrics has no address"},

		"exports[0].name":            {value: `""`, bad: `"a\nb"`, fault: "has control characters"},
		"exports[0].path":            {value: `""`, bad: `""`, fault: "needed: the file or block device"},
		"exports[0].size":            {value: "0", bad: "8EiB", fault: "8EiB is out of range: give 0 to"},
		"exports[0].capacity":        {value: "0", bad: "1.5", fault: "1.5 has no unit"},
		"exports[0].codec":           {value: `""`, bad: "lz4", fault: "lz4 is not allowed: give one of auto, zstd, s2, none"},
		"exports[0].level":           {value: "0", bad: "5", fault: "5 is out of range: give 0 to 4"},
		"exports[0].recompress":      {value: `""`, bad: `"zstd:9"`, fault: "zstd:9 is not allowed: give one of auto, off, zstd:fastest"},
		"exports[0].lazy":            {value: "false", bad: "x", fault: "x is neither true nor false"},
		"exports[0].allow":           {value: "[]", bad: "[alice]", fault: "clients are known by their certificates only"},
		"exports[0].connections-max": {value: "0", bad: "65537", fault: "65537 is out of range: give 0 to 65536"},
		"exports[0].read-only":       {value: "false", bad: "maybe", fault: "maybe is neither true nor false"},
		"exports[0].description":     {value: `""`, bad: "5", fault: "5 is not text"},
	}
	for _, s := range allSettings() {
		key, format := s.key, "%s: %s\n"
		switch {
		case strings.HasPrefix(s.id, "Export."):
			key = exportKey(0, key)
			format = "exports: [{path: disk, %s: %s}]\n"
			if s.key == "path" {
				format = "exports: [{%s: %s}]\n"
			}
		case key != "exports":
			format += "exports: [{path: disk}]\n"
		}
		row, ok := rows[key]
		if !ok {
			t.Errorf("the table lacks %s", key)
			continue
		}
		delete(rows, key)
		if got := s.defaultText(); got != row.value {
			t.Errorf("the default of %s is %s, want %s", key, got, row.value)
		}
		_, err := Load(write(t, row.more+"\n"+fmt.Sprintf(format, s.key, row.bad)), nil)
		wantFaults(t, err, map[string]string{key: row.fault})
	}
	for key := range rows {
		t.Errorf("%s is no key", key)
	}
}

// TestRefused are configurations with one fault each, or a few that belong
// together.
func TestRefused(t *testing.T) {
	const other = "can be reached by other hosts"
	for name, tc := range map[string]struct {
		file string
		args []string
		want map[string]string
	}{
		"nothing":       {"", nil, map[string]string{"exports": "none: name a BACKING"}},
		"empty list":    {"exports: []", nil, map[string]string{"exports": "none: name a BACKING"}},
		"no list":       {"exports: disk", nil, map[string]string{"exports": "a list is expected"}},
		"list and one":  {"exports: [{path: a}]", []string{"b"}, map[string]string{"exports": "listed in the file, and BACKING b is given too"}},
		"list and size": {"exports: [{path: a}]", []string{"--size", "1G"}, map[string]string{"size": "--size: describes the export of a BACKING"}},
		"two arguments": {"", []string{"a", "b"}, map[string]string{"backing": `BACKING: one expected, not 2: ["a" "b"]`}},
		"empty backing": {"", []string{""}, map[string]string{"exports[0].path": "BACKING: needed"}},
		"bad size":      {"", []string{"--size", "1Q", "b"}, map[string]string{"size": `--size: "1Q" is not a size`}},
		"huge size":     {"", []string{"--size", "8EiB", "b"}, map[string]string{"exports[0].size": "--size: 8EiB is out of range"}},
		"long name":     {"", []string{"--export", strings.Repeat("n", 4097), "b"}, map[string]string{"exports[0].name": "--export: 4097 bytes are too many"}},
		"not UTF-8":     {"", []string{"--export", "\xff", "b"}, map[string]string{"exports[0].name": "not valid UTF-8"}},
		"level of auto": {"", []string{"--codec", "auto", "--level", "2", "b"}, map[string]string{"exports[0].level": "--level: 2 with codec auto"}},
		"single form in the file": {"size: 1GiB\nexport: a\nexports: [{path: a}]", nil,
			map[string]string{"size": "unknown key", "export": "unknown key"}},

		"address":        {"", []string{"--listen", "localhost", "b"}, map[string]string{"listen": "--listen: \"localhost\" is not an address"}},
		"no address":     {"", []string{"--listen=", "b"}, map[string]string{"listen": "--listen: \"\" is not an address"}},
		"twice":          {"", []string{"--listen", "unix:/a", "--listen", "unix:/a", "b"}, map[string]string{"listen": "unix:/a is given twice"}},
		"open":           {"", []string{"--listen", "tcp:0.0.0.0:10809", "b"}, map[string]string{"listen": other}},
		"all addresses":  {"", []string{"--listen", "tcp:[::]", "b"}, map[string]string{"listen": other}},
		"TLS not forced": {"", []string{"--listen", "tcp:h:1", "--tls=on", "--tls-certificates=/c", "b"}, map[string]string{"listen": other}},
		"no directory":   {"", []string{"--tls=require", "b"}, map[string]string{"tls-certificates": "needed with tls require"}},

		"allow without TLS":     {"", []string{"--allow=alice", "b"}, map[string]string{"exports[0].allow": "--allow: clients are known by their certificates only"}},
		"allow, peer not asked": {"exports: [{path: a, allow: [x]}]", []string{"--tls=on", "--tls-certificates=/c", "--tls-verify-peer=false"}, map[string]string{"exports[0].allow": "exports[0].allow: clients are known"}},
		"allow nobody":          {"", []string{"--tls=on", "--tls-certificates=/c", "--allow=", "b"}, map[string]string{"exports[0].allow": "empty name"}},
		"allow a number":        {"exports: [{path: a, allow: [1]}]", nil, map[string]string{"exports[0].allow": "1 is not text"}},
		"default export":        {"", []string{"--default-export=x", "b"}, map[string]string{"default-export": `--default-export: "x" is the name of no export`}},
		"two defaults":          {"exports: [{path: a}, {path: b, name: b}]\ndefault-export: b", nil, map[string]string{"default-export": `"b", and exports[0] has the empty name`}},

		"export's connections": {"", []string{"--export-connections-max=-1", "b"}, map[string]string{"exports[0].connections-max": "--export-connections-max: -1 is out of range: give 0 to 65536"}},

		"metrics":               {"", []string{"--metrics=localhost:9000", "b"}, map[string]string{"metrics": "--metrics: \"localhost:9000\" is not an address"}},
		"metrics, no port":      {"", []string{"--metrics=tcp:localhost", "b"}, map[string]string{"metrics": "has no port"}},
		"metrics, bad port":     {"", []string{"--metrics=tcp:localhost:http", "b"}, map[string]string{"metrics": "is not an address"}},
		"metrics, abstract":     {"", []string{"--metrics=unix:@m", "b"}, map[string]string{"metrics": "open to every user"}},
		"metrics, number":       {"metrics: 9000\nexports: [{path: a}]", nil, map[string]string{"metrics": "9000 is not text"}},
		"metrics, taken":        {"", []string{"--metrics=unix:/a", "--listen=unix:/a", "b"}, map[string]string{"metrics": "unix:/a is an address of listen too"}},
		"pprof without metrics": {"", []string{"--pprof", "b"}, map[string]string{"pprof": "metrics has no address"}},
		"pprof for other hosts": {"", []string{"--pprof", "--metrics=tcp:0.0.0.0:9", "b"}, map[string]string{"pprof": "profiles are for this host"}},

		"cache too small": {"", []string{"--cache", "1MiB", "--dirty-max=1GiB", "--background=1GiB", "b"}, map[string]string{"cache": "1MiB is out of range: give 16MiB to"}},
		"dirty too much":  {"", []string{"--dirty-max", "200MiB", "b"}, map[string]string{"dirty-max": "give 4MiB to 192MiB"}},
		"background":      {"", []string{"--background", "129MiB", "b"}, map[string]string{"background": "give 0 to 96MiB"}},
		"negative":        {"", []string{"--workers=-1", "--connections-max=0", "b"}, map[string]string{"workers": "-1 is out of range", "connections-max": "give 1 to 65536"}},
		"syntax":          {"", []string{"--cache=", "--workers=", "--commit-interval=", "b"}, map[string]string{"cache": "not a size", "workers": "not a whole number", "commit-interval": "not a duration"}},
	} {
		t.Run(name, func(t *testing.T) {
			file := ""
			if tc.file != "" {
				file = write(t, tc.file)
			}
			c, err := Load(file, commandLine(t, tc.args...))
			if c != nil {
				t.Error("a configuration was returned")
			}
			wantFaults(t, err, tc.want)
		})
	}
}

func TestAccepted(t *testing.T) {
	for _, args := range [][]string{
		{"--listen=unix:/a,b", "--listen=tcp:127.0.0.1:0", "--listen=tcp:127.0.0.1:0", "--listen=tcp:[::1]:10809", "--listen=tcp:localhost:1", "b"},
		{"--listen=tcp:0.0.0.0:10809", "--allow-plaintext", "b"},
		{"--listen=tcp:[::]:10809", "--tls=require", "--tls-certificates=/c", "b"},
		{"--socket-mode=0o660", "b"},
		{"--cache=16M", "--dirty-max=12M", "--background=9M", "b"},
	} {
		c, err := Load("", commandLine(t, args...))
		if err != nil {
			t.Errorf("%q: %v", args, err)
		} else if err := c.Validate(); err != nil {
			t.Errorf("%q: loaded, but %v", args, err)
		}
	}
	c, err := Load("", commandLine(t, "--listen=unix:/a,b", "disk"))
	if err != nil || !slices.Equal(c.Listen, []string{"unix:/a,b"}) {
		t.Errorf("a path with a comma: %v, %v", c, err)
	}
}

func TestFileFaults(t *testing.T) {
	_, err := Load(filepath.Join(t.TempDir(), "none.yaml"), nil)
	var f *Fault
	if !errors.Is(err, os.ErrNotExist) || errors.As(err, &f) {
		t.Errorf("a missing file: %v, want ErrNotExist and no Fault", err)
	}
	for _, text := range []string{"cache: [", "- a", "cache: 1\ncache: 2", "\t"} {
		path := write(t, text)
		if _, err := Load(path, nil); !errors.As(err, &f) || f.Where != path {
			t.Errorf("file %q: %v, want a Fault of the file", text, err)
		}
	}
}

func TestUnknownEnv(t *testing.T) {
	got := UnknownEnv([]string{"HOME=/", "CNBD_CACHE=1", "CNBD_PORT=tcp", "CNBD_CAHCE=1GiB", "CNBD_BACKING=b", "CNBD_READ_ONLY=1", "CNBD_EXPORTS=x"})
	if want := []string{"CNBD_CAHCE", "CNBD_EXPORTS", "CNBD_PORT"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAddFlags(t *testing.T) {
	fs := pflag.NewFlagSet("create", pflag.ContinueOnError)
	AddFlags(fs, "size", "codec")
	var got []string
	fs.VisitAll(func(f *pflag.Flag) { got = append(got, f.Name) })
	if !slices.Equal(got, []string{"codec", "size"}) {
		t.Errorf("flags %q", got)
	}
	if err := fs.Parse([]string{"--size=1G", "b"}); err != nil {
		t.Fatal(err)
	}
	if c, err := Load("", fs); err != nil || c.Exports[0].Size != GiB {
		t.Errorf("with few flags: %+v, %v", c, err)
	}

	all := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	AddFlags(all)
	names := slices.Sorted(maps.Keys(allFlags()))
	got = nil
	all.VisitAll(func(f *pflag.Flag) { got = append(got, f.Name) })
	if !slices.Equal(got, names) || slices.Contains(names, backingKey) || !slices.Contains(names, "export") {
		t.Errorf("all flags are %q", got)
	}

	defer func() {
		if recover() == nil {
			t.Error("no panic for a key that is none")
		}
	}()
	AddFlags(all, "cahce")
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]struct {
		Address
		local bool
	}{
		"unix:/run/a.sock":    {Address{"unix", "/run/a.sock"}, true},
		"unix:a:b":            {Address{"unix", "a:b"}, true},
		"unix:@a":             {Address{"unix", "@a"}, true},
		"tcp:127.0.0.1:10809": {Address{"tcp", "127.0.0.1:10809"}, true},
		"tcp:127.9.9.9:0":     {Address{"tcp", "127.9.9.9:0"}, true},
		"tcp:[::1]:10809":     {Address{"tcp", "[::1]:10809"}, true},
		"tcp:localhost:1":     {Address{"tcp", "localhost:1"}, true},
		"tcp:10.0.0.1:1":      {Address{"tcp", "10.0.0.1:1"}, false},
		"tcp:0.0.0.0:1":       {Address{"tcp", "0.0.0.0:1"}, false},
		"tcp:[::]:1":          {Address{"tcp", "[::]:1"}, false},
		"tcp:host:1":          {Address{"tcp", "host:1"}, false},
	} {
		got, err := ParseAddress(in)
		if err != nil || got != want.Address || got.Local() != want.local || got.String() != in {
			t.Errorf("ParseAddress(%q) = %+v, local %v, %v", in, got, got.Local(), err)
		}
	}
	for in, want := range map[string]string{
		"tcp:":      "tcp:127.0.0.1:10809",
		"tcp":       "tcp:127.0.0.1:10809",
		"tcp::1":    "tcp:127.0.0.1:1",
		"tcp:h":     "tcp:h:10809",
		"tcp:h:":    "tcp:h:10809",
		"tcp:[::1]": "tcp:[::1]:10809",
	} {
		if got, err := ParseAddress(in); err != nil || got.String() != want {
			t.Errorf("ParseAddress(%q) = %v, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "unix", "unix:", "unix:@", "unix:\x00", "unix:/" + strings.Repeat("a", 107), "tcp:[::1", "tcp:]",
		"tcp:h:nbd", "tcp:h:65536", "tcp:h:-1", "tcp:::1:1", "udp:h:1", "/run/a.sock", "localhost:10809"} {
		if got, err := ParseAddress(in); err == nil {
			t.Errorf("ParseAddress(%q) = %+v, want an error", in, got)
		}
	}
	if _, err := ParseAddress("unix:/" + strings.Repeat("a", 106)); err != nil {
		t.Errorf("a path of 107 bytes: %v", err)
	}
}

// FuzzLoad feeds files: none may crash, and what is accepted is valid.
func FuzzLoad(f *testing.F) {
	example, err := os.ReadFile("../docs/examples/cnbd.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{filledIn(string(example)), "", "exports: [{path: a}, {name: b, path: b}]", "exports: {1: 2}", "1: 2",
		"cache: {a: {b: []}}", "exports: [{1: 2}, [], null]", "a: &a [*a]", "socket-mode: 0o600", "cache: .inf", "cache.a: 1"} {
		f.Add(s)
	}
	path := filepath.Join(f.TempDir(), "cnbd.yaml")
	f.Fuzz(func(t *testing.T, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path, nil)
		if (c == nil) == (err == nil) {
			t.Fatalf("Load returns %v and %v", c, err)
		}
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Fatalf("accepted, but %v", err)
			}
		} else if !strings.Contains(err.Error(), path) && !strings.Contains(err.Error(), "exports: none") {
			t.Fatalf("an error without its place: %v", err)
		}
	})
}

func TestChanged(t *testing.T) {
	change := func(f func(c *Config)) *Config {
		c := Default()
		c.Exports = []Export{{Path: "disk", Allow: []string{"alice"}}}
		f(c)
		return c
	}
	same := func(*Config) {}
	for _, tc := range []struct {
		name string
		f    func(c *Config)
		want []string
	}{
		{"nothing", same, nil},
		{"a value", func(c *Config) { c.LogLevel = "debug" }, []string{"log-level"}},
		{"several, in order", func(c *Config) { c.LogLevel, c.Cache = "debug", GiB }, []string{"cache", "log-level"}},
		{"a list", func(c *Config) { c.Listen = []string{"tcp:"} }, []string{"listen"}},
		{"an export", func(c *Config) { c.Exports[0].Allow = []string{"bob"} }, []string{"exports"}},
		{"one more export", func(c *Config) { c.Exports = append(c.Exports, Export{Path: "b"}) }, []string{"exports"}},
	} {
		if got := Changed(change(same), change(tc.f)); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}
