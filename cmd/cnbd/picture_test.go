//go:build !race && !invariants

package main

import (
	"bytes"
	"encoding/json"
	"image/png"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"cnbd/nbd"
)

// TestMapPicture: the map of a store is the same while it is served and while it is not,
// tells scattered data from what lies in order, and is drawn as PNG and SVG.
func TestMapPicture(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	s := serve(t, "--size", "64MiB", "--recompress", "off", path)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	noise := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	write := func(p []byte, off uint64) {
		t.Helper()
		if err := c.WriteAt(t.Context(), p, off, false); err != nil {
			t.Fatal(err)
		}
	}
	write(noise, 0)
	write(bytes.Repeat([]byte("compresses"), 100<<10), 16<<20)
	for i, b := range rand.New(rand.NewPCG(1, 1)).Perm(256) {
		write(noise[:4096], 32<<20+uint64(b)*4096)
		if i%16 == 0 {
			if err := c.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	var served, stopped deviceMap
	if err := json.Unmarshal([]byte(do(t, binary, "map", "--json", "-o", filepath.Join(dir, "a.png"), path)), &served); err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	if err := json.Unmarshal([]byte(do(t, binary, "map", "--json", path)), &stopped); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(served, stopped) {
		t.Error("the map changes when the server is stopped")
	}
	if served.RegionBytes != 16<<10 || len(served.Regions) != 4096 {
		t.Fatalf("%d regions of %d bytes", len(served.Regions), served.RegionBytes)
	}
	// Per MiB: data, stored, fragments.
	sum := func(mib int) (data, stored, fragments uint64) {
		for _, r := range served.Regions[mib*64 : (mib+1)*64] {
			data, stored, fragments = data+r.Data, stored+r.Stored, fragments+r.Fragments
		}
		return data, stored, fragments
	}
	if d, st, f := sum(0); d != 1<<20 || st != 1<<20 || f > 80 {
		t.Errorf("in order: %d bytes of data in %d, in %d fragments", d, st, f)
	}
	if d, st, _ := sum(16); d != 1000<<10 || st > d/8 { // the rest is a part of a block
		t.Errorf("compressed: %d bytes of data in %d", d, st)
	}
	if d, _, f := sum(32); d != 1<<20 || f < 160 {
		t.Errorf("scattered: %d bytes of data, in %d fragments", d, f)
	}
	if d, _, _ := sum(48); d != 0 {
		t.Errorf("a hole: %d bytes of data", d)
	}
	f, err := os.Open(filepath.Join(dir, "a.png"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := png.Decode(f); err != nil {
		t.Error(err)
	}
	svg := filepath.Join(dir, "a.svg")
	do(t, binary, "map", path, "-o", svg)
	if text, err := os.ReadFile(svg); err != nil || !strings.Contains(string(text), "device of 64 MiB") {
		t.Errorf("%v\n%.500s", err, text)
	}
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"map", path}, exitUsage, "-o is needed"},
		{[]string{"map", path, "-o", path}, exitUsage, "ends in .png or .svg"},
		{[]string{"map", path, "-o", filepath.Join(path, "x.png")}, exitFailed, "not a directory"},
		{[]string{"map", svg, "-o", filepath.Join(dir, "x.png")}, exitFailed, "not a cnbd store"},
	} {
		if r := try(t, binary, c.args...); r.status != c.status || !strings.Contains(r.stderr, c.want) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%q: status %d\n%s", c.args, r.status, r.stderr)
		}
	}
}
