package store

import (
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// TestReplayedIsCounted: what replay has put into the overlay counts from the
// beginning. A store that was killed promises no more than before, and what it
// promises can be stored, with the changes of the map.
func TestReplayedIsCounted(t *testing.T) {
	const blocks = 64 << 10
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 60)))
	c := openCommitted(t, d, Options{})
	small := func(b int) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Codec: 1, Parts: [][]byte{{byte(b), byte(b >> 8)}}})
	}
	for b := 0; b < blocks; b += 4 {
		must(t, small(b))
	}
	// With too few segments that have space on the host the commit would begin a
	// checkpoint, after which there is nothing to replay.
	must(t, c.segments.ensure(c.file, 2*reserveSegments))
	must(t, c.commit())
	before := c.segmentsFor(0, 0)
	must(t, c.Close())
	c = openCommitted(t, d.Clone(), Options{})
	if after := c.segmentsFor(0, 0); after != before {
		t.Errorf("%d segments are kept, before the restart %d", after, before)
	}
	reserved := 0
	for c.Reserve(8, Overwriting) == nil {
		reserved += 8
	}
	for b := range reserved {
		if err := c.blob(4*b+1, 1, 1); err != nil {
			t.Fatalf("block %d of %d that were promised: %v", b, reserved, err)
		}
		c.Release(1)
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	must(t, c.Close())
}

// TestRecompressedAfterKill: an idle store works off what replay has found, and
// recompresses all of it, although nothing is written any more.
func TestRecompressedAfterKill(t *testing.T) {
	const blocks = 512
	c := scattered(t, blocks, CleanerOptions{Recoder: quarter{}, Recompress: true})
	must(t, c.Close())
	c = openCommitted(t, c.file.(*disktest.Disk).Clone(), Options{})
	c.StartCleaning(CleanerOptions{Recoder: quarter{}, Recompress: true})
	for range 30 { // looks, of which a few are enough
		c.cleaner.turn <- struct{}{}
		c.cleaner.work()
		<-c.cleaner.turn
	}
	list, err := c.Lookup(block.Span(0, blocks), nil)
	must(t, err)
	left := block.Count(0)
	for _, e := range list {
		if e.Kind == extents.Data && e.Addr.Codec != 2 {
			left += e.Count
		}
	}
	if left > 0 {
		t.Errorf("%d of %d blocks are as they were written", left, blocks)
	}
	must(t, c.Close())
}
