package extents

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A mapModel is a whole map (overlay over pending trims over tree) beside the
// plain form of what it has to say.
type mapModel struct {
	t       *testing.T
	rand    *rand.Rand
	maker   blobMaker
	store   *memNodes
	tree    *Tree
	root    Root
	overlay *Overlay
	pending *RangeSet
	cells   mapCells
	got     mapCells // for compose
	usage   *usageTotals
	leaked  *usageTotals // of nodes that were found unreadable

	evacuated int // nodes that had to leave their places
}

func newMapModel(t *testing.T, rand *rand.Rand, blocks, nodeSize int, opts TreeOptions) *mapModel {
	m := &mapModel{
		t: t, rand: rand, maker: blobMaker{rand: rand}, store: newMemNodes(),
		overlay: NewOverlay(), pending: NewRangeSet(), cells: make(mapCells, blocks), got: make(mapCells, blocks),
		usage: newUsageTotals(), leaked: newUsageTotals(),
	}
	m.tree = NewTree(m.store, opts)
	m.tree.nodeSize = nodeSize
	m.cells.paint(holeExtent(0, block.Index(blocks)))
	return m
}

func (m *mapModel) insert(e Extent) {
	m.overlay.Insert(e)
	m.cells.paint(e)
}

// compose says in cells what the map says of r, asked as the store asks.
func compose(t testing.TB, tree *Tree, root Root, pending *RangeSet, overlay *Overlay, r block.Range, cells mapCells) mapCells {
	t.Helper()
	if !r.Empty() {
		cells.paint(Extent{Start: r.Start, Count: r.Len()})
	}
	last := r.Start
	if err := tree.Lookup(root, r, func(e Extent) error {
		if e.Start < last || e.Count == 0 || !r.Covers(e.Range()) || e.Kind == Hole {
			return fmt.Errorf("lookup of %v: %s behind %d", r, e.short(), last)
		}
		last = e.Range().End
		cells.paint(e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	pending.Visit(r, func(x block.Range) { cells.paint(Extent{Start: x.Start, Count: x.Len()}) })
	overlay.Lookup(r, cells.paint)
	return cells
}

// check compares the map with the model over r.
func (m *mapModel) check(what string, r block.Range) {
	m.t.Helper()
	compose(m.t, m.tree, m.root, m.pending, m.overlay, r, m.got).diff(m.t, what, m.cells, r)
}

func (m *mapModel) all() block.Range { return rng(0, block.Index(len(m.cells))) }

// stream writes blocks start to end.
func (m *mapModel) stream(start, end int) {
	for at := block.Index(start); ; {
		e := m.maker.extent(at)
		if at = e.Range().End; at > block.Index(end) {
			return
		}
		m.insert(e)
	}
}

// change makes some random changes.
func (m *mapModel) change() {
	n := len(m.cells)
	switch m.rand.IntN(6) {
	case 0: // a stream
		start := m.rand.IntN(n)
		m.stream(start, start+m.rand.IntN(n-start))
	case 1: // one place, many times
		at := m.rand.IntN(n - 64)
		for range m.rand.IntN(100) {
			m.insert(m.maker.extent(block.Index(at + m.rand.IntN(32))))
		}
	case 2: // much is trimmed
		if m.rand.IntN(3) == 0 {
			m.insert(holeExtent(block.Index(m.rand.IntN(n/2)), block.Index(n-m.rand.IntN(n/2))))
		}
	case 3: // nothing
	default:
		for range m.rand.IntN(200) {
			m.insert(m.maker.random(n))
		}
	}
}

// reach tells of each node of the tree that can be read, and of what the whole
// tree refers to, damaged or not.
func (m *mapModel) reach() (intact *usageTotals, nodes []WalkNode, entries uint64) {
	m.t.Helper()
	intact = newUsageTotals()
	m.store.pristine = true
	err := m.tree.Walk(m.root, func(w WalkNode) error {
		nodes = append(nodes, w)
		intact.Node(w.Pointer, 1)
		if w.Level+1 == m.root.Height && w.Level > 0 && w.Entries < 2 {
			m.t.Errorf("a root with one child")
		}
		return w.Err
	}, func(e Extent) error {
		entries++
		if e.Kind == Data {
			intact.Extent(e, 1)
		}
		return nil
	})
	m.store.pristine = false
	if err != nil {
		m.t.Fatal(err)
	}
	return intact, nodes, entries
}

// damaged are the highest damaged nodes of the tree with what is below them.
func (m *mapModel) damaged(nodes []WalkNode) map[Pointer]*usageTotals {
	found := make(map[Pointer]*usageTotals)
	var under block.Index // end of the last damaged node
	for _, w := range nodes {
		if !m.store.damaged[w.Places[0]] || w.Copies == 2 && !m.store.damaged[w.Places[1]] || w.Keys.Start < under {
			continue
		}
		under = w.Keys.End
		below := newUsageTotals()
		m.store.pristine = true
		if err := m.tree.walk(w.Level, child{w.Keys, w.Pointer}, 0, func(w WalkNode) error {
			below.Node(w.Pointer, 1)
			return w.Err
		}, func(e Extent) error {
			if e.Kind == Data {
				below.Extent(e, 1)
			}
			return nil
		}); err != nil {
			m.t.Fatal(err)
		}
		m.store.pristine = false
		found[w.Pointer] = below
	}
	return found
}

func (u *usageTotals) addAll(o *usageTotals) {
	for k, v := range o.blocks {
		add(u.blocks, k, v)
	}
	for k, v := range o.bytes {
		add(u.bytes, k, v)
	}
	for k, v := range o.nodes {
		add(u.nodes, k, v)
	}
}

func (u *usageTotals) diff(t testing.TB, want *usageTotals) {
	t.Helper()
	if !maps.Equal(u.blocks, want.blocks) {
		t.Fatalf("blocks by segment %v, expected %v", u.blocks, want.blocks)
	}
	if !maps.Equal(u.bytes, want.bytes) {
		t.Fatalf("bytes by segment %v, expected %v", u.bytes, want.bytes)
	}
	if !maps.Equal(u.nodes, want.nodes) {
		t.Fatalf("nodes %v, expected %v", u.nodes, want.nodes)
	}
}

// merge makes a checkpoint and compares the accounts with a recount.
func (m *mapModel) merge(leafBudget int) {
	m.t.Helper()
	_, nodes, _ := m.reach()
	damaged := m.damaged(nodes)
	hidden := make(map[Pointer]bool) // the damaged nodes and those below them
	for _, below := range damaged {
		for p := range below.nodes {
			hidden[p] = true
		}
	}
	// Now and then the nodes of one segment have to leave it.
	var evacuation Evacuation
	var leaving []WalkNode
	if len(nodes) > 0 && m.rand.IntN(2) == 0 {
		segment := nodes[m.rand.IntN(len(nodes))].Places[0].Segment
		evacuation.From = func(n uint32) bool { return n == segment }
		for _, w := range nodes {
			if w.Places[0].Segment == segment || w.Copies == 2 && w.Places[1].Segment == segment {
				evacuation.Keys = append(evacuation.Keys, w.Keys.Start)
				leaving = append(leaving, w)
			}
		}
		slices.Sort(evacuation.Keys)
	}
	pendingBefore := m.pending.Append(nil)
	var before, after []Extent
	m.overlay.Ascend(0, func(e Extent) bool { before = append(before, e); return true })
	root, left, err := m.tree.Merge(m.root, m.overlay, m.pending, leafBudget, evacuation, m.usage)
	if err != nil {
		m.t.Fatal(err)
	}
	m.overlay.Ascend(0, func(e Extent) bool { after = append(after, e); return true })
	if !slices.Equal(m.pending.Append(nil), pendingBefore) || !slices.Equal(before, after) {
		m.t.Fatal("Merge changed its input")
	}
	m.root, m.pending, m.overlay = root, left, NewOverlay()

	have, nodes, entries := m.reach()
	for _, w := range nodes {
		delete(damaged, w.Pointer)
		if int(w.Length) > m.tree.nodeSize {
			m.t.Fatalf("node of %d bytes", w.Length)
		}
	}
	for _, w := range leaving {
		if hidden[w.Pointer] {
			continue // it stays unless something has to be done to it
		}
		if slices.ContainsFunc(nodes, func(n WalkNode) bool { return n.Pointer == w.Pointer }) {
			m.t.Fatalf("the node of %v of level %d is still in segment %d", w.Keys, w.Level, w.Places[0].Segment)
		}
		m.evacuated++
	}
	for _, below := range damaged {
		m.leaked.addAll(below)
	}
	if len(m.leaked.nodes) == 0 && (root.Entries != entries || root.Nodes != uint64(len(nodes))) {
		m.t.Fatalf("root has %d extents in %d nodes, found %d in %d", root.Entries, root.Nodes, entries, len(nodes))
	}
	have.addAll(m.leaked)
	m.usage.diff(m.t, have)
	r, err := DecodeRoot(root.Append(nil))
	if len(m.leaked.nodes) == 0 && (err != nil || r != root) {
		m.t.Fatalf("%+v decodes to %+v, %v", root, r, err)
	}
}

// hurt damages a random node; whatever only it knew is lost.
func (m *mapModel) hurt() {
	_, nodes, _ := m.reach()
	if len(nodes) == 0 {
		return
	}
	w := nodes[m.rand.IntN(len(nodes))]
	if w.Copies == 2 && m.rand.IntN(2) == 0 {
		m.store.damaged[w.Places[0]] = true // the other copy serves
		if !m.store.damaged[w.Places[1]] {
			return
		}
	}
	m.store.damage(w.Pointer)
	hidden := m.pending.Clone()
	m.overlay.Ascend(0, func(e Extent) bool { hidden.Add(e.Range()); return true })
	for i := w.Keys.Start; i < w.Keys.End; i++ {
		if !hidden.Contains(i) {
			m.cells[i] = mapCell{known: true, kind: Lost}
		}
	}
}

// An inner node leaves its place although the leaf by which it is found cannot
// be read; the leaf stays.
func TestEvacuationAboveUnreadable(t *testing.T) {
	m := newMapModel(t, rand.New(rand.NewPCG(1, 1)), 8000, 200, TreeOptions{CacheBytes: 1})
	m.stream(0, 8000)
	m.merge(0)
	_, nodes, _ := m.reach()
	find := func(level uint8, start block.Index) (WalkNode, bool) {
		i := slices.IndexFunc(nodes, func(w WalkNode) bool { return w.Level == level && w.Keys.Start == start })
		if i < 0 {
			return WalkNode{}, false
		}
		return nodes[i], true
	}
	inner := nodes[slices.IndexFunc(nodes, func(w WalkNode) bool { return w.Level == 1 && w.Keys.Start > 0 })]
	leaf, ok := find(0, inner.Keys.Start)
	if !ok {
		t.Fatal("no leaf begins with its parent")
	}
	m.store.damage(leaf.Pointer)
	segment := inner.Places[0].Segment
	evacuation := Evacuation{Keys: []block.Index{inner.Keys.Start}, From: func(n uint32) bool { return n == segment }}
	var err error
	if m.root, m.pending, err = m.tree.Merge(m.root, nil, nil, 0, evacuation, m.usage); err != nil {
		t.Fatal(err)
	}
	have, nodes, _ := m.reach()
	if w, ok := find(1, inner.Keys.Start); !ok || w.Pointer == inner.Pointer {
		t.Errorf("the inner node of %v is still in segment %d", inner.Keys, segment)
	}
	if w, ok := find(0, leaf.Keys.Start); !ok || w.Pointer != leaf.Pointer {
		t.Error("the leaf that cannot be read was given up")
	}
	m.usage.diff(t, have)
}

func TestMergeModel(t *testing.T) {
	seed := disktest.Seed(t)
	for i, c := range []struct {
		name      string
		nodeSize  int
		blocks    int
		rounds    int
		cache     int64
		damage    bool
		budgetMax int
		blobMax   int
		heightMin uint8 // that the tree must have reached
	}{
		{"small nodes", 160, 8000, 20, 0, false, 20, 4, 4},
		{"small nodes, little cache, no budget", 200, 8000, 20, 4 << 10, false, 0, 32, 3},
		{"full-size nodes", NodeSizeMax, 30000, 10, 0, false, 2, 2, 2},
		{"damage", 200, 8000, 30, 1, true, 20, 8, 3},
		{"damage in a small tree", 256, 400, 100, 1, true, 2, 8, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			rand := rand.New(rand.NewPCG(seed, uint64(100+i)))
			heights := make(map[uint8]int)
			trimmed, lostBlocks, evacuated, highest := 0, 0, 0, uint8(0)
			tame := func() bool { return trimmed == 0 || lostBlocks == 0 || evacuated == 0 || highest < c.heightMin }
			// As often as asked for, and until it was wild enough.
			for run := 0; run < disktest.Scale(t) || run < 20 && tame(); run++ {
				m := newMapModel(t, rand, c.blocks, c.nodeSize, TreeOptions{CacheBytes: c.cache})
				m.maker.blobMax = c.blobMax
				m.stream(0, c.blocks)
				type snapshot struct {
					root    Root
					pending *RangeSet
					cells   mapCells
				}
				var old snapshot
				for round := range c.rounds {
					for range 1 + rand.IntN(8) {
						m.change()
					}
					if c.damage && rand.IntN(2) == 0 {
						m.hurt()
					}
					for range 5 {
						start := block.Index(rand.IntN(c.blocks - 300))
						m.check(fmt.Sprint("before merge ", round), rng(start, start+300))
					}
					m.merge(rand.IntN(c.budgetMax + 1))
					m.check(fmt.Sprint("after merge ", round), m.all())
					heights[m.root.Height]++
					highest = max(highest, m.root.Height)
					trimmed += m.pending.Len()
					evacuated += m.evacuated
					m.evacuated = 0
					for _, cell := range m.cells {
						if cell.kind == Lost {
							lostBlocks++
						}
					}
					if c.damage {
						continue
					}
					if old.cells != nil {
						compose(t, m.tree, old.root, old.pending, NewOverlay(), m.all(), m.got).diff(t, "an older root", old.cells, m.all())
					}
					if rand.IntN(4) == 0 {
						old = snapshot{m.root, m.pending, slices.Clone(m.cells)}
					}
				}
				// In the end all trims are worked off, and then all the rest.
				m.merge(math.MaxInt)
				m.check("all worked off", m.all())
				if m.pending.Len() != 0 {
					t.Fatalf("%d trims are pending with no bound", m.pending.Len())
				}
				m.insert(holeExtent(0, block.Index(c.blocks)))
				m.merge(0)
				m.check("all trimmed", m.all())
				m.merge(math.MaxInt)
				m.check("all dropped", m.all())
				if m.root != (Root{}) || m.pending.Len() != 0 {
					t.Fatalf("an empty map has the root %+v and %d pending trims", m.root, m.pending.Len())
				}
				m.usage.diff(t, m.leaked)
			}
			t.Logf("merges by height %v, %d pending trims, %d lost blocks, %d nodes evacuated in all", heights, trimmed, lostBlocks, evacuated)
			if tame() {
				t.Errorf("the run was too tame: %d pending trims, %d lost blocks, %d nodes evacuated, height %d", trimmed, lostBlocks, evacuated, highest)
			}
		})
	}
}

// A trim of everything takes no more than the budget at each merge, is seen at
// once, and hides nothing that was written later.
func TestMergeBigTrim(t *testing.T) {
	const n, budget = 50000, 7
	tree, store, root := bulkTree(t, n, 1, true)
	usage, start := newUsageTotals(), newUsageTotals()
	if err := tree.Walk(root, func(w WalkNode) error { start.Node(w.Pointer, 1); return nil },
		func(e Extent) error { start.Extent(e, 1); return nil }); err != nil {
		t.Fatal(err)
	}
	usage.addAll(start)
	tree = NewTree(store, TreeOptions{CacheBytes: 1}) // count every read
	overlay := NewOverlay()
	overlay.Insert(holeExtent(0, 1<<32))
	written := dataExtent(n*16, 99, 16)
	overlay.Insert(written)
	var pending *RangeSet
	merges := 0
	for ; merges == 0 || pending.Len() > 0; merges++ {
		reads := store.reads
		var err error
		if root, pending, err = tree.Merge(root, overlay, pending, budget, Evacuation{}, usage); err != nil {
			t.Fatal(err)
		}
		// One more for the leaf under the new data, two for coalescing; each leaf
		// may come with inner nodes.
		if reads = store.reads - reads; reads > budget+3+2*int(root.Height) {
			t.Fatalf("merge %d read %d nodes, the budget is %d leaves", merges, reads, budget)
		}
		found := 0
		if err := tree.Lookup(root, rng(0, n*32), func(e Extent) error {
			if !pending.Covers(e.Range()) {
				if found++; e != written {
					return fmt.Errorf("%+v is neither trimmed nor new", e)
				}
			} else if e.Range().Overlaps(written.Range()) {
				return errors.New("an older trim hides newer data")
			}
			return nil
		}); err != nil || found != 1 {
			t.Fatalf("merge %d: found %d extents, %v", merges, found, err)
		}
		overlay = NewOverlay()
	}
	if merges < 10 {
		t.Errorf("all was done in %d merges", merges)
	}
	t.Logf("%d merges, %d nodes read", merges, store.reads)
	if root.Entries != 1 || root.Nodes != 1 || root.Height != 1 || root.Keys != written.Range() {
		t.Errorf("one extent is left in %+v", root)
	}
	want := newUsageTotals()
	want.Extent(written, 1)
	want.Node(root.Pointer, 1)
	usage.diff(t, want)
}

// Cost is that of the leaves that are touched.
func TestMergeIsLocal(t *testing.T) {
	tree, store, root := bulkTree(t, 20000, 5, false)
	for _, c := range []struct {
		name          string
		e             Extent
		writes, calls int
	}{
		{"overwrite", dataExtent(32*10000, 5, 16), int(root.Height), 2},
		{"write into a hole", dataExtent(32*10000+20, 5, 4), int(root.Height), 1},
		{"append", dataExtent(32*20000, 5, 4), int(root.Height), 1},
		{"trim one", holeExtent(32*10000, 32*10000+16), int(root.Height), 1},
		{"trim part of one", holeExtent(32*10000+3, 32*10000+5), int(root.Height), 1},
		{"trim a hole", holeExtent(32*10000+16, 32*10000+32), 0, 0},
		{"trim behind the end", holeExtent(32*20000, 1<<40), 0, 0},
		{"trim inside nothing but holes at the ends", holeExtent(32*10000-10, 32*10000), 0, 0},
	} {
		o := NewOverlay()
		o.Insert(c.e)
		usage := newUsageTotals()
		writes := store.writes
		next, left, err := tree.Merge(root, o, nil, 0, Evacuation{}, usage)
		if err != nil {
			t.Fatal(err)
		}
		if store.writes-writes > c.writes+1 || store.writes-writes < c.writes || usage.calls != c.calls || left.Len() != 0 {
			t.Errorf("%s: %d nodes written, %d calls of usage, %d trims left, expected %d, %d and 0",
				c.name, store.writes-writes, usage.calls, left.Len(), c.writes, c.calls)
		}
		if c.writes == 0 && next != root {
			t.Errorf("%s: a new root", c.name)
		}
	}
	// Nothing to do is nothing done.
	reads := store.reads
	if next, left, err := tree.Merge(root, nil, nil, 100, Evacuation{}, newUsageTotals()); err != nil || next != root || left.Len() != 0 || store.reads != reads {
		t.Errorf("a merge of nothing: %+v, %v", next, err)
	}
	if next, left, err := tree.Merge(Root{}, nil, nil, 100, Evacuation{}, newUsageTotals()); err != nil || next != (Root{}) || left.Len() != 0 {
		t.Errorf("a merge of nothing into nothing: %+v, %v", next, err)
	}
}

// Leaves that were thinned out are put together, so that a tree that shrank is
// not slower than one that never was large.
func TestMergeCoalesces(t *testing.T) {
	const n = 20000
	for _, oneByOne := range []bool{false, true} {
		tree, _, root := bulkTree(t, n, 1, true)
		nodes := root.Nodes
		overlay := NewOverlay()
		var err error
		for i := range n {
			if i%16 != 0 {
				overlay.Insert(holeExtent(block.Index(i)*32, block.Index(i+1)*32))
			}
			if i == n-1 || oneByOne && i%500 == 0 {
				if root, _, err = tree.Merge(root, overlay, nil, 0, Evacuation{}, newUsageTotals()); err != nil {
					t.Fatal(err)
				}
				overlay = NewOverlay()
			}
		}
		t.Logf("merged in steps: %v; %d nodes of %d are left for a sixteenth of the extents", oneByOne, root.Nodes, nodes)
		if root.Entries != n/16 || root.Nodes > nodes/5 {
			t.Errorf("%d nodes of %d are left for %d extents", root.Nodes, nodes, root.Entries)
		}
	}
}

// The memory of a merge does not grow with what is merged.
func TestMergeStreams(t *testing.T) {
	overlay := NewOverlay()
	maker := blobMaker{rand: rand.New(rand.NewPCG(1, 1))}
	const n = 50000
	for i := range n {
		overlay.Insert(maker.extent(block.Index(i) * 40))
	}
	store := newMemNodes()
	root := Root{}
	for range 2 { // into an empty tree, and over all of a full one
		m := &merger{t: NewTree(store, TreeOptions{}), changes: overlay, pending: NewRangeSet(), usage: nopUsage{}, left: NewRangeSet(), touched: true}
		var err error
		if root.Height == 0 {
			err = m.apply(&survivors{m: m}, rng(0, keyEnd))
		} else {
			err = m.visit(root.Height-1, root.child(), rng(0, keyEnd))
		}
		if err != nil {
			t.Fatal(err)
		}
		if root, err = m.finish(root); err != nil {
			t.Fatal(err)
		}
		if root.Entries != n {
			t.Fatalf("%d extents, expected %d", root.Entries, n)
		}
		if c := cap(m.leaves.items); c > 4*NodeSizeMax/8 {
			t.Errorf("%d extents were held at once", c)
		}
		for i, b := range m.inner {
			if c := cap(b.items); c > 4*NodeSizeMax/12 {
				t.Errorf("%d children were held at once at level %d", c, i+1)
			}
		}
		if len(m.path) != 0 || len(m.inner) > int(root.Height) {
			t.Errorf("%d frames, %d levels", len(m.path), len(m.inner))
		}
	}
}

// Errors that say nothing of the data end a merge without a root.
func TestMergeFails(t *testing.T) {
	tree, store, root := bulkTree(t, 5000, 1, true)
	overlay := NewOverlay()
	for i := range 5000 {
		overlay.Insert(dataExtent(block.Index(i)*32+16, uint32(i)*4, 4))
	}
	store.failRead = io.ErrUnexpectedEOF
	if r, left, err := NewTree(store, TreeOptions{}).Merge(root, overlay, nil, 0, Evacuation{}, nopUsage{}); !errors.Is(err, io.ErrUnexpectedEOF) || r != (Root{}) || left != nil {
		t.Errorf("failed read: %+v, %v", r, err)
	}
	store.failRead = nil
	want := 0
	for fail := 1; ; fail++ {
		store.failAt = store.writes + fail
		r, _, err := tree.Merge(root, overlay, nil, 0, Evacuation{}, nopUsage{})
		if err == nil {
			if fail == 1 || r.Entries != 10000 {
				t.Errorf("%d writes, %d extents", fail-1, r.Entries)
			}
			break
		}
		if !errors.Is(err, io.ErrShortWrite) || r != (Root{}) {
			t.Fatalf("failed write %d: %+v, %v", fail, r, err)
		}
		want++
	}
	if want == 0 {
		t.Error("no write ever failed")
	}
	// The old root is as it was.
	n := 0
	if err := tree.Lookup(root, rng(0, keyEnd), func(e Extent) error { n++; return nil }); err != nil || n != 5000 {
		t.Errorf("%d extents, %v", n, err)
	}
}

// Nodes that a merge writes in place of cached ones are cached, so a checkpoint
// does not slow down the reads after it; others are not.
func TestMergeKeepsCacheWarm(t *testing.T) {
	_, store, root := bulkTree(t, 50000, 1, true)
	tree := NewTree(store, TreeOptions{})
	look := func(i block.Index) int {
		reads := store.reads
		if err := tree.Lookup(root, rng(i*32, i*32+16), func(Extent) error { return nil }); err != nil {
			t.Fatal(err)
		}
		return store.reads - reads
	}
	if look(100) != int(root.Height) {
		t.Fatal("the cache was warm")
	}
	o := NewOverlay()
	o.Insert(dataExtent(100*32, 1, 16))
	o.Insert(dataExtent(40000*32, 1, 16))
	var err error
	if root, _, err = tree.Merge(root, o, nil, 0, Evacuation{}, nopUsage{}); err != nil {
		t.Fatal(err)
	}
	if n := look(100); n != 0 {
		t.Errorf("%d reads after a merge of what was cached", n)
	}
	if n := look(40000); n != 1 {
		t.Errorf("%d reads of a leaf that was not", n)
	}
}
