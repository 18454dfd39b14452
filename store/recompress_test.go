package store

import (
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// quarter is a Recoder that makes everything a quarter of its size.
type quarter struct{}

func (quarter) Encode(dst, src []byte, _ bool) ([]byte, uint8, uint8, bool) {
	return append(dst, src[:len(src)/4]...), 2, 1, true
}

func (quarter) Decode(dst, _ []byte, a extents.Addr) ([]byte, error) {
	return append(dst, make([]byte, block.Count(a.Blocks).Bytes())...), nil
}

func (quarter) Done(codec, _ uint8) bool { return codec == 2 }

// rest has the cleaner work until an idle store has nothing more to do.
func (c *committed) rest() {
	c.t.Helper()
	for n, quiet := 0, 0; quiet <= quietLooks+1; n++ {
		if n == 10000 {
			c.t.Fatal("the cleaner does not end")
		}
		c.cleaner.turn <- struct{}{}
		worked, _ := c.cleaner.work()
		<-c.cleaner.turn
		if quiet++; worked {
			quiet = 0
		}
	}
}

// scattered is a store of so many blocks, each written alone, of which a quarter
// was trimmed, so that there is something to clean.
func scattered(t *testing.T, blocks int) *committed {
	t.Helper()
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 1000)))
	c := openCommitted(t, d, Options{})
	c.StartCleaning(CleanerOptions{Recoder: quarter{}, Recompress: true})
	for _, b := range rand.New(rand.NewPCG(disktest.Seed(t), 0)).Perm(blocks) {
		must(t, c.blob(b, 1, 1))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	for b := 0; b < blocks; b += 4 {
		must(t, c.hole(block.Span(block.Index(b), 1)))
	}
	must(t, c.commit())
	return c
}

// TestRecompressedWhileCleaned: recompression leaves out nothing, although the
// cleaner has moved, since the newest checkpoint, what it comes to.
func TestRecompressedWhileCleaned(t *testing.T) {
	const blocks = 4096
	c := scattered(t, blocks)
	c.rest()
	if c.metrics.cleaned.Load() == 0 {
		t.Fatal("nothing was cleaned")
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

// TestRecompressedOnce: an extent with holes that has been encoded anew is not
// encoded again when its region is looked at again.
func TestRecompressedOnce(t *testing.T) {
	const blocks = 512
	c := scattered(t, blocks)
	c.rest()
	before := c.metrics.recompressedBytes.Load()
	must(t, c.blob(1, 1, 1))
	must(t, c.commit())
	c.rest()
	if n := c.metrics.recompressedBytes.Load() - before; n == 0 || n > 16*block.Size {
		t.Errorf("one block was written, and %d bytes were encoded anew", n)
	}
	must(t, c.Close())
}
