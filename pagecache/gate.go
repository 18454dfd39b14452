package pagecache

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
)

// A gate admits callers that want some units of a limited good, in the order in
// which they came. It does not know what is left: try does. A large request at
// its head holds back the small ones behind, else it might wait for ever.
type gate struct {
	// try takes n units, or reports false if that many cannot be had now. It is
	// called by several goroutines, with or without mu. Set before use.
	try func(n int64) bool

	// waiting is len(queue), readable without mu. Whoever gives units back does
	// so first and looks here then; whoever waits is counted here first and
	// tries then: one of the two sees the other.
	waiting atomic.Int64
	broken  atomic.Bool // err is set

	mu    sync.Mutex // guards queue and err
	queue []*waiter
	err   error
}

type waiter struct {
	n        int64
	admitted chan struct{} // closed when n units were taken for it, or the gate broke
	err      error         // set before admitted is closed
}

// acquire waits until n units are taken for the caller. Before it sleeps it calls
// kick. The errors are the context's cause and that of fail.
func (g *gate) acquire(ctx context.Context, n int64, kick func()) error {
	if g.tryAcquire(n) {
		return nil
	}
	w := &waiter{n: n, admitted: make(chan struct{})}
	g.mu.Lock()
	if g.err != nil {
		g.mu.Unlock()
		return g.err
	}
	g.queue = append(g.queue, w)
	g.waiting.Add(1)
	g.serveLocked()
	g.mu.Unlock()

	select {
	case <-w.admitted:
		return w.err
	default:
	}
	kick()
	select {
	case <-w.admitted:
		return w.err
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.queue, w); i >= 0 {
		g.queue = slices.Delete(g.queue, i, i+1)
		g.waiting.Add(-1)
		g.serveLocked() // it may have held back a smaller one
		return context.Cause(ctx)
	}
	return w.err // admitted at the last moment
}

// tryAcquire takes n units for the caller if it need not wait for them.
func (g *gate) tryAcquire(n int64) bool {
	return g.waiting.Load() == 0 && !g.broken.Load() && g.try(n)
}

// serve admits who can be admitted. It is called after units became available.
func (g *gate) serve() {
	if g.waiting.Load() == 0 {
		return
	}
	g.mu.Lock()
	g.serveLocked()
	g.mu.Unlock()
}

func (g *gate) serveLocked() {
	for len(g.queue) > 0 && g.try(g.queue[0].n) {
		g.popLocked(nil)
	}
}

// fail breaks the gate: everybody who waits, or comes later, gets err. Only the
// first call counts.
func (g *gate) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return
	}
	g.err = err
	g.broken.Store(true)
	for len(g.queue) > 0 {
		g.popLocked(err)
	}
}

func (g *gate) popLocked(err error) {
	w := g.queue[0]
	g.queue = slices.Delete(g.queue, 0, 1)
	g.waiting.Add(-1)
	w.err = err
	close(w.admitted)
}
