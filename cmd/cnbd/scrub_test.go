//go:build !race && !invariants

package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cnbd/nbd"
)

// TestScrub: check --data of a store that is served has its server verify it, and
// finds what was damaged behind its back.
func TestScrub(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	do(t, binary, "create", "--size", "64MiB", path)
	s := serve(t, path)
	defer s.stop(t)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	if err := c.WriteAt(t.Context(), data, 0, true); err != nil {
		t.Fatal(err)
	}
	if out := do(t, binary, "check", "--data", "--rate", "0", path); !strings.HasPrefix(out, "the server has verified ") {
		t.Errorf("a store that is whole: %s", out)
	}
	if r := try(t, binary, "check", path); r.status != exitFailed || !strings.Contains(r.stderr, "in use") {
		t.Errorf("check without --data: status %d\n%s", r.status, r.stderr)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(b, data[5<<20:][:512])
	if at < 0 {
		t.Fatal("the data is not in the store")
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("damage"), int64(at)); err != nil {
		t.Fatal(err)
	}
	r := try(t, binary, "check", "--data", "--json", "--rate", "1GiB", path)
	var rep scrubReport
	if err := json.Unmarshal([]byte(r.stdout), &rep); err != nil {
		t.Fatalf("%v\n%s", err, r.stdout)
	}
	if r.status != exitDamage || rep.Clean || len(rep.Lost) != 1 || rep.Blobs < 128 || rep.Lost[0].Offset != 5<<20 || rep.Lost[0].Length > 64<<10 {
		t.Errorf("a damaged extent: status %d, %+v", r.status, rep)
	}
	if out := do(t, binary, "info", path); !strings.Contains(out, "1 problems") {
		t.Errorf("info does not tell:\n%s", out)
	}
}
