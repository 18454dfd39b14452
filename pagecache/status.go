package pagecache

import (
	"slices"

	"cnbd/internal/block"
)

// What the extent map does not know yet, for those who tell what is allocated.
// They ask Unstored, then PendingHoles, then the map. In this order no block is
// told a state that it did not have meanwhile: what is written back after it was
// looked for here is found in the map, which has it first (invariant 5).

// Unstored appends to dst, ascending, the blocks of r whose visible version the
// extent map does not have: dirty, in writeback, or failed. It stops after about
// max of them: what it says is complete for the blocks of r before end, which is
// not below r.Start unless r is empty. It does not block; its cost is bounded by
// the smaller of the length of r and the size of the cache.
func (c *Cache) Unstored(r block.Range, max int, dst []block.Index) (blocks []block.Index, end block.Index) {
	end = r.End
	if r.Empty() || c.charged.Load() == 0 { // invariant 7
		return dst, end
	}
	const pending = dirty | writeback | failed
	from := len(dst)
	if uint64(r.Len()) <= uint64(len(c.index.Values()))/8 { // a look-up costs about 8 steps of the scan below
		for b := r.Start; b < r.End; b++ {
			if len(dst)-from == max {
				return dst, b
			}
			sh, bucket := c.home(b)
			sh.mu.Lock()
			if v := c.find(sh, bucket, b); v != 0 && c.arena.Header(v).state.Load()&pending != 0 {
				dst = append(dst, b)
			}
			sh.mu.Unlock()
		}
		return dst, end
	}
	// A shard at a time: a block keeps its shard, so none moves past the scan.
	cut := func() {
		slices.Sort(dst[from:])
		if len(dst)-from > max {
			dst = dst[:from+max]
			end = dst[len(dst)-1] + 1
		}
	}
	for i := range c.shards {
		sh := &c.shards[i]
		sh.mu.Lock()
		if v := &sh.versions; v.dirty+v.writeback+v.failed > 0 {
			for _, bucket := range sh.buckets {
				for version := bucket.first; version != 0; version = c.arena.Header(version).next {
					h := c.arena.Header(version)
					b := block.Index(h.block.Load())
					if s := h.state.Load(); s&pending != 0 && s&shadow == 0 && r.Start <= b && b < end {
						dst = append(dst, b)
					}
				}
			}
		}
		sh.mu.Unlock()
		if len(dst)-from >= 2*max {
			cut()
		}
	}
	cut()
	return dst, end
}

// PendingHoles appends to dst, ascending, the parts of pending holes that lie in
// r, but for single blocks that were written since. It stops after max of them:
// what it says is complete for the blocks of r before end. It does not block.
func (c *Cache) PendingHoles(r block.Range, max int, dst []block.Range) (holes []block.Range, end block.Index) {
	return c.holes.in(r, max, dst)
}

// in appends the parts that lie in r, at most max, and returns where it stopped.
func (m *holeMap) in(r block.Range, max int, dst []block.Range) ([]block.Range, block.Index) {
	end := r.End
	if r.Empty() || m.count.Load() == 0 {
		return dst, end
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ranges.Descend(r.Start, func(start block.Index, h hole) bool {
		if start < r.Start && h.end > r.Start {
			dst = append(dst, block.Range{Start: r.Start, End: min(h.end, r.End)})
		}
		return false
	})
	found := 0
	m.ranges.Ascend(r.Start, func(start block.Index, h hole) bool {
		if start >= r.End {
			return false
		}
		if found++; found > max {
			end = start
			return false
		}
		dst = append(dst, block.Range{Start: start, End: min(h.end, r.End)})
		return true
	})
	return dst, end
}
