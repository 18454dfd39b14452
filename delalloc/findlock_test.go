package delalloc

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"

	"cnbd/extents"
	"cnbd/internal/block"
)

// What findLock makes of [3, 43), depending on what happens before it, and while
// it locks the pages, between the last page and the range lock.
func TestFindLock(t *testing.T) {
	whole, one, none := rng(3, 43), rng(3, 4), rng(0, 0)
	type test struct {
		name   string
		before func(g *rig)
		locked func(g *rig) // when the last page of the first try is locked
		want   block.Range  // none: busy
		finds, busy, retests,
		again uint64 // locked is called so often
	}
	tests := []test{
		{name: "nothing happens", want: whole, finds: 1},
		{name: "a page in the middle is trimmed", locked: func(g *rig) { g.trim(rng(20, 21)) }, want: one, finds: 2, retests: 1},
		{name: "the last page is trimmed", locked: func(g *rig) { g.trim(rng(42, 50)) }, want: one, finds: 2, retests: 1},
		{name: "the first page is trimmed", locked: func(g *rig) { g.trim(rng(0, 4)) }, want: none, finds: 2, retests: 1, busy: 1},
		{name: "all is trimmed", locked: func(g *rig) { g.trim(rng(0, 60)) }, want: none, finds: 2, retests: 1, busy: 1},
		{name: "a page in the middle is written anew", locked: func(g *rig) { g.write(rng(20, 21), text) }, want: one, finds: 2, retests: 1},
		{name: "the first page is written anew", locked: func(g *rig) { g.write(rng(3, 4), text) }, want: one, finds: 2, retests: 1},
		{name: "a page is trimmed and written anew", locked: func(g *rig) { g.trim(rng(20, 21)); g.write(rng(20, 21), text) }, want: one, finds: 2, retests: 1},
		{name: "the first page is written anew at each try", locked: func(g *rig) { g.write(rng(3, 4), text) }, again: 1, want: none, finds: 2, retests: 2},
		// Each half of the re-test by itself.
		{name: "a bit goes, all pages stay", locked: func(g *rig) { g.es.open.State.Clear(rng(20, 21), extents.Delalloc) }, want: one, finds: 2, retests: 1},
		{name: "a page goes, all bits stay", locked: func(g *rig) { g.pages.drop(20, 1) }, want: one, finds: 2, retests: 1},
		{name: "the last page goes, all bits stay", locked: func(g *rig) { g.pages.drop(42, 1) }, want: one, finds: 2, retests: 1},
		// The holder of a range lock is waited for, whatever he has done.
		{name: "a range lock is held and given up", locked: func(g *rig) {
			g.es.open.State.Lock(rng(10, 12), 99)
			go func() {
				synctest.Wait()
				g.es.open.State.Unlock(rng(10, 12), 99, 0, 0)
			}()
		}, want: whole, finds: 1},
		{name: "a range lock is held for a trim", locked: func(g *rig) {
			g.es.open.State.Lock(rng(10, 12), 99)
			go func() {
				synctest.Wait()
				g.pages.installHole(rng(10, 12), 1)
				g.es.open.State.Unlock(rng(10, 12), 99, extents.DirtyHole, extents.Delalloc)
			}()
		}, want: one, finds: 2, retests: 1},
	}
	// A page has gone, or another has it locked, at each place: in the gang of 16
	// that Linux takes at a time, and in the next.
	for k := range block.Index(40) {
		want, busy := one, uint64(1)
		if k == 0 {
			want, busy = none, 2
		}
		tests = append(tests,
			test{name: fmt.Sprintf("page %d has gone", 3+k), before: func(g *rig) { g.pages.drop(3+k, 1) }, want: want, finds: 2, busy: busy},
			test{name: fmt.Sprintf("page %d is locked", 3+k), before: func(g *rig) {
				f, _ := g.pages.LockDirty(3+k, 1)
				g.pages.held = nil // that was another flusher
				g.t.Cleanup(func() { g.pages.UnlockDirty(f) })
			}, want: want, finds: 2, busy: busy})
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newRig(t, rigOptions{})
				g.write(rng(3, 43), text)
				if tc.before != nil {
					tc.before(g)
				}
				calls := uint64(0)
				g.pages.locked = func(b block.Index) {
					if tc.locked != nil && (calls == 0 && b == 42 || calls > 0 && calls <= tc.again && b == 3) {
						calls++
						tc.locked(g)
					}
				}
				e := g.es.Open()
				g.w.handOff.Lock()
				r, pages, ok := g.w.findLock(e, whole)
				if ok != !tc.want.Empty() || ok && r != tc.want {
					t.Fatalf("found %v, %t, want %v", r, ok, tc.want)
				}
				if !ok {
					r = none
				}
				m := g.w.Metrics()
				if m.Finds != tc.finds || m.Busy != tc.busy || m.Retests != tc.retests {
					t.Errorf("%d finds, %d busy, %d failed re-tests, want %d, %d, %d", m.Finds, m.Busy, m.Retests, tc.finds, tc.busy, tc.retests)
				}
				// Exactly the range is locked, pages and bits, and is what it was
				// found for.
				var want []block.Index
				for b := r.Start; b < r.End; b++ {
					want = append(want, b)
				}
				if held := g.pages.heldPages(); !slices.Equal(held, want) || len(pages) != len(want) {
					t.Errorf("pages %v are locked and %d are returned, want %v", held, len(pages), want)
				}
				if n := e.State.Count(extents.Locked); n != r.Len() || !e.State.Test(r, extents.Locked|extents.Delalloc, true) {
					t.Errorf("%d blocks are locked, not those of %v, or not delalloc", n, r)
				}
				for _, p := range pages {
					if !g.pages.StillDirty(p, 1) {
						t.Error("a page is not dirty")
					}
				}
				e.State.Unlock(r, Owner, 0, 0)
				g.w.unlockPages(pages)
				g.w.handOff.Unlock()
			})
		})
	}
}

// A pass goes around whatever is busy, hands off the rest, and leaves what was
// busy dirty for the next one. Nothing leaks: neither locks nor tokens.
func TestBusyPagesAreLeft(t *testing.T) {
	for _, busy := range [][]block.Index{{0}, {39}, {15}, {16}, {17}, {3, 4}, {0, 20, 39}} {
		t.Run(fmt.Sprint(busy), func(t *testing.T) {
			g := newRig(t, rigOptions{})
			g.write(rng(0, 40), text)
			for _, b := range busy {
				g.es.open.State.Lock(rng(b, b+1), 99+uint64(b))
				g.pages.drop(b, 1) // about to be trimmed
			}
			c := Control{Budget: all}
			g.background(&c)
			left := block.Count(len(busy))
			if c.Written != 40-left || g.w.Metrics().Pages != uint64(40-left) {
				t.Errorf("%d blocks written, %d handed off, want %d", c.Written, g.w.Metrics().Pages, 40-left)
			}
			if n := g.es.open.State.Count(extents.Delalloc); n != left {
				t.Errorf("%d blocks are left delalloc, want %d", n, left)
			}
			for _, b := range busy {
				g.pages.installHole(rng(b, b+1), 1)
				g.es.open.State.Unlock(rng(b, b+1), 99+uint64(b), extents.DirtyHole, extents.Delalloc)
				clear(g.truth[b.Bytes():][:block.Size])
			}
			g.reserved.Add(-int64(left))
			g.commit()
			g.read(rng(0, 40))
			g.close()
		})
	}
}

// With Sync, what is busy is waited for by its range lock, not left.
func TestSyncWaitsForTheRange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		g.write(rng(0, 40), text)
		// A request that holds a range while its epoch is frozen.
		e := g.es.Open()
		e.State.Lock(rng(10, 12), 99)
		g.pages.installHole(rng(10, 12), 1)
		g.reserved.Add(-2)
		clear(g.truth[10*block.Size : 12*block.Size])
		returned := false
		go func() {
			g.commit()
			returned = true
		}()
		synctest.Wait()
		if returned {
			t.Error("the commit does not wait for the range")
		}
		e.State.Unlock(rng(10, 12), 99, extents.DirtyHole, extents.Delalloc)
		synctest.Wait()
		if !returned {
			t.Error("the commit still waits")
		}
		if !e.State.Empty() {
			t.Error("the epoch is not written out")
		}
		g.read(rng(0, 40))
		g.close()
	})
}

// One find takes at most 128 MiB, however long the range is.
func TestRangeIsBounded(t *testing.T) {
	g := newRig(t, rigOptions{bytesMax: 1 << 30, blocks: 1})
	const n = rangeBlocksMax + rangeBlocksMax/4
	page := make([]byte, block.Size)
	page[0] = 1
	e := g.es.Open()
	for b := range block.Index(n) {
		g.pages.install(b, page, 1)
	}
	g.pages.keep = true // they share it
	e.State.Set(rng(0, n), extents.Delalloc)
	g.pages.handedOff = func(block.Index, uint64) {}
	var most block.Count
	g.pages.locked = func(block.Index) { most = max(most, block.Count(len(g.pages.held))) }
	c := Control{Budget: all}
	g.background(&c)
	if most != 128<<20/block.Size || g.w.Metrics().HandOffs != 2 || c.Written != n {
		t.Errorf("%d pages locked at once, %d hand-offs, %d blocks written", most, g.w.Metrics().HandOffs, c.Written)
	}
}

// Tokens are taken before pages are locked: whoever sleeps for them holds neither
// pages nor a range, so a writer of the same blocks is not held up. The range is
// cut to the tokens, at the border of an extent if there is one.
func TestTokensBeforeLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{bytesMax: 40 * block.Size, workers: 1})
		gate, open := newGate(t)
		g.transform.before = func(start block.Index) {
			if start == 3 {
				<-gate
			}
		}
		g.write(rng(3, 103), text)
		passed := make(chan struct{})
		go func() {
			g.background(&Control{Budget: all})
			close(passed)
		}()
		synctest.Wait()
		// 40 tokens: [3, 43), cut to [3, 32), and the other 11 are returned. They
		// are less than the limit leaves to a waiter, so the pass sleeps.
		if m := g.queue.Metrics(); m.Acquiring != 1 || m.Bytes != 29*block.Size {
			t.Fatalf("the queue has %+v", m)
		}
		if held := g.pages.heldPages(); len(held) != 0 {
			t.Errorf("pages %v are locked while the pass sleeps", held)
		}
		if n := g.es.open.State.Count(extents.Locked); n != 0 {
			t.Errorf("%d blocks are locked while the pass sleeps", n)
		}
		g.write(rng(60, 70), text) // does not wait
		open()
		<-passed
		for _, e := range g.log.take("raw", "commit") {
			var n int
			if _, err := fmt.Sscanf(e, "release %d", &n); err == nil && n > 40 {
				t.Errorf("a chunk of %d blocks with 40 tokens", n)
			}
		}
		if d := g.es.open.State.Count(extents.Delalloc); d != 0 {
			t.Errorf("%d blocks are left", d)
		}
		g.commit()
		g.read(rng(0, 110))
		g.close()
	})
}

// The end of the context ends the sleep, and nothing is lost.
func TestContextEndsTheSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{bytesMax: 16 * block.Size})
		gate, open := newGate(t)
		g.transform.before = func(block.Index) { <-gate }
		g.write(rng(0, 64), text)
		ctx, cancel := context.WithCancel(t.Context())
		returned := false
		go func() {
			if err := g.w.Background(ctx, g.es, &Control{Budget: all}, false); err != nil {
				t.Errorf("Background: %v", err)
			}
			returned = true
		}()
		synctest.Wait()
		if returned {
			t.Fatal("the pass does not wait for tokens")
		}
		cancel()
		synctest.Wait()
		if !returned {
			t.Error("the pass still waits")
		}
		if n := g.es.open.State.Count(extents.Delalloc); n != 48 {
			t.Errorf("%d blocks are left, want 48", n)
		}
		open()
		g.commit()
		g.read(rng(0, 64))
		g.close()
	})
}
