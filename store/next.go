package store

import (
	"errors"
	"fmt"

	"cnbd/extents"
	"cnbd/internal/block"
)

// errNext ends a look-up in the tree that has found what it wanted.
var errNext = errors.New("store: found")

// NextMapped returns the first block of r that may be something else than a hole, or
// r.End: a way past long holes, which Lookup would cover piece by piece. It is
// the newest map's, as of Lookup, and has the same requirements and errors.
func (s *Store) NextMapped(r block.Range) (block.Index, error) {
	if r.Empty() {
		return r.End, nil
	}
	s.mu.RLock()
	root := s.mu.root
	next := nextInOverlays(r, s.mu.open, s.mu.merging)
	s.mu.RUnlock()
	return s.nextInTree(root, r, next)
}

// nextInOverlays returns the first block of r that the overlays, which may be nil,
// have as something else than a hole, or r.End.
func nextInOverlays(r block.Range, overlays ...*extents.Overlay) block.Index {
	next := r.End
	for _, o := range overlays {
		if o == nil {
			continue
		}
		o.Ascend(r.Start, func(e extents.Extent) bool {
			if e.Start < next && e.Kind != extents.Hole {
				next = max(e.Start, r.Start)
			}
			return e.Start < next
		})
	}
	return next
}

// nextInTree returns the first block of r before next that the tree has, or next.
// What hides the tree's extents is not looked at: it may be too early.
func (s *Store) nextInTree(root extents.Root, r block.Range, next block.Index) (block.Index, error) {
	err := s.tree.Lookup(root, block.Range{Start: r.Start, End: next}, func(e extents.Extent) error {
		next = e.Start
		return errNext
	})
	if err != nil && err != errNext {
		return r.Start, fmt.Errorf("store: look up %v: %w", r, err)
	}
	return next, nil
}
