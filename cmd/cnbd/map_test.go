//go:build !race && !invariants

package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"cnbd/internal/disktest"
	"cnbd/nbd"
)

// TestMap: what libnbd is told to be holes is exact to 4 KiB, while it is in the
// cache, after a flush, and after restarts; and prefetched and sparse reads are right.
func TestMap(t *testing.T) {
	nbdinfo := tool(t, "nbdinfo")
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	const size, block = 40 << 20, 4096
	path := filepath.Join(t.TempDir(), "store")
	s := serve(t, "--size", "40MiB", "--cache", "16MiB", path)

	model := make([]byte, size)
	// told is a letter for each block.
	told := func() []byte {
		t.Helper()
		var extents []struct{ Offset, Length, Type uint64 }
		if err := json.Unmarshal([]byte(do(t, nbdinfo, "--map", "--json", s.uri)), &extents); err != nil {
			t.Fatal(err)
		}
		var blocks []byte
		for _, x := range extents {
			if x.Offset != uint64(len(blocks))*block || x.Length%block != 0 || x.Type != 0 && x.Type != 3 {
				t.Fatalf("extent %+v", x)
			}
			blocks = append(blocks, bytes.Repeat([]byte{byte(x.Type)}, int(x.Length/block))...)
		}
		return blocks
	}
	// expect compares it with what is there. Zeros that were written and are not
	// stored yet may be told to be data.
	expect := func(when string, stored bool) {
		t.Helper()
		blocks, wrong := told(), 0
		for b, zero := range blocks {
			page := model[b*block:][:block]
			if isZero := len(bytes.Trim(page, "\x00")) == 0; zero == 3 && !isZero || zero == 0 && isZero && stored {
				wrong++
				if wrong == 1 {
					t.Errorf("%s: block %d is told to be of type %d", when, b, zero)
				}
			}
		}
		if len(blocks) != size/block || wrong > 0 {
			t.Fatalf("%s: %d of %d blocks are wrong", when, wrong, len(blocks))
		}
	}
	client := func() *nbd.Client {
		t.Helper()
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	change := func() {
		t.Helper()
		c := client()
		defer c.Close()
		for range 60 {
			at := rng.IntN(size/block-300) * block
			n := (1 + rng.IntN(300)) * block
			var err error
			switch rng.IntN(4) {
			case 0, 1:
				for i := range n { // a third of the blocks are zeros
					model[at+i] = byte(rng.IntN(200)) * byte(min(1, (at+i)/block%3))
				}
				err = c.WriteAt(t.Context(), model[at:][:n], uint64(at), false)
			case 2:
				clear(model[at:][:n])
				err = c.Trim(t.Context(), uint64(at), uint64(n), false)
			case 3:
				clear(model[at+100:][:n])
				err = c.WriteZeroes(t.Context(), uint64(at)+100, uint64(n), nbd.ZeroFlags{FastZero: true})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	expect("new", true)
	for round := range 3 {
		change()
		expect("dirty", false)
		c := client()
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		expect("flushed", true)
		if round == 0 {
			s.stop(t)
		} else {
			s.kill()
		}
		s = serve(t, "--cache", "16MiB", path)
		expect("served again", true)
		c = client()
		if err := c.Cache(t.Context(), 1<<20, 3<<20); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if err := c.ReadAt(t.Context(), got, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, model) {
			t.Fatal("read differs")
		}
	}
}

// TestInfoOfExport: cnbd info of a URI tells what the server of it offers, be it
// cnbd or another.
func TestInfoOfExport(t *testing.T) {
	s := serve(t, "--size", "40MiB", "--export", "a b", filepath.Join(t.TempDir(), "store"))
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	page := bytes.Repeat([]byte{1}, 4096)
	for _, off := range []uint64{0, 8192, 1 << 20} {
		if err := c.WriteAt(t.Context(), page, off, false); err != nil {
			t.Fatal(err)
		}
	}
	var st exportStatus
	if err := json.Unmarshal([]byte(do(t, binary, "info", "--json", s.uri)), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 40<<20 || st.ReadOnly || st.DataBytes != 3*4096 || st.HoleBytes != 40<<20-3*4096 || st.Extents != 6 ||
		st.MinimumBlock != 1 || st.MaximumBlock != 32<<20 || len(st.Can) != len(exportAbilities) {
		t.Errorf("%+v", st)
	}
	if out := do(t, binary, "info", s.uri); !strings.Contains(out, "12 KiB (12288 bytes)") || !strings.Contains(out, "extended headers") {
		t.Errorf("%s", out)
	}
	if r := try(t, binary, "info", strings.Replace(s.uri, "a%20b", "none", 1)); r.status != 1 || !strings.Contains(r.stderr, "no such export") {
		t.Errorf("of an export that is not there: %+v", r)
	}
	out := do(t, tool(t, "nbdkit"), "-U", "-", "--run", "'"+binary+"' info \"$uri\"", "memory", "1M")
	if !strings.Contains(out, "1 MiB (1048576 bytes)") || !strings.Contains(out, "structured replies") {
		t.Errorf("nbdkit: %s", out)
	}
}
