package pagecache

import (
	"sync/atomic"

	"cnbd/internal/block"
)

// A clock is the replacement policy, and this file the place for another one: the
// cache tells it what enters and what is read, and it proposes whom to evict.
//
// It is CLOCK: a hand goes round the frames; a version that was read since the
// hand's last visit loses its mark and stays, one that was not is proposed. It
// needs one bit for each version and no lock, and a version that is filled but
// never read, as most neighbours are, goes at the first visit.
type clock struct {
	hand atomic.Uint64
}

// enter is told that h became the visible version of its block.
func (*clock) enter(h *header) { h.referenced.Store(0) }

// touch is told that h was read.
func (*clock) touch(h *header) {
	// Most hits find the mark set, and do not write to a shared cache line.
	if h.referenced.Load() == 0 {
		h.referenced.Store(1)
	}
}

// propose moves the hand to the next of the first n frames and returns it, or 0
// if it is spared this time.
func (k *clock) propose(c *Cache, n int) Ref {
	r := Ref(k.hand.Add(1)%uint64(n)) + 1
	h := c.arena.Header(r)
	if !isClean(h.state.Load()) || h.refs.Load() != 1 {
		return 0
	}
	if h.referenced.Load() != 0 {
		h.referenced.Store(0)
		return 0
	}
	return r
}

// trimSteps bounds the frames that one call of trim looks at, about a
// microsecond's work: Install calls it.
const trimSteps = 64

// evict detaches a clean version that nobody holds, the first one that the policy
// proposes in at most steps steps, and returns its frame, which is still charged
// to the budget. It must not be called with a shard's mutex held.
func (c *Cache) evict(steps int) (Ref, bool) {
	used := c.arena.Used()
	for ; steps > 0 && used > 0 && c.clean.Load() > 0; steps-- {
		r := c.clock.propose(c, used)
		if r == 0 {
			continue
		}
		h := c.arena.Header(r)
		b := block.Index(h.block.Load())
		sh, bucket := c.home(b)
		sh.mu.Lock()
		// Meanwhile the frame may have got another life, with another block in
		// another shard. State before block: a state of that other life is
		// stored after its block, so it does not go with the old block.
		if isClean(h.state.Load()) && h.refs.Load() == 1 && block.Index(h.block.Load()) == b {
			c.unlink(sh, bucket, r)
			c.setState(sh, h, 0)
			h.refs.Store(0)
			sh.events[evictions]++
			sh.mu.Unlock()
			return r, true
		}
		sh.mu.Unlock()
	}
	return 0, false
}

// evictAll are steps enough for two rounds: the first takes the marks away.
func (c *Cache) evictAll() int { return 2 * c.arena.Len() }

// trim brings the cache nearer to its limit, if it is above, by at most two
// versions: callers that each add one make it shrink.
func (c *Cache) trim() {
	for range 2 {
		if cached, _ := cachedPayload(c.budget.Load()); cached <= c.cacheMax {
			return
		}
		r, ok := c.evict(trimSteps)
		if !ok {
			return
		}
		c.release(r)
		c.payloadGate.serve()
	}
}
