package nbd

import (
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// roundRequests is about how many requests all busy readers together read in a round.
// The more, the longer waits a client that sends one at a time. But a round's end costs
// as much as one or two small requests, and short turns make small batches of replies.
const roundRequests = 256

// turns lets connections whose next request is always there already take turns with
// those that send one at a time.
//
// Go's scheduler looks at the network when a processor has nothing else to run, or
// after 10 ms. The reader of a client that floods the server finds something to
// read whenever it runs, so a few of them keep all processors busy, and the readers
// that wait for the network are not woken. (Gosched does not help: it lets others
// run that are known to be able to.) So a reader that has had its turn waits for the
// network as well. When all have, the processors run dry, the scheduler looks, and
// a new round begins with everybody who has something to read.
//
// What they wait for is an event that the first of them makes, and that only such a
// look can find. The next turns are the shorter the more readers were in the round.
// A turn begins anew whenever a reader waits for bytes of its client. So one that has
// few requests in flight is spared, and the wait with it: beside goroutines that only
// compute, as compressors do, that is as long as 10 ms.
type turns struct {
	event *os.File // an eventfd
	raw   syscall.RawConn

	// Of the reader that has set mu.looking.
	made bool
	look func(fd uintptr) bool // makes the event, then awaits it; made once, so that no turn allocates

	over sync.Cond // of mu: a round is over
	mu   struct {
		sync.Mutex
		looking bool   // a reader waits for the event, others for over
		round   uint64 // how many are over
		readers int    // that have had their turn in this one
		turn    int    // requests in a turn of the next
	}
}

// init prepares t, which close ends.
func (t *turns) init() error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return os.NewSyscallError("eventfd", err)
	}
	t.event = os.NewFile(uintptr(fd), "eventfd")
	if t.raw, err = t.event.SyscallConn(); err != nil {
		t.event.Close()
		return err
	}
	one := [8]byte{1}
	t.look = func(fd uintptr) bool {
		if t.made {
			return true
		}
		// Nobody ever reads the counter: adding to it is an event each time, for the
		// runtime's epoll is edge-triggered.
		_, err := unix.Write(int(fd), one[:])
		t.made = err == nil
		return err != nil // rather no wait than one without end
	}
	t.over.L = &t.mu
	return nil
}

// close ends t. REQUIRES: no reader is in pass, or will be.
func (t *turns) close() { t.event.Close() }

// pass ends a reader's turn. It waits for its next one, 10 ms at most while
// the server has the processors, and returns how many requests that has.
func (t *turns) pass() int {
	m := &t.mu
	m.Lock()
	defer m.Unlock()
	m.readers++
	if m.looking {
		for round := m.round; round == m.round; {
			t.over.Wait()
		}
		return m.turn
	}
	m.looking = true
	m.Unlock()
	t.made = false
	t.raw.Read(t.look) // without a wait if the host cannot poll it
	m.Lock()
	m.looking = false
	m.turn = max(1, roundRequests/m.readers)
	m.readers = 0
	m.round++
	t.over.Broadcast()
	return m.turn
}
