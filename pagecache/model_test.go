package pagecache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A model is what the package promises, said simply: for each block its versions,
// claims and holes, for the device its extent map and its queue of hand-offs. One
// goroutine drives cache and model through the same operations, and after each
// one compares everything that can be seen from inside the package.
type model struct {
	t       *testing.T
	c       *Cache
	rng     *rand.Rand
	step    int
	weights []int // of the operations, by their place in operate
	epoch   uint64
	stamp   uint64

	blocks   [modelBlocks]modelBlock
	versions map[Ref]*modelVersion // all that have a frame
	claims   []*modelClaim         // all that were not given up, withdrawn or not
	pinned   []Ref
	payload  []Ref
	admitted int64
	queue    []modelItem // in the order of hand-off
	frozen   uint64      // HoleSeq at the freeze
}

const modelBlocks = 24

type modelBlock struct {
	visible, shadow *modelVersion
	claim           *modelClaim
	hole            uint64            // number of the pending hole, or 0
	mapped          uint64            // stamp in the extent map, 0 for a hole
	todo            map[uint64]string // what the state tree of an epoch has to write: "data" or "hole"
}

type modelVersion struct {
	b                               block.Index
	ref                             Ref
	stamp, epoch                    uint64
	attached                        bool
	dirty, locked, writeback, fails bool
	pins                            int
}

type modelClaim struct {
	cl     Claim
	looked bool
	stamp  uint64 // what the map said
}

type modelItem struct {
	b   block.Index
	v   *modelVersion // nil for a hole
	seq uint64
}

func (v *modelVersion) clean() bool { return v.attached && !v.dirty && !v.writeback && !v.fails }

// counted: the dirty limit counts it.
func (v *modelVersion) counted() bool { return v.dirty || v.writeback || v.fails }

func TestModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	met := edges{}
	for _, o := range []Options{
		{CacheBytes: blocks(12), PayloadBytes: blocks(6), DirtyBytesMax: blocks(8)},
		{CacheBytes: blocks(6), PayloadBytes: blocks(8), DirtyBytesMax: blocks(6)},
		{CacheBytes: blocks(64), PayloadBytes: blocks(4), DirtyBytesMax: blocks(40)},
	} {
		o := o
		t.Run(fmt.Sprintf("%d-%d-%d", o.CacheBytes>>12, o.PayloadBytes>>12, o.DirtyBytesMax>>12), func(t *testing.T) {
			m := &model{t: t, c: newCache(t, o), rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), epoch: 1, versions: map[Ref]*modelVersion{}}
			for b := range m.blocks {
				m.blocks[b].todo = map[uint64]string{}
			}
			for m.step = range 5000 * disktest.Scale(t) {
				m.operate()
				m.compare()
			}
			m.finish()
			met.add(m.c.Metrics())
			closeCache(t, m.c)
		})
	}
	met.check(t)
}

func (m *model) fatalf(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("step %d: "+format, append([]any{m.step}, args...)...)
}

// operate does one operation. How often each kind comes changes from time to time:
// a run has phases in which writeback, readers or trims are ahead.
func (m *model) operate() {
	b := block.Index(m.rng.IntN(modelBlocks))
	mb := &m.blocks[b]
	ops := []func(){
		func() { m.get(b) },
		func() {
			if len(m.pinned) > 0 {
				m.unpin(m.rng.IntN(len(m.pinned)))
			}
		},
		func() {
			want := mb.visible == nil && mb.claim == nil && mb.hole == 0 && m.frameCanBeHad(true)
			cl, ok := m.c.TryClaim(b)
			if ok != want {
				m.fatalf("TryClaim(%d) = %v, want %v", b, ok, want)
			}
			if ok {
				m.claimed(b, cl)
			}
		},
		func() {
			if len(m.claims) > 0 {
				m.advanceClaim(m.rng.IntN(len(m.claims)))
			}
		},
		func() { m.allocPayload(1 + m.rng.IntN(3)) },
		func() { m.balanceDirty(int64(1 + m.rng.IntN(3))) },
		func() {
			if len(m.payload) == 0 {
				m.allocPayload(1)
			}
			if m.admitted == 0 {
				m.balanceDirty(1)
			}
			if len(m.payload) > 0 && m.admitted > 0 {
				m.install(b)
			}
		},
		func() {
			if len(m.payload) > 0 && m.rng.IntN(3) == 0 {
				m.c.FreePayload(m.payload[:1])
				m.payload = m.payload[1:]
			}
			if m.admitted > 0 && m.rng.IntN(3) == 0 {
				m.c.CancelDirty(1)
				m.admitted--
			}
		},
		func() {
			switch m.rng.IntN(100) {
			case 0:
				m.installHole(block.Range{Start: b, End: 1 << 40})
			case 1, 2, 3, 4, 5, 6, 7, 8, 9, 10:
				m.installHole(block.Span(b, block.Count(1+m.rng.IntN(5))))
			case 11, 12, 13, 14, 15, 16, 17, 18, 19, 20:
				m.installHole(block.Span(b, 1))
			}
		},
		func() {
			for i := 0; i < 20 && m.dirtyVersion(b, m.epoch) == nil && m.dirtyVersion(b, m.epoch-1) == nil; i++ {
				b = block.Index(m.rng.IntN(modelBlocks))
			}
			m.lockDirty(b)
		},
		func() { m.advanceLocked() },
		func() {
			for i := range block.Index(modelBlocks / 2) {
				m.handOffHole((b + i) % modelBlocks)
			}
		},
		func() {
			if len(m.queue) > 0 && m.rng.IntN(4) == 0 {
				m.endItem(nil)
			}
		},
		func() {
			if m.rng.IntN(4) == 0 {
				m.freeze()
			}
		},
	}
	if m.step%200 == 0 {
		m.weights = m.weights[:0]
		for range ops {
			m.weights = append(m.weights, 1+m.rng.IntN(10))
		}
	}
	total := 0
	for _, w := range m.weights {
		total += w
	}
	n := m.rng.IntN(total)
	for i, w := range m.weights {
		if n < w {
			ops[i]()
			return
		}
		n -= w
	}
}

func (m *model) get(b block.Index) {
	mb := &m.blocks[b]
	m.peek(b)
	r, cl, st := m.c.Get(b)
	want := Claimed
	switch {
	case mb.visible != nil:
		want = Hit
	case mb.claim != nil:
		want = Filling
	case mb.hole != 0:
		want = Hole
	}
	if st != want {
		m.fatalf("Get(%d): %v, want %v", b, st, want)
	}
	switch st {
	case Hit:
		if r != mb.visible.ref {
			m.fatalf("Get(%d): version %d, want %d", b, r, mb.visible.ref)
		}
		mb.visible.pins++
		m.pinned = append(m.pinned, r)
	case Claimed:
		m.claimed(b, cl)
	}
}

// peek looks b up, which changes nothing but for the pin of a hit.
func (m *model) peek(b block.Index) {
	mb := &m.blocks[b]
	r, st := m.c.Peek(b)
	want, ref := Filling, Ref(0)
	switch {
	case mb.visible != nil:
		want, ref = Hit, mb.visible.ref
	case mb.claim == nil && mb.hole != 0:
		want = Hole
	}
	if st != want || r != ref {
		m.fatalf("Peek(%d): %v, version %d, want %v, %d", b, st, r, want, ref)
	}
	if st == Hit {
		m.c.Unpin(r)
	}
}

func (m *model) unpin(i int) {
	r := m.pinned[i]
	m.pinned = slices.Delete(m.pinned, i, i+1)
	v := m.versions[r]
	v.pins--
	m.c.Unpin(r)
	m.free(v)
}

func (m *model) claimed(b block.Index, cl Claim) {
	x := &modelClaim{cl: cl}
	m.claims = append(m.claims, x)
	m.blocks[b].claim = x
}

// frameCanBeHad: the cache has room, or a clean version that can go; for TryClaim
// it is enough that it is clean.
func (m *model) frameCanBeHad(evenPinned bool) bool {
	if int64(m.cached()) < m.c.cacheMax {
		return true
	}
	for _, v := range m.versions {
		if v.clean() && (v.pins == 0 || evenPinned) {
			return true
		}
	}
	return false
}

func (m *model) cached() int { return len(m.versions) }

// advanceClaim looks the map up for a claim that has not, and else gives it up.
func (m *model) advanceClaim(i int) {
	x := m.claims[i]
	b := x.cl.Block()
	mb := &m.blocks[b]
	if !x.looked {
		x.looked, x.stamp = true, mb.mapped
		return
	}
	m.claims = slices.Delete(m.claims, i, i+1)
	stands := mb.claim == x
	if stands {
		mb.claim = nil
		if x.stamp != mb.mapped {
			m.fatalf("the claim of block %d stands with stamp %d, the map has %d", b, x.stamp, mb.mapped)
		}
	}
	frame := m.frameCanBeHad(false)
	switch m.rng.IntN(5) {
	case 0:
		m.c.Abandon(x.cl)
	case 1, 2:
		if ok := m.c.Fill(x.cl, pageOf(b, x.stamp)); ok != (stands && frame) {
			m.fatalf("Fill(%d) = %v; claim stands %v, frame %v", b, ok, stands, frame)
		} else if ok {
			m.filled(b, m.visible(b), x.stamp)
		}
	default:
		r, ok := m.c.FillPinned(x.cl, pageOf(b, x.stamp))
		if ok != (stands && frame) {
			m.fatalf("FillPinned(%d) = %v; claim stands %v, frame %v", b, ok, stands, frame)
		} else if ok {
			m.filled(b, r, x.stamp)
			m.versions[r].pins++
			m.pinned = append(m.pinned, r)
		}
	}
}

func (m *model) filled(b block.Index, r Ref, stamp uint64) {
	if old := m.versions[r]; old != nil { // evicted for this very fill
		m.evicted(old)
	}
	v := &modelVersion{b: b, ref: r, stamp: stamp, attached: true}
	m.versions[r] = v
	m.blocks[b].visible = v
}

// evicted checks that v could go, and lets it.
func (m *model) evicted(v *modelVersion) {
	if !v.clean() || v.pins != 0 || m.blocks[v.b].mapped != v.stamp {
		m.fatalf("version %+v was evicted; the map has %d", *v, m.blocks[v.b].mapped)
	}
	m.blocks[v.b].visible = nil
	delete(m.versions, v.ref)
}

func (m *model) allocPayload(n int) {
	var refs []Ref
	var err error
	switch {
	case m.rng.IntN(2) == 0:
		refs, err = m.c.AllocPayload(canceled(), n, nil)
	case m.c.TryAdmitPayload(n):
		refs = m.c.TakePayload(n, nil)
	default:
		err = context.Canceled
	}
	m.dropEvicted()
	excess := max(0, int64(m.cached())-m.c.cacheMax)
	if want := int64(len(m.payload)+n)+excess <= m.c.payloadMax; (err == nil) != want {
		m.fatalf("AllocPayload(%d) with %d out and %d too many cached: %v", n, len(m.payload), excess, err)
	}
	if err != nil && !errors.Is(err, context.Canceled) && int64(n) <= m.c.payloadMax {
		m.fatalf("AllocPayload: %v", err)
	}
	m.payload = append(m.payload, refs...)
}

func (m *model) charged() int64 {
	n := m.admitted
	for _, v := range m.versions {
		n += btoi(v.counted())
	}
	return n
}

func (m *model) balanceDirty(n int64) {
	charged := m.charged()
	want := charged == 0 || charged+n <= m.c.dirtyMax
	var err error
	if m.rng.IntN(2) == 0 {
		err = m.c.BalanceDirty(canceled(), block.Count(n))
	} else if !m.c.TryBalanceDirty(block.Count(n)) {
		err = context.Canceled
	}
	if (err == nil) != want {
		m.fatalf("BalanceDirty(%d) with %d charged: %v", n, charged, err)
	}
	if err == nil {
		m.admitted += n
	}
}

// supersede is what happens to the visible version of b by a write or trim.
func (m *model) supersede(b block.Index) (droppedDirty bool) {
	mb := &m.blocks[b]
	v := mb.visible
	mb.visible, mb.claim = nil, nil
	switch {
	case v == nil:
	case v.dirty && v.epoch != m.epoch:
		if mb.shadow != nil {
			m.fatalf("two shadows of block %d", b)
		}
		mb.shadow = v
	default:
		droppedDirty = v.dirty
		v.attached, v.dirty, v.fails = false, false, false
		m.free(v)
	}
	return droppedDirty
}

// free forgets v if nothing refers to it.
func (m *model) free(v *modelVersion) {
	if !v.attached && !v.locked && !v.writeback && v.pins == 0 {
		delete(m.versions, v.ref)
	}
}

func (m *model) install(b block.Index) {
	r := m.payload[0]
	m.payload = m.payload[1:]
	m.stamp++
	fillPage(m.c.Bytes(r), b, m.stamp)
	mb := &m.blocks[b]
	want := m.supersede(b)
	got := m.c.Install(b, r, m.epoch)
	if got != want || want != (mb.todo[m.epoch] == "data") {
		m.fatalf("Install(%d) replaced a dirty version: %v, want %v; the tree has %q", b, got, want, mb.todo[m.epoch])
	}
	m.admitted-- // used up, or given back with the place of what it replaced
	v := &modelVersion{b: b, ref: r, stamp: m.stamp, epoch: m.epoch, attached: true, dirty: true}
	m.versions[r] = v
	mb.visible, mb.hole = v, 0
	mb.todo[m.epoch] = "data"
}

func (m *model) installHole(r block.Range) {
	dropped, seq := m.c.InstallHole(r, m.epoch)
	want := block.Count(0)
	for b := r.Start; b < min(r.End, modelBlocks); b++ {
		mb := &m.blocks[b]
		if m.supersede(b) {
			want++
		}
		mb.hole = seq
		mb.todo[m.epoch] = "hole"
	}
	if dropped != want || seq != m.c.HoleSeq() {
		m.fatalf("InstallHole(%v) dropped %d, want %d; number %d", r, dropped, want, seq)
	}
}

// dirtyVersion is the version of b that is dirty in epoch.
func (m *model) dirtyVersion(b block.Index, epoch uint64) *modelVersion {
	for _, v := range []*modelVersion{m.blocks[b].visible, m.blocks[b].shadow} {
		if v != nil && v.dirty && v.epoch == epoch {
			return v
		}
	}
	return nil
}

func (m *model) lockDirty(b block.Index) {
	epoch := m.epoch - uint64(m.rng.IntN(2))
	v := m.dirtyVersion(b, epoch)
	r, ok := m.c.LockDirty(b, epoch)
	if want := v != nil && !v.locked; ok != want || ok && r != v.ref {
		m.fatalf("LockDirty(%d, %d) = %d, %v; want %v", b, epoch, r, ok, want)
	}
	if ok {
		v.locked = true
	}
}

// advanceLocked re-tests a locked version and hands it off, or unlocks it. Log
// order is epoch order: of the open epoch only when the frozen one is done.
func (m *model) advanceLocked() {
	for _, r := range slices.Sorted(maps.Keys(m.versions)) {
		v := m.versions[r]
		if !v.locked {
			continue
		}
		if m.c.StillDirty(r, v.epoch) != v.dirty {
			m.fatalf("StillDirty(%d) = %v", r, !v.dirty)
		}
		if m.c.StillDirty(r, v.epoch+1) {
			m.fatalf("version %d of epoch %d is dirty in the next", r, v.epoch)
		}
		v.locked = false
		if v.dirty && m.rng.IntN(4) != 0 && (v.epoch < m.epoch || !m.frozenWork()) {
			m.c.HandOff(r)
			v.dirty, v.writeback = false, true
			mb := &m.blocks[v.b]
			if mb.shadow == v {
				mb.shadow, v.attached = nil, false
			}
			if mb.todo[v.epoch] != "data" {
				m.fatalf("block %d handed off in epoch %d; the tree has %q", v.b, v.epoch, mb.todo[v.epoch])
			}
			delete(mb.todo, v.epoch)
			m.queue = append(m.queue, modelItem{b: v.b, v: v})
		} else {
			m.c.UnlockDirty(r)
			m.free(v)
		}
		return
	}
}

func (m *model) frozenWork() bool {
	for i := range m.blocks {
		if m.blocks[i].todo[m.epoch-1] != "" {
			return true
		}
	}
	return false
}

func (m *model) handOffHole(b block.Index) {
	epoch, seq := m.epoch, m.c.HoleSeq()
	if m.frozenWork() {
		epoch, seq = m.epoch-1, m.frozen
	}
	if m.blocks[b].todo[epoch] != "hole" {
		return
	}
	delete(m.blocks[b].todo, epoch)
	m.queue = append(m.queue, modelItem{b: b, seq: seq})
}

// endItem is the ordered side: it applies the oldest item.
func (m *model) endItem(err error) {
	x := m.queue[0]
	m.queue = m.queue[1:]
	mb := &m.blocks[x.b]
	if x.v == nil {
		mb.mapped = 0
		m.c.HolesApplied(block.Span(x.b, 1), x.seq)
		if mb.hole <= x.seq {
			mb.hole = 0
		}
		return
	}
	if stamp, whole := pageStamp(m.c.Bytes(x.v.ref), x.b); stamp != x.v.stamp || !whole {
		m.fatalf("block %d in writeback has stamp %d, want %d", x.b, stamp, x.v.stamp)
	}
	if err == nil {
		mb.mapped = x.v.stamp
	}
	x.v.writeback = false
	x.v.fails = err != nil && x.v.attached
	m.c.EndWriteback(x.v.ref, err)
	m.free(x.v)
}

func (m *model) freeze() {
	if !m.frozenWork() {
		m.epoch++
		m.frozen = m.c.HoleSeq()
	}
}

// visible is the version that the cache has in sight of b, or 0.
func (m *model) visible(b block.Index) Ref {
	sh, bucket := m.c.home(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return m.c.find(sh, bucket, b)
}

// dropEvicted lets the model forget what the cache has evicted.
func (m *model) dropEvicted() {
	for b := range m.blocks {
		if v := m.blocks[b].visible; v != nil && m.visible(v.b) != v.ref {
			m.evicted(v)
		}
	}
}

func (m *model) compare() {
	m.dropEvicted()
	var want Metrics
	for b := range m.blocks {
		mb := &m.blocks[b]
		var want Ref
		if mb.visible != nil {
			want = mb.visible.ref
		}
		if got := m.visible(block.Index(b)); got != want {
			m.fatalf("block %d: version %d is visible, want %d", b, got, want)
		}
		if m.c.holes.contains(block.Index(b)) != (mb.hole != 0) {
			m.fatalf("block %d in a hole: want number %d", b, mb.hole)
		}
	}
	for r, v := range m.versions {
		// All of the page now and then, one word of it always.
		i := m.rng.IntN(block.Size/8) * 8
		word := binary.NativeEndian.Uint64(m.c.Bytes(r)[i:]) == stampWord(v.b, v.stamp, i)
		if !word || m.step%64 == 0 {
			if stamp, whole := pageStamp(m.c.Bytes(r), v.b); stamp != v.stamp || !whole {
				m.fatalf("version %d of block %d has stamp %d (whole %v), want %d", r, v.b, stamp, whole, v.stamp)
			}
		}
		h := m.c.arena.Header(r)
		if refs := btoi(v.attached) + btoi(v.locked) + btoi(v.writeback) + int64(v.pins); int64(h.refs.Load()) != refs {
			m.fatalf("version %+v has %d references", *v, h.refs.Load())
		}
		want.Clean += btoi(v.clean())
		want.Dirty += btoi(v.dirty)
		want.Locked += btoi(v.locked)
		want.Writeback += btoi(v.writeback)
		want.Failed += btoi(v.fails)
		want.Pinned += int64(v.pins)
		want.Shadow += btoi(m.blocks[v.b].shadow == v)
	}
	for b := range m.blocks {
		want.Claims += btoi(m.blocks[b].claim != nil)
	}
	checkQueues(m.t, m.c)
	got := m.c.Metrics()
	cmp := Metrics{
		Clean: got.Clean, Dirty: got.Dirty, Locked: got.Locked, Writeback: got.Writeback, Failed: got.Failed,
		Pinned: got.Pinned, Shadow: got.Shadow, Claims: got.Claims, Cached: got.Cached, Payload: got.Payload, Admitted: got.Admitted,
	}
	want.Cached, want.Payload, want.Admitted = int64(len(m.versions)), int64(len(m.payload)), m.admitted
	if cmp != want {
		m.fatalf("gauges\n%+v, want\n%+v", cmp, want)
	}
	if int64(m.c.DirtyBlocks()) != want.Dirty || m.c.clean.Load() != want.Clean || got.DirtyWaiters != 0 || got.PayloadWaiters != 0 {
		m.fatalf("DirtyBlocks %d, clean %d: %+v", m.c.DirtyBlocks(), m.c.clean.Load(), got)
	}
	if n := m.c.arena.Outstanding(); n != len(m.versions)+len(m.payload) {
		m.fatalf("%d frames outstanding, %d versions, %d payload", n, len(m.versions), len(m.payload))
	}
	if excess := max(0, got.Cached-m.c.cacheMax); got.Payload+excess > m.c.payloadMax {
		m.fatalf("invariant 6: %+v", got)
	}
}

// finish lets everything go, fails the writeback of half of what is dirty, and
// checks that the failed versions stay.
func (m *model) finish() {
	for len(m.claims) > 0 {
		m.advanceClaim(0)
		m.compare()
	}
	for len(m.pinned) > 0 {
		m.unpin(0)
	}
	m.c.FreePayload(m.payload)
	m.payload = nil
	m.c.CancelDirty(block.Count(m.admitted))
	m.admitted = 0
	for _, r := range slices.Sorted(maps.Keys(m.versions)) {
		if v := m.versions[r]; v.locked {
			v.locked = false
			m.c.UnlockDirty(r)
			m.free(v)
		}
	}
	m.compare()
	for range 2 { // frozen, then open
		if !m.frozenWork() {
			m.freeze()
		}
		for b := range block.Index(modelBlocks) {
			m.handOffHole(b)
			if m.blocks[b].todo[m.epoch-1] == "data" {
				v := m.dirtyVersion(b, m.epoch-1)
				r, ok := m.c.LockDirty(b, m.epoch-1)
				if !ok || v == nil || r != v.ref {
					m.fatalf("block %d is not dirty in epoch %d", b, m.epoch-1)
				}
				v.locked = true
				for v.locked {
					m.advanceLocked()
					if !v.writeback && !v.locked { // it chose to unlock
						m.c.LockDirty(b, m.epoch-1)
						v.locked = true
					}
				}
			}
			m.compare()
		}
	}
	for m.dirtyLeft() || len(m.queue) > 0 {
		if len(m.queue) == 0 {
			m.fatalf("dirty versions are left that no tree has")
		}
		m.endItem(nil)
		m.compare()
	}
	for b := range block.Index(4) { // and some that fail
		m.balanceDirty(1)
		m.allocPayload(1)
		m.install(b)
		m.compare()
	}
	for b := range block.Index(4) {
		v := m.dirtyVersion(b, m.epoch)
		m.lockDirtyNow(b)
		m.c.HandOff(v.ref)
		v.locked, v.dirty, v.writeback = false, false, true
		m.queue = append(m.queue, modelItem{b: b, v: v})
		m.endItem(errors.New("no disk"))
		m.compare()
	}
	for i := range 1000 {
		b := block.Index(i % modelBlocks)
		m.get(b)
		for len(m.claims) > 0 {
			m.advanceClaim(0)
		}
		for len(m.pinned) > 0 {
			m.unpin(0)
		}
		m.compare()
	}
	for b := range block.Index(4) {
		if v := m.blocks[b].visible; v == nil || !v.fails {
			m.fatalf("the failed version of block %d is gone", b)
		}
	}
}

func (m *model) lockDirtyNow(b block.Index) {
	v := m.dirtyVersion(b, m.epoch)
	if r, ok := m.c.LockDirty(b, m.epoch); !ok || r != v.ref {
		m.fatalf("LockDirty(%d) = %d, %v", b, r, ok)
	}
	v.locked = true
	m.compare()
}

func (m *model) dirtyLeft() bool {
	for _, v := range m.versions {
		if v.dirty || v.writeback {
			return true
		}
	}
	return false
}
