//go:build !race && !invariants

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cnbd/nbd"
)

// TestRepair: a store that has lost its first megabyte is repaired, after a
// question, and by nobody else meanwhile; a file that is none is left alone.
func TestRepair(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	do(t, binary, "create", "--size", "64MiB", path)
	s := serve(t, path)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("what is stored"), 100000)
	if err := c.WriteAt(t.Context(), data, 12345, true); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if r := try(t, binary, "check", "--repair", "--yes", path); r.status != exitFailed || !strings.Contains(r.stderr, "in use") {
		t.Errorf("a store that is served: status %d\n%s", r.status, r.stderr)
	}
	s.stop(t)
	if out := do(t, binary, "check", "--repair", path); !strings.Contains(out, "nothing to repair") {
		t.Errorf("a store that is whole: %s", out)
	}
	edit(t, path, func(b []byte) []byte { clear(b[:1<<20]); return b })
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Without an answer it is left as it is.
	if r := try(t, binary, "check", "--repair", path); r.status != exitDamage || !strings.Contains(r.stdout, "[y/N]") {
		t.Errorf("not confirmed: status %d\n%s%s", r.status, r.stdout, r.stderr)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("not confirmed, and changed: %v", err)
	}
	if out := do(t, binary, "check", "--repair", "--yes", path); !strings.Contains(out, "nothing is lost") {
		t.Errorf("repaired: %s", out)
	}
	do(t, binary, "check", "--data", path)
	s = serve(t, path)
	defer s.stop(t)
	if c, err = nbd.Dial(t.Context(), s.uri); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, len(data))
	if err := c.ReadAt(t.Context(), got, 12345); err != nil || !bytes.Equal(got, data) {
		t.Errorf("repaired, and the data is not there: %v", err)
	}

	foreign := filepath.Join(t.TempDir(), "foreign")
	if err := os.WriteFile(foreign, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := try(t, binary, "check", "--repair", "--yes", foreign); r.status != exitFailed || !strings.Contains(r.stderr, "not a cnbd store") {
		t.Errorf("a foreign file: status %d\n%s", r.status, r.stderr)
	}
	if after, err := os.ReadFile(foreign); err != nil || !bytes.Equal(after, data) {
		t.Errorf("a foreign file was changed: %v", err)
	}
}
