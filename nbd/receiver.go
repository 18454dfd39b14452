package nbd

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// receiveBufferBytes holds a good number of small requests, which then cost
	// one system call together and one copy each; of a larger payload only
	// what arrived together with its header is copied.
	receiveBufferBytes = 32 << 10

	// payloadPiece is how much of a payload is given memory when its first byte has
	// come: what common requests have, in one piece.
	payloadPiece = 64 << 10

	// drainQuiet is how long a client sends nothing before a server that stops takes it
	// that nothing is on its way: many round trips of a local network.
	drainQuiet = 20 * time.Millisecond

	// drainMax bounds how long a server that stops reads on for a client that is not quiet.
	drainMax = time.Second

	// iovMax is the kernel's limit (UIO_MAXIOV) of segments in one call.
	iovMax = 1024
)

// errIdle tells that a client has wanted nothing for too long.
var errIdle = errors.New("nbd: idle for too long")

// errStopped tells that stop has been called, at a point where nothing that
// was begun is lost.
var errStopped = errors.New("nbd: stopped")

// aLongTimeAgo is a deadline that ends every read at once.
var aLongTimeAgo = time.Unix(1, 0)

// A receiver reads from a connection through a buffer, and knows the deadlines:
//
//   - during the handshake, one for all of it;
//   - between requests that of idleness, if there is one, and after stop that of
//     quiet; stop ends the wait, too;
//   - inside a request, one for the rest of its header and one for its payload,
//     whatever stop does. They are not put off by a byte now and then.
//
// It belongs to the goroutine that reads the connection, except for stop.
type receiver struct {
	nc    net.Conn        // the socket, for its deadlines
	src   io.Reader       // what is read: nc, or TLS on it
	raw   syscall.RawConn // nil if src has no descriptor
	stall time.Duration   // limit of what a client has begun; not positive: none
	idle  time.Duration   // limit of the wait for a request; not positive: none

	// active tells whether something else has happened since it was last called,
	// or is happening, for which a client that sends nothing is not idle.
	active func() bool

	// waits is told that what comes next has not arrived yet, before rc waits for it.
	waits func()

	buf  []byte
	r, w int // buf[r:w] is received and not yet consumed

	handshake time.Time // deadline of the handshake; zero: it is over
	begun     bool      // what is being received has its deadline
	deadline  time.Time // that deadline
	timed     bool      // nc may have a read deadline

	until   time.Time // drainMax after the first request that came after stop; zero: none has
	hold    func()    // has answers held back
	release func()    // has them sent
	closed  bool      // the client cannot send any more: behind what it has sent is the end

	poller *poller
	lone   bool // its client has one request in flight at a time, as conn says
	slept  bool // the last request was not there yet when it was asked for
	quick  bool // and came so soon that it is worth to poll for the next

	waited bool // for bytes; whoever asks resets it. Not noted of TLS, nor inside a header

	// The state of a readv, so that none allocates.
	iov      []unix.Iovec
	readvFn  func(fd uintptr) bool
	tryFn    func(fd uintptr) // readvFn, whose result is in readvErr
	readvN   int
	readvErr syscall.Errno

	halted atomic.Bool // mu.stopped, readable without mu

	mu struct {
		sync.Mutex
		stopped bool
		woken   bool // stop's deadline may have ended a read
	}
}

// init prepares rc to read nc, whose handshake ends at deadline (zero: never).
func (rc *receiver) init(nc net.Conn, stall time.Duration, deadline time.Time) {
	rc.nc, rc.src, rc.stall, rc.handshake = nc, nc, stall, deadline
	rc.buf = make([]byte, receiveBufferBytes)
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			rc.raw = raw
		}
	}
	rc.readvFn = func(fd uintptr) bool {
		for {
			// unix.Readv would allocate for each call with more than 8 segments.
			n, _, errno := unix.Syscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&rc.iov[0])), uintptr(len(rc.iov)))
			rc.readvN, rc.readvErr = int(n), errno
			rc.waited = rc.waited || errno == unix.EAGAIN
			if errno != unix.EINTR {
				return errno != unix.EAGAIN
			}
		}
	}
	rc.tryFn = func(fd uintptr) {
		waited := rc.waited
		rc.readvFn(fd)
		rc.waited = waited // it has not yet
	}
}

// stop makes the handshake end with errStopped, or request when all that the client
// has sent was received and executed, at a moment when it sends nothing: a client whose
// sending fails may not look at what it is answered. (Linux and QEMU shut the socket
// down in both directions.) So answers are held back from now on. When the client has
// been quiet for drainQuiet, and everything is executed, a unix socket is made to refuse
// what it would send; then it gets its answers. One that is not quiet for drainMax,
// whatever it waits for, may lose some. stop may be called from any goroutine, more
// than once.
func (rc *receiver) stop() {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if !rc.mu.stopped {
		rc.mu.stopped, rc.mu.woken = true, true
		rc.halted.Store(true)
		rc.nc.SetReadDeadline(aLongTimeAgo)
	}
}

func (rc *receiver) stopped() bool { return rc.halted.Load() }

// endHandshake takes the handshake's deadline away.
func (rc *receiver) endHandshake() { rc.handshake = time.Time{} }

// buffered is how many bytes are received and not yet consumed.
func (rc *receiver) buffered() int { return rc.w - rc.r }

// startTLS runs the handshake of tc, which is on nc, and reads from it from then
// on. REQUIRES: nothing is buffered, and the handshake is not over.
func (rc *receiver) startTLS(tc *tls.Conn) error {
	rc.begun = false
	if err := rc.armBusy(); err != nil {
		return err
	}
	if err := tc.Handshake(); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) && rc.stopped() {
			return errStopped
		}
		return err
	}
	rc.src, rc.raw = tc, nil
	return nil
}

// request waits for the header of a request and returns its size bytes, which are
// valid until the next call. It returns errStopped after stop, errIdle when none
// came for too long, and io.EOF if the connection ended between two requests.
func (rc *receiver) request(size int) ([]byte, error) {
	rc.slept = false
	for {
		if rc.stopped() {
			rc.hold() // anew: who had to wait has released what was held
		}
		if rc.r < rc.w {
			if rc.stopped() && rc.late() {
				return nil, errStopped
			}
			return rc.next(size)
		}
		rc.r, rc.w = 0, 0
		rc.iov = appendIovec(rc.iov[:0], rc.buf)
		n, ok, err := rc.try()
		if !ok {
			rc.waits()
			n, err = rc.sleep()
		}
		rc.w = n
		switch {
		case n > 0 || err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return nil, rc.ended(err)
		case rc.stopped():
			if !rc.again(err) && !rc.active() && !rc.closeRead() {
				return nil, errStopped
			}
		case !rc.active():
			return nil, errIdle
		}
	}
}

// sleep waits for a request, and reads at least one byte into buf. What it polls for
// counts as waited for: one client at a time is polled for.
func (rc *receiver) sleep() (int, error) {
	rc.slept = true
	begin := time.Now()
	n, ok, polled, err := rc.poll()
	rc.waited = rc.waited || ok
	if !ok {
		if err := rc.armIdle(); err != nil {
			return 0, err
		}
		var p []byte
		if rc.raw == nil {
			p = rc.buf
		}
		n, err = rc.await(p) // which notes if it waits
	}
	// Without polling it has taken as long as the client, and as long as to wake up.
	rc.quick = ok || !polled && time.Since(begin) < 2*rc.poller.limit
	return n, err
}

// late reports, after stop, whether what the client still sends is left unread now.
func (rc *receiver) late() bool {
	switch {
	case rc.until.IsZero():
		rc.until = time.Now().Add(drainMax)
		return false
	case rc.closed || time.Now().Before(rc.until):
		return false
	}
	return !rc.closeRead()
}

// closeRead has the client's sending fail from now on, without harm to what it has
// sent. It reports false if that has been done, or is not possible: TCP does not
// tell the other side.
func (rc *receiver) closeRead() bool {
	u, ok := rc.nc.(*net.UnixConn)
	if !ok || rc.closed || u.CloseRead() != nil {
		return false
	}
	rc.closed = true
	rc.release() // now: the sooner it is answered, the less can the client want to send before
	return true
}

// ended turns the end that closeRead has made into errStopped.
func (rc *receiver) ended(err error) error {
	if rc.closed && (err == io.EOF || err == io.ErrUnexpectedEOF) { // the latter inside a record of TLS
		return errStopped
	}
	return err
}

// try reads into rc.iov what has arrived already. It reports false if that is
// nothing, or if that cannot be told: reading waits then, or may wait. Deadlines do
// not matter to it, so it is not for the handshake, all of which has one.
func (rc *receiver) try() (n int, ok bool, err error) {
	if rc.raw == nil || !rc.handshake.IsZero() {
		return 0, false, nil
	}
	if err := rc.raw.Control(rc.tryFn); err != nil {
		return 0, true, err
	}
	if rc.readvErr == unix.EAGAIN {
		return 0, false, nil
	}
	n, err = rc.result()
	return n, true, err
}

// await reads at least one byte into rc.iov; into p if that is all of it, or if there
// is no descriptor.
func (rc *receiver) await(p []byte) (int, error) {
	if p != nil {
		return rc.src.Read(p)
	}
	if err := rc.raw.Read(rc.readvFn); err != nil {
		return 0, err
	}
	return rc.result()
}

// result is what the last readv, which has not found nothing, has given.
func (rc *receiver) result() (int, error) {
	switch {
	case rc.readvErr != 0:
		return 0, os.NewSyscallError("readv", rc.readvErr)
	case rc.readvN == 0:
		return 0, io.EOF
	}
	return rc.readvN, nil
}

// armIdle prepares the wait for a request.
func (rc *receiver) armIdle() error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.mu.stopped {
		rc.mu.woken = false
		return rc.nc.SetReadDeadline(time.Now().Add(drainQuiet))
	}
	if rc.idle > 0 {
		return rc.nc.SetReadDeadline(time.Now().Add(rc.idle))
	}
	if rc.timed {
		rc.timed = false
		return rc.nc.SetReadDeadline(time.Time{})
	}
	return nil
}

// armBusy prepares the wait for a piece of something that has begun.
func (rc *receiver) armBusy() error {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	if rc.mu.stopped && !rc.handshake.IsZero() {
		return errStopped
	}
	if rc.begun && !rc.mu.woken {
		return nil
	}
	if !rc.begun {
		rc.begun, rc.timed = true, true
		rc.deadline = rc.handshake
		if rc.handshake.IsZero() && rc.stall > 0 {
			rc.deadline = time.Now().Add(rc.stall)
		}
	}
	rc.mu.woken = false // the deadline set here replaces stop's
	return rc.nc.SetReadDeadline(rc.deadline)
}

// again reports whether a read that failed with err is to be repeated: it was
// ended by stop.
func (rc *receiver) again(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	rc.mu.Lock()
	defer rc.mu.Unlock()
	return rc.mu.woken
}

// read receives at least one byte into p. What is in the buffer is not looked at.
func (rc *receiver) read(p []byte) (int, error) {
	rc.iov = appendIovec(rc.iov[:0], p)
	return rc.receive(p)
}

// receive reads at least one byte of something that has begun, as await does, and
// forgets rc.iov: its memory is only borrowed. It returns errStopped if the client
// could not send it to its end.
func (rc *receiver) receive(p []byte) (int, error) {
	defer clear(rc.iov)
	n, ok, err := rc.try()
	if !ok {
		rc.waits()
	}
	for !ok {
		if err := rc.armBusy(); err != nil {
			return 0, err
		}
		n, err = rc.await(p)
		ok = n > 0 || !rc.again(err)
	}
	if n > 0 {
		return n, nil
	}
	return 0, unexpected(rc.ended(err))
}

// readv receives at least one byte into segs[0][fill:] and the segments behind
// it, in order, and unless more is to follow them in place, what arrives beyond
// them into the buffer, which must be empty. It returns how many bytes went into
// segs.
func (rc *receiver) readv(segs [][]byte, fill int, more bool) (int, error) {
	if rc.raw == nil {
		return rc.read(segs[0][fill:])
	}
	rc.iov = rc.iov[:0]
	room := 0
	for i, b := range segs[:min(len(segs), iovMax-1)] {
		if i == 0 {
			b = b[fill:]
		}
		rc.iov = appendIovec(rc.iov, b)
		room += len(b)
	}
	if len(rc.iov) == len(segs) && !more {
		rc.iov = appendIovec(rc.iov, rc.buf)
	}
	n, err := rc.receive(nil)
	if err != nil {
		return 0, err
	}
	rc.r, rc.w = 0, max(0, n-room)
	return min(n, room), nil
}

func appendIovec(iov []unix.Iovec, b []byte) []unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return append(iov, v)
}

// unexpected turns an end of file inside something into the error it is.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// next receives n bytes, at most the size of the buffer, and returns them as a
// part of it, valid until the next call.
func (rc *receiver) next(n int) ([]byte, error) {
	rc.begun = false
	if len(rc.buf)-rc.r < n {
		rc.w = copy(rc.buf, rc.buf[rc.r:rc.w])
		rc.r = 0
	}
	for rc.w-rc.r < n {
		m, err := rc.read(rc.buf[rc.w:])
		if err != nil {
			return nil, err
		}
		rc.w += m
	}
	rc.r += n
	return rc.buf[rc.r-n : rc.r], nil
}

// discard receives n bytes and forgets them.
func (rc *receiver) discard(n uint64) error {
	rc.begun = false
	for n > 0 {
		if rc.r == rc.w {
			rc.r, rc.w = 0, 0
			m, err := rc.read(rc.buf)
			if err != nil {
				return err
			}
			rc.w = m
		}
		m := min(n, uint64(rc.w-rc.r))
		rc.r += int(m)
		n -= m
	}
	return nil
}

// payload begins a payload: it waits for the first byte of it.
func (rc *receiver) payload() error {
	rc.begun = false
	if rc.r < rc.w {
		return nil
	}
	n, err := rc.read(rc.buf)
	rc.r, rc.w = 0, n
	return err
}

// segments fills segs, borrowed, in order, with a piece of what payload has begun.
// The bytes that are in the buffer already are copied; the others are received in
// place. With more, another piece is to follow.
func (rc *receiver) segments(segs [][]byte, more bool) error {
	fill := 0 // bytes of segs[0] that are filled
	for {
		for ; len(segs) > 0 && fill >= len(segs[0]); segs = segs[1:] {
			fill -= len(segs[0])
		}
		if len(segs) == 0 {
			return nil
		}
		if rc.r < rc.w {
			n := copy(segs[0][fill:], rc.buf[rc.r:rc.w])
			rc.r += n
			fill += n
			continue
		}
		n, err := rc.readv(segs, fill, more)
		if err != nil {
			return err
		}
		fill += n
	}
}
