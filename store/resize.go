package store

import (
	"errors"
	"fmt"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/mutant"
)

// A resize changes the geometry in the superblocks. Both slots have the new one
// before anything makes use of it: two checkpoints are taken, and then the device
// and the table of segments grow. So whichever slot recovery uses, nothing lies
// beyond what that slot knows of. A device that shrinks has nothing left beyond its
// new end, neither in its tree nor in the log behind either checkpoint, before the
// first of the two. A crash between them leaves slots that differ: opening takes one
// more checkpoint before anything is served.

// ErrInUse says that a store cannot become so small: there is something beyond the
// new end.
var ErrInUse = errors.New("in use")

// ValidateResize tells why a store of geometry g cannot be made one of geometry next,
// whatever it holds.
func (g *Geometry) ValidateResize(next *Geometry) error {
	if err := next.Validate(); err != nil {
		return err
	}
	// The table is written with each checkpoint, which must find its place in the
	// reserve.
	if total, most := next.Segments(), g.SegmentSize/usageEntry; total > g.Segments() && total > most {
		return fmt.Errorf("capacity %d: a store with segments of %d bytes, as this one, has a capacity of %d at most", next.Capacity, g.SegmentSize, uint64(most)*uint64(g.SegmentSize))
	}
	return nil
}

// CanResize tells what stands in the way of making bytes the size of the device and
// capacity that of the store, but for contents of the device beyond its new end. An
// error that wraps ErrInUse or ErrNoSpace says that what is stored needs more; any
// other, that there cannot be such a store.
func (s *Store) CanResize(bytes, capacity uint64) error {
	was := s.Geometry()
	next := was
	next.DeviceSize, next.Capacity = bytes, capacity
	if err := was.ValidateResize(&next); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if total := next.Segments(); total < was.Segments() {
		if last, ok := s.segments.last(); ok && last >= total {
			return fmt.Errorf("store: segment %d is %w: it needs a capacity of %d bytes", last, ErrInUse, (uint64(last)+1)*uint64(was.SegmentSize))
		}
		s.mu.RLock()
		nodes := s.mu.root.Nodes
		s.mu.RUnlock()
		free, _ := s.segments.room()
		need := s.segmentsFor(s.promised(), nodes) + max(cleanSegments, uint64(total)/cleanReserve)
		if gone := was.Segments() - total; uint64(free) < uint64(gone)+need {
			return fmt.Errorf("store: a capacity of %d bytes leaves no room to work in: %w", capacity, ErrNoSpace)
		}
	}
	return nil
}

// Resize makes bytes the size of the device and capacity that of the store. When it
// returns nil both are durable and in force. It may grow them at any time; while it
// shrinks one nothing else may use the store. A device shrinks only if all that is
// beyond its new end is holes, in which the part of a block that remains must be
// zeros: else the error wraps ErrInUse. It takes checkpoints: the caller, or another
// goroutine by way of NeedCommit, commits. After an error of a checkpoint the store
// has failed, and has the old size or the new one when it is opened again.
func (s *Store) Resize(bytes, capacity uint64) error {
	if err := s.writable(); err != nil {
		return err
	}
	s.resizing.Lock()
	defer s.resizing.Unlock()
	if err := s.CanResize(bytes, capacity); err != nil {
		return err
	}
	next := s.Geometry()
	tail := block.Range{Start: block.Index(block.CountFor(bytes)), End: block.Index(next.Blocks())}
	shrinks := capacity < next.Capacity
	next.DeviceSize, next.Capacity = bytes, capacity
	if tail.Start < tail.End {
		if err := s.forgetTail(tail); err != nil {
			return err
		}
	}
	if shrinks {
		s.cleaner.turn <- struct{}{}
		defer func() { <-s.cleaner.turn }()
		if err := s.segments.shrink(s.file, next.Segments()); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.mu.target = next
	s.mu.Unlock()
	for range 2 { // both slots
		if err := s.Checkpoint(); err != nil {
			return err
		}
		if mutant.Is(mutant.ResizeOneSlot) {
			break
		}
	}
	s.log.mu.Lock() // which writes the geometry too
	s.mu.Lock()
	s.geometry.DeviceSize, s.geometry.Capacity = next.DeviceSize, next.Capacity
	s.mu.Unlock()
	s.log.mu.Unlock()
	s.segments.grow(next.Segments())
	s.touched.grow(next.Blocks())
	return nil
}

// forgetTail takes checkpoints until neither the tree nor the log behind the newest
// checkpoint has anything of the blocks r, which are holes.
func (s *Store) forgetTail(r block.Range) error {
	for {
		if err := s.Checkpoint(); err != nil {
			return err
		}
		s.mu.RLock()
		pending := s.mu.trims.Overlaps(r) || s.mu.open.Overlaps(r) || s.mu.merging != nil && s.mu.merging.Overlaps(r)
		root := s.mu.root
		s.mu.RUnlock()
		if pending {
			continue
		}
		return s.tree.Lookup(root, r, func(e extents.Extent) error {
			return fmt.Errorf("store: blocks %v are %w", e.Range(), ErrInUse)
		})
	}
}

// last is the highest segment in use.
func (t *segments) last() (n uint32, ok bool) {
	t.visit(func(at uint32, _ segment) { n, ok = at, true })
	return n, ok
}

// shrink makes total the number of segments, and gives the space of those beyond
// back to the host. If one of them is in use by now, the error wraps ErrInUse and
// nothing has changed.
func (t *segments) shrink(f disk.File, total uint32) error {
	if err := t.chill(f, func() uint32 { return 0 }); err != nil {
		return err
	}
	t.alloc.Lock() // whoever punches has segments in use for the moment
	defer t.alloc.Unlock()
	t.mu.Lock()
	for n := total; n < uint32(len(t.table)); n++ {
		if t.table[n].state != segmentFree {
			t.mu.Unlock()
			return fmt.Errorf("store: segment %d is %w", n, ErrInUse)
		}
	}
	if gone := t.total.Load() - total; t.free < gone+reserveSegments {
		t.mu.Unlock()
		return fmt.Errorf("store: too few segments would be free: %w", ErrNoSpace)
	}
	t.free -= t.total.Load() - total
	t.total.Store(total)
	if uint32(len(t.table)) > total {
		t.table = t.table[:total]
	}
	t.low = min(t.low, total)
	t.mu.Unlock()
	// What a process that was killed has left.
	size, err := f.Size()
	if end := t.base(total); err == nil && size > end {
		err = f.Truncate(end)
	}
	if err != nil {
		return fmt.Errorf("store: set the size: %w", err)
	}
	return nil
}

// grow makes total the number of segments, unless it is less than it was.
func (t *segments) grow(total uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if was := t.total.Load(); total > was {
		t.free += total - was
		t.total.Store(total)
	}
}
