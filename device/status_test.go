package device

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// allocation is what d tells of the n bytes at off, a letter for each block or
// part of one: D for data, a dot for a hole.
func allocation(t *testing.T, d *Device, off, n uint64) string {
	t.Helper()
	var s strings.Builder
	last, first := false, true
	err := d.Allocation(t.Context(), off, n, func(n uint64, hole bool) bool {
		if !first && hole == last {
			t.Errorf("two runs of the same kind at %d", off)
		}
		last, first = hole, false
		letter := "D"
		if hole {
			letter = "."
		}
		s.WriteString(strings.Repeat(letter, int(block.Covering(off, n).Len())))
		off += n
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return s.String()
}

// TestAllocation: holes are exact to the block, wherever what is known of a block
// stands at the time: in the cache, on its way to the store, or in the map.
func TestAllocation(t *testing.T) {
	const blocks = 40
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(blocks*block.Size-1024, compression.Zstd))
	o := smallOptions(t)
	o.CommitInterval, o.WritebackPeriod, o.DirtyExpire = 1<<40, 1<<40, 1<<40 // only flushes write out
	d := open(t, f, o)
	size := d.Bytes()
	want := bytes.Repeat([]byte{'.'}, blocks)
	expect := func(when string) {
		t.Helper()
		if got := allocation(t, d, 0, size); got != string(want) {
			t.Errorf("%s:\n%s, want\n%s", when, got, want)
		}
		for _, r := range [][2]int{{0, 1}, {3, 8}, {5, 30}, {39, 40}} { // few blocks are looked for one by one
			n := min(uint64(r[1])*block.Size, size) - uint64(r[0])*block.Size
			if got := allocation(t, d, uint64(r[0])*block.Size, n); got != string(want[r[0]:r[1]]) {
				t.Errorf("%s, blocks %d to %d: %s, want %s", when, r[0], r[1], got, want[r[0]:r[1]])
			}
		}
	}
	write := func(at, n int, content byte) {
		t.Helper()
		b := block.Span(block.Index(at), block.Count(n))
		p := bytes.Repeat([]byte{content}, int(min(b.End.Bytes(), size)-b.Start.Bytes()))
		if _, err := d.WriteAt(p, int64(b.Start.Bytes())); err != nil {
			t.Fatal(err)
		}
		copy(want[at:], strings.Repeat("D", n))
	}
	holes := func(at, n int) { copy(want[at:], strings.Repeat(".", n)) }
	flush := func() {
		t.Helper()
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
	}

	expect("new")
	write(4, 3, 'a')
	write(9, 1, 'b')
	write(20, 12, 'c')
	write(39, 1, 'd') // the last, which is not whole
	write(11, 1, 0)
	expect("dirty")
	flush()
	holes(11, 1) // zeros are not stored
	expect("stored")
	if err := d.Trim(t.Context(), 5*block.Size, 17*block.Size, false); err != nil {
		t.Fatal(err)
	}
	holes(5, 17)
	expect("trimmed")
	write(9, 1, 'e')
	expect("written after it")
	if err := d.WriteZeroes(t.Context(), 24*block.Size+100, 3*block.Size, false); err != nil {
		t.Fatal(err)
	}
	holes(25, 2) // the edges stay
	expect("zeroed")
	flush()
	expect("zeroed and stored")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	expect("opened again")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	o.ReadOnly = true
	f = f.Clone()
	d = open(t, f, o)
	expect("read-only")

	// In bytes, with the edges of the request; and as far as is wanted.
	var runs []uint64
	visit := func(n uint64, _ bool) bool {
		runs = append(runs, n)
		return len(runs) < 3
	}
	if err := d.Allocation(t.Context(), 100, size-100, visit); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(runs, []uint64{4*block.Size - 100, block.Size, 4 * block.Size}) {
		t.Errorf("runs of %v bytes", runs)
	}
	if err := d.Allocation(t.Context(), 1, size, visit); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("past the end: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestAllocationOfMuchDirty: more dirty blocks and holes than are taken from the
// cache at a time.
func TestAllocationOfMuchDirty(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	const blocks = 5 * walkUnstored
	g := testGeometry(blocks*block.Size, compression.None)
	g.Capacity *= 4
	format(t, f, g)
	o := smallOptions(t)
	o.CacheBytes, o.DirtyBytesMax, o.BackgroundBytes = 2*blocks*block.Size, blocks*block.Size, blocks*block.Size-1
	o.CommitInterval, o.WritebackPeriod, o.DirtyExpire = 1<<40, 1<<40, 1<<40
	d := open(t, f, o)
	data, hole := []byte(strings.Repeat("a", block.Size)), 0
	want := bytes.Repeat([]byte{'.'}, blocks)
	for b := 0; b < blocks; b += 2 {
		if _, err := d.WriteAt(data, int64(b)*block.Size); err != nil {
			t.Fatal(err)
		}
		want[b] = 'D'
		if b%8 == 0 && hole < 1000 {
			hole++
			if err := d.Trim(t.Context(), uint64(b)*block.Size, block.Size, false); err != nil {
				t.Fatal(err)
			}
			want[b] = '.'
		}
	}
	if got := allocation(t, d, 0, d.Bytes()); got != string(want) {
		t.Error("differs")
	}
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
}

// TestAllocationOfMuchHole: holes of any length cost nothing, and who asks for much
// more than a device has data for is answered in parts.
func TestAllocationOfMuchHole(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	const size, data = 1 << 60, walkWindows + 50
	format(t, f, testGeometry(size, compression.None))
	o := smallOptions(t)
	o.CacheBytes = 16 << 20
	d := open(t, f, o)
	page := bytes.Repeat([]byte("a"), block.Size)
	for i := range data {
		if _, err := d.WriteAt(page, int64(i+1)*(size/(data+1)/block.Size*block.Size)); err != nil {
			t.Fatal(err)
		}
		if i == data/2 {
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, stored := range []bool{false, true} {
		var pages, parts int
		for off := uint64(0); off < size; parts++ {
			from := off
			if err := d.Allocation(t.Context(), off, size-off, func(n uint64, hole bool) bool {
				off += n
				if !hole {
					pages++
					if n != block.Size || off-n != uint64(pages)*(size/(data+1)/block.Size*block.Size) {
						t.Fatalf("data of %d bytes at %d", n, off-n)
					}
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
			if off == from {
				t.Fatalf("nothing was told of %d", off)
			}
		}
		if pages != data || stored && parts < 2 {
			t.Errorf("%d pages in %d parts", pages, parts)
		}
		if err := errors.Join(d.Sync(), d.store.Checkpoint()); err != nil { // into the tree
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestPrefetch: what was prefetched is read without the disk, and no more is
// prefetched than half of the cache holds.
func TestPrefetch(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := smallOptions(t)
	o.CacheBytes = 1 << 20
	d := open(t, f, o)
	if _, err := d.WriteAt(bytes.Repeat([]byte("some data"), 3<<20/9), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	if err := d.Prefetch(t.Context(), 100, 300<<10); err != nil {
		t.Fatal(err)
	}
	decodes := d.metrics.decodes.Load()
	if decodes == 0 {
		t.Error("nothing was read")
	}
	if _, err := d.ReadAt(make([]byte, 300<<10), 100); err != nil {
		t.Fatal(err)
	}
	if n := d.metrics.decodes.Load(); n != decodes {
		t.Errorf("%d extents were decoded again", n-decodes)
	}
	if err := d.Prefetch(t.Context(), 0, 4<<20); err != nil {
		t.Fatal(err)
	}
	if n := d.metrics.decodes.Load(); n > 512>>6+1 {
		t.Errorf("%d extents of 64 KiB were decoded for half of a cache of 1 MiB", n)
	}
	if err := d.Prefetch(t.Context(), 4<<20, 1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("past the end: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestZeroSegments: the segments of a read that are holes are known as such.
func TestZeroSegments(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(1<<20, compression.Zstd))
	d := open(t, f, smallOptions(t))
	if _, err := d.WriteAt(make([]byte, block.Size), 2*block.Size); err != nil {
		t.Fatal(err)
	}
	p, err := d.Read(t.Context(), 100, 3*block.Size)
	if err != nil {
		t.Fatal(err)
	}
	var zero []bool
	for i := range p.Segments() {
		zero = append(zero, p.Zero(i))
	}
	// The written one holds zeros too, but nobody has looked.
	if !slices.Equal(zero, []bool{true, true, false, true}) || len(p.Segments()[0]) != block.Size-100 || len(p.Segments()[3]) != 100 {
		t.Errorf("%v", zero)
	}
	p.Release()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestAllocationHoldsNothing: who is slow to take what Allocation tells keeps no
// segment from being free, for writes that are short of space wait for that.
func TestAllocationHoldsNothing(t *testing.T) {
	d, _, truth := fullDevice(t, disktest.Seed(t), 8<<20)
	if err := d.Trim(t.Context(), 4<<20, 64<<10, true); err != nil {
		t.Fatal(err)
	}
	told := 0
	err := d.Allocation(t.Context(), 0, d.Bytes(), func(uint64, bool) bool {
		if told++; told > 1 {
			return true
		}
		// Twice over, which needs what is overwritten.
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		for at := 0; at < 2*len(truth); at += 64 << 10 {
			w, err := d.PrepareWrite(ctx, uint64(at%len(truth)), 64<<10)
			if err != nil {
				t.Errorf("write %d: %v", at, err)
				return false
			}
			for i, s := range w.Next(64 << 10) {
				fill(s, uint64(at+i))
			}
			if err := w.Commit(ctx, false); err != nil {
				t.Errorf("write %d: %v", at, err)
				return false
			}
		}
		return true
	})
	if err != nil || told < 3 {
		t.Errorf("%d runs, %v", told, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLookWritesNothing: a look at a device commits nothing and writes nothing, and sees
// what is dirty.
func TestLookWritesNothing(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(16<<20, compression.None))
	d := open(t, f, Options{CacheBytes: 4 << 20, CommitInterval: time.Hour, WritebackPeriod: time.Hour, DirtyExpire: time.Hour})
	d.store.StopCleaning()
	if _, err := d.WriteAt(noise(1, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	var wrote atomic.Int64
	f.SetHook(func(op disktest.Op) {
		if op.Kind != disktest.Read {
			wrote.Add(1)
		}
	})
	for range 3 {
		st, err := d.Look()
		if err != nil {
			t.Fatal(err)
		}
		if st.DirtyBytes != 64<<10 || !st.Healthy {
			t.Errorf("%d bytes are dirty", st.DirtyBytes)
		}
	}
	if n := wrote.Load(); n != 0 {
		t.Errorf("%d operations that change the store, for looking at it", n)
	}
	st, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.DirtyBytes != 0 || wrote.Load() == 0 {
		t.Errorf("Status has written nothing out: %d bytes are dirty", st.DirtyBytes)
	}
	if q := st.Queue; q.Workers == 0 || q.Completed == 0 || q.Completed > q.Submitted { // a commit of the checkpoint's may be under way
		t.Errorf("what was written out has gone through the queue: %+v", q)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestStatusNames: all of a status is JSON with names of one kind.
func TestStatusNames(t *testing.T) {
	text, err := json.Marshal(Status{Scrub: &store.ScrubReport{}})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`"([^"]*)":`).FindAllSubmatch(text, -1)
	for _, n := range names {
		if !regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`).Match(n[1]) {
			t.Errorf("%s is not in snake_case", n[1])
		}
	}
	if len(names) < 100 {
		t.Errorf("%d names: %s", len(names), text)
	}
}
