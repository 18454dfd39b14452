// Package export shows a device as what an NBD server serves. The packages device
// and nbd do not know each other; a program that joins them, as cmd/cnbd does, needs
// this between.
package export

import (
	"context"

	"cnbd/device"
	"cnbd/nbd"
)

// Backend is d for an export of a server. It must be served no more when d is
// closed.
func Backend(d *device.Device) nbd.PromptBackend { return backend{d} }

type backend struct{ d *device.Device }

func (b backend) Size() uint64   { return b.d.Bytes() }
func (b backend) ReadOnly() bool { return b.d.ReadOnly() }

func (b backend) Read(ctx context.Context, off uint64, n uint32) (nbd.Payload, error) {
	p, err := b.d.Read(ctx, off, n)
	if err != nil {
		return nil, err // and not a nil *Payload in an interface
	}
	return p, nil
}

func (b backend) PrepareWrite(ctx context.Context, off uint64, n uint32) (nbd.PendingWrite, error) {
	w, err := b.d.PrepareWrite(ctx, off, n)
	if err != nil {
		return nil, err
	}
	return w, nil
}

func (b backend) ReadPromptly(off uint64, n uint32) (nbd.Payload, bool) {
	p, ok := b.d.ReadPromptly(off, n)
	if !ok {
		return nil, false
	}
	return p, true
}

func (b backend) PrepareWritePromptly(off uint64, n uint32) (nbd.PendingWrite, bool) {
	w, ok := b.d.PrepareWritePromptly(off, n)
	if !ok {
		return nil, false
	}
	return w, true
}

func (b backend) CommitPromptly(w nbd.PendingWrite) bool { return w.(*device.Write).CommitPromptly() }

// WriteZeroes makes holes, which is fast for whole blocks and costs at most two
// reads at the edges, so FastZero is always granted. NoHole changes nothing: in a
// log every write goes to a new place, and space for it is promised by the
// capacity of the store and not by what the range held before.
func (b backend) WriteZeroes(ctx context.Context, off, n uint64, f nbd.ZeroFlags) error {
	return b.d.WriteZeroes(ctx, off, n, f.FUA)
}

func (b backend) Trim(ctx context.Context, off, n uint64, fua bool) error {
	return b.d.Trim(ctx, off, n, fua)
}

// BlockStatus knows data and holes; a hole reads as zeros.
func (b backend) BlockStatus(ctx context.Context, off, n uint64, visit func(n uint64, s nbd.BlockState) bool) error {
	return b.d.Allocation(ctx, off, n, allocation(visit))
}

// allocation tells visit in the protocol's words.
func allocation(visit func(n uint64, s nbd.BlockState) bool) func(n uint64, hole bool) bool {
	return func(n uint64, hole bool) bool {
		if hole {
			return visit(n, nbd.StateHole|nbd.StateZero)
		}
		return visit(n, 0)
	}
}

func (b backend) Cache(ctx context.Context, off, n uint64) error { return b.d.Prefetch(ctx, off, n) }

func (b backend) Flush(ctx context.Context) error { return b.d.Flush(ctx) }
