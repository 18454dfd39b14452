package delalloc

import (
	"sync"
	"sync/atomic"
	"time"

	"cnbd/extents"
	"cnbd/internal/mutant"
)

// An Epoch is one generation of dirty state: what was changed between two
// freezes. Its state tree says which blocks are dirty data (Delalloc), dirty
// holes (Hole), or locked.
type Epoch struct {
	Number uint64
	State  *extents.StateTree

	holeSeq uint64       // when frozen: the newest hole that belongs to it
	trims   atomic.Int64 // holes that it was given

	mu    sync.Mutex
	since time.Time // guarded by mu; when it became dirty, zero if it is not
}

// Touch notes that e is dirty from now on. It is called after the state of e has
// been changed.
func (e *Epoch) Touch(now time.Time) {
	e.mu.Lock()
	if e.since.IsZero() {
		e.since = now
	}
	e.mu.Unlock()
}

// settle notes that e is clean, if it is: nothing in it is dirty or being changed.
func (e *Epoch) settle() {
	e.mu.Lock()
	if e.State.Empty() {
		e.since = time.Time{} // who changes the state from here on touches e later
	}
	e.mu.Unlock()
}

// dirtySince is when e became dirty, zero if it is clean.
func (e *Epoch) dirtySince() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.since
}

// Epochs are the open epoch, which requests change, and at most one frozen one,
// which is being written out for a commit (rule R6).
type Epochs struct {
	// gate is held for reading while a request installs what it changes, so a
	// freeze is an instant between whole requests. Nobody waits for I/O under it.
	gate sync.RWMutex

	open   *Epoch // guarded by gate
	frozen *Epoch // owned by the committer
	spare  *Epoch // of an older epoch, clean, for the next one; owned by the committer

	trims atomic.Int64 // holes of the open epoch, and of the frozen one until all is appended
}

// NewEpochs begins with an empty open epoch.
func NewEpochs() *Epochs {
	return &Epochs{open: &Epoch{Number: 1, State: extents.NewStateTree()}}
}

// Enter joins the open epoch: until Leave it is not frozen. What the request
// needs has been received, read and reserved before.
func (e *Epochs) Enter() *Epoch {
	e.gate.RLock()
	return e.open
}

// Leave ends what Enter began.
func (e *Epochs) Leave() { e.gate.RUnlock() }

// Trimmed notes that e, which was entered and has not been left, was given a hole.
func (e *Epochs) Trimmed(in *Epoch) {
	in.trims.Add(1)
	e.trims.Add(1)
}

// Trims is how many holes may not have been appended yet, at most.
func (e *Epochs) Trims() int64 { return e.trims.Load() }

// Open is the open epoch, which may be frozen at any moment.
func (e *Epochs) Open() *Epoch {
	e.gate.RLock()
	defer e.gate.RUnlock()
	return e.open
}

// freeze swaps in a new open epoch and returns the one before. holeSeq reads the
// sequence number of the newest hole.
func (e *Epochs) freeze(holeSeq func() uint64) *Epoch {
	e.gate.Lock()
	defer e.gate.Unlock()
	f := e.open
	f.holeSeq = holeSeq()
	e.frozen = f
	if mutant.Is(mutant.EpochLeak) {
		return f
	}
	next := e.spare
	if next == nil {
		next = &Epoch{State: extents.NewStateTree()}
	}
	next.Number, e.open, e.spare = f.Number+1, next, nil
	return f
}

// recycle keeps a frozen epoch, whose changes have been appended, for its memory:
// nobody has anything to do with it any more. Should somebody hold the lock of a
// range beyond the epoch, it is left to him.
func (e *Epochs) recycle(f *Epoch) {
	if f.State.Empty() {
		f.settle()
		f.holeSeq = 0
		e.spare = f
	}
}
