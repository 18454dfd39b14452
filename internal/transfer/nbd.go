package transfer

import (
	"context"

	"cnbd/nbd"
)

// An Export is an NBD export as a Source and as a Target.
type Export struct {
	c     *nbd.Client
	known []nbd.Extent // of the bytes from at on
	at    uint64
}

// NewExport is the export of c, which stays the caller's.
func NewExport(c *nbd.Client) *Export { return &Export{c: c} }

// Size implements Source.
func (x *Export) Size() uint64 { return x.c.Size() }

// Serial implements Source.
func (x *Export) Serial() bool { return false }

// statusBytes is of how much the server is asked at a time what is allocated.
const statusBytes = 1 << 30

// Next implements Source. Zeros are what the server says reads as such.
func (x *Export) Next(ctx context.Context, off uint64) (n uint64, hole bool, err error) {
	if !x.c.CanBlockStatus() {
		return x.Size() - off, false, nil
	}
	for len(x.known) > 0 && x.at+x.known[0].Length <= off {
		x.at += x.known[0].Length
		x.known = x.known[1:]
	}
	if len(x.known) == 0 {
		if x.known, err = x.c.BlockStatus(ctx, off, min(x.Size()-off, statusBytes), false); err != nil {
			return 0, false, err
		}
		x.at = off
	}
	e := x.known[0]
	return x.at + e.Length - off, e.State&nbd.StateZero != 0, nil
}

// ReadAt implements Source.
func (x *Export) ReadAt(ctx context.Context, p []byte, off uint64) error {
	return x.c.ReadAt(ctx, p, off)
}

// WriteAt implements Target.
func (x *Export) WriteAt(ctx context.Context, p []byte, off uint64) error {
	return x.c.WriteAt(ctx, p, off, false)
}

// Zero implements Target for an export that is new, and zeros all over.
func (x *Export) Zero(context.Context, uint64, uint64) error { return nil }
