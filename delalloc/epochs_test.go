package delalloc

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
)

// Each commit has an epoch of its own; what is found dirty in it does not show in
// the next.
func TestEpochNumbers(t *testing.T) {
	g := newRig(t, rigOptions{})
	for n := range uint64(3) {
		if e := g.write(rng(0, 2), text); e.Number != n+1 {
			t.Errorf("a write joins epoch %d, want %d", e.Number, n+1)
		}
		before := g.es.Open()
		g.commit()
		e := g.es.Open()
		if e == before || e.Number != n+2 || !e.State.Empty() || !e.dirtySince().IsZero() {
			t.Errorf("after commit %d the open epoch is %d, dirty since %v", n+1, e.Number, e.dirtySince())
		}
		if !before.State.Empty() || g.es.frozen != nil {
			t.Errorf("commit %d leaves its epoch frozen", n+1)
		}
	}
	g.commit() // of nothing
	if n := g.es.Open().Number; n != 5 {
		t.Errorf("epoch %d, want 5", n)
	}
	g.close()
}

// A freeze waits for the requests that have entered, and those that come
// meanwhile belong to the next epoch: it is an instant between whole requests.
func TestFreezeIsBetweenRequests(t *testing.T) {
	g := newRig(t, rigOptions{})
	e := g.es.Enter()
	var frozen atomic.Bool
	snapshot := g.pages.frozen
	g.pages.frozen = func() { frozen.Store(true); snapshot() }
	committed := make(chan struct{})
	go func() {
		g.commit()
		close(committed)
	}()
	for g.es.gate.TryRLock() { // until the freeze is at the gate
		g.es.gate.RUnlock()
		runtime.Gosched()
	}
	late := make(chan uint64)
	go func() { late <- g.write(rng(5, 6), text).Number }()
	select {
	case <-committed:
		t.Error("the commit does not wait for a request that has entered")
	case n := <-late:
		t.Errorf("a request enters epoch %d while a freeze waits", n)
	case <-time.After(20 * time.Millisecond):
	}
	if frozen.Load() {
		t.Error("the epoch is frozen while a request is in it")
	}
	// The rest of the first request.
	e.State.Lock(rng(0, 2), 99)
	for b := range block.Index(2) {
		page := g.truth[b.Bytes():][:block.Size]
		noise(page)
		g.pages.install(b, slices.Clone(page), e.Number)
	}
	g.reserved.Add(2)
	e.State.Unlock(rng(0, 2), 99, extents.Delalloc, 0)
	g.es.Leave()
	<-committed
	if n := <-late; n != 2 {
		t.Errorf("the second request is in epoch %d", n)
	}
	g.read(rng(0, 10))
	g.commit()
	g.read(rng(0, 10))
	g.close()
}

// While a commit is in the middle of its hand-off, requests change the open epoch:
// blocks that are in writeback, blocks that are frozen and not yet handed off. The
// commit has what was frozen, exactly; nothing later comes before it in the log,
// background pass or not; and reads have the newest.
func TestFrozenAndOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{bytesMax: 16 * block.Size, workers: 1})
		gate, open := newGate(t)
		g.transform.before = func(block.Index) { <-gate }
		g.write(rng(0, 64), text)
		g.trim(rng(100, 120))
		var commits atomic.Int64
		go func() {
			g.commit()
			commits.Add(1)
		}()
		synctest.Wait()
		f := g.es.frozen
		if f == nil || f.State.Count(extents.Delalloc) != 48 || g.es.open.Number != 2 {
			t.Fatal("the commit is not in the middle of its hand-off")
		}
		for _, r := range []block.Range{rng(0, 8), rng(40, 48), rng(110, 111)} {
			if e := g.write(r, noise); e.Number != 2 {
				t.Errorf("a write joins epoch %d", e.Number)
			}
		}
		g.trim(rng(4, 6))   // written in both epochs, in writeback in the first
		g.trim(rng(46, 52)) // frozen, some of it written in the second
		g.trim(rng(105, 106))
		g.read(rng(0, 512))
		if n := f.State.Count(extents.Delalloc); n != 48 {
			t.Errorf("%d blocks of the frozen epoch are delalloc, want 48: a request has changed them", n)
		}
		go g.background(&Control{Budget: all})
		open()
		synctest.Wait()
		if commits.Load() != 1 {
			t.Fatal("the commit has not returned")
		}
		var got []string
		for _, e := range g.log.take("release") {
			if e[:3] == "raw" {
				e = e[:len("raw")] + e[len("raw"):slices.Index([]byte(e), ')')+1]
			}
			got = append(got, e)
		}
		want := []string{"raw [0,16)", "raw [16,32)", "raw [32,48)", "raw [48,64)", "hole [100,120)", "commit 1",
			"raw [0,4)", "hole [4,6)", "raw [6,8)", "raw [40,46)", "hole [46,52)", "hole [105,106)", "raw [110,111)"}
		if !slices.Equal(got, want) {
			t.Errorf("the log has\n%v, want\n%v", got, want)
		}
		g.read(rng(0, 512))
		g.commit()
		g.read(rng(0, 512))
		g.close()
	})
}

// A commit returns when it is durable, not before; one with nothing to commit
// needs no sync.
func TestCommitIsDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{hold: true, limit: 1 << 20})
		gate, open := newGate(t)
		syncs := 0
		g.log.syncing = func(uint64) { syncs++; <-gate }
		g.write(rng(0, 2), text)
		returned := false
		go func() {
			g.commit()
			returned = true
		}()
		synctest.Wait()
		if returned || syncs != 1 {
			t.Errorf("before the sync has ended: returned %t, %d syncs", returned, syncs)
		}
		open()
		synctest.Wait()
		if n, durable := g.log.commits(); !returned || n != 1 || durable != 1 {
			t.Errorf("returned %t, %d commits, %d durable", returned, n, durable)
		}
		g.commit()
		if syncs != 1 {
			t.Errorf("%d syncs, want 1: the second commit had nothing", syncs)
		}
		g.close()
	})
}

// The context can end a commit; the error says so.
func TestCommitAndContext(t *testing.T) {
	for _, where := range []string{"tokens", "ticket"} {
		synctest.Test(t, func(t *testing.T) {
			g := newRig(t, rigOptions{bytesMax: 16 * block.Size})
			gate, open := newGate(t)
			g.transform.before = func(block.Index) { <-gate }
			n := block.Index(16)
			if where == "tokens" {
				n = 32
			}
			g.write(rng(0, n), text)
			if where == "ticket" { // of what a worker is at, and not who commits
				g.background(&Control{Budget: all})
				synctest.Wait()
			}
			ctx, cancel := context.WithCancel(t.Context())
			var err error
			go func() { err = g.w.Commit(ctx, g.es) }()
			synctest.Wait()
			cancel()
			synctest.Wait()
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: Commit: %v", where, err)
			}
			open()
			if !g.w.handOff.TryLock() {
				t.Errorf("%s: the hand-off stays locked", where)
			}
		})
	}
}

// An epoch is dirty since its first change that is not written out: Touch keeps
// the older time, and a pass that leaves nothing dirty ends it.
func TestDirtySince(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		began := time.Now()
		e := g.es.Open()
		check := func(when string, want time.Time) {
			t.Helper()
			if got := e.dirtySince(); !got.Equal(want) {
				t.Errorf("%s: dirty since %v, want %v", when, got, want)
			}
		}
		check("at first", time.Time{})
		g.write(rng(0, 2), text)
		time.Sleep(time.Second)
		g.write(rng(10, 12), text)
		g.trim(rng(20, 21))
		check("after more", began)
		g.background(&Control{Budget: 1})
		check("after a part was written out", began)
		e.State.Lock(rng(300, 301), 99) // a request is at work
		g.background(&Control{Budget: all})
		check("while a request is at work", began)
		e.State.Unlock(rng(300, 301), 99, 0, 0)
		g.background(&Control{Budget: all})
		check("after all was written out", time.Time{})
		time.Sleep(time.Second)
		g.write(rng(0, 2), text)
		check("after another write", began.Add(2*time.Second))
		g.commit()
		g.close()
	})
}
