package nbd

import (
	"context"
	"slices"
	"sync"
)

// A budget is the memory for the payloads of all connections of a server. It is
// divided so that clients that keep theirs, because they do not take their
// replies or do not send what they announced, leave some for the others:
//
//   - Each connection has a reserve of its own.
//   - Beyond that it may hold half of what the others leave of a common pool.
//   - The slot is for one request at a time, of a connection that holds nothing
//     else. So every request has its turn, the longest too.
//
// The requests of a connection are granted in their order; its reader waits.
type budget struct {
	reserve uint64 // of each connection, in bytes; immutable
	pool    uint64 // bytes; immutable
	slot    uint64 // bytes; no request wants more; immutable

	mu struct {
		sync.Mutex
		pooled  uint64   // bytes of the pool in use: the sum of what shares hold beyond their reserve
		slotted bool     // a request has the slot
		used    uint64   // bytes, of all
		waiters []*share // in the order of their coming
	}
}

// A share is what one connection holds of a [budget], but for the slot.
type share struct {
	held    uint64        // bytes; guarded by budget.mu
	want    *request      // what it waits for; guarded by budget.mu
	granted chan struct{} // capacity 1: want was granted
}

// init divides up bytes for at most conns connections with requests of at most
// payload bytes, which is at most half of bytes.
func (b *budget) init(bytes, payload uint64, conns int) {
	b.slot = payload
	b.reserve = bytes / 4 / uint64(conns) / blockPreferred * blockPreferred
	b.pool = bytes - b.slot - b.reserve*uint64(conns)
}

// charge is the memory that a payload of n bytes at off takes: a backend holds
// whole blocks.
func (b *budget) charge(off, n uint64) uint64 {
	bytes := off%blockPreferred + n + blockPreferred - 1
	return min(bytes-bytes%blockPreferred, b.slot)
}

// tryTake grants r its bytes if that can be done at once.
func (b *budget) tryTake(s *share, r *request) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.grant(s, r)
}

// take waits until r.bytes are granted to r, a request of the connection of s.
// The error is the cause of ctx; nothing is granted then.
func (b *budget) take(ctx context.Context, s *share, r *request) error {
	b.mu.Lock()
	if b.grant(s, r) {
		b.mu.Unlock()
		return nil
	}
	s.want = r
	b.mu.waiters = append(b.mu.waiters, s)
	b.mu.Unlock()
	select {
	case <-s.granted:
		return nil
	case <-ctx.Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	i := slices.Index(b.mu.waiters, s)
	if i < 0 {
		<-s.granted // at the last moment
		return nil
	}
	b.mu.waiters = slices.Delete(b.mu.waiters, i, i+1)
	r.bytes = 0
	return context.Cause(ctx)
}

// grant gives r its bytes, if they can be had. REQUIRES: b.mu held.
func (b *budget) grant(s *share, r *request) bool {
	was, will := b.beyond(s.held), b.beyond(s.held+r.bytes)
	if left := b.pool - (b.mu.pooled - was); will <= left/2 {
		b.mu.pooled += will - was
		s.held += r.bytes
	} else if s.held == 0 && !b.mu.slotted {
		b.mu.slotted, r.slotted = true, true
	} else {
		return false
	}
	b.mu.used += r.bytes
	return true
}

// beyond is how much of held bytes is not in the reserve.
func (b *budget) beyond(held uint64) uint64 { return max(held, b.reserve) - b.reserve }

// give takes back what was granted to the batch, requests of the connection of s,
// and grants it to those who wait.
func (b *budget) give(s *share, batch []*request) {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.beyond(s.held)
	for _, r := range batch {
		b.mu.used -= r.bytes
		if r.slotted {
			b.mu.slotted = false
		} else {
			s.held -= r.bytes
		}
	}
	b.mu.pooled -= was - b.beyond(s.held)
	b.mu.waiters = slices.DeleteFunc(b.mu.waiters, func(w *share) bool {
		if !b.grant(w, w.want) {
			return false
		}
		w.want = nil
		w.granted <- struct{}{}
		return true
	})
}

// used is how many bytes are granted.
func (b *budget) used() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.used
}
