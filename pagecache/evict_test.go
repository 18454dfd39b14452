package pagecache

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A place is what the policy knows of a clean version.
type place struct {
	r    Ref
	rank uint32
	free bool // not pinned
}

// queuesOf are the small and the main queue of a shard, oldest first, as their
// links have them. It checks that they hold the clean versions of the shard, once
// each. REQUIRES: sh.mu held.
func queuesOf(t testing.TB, c *Cache, sh *shard) (queues [2][]place) {
	t.Helper()
	for i, q := range []*queue{&sh.small, &sh.main} {
		newer := Ref(0)
		for r := q.newest; r != 0; r = c.arena.Header(r).older {
			h := c.arena.Header(r)
			home, bucket := c.home(block.Index(h.block.Load()))
			if len(queues[i]) == q.n || !isClean(h.state.Load()) || home != sh || c.find(sh, bucket, block.Index(h.block.Load())) != r ||
				h.newer != newer || (h.rank.Load()&mainRank != 0) != (i == 1) {
				t.Errorf("queue %d of %d versions has as its %d. newest version %d of block %d, in state %b, rank %x, newer %d, want %d",
					i, q.n, len(queues[i])+1, r, h.block.Load(), h.state.Load(), h.rank.Load(), h.newer, newer)
				return queues
			}
			queues[i] = append(queues[i], place{r, h.rank.Load(), h.refs.Load() == 1})
			newer = r
		}
		if len(queues[i]) != q.n || q.oldest != newer {
			t.Errorf("queue %d has %d versions, want %d, and as its oldest %d, want %d", i, len(queues[i]), q.n, newer, q.oldest)
		}
		slices.Reverse(queues[i])
	}
	if n := int64(sh.small.n + sh.main.n); n != sh.versions.clean {
		t.Errorf("%d versions in queues, %d clean", n, sh.versions.clean)
	}
	return queues
}

// checkQueues checks the queues of all shards; nobody else uses the cache.
func checkQueues(t testing.TB, c *Cache) (queues [][2][]place) {
	t.Helper()
	queues = make([][2][]place, len(c.shards))
	var small, all int
	for i := range c.shards {
		sh := &c.shards[i]
		sh.mu.Lock()
		queues[i] = queuesOf(t, c, sh)
		sh.mu.Unlock()
		small += len(queues[i][0])
		all += len(queues[i][0]) + len(queues[i][1])
	}
	if t.Failed() {
		t.FailNow()
	}
	if int64(small) != c.small.Load() || int64(all) != c.clean.Load() {
		t.Fatalf("%d versions in small queues and %d in all, counted are %d and %d", small, all, c.small.Load(), c.clean.Load())
	}
	return queues
}

// Whatever has happened, an eviction takes the oldest that may go, moves or passes
// over what is older, and leaves the rest as it is.
func TestEvictionOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	met := edges{"from small": 0, "from main": 0, "moved": 0, "again": 0, "passed over": 0, "none": 0, "ghost": 0, "by a ghost": 0}
	for round := 0; round < 3*disktest.Scale(t) || !met.all() && round < 100; round++ {
		frames := 8 << rng.IntN(8)
		c := newCache(t, Options{CacheBytes: blocks(frames), PayloadBytes: blocks(8), BackgroundBytes: blocks(1)})
		span := block.Index(2 + rng.IntN(3*frames))
		var pinned []Ref
		var unstored []block.Index
		for range 2500 {
			hot := rng.Float64()
			b := block.Index(hot * hot * hot * hot * float64(span))
			switch op := rng.IntN(12); {
			case op < 6:
				r, cl, st := c.Get(b)
				if st == Claimed {
					for n := b / 16 * 16; n < b/16*16+16; n++ {
						if near, ok := c.TryClaim(n); ok {
							c.Fill(near, pageOf(n, 1))
						}
					}
					ok := false
					if r, ok = c.FillPinned(cl, pageOf(b, 1)); !ok {
						break
					}
				}
				if pinned = append(pinned, r); len(pinned) > frames/4 || rng.IntN(2) == 0 {
					i := rng.IntN(len(pinned))
					c.Unpin(pinned[i])
					pinned = slices.Delete(pinned, i, i+1)
				}
			case op == 6:
				if r, st := c.Peek(b); st == Hit {
					if rng.IntN(2) == 0 {
						c.CountPeeks([]Ref{r}, 0)
					}
					c.Unpin(r)
				}
			case op == 7 && c.TryBalanceDirty(1):
				if !writeAdmitted(t, c, b, 1, 1) {
					unstored = append(unstored, b)
				}
			case op == 8:
				for _, b := range unstored {
					flush(t, c, b, 1)
				}
				unstored = unstored[:0]
			case op == 9 && rng.IntN(8) == 0:
				hole := block.Span(b, block.Count(1+rng.IntN(8)))
				_, seq := c.InstallHole(hole, 1)
				c.HolesApplied(hole, seq)
				unstored = slices.DeleteFunc(unstored, hole.Contains)
			default:
				checkEviction(t, c, met)
			}
		}
		for _, b := range unstored {
			flush(t, c, b, 1)
		}
		for _, r := range pinned {
			c.Unpin(r)
		}
		checkQueues(t, c)
		evictEverything(t, c)
		closeCache(t, c)
	}
	met.check(t)
}

// checkEviction evicts one version and checks what that did to the queues.
func checkEviction(t *testing.T, c *Cache, met edges) {
	t.Helper()
	before := checkQueues(t, c)
	r, ok := c.evict(c.evictAll())
	after := checkQueues(t, c)

	where, free := map[Ref]string{}, false
	for i := range after {
		for q, places := range after[i] {
			for _, p := range places {
				where[p.r] = fmt.Sprint(i, q)
			}
		}
	}
	for i := range before {
		for q, places := range before[i] {
			gone := slices.IndexFunc(places, func(p place) bool { return p.r == r })
			for k, p := range places {
				free = free || p.free
				reads, rank := p.rank&readsMask, c.arena.Header(p.r).rank.Load()
				hot := q == 0 && (reads >= 3 || reads >= 1 && p.rank&ghostRank != 0)
				switch where[p.r] {
				case "":
					// One that was hot may have moved, and been the next in turn there.
					if p.r != r || !p.free || hot && rank != p.rank-reads+mainRank {
						t.Fatalf("version %d in queue %d, rank %x, free %v, is gone; evicted was %d", p.r, q, p.rank, p.free, r)
					}
					if q == 1 || hot {
						met["from main"]++
						break
					}
					met["from small"]++
					if reads > 0 {
						b := block.Index(c.arena.Header(r).block.Load())
						if sh, bucket := c.home(b); sh.buckets[bucket].ghost != c.ghostOf(c.arena.Header(r)) {
							t.Fatalf("block %d was read, and left no ghost", b)
						}
						met["ghost"]++
					}
				case fmt.Sprint(i, 1-q):
					if !hot || !p.free || rank&readsMask != 0 {
						t.Fatalf("version %d moved from queue %d, rank %x to %x, free %v", p.r, q, p.rank, rank, p.free)
					}
					met["moved"]++
					if reads < 3 {
						met["by a ghost"]++
					}
				default:
					if gone >= 0 && k < gone && p.free && (q == 0 || reads == 0) {
						t.Fatalf("version %d, rank %x, was older than %d, which was evicted", p.r, p.rank, r)
					}
					switch {
					case rank < p.rank:
						met["again"]++
					case rank > p.rank:
						t.Fatalf("version %d rose from rank %x to %x", p.r, p.rank, rank)
					case gone >= 0 && k < gone:
						met["passed over"]++
					}
				}
			}
		}
	}
	if ok != free {
		t.Fatalf("evicted %v; there was one to evict: %v", ok, free)
	}
	if ok {
		c.release(r)
	} else {
		met["none"]++
	}
}

// What is read again and again stays, whatever passes through the cache once: reads
// of each size, with the blocks that were decoded beside, and writes.
func TestScanLeavesHotSet(t *testing.T) {
	const frames, hot = 4096, 2048
	const extent = 16
	for name, scan := range map[string]func(*Cache, block.Index) block.Count{
		"reads of a block":   func(c *Cache, b block.Index) block.Count { return readThrough(t, c, b, 1, extent) },
		"reads of 128 KiB":   func(c *Cache, b block.Index) block.Count { return readThrough(t, c, b, 32, extent) },
		"reads across":       func(c *Cache, b block.Index) block.Count { return readThrough(t, c, b+5, 32, extent) },
		"single blocks":      func(c *Cache, b block.Index) block.Count { return readThrough(t, c, b, 1, 1) },
		"one of each extent": func(c *Cache, b block.Index) block.Count { readThrough(t, c, b+3, 1, extent); return extent },
		"each read two times": func(c *Cache, b block.Index) block.Count {
			readThrough(t, c, b, 1, extent)
			return readThrough(t, c, b, 1, extent)
		},
		"writes": func(c *Cache, b block.Index) block.Count {
			write(t, c, b, 1, 1)
			flush(t, c, b, 1)
			return 1
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCache(t, Options{CacheBytes: blocks(frames), PayloadBytes: blocks(64)})
			defer closeCache(t, c)
			rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
			for range 3 {
				for _, b := range rng.Perm(hot) {
					readThrough(t, c, block.Index(b), 1, extent)
				}
			}
			for b := block.Index(1 << 20); b < 1<<20+4*frames; {
				b += block.Index(scan(c, b))
			}
			left := 0
			for b := range block.Index(hot) {
				if r, st := c.Peek(b); st == Hit {
					c.Unpin(r)
					left++
				}
			}
			t.Logf("%d of %d hot blocks left", left, hot)
			if left < hot*95/100 {
				t.Errorf("a scan of 4 times the cache leaves %d of %d hot blocks", left, hot)
			}
			checkQueues(t, c)
		})
	}
}

// Beside a hot set what is read ahead is there still when it is asked for, if it is no more
// than a third of the small queue: the shards give in turn what is oldest in all of them.
func TestReadAheadStays(t *testing.T) {
	const frames, group = 16 << 20 / block.Size, 1 << groupShift
	const ahead = frames / 32
	gone, all := 0, 0
	for range 8 { // each cache has a hash of its own
		c := newCache(t, Options{CacheBytes: blocks(frames), PayloadBytes: blocks(64)})
		for range 3 {
			for b := block.Index(0); b < frames; b += group {
				readThrough(t, c, b, group, group)
			}
		}
		const from = 4 * frames
		for b := block.Index(from); b < from+frames+ahead; b += group {
			for i := b; i < b+group; i++ {
				if cl, ok := c.TryClaim(i); ok {
					c.Fill(cl, zeros)
				}
			}
			if b < from+ahead {
				continue
			}
			all++
			there := 0
			for i := b - ahead; i < b-ahead+group; i++ {
				if r, st := c.Peek(i); st == Hit {
					c.CountPeeks([]Ref{r}, 0)
					c.Unpin(r)
					there++
				}
			}
			if there < group {
				gone++
			}
		}
		closeCache(t, c)
	}
	t.Logf("%d of %d extents were gone, in part, before they were read", gone, all)
	if gone > all/12 {
		t.Errorf("%d of %d extents were gone, in part, before they were read", gone, all)
	}
}

// readThrough reads n blocks from b as the device does: all at once if they are
// here, else with what is decoded beside each that is not.
func readThrough(t testing.TB, c *Cache, b block.Index, n, extent block.Count) block.Count {
	t.Helper()
	var refs []Ref
	defer func() {
		for _, r := range refs {
			c.Unpin(r)
		}
	}()
	want := block.Span(b, n)
	for b := want.Start; b < want.End; b++ {
		r, st := c.Peek(b)
		if st != Hit {
			break
		}
		refs = append(refs, r)
	}
	if block.Count(len(refs)) == n {
		c.CountPeeks(refs, 0)
		return n
	}
	var claims []Claim
	for b := want.Start; b < want.End; b++ {
		switch r, cl, st := c.Get(b); st {
		case Hit:
			refs = append(refs, r)
		case Claimed:
			claims = append(claims, cl)
		default:
			t.Fatalf("block %d: %v", b, st)
		}
	}
	for _, cl := range claims {
		first := cl.Block() - cl.Block()%block.Index(extent)
		for b := first; b < first+block.Index(extent); b++ {
			if near, ok := c.TryClaim(b); ok {
				c.Fill(near, zeros)
			}
		}
		if r, ok := c.FillPinned(cl, zeros); ok {
			refs = append(refs, r)
		}
	}
	return n
}

var zeros = make([]byte, block.Size)

// A hot block that is overwritten is still hot.
func TestWriteKeepsRank(t *testing.T) {
	c := newCache(t, Options{CacheBytes: blocks(256), PayloadBytes: blocks(8)})
	defer closeCache(t, c)
	load(t, c, 1, 1)
	for range 3 {
		expect(t, c, 1, 1)
	}
	for stamp := uint64(2); stamp < 5; stamp++ {
		write(t, c, 1, stamp, 1)
		flush(t, c, 1, 1)
		for b := range block.Index(1024) {
			if r, cl, st := c.Get(1000 + b); st == Claimed {
				c.Fill(cl, zeros)
			} else if st == Hit {
				c.Unpin(r)
			}
		}
		expect(t, c, 1, stamp)
		checkQueues(t, c)
	}
}

// A block that comes back while its ghost is there is hot; one that was decoded
// beside others and never read has none.
func TestGhost(t *testing.T) {
	for _, read := range []bool{true, false} {
		c := newCache(t, Options{CacheBytes: blocks(1024), PayloadBytes: blocks(8)})
		cl, _ := c.TryClaim(7)
		c.Fill(cl, zeros)
		if read {
			r, _, _ := c.Get(7)
			c.Unpin(r)
		}
		for b := block.Index(1000); ; b++ { // until it is gone
			readThrough(t, c, b, 1, 1)
			if r, st := c.Peek(7); st != Hit {
				break
			} else {
				c.Unpin(r)
			}
		}
		readThrough(t, c, 7, 1, 1)
		for b := range block.Index(4096) {
			readThrough(t, c, 10000+b, 1, 1)
		}
		r, st := c.Peek(7)
		if st == Hit {
			c.Unpin(r)
		}
		if (st == Hit) != read {
			t.Errorf("a block read, evicted and read again is hot: %v, want %v", st == Hit, read)
		}
		closeCache(t, c)
	}
}

// While all is dirty or pinned, an evictor gives up when it has seen that, however
// many steps it has left: it looks at what is clean only.
func TestEvictorDoesNotSpin(t *testing.T) {
	const frames = 16384
	for _, pins := range []block.Index{100, frames} {
		evictorDoesNotSpin(t, frames, pins)
	}
}

// evictorDoesNotSpin has so many of frames pinned, and the others dirty.
func evictorDoesNotSpin(t *testing.T, frames int, pins block.Index) {
	t.Helper()
	c := newCache(t, Options{CacheBytes: blocks(frames), PayloadBytes: blocks(8), DirtyBytesMax: blocks(frames)})
	defer closeCache(t, c)
	for b := range block.Index(frames) - pins {
		write(t, c, b, 1, 1)
	}
	var pinned []Ref
	for b := range pins {
		_, cl, _ := c.Get(block.Index(frames) + b)
		r, _ := c.FillPinned(cl, zeros)
		pinned = append(pinned, r)
	}
	if _, ok := c.evict(math.MaxInt); ok {
		t.Fatal("a pinned or dirty version was evicted")
	}
	if n := c.evictAll(); n > 16*(int(pins)+shardCount) {
		t.Errorf("%d steps for %d clean versions", n, pins)
	}
	if _, cl, _ := c.Get(1 << 30); c.Fill(cl, zeros) {
		t.Error("a frame was had although all are dirty or pinned")
	}
	for _, r := range pinned {
		c.Unpin(r)
	}
	if _, cl, _ := c.Get(1 << 30); !c.Fill(cl, zeros) {
		t.Error("no frame was had although some are clean")
	}
}

// The blocks of an extent that are read together stay together: a part of an extent
// saves nothing to who reads all of it.
func TestExtentsStayWhole(t *testing.T) {
	const frames, extent = 8192, 16
	c := newCache(t, Options{CacheBytes: blocks(frames), PayloadBytes: blocks(64)})
	defer closeCache(t, c)
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	const extents = 2 * frames / extent
	for range 8 * extents {
		readThrough(t, c, block.Index(rng.IntN(extents)*extent), extent, extent)
	}
	whole, parts := 0, 0
	for e := range extents {
		here := 0
		for b := range block.Index(extent) {
			if r, st := c.Peek(block.Index(e*extent) + b); st == Hit {
				c.Unpin(r)
				here++
			}
		}
		switch {
		case here == extent:
			whole++
		case here > 0:
			parts++
		}
	}
	t.Logf("%d extents are here, %d in part", whole, parts)
	if whole < extents*4/10 {
		t.Errorf("of %d extents %d are here and %d in part", extents, whole, parts)
	}
}
