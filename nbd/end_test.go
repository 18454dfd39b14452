package nbd

import (
	"context"
	"errors"
	"net"
	"runtime"
	"testing"
	"time"

	"cnbd/internal/invariants"
)

// A stage is a point in the life of a connection at which it can end. enter
// brings one there; its disk waits in what the stage is about.
type stage struct {
	name    string
	enter   func(s *testServer, d *memDisk, g gate) rawConn
	noticed bool // the server notices there that the client is gone
}

var stages = []stage{
	{"greeting", func(s *testServer, _ *memDisk, _ gate) rawConn {
		rc := s.raw()
		rc.get(18)
		return rc
	}, true},
	{"first option", func(s *testServer, _ *memDisk, _ gate) rawConn { return s.rawTLS() }, true},
	{"half an option", func(s *testServer, _ *memDisk, _ gate) rawConn {
		rc := s.rawTLS()
		rc.put(appendOption(nil, optGo, make([]byte, 100))[:50])
		return rc
	}, true},
	{"idle", func(s *testServer, _ *memDisk, _ gate) rawConn { return s.rawGo() }, true},
	{"half a header", func(s *testServer, _ *memDisk, _ gate) rawConn {
		rc := s.rawGo()
		rc.put(header{}.appendTo(nil)[:11])
		return rc
	}, true},
	{"memory for a write", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onPrepare = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
		rc := s.rawGo()
		rc.put(append(header{cmd: CmdWrite, n: 4096}.appendTo(nil), make([]byte, 4096)...))
		<-g.entered
		return rc
	}, false},
	{"half a payload", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onPrepare = func(context.Context, uint64) error { g.entered <- struct{}{}; return nil }
		rc := s.rawGo()
		rc.put(append(header{cmd: CmdWrite, n: 60_000}.appendTo(nil), make([]byte, 50_000)...))
		<-g.entered
		return rc
	}, true},
	{"half a refused payload", func(s *testServer, _ *memDisk, _ gate) rawConn {
		rc := s.rawGo()
		rc.put(append(header{cmd: CmdWrite, flags: 0x8000, n: 60_000}.appendTo(nil), make([]byte, 50_000)...))
		return rc
	}, true},
	{"every verb", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
		d.onCommit, d.onFlush = d.onRead, g.wait
		rc := s.rawGo()
		for i := range uint64(2) {
			rc.request(CmdRead, i, 0, 4096)
			rc.request(CmdFlush, i, 0, 0)
			rc.put(append(header{cmd: CmdWrite, n: 4096}.appendTo(nil), make([]byte, 4096)...))
		}
		for range 6 {
			<-g.entered
		}
		return rc
	}, true},
	{"executed by the reader", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
		rc := s.rawGo()
		lonely(rc)
		rc.request(CmdRead, 1, 0, 4096)
		<-g.entered
		return rc
	}, true},
	{"requests max", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onFlush = g.wait
		rc := s.rawGo()
		for range s.opts.RequestsMax + 1 {
			rc.request(CmdFlush, 0, 0, 0)
		}
		for range s.opts.RequestsMax {
			<-g.entered
		}
		return rc
	}, false},
	{"bytes max", func(s *testServer, d *memDisk, g gate) rawConn {
		d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
		rc := s.rawGo()
		for range 4 { // the first three fit
			rc.request(CmdRead, 0, 0, 64<<10)
		}
		for range 3 {
			<-g.entered
		}
		eventually(s.t, "a request waits for memory", func() bool {
			s.budget.mu.Lock()
			defer s.budget.mu.Unlock()
			return len(s.budget.mu.waiters) == 1
		})
		return rc
	}, false},
	{"replies not taken", func(s *testServer, d *memDisk, _ gate) rawConn {
		rc := s.rawGo()
		for range 8 { // more than a socket holds
			rc.request(CmdRead, 0, 0, 64<<10)
		}
		eventually(s.t, "one is being sent", func() bool { return d.payloads.Load() > 0 })
		return rc
	}, true},
}

// eachStage runs test for every stage, without TLS and with it.
func eachStage(t *testing.T, test func(t *testing.T, st stage, dirs *certDirs)) {
	dirs := newCertDirs(t)
	for _, st := range stages {
		t.Run(st.name, func(t *testing.T) { test(t, st, nil) })
		t.Run(st.name+"/TLS", func(t *testing.T) { test(t, st, dirs) })
	}
}

// serveStage starts a server, with TLS if there are dirs, and brings a connection
// to st. The channel gets the reason for its end.
func serveStage(t *testing.T, st stage, dirs *certDirs) (*testServer, *memDisk, rawConn, <-chan error) {
	d := newMemDisk(1 << 20)
	ended := make(chan error, 1)
	opts := Options{
		Exports: []Export{{Backend: d}}, RequestsMax: 8,
		PayloadBytesMax: 64 << 10, BytesMax: 512 << 10, ConnectionsMax: 2, // 64 KiB of reserve, 320 KiB of pool
		Log: func(e Event) {
			if e.Kind == EventClose {
				ended <- e.Err
			}
		},
	}
	var s *testServer
	if dirs == nil {
		s = serve(t, opts)
	} else {
		s = dirs.serve(t, opts)
	}
	g := newGate() // never opened
	rc := st.enter(s, d, g)
	return s, d, rc, ended
}

// Close ends a connection at every stage, at once, and all memory comes back.
func TestCloseAtEveryStage(t *testing.T) {
	eachStage(t, func(t *testing.T, st stage, dirs *certDirs) {
		s, d, rc, ended := serveStage(t, st, dirs)
		closed := make(chan struct{})
		go func() { defer close(closed); s.Close() }()
		select {
		case <-closed:
		case <-time.After(10 * time.Second):
			t.Fatal("Close hangs")
		}
		d.idle(t)
		if u := s.budget.used(); u != 0 {
			t.Errorf("%d bytes of the budget are in use", u)
		}
		if err := <-ended; err != nil && err != ErrServerClosed {
			t.Errorf("ended with %v", err)
		}
		for { // what was sent before, and then the end
			if _, err := rc.Read(make([]byte, 1<<16)); err != nil {
				var timeout net.Error
				if errors.As(err, &timeout) && timeout.Timeout() {
					t.Error("not closed")
				}
				return
			}
		}
	})
}

// So does the death of the client, wherever the server reads or sends.
func TestDeathAtEveryStage(t *testing.T) {
	eachStage(t, func(t *testing.T, st stage, dirs *certDirs) {
		s, d, rc, ended := serveStage(t, st, dirs)
		rc.Close()
		if !st.noticed {
			return // at the latest by the Close of serve
		}
		if err := <-ended; err == nil || errors.Is(err, net.ErrClosed) {
			t.Errorf("ended with %v", err) // not why, but what came of it
		}
		d.idle(t)
		if u := s.budget.used(); u != 0 {
			t.Errorf("%d bytes of the budget are in use", u)
		}
	})
}

// A thousand clients that only sit there, half of them under TLS, and some in the
// middle of the handshake, cost little memory and nobody's time, and end when the
// server does.
func TestIdleConnections(t *testing.T) {
	const clients = 1000
	dirs := newCertDirs(t)
	d := newMemDisk(1 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, TLS: dirs.load(t), ConnectionsMax: clients + 1, HandshakeTimeout: time.Hour})
	busy := s.dial("")
	r, model := testRand(t), make([]byte, 1<<20)
	work := func() (best time.Duration) {
		for range 5 {
			begin := time.Now()
			for range 200 {
				n := 1 + r.IntN(16<<10)
				off := r.IntN(len(model) - n)
				p := pattern(n, byte(r.Uint32()))
				copy(model[off:], p)
				if err := busy.WriteAt(t.Context(), p, uint64(off), false); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, n)
				off = r.IntN(len(model) - n)
				if err := busy.ReadAt(t.Context(), got, uint64(off)); err != nil {
					t.Fatal(err)
				}
				mustEqual(t, "read", got, model[off:][:n])
			}
			if took := time.Since(begin); best == 0 || took < best {
				best = took
			}
		}
		return best
	}
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	alone, before := work(), memory()
	for i := range clients {
		s.tls = nil
		if i%2 == 0 {
			s.tls = clientConfig(t, dirs.client)
		}
		switch {
		case i%10 < 8:
			s.rawGo()
		default:
			s.rawTLS()
		}
	}
	if n := s.Metrics().Connections; n != clients+1 {
		t.Errorf("%d connections", n)
	}
	// The clients are in this process, and counted too.
	each := (memory() - before) / clients
	beside := work()
	t.Logf("%d bytes for each idle connection; 400 requests in %v without them, %v with them", each, alone, beside)
	if each > 96<<10 {
		t.Errorf("an idle connection takes %d bytes", each)
	}
	if beside > 4*alone {
		t.Errorf("400 requests take %v, %v without idle clients", beside, alone)
	}
	late := s.raw() // it takes the place of one that has not got an export
	late.get(18)
	if m := s.Metrics(); m.ConnectionsDisplaced != 1 || m.ConnectionsRefused != 0 {
		t.Errorf("%+v", m)
	}
	begin := time.Now()
	s.Close()
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("closed after %v", took)
	}
}

// A client that shuts down its side for sending has gone: it is not answered.
func TestHalfClosedClientIsGone(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate() // never opened
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	s := serveDisk(t, d)
	rc := s.rawGo()
	rc.request(CmdRead, 1, 0, 4096)
	<-g.entered
	rc.closeWrite()
	rc.eof()
	eventually(t, "the connection is gone", func() bool { return s.Metrics().Connections == 0 })
}

// A client may send ABORT and go without waiting for the answer: that is no
// failure, and no answer is owed.
func TestAbortWithoutWaiting(t *testing.T) {
	ended := make(chan error, 1)
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(1)}}, Log: func(e Event) {
		if e.Kind == EventClose {
			ended <- e.Err
		}
	}})
	for range 20 {
		rc := s.raw()
		rc.get(18)
		rc.put(appendOption([]byte{0, 0, 0, 3}, optAbort, nil))
		rc.Close()
		if err := <-ended; err != nil {
			t.Fatalf("ended with %v", err)
		}
	}
	if n := s.Metrics().HandshakesFailed; n != 0 {
		t.Errorf("%d failed handshakes", n)
	}
}

// wrongDisk hands out less than it was asked for.
type wrongDisk struct{ *memDisk }

func (d wrongDisk) Read(ctx context.Context, off uint64, n uint32) (Payload, error) {
	return d.memDisk.Read(ctx, off, n-1)
}

func (d wrongDisk) PrepareWrite(ctx context.Context, off uint64, n uint32) (PendingWrite, error) {
	return d.memDisk.PrepareWrite(ctx, off, n-1)
}

func (d wrongDisk) ReadPromptly(off uint64, n uint32) (Payload, bool) {
	return d.memDisk.ReadPromptly(off, n-1)
}

func (d wrongDisk) PrepareWritePromptly(off uint64, n uint32) (PendingWrite, bool) {
	return d.memDisk.PrepareWritePromptly(off, n-1)
}

// A backend that gives too little costs the request, never the connection's sync.
func TestBackendGivesTooLittle(t *testing.T) {
	if invariants.Enabled {
		t.Skip("panics in this build")
	}
	d := newMemDisk(1 << 20)
	c := serveDisk(t, wrongDisk{d}).dial("")
	p := pattern(100_000, 1)
	for range 3 {
		if err := c.ReadAt(t.Context(), p, 0); err != EIO {
			t.Errorf("read: %v", err)
		}
		if err := c.WriteAt(t.Context(), p, 0, false); err != EIO {
			t.Errorf("write: %v", err)
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Errorf("flush: %v", err)
		}
	}
	d.idle(t)
}
