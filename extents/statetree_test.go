package extents

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

func rng(start, end block.Index) block.Range { return block.Range{Start: start, End: end} }

// dump lists the states of t.
func (t *StateTree) dump() (states []state) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.states.Scan(func(_ block.Index, s state) bool {
		states = append(states, s)
		return true
	})
	return states[:len(states)-1]
}

func mustCheck(t testing.TB, tree *StateTree) {
	t.Helper()
	if err := tree.check(); err != nil {
		t.Fatal(err)
	}
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

func TestBitsString(t *testing.T) {
	for b, want := range map[Bits]string{
		0:                             "none",
		Locked:                        "locked",
		Delalloc | DirtyHole:          "delalloc|dirtyhole",
		Locked | Delalloc | Bits(128): "locked|delalloc|0x80",
	} {
		if got := b.String(); got != want {
			t.Errorf("Bits(%d) = %q, want %q", uint8(b), got, want)
		}
	}
}

// States split and merge: each step's states are listed as a whole.
func TestStateTreeSplitMerge(t *testing.T) {
	type states []state
	d := func(start, end block.Index) state { return state{Range: rng(start, end), bits: Delalloc} }
	h := func(start, end block.Index) state { return state{Range: rng(start, end), bits: DirtyHole} }
	l := func(start, end block.Index, bits Bits) state {
		return state{Range: rng(start, end), bits: bits | Locked, owner: 7}
	}
	tree := NewStateTree()
	for _, step := range []struct {
		name string
		do   func()
		want states
	}{
		{"set", func() { tree.Set(rng(10, 20), Delalloc) }, states{d(10, 20)}},
		{"set again changes nothing", func() { tree.Set(rng(12, 20), Delalloc) }, states{d(10, 20)}},
		{"touching right merges", func() { tree.Set(rng(20, 22), Delalloc) }, states{d(10, 22)}},
		{"touching left merges", func() { tree.Set(rng(8, 10), Delalloc) }, states{d(8, 22)}},
		{"apart stays apart", func() { tree.Set(rng(23, 24), Delalloc) }, states{d(8, 22), d(23, 24)}},
		{"filling the gap merges three", func() { tree.Set(rng(22, 23), Delalloc) }, states{d(8, 24)}},
		{"other bits do not merge", func() { tree.Set(rng(24, 30), DirtyHole) }, states{d(8, 24), h(24, 30)}},
		{"lock splits and does not merge", func() { tree.Lock(rng(10, 12), 7); tree.Lock(rng(12, 14), 7) },
			states{d(8, 10), l(10, 12, Delalloc), l(12, 14, Delalloc), d(14, 24), h(24, 30)}},
		{"lock over a gap", func() { tree.Lock(rng(28, 32), 7) },
			states{d(8, 10), l(10, 12, Delalloc), l(12, 14, Delalloc), d(14, 24), h(24, 28), l(28, 30, DirtyHole), l(30, 32, 0)}},
		{"set and clear keep the lock", func() { tree.Set(rng(28, 32), Delalloc); tree.Clear(rng(28, 32), DirtyHole) },
			states{d(8, 10), l(10, 12, Delalloc), l(12, 14, Delalloc), d(14, 24), h(24, 28), l(28, 30, Delalloc), l(30, 32, Delalloc)}},
		{"unlock swaps bits and merges", func() { tree.Unlock(rng(28, 32), 7, DirtyHole, Delalloc) },
			states{d(8, 10), l(10, 12, Delalloc), l(12, 14, Delalloc), d(14, 24), h(24, 32)}},
		{"unlock a part", func() { tree.Unlock(rng(11, 13), 7, 0, Delalloc) },
			states{d(8, 10), l(10, 11, Delalloc), l(13, 14, Delalloc), d(14, 24), h(24, 32)}},
		{"unlock merges both sides", func() {
			tree.Unlock(rng(10, 11), 7, 0, 0)
			tree.Unlock(rng(13, 14), 7, 0, 0)
			tree.Set(rng(11, 13), Delalloc)
		}, states{d(8, 24), h(24, 32)}},
		{"clear in the middle", func() { tree.Clear(rng(10, 12), Delalloc) }, states{d(8, 10), d(12, 24), h(24, 32)}},
		{"clear over all", func() { tree.Clear(rng(0, stateEnd), Delalloc|DirtyHole) }, nil},
	} {
		step.do()
		mustCheck(t, tree)
		if got := tree.dump(); fmt.Sprint(got) != fmt.Sprint([]state(step.want)) {
			t.Fatalf("%s: states %v, want %v", step.name, got, step.want)
		}
	}
	if !tree.Empty() || tree.Ranges() != 0 || tree.Count(allBits) != 0 {
		t.Error("not empty at the end")
	}
}

func TestStateTreeFind(t *testing.T) {
	tree := NewStateTree()
	tree.Set(rng(10, 20), Delalloc)
	tree.Set(rng(20, 30), DirtyHole)
	tree.Set(rng(40, 50), Delalloc)
	tree.Lock(rng(43, 46), 1) // splits in three, only the lock differs
	const any = Delalloc | DirtyHole
	for _, c := range []struct {
		start block.Index
		bits  Bits
		limit block.Count
		want  block.Range
		have  Bits
	}{
		{0, Delalloc, 0, rng(10, 20), Delalloc},      // after start
		{10, Delalloc, 0, rng(10, 20), Delalloc},     // at its first block
		{15, Delalloc, 0, rng(15, 20), Delalloc},     // clipped to start
		{19, Delalloc, 0, rng(19, 20), Delalloc},     // at its last block
		{20, Delalloc, 0, rng(40, 50), Delalloc},     // past other bits and a gap
		{0, any, 0, rng(10, 20), Delalloc},           // ends where the bits differ
		{12, any, 0, rng(12, 20), Delalloc},          //
		{20, any, 0, rng(20, 30), DirtyHole},         // ends at a gap
		{30, any, 0, rng(40, 50), Delalloc},          // begins in a gap, goes on over a lock
		{41, Delalloc, 3, rng(41, 44), Delalloc},     // cut inside the second state
		{41, Delalloc, 2, rng(41, 43), Delalloc},     // cut at a state's end
		{0, Delalloc, 1, rng(10, 11), Delalloc},      // cut to one block
		{0, Delalloc, 10, rng(10, 20), Delalloc},     // exactly the limit
		{0, Delalloc, 11, rng(10, 20), Delalloc},     // limit beyond
		{42, Locked | any, 0, rng(42, 43), Delalloc}, // the lock is asked for
		{43, Locked | any, 0, rng(43, 46), Locked | Delalloc},
		{0, Locked, 0, rng(43, 46), Locked},
		{50, any, 0, block.Range{}, 0}, // before start only
		{46, Locked, 0, block.Range{}, 0},
		{0, 0, 0, block.Range{}, 0},
		{stateEnd, any, 0, block.Range{}, 0},
		{^block.Index(0), any, 0, block.Range{}, 0},
	} {
		got, have, ok := tree.Find(c.start, c.bits, c.limit)
		if got != c.want || have != c.have || ok != !c.want.Empty() {
			t.Errorf("Find(%d, %v, %d) = %v, %v, %v, want %v, %v", c.start, c.bits, c.limit, got, have, ok, c.want, c.have)
		}
	}
}

// A range of 16 TiB, and one up to the last block there can be, is one state.
func TestStateTreeHuge(t *testing.T) {
	tree := NewStateTree()
	for _, end := range []block.Index{1 << 32, stateEnd} {
		r := rng(0, end)
		tree.Set(r, DirtyHole)
		if n, blocks := tree.Ranges(), tree.Count(DirtyHole); n != 1 || blocks != r.Len() {
			t.Errorf("%v: %d states with %d blocks", r, n, blocks)
		}
		if !tree.Test(r, DirtyHole, true) {
			t.Errorf("%v: not filled", r)
		}
		tree.Lock(r, 1)
		if tree.Ranges() != 1 {
			t.Errorf("%v locked: %d states", r, tree.Ranges())
		}
		tree.Unlock(r, 1, 0, 0)
	}
	if had := tree.Clear(rng(5, stateEnd), Delalloc|DirtyHole); had != DirtyHole {
		t.Errorf("cleared %v", had)
	}
	if got := tree.Count(DirtyHole); got != 5 {
		t.Errorf("%d blocks left, want 5", got)
	}
	mustCheck(t, tree)
}

// Invariant 6 of the pipeline, and what our own callers must not do.
func TestStateTreeMisuse(t *testing.T) {
	if !invariants.Enabled {
		t.Skip("needs a build with invariants")
	}
	tree := NewStateTree()
	tree.Lock(rng(10, 20), 1)
	for what, f := range map[string]func(){
		"unlock by another owner":     func() { tree.Unlock(rng(10, 20), 2, 0, 0) },
		"unlock more than is locked":  func() { tree.Unlock(rng(10, 21), 1, 0, 0) },
		"unlock what is not locked":   func() { tree.Unlock(rng(0, 1), 1, 0, 0) },
		"lock twice by one owner":     func() { tree.Lock(rng(15, 16), 1) },
		"lock in descending order":    func() { tree.Lock(rng(0, 5), 1) },
		"lock without owner":          func() { tree.Lock(rng(30, 31), 0) },
		"set of locked":               func() { tree.Set(rng(0, 1), Locked) },
		"clear of locked":             func() { tree.Clear(rng(10, 11), Locked) },
		"unlock that sets and clears": func() { tree.Unlock(rng(10, 20), 1, Delalloc, Delalloc) },
		"inverted range":              func() { tree.Set(rng(2, 1), Delalloc) },
		"range beyond the end":        func() { tree.Set(rng(0, stateEnd+1), Delalloc) },
	} {
		mustPanic(t, what, f)
		mustCheck(t, tree)
	}
	tree.Unlock(rng(10, 20), 1, 0, 0)
	if !tree.Empty() {
		t.Error("a refused call changed the tree")
	}
}

// The checker finds each kind of broken tree, else the tests above prove little.
func TestStateTreeCheckFinds(t *testing.T) {
	put := func(tree *StateTree, s state) {
		tree.states.Set(s.End, s)
		tree.blocks[s.bits] += s.Len()
	}
	for what, spoil := range map[string]func(*StateTree){
		"no bits":        func(tree *StateTree) { put(tree, state{Range: rng(20, 21)}) },
		"empty":          func(tree *StateTree) { put(tree, state{Range: rng(21, 21), bits: Delalloc}) },
		"overlap":        func(tree *StateTree) { put(tree, state{Range: rng(9, 12), bits: DirtyHole}) },
		"not merged":     func(tree *StateTree) { put(tree, state{Range: rng(10, 12), bits: Delalloc}) },
		"no owner":       func(tree *StateTree) { put(tree, state{Range: rng(10, 12), bits: Locked}) },
		"owner, no lock": func(tree *StateTree) { put(tree, state{Range: rng(10, 12), bits: DirtyHole, owner: 1}) },
		"counter":        func(tree *StateTree) { tree.blocks[Delalloc]++ },
		"lost wake-up":   func(tree *StateTree) { tree.waiters.next = &lockWaiter{on: 5} },
	} {
		tree := NewStateTree()
		tree.Set(rng(0, 10), Delalloc)
		mustCheck(t, tree)
		spoil(tree)
		if tree.check() == nil {
			t.Errorf("%s: not found", what)
		}
	}
}

// stateModel is the plain form of a StateTree: bits and owner of each block.
type stateModel struct {
	bits  []Bits
	owner []uint64
}

func newStateModel(blocks int) *stateModel {
	return &stateModel{make([]Bits, blocks), make([]uint64, blocks)}
}

func (m *stateModel) any(r block.Range, bits Bits) (have Bits) {
	for i := r.Start; i < r.End; i++ {
		have |= m.bits[i] & bits
	}
	return have
}

func (m *stateModel) all(r block.Range, bits Bits) bool {
	for i := r.Start; i < r.End; i++ {
		if m.bits[i]&bits != bits {
			return false
		}
	}
	return true
}

func (m *stateModel) update(r block.Range, set, clear Bits) {
	for i := r.Start; i < r.End; i++ {
		m.bits[i] = m.bits[i]&^clear | set
	}
}

func (m *stateModel) find(start block.Index, bits Bits, limit block.Count) (block.Range, Bits, bool) {
	end := block.Index(len(m.bits))
	for start < end && m.bits[start]&bits == 0 {
		start++
	}
	if start >= end {
		return block.Range{}, 0, false
	}
	r := rng(start, start)
	have := m.bits[start] & bits
	for r.End < end && m.bits[r.End]&bits == have && (limit == 0 || r.Len() < limit) {
		r.End++
	}
	return r, have, true
}

// states is the number of states that invariant 2 leaves no choice about, given
// that no block is locked.
func (m *stateModel) states() (n int) {
	var prev Bits
	for _, b := range m.bits {
		if b != prev && b != 0 {
			n++
		}
		prev = b
	}
	return n
}

// step does one operation, which four bytes choose, on both and compares what
// they answer.
func (m *stateModel) step(t testing.TB, tree *StateTree, op [4]byte) {
	t.Helper()
	n := block.Index(len(m.bits))
	a, b := block.Index(op[1])%(n+1), block.Index(op[2])%(n+1)
	r := rng(min(a, b), max(a, b))
	bits := Bits(op[3]) & (Delalloc | DirtyHole)
	other := Bits(op[3]>>3) & (Delalloc | DirtyHole) &^ bits
	limit := block.Count(op[3] >> 3)
	owner := uint64(op[3]>>6) + 1
	switch op[0] % 8 {
	case 0:
		tree.Set(r, bits)
		m.update(r, bits, 0)
	case 1:
		if got, want := tree.Clear(r, bits), m.any(r, bits); got != want {
			t.Fatalf("Clear(%v, %v) = %v, want %v", r, bits, got, want)
		}
		m.update(r, 0, bits)
	case 2, 3:
		got, want := tree.TryLock(r, owner), m.any(r, Locked) == 0
		if got != want {
			t.Fatalf("TryLock(%v) = %v, want %v", r, got, want)
		}
		if got {
			m.update(r, Locked, 0)
			for i := r.Start; i < r.End; i++ {
				m.owner[i] = owner
			}
		}
	case 4, 5:
		// Unlock as much of r as one owner holds from the first locked block on.
		for r.Start < r.End && m.bits[r.Start]&Locked == 0 {
			r.Start++
		}
		end := r.Start
		for end < r.End && m.bits[end]&Locked != 0 && m.owner[end] == m.owner[r.Start] {
			end++
		}
		if r.End = end; !r.Empty() {
			tree.Unlock(r, m.owner[r.Start], bits, other)
			m.update(r, bits, other|Locked)
			for i := r.Start; i < r.End; i++ {
				m.owner[i] = 0
			}
		}
	case 6:
		if bits |= Bits(op[3]>>7) & Locked; bits == 0 {
			bits = Locked
		}
		for _, filled := range []bool{false, true} {
			want := m.all(r, bits)
			if !filled {
				want = m.any(r, bits) != 0
			}
			if got := tree.Test(r, bits, filled); got != want {
				t.Fatalf("Test(%v, %v, %v) = %v, want %v", r, bits, filled, got, want)
			}
		}
	case 7:
		bits |= Bits(op[2]>>7) & Locked
		got, gotBits, gotOK := tree.Find(a, bits, limit)
		want, wantBits, wantOK := m.find(a, bits, limit)
		if got != want || gotBits != wantBits || gotOK != wantOK {
			t.Fatalf("Find(%d, %v, %d) = %v, %v, %v, want %v, %v, %v",
				a, bits, limit, got, gotBits, gotOK, want, wantBits, wantOK)
		}
	}
}

// compare compares the whole of the tree with the model.
func (m *stateModel) compare(t testing.TB, tree *StateTree) {
	t.Helper()
	mustCheck(t, tree)
	got := newStateModel(len(m.bits))
	for _, s := range tree.dump() {
		for i := s.Start; i < s.End; i++ {
			got.bits[i], got.owner[i] = s.bits, s.owner
		}
	}
	for i := range m.bits {
		if got.bits[i] != m.bits[i] || got.owner[i] != m.owner[i] {
			t.Fatalf("block %d has %v of owner %d, want %v of %d", i, got.bits[i], got.owner[i], m.bits[i], m.owner[i])
		}
	}
	for _, bits := range []Bits{Locked, Delalloc, DirtyHole, Delalloc | DirtyHole, allBits} {
		var want block.Count
		for _, b := range m.bits {
			if b&bits != 0 {
				want++
			}
		}
		if got := tree.Count(bits); got != want {
			t.Fatalf("Count(%v) = %d, want %d", bits, got, want)
		}
	}
	if m.any(rng(0, block.Index(len(m.bits))), Locked) == 0 && tree.Ranges() != m.states() {
		t.Fatalf("%d states, want %d", tree.Ranges(), m.states())
	}
}

func TestStateTreeModel(t *testing.T) {
	seed := disktest.Seed(t)
	for round := range 40 * disktest.Scale(t) {
		rnd := rand.New(rand.NewPCG(seed, uint64(round)))
		blocks := 1 + rnd.IntN(200)
		tree, model := NewStateTree(), newStateModel(blocks)
		span := 1 + rnd.IntN(blocks) // short ranges make many states
		for range 500 {
			a := rnd.IntN(blocks + 1)
			b := min(a+rnd.IntN(span+1), blocks)
			model.step(t, tree, [4]byte{byte(rnd.Uint32()), byte(a), byte(b), byte(rnd.Uint32())})
			model.compare(t, tree)
		}
	}
}

func FuzzStateTree(f *testing.F) {
	f.Add([]byte{0, 10, 20, 2, 2, 12, 14, 0, 0, 14, 30, 4, 4, 0, 63, 2, 7, 0, 0, 6})
	f.Add([]byte{2, 0, 32, 0, 2, 32, 64, 64, 0, 16, 48, 6, 4, 0, 40, 0, 1, 0, 64, 6})
	f.Fuzz(func(t *testing.T, ops []byte) {
		tree, model := NewStateTree(), newStateModel(64)
		for ; len(ops) >= 4; ops = ops[4:] {
			model.step(t, tree, [4]byte(ops))
			model.compare(t, tree)
		}
	})
}

// A waiter holds the blocks before the one it waits for, and none behind it.
func TestStateTreeLockHoldsPrefix(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tree := NewStateTree()
		tree.Set(rng(0, 8), Delalloc)
		free := func(i block.Index) bool {
			if !tree.TryLock(block.Span(i, 1), 9) {
				return false
			}
			tree.Unlock(block.Span(i, 1), 9, 0, 0)
			return true
		}
		expect := func(step, want string) {
			t.Helper()
			synctest.Wait()
			mustCheck(t, tree)
			got := ""
			for i := range block.Index(8) {
				if free(i) {
					got += "."
				} else {
					got += "L"
				}
			}
			if got != want {
				t.Fatalf("%s: locked blocks %s, want %s", step, got, want)
			}
		}
		tree.Lock(rng(2, 4), 1)
		tree.Lock(rng(6, 7), 2)
		expect("two holders", "..LL..L.")
		done := false
		go func() {
			tree.Lock(rng(0, 8), 3)
			done = true
		}()
		expect("waits for block 2", "LLLL..L.")
		tree.Unlock(rng(3, 4), 1, 0, 0)
		expect("a block behind is free", "LLL...L.")
		if !tree.TryLock(rng(4, 5), 4) {
			t.Fatal("block 4 is locked before the waiter got there")
		}
		tree.Unlock(rng(2, 3), 1, 0, Delalloc)
		expect("waits for block 4", "LLLLL.L.")
		tree.Unlock(rng(4, 5), 4, 0, 0)
		expect("waits for block 6", "LLLLLLL.")
		if done {
			t.Fatal("locked while block 6 was another's")
		}
		tree.Unlock(rng(6, 7), 2, 0, 0)
		expect("has all", "LLLLLLLL")
		if !done {
			t.Fatal("still waits")
		}
		tree.Unlock(rng(0, 8), 3, 0, 0)
		expect("all free", "........")
	})
}

// Woken waiters search again: of several that want the same blocks one goes on,
// and the others wait for it in turn, each once, until all have been served.
func TestStateTreeWaitersAscending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tree := NewStateTree()
		tree.Lock(rng(10, 20), 100)
		wants := map[uint64]block.Range{1: rng(12, 30), 2: rng(5, 14), 3: rng(19, 22), 4: rng(12, 13)}
		locked := make(chan uint64, len(wants))
		for owner := range uint64(len(wants)) {
			owner++
			go func() {
				tree.Lock(wants[owner], owner)
				locked <- owner
			}()
			synctest.Wait()
		}
		// 1 and 4 wait for block 12; 2 has [5,10) and waits for block 10; 3
		// waits for block 19. Now 2 goes on to block 12.
		tree.Unlock(rng(10, 12), 100, 0, 0)
		synctest.Wait()
		if len(locked) != 0 {
			t.Fatalf("owner %d passed a held lock", <-locked)
		}
		if !tree.Test(rng(5, 12), Locked, true) {
			t.Fatal("owner 2 does not have [5,12)")
		}
		tree.Unlock(rng(12, 20), 100, 0, 0)
		for served := range len(wants) {
			synctest.Wait()
			mustCheck(t, tree)
			if len(locked) == 0 {
				t.Fatalf("deadlock after %d owners: %v", served, tree.dump())
			}
			owner := <-locked
			tree.Unlock(wants[owner], owner, 0, 0)
		}
		if !tree.Empty() {
			t.Errorf("states left: %v", tree.dump())
		}
	})
}

// Unlock shows the range unlocked and with its new bits at one instant.
func TestStateTreeUnlockIsOneStep(t *testing.T) {
	tree := NewStateTree()
	r := rng(100, 200)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 500 * disktest.Scale(t) {
				tree.Lock(r, uint64(g+1))
				if tree.Test(r, Delalloc, false) {
					t.Errorf("locked with the holder's bits left, round %d", i)
				}
				tree.Set(r, Delalloc)
				tree.Unlock(r, uint64(g+1), 0, Delalloc)
			}
		})
	}
	wg.Wait()
	if !tree.Empty() {
		t.Errorf("states left: %v", tree.dump())
	}
}

// Goroutines lock random overlapping ranges, of one or two parts in ascending
// order. The array is not atomic: the race detector sees it when two hold a block.
func TestStateTreeExclusion(t *testing.T) {
	const blocks = 64
	seed := disktest.Seed(t)
	tree := NewStateTree()
	var held [blocks]uint64
	var locks atomic.Int64
	var wg sync.WaitGroup
	for g := range 8 {
		owner := uint64(g + 1)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, owner))
			use := func(r block.Range) {
				for i := r.Start; i < r.End; i++ {
					if held[i] != 0 {
						t.Errorf("block %d is held by %d and %d", i, held[i], owner)
					}
					held[i] = owner
				}
				locks.Add(1)
			}
			release := func(r block.Range) {
				for i := r.Start; i < r.End; i++ {
					held[i] = 0
				}
				tree.Unlock(r, owner, Bits(rnd.Uint32())&Delalloc, DirtyHole)
			}
			for range 400 * disktest.Scale(t) {
				a := block.Index(rnd.IntN(blocks))
				r := rng(a, min(a+1+block.Index(rnd.IntN(12)), blocks))
				if rnd.IntN(4) == 0 {
					if tree.TryLock(r, owner) {
						use(r)
						release(r)
					}
					continue
				}
				tree.Lock(r, owner)
				use(r)
				if next := rng(r.End, min(r.End+5, blocks)); rnd.IntN(3) == 0 && !next.Empty() {
					tree.Lock(next, owner)
					use(next)
					r.End = next.End // both are given back by one call
				}
				if rnd.IntN(2) == 0 {
					tree.Set(rng(0, blocks), DirtyHole) // splits and merges under the holders
				}
				release(r)
			}
		})
	}
	wg.Wait()
	mustCheck(t, tree)
	if tree.Count(Locked) != 0 {
		t.Errorf("locked for ever: %v", tree.dump())
	}
	t.Logf("%d ranges locked", locks.Load())
}

// fragmented is a tree of n states of two blocks with gaps of two.
func fragmented(n int) *StateTree {
	tree := NewStateTree()
	for i := range n {
		tree.Set(block.Span(block.Index(i)*4, 2), Delalloc)
	}
	return tree
}

func TestStateTreeAllocatesNothing(t *testing.T) {
	if invariants.Enabled {
		t.Skip("the checks allocate")
	}
	for _, states := range []int{0, 1, 1000} {
		tree := fragmented(states)
		var i block.Index
		allocs := testing.AllocsPerRun(1000, func() {
			i = (i*31 + 17) % (4*block.Index(states) + 64)
			r := block.Span(i, 8)
			tree.Lock(r, 1)
			tree.Unlock(r, 1, 0, 0)
			tree.Find(i, Delalloc, 0)
			tree.Test(r, Delalloc, true)
		})
		if allocs != 0 {
			t.Errorf("%d states: %v allocations for each lock and unlock", states, allocs)
		}
	}
}

func BenchmarkStateTreeLockUnlock(b *testing.B) {
	for _, states := range []int{0, 1000, 100_000} {
		for _, bench := range []struct {
			name   string
			blocks block.Count
		}{{"1block", 1}, {"16blocks", 16}} {
			b.Run(fmt.Sprintf("%dstates/%s", states, bench.name), func(b *testing.B) {
				tree := fragmented(states)
				limit := block.Index(max(4*states, 64))
				rnd := rand.New(rand.NewPCG(1, 2))
				b.ReportAllocs()
				b.ResetTimer()
				for range b.N {
					r := block.Span(block.Index(rnd.Uint64N(uint64(limit))), bench.blocks)
					tree.Lock(r, 1)
					tree.Unlock(r, 1, 0, 0)
				}
			})
		}
	}
}

// What a stream of small writes and its writeback cost.
func BenchmarkStateTreeSetClear(b *testing.B) {
	for _, order := range []string{"sequential", "random"} {
		b.Run(order, func(b *testing.B) {
			tree := fragmented(100_000)
			rnd := rand.New(rand.NewPCG(1, 2))
			var i block.Index
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if order == "random" {
					i = block.Index(rnd.Uint64N(400_000))
				} else {
					i = (i + 1) % 400_000
				}
				tree.Set(block.Span(i, 1), DirtyHole)
				tree.Clear(block.Span(max(i, 16)-16, 1), DirtyHole)
			}
		})
	}
}

func BenchmarkStateTreeFind(b *testing.B) {
	tree := fragmented(100_000)
	rnd := rand.New(rand.NewPCG(1, 2))
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		tree.Find(block.Index(rnd.Uint64N(400_000)), Delalloc, 128)
	}
}
