package nbd

import (
	"sync/atomic"
	"time"
)

// A client that has one request in flight at a time waits for each goroutine that is
// woken on the way. So the reader executes the requests of such a client itself, and
// looks for the next one for a moment before it sleeps. Neither may keep a second request
// waiting: a reader that executes for longer than relieveAfter is relieved of reading by
// another goroutine.
//
// Waking one takes longer than most reads, and setting a timer may wake one too. So
// there is one goroutine that looks at all readers now and then, as the monitor of Go's
// scheduler does for threads in system calls; it sleeps while no reader executes.

const (
	// loneMin is how many requests in sequence make a client one that has one in
	// flight at a time.
	loneMin = 16

	// relieveAfter is how often readers are looked at: who is seen twice in the same
	// request is relieved.
	relieveAfter = time.Millisecond

	// relieveIdle is after how many looks in vain the one who looks sleeps.
	relieveIdle = 100

	// busyPollDefault is what QEMU's I/O threads poll for (poll-max-ns, 32 us), and somewhat
	// more: a client in the same machine that takes 25 us from an answer to its next
	// request, as fio does, is still found.
	busyPollDefault = 50 * time.Microsecond

	// busyPollMax is what may be asked for.
	busyPollMax = time.Millisecond
)

// A reliever is what readers need of the goroutine that relieves them.
type reliever struct {
	asleep atomic.Bool   // who begins to execute has to wake it
	wake   chan struct{} // of capacity 1
}

// begun is called by a reader that executes a request from now on.
func (v *reliever) begun() {
	if v.asleep.Load() && v.asleep.CompareAndSwap(true, false) {
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
}

// relieve relieves readers until the server has ended.
func (s *Server) relieve() {
	v := &s.reliever
	looks := time.NewTicker(relieveAfter)
	defer looks.Stop()
	for vain := 0; ; {
		select {
		case <-looks.C:
		case <-s.idle:
			return
		}
		if vain++; s.relieveReaders() {
			vain = 0
		}
		if vain < relieveIdle {
			continue
		}
		looks.Stop()
		v.asleep.Store(true)
		if !s.relieveReaders() { // or one has begun before that, and has woken nobody
			select {
			case <-v.wake:
			case <-s.idle:
				return
			}
		}
		v.asleep.Store(false)
		vain = 0
		looks.Reset(relieveAfter)
	}
}

// relieveReaders relieves the readers that are still at the request that they were seen
// at by the last call, and tells whether any has been at one since.
func (s *Server) relieveReaders() (any bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.mu.conns {
		n := c.alone.Load()
		switch {
		case n != c.seen:
			c.seen, any = n, true
		case n&1 != 0:
			any = true
			c.relieveReader(n)
		}
	}
	return any
}

// relieveReader has another goroutine read, if the reader is still at its request n.
func (c *conn) relieveReader(n uint64) {
	if !c.alone.CompareAndSwap(n, n+1) {
		return
	}
	// What is the reader's belongs to this goroutine now, until it gives it on.
	select {
	case c.work <- theReading:
	default:
		c.started++
		c.workers.Go(func() { c.run(theReading) })
	}
}

// theReading takes the place of a request for who is to read the connection.
var theReading = new(request)

// countLone counts the request last admitted and received, if its client was waiting for
// nothing else when it sent it. One that is there already when the reader has executed
// the one before was sent before that was answered. Through TLS that cannot be told.
func (c *conn) countLone() {
	if c.unsent == 1 && c.in.buffered() == 0 && (c.in.slept || !c.itself) && c.in.raw != nil {
		c.lone++
	} else {
		c.lone = 0
	}
	c.in.lone = c.lone >= loneMin
}

// executeAlone has the reader execute r, and reports false if that took so long that
// somebody else reads by now.
func (c *conn) executeAlone(r *request) bool {
	n := c.alone.Load() + 1
	c.alone.Store(n)
	c.s.relieving.Do(func() { go c.s.relieve() })
	c.s.reliever.begun()
	c.execute(r)
	if !c.alone.CompareAndSwap(n, n+1) {
		c.finish(r)
		return false
	}
	c.answer(r)
	return true
}

// A poller bounds those who poll to one, and to when the server has nothing else to do:
// as many as there are clients could take the processors from them. It is for a client
// that has one request in flight at a time: one with several, which sends as many at
// once, has so much to do between that to wait for it is better.
type poller struct {
	limit    time.Duration // of one look; not positive: nobody polls
	inFlight *atomic.Int64 // requests of all connections
	taken    atomic.Bool
}

// poll looks for what comes next until it is there, or rc's client takes too long, or
// another asks for something, or stop was called. It reports ok as try does; polled is false if it has not looked.
func (rc *receiver) poll() (n int, ok, polled bool, err error) {
	p := rc.poller
	if rc.raw == nil || !rc.lone || !rc.quick || p.inFlight.Load() > 0 || !p.taken.CompareAndSwap(false, true) {
		return 0, false, false, nil
	}
	defer p.taken.Store(false)
	for begin := time.Now(); !ok && p.inFlight.Load() == 0 && !rc.stopped() && time.Since(begin) < p.limit; {
		n, ok, err = rc.try()
	}
	return n, ok, true, err
}
