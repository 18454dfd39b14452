package nbd

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"cnbd/internal/disktest"
)

// TestRandomClients lets several connections, each used by several goroutines,
// do random requests, and compares with plain byte slices: each goroutine has
// a region of its own, at an odd offset, of which it knows every byte. A FLUSH
// must find durable all that was answered to its goroutine before.
func TestRandomClients(t *testing.T) {
	const conns, perConn, region = 4, 5, 140_007
	r := testRand(t)
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	for _, tc := range []struct {
		name     string
		opts     Options
		pieceMax int
	}{
		{"defaults", Options{}, 4096},
		{"tight bounds", Options{RequestsMax: 2, BytesMax: 128 << 10, PayloadBytesMax: 64 << 10}, 4096},
		{"tiny segments", Options{RequestsMax: 16}, 61}, // more of them than one readv takes
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newMemDisk(conns * perConn * region)
			d.pieceMax = tc.pieceMax
			tc.opts.Exports = []Export{{Backend: d}}
			s := serve(t, tc.opts)
			var group sync.WaitGroup
			for i := range conns {
				c := s.dialMode("", ReplyMode(1+i%3))
				for j := range perConn {
					m := &modelClient{
						t: t, c: c, d: d,
						r:     rand.New(rand.NewPCG(r.Uint64(), r.Uint64())),
						base:  uint64(i*perConn+j) * region,
						model: make([]byte, region),
						noise: noise,
					}
					group.Go(func() {
						for range 60 * disktest.Scale(t) {
							if !m.step() {
								return
							}
						}
					})
				}
			}
			group.Wait()
			m := s.Metrics()
			if m.Read.Requests == 0 || m.Write.Requests == 0 || m.Trim.Requests == 0 || m.Cache.Requests == 0 || m.BlockStatus.Requests == 0 || m.Flush.Requests == 0 || len(m.Errors) != 0 {
				t.Errorf("metrics: %+v", m)
			}
		})
	}
}

// A modelClient knows what its region of the disk holds.
type modelClient struct {
	t     *testing.T
	c     *Client
	d     *memDisk
	r     *rand.Rand
	base  uint64
	model []byte
	noise []byte // what it writes pieces of
}

// step does one random request and reports whether to go on.
func (m *modelClient) step() bool {
	// Most are small, some cross every buffer there is.
	n := 1 + m.r.IntN(1<<(1+m.r.IntN(17)))
	off := m.r.IntN(len(m.model) - n + 1)
	at := m.base + uint64(off)
	fua := m.r.IntN(8) == 0
	ctx := m.t.Context()
	var err error
	durable := false
	switch op := m.r.IntN(22); {
	case op < 8:
		p := make([]byte, n)
		if err = m.c.ReadAt(ctx, p, at); err == nil && !bytes.Equal(p, m.model[off:off+n]) {
			m.t.Errorf("read of %d bytes at %d (base %d) differs", n, at, m.base)
			return false
		}
	case op < 16:
		p := m.noise[m.r.IntN(len(m.noise)-n):][:n]
		copy(m.model[off:], p)
		err, durable = m.c.WriteAt(ctx, p, at, fua), fua
	case op < 17:
		clear(m.model[off : off+n])
		err, durable = m.c.Trim(ctx, at, uint64(n), fua), fua
	case op < 18:
		clear(m.model[off : off+n])
		err, durable = m.c.WriteZeroes(ctx, at, uint64(n), ZeroFlags{FUA: fua}), fua
	case op < 19:
		err = m.c.Cache(ctx, at, uint64(n))
	case op < 20:
		if !m.c.CanBlockStatus() {
			return true
		}
		var extents []Extent
		if extents, err = m.c.BlockStatus(ctx, at, uint64(n), fua); err == nil && !m.holes(extents, off, n) {
			m.t.Errorf("%d bytes at %d (base %d) are told to be %v", n, at, m.base, extents)
			return false
		}
	default:
		off, n = 0, len(m.model)
		err, durable = m.c.Flush(ctx), true
	}
	if err != nil {
		m.t.Errorf("at %d, %d bytes: %v", at, n, err)
		return false
	}
	if durable {
		m.d.mu.Lock()
		defer m.d.mu.Unlock()
		at := m.base + uint64(off)
		if !bytes.Equal(m.d.durable[at:at+uint64(n)], m.model[off:off+n]) {
			m.t.Errorf("%d bytes at %d are not durable", n, at)
			return false
		}
	}
	return true
}

// holes reports whether extents, told of the n bytes at off, lie within them, and
// every hole is zeroes.
func (m *modelClient) holes(extents []Extent, off, n int) bool {
	for _, x := range extents {
		if x.Length > uint64(n) || x.State == StateHole|StateZero && !isZero(m.model[off:off+int(x.Length)]) {
			return false
		}
		off, n = off+int(x.Length), n-int(x.Length)
	}
	return true
}
