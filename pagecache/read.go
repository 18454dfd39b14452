package pagecache

import (
	"context"
	"fmt"

	"cnbd/internal/block"
)

// A Status is the answer of Get.
type Status uint8

const (
	// Hit: the block is here. The Ref is pinned until Unpin.
	Hit Status = iota
	// Hole: the block lies in a pending hole and reads as zeros.
	Hole
	// Filling: another reader has claimed the block. WaitFill, then Get again.
	Filling
	// Claimed: the block was absent and is claimed for the caller, who must
	// Fill or Abandon the Claim.
	Claimed
)

func (s Status) String() string {
	switch s {
	case Hit:
		return "hit"
	case Hole:
		return "hole"
	case Filling:
		return "filling"
	case Claimed:
		return "claimed"
	}
	return fmt.Sprintf("Status(%d)", uint8(s))
}

// Get looks b up for reading. It does not block. The Ref is valid for Hit only,
// the Claim for Claimed only. What a pinned Ref refers to stays as it is,
// whatever is written, trimmed or evicted meanwhile.
//
// After Claimed the caller looks b up in the extent map, not before.
func (c *Cache) Get(b block.Index) (Ref, Claim, Status) {
	sh, bucket := c.home(b)
	sh.mu.Lock()
	if r := c.find(sh, bucket, b); r != 0 {
		h := c.arena.Header(r)
		h.refs.Add(1)
		touch(h)
		sh.events[hits]++
		sh.mu.Unlock()
		c.pins[r%Ref(len(c.pins))].Add(1)
		return r, Claim{}, Hit
	}
	if _, ok := sh.claims[b]; ok {
		sh.events[fillWaits]++
		sh.mu.Unlock()
		return 0, Claim{}, Filling
	}
	// Under the mutex: an InstallHole that is not seen here has not swept this
	// shard yet, and will withdraw the claim when it does.
	if c.holes.contains(b) {
		sh.events[holeHits]++
		sh.mu.Unlock()
		return 0, Claim{}, Hole
	}
	cl := sh.claim(b)
	sh.events[misses]++
	sh.mu.Unlock()
	return 0, cl, Claimed
}

// Peek is Get of a block that nobody wants if it is not here: the answer is Hit, with
// a pinned Ref, Hole, or Filling for everything else. Only CountPeeks counts it, as a read too.
// It does not block.
func (c *Cache) Peek(b block.Index) (Ref, Status) {
	sh, bucket := c.home(b)
	sh.mu.Lock()
	if r := c.find(sh, bucket, b); r != 0 {
		c.arena.Header(r).refs.Add(1)
		sh.mu.Unlock()
		c.pins[r%Ref(len(c.pins))].Add(1)
		return r, Hit
	}
	_, claimed := sh.claims[b]
	hole := !claimed && c.holes.contains(b) // under the mutex, as in Get
	sh.mu.Unlock()
	if hole {
		return 0, Hole
	}
	return 0, Filling
}

// CountPeeks counts what Peek has answered a request with: versions, which are pinned
// still, and holes. Of a request that goes on to Get, what was peeked at counts there.
func (c *Cache) CountPeeks(hits []Ref, holes int) {
	for _, r := range hits {
		touch(c.arena.Header(r))
	}
	c.peekHits.Add(uint64(len(hits)))
	c.peekHoles.Add(uint64(holes))
}

// TryClaim claims b if it is absent, lies in no pending hole, and a frame for it
// could be had: for the neighbours of a block that is decoded anyway. The caller
// looks their mapping up again before it fills them. It does not block.
func (c *Cache) TryClaim(b block.Index) (Claim, bool) {
	if cached, _ := cachedPayload(c.budget.Load()); cached >= c.cacheMax && c.clean.Load() == 0 {
		return Claim{}, false
	}
	sh, bucket := c.home(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if _, ok := sh.claims[b]; ok || c.find(sh, bucket, b) != 0 || c.holes.contains(b) {
		return Claim{}, false
	}
	sh.events[neighbours]++
	return sh.claim(b), true
}

// Fill gives up the claim and publishes a copy of data, which is borrowed and has
// [block.Size] bytes, as the clean content of its block. Who waits for the block
// is woken. It reports false, and publishes nothing, if a write, trim or hole has
// withdrawn the claim, or if no frame can be had because everything in the cache
// is pinned or not yet written back. It does not block.
func (c *Cache) Fill(cl Claim, data []byte) bool {
	_, ok := c.fill(cl, data, 0)
	return ok
}

// FillPinned is Fill; on true the Ref is pinned until Unpin. On false the caller
// has no Ref, but data is a correct answer to the read that made the claim.
func (c *Cache) FillPinned(cl Claim, data []byte) (Ref, bool) {
	r, ok := c.fill(cl, data, 1)
	if ok {
		c.pins[r%Ref(len(c.pins))].Add(1)
	}
	return r, ok
}

func (c *Cache) fill(cl Claim, data []byte, pins int32) (Ref, bool) {
	if cl.seq == 0 || len(data) != block.Size {
		panic(fmt.Sprintf("pagecache: fill of claim %d of block %d with %d bytes", cl.seq, cl.block, len(data)))
	}
	r, ok := c.frameForFill()
	if !ok {
		c.giveUp(cl, fillsUncached)
		return 0, false
	}
	// The copy takes the bytes out of the decoder's scratch memory, which is
	// reused for the next extent.
	copy(c.arena.Bytes(r), data)
	h := c.arena.Header(r)
	h.block.Store(uint64(cl.block))
	h.refs.Store(1 + pins)

	sh, bucket := c.home(cl.block)
	sh.mu.Lock()
	if !sh.stands(cl) {
		sh.events[lateFills]++
		sh.mu.Unlock()
		c.release(r)
		c.payloadGate.serve()
		return 0, false
	}
	c.attach(sh, bucket, r, 0, uint32(pins))
	sh.withdraw(cl.block)
	sh.events[fills]++
	sh.mu.Unlock()
	return r, true
}

// frameForFill is a frame charged to the cache: a new one below the limit, else
// that of an evicted version.
func (c *Cache) frameForFill() (Ref, bool) {
	for {
		v := c.budget.Load()
		if cached, _ := cachedPayload(v); cached >= c.cacheMax {
			return c.evict(c.evictAll())
		}
		if c.budget.CompareAndSwap(v, v+cachedUnit) {
			return c.takeFrame(), true
		}
	}
}

// Abandon gives up the claim without an answer, after a read error or when the
// block turned out not to belong to what was decoded. Who waits for the block is
// woken and finds it absent. It does not block.
func (c *Cache) Abandon(cl Claim) { c.giveUp(cl, abandons) }

func (c *Cache) giveUp(cl Claim, e event) {
	if cl.seq == 0 {
		panic("pagecache: use of the zero Claim")
	}
	sh, _ := c.home(cl.block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.events[e]++
	if sh.stands(cl) {
		sh.withdraw(cl.block)
	}
}

// WaitFill waits until b is not claimed by the reader that holds it now. The error
// is the context's. Afterwards Get may say anything, Filling included.
func (c *Cache) WaitFill(ctx context.Context, b block.Index) error {
	sh, _ := c.home(b)
	sh.mu.Lock()
	cl, ok := sh.claims[b]
	if !ok {
		sh.mu.Unlock()
		return nil
	}
	if cl.done == nil {
		cl.done = make(chan struct{})
		sh.claims[b] = cl
	}
	sh.mu.Unlock()
	select {
	case <-cl.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Unpin gives up a Ref that Get or FillPinned pinned. It does not block.
func (c *Cache) Unpin(r Ref) {
	c.pins[r%Ref(len(c.pins))].Add(-1)
	c.unref(r)
	// A clean version that nobody holds any more can be evicted for payload.
	c.payloadGate.serve()
}

// claim makes a claim of b, which has none. REQUIRES: sh.mu held.
func (sh *shard) claim(b block.Index) Claim {
	sh.claimSeq++
	sh.claims[b] = claimed{seq: sh.claimSeq}
	return Claim{block: b, seq: sh.claimSeq}
}

// stands reports whether cl has not been withdrawn. REQUIRES: sh.mu held.
func (sh *shard) stands(cl Claim) bool {
	return sh.claims[cl.block].seq == cl.seq
}

// withdraw ends the claim of b, if there is one, and wakes who waits for it.
// REQUIRES: sh.mu held.
func (sh *shard) withdraw(b block.Index) bool {
	cl, ok := sh.claims[b]
	if !ok {
		return false
	}
	delete(sh.claims, b)
	if cl.done != nil {
		close(cl.done)
	}
	return true
}

// Stands reports whether cl has not been withdrawn by a write, trim or hole: what
// the map said of its block after it was made is still the newest.
func (c *Cache) Stands(cl Claim) bool {
	sh, _ := c.home(cl.block)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.stands(cl)
}
