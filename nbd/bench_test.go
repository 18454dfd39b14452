package nbd

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// A nullDisk costs nothing: what is measured is the server, the client and
// the socket between them, in one process.
type nullDisk struct {
	memDisk
	page nullPage
}

type nullPage struct{ segs [][]byte }

func (p *nullPage) Segments() [][]byte                 { return p.segs }
func (p *nullPage) Release()                           {}
func (p *nullPage) Commit(context.Context, bool) error { return nil }
func (p *nullPage) Abort()                             {}

func (d *nullDisk) Size() uint64 { return 1 << 30 }
func (d *nullDisk) Read(context.Context, uint64, uint32) (Payload, error) {
	return &d.page, nil
}

// Writes are only right at depth 1: they all share the memory.
func (d *nullDisk) PrepareWrite(context.Context, uint64, uint32) (PendingWrite, error) {
	return &d.page, nil
}

func BenchmarkUnixSocket(b *testing.B) {
	for _, bc := range []struct {
		verb  Command
		size  int
		depth int
	}{
		{CmdRead, 4 << 10, 1}, {CmdRead, 4 << 10, 16}, {CmdRead, 128 << 10, 1}, {CmdRead, 128 << 10, 16},
		{CmdWrite, 4 << 10, 1}, {CmdWrite, 128 << 10, 1},
	} {
		b.Run(fmt.Sprintf("%v/%dKiB/depth=%d", bc.verb, bc.size>>10, bc.depth), func(b *testing.B) {
			d := new(nullDisk)
			for n := bc.size; n > 0; n -= 4096 {
				d.page.segs = append(d.page.segs, make([]byte, 4096))
			}
			c := serveDisk(b, d).dial("")
			b.SetBytes(int64(bc.size))
			b.ReportAllocs()
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var group sync.WaitGroup
			for range bc.depth {
				group.Go(func() {
					p := make([]byte, bc.size)
					for left.Add(-1) >= 0 {
						var err error
						if bc.verb == CmdRead {
							err = c.ReadAt(b.Context(), p, 0)
						} else {
							err = c.WriteAt(b.Context(), p, 0, false)
						}
						if err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
		})
	}
}
