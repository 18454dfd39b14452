package store

import (
	"errors"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// TestTrimsOfLargeMapOnFullHost: trims that touch all of a map which is larger than the
// space that is kept for them, on a host that is full, end before a checkpoint would
// run out of space (promise P4): the store stays whole, and opens again.
func TestTrimsOfLargeMapOnFullHost(t *testing.T) {
	const blocks = 256 << 10
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 2000)))
	c := openCommitted(t, d, Options{})
	for b := 0; b < blocks; b += 2 {
		if b%512 == 0 {
			must(t, c.Reserve(256, Growth))
		}
		c.mu.Lock()
		err := c.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Codec: 1, Parts: [][]byte{{byte(b), byte(b >> 8)}}})
		c.mu.Unlock()
		must(t, err)
		if b%512 == 510 {
			c.Release(256)
		}
	}
	must(t, c.commit())
	for range 3 {
		must(t, c.Checkpoint())
	}
	c.closeClean()
	d = d.Clone()
	n, err := d.Allocated()
	must(t, err)
	d.SetCapacity(n + 6*SegmentSizeMin)
	c = openCommitted(t, d, Options{Warn: func(m string, err error) { t.Log(m, err) }})
	free, warm := c.segments.room()
	t.Logf("%d nodes, %d free, %d warm", c.Store.mu.root.Nodes, free, warm)
	fillHost(t, d)
	failed := func(i int, err error) {
		t.Errorf("trim %d: %v", i, err)
		_ = c.Close()
		s, err := Open(d.Clone(), Options{})
		if err == nil {
			err = s.Close()
		}
		t.Fatalf("opened again: %v", err)
	}
	skipped, done := 0, 0
	for i := 0; i < 4000 && skipped < 30; i++ {
		if c.Short() { // as a device does
			if err := c.MakeRoom(t.Context(), 0, Trimming); err != nil && !errors.Is(err, ErrNoSpace) {
				failed(i, err)
			}
			if c.Short() {
				skipped++
				continue
			}
		}
		if err := c.hole(block.Span(block.Index(i*38%blocks)&^1, 1)); err != nil {
			failed(i, err)
		}
		done++
	}
	t.Logf("%d trims, %d left undone", done, skipped)
	if done < 20 {
		t.Errorf("only %d trims were done", done)
	}
	must(t, c.Close()) // as a kill would
	s, err := Open(d.Clone(), Options{})
	must(t, err)
	must(t, s.Close())
}
