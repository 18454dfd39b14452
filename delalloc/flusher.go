package delalloc

import (
	"context"
	"errors"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"time"

	"cnbd/internal/block"
)

// passBlocks is the budget of one background pass: 4 MiB, so that a commit does
// not wait long for the hand-off lock, and a pass keeps all workers busy.
const passBlocks = 4 << 20 / block.Size

// FlusherOptions are the settings of a Flusher; all must be given.
type FlusherOptions struct {
	Writeback *Writeback
	Epochs    *Epochs

	// CommitInterval is the longest time that a change waits for a commit.
	CommitInterval time.Duration
	// Period is how often the age of dirty data is looked at.
	Period time.Duration
	// Expire is the age from which on dirty data is written out although there
	// is little of it.
	Expire time.Duration

	// Background tells whether there is so much dirty data that it should be
	// written out now.
	Background func() bool
	// Pressure tells whether somebody waits for dirty data to be written.
	Pressure func() bool
	// Failed is told of the error that ended a commit which nobody waited for.
	Failed func(error)
}

// A Flusher decides when dirty data is written out and committed. One at a time
// commits, for all who have asked for it until then: who asks when nobody is at it,
// which saves waking another, and else a goroutine of the Flusher. A second one writes
// the open epoch out in the background.
type Flusher struct {
	opts   FlusherOptions
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	kick   chan struct{} // of capacity 1: there may be background work
	wake   chan struct{} // of capacity 1: a commit is wanted
	dirty  atomic.Bool   // something may have changed since the last commit

	// awaited is how many calls of Flush wait.
	awaited atomic.Int64

	mu         sync.Mutex
	committing bool   // guarded by mu; somebody is at the commit of number begun
	wanted     uint64 // guarded by mu; the number of the newest commit asked for
	begun      uint64 // guarded by mu; the number of the newest commit begun
	rounds     map[uint64]*round
}

// A round is one commit that somebody waits for.
type round struct {
	done    chan struct{}
	err     error // set before done is closed
	waiting int   // guarded by Flusher.mu; how many still wait
}

// ErrStopped is returned by Flush after Stop.
var ErrStopped = errors.New("delalloc: stopped")

// StartFlusher starts both goroutines; Stop ends them.
func StartFlusher(o FlusherOptions) *Flusher {
	f := &Flusher{opts: o, kick: make(chan struct{}, 1), wake: make(chan struct{}, 1), rounds: make(map[uint64]*round)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	run := func(name string, loop func()) {
		f.wg.Go(func() { pprof.Do(f.ctx, pprof.Labels("cnbd", name), func(context.Context) { loop() }) })
	}
	run("commit", f.commitLoop)
	run("writeback", f.backgroundLoop)
	return f
}

// Stop ends both goroutines after the commit in progress. It commits nothing;
// those who wait for a commit get ErrStopped.
func (f *Flusher) Stop() {
	f.mu.Lock()
	f.cancel()
	f.mu.Unlock()
	f.wg.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	for n, r := range f.rounds {
		r.err = ErrStopped
		close(r.done)
		delete(f.rounds, n)
	}
}

// Kick says that there may be background work. It does not block.
func (f *Flusher) Kick() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// NeedCommit asks for a commit without waiting for it.
func (f *Flusher) NeedCommit() {
	f.mu.Lock()
	f.ask()
	f.mu.Unlock()
}

// ask asks for a commit that has not begun. REQUIRES: f.mu held.
func (f *Flusher) ask() {
	f.wanted = f.begun + 1
	f.wakeLocked()
}

// wakeLocked has the goroutine that commits look whether it is wanted.
func (f *Flusher) wakeLocked() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Dirtied says that something has changed that the next timed commit must cover.
func (f *Flusher) Dirtied() {
	if !f.dirty.Load() {
		f.dirty.Store(true)
	}
}

// Flush blocks until everything that has been installed before is durable. Those
// who call it while a commit runs share the next one. When ctx ends, the wait
// does, not the commit; who commits himself does not look at it.
func (f *Flusher) Flush(ctx context.Context) error {
	f.mu.Lock()
	if f.ctx.Err() != nil {
		f.mu.Unlock()
		return ErrStopped
	}
	if !f.committing {
		f.awaited.Add(1) // before the commit begins
		defer f.awaited.Add(-1)
		f.wg.Add(1) // Stop waits for this
		defer f.wg.Done()
		err, _ := f.commitLocked()
		f.mu.Unlock()
		return err
	}
	n := f.begun + 1
	r := f.rounds[n]
	if r == nil {
		r = &round{done: make(chan struct{})}
		f.rounds[n] = r
	}
	r.waiting++
	f.awaited.Add(1) // before the commit can begin
	defer f.awaited.Add(-1)
	f.ask()
	f.mu.Unlock()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	select {
	case <-r.done: // with an error that only this caller may be told
		return r.err
	default:
		r.waiting--
		return ctx.Err()
	}
}

// Awaited tells whether a call of Flush waits.
func (f *Flusher) Awaited() bool { return f.awaited.Load() > 0 }

func (f *Flusher) commitLoop() {
	timer := time.NewTicker(f.opts.CommitInterval)
	defer timer.Stop()
	for {
		timed := false
		select {
		case <-f.ctx.Done():
		case <-f.wake:
		case <-timer.C:
			timed = true
		}
		f.mu.Lock()
		if f.ctx.Err() != nil { // both may be ready, and select chooses at random
			f.mu.Unlock()
			return
		}
		if f.committing || f.wanted <= f.begun && !(timed && f.dirty.Load()) {
			f.mu.Unlock() // who commits wakes this when more is wanted
			continue
		}
		err, told := f.commitLocked()
		f.mu.Unlock()
		if err != nil && !told {
			f.opts.Failed(err)
		}
	}
}

// commitLocked commits, and tells those who wait for it; told says whether there were
// any. It drops and retakes the mutex. REQUIRES: f.mu held, and nobody commits.
func (f *Flusher) commitLocked() (err error, told bool) {
	f.begun++
	r := f.rounds[f.begun]
	delete(f.rounds, f.begun)
	f.committing = true
	f.dirty.Store(false)
	f.mu.Unlock()

	// A commit that has begun is not cancelled: what it froze must go out.
	err = f.opts.Writeback.Commit(context.Background(), f.opts.Epochs)

	f.mu.Lock()
	f.committing = false
	if r != nil {
		r.err, told = err, r.waiting > 0
		close(r.done)
	}
	if f.wanted > f.begun {
		f.wakeLocked()
	}
	return err, told
}

func (f *Flusher) backgroundLoop() {
	timer := time.NewTicker(f.opts.Period)
	defer timer.Stop()
	round := Control{Cyclic: true}
	for {
		c := &round
		select {
		case <-f.ctx.Done():
			return
		case <-f.kick:
		case <-timer.C:
			if since := f.opts.Epochs.Open().dirtySince(); !since.IsZero() && time.Since(since) >= f.opts.Expire {
				// Once over all blocks, whatever the limit: what is dirtied behind
				// the cursor is not old, and a steady writer does not keep it going.
				c = &Control{}
			}
		}
		for f.ctx.Err() == nil && (!c.Cyclic || f.opts.Background()) {
			c.Written, c.Budget = 0, passBlocks
			if err := f.opts.Writeback.Background(f.ctx, f.opts.Epochs, c, f.opts.Pressure()); err != nil {
				f.opts.Failed(err)
				break
			}
			if c.Written == 0 {
				break // all of it is on its way
			}
		}
	}
}
