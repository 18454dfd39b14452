package device

import (
	"context"
	"fmt"
	"syscall"

	"cnbd/extents"
	"cnbd/internal/block"
)

const (
	// walkBlocks is how much of the map is looked up at a time: at most as many
	// extents, a megabyte, of which there are usually far fewer.
	walkBlocks = 64 << 20 >> block.Shift
	// walkWindows is how often that is done in one Allocation.
	walkWindows = 256
	// walkUnstored is how many blocks and holes that the map does not have yet
	// are taken from the cache at a time.
	walkUnstored = 16 << 10

	// prefetchBytes is how much of a Prefetch is read at a time.
	prefetchBytes = 256 << 10
)

// A walk is an Allocation in progress, with memory that is kept for the next.
type walk struct {
	buffers struct {
		unstored []block.Index
		holes    []block.Range
	}
	ext []extents.Extent

	unstored []block.Index // what the map does not have: not yet passed, ascending
	holes    []block.Range
	windows  int    // that may still be looked up
	off, end uint64 // what was asked for, in bytes
	visit    func(n uint64, hole bool) bool
	run      block.Range // not yet visited
	hole     bool        // what it is
	stopped  bool        // visit has returned false
}

// Allocation tells which of the n bytes at off are stored, or waiting to be, and
// which are holes, which read as zeros: it calls visit for runs, in order from off
// on and without a gap, until visit returns false or all is told, or after so much
// work (16 GiB of data) that the caller had better ask again. Holes are exact
// to the block. A run of data may hold zeros, for what was written and has not
// been written back yet counts as data, and so do lost blocks. What changes
// meanwhile is told as it was at one moment or another, block by block.
//
// It reads nodes of the map, and no data. It may block for another Allocation.
func (d *Device) Allocation(ctx context.Context, off, n uint64, visit func(n uint64, hole bool) bool) error {
	if err := d.admit(off, n); err != nil {
		return err
	}
	var w *walk
	select {
	case w = <-d.walks:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() {
		w.visit = nil
		d.walks <- w
	}()
	r := block.Covering(off, n)
	w.off, w.end, w.visit = off, off+n, visit
	w.run, w.hole, w.stopped = block.Span(r.Start, 0), false, false
	for w.windows = walkWindows; !r.Empty() && !w.stopped && w.windows > 0; {
		// The cache first, then the map: see pagecache.Unstored.
		part := r
		w.unstored, part.End = d.cache.Unstored(part, walkUnstored, w.buffers.unstored[:0])
		w.holes, part.End = d.cache.PendingHoles(part, walkUnstored, w.buffers.holes[:0])
		w.buffers.unstored, w.buffers.holes = w.unstored, w.holes
		if err := w.part(ctx, d, part); err != nil {
			return err
		}
		r.Start = part.End
	}
	w.flush()
	return nil
}

// part walks r, of which w knows what the map does not have, until it is stopped or
// has no windows left.
func (w *walk) part(ctx context.Context, d *Device, r block.Range) error {
	for !r.Empty() && !w.stopped && w.windows > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		w.windows--
		next, end, err := w.window(d, r)
		if err != nil {
			return fmt.Errorf("device: %w: %w", syscall.EIO, err)
		}
		w.mapped(block.Range{Start: r.Start, End: next}, true)
		r.Start = end
		for _, e := range w.ext {
			w.mapped(e.Range(), e.Kind == extents.Hole)
		}
	}
	return nil
}

// window looks up what the map has of the beginning of r into w.ext: a hole up to
// next, and the extents from there to end. Each has a View of its own, for writes that
// are short of space wait for the oldest.
func (w *walk) window(d *Device, r block.Range) (next, end block.Index, err error) {
	view := d.store.View()
	defer d.store.Unview(view)
	if next, err = d.store.NextMapped(r); err != nil {
		return 0, 0, err
	}
	end = min(r.End, next+walkBlocks)
	w.ext, err = d.store.Lookup(block.Range{Start: next, End: end}, w.ext[:0])
	return next, end, err
}

// mapped adds r, which the map has as data or a hole, with what the cache knows
// better.
func (w *walk) mapped(r block.Range, hole bool) {
	for at := r.Start; at < r.End && !w.stopped; {
		for len(w.unstored) > 0 && w.unstored[0] < at {
			w.unstored = w.unstored[1:]
		}
		for len(w.holes) > 0 && w.holes[0].End <= at {
			w.holes = w.holes[1:]
		}
		stop, is := r.End, hole
		switch {
		case len(w.unstored) > 0 && w.unstored[0] == at:
			stop, is = at+1, false
		case len(w.holes) > 0 && w.holes[0].Start <= at:
			stop, is = min(stop, w.holes[0].End), true
		case len(w.holes) > 0:
			stop = min(stop, w.holes[0].Start)
		}
		if len(w.unstored) > 0 && w.unstored[0] > at {
			stop = min(stop, w.unstored[0])
		}
		w.add(block.Range{Start: at, End: stop}, is)
		at = stop
	}
}

// add makes r, which adjoins what came before, a part of the current run or begins
// another.
func (w *walk) add(r block.Range, hole bool) {
	if hole != w.hole {
		w.flush()
		w.run.Start, w.hole = r.Start, hole
	}
	w.run.End = r.End
}

// flush visits the current run, as far as it was asked for.
func (w *walk) flush() {
	if from, to := max(w.run.Start.Bytes(), w.off), min(w.run.End.Bytes(), w.end); from < to && !w.stopped {
		w.stopped = !w.visit(to-from, w.hole)
	}
}

// Prefetch reads the n bytes at off into the cache, as far as they fit into half
// of it, but for what others are reading. It blocks until that is done. In a cache that
// is full of what is read often they have a tenth of it, where the last ones replace the
// first.
func (d *Device) Prefetch(ctx context.Context, off, n uint64) error {
	if err := d.admit(off, n); err != nil {
		return err
	}
	select {
	case d.prefetches <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-d.prefetches }()
	for end := off + min(n, uint64(d.opts.CacheBytes)/2); off < end; {
		step := min(end-off, prefetchBytes)
		p := d.payloads.Get().(*Payload)
		err := p.fetch(block.Covering(off, step))
		p.Release()
		if err != nil {
			d.metrics.readErrors.Add(1)
			return err
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		off += step
	}
	return nil
}
