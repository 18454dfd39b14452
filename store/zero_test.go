package store

import (
	"sync"
	"testing"

	"cnbd/internal/disktest"
)

// Zeros are written ahead of small commits in sequence, in space that was never
// written, and of nothing else.
func TestZeroesAhead(t *testing.T) {
	small := func(c *committed, n int) {
		for i := range n {
			must(t, c.blob(i, 1, 1))
			must(t, c.commit())
			c.Release(1)
		}
	}
	large := func(c *committed, n int) {
		for i := range n {
			must(t, c.blob(32*i, 32, 1<<32-1))
			must(t, c.commit())
			c.Release(32)
		}
	}
	for name, tc := range map[string]struct {
		device bool
		commit func(c *committed)
		want   bool
	}{
		"few":          {false, func(c *committed) { small(c, 7) }, false},
		"many":         {false, func(c *committed) { small(c, 8) }, true},
		"interrupted":  {false, func(c *committed) { small(c, 7); large(c, 1); small(c, 7) }, false},
		"large":        {false, func(c *committed) { large(c, 8) }, false},
		"block device": {true, func(c *committed) { small(c, 20) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			g := testGeometry(64*ExtentBlocksMax, 100)
			o := disktest.Options{Device: tc.device}
			if tc.device {
				o.Size = segmentsOffset + int64(g.Capacity)
			}
			d := disktest.New(1, o)
			must(t, Format(d, g))
			c := openCommitted(t, d, Options{ZeroCommits: 8})
			must(t, c.Reserve(1000, Growth))
			var mu sync.Mutex
			var end int64 // of the writes
			d.SetHook(func(op disktest.Op) {
				if op.Kind == disktest.Write {
					mu.Lock()
					end = max(end, op.Off+op.Len)
					mu.Unlock()
				}
			})
			tc.commit(c)
			c.log.written.Lock()
			log := c.log.written.end
			for c.log.written.goal > 0 || c.log.written.writing {
				c.log.written.cond.Wait()
			}
			c.log.written.Unlock()
			mu.Lock()
			if ahead := end - log; tc.want != (ahead >= zeroCommit) || ahead < 0 {
				t.Errorf("%d bytes were written ahead of the log, want zeros: %t", ahead, tc.want)
			}
			mu.Unlock()
			must(t, c.Close())
			d = d.Clone()
			c = openCommitted(t, d, Options{})
			if c.Recovery().Damaged != 0 || c.Recovery().Dropped != 0 {
				t.Errorf("recovery: %+v", c.Recovery())
			}
			must(t, c.Close())
		})
	}
}
