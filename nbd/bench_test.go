package nbd

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"cnbd/internal/invariants"
)

// A nullDisk costs nothing: what is measured is the server, the client and
// the socket between them, in one process.
type nullDisk struct {
	memDisk
	page nullPage
}

type nullPage struct{ segs [][]byte }

// Next hands out the first pages, each time: writes all share the memory.
func (p *nullPage) Next(n int) [][]byte {
	return p.segs[:min((n+4095)/4096, len(p.segs))]
}

func (p *nullPage) Segments() [][]byte                 { return p.segs }
func (p *nullPage) Release()                           {}
func (p *nullPage) Zero(int) bool                      { return false }
func (p *nullPage) Commit(context.Context, bool) error { return nil }
func (p *nullPage) Abort()                             {}

func (d *nullDisk) Size() uint64 { return 1 << 30 }
func (d *nullDisk) Read(context.Context, uint64, uint32) (Payload, error) {
	return &d.page, nil
}

func (d *nullDisk) PrepareWrite(context.Context, uint64, uint32) (PendingWrite, error) {
	return &d.page, nil
}

func (d *nullDisk) ReadPromptly(uint64, uint32) (Payload, bool)              { return &d.page, true }
func (d *nullDisk) PrepareWritePromptly(uint64, uint32) (PendingWrite, bool) { return &d.page, true }
func (d *nullDisk) CommitPromptly(PendingWrite) bool                         { return true }

// newNullDisk is one for requests of size bytes, in segments of a page.
func newNullDisk(size int) *nullDisk {
	d := new(nullDisk)
	for n := size; n > 0; n -= 4096 {
		d.page.segs = append(d.page.segs, make([]byte, min(n, 4096)))
	}
	return d
}

func (d *nullDisk) Flush(context.Context) error                      { return nil }
func (d *nullDisk) Cache(context.Context, uint64, uint64) error      { return nil }
func (d *nullDisk) Trim(context.Context, uint64, uint64, bool) error { return nil }
func (d *nullDisk) WriteZeroes(context.Context, uint64, uint64, ZeroFlags) error {
	return nil
}

// A pipeline keeps depth requests of one kind in flight on a raw connection, and
// allocates nothing itself.
type pipeline struct {
	nc      net.Conn
	request []byte // with its payload
	reply   []byte
	sent    int // beyond what was answered
}

func newPipeline(s *testServer, m ReplyMode, cmd Command, size int) *pipeline {
	rc := s.rawMode(m, "")
	rc.SetDeadline(aLongTimeAgo.AddDate(200, 0, 0))
	p := &pipeline{nc: rc.Conn}
	h := header{cmd: cmd, n: uint64(size)}
	if m < ExtendedHeaders {
		p.request = h.appendTo(nil)
	} else {
		if cmd == CmdWrite {
			h.flags = cmdFlagPayloadLen
		}
		p.request = h.appendExtended(nil)
	}
	if cmd == CmdWrite {
		p.request = append(p.request, make([]byte, size)...)
	}
	reply := simpleReplySize
	switch {
	case m >= ExtendedHeaders:
		reply = chunkExtSize
	case m >= StructuredReplies && cmd == CmdRead:
		reply = chunkSize
	}
	if cmd == CmdRead {
		if m >= StructuredReplies {
			reply += 8 // the offset; there are no holes
		}
		reply += size
	}
	p.reply = make([]byte, reply)
	return p
}

// run does n requests, depth at a time.
func (p *pipeline) run(n, depth int) error {
	for done := 0; done < n; done++ {
		for ; p.sent < min(depth, n-done); p.sent++ {
			if _, err := p.nc.Write(p.request); err != nil {
				return err
			}
		}
		if _, err := io.ReadFull(p.nc, p.reply); err != nil {
			return err
		}
		p.sent--
	}
	return nil
}

// pipelines are what the server is measured with. The writes of a nullDisk share
// their memory, which is no worse for the measurement.
var pipelines = []struct {
	cmd   Command
	size  int
	depth int
}{
	{CmdRead, 4 << 10, 1}, {CmdRead, 4 << 10, 16}, {CmdRead, 128 << 10, 1}, {CmdRead, 128 << 10, 16}, {CmdRead, 2 << 20, 2},
	{CmdWrite, 4 << 10, 1}, {CmdWrite, 4 << 10, 16}, {CmdWrite, 128 << 10, 1}, {CmdWrite, 128 << 10, 16}, {CmdWrite, 2 << 20, 2},
	{CmdFlush, 0, 1}, {CmdFlush, 0, 16}, {CmdTrim, 4 << 10, 16}, {CmdWriteZeroes, 4 << 10, 16},
}

// No request allocates once a connection has had as many in flight before.
func TestRequestsDoNotAllocate(t *testing.T) {
	if invariants.Enabled {
		t.Skip("the race detector allocates")
	}
	for m := SimpleReplies; m <= ExtendedHeaders; m++ {
		for _, tc := range pipelines {
			p := newPipeline(serveDisk(t, newNullDisk(tc.size)), m, tc.cmd, tc.size)
			n := 1000
			if tc.size > 1<<20 {
				n = 200
			}
			var before, after runtime.MemStats
			var err error
			least := ^uint64(0)
			for range 3 { // others may allocate meanwhile: the first round warms up
				runtime.ReadMemStats(&before)
				err = p.run(n, tc.depth)
				runtime.ReadMemStats(&after)
				least = min(least, after.Mallocs-before.Mallocs)
			}
			if err != nil {
				t.Fatal(err)
			}
			if least > uint64(n)/10 { // the runtime has some of its own
				t.Errorf("%v: %v of %d bytes, %d at a time: %d allocations in %d requests", m, tc.cmd, tc.size, tc.depth, least, n)
			}
		}
	}
}

// A connection has at most one worker more than it ever had requests in flight.
func TestWorkersAreBounded(t *testing.T) {
	for _, depth := range []int{1, 4} {
		s := serveDisk(t, newNullDisk(512))
		before := runtime.NumGoroutine()
		p := newPipeline(s, SimpleReplies, CmdRead, 512)
		if err := p.run(3000, depth); err != nil {
			t.Fatal(err)
		}
		if n := runtime.NumGoroutine() - before - 1; n > depth+1 { // 1: the reader
			t.Errorf("%d requests at a time: %d workers", depth, n)
		}
	}
}

// BenchmarkServer measures the server alone, with a client that costs next to
// nothing but its system calls, in one process.
func BenchmarkServer(b *testing.B) {
	for m := SimpleReplies; m <= ExtendedHeaders; m++ {
		for _, bc := range pipelines {
			b.Run(fmt.Sprintf("%v/%v/%dKiB/depth=%d", m, bc.cmd, bc.size>>10, bc.depth), func(b *testing.B) {
				p := newPipeline(serveDisk(b, newNullDisk(bc.size)), m, bc.cmd, bc.size)
				if bc.cmd == CmdRead || bc.cmd == CmdWrite {
					b.SetBytes(int64(bc.size))
				}
				b.ReportAllocs()
				b.ResetTimer()
				if err := p.run(b.N, bc.depth); err != nil {
					b.Error(err)
				}
			})
		}
	}
}

// BenchmarkConnections measures what several connections do together, a request at
// a time on each.
func BenchmarkConnections(b *testing.B) {
	for _, conns := range []int{1, 64} {
		b.Run(fmt.Sprint(conns), func(b *testing.B) {
			s := serveDisk(b, newNullDisk(4096))
			var group sync.WaitGroup
			var left atomic.Int64
			left.Store(int64(b.N))
			b.SetBytes(4096)
			for range conns {
				p := newPipeline(s, StructuredReplies, CmdRead, 4096)
				group.Go(func() {
					for left.Add(-1) >= 0 {
						if err := p.run(1, 1); err != nil {
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

// BenchmarkRawSocket is the measure for the others: the same bytes sent through a
// unix socket, by a goroutine that does nothing else, and received.
func BenchmarkRawSocket(b *testing.B) {
	for _, size := range []int{4 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			l, err := Listen("unix:"+socketDir(b)+"/s", 0)
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			go func() {
				nc, err := l.Accept()
				if err != nil {
					return
				}
				defer nc.Close()
				for p := make([]byte, size); err == nil; {
					_, err = nc.Write(p)
				}
			}()
			nc, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer nc.Close()
			p := make([]byte, size)
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, err := io.ReadFull(nc, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMemoryCopy is the other measure: the bytes copied once.
func BenchmarkMemoryCopy(b *testing.B) {
	for _, size := range []int{4 << 10, 128 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			from, to := make([]byte, 64<<20), make([]byte, size) // from beyond the processor's cache
			b.SetBytes(int64(size))
			for off := 0; b.Loop(); off = (off + size) % len(from) {
				copy(to, from[off:off+size])
			}
		})
	}
}

// BenchmarkClient measures the server and [Client] together.
func BenchmarkClient(b *testing.B) {
	for _, bc := range []struct {
		verb  Command
		size  int
		depth int
	}{
		{CmdRead, 4 << 10, 1}, {CmdRead, 4 << 10, 16}, {CmdRead, 128 << 10, 1}, {CmdRead, 128 << 10, 16},
		{CmdWrite, 4 << 10, 1}, {CmdWrite, 128 << 10, 1},
	} {
		b.Run(fmt.Sprintf("%v/%dKiB/depth=%d", bc.verb, bc.size>>10, bc.depth), func(b *testing.B) {
			c := serveDisk(b, newNullDisk(bc.size)).dial("")
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
