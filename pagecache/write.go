package pagecache

import (
	"context"
	"fmt"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// AllocPayload appends n frames to dst, for the payload of a request, and returns
// it. It is AdmitPayload and TakePayload in one, and waits as the former does.
func (c *Cache) AllocPayload(ctx context.Context, n int, dst []Ref) ([]Ref, error) {
	if err := c.AdmitPayload(ctx, n); err != nil {
		return dst, err
	}
	return c.TakePayload(n, dst), nil
}

// AdmitPayload promises n frames for the payload of a request, without taking any
// memory for them yet. It blocks until the payload budget has all n, first come,
// first served; the error is the context's, or says that n frames are more than
// PayloadBytes. Each is given up by TakePayload or by CancelPayload.
func (c *Cache) AdmitPayload(ctx context.Context, n int) error {
	if n < 0 || int64(n) > c.payloadMax {
		return fmt.Errorf("pagecache: payload of %d blocks: the limit is %d", n, c.payloadMax)
	}
	if n == 0 {
		return nil
	}
	return c.payloadGate.acquire(ctx, int64(n), c.needWriteback)
}

// TryAdmitPayload is AdmitPayload if that need not wait.
func (c *Cache) TryAdmitPayload(n int) bool { return c.payloadGate.tryAcquire(int64(n)) }

// TakePayload appends n frames of those that were admitted to dst, and returns it.
// They are the caller's alone until Install publishes or FreePayload returns them;
// their content is undefined. It does not block.
func (c *Cache) TakePayload(n int, dst []Ref) []Ref {
	for range n {
		r := c.takeFrame()
		c.arena.Header(r).state.Store(payload)
		dst = append(dst, r)
	}
	return dst
}

// CancelPayload gives back n frames that were admitted and not taken.
func (c *Cache) CancelPayload(n int) {
	if n == 0 {
		return
	}
	c.budget.Add(-uint64(n) * payloadUnit)
	c.payloadGate.serve()
}

// tryChargePayload is the payload gate's try. While the cache is above its limit,
// the payload budget is smaller by the excess; what can be evicted is.
func (c *Cache) tryChargePayload(n int64) bool {
	for {
		v := c.budget.Load()
		cached, payload := cachedPayload(v)
		excess := max(0, cached-c.cacheMax)
		if payload+n+excess <= c.payloadMax {
			if c.budget.CompareAndSwap(v, v+uint64(n)*payloadUnit) {
				return true
			}
			continue
		}
		if excess == 0 || payload+n > c.payloadMax {
			return false
		}
		r, ok := c.evict(c.evictAll())
		if !ok {
			return false
		}
		c.release(r)
	}
}

// FreePayload gives back frames that were taken and not installed.
func (c *Cache) FreePayload(refs []Ref) {
	for _, r := range refs {
		h := c.arena.Header(r)
		if h.state.Load() != payload {
			panic(fmt.Sprintf("pagecache: frame %d freed as payload in state %b", r, h.state.Load()))
		}
		h.state.Store(0)
		c.arena.Free(r) // first, so that what is charged exists: invariant 6
	}
	c.CancelPayload(len(refs))
}

// BalanceDirty admits a write of n blocks: it waits until what is dirty, in
// writeback or admitted is at most DirtyBytesMax together with them, or nothing.
// First come, first served. It only sleeps; the writeback, which it calls for,
// does the work. Each admitted block is given up by an Install or in CancelDirty.
// The errors are the context's, and after a failed writeback that failure: what
// is dirty then stays so, and nobody should wait for it.
func (c *Cache) BalanceDirty(ctx context.Context, n block.Count) error {
	if n == 0 {
		return nil
	}
	return c.dirtyGate.acquire(ctx, int64(n), c.needWriteback)
}

// TryBalanceDirty is BalanceDirty if that need not wait.
func (c *Cache) TryBalanceDirty(n block.Count) bool { return c.dirtyGate.tryAcquire(int64(n)) }

// tryChargeDirty is the dirty gate's try.
func (c *Cache) tryChargeDirty(n int64) bool {
	for {
		v := c.charged.Load()
		if v > 0 && v+n > c.dirtyMax {
			return false
		}
		if c.charged.CompareAndSwap(v, v+n) {
			return true
		}
	}
}

// CancelDirty gives back n admitted blocks that will not be installed.
func (c *Cache) CancelDirty(n block.Count) { c.uncharge(int64(n)) }

func (c *Cache) uncharge(n int64) {
	if n == 0 {
		return
	}
	left := c.charged.Add(-n)
	invariants.Assertf(left >= 0, "%d dirty blocks charged", left)
	c.dirtyGate.serve()
}

// DirtyBlocks is the number of dirty versions that were not handed off, shadows
// included: what the writeback has to do.
func (c *Cache) DirtyBlocks() block.Count { return block.Count(c.dirty.Load()) }

// OverBackground reports whether DirtyBlocks is above BackgroundBytes.
func (c *Cache) OverBackground() bool { return c.dirty.Load() > c.background }

// Backlogged reports whether what is dirty, admitted or in writeback is above
// BackgroundBytes: more is written than goes to the store.
func (c *Cache) Backlogged() bool { return c.charged.Load() > c.background }

// Throttles reports whether what Backlogged counts is nearer to DirtyBytesMax than to
// BackgroundBytes: soon writers will wait in BalanceDirty. (Linux slows writers down from
// that middle on, balance_dirty_pages.)
func (c *Cache) Throttles() bool { return 2*c.charged.Load() > c.background+c.dirtyMax }

// WaitersForDirty reports whether somebody waits in BalanceDirty.
func (c *Cache) WaitersForDirty() bool { return c.dirtyGate.waiting.Load() > 0 }

// Install publishes r, a frame of payload, which is given, as the visible version
// of b, dirty in epoch. It uses up one block that BalanceDirty has admitted. It
// reports whether it replaced a version dirty in the same epoch, which then needs
// no writeback and whose place among the dirty the new one takes.
//
// REQUIRES: the caller holds the range lock of b in the state tree of the open
// epoch, which is epoch; so nobody installs or trims b at the same time.
// Install waits for nothing but the mutex of a shard.
func (c *Cache) Install(b block.Index, r Ref, epoch uint64) (replacedDirty bool) {
	h := c.arena.Header(r)
	if s := h.state.Load(); s != payload {
		panic(fmt.Sprintf("pagecache: install of frame %d in state %b", r, s))
	}
	h.block.Store(uint64(b))
	h.epoch = epoch
	h.refs.Store(1)
	c.budget.Add(payloadToCached)

	sh, bucket := c.home(b)
	sh.mu.Lock()
	old, was := c.supersede(sh, bucket, b, epoch)
	sh.withdraw(b)
	var rank uint32
	if old != 0 {
		rank = c.arena.Header(old).rank.Load()
	}
	c.attach(sh, bucket, r, dirty, rank)
	c.holes.punch(b)
	sh.events[wasWritten[was]]++
	crossed := false
	if was != wasDirty {
		crossed = c.dirty.Add(1) == c.background+1
	}
	sh.mu.Unlock()

	c.drop(old, was)
	if crossed || c.WaitersForDirty() {
		c.needWriteback()
	}
	c.trim()
	c.payloadGate.serve()
	return was == wasDirty
}

// InstallHole makes r a pending hole of epoch: its blocks read as zeros from now
// on, until HolesApplied. What was visible there is treated as by a write, and
// claims are withdrawn. It returns how many versions dirty in the same epoch were
// dropped and need no writeback, and the sequence number of the hole.
//
// REQUIRES: as Install, for all of r. It does not block; its cost is bounded by
// the smaller of the length of r and the size of the cache.
func (c *Cache) InstallHole(r block.Range, epoch uint64) (dropped block.Count, seq uint64) {
	if r.Empty() {
		return 0, c.holes.last()
	}
	// First the hole, then the sweep: what is claimed after the sweep of its
	// shard has seen the hole, what was claimed before is withdrawn.
	seq = c.holes.insert(r)
	if uint64(r.Len()) <= uint64(c.arena.Len())/8 { // a look-up costs about 8 steps of the scan below
		for b := r.Start; b < r.End; b++ {
			dropped += c.trimBlock(b, epoch)
		}
		return dropped, seq
	}
	// Claims first: when they are gone nothing can be attached in r, and the
	// scan over the frames misses nothing.
	for i := range c.shards {
		sh := &c.shards[i]
		sh.mu.Lock()
		for b := range sh.claims {
			if r.Contains(b) {
				sh.withdraw(b)
			}
		}
		sh.mu.Unlock()
	}
	for f := range Ref(c.arena.Used()) {
		h := c.arena.Header(f + 1)
		if h.state.Load()&attached == 0 {
			continue
		}
		// The block may be that of another life of the frame; trimBlock looks
		// it up anyway.
		if b := block.Index(h.block.Load()); r.Contains(b) {
			dropped += c.trimBlock(b, epoch)
		}
	}
	return dropped, seq
}

// trimBlock takes away what is visible of b, which lies in a new hole, and returns
// 1 if that was dirty in epoch.
func (c *Cache) trimBlock(b block.Index, epoch uint64) block.Count {
	sh, bucket := c.home(b)
	sh.mu.Lock()
	old, was := c.supersede(sh, bucket, b, epoch)
	sh.withdraw(b)
	if old != 0 {
		sh.events[wasTrimmed[was]]++
	}
	if was == wasDirty {
		c.dirty.Add(-1)
	}
	sh.mu.Unlock()
	c.drop(old, was)
	if was == wasDirty {
		return 1
	}
	return 0
}

// HolesApplied tells that the records of the holes up to number seq are in the
// extent map as far as r goes: they are not pending there any more. For a hole of
// the writeback seq is what HoleSeq was when the hole was handed off, not later:
// blocks written and trimmed again meanwhile have another record to come.
func (c *Cache) HolesApplied(r block.Range, seq uint64) { c.holes.remove(r, seq) }

// HoleSeq is the number of the newest hole, 0 if there never was one.
func (c *Cache) HoleSeq() uint64 { return c.holes.last() }

// was says what a write or trim found to be visible of its block.
type was uint8

const (
	wasAbsent was = iota
	wasClean
	wasDirty  // in the same epoch
	wasFrozen // dirty in an older epoch
	wasWriteback
	wasFailed
)

// wasWritten and wasTrimmed are the events that Install and InstallHole count.
var (
	wasWritten = [...]event{writesAbsent, writesClean, writesDirty, writesFrozen, writesWriteback, writesFailed}
	wasTrimmed = [...]event{wasClean: trimsClean, wasDirty: trimsDirty, wasFrozen: trimsFrozen, wasWriteback: trimsWriteback, wasFailed: trimsFailed}
)

// supersede takes the visible version of b, if there is one, out of sight because
// of a write or trim of epoch. The caller calls drop after it has let sh.mu go.
// REQUIRES: sh.mu held.
func (c *Cache) supersede(sh *shard, bucket uint64, b block.Index, epoch uint64) (Ref, was) {
	r := c.find(sh, bucket, b)
	if r == 0 {
		return 0, wasAbsent
	}
	h := c.arena.Header(r)
	state := h.state.Load()
	if state&dirty != 0 && h.epoch != epoch {
		if invariants.Enabled {
			invariants.Assertf(h.epoch < epoch, "block %d is dirty in epoch %d, written in %d", b, h.epoch, epoch)
			n := 0
			for x := sh.buckets[bucket].first; x != 0; x = c.arena.Header(x).next {
				if xh := c.arena.Header(x); xh.block.Load() == uint64(b) && xh.state.Load()&shadow != 0 {
					n++
				}
			}
			invariants.Assertf(n == 0, "block %d has a shadow already, written in %d", b, epoch)
		}
		c.setState(sh, r, state|shadow)
		return r, wasFrozen
	}
	c.unlink(sh, bucket, r)
	switch {
	case state&dirty != 0:
		if state&locked != 0 {
			sh.events[locksLost]++
		}
		c.setState(sh, r, state&locked)
		return r, wasDirty
	case state&writeback != 0:
		c.setState(sh, r, writeback)
		return r, wasWriteback
	case state&failed != 0:
		c.setState(sh, r, 0)
		return r, wasFailed
	}
	c.setState(sh, r, 0)
	return r, wasClean
}

// drop completes supersede, with no mutex held: the reference of the index, and
// the place among what the dirty limit counts, of a version that is gone. (An
// Install that replaces a dirty version gives one place back: it brought one.)
func (c *Cache) drop(r Ref, was was) {
	if r == 0 || was == wasFrozen {
		return
	}
	c.unref(r)
	if was == wasDirty || was == wasFailed {
		c.uncharge(1)
	}
}
