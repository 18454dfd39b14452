package nbd

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// byReader tells whether it was called by a reader.
func byReader() bool {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs)])
	for {
		f, more := frames.Next()
		if strings.HasSuffix(f.Function, ").transmit") {
			return true
		}
		if !more {
			return false
		}
	}
}

// lonely has the reader of rc see that its client has one request in flight at a time.
func lonely(rc rawConn) {
	rc.t.Helper()
	for range 2 * loneMin {
		rc.request(CmdFlush, 0, 0, 0)
		if e, _ := rc.reply(); e != 0 {
			rc.t.Fatal(e)
		}
	}
}

// The reader itself executes the requests of a client that has one in flight at a time,
// and those of others it does not.
func TestReaderExecutesLoneRequests(t *testing.T) {
	d := newMemDisk(1 << 20)
	var reader, others atomic.Int64
	d.onFlush = func(context.Context) error {
		if byReader() {
			reader.Add(1)
		} else {
			others.Add(1)
		}
		return nil
	}
	rc := serveDisk(t, d).rawGo()
	for range loneMin + 10 {
		rc.request(CmdFlush, 0, 0, 0)
		rc.reply()
	}
	if r, o := reader.Load(), others.Load(); o > loneMin || r+o != loneMin+10 {
		t.Errorf("%d by the reader, %d by others", r, o)
	}
	others.Store(0)
	two := append(header{cmd: CmdFlush}.appendTo(nil), header{cmd: CmdFlush}.appendTo(nil)...)
	for range 100 {
		rc.put(two)
		rc.reply()
		rc.reply()
	}
	if o := others.Load(); o < 199 {
		t.Errorf("%d of 200 in pairs by others than the reader", o)
	}
}

// A second request does not wait for the one that the reader executes, however often
// that happens, nor does that cost a goroutine each time.
func TestReaderIsRelieved(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	var gated, byReaders atomic.Int64
	d.onRead = func(ctx context.Context, off uint64) error {
		if off == 0 {
			return nil
		}
		gated.Add(1)
		if byReader() {
			byReaders.Add(1)
		}
		return g.wait(ctx)
	}
	s := serveDisk(t, d)
	rc := s.rawGo()
	most := 0
	for i := range uint64(50) {
		lonely(rc)
		rc.request(CmdRead, 100+i, 4096, 512)
		<-g.entered
		rc.request(CmdRead, 200+i, 0, 512)
		if e, cookie := rc.reply(); e != 0 || cookie != 200+i {
			t.Fatalf("%v for %d, want success for %d", e, cookie, 200+i)
		}
		rc.get(512)
		g.open(1)
		if e, cookie := rc.reply(); e != 0 || cookie != 100+i {
			t.Fatalf("%v for %d, want success for %d", e, cookie, 100+i)
		}
		rc.get(512)
		if i == 5 {
			most = runtime.NumGoroutine()
		}
	}
	if n := byReaders.Load(); n != gated.Load() {
		t.Errorf("%d of %d were executed by the reader", n, gated.Load())
	}
	if n := runtime.NumGoroutine(); n > most+2 {
		t.Errorf("%d goroutines, %d after the first few", n, most)
	}
}

// The one who relieves readers sleeps when there is nothing to do, and wakes up.
func TestReliefSleeps(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	s := serveDisk(t, d)
	rc := s.rawGo()
	for i := range uint64(3) {
		lonely(rc)
		eventually(t, "nobody looks at readers", s.reliever.asleep.Load)
		rc.request(CmdRead, 100+i, 0, 512)
		<-g.entered
		rc.request(CmdFlush, 200+i, 0, 0)
		if e, cookie := rc.reply(); e != 0 || cookie != 200+i {
			t.Fatalf("%v for %d", e, cookie)
		}
		g.open(1)
		rc.reply()
		rc.get(512)
	}
}

// Clients that change between one request at a time and many, with a backend that is
// sometimes slow: every answer is right and comes once.
func TestLoneAndManyByTurns(t *testing.T) {
	d := newMemDisk(1 << 20)
	rng := testRand(t)
	var n atomic.Uint64
	slow := func() {
		if n.Add(1)%97 == 0 {
			time.Sleep(3 * relieveAfter)
		}
	}
	d.onRead = func(context.Context, uint64) error { slow(); return nil }
	d.onFlush = func(context.Context) error { slow(); return nil }
	rc := serveDisk(t, d).rawGo()
	for cookie := uint64(0); cookie < 3000; {
		depth := 1
		if rng.IntN(3) == 0 {
			depth = 1 + rng.IntN(20)
		}
		for range 1 + rng.IntN(60) {
			var b []byte
			missing := map[uint64]Command{}
			for range depth {
				cmd := []Command{CmdRead, CmdFlush}[rng.IntN(2)]
				missing[cookie] = cmd
				h := header{cmd: cmd, cookie: cookie}
				if cmd == CmdRead {
					h.off, h.n = cookie%200*4096, 512
				}
				b = h.appendTo(b)
				cookie++
			}
			rc.put(b)
			for range depth {
				e, got := rc.reply()
				cmd, ok := missing[got]
				if e != 0 || !ok {
					t.Fatalf("%v for %d", e, got)
				}
				delete(missing, got)
				if cmd == CmdRead {
					rc.get(512)
				}
			}
		}
	}
}

// A quick client is polled for, and none while another has something in flight.
func TestBusyPoll(t *testing.T) {
	for _, off := range []bool{false, true} {
		d := newMemDisk(1 << 20)
		g := newGate()
		d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
		opts := Options{Exports: []Export{{Backend: d}}, BusyPoll: busyPollMax}
		if off {
			opts.BusyPoll = -1
		}
		s := serve(t, opts)
		polled := false
		a, b := s.rawGo(), s.rawGo()
		for range 200 {
			for _, rc := range []rawConn{a, b} {
				rc.request(CmdFlush, 0, 0, 0)
				rc.reply()
			}
			polled = polled || s.poller.taken.Load()
		}
		if polled == off {
			t.Errorf("BusyPoll %v: polled %v", opts.BusyPoll, polled)
		}
		eventually(t, "nobody polls for idle clients", func() bool { return !s.poller.taken.Load() })
		b.request(CmdRead, 1, 0, 512)
		<-g.entered
		for range 200 {
			a.request(CmdFlush, 0, 0, 0)
			a.reply()
			if s.poller.taken.Load() {
				t.Error("one is polled for while another waits")
			}
		}
		g.open(1)
		b.reply()
		b.get(512)
	}
}

// A client that has several requests in flight is not polled for.
func TestNoPollForMany(t *testing.T) {
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(1 << 20)}}, BusyPoll: busyPollMax})
	rc := s.rawGo()
	two := header{cmd: CmdRead, cookie: 1, n: 512}.appendTo(nil)
	two = append(two, header{cmd: CmdRead, cookie: 2, n: 512}.appendTo(nil)...)
	for range 200 {
		rc.put(two)
		for range 2 {
			rc.reply()
			rc.get(512)
		}
		if s.poller.taken.Load() {
			t.Fatal("it is polled for")
		}
	}
}

// The end of a client, and of the server, ends polling.
func TestEndOfPolling(t *testing.T) {
	for range 20 {
		d := newMemDisk(1 << 20)
		s := serve(t, Options{Exports: []Export{{Backend: d}}, BusyPoll: busyPollMax})
		rc, gone := s.rawGo(), s.rawGo()
		for range loneMin + 5 {
			for _, c := range []rawConn{rc, gone} {
				c.request(CmdFlush, 0, 0, 0)
				c.reply()
			}
		}
		gone.Close()
		eventually(t, "it is gone", func() bool { return s.Metrics().Connections == 1 })
		rc.request(CmdFlush, 0, 0, 0)
		rc.reply()
		if err := s.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := rc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the end: %v", err)
		}
	}
}
