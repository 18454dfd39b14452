package device

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/store"
)

// A Snapshot is the device as it was at one commit, to be read while the device goes
// on being written. What is overwritten meanwhile takes its space until Close; when
// writes need that space the snapshot is lost, and everything fails with an error
// that wraps store.ErrPinLost and syscall.ENOSPC. All methods but Close may be called concurrently.
type Snapshot struct {
	d    *Device
	pin  *store.Pin
	size uint64
}

// Snapshot returns the device as it is at one moment at or after the call: with all
// that was answered before. It blocks for a commit and a checkpoint. It must be
// closed before the device is.
func (d *Device) Snapshot(ctx context.Context) (*Snapshot, error) {
	if !d.opts.ReadOnly {
		if err := d.Flush(ctx); err != nil {
			return nil, err
		}
		if err := d.store.Settle(); err != nil {
			return nil, d.noSpace(err)
		}
	}
	size := d.Bytes() // what it has grown by since is not in the pin
	return &Snapshot{d: d, pin: d.store.Pin(), size: size}, nil
}

// Close gives the snapshot up. No call may be in progress.
func (s *Snapshot) Close() { s.pin.Release() }

// Bytes is the size of the device in bytes.
func (s *Snapshot) Bytes() uint64 { return s.size }

// ReadAt fills p, borrowed, with the bytes at off. It does not use the page cache:
// each stored extent that p touches is read and decoded for it. Damaged blocks are
// EIO.
func (s *Snapshot) ReadAt(ctx context.Context, p []byte, off uint64) error {
	if off > s.size || uint64(len(p)) > s.size-off {
		return ErrRange
	}
	if len(p) == 0 {
		return nil
	}
	clear(p)
	var last extents.Addr // decoded into blob
	var blob, buf []byte
	release := func() {
		if buf != nil {
			s.d.scratch.Put(buf)
			buf = nil
		}
	}
	defer release()
	var ext []extents.Extent
	return s.visit(ctx, block.Covering(off, uint64(len(p))), &ext, func(e extents.Extent) (bool, error) {
		if e.Kind != extents.Data {
			return false, fmt.Errorf("block %d was damaged in the store", e.Start)
		}
		if e.Addr != last {
			release()
			var err error
			if blob, buf, err = s.d.decode(e.Addr); err != nil {
				return false, err
			}
			last = e.Addr
		}
		data, at := blob[int(e.Skip)*block.Size:][:e.Count.Bytes()], e.Start.Bytes()
		if at < off {
			data, at = data[off-at:], off
		}
		copy(p[at-off:], data)
		return true, nil
	})
}

// Allocation is Device.Allocation of the snapshot, of which all is stored.
func (s *Snapshot) Allocation(ctx context.Context, off, n uint64, visit func(n uint64, hole bool) bool) error {
	if off > s.size || n > s.size-off {
		return ErrRange
	}
	w := walk{off: off, end: off + n, visit: visit}
	r := block.Covering(off, n)
	w.run = block.Span(r.Start, 0)
	err := s.walk(ctx, r, func(e extents.Extent) bool {
		if at := w.run.End; at < e.Start {
			w.add(block.Range{Start: at, End: e.Start}, true)
		}
		w.add(e.Range(), false)
		return !w.stopped
	})
	if err != nil {
		return err
	}
	if at := w.run.End; at < r.End && !w.stopped {
		w.add(block.Range{Start: at, End: r.End}, true)
	}
	w.flush()
	return nil
}

// walk is visit with memory of its own, for long walks; it may block for one of
// Device.Allocation.
func (s *Snapshot) walk(ctx context.Context, r block.Range, visit func(extents.Extent) bool) error {
	var w *walk
	select {
	case w = <-s.d.walks:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { s.d.walks <- w }()
	return s.visit(ctx, r, &w.ext, func(e extents.Extent) (bool, error) { return visit(e), nil })
}

// visit visits what is stored of r, or lost, in order, until fn returns false or an
// error. While fn runs, the place that it is told of is readable. ext is scratch.
func (s *Snapshot) visit(ctx context.Context, r block.Range, ext *[]extents.Extent, fn func(extents.Extent) (bool, error)) error {
	// A window of the map at a time, so that writes need not wait for long when
	// they need what is pinned.
	window := func() (more bool, err error) {
		if err := s.pin.Enter(); err != nil {
			return false, err
		}
		defer s.pin.Leave()
		if r.Start, err = s.pin.NextMapped(r); err != nil {
			return false, err
		}
		win := block.Range{Start: r.Start, End: min(r.End, r.Start+walkBlocks)}
		if *ext, err = s.pin.Lookup(win, (*ext)[:0]); err != nil {
			return false, err
		}
		r.Start = win.End
		for _, e := range *ext {
			if e.Kind == extents.Hole {
				continue
			}
			if more, err := fn(e); !more || err != nil {
				return false, err
			}
		}
		return !r.Empty(), nil
	}
	for more := !r.Empty(); more; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var err error
		more, err = window()
		switch {
		case errors.Is(err, store.ErrPinLost):
			return fmt.Errorf("device: %w: %w", syscall.ENOSPC, err)
		case err != nil:
			return fmt.Errorf("device: %w: %w", syscall.EIO, err)
		}
	}
	return nil
}

// A Region is a part of a device, and how it is stored.
type Region struct {
	Data      uint64 `json:"data"`      // bytes that are neither holes nor lost
	Stored    uint64 `json:"stored"`    // bytes that they take
	Extents   uint64 `json:"extents"`   // that they are in
	Fragments uint64 `json:"fragments"` // runs of extents that lie one behind the other in the store
	Lost      uint64 `json:"lost"`      // bytes that cannot be read
}

// fragmentGap is how many bytes may lie between two extents of one fragment: less
// than a host reads ahead, and more than a commit takes.
const fragmentGap = 16 << 10

// Regions tells how each part of that many bytes, a multiple of the block size, is
// stored; the last may be shorter. It reads all of the map, and no data.
func (s *Snapshot) Regions(ctx context.Context, bytes uint64) ([]Region, error) {
	out := make([]Region, (s.size+bytes-1)/bytes)
	var last extents.Extent
	previous := -1 // the region of last
	err := s.walk(ctx, block.Covering(0, s.size), func(e extents.Extent) bool {
		for n := int(e.Start.Bytes() / bytes); n < len(out); n++ {
			region := block.Span(block.Index(uint64(n)*bytes/block.Size), block.Count(bytes/block.Size))
			if !region.Overlaps(e.Range()) {
				break
			}
			x, part := &out[n], e.Clip(region)
			if part.Kind != extents.Data {
				x.Lost += part.Count.Bytes()
				continue
			}
			x.Data += part.Count.Bytes()
			x.Stored += uint64(part.LiveBytes())
			x.Extents++
			if n != previous || !follows(last.Addr, part.Addr) {
				x.Fragments++
			}
			last, previous = part, n
		}
		return true
	})
	return out, err
}

// follows tells whether b lies where a does, or right behind it.
func follows(a, b extents.Addr) bool {
	end := uint64(a.Offset) + uint64(a.Length)
	return a == b || a.Segment == b.Segment && uint64(b.Offset) >= end && uint64(b.Offset) <= end+fragmentGap
}
