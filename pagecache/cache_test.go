package pagecache

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

func small() Options {
	return Options{CacheBytes: blocks(16), PayloadBytes: blocks(8), DirtyBytesMax: blocks(12), BackgroundBytes: blocks(4)}
}

func TestOptions(t *testing.T) {
	if err := (Options{}).Validate(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
	o := Options{CacheBytes: 80 << 20}.withDefaults()
	if o.PayloadBytes != 64<<20 || o.DirtyBytesMax != 40<<20 || o.BackgroundBytes != 10<<20 {
		t.Errorf("defaults for a cache of 80 MiB: %+v", o)
	}
	if err := (Options{DirtyBytesMax: 8192}).Validate(); err != nil {
		t.Errorf("a low dirty limit alone: %v", err)
	}
	for name, o := range map[string]Options{
		"CacheBytes":      {CacheBytes: blocks(3)},
		"PayloadBytes":    {PayloadBytes: 1 << 50},
		"DirtyBytesMax":   {CacheBytes: 1 << 20, DirtyBytesMax: 1<<20 + 1},
		"BackgroundBytes": {DirtyBytesMax: 1 << 20, BackgroundBytes: 1 << 20},
	} {
		if err := o.Validate(); err == nil || !strings.Contains(err.Error(), name) || strings.Count(err.Error(), "\n") != 0 {
			t.Errorf("%+v: error %v, want one about %s", o, err, name)
		}
	}
	err := Options{CacheBytes: 1, PayloadBytes: -1, DirtyBytesMax: 1, BackgroundBytes: 2}.Validate()
	if n := strings.Count(err.Error(), "\n") + 1; n != 4 {
		t.Errorf("%d faults reported, want 4: %v", n, err)
	}
}

func TestReadLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, small())
		defer closeCache(t, c)
		_, cl, st := c.Get(7)
		if st != Claimed || cl.Block() != 7 {
			t.Fatalf("first Get: %v", st)
		}
		expectStatus(t, c, 7, Filling)
		if _, ok := c.TryClaim(7); ok {
			t.Error("a claimed block was claimed")
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		var woken atomic.Int64
		for range 3 {
			go func() {
				if err := c.WaitFill(context.Background(), 7); err != nil {
					t.Error(err)
				}
				woken.Add(1)
				expect(t, c, 7, 5)
			}()
		}
		why := errors.New("gone")
		go func() {
			if err := c.WaitFill(ctx, 7); err != why {
				t.Errorf("cancelled wait: %v", err)
			}
		}()
		synctest.Wait()
		cancel(why)
		synctest.Wait()
		if woken.Load() != 0 {
			t.Fatal("WaitFill returned before the fill")
		}
		r, ok := c.FillPinned(cl, pageOf(7, 5))
		if !ok {
			t.Fatal("FillPinned failed")
		}
		synctest.Wait()
		expect(t, c, 7, 5)
		if m := c.Metrics(); m.Pinned != 1 || m.Clean != 1 || m.Claims != 0 || m.Fills != 1 || m.FillWaits != 1 {
			t.Errorf("after the fill: %+v", m)
		}
		c.Unpin(r)
		if err := c.WaitFill(context.Background(), 7); err != nil {
			t.Error(err)
		}
		if _, ok := c.TryClaim(7); ok {
			t.Error("a present block was claimed")
		}

		// A read error: who waits looks again and finds it absent.
		_, cl, _ = c.Get(8)
		go func() {
			if err := c.WaitFill(context.Background(), 8); err != nil {
				t.Error(err)
			}
			expectStatus(t, c, 8, Claimed)
		}()
		synctest.Wait()
		c.Abandon(cl)
		synctest.Wait()
		if cl, ok := c.TryClaim(8); !ok {
			t.Error("an absent block was not claimed")
		} else {
			c.Fill(cl, pageOf(8, 1))
		}
		expect(t, c, 8, 1)
		if m := c.Metrics(); m.Abandons != 2 || m.Neighbours != 1 || m.Misses != 3 {
			t.Errorf("after the abandons: %+v", m)
		}
		mustPanic(t, "the zero Claim", func() { c.Abandon(Claim{}) })
	})
}

// Whatever comes between the claim and its Fill, nothing old is published
// (invariant 4).
func TestFillIsNeverLate(t *testing.T) {
	for name, between := range map[string]func(*testing.T, *Cache){
		"write": func(t *testing.T, c *Cache) { write(t, c, 3, 9, 1) },
		"trim":  func(t *testing.T, c *Cache) { c.InstallHole(block.Span(3, 1), 1) },
		"great trim": func(t *testing.T, c *Cache) {
			c.InstallHole(block.Range{Start: 0, End: 1 << 40}, 1)
		},
		"trim, applied": func(t *testing.T, c *Cache) {
			_, seq := c.InstallHole(block.Span(3, 1), 1)
			c.HolesApplied(block.Span(3, 1), seq)
		},
		"write, written back, evicted": func(t *testing.T, c *Cache) {
			write(t, c, 3, 9, 1)
			flush(t, c, 3, 1)
			evictEverything(t, c)
		},
		"write, written back, evicted, claimed again": func(t *testing.T, c *Cache) {
			write(t, c, 3, 9, 1)
			flush(t, c, 3, 1)
			evictEverything(t, c)
			_, cl, st := c.Get(3)
			if st != Claimed {
				t.Fatalf("second claim: %v", st)
			}
			t.Cleanup(func() { c.Abandon(cl) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCache(t, small())
			t.Cleanup(func() { closeCache(t, c) })
			_, cl, _ := c.Get(3)
			between(t, c)
			before := c.Metrics()
			if c.Fill(cl, pageOf(3, 1)) {
				t.Error("the late fill was published")
			}
			after := c.Metrics()
			if after.LateFills != 1 || after.Cached != before.Cached || after.Claims != before.Claims {
				t.Errorf("before %+v\nafter %+v", before, after)
			}
			want := map[string]Status{
				"write": Hit, "trim": Hole, "great trim": Hole,
				"write, written back, evicted, claimed again": Filling,
			}
			st, ok := want[name]
			if !ok {
				st = Claimed
			}
			if st == Hit {
				expect(t, c, 3, 9)
			} else {
				expectStatus(t, c, 3, st)
			}
		})
	}
}

func evictEverything(t testing.TB, c *Cache) {
	t.Helper()
	for {
		r, ok := c.evict(c.evictAll())
		if !ok {
			break
		}
		c.release(r)
	}
	if n := c.clean.Load(); n != 0 {
		t.Fatalf("%d clean versions cannot be evicted", n)
	}
}

// What a write and a trim in epoch 2 do to each state that a block can be in.
func TestSupersede(t *testing.T) {
	type state struct {
		name    string
		prepare func(t *testing.T, c *Cache) (cleanup func())
		// the events, and how many versions stay: dirty (with shadows), shadows,
		// in writeback
		written, trimmed         func(Metrics) uint64
		dirty, shadow, writeback int64
	}
	none := func(Metrics) uint64 { return 1 }
	nothing := func() {}
	for _, s := range []state{
		{"absent", func(t *testing.T, c *Cache) func() { return nothing },
			func(m Metrics) uint64 { return m.WritesAbsent }, none, 0, 0, 0},
		{"claimed", func(t *testing.T, c *Cache) func() {
			_, cl, _ := c.Get(3)
			return func() { c.Abandon(cl) }
		}, func(m Metrics) uint64 { return m.WritesAbsent }, none, 0, 0, 0},
		{"hole", func(t *testing.T, c *Cache) func() {
			c.InstallHole(block.Span(0, 10), 1)
			return nothing
		}, func(m Metrics) uint64 { return m.WritesAbsent }, none, 0, 0, 0},
		{"clean", func(t *testing.T, c *Cache) func() {
			load(t, c, 3, 1)
			return nothing
		}, func(m Metrics) uint64 { return m.WritesClean }, func(m Metrics) uint64 { return m.TrimsClean }, 0, 0, 0},
		{"dirty", func(t *testing.T, c *Cache) func() {
			write(t, c, 3, 1, 2)
			return nothing
		}, func(m Metrics) uint64 { return m.WritesDirty }, func(m Metrics) uint64 { return m.TrimsDirty }, 0, 0, 0},
		{"dirty and locked", func(t *testing.T, c *Cache) func() {
			write(t, c, 3, 1, 2)
			r, ok := c.LockDirty(3, 2)
			if _, again := c.LockDirty(3, 2); !ok || again {
				t.Fatalf("LockDirty %v, again %v", ok, again)
			}
			return func() {
				if c.StillDirty(r, 2) {
					t.Error("the dropped version is still dirty")
				}
				mustPanic(t, "hand-off of a dropped version", func() { c.HandOff(r) })
				if m := c.Metrics(); m.LocksLost != 1 || m.BusyPages != 2 || m.Locked != 1 {
					t.Errorf("%+v", m)
				}
				c.UnlockDirty(r)
			}
		}, func(m Metrics) uint64 { return m.WritesDirty }, func(m Metrics) uint64 { return m.TrimsDirty }, 0, 0, 0},
		{"frozen", func(t *testing.T, c *Cache) func() {
			write(t, c, 3, 1, 1)
			return func() { flush(t, c, 3, 1) }
		}, func(m Metrics) uint64 { return m.WritesFrozen }, func(m Metrics) uint64 { return m.TrimsFrozen }, 1, 1, 0},
		{"frozen and locked", func(t *testing.T, c *Cache) func() {
			write(t, c, 3, 1, 1)
			r, _ := c.LockDirty(3, 1)
			return func() {
				if !c.StillDirty(r, 1) || c.StillDirty(r, 2) {
					t.Error("the shadow is not what was locked")
				}
				if s, _ := pageStamp(c.Bytes(r), 3); s != 1 {
					t.Errorf("the shadow has stamp %d", s)
				}
				c.HandOff(r)
				c.EndWriteback(r, nil)
			}
		}, func(m Metrics) uint64 { return m.WritesFrozen }, func(m Metrics) uint64 { return m.TrimsFrozen }, 1, 1, 0},
		{"writeback", func(t *testing.T, c *Cache) func() {
			write(t, c, 3, 1, 2)
			r := handOff(t, c, 3, 2)
			expect(t, c, 3, 1)
			return func() {
				if s, _ := pageStamp(c.Bytes(r), 3); s != 1 {
					t.Errorf("the version in writeback has stamp %d", s)
				}
				c.EndWriteback(r, nil)
				if m := c.Metrics(); m.WritebacksDetached != 1 || m.Clean != 0 {
					t.Errorf("%+v", m)
				}
			}
		}, func(m Metrics) uint64 { return m.WritesWriteback }, func(m Metrics) uint64 { return m.TrimsWriteback }, 0, 0, 1},
		{"failed", func(t *testing.T, c *Cache) func() {
			if err := c.BalanceDirty(context.Background(), 1); err != nil { // for the write that comes
				t.Fatal(err)
			}
			write(t, c, 3, 1, 1)
			c.EndWriteback(handOff(t, c, 3, 1), errors.New("no disk"))
			return func() { c.CancelDirty(1) }
		}, func(m Metrics) uint64 { return m.WritesFailed }, func(m Metrics) uint64 { return m.TrimsFailed }, 0, 0, 0},
	} {
		check := func(t *testing.T, c *Cache, extraDirty int64) {
			t.Helper()
			m := c.Metrics()
			if m.Dirty != s.dirty+extraDirty || m.Shadow != s.shadow || m.Writeback != s.writeback || m.Clean != 0 || m.Failed != 0 || m.Holes < 0 {
				t.Errorf("%+v", m)
			}
			if int64(c.DirtyBlocks()) != m.Dirty {
				t.Errorf("DirtyBlocks %d, gauge %d", c.DirtyBlocks(), m.Dirty)
			}
		}
		quiescent := func(t *testing.T, c *Cache, cached int64) {
			t.Helper()
			if m := c.Metrics(); m.Cached != cached || m.Payload != 0 || m.Shadow != 0 || m.Writeback != 0 || m.Admitted != 0 {
				t.Errorf("in the end: %+v", m)
			}
		}
		t.Run(s.name+"/write", func(t *testing.T) {
			c := newCache(t, small())
			defer closeCache(t, c)
			cleanup := s.prepare(t, c)
			refs, err := c.AllocPayload(context.Background(), 1, nil)
			if err != nil {
				t.Fatal(err)
			}
			if s.name != "failed" {
				if err := c.BalanceDirty(context.Background(), 1); err != nil {
					t.Fatal(err)
				}
			}
			fillPage(c.Bytes(refs[0]), 3, 2)
			if replaced := c.Install(3, refs[0], 2); replaced != strings.HasPrefix(s.name, "dirty") {
				t.Errorf("replacedDirty %v", replaced)
			}
			if s.written(c.Metrics()) != 1 {
				t.Errorf("not counted: %+v", c.Metrics())
			}
			check(t, c, 1)
			expect(t, c, 3, 2)
			if s.name != "failed" {
				cleanup()
			}
			expect(t, c, 3, 2)
			flush(t, c, 3, 2)
			expect(t, c, 3, 2)
			quiescent(t, c, 1)
		})
		t.Run(s.name+"/trim", func(t *testing.T) {
			for _, r := range []block.Range{block.Span(3, 1), {Start: 0, End: 1 << 40}} {
				c := newCache(t, small())
				defer closeCache(t, c)
				cleanup := s.prepare(t, c)
				dropped, seq := c.InstallHole(r, 2)
				if dropped != block.Count(btoi(strings.HasPrefix(s.name, "dirty"))) || seq != c.HoleSeq() {
					t.Errorf("%v: dropped %d, number %d, newest %d", r, dropped, seq, c.HoleSeq())
				}
				if s.trimmed(c.Metrics()) != 1 {
					t.Errorf("not counted: %+v", c.Metrics())
				}
				check(t, c, 0)
				expectStatus(t, c, 3, Hole)
				cleanup()
				expectStatus(t, c, 3, Hole)
				c.HolesApplied(r, seq)
				expectStatus(t, c, 3, Claimed)
				quiescent(t, c, 0)
			}
		})
	}
}

// A reader's reference outlives whatever happens to its block, and the last one
// frees the frame (invariants 3 and 9).
func TestPinnedVersionStays(t *testing.T) {
	c := newCache(t, small())
	defer closeCache(t, c)
	load(t, c, 3, 1)
	p1, _, _ := c.Get(3)
	write(t, c, 3, 2, 1)
	p2, _, _ := c.Get(3)
	write(t, c, 3, 3, 1)
	p3, _, _ := c.Get(3)
	p3again, _, _ := c.Get(3)
	wb := handOff(t, c, 3, 1)
	_, seq := c.InstallHole(block.Span(3, 1), 1)
	c.EndWriteback(wb, nil)
	c.HolesApplied(block.Span(3, 1), seq)
	for range 100 { // more than there are frames
		_, cl, _ := c.Get(block.Index(50 + c.Metrics().Misses))
		c.Fill(cl, pageOf(9, 9))
	}
	for i, p := range []Ref{p1, p2, p3, p3again} {
		if s, whole := pageStamp(c.Bytes(p), 3); s != min(uint64(i)+1, 3) || !whole {
			t.Errorf("pin %d has stamp %d", i, s)
		}
	}
	m := c.Metrics()
	if m.Pinned != 4 || m.Cached != 16 || m.Cached-m.Clean != 3 {
		t.Errorf("%+v", m)
	}
	for i, p := range []Ref{p1, p2, p3, p3again} {
		c.Unpin(p)
		if m := c.Metrics(); m.Cached != []int64{15, 14, 14, 13}[i] {
			t.Errorf("after %d pins: %d cached", i+1, m.Cached)
		}
	}
}

// Each epoch's version is found by its epoch alone.
func TestFrozenAndOpen(t *testing.T) {
	c := newCache(t, small())
	defer closeCache(t, c)
	write(t, c, 3, 1, 1)
	inWriteback := handOff(t, c, 3, 1)
	write(t, c, 3, 2, 1)
	write(t, c, 3, 3, 2) // epoch 1 is frozen
	if m := c.Metrics(); m.Dirty != 2 || m.Shadow != 1 || m.Writeback != 1 || m.WritesWriteback != 1 || m.WritesFrozen != 1 {
		t.Fatalf("three versions: %+v", m)
	}
	expect(t, c, 3, 3)
	if _, ok := c.LockDirty(3, 7); ok {
		t.Error("a version of epoch 7 was found")
	}
	frozen, ok := c.LockDirty(3, 1)
	if !ok || !c.StillDirty(frozen, 1) {
		t.Fatal("the frozen version was not found")
	}
	open, ok := c.LockDirty(3, 2)
	if !ok || open == frozen {
		t.Fatal("the open version was not found")
	}
	for r, want := range map[Ref]uint64{inWriteback: 1, frozen: 2, open: 3} {
		if s, whole := pageStamp(c.Bytes(r), 3); s != want || !whole {
			t.Errorf("version %d has stamp %d, want %d", r, s, want)
		}
	}
	c.UnlockDirty(open)
	if dropped, _ := c.InstallHole(block.Span(3, 1), 2); dropped != 1 {
		t.Errorf("the trim dropped %d of the open epoch", dropped)
	}
	if !c.StillDirty(frozen, 1) {
		t.Error("a trim of the open epoch dropped a frozen version")
	}
	c.UnlockDirty(frozen)
	flush(t, c, 3, 1)
	c.EndWriteback(inWriteback, nil)
	if _, ok := c.LockDirty(3, 1); ok {
		t.Error("a written version is dirty")
	}
	if m := c.Metrics(); m.Cached != 0 || m.Admitted != 0 {
		t.Errorf("in the end: %+v", m)
	}
}

// A failed version is readable and not evicted, and nobody waits for it.
func TestWritebackError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := small()
		o.DirtyBytesMax = blocks(5)
		c := newCache(t, o)
		defer closeCache(t, c)
		for b := range block.Index(5) {
			write(t, c, b, 7, 1)
		}
		var items []Ref
		for b := range block.Index(5) {
			items = append(items, handOff(t, c, b, 1))
		}
		noDisk := errors.New("no disk")
		go func() {
			if err := c.BalanceDirty(context.Background(), 1); !errors.Is(err, noDisk) {
				t.Errorf("a waiting BalanceDirty: %v", err)
			}
		}()
		synctest.Wait()
		if !c.WaitersForDirty() {
			t.Fatal("BalanceDirty did not wait")
		}
		for _, r := range items {
			c.EndWriteback(r, noDisk)
		}
		synctest.Wait()
		if err := c.BalanceDirty(context.Background(), 1); !errors.Is(err, noDisk) {
			t.Errorf("a later BalanceDirty: %v", err)
		}
		for b := block.Index(100); b < 200; b++ {
			load(t, c, b, 1)
		}
		for b := range block.Index(5) {
			expect(t, c, b, 7)
		}
		if m := c.Metrics(); m.Failed != 5 || m.WritebackErrors != 5 || m.Pinned != 0 || m.Clean != 11 {
			t.Errorf("%+v", m)
		}
	})
}

func TestHoles(t *testing.T) {
	c := newCache(t, small())
	defer closeCache(t, c)
	_, s1 := c.InstallHole(block.Range{Start: 10, End: 20}, 1)
	write(t, c, 12, 1, 1) // a write into the hole
	_, s2 := c.InstallHole(block.Range{Start: 15, End: 30}, 1)
	if s1 == 0 || s2 <= s1 || c.HoleSeq() != s2 {
		t.Fatalf("numbers %d, %d, newest %d", s1, s2, c.HoleSeq())
	}
	status := func(want string) {
		t.Helper()
		var got strings.Builder
		for b := block.Index(9); b <= 30; b++ {
			r, cl, st := c.Get(b)
			switch st {
			case Hit:
				c.Unpin(r)
			case Claimed:
				c.Abandon(cl)
			}
			got.WriteByte(map[Status]byte{Hit: 'd', Hole: 'o', Claimed: '.'}[st])
		}
		if got.String() != want {
			t.Errorf("blocks 9 to 30 are\n%s, want\n%s", &got, want)
		}
	}
	status(".ood" + strings.Repeat("o", 17) + ".")
	c.HolesApplied(block.Range{Start: 0, End: 100}, s1-1)
	status(".ood" + strings.Repeat("o", 17) + ".")
	c.HolesApplied(block.Range{Start: 11, End: 18}, s1) // of the older one, a part
	status(".o.d.." + strings.Repeat("o", 15) + ".")
	c.HolesApplied(block.Range{Start: 17, End: 19}, s2)
	status(".o.d..oo.." + strings.Repeat("o", 11) + ".")
	c.HolesApplied(block.Range{Start: 0, End: 100}, s2)
	status("...d..................")
	if n := c.Metrics().Holes; n != 0 {
		t.Errorf("%d ranges are left", n)
	}
	if dropped, seq := c.InstallHole(block.Range{}, 1); dropped != 0 || seq != s2 {
		t.Errorf("an empty hole: dropped %d, number %d", dropped, seq)
	}
	c.InstallHole(block.Span(40, 1), 1)
	if _, ok := c.TryClaim(40); ok {
		t.Error("a block in a hole was claimed")
	}
}

// The set of holes against an array.
func TestHoleMapModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	const n = 60
	var m holeMap
	var model [n]uint64
	for i := range 3000 * disktest.Scale(t) {
		r := block.Span(block.Index(rng.IntN(n)), block.Count(1+rng.IntN(12)))
		r.End = min(r.End, n)
		switch rng.IntN(3) {
		case 0:
			seq := m.insert(r)
			for b := r.Start; b < r.End; b++ {
				model[b] = seq
			}
		case 1:
			seq := m.last() - min(m.last(), rng.Uint64N(4))
			m.remove(r, seq)
			for b := r.Start; b < r.End; b++ {
				if model[b] <= seq {
					model[b] = 0
				}
			}
		case 2:
			m.punch(r.Start)
			model[r.Start] = 0
		}
		for b := range block.Index(n) {
			if m.contains(b) != (model[b] != 0) {
				t.Fatalf("step %d: block %d in a hole: %v, want number %d", i, b, m.contains(b), model[b])
			}
		}
		part := block.Span(block.Index(rng.IntN(n)), block.Count(1+rng.IntN(n)))
		max := 1 + rng.IntN(8)
		holes, stop := m.in(part, max, nil)
		if stop < min(part.End, part.Start+1) || stop > part.End || len(holes) > max+1 {
			t.Fatalf("step %d: %d of the holes in %v, up to block %d", i, len(holes), part, stop)
		}
		for b := part.Start; b < min(stop, n); b++ {
			in := slices.ContainsFunc(holes, func(r block.Range) bool { return r.Contains(b) })
			if in != (model[b] != 0) {
				t.Fatalf("step %d: block %d among %v: %v", i, b, holes, in)
			}
		}
		end := block.Index(0)
		m.ranges.Scan(func(start block.Index, h hole) bool {
			if start < end || h.end <= start || int(h.end) > n || model[start] != h.seq {
				t.Fatalf("step %d: range [%d,%d) number %d after %d", i, start, h.end, h.seq, end)
			}
			end = h.end
			return true
		})
		if int(m.count.Load()) != m.ranges.Len() {
			t.Fatalf("step %d: count %d of %d", i, m.count.Load(), m.ranges.Len())
		}
	}
}

// Unstored finds what is dirty, in writeback or failed, and nothing else, by
// either way of looking, while other blocks come and go.
func TestUnstored(t *testing.T) {
	c := newCache(t, Options{CacheBytes: blocks(256), PayloadBytes: blocks(16), DirtyBytesMax: blocks(256), BackgroundBytes: blocks(255)})
	defer closeCache(t, c)
	expect := func(r block.Range, max int, end block.Index, want ...block.Index) {
		t.Helper()
		if got, stop := c.Unstored(r, max, nil); !slices.Equal(got, want) || stop != end {
			t.Errorf("in %v: %v up to %d, want %v up to %d", r, got, stop, want, end)
		}
	}
	all := block.Range{End: 1 << 40}
	expect(all, 10, all.End)
	for _, b := range []block.Index{7, 1 << 30, 9, 8, 20} {
		write(t, c, b, 1, 1)
	}
	_, cl, _ := c.Get(10) // clean
	c.Fill(cl, pageOf(10, 1))
	expect(all, 10, all.End, 7, 8, 9, 20, 1<<30)
	expect(all, 2, 9, 7, 8)
	expect(block.Range{Start: 8, End: 20}, 10, 20, 8, 9)
	expect(block.Range{Start: 8, End: 30}, 2, 10, 8, 9)
	writing := map[block.Index]Ref{}
	for _, b := range []block.Index{8, 9, 20} {
		r, ok := c.LockDirty(b, 1)
		if !ok || !c.StillDirty(r, 1) {
			t.Fatal("not dirty")
		}
		c.HandOff(r)
		writing[b] = r
	}
	write(t, c, 7, 2, 2) // its older version is a shadow
	c.InstallHole(block.Span(20, 1), 2)
	expect(all, 10, all.End, 7, 8, 9, 1<<30)
	c.EndWriteback(writing[8], nil)
	c.EndWriteback(writing[9], errors.New("failed"))
	c.EndWriteback(writing[20], nil)
	expect(all, 10, all.End, 7, 9, 1<<30)
	expect(block.Range{Start: 7, End: 12}, 10, 12, 7, 9)

}

// A block that is always dirty is always found, whatever frame it is in.
func TestUnstoredMissesNothing(t *testing.T) {
	c := newCache(t, small())
	defer closeCache(t, c)
	write(t, c, 7, 1, 1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for stamp := uint64(2); ; stamp++ {
			select {
			case <-stop:
				return
			default:
				write(t, c, 7, stamp, 1)
			}
		}
	})
	for range 2000 {
		if got, _ := c.Unstored(block.Range{End: 1 << 40}, 10, nil); !slices.Contains(got, 7) {
			t.Errorf("block 7 was missed: %v", got)
			break
		}
	}
	close(stop)
	wg.Wait()
}

// What is read again stays, what is read once goes.
func TestEvictionKeepsWhatIsRead(t *testing.T) {
	c := newCache(t, small())
	defer closeCache(t, c)
	load(t, c, 1, 1)
	for b := block.Index(100); b < 200; b++ {
		expect(t, c, 1, 1)
		load(t, c, b, 1)
	}
	expect(t, c, 1, 1)
	expectStatus(t, c, 100, Claimed)
	if m := c.Metrics(); m.Cached != 16 || m.Clean != 16 || m.Evictions != 101-16 {
		t.Errorf("%+v", m)
	}
}

// A reader never waits for memory.
func TestFillWithoutFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, Options{CacheBytes: blocks(8), PayloadBytes: blocks(4), DirtyBytesMax: blocks(6)})
		defer closeCache(t, c)
		for b := range block.Index(6) {
			write(t, c, b, 1, 1)
		}
		load(t, c, 6, 1)
		load(t, c, 7, 1)
		p6, _, _ := c.Get(6)
		p7, _, _ := c.Get(7)
		_, cl, _ := c.Get(8)
		go func() {
			if err := c.WaitFill(context.Background(), 8); err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		if _, ok := c.FillPinned(cl, pageOf(8, 1)); ok {
			t.Error("a frame was had although all are dirty or pinned")
		}
		synctest.Wait()
		expectStatus(t, c, 8, Claimed)
		c.Unpin(p7)
		load(t, c, 8, 1)
		expect(t, c, 8, 1)
		expect(t, c, 6, 1)
		expectStatus(t, c, 7, Claimed)
		c.Unpin(p6)
		c.InstallHole(block.Span(6, 3), 1)
		for range 2 { // refill what the trim freed, with dirty versions
			if err := c.BalanceDirty(canceled(), 1); err == nil {
				t.Error("admitted above the limit")
			}
		}
		if m := c.Metrics(); m.FillsUncached != 1 || m.Dirty != 6 {
			t.Errorf("%+v", m)
		}
	})
}

func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// With everything dirty, TryClaim does not begin what cannot be filled.
func TestTryClaimNeedsAFrame(t *testing.T) {
	c := newCache(t, Options{CacheBytes: blocks(4), PayloadBytes: blocks(4), DirtyBytesMax: blocks(4)})
	defer closeCache(t, c)
	for b := range block.Index(4) {
		write(t, c, b, 1, 1)
	}
	if _, ok := c.TryClaim(9); ok {
		t.Error("claimed")
	}
	flush(t, c, 0, 1)
	cl, ok := c.TryClaim(9)
	if !ok || !c.Fill(cl, pageOf(9, 1)) {
		t.Error("not claimed or filled although a clean version could go")
	}
}

// Payload is granted in order, as a whole, and comes back.
func TestPayloadGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kicks := 0
		o := small()
		o.NeedWriteback = func() { kicks++ }
		c := newCache(t, o)
		defer closeCache(t, c)
		bg := context.Background()
		if _, err := c.AllocPayload(bg, 9, nil); err == nil {
			t.Error("more than the budget was granted")
		}
		if refs, err := c.AllocPayload(bg, 0, nil); err != nil || len(refs) != 0 {
			t.Errorf("nothing: %v, %v", refs, err)
		}
		held, err := c.AllocPayload(bg, 6, make([]Ref, 0, 8))
		if err != nil || len(held) != 6 {
			t.Fatalf("%v, %v", held, err)
		}
		var order []int
		ctx, cancel := context.WithCancel(bg)
		for i, n := range []int{8, 3, 2} {
			go func() {
				refs, err := c.AllocPayload([]context.Context{ctx, bg, bg}[i], n, nil)
				if (err != nil) != (i == 0) {
					t.Errorf("request %d: %v", i, err)
				}
				order = append(order, i)
				c.FreePayload(refs)
			}()
			synctest.Wait()
		}
		if len(order) != 0 || c.Metrics().PayloadWaiters != 3 || kicks != 3 {
			t.Fatalf("granted %v, %d wait, %d kicks", order, c.Metrics().PayloadWaiters, kicks)
		}
		// 2 frames are free, and the last request would fit.
		cancel()
		synctest.Wait()
		if !slices.Equal(order, []int{0}) {
			t.Fatalf("granted %v: small requests must not pass", order)
		}
		c.FreePayload(held[:1])
		synctest.Wait()
		if !slices.Equal(order, []int{0, 1, 2}) || c.Metrics().Payload != 5 {
			t.Fatalf("granted %v", order)
		}
		c.FreePayload(held[1:])
		mustPanic(t, "payload freed twice", func() { c.FreePayload(held[:1]) })
	})
}

// Payload that is admitted counts, and has frames only when they are taken.
func TestPayloadAdmitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, small())
		defer closeCache(t, c)
		bg := context.Background()
		if err := c.AdmitPayload(bg, 9); err == nil {
			t.Error("more than the budget was admitted")
		}
		if err := c.AdmitPayload(bg, 6); err != nil {
			t.Fatal(err)
		}
		if n, m := c.arena.Outstanding(), c.Metrics(); n != 0 || m.Payload != 6 {
			t.Errorf("%d frames are taken for %d admitted blocks", n, m.Payload)
		}
		refs := c.TakePayload(4, nil)
		if n, m := c.arena.Outstanding(), c.Metrics(); n != 4 || m.Payload != 6 || len(refs) != 4 {
			t.Errorf("%d frames are taken, %d handed out, for %d admitted blocks", n, len(refs), m.Payload)
		}
		admitted := false
		go func() {
			if err := c.AdmitPayload(bg, 4); err != nil {
				t.Error(err)
			}
			admitted = true
		}()
		synctest.Wait()
		if admitted {
			t.Error("admitted beyond the budget")
		}
		c.CancelPayload(2)
		synctest.Wait()
		if !admitted {
			t.Error("what was given back admits nobody")
		}
		c.CancelPayload(4)
		c.FreePayload(refs)
		if m := c.Metrics(); m.Payload != 0 {
			t.Errorf("%d blocks of payload are left", m.Payload)
		}
	})
}

// A cache above its limit takes the excess from the payload budget, until
// writeback or a reader lets frames go.
func TestPayloadWaitsForTheExcess(t *testing.T) {
	for _, how := range []string{"unpin", "writeback", "trim"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCache(t, Options{CacheBytes: blocks(8), PayloadBytes: blocks(4), DirtyBytesMax: blocks(4)})
				defer closeCache(t, c)
				var pins []Ref
				for b := range block.Index(8) {
					load(t, c, b, 1)
					p, _, _ := c.Get(b)
					pins = append(pins, p)
				}
				for b := range block.Index(4) {
					write(t, c, 20+b, 1, 1)
				}
				if m := c.Metrics(); m.Cached != 12 || m.Payload != 0 {
					t.Fatalf("%+v", m)
				}
				granted := false
				go func() {
					refs, err := c.AllocPayload(context.Background(), 1, nil)
					if err != nil {
						t.Error(err)
					}
					granted = true
					c.FreePayload(refs)
				}()
				synctest.Wait()
				if granted {
					t.Fatal("a frame that does not exist was granted")
				}
				switch how {
				case "unpin":
					c.Unpin(pins[0])
					pins = pins[1:]
				case "writeback":
					flush(t, c, 20, 1)
				case "trim":
					c.InstallHole(block.Span(20, 1), 1)
				}
				synctest.Wait()
				if !granted {
					t.Fatal("not granted")
				}
				for _, p := range pins {
					c.Unpin(p)
				}
				for b := range block.Index(4) {
					if r, ok := c.LockDirty(20+b, 1); ok {
						c.HandOff(r)
						c.EndWriteback(r, nil)
					}
				}
				if m := c.Metrics(); m.Cached > 8 {
					t.Errorf("the cache stays above its limit: %+v", m)
				}
			})
		})
	}
}

func TestBalanceDirty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kicks := 0
		c := newCache(t, Options{
			CacheBytes: blocks(32), PayloadBytes: blocks(32), DirtyBytesMax: blocks(8), BackgroundBytes: blocks(4),
			NeedWriteback: func() { kicks++ },
		})
		defer closeCache(t, c)
		bg := context.Background()
		for b := range block.Index(4) {
			write(t, c, b, 1, 1)
		}
		if c.OverBackground() || kicks != 0 {
			t.Fatalf("over background with 4 of 4, %d kicks", kicks)
		}
		write(t, c, 4, 1, 1)
		if !c.OverBackground() || kicks != 1 {
			t.Fatalf("over background %v with 5 of 4, %d kicks", c.OverBackground(), kicks)
		}
		if !c.Backlogged() || c.Throttles() {
			t.Fatalf("5 of 4 and 8: backlogged %v, throttles %v", c.Backlogged(), c.Throttles())
		}
		write(t, c, 4, 2, 1) // replaced: no place used up
		if m := c.Metrics(); m.Dirty != 5 || m.Admitted != 0 || c.DirtyBlocks() != 5 {
			t.Fatalf("%+v", m)
		}
		if err := c.BalanceDirty(bg, 0); err != nil {
			t.Fatal(err)
		}

		if err := c.BalanceDirty(bg, 2); err != nil || !c.Throttles() {
			t.Fatalf("7 of 4 and 8: %v, throttles %v", err, c.Throttles())
		}
		c.CancelDirty(2)

		var order []int
		ctx, cancel := context.WithCancel(bg)
		for i, n := range []block.Count{100, 4, 3} {
			go func() {
				err := c.BalanceDirty([]context.Context{ctx, bg, bg}[i], n)
				if (err != nil) != (i == 0) {
					t.Errorf("request %d: %v", i, err)
				}
				order = append(order, i)
			}()
			synctest.Wait()
		}
		if len(order) != 0 || !c.WaitersForDirty() || kicks != 4 {
			t.Fatalf("admitted %v, %d kicks", order, kicks)
		}
		cancel()
		synctest.Wait()
		if !slices.Equal(order, []int{0}) {
			t.Fatalf("admitted %v", order)
		}
		// Hand-off alone frees nothing: writeback counts.
		items := []Ref{handOff(t, c, 0, 1), handOff(t, c, 1, 1)}
		synctest.Wait()
		if len(order) != 1 || c.DirtyBlocks() != 3 {
			t.Fatalf("admitted %v with %d dirty", order, c.DirtyBlocks())
		}
		c.EndWriteback(items[0], nil) // 4 + 4 = the limit
		synctest.Wait()
		if !slices.Equal(order, []int{0, 1}) {
			t.Fatalf("admitted %v", order)
		}
		c.EndWriteback(items[1], nil)
		c.CancelDirty(1)
		synctest.Wait()
		if len(order) != 2 {
			t.Fatalf("admitted %v", order)
		}
		c.InstallHole(block.Span(2, 1), 1)
		synctest.Wait()
		if !slices.Equal(order, []int{0, 1, 2}) || c.WaitersForDirty() {
			t.Fatalf("admitted %v", order)
		}
		if m := c.Metrics(); m.Admitted != 6 || m.Dirty != 2 {
			t.Fatalf("%+v", m)
		}
		c.CancelDirty(6)

		// More than the limit is admitted when nothing is dirty, and only then.
		if c.BalanceDirty(canceled(), 9) == nil {
			t.Fatal("9 admitted over 2 dirty")
		}
		c.InstallHole(block.Span(0, 10), 1)
		if err := c.BalanceDirty(bg, 9); err != nil {
			t.Fatal(err)
		}
		if c.BalanceDirty(canceled(), 1) == nil {
			t.Fatal("admitted above the limit")
		}
		c.CancelDirty(9)
		if kicks < 5 {
			t.Errorf("%d kicks", kicks)
		}
	})
}

// An Install while somebody waits asks for writeback, however little is dirty:
// what was admitted when the waiter came has only now become something to write.
func TestInstallKicksForWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kicks := 0
		o := small() // 12 dirty, background 4
		o.NeedWriteback = func() { kicks++ }
		c := newCache(t, o)
		defer closeCache(t, c)
		if err := c.BalanceDirty(context.Background(), 1); err != nil {
			t.Fatal(err)
		}
		go func() {
			if err := c.BalanceDirty(context.Background(), 12); err != nil {
				t.Error(err)
			}
			c.CancelDirty(12)
		}()
		synctest.Wait()
		before := kicks
		writeAdmitted(t, c, 1, 1, 1)
		if kicks != before+1 {
			t.Errorf("%d kicks", kicks-before)
		}
		flush(t, c, 1, 1)
		synctest.Wait()
	})
}

func TestCloseFindsLeaks(t *testing.T) {
	for name, leak := range map[string]func(*Cache){
		"pins": func(c *Cache) {
			load(t, c, 1, 1)
			c.Get(1)
		},
		"claims":          func(c *Cache) { c.Get(1) },
		"payload":         func(c *Cache) { c.AllocPayload(context.Background(), 1, nil) },
		"admitted":        func(c *Cache) { c.BalanceDirty(context.Background(), 1) },
		"locked versions": func(c *Cache) { write(t, c, 1, 1, 1); c.LockDirty(1, 1) },
		"writeback":       func(c *Cache) { write(t, c, 1, 1, 1); handOff(t, c, 1, 1) },
	} {
		c := newCache(t, small())
		leak(c)
		err := func() (err error) {
			defer func() {
				if r := recover(); r != nil {
					if !invariants.Enabled {
						t.Errorf("%s: panic without invariants", name)
					}
					err = fmt.Errorf("%v", r)
				}
			}()
			return c.Close()
		}()
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("close with a leak of %s: %v", name, err)
		}
	}
}

func TestMistakesPanic(t *testing.T) {
	c := newCache(t, small())
	write(t, c, 1, 1, 1)
	r, _, _ := c.Get(1)
	mustPanic(t, "install of a version", func() { c.Install(2, r, 1) })
	mustPanic(t, "free of a version as payload", func() { c.FreePayload([]Ref{r}) })
	mustPanic(t, "unlock of what is not locked", func() { c.UnlockDirty(r) })
	mustPanic(t, "hand-off of what is not locked", func() { c.HandOff(r) })
	mustPanic(t, "end of no writeback", func() { c.EndWriteback(r, nil) })
	_, cl, _ := c.Get(3)
	mustPanic(t, "fill with half a page", func() { c.Fill(cl, make([]byte, 2048)) })
	c.Abandon(cl)
	c.Unpin(r)
	if invariants.Enabled {
		write(t, c, 1, 2, 2)
		refs, _ := c.AllocPayload(context.Background(), 1, nil)
		mustPanic(t, "a second shadow", func() { c.Install(1, refs[0], 3) })
	}
}

func TestDataPathDoesNotAllocate(t *testing.T) {
	if invariants.Enabled {
		t.Skip("builds with invariants allocate for their checks")
	}
	c := newCache(t, Options{CacheBytes: blocks(64), PayloadBytes: blocks(8)})
	defer closeCache(t, c)
	page := pageOf(0, 1)
	ctx := context.Background()
	refs := make([]Ref, 0, 8)
	b := block.Index(0)
	c.InstallHole(block.Span(1<<30, 8), 1) // so that look-ups look at the holes too
	for name, f := range map[string]func(){
		"read": func() {
			r, cl, st := c.Get(b)
			if st == Claimed {
				r, _ = c.FillPinned(cl, page)
			}
			c.Unpin(r)
			b++
		},
		"write": func() {
			if c.BalanceDirty(ctx, 1) != nil {
				t.Fatal("not admitted")
			}
			refs, _ = c.AllocPayload(ctx, 1, refs[:0])
			c.Install(b, refs[0], 1)
			r, _ := c.LockDirty(b, 1)
			c.HandOff(r)
			c.EndWriteback(r, nil)
			b++
		},
	} {
		for range 1000 {
			f() // the maps of claims grow to their size
		}
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("a %s makes %v allocations", name, n)
		}
	}
}

func BenchmarkGetHit(b *testing.B) {
	c := newCache(b, Options{CacheBytes: 64 << 20})
	const n = 8192
	for i := range block.Index(n) {
		load(b, c, i, 1)
	}
	b.Run("serial", func(b *testing.B) {
		b.ReportAllocs()
		i := block.Index(0)
		for b.Loop() {
			r, _, st := c.Get(i % n)
			if st != Hit {
				b.Fatal(st)
			}
			c.Unpin(r)
			i += 7
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for i := block.Index(rand.IntN(n)); pb.Next(); i += 7 {
				r, _, _ := c.Get(i % n)
				c.Unpin(r)
			}
		})
	})
}

// A write from admission to installation, the same block time and again: the copy
// of the bytes, which is the socket's, is not in it.
func BenchmarkInstall(b *testing.B) {
	ctx := context.Background()
	b.Run("over dirty", func(b *testing.B) {
		c := newCache(b, Options{CacheBytes: 64 << 20})
		refs := make([]Ref, 0, 1)
		b.ReportAllocs()
		i := block.Index(0)
		for b.Loop() {
			if c.BalanceDirty(ctx, 1) != nil {
				b.Fatal("not admitted")
			}
			refs, _ = c.AllocPayload(ctx, 1, refs[:0])
			c.Install(i%1024, refs[0], 1)
			i++
		}
	})
	b.Run("with writeback and eviction", func(b *testing.B) {
		c := newCache(b, Options{CacheBytes: 64 << 20})
		refs := make([]Ref, 0, 1)
		b.ReportAllocs()
		i := block.Index(0)
		for b.Loop() {
			if c.BalanceDirty(ctx, 1) != nil {
				b.Fatal("not admitted")
			}
			refs, _ = c.AllocPayload(ctx, 1, refs[:0])
			c.Install(i, refs[0], 1)
			r, _ := c.LockDirty(i, 1)
			c.HandOff(r)
			c.EndWriteback(r, nil)
			i++
		}
	})
}

func BenchmarkMissFill(b *testing.B) {
	c := newCache(b, Options{CacheBytes: 16 << 20})
	page := pageOf(0, 1)
	b.ReportAllocs()
	b.SetBytes(block.Size)
	i := block.Index(0)
	for b.Loop() {
		_, cl, _ := c.Get(i)
		c.Fill(cl, page)
		i++
	}
}

// The trim of a whole device of 16 TiB.
func BenchmarkTrimAll(b *testing.B) {
	c := newCache(b, Options{CacheBytes: 256 << 20})
	for i := range block.Index(65536) {
		load(b, c, i, 1)
	}
	all := block.Range{End: 1 << 32}
	b.ReportAllocs()
	for b.Loop() {
		_, seq := c.InstallHole(all, 1)
		c.HolesApplied(all, seq)
	}
}
