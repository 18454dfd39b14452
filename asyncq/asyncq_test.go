package asyncq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

// A funcTask is a task made of functions, nil ones doing nothing.
type funcTask struct {
	do       func(worker int) error
	complete func(err error)
	free     func()
}

func (t *funcTask) Do(worker int) error {
	if t.do == nil {
		return nil
	}
	return t.do(worker)
}

func (t *funcTask) Complete(err error) {
	if t.complete != nil {
		t.complete(err)
	}
}

func (t *funcTask) Free() {
	if t.free != nil {
		t.free()
	}
}

// blocked is a task whose Do returns when release is called.
func blocked() (task *funcTask, release func()) {
	c := make(chan struct{})
	return &funcTask{do: func(int) error { <-c; return nil }}, func() { close(c) }
}

func mustAcquire(t testing.TB, q *Queue, min, max int64) int64 {
	t.Helper()
	n, err := q.Acquire(context.Background(), min, max)
	if err != nil {
		t.Fatalf("Acquire(%d, %d): %v", min, max, err)
	}
	if n < min || n > max {
		t.Fatalf("Acquire(%d, %d) = %d", min, max, n)
	}
	return n
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if recover() == nil {
			t.Errorf("%s: no panic", what)
		}
	}()
	f()
}

// inBubble runs f with a fresh queue in a bubble of synctest, where the end of f
// proves that Close has left no goroutine.
func inBubble(t *testing.T, o Options, f func(t *testing.T, q *Queue)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		q := New(o)
		f(t, q)
		q.Close()
		m := q.Metrics()
		if m.Bytes != 0 || m.Submitted != m.Completed || m.Waiting+m.Running+m.Unordered+m.Acquiring+m.Draining != 0 {
			t.Errorf("after Close: %+v", m)
		}
	})
}

// An orderCheck verifies invariants 1 to 4 for the tasks that it makes. Its plain
// fields are written by the committer alone, which the race detector verifies.
type orderCheck struct {
	t       testing.TB
	q       *Queue
	pool    sync.Pool
	workers []int // Dos by worker; plain, so that two at once are a race

	submit    sync.Mutex // makes the order of sequence numbers that of tickets
	sequence  uint64
	completed uint64
	freed     uint64
	failed    uint64
}

var errDo = errors.New("do failed")

type checkedTask struct {
	c        *orderCheck
	sequence uint64
	tokens   int64
	delay    func()
	payload  uint64 // written by Do, read by Complete
	fail     byte
	done     bool
	complete bool
}

func (c *orderCheck) send(tokens int64, fail byte, delay func()) Ticket {
	task, _ := c.pool.Get().(*checkedTask)
	if task == nil {
		task = new(checkedTask)
	}
	*task = checkedTask{c: c, tokens: tokens, delay: delay, fail: fail}
	c.submit.Lock()
	defer c.submit.Unlock()
	c.sequence++
	task.sequence = c.sequence
	submit := c.q.Submit
	if task.sequence%3 == 0 {
		submit = c.q.SubmitLater
	}
	t := submit(task, tokens)
	if uint64(t) != c.sequence {
		c.t.Errorf("ticket %d for task %d", t, c.sequence)
	}
	return t
}

func (task *checkedTask) Do(worker int) error {
	task.c.workers[worker]++
	task.delay()
	task.payload = task.sequence * 3
	task.done = true
	switch task.fail {
	case 1:
		return errDo
	case 2:
		panic(errDo)
	}
	return nil
}

func (task *checkedTask) Complete(err error) {
	c := task.c
	if c.completed != c.freed {
		c.t.Errorf("Complete of %d before the Free of %d", task.sequence, c.completed)
	}
	c.completed++
	if task.sequence != c.completed {
		c.t.Errorf("Complete of %d, want %d", task.sequence, c.completed)
	}
	if !task.done || task.complete || task.payload != task.sequence*3 {
		c.t.Errorf("Complete of %d: %+v", task.sequence, task)
	}
	if (task.fail != 0) != errors.Is(err, errDo) {
		c.t.Errorf("Complete of %d: fails by %d, error %v", task.sequence, task.fail, err)
	}
	if err != nil {
		c.failed++
	}
	if m := c.q.Metrics(); m.Bytes < task.tokens || m.Completed != c.completed-1 || m.Unordered < 1 {
		c.t.Errorf("in Complete of %d with %d tokens: %+v", task.sequence, task.tokens, m)
	}
	task.complete = true
}

func (task *checkedTask) Free() {
	c := task.c
	c.freed++
	if !task.complete || c.freed != task.sequence {
		c.t.Errorf("Free of %d: %+v", task.sequence, task)
	}
	if m := c.q.Metrics(); m.Completed != c.freed-1 { // and would hang under the lock
		c.t.Errorf("in Free of %d: %+v", task.sequence, m)
	}
	*task = checkedTask{}
	c.pool.Put(task)
}

// All Dos take different, random times: in a bubble every order of their ends
// occurs, at no cost in time.
func TestOrderRandomDelays(t *testing.T) {
	seed := disktest.Seed(t)
	for round := range 20 * disktest.Scale(t) {
		rnd := rand.New(rand.NewPCG(seed, uint64(round)))
		o := Options{Workers: 1 + rnd.IntN(8), BytesMax: 1000}
		inBubble(t, o, func(t *testing.T, q *Queue) {
			c := &orderCheck{t: t, q: q, workers: make([]int, o.Workers+1)}
			for range 300 {
				var n int64
				if rnd.IntN(4) > 0 {
					n = mustAcquire(t, q, 1+rnd.Int64N(100), 150)
				}
				d := time.Duration(rnd.IntN(1000))
				c.send(n, byte(max(0, rnd.IntN(12)-9)), func() { time.Sleep(d) })
				if m := q.Metrics(); m.Bytes > o.BytesMax {
					t.Fatalf("over the limit: %+v", m)
				}
				switch rnd.IntN(32) {
				case 0, 1:
					time.Sleep(time.Duration(rnd.IntN(2000)))
				case 2:
					if err := q.Help(t.Context(), Ticket(1+rnd.Uint64N(c.sequence))); err != nil {
						t.Errorf("Help: %v", err)
					}
				}
			}
			q.Close()
			if c.freed != 300 {
				t.Errorf("%d of 300 freed", c.freed)
			}
		})
	}
}

// Many submitters, recycled tasks, real threads; Drain and Wait on the side, and
// Close in the middle of it.
func TestStressAndCloseUnderLoad(t *testing.T) {
	seed := disktest.Seed(t)
	o := Options{Workers: 4, BytesMax: 1000, BytesLow: 300}
	q := New(o)
	c := &orderCheck{t: t, q: q, workers: make([]int, o.Workers+1)}
	ctx := context.Background()
	var wg sync.WaitGroup
	target := make(chan struct{})
	var sent atomic.Int64
	for g := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(g)))
			for i := 0; ; i++ {
				least := 1 + rnd.Int64N(200)
				if rnd.IntN(100) == 0 {
					least = 1500 // passes alone
				}
				n, err := q.Acquire(ctx, least, least+100)
				if err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Errorf("Acquire: %v", err)
					}
					return
				}
				if m := q.Metrics(); m.Bytes > max(o.BytesMax, 1500) {
					t.Errorf("over the limit: %+v", m)
				}
				if rnd.IntN(20) == 0 {
					q.Return(n / 2)
					n -= n / 2
				}
				ticket := c.send(n, byte(max(0, rnd.IntN(50)-47)), func() {
					for range n % 50 {
						runtime.Gosched()
					}
				})
				if sent.Add(1) == int64(3000*disktest.Scale(t)) {
					close(target)
				}
				wait := q.Wait
				switch rnd.IntN(30) {
				case 3, 4:
					wait = q.Help
					fallthrough
				case 0:
					if err := wait(ctx, ticket); err != nil {
						t.Errorf("Wait: %v", err)
					}
					if m := q.Metrics(); m.Completed < uint64(ticket) {
						t.Errorf("ticket %d is waited for, completed %d", ticket, m.Completed)
					}
				case 1:
					if err := q.Drain(ctx); err != nil {
						t.Errorf("Drain: %v", err)
					}
					if m := q.Metrics(); m.Completed < uint64(ticket) {
						t.Errorf("ticket %d is drained, completed %d", ticket, m.Completed)
					}
				case 2:
					short, cancel := context.WithTimeout(ctx, time.Duration(rnd.IntN(50))*time.Microsecond)
					if n, err := q.Acquire(short, 900, 900); err == nil {
						q.Return(n)
					}
					cancel()
				}
			}
		})
	}
	<-target
	for range 2 {
		wg.Go(q.Close)
	}
	q.Close()
	mustPanic(t, "Submit after Close", func() { q.Submit(&funcTask{}, 0) })
	wg.Wait()
	if c.freed != c.sequence || c.completed != c.sequence {
		t.Errorf("%d submitted, %d complete, %d freed", c.sequence, c.completed, c.freed)
	}
	m := q.Metrics()
	if m.Bytes != 0 || m.Completed != c.sequence || m.Acquiring+m.Draining+m.Waiting+m.Running+m.Unordered != 0 {
		t.Errorf("after Close: %+v", m)
	}
	if _, err := q.Acquire(ctx, 1, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("Acquire after Close: %v", err)
	}
	if err := errors.Join(q.Wait(ctx, Ticket(c.sequence)), q.Drain(ctx)); err != nil {
		t.Errorf("Wait and Drain after Close: %v", err)
	}
	t.Logf("%d tasks, %d failed, %+v", c.sequence, c.failed, m)
}

func TestSlowHead(t *testing.T) {
	inBubble(t, Options{Workers: 4}, func(t *testing.T, q *Queue) {
		var did atomic.Int32
		var completed []int
		var releases []func()
		send := func(i int, head bool) {
			task, release := &funcTask{}, func() {}
			if head {
				task, release = blocked()
			}
			do := task.do
			task.do = func(worker int) error {
				if do != nil {
					do(worker)
				}
				did.Add(1)
				return nil
			}
			task.complete = func(error) { completed = append(completed, i) }
			q.Submit(task, mustAcquire(t, q, 10, 10))
			releases = append(releases, release)
		}
		// Three of four workers are held; the fourth does all the rest. 200
		// tasks are more than the ring begins with.
		for i := range 200 {
			send(i, i == 0 || i == 1 || i == 50)
			if i <= 50 {
				synctest.Wait() // those that are held have begun when the ring grows
			}
		}
		synctest.Wait()
		if m := q.Metrics(); did.Load() != 197 || len(completed) != 0 ||
			m.Running != 3 || m.Unordered != 197 || m.Bytes != 2000 {
			t.Fatalf("%d done, %d complete, %+v", did.Load(), len(completed), m)
		}
		for _, step := range []struct{ release, complete int }{{1, 0}, {0, 50}, {50, 200}} {
			releases[step.release]()
			synctest.Wait()
			if m := q.Metrics(); len(completed) != step.complete || m.Bytes != int64(2000-10*step.complete) {
				t.Errorf("release of %d: %d complete, %+v", step.release, len(completed), m)
			}
		}
		if !slices.IsSorted(completed) {
			t.Errorf("order %v", completed)
		}
	})
}

// Tokens come back after Complete has returned, not when Do has.
func TestTokensFallAfterComplete(t *testing.T) {
	inBubble(t, Options{BytesMax: 100}, func(t *testing.T, q *Queue) {
		c := make(chan struct{})
		q.Submit(&funcTask{complete: func(error) { <-c }}, mustAcquire(t, q, 60, 60))
		got := int64(0)
		go func() { got = mustAcquire(t, q, 50, 50); q.Return(got) }()
		synctest.Wait()
		if m := q.Metrics(); got != 0 || m.Bytes != 60 || m.Acquiring != 1 {
			t.Errorf("during Complete: %d acquired, %+v", got, m)
		}
		close(c)
		synctest.Wait()
		if m := q.Metrics(); got != 50 || m.Bytes != 0 || m.Throttled != 1 {
			t.Errorf("after Complete: %d acquired, %+v", got, m)
		}
	})
}

func TestAcquire(t *testing.T) {
	ctx := context.Background()
	// acquire starts an Acquire and returns where its result will be: 0 while
	// it blocks, -1 after an error.
	acquire := func(q *Queue, ctx context.Context, min, max int64) *int64 {
		n := new(int64)
		go func() {
			got, err := q.Acquire(ctx, min, max)
			if *n = got; err != nil {
				*n = -1
			}
		}()
		synctest.Wait()
		return n
	}
	expect := func(t *testing.T, what string, got *int64, want int64) {
		t.Helper()
		synctest.Wait()
		if *got != want {
			t.Errorf("%s: acquired %d, want %d", what, *got, want)
		}
	}
	o := Options{BytesMax: 100, BytesLow: 50}
	inBubble(t, o, func(t *testing.T, q *Queue) {
		expect(t, "takes as much as there is", acquire(q, ctx, 10, 1000), 100)
		a := acquire(q, ctx, 10, 40)
		for i := range 4 {
			q.Return(10)
			expect(t, fmt.Sprintf("%d are in flight", 90-10*i), a, 0)
		}
		q.Return(10)
		expect(t, "50 are in flight", a, 40) // 90
		expect(t, "fits below the limit", acquire(q, ctx, 10, 10), 10)
		b := acquire(q, ctx, 1, 1) // at the limit again
		q.Return(40)
		expect(t, "60 are in flight", b, 0)
		q.Return(10)
		expect(t, "50 are in flight", b, 1)
		q.Return(51)
	})
	inBubble(t, o, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 90, 90)
		cancelled, cancel := context.WithCancel(ctx)
		large := acquire(q, cancelled, 70, 70)
		small := acquire(q, ctx, 5, 5)
		expect(t, "small does not overtake", small, 0)
		q.Return(50) // 40 in flight: 5 would fit, 70 do not
		expect(t, "large does not fit", large, 0)
		expect(t, "small does not overtake", small, 0)
		cancel()
		expect(t, "cancelled", large, -1)
		expect(t, "next in order after a cancel", small, 5)
		expect(t, "cancelled before", acquire(q, cancelled, 1, 1), -1)
		q.Return(45)
	})
	inBubble(t, o, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 20, 20)
		larger := acquire(q, ctx, 500, 600)
		after := acquire(q, ctx, 20, 80)
		q.Return(19)
		expect(t, "more than the limit waits for all", larger, 0)
		q.Return(1)
		expect(t, "more than the limit passes alone", larger, 500)
		expect(t, "and others wait", after, 0)
		q.Return(440)
		expect(t, "until the low mark", after, 0)
		q.Return(10)
		expect(t, "at the low mark", after, 50)
		q.Return(100)
	})
	inBubble(t, o, func(t *testing.T, q *Queue) {
		// More than the room above the low mark does not wait for ever.
		mustAcquire(t, q, 100, 100)
		a := acquire(q, ctx, 80, 80)
		q.Return(50)
		expect(t, "low mark, but no room", a, 0)
		q.Return(29)
		expect(t, "one too few", a, 0)
		q.Return(1)
		expect(t, "room", a, 80)
		q.Return(100)
	})
}

// A context that ends just before the tokens come does not lose them, nor leave a
// wake-up behind for the next to wait.
func TestCancelMeetsGrant(t *testing.T) {
	inBubble(t, Options{BytesMax: 100}, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 100, 100)
		ctx, cancel := context.WithCancel(context.Background())
		var n int64
		var err error
		go func() { n, err = q.Acquire(ctx, 100, 100) }()
		synctest.Wait()
		q.mu.Lock()
		cancel() // takes the waiter out of its select, and it waits for the mutex
		q.takeHeldLocked(100)
		q.releaseLocked(100)
		q.mu.Unlock()
		synctest.Wait()
		if n != 100 || err != nil {
			t.Fatalf("Acquire = %d, %v", n, err)
		}
		n = 0
		go func() { n, err = q.Acquire(context.Background(), 100, 100) }()
		synctest.Wait()
		if n != 0 || err != nil {
			t.Errorf("an Acquire that has to wait returned %d, %v", n, err)
		}
		q.Return(100)
		synctest.Wait()
		q.Return(n)
	})
}

// The number of tokens in flight matches a model through random operations.
func TestTokensModel(t *testing.T) {
	seed := disktest.Seed(t)
	rnd := rand.New(rand.NewPCG(seed, 0))
	inBubble(t, Options{Workers: 2, BytesMax: 100}, func(t *testing.T, q *Queue) {
		var held, flying int64
		var releases []func()
		var sizes []int64
		for range 2000 * disktest.Scale(t) {
			switch rnd.IntN(4) {
			case 0:
				if n := 1 + rnd.Int64N(30); held+flying+n <= 50 { // where no wait can be
					held += mustAcquire(t, q, n, n)
				}
			case 1:
				n := rnd.Int64N(held + 1)
				q.Return(n)
				held -= n
			case 2:
				n := rnd.Int64N(held + 1)
				task, release := blocked()
				q.Submit(task, n)
				releases, sizes = append(releases, release), append(sizes, n)
				held, flying = held-n, flying+n
			case 3:
				if len(releases) > 0 {
					releases[0]()
					flying -= sizes[0]
					releases, sizes = releases[1:], sizes[1:]
				}
			}
			synctest.Wait()
			if m := q.Metrics(); m.Bytes != held+flying || m.Submitted-m.Completed != uint64(len(releases)) {
				t.Fatalf("want %d tokens, %d tasks: %+v", held+flying, len(releases), m)
			}
		}
		q.Return(held)
		for _, release := range releases {
			release()
		}
	})
}

func TestDrain(t *testing.T) {
	ctx := context.Background()
	inBubble(t, Options{BytesMax: 100, Workers: 2}, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 30, 30)
		withTokens, releaseTokens := blocked()
		var drained, drained2, passed bool
		go func() {
			if err := q.Drain(ctx); err != nil {
				t.Error(err)
			}
			drained = true
		}()
		go func() {
			if err := q.Drain(ctx); err != nil {
				t.Error(err)
			}
			drained2 = true
		}()
		synctest.Wait()
		go func() {
			q.Return(mustAcquire(t, q, 1, 1))
			passed = true
		}()
		expect := func(what string, want bool) {
			t.Helper()
			synctest.Wait()
			if drained != want || drained2 != want || passed != want {
				t.Fatalf("%s: drained %v, %v, passed %v, want %v", what, drained, drained2, passed, want)
			}
		}
		expect("tokens held", false)
		q.Submit(withTokens, 20) // a holder passes while draining
		expect("a task with tokens is in flight", false)
		releaseTokens()
		expect("some tokens held", false)
		without, releaseWithout := blocked()
		q.Submit(without, 0)
		q.Return(10)
		expect("a task without tokens is in flight", false)
		if m := q.Metrics(); m.Draining != 2 || m.Acquiring != 1 || m.Bytes != 0 {
			t.Errorf("while draining: %+v", m)
		}
		releaseWithout()
		expect("all is complete", true)
	})
	inBubble(t, Options{BytesMax: 100}, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 30, 30)
		cancelled, cancel := context.WithCancel(ctx)
		var err error
		passed := false
		go func() { err = q.Drain(cancelled) }()
		synctest.Wait()
		go func() { q.Return(mustAcquire(t, q, 1, 1)); passed = true }()
		synctest.Wait()
		if passed || err != nil {
			t.Fatalf("passed %v, error %v", passed, err)
		}
		cancel()
		synctest.Wait()
		if !passed || !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: passed %v, error %v", passed, err)
		}
		q.Return(30)
	})
}

// Steady writers, with and without tokens, do not hold up Drain.
func TestDrainUnderLoad(t *testing.T) {
	q := New(Options{Workers: 2, BytesMax: 200})
	ctx := context.Background()
	var last atomic.Uint64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for g := range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				var n int64
				if g > 0 {
					n = mustAcquire(t, q, 10, 50)
				}
				ticket := uint64(q.Submit(&funcTask{}, n))
				for old := last.Load(); old < ticket && !last.CompareAndSwap(old, ticket); old = last.Load() {
				}
				if g == 0 {
					q.Wait(ctx, Ticket(ticket)) // has no throttle else
				}
			}
		})
	}
	for range 1000 * disktest.Scale(t) {
		before := last.Load()
		if err := q.Drain(ctx); err != nil {
			t.Fatal(err)
		}
		if m := q.Metrics(); m.Completed < before {
			t.Errorf("drained with ticket %d incomplete: %+v", before, m)
		}
	}
	close(stop)
	wg.Wait()
	q.Close()
	t.Logf("%+v", q.Metrics())
}

func TestWait(t *testing.T) {
	ctx := context.Background()
	inBubble(t, Options{Workers: 8}, func(t *testing.T, q *Queue) {
		if err := q.Wait(ctx, 0); err != nil {
			t.Errorf("Wait for nothing: %v", err)
		}
		var releases []func()
		var freed atomic.Int32
		for range 6 {
			task, release := blocked()
			task.free = func() { freed.Add(1) }
			q.Submit(task, 0)
			releases = append(releases, release)
		}
		var woken []Ticket
		var mu sync.Mutex
		for _, ticket := range []Ticket{4, 2, 6, 1, 5, 2} { // 3 has no waiter
			go func() {
				if err := q.Wait(ctx, ticket); err != nil {
					t.Errorf("Wait(%d): %v", ticket, err)
				}
				mu.Lock()
				defer mu.Unlock()
				woken = append(woken, ticket)
				if n := freed.Load(); n < int32(ticket) {
					t.Errorf("Wait(%d) returned with %d freed", ticket, n)
				}
			}()
			synctest.Wait()
		}
		cancelled, cancel := context.WithCancel(ctx)
		var err error
		go func() { err = q.Wait(cancelled, 3) }()
		synctest.Wait()
		cancel()
		synctest.Wait()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled Wait: %v", err)
		}
		for _, step := range []struct {
			release int
			want    []Ticket
		}{
			{2, nil},
			{1, []Ticket{1, 2, 2}},
			{4, []Ticket{1, 2, 2, 4}},
			{6, []Ticket{1, 2, 2, 4}},
			{5, []Ticket{1, 2, 2, 4, 5, 6}},
		} {
			releases[step.release-1]()
			if step.release == 1 {
				releases[3-1]() // 3 is complete with nobody waiting
			}
			synctest.Wait()
			slices.Sort(woken)
			if !slices.Equal(woken, step.want) {
				t.Errorf("release of %d: waiters %v went on, want %v", step.release, woken, step.want)
			}
		}
	})
}

// SubmitLater leaves a few tasks to who helps, who does and completes them himself;
// anybody else who waits for the queue has them begun.
func TestHelp(t *testing.T) {
	ctx := context.Background()
	var by []int // the workers, in the order of Complete
	task := func() *funcTask {
		task := &funcTask{}
		worker := -1
		task.do = func(w int) error { worker = w; return nil }
		task.complete = func(error) { by = append(by, worker) }
		return task
	}
	later := func(q *Queue, n int) (last Ticket) {
		t.Helper()
		by = nil
		for range n {
			last = q.SubmitLater(task(), mustAcquire(t, q, 1, 1))
		}
		synctest.Wait()
		return last
	}
	o := Options{Workers: 2, BytesMax: 10, BytesLow: 9}
	inBubble(t, o, func(t *testing.T, q *Queue) {
		synctest.Wait() // until the workers wait
		if last := later(q, laterMax); q.Metrics().Waiting != laterMax {
			t.Errorf("%d tasks are left for later: %+v", laterMax, q.Metrics())
		} else if err := q.Help(ctx, last); err != nil || !slices.Equal(by, []int{2, 2, 2, 2}) {
			t.Errorf("Help: %v, done by %v", err, by)
		}
		// One more than is left for later wakes a worker, which does all.
		if later(q, laterMax+1); !slices.Equal(by, []int{0, 0, 0, 0, 0}) && !slices.Equal(by, []int{1, 1, 1, 1, 1}) {
			t.Errorf("many: done by %v", by)
		}
		// Help does not wait for who is at something later, nor do what is later.
		busy, release := blocked()
		first := q.SubmitLater(task(), 0)
		q.SubmitLater(busy, 0)
		if err := q.Help(ctx, first); err != nil || q.Metrics().Waiting != 1 {
			t.Errorf("Help: %v, %+v", err, q.Metrics())
		}
		release()
		for name, wait := range map[string]func() error{
			"Wait":  func() error { return q.Wait(ctx, Ticket(q.Metrics().Submitted)) },
			"Drain": func() error { return q.Drain(ctx) },
			"Acquire": func() error {
				n, err := q.Acquire(ctx, 10, 10)
				q.Return(n)
				return err
			},
		} {
			later(q, 2)
			if err := wait(); err != nil || len(by) != 2 || slices.Contains(by, 2) {
				t.Errorf("%s: %v, done by %v", name, err, by)
			}
		}
		// Two who help: one waits.
		busy, release = blocked()
		second := q.SubmitLater(busy, 0)
		for range 2 {
			go func() {
				if err := q.Help(ctx, second); err != nil {
					t.Errorf("Help: %v", err)
				}
			}()
		}
		synctest.Wait()
		release()
		// What helps is cancelled while it waits for a worker.
		busy, release = blocked()
		last := q.Submit(busy, 0)
		synctest.Wait()
		cancelled, cancel := context.WithCancel(ctx)
		cancel()
		if err := q.Help(cancelled, last); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled Help: %v", err)
		}
		release()
		later(q, 2) // for Close
	})
	if len(by) != 2 {
		t.Errorf("Close leaves tasks: done by %v", by)
	}
}

func TestCloseWakesAcquire(t *testing.T) {
	inBubble(t, Options{BytesMax: 10}, func(t *testing.T, q *Queue) {
		n := mustAcquire(t, q, 10, 10)
		var err error
		closed := false
		go func() { _, err = q.Acquire(context.Background(), 1, 1) }()
		synctest.Wait()
		go func() { q.Close(); closed = true }()
		synctest.Wait()
		if !errors.Is(err, ErrClosed) || closed {
			t.Fatalf("Acquire: %v, closed %v with tokens held", err, closed)
		}
		q.Submit(&funcTask{}, n) // who has tokens may still use them
		synctest.Wait()
		if !closed {
			t.Error("Close hangs")
		}
	})
}

func TestPanicInDo(t *testing.T) {
	inBubble(t, Options{Workers: 1}, func(t *testing.T, q *Queue) {
		boom := errors.New("boom")
		var errs []error
		freed := 0
		for _, value := range []any{boom, "boom", nil} {
			q.Submit(&funcTask{
				do:       func(int) error { panicsInDo(value); return nil },
				complete: func(err error) { errs = append(errs, err) },
				free:     func() { freed++ },
			}, mustAcquire(t, q, 5, 5))
		}
		last := q.Submit(&funcTask{complete: func(err error) { errs = append(errs, err) }}, 0)
		if err := q.Wait(context.Background(), last); err != nil {
			t.Fatal(err)
		}
		if len(errs) != 4 || freed != 3 || errs[3] != nil || !errors.Is(errs[0], boom) || errors.Is(errs[1], boom) {
			t.Fatalf("%d freed, errors %v", freed, errs)
		}
		for i, err := range errs[:3] {
			var p *PanicError
			if !errors.As(err, &p) || !bytes.Contains(p.Stack, []byte("panicsInDo")) || !strings.Contains(err.Error(), "panicsInDo") {
				t.Errorf("error %d has no stack: %v", i, err)
			}
		}
		if m := q.Metrics(); m.Panicked != 3 || m.Bytes != 0 {
			t.Errorf("%+v", m)
		}
	})
}

//go:noinline
func panicsInDo(value any) { panic(value) }

// What would break the order ends the process; each case is run in a child.
func TestCrash(t *testing.T) {
	const env = "ASYNCQ_TEST_CRASH"
	cases := map[string]*funcTask{
		"panic in Complete": {complete: func(error) { panic("crash: in Complete") }},
		"panic in Free":     {free: func() { panic("crash: in Free") }},
		"Do called runtime.Goexit": {do: func(int) error {
			runtime.Goexit()
			return nil
		}},
	}
	if name := os.Getenv(env); name != "" {
		q := New(Options{})
		q.Wait(context.Background(), q.Submit(cases[name], 0))
		return
	}
	for name := range cases {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$", "-test.timeout=30s")
		cmd.Env = append(os.Environ(), env+"="+name)
		out, err := cmd.CombinedOutput()
		want := strings.Replace(name, "panic in", "panic: crash: in", 1)
		if err == nil || !bytes.Contains(out, []byte(want)) || bytes.Contains(out, []byte("timed out")) {
			t.Errorf("%s: error %v, output:\n%s", name, err, out)
		}
	}
}

// Complete may submit: a chain of tasks, each sent by the one before.
func TestSubmitFromComplete(t *testing.T) {
	inBubble(t, Options{}, func(t *testing.T, q *Queue) {
		n := 0
		var task funcTask
		task.free = func() {
			if n++; n < 100 {
				q.Submit(&task, 0)
			}
		}
		q.Submit(&task, 0)
		synctest.Wait()
		if n != 100 {
			t.Errorf("%d tasks freed", n)
		}
	})
}

func TestMisuse(t *testing.T) {
	inBubble(t, Options{BytesMax: 100}, func(t *testing.T, q *Queue) {
		mustAcquire(t, q, 10, 10)
		for what, f := range map[string]func(){
			"Submit of more than acquired": func() { q.Submit(&funcTask{}, 11) },
			"Submit of less than nothing":  func() { q.Submit(&funcTask{}, -1) },
			"Return of more than acquired": func() { q.Return(11) },
			"Return of less than nothing":  func() { q.Return(-1) },
			"Acquire of nothing":           func() { q.Acquire(context.Background(), 0, 1) },
			"Acquire of min over max":      func() { q.Acquire(context.Background(), 2, 1) },
			"Wait for no ticket":           func() { q.Wait(context.Background(), 1) },
		} {
			mustPanic(t, what, f)
		}
		if m := q.Metrics(); m.Bytes != 10 || m.Submitted != 0 {
			t.Errorf("refused calls had an effect: %+v", m)
		}
		q.Return(10)
	})
}

func TestOptions(t *testing.T) {
	q := New(Options{})
	m := q.Metrics()
	q.Close()
	if m.Workers != min(runtime.NumCPU()+2, 8) || m.BytesMax != 64<<20 || m.BytesLow != 32<<20 {
		t.Errorf("defaults: %+v", m)
	}
	for _, c := range []struct {
		o      Options
		faults int
	}{
		{Options{}, 0},
		{Options{Workers: 1, BytesMax: 1}, 0},
		{Options{BytesMax: 10, BytesLow: 10}, 0},
		{Options{BytesMax: 10, BytesLow: 11}, 1},
		{Options{BytesLow: -1}, 1},
		{Options{Workers: -1, BytesMax: 10, BytesLow: 11}, 2},
		{Options{Workers: -1, BytesMax: -1, BytesLow: -1}, 3},
	} {
		err := c.o.Validate()
		faults := 0
		if err != nil {
			faults = len(strings.Split(err.Error(), "\n"))
			mustPanic(t, "New", func() { New(c.o) })
		}
		if faults != c.faults {
			t.Errorf("%+v: want %d faults: %v", c.o, c.faults, err)
		}
	}
}

func TestGoroutineLabels(t *testing.T) {
	q := New(Options{Workers: 2})
	defer q.Close()
	// Once a task is complete, its worker and the committer have their labels;
	// two that meet in Do are with both workers.
	var meet sync.WaitGroup
	meet.Add(2)
	for range 2 {
		q.Submit(&funcTask{do: func(int) error { meet.Done(); meet.Wait(); return nil }}, 0)
	}
	q.Wait(context.Background(), 2)
	var profile bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&profile, 1); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"asyncq":"committer"`, `"asyncq":"worker"`, `"worker":"0"`, `"worker":"1"`} {
		if !strings.Contains(profile.String(), want) {
			t.Errorf("no goroutine has the label %s", want)
		}
	}
}

func TestAllocatesNothing(t *testing.T) {
	if invariants.Enabled {
		t.Skip("the race detector allocates")
	}
	q := New(Options{})
	defer q.Close()
	ctx := context.Background()
	task := &funcTask{}
	if allocs := testing.AllocsPerRun(1000, func() {
		n, _ := q.Acquire(ctx, 1, 1)
		q.Wait(ctx, q.Submit(task, n))
	}); allocs != 0 {
		t.Errorf("%v allocations for each task", allocs)
	}
}

// The time from Submit to the end of Wait for one tiny task on an idle queue.
func BenchmarkLatency(b *testing.B) {
	q := New(Options{})
	defer q.Close()
	ctx := context.Background()
	task := &funcTask{}
	b.ReportAllocs()
	for b.Loop() {
		n, err := q.Acquire(ctx, 4096, 4096)
		if err != nil {
			b.Fatal(err)
		}
		if err := q.Wait(ctx, q.Submit(task, n)); err != nil {
			b.Fatal(err)
		}
	}
}

// Tasks of no work, as many as the limit lets in flight: the cost of the queue.
func BenchmarkThroughput(b *testing.B) {
	for _, inFlight := range []int64{8, 128, 1024} {
		b.Run(fmt.Sprintf("%dinflight", inFlight), func(b *testing.B) {
			q := New(Options{BytesMax: inFlight << 16})
			defer q.Close()
			ctx := context.Background()
			task := &funcTask{}
			var last Ticket
			b.ReportAllocs()
			for b.Loop() {
				n, err := q.Acquire(ctx, 1<<16, 1<<16)
				if err != nil {
					b.Fatal(err)
				}
				last = q.Submit(task, n)
			}
			if err := q.Wait(ctx, last); err != nil {
				b.Fatal(err)
			}
		})
	}
}
