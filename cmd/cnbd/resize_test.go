//go:build !race && !invariants

package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"cnbd/nbd"
)

// TestResize: a device grows while it is served and while it is not, shrinks when its
// tail is unused or dropped, and what was beyond an end does not come back.
func TestResize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s := serve(t, "--size", "64MiB", path)
	dial := func() *nbd.Client {
		t.Helper()
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	status := func() (st storeStatus) {
		t.Helper()
		if err := json.Unmarshal([]byte(do(t, binary, "info", "--json", path)), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	fully := status().Capacity - 64<<20*9/8 // the overhead that does not depend on the size
	data := bytes.Repeat([]byte("0123456789abcdef"), 256)
	block := func(c *nbd.Client, off uint64, want []byte) {
		t.Helper()
		got := make([]byte, len(data))
		if err := c.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, want) {
			t.Errorf("at %d: %v, or what is read is wrong", off, err)
		}
	}
	old := dial()
	if text := do(t, binary, "resize", "--size", "128MiB", path); !strings.Contains(text, "128 MiB") || !strings.Contains(text, "until they connect again") {
		t.Errorf("resize says %q", text)
	}
	if old.Size() != 64<<20 {
		t.Errorf("an old client has %d bytes", old.Size())
	}
	block(old, 0, make([]byte, len(data)))
	c := dial()
	if c.Size() != 128<<20 {
		t.Fatalf("a new client has %d bytes", c.Size())
	}
	const last = 128<<20 - 4096
	for _, off := range []uint64{0, last} {
		if err := c.WriteAt(t.Context(), data, off, true); err != nil {
			t.Fatal(err)
		}
	}
	block(old, last, data) // as the kernel's client does when it is told
	s.kill()
	if st := status(); st.DeviceSize != 128<<20 || st.Capacity != fully+128<<20*9/8 {
		t.Errorf("after a kill: %d bytes, capacity %d, want %d", st.DeviceSize, st.Capacity, fully+128<<20*9/8)
	}

	if r := try(t, binary, "resize", "--size", "100MiB", path); r.status != exitFailed || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "4 KiB (4096 bytes) of data lie beyond the new end; --force drops them") {
		t.Errorf("a tail in use: status %d\n%s", r.status, r.stderr)
	}
	// A part of the last block is dropped too.
	if text := do(t, binary, "resize", "--size", "134217216", "--force", path); !strings.Contains(text, "512 bytes of data beyond the new end are dropped") {
		t.Errorf("resize --force says %q", text)
	}
	if text := do(t, binary, "resize", "--size", "100MiB", "--force", path); !strings.Contains(text, "are dropped") {
		t.Errorf("resize --force says %q", text)
	}
	do(t, binary, "check", "--data", path)
	if st := status(); st.DeviceSize != 100<<20 || st.Store.DataBytes != 4096 {
		t.Errorf("smaller: %d bytes, %d of data", st.DeviceSize, st.Store.DataBytes)
	}
	// Without --force, for there is nothing left.
	do(t, binary, "resize", "--size", "50MiB", path)
	do(t, binary, "resize", "--size", "128MiB", path)
	s = serve(t, path)
	c = dial()
	block(c, 0, data)
	block(c, last, make([]byte, len(data)))
	s.stop(t)
	do(t, binary, "check", "--data", path)
}

// TestResizeCapacity: a thin device stays thin, and says so; the capacity shrinks as
// far as the segments in use allow.
func TestResizeCapacity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	do(t, binary, "create", "--size", "1GiB", "--capacity", "64MiB", path)
	if text := do(t, binary, "resize", "--size", "2GiB", path); !strings.Contains(text, "capacity 64 MiB (67108864 bytes), was 64 MiB") || !strings.Contains(text, "thinly provisioned") {
		t.Errorf("resize says %q", text)
	}
	if text := do(t, binary, "resize", "--size", "2GiB", path); !strings.Contains(text, "already") {
		t.Errorf("resize says %q", text)
	}
	if text := do(t, binary, "resize", "--capacity", "128MiB", path); !strings.Contains(text, "size 2 GiB (2147483648 bytes), was 2 GiB") || !strings.Contains(text, "capacity 128 MiB") {
		t.Errorf("resize says %q", text)
	}
	s := serve(t, path)
	punctured(t, s.uri, 64<<20)
	s.stop(t)
	if r := try(t, binary, "resize", "--capacity", "40MiB", path); r.status != exitFailed || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "it needs a capacity of") {
		t.Errorf("segments in use: status %d\n%s", r.status, r.stderr)
	}
	do(t, binary, "check", path)
	do(t, binary, "resize", "--capacity", "126MiB", path)
	do(t, binary, "check", "--data", path)
}
