package asyncq

import "context"

// A waiter is one goroutine that waits for an event of the queue.
type waiter struct {
	prev, next *waiter // in its waitList
	listed     bool
	wake       chan struct{} // of capacity 1; one send by who took it off the list

	// What it waits for, as its list needs.
	ticket   Ticket
	min, max int64 // tokens
	granted  int64 // tokens; 0 when woken with none
}

// A waitList is a doubly linked list of waiters. The zero waitList is empty.
type waitList struct {
	first, last *waiter
}

// insertAfter puts w behind prev, which is on the list, or first if prev is nil.
func (l *waitList) insertAfter(prev, w *waiter) {
	next := l.first
	if prev != nil {
		next = prev.next
	}
	w.prev, w.next, w.listed = prev, next, true
	l.link(prev, w)
	l.link(w, next)
}

// wake takes w, which is on the list, off it and wakes it.
func (l *waitList) wake(w *waiter) {
	l.remove(w)
	w.wake <- struct{}{}
}

func (l *waitList) remove(w *waiter) {
	l.link(w.prev, w.next)
	w.prev, w.next, w.listed = nil, nil, false
}

// link makes a and b neighbours; nil stands for the end of the list.
func (l *waitList) link(a, b *waiter) {
	if a == nil {
		l.first = b
	} else {
		a.next = b
	}
	if b == nil {
		l.last = a
	} else {
		b.prev = a
	}
}

// sleepLocked drops the mutex until w, which is on l, is woken, and retakes it.
// If ctx ends first, it takes w off the list and returns ctx's error.
func (q *Queue) sleepLocked(ctx context.Context, l *waitList, w *waiter) error {
	q.mu.Unlock()
	select {
	case <-w.wake:
		q.mu.Lock()
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	if w.listed {
		l.remove(w)
		return ctx.Err()
	}
	<-w.wake // it was woken meanwhile, so it has what it waited for
	return nil
}

// newWaiterLocked returns a waiter with nothing to wait for. There are never more
// than have waited at once, so none is made in the steady state.
func (q *Queue) newWaiterLocked() *waiter {
	w := q.mu.idle
	if w == nil {
		return &waiter{wake: make(chan struct{}, 1)}
	}
	q.mu.idle = w.next
	*w = waiter{wake: w.wake}
	return w
}

// freeWaiterLocked takes back w, which is on no list.
func (q *Queue) freeWaiterLocked(w *waiter) {
	w.next = q.mu.idle
	q.mu.idle = w
}
