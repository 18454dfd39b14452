package nbd

import (
	"cmp"
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cnbd/internal/invariants"
)

const (
	// writeHangUpBytes is the length of a WRITE from which on its payload is
	// not worth consuming to stay in sync.
	writeHangUpBytes = 1 << 30

	// sendBytesMax bounds what is sent at once, beyond a single reply, so that
	// room for new requests is made as replies leave.
	sendBytesMax = 1 << 20

	// sendRepliesMax bounds the number of replies that the reader keeps back, so that a client
	// with many requests in flight has something to do meanwhile. Those beyond
	// sendRepliesSoon answer requests that have come together: what comes one by one, while
	// the others are answered, is answered the sooner.
	sendRepliesMax  = 16
	sendRepliesSoon = 8

	// lingerMax bounds how long a connection that the server ends waits for
	// the client to close. Closed at once, with requests unread, TCP would
	// throw away the replies that are still on their way.
	lingerMax = time.Second
)

var errPayloadTooLong = errors.New("nbd: absurdly long payload")

// A conn is one connection of a [Server].
type conn struct {
	s         *Server
	nc        link
	id        uint64
	shaking   *list.Element // in Server.mu.shaking, or nil; guarded by Server.mu
	displaced bool          // guarded by Server.mu

	ctx    context.Context // ends with the connection; its cause tells why
	cancel context.CancelCauseFunc

	// Of the reader.
	in       receiver
	started  int        // workers
	lone     int        // requests in sequence that came alone
	itself   bool       // the reader has executed the last one
	inFlight int        // requests, when the last one was admitted
	unsent   int        // of them, those whose reply was not yet being sent
	size     uint64     // of the export, as the client was told, or more
	refused  bool       // an export, to the client
	answered uint64     // mu.answered when active was last called
	done     []*request // executed by the reader, not yet queued to be sent
	doneLen  uint64     // the sum of their dataLen

	// Set by the handshake, immutable from then on.
	agreed     agreement
	names      []string      // of the client, by its verified certificate
	export     *Export       // a copy, whose Backend is opened
	prompt     PromptBackend // the same, nil if it is none, or all goes through TLS
	using      *namedExport  // nil until the handshake has ended well
	allocation bool          // base:allocation was selected for it
	flags      TransmissionFlags
	readOnly   bool

	work    chan *request // unbuffered: only an idle worker takes from it; theReading makes it the reader
	over    chan error    // of capacity 1: why reading has ended
	alone   atomic.Uint64 // one more when the reader begins to execute a request itself, and when that ends, or somebody else reads
	seen    uint64        // alone, when readers were last looked at; guarded by Server.mu
	rest    chan struct{} // capacity 1: the reader has left the sending to the goroutine of sendRest; nil: there is none
	workers sync.WaitGroup
	room    chan struct{} // capacity 1: requests have left flight
	share   share         // of the server's budget

	mu struct {
		sync.Mutex
		requests int        // in flight
		unsent   int        // of them, those whose reply is not being sent
		answered uint64     // requests that are no longer in flight
		ready    []*request // finished, to be sent
		sending  bool       // a goroutine is in the loop of finish
		holding  bool       // nothing is sent
		free     []*request // for reuse, at most as many as there were in flight
	}

	// Of the goroutine that is sending.
	batch []*request
	reply encoder
}

// A request is one request from admission until its reply has been sent.
type request struct {
	header
	begun   time.Time    // when the header was there
	bytes   uint64       // granted by the budget
	slotted bool         // they are the budget's slot
	write   PendingWrite // a WRITE whose payload is received, not yet ended
	payload Payload      // the data of a READ, not yet released
	extents []Extent     // the answer to a BLOCK_STATUS
	errno   Errno
	why     string // of errno, for people; may be empty
}

// dataLen is about the length of what the reply has beside headers, in bytes.
func (r *request) dataLen() uint64 {
	if r.payload == nil {
		return uint64(len(r.extents)) * extentBytes
	}
	return r.n
}

// refuse enters an error that the client has made.
func (r *request) refuse(e Errno, why string) { r.errno, r.why = e, why }

// fail is the death of the connection, if it is not dead yet. It may be called
// from any goroutine.
func (c *conn) fail(err error) {
	c.cancel(err)
	c.nc.Close()
}

// newConn returns the connection of nc, ready to serve. Its handshake's time
// runs from now on.
func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{s: s, nc: newLink(nc), work: make(chan *request), over: make(chan error, 1), room: make(chan struct{}, 1)}
	c.share.granted = make(chan struct{}, 1)
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.in.init(nc, s.opts.StallTimeout, time.Now().Add(s.opts.HandshakeTimeout))
	c.in.idle, c.in.active, c.in.waits = s.opts.IdleTimeout, c.active, c.flush
	c.in.poller, c.in.hold, c.in.release = &s.poller, c.hold, c.release
	return c
}

// serve runs the connection to its end and returns why it ended, nil if in good
// order. On return all that belonged to it is stopped, released and closed.
func (c *conn) serve() error {
	err := c.handshake()
	chosen := err == nil
	if chosen {
		e := Event{Kind: EventOpen, Conn: c.id, Remote: remoteOf(c.nc.Conn), Export: c.export.Name}
		e.TLS, e.Client = c.tlsName()
		c.s.log(e)
		if c.nc.tls == nil { // which cannot tell when a write would block
			c.prompt, _ = c.export.Backend.(PromptBackend)
		}
		c.workers.Go(func() { c.run(theReading) })
		err = <-c.over
		c.flush() // also for a client that has only closed its side
		c.release()
		if err != nil && !errors.Is(err, errStopped) {
			c.fail(err)
		}
		close(c.work)
		if c.rest != nil {
			close(c.rest)
		}
		c.workers.Wait() // they end with nothing in flight
	} else if !errors.Is(err, errAborted) && !errors.Is(err, errStopped) {
		c.s.counters.handshakesFailed.Add(1)
	}
	if cause := context.Cause(c.ctx); cause != nil {
		err = cause // the first reason, rather than what came of it
	} else if chosen && errors.Is(err, errStopped) {
		c.linger()
	} else if chosen && c.nc.tls != nil {
		c.nc.tls.CloseWrite() // or the client could not tell it from an attacker's end
	}
	if c.using != nil {
		c.using.clients.Add(-1)
	}
	c.fail(err) // by now it only frees what is left
	switch {
	case errors.Is(err, errStopped) || errors.Is(err, errAborted):
		return nil
	case errors.Is(err, errIdle):
		c.s.counters.idle.Add(1)
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.s.counters.stalled.Add(1)
	}
	return err
}

// handshake runs the negotiation within its time.
func (c *conn) handshake() error {
	if err := c.nc.SetWriteDeadline(c.in.handshake); err != nil {
		return err
	}
	if err := c.negotiate(); err != nil {
		return err
	}
	c.in.endHandshake()
	return c.nc.SetWriteDeadline(time.Time{})
}

// linger tells the client that nothing more comes, and gives it a while to take
// what has been sent and close.
func (c *conn) linger() {
	until := time.Now().Add(lingerMax)
	if c.nc.SetDeadline(until) != nil || c.nc.CloseWrite() != nil {
		return
	}
	io.Copy(io.Discard, c.nc.Conn)
}

// errRelieved is the end of a reader whose connection somebody else reads by now.
var errRelieved = errors.New("nbd: relieved")

// transmit reads requests until the connection ends: with nil after DISC, with
// errStopped, or with the reason of its death; or until errRelieved.
func (c *conn) transmit() error {
	size, decode := requestSize, decodeHeader
	if c.agreed.mode >= ExtendedHeaders {
		size, decode = requestExtSize, decodeExtended
	}
	turn := roundRequests
	for left := turn; ; left-- {
		if c.in.waited {
			c.in.waited, left = false, turn // it has given way
		} else if left <= 0 {
			c.flush()
			turn = c.s.turns.pass()
			left = turn
		}
		b, err := c.in.request(size)
		if err != nil {
			return err
		}
		h, ok := decode(b)
		if !ok {
			return errBadMagic
		}
		if h.cmd == CmdDisc {
			return nil
		}
		payload, err := c.payloadOf(h)
		if err != nil {
			return err
		}
		other := false
		if h.cmd == CmdBlockStatus && payload == contextQuerySize && c.flags&FlagStatusPayload != 0 {
			if other, err = c.contextQuery(&h); err != nil {
				return err
			}
			payload = 0
		}
		r, err := c.admit(h)
		if err != nil {
			return err
		}
		if other && r.errno == 0 {
			r.refuse(EINVAL, "no such metadata context")
		}
		if payload > 0 {
			if err := c.receive(r, payload); err != nil {
				return err
			}
		}
		if r.errno != 0 || h.n == 0 && h.cmd != CmdFlush {
			// Refused, or of no length, which succeeds and does nothing: the
			// document leaves it open, and this is what other servers do.
			c.answer(r)
			continue
		}
		c.countLone()
		c.itself = true
		switch {
		case c.executePromptly(r):
			c.answer(r)
		case c.lone >= loneMin:
			if !c.executeAlone(r) {
				return errRelieved
			}
		default:
			c.itself = false
			c.dispatch(r)
		}
	}
}

// payloadOf is the length of what follows h on the wire. The error is that of a
// client that wants to send too much for it to be consumed.
func (c *conn) payloadOf(h header) (uint64, error) {
	if c.agreed.mode >= ExtendedHeaders {
		if h.flags&cmdFlagPayloadLen == 0 {
			return 0, nil
		}
		if h.n > uint64(c.s.opts.PayloadBytesMax) { // the document wants it cut off here
			return 0, fmt.Errorf("%w: %d bytes", errPayloadTooLong, h.n)
		}
		return h.n, nil
	}
	if h.cmd != CmdWrite {
		return 0, nil
	}
	if h.n > writeHangUpBytes {
		return 0, fmt.Errorf("%w: %d bytes", errPayloadTooLong, h.n)
	}
	return h.n, nil
}

// contextQuery receives the payload of h, a BLOCK_STATUS, which has the length of
// its range and the context that is asked for; other tells that it is not ours.
func (c *conn) contextQuery(h *header) (other bool, err error) {
	b, err := c.in.next(contextQuerySize)
	if err != nil {
		return false, err
	}
	h.n = binary.BigEndian.Uint64(b)
	h.flags &^= cmdFlagPayloadLen
	return binary.BigEndian.Uint32(b[8:]) != contextID, nil
}

// dispatch hands r, the request last admitted, to an idle worker, else to a new
// one. But when there are more workers than requests in flight, then one that
// neither executes one of the others nor sends is idle in a moment.
func (c *conn) dispatch(r *request) {
	select {
	case c.work <- r:
		return
	default:
	}
	if c.started > c.inFlight {
		c.work <- r
		return
	}
	c.started++
	c.workers.Go(func() { c.run(r) })
}

// active implements receiver.active: a client that waits for an answer, or has
// just had one, is not idle.
func (c *conn) active() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.answered
	c.answered = c.mu.answered
	unanswered := c.mu.requests
	if c.mu.holding {
		unanswered -= len(c.mu.ready)
	}
	return unanswered > 0 || c.answered != was
}

// check enters the error of a request that can be told from its header: the
// client's fault, which costs it this request and nothing else.
func (c *conn) check(r *request) {
	switch r.cmd {
	case CmdRead, CmdWrite, CmdFlush, CmdTrim, CmdCache, CmdWriteZeroes:
	case CmdBlockStatus:
		if !c.allocation {
			r.refuse(EINVAL, "no metadata context was selected for this export")
			return
		}
	default:
		r.refuse(EINVAL, "unknown command")
		return
	}
	transfer := r.cmd == CmdRead || r.cmd == CmdWrite
	switch payloadMax := uint64(c.s.opts.PayloadBytesMax); {
	case r.flags&^cmdFlagsOf(r.cmd, c.agreed.mode) != 0:
		r.refuse(EINVAL, "flag that this command does not have")
	case r.cmd == CmdWrite && c.agreed.mode >= ExtendedHeaders && r.flags&cmdFlagPayloadLen == 0:
		r.refuse(EINVAL, "WRITE without the flag PAYLOAD_LEN")
	case r.cmd == CmdFlush:
		if r.off != 0 || r.n != 0 {
			r.refuse(EINVAL, "FLUSH with a range") // reserved, must be zero
		}
	case c.readOnly && (r.cmd == CmdWrite || r.cmd == CmdTrim || r.cmd == CmdWriteZeroes):
		r.refuse(EPERM, "the export is read-only")
	case transfer && r.n > payloadMax && r.flags&cmdFlagDF != 0:
		r.refuse(EOVERFLOW, "too long for one chunk")
	case transfer && r.n > payloadMax:
		r.refuse(EINVAL, "longer than the largest payload")
	case !c.inside(r.off, r.n):
		if r.cmd == CmdWrite || r.cmd == CmdWriteZeroes {
			r.refuse(ENOSPC, "beyond the end of the export")
		} else {
			r.refuse(EINVAL, "beyond the end of the export")
		}
	case r.cmd == CmdBlockStatus && r.n == 0:
		r.refuse(EINVAL, "BLOCK_STATUS of nothing") // the answer must have a run of one byte at least
	}
}

// inside tells whether the export has the range. NBD cannot tell a client that it has
// grown, but there are other ways, such as the kernel's netlink.
func (c *conn) inside(off, n uint64) bool {
	if off > c.size || n > c.size-off {
		c.size = max(c.size, c.export.Backend.Size())
	}
	return off <= c.size && n <= c.size-off
}

// awaitInFlight waits until at most n requests are in flight. The error is that of
// the connection, if it dies meanwhile.
func (c *conn) awaitInFlight(n int) error {
	for {
		c.mu.Lock()
		requests := c.mu.requests
		c.mu.Unlock()
		if requests <= n {
			return nil
		}
		c.flush()
		c.release()
		select {
		case <-c.room:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

// admit checks h and waits until there is room for it in flight. The error is
// that of the connection, if it dies meanwhile.
func (c *conn) admit(h header) (*request, error) {
	begun := time.Now()
	if err := c.awaitInFlight(c.s.opts.RequestsMax - 1); err != nil {
		return nil, err
	}
	m := &c.mu
	m.Lock()
	m.requests++
	m.unsent++
	c.inFlight, c.unsent = m.requests, m.unsent
	var r *request
	if n := len(m.free); n > 0 {
		r, m.free = m.free[n-1], m.free[:n-1]
	} else {
		r = new(request)
	}
	m.Unlock()
	c.s.counters.inFlight.Add(1)

	*r = request{header: h, begun: begun}
	c.check(r)
	if r.errno == 0 && (h.n > 0 || h.cmd == CmdFlush) {
		// The rest takes the memory of a worker, which is bounded in the same way.
		r.bytes = blockPreferred
		switch {
		case h.cmd == CmdRead || h.cmd == CmdWrite:
			r.bytes = c.s.budget.charge(h.off, h.n)
		case h.cmd == CmdBlockStatus && h.flags&cmdFlagReqOne == 0:
			r.bytes = c.s.budget.charge(0, extentsMax*2*extentBytes) // in memory, and encoded
		}
		if !c.s.budget.tryTake(&c.share, r) {
			c.flush() // what it holds may be what r waits for
			c.release()
			if err := c.s.budget.take(c.ctx, &c.share, r); err != nil {
				r.errno = ESHUTDOWN
				c.finish(r)
				return nil, err
			}
		}
	}
	return r, nil
}

// receive takes the n bytes of payload of r from the wire: those of a WRITE into
// the backend's memory, or to nowhere if r is refused. An error is the
// connection's death; r is then finished.
func (c *conn) receive(r *request, n uint64) error {
	if r.errno == 0 {
		c.prepareWrite(r)
	}
	var got uint64
	var err error
	if r.write != nil {
		got, err = c.receiveInto(r.write, n)
		if err == nil && got < n {
			invariants.Assertf(false, "a write of %d bytes at %d had wrong memory behind %d bytes", r.n, r.off, got)
			r.write.Abort()
			r.write = nil
			c.backendError(r, fmt.Errorf("nbd: backend gave wrong memory for a write"))
		}
	}
	if err == nil && got < n {
		err = c.in.discard(n - got)
	}
	if errors.Is(err, errStopped) {
		c.awaitInFlight(1) // the others are answered; it has not been sent, for its client
	}
	if err != nil {
		c.fail(err)
		c.abort(r)
		c.finish(r)
	}
	return err
}

// prepareWrite has the backend admit r, a WRITE.
func (c *conn) prepareWrite(r *request) {
	if c.prompt != nil {
		if w, ok := c.prompt.PrepareWritePromptly(r.off, uint32(r.n)); ok {
			r.write = w
			return
		}
	}
	c.flush()
	w, err := c.export.Backend.PrepareWrite(c.ctx, r.off, uint32(r.n))
	if err != nil {
		c.backendError(r, err)
		return
	}
	r.write = w
}

// receiveInto takes n bytes of payload from the wire into the memory of w. It asks
// for that memory piece by piece: the first payloadPiece bytes when the first byte
// has come, and then as much again as has come. So what a client announces and does
// not send takes no more memory than what it has sent, or that piece. got < n
// without an error means that w gave nothing or too much.
func (c *conn) receiveInto(w PendingWrite, n uint64) (got uint64, err error) {
	if err := c.in.payload(); err != nil {
		return 0, err
	}
	for got < n {
		segs := w.Next(int(min(n-got, max(got, payloadPiece))))
		size := segmentsLen(segs)
		if size == 0 || size > n-got {
			return got, nil
		}
		got += size
		if err := c.in.segments(segs, got < n); err != nil {
			return got, err
		}
	}
	return got, nil
}

// abort ends the pending write of r, if there is one.
func (c *conn) abort(r *request) {
	if r.write != nil {
		r.write.Abort()
		r.write = nil
		r.errno = ESHUTDOWN
	}
}

// run is the life of a worker: it executes r, and then what the reader has for it, or
// becomes the reader.
func (c *conn) run(r *request) {
	for ok := true; ok; r, ok = <-c.work {
		if r != theReading {
			c.execute(r)
			c.finish(r)
		} else if err := c.transmit(); err != errRelieved {
			c.over <- err
		}
	}
}

// executePromptly lets the backend do r, if it can do that at once.
func (c *conn) executePromptly(r *request) bool {
	if c.prompt == nil {
		return false
	}
	switch {
	case r.cmd == CmdRead:
		p, ok := c.prompt.ReadPromptly(r.off, uint32(r.n))
		if !ok {
			return false
		}
		c.enterPayload(r, p)
		return true
	case r.cmd == CmdWrite && r.flags&cmdFlagFUA == 0 && c.prompt.CommitPromptly(r.write):
		r.write = nil
		return true
	}
	return false
}

// enterPayload makes p the answer to r, a READ, if it is as long as it has to be.
func (c *conn) enterPayload(r *request, p Payload) {
	if n := segmentsLen(p.Segments()); n != r.n {
		invariants.Assertf(false, "Read(%d, %d) gave %d bytes", r.off, r.n, n)
		p.Release()
		c.backendError(r, fmt.Errorf("nbd: backend gave wrong data for a read"))
		return
	}
	r.payload = p
}

// execute lets the backend do r.
func (c *conn) execute(r *request) {
	if c.ctx.Err() != nil { // nobody is there to be answered
		c.abort(r)
		r.errno = ESHUTDOWN
		return
	}
	b := c.export.Backend
	fua := r.flags&cmdFlagFUA != 0
	var err error
	switch r.cmd {
	case CmdRead:
		var p Payload
		if p, err = b.Read(c.ctx, r.off, uint32(r.n)); err == nil {
			c.enterPayload(r, p)
		}
	case CmdWrite:
		err = r.write.Commit(c.ctx, fua)
		r.write = nil
	case CmdFlush:
		err = b.Flush(c.ctx)
	case CmdTrim:
		if err = b.Trim(c.ctx, r.off, r.n, fua); errors.Is(err, syscall.ENOSPC) {
			err = nil // it is advice, and no reason to have a filesystem fail
		}
	case CmdWriteZeroes:
		err = b.WriteZeroes(c.ctx, r.off, r.n, ZeroFlags{
			FUA:      fua,
			NoHole:   r.flags&cmdFlagNoHole != 0,
			FastZero: r.flags&cmdFlagFastZero != 0,
		})
	case CmdCache:
		err = b.Cache(c.ctx, r.off, r.n)
	case CmdBlockStatus:
		err = c.blockStatus(r)
	}
	if err != nil {
		c.backendError(r, err)
	}
}

// blockStatus asks the backend for the extents of r: as many as were asked for and
// are told at once, and none of them beyond the range.
func (c *conn) blockStatus(r *request) error {
	most := extentsMax
	if r.flags&cmdFlagReqOne != 0 {
		most = 1
	}
	left := r.n
	err := c.export.Backend.BlockStatus(c.ctx, r.off, r.n, func(n uint64, s BlockState) bool {
		n = min(n, left)
		last := len(r.extents) - 1
		switch {
		case n == 0:
			return left > 0
		case last >= 0 && r.extents[last].State == s:
			r.extents[last].Length += n
		case len(r.extents) == most:
			return false
		default:
			r.extents = append(r.extents, Extent{n, s})
		}
		left -= n
		return left > 0
	})
	if err == nil && len(r.extents) == 0 {
		err = fmt.Errorf("nbd: backend told no block status")
		invariants.Assertf(false, "BlockStatus(%d, %d) told nothing", r.off, r.n)
	}
	if err != nil {
		r.extents = nil
	}
	return err
}

// backendError enters and logs the backend's answer to r.
func (c *conn) backendError(r *request, err error) {
	r.errno = ErrnoOf(err)
	if r.errno == ENOTSUP && r.flags&cmdFlagFastZero == 0 || r.errno == EOVERFLOW {
		r.errno = EINVAL // the others are answers to FAST_ZERO, and to the flag DF, only
	}
	if c.ctx.Err() == nil && r.errno != ENOTSUP {
		c.s.log(Event{
			Kind: EventRequestFailed, Conn: c.id, Remote: remoteOf(c.nc.Conn), Export: c.export.Name, Err: err,
			Command: r.cmd, Offset: r.off, Length: r.n,
		})
	}
}

// answer answers r, which the reader has executed. The reply is sent together with
// others, at the latest when the reader has to wait for anything.
func (c *conn) answer(r *request) {
	c.using.counters.finished(r, time.Since(r.begun))
	c.done = append(c.done, r)
	c.doneLen += r.dataLen()
	if n := len(c.done); c.doneLen >= sendBytesMax || n >= sendRepliesMax || n >= sendRepliesSoon && c.in.buffered() == 0 {
		c.flush()
	}
}

// flush queues the replies to what the reader has executed, and sends what the
// socket takes at once, unless somebody is sending. It never waits for the client:
// one that first writes all of a request and then reads would wait for the reader.
func (c *conn) flush() {
	if len(c.done) == 0 {
		return
	}
	m := &c.mu
	m.Lock()
	m.ready = append(m.ready, c.done...)
	m.Unlock()
	c.done, c.doneLen = c.done[:0], 0
	c.sendQueued()
}

// hold implements receiver.hold: nothing is sent until release. The client waits
// for everything by and by, so whoever has to wait for a reply to leave calls that.
func (c *conn) hold() {
	c.mu.Lock()
	c.mu.holding = true
	c.mu.Unlock()
}

// release ends hold. Short replies go first: those that the socket takes at once are
// not lost whatever the client does.
func (c *conn) release() {
	c.mu.Lock()
	holding := c.mu.holding
	c.mu.holding = false
	if holding {
		slices.SortStableFunc(c.mu.ready, func(a, b *request) int { return cmp.Compare(a.dataLen(), b.dataLen()) })
	}
	c.mu.Unlock()
	if holding {
		c.sendQueued()
	}
}

// sendQueued sends what the socket takes at once of the replies that are queued, unless
// somebody is sending.
func (c *conn) sendQueued() {
	c.mu.Lock()
	sending := c.mu.sending
	c.mu.sending = true
	c.mu.Unlock()
	if sending || c.sendReady(false) {
		return
	}
	if c.rest == nil {
		c.rest = make(chan struct{}, 1)
		c.workers.Go(c.sendRest)
	}
	c.rest <- struct{}{} // there is room: this goroutine is not sending
}

// sendRest sends what the reader has begun to send and could not without waiting.
func (c *conn) sendRest() {
	for range c.rest {
		c.sendReady(true)
	}
}

// finish answers r: it queues the reply and, if nobody is sending, sends what
// is queued until nothing is. It may block as long as the client does not read;
// others only queue meanwhile. r must not be used any more.
func (c *conn) finish(r *request) {
	c.using.counters.finished(r, time.Since(r.begun))
	m := &c.mu
	m.Lock()
	m.ready = append(m.ready, r)
	sending := m.sending
	m.sending = true
	m.Unlock()
	if !sending {
		c.sendReady(true)
	}
}

// sendReady sends what is queued, until nothing is. Unless it may wait it stops when
// the socket takes no more, and reports false: somebody has to call it again.
// REQUIRES: the caller has set mu.sending, or has been left it with what is in batch.
func (c *conn) sendReady(wait bool) bool {
	m := &c.mu
	for {
		if len(c.batch) == 0 && !c.nextBatch() {
			return true
		}
		if !c.send(wait) {
			return false
		}
		c.s.budget.give(&c.share, c.batch)
		c.s.counters.inFlight.Add(-int64(len(c.batch)))

		m.Lock()
		m.requests -= len(c.batch)
		m.answered += uint64(len(c.batch))
		m.free = append(m.free, c.batch...)
		m.Unlock()
		c.batch = c.batch[:0]
		select {
		case c.room <- struct{}{}:
		default:
		}
	}
}

// nextBatch moves replies that are queued to the batch, and encodes them. Without
// any, or while they are held, the caller is not sending any more.
func (c *conn) nextBatch() bool {
	m := &c.mu
	m.Lock()
	n, bytes := 0, uint64(0)
	for !m.holding && n < len(m.ready) && (n == 0 || bytes+m.ready[n].dataLen() <= sendBytesMax) {
		bytes += m.ready[n].dataLen()
		n++
	}
	if n == 0 {
		m.sending = false
		m.Unlock()
		return false // what the sender has may be somebody else's by now
	}
	c.batch = append(c.batch, m.ready[:n]...)
	m.ready = append(m.ready[:0], m.ready[n:]...)
	m.unsent -= n
	m.Unlock()
	c.reply.gather = len(c.batch) > 1
	for _, r := range c.batch {
		c.reply.append(r, c.agreed.mode)
	}
	return true
}

// send writes the replies of the batch, and releases their payloads when that is
// done. Without wait it may report false. On a dead connection it only does the
// latter; an error is the connection's death.
func (c *conn) send(wait bool) bool {
	if c.ctx.Err() == nil {
		done, err := c.write(wait)
		if err != nil {
			c.fail(err)
		} else if !done {
			return false
		}
	}
	c.reply.reset()
	for _, r := range c.batch {
		if r.payload != nil {
			r.payload.Release()
			r.payload = nil
		}
		r.extents = nil
	}
	return true
}

// write sends what is encoded, without wait as far as that is possible at once.
func (c *conn) write(wait bool) (done bool, err error) {
	if !wait {
		return c.reply.tryWriteTo(&c.nc)
	}
	if d := c.s.opts.StallTimeout; d > 0 {
		if err := c.nc.SetWriteDeadline(time.Now().Add(d)); err != nil {
			return false, err
		}
	}
	return true, c.reply.writeTo(&c.nc)
}

func segmentsLen(segs [][]byte) (n uint64) {
	for _, s := range segs {
		n += uint64(len(s))
	}
	return n
}
