//go:build !race && !invariants

package main

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cnbd/internal/estimate"
	"cnbd/nbd"
)

// TestEstimate: what estimate says of an image is what a store of it then takes.
func TestEstimate(t *testing.T) {
	const size = 64 << 20
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	data := make([]byte, size)
	rng := rand.New(rand.NewPCG(1, 1))
	for at := 0; at < size; {
		n := min(size-at, 4096*(1+rng.IntN(64)))
		p := data[at : at+n]
		switch kind := rng.IntN(4); kind {
		case 0: // zeros
		default:
			for i := range p {
				p[i] = byte(rng.Uint32()) >> (2 * (kind - 1))
			}
		}
		at += n
	}
	if err := os.WriteFile(image, data, 0o600); err != nil {
		t.Fatal(err)
	}
	var r estimate.Report
	if err := json.Unmarshal([]byte(do(t, binary, "estimate", "--json", "--codec", "zstd:1", image)), &r); err != nil {
		t.Fatal(err)
	}
	for _, x := range r.Results {
		path := filepath.Join(dir, "s")
		codec, _, _ := strings.Cut(x.Setting.String(), ":") // the first level of each
		args := []string{"--size", "64MiB", "--codec", codec, "--level", "1", "--recompress", "off", "--commit-interval", "1h"}
		s := serve(t, append(args, "--background", "96MiB", "--dirty-max", "128MiB", "--extent", map[uint32]string{32 << 10: "32KiB", 64 << 10: "64KiB", 128 << 10: "128KiB"}[x.Extent], path)...)
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < size; at += 1 << 20 {
			if err := c.WriteAt(t.Context(), data[at:at+1<<20], uint64(at), false); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.Close()
		var st storeStatus
		if err := json.Unmarshal([]byte(do(t, binary, "info", "--json", path)), &st); err != nil {
			t.Fatal(err)
		}
		s.stop(t)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		t.Logf("%v, extents of %d: estimated %d and %d of map, stored %d and %d", x.Setting, x.Extent, x.PayloadBytes, x.MapBytes, st.Store.StoredBytes, st.Store.MapBytes)
		near := func(a, b uint64, part float64) bool {
			return float64(a) > float64(b)*(1-part) && float64(a) < float64(b)*(1+part)
		}
		// Where data keeps failing to compress, which extents are tried in full depends on
		// the order in which workers come to them.
		if !near(x.PayloadBytes, st.Store.StoredBytes, 0.02) || !near(x.MapBytes, st.Store.MapBytes, 0.2) || r.DataBytes-r.ZeroBytes != st.Store.DataBytes {
			t.Errorf("%v, extents of %d: %+v, and a store takes %+v", x.Setting, x.Extent, x, st.Store)
		}
	}
	if text := do(t, binary, "estimate", "--sample", "8MiB", dir); !strings.Contains(text, "estimated from 8 MiB") || !strings.Contains(text, "zstd:better") {
		t.Errorf("estimate says\n%s", text)
	}
}
