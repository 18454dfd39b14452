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

func (quarter) Encode(dst, src []byte, _ Effort) ([]byte, uint8, uint8, bool) {
	return append(dst, src[:len(src)/4]...), 2, 1, true
}

func (quarter) Decode(dst, _ []byte, a extents.Addr) ([]byte, error) {
	return append(dst, make([]byte, block.Count(a.Blocks).Bytes())...), nil
}

func (quarter) Done(codec, _ uint8, _ Effort) bool { return codec == 2 }

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

func (s slow) Encode(dst, src []byte, e Effort) ([]byte, uint8, uint8, bool) {
	time.Sleep(encodeTime)
	s.spent.Add(int64(encodeTime))
	return s.quarter.Encode(dst, src, e)
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

// grades is a Recoder that makes less of everything the more effort it may take, but for
// blobs whose first bytes are refused.
type grades struct {
	quarter
	refused map[[8]byte]bool
	efforts [PackingRaw + 1]atomic.Int64 // how often each was asked for
	packs   func()                       // is called by each encoding of effort Packing, which takes encodeTime
}

func (g *grades) Encode(dst, src []byte, e Effort) ([]byte, uint8, uint8, bool) {
	g.efforts[e].Add(1)
	if e == Packing {
		g.packs()
		time.Sleep(encodeTime)
	}
	if g.refused[[8]byte(src)] {
		return dst, 0, 0, false
	}
	return append(dst, src[:len(src)/4/(1+int(e))]...), 2, uint8(e), true
}

func (*grades) Done(codec, level uint8, e Effort) bool { return codec == 2 && level >= uint8(e) }

// TestPacked: what was encoded anew is packed when clients have asked for nothing for
// PackAfter, but for regions that are read at random; and each once, whatever comes between.
func TestPacked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const (
			region                     = 256 // blocks
			files, random, noise, last = 0, 1, 2, 3
			after                      = 30 * time.Second
		)
		var requests atomic.Uint64
		g := &grades{refused: make(map[[8]byte]bool)}
		g.packs = func() {
			if g.efforts[Packing].Load() == 1 {
				requests.Add(1)
			}
		}
		o := CleanerOptions{Recoder: g, Recompress: true, PackAfter: after, Period: time.Second, Requests: requests.Load}
		d := disktest.New(1, disktest.Options{})
		must(t, Format(d, testGeometry(4*region, 2000)))
		c := openCommitted(t, d, Options{})
		c.StartCleaning(o)
		for b := range 4 * region {
			if b/region == noise {
				rng := rand.New(rand.NewPCG(uint64(b), 5)) // as committed.blob
				var first [8]byte
				for i := range first {
					first[i] = byte(rng.Uint32())
				}
				g.refused[first] = true
			}
			must(t, c.blob(b, 1, 1))
		}
		must(t, c.commit())
		// kinds are the extents of a region, by their level and blocks; 0 is raw.
		kinds := func(n int) map[[2]int]int {
			t.Helper()
			list, err := c.Lookup(block.Span(block.Index(n*region), region), nil)
			must(t, err)
			kinds := make(map[[2]int]int)
			for _, e := range list {
				level := int(e.Addr.Level)
				if e.Addr.Codec == 0 {
					level = -1
				}
				kinds[[2]int{level, int(e.Addr.Blocks)}]++
			}
			return kinds
		}
		want := func(n, level, blocks int) {
			t.Helper()
			if k := kinds(n); len(k) != 1 || k[[2]int{level, blocks}] != region/blocks {
				t.Errorf("region %d after %v: extents by level and blocks %v, want all %d and %d", n, time.Since(c.cleaner.began), k, level, blocks)
			}
		}
		read := func(n, times int) {
			for i := range times {
				c.NoteRandomRead(block.Span(block.Index(n*region+i*37%region), 1))
			}
		}
		read(files, region/randomExtent-1) // each file once, or so
		read(random, region/randomExtent)
		for range 20 { // which takes much longer than encoding anew
			time.Sleep(after - 2*time.Second)
			requests.Add(1)
		}
		for _, n := range []int{files, random, last} {
			want(n, int(Relaxed), 16)
		}
		if n := g.efforts[Packing].Load(); n != 0 {
			t.Errorf("packed %d times beside requests", n)
		}
		// A restart begins nothing anew.
		relaxed := g.efforts[Relaxed].Load()
		c.StopCleaning()
		c.closeClean()
		c = openCommitted(t, d.Clone(), Options{})
		c.StartCleaning(o)
		read(random, region/randomExtent)
		time.Sleep(after / 2)
		if n := g.efforts[Packing].Load(); n != 0 {
			t.Errorf("packed %d times soon after the opening", n)
		}
		// A request ends it when it has just begun.
		time.Sleep(after)
		if n := g.efforts[Packing].Load(); n != 1 {
			t.Errorf("packed %d times, and there was a request in the first", n)
		}
		time.Sleep(2 * after)
		want(files, int(Packing), 32)
		want(last, int(Packing), 32)
		want(random, int(Relaxed), 16)
		if n, m := g.efforts[Relaxed].Load()-relaxed, g.efforts[Packing].Load(); n != 0 || m != 2*region/32 {
			t.Errorf("after the restart encoded %d times and packed %d times, want 0 and %d", n, m, 2*region/32)
		}
		// What was left raw was tried again, in vain.
		if n := g.efforts[PackingRaw].Load(); n < region/32 || n > 2*region/32 {
			t.Errorf("%d extents that were raw were tried again, want %d", n, region/32)
		}
		for k := range kinds(noise) {
			if k[0] != -1 {
				t.Errorf("in the region of noise are extents by level and blocks %v", k)
			}
		}
		// What was written has its extent encoded, and packed.
		must(t, c.blob(last*region+5, 1, 1))
		must(t, c.commit())
		time.Sleep(after / 2)
		if k := kinds(last); k[[2]int{int(Packing), 32}] != region/32 { // all but block 5
			t.Errorf("one block was written, and the extents are %v", k)
		}
		time.Sleep(2 * after)
		want(last, int(Packing), 32)
		if n, m := g.efforts[Relaxed].Load()-relaxed, g.efforts[Packing].Load(); n > 1 || m != 2*region/32+1 {
			t.Errorf("one block was written: encoded %d times and packed %d times", n, m-2*region/32)
		}
		// What is left of an extent of which half was overwritten becomes one again at once.
		for b := 1; b < 32; b += 2 {
			must(t, c.blob(last*region+b, 1, 1))
		}
		must(t, c.commit())
		requests.Add(1)
		time.Sleep(after / 2)
		if k := kinds(last); len(k) != 2 || k[[2]int{int(Packing), 32}] != region/32-1 || k[[2]int{int(Relaxed), 32}] != 1 {
			t.Errorf("half of an extent was overwritten, and the extents are %v", k)
		}
		time.Sleep(2 * after)
		want(last, int(Packing), 32)
		// What is read at random when it is packed already is unpacked, beside the readers.
		read(files, region/randomExtent)
		for range 60 {
			requests.Add(1)
			time.Sleep(time.Second)
		}
		want(files, int(Relaxed), 16)
		time.Sleep(2 * after)
		want(files, int(Relaxed), 16)
		c.StopCleaning()
		c.closeClean()
	})
}

// packs opens a store of so many blocks, each written alone, whose data is packed after
// 30 s without a request. With warn it tells of damage.
func packs(t *testing.T, d *disktest.Disk, blocks int, r Recoder, period time.Duration, requests *atomic.Uint64, warn func(string, error)) *committed {
	t.Helper()
	must(t, Format(d, testGeometry(blocks, 1000)))
	c := openCommitted(t, d, Options{Warn: warn})
	c.StartCleaning(CleanerOptions{Recoder: r, Recompress: true, PackAfter: 30 * time.Second, Period: period, Requests: requests.Load})
	for b := range blocks {
		must(t, c.blob(b, 1, 1))
	}
	must(t, c.commit())
	return c
}

// refuser is a Recoder to which packing is never worth it, and takes a second to find out.
type refuser struct {
	grades
	tries atomic.Int64
}

func (g *refuser) Encode(dst, src []byte, e Effort) ([]byte, uint8, uint8, bool) {
	if e >= Packing {
		g.tries.Add(1)
		time.Sleep(time.Second)
		return dst, 0, 0, false
	}
	return g.grades.Encode(dst, src, e)
}

// TestPackedInVainOnce: what does not get smaller is tried once, although requests come
// before a region is done with, and although something beside it is written.
func TestPackedInVainOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blocks = 256
		var requests atomic.Uint64
		g := new(refuser)
		c := packs(t, disktest.New(1, disktest.Options{}), blocks, g, time.Second, &requests, nil)
		for range 20 {
			time.Sleep(32 * time.Second) // two are tried between two requests
			requests.Add(1)
		}
		if n := g.tries.Load(); n != blocks/32 {
			t.Errorf("tried %d times, want %d", n, blocks/32)
		}
		for range 3 {
			must(t, c.blob(7, 1, 1))
			must(t, c.commit())
			requests.Add(1)
			time.Sleep(2 * time.Minute)
		}
		if n := g.tries.Load(); n != blocks/32+3 {
			t.Errorf("tried %d times, 3 extents of %d were written to again", n, blocks/32)
		}
		c.StopCleaning()
		must(t, c.Close())
	})
}

// TestUnpackDamaged: a damaged extent that is to be unpacked is told of, and not tried for ever.
func TestUnpackDamaged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blocks = 256
		var requests atomic.Uint64
		var warned atomic.Int64
		g := &grades{packs: func() {}}
		d := disktest.New(1, disktest.Options{})
		c := packs(t, d, blocks, g, time.Second, &requests, func(string, error) { warned.Add(1) })
		time.Sleep(2 * time.Minute)
		requests.Add(1)
		must(t, c.blob(0, 1, 1)) // what lies beside it is to be encoded with it again
		must(t, c.commit())
		time.Sleep(20 * time.Second)
		list, err := c.Lookup(block.Span(0, 32), nil)
		must(t, err)
		for _, e := range list {
			if e.Addr.Blocks == 32 {
				d.Corrupt(c.segments.base(e.Addr.Segment)+int64(e.Addr.Offset), 1)
			}
		}
		for i := range blocks / randomExtent {
			c.NoteRandomRead(block.Span(block.Index(i), 1))
		}
		for range 30 {
			requests.Add(1)
			time.Sleep(2 * time.Second)
		}
		if n := warned.Load(); n == 0 || n > 3 {
			t.Errorf("told %d times of one damaged extent", n)
		}
		c.StopCleaning()
		_ = c.Close()
	})
}

// TestPackedAgain: what was unpacked is packed again when it is not read at random any more,
// and a read now and then does not have it unpacked.
func TestPackedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const blocks = 256
		var requests atomic.Uint64
		c := packs(t, disktest.New(1, disktest.Options{}), blocks, &grades{packs: func() {}}, time.Minute, &requests, nil)
		packed := func() (n block.Count) {
			list, err := c.Lookup(block.Span(0, blocks), nil)
			must(t, err)
			for _, e := range list {
				if e.Addr.Level == uint8(Packing) {
					n += e.Count
				}
			}
			return n
		}
		read := func(every time.Duration, times int) {
			for i := range times {
				requests.Add(1)
				c.NoteRandomRead(block.Span(block.Index(i*7%blocks), 1))
				time.Sleep(every)
			}
		}
		time.Sleep(time.Hour)
		read(fadeAfter/4, 2*blocks/randomExtent)
		if n := packed(); n != blocks {
			t.Errorf("four reads in an hour have left %d blocks packed", n)
		}
		read(time.Second, 2*blocks/randomExtent)
		time.Sleep(fadeAfter / 2)
		if n := packed(); n != 0 {
			t.Errorf("%d blocks are packed, and read at random", n)
		}
		time.Sleep(3 * fadeAfter)
		if n := packed(); n != blocks {
			t.Errorf("%d blocks are packed hours after they were read at random", n)
		}
		c.StopCleaning()
		must(t, c.Close())
	})
}
