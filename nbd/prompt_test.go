package nbd

import (
	"context"
	"testing"
)

// A client that ends its side without DISC is still told of what was done before the
// server came to see that: the reader keeps no reply back at the end.
func TestAnswersBeforeEnd(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onPrepare = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	rc := serveDisk(t, d).rawGo()
	rc.put(append(header{cmd: CmdWrite, cookie: 1, n: 4096}.appendTo(nil), make([]byte, 4096)...))
	<-g.entered // the reader waits in PrepareWrite: the rest comes with the end behind it
	rc.request(CmdRead, 2, 0, 0)
	rc.request(CmdRead, 3, 0, 0)
	rc.closeWrite()
	g.open(1)
	for want := range uint64(3) {
		if e, cookie := rc.reply(); e != 0 || cookie != want+1 {
			t.Fatalf("%v to request %d, want success to %d", e, cookie, want+1)
		}
	}
}

// A reader that waits for its next turn keeps no reply back.
func TestAnswersBeforeTurn(t *testing.T) {
	s := serveDisk(t, newMemDisk(1<<20))
	rc := s.rawGo()
	m := &s.turns.mu
	m.Lock()
	m.looking = true // so the round lasts until it is ended here
	m.Unlock()
	t.Cleanup(func() {
		m.Lock()
		defer m.Unlock()
		m.looking, m.turn, m.readers = false, roundRequests, 0
		m.round++
		s.turns.over.Broadcast()
	})
	// The turn has roundRequests of them, and one more if the reader had to wait for the
	// first. FLUSH is answered by workers; two, so that the others are no multiple of what leaves
	// together in either case.
	var b []byte
	for i := range uint64(roundRequests + 4) {
		h := header{cmd: CmdRead, cookie: i}
		if i < 2 {
			h.cmd = CmdFlush
		}
		b = h.appendTo(b)
	}
	rc.put(b)
	answered := make(map[uint64]bool)
	for range roundRequests {
		e, cookie := rc.reply()
		if e != 0 || cookie > roundRequests || answered[cookie] {
			t.Fatalf("%v to request %d, after %d others", e, cookie, len(answered))
		}
		answered[cookie] = true
	}
}
