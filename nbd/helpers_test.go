package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

// testRand returns a random source whose seed is printed.
func testRand(t testing.TB) *rand.Rand { return rand.New(rand.NewPCG(disktest.Seed(t), 0)) }

// A memDisk is a Backend over a byte slice, with a second one that holds what a
// power cut would leave. Its hooks, when set, run at the start of their verb.
type memDisk struct {
	readOnly bool
	pieceMax int // of segments; 0: a page

	onRead    func(ctx context.Context, off uint64) error
	onPrepare func(ctx context.Context, off uint64) error
	onCommit  func(ctx context.Context, off uint64) error
	onFlush   func(ctx context.Context) error
	onZero    func(f ZeroFlags) error
	onTrim    func(off, n uint64, fua bool) error
	onCache   func(off, n uint64) error
	onStatus  func(ctx context.Context) error

	payloads, pendings atomic.Int64 // handed out, not yet given back
	bytes, bytesMost   atomic.Int64 // their memory, and the most that it has ever been
	aborts             atomic.Int64
	asked              atomic.Int64 // for promptness

	mu      sync.Mutex
	data    []byte
	durable []byte
}

func newMemDisk(size int) *memDisk {
	return &memDisk{data: make([]byte, size), durable: make([]byte, size)}
}

func (d *memDisk) Size() uint64   { return uint64(len(d.data)) }
func (d *memDisk) ReadOnly() bool { return d.readOnly }

// pieces makes n bytes of segments that end where pages end, as a page cache has them.
func (d *memDisk) pieces(off uint64, n uint32) (segs [][]byte) {
	size := uint64(d.pieceMax)
	if size == 0 {
		size = 4096
	}
	for end := off + uint64(n); off < end; {
		m := min(size-off%size, end-off)
		segs = append(segs, make([]byte, m))
		off += m
	}
	return segs
}

var poison = bytes.Repeat([]byte{0xdb}, 4096)

type memPayload struct {
	d    *memDisk
	segs [][]byte
	n    int64
	gone bool
}

func (d *memDisk) Read(ctx context.Context, off uint64, n uint32) (Payload, error) {
	if d.onRead != nil {
		if err := d.onRead(ctx, off); err != nil {
			return nil, err
		}
	}
	p := &memPayload{d: d, segs: d.pieces(off, n), n: int64(n)}
	d.payloads.Add(1)
	d.handOut(int64(n))
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range p.segs {
		off += uint64(copy(s, d.data[off:]))
	}
	return p, nil
}

// promptly tells whether the disk does something at once, as it mostly does unless
// there is a hook that may wait.
func (d *memDisk) promptly(hook bool) bool { return !hook && d.asked.Add(1)%4 != 0 }

func (d *memDisk) ReadPromptly(off uint64, n uint32) (Payload, bool) {
	if !d.promptly(d.onRead != nil) {
		return nil, false
	}
	p, err := d.Read(context.Background(), off, n)
	return p, err == nil
}

func (d *memDisk) PrepareWritePromptly(off uint64, n uint32) (PendingWrite, bool) {
	if !d.promptly(d.onPrepare != nil) {
		return nil, false
	}
	w, err := d.PrepareWrite(context.Background(), off, n)
	return w, err == nil
}

func (d *memDisk) CommitPromptly(w PendingWrite) bool {
	return d.promptly(d.onCommit != nil) && w.Commit(context.Background(), false) == nil
}

// handOut counts n bytes of memory handed out.
func (d *memDisk) handOut(n int64) {
	now := d.bytes.Add(n)
	for most := d.bytesMost.Load(); now > most && !d.bytesMost.CompareAndSwap(most, now); {
		most = d.bytesMost.Load()
	}
}

func (p *memPayload) Segments() [][]byte { return p.segs }

// Zero takes every segment of zeroes for a hole.
func (p *memPayload) Zero(i int) bool { return isZero(p.segs[i]) }

func isZero(p []byte) bool {
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

func (p *memPayload) Release() {
	if p.gone {
		panic("payload released twice")
	}
	p.gone = true
	for _, s := range p.segs { // whoever still sends it is found out
		for len(s) > 0 {
			s = s[copy(s, poison):]
		}
	}
	p.d.payloads.Add(-1)
	p.d.bytes.Add(-p.n)
}

type memWrite struct {
	d    *memDisk
	off  uint64
	n    uint32
	segs [][]byte // what Next has handed out
	gone bool
}

func (d *memDisk) PrepareWrite(ctx context.Context, off uint64, n uint32) (PendingWrite, error) {
	if d.onPrepare != nil {
		if err := d.onPrepare(ctx, off); err != nil {
			return nil, err
		}
	}
	d.pendings.Add(1)
	return &memWrite{d: d, off: off, n: n}, nil
}

func (w *memWrite) Next(n int) [][]byte {
	from := uint32(segmentsLen(w.segs))
	next := w.d.pieces(w.off+uint64(from), min(uint32(n), w.n-from))
	w.segs = append(w.segs, next...)
	w.d.handOut(int64(segmentsLen(next)))
	return next
}

func (w *memWrite) end() {
	if w.gone {
		panic("pending write ended twice")
	}
	w.gone = true
	w.d.pendings.Add(-1)
	w.d.bytes.Add(-int64(segmentsLen(w.segs)))
}

func (w *memWrite) Commit(ctx context.Context, fua bool) error {
	defer w.end()
	if n := segmentsLen(w.segs); n != uint64(w.n) {
		panic("commit of a part of the payload")
	}
	if w.d.onCommit != nil {
		if err := w.d.onCommit(ctx, w.off); err != nil {
			return err
		}
	}
	w.d.change(w.off, bytes.Join(w.segs, nil), fua)
	return nil
}

func (w *memWrite) Abort() {
	w.end()
	w.d.aborts.Add(1)
}

func (d *memDisk) change(off uint64, p []byte, fua bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.data[off:], p)
	if fua {
		copy(d.durable[off:], p)
	}
}

func (d *memDisk) WriteZeroes(_ context.Context, off, n uint64, f ZeroFlags) error {
	if d.onZero != nil {
		if err := d.onZero(f); err != nil {
			return err
		}
	}
	d.change(off, make([]byte, n), f.FUA)
	return nil
}

func (d *memDisk) Trim(_ context.Context, off, n uint64, fua bool) error {
	if d.onTrim != nil {
		if err := d.onTrim(off, n, fua); err != nil {
			return err
		}
	}
	d.change(off, make([]byte, n), fua)
	return nil
}

// BlockStatus takes pages of zeroes for holes, a page at a time.
func (d *memDisk) BlockStatus(ctx context.Context, off, n uint64, visit func(n uint64, s BlockState) bool) error {
	if d.onStatus != nil {
		if err := d.onStatus(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for end, more := off+n, true; off < end && more; {
		m := min(4096-off%4096, end-off)
		page := d.data[off&^4095 : min(off&^4095+4096, uint64(len(d.data)))]
		s := BlockState(0)
		if isZero(page) {
			s = StateHole | StateZero
		}
		more = visit(m, s)
		off += m
	}
	return nil
}

func (d *memDisk) Cache(_ context.Context, off, n uint64) error {
	if d.onCache != nil {
		return d.onCache(off, n)
	}
	return nil
}

func (d *memDisk) Flush(ctx context.Context) error {
	if d.onFlush != nil {
		if err := d.onFlush(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(d.durable, d.data)
	return nil
}

// contents are copies of what d holds and of what a power cut would leave.
func (d *memDisk) contents() (data, durable []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.data), bytes.Clone(d.durable)
}

// idle fails the test if memory of d is still handed out.
func (d *memDisk) idle(t testing.TB) {
	t.Helper()
	if p, w := d.payloads.Load(), d.pendings.Load(); p != 0 || w != 0 {
		t.Errorf("handed out at the end: %d payloads, %d pending writes", p, w)
	}
}

// A testServer is a server on a unix socket, which is closed and looked over at
// the end of the test.
type testServer struct {
	*Server
	t    testing.TB
	path string
	tls  *tls.Config // of its clients, nil: they use none
}

// serve starts a server of opts.
func serve(t testing.TB, opts Options) *testServer {
	t.Helper()
	before := runtime.NumGoroutine()
	s, err := NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{Server: s, t: t, path: filepath.Join(socketDir(t), "s")}
	l, err := Listen("unix:"+ts.path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != ErrServerClosed {
			t.Errorf("Serve: %v", err)
		}
		m := s.Metrics()
		if m.Connections != 0 || m.RequestsInFlight != 0 {
			t.Errorf("after Close: %d connections, %d requests in flight", m.Connections, m.RequestsInFlight)
		}
		if err := s.turns.event.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("after Close: the descriptor for turns is open (%v)", err)
		}
		for _, e := range opts.Exports {
			if d, ok := e.Backend.(*memDisk); ok {
				d.idle(t)
			}
		}
		noLeaks(t, before)
	})
	return ts
}

// serveDisk starts a server of d under the empty name.
func serveDisk(t testing.TB, d Backend) *testServer {
	t.Helper()
	return serve(t, Options{Exports: []Export{{Backend: d}}})
}

// socketDir is a directory with a short name, for socket paths are short.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// noLeaks fails the test if there are more goroutines than before. The last
// instructions of a goroutine make no event, so this looks again for a while.
func noLeaks(t testing.TB, before int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			return
		}
	}
}

// uri is the URI of export.
func (s *testServer) uri(export string) string {
	return URI{Network: "unix", Address: s.path, Export: export}.String()
}

// dial returns a client of export, which is closed at the end of the test.
func (s *testServer) dial(export string) *Client {
	s.t.Helper()
	return s.dialMode(export, ExtendedHeaders)
}

// dialMode is dial for a client that knows no newer form of messages than m.
func (s *testServer) dialMode(export string, m ReplyMode) *Client {
	s.t.Helper()
	c, err := Dialer{Replies: m}.Dial(s.t.Context(), s.uri(export))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// A rawConn is a connection for talking bytes.
type rawConn struct {
	net.Conn
	t testing.TB
}

// raw connects without a handshake.
func (s *testServer) raw() rawConn {
	s.t.Helper()
	return rawDial(s.t, "unix", s.path)
}

// rawDial returns a connection on which everything has to happen within ten
// seconds. It is closed at the end of the test.
func rawDial(t testing.TB, network, address string) rawConn {
	t.Helper()
	nc, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	nc.SetDeadline(time.Now().Add(10 * time.Second))
	t.Cleanup(func() { nc.Close() })
	return rawConn{nc, t}
}

// closeWrite closes the client's side.
func (rc rawConn) closeWrite() { rc.Conn.(interface{ CloseWrite() error }).CloseWrite() }

// giveUp shuts the socket down in both directions, as Linux and QEMU do when sending
// fails, so that what the server sends from then on is lost.
func (rc rawConn) giveUp() {
	nc := rc.Conn
	if tc, ok := nc.(*tls.Conn); ok {
		nc = tc.NetConn()
	}
	both := nc.(interface {
		CloseRead() error
		CloseWrite() error
	})
	both.CloseRead()
	both.CloseWrite()
}

// rawTLS connects, and begins with TLS if the server's clients use it.
func (s *testServer) rawTLS() rawConn {
	s.t.Helper()
	rc := s.raw()
	rc.get(18)
	rc.put([]byte{0, 0, 0, 3})
	if s.tls != nil {
		rc.put(appendOption(nil, optStartTLS, nil))
		mustEqual(s.t, "STARTTLS", rc.get(optReplySize), appendOptReply(nil, optStartTLS, repAck, nil))
		tc := tls.Client(rc.Conn, s.tls)
		if err := tc.Handshake(); err != nil {
			s.t.Fatal(err)
		}
		rc.Conn = tc
	}
	return rc
}

// rawGo connects and negotiates the export with the empty name.
func (s *testServer) rawGo() rawConn {
	s.t.Helper()
	rc := s.rawTLS()
	rc.put(appendOption(nil, optExportName, nil))
	rc.get(10)
	return rc
}

// rawTCP is rawGo through TCP, to a listener of its own, without TLS.
func (s *testServer) rawTCP() rawConn {
	s.t.Helper()
	l, err := Listen("tcp:127.0.0.1:0", 0)
	if err != nil {
		s.t.Fatal(err)
	}
	go s.Serve(l)
	rc := rawDial(s.t, "tcp", l.Addr().String())
	rc.get(18)
	rc.put(appendOption([]byte{0, 0, 0, 3}, optExportName, nil))
	rc.get(10)
	return rc
}

// rawMode connects and negotiates export and messages of form m.
func (s *testServer) rawMode(m ReplyMode, export string) rawConn {
	s.t.Helper()
	rc := s.raw()
	rc.get(18)
	verb := map[ReplyMode]string{SimpleReplies: "go", StructuredReplies: "structured", ExtendedHeaders: "extended"}[m]
	rc.put(opening(verb, export))
	if m > SimpleReplies {
		rc.get(3*optReplySize + 4 + len(contextAllocation))
	}
	rc.get(2*optReplySize + 12)
	return rc
}

func (rc rawConn) put(b []byte) {
	rc.t.Helper()
	if _, err := rc.Write(b); err != nil {
		rc.t.Fatalf("send %d bytes: %v", len(b), err)
	}
}

func (rc rawConn) get(n int) []byte {
	rc.t.Helper()
	b := make([]byte, n)
	for got := 0; got < n; {
		m, err := rc.Read(b[got:])
		if err != nil {
			rc.t.Fatalf("want %d bytes, got %d (%x), then %v", n, got, b[:min(got, 64)], err)
		}
		got += m
	}
	return b
}

// request sends a request without a payload.
func (rc rawConn) request(cmd Command, cookie, off, n uint64) {
	rc.t.Helper()
	rc.put(header{cmd: cmd, cookie: cookie, off: off, n: n}.appendTo(nil))
}

// reply receives the header of a reply.
func (rc rawConn) reply() (Errno, uint64) {
	rc.t.Helper()
	e, cookie, ok := decodeSimpleReply(rc.get(simpleReplySize))
	if !ok {
		rc.t.Fatal("wrong magic of a reply")
	}
	return e, cookie
}

// eof expects the server to close without another byte.
func (rc rawConn) eof() {
	rc.t.Helper()
	var b [1]byte
	n, err := rc.Read(b[:])
	if n != 0 || err == nil || strings.Contains(err.Error(), "timeout") {
		rc.t.Fatalf("want the end of the connection, got %x, %v", b[:n], err)
	}
}

// eventually waits for what no event tells.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("in vain waited until %s", what)
		}
	}
}

// pattern is n bytes that depend on v.
func pattern(n int, v byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = v + byte(i) + byte(i>>8)*3
	}
	return b
}

func mustEqual(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	t.Fatalf("%s: %d bytes, want %d; first difference at %d: %s", what, len(got), len(want), i,
		fmt.Sprintf("%x, want %x", got[i:min(len(got), i+8)], want[i:min(len(want), i+8)]))
}
