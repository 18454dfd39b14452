package delalloc

import (
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

// historyOptions are those of the random tests: each limit is reached all the time
// in some of them.
var historyOptions = []rigOptions{
	{transform: "none", workers: 2},
	{transform: "xor", extent: 8, workers: 3, bytesMax: 24 * block.Size, hold: true, limit: 3},
	{transform: "zstd", extent: 32, workers: 4, bytesMax: 200 * block.Size, hold: true, limit: 7},
	{transform: "zstd", extent: 16, workers: 1, bytesMax: 16 * block.Size, hold: true, limit: 1 << 20},
}

// history runs several connections at once over g: writes and trims that overlap
// each other and what is being written out, flushes, and reads, which are compared
// with the truth. The rig compares each commit with the truth at its freeze.
// flushed is called with the result of each flush, and the newest epoch that the
// connection has changed.
func (g *rig) history(seed uint64, ops int, failed func(error), flushed func(epoch uint64, err error)) {
	// Between the lock of a page and that of its range, requests change it.
	between := rand.New(rand.NewPCG(seed, 1000))
	g.pages.locked = func(b block.Index) { // one at a time, under Writeback.handOff
		switch between.IntN(150) {
		case 0:
			g.write(block.Span(b, 1), text)
		case 1:
			g.trim(block.Span(b, 1))
		case 2:
			runtime.Gosched()
		}
	}
	var encodes atomic.Uint64
	g.transform.before = func(block.Index) {
		switch rand.New(rand.NewPCG(seed, 2000+encodes.Add(1))).IntN(40) {
		case 0:
			panic("broken")
		case 1, 2, 3:
			time.Sleep(50 * time.Microsecond)
		}
	}
	f := g.flusher(FlusherOptions{
		CommitInterval: 3 * time.Millisecond, Period: time.Millisecond, Expire: 2 * time.Millisecond,
		Background: func() bool { dirty, _, _, _ := g.pages.counts(); return dirty > 64 },
		Pressure:   func() bool { dirty, _, _, _ := g.pages.counts(); return dirty > 128 },
		Failed:     failed,
	})
	device := block.Index(g.o.blocks)
	var wg sync.WaitGroup
	for c := range uint64(4) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, c))
			newest := uint64(0)
			for range ops {
				// Half of it goes to a few blocks, which are dirty, in writeback
				// and frozen all at once.
				at, n := block.Index(r.Uint64N(32)), 1+block.Index(r.Uint64N(8))
				if r.IntN(2) == 0 {
					at, n = block.Index(r.Uint64N(uint64(device))), 1+block.Index(r.Uint64N(60))
				}
				req := rng(at, min(at+n, device))
				switch r.IntN(20) {
				case 0:
					flushed(newest, f.Flush(g.t.Context()))
				case 1, 2, 3:
					newest = g.trim(req).Number
				case 4, 5, 6, 7:
					g.read(req)
					continue
				case 8, 9:
					newest = g.write(req, zeros).Number
				case 10, 11, 12:
					newest = g.write(req, noise).Number
				default:
					newest = g.write(req, text).Number
				}
				f.Dirtied()
				f.Kick()
			}
			flushed(newest, f.Flush(g.t.Context()))
		})
	}
	wg.Wait()
	f.Stop()
	g.pages.locked = func(block.Index) {}
	g.read(rng(0, device))
}

func TestRandomHistories(t *testing.T) {
	seed := disktest.Seed(t)
	var total Metrics
	for i, o := range historyOptions {
		t.Run(fmt.Sprintf("%s %d", o.transform, o.extent), func(t *testing.T) {
			g := newRig(t, o)
			flushes := atomic.Int64{}
			g.history(seed+uint64(i), 250*disktest.Scale(t), func(err error) { t.Errorf("failed: %v", err) }, func(epoch uint64, err error) {
				flushes.Add(1)
				if _, durable := g.log.commits(); err != nil || durable < epoch {
					t.Errorf("flush of epoch %d: %v, %d is durable", epoch, err, durable)
				}
			})
			// What is not committed yet.
			g.commit()
			g.read(rng(0, block.Index(o.blocks)))
			g.close()
			if dirty, _, _, holes := g.pages.counts(); dirty+holes != 0 || g.pages.failed != 0 || g.reserved.Load() != int64(g.log.released) {
				t.Errorf("at the end %d pages are dirty, %d blocks pending holes, %d pages have failed, %d blocks reserved",
					dirty, holes, g.pages.failed, g.reserved.Load()-int64(g.log.released))
			}
			m := g.w.Metrics()
			t.Logf("%d commits, %d flushes, %+v", g.commits(), flushes.Load(), m)
			total.Busy += m.Busy
			total.Retests += m.Retests
			total.Holes += m.Holes
			total.Encoded += m.Encoded
			total.Raw += m.Raw
			total.Zero += m.Zero
			total.EncodeFailures += m.EncodeFailures
		})
	}
	if total.Busy*total.Retests*total.Holes*total.Encoded*total.Raw*total.Zero*total.EncodeFailures == 0 {
		t.Errorf("something never happened: %+v", total)
	}
}

// The log fails at some operation, and from then on. All that is handed off ends,
// once, nobody hangs, flushes fail, and everything can still be read.
func TestRandomFailures(t *testing.T) {
	seed := disktest.Seed(t)
	for i := range 6 * disktest.Scale(t) {
		seed := seed + uint64(i)
		r := rand.New(rand.NewPCG(seed, 3000))
		o := historyOptions[i%len(historyOptions)]
		kind := []string{"data", "hole", "after", "commit", "sync"}[r.IntN(5)]
		var left atomic.Int64
		left.Store(1 + r.Int64N(map[string]int64{"data": 200, "hole": 40, "after": 100, "commit": 20, "sync": 20}[kind]))
		var failed atomic.Bool
		g := newRig(t, o)
		g.log.fail = func(op string) error {
			if op == kind && left.Add(-1) == 0 {
				failed.Store(true)
			}
			if failed.Load() {
				return errFake
			}
			return nil
		}
		good := func(err error) {
			if err != nil && (!errors.Is(err, errFake) || !failed.Load()) {
				t.Errorf("seed %d: %v", seed, err)
			}
		}
		g.history(seed, 100, good, func(epoch uint64, err error) {
			good(err)
			if _, durable := g.log.commits(); err == nil && durable < epoch {
				t.Errorf("seed %d: flush of epoch %d, %d is durable", seed, epoch, durable)
			}
		})
		if err := g.w.Commit(t.Context(), g.es); failed.Load() != errors.Is(err, errFake) {
			t.Errorf("seed %d: failed %t, and Commit: %v", seed, failed.Load(), err)
		}
		g.settle()
		g.read(rng(0, block.Index(g.o.blocks)))
		if dirty, _, _, _ := g.pages.counts(); dirty != 0 || g.pages.ended != int(g.w.Metrics().Pages) {
			t.Errorf("seed %d: %d pages are dirty; %d handed off, %d ended", seed, dirty, g.w.Metrics().Pages, g.pages.ended)
		}
		g.close()
		if t.Failed() {
			t.Fatalf("seed %d, %s, %+v", seed, kind, o)
		}
	}
}
