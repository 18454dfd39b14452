package extents

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// A NodeStore keeps the nodes of a Tree. Its methods may be called concurrently.
type NodeStore interface {
	// ReadNode returns the bytes that p leads to, their checksum verified, from
	// the second copy if the first is damaged. The caller may keep them; nobody
	// may change them. The error wraps ErrCorrupt if no copy is whole, and
	// ErrUnreadable if the medium has a bad place there, which has been tried
	// more than once; any other says nothing of the node. What WriteNode wrote
	// can be read at once.
	ReadNode(p Pointer) ([]byte, error)

	// WriteNode appends a node of this level to the log, Copies(level) times,
	// and returns where it is. data is borrowed until the call returns. The
	// nodes of a new root must be synced before anything durable leads to it.
	WriteNode(level uint8, data []byte) (Pointer, error)
}

// TreeOptions are the settings of a Tree. The zero value is ready for use.
type TreeOptions struct {
	// CacheBytes limits the memory of cached nodes, in bytes, which is about 15
	// for each extent. Default 32 MiB.
	CacheBytes int64
}

// A Tree is the stored part of the map: a paged B+tree of extents, each state of
// which is a Root. Nodes are never changed; Merge makes a new root that shares
// all nodes that did not change with the old one, and old roots go on being
// readable for as long as the store keeps their nodes.
//
// Invariants:
//
//  1. A node answers for a range of blocks, exactly from its first entry to its
//     last; blocks that no node answers for are holes.
//  2. The extents of a leaf, and the children of an inner node, are ordered and
//     do not overlap.
//  3. No node is empty; a tree without extents has no nodes.
//  4. The root has more than one child, unless it is a leaf.
//
// All methods may be called concurrently. They read, and Merge writes, the
// NodeStore; no lock is held meanwhile.
type Tree struct {
	nodes NodeStore
	cache *cache

	// nodeSize is NodeSizeMax, and less in tests that want many levels.
	nodeSize int

	reads, writes, unreadable atomic.Uint64
}

// NewTree returns a Tree over what is in nodes.
func NewTree(nodes NodeStore, opts TreeOptions) *Tree {
	if opts.CacheBytes == 0 {
		opts.CacheBytes = 32 << 20
	}
	return &Tree{nodes: nodes, cache: newCache(opts.CacheBytes), nodeSize: NodeSizeMax}
}

// TreeMetrics are counters of a Tree since it was made, and gauges of its cache.
type TreeMetrics struct {
	NodesRead       uint64 // calls of ReadNode
	NodesWritten    uint64 // calls of WriteNode
	NodesUnreadable uint64 // times that a node was found corrupt or unreadable
	CacheHits       uint64 // lookups of nodes that read nothing
	CacheMisses     uint64
	CacheNodes      int
	CacheBytes      int64 // of at most CacheBytesMax
	CacheBytesMax   int64
}

// Metrics returns a snapshot.
func (t *Tree) Metrics() TreeMetrics {
	m := TreeMetrics{
		NodesRead:       t.reads.Load(),
		NodesWritten:    t.writes.Load(),
		NodesUnreadable: t.unreadable.Load(),
		CacheBytesMax:   t.cache.bytesMax,
	}
	mu := &t.cache.mu
	mu.Lock()
	defer mu.Unlock()
	m.CacheHits, m.CacheMisses = mu.hits, mu.misses
	m.CacheNodes, m.CacheBytes = mu.nodes, mu.bytes
	return m
}

// Lookup visits the extents of root that have blocks in r, clipped to r,
// ascending; gaps are holes. What an unreadable node answers for is visited as
// one extent of kind Lost. It blocks for I/O where nodes are not cached. The
// error is the first one of visit, or of the store if it says nothing of the node;
// either ends the lookup. visit may call Lookup.
func (t *Tree) Lookup(root Root, r block.Range, visit func(Extent) error) error {
	if root.Height == 0 || !root.Keys.Overlaps(r) {
		return nil
	}
	return t.lookup(root.Height-1, root.child(), r, visit)
}

func (t *Tree) lookup(level uint8, c child, r block.Range, visit func(Extent) error) error {
	n, err := t.load(level, c)
	if isLost(err) {
		return visit(lost(c.keys.Intersect(r)))
	} else if err != nil {
		return err
	}
	at, i := n.seek(r.Start)
	for ; i < n.count && at.end < r.End; i++ {
		if level == 0 {
			if e := n.extent(&at); e.Range().Overlaps(r) {
				if err := visit(e.Clip(r)); err != nil {
					return err
				}
			}
		} else if c := n.child(&at); c.keys.Overlaps(r) {
			if err := t.lookup(level-1, c, r, visit); err != nil {
				return err
			}
		}
	}
	return nil
}

// lost is the extent that says that r is lost.
func lost(r block.Range) Extent { return Extent{Start: r.Start, Count: r.Len(), Kind: Lost} }

// Locate returns where the node of this level is that answers for block i. ok is
// false if there is none, or if a node above it is unreadable; err is as of
// Lookup. It blocks for I/O where nodes are not cached.
func (t *Tree) Locate(root Root, level uint8, i block.Index) (p Pointer, ok bool, err error) {
	if level >= root.Height {
		return p, false, nil
	}
	c := root.child()
	for at := root.Height - 1; ; at-- {
		if i < c.keys.Start || i >= c.keys.End {
			return p, false, nil
		}
		if at == level {
			return c.Pointer, true, nil
		}
		n, err := t.load(at, c)
		if isLost(err) {
			return p, false, nil
		} else if err != nil {
			return p, false, err
		}
		cur, k := n.seek(i)
		found := false
		for ; k < n.count && cur.end <= i && !found; k++ {
			c = n.child(&cur)
			found = c.keys.End > i
		}
		if !found {
			return p, false, nil
		}
	}
}

// NodeKey returns the level of the node whose stored form data is, and the first
// block that it answers for. It looks at no more than that; ok is false if data
// is no node.
func NodeKey(data []byte) (level uint8, first block.Index, ok bool) {
	if len(data) <= nodeHeaderSize || string(data[:4]) != nodeMagic || data[4] != nodeVersion {
		return 0, 0, false
	}
	return data[5], block.Index(binary.LittleEndian.Uint64(data[8:])), true
}

// A WalkNode is a node as Walk found it.
type WalkNode struct {
	Pointer
	Level   uint8       // 0 is a leaf
	Keys    block.Range // that it answers for
	Entries int         // extents or children; 0 if it is unreadable
	Err     error       // why it is unreadable, or nil
}

// Walk visits each node of root, a node before what is in it, and each extent,
// all ascending. It reads every node from the store, whatever is cached, and
// leaves the cache alone. What is below an unreadable node is not visited. An
// error of node or extent ends the walk and is returned; there is no other.
func (t *Tree) Walk(root Root, node func(WalkNode) error, extent func(Extent) error) error {
	return t.WalkFrom(root, 0, node, extent)
}

// WalkFrom is Walk without the nodes whose last block is before from, and what is
// in them.
func (t *Tree) WalkFrom(root Root, from block.Index, node func(WalkNode) error, extent func(Extent) error) error {
	if root.Height == 0 {
		return nil
	}
	return t.walk(root.Height-1, root.child(), from, node, extent)
}

func (t *Tree) walk(level uint8, c child, from block.Index, node func(WalkNode) error, extent func(Extent) error) error {
	if c.keys.End <= from {
		return nil
	}
	w := WalkNode{Pointer: c.Pointer, Level: level, Keys: c.keys}
	n, err := t.read(level, c)
	if err != nil {
		w.Err = err
		return node(w)
	}
	w.Entries = n.count
	if err := node(w); err != nil {
		return err
	}
	at := n.first()
	for range n.count {
		if level == 0 {
			err = extent(n.extent(&at))
		} else {
			err = t.walk(level-1, n.child(&at), from, node, extent)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// load returns the node that c leads to, from the cache or into it. Of several
// that want it at once, one reads it.
func (t *Tree) load(level uint8, c child) (*node, error) {
	e, load := t.cache.acquire(c.Places[0])
	if load {
		n, err := t.read(level, c)
		t.cache.loaded(e, n, err)
		return n, err
	}
	n, err := e.wait()
	if err == nil && (n.level != level || n.keys != c.keys) {
		return nil, t.mismatch(level, c, n)
	}
	return n, err
}

// peek returns the node that c leads to without a trace in the cache, and
// whether it was there.
func (t *Tree) peek(level uint8, c child) (n *node, cached bool, err error) {
	if n := t.cache.peek(c.Places[0]); n != nil && n.level == level && n.keys == c.keys {
		return n, true, nil
	}
	n, err = t.read(level, c)
	return n, false, err
}

// read reads the node that c leads to from the store.
func (t *Tree) read(level uint8, c child) (*node, error) {
	t.reads.Add(1)
	data, err := t.nodes.ReadNode(c.Pointer)
	var n *node
	if err == nil && len(data) != int(c.Length) {
		err = corruptf("node: expected %d bytes, found %d", c.Length, len(data))
	}
	if err == nil {
		n, err = decodeNode(data)
	}
	if err == nil && (n.level != level || n.keys != c.keys) {
		return nil, t.mismatch(level, c, n)
	}
	if err != nil {
		if isLost(err) {
			t.unreadable.Add(1)
		}
		return nil, fmt.Errorf("extents: read map node at segment %d offset %d: %w",
			c.Places[0].Segment, c.Places[0].Offset, err)
	}
	return n, nil
}

// mismatch is the error for a node that is well-formed but not the one that its
// parent means.
func (t *Tree) mismatch(level uint8, c child, n *node) error {
	t.unreadable.Add(1)
	return corruptf("extents: map node at segment %d offset %d: expected level %d for %v, found level %d for %v",
		c.Places[0].Segment, c.Places[0].Offset, level, c.keys, n.level, n.keys)
}

// write stores the node of this level with these entries. data is its encoded
// form. If hot, the node is entered in the cache.
func (t *Tree) write(level uint8, data []byte, hot bool) (Pointer, error) {
	t.writes.Add(1)
	p, err := t.nodes.WriteNode(level, data)
	if err != nil {
		return p, fmt.Errorf("extents: write map node: %w", err)
	}
	wrong := checkPointer(p, level)
	invariants.Assertf(wrong == "" && int(p.Length) == len(data), "node store returned %+v for %d bytes of level %d: %s",
		p, len(data), level, wrong)
	if hot || invariants.Enabled {
		n, err := decodeNode(append(make([]byte, 0, len(data)), data...))
		if err != nil {
			panic("extents: wrote " + err.Error())
		}
		if hot {
			t.cache.put(p.Places[0], n)
		}
	}
	return p, nil
}
