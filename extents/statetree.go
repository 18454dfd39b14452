package extents

import (
	"fmt"
	"math/bits"
	"strings"
	"sync"

	"github.com/tidwall/btree"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// Bits are what a [StateTree] knows of a block.
type Bits uint8

const (
	// Locked is the range lock: exclusive, waited for by sleeping. It is set
	// by [StateTree.Lock] and [StateTree.TryLock] and cleared by
	// [StateTree.Unlock] only.
	Locked Bits = 1 << iota
	// Delalloc blocks are dirty and have no place in the log yet.
	Delalloc
	// DirtyHole blocks were trimmed or zeroed, which the log does not have yet.
	DirtyHole

	allBits = Locked | Delalloc | DirtyHole
)

var bitNames = [...]string{"locked", "delalloc", "dirtyhole"}

// String prints the names of the bits joined by |, and none for no bits.
func (b Bits) String() string {
	if b == 0 {
		return "none"
	}
	var names []string
	for rest := b & allBits; rest != 0; rest &= rest - 1 {
		names = append(names, bitNames[bits.TrailingZeros8(uint8(rest))])
	}
	if rest := b &^ allBits; rest != 0 {
		names = append(names, fmt.Sprintf("%#x", uint8(rest)))
	}
	return strings.Join(names, "|")
}

// A state is a run of blocks with equal bits.
type state struct {
	block.Range
	bits  Bits
	owner uint64 // of the range lock; 0 when bits has no Locked
}

// mayMerge reports whether s and o, when adjacent, are to be one state. Locked
// states are kept apart: their borders are where the owner will unlock, so a
// merge would only be undone by a split.
func (s state) mayMerge(o state) bool { return s.bits == o.bits && s.bits&Locked == 0 }

const (
	// stateEnd is the exclusive limit of block indexes: 64 bits of bytes.
	stateEnd block.Index = 1 << (64 - block.Shift)

	// checkStatesMax is the largest tree that is checked as a whole after
	// each mutation of a build with invariants.
	checkStatesMax = 64

	// scratchStatesMax bounds the scratch space kept between calls; one call
	// over a wide range may need more for its time.
	scratchStatesMax = 1024
)

// A StateTree holds which ranges of the device have which [Bits]; see the
// package's documentation for its invariants. All methods may be called
// concurrently, and none blocks save [StateTree.Lock]. Ranges must lie below
// 2^52 blocks; an empty range is nothing to do. The memory used is
// proportional to the number of states, whatever their length.
type StateTree struct {
	mu sync.Mutex // guards all below

	// states by the *end* of their range, so that one search finds the first
	// state that overlaps or touches a range from the left. An empty state at
	// the very end is always there: it keeps the root node allocated when the
	// tree runs empty, and ends every walk.
	states btree.Map[block.Index, state]

	// blocks counts the blocks by the exact bits they have; [0] is unused.
	blocks [allBits + 1]block.Count

	// waiters in the order of their arrival, linked by next.
	waiters lockWaiter
	// idle waiters for reuse, linked by next.
	idle *lockWaiter

	// before and after are scratch space of updateLocked.
	before, after []state
}

// A lockWaiter waits for one block to be unlocked.
type lockWaiter struct {
	next *lockWaiter
	on   block.Index
	wake chan struct{} // of capacity 1; one send for each time on the list
}

// NewStateTree returns a tree without states.
func NewStateTree() *StateTree {
	t := &StateTree{}
	t.states.Set(^block.Index(0), state{Range: block.Range{Start: ^block.Index(0), End: ^block.Index(0)}})
	return t
}

// Lock locks r for owner. It blocks while any block of r is locked, by whomever:
// the lock is not recursive. It takes blocks in ascending order and keeps those
// it has while it waits for the next, hence an owner must not lock a range that
// begins before the end of one it holds: two that do so wait for each other for
// ever. owner names one holder, and not zero.
func (t *StateTree) Lock(r block.Range, owner uint64) {
	assertRange(r)
	invariants.Assertf(owner != 0, "extents: lock %v without an owner", r)
	if r.Empty() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.checkOrderLocked(r, owner)
	for {
		free := block.Range{Start: r.Start, End: t.firstLockedLocked(r)}
		t.updateLocked(free, Locked, 0, owner)
		t.checkSmallLocked()
		if free.End == r.End {
			return
		}
		// The rest is searched again after waking: the state that was in the
		// way may have been split, and another may have locked it since.
		r.Start = free.End
		t.waitLocked(r.Start)
	}
}

// TryLock locks all of r for owner and returns true, or, when any block of it is
// locked, does nothing and returns false. It does not block, so it may be called
// in any order.
func (t *StateTree) TryLock(r block.Range, owner uint64) bool {
	assertRange(r)
	invariants.Assertf(owner != 0, "extents: lock %v without an owner", r)
	if r.Empty() {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.firstLockedLocked(r) != r.End {
		return false
	}
	t.updateLocked(r, Locked, 0, owner)
	t.checkSmallLocked()
	return true
}

// Unlock sets and clears bits on all of r, unlocks it and wakes who waits for
// it, in one step: nobody sees r unlocked with the old bits. owner must hold all
// of r, which may be a part of what it locked or several adjacent ranges. set
// and clear must be disjoint and without Locked.
func (t *StateTree) Unlock(r block.Range, owner uint64, set, clear Bits) {
	assertRange(r)
	invariants.Assertf((set|clear)&Locked == 0 && set&clear == 0,
		"extents: unlock %v sets %v and clears %v", r, set, clear)
	if r.Empty() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.checkOwnerLocked(r, owner)
	t.updateLocked(r, set, clear|Locked, 0)
	t.wakeLocked(r)
	t.checkSmallLocked()
}

// Set sets bits, which must not contain Locked, on all of r, whoever may have
// it locked.
func (t *StateTree) Set(r block.Range, bits Bits) {
	assertRange(r)
	invariants.Assertf(bits&Locked == 0, "extents: set %v on %v", bits, r)
	if r.Empty() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.updateLocked(r, bits, 0, 0)
	t.checkSmallLocked()
}

// Clear clears bits, which must not contain Locked, on all of r, whoever may
// have it locked, and returns which of them any block of r had.
func (t *StateTree) Clear(r block.Range, bits Bits) (had Bits) {
	assertRange(r)
	invariants.Assertf(bits&Locked == 0, "extents: clear %v on %v", bits, r)
	if r.Empty() {
		return 0
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	had = t.updateLocked(r, 0, bits, 0) & bits
	t.checkSmallLocked()
	return had
}

// Test reports, if filled, whether every block of r has all of bits, and if not
// filled, whether any block of r has any of bits. Of an empty range the first is
// true and the second false.
func (t *StateTree) Test(r block.Range, bits Bits, filled bool) bool {
	assertRange(r)
	invariants.Assertf(bits != 0, "extents: test of %v for no bits", r)
	if r.Empty() {
		return filled
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	found := false
	pos := r.Start // every block of r before it has all of bits
	t.states.Ascend(r.Start+1, func(_ block.Index, s state) bool {
		if s.Start >= r.End {
			return false
		}
		if !filled {
			found = s.bits&bits != 0
			return !found
		}
		if s.Start > pos || s.bits&bits != bits {
			return false
		}
		pos = s.End
		return pos < r.End
	})
	if filled {
		return pos >= r.End
	}
	return found
}

// Find returns the first run of adjacent blocks at or after start that have any
// of bits and all the same of them, and which those are. The run is clipped to
// begin no earlier than start and cut to limit blocks, 0 for none; it does not go
// on where the blocks' share of bits changes, but it does where only other
// bits change. ok is false if there is none.
func (t *StateTree) Find(start block.Index, bits Bits, limit block.Count) (r block.Range, have Bits, ok bool) {
	if start >= stateEnd {
		return block.Range{}, 0, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.countLocked(bits) == 0 {
		return block.Range{}, 0, false // spares the walk over all other states
	}
	t.states.Ascend(start+1, func(_ block.Index, s state) bool {
		switch {
		case !ok:
			if have = s.bits & bits; have == 0 {
				return true
			}
			r, ok = s.Range, true
			r.Start = max(r.Start, start)
		case s.Start == r.End && s.bits&bits == have:
			r.End = s.End
		default:
			return false
		}
		return limit == 0 || r.Len() < limit
	})
	if limit != 0 && r.Len() > limit {
		r.End = r.Start + block.Index(limit)
	}
	return r, have, ok
}

// Count is the number of blocks that have any of bits. It takes constant time.
func (t *StateTree) Count(bits Bits) block.Count {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.countLocked(bits)
}

// Ranges is the number of states, which the memory used is proportional to.
func (t *StateTree) Ranges() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rangesLocked()
}

// Empty reports whether no block has any bit.
func (t *StateTree) Empty() bool { return t.Ranges() == 0 }

func (t *StateTree) rangesLocked() int { return t.states.Len() - 1 }

func (t *StateTree) countLocked(bits Bits) block.Count {
	var n block.Count
	for b, blocks := range t.blocks {
		if Bits(b)&bits != 0 {
			n += blocks
		}
	}
	return n
}

// firstLockedLocked returns the first locked block of r, r.End if there is none.
func (t *StateTree) firstLockedLocked(r block.Range) block.Index {
	first := r.End
	if t.countLocked(Locked) == 0 {
		return first
	}
	t.states.Ascend(r.Start+1, func(_ block.Index, s state) bool {
		if s.Start >= r.End {
			return false
		}
		if s.bits&Locked != 0 {
			first = max(s.Start, r.Start)
			return false
		}
		return true
	})
	return first
}

// updateLocked clears and then sets bits on all of r and returns all bits that
// any block of r had. If set has Locked, owner is the new owner of r.
//
// The states that overlap or touch r are read, rewritten beside and compared, so
// that a call changes as little of the tree as can be, and nothing if the blocks
// have the bits already.
func (t *StateTree) updateLocked(r block.Range, set, clear Bits, owner uint64) (had Bits) {
	if r.Empty() {
		return 0
	}
	before, after := t.before[:0], t.after[:0]
	t.states.Ascend(r.Start, func(_ block.Index, s state) bool {
		if s.Start > r.End {
			return false
		}
		before = append(before, s)
		return true
	})

	change := func(s state) state {
		s.bits = s.bits&^clear | set
		switch {
		case set&Locked != 0:
			s.owner = owner
		case s.bits&Locked == 0:
			s.owner = 0
		}
		return s
	}
	pos := r.Start // blocks of r before it are in after
	for _, s := range before {
		if s.Start < r.Start {
			left := s
			left.End = min(s.End, r.Start)
			after = appendState(after, left)
		}
		if s.Overlaps(r) {
			in := s
			in.Range = s.Intersect(r)
			had |= s.bits
			after = appendState(after, change(state{Range: block.Range{Start: pos, End: in.Start}}))
			after = appendState(after, change(in))
			pos = in.End
		}
		if s.End > r.End {
			after = appendState(after, change(state{Range: block.Range{Start: pos, End: r.End}}))
			pos = r.End
			right := s
			right.Start = max(s.Start, r.End)
			after = appendState(after, right)
		}
	}
	after = appendState(after, change(state{Range: block.Range{Start: pos, End: r.End}}))

	t.replaceLocked(before, after)
	if cap(before) <= scratchStatesMax {
		t.before = before
	}
	if cap(after) <= scratchStatesMax {
		t.after = after
	}
	return had
}

// appendState appends s to states, which it follows, or merges it with the last
// of them. A state without blocks or bits does not exist.
func appendState(states []state, s state) []state {
	if s.Empty() || s.bits == 0 {
		return states
	}
	if n := len(states); n > 0 && states[n-1].End == s.Start && states[n-1].mayMerge(s) {
		states[n-1].End = s.End
		return states
	}
	return append(states, s)
}

// replaceLocked puts after in the place of before, both ordered.
func (t *StateTree) replaceLocked(before, after []state) {
	for len(before) > 0 || len(after) > 0 {
		switch {
		case len(after) == 0 || len(before) > 0 && before[0].End < after[0].End:
			t.blocks[before[0].bits] -= before[0].Len()
			t.states.Delete(before[0].End)
			before = before[1:]
		case len(before) == 0 || after[0].End < before[0].End:
			t.blocks[after[0].bits] += after[0].Len()
			t.states.Set(after[0].End, after[0])
			after = after[1:]
		default:
			if before[0] != after[0] {
				t.blocks[before[0].bits] -= before[0].Len()
				t.blocks[after[0].bits] += after[0].Len()
				t.states.Set(after[0].End, after[0])
			}
			before, after = before[1:], after[1:]
		}
	}
}

// waitLocked drops the mutex until the locked block on has been unlocked, and
// retakes it; by then it may be locked again.
func (t *StateTree) waitLocked(on block.Index) {
	w := t.idle
	if w == nil {
		w = &lockWaiter{wake: make(chan struct{}, 1)}
	} else {
		t.idle = w.next
	}
	w.on, w.next = on, nil
	last := &t.waiters
	for last.next != nil {
		last = last.next
	}
	last.next = w

	t.mu.Unlock()
	<-w.wake
	t.mu.Lock()

	// As many are kept as have ever waited at once.
	w.next = t.idle
	t.idle = w
}

// wakeLocked wakes all who wait for a block of r, the longest waiting first. The
// list is short, as it holds goroutines that found a range locked by another.
func (t *StateTree) wakeLocked(r block.Range) {
	for prev := &t.waiters; prev.next != nil; {
		w := prev.next
		if !r.Contains(w.on) {
			prev = w
			continue
		}
		prev.next, w.next = w.next, nil
		w.wake <- struct{}{}
	}
}

func assertRange(r block.Range) {
	invariants.Assertf(r.Start <= r.End && r.End <= stateEnd, "extents: range %v", r)
}

// checkOrderLocked verifies invariant 5 for a Lock that is about to begin.
func (t *StateTree) checkOrderLocked(r block.Range, owner uint64) {
	if !invariants.Enabled || t.rangesLocked() > checkStatesMax {
		return
	}
	t.states.Ascend(r.Start+1, func(_ block.Index, s state) bool {
		invariants.Assertf(s.bits&Locked == 0 || s.owner != owner,
			"extents: owner %d holds %v and locks %v, not in ascending order", owner, s.Range, r)
		return true
	})
}

// checkOwnerLocked verifies that owner holds all of r.
func (t *StateTree) checkOwnerLocked(r block.Range, owner uint64) {
	if !invariants.Enabled {
		return
	}
	pos := r.Start
	t.states.Ascend(r.Start+1, func(_ block.Index, s state) bool {
		if s.Start > pos || s.bits&Locked == 0 || s.owner != owner {
			return false
		}
		pos = s.End
		return pos < r.End
	})
	invariants.Assertf(pos >= r.End, "extents: owner %d unlocks %v without holding block %d", owner, r, pos)
}

func (t *StateTree) checkSmallLocked() {
	if invariants.Enabled && t.rangesLocked() <= checkStatesMax {
		err := t.checkLocked()
		invariants.Assertf(err == nil, "%v", err)
	}
}

// check verifies the invariants over the whole tree.
func (t *StateTree) check() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.checkLocked()
}

func (t *StateTree) checkLocked() (err error) {
	var blocks [len(t.blocks)]block.Count
	var prev state
	t.states.Scan(func(end block.Index, s state) bool {
		switch {
		case end == ^block.Index(0):
			return false
		case s.End != end || s.Empty() || s.bits == 0 || s.bits&^allBits != 0:
			err = fmt.Errorf("extents: state %v with %v at %d", s.Range, s.bits, end)
		case s.Start < prev.End:
			err = fmt.Errorf("extents: state %v overlaps %v", s.Range, prev.Range)
		case s.Start == prev.End && s.mayMerge(prev):
			err = fmt.Errorf("extents: states %v and %v with %v are not merged", prev.Range, s.Range, s.bits)
		case (s.bits&Locked != 0) != (s.owner != 0):
			err = fmt.Errorf("extents: state %v with %v has owner %d", s.Range, s.bits, s.owner)
		}
		blocks[s.bits] += s.Len()
		prev = s
		return err == nil
	})
	if err == nil && blocks != t.blocks {
		err = fmt.Errorf("extents: counted blocks %v, states have %v", t.blocks, blocks)
	}
	for w := t.waiters.next; w != nil && err == nil; w = w.next {
		if t.firstLockedLocked(block.Span(w.on, 1)) != w.on {
			err = fmt.Errorf("extents: a lock waits for block %d, which is not locked", w.on)
		}
	}
	return err
}
