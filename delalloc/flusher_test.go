package delalloc

import (
	"context"
	"errors"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
)

// flusher starts a Flusher over g that does nothing by itself, but for what o says.
func (g *rig) flusher(o FlusherOptions) *Flusher {
	o.Writeback, o.Epochs = g.w, g.es
	for _, d := range []*time.Duration{&o.CommitInterval, &o.Period, &o.Expire} {
		if *d == 0 {
			*d = 1000 * time.Hour
		}
	}
	if o.Background == nil {
		o.Background = func() bool { return false }
	}
	if o.Pressure == nil {
		o.Pressure = func() bool { return false }
	}
	if o.Failed == nil {
		o.Failed = func(err error) { g.t.Errorf("failed: %v", err) }
	}
	f := StartFlusher(o)
	g.t.Cleanup(f.Stop)
	// Where all wait for each other in a bubble, its time goes on with the tickers.
	watchdog := time.AfterFunc(500*time.Hour, func() { panic("nothing goes on") })
	g.t.Cleanup(func() { watchdog.Stop() })
	return f
}

// flushBeside has another goroutine flush, which must succeed, and returns when that
// has gone as far as it can. It is called in a bubble.
func (g *rig) flushBeside(f *Flusher) {
	go func() {
		if err := f.Flush(g.t.Context()); err != nil {
			g.t.Errorf("Flush: %v", err)
		}
	}()
	synctest.Wait()
}

// commits is the number of commits so far, empty ones too.
func (g *rig) commits() uint64 {
	n, _ := g.log.commits()
	return n
}

// Flushes that come while a commit runs share one, the next: not the one that
// runs, which may have been frozen before.
func TestFlushesShareACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		f := g.flusher(FlusherOptions{})
		gate := make(chan struct{}, 2)
		t.Cleanup(func() { close(gate) })
		g.log.syncing = func(uint64) { <-gate }
		var first, second atomic.Int64
		flush := func(done *atomic.Int64) {
			if err := f.Flush(t.Context()); err != nil {
				t.Errorf("Flush: %v", err)
			}
			done.Add(1)
		}
		g.write(rng(0, 1), text)
		go flush(&first)
		synctest.Wait()
		for i := range block.Index(5) {
			g.write(block.Span(10+i, 1), text)
			go flush(&second)
			synctest.Wait()
		}
		if g.commits() != 1 || first.Load()+second.Load() != 0 {
			t.Errorf("before any sync: %d commits, %d and %d flushes have returned", g.commits(), first.Load(), second.Load())
		}
		gate <- struct{}{}
		synctest.Wait()
		if g.commits() != 2 || first.Load() != 1 || second.Load() != 0 {
			t.Errorf("after one sync: %d commits, %d and %d flushes have returned", g.commits(), first.Load(), second.Load())
		}
		gate <- struct{}{}
		synctest.Wait()
		if n, durable := g.log.commits(); n != 2 || durable != 2 || second.Load() != 5 {
			t.Errorf("after two syncs: %d commits, %d durable, %d flushes have returned", n, durable, second.Load())
		}
		f.Stop()
		g.read(rng(0, 20))
		g.close()
	})
}

// The context of a flush that waits for a commit ends the wait, not the commit.
func TestFlushAndContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		f := g.flusher(FlusherOptions{})
		gate, open := newGate(t)
		g.log.syncing = func(uint64) { <-gate }
		g.write(rng(0, 1), text)
		g.flushBeside(f)
		g.write(rng(0, 1), text)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := f.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("Flush: %v after %v", err, time.Since(began))
		}
		open()
		synctest.Wait()
		if n, durable := g.log.commits(); n != 2 || durable != 2 {
			t.Errorf("%d commits, %d durable, want 2", n, durable)
		}
		f.Stop()
		g.close()
	})
}

// Who flushes when nobody commits does it himself: no other goroutine is woken, and
// what is asked for meanwhile is done afterwards.
func TestFlushCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		f := g.flusher(FlusherOptions{CommitInterval: time.Hour})
		g.write(rng(0, 1), text)
		stack := make([]byte, 64<<10)
		g.log.syncing = func(uint64) { stack = stack[:runtime.Stack(stack, false)] }
		if err := f.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(stack), "TestFlushCommits") {
			t.Errorf("somebody else has committed:\n%s", stack)
		}
		gate, open := newGate(t)
		g.log.syncing = func(uint64) { <-gate }
		g.write(rng(0, 1), text)
		g.flushBeside(f)
		g.write(rng(1, 1), text)
		f.Dirtied()
		time.Sleep(3 * time.Hour) // a timed commit waits too
		f.NeedCommit()
		synctest.Wait()
		if n := g.commits(); n != 2 {
			t.Errorf("%d commits, want 2: one at a time", n)
		}
		open()
		synctest.Wait()
		if n, durable := g.log.commits(); n != 3 || durable != 3 {
			t.Errorf("%d commits, %d durable, want 3", n, durable)
		}
		f.Stop()
		g.close()
	})
}

// A commit that fails tells all who share it, and else Failed; the next is tried.
func TestFailedCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		var failed atomic.Int64
		f := g.flusher(FlusherOptions{CommitInterval: time.Hour, Failed: func(err error) {
			if !errors.Is(err, errFake) {
				t.Errorf("Failed is told %v", err)
			}
			failed.Add(1)
		}})
		g.log.fail = func(op string) error {
			if op == "commit" {
				return errFake
			}
			return nil
		}
		var wg sync.WaitGroup
		for range 3 {
			g.write(rng(0, 1), text)
			wg.Go(func() {
				if err := f.Flush(t.Context()); !errors.Is(err, errFake) {
					t.Errorf("Flush: %v", err)
				}
			})
		}
		wg.Wait()
		if failed.Load() != 0 {
			t.Errorf("Failed was called %d times for commits that somebody waited for", failed.Load())
		}
		g.write(rng(0, 1), text)
		f.NeedCommit()
		synctest.Wait()
		if failed.Load() != 1 {
			t.Errorf("Failed was called %d times for NeedCommit, want 1", failed.Load())
		}
		g.write(rng(0, 1), text)
		f.Dirtied()
		time.Sleep(2 * time.Hour)
		if failed.Load() != 2 {
			t.Errorf("Failed was called %d times after a timed commit, want 2", failed.Load())
		}
		// Somebody waited, and has gone.
		ctx, cancel := context.WithCancel(t.Context())
		joined, gone := make(chan struct{}), make(chan struct{})
		commits := 0
		g.log.fail = func(op string) error {
			if op != "commit" {
				return nil
			}
			if commits++; commits == 1 {
				<-joined
				return nil
			}
			cancel()
			<-gone
			return errFake
		}
		for _, tc := range []struct {
			ctx  context.Context
			want error
		}{{t.Context(), nil}, {ctx, context.Canceled}} {
			g.write(rng(0, 1), text)
			wg.Go(func() {
				if err := f.Flush(tc.ctx); !errors.Is(err, tc.want) {
					t.Errorf("Flush: %v, want %v", err, tc.want)
				}
			})
			synctest.Wait()
		}
		close(joined)
		wg.Wait()
		close(gone)
		synctest.Wait()
		if failed.Load() != 3 {
			t.Errorf("Failed was called %d times after a commit that nobody waited for any more, want 3", failed.Load())
		}
		f.Stop()
		g.close()
	})
}

// NeedCommit begins a commit, and does not wait for it.
func TestNeedCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		f := g.flusher(FlusherOptions{})
		gate, open := newGate(t)
		g.log.syncing = func(uint64) { <-gate }
		g.write(rng(0, 1), text)
		f.NeedCommit()
		synctest.Wait()
		if g.commits() != 1 {
			t.Errorf("%d commits, want 1", g.commits())
		}
		for range 10 {
			f.NeedCommit() // they want one more
		}
		open()
		synctest.Wait()
		if g.commits() != 2 {
			t.Errorf("%d commits, want 2", g.commits())
		}
		f.Stop()
		g.close()
	})
}

// Stop lets the commit in progress end, wherever it is, begins no other, and
// whoever waits for one gets ErrStopped, as does whoever comes later.
func TestStop(t *testing.T) {
	for i := range 20 { // a select chooses at random
		synctest.Test(t, func(t *testing.T) {
			g := newRig(t, rigOptions{bytesMax: 16 * block.Size})
			f := g.flusher(FlusherOptions{})
			gate, open := newGate(t)
			n := block.Index(16)
			switch i % 3 {
			case 0: // it waits for the sync
				g.log.syncing = func(uint64) { <-gate }
			case 1: // for tokens
				n = 32
				fallthrough
			case 2: // for the queue
				g.transform.before = func(block.Index) { <-gate }
			}
			flush := func(want error) {
				if err := f.Flush(t.Context()); !errors.Is(err, want) {
					t.Errorf("Flush: %v, want %v", err, want)
				}
			}
			g.write(rng(0, n), text)
			go flush(nil)
			synctest.Wait()
			g.write(rng(1, 2), text)
			for range 3 {
				go flush(ErrStopped)
			}
			synctest.Wait()
			stopped := false
			go func() {
				f.Stop()
				stopped = true
			}()
			synctest.Wait()
			if stopped {
				t.Error("Stop does not wait for the commit in progress")
			}
			open()
			synctest.Wait()
			if n, durable := g.log.commits(); !stopped || n != 1 || durable != 1 {
				t.Errorf("stopped %t after %d commits, %d durable, want 1", stopped, n, durable)
			}
			flush(ErrStopped)
			f.NeedCommit()
			f.Kick()
			g.settle()
			g.close()
		})
	}
}

// What was changed is committed within the interval, and an idle device is left
// alone.
func TestCommitInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		f := g.flusher(FlusherOptions{CommitInterval: 5 * time.Second})
		change := func() {
			g.write(rng(0, 1), text)
			f.Dirtied()
		}
		check := func(want uint64) {
			t.Helper()
			synctest.Wait()
			if n, durable := g.log.commits(); n != want || durable != want {
				t.Errorf("%d commits, %d durable, want %d", n, durable, want)
			}
		}
		time.Sleep(time.Minute)
		check(0) // nothing has changed
		time.Sleep(time.Second)
		change() // 1 s after a tick
		time.Sleep(4*time.Second - time.Nanosecond)
		check(0)
		time.Sleep(time.Nanosecond)
		check(1)
		time.Sleep(time.Minute)
		check(1)
		// A change during a commit, after its freeze, is in the next.
		gate, open := newGate(t)
		g.log.syncing = func(uint64) { <-gate }
		change()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		change()
		open()
		check(2)
		time.Sleep(5 * time.Second)
		check(3)
		// A flush makes the timed commit needless.
		change()
		began := time.Now()
		if err := f.Flush(t.Context()); err != nil || !time.Now().Equal(began) {
			t.Errorf("Flush: %v after %v", err, time.Since(began))
		}
		check(4)
		time.Sleep(time.Minute)
		check(4)
		f.Stop()
		g.close()
	})
}

// Little dirty data is written out when it is Expire old, within one Period, and
// not before.
func TestExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		var over atomic.Bool
		f := g.flusher(FlusherOptions{Period: 5 * time.Second, Expire: 30 * time.Second,
			Background: func() bool { return over.Swap(false) }}) // for one pass
		check := func(want block.Count) {
			t.Helper()
			synctest.Wait()
			if n := g.es.Open().State.Count(extents.Delalloc | extents.DirtyHole); n != want {
				t.Errorf("%d blocks are dirty, want %d", n, want)
			}
		}
		// The cursor of the background passes is behind all that follows.
		g.write(rng(400, 401), text)
		over.Store(true)
		f.Kick()
		check(0)
		time.Sleep(time.Minute + time.Second) // the next tick is in 4 s
		g.write(rng(100, 102), text)
		g.trim(rng(200, 210))
		time.Sleep(20 * time.Second)
		g.write(rng(50, 52), text) // goes with the others: an epoch has one age
		time.Sleep(13 * time.Second)
		check(14) // 33 s old
		time.Sleep(time.Second)
		check(0)
		// The next is young again.
		g.write(rng(100, 102), text)
		time.Sleep(30*time.Second - time.Nanosecond)
		check(2)
		time.Sleep(time.Nanosecond)
		check(0)
		if g.commits() != 0 {
			t.Errorf("%d commits", g.commits())
		}
		f.Stop()
		g.commit()
		g.read(rng(0, 512))
		g.close()
	})
}

// A writer that writes one block again and again keeps neither old data from being
// written out, nor the flusher busy.
func TestExpireUnderAHotSpot(t *testing.T) {
	for _, hot := range []block.Index{5, 300} {
		synctest.Test(t, func(t *testing.T) {
			g := newRig(t, rigOptions{})
			passes := 0
			f := g.flusher(FlusherOptions{Period: 5 * time.Second, Expire: 30 * time.Second, Pressure: func() bool {
				if passes++; passes <= 1000 { // before each pass
					g.write(rng(hot, hot+1), text)
				}
				return false
			}})
			g.write(rng(100, 200), text)
			time.Sleep(31 * time.Second)
			synctest.Wait()
			if g.es.Open().State.Test(rng(100, 200), extents.Delalloc, false) {
				t.Error("old data is not written out")
			}
			if passes != 2 {
				t.Errorf("%d passes in one period, want 2", passes)
			}
			f.Stop()
			g.commit()
			g.read(rng(0, 512))
			g.close()
		})
	}
}

// Above the background limit data is written out at once, from where the pass
// before has ended, until it is below the limit again; below it nothing is.
func TestBackgroundLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{blocks: 4096})
		var limit atomic.Int64
		limit.Store(2000)
		f := g.flusher(FlusherOptions{Period: 5 * time.Second, Background: func() bool {
			dirty, _, _, _ := g.pages.counts()
			return dirty > int(limit.Load())
		}})
		check := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			if dirty, _, _, _ := g.pages.counts(); dirty != want {
				t.Errorf("%s: %d pages are dirty, want %d", when, dirty, want)
			}
		}
		for i := range block.Index(20) {
			g.write(block.Span(120*i, 100), text)
		}
		f.Kick()
		time.Sleep(time.Minute)
		check("at the limit", 2000)
		for i := range block.Index(10) {
			g.write(block.Span(120*(20+i), 100), text)
		}
		check("above the limit, nobody has said so", 3000)
		f.Kick()
		check("after the kick", 1900) // one pass: 1024 blocks, the last range whole
		g.write(rng(0, 100), text)    // behind the cursor
		limit.Store(900)
		f.Kick()
		check("after the next", 900)
		if !g.es.Open().State.Test(rng(0, 100), extents.Delalloc, true) {
			t.Error("the pass has begun at 0, not where the one before has ended")
		}
		limit.Store(0)
		time.Sleep(5 * time.Second)
		check("after a period", 0)
		f.Stop()
		g.commit()
		g.read(rng(0, 4096))
		g.close()
	})
}

// When all is on its way, the flusher sleeps, however much is in writeback and
// whoever waits; and while somebody waits, the log is asked to write.
func TestFlusherSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{hold: true, limit: 1 << 20})
		var asked atomic.Int64
		pressure := false
		f := g.flusher(FlusherOptions{
			Background: func() bool { asked.Add(1); return true },
			Pressure:   func() bool { return pressure },
		})
		g.write(rng(0, 10), text)
		f.Kick()
		synctest.Wait() // would not return if it did not sleep
		if n := asked.Load(); n != 2 {
			t.Errorf("it has looked %d times, want 2", n)
		}
		if _, _, n, _ := g.pages.counts(); n != 10 || g.log.kicks != 0 {
			t.Errorf("%d pages in writeback, %d kicks, want 10 and 0", n, g.log.kicks)
		}
		pressure = true
		f.Kick()
		synctest.Wait()
		if _, _, n, _ := g.pages.counts(); n != 0 || g.log.kicks == 0 {
			t.Errorf("under pressure: %d pages in writeback, %d kicks", n, g.log.kicks)
		}
		f.Stop()
		g.close()
	})
}

// What ends a background pass is told, and the flusher goes on.
func TestBackgroundFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		failed := 0
		f := g.flusher(FlusherOptions{Background: func() bool { return true }, Failed: func(error) { failed++ }})
		g.write(rng(0, 10), text)
		g.queue.Close()
		for i := range 3 {
			f.Kick()
			synctest.Wait()
			if failed != i+1 {
				t.Errorf("%d failures are told, want %d", failed, i+1)
			}
		}
	})
}

// Stop ends a pass that sleeps for tokens.
func TestStopDuringAPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{bytesMax: 16 * block.Size})
		f := g.flusher(FlusherOptions{Background: func() bool { return true }})
		gate, open := newGate(t)
		g.transform.before = func(block.Index) { <-gate }
		g.write(rng(0, 64), text)
		f.Kick()
		synctest.Wait()
		if m := g.queue.Metrics(); m.Acquiring != 1 {
			t.Fatalf("the pass does not wait for tokens: %+v", m)
		}
		for range 3 {
			f.Kick() // does not wait for the pass
		}
		f.Stop()
		open()
		g.close()
	})
}

// The goroutines can be told apart in a profile.
func TestFlusherLabels(t *testing.T) {
	g := newRig(t, rigOptions{})
	f := g.flusher(FlusherOptions{})
	var b strings.Builder
	for range 100 { // until both have begun
		b.Reset()
		if err := pprof.Lookup("goroutine").WriteTo(&b, 1); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(b.String(), `"cnbd":"commit"`) && strings.Contains(b.String(), `"cnbd":"writeback"`) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	f.Stop()
	for _, l := range []string{`"cnbd":"commit"`, `"cnbd":"writeback"`} {
		if !strings.Contains(b.String(), l) {
			t.Errorf("no goroutine has the label %s", l)
		}
	}
	g.close()
}
