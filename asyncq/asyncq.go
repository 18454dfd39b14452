// Package asyncq is a bounded queue of work that is done in parallel and
// completed in order.
//
// Each task has two parts. Its parallel part, Do, runs on one of a fixed number
// of workers, in any order and at any time after Submit. Its ordered part,
// Complete, runs on one committer goroutine, strictly in the order of Submit:
//
//	Submit      1   2   3   4   5        tickets are given in this order
//	                 \  |  /
//	workers    Do 2    Do 4    Do 3      any order, any worker
//	                 /  |  \
//	committer   1 → 2 → 3                Complete, then Free; 4 is done and waits
//
// Waking goroutines takes longer than a small task. So who submits a few and then has
// to wait for them can do them itself: SubmitLater wakes nobody yet, and Help does, in
// the calling goroutine, what is to be done and what is to be completed.
//
// What is in flight is bounded by tokens (bytes, to most callers) which are taken
// with Acquire before a task is made and come back when it is complete. The queue
// knows nothing of what the tasks are for.
//
// Invariants:
//
//  1. Complete runs in ticket order, never two at once, and only after the Do of
//     its own task has returned; what Do wrote, Complete sees.
//  2. Free runs once for each task, after its Complete, under no lock.
//  3. A task stays the head of the order while its Complete and Free run: the
//     next one begins after that.
//  4. A slow task holds back the Complete of later ones, but not their Do: with
//     n workers, n-1 others go on.
//  5. Tokens in flight never exceed BytesMax, save that one Acquire larger than
//     that passes when nothing else is in flight. They fall only after the
//     Complete of the task that had them has returned (or by Return).
//  6. No ticket is lost: a Do that panics is a failed Do.
//  7. completed <= begun <= issued, see Queue.
//
// # Locks
//
// The queue has one mutex, a leaf: no method of a task is called and nothing is
// waited for under it. Tasks may take any lock in Do and Complete, if its holders
// do not wait for the queue meanwhile. Complete and Free must not call Acquire,
// Wait, Help, Drain or Close, and nobody may call those while it has tokens that it has
// neither submitted nor returned: either could wait for itself.
package asyncq

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"sync"
	"time"
)

// A Task is one piece of work. The queue holds it from Submit until Free.
type Task interface {
	// Do is the parallel part. worker is 0 to Workers, the last being that of who
	// helps, and no two calls that run at the same time have the same one, so it can
	// index state that is kept for each worker. A panic in Do becomes the error that Complete gets,
	// a *[PanicError].
	Do(worker int) error

	// Complete is the ordered part: it runs alone, after the Complete and Free
	// of all tasks submitted before. err is what Do returned. A panic here is
	// not recovered and ends the process: the order that the owner of the queue
	// relies on is broken, and there is no way to go on without the task.
	Complete(err error)

	// Free ends the queue's use of the task, once, after Complete. The task may
	// be submitted anew from here on.
	Free()
}

// A Ticket is the place of a task in the order of submission, counted from 1.
// The zero Ticket is before all tasks.
type Ticket uint64

// A PanicError is the error of a Do that panicked.
type PanicError struct {
	Value any    // what panic was called with
	Stack []byte // of the worker, at the panic
}

func (e *PanicError) Error() string {
	return fmt.Sprintf("asyncq: task panicked: %v\n\n%s", e.Value, e.Stack)
}

// Unwrap is the panic's value if that was an error.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// ErrClosed is returned by Acquire when the queue is closed or closing.
var ErrClosed = errors.New("asyncq: queue is closed")

const (
	workersMaxDefault = 8 // as Btrfs has
	bytesMaxDefault   = 64 << 20
)

// Options of a Queue. The zero value is the default of every field.
type Options struct {
	// Workers is the number of goroutines that run Do. Default: two more than
	// the machine has processors, at most 8.
	Workers int

	// BytesMax is the limit of tokens in flight. Default: 64 MiB.
	BytesMax int64

	// BytesLow, at most BytesMax, is where those who wait for tokens go on once
	// the limit was reached, so that they come in few large steps instead of
	// one for each completed task. Default: half of BytesMax.
	BytesLow int64
}

// Validate reports all faults of o together.
func (o Options) Validate() error {
	var errs []error
	if o.Workers < 0 {
		errs = append(errs, fmt.Errorf("asyncq: Workers is %d, less than 0", o.Workers))
	}
	if o.BytesMax < 0 {
		errs = append(errs, fmt.Errorf("asyncq: BytesMax is %d, less than 0", o.BytesMax))
	}
	if o = o.withDefaults(); o.BytesLow < 0 || o.BytesLow > max(o.BytesMax, 0) {
		errs = append(errs, fmt.Errorf("asyncq: BytesLow is %d, not from 0 to BytesMax, %d", o.BytesLow, o.BytesMax))
	}
	return errors.Join(errs...)
}

func (o Options) withDefaults() Options {
	if o.Workers == 0 {
		o.Workers = min(runtime.NumCPU()+2, workersMaxDefault)
	}
	if o.BytesMax == 0 {
		o.BytesMax = bytesMaxDefault
	}
	if o.BytesLow == 0 {
		o.BytesLow = o.BytesMax / 2
	}
	return o
}

// A Queue runs tasks; see the package's documentation. All methods may be called
// concurrently.
type Queue struct {
	opts    Options // with the defaults filled in; immutable
	wg      sync.WaitGroup
	stopped chan struct{} // closed when Close has stopped the goroutines

	begin  sync.Cond // workers wait for a task to begin or for closed
	commit sync.Cond // the committer waits for the head to be done or for closed

	mu struct {
		sync.Mutex

		// Of the tickets up to issued, those after completed are in order:
		// (completed, begun] are with the workers or done, (begun, issued]
		// wait for a worker.
		order                    order
		completed, begun, issued Ticket
		running                  int  // tasks in Do
		committing               bool // somebody is in Complete or Free
		helping                  bool // somebody is in Help, and has the last number of workers

		inFlight int64 // tokens acquired and not yet released
		held     int64 // the part of inFlight that is not submitted yet
		limited  bool  // the limit was reached, and BytesLow not yet since
		gates    int   // Drains that keep Acquire from passing

		acquirers waitList // in the order of arrival
		ticketers waitList // in the order of tickets
		drainers  waitList // for inFlight to be 0
		idle      *waiter  // for reuse, linked by next

		closing bool // Close was called: no Acquire succeeds any more
		closed  bool // all is complete: goroutines end, no Submit any more

		panics        uint64
		throttled     uint64
		throttledTime time.Duration
	}
}

// New returns a queue with its goroutines running; Close ends them. It panics if
// o is not valid.
func New(o Options) *Queue {
	if err := o.Validate(); err != nil {
		panic(err)
	}
	q := &Queue{opts: o.withDefaults(), stopped: make(chan struct{})}
	q.begin.L, q.commit.L = &q.mu, &q.mu
	q.mu.order.ring = make([]entry, orderSizeInitial)
	for i := range q.opts.Workers {
		q.wg.Go(func() {
			label("worker", "worker", strconv.Itoa(i))
			q.work(i)
		})
	}
	q.wg.Go(func() {
		label("committer")
		q.commitAll()
	})
	return q
}

// label gives the calling goroutine its pprof labels.
func label(role string, more ...string) {
	labels := pprof.Labels(append([]string{"asyncq", role}, more...)...)
	pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), labels))
}

// Submit queues task, which is given to the queue until its Free, together with
// n tokens that the caller has acquired before; they come back when its Complete
// has returned. n may be 0. Submit never blocks. The order of calls that do not
// overlap is the order of their tickets, so a caller that has an order to keep
// serializes its calls. Submit panics after Close.
func (q *Queue) Submit(task Task, n int64) Ticket { return q.submit(task, n, 0) }

// laterMax is how many tasks of SubmitLater wait for Help: a wake-up takes as long as a
// few of the smallest.
const laterMax = 4

// SubmitLater is Submit for a caller that calls Help soon: while few tasks wait to be
// begun it wakes no worker. Others that wait for the queue meanwhile do.
func (q *Queue) SubmitLater(task Task, n int64) Ticket { return q.submit(task, n, laterMax) }

// submit wakes a worker if more than so many tasks wait to be begun.
func (q *Queue) submit(task Task, n int64, waiting Ticket) Ticket {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.mu.closed {
		panic("asyncq: Submit after Close")
	}
	q.takeHeldLocked(n)
	q.mu.issued++
	t := q.mu.issued
	if t-q.mu.completed > q.mu.order.size() {
		q.mu.order.grow(q.mu.completed+1, t)
	}
	*q.mu.order.at(t) = entry{task: task, tokens: n}
	if t-q.mu.begun > waiting {
		q.begin.Signal()
	}
	return t
}

// work is the loop of one worker.
func (q *Queue) work(worker int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for q.mu.begun == q.mu.issued {
			if q.mu.closed {
				return
			}
			q.begin.Wait()
		}
		if t := q.doLocked(worker); t == q.mu.completed+1 {
			q.commit.Signal()
		}
	}
}

// doLocked does the next task, and returns its ticket. It drops and retakes the
// mutex. REQUIRES: there is a task to begin.
func (q *Queue) doLocked(worker int) Ticket {
	q.mu.begun++
	t := q.mu.begun
	task := q.mu.order.at(t).task
	q.mu.running++
	q.mu.Unlock()

	err, panicked := do(task, worker)

	q.mu.Lock()
	// Nothing but the ticket is used from here on: once done is seen, the
	// task may be freed and even be in the queue again.
	q.mu.running--
	e := q.mu.order.at(t) // anew, as the ring may have grown
	e.err, e.done = err, true
	if panicked {
		q.mu.panics++
	}
	return t
}

// do runs task's parallel part and makes an error of its panic.
func do(task Task, worker int) (err error, panicked bool) {
	panicked = true // until Do has returned
	defer func() {
		if !panicked {
			return
		}
		v := recover()
		if v == nil {
			// The goroutine cannot be kept, and without it the ticket would be
			// lost: better to end here than to hang later.
			panic("asyncq: Do called runtime.Goexit")
		}
		err = &PanicError{Value: v, Stack: debug.Stack()}
	}()
	err = task.Do(worker)
	return err, false
}

// commitAll is the loop of the committer.
func (q *Queue) commitAll() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for {
		for !q.headDoneLocked() {
			if q.mu.closed {
				return
			}
			q.commit.Wait()
		}
		q.commitLocked()
	}
}

// headDoneLocked tells whether the next task in order is there to be completed, and
// nobody is at it.
func (q *Queue) headDoneLocked() bool {
	head := q.mu.completed + 1
	return !q.mu.committing && head <= q.mu.issued && q.mu.order.at(head).done
}

// commitLocked completes and frees the head. It drops and retakes the mutex.
// REQUIRES: headDoneLocked.
func (q *Queue) commitLocked() {
	head := q.mu.completed + 1
	e := *q.mu.order.at(head)
	q.mu.committing = true
	q.mu.Unlock()

	e.task.Complete(e.err)
	e.task.Free()

	q.mu.Lock()
	q.mu.committing = false
	*q.mu.order.at(head) = entry{}
	q.mu.completed = head
	q.releaseLocked(e.tokens)
	for w := q.mu.ticketers.first; w != nil && w.ticket <= head; w = q.mu.ticketers.first {
		q.mu.ticketers.wake(w)
	}
}

// Help is Wait, but what is to be done until then it does in the calling goroutine, as
// far as nobody else is at it; one caller at a time helps, others wait. It does not
// look at ctx while there is something to do.
func (q *Queue) Help(ctx context.Context, t Ticket) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t > q.mu.issued {
		panic("asyncq: Help for a ticket that was not issued")
	}
	if !q.mu.helping {
		q.mu.helping = true
		for t > q.mu.completed {
			if q.headDoneLocked() {
				q.commitLocked()
			} else if q.mu.begun < t {
				q.doLocked(q.opts.Workers)
			} else {
				break
			}
		}
		q.mu.helping = false
		if q.headDoneLocked() {
			q.commit.Signal() // who did it may have seen this goroutine at it
		}
	}
	return q.waitTicketLocked(ctx, t)
}

// Wait returns nil once Complete and Free of ticket t and of all before it have
// returned, or ctx's error when ctx ends first; the tasks are not affected by
// that. It panics for a ticket that was not issued.
func (q *Queue) Wait(ctx context.Context, t Ticket) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if t > q.mu.issued {
		panic("asyncq: Wait for a ticket that was not issued")
	}
	return q.waitTicketLocked(ctx, t)
}

// waitTicketLocked drops and retakes the mutex.
func (q *Queue) waitTicketLocked(ctx context.Context, t Ticket) error {
	if t <= q.mu.completed {
		return nil
	}
	q.wakeLocked()
	w := q.newWaiterLocked()
	defer q.freeWaiterLocked(w)
	w.ticket = t
	// Most wait for a late ticket: its place is looked for from the back.
	prev := q.mu.ticketers.last
	for prev != nil && prev.ticket > t {
		prev = prev.prev
	}
	q.mu.ticketers.insertAfter(prev, w)
	return q.sleepLocked(ctx, &q.mu.ticketers, w)
}

// wakeLocked has all begun that SubmitLater has left, for somebody waits for it.
func (q *Queue) wakeLocked() {
	if q.mu.begun < q.mu.issued {
		q.begin.Broadcast()
	}
}

// Close waits until all that was acquired is submitted or returned and all that
// was submitted is complete, then ends the goroutines and returns. From its call
// on Acquire returns ErrClosed; from its return on Submit panics. Further calls
// wait for the first.
func (q *Queue) Close() {
	q.mu.Lock()
	if q.mu.closing {
		q.mu.Unlock()
		<-q.stopped
		return
	}
	q.mu.closing = true
	for w := q.mu.acquirers.first; w != nil; w = q.mu.acquirers.first {
		q.mu.acquirers.wake(w) // with nothing granted
	}
	q.wakeLocked()
	// Tasks without tokens may still come while the others are waited for.
	for q.mu.inFlight > 0 || q.mu.completed < q.mu.issued {
		q.drainLocked(context.Background()) // fails only if the context ends
	}
	q.mu.closed = true
	q.mu.Unlock()
	q.begin.Broadcast()
	q.commit.Broadcast()
	q.wg.Wait()
	close(q.stopped)
}
