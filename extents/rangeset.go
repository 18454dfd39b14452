package extents

import (
	"encoding/binary"

	"cnbd/internal/block"
	"cnbd/internal/invariants"

	"github.com/tidwall/btree"
)

// A RangeSet is a set of blocks, kept as ordered ranges that neither overlap
// nor adjoin. The store keeps the trims in one that are promised but not yet
// worked off in the tree (rule R11).
//
// A RangeSet must not be changed while anything else is done with it. While
// nobody changes it, any number of goroutines may read it.
type RangeSet struct {
	byEnd  *btree.Map[block.Index, block.Index] // end of each range to its start
	blocks block.Count
}

// NewRangeSet returns an empty set.
func NewRangeSet() *RangeSet {
	return &RangeSet{byEnd: btree.NewMap[block.Index, block.Index](0)}
}

// Len is the number of ranges.
func (s *RangeSet) Len() int { return s.byEnd.Len() }

// Blocks is the number of blocks in the set.
func (s *RangeSet) Blocks() block.Count { return s.blocks }

// Add puts the blocks of r into the set.
func (s *RangeSet) Add(r block.Range) {
	if r.Empty() {
		return
	}
	invariants.Assertf(r.End <= keyEnd, "range %v out of bounds", r)
	// What ends where r begins joins it, hence >= r.Start and not > r.Start.
	for {
		x, ok := s.ending(r.Start)
		if !ok || x.Start > r.End {
			break
		}
		s.byEnd.Delete(x.End)
		s.blocks -= x.Len()
		r.Start, r.End = min(r.Start, x.Start), max(r.End, x.End)
	}
	s.byEnd.Set(r.End, r.Start)
	s.blocks += r.Len()
}

// Remove takes the blocks of r out of the set.
func (s *RangeSet) Remove(r block.Range) {
	if r.Empty() {
		return
	}
	for {
		x, ok := s.after(r.Start)
		if !ok || x.Start >= r.End {
			return
		}
		s.blocks -= x.Intersect(r).Len()
		if x.End > r.End {
			s.byEnd.Set(x.End, r.End)
		} else {
			s.byEnd.Delete(x.End)
		}
		if x.Start < r.Start {
			s.byEnd.Set(r.Start, x.Start)
		}
	}
}

// Contains reports whether block i is in the set.
func (s *RangeSet) Contains(i block.Index) bool {
	x, ok := s.after(i)
	return ok && x.Start <= i
}

// Overlaps reports whether any block of r is in the set.
func (s *RangeSet) Overlaps(r block.Range) bool {
	x, ok := s.after(r.Start)
	return ok && x.Overlaps(r)
}

// Covers reports whether all blocks of r are in the set.
func (s *RangeSet) Covers(r block.Range) bool {
	x, ok := s.after(r.Start)
	return r.Empty() || ok && x.Covers(r)
}

// Visit visits the parts of the set's ranges that lie in r, ascending. visit
// must not change s.
func (s *RangeSet) Visit(r block.Range, visit func(block.Range)) {
	if r.Empty() {
		return
	}
	s.byEnd.Ascend(r.Start+1, func(end, start block.Index) bool {
		if start >= r.End {
			return false
		}
		visit(r.Intersect(block.Range{Start: start, End: end}))
		return true
	})
}

// Clone returns a copy that can be changed on its own. It only reads s.
func (s *RangeSet) Clone() *RangeSet {
	c := NewRangeSet()
	c.blocks = s.blocks
	s.byEnd.Scan(func(end, start block.Index) bool {
		c.byEnd.Set(end, start)
		return true
	})
	return c
}

// after is the first range that reaches past block i.
func (s *RangeSet) after(i block.Index) (block.Range, bool) { return s.ending(i + 1) }

// ending is the first range that ends at i or later.
func (s *RangeSet) ending(i block.Index) (r block.Range, ok bool) {
	s.byEnd.Ascend(i, func(end, start block.Index) bool {
		r, ok = block.Range{Start: start, End: end}, true
		return false
	})
	return r, ok
}

// The encoded form, all numbers uvarints in the fewest bytes:
//
//	number of ranges
//	for each range, ascending:
//	    blocks between the end of the range before (or block 0) and its start;
//	        not 0 except for the first range
//	    its blocks; not 0

// Append appends the encoded form of s to dst: 2 to 6 bytes for a usual range.
func (s *RangeSet) Append(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(s.Len()))
	last := block.Index(0)
	s.byEnd.Scan(func(end, start block.Index) bool {
		dst = binary.AppendUvarint(dst, uint64(start-last))
		dst = binary.AppendUvarint(dst, uint64(end-start))
		last = end
		return true
	})
	return dst
}

// DecodeRangeSet decodes what Append made, and nothing else: any other bytes,
// also trailing ones, are an error that wraps ErrCorrupt. data is borrowed.
func DecodeRangeSet(data []byte) (*RangeSet, error) {
	in := reader{rest: data}
	s := NewRangeSet()
	last := block.Index(0)
	n := in.uvarint()
	for i := uint64(0); i < n && !in.failed; i++ {
		gap, blocks := in.uvarint(), in.uvarint()
		if in.failed {
			break
		}
		if gap == 0 && i > 0 || gap > uint64(keyEnd-last) || blocks == 0 || blocks > uint64(keyEnd-last)-gap {
			return nil, corruptf("extents: range set: range %d of %d at byte %d: expected a range after block %d, found gap %d and %d blocks",
				i, n, len(data)-len(in.rest), last, gap, blocks)
		}
		start := last + block.Index(gap)
		last = start + block.Index(blocks)
		s.byEnd.Set(last, start)
		s.blocks += block.Count(blocks)
	}
	if in.failed {
		return nil, corruptf("extents: range set: expected %d ranges, found %d bytes that end early or are not in the shortest form", n, len(data))
	}
	if len(in.rest) != 0 {
		return nil, corruptf("extents: range set: expected %d ranges to end at byte %d, found %d bytes", n, len(data)-len(in.rest), len(data))
	}
	return s, nil
}
