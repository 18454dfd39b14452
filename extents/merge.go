package extents

import (
	"errors"
	"slices"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// Usage is told what a Merge changes in what the tree refers to, so that the
// store can keep its accounts of live blocks, bytes and nodes.
type Usage interface {
	// Extent adds delta (1 or -1) times the Count and LiveBytes of e, an extent
	// of kind Data or a part of one. What stays as it was is not told; what is
	// dropped and entered again may be.
	Extent(e Extent, delta int)
	// Node adds delta (1 or -1) times the bytes of a node, at each of its places.
	Node(p Pointer, delta int)
}

// An Evacuation names nodes that Merge shall write to new places although
// nothing in them has changed, so that the old places become free.
type Evacuation struct {
	// Keys are blocks, ascending, below which such nodes may be: the first
	// blocks of their ranges.
	Keys []block.Index
	// From tells whether a segment is to be left. It is called for the nodes on
	// the way to each of Keys. It must not be nil if there are Keys.
	From func(segment uint32) bool
}

// Merge makes the tree of a checkpoint: root, with changes entered over it, and
// with the trims of changes and of pending applied. pending is older than
// changes and hides what it covers of root; so the caller, too, asks changes
// first, then pending, then root. Both may be nil, and are only read.
//
// Data and Lost extents of changes, and holes that end inside a leaf, are worked
// off here, at the cost of the leaves that they touch. A leaf that holes and
// pending cover whole can take as long to drop as it took to write; of these at
// most leafBudget are worked off. What is left is returned: it is pending for
// the new root. It covers only blocks of leaves that Merge did not touch, never
// any of an extent of changes.
//
// A node that is found corrupt or unreadable becomes a Lost extent, over which
// changes are entered; but more than lostNodesMax of them that are unreadable end
// the merge: it is the disk that is failing, and what it holds may come back. Usage is not told that the node or what was in it is gone: nobody
// knows what it was. Any other error ends the merge; then there is no new root,
// what usage was told is void, and what was written is garbage.
//
// Nodes that evacuation names are written anew, with all those above them.
//
// New nodes are written children before parents. Memory is bounded by a few
// nodes for each level, and by the trims that are left.
func (t *Tree) Merge(root Root, changes *Overlay, pending *RangeSet, leafBudget int, evacuation Evacuation, usage Usage) (Root, *RangeSet, error) {
	if changes == nil {
		changes = NewOverlay()
	}
	if pending == nil {
		pending = NewRangeSet()
	}
	m := &merger{t: t, changes: changes, pending: pending, budget: leafBudget, evacuation: evacuation, usage: usage, left: NewRangeSet()}
	all := block.Range{End: keyEnd}
	var err error
	if root.Height == 0 {
		m.touched = true
		err = m.apply(&survivors{m: m}, all)
	} else {
		err = m.visit(root.Height-1, root.child(), all)
	}
	if err != nil {
		return Root{}, nil, err
	}
	if !m.touched {
		return root, m.left, nil
	}
	next, err := m.finish(root)
	if err != nil {
		return Root{}, nil, err
	}
	return next, m.left, nil
}

// A merger is one Merge. It goes down the old tree in order, into the children
// that changes or trims concern, and lets the new tree grow beside it, level by
// level, from what it keeps, copies and enters.
//
// Each child has a route: the range of blocks for which changes go to it, its
// own and the hole behind it up to the next child.
type merger struct {
	t       *Tree
	changes *Overlay
	pending *RangeSet
	budget  int
	usage   Usage

	evacuation Evacuation

	// left is what will be pending: the trims of the children that were kept.
	left *RangeSet

	// path is the inner nodes, from the root down, that the merger is in.
	path []frame
	// touched is set with the first thing that changes.
	touched bool

	// The nodes of the new tree that are being filled: leaves, and inner[i] of
	// level i+1. What is in a lower level comes after all of a higher one.
	leaves builder[Extent]
	inner  []*builder[child]
	buf    []byte // for encoding

	entries, nodes int64 // how many more than in the old tree
	lost           int   // nodes given up
}

// lostNodesMax is how many unreadable nodes one merge gives up at most: those of
// about 2 MiB of bad sectors.
const lostNodesMax = 256

// A frame is an inner node of the old tree that the merger is in. It is not
// dirty, and can be kept as it is, as long as all of its children are.
type frame struct {
	level uint8
	self  child
	node  *node
	hot   bool
	kept  int // children that were kept while it was not dirty
	dirty bool
}

// visit works off what concerns the child c of this level.
func (m *merger) visit(level uint8, c child, route block.Range) error {
	changed := m.changed(level, c.keys, route)
	if !changed && !m.evacuating(route) {
		m.leave(c.keys)
		return m.keep(level, c)
	}
	n, hot, err := m.t.peek(level, c)
	switch {
	case isLost(err) && !changed:
		// It was only to be moved: whoever reads it later may have more luck.
		// Those above it can still leave their places.
		if m.evacuatesAbove(route) {
			if err := m.touch(); err != nil {
				return err
			}
		}
		m.leave(c.keys)
		return m.keep(level, c)
	case isLost(err):
		if m.lost++; m.lost > lostNodesMax && errors.Is(err, ErrUnreadable) {
			return err
		}
		if err := m.touch(); err != nil {
			return err
		}
		return m.apply(&survivors{m: m, rest: lost(c.keys)}, route)
	case err != nil:
		return err
	case level > 0:
		return m.visitChildren(frame{level: level, self: c, node: n, hot: hot}, route)
	case !m.alters(n, route) && !m.evacuatesAbove(route) && !(m.evacuating(route) && m.evacuates(c.Pointer)):
		return m.keep(level, c)
	}
	if err := m.touch(); err != nil {
		return err
	}
	m.replaced(c, n)
	m.leaves.hot = m.leaves.hot || hot
	return m.apply(&survivors{m: m, node: n, at: n.first()}, route)
}

// visitChildren visits the children of an inner node.
func (m *merger) visitChildren(f frame, route block.Range) error {
	m.path = append(m.path, f)
	at := f.node.first()
	next := m.concern(route.Start)
	for i, c := 0, f.node.child(&at); i < f.node.count; i++ {
		r := block.Range{Start: c.keys.Start, End: route.End}
		if i == 0 {
			r.Start = route.Start
		}
		var sibling child
		if i+1 < f.node.count {
			sibling = f.node.child(&at)
			r.End = sibling.keys.Start
		}
		var err error
		if r.End <= next {
			err = m.keep(f.level-1, c)
		} else {
			err = m.visit(f.level-1, c, r)
			next = m.concern(r.End)
		}
		if err != nil {
			return err
		}
		c = sibling
	}
	f = m.path[len(m.path)-1]
	m.path = m.path[:len(m.path)-1]
	if !f.dirty {
		return m.keep(f.level, f.self)
	}
	return m.settle(f.level)
}

// concern is the first block at or after i that changes or pending say
// something of.
func (m *merger) concern(i block.Index) block.Index {
	first := keyEnd
	if e, ok := m.changes.after(i); ok {
		first = e.Start
	}
	if r, ok := m.pending.after(i); ok {
		first = min(first, r.Start)
	}
	if k, ok := m.evacuation.after(i); ok {
		first = min(first, k)
	}
	return max(first, i)
}

// after is the first key at or behind block i.
func (e *Evacuation) after(i block.Index) (block.Index, bool) {
	n, _ := slices.BinarySearch(e.Keys, i)
	if n == len(e.Keys) {
		return 0, false
	}
	return e.Keys[n], true
}

// evacuating reports whether a node below route may have to leave its place.
func (m *merger) evacuating(route block.Range) bool {
	k, ok := m.evacuation.after(route.Start)
	return ok && k < route.End
}

// evacuates reports whether a node at p has to leave its place.
func (m *merger) evacuates(p Pointer) bool {
	for _, at := range p.Places[:p.Copies] {
		if m.evacuation.From(at.Segment) {
			return true
		}
	}
	return false
}

// evacuatesAbove reports whether a node above route that would otherwise be
// kept has to leave its place. Touching it does that for all those above.
func (m *merger) evacuatesAbove(route block.Range) bool {
	return m.evacuating(route) && slices.ContainsFunc(m.path, func(f frame) bool {
		return !f.dirty && m.evacuates(f.self.Pointer)
	})
}

// changed reports whether the node of this level and range has to be read,
// for changes that cannot wait or for trims that the budget allows for.
func (m *merger) changed(level uint8, keys, route block.Range) bool {
	must, trimmed := false, false
	m.changes.Ascend(route.Start, func(e Extent) bool {
		if e.Start >= route.End {
			return false
		}
		switch r := e.Range(); {
		case e.Kind != Hole:
			must = true
		case r.Covers(keys):
			trimmed = true
		case r.Overlaps(keys):
			must = true
		}
		return !must
	})
	if must {
		return true
	}
	if m.budget <= 0 || !trimmed && !m.pending.Overlaps(keys) {
		return false
	}
	if level == 0 {
		m.budget--
	}
	return true
}

// alters reports whether anything has to be done to the leaf n.
func (m *merger) alters(n *node, route block.Range) (alters bool) {
	m.changes.Ascend(route.Start, func(e Extent) bool {
		if e.Start >= route.End {
			return false
		}
		alters = e.Kind != Hole || n.overlaps(e.Range())
		return !alters
	})
	if !alters {
		m.pending.Visit(n.keys, func(r block.Range) { alters = alters || n.overlaps(r) })
	}
	return alters
}

// leave leaves the trims of keys, whose node is kept unread, for later. A hole
// of changes covers all of keys or none: see changed.
func (m *merger) leave(keys block.Range) {
	if e, ok := m.changes.after(keys.Start); ok && e.Range().Covers(keys) {
		m.left.Add(keys)
		return
	}
	m.pending.Visit(keys, m.left.Add)
}

// keep takes the old node c into the new tree as it is.
func (m *merger) keep(level uint8, c child) error {
	if len(m.path) == 0 {
		return nil
	}
	if f := &m.path[len(m.path)-1]; !f.dirty {
		f.kept++
		return nil
	}
	return m.addKept(level, c)
}

// touch is called before the first change below the inner nodes of the path.
// It makes them dirty: they will be written anew, so their children are taken
// one by one, beginning with those that were already kept.
func (m *merger) touch() error {
	m.touched = true
	for i := range m.path {
		f := &m.path[i]
		if f.dirty {
			continue
		}
		f.dirty = true
		m.replaced(f.self, f.node)
		b := m.builder(f.level)
		b.hot = b.hot || f.hot
		at := f.node.first()
		for range f.kept {
			if err := m.addKept(f.level-1, f.node.child(&at)); err != nil {
				return err
			}
		}
	}
	return nil
}

// replaced accounts for an old node that is not in the new tree.
func (m *merger) replaced(c child, n *node) {
	m.usage.Node(c.Pointer, -1)
	m.nodes--
	if n.level == 0 {
		m.entries -= int64(n.count)
	}
}

// apply enters the changes of route over what is left of the old extents there.
// A change belongs to the route that it begins in and is entered whole; to the
// routes that it reaches into it is a hole, so that it is not split for nothing.
func (m *merger) apply(old *survivors, route block.Range) (err error) {
	old.next()
	m.changes.Ascend(route.Start, func(e Extent) bool {
		r := e.Range()
		if r.Start >= route.End {
			return false
		}
		for old.ok && old.cur.Start < r.Start && err == nil {
			end := old.cur.Range().End
			if end <= r.Start {
				err = m.addExtent(old.cur, false)
				old.next()
				continue
			}
			err = m.addExtent(old.cur.Clip(block.Range{Start: old.cur.Start, End: r.Start}), false)
			old.cur = old.cur.Clip(block.Range{Start: r.Start, End: end})
		}
		for old.ok && old.cur.Start < r.End {
			m.drop(old.cur.Clip(r))
			if end := old.cur.Range().End; end > r.End {
				old.cur = old.cur.Clip(block.Range{Start: r.End, End: end})
			} else {
				old.next()
			}
		}
		if err == nil && e.Kind != Hole && r.Start >= route.Start {
			if e.Kind == Data {
				m.usage.Extent(e, 1)
			}
			err = m.addExtent(e, true)
		}
		return err == nil
	})
	for old.ok && err == nil {
		err = m.addExtent(old.cur, false)
		old.next()
	}
	if err != nil {
		return err
	}
	return m.settle(0)
}

// drop accounts for an old extent that is not in the new tree.
func (m *merger) drop(e Extent) {
	if e.Kind == Data {
		m.usage.Extent(e, -1)
	}
}

// survivors are the extents of an old leaf, or the one that stands for an
// unreadable node, as the pending trims leave them; what they take is dropped.
type survivors struct {
	m    *merger
	node *node
	at   cursor
	i    int         // entries of node that were decoded
	rest Extent      // of the last one; none if its Count is 0
	trim block.Range // the first of pending that reaches into or past rest

	cur Extent // what next found
	ok  bool   // whether it did
}

// next moves on to the next extent, or part of one, that survives.
func (s *survivors) next() {
	for {
		if s.rest.Count == 0 {
			if s.node == nil || s.i == s.node.count {
				s.ok = false
				return
			}
			s.rest = s.node.extent(&s.at)
			s.i++
		}
		r := s.rest.Range()
		if s.trim.End <= r.Start {
			var ok bool
			if s.trim, ok = s.m.pending.after(r.Start); !ok {
				s.trim = block.Range{Start: keyEnd, End: keyEnd}
			}
		}
		switch {
		case s.trim.Start >= r.End:
			s.cur, s.ok, s.rest.Count = s.rest, true, 0
			return
		case s.trim.Start > r.Start:
			s.cur, s.ok = s.rest.Clip(block.Range{Start: r.Start, End: s.trim.Start}), true
			s.rest = s.rest.Clip(block.Range{Start: s.trim.Start, End: r.End})
			return
		case s.trim.End >= r.End:
			s.m.drop(s.rest)
			s.rest.Count = 0
		default:
			s.m.drop(s.rest.Clip(s.trim))
			s.rest = s.rest.Clip(block.Range{Start: s.trim.End, End: r.End})
		}
	}
}

// finish writes what is still being filled and returns the new root.
func (m *merger) finish(old Root) (Root, error) {
	if err := m.flush(0); err != nil {
		return Root{}, err
	}
	for i := 0; i < len(m.inner); i++ {
		b := m.inner[i]
		higher := false
		for _, h := range m.inner[i+1:] {
			higher = higher || len(h.items) > 0
		}
		if len(b.items) == 1 && !higher {
			return m.root(old, b)
		}
		if err := m.flush(b.level); err != nil {
			return Root{}, err
		}
	}
	return Root{}, nil // nothing was written
}

// root makes the only entry of b the new root: the highest node that is of use.
func (m *merger) root(old Root, b *builder[child]) (Root, error) {
	c, level := b.items[0], b.level-1
	// A node of the old tree may have had one child among its siblings. (New
	// nodes are never written so unless they have siblings.)
	for kept := !b.notes[0].fresh; kept && level > 0 && c != old.child(); level-- {
		n, _, err := m.t.peek(level, c)
		if err != nil && !isLost(err) {
			return Root{}, err
		}
		if err != nil || n.count > 1 {
			break
		}
		m.replaced(c, n)
		at := n.first()
		c = n.child(&at)
	}
	return Root{
		Pointer: c.Pointer,
		Height:  level + 1,
		Keys:    c.keys,
		Entries: uint64(int64(old.Entries) + m.entries),
		Nodes:   uint64(int64(old.Nodes) + m.nodes),
	}, nil
}

// The rest of this file makes nodes of entries: how full they get, and which
// are taken together.
//
//   - A node that grows over its size is cut in two even halves; one that grows
//     much over it, into nodes that are full to three quarters.
//   - Where all that is cut off is new, it was written in sequence, and there is
//     nothing to be expected in between: the node is left full.
//   - A new node that is less than half full waits for what comes next. If that
//     is an old node that is kept, or there is one before, and both together
//     fill no more than three quarters, the old one is copied into it.

// A builder holds the entries for the next nodes of one level.
type builder[T entry[T]] struct {
	level uint8
	items []T
	notes []note // on each item
	bytes int    // of the node that items would make; 0 if there are none
	hot   bool   // a node that items came from was cached

	// What measure encodes an entry with, which would be allocated each time.
	at      cursor
	scratch [64]byte // an entry has less than 48 bytes
}

type note struct {
	size  uint8 // of the encoded item, behind the one before
	fresh bool  // the item is not of the old tree
}

// add appends e to the items.
func (b *builder[T]) add(e T, fresh bool) {
	last := len(b.items) - 1
	if last >= 0 {
		if both, ok := b.items[last].joined(e); ok {
			b.items[last] = both
			b.notes[last].fresh = b.notes[last].fresh && fresh
			b.measure(last)
			return
		}
	} else {
		b.bytes = nodeHeaderSize
	}
	b.items = append(b.items, e)
	b.notes = append(b.notes, note{fresh: fresh})
	b.measure(last + 1)
}

// measure brings the size of item i up to date.
func (b *builder[T]) measure(i int) {
	b.at = cursor{end: b.items[i].Range().Start}
	if i > 0 {
		b.items[i-1].after(&b.at)
	}
	size := len(b.items[i].put(b.scratch[:0], &b.at))
	b.bytes += size - int(b.notes[i].size)
	b.notes[i].size = uint8(size)
}

// remove takes the first n items away.
func (b *builder[T]) remove(n int) {
	for _, note := range b.notes[:n] {
		b.bytes -= int(note.size)
	}
	b.items = b.items[:copy(b.items, b.items[n:])]
	b.notes = b.notes[:copy(b.notes, b.notes[n:])]
	if len(b.items) > 0 {
		b.measure(0)
	} else {
		b.bytes = 0
	}
}

// pop takes the last item away.
func (b *builder[T]) pop() {
	last := len(b.items) - 1
	b.bytes -= int(b.notes[last].size)
	b.items, b.notes = b.items[:last], b.notes[:last]
	if last == 0 {
		b.bytes = 0
	}
}

// cut is the number of items for the next node, when there are too many for one
// of this size.
func (b *builder[T]) cut(size int) int {
	full := b.prefix(size)
	for i := len(b.notes) - 1; b.notes[i].fresh; i-- {
		if i < full {
			return full
		}
	}
	return b.prefix(min(size*3/4, (b.bytes+nodeHeaderSize)/2+1))
}

// prefix is the number of items, at least 1, that fit in a node of this size.
func (b *builder[T]) prefix(size int) int {
	n, bytes := 1, nodeHeaderSize+int(b.notes[0].size)
	for n < len(b.items) && bytes+int(b.notes[n].size) <= size {
		bytes += int(b.notes[n].size)
		n++
	}
	return n
}

// builder returns the builder of the inner nodes of this level.
func (m *merger) builder(level uint8) *builder[child] {
	for len(m.inner) < int(level) {
		m.inner = append(m.inner, &builder[child]{level: uint8(len(m.inner) + 1)})
	}
	return m.inner[level-1]
}

// bytes is the size of the node of this level that is being filled.
func (m *merger) bytes(level uint8) int {
	if level == 0 {
		return m.leaves.bytes
	}
	return m.builder(level).bytes
}

// addExtent adds an extent to the leaves.
func (m *merger) addExtent(e Extent, fresh bool) error {
	m.leaves.add(e, fresh)
	return spill(m, &m.leaves)
}

// addChild adds a node of the level below to the inner nodes of this level.
func (m *merger) addChild(level uint8, c child, fresh bool) error {
	b := m.builder(level)
	b.add(c, fresh)
	return spill(m, b)
}

// addKept adds an old node of this level to the one above, behind all that is
// being filled.
func (m *merger) addKept(level uint8, c child) error {
	for l := range level {
		if err := m.flush(l); err != nil {
			return err
		}
	}
	if absorbed, err := m.absorbNext(level, c); absorbed || err != nil {
		return err
	}
	if err := m.flush(level); err != nil {
		return err
	}
	return m.addChild(level+1, c, false)
}

// settle is called when all of an old node of this level is worked off. If what
// came of it makes a node on its own, that is written: so changes stay local.
func (m *merger) settle(level uint8) error {
	for l := range level {
		if m.bytes(l) > 0 {
			return nil // it belongs to the node, and is not in it yet
		}
	}
	if m.bytes(level) < m.t.nodeSize/2 {
		return nil
	}
	return m.flush(level)
}

// flush writes what is being filled of this level.
func (m *merger) flush(level uint8) error {
	if level == 0 {
		return flush(m, &m.leaves)
	}
	return flush(m, m.builder(level))
}

func flush[T entry[T]](m *merger, b *builder[T]) error {
	if len(b.items) == 0 {
		b.hot = false
		return nil
	}
	if err := absorbPrevious(m, b); err != nil {
		return err
	}
	for len(b.items) > 0 {
		n := len(b.items)
		if b.bytes > m.t.nodeSize {
			n = b.cut(m.t.nodeSize)
		}
		if err := emit(m, b, n); err != nil {
			return err
		}
	}
	b.hot = false
	return nil
}

// spill writes nodes while there is more than enough for one, which bounds the
// memory of b.
func spill[T entry[T]](m *merger, b *builder[T]) error {
	for b.bytes > m.t.nodeSize*3/2 {
		if err := emit(m, b, b.cut(m.t.nodeSize)); err != nil {
			return err
		}
	}
	return nil
}

// emit writes a node of the first n items of b.
func emit[T entry[T]](m *merger, b *builder[T], n int) error {
	items := b.items[:n]
	m.buf = encodeNode(m.buf[:0], b.level, items)
	invariants.Assertf(len(m.buf) <= m.t.nodeSize, "node of %d bytes", len(m.buf))
	p, err := m.t.write(b.level, m.buf, b.hot)
	if err != nil {
		return err
	}
	m.usage.Node(p, 1)
	m.nodes++
	if b.level == 0 {
		m.entries += int64(n)
	}
	c := child{block.Range{Start: items[0].Range().Start, End: items[n-1].Range().End}, p}
	b.remove(n)
	return m.addChild(b.level+1, c, true)
}

// fits reports whether the old node c and one of this many bytes are to be one.
func (m *merger) fits(c child, bytes int) bool {
	return bytes+int(c.Length)-nodeHeaderSize <= m.t.nodeSize*3/4
}

// absorbNext copies the old node c of this level into what is being filled, if
// that is little enough.
func (m *merger) absorbNext(level uint8, c child) (absorbed bool, err error) {
	bytes := m.bytes(level)
	if bytes == 0 || bytes >= m.t.nodeSize/2 || !m.fits(c, bytes) {
		return false, nil
	}
	n, hot, err := m.t.peek(level, c)
	if isLost(err) {
		return false, nil // it stays as it is until something has to be done to it
	} else if err != nil {
		return false, err
	}
	m.replaced(c, n)
	if level == 0 {
		copyEntries(&m.leaves, n, hot)
	} else {
		copyEntries(m.builder(level), n, hot)
	}
	return true, nil
}

// absorbPrevious copies the old node before what is being filled into it, if
// both are little enough.
func absorbPrevious[T entry[T]](m *merger, b *builder[T]) error {
	parent := m.builder(b.level + 1)
	last := len(parent.items) - 1
	if b.bytes >= m.t.nodeSize/2 || last < 0 || parent.notes[last].fresh || !m.fits(parent.items[last], b.bytes) {
		return nil
	}
	c := parent.items[last]
	n, hot, err := m.t.peek(b.level, c)
	if isLost(err) {
		return nil
	} else if err != nil {
		return err
	}
	parent.pop()
	m.replaced(c, n)
	items, notes := slices.Clone(b.items), slices.Clone(b.notes)
	b.remove(len(items))
	copyEntries(b, n, hot)
	for i, e := range items {
		b.add(e, notes[i].fresh)
	}
	return nil
}

// copyEntries adds the entries of the old node n.
func copyEntries[T entry[T]](b *builder[T], n *node, hot bool) {
	b.hot = b.hot || hot
	var e T
	at := n.first()
	for range n.count {
		e = e.take(n, &at)
		b.add(e, false)
	}
}
