package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/internal/disktest"
)

func newShare() *share { return &share{granted: make(chan struct{}, 1)} }

// However many connections take all they can and keep it, one more has its
// reserve, the first ones leave it a part of the pool, and together they hold no
// more than there is.
func TestBudgetLeavesSomeForOneMore(t *testing.T) {
	const bytes, payload, conns = 64 << 20, 32 << 20, 128
	b := new(budget)
	b.init(bytes, payload, conns)
	if b.reserve != bytes/4/conns || b.pool+b.slot+conns*b.reserve != bytes {
		t.Errorf("divided: %d, %d and %d each", b.slot, b.pool, b.reserve)
	}
	b.grant(newShare(), &request{bytes: payload}) // takes the slot
	for k := range conns {
		s := newShare()
		for b.grant(s, &request{bytes: blockPreferred}) {
		}
		if s.held < b.reserve+b.pool>>(k+1)/blockPreferred*blockPreferred {
			t.Fatalf("connection %d has %d bytes", k, s.held)
		}
	}
	if u := b.used(); u > bytes || u < bytes*9/10 {
		t.Errorf("%d of %d bytes in use", u, bytes)
	}
}

// What is charged is what a backend of whole blocks takes, and never more than
// can be granted.
func TestBudgetCharge(t *testing.T) {
	b := &budget{slot: 1 << 20}
	for _, tc := range []struct {
		off  uint64
		n    uint64
		want uint64
	}{
		{0, 1, 4096}, {4095, 1, 4096}, {4095, 2, 8192}, {4096, 4096, 4096}, {1, 4096, 8192},
		{0, 1 << 20, 1 << 20}, {1, 1 << 20, 1 << 20}, {1<<64 - 1, 1, 4096}, {1<<64 - 1, 1<<32 - 1, 1 << 20},
	} {
		if got := b.charge(tc.off, tc.n); got != tc.want {
			t.Errorf("%d bytes at %d: %d, want %d", tc.n, tc.off, got, tc.want)
		}
	}
}

// Takers of all sizes, some of whom give up, all have their turn; the limits hold
// at every moment, and in the end all has come back.
func TestBudgetRandom(t *testing.T) {
	const bytes, payload, takers = 2 << 20, 1 << 20, 12
	b := new(budget)
	b.init(bytes, payload, takers)
	r := testRand(t)
	check := func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.mu.used > bytes || b.mu.pooled > b.pool || len(b.mu.waiters) > takers {
			t.Errorf("in use: %d of %d, %d of the pool of %d; %d wait", b.mu.used, bytes, b.mu.pooled, b.pool, len(b.mu.waiters))
		}
	}
	var group sync.WaitGroup
	for range takers {
		sizes := make([]uint64, 300*disktest.Scale(t))
		for i := range sizes {
			sizes[i] = 1 + r.Uint64N(payload>>r.IntN(9))
		}
		impatient := r.IntN(4) == 0
		group.Go(func() {
			s := newShare()
			var batch []*request
			for i, n := range sizes {
				q := &request{bytes: n}
				ctx, cancel := context.WithCancel(t.Context())
				if impatient {
					go cancel()
				}
				// As a connection does: what it holds it gives back, whether or
				// not it waits for more.
				given := make(chan struct{})
				go func() { defer close(given); b.give(s, batch) }()
				err := b.take(ctx, s, q)
				<-given
				batch = batch[:0]
				cancel()
				if err != nil && (!impatient || !errors.Is(err, context.Canceled)) {
					t.Error(err)
				}
				check()
				batch = append(batch, q)
				if i%3 == 0 {
					b.give(s, batch)
					batch = batch[:0]
				}
			}
			b.give(s, batch)
			if s.held != 0 || len(s.granted) != 0 {
				t.Errorf("at the end: %+v", s)
			}
		})
	}
	group.Wait()
	if b.used() != 0 || b.mu.pooled != 0 || b.mu.slotted || len(b.mu.waiters) != 0 {
		t.Errorf("at the end: %+v", &b.mu)
	}
}

// Clients that do not take their replies, or do not send what they announced,
// hold bounded memory together, and others work on.
func TestClientsThatKeepMemory(t *testing.T) {
	const bytesMax, payloadMax, hogs = 8 << 20, 1 << 20, 15
	d := newMemDisk(2 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, BytesMax: bytesMax, PayloadBytesMax: payloadMax, ConnectionsMax: hogs + 2})

	// The longest request, which goes beyond every share, is the first to be stuck.
	large := s.rawGo()
	large.request(CmdRead, 1, 0, payloadMax)
	eventually(t, "it is granted", func() bool { return s.Metrics().BytesInFlight == payloadMax })
	for i := range hogs {
		rc := s.rawGo()
		if i%2 == 0 {
			go func() {
				for c := uint64(0); ; c++ {
					h := header{cmd: CmdRead, cookie: c, n: 64 << 10}
					if _, err := rc.Write(h.appendTo(nil)); err != nil {
						return // cut off at the end of the test
					}
				}
			}()
		} else {
			rc.put(header{cmd: CmdWrite, cookie: 1, n: payloadMax / 8}.appendTo(nil))
			rc.put(make([]byte, 1000)) // and no more
		}
	}
	eventually(t, "they hold a lot", func() bool { return d.bytes.Load() >= bytesMax/2 })

	good := s.dial("")
	p, q := pattern(64<<10, 1), make([]byte, 64<<10)
	for range 50 {
		if err := errors.Join(good.WriteAt(t.Context(), p, 1<<20, false), good.ReadAt(t.Context(), q, 1<<20)); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, "the good client's data", q, p)
		if m := s.Metrics(); m.BytesInFlight > m.BytesMax {
			t.Fatalf("%d bytes in flight, limit %d", m.BytesInFlight, m.BytesMax)
		}
	}
	if got := d.bytesMost.Load(); got > bytesMax+2*64<<10 { // an answer comes a little before its memory is given back
		t.Errorf("up to %d bytes handed out, limit %d", got, bytesMax)
	}
}

// The longest request waits while another one is stuck, until that one's client
// is cut off.
func TestLongestRequestHasItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const payloadMax = 1 << 20
		s, err := NewServer(Options{
			Exports:         []Export{{Backend: newMemDisk(payloadMax)}},
			PayloadBytesMax: payloadMax,
			StallTimeout:    time.Minute,
		})
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		defer s.Close()
		dial := func() net.Conn {
			nc := l.dial()
			io.ReadFull(nc, make([]byte, 18))
			nc.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, nil))
			io.ReadFull(nc, make([]byte, 10))
			return nc
		}
		longest := header{cmd: CmdRead, n: payloadMax}.appendTo(nil)
		stuck := dial()
		defer stuck.Close()
		stuck.Write(longest)
		synctest.Wait()
		begin := time.Now()
		for range 3 { // in turn, and at once
			nc := dial()
			defer nc.Close()
			nc.Write(longest)
			if _, err := io.ReadFull(nc, make([]byte, simpleReplySize+payloadMax)); err != nil {
				t.Fatal(err)
			}
		}
		if got := time.Since(begin); got != time.Minute {
			t.Errorf("answered after %v", got)
		}
	})
}

// What a header announces takes memory when its bytes come, and not before.
func TestMemoryComesWithTheBytes(t *testing.T) {
	const size = 32 << 20
	d := newMemDisk(size)
	s := serveDisk(t, d)
	rc := s.rawGo()
	p := pattern(size, 1)
	rc.request(CmdWrite, 1, 0, size)
	eventually(t, "the write is admitted", func() bool { return d.pendings.Load() == 1 })
	sent := 0
	for _, n := range []int{1, 1000, 200_000, 5 << 20, size} {
		if got, most := d.bytesMost.Load(), max(2*int64(sent), payloadPiece); sent == 0 && got > 0 || got > most {
			t.Errorf("%d bytes of memory for %d sent", got, sent)
		}
		rc.put(p[sent:n])
		sent = n
		eventually(t, "what was sent has memory", func() bool { return d.bytes.Load() >= int64(n) || d.pendings.Load() == 0 })
	}
	if e, cookie := rc.reply(); e != 0 || cookie != 1 {
		t.Fatal(e, cookie)
	}
	data, _ := d.contents()
	mustEqual(t, "written", data, p)
}
