package asyncq

import (
	"context"
	"fmt"
	"time"
)

// Acquire takes between min and max tokens, as many as there are, for a Submit to
// come; 1 <= min <= max. It blocks until it can have min of them: until they fit
// below BytesMax, or, if min is more than that, until nothing is in flight; once
// the limit was reached, until in flight has fallen to BytesLow; and while a
// Drain waits. Who comes first is served first. It returns how many it took,
// ctx's error when ctx ends first, or ErrClosed.
//
// The caller must Submit or Return all of them, and not wait for the queue
// before it has.
func (q *Queue) Acquire(ctx context.Context, min, max int64) (int64, error) {
	if min < 1 || max < min {
		panic(fmt.Sprintf("asyncq: Acquire of %d to %d tokens", min, max))
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.closing {
		return 0, ErrClosed
	}
	if q.mu.acquirers.first == nil && q.admitsLocked(min) {
		return q.grantLocked(min, max), nil
	}

	q.wakeLocked()
	q.mu.throttled++
	began := time.Now()
	w := q.newWaiterLocked()
	defer q.freeWaiterLocked(w)
	w.min, w.max = min, max
	q.mu.acquirers.insertAfter(q.mu.acquirers.last, w)
	err := q.sleepLocked(ctx, &q.mu.acquirers, w)
	q.mu.throttledTime += time.Since(began)
	if err != nil {
		q.admitLocked() // those behind may want less
		return 0, err
	}
	if w.granted == 0 {
		return 0, ErrClosed
	}
	return w.granted, nil
}

// Return gives back n tokens that were acquired and not submitted.
func (q *Queue) Return(n int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.takeHeldLocked(n)
	q.releaseLocked(n)
}

// Drain keeps every Acquire from passing until all tokens in flight are back and
// all tasks submitted by then are complete, then lets them go on; a steady
// writer cannot hold it up. It returns ctx's error when ctx ends first.
func (q *Queue) Drain(ctx context.Context) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.mu.gates++
	err := q.drainLocked(ctx)
	q.mu.gates--
	q.admitLocked()
	return err
}

// drainLocked drops and retakes the mutex until no token is in flight, then until
// all tasks issued by then, among them those without tokens, are complete.
// Acquire must be barred.
func (q *Queue) drainLocked(ctx context.Context) error {
	if q.mu.inFlight > 0 {
		q.wakeLocked()
		w := q.newWaiterLocked()
		defer q.freeWaiterLocked(w)
		q.mu.drainers.insertAfter(q.mu.drainers.last, w)
		if err := q.sleepLocked(ctx, &q.mu.drainers, w); err != nil {
			return err
		}
	}
	return q.waitTicketLocked(ctx, q.mu.issued)
}

// takeHeldLocked takes n from the tokens that callers hold. If they have less, a
// caller's bug has broken the bound, which is worth a check in every build.
func (q *Queue) takeHeldLocked(n int64) {
	if n < 0 || n > q.mu.held {
		panic(fmt.Sprintf("asyncq: %d tokens given, %d acquired", n, q.mu.held))
	}
	q.mu.held -= n
}

// releaseLocked ends the flight of n tokens and wakes who waited for that.
func (q *Queue) releaseLocked(n int64) {
	if n == 0 {
		return
	}
	q.mu.inFlight -= n
	if q.mu.inFlight == 0 {
		for w := q.mu.drainers.first; w != nil; w = q.mu.drainers.first {
			q.mu.drainers.wake(w)
		}
	}
	q.admitLocked()
}

// admitLocked grants tokens to those who wait for them, in order, up to the first
// who has to go on waiting.
func (q *Queue) admitLocked() {
	for w := q.mu.acquirers.first; w != nil && q.admitsLocked(w.min); w = q.mu.acquirers.first {
		w.granted = q.grantLocked(w.min, w.max)
		q.mu.acquirers.wake(w)
	}
}

// admitsLocked reports whether the next in order may take min tokens now, and
// notes when the limit is reached and when it is left behind.
func (q *Queue) admitsLocked(min int64) bool {
	switch {
	case q.mu.gates > 0:
		return false
	case q.mu.inFlight == 0:
		q.mu.limited = false
		return true // whatever min is, else more than BytesMax would never pass
	case q.mu.limited && q.mu.inFlight > q.opts.BytesLow:
		return false
	}
	q.mu.limited = min > q.opts.BytesMax-q.mu.inFlight
	return !q.mu.limited
}

func (q *Queue) grantLocked(least, most int64) int64 {
	n := max(least, min(most, q.opts.BytesMax-q.mu.inFlight))
	q.mu.inFlight += n
	q.mu.held += n
	return n
}
