package pagecache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A rig is a device in miniature around a tiny cache: state trees for the open and
// the frozen epoch, an ordered queue of hand-offs, and an extent map, each as
// simple as can be, driven by many goroutines. It checks that reads are
// linearizable block by block.
//
// Writes of a block, trims included, are numbered by the holder of its range lock:
// begun is raised before a write is installed, done after. A read that started
// when done was lo and ended when begun was hi returns a write from lo to hi, and
// none older than what a read that ended before has returned.
type rig struct {
	t    *testing.T
	c    *Cache
	ctx  context.Context
	stop atomic.Bool

	freezing sync.RWMutex // writers share it: an epoch begins between whole requests
	epoch    atomic.Uint64
	frozen   [2]uint64 // by tree: HoleSeq when its epoch was frozen
	trees    [2]tree   // by epoch modulo 2

	queue  chan rigItem
	mapped [rigBlocks]atomic.Uint64 // the extent map: stamp, or 0 for a hole

	begun, done, seen [rigBlocks]atomic.Uint64
	trims             [rigBlocks]struct {
		sync.Mutex
		at map[uint64]bool // the writes that were trims
	}
	reads, retries atomic.Uint64
}

const rigBlocks = 40

// A tree is the state tree of an epoch: range locks, and what is to be written.
type tree struct {
	blocks [rigBlocks]struct {
		sync.Mutex        // the range lock
		todo       string // "", "data" or "hole"
	}
	work atomic.Int64 // blocks with something to do
}

type rigItem struct {
	b    block.Index
	ref  Ref
	hole bool
	seq  uint64
}

func TestStress(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	met := edges{}
	// Some ways are gone seldom, on some machines; a round takes a tenth of a second.
	for round := 0; round == 0 || !met.all() && round < 50; round++ {
		for _, o := range []Options{
			{CacheBytes: blocks(16), PayloadBytes: blocks(8), DirtyBytesMax: blocks(10)},
			{CacheBytes: blocks(4), PayloadBytes: blocks(4), DirtyBytesMax: blocks(4)},
			{CacheBytes: blocks(64), PayloadBytes: blocks(6), DirtyBytesMax: blocks(48)},
		} {
			t.Run(fmt.Sprintf("%d-%d-%d", o.CacheBytes>>12, o.PayloadBytes>>12, o.DirtyBytesMax>>12), func(t *testing.T) {
				// It is a deadlock that the deadline finds; a sound run takes seconds.
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(disktest.Scale(t))*2*time.Minute)
				defer cancel()
				g := &rig{t: t, c: newCache(t, o), ctx: ctx, queue: make(chan rigItem, 4*rigBlocks)}
				g.epoch.Store(1)
				for b := range g.trims {
					g.trims[b].at = map[uint64]bool{0: true}
				}
				g.run(rng)
				met.add(g.c.Metrics())
				t.Logf("%d reads, %d of them again", g.reads.Load(), g.retries.Load())
				closeCache(t, g.c)
			})
		}
	}
	met.check(t)
}

func (g *rig) run(rng *rand.Rand) {
	var work, writeback, committer sync.WaitGroup
	ops := 500 * disktest.Scale(g.t)
	start := func(wg *sync.WaitGroup, f func(*rand.Rand)) {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		wg.Go(func() { f(rng) })
	}
	for range 4 {
		start(&work, func(rng *rand.Rand) {
			for range 4 * ops {
				g.read(rng, block.Index(rng.IntN(rigBlocks)))
			}
		})
	}
	for range 3 {
		start(&work, func(rng *rand.Rand) {
			for range ops {
				g.write(rng)
				for range rng.IntN(16) {
					runtime.Gosched()
				}
			}
		})
	}
	start(&work, func(rng *rand.Rand) {
		for range ops {
			g.trim(rng)
			for range 20 {
				runtime.Gosched()
			}
		}
	})
	for range 2 {
		start(&writeback, func(rng *rand.Rand) {
			for !g.stop.Load() {
				g.flush(rng, block.Index(rng.IntN(rigBlocks)))
				runtime.Gosched()
			}
		})
	}
	start(&writeback, func(rng *rand.Rand) {
		for !g.stop.Load() {
			g.freeze()
			if r, ok := g.c.evict(8); ok { // and an evictor of its own
				g.c.release(r)
				g.c.payloadGate.serve()
			}
			sh := &g.c.shards[rng.IntN(len(g.c.shards))]
			sh.mu.Lock()
			queuesOf(g.t, g.c, sh)
			sh.mu.Unlock()
			runtime.Gosched()
		}
	})
	start(&committer, func(rng *rand.Rand) {
		for x := range g.queue {
			g.commit(rng, x)
		}
	})

	work.Wait()
	g.stop.Store(true)
	writeback.Wait()
	// What is left of the frozen epoch, then of the open one. A flush may find a
	// block lost, so there are as many rounds as it takes.
	for round := 0; g.trees[0].work.Load()+g.trees[1].work.Load() > 0; round++ {
		if round == 1000 {
			g.t.Error("flushes do not get done")
			break
		}
		for b := range block.Index(rigBlocks) {
			g.flush(rng, b)
		}
		g.freeze()
	}
	close(g.queue)
	committer.Wait()

	m := g.c.Metrics()
	if m.Dirty != 0 || m.Shadow != 0 || m.Writeback != 0 || m.Payload != 0 || m.Pinned != 0 || m.Claims != 0 || m.Admitted != 0 ||
		m.Locked != 0 || m.Cached != m.Clean || m.Cached > int64(m.CacheMax) {
		g.t.Errorf("in the end something is left: %+v", m)
	}
	checkQueues(g.t, g.c)
	evictEverything(g.t, g.c)
	for b := range block.Index(rigBlocks) {
		if g.c.holes.contains(b) {
			g.t.Errorf("block %d is still in a pending hole", b)
		}
		g.read(rng, b)
	}
	if n := g.c.arena.Outstanding(); int64(n) != g.c.Metrics().Clean {
		g.t.Errorf("%d frames are outstanding", n)
	}
}

// read reads b and checks what it got.
func (g *rig) read(rng *rand.Rand, b block.Index) {
	g.reads.Add(1)
	lo := max(g.done[b].Load(), g.seen[b].Load())
	stamp, ok := g.readBlock(rng, b)
	if !ok {
		return
	}
	hi := g.begun[b].Load()
	if stamp == 0 { // zeros: the oldest trim that it can have been
		tr := &g.trims[b]
		tr.Lock()
		for stamp = lo; stamp <= hi && !tr.at[stamp]; stamp++ {
		}
		tr.Unlock()
	}
	if stamp < lo || stamp > hi {
		g.t.Errorf("a read of block %d returned write %d, want one of %d to %d", b, stamp, lo, hi)
	}
	for s := g.seen[b].Load(); s < stamp && !g.seen[b].CompareAndSwap(s, stamp); s = g.seen[b].Load() {
	}
}

// readBlock is what a device does to read a block.
func (g *rig) readBlock(rng *rand.Rand, b block.Index) (stamp uint64, ok bool) {
	for {
		r, cl, st := g.c.Get(b)
		switch st {
		case Hit:
			for range rng.IntN(3) {
				runtime.Gosched()
			}
			stamp, whole := pageStamp(g.c.Bytes(r), b)
			if !whole {
				g.t.Errorf("a page of block %d is not whole", b)
			}
			g.c.Unpin(r)
			return stamp, true
		case Hole:
			return 0, true
		case Filling:
			g.retries.Add(1)
			if err := g.c.WaitFill(g.ctx, b); err != nil {
				g.t.Errorf("a wait for block %d: %v", b, err)
				return 0, false
			}
		case Claimed:
			if rng.IntN(20) == 0 { // a read error, and the client tries again
				g.c.Abandon(cl)
				continue
			}
			first := g.mapped[b].Load()
			runtime.Gosched()
			page := pageOf(b, first)
			// The extent has 4 blocks: claim its other blocks, look them up
			// again, fill.
			for n := b &^ 3; n < b&^3+4; n++ {
				if n == b {
					continue
				}
				other, ok := g.c.TryClaim(n)
				if !ok {
					continue
				}
				now := g.mapped[n].Load()
				runtime.Gosched()
				if rng.IntN(4) == 0 {
					g.c.Abandon(other)
				} else {
					g.c.Fill(other, pageOf(n, now))
				}
			}
			if r, ok := g.c.FillPinned(cl, page); ok {
				if s, whole := pageStamp(g.c.Bytes(r), b); s != first || !whole {
					g.t.Errorf("block %d was filled with write %d, and has %d", b, first, s)
				}
				g.c.Unpin(r)
			}
			return first, true
		}
	}
}

func (g *rig) write(rng *rand.Rand) {
	n := 1 + rng.IntN(4)
	first := block.Index(rng.IntN(rigBlocks - n + 1))
	refs, err := g.c.AllocPayload(g.ctx, n, nil)
	if err != nil {
		g.t.Errorf("payload: %v", err)
		return
	}
	if err := g.c.BalanceDirty(g.ctx, block.Count(n)); err != nil {
		g.t.Errorf("dirty limit: %v", err)
		g.c.FreePayload(refs)
		return
	}
	if rng.IntN(20) == 0 { // the client goes away
		g.c.CancelDirty(block.Count(n))
		g.c.FreePayload(refs)
		return
	}
	g.freezing.RLock()
	defer g.freezing.RUnlock()
	epoch := g.epoch.Load()
	tr := &g.trees[epoch%2]
	for i := range n {
		tr.blocks[int(first)+i].Lock()
	}
	for i, r := range refs {
		b := first + block.Index(i)
		stamp := g.begun[b].Add(1)
		fillPage(g.c.Bytes(r), b, stamp)
		replaced := g.c.Install(b, r, epoch)
		if replaced != (tr.blocks[b].todo == "data") {
			g.t.Errorf("a write of block %d in epoch %d replaced %v; the tree has %q", b, epoch, replaced, tr.blocks[b].todo)
		}
		g.setTodo(tr, b, "data")
		g.done[b].Store(stamp)
	}
	for i := range n {
		tr.blocks[int(first)+i].Unlock()
	}
}

func (g *rig) trim(rng *rand.Rand) {
	r := block.Span(block.Index(rng.IntN(rigBlocks)), block.Count(1+rng.IntN(4)))
	if rng.IntN(30) == 0 {
		r = block.Range{Start: r.Start, End: 1 << 40}
	}
	end := min(r.End, rigBlocks)
	g.freezing.RLock()
	defer g.freezing.RUnlock()
	epoch := g.epoch.Load()
	tr := &g.trees[epoch%2]
	data := block.Count(0)
	for b := r.Start; b < end; b++ {
		tr.blocks[b].Lock()
		if tr.blocks[b].todo == "data" {
			data++
		}
		x := &g.trims[b]
		x.Lock()
		x.at[g.begun[b].Load()+1] = true
		x.Unlock()
		g.begun[b].Add(1)
	}
	if dropped, _ := g.c.InstallHole(r, epoch); dropped != data {
		g.t.Errorf("a trim of %v dropped %d dirty blocks; the tree has %d", r, dropped, data)
	}
	for b := r.Start; b < end; b++ {
		g.setTodo(tr, b, "hole")
		g.done[b].Store(g.begun[b].Load())
	}
	for b := r.Start; b < end; b++ {
		tr.blocks[b].Unlock()
	}
}

// setTodo says what is to be written of b. The caller holds its range lock.
func (g *rig) setTodo(tr *tree, b block.Index, todo string) {
	tr.work.Add(btoi(todo != "") - btoi(tr.blocks[b].todo != ""))
	tr.blocks[b].todo = todo
}

// freeze begins an epoch, if the frozen one has been handed off.
func (g *rig) freeze() {
	g.freezing.Lock()
	defer g.freezing.Unlock()
	e := g.epoch.Load()
	if g.trees[(e-1)%2].work.Load() == 0 {
		g.frozen[e%2] = g.c.HoleSeq()
		g.epoch.Store(e + 1)
	}
}

// flush hands off what there is to write of b in the oldest epoch that has work.
func (g *rig) flush(rng *rand.Rand, b block.Index) {
	e := g.epoch.Load()
	if g.trees[(e-1)%2].work.Load() > 0 {
		e--
	}
	tr := &g.trees[e%2]
	r, ok := g.c.LockDirty(b, e)
	if !ok {
		// A hole has no page to lock. The epoch must not freeze between the
		// two looks at its number, and its work not be that of a later one.
		g.freezing.RLock()
		defer g.freezing.RUnlock()
		if now := g.epoch.Load(); now > e+1 {
			return
		}
		tr.blocks[b].Lock()
		defer tr.blocks[b].Unlock()
		if tr.blocks[b].todo == "hole" {
			seq := g.frozen[e%2]
			if e == g.epoch.Load() {
				seq = g.c.HoleSeq()
			}
			g.queue <- rigItem{b: b, hole: true, seq: seq}
			g.setTodo(tr, b, "")
		}
		return
	}
	for range rng.IntN(3) {
		runtime.Gosched()
	}
	tr.blocks[b].Lock()
	defer tr.blocks[b].Unlock()
	if !g.c.StillDirty(r, e) || rng.IntN(10) == 0 {
		g.c.UnlockDirty(r)
		return
	}
	if tr.blocks[b].todo != "data" {
		g.t.Errorf("block %d is dirty in epoch %d, the tree has %q", b, e, tr.blocks[b].todo)
	}
	g.c.HandOff(r)
	g.queue <- rigItem{b: b, ref: r}
	g.setTodo(tr, b, "")
}

// commit is the ordered side of the queue: first the map, then the page.
func (g *rig) commit(rng *rand.Rand, x rigItem) {
	for range rng.IntN(4) {
		runtime.Gosched()
	}
	if x.hole {
		g.mapped[x.b].Store(0)
		g.c.HolesApplied(block.Span(x.b, 1), x.seq)
		return
	}
	stamp, whole := pageStamp(g.c.Bytes(x.ref), x.b)
	if !whole {
		g.t.Errorf("the version of block %d in writeback is not whole", x.b)
	}
	g.mapped[x.b].Store(stamp)
	g.c.EndWriteback(x.ref, nil)
}

// A freeing frame meets a waiting request in every order: no wake-up is lost.
func TestNoLostWakeup(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Duration(disktest.Scale(t))*time.Minute, errors.New("a wake-up was lost"))
	defer cancel()
	c := newCache(t, Options{CacheBytes: blocks(4), PayloadBytes: blocks(4), DirtyBytesMax: blocks(2)})
	defer closeCache(t, c)
	var wg sync.WaitGroup
	for w := range 4 {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		wg.Go(func() {
			for range 1500 * disktest.Scale(t) {
				n := 1 + rng.IntN(4)
				refs, err := c.AllocPayload(ctx, n, nil)
				if err != nil {
					t.Errorf("worker %d: payload of %d: %v", w, n, err)
					return
				}
				if err := c.BalanceDirty(ctx, block.Count(n)); err != nil {
					t.Errorf("worker %d: dirty limit, %d: %v", w, n, err)
					c.FreePayload(refs)
					return
				}
				for i, r := range refs {
					b := block.Index(w*100 + i)
					c.Install(b, r, 1)
					p, _, st := c.Get(b)
					if st != Hit {
						t.Errorf("worker %d: %v", w, st)
						return
					}
					x, ok := c.LockDirty(b, 1)
					if !ok {
						t.Errorf("worker %d: busy", w)
						return
					}
					c.HandOff(x)
					c.EndWriteback(x, nil)
					c.Unpin(p)
				}
			}
		})
	}
	wg.Wait()
}
