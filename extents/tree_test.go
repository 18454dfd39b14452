package extents

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

// memNodes is a NodeStore in memory that can be damaged.
type memNodes struct {
	mu       sync.Mutex
	nodes    map[Place][]byte
	offset   uint32
	damaged  map[Place]bool
	pristine bool  // read damaged nodes as if they were whole
	failRead error // of every read
	failAt   int   // number of the write that fails, from 1
	writes   int
	reads    int
	readGate chan struct{} // if not nil, each read takes one
}

func newMemNodes() *memNodes {
	return &memNodes{nodes: make(map[Place][]byte), damaged: make(map[Place]bool)}
}

func (s *memNodes) ReadNode(p Pointer) ([]byte, error) {
	s.mu.Lock()
	s.reads++
	gate := s.readGate
	s.mu.Unlock()
	if gate != nil {
		<-gate
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failRead != nil {
		return nil, s.failRead
	}
	for _, place := range p.Places[:p.Copies] {
		if data, ok := s.nodes[place]; ok && len(data) == int(p.Length) && (s.pristine || !s.damaged[place]) {
			return data, nil
		}
	}
	why := ErrCorrupt
	if p.Places[0].Checksum&1 != 0 {
		why = ErrUnreadable
	}
	return nil, fmt.Errorf("no copy of %+v is whole: %w", p, why)
}

func (s *memNodes) WriteNode(level uint8, data []byte) (Pointer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writes++; s.writes == s.failAt {
		return Pointer{}, io.ErrShortWrite
	}
	p := Pointer{Copies: uint8(Copies(level)), Length: uint16(len(data))}
	data = append([]byte(nil), data...)
	for i := range p.Copies {
		p.Places[i] = Place{Segment: s.offset >> 14, Offset: s.offset & (1<<14 - 1), Checksum: crc32.ChecksumIEEE(data)}
		s.offset += uint32(len(data)) + 32
		s.nodes[p.Places[i]] = data
	}
	return p, nil
}

func (s *memNodes) damage(p Pointer) {
	for _, place := range p.Places[:p.Copies] {
		s.damaged[place] = true
	}
}

// usageTotals are what a Usage adds up: of each segment, and of the nodes.
type usageTotals struct {
	blocks, bytes map[uint32]int64
	nodes         map[Pointer]int
	calls         int
}

func newUsageTotals() *usageTotals {
	return &usageTotals{blocks: make(map[uint32]int64), bytes: make(map[uint32]int64), nodes: make(map[Pointer]int)}
}

func (u *usageTotals) Extent(e Extent, delta int) {
	if e.Kind != Data {
		panic("usage of an extent that is not data")
	}
	u.calls++
	add(u.blocks, e.Addr.Segment, int64(e.Count)*int64(delta))
	add(u.bytes, e.Addr.Segment, int64(e.LiveBytes())*int64(delta))
}

func (u *usageTotals) Node(p Pointer, delta int) { add(u.nodes, p, delta) }

// add keeps no zeros, so that maps can be compared.
func add[K comparable, V int | int64](m map[K]V, k K, v V) {
	if m[k] += v; m[k] == 0 {
		delete(m, k)
	}
}

// TestLocate: every node is found by its level and any of its blocks, and none is
// where there is none.
func TestLocate(t *testing.T) {
	tree, store, root := bulkTree(t, 20000, 5, false)
	if root.Height < 2 {
		t.Fatalf("a tree of %d levels", root.Height)
	}
	err := tree.Walk(root, func(w WalkNode) error {
		for _, i := range []block.Index{w.Keys.Start, w.Keys.End - 1} {
			if p, ok, err := tree.Locate(root, w.Level, i); err != nil || !ok || p != w.Pointer {
				t.Errorf("node of level %d for block %d: %+v, %v, %v, expected %+v", w.Level, i, p, ok, err, w.Pointer)
			}
		}
		if level, first, ok := NodeKey(store.nodes[w.Places[0]]); !ok || level != w.Level || first != w.Keys.Start {
			t.Errorf("node of level %d for %v has the key %d of level %d, %v", w.Level, w.Keys, first, level, ok)
		}
		return nil
	}, func(Extent) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		level uint8
		at    block.Index
	}{{root.Height, 0}, {root.Height - 1, root.Keys.End}, {0, root.Keys.End}} {
		if p, ok, err := tree.Locate(root, c.level, c.at); ok || err != nil {
			t.Errorf("level %d at block %d: %+v, %v", c.level, c.at, p, err)
		}
	}
	if _, _, ok := NodeKey([]byte("CNMN")); ok {
		t.Error("four bytes are no node")
	}
}

// bulkTree is a tree of n extents of 16 blocks, each followed by a hole of as
// many, made in some merges of random extents, or in sequence.
func bulkTree(t testing.TB, n, merges int, sequential bool) (*Tree, *memNodes, Root) {
	t.Helper()
	store := newMemNodes()
	tree := NewTree(store, TreeOptions{})
	var root Root
	rand := rand.New(rand.NewPCG(1, 1))
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	if !sequential {
		rand.Shuffle(n, func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	usage := newUsageTotals()
	var segment, offset uint32
	for m := range merges {
		o := NewOverlay()
		for _, i := range order[n*m/merges : n*(m+1)/merges] {
			length := 10000 + rand.Uint32N(40000)
			if offset += length + 48; offset > 64<<20 {
				segment, offset = segment+1, length
			}
			o.Insert(Extent{Start: block.Index(i) * 32, Count: 16, Kind: Data,
				Addr: Addr{Segment: segment, Offset: offset - length, Length: length, Checksum: rand.Uint32(), Blocks: 16, Codec: 1, Level: 3}})
		}
		var err error
		if root, _, err = tree.Merge(root, o, nil, 0, Evacuation{}, usage); err != nil {
			t.Fatal(err)
		}
	}
	if root.Entries != uint64(n) || uint64(len(usage.nodes)) != root.Nodes {
		t.Fatalf("%d extents in %d nodes, root says %d in %d", n, len(usage.nodes), root.Entries, root.Nodes)
	}
	return tree, store, root
}

func TestTreeMillion(t *testing.T) {
	n := 1_000_000
	if invariants.Enabled {
		n = 50_000 // every node written is decoded again
	}
	for _, c := range []struct {
		name       string
		sequential bool
		merges     int
		bytesMax   float64
		fillMin    float64
	}{
		{"in sequence", true, 10, 12.5, 0.95},
		{"at random", false, 10, 24, 0.60},
	} {
		t.Run(c.name, func(t *testing.T) {
			tree, _, root := bulkTree(t, n, c.merges, c.sequential)
			var nodes, bytes [heightMax]int
			stored, extents := 0, 0
			if err := tree.Walk(root, func(w WalkNode) error {
				nodes[w.Level]++
				bytes[w.Level] += int(w.Length)
				stored += int(w.Length) * int(w.Copies)
				return w.Err
			}, func(Extent) error { extents++; return nil }); err != nil {
				t.Fatal(err)
			}
			if extents != n {
				t.Fatalf("%d extents, expected %d", extents, n)
			}
			for level := range root.Height {
				t.Logf("level %d: %d nodes, filled to %.0f %%", level, nodes[level],
					100*float64(bytes[level])/float64(nodes[level]*NodeSizeMax))
			}
			per := float64(stored) / float64(n)
			t.Logf("%d extents: %.2f bytes of nodes for each, both copies of inner nodes counted", n, per)
			if per > c.bytesMax {
				t.Errorf("expected at most %v", c.bytesMax)
			}
			if fill := float64(bytes[0]) / float64(nodes[0]*NodeSizeMax); fill < c.fillMin {
				t.Errorf("leaves filled to %.2f, expected at least %v", fill, c.fillMin)
			}
		})
	}
}

func TestTreeLookupIsClipped(t *testing.T) {
	tree, _, root := bulkTree(t, 5000, 1, true)
	for _, c := range []struct {
		r    block.Range
		want string
	}{
		{rng(0, 16), "0+16"},
		{rng(16, 32), ""},
		{rng(10, 40), "10+6 32+8"},
		{rng(5, 6), "5+1"},
		{rng(31, 32), ""},
		{rng(5, 5), ""},
		{rng(4999*32, keyEnd), "159968+16"},
		{rng(5000*32, keyEnd), ""},
	} {
		got := ""
		if err := tree.Lookup(root, c.r, func(e Extent) error {
			if got != "" {
				got += " "
			}
			got += fmt.Sprintf("%d+%d", e.Start, e.Count)
			if e.Skip != uint8(e.Start%32) {
				t.Errorf("lookup of %v: %+v", c.r, e)
			}
			return nil
		}); err != nil || got != c.want {
			t.Errorf("lookup of %v: %q %v, expected %q", c.r, got, err, c.want)
		}
	}
	if err := tree.Lookup(root, rng(0, 100), func(Extent) error { return io.EOF }); err != io.EOF {
		t.Errorf("the error of visit came back as %v", err)
	}
}

// An unreadable node costs what it answers for and nothing else.
func TestTreeLookupUnreadable(t *testing.T) {
	tree, store, root := bulkTree(t, 5000, 1, true)
	var bad []WalkNode
	leaves := 0
	if err := tree.Walk(root, func(w WalkNode) error {
		if w.Level == 0 {
			if leaves++; leaves == 3 || leaves == 4 {
				bad = append(bad, w)
			}
		}
		return w.Err
	}, func(Extent) error { return nil }); err != nil {
		t.Fatal(err)
	}
	for _, w := range bad {
		store.damage(w.Pointer)
	}
	tree = NewTree(store, TreeOptions{})
	r := rng(bad[0].Keys.Start-100, bad[1].Keys.End+100)
	var got []Extent
	if err := tree.Lookup(root, r, func(e Extent) error {
		if e.Kind == Lost {
			got = append(got, e)
		} else if e.Range().Overlaps(bad[0].Keys) || e.Range().Overlaps(bad[1].Keys) {
			t.Errorf("%+v was read from an unreadable leaf", e)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0] != lost(bad[0].Keys) || got[1] != lost(bad[1].Keys) {
		t.Errorf("lost %+v, expected %v and %v", got, bad[0].Keys, bad[1].Keys)
	}
	if m := tree.Metrics(); m.NodesUnreadable != 2 {
		t.Errorf("%d unreadable nodes counted, expected 2", m.NodesUnreadable)
	}

	// Healed, say by the other copy of a mirror, it is read again.
	clear(store.damaged)
	if err := tree.Lookup(root, r, func(e Extent) error {
		if e.Kind == Lost {
			t.Errorf("%+v is lost still", e)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}

	// An I/O error says nothing of the data.
	store.failRead = io.ErrUnexpectedEOF
	tree = NewTree(store, TreeOptions{})
	if err := tree.Lookup(root, r, func(e Extent) error { return nil }); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("lookup: %v", err)
	}
}

// A root with a wrong range, height or place leads to no data.
func TestTreeLookupMisplacedNode(t *testing.T) {
	tree, _, root := bulkTree(t, 5000, 1, true)
	for _, warm := range []bool{false, true} {
		if warm {
			if err := tree.Lookup(root, rng(0, 1), func(Extent) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		bad := root
		bad.Keys.End += 5
		if err := tree.Lookup(bad, rng(0, 10), func(e Extent) error {
			if e != lost(rng(0, 10)) {
				t.Errorf("found %+v", e)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
}

func TestTreeWalkUnreadable(t *testing.T) {
	tree, store, root := bulkTree(t, 5000, 1, true)
	store.damage(root.Pointer)
	nodes := 0
	if err := tree.Walk(root, func(w WalkNode) error {
		nodes++
		mustBeCorrupt(t, w.Err)
		if w.Keys != root.Keys || w.Level != root.Height-1 {
			t.Errorf("node %+v", w)
		}
		return nil
	}, func(e Extent) error { t.Errorf("extent %+v", e); return nil }); err != nil || nodes != 1 {
		t.Errorf("%d nodes, %v", nodes, err)
	}
}

// Concurrent misses on one node share one read, and its error.
func TestTreeMissesShareOneRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemNodes()
		tree := NewTree(store, TreeOptions{})
		o := NewOverlay()
		o.Insert(dataExtent(0, 1, 4))
		root, _, err := tree.Merge(Root{}, o, nil, 0, Evacuation{}, newUsageTotals())
		if err != nil {
			t.Fatal(err)
		}
		for _, fail := range []error{io.ErrUnexpectedEOF, nil} {
			store.reads, store.failRead, store.readGate = 0, fail, make(chan struct{})
			var wg sync.WaitGroup
			var found, failed atomic.Int32
			for range 10 {
				wg.Go(func() {
					err := tree.Lookup(root, rng(0, 4), func(Extent) error { found.Add(1); return nil })
					if errors.Is(err, io.ErrUnexpectedEOF) {
						failed.Add(1)
					} else if err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			close(store.readGate)
			wg.Wait()
			if store.reads != 1 {
				t.Errorf("%d reads for ten misses", store.reads)
			}
			if f := failed.Load(); (fail != nil) != (f == 10) || f+found.Load() != 10 {
				t.Errorf("%d found, %d failed, expected all to end with %v", found.Load(), f, fail)
			}
		}
	})
}

func TestTreeCacheIsBounded(t *testing.T) {
	_, store, root := bulkTree(t, 50000, 1, true)
	const limit = 200 << 10
	tree := NewTree(store, TreeOptions{CacheBytes: limit})
	rand := rand.New(rand.NewPCG(disktest.Seed(t), 4))
	look := func(start block.Index) {
		if err := tree.Lookup(root, rng(start, start+64), func(Extent) error { return nil }); err != nil {
			t.Fatal(err)
		}
		m := tree.Metrics()
		if m.CacheBytes > limit || m.CacheBytesMax != limit {
			t.Fatalf("%d bytes are cached, limit %d", m.CacheBytes, m.CacheBytesMax)
		}
	}
	for range 3000 {
		look(block.Index(rand.IntN(50000 * 32)))
	}
	// What is used stays: the root is never read again.
	m := tree.Metrics()
	if m.CacheNodes < 15 || m.CacheNodes != countList(tree.cache) {
		t.Errorf("%d nodes of 8 KiB in %d bytes", m.CacheNodes, limit)
	}
	for i := range 500 {
		look(0)
		look(block.Index(1000 + i%5*40000))
	}
	after := tree.Metrics()
	if misses := after.CacheMisses - m.CacheMisses; misses > 8 {
		t.Errorf("%d misses of 6 leaves in a cache of %d nodes", misses, m.CacheNodes)
	}
	if after.CacheHits <= m.CacheHits {
		t.Error("no hits")
	}
}

// countList counts the cached nodes along the list, both ways.
func countList(c *cache) int {
	n, back := 0, 0
	for e := c.mu.oldest; e != nil; e = e.newer {
		n++
	}
	for e := c.mu.newest; e != nil; e = e.older {
		back++
	}
	if n != back || n != len(c.mu.entries) {
		return -1
	}
	return n
}

func TestTreeCachedLookupAllocatesNothing(t *testing.T) {
	tree, _, root := bulkTree(t, 50000, 1, true)
	visit := func(Extent) error { return nil }
	if n := testing.AllocsPerRun(100, func() {
		if err := tree.Lookup(root, rng(40000, 40100), visit); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("a cached lookup allocates %v times", n)
	}
}

// Lookups of old and new roots go on while merges are made.
func TestTreeLookupDuringMerge(t *testing.T) {
	tree, store, root := bulkTree(t, 5000, 1, true)
	tree = NewTree(store, TreeOptions{CacheBytes: 64 << 10})
	rand := rand.New(rand.NewPCG(disktest.Seed(t), 5))
	var current atomic.Pointer[Root]
	current.Store(&root)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for g := range 3 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				root := current.Load()
				start := block.Index((i*37+g)%5000) * 32
				// Every version of this test's extents begins at their place.
				if err := tree.Lookup(*root, rng(start, start+16), func(e Extent) error {
					if e.Start != start || e.Count != 16 || e.Kind != Data {
						return fmt.Errorf("found %+v at %d", e, start)
					}
					return nil
				}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 20 {
		o := NewOverlay()
		for range 100 {
			o.Insert(dataExtent(block.Index(rand.IntN(5000))*32, rand.Uint32(), 16))
		}
		next, _, err := tree.Merge(*current.Load(), o, nil, 0, Evacuation{}, newUsageTotals())
		if err != nil {
			t.Fatal(err)
		}
		current.Store(&next)
	}
	close(stop)
	wg.Wait()
}

func BenchmarkTreeLookupCached(b *testing.B) {
	for _, n := range []int{1000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			tree, _, root := bulkTree(b, n, 1, true)
			tree.cache.bytesMax = 1 << 30
			rand := rand.New(rand.NewPCG(1, 1))
			visit := func(Extent) error { return nil }
			for i := range n {
				_ = tree.Lookup(root, rng(block.Index(i*32), block.Index(i*32+1)), visit)
			}
			b.ReportAllocs()
			for b.Loop() {
				start := block.Index(rand.IntN(n * 32))
				if err := tree.Lookup(root, rng(start, start+32), visit); err != nil {
					b.Fatal(err)
				}
			}
			m := tree.Metrics()
			b.ReportMetric(float64(m.CacheBytes)/float64(n), "cachedB/extent")
		})
	}
}

func BenchmarkTreeMerge(b *testing.B) {
	const n = 1_000_000
	for _, changes := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprint(changes), func(b *testing.B) {
			tree, store, root := bulkTree(b, n, 1, true)
			rand := rand.New(rand.NewPCG(1, 1))
			o := NewOverlay()
			for range changes {
				o.Insert(dataExtent(block.Index(rand.IntN(n))*32, rand.Uint32(), 16))
			}
			writes := store.writes
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := tree.Merge(root, o, nil, 0, Evacuation{}, nopUsage{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(store.writes-writes)/float64(b.N), "nodes/op")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(changes), "ns/change")
		})
	}
}

type nopUsage struct{}

func (nopUsage) Extent(Extent, int) {}
func (nopUsage) Node(Pointer, int)  {}
