package device

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cnbd/internal/block"
	"cnbd/store"
)

// A TailError says that a device does not shrink, for there is something beyond its
// new end.
type TailError struct {
	Bytes uint64 // of data there
}

func (e *TailError) Error() string {
	return fmt.Sprintf("device: %d bytes of data lie beyond the new end", e.Bytes)
}

// ResizeOptions say how large a device is to be.
type ResizeOptions struct {
	Bytes         uint64 // of the device: a multiple of 512
	CapacityBytes uint64 // of the store
	// Drop drops what lies beyond the new end; without it that is a *TailError.
	Drop bool
}

// Resize makes the device and its store as large as o says, durably. A device can
// grow while it is used: requests beyond its old end are taken as soon as Resize
// returns. While it or its store shrinks no request may be in progress. dropped is how
// much data was beyond the new end. An error that wraps store.ErrInUse or
// syscall.ENOSPC, or a *TailError, says that what is stored needs more than o allows;
// syscall.EINVAL, that there is no such device. Then nothing has changed.
func (d *Device) Resize(ctx context.Context, o ResizeOptions) (dropped uint64, err error) {
	if d.opts.ReadOnly {
		return 0, ErrReadOnly
	}
	d.resize.Lock()
	defer d.resize.Unlock()
	if o.Bytes < d.Bytes() || o.CapacityBytes < d.Geometry().Capacity {
		d.ahead.busy.Wait() // what was read ahead of requests that have ended
	}
	if err := d.store.CanResize(o.Bytes, o.CapacityBytes); err != nil {
		if errors.Is(err, store.ErrInUse) || errors.Is(err, store.ErrNoSpace) {
			return 0, fmt.Errorf("device: %w: %w", syscall.ENOSPC, err)
		}
		return 0, fmt.Errorf("device: %w: %w", syscall.EINVAL, err)
	}
	if was := d.Bytes(); o.Bytes < was {
		if dropped, err = d.stored(ctx, o.Bytes, was-o.Bytes); err != nil {
			return 0, err
		}
		if dropped > 0 {
			if !o.Drop {
				return 0, &TailError{dropped}
			}
			if err := d.WriteZeroes(ctx, o.Bytes, was-o.Bytes, true); err != nil {
				return 0, err
			}
		}
	}
	if err := d.Flush(ctx); err != nil {
		return dropped, err
	}
	if err := d.store.Resize(o.Bytes, o.CapacityBytes); err != nil {
		return dropped, fmt.Errorf("device: %w: %w", syscall.EIO, err)
	}
	d.size.Store(o.Bytes)
	return dropped, nil
}

// stored is how many of the n bytes at off are data; of a block of which off cuts
// the head off, those that are not zeros.
func (d *Device) stored(ctx context.Context, off, n uint64) (bytes uint64, err error) {
	if part := min(-off%block.Size, n); part > 0 {
		p, err := d.Read(ctx, off, uint32(part))
		if err != nil {
			return 0, err
		}
		for _, s := range p.Segments() {
			for _, b := range s {
				if b != 0 {
					bytes++
				}
			}
		}
		p.Release()
		off, n = off+part, n-part
	}
	for n > 0 && err == nil { // Allocation tells as much as it can at a time
		err = d.Allocation(ctx, off, n, func(run uint64, hole bool) bool {
			if !hole {
				bytes += run
			}
			off, n = off+run, n-run
			return true
		})
	}
	return bytes, err
}

// end is the block behind the device's last.
func (d *Device) end() block.Index { return block.Index(block.CountFor(d.Bytes())) }
