package extents

import (
	"cnbd/internal/block"
	"cnbd/internal/invariants"

	"github.com/tidwall/btree"
)

// keyEnd is the end of the key space of the map: the number of blocks whose
// byte offsets fit in 64 bits.
const keyEnd block.Index = 1 << (64 - block.Shift)

// An Overlay is the newest part of the map, in memory: what was stored since
// the last checkpoint, as ordered extents that do not overlap. Blocks in none
// of them are as the older map says. Holes are entries here, for they hide
// what is older; a hole of any length is one entry.
//
// Adjoining extents that say the same (two holes, two lost runs, two parts of
// one blob in line) are kept as one.
//
// An Overlay must not be changed while anything else is done with it. While
// nobody changes it, any number of goroutines may read it.
type Overlay struct {
	// byEnd has each extent under its end: the first extent that reaches past
	// a block is then found by one descent.
	byEnd *btree.Map[block.Index, Extent]
}

// NewOverlay returns an empty overlay.
func NewOverlay() *Overlay { return &Overlay{byEnd: btree.NewMap[block.Index, Extent](0)} }

// Clone returns a copy, in constant time: what both have is copied when either
// changes. It counts as a change of o.
func (o *Overlay) Clone() *Overlay { return &Overlay{byEnd: o.byEnd.Copy()} }

// Len is the number of extents.
func (o *Overlay) Len() int { return o.byEnd.Len() }

// Insert enters e, which must be valid and not empty, over whatever was there:
// extents under it are clipped, split or dropped. It is O(log n), amortized
// over the extents that it drops.
func (o *Overlay) Insert(e Extent) {
	r := e.Range()
	invariants.Assertf(e.Count > 0 && r.Start < r.End && r.End <= keyEnd, "extent %v out of bounds", r)
	invariants.Assertf(e.Kind != Data || uint64(e.Skip)+uint64(e.Count) <= uint64(e.Addr.Blocks) && e.Addr.Blocks <= BlobBlocksMax,
		"extent %v: blocks %d+%d of a blob of %d", r, e.Skip, e.Count, e.Addr.Blocks)
	for {
		x, ok := o.after(r.Start)
		if !ok || x.Start >= r.End {
			break
		}
		xr := x.Range()
		switch {
		case xr.End > r.End:
			o.byEnd.Set(xr.End, x.Clip(block.Range{Start: r.End, End: xr.End}))
		case xr.End < r.End:
			o.byEnd.Delete(xr.End)
		default:
			// Its key is that of e, which will replace it.
		}
		if xr.Start < r.Start {
			o.byEnd.Set(r.Start, x.Clip(block.Range{Start: xr.Start, End: r.Start}))
		}
		if xr.End >= r.End {
			break // nothing else is under e
		}
	}
	// The beginning of a blob continues nothing, and nothing continues its end: most
	// of what is entered is whole, and need not be looked for beside.
	if e.Kind != Data || e.Skip > 0 {
		if x, ok := o.byEnd.Get(r.Start); ok && x.continues(e) {
			o.byEnd.Delete(r.Start)
			x.Count += e.Count
			e = x
		}
	}
	if e.Kind != Data || uint64(e.Skip)+uint64(e.Count) < uint64(e.Addr.Blocks) {
		if x, ok := o.after(r.End); ok && e.continues(x) {
			o.byEnd.Delete(r.End)
			e.Count += x.Count // x's key is the end of both: Set replaces it
		}
	}
	o.byEnd.Set(e.Range().End, e)
}

// Lookup visits the parts of extents that lie in r, clipped to r, ascending.
// visit must not change o.
func (o *Overlay) Lookup(r block.Range, visit func(Extent)) {
	if r.Empty() {
		return
	}
	o.byEnd.Ascend(r.Start+1, func(_ block.Index, e Extent) bool {
		if e.Start >= r.End {
			return false
		}
		visit(e.Clip(r))
		return true
	})
}

// Overlaps tells whether any extent has blocks in r.
func (o *Overlay) Overlaps(r block.Range) bool {
	e, ok := o.after(r.Start)
	return ok && e.Start < r.End
}

// Ascend visits the extents that have blocks at or after start, whole and
// ascending, until visit returns false. visit must not change o.
func (o *Overlay) Ascend(start block.Index, visit func(Extent) bool) {
	o.byEnd.Ascend(start+1, func(_ block.Index, e Extent) bool { return visit(e) })
}

// after is the first extent that reaches past block i.
func (o *Overlay) after(i block.Index) (found Extent, ok bool) {
	o.byEnd.Ascend(i+1, func(_ block.Index, e Extent) bool {
		found, ok = e, true
		return false
	})
	return found, ok
}

// continues reports whether o begins where e ends and says the same, so that
// the two can be one extent.
func (e Extent) continues(o Extent) bool {
	if e.Kind != o.Kind || e.Start+block.Index(e.Count) != o.Start {
		return false
	}
	return e.Kind != Data || e.SameBlob(o)
}
