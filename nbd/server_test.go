package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/internal/disktest"
)

// A gate is passed by one call for each token; entered has one for each that arrived.
type gate struct{ entered, tokens chan struct{} }

func newGate() gate { return gate{make(chan struct{}, 1000), make(chan struct{}, 1000)} }

func (g gate) wait(ctx context.Context) error {
	g.entered <- struct{}{}
	select {
	case <-g.tokens:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g gate) open(n int) {
	for range n {
		g.tokens <- struct{}{}
	}
}

func TestAnswersOutOfOrder(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onRead = func(ctx context.Context, off uint64) error {
		if off == 0 {
			return g.wait(ctx)
		}
		return nil
	}
	s := serveDisk(t, d)
	rc := s.rawGo()
	rc.request(CmdRead, 1, 0, 4096)
	<-g.entered
	for i := uint64(2); i < 20; i++ {
		rc.request(CmdRead, i, 4096, 512)
		if e, cookie := rc.reply(); e != 0 || cookie != i {
			t.Fatalf("got %v for %d, want the answer to %d", e, cookie, i)
		}
		rc.get(512)
	}
	g.open(1)
	if e, cookie := rc.reply(); e != 0 || cookie != 1 {
		t.Fatalf("got %v for %d, want the answer to 1", e, cookie)
	}
	rc.get(4096)
}

// When there are more workers than requests in flight, none is started: one is
// about to be idle.
func TestDispatchWaitsForAWorker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(Options{Exports: []Export{{Backend: newMemDisk(1)}}})
		if err != nil {
			t.Fatal(err)
		}
		c := newConn(s, new(streamConn))
		c.started, c.inFlight = 2, 1
		r := new(request)
		go c.dispatch(r)
		synctest.Wait()
		if got := <-c.work; got != r || c.started != 2 {
			t.Errorf("got %+v, %d workers", got, c.started)
		}
	})
}

// A FLUSH waits for none that is in flight, and covers all that was answered,
// on every connection.
func TestFlushCoversTheAnswered(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onCommit = func(ctx context.Context, off uint64) error {
		if off == 8192 {
			return g.wait(ctx)
		}
		return nil
	}
	s := serveDisk(t, d)
	a, b := s.dial(""), s.dial("")
	want := pattern(4096, 1)
	if err := a.WriteAt(t.Context(), want, 4096, false); err != nil {
		t.Fatal(err)
	}
	var slow sync.WaitGroup
	slow.Go(func() {
		if err := a.WriteAt(t.Context(), want, 8192, false); err != nil {
			t.Error(err)
		}
	})
	<-g.entered
	for _, c := range []*Client{b, a} {
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	_, durable := d.contents()
	mustEqual(t, "durable after FLUSH", durable[:12288], append(append(make([]byte, 4096), want...), make([]byte, 4096)...))
	g.open(1)
	slow.Wait()

	if err := a.WriteAt(t.Context(), want, 16384, true); err != nil {
		t.Fatal(err)
	}
	_, durable = d.contents()
	mustEqual(t, "durable after FUA", durable[16384:20480], want)
}

func TestBackendErrors(t *testing.T) {
	d := newMemDisk(1 << 20)
	var answer atomic.Pointer[error]
	say := func(err error) { answer.Store(&err) }
	d.onRead = func(context.Context, uint64) error { return *answer.Load() }
	d.onPrepare = d.onRead
	d.onFlush = func(context.Context) error { return *answer.Load() }
	d.onZero = func(ZeroFlags) error { return *answer.Load() }
	var failed atomic.Int64
	s := serve(t, Options{
		Exports: []Export{{Backend: d}},
		Log: func(e Event) {
			if e.Kind == EventRequestFailed && e.Err == nil {
				t.Errorf("%+v", e)
			} else if e.Kind == EventRequestFailed {
				failed.Add(1)
			}
		},
	})
	c := s.dial("")
	p := make([]byte, 100<<10)
	for _, tc := range []struct {
		err  error
		want Errno
	}{
		{fmt.Errorf("device: full: %w", syscall.ENOSPC), ENOSPC},
		{ErrNoSpace, ENOSPC}, {ErrReadOnly, EPERM}, {ErrShutdown, ESHUTDOWN}, {context.Canceled, ESHUTDOWN},
		{errors.New("anything"), EIO}, {syscall.ENOENT, EIO}, {syscall.ENOMEM, ENOMEM}, {syscall.EDQUOT, ENOSPC},
		{syscall.EROFS, EPERM}, {EINVAL, EINVAL}, {EOVERFLOW, EINVAL}, {Errno(9999), EIO},
		{context.DeadlineExceeded, EIO},
	} {
		say(tc.err)
		for verb, got := range map[string]error{
			"read":  c.ReadAt(t.Context(), p, 0),
			"write": c.WriteAt(t.Context(), p, 0, false), // its payload is consumed
			"flush": c.Flush(t.Context()),
			"zero":  c.WriteZeroes(t.Context(), 0, 10, ZeroFlags{}),
		} {
			if got != tc.want {
				t.Errorf("%s, backend says %v: got %v, want %v", verb, tc.err, got, tc.want)
			}
		}
	}
	logged := failed.Load()
	if logged != 4*14 {
		t.Errorf("%d failures logged", logged)
	}
	say(ErrNotSupported)
	if got := c.WriteZeroes(t.Context(), 0, 10, ZeroFlags{FastZero: true}); got != ENOTSUP {
		t.Errorf("FAST_ZERO: %v", got)
	}
	if got := c.WriteZeroes(t.Context(), 0, 10, ZeroFlags{}); got != EINVAL {
		t.Errorf("ENOTSUP without FAST_ZERO came as %v", got)
	}
	if failed.Load() != logged+1 {
		t.Error("a FAST_ZERO that cannot be fast is no failure to log")
	}
	say(nil)
	if got := c.ReadAt(t.Context(), p, 0); got != nil {
		t.Error(got)
	}
	m := s.Metrics()
	if m.Errors[ENOTSUP] != 1 || m.Errors[ENOSPC] != 4*3 || m.Read.Errors != 14 || m.Read.Requests != 15 || m.Read.Bytes != uint64(len(p)) {
		t.Errorf("metrics: %+v", m)
	}
}

// Flags and ranges must reach the backend unchanged.
func TestVerbsReachTheBackend(t *testing.T) {
	d := newMemDisk(1 << 20)
	zero := make(chan ZeroFlags, 1)
	d.onZero = func(f ZeroFlags) error { zero <- f; return nil }
	trims := make(chan string, 2)
	d.onTrim = func(off, n uint64, fua bool) error { trims <- fmt.Sprint(off, n, fua); return nil }
	c := serveDisk(t, d).dial("")
	for _, f := range []ZeroFlags{{}, {FUA: true}, {NoHole: true}, {FastZero: true}, {true, true, true}} {
		if err := c.WriteZeroes(t.Context(), 5, 7, f); err != nil {
			t.Fatal(err)
		}
		if got := <-zero; got != f {
			t.Errorf("%+v arrived as %+v", f, got)
		}
	}
	for _, want := range []string{"1 1048575 false", "4096 1 true"} {
		var off, n uint64
		var fua bool
		fmt.Sscan(want, &off, &n, &fua)
		if err := c.Trim(t.Context(), off, n, fua); err != nil {
			t.Fatal(err)
		}
		if got := <-trims; got != want {
			t.Errorf("trim %s arrived as %s", want, got)
		}
	}
}

// A trim for which there is no room is answered like one that had an effect: it is
// advice. Every other error is told.
func TestTrimWithoutRoom(t *testing.T) {
	d := newMemDisk(1 << 20)
	d.onTrim = func(off, _ uint64, _ bool) error {
		if off == 0 {
			return fmt.Errorf("full: %w", syscall.ENOSPC)
		}
		return fmt.Errorf("broken: %w", syscall.EIO)
	}
	c := serveDisk(t, d).dial("")
	if err := c.Trim(t.Context(), 0, 4096, false); err != nil {
		t.Error(err)
	}
	if err := c.Trim(t.Context(), 4096, 4096, false); !errors.Is(err, syscall.EIO) {
		t.Errorf("EIO arrived as %v", err)
	}
}

// growingDisk is a memDisk of which only the beginning is there at first.
type growingDisk struct {
	*memDisk
	size atomic.Uint64
}

func (d *growingDisk) Size() uint64 { return d.size.Load() }

// A client that has learnt elsewhere that the export has grown may use what was added.
func TestGrownExport(t *testing.T) {
	d := &growingDisk{memDisk: newMemDisk(1 << 20)}
	d.size.Store(512 << 10)
	c := serveDisk(t, d).dial("")
	data := bytes.Repeat([]byte("grown"), 1000)
	if err := c.WriteAt(t.Context(), data, 512<<10, false); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("beyond the end: %v", err)
	}
	d.size.Store(1 << 20)
	if err := c.WriteAt(t.Context(), data, 512<<10, false); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err := c.ReadAt(t.Context(), got, 512<<10); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what was added: %v, or what is read is wrong", err)
	}
	if err := c.ReadAt(t.Context(), got, 1<<20-1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("across the new end: %v", err)
	}
}

// What a server has to say of an export is told to who asks for it, and to nobody else.
func TestAbout(t *testing.T) {
	d := newMemDisk(1 << 20)
	said := []string{"run=1", "after=2"}
	s := serve(t, Options{Exports: []Export{{Name: "a", Backend: d, About: func() []string { return said }}, {Name: "b", Backend: d}}})
	for name, want := range map[string][]string{"a": said, "b": nil} {
		if got, err := About(t.Context(), s.uri(name)); err != nil || !slices.Equal(got, want) {
			t.Errorf("of %s: %q, %v, want %q", name, got, err, want)
		}
	}
	if got, err := About(t.Context(), s.uri("c")); err == nil {
		t.Errorf("of an export that there is not: %q", got)
	}
	c := s.dial("a")
	if _, err := c.BlockStatus(t.Context(), 0, 4096, false); err != nil {
		t.Errorf("base:allocation beside it: %v", err)
	}
}

// What was sent when Shutdown is called is answered, in flight or not yet read, and over
// TCP what is on its way as well. The client's side of a socket does not hold it all.
func TestShutdownAnswersWhatWasSent(t *testing.T) {
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			const atOnce, unread, late, length = 8, 40, 4, 64 << 10
			d := newMemDisk(1 << 20)
			g := newGate()
			d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
			s := serve(t, Options{Exports: []Export{{Backend: d}}, RequestsMax: atOnce})
			rc, handshaking := s.rawGo(), s.raw()
			if network == "tcp" {
				rc = s.rawTCP()
			}
			handshaking.get(18)

			n := uint64(atOnce + unread)
			for i := range n {
				rc.request(CmdRead, i, i*4096, length)
			}
			for range atOnce {
				<-g.entered
			}
			down := make(chan error, 1)
			go func() { down <- s.Shutdown(t.Context()) }()
			<-s.stopping
			handshaking.eof()
			if network == "tcp" {
				for range late {
					rc.request(CmdRead, n, 0, length)
					n++
				}
			}
			go func() {
				for range n - atOnce {
					<-g.entered
				}
			}()
			g.open(int(n))
			seen := map[uint64]bool{}
			for range n {
				e, cookie := rc.reply()
				if e != 0 || cookie >= n || seen[cookie] {
					t.Fatalf("%v for %d", e, cookie)
				}
				seen[cookie] = true
				rc.get(length)
			}
			rc.eof()
			rc.Close()
			if err := <-down; err != nil {
				t.Fatal(err)
			}
			if _, err := net.Dial("unix", s.path); err == nil {
				t.Error("still listening after Shutdown")
			}
		})
	}
}

// Clients that never pause, and look at nothing any more when they cannot send: what they
// could send whole is answered, through a unix socket without exception, and what they
// could not is not done. TCP cannot tell when the server has read for the last time.
func TestShutdownOfBusyClients(t *testing.T) {
	dirs := newCertDirs(t)
	for _, network := range []string{"unix", "unix, TLS", "tcp"} {
		t.Run(network, func(t *testing.T) {
			d := newMemDisk(64 << 20)
			opts := Options{Exports: []Export{{Backend: d}}}
			var s *testServer
			if network == "unix, TLS" {
				s = dirs.serve(t, opts)
			} else {
				s = serve(t, opts)
			}
			var clients sync.WaitGroup
			var started atomic.Int64
			for c, length := range []int{1, 4096, 60_000, 200_000} {
				connect := s.rawGo
				if network == "tcp" {
					connect = s.rawTCP
				}
				rc := connect()
				place := func(n uint64) uint64 { return uint64(c)<<24 | n%32<<19 }
				mark := func(n uint64) byte { return byte(1 + n%251) }
				slots, over := make(chan struct{}, 8), make(chan struct{})
				sent := make(chan uint64, 1)
				go func() {
					var n uint64
					defer func() { sent <- n }()
					for ; ; n++ {
						select {
						case slots <- struct{}{}:
						case <-over:
							return
						}
						b := header{cmd: CmdWrite, cookie: n, off: place(n), n: uint64(length)}.appendTo(nil)
						if _, err := rc.Write(append(b, bytes.Repeat([]byte{mark(n)}, length)...)); err != nil {
							rc.giveUp()
							return
						}
					}
				}()
				clients.Go(func() {
					var answered uint64
					for b := make([]byte, simpleReplySize); ; <-slots {
						if _, err := io.ReadFull(rc, b); err != nil {
							break
						}
						if e, cookie, _ := decodeSimpleReply(b); e != 0 {
							t.Errorf("client %d: %v for %d", c, e, cookie)
						}
						if answered++; answered == 8 {
							started.Add(1)
						}
					}
					close(over)
					rc.Close()
					n := <-sent
					if n < answered || n > answered && network != "tcp" {
						t.Errorf("client %d: %d of %d writes that were sent are answered", c, answered, n)
					}
					if data, _ := d.contents(); network != "tcp" && data[place(n)] == mark(n) {
						t.Errorf("client %d: write %d is done, and was not sent", c, n)
					}
				})
			}
			eventually(t, "all are at work", func() bool { return started.Load() == 4 })
			if err := s.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			clients.Wait()
		})
	}
}

// A client that sends while something else is in flight at the stop, and would give up if
// it could not.
func TestShutdownGoesOn(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onFlush = g.wait
	s := serveDisk(t, d)
	rc := s.rawGo()
	rc.request(CmdFlush, 1, 0, 0)
	<-g.entered
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	<-s.stopping
	for end := time.Now().Add(3 * drainQuiet); time.Now().Before(end); {
		runtime.Gosched()
	}
	for i := range uint64(20) {
		rc.request(CmdRead, 2+i, 0, 512)
	}
	g.open(1)
	seen := uint64(0)
	for i := range 21 {
		e, cookie := rc.reply()
		if seen += cookie; e != 0 || (i == 0) != (cookie == 1) { // the shortest is the first
			t.Errorf("%v for %d, answer %d", e, cookie, i)
		}
		if cookie > 1 {
			rc.get(512)
		}
	}
	if seen != 21*22/2 {
		t.Errorf("the cookies of the answers have a sum of %d", seen)
	}
	rc.eof()
	if err := <-down; err != nil {
		t.Error(err)
	}
}

// A stop just before the reader sleeps ends with the client unable to send.
func TestStopBeforeSleep(t *testing.T) {
	l, err := net.Listen("unix", socketDir(t)+"/s")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, nc := connected(t, l)
	rc := receiver{
		poller: &poller{inFlight: new(atomic.Int64)},
		active: func() bool { return false }, hold: func() {}, release: func() {},
	}
	rc.waits = rc.stop
	rc.init(nc, time.Minute, time.Time{})
	if _, err := rc.request(requestSize); err != errStopped {
		t.Error(err)
	}
	if _, err := client.Write(make([]byte, requestSize)); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("a request that nobody reads could be sent: %v", err)
	}
}

// A WRITE whose header was read before Shutdown is received to its end and done.
func TestShutdownReceivesThePayload(t *testing.T) {
	d := newMemDisk(1 << 20)
	prepared := make(chan struct{}, 1)
	d.onPrepare = func(context.Context, uint64) error { prepared <- struct{}{}; return nil }
	s := serveDisk(t, d)
	rc := s.rawGo()
	p := pattern(200<<10, 5)
	rc.put(header{cmd: CmdWrite, cookie: 7, n: uint64(len(p))}.appendTo(nil))
	rc.put(p[:100<<10])
	<-prepared
	down := make(chan error, 1)
	go func() { down <- s.Shutdown(t.Context()) }()
	<-s.stopping
	rc.put(p[100<<10:])
	if e, cookie := rc.reply(); e != 0 || cookie != 7 {
		t.Fatal(e, cookie)
	}
	rc.eof()
	rc.Close()
	if err := <-down; err != nil {
		t.Fatal(err)
	}
	data, _ := d.contents()
	mustEqual(t, "written", data[:len(p)], p)
}

// A WRITE of which a part was sent when its client had no more time is neither done nor
// answered; the requests before it are both.
func TestShutdownCutsAWriteShort(t *testing.T) {
	for _, length := range []uint64{1 << 20, 4 << 20} { // the latter is refused
		d := newMemDisk(8 << 20)
		reading, preparing := newGate(), newGate()
		d.onRead = func(ctx context.Context, _ uint64) error { return reading.wait(ctx) }
		d.onPrepare = func(ctx context.Context, _ uint64) error { return preparing.wait(ctx) }
		s := serve(t, Options{Exports: []Export{{Backend: d}}, PayloadBytesMax: 2 << 20, BytesMax: 16 << 20})
		rc := s.rawGo()
		rc.request(CmdRead, 1, 0, 512)
		<-reading.entered
		rc.put(append(header{cmd: CmdWrite, cookie: 2, n: 512}.appendTo(nil), pattern(512, 2)...))
		<-preparing.entered
		rc.put(header{cmd: CmdWrite, cookie: 3, off: 4096, n: length}.appendTo(nil))
		p := pattern(int(length), 3)
		rc.put(p[:8192]) // the socket has room for it
		cut := make(chan error, 1)
		go func() {
			_, err := rc.Write(p[8192:])
			cut <- err
		}()
		down := make(chan error, 1)
		go func() { down <- s.Shutdown(t.Context()) }()
		<-s.stopping
		s.Server.mu.Lock()
		for c := range s.Server.mu.conns {
			c.in.until = time.Unix(1, 0) // its reader waits for the gate
		}
		s.Server.mu.Unlock()
		preparing.open(2)
		if err := <-cut; !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%d bytes: the client's end: %v", length, err)
		}
		reading.open(1)
		seen := uint64(0)
		for range 2 {
			e, cookie := rc.reply()
			if e != 0 {
				t.Errorf("%v for %d", e, cookie)
			}
			if cookie == 1 {
				rc.get(512)
			}
			seen += cookie
		}
		if seen != 1+2 {
			t.Errorf("answers to %d", seen)
		}
		rc.eof()
		if err := <-down; err != nil {
			t.Error(err)
		}
		data, _ := d.contents()
		mustEqual(t, "written", data[:512], pattern(512, 2))
		mustEqual(t, "cut short", data[4096:8192], make([]byte, 4096))
	}
}

func TestShutdownGivesUp(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate() // never opened
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	s := serveDisk(t, d)
	rc := s.rawGo()
	rc.request(CmdRead, 1, 0, 4096)
	<-g.entered
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-s.stopping; cancel() }()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	rc.eof()
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal("again:", err)
	}
	if l, err := Listen("unix:"+s.path+"2", 0o600); err != nil || s.Serve(l) != ErrServerClosed {
		t.Error("Serve after Close")
	}
}

// The requests in flight stay bounded when a client does not read its replies,
// another one is served meanwhile, and all come in the end.
func TestSlowReaderHoldsBoundedRequests(t *testing.T) {
	const requestsMax, n, length = 8, 60, 256 << 10
	d := newMemDisk(1 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, RequestsMax: requestsMax})
	rc := s.rawGo()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range uint64(n) {
			rc.Write(header{cmd: CmdRead, cookie: i, n: length}.appendTo(nil))
		}
	}()
	eventually(t, "the connection is full", func() bool { return d.bytes.Load() == requestsMax*length })
	other := s.dial("")
	for range 10 {
		if err := other.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		// The other client has its answer a little before its request leaves flight.
		if got := s.Metrics().RequestsInFlight; got > requestsMax+1 {
			t.Errorf("%d requests in flight, limit %d", got, requestsMax)
		}
	}
	<-sent
	for range n {
		rc.reply()
		rc.get(length)
	}
	if got := d.bytesMost.Load(); got > requestsMax*length+10*4096 {
		t.Errorf("up to %d bytes handed out", got)
	}
}

// A write that waits for memory stops its own connection and no other.
func TestPrepareWriteBlocksItsConnectionOnly(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onPrepare = func(ctx context.Context, off uint64) error {
		if off == 0 {
			return g.wait(ctx)
		}
		return nil
	}
	s := serveDisk(t, d)
	a, b := s.dial(""), s.dial("")
	done := make(chan error, 1)
	go func() { done <- a.WriteAt(t.Context(), pattern(4096, 3), 0, false) }()
	<-g.entered
	if err := b.WriteAt(t.Context(), pattern(4096, 4), 4096, false); err != nil {
		t.Fatal(err)
	}
	g.open(1)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// The death of a connection cancels what it asked for and gives all memory back.
func TestDeathCancelsAndReleases(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate() // never opened
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	d.onCommit = d.onRead
	var closed atomic.Int64
	s := serve(t, Options{Exports: []Export{{Backend: d}}, Log: func(e Event) {
		if e.Kind == EventClose && e.Err != nil {
			closed.Add(1)
		}
	}})
	rc := s.rawGo()
	for i := range uint64(5) {
		rc.request(CmdRead, i, 0, 4096)
	}
	for i := range uint64(5) {
		rc.put(append(header{cmd: CmdWrite, cookie: 10 + i, n: 8192}.appendTo(nil), pattern(8192, 1)...))
	}
	for range 10 {
		<-g.entered
	}
	rc.put(append(header{cmd: CmdWrite, cookie: 20, n: 8192}.appendTo(nil), pattern(8191, 1)...))
	rc.Close()
	eventually(t, "the connection is gone", func() bool { return s.Metrics().Connections == 0 })
	if n := d.aborts.Load(); n != 1 {
		t.Errorf("%d writes aborted, want the one that was half sent", n)
	}
	if closed.Load() != 1 {
		t.Errorf("%d deaths logged", closed.Load())
	}
	d.idle(t)
}

// DISC is no death: what was asked before it is done and answered.
func TestDiscAnswersWhatIsInFlight(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	s := serve(t, Options{Exports: []Export{{Backend: d}}, Log: func(e Event) {
		if e.Kind == EventClose && e.Err != nil {
			t.Errorf("closed with %v", e.Err)
		}
	}})
	rc := s.rawGo()
	rc.request(CmdRead, 1, 0, 10)
	rc.request(CmdDisc, 0, 0, 0)
	<-g.entered
	g.open(1)
	if e, cookie := rc.reply(); e != 0 || cookie != 1 {
		t.Fatal(e, cookie)
	}
	rc.get(10)
	rc.eof()
	eventually(t, "the connection is gone", func() bool { return s.Metrics().Connections == 0 })
}

// Clients that send rubbish, or stop anywhere, hurt nobody: a good one works on.
func TestAbusiveClients(t *testing.T) {
	d := newMemDisk(1 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}})
	r := testRand(t)
	goName := appendOption([]byte{0, 0, 0, 3}, optExportName, nil)
	write := append(header{cmd: CmdWrite, off: 4096, n: 70000}.appendTo(nil), pattern(70000, 9)...)
	huge := append([]byte{0, 0, 0, 3}, appendOption(nil, 99, nil)...)
	copy(huge[len(huge)-4:], []byte{0, 0x10, 0, 0}) // 1 MiB, that never comes
	streams := map[string][]byte{
		"nothing":             nil,
		"a web browser":       []byte("GET / HTTP/1.1\r\nHost: nbd\r\n\r\n"),
		"options without end": []byte(strings.Repeat(string(appendOption(nil, 77, nil)), 4*optionsMax)),
		"a huge option":       huge,
		"a half write":        append(append([]byte(nil), goName...), write[:50000]...),
		"writes":              append(append(append([]byte(nil), goName...), write...), write...),
		"refused requests": append(append([]byte(nil), goName...),
			strings.Repeat(string(header{cmd: 99}.appendTo(nil)), 5000)...),
		"reads not taken": append(append([]byte(nil), goName...),
			strings.Repeat(string(header{cmd: CmdRead, n: 1 << 20}.appendTo(nil)), 500)...),
	}
	streams["options without end"] = append([]byte{0, 0, 0, 3}, streams["options without end"]...)

	good := s.dial("")
	var group sync.WaitGroup
	stop := make(chan struct{})
	group.Go(func() {
		p, q := pattern(20000, 7), make([]byte, 20000)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := errors.Join(good.WriteAt(t.Context(), p, 500000, false), good.ReadAt(t.Context(), q, 500000)); err != nil {
				t.Errorf("the good client: %v", err)
				return
			}
			mustEqual(t, "the good client's data", q, p)
		}
	})
	for round := range 10 * disktest.Scale(t) {
		for name, stream := range streams {
			cut := len(stream)
			if round > 0 && cut > 0 {
				cut = r.IntN(cut)
			}
			rc := s.raw()
			if name != "reads not taken" {
				go io.Copy(io.Discard, rc)
			}
			rc.SetDeadline(time.Now().Add(time.Second))
			rc.Write(stream[:cut]) // may be cut off, or not be taken
			rc.Close()
		}
	}
	close(stop)
	group.Wait()
	eventually(t, "the abusive are gone", func() bool { return s.Metrics().Connections == 1 })
	eventually(t, "the last answer is released", func() bool { return d.payloads.Load() == 0 })
	d.idle(t)

	// Rubbish in good form is answered, all of it.
	rc := s.rawGo()
	before := s.Metrics().Unknown.Errors
	go rc.Write([]byte(strings.Repeat(string(header{cmd: 99, cookie: 4}.appendTo(nil)), 5000)))
	for range 5000 {
		if e, cookie := rc.reply(); e != EINVAL || cookie != 4 {
			t.Fatal(e, cookie)
		}
	}
	if got := s.Metrics().Unknown.Errors - before; got != 5000 {
		t.Errorf("%d refused requests counted", got)
	}
}

func TestConnectionsMax(t *testing.T) {
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(4096)}}, ConnectionsMax: 2})
	a, _ := s.dial(""), s.dial("")
	s.raw().eof()
	if m := s.Metrics(); m.ConnectionsRefused != 1 || m.Connections != 2 || m.ConnectionsTotal != 2 {
		t.Errorf("%+v", m)
	}
	if err := a.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there is room", func() bool { return s.Metrics().Connections == 1 })
	s.dial("")
}

// Those that just connect and wait, however many, keep nobody out and take no place
// from those who have theirs.
func TestConnectionsMaxDisplaces(t *testing.T) {
	dirs := newCertDirs(t)
	d := newMemDisk(1 << 20)
	ended := make(chan Event, 1000)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, ConnectionsMax: 4, TLS: dirs.load(t), HandshakeTimeout: time.Hour, Log: func(e Event) {
		if e.Kind == EventClose {
			ended <- e
		}
	}})
	settled := s.dial("")
	s.tls = clientConfig(t, dirs.client)
	certified := s.rawTLS() // takes its time
	certified.put(appendOption(nil, 77, nil))
	certified.get(optReplySize) // now the server knows who it is
	var waiting []rawConn
	for range 50 {
		rc := s.raw()
		rc.get(18)
		waiting = append(waiting, rc)
	}
	for i := range 48 { // the eldest first
		waiting[i].eof()
		if e := <-ended; e.Err != errDisplaced {
			t.Fatalf("ended with %v", e.Err)
		}
	}
	s.tls = nil
	late := s.rawGo()
	late.request(CmdFlush, 1, 0, 0)
	late.reply()
	if err := settled.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	certified.put(appendOption(nil, optExportName, nil))
	certified.get(10)
	waiting[48].eof()
	m := s.Metrics()
	if m.Connections != 4 || m.ConnectionsDisplaced != 49 || m.ConnectionsRefused != 0 {
		t.Errorf("%+v", m)
	}
	s.dial("") // for the last that waits
	waiting[49].eof()
	s.raw().eof() // now all have their places
	if m := s.Metrics(); m.ConnectionsRefused != 1 {
		t.Errorf("%+v", m)
	}
}

// A pipeListener accepts connections that live in memory, under a fake clock.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{} }

func (l *pipeListener) dial() net.Conn {
	a, b := net.Pipe()
	l.conns <- a
	return b
}

// timedEnd is how long, on the fake clock, after send the server hangs up.
func timedEnd(t *testing.T, opts Options, send func(nc net.Conn)) (after time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		opts.Exports = []Export{{Backend: newMemDisk(1 << 20)}}
		s, err := NewServer(opts)
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		defer s.Close()
		nc := l.dial()
		defer nc.Close()
		io.ReadFull(nc, make([]byte, 18))
		begin := time.Now()
		send(nc)
		for err == nil {
			nc.SetDeadline(time.Now().Add(time.Hour))
			_, err = nc.Read(make([]byte, 1))
		}
		after = time.Since(begin)
	})
	return after
}

func TestTimeouts(t *testing.T) {
	opts := Options{HandshakeTimeout: 10 * time.Second, StallTimeout: time.Minute}
	hello := func(nc net.Conn) {
		nc.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, nil))
		io.ReadFull(nc, make([]byte, 10))
	}
	for _, tc := range []struct {
		name string
		send func(nc net.Conn)
		want time.Duration
	}{
		{"silent handshake", func(net.Conn) {}, 10 * time.Second},
		{"slow handshake", func(nc net.Conn) {
			for _, b := range append([]byte{0, 0, 0, 3}, "IHAVEOPT\x00"...) {
				if _, err := nc.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(900 * time.Millisecond) // of the fake clock
			}
		}, 12 * 900 * time.Millisecond}, // the first write after the end
		{"half a header", func(nc net.Conn) { hello(nc); nc.Write(header{}.appendTo(nil)[:20]) }, time.Minute},
		{"half a payload", func(nc net.Conn) {
			hello(nc)
			nc.Write(header{cmd: CmdWrite, n: 100000}.appendTo(nil))
			nc.Write(make([]byte, 99999))
		}, time.Minute},
		{"a payload in drips", func(nc net.Conn) {
			hello(nc)
			nc.Write(header{cmd: CmdWrite, n: 100000}.appendTo(nil))
			for range 10 {
				if _, err := nc.Write(make([]byte, 1)); err != nil {
					return
				}
				time.Sleep(25 * time.Second)
			}
		}, 3 * 25 * time.Second}, // the first write after the end
		{"two slow requests", func(nc net.Conn) { // each has a minute
			hello(nc)
			for range 2 {
				h := header{cmd: CmdFlush}.appendTo(nil)
				nc.Write(h[:9])
				time.Sleep(50 * time.Second)
				nc.Write(h[9:])
				io.ReadFull(nc, make([]byte, simpleReplySize))
			}
			nc.Write(header{cmd: CmdDisc}.appendTo(nil))
		}, 2 * 50 * time.Second},
		{"a reply not read", func(nc net.Conn) {
			hello(nc)
			nc.Write(header{cmd: CmdRead, n: 10}.appendTo(nil))
			time.Sleep(10 * time.Minute)
		}, 10 * time.Minute}, // by then it is closed: the read ends at once
		{"replies taken slowly", func(nc net.Conn) { // 1 MiB has a minute
			hello(nc)
			for range 5 {
				nc.Write(header{cmd: CmdRead, n: 512 << 10}.appendTo(nil))
			}
			synctest.Wait()
			for range 5 {
				if _, err := io.ReadFull(nc, make([]byte, simpleReplySize+512<<10)); err != nil {
					return
				}
				time.Sleep(25 * time.Second)
			}
			nc.Write(header{cmd: CmdDisc}.appendTo(nil))
		}, 5 * 25 * time.Second},
		{"idle", func(nc net.Conn) { hello(nc); time.Sleep(24 * time.Hour) }, 25 * time.Hour}, // the test's own hour
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := timedEnd(t, opts, tc.send); got != tc.want {
				t.Errorf("hung up after %v, want %v", got, tc.want)
			}
		})
	}
}

// Idle is who wants nothing: not who waits for an answer, however long that takes,
// and not who takes long over a request.
func TestIdleTimeout(t *testing.T) {
	const idle = 10 * time.Second
	synctest.Test(t, func(t *testing.T) {
		d := newMemDisk(1 << 20)
		d.onFlush = func(context.Context) error { time.Sleep(time.Hour); return nil }
		events := make(chan Event, 10)
		s, err := NewServer(Options{IdleTimeout: idle, Exports: []Export{{Backend: d}}, Log: func(e Event) {
			if e.Kind == EventClose {
				events <- e
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		defer s.Close()
		nc := l.dial()
		defer nc.Close()
		io.ReadFull(nc, make([]byte, 18))
		nc.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, nil))
		io.ReadFull(nc, make([]byte, 10))
		do := func(cmd Command, n int) {
			t.Helper()
			h := header{cmd: cmd, n: uint64(n)}.appendTo(nil)
			nc.Write(h[:20])
			time.Sleep(2 * idle) // in the middle of it
			nc.Write(h[20:])
			if _, err := io.ReadFull(nc, make([]byte, simpleReplySize+n)); err != nil {
				t.Fatal(err)
			}
		}
		for range 5 {
			do(CmdRead, 512)
			time.Sleep(idle - 1)
		}
		do(CmdFlush, 0) // takes an hour
		begin := time.Now()
		if e := <-events; e.Err != errIdle || time.Since(begin) < idle || time.Since(begin) > 2*idle {
			t.Errorf("closed after %v with %v", time.Since(begin), e.Err)
		}
		if m := s.Metrics(); m.ConnectionsIdle != 1 || m.ConnectionsStalled != 0 {
			t.Errorf("%+v", m)
		}
	})
}

// Requests without data count, too: however many clients send them and however
// long they take, their number is bounded, and one more client has its turn.
func TestRequestsOfAllAreBounded(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onFlush = g.wait
	s := serve(t, Options{Exports: []Export{{Backend: d}, {Name: "other", Backend: newMemDisk(4096)}},
		PayloadBytesMax: 64 << 10, BytesMax: 256 << 10, ConnectionsMax: 8}) // 2 blocks of reserve each, 32 of pool
	for range 7 {
		rc := s.rawGo()
		for i := range uint64(64) {
			rc.request(CmdFlush, i, 0, 0)
		}
	}
	waiting := func() bool {
		s.budget.mu.Lock()
		defer s.budget.mu.Unlock()
		return len(s.budget.mu.waiters) == 7
	}
	eventually(t, "all wait", waiting)
	m := s.Metrics()
	if m.BytesInFlight > m.BytesMax || len(g.entered) > 256/4 {
		t.Errorf("%d flushes at once, %d bytes", len(g.entered), m.BytesInFlight)
	}
	other := s.dial("other")
	for range 10 {
		if err := other.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	g.open(7 * 64)
	eventually(t, "all are answered", func() bool { return s.Metrics().Flush.Requests == 7*64+10 })
}

// A handshake has its time for what the server sends, too; afterwards there is
// none of it left.
func TestHandshakeTimeoutOfWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(Options{Exports: []Export{{Backend: newMemDisk(4096)}}, StallTimeout: -1})
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		defer s.Close()
		stuck, good := l.dial(), l.dial()
		defer stuck.Close()
		defer good.Close()
		io.ReadFull(stuck, make([]byte, 18))
		stuck.Write(appendOption([]byte{0, 0, 0, 3}, optList, nil)) // and takes no answer
		io.ReadFull(good, make([]byte, 18))
		good.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, nil))
		io.ReadFull(good, make([]byte, 10))
		time.Sleep(s.opts.HandshakeTimeout)
		synctest.Wait()
		if n := s.Metrics().Connections; n != 1 {
			t.Errorf("%d connections, want the one that is through", n)
		}
		// Without a StallTimeout it may take a week over a request.
		h := header{cmd: CmdRead, n: 512}.appendTo(nil)
		good.Write(h[:20])
		time.Sleep(7 * 24 * time.Hour)
		good.Write(h[20:])
		time.Sleep(7 * 24 * time.Hour)
		if _, err := io.ReadFull(good, make([]byte, simpleReplySize+512)); err != nil {
			t.Error(err)
		}
	})
}

// A handshake is not without end: so many options are answered, and no more.
func TestTooManyOptions(t *testing.T) {
	rc := serveDisk(t, newMemDisk(1)).raw()
	rc.get(18)
	rc.put([]byte{0, 0, 0, 3})
	for range optionsMax {
		rc.put(appendOption(nil, 77, nil))
		mustEqual(t, "refused", rc.get(optReplySize), appendOptReply(nil, 77, repErrUnsup, nil))
	}
	rc.eof()
}

// failingListener fails for want of descriptors, for a fault of the client's, and
// then for good.
type failingListener struct {
	net.Listener
	n int
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.n++; l.n <= 2 {
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", []syscall.Errno{syscall.EMFILE, syscall.EPROTO}[l.n-1])}
	}
	return nil, syscall.EBADF
}

func (l *failingListener) Close() error { return nil }

func TestServeSurvivesAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		events := 0
		s, err := NewServer(Options{
			Exports: []Export{{Backend: newMemDisk(1)}},
			Log: func(e Event) {
				if e.Kind == EventAcceptFailing && e.Err != nil {
					events++
				}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := s.Serve(&failingListener{}); !errors.Is(err, syscall.EBADF) {
			t.Errorf("Serve: %v", err)
		}
		if events != 2 || time.Since(begin) != 15*time.Millisecond {
			t.Errorf("%d events in %v", events, time.Since(begin))
		}
		s.Close()
	})
}

func TestOptionsValidate(t *testing.T) {
	d := newMemDisk(1)
	err := Options{
		Exports:         []Export{{Name: "a", Backend: d}, {Name: "a", Backend: d}, {Name: "b\x00"}, {Description: "\xff", Backend: d}},
		ConnectionsMax:  -1,
		RequestsMax:     -1,
		PayloadBytesMax: 100000,
		BytesMax:        100000,
	}.Validate()
	if err == nil {
		t.Fatal("no fault found")
	}
	for _, want := range []string{"exists twice", "name: ", "description: ", "want either Backend or Open", "ConnectionsMax", "RequestsMax", " PayloadBytesMax", " BytesMax"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not among the faults:\n%v", want, err)
		}
	}
	if err := (Options{Exports: []Export{{Backend: d}}}).Validate(); err != nil {
		t.Error(err)
	}
	if _, err := NewServer(Options{}); err == nil {
		t.Error("a server of nothing")
	}
}

// One server serves several listeners, of both kinds, at once.
func TestManyListeners(t *testing.T) {
	d := newMemDisk(1 << 20)
	s := serveDisk(t, d)
	uris := []string{s.uri("")}
	served := make(chan error, 2)
	for _, spec := range []string{"tcp:127.0.0.1:0", "unix:" + filepath.Join(filepath.Dir(s.path), "t")} {
		l, err := Listen(spec, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		uris = append(uris, URIOf(l.Addr(), "").String())
		go func() { served <- s.Serve(l) }()
	}
	for i, uri := range uris {
		c, err := Dial(t.Context(), uri)
		if err != nil {
			t.Fatal(uri, err)
		}
		defer c.Close()
		p := pattern(300000, byte(i))
		q := make([]byte, len(p))
		if err := errors.Join(c.WriteAt(t.Context(), p, 77, false), c.ReadAt(t.Context(), q, 77)); err != nil {
			t.Fatal(uri, err)
		}
		mustEqual(t, uri, q, p)
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-served; err != ErrServerClosed {
			t.Error(err)
		}
	}
}
