//go:build !race && !invariants

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cnbd/internal/certtest"
	"cnbd/nbd"
)

// configFile puts a configuration file into dir.
func configFile(t *testing.T, dir, format string, a ...any) string {
	t.Helper()
	path := filepath.Join(dir, "cnbd.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, format, a...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// names are those of the exports that a client at uri sees.
func names(t *testing.T, uri string) (names []string) {
	t.Helper()
	list, err := nbd.List(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name)
	}
	return names
}

// TestTLS: the program with certificates: who may use which export, the URIs that
// it prints, and a change of the certificates while it runs.
func TestTLS(t *testing.T) {
	dir, certs := t.TempDir(), t.TempDir()
	alice, bob := t.TempDir(), t.TempDir()
	ca := certtest.New(t)
	ca.Server(certs)
	ca.Client(alice, "alice")
	ca.Client(bob, "bob")
	file := configFile(t, dir, `
listen: ["unix:%[1]s/s"]
tls: require
tls-certificates: %[2]s
default-export: hers
exports:
  - {name: hers, path: %[1]s/a, size: 64MiB, allow: [alice]}
  - {name: theirs, path: %[1]s/b, size: 64MiB}
`, dir, certs)
	s := serve(t, "--config", file)
	if want := "nbds+unix:///hers?socket=" + dir + "/s"; s.uri != want {
		t.Errorf("URI %s, want %s", s.uri, want)
	}
	as := func(dir string) string { return s.uri + "&tls-certificates=" + dir }
	if got := names(t, as(alice)); !slices.Equal(got, []string{"hers", "theirs"}) {
		t.Errorf("alice sees %q", got)
	}
	if got := names(t, as(bob)); !slices.Equal(got, []string{"theirs"}) {
		t.Errorf("bob sees %q", got)
	}
	old, err := nbd.Dial(t.Context(), as(alice))
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	for _, uri := range []string{as(bob), strings.Replace(s.uri, "nbds", "nbd", 1), strings.Replace(as(bob), "hers", "", 1)} {
		if c, err := nbd.Dial(t.Context(), uri); err == nil {
			c.Close()
			t.Errorf("%s: let in", uri)
		}
	}
	do(t, tool(t, "nbdinfo"), as(alice))

	other := certtest.New(t)
	other.Server(certs)
	if c, err := nbd.Dial(t.Context(), as(alice)); err == nil {
		c.Close()
		t.Error("a client of the authority before is let in")
	}
	other.Client(alice, "alice")
	c, err := nbd.Dial(t.Context(), as(alice))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := old.WriteAt(t.Context(), []byte{1}, 0, true); err != nil {
		t.Errorf("the client of before: %v", err)
	}
	if err := os.WriteFile(filepath.Join(certs, "server-key.pem"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err = nbd.Dial(t.Context(), as(alice)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if info := do(t, binary, "info", dir+"/a"); !strings.Contains(info, "1 of at most 128, for all exports of the server; ") {
		t.Errorf("info: %s", info)
	}
	if info := do(t, binary, "info", "--json", dir+"/a"); !strings.Contains(info, `"exports_forbidden": 2`) || !strings.Contains(info, `"tls_failed": 1`) {
		t.Errorf("info: %s", info)
	}
	if log := s.log.String(); !strings.Contains(log, "cannot be used, the ones before are") || !strings.Contains(log, `"client":"alice"`) {
		t.Errorf("log: %s", log)
	}
	s.stop(t)
}

// TestExportFails: an export whose store is missing, damaged or somebody else's does
// not touch the others, and is served when a client asks for it and it is there. One
// that is lazy is not looked at before.
func TestExportFails(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"good", "broken", "locked", "lazy", "later"} {
		do(t, binary, "create", "--size", "64MiB", at(name))
	}
	edit(t, at("broken"), func(b []byte) []byte { return bytes.Repeat([]byte{1}, len(b)) })
	if err := os.Rename(at("later"), at("hidden")); err != nil {
		t.Fatal(err)
	}
	holder := serve(t, at("locked"))
	lazy, err := os.ReadFile(at("lazy"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("lazy"), []byte("not yet"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := configFile(t, dir, `
listen: ["unix:%[1]s/s"]
cache: 64MiB
exports:
  - {name: broken, path: %[1]s/broken}
  - {name: locked, path: %[1]s/locked}
  - {name: good, path: %[1]s/good, connections-max: 1}
  - {name: later, path: %[1]s/later}
  - {name: lazy, path: %[1]s/lazy, lazy: true}
`, dir)
	s := serve(t, "--config", file)
	uri := func(name string) string { return "nbd+unix:///" + name + "?socket=" + at("s") }
	if s.uri != uri("good") {
		t.Errorf("the first URI is %s", s.uri)
	}
	works := func(name string) {
		t.Helper()
		c, err := nbd.Dial(t.Context(), uri(name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		if err := c.WriteAt(t.Context(), []byte(name), 1000, true); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Disconnect(t.Context()); err != nil {
			t.Error(err)
		}
		do(t, binary, "info", at(name)) // of its server
	}
	fails := func(name, part string) {
		t.Helper()
		if c, err := nbd.Dial(t.Context(), uri(name)); err == nil {
			c.Close()
			t.Errorf("%s is served", name)
		} else if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: %v, want %q", name, err, part)
		}
	}
	works("good")
	for _, name := range []string{"broken", "locked", "later", "lazy"} {
		fails(name, "not available")
	}
	for _, part := range []string{"not a cnbd store", "in use by another process", "no such file"} {
		if !strings.Contains(s.log.String(), part) {
			t.Errorf("the log lacks %q:\n%s", part, s.log)
		}
	}
	user, err := nbd.Dial(t.Context(), uri("good"))
	if err != nil {
		t.Fatal(err)
	}
	fails("good", "too many clients")
	user.Close()

	holder.stop(t)
	if err := os.Rename(at("hidden"), at("later")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(at("lazy"), lazy, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"locked", "later", "lazy", "good"} {
		works(name)
	}
	fails("broken", "not available")
	s.stop(t)
	for _, name := range []string{"good", "locked", "later", "lazy"} {
		do(t, binary, "check", "--data", at(name))
	}

	// With none to serve there is no server; and a wrong setting is told at once.
	r := try(t, binary, "serve", at("broken"))
	if r.status != exitFailed && r.status != exitDamage {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	r = try(t, binary, "serve", "--config", configFile(t, dir, "exports: [{path: %s}, {name: x, path: %s, size: 1MiB}]", at("good"), at("later")))
	if r.status != exitUsage || !strings.Contains(r.stderr, "is a store for 64MiB") {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
}
