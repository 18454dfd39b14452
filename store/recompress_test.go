package store

import (
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
// was trimmed, so that there is something to clean. o are the cleaner's settings.
func scattered(t *testing.T, blocks int, o CleanerOptions) *committed {
	t.Helper()
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 1000)))
	c := openCommitted(t, d, Options{})
	c.StartCleaning(o)
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
	c := scattered(t, blocks, CleanerOptions{Recoder: quarter{}, Recompress: true})
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
	c := scattered(t, blocks, CleanerOptions{Recoder: quarter{}, Recompress: true})
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

// A slow recoder takes encodeTime of a processor for each extent.
type slow struct {
	quarter
	spent *atomic.Int64 // time.Duration
}

const encodeTime = 10 * time.Millisecond

func (s slow) Encode(dst, src []byte, hurry bool) ([]byte, uint8, uint8, bool) {
	time.Sleep(encodeTime)
	s.spent.Add(int64(encodeTime))
	return s.quarter.Encode(dst, src, hurry)
}

// TestRecompressionGivesWay: half of an idle device's time goes into recompression,
// and from the first request on a small part, until clients have asked for nothing
// for a while.
func TestRecompressionGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var spent atomic.Int64
		var requests atomic.Uint64
		c := scattered(t, 1<<14, CleanerOptions{
			Recoder: slow{spent: &spent}, Recompress: true, Period: time.Second, Requests: requests.Load,
		})
		// during is the time that encoding takes of d, a request coming in each gap.
		during := func(d, gap time.Duration) time.Duration {
			before := spent.Load()
			for began := time.Now(); time.Since(began) < d; time.Sleep(gap) {
				requests.Add(1)
			}
			return time.Duration(spent.Load() - before)
		}
		idle := func(d time.Duration) time.Duration {
			before := spent.Load()
			time.Sleep(d)
			return time.Duration(spent.Load() - before)
		}
		for spent.Load() == 0 {
			time.Sleep(encodeTime)
		}
		for range 2 {
			if n := idle(2 * time.Second); n < 900*time.Millisecond {
				t.Errorf("an idle device's data was encoded for %v of 2 s", n)
			}
			const d = 10 * time.Second
			// What is being encoded is finished.
			if n := during(d, inUseFor/2); n < d/64 || n > d/(1+pauseRecompress)+2*encodeTime {
				t.Errorf("beside requests data was encoded for %v of %v", n, d)
			}
			time.Sleep(inUseFor + pauseRecompress*2*encodeTime)
		}
		c.StopCleaning()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
