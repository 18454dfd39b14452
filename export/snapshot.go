package export

import (
	"context"
	"sync"
	"syscall"

	"cnbd/device"
	"cnbd/nbd"
)

// Snapshot is s for a read-only export of a server. It must be served no more when s
// is closed.
func Snapshot(s *device.Snapshot) nbd.Backend { return &snapshot{s: s} }

type snapshot struct {
	s       *device.Snapshot
	buffers sync.Pool // of *payload
}

// A payload is data that has been read for one request.
type payload struct {
	of   *snapshot
	data []byte
}

func (p *payload) Segments() [][]byte { return [][]byte{p.data} }
func (p *payload) Zero(int) bool      { return false }
func (p *payload) Release()           { p.of.buffers.Put(p) }

func (b *snapshot) Size() uint64   { return b.s.Bytes() }
func (b *snapshot) ReadOnly() bool { return true }

func (b *snapshot) Read(ctx context.Context, off uint64, n uint32) (nbd.Payload, error) {
	p, _ := b.buffers.Get().(*payload)
	if p == nil {
		p = &payload{of: b}
	}
	if cap(p.data) < int(n) {
		p.data = make([]byte, n)
	}
	p.data = p.data[:n]
	if err := b.s.ReadAt(ctx, p.data, off); err != nil {
		p.Release()
		return nil, err
	}
	return p, nil
}

func (b *snapshot) BlockStatus(ctx context.Context, off, n uint64, visit func(n uint64, s nbd.BlockState) bool) error {
	return b.s.Allocation(ctx, off, n, allocation(visit))
}

func (b *snapshot) Cache(context.Context, uint64, uint64) error { return nil }
func (b *snapshot) Flush(context.Context) error                 { return nil }

// The server asks for no change of what is read-only.

func (b *snapshot) PrepareWrite(context.Context, uint64, uint32) (nbd.PendingWrite, error) {
	return nil, syscall.EPERM
}

func (b *snapshot) WriteZeroes(context.Context, uint64, uint64, nbd.ZeroFlags) error {
	return syscall.EPERM
}

func (b *snapshot) Trim(context.Context, uint64, uint64, bool) error { return syscall.EPERM }
