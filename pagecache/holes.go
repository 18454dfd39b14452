package pagecache

import (
	"sync"
	"sync/atomic"

	"cnbd/internal/block"

	"github.com/tidwall/btree"
)

// A holeMap is the set of pending holes: disjoint ranges, each with the sequence
// number of the InstallHole that made it. Its size is bounded by the trims whose
// records have not reached the extent map, plus the blocks written into them since.
type holeMap struct {
	// count is the number of ranges, readable without mu, so that the misses of
	// a device that nobody trims do not meet here.
	count atomic.Int64

	mu      sync.Mutex // guards all below
	ranges  btree.Map[block.Index, hole]
	seq     uint64
	scratch []heldHole // of cutLocked
}

// A hole is the value of a range whose start is the key.
type hole struct {
	end block.Index
	seq uint64
}

type heldHole struct {
	start block.Index
	hole
}

// insert makes r a hole, newer than all others, and returns its number.
func (m *holeMap) insert(r block.Range) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seq++
	m.cutLocked(r, m.seq)
	m.ranges.Set(r.Start, hole{end: r.End, seq: m.seq})
	m.count.Store(int64(m.ranges.Len()))
	return m.seq
}

// remove takes out of r what has a number of at most seq.
func (m *holeMap) remove(r block.Range, seq uint64) {
	if m.count.Load() == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cutLocked(r, seq)
	m.count.Store(int64(m.ranges.Len()))
}

// punch takes b out, whatever its number.
func (m *holeMap) punch(b block.Index) { m.remove(block.Span(b, 1), ^uint64(0)) }

// contains reports whether b lies in a hole.
func (m *holeMap) contains(b block.Index) bool {
	if m.count.Load() == 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	in := false
	m.ranges.Descend(b, func(_ block.Index, h hole) bool {
		in = b < h.end
		return false
	})
	return in
}

// last is the number of the newest hole, 0 if there never was one.
func (m *holeMap) last() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seq
}

// cutLocked removes from r the parts with a number of at most seq. What sticks
// out of r at either side stays.
func (m *holeMap) cutLocked(r block.Range, seq uint64) {
	cut := m.scratch[:0]
	m.ranges.Descend(r.Start, func(start block.Index, h hole) bool {
		if start < r.Start && h.end > r.Start && h.seq <= seq {
			cut = append(cut, heldHole{start, h})
		}
		return false
	})
	m.ranges.Ascend(r.Start, func(start block.Index, h hole) bool {
		if start >= r.End {
			return false
		}
		if h.seq <= seq {
			cut = append(cut, heldHole{start, h})
		}
		return true
	})
	for _, x := range cut {
		if x.start < r.Start {
			m.ranges.Set(x.start, hole{end: r.Start, seq: x.seq})
		} else {
			m.ranges.Delete(x.start)
		}
		if x.end > r.End {
			m.ranges.Set(r.End, hole{end: x.end, seq: x.seq})
		}
	}
	m.scratch = cut[:0]
	if cap(m.scratch) > scratchHolesMax {
		m.scratch = nil
	}
}

// scratchHolesMax bounds the memory that a cut of very many holes leaves behind.
const scratchHolesMax = 1024
