package pagecache

import "cnbd/internal/block"

// An event is an edge of the page diagram that shards count.
type event uint8

const (
	hits event = iota
	holeHits
	fillWaits
	misses
	neighbours
	fills
	lateFills
	fillsUncached
	abandons
	writesAbsent
	writesClean
	writesDirty
	writesFrozen
	writesWriteback
	writesFailed
	trimsClean
	trimsDirty
	trimsFrozen
	trimsWriteback
	trimsFailed
	findLocks
	busyPages
	locksLost
	handOffs
	writebacksClean
	writebacksDetached
	writebackErrors
	evictions
	eventCount
)

// Metrics is a snapshot of the cache's counters and gauges. Each is exact; those
// of different shards are read one after the other.
type Metrics struct {
	// Lookups by Get, and those by Peek that CountPeeks was told of.
	Hits      uint64 `json:"hits"`       // answered by a version
	HoleHits  uint64 `json:"hole_hits"`  // answered by a pending hole
	FillWaits uint64 `json:"fill_waits"` // found the block claimed
	Misses    uint64 `json:"misses"`     // claimed the block
	// Claims by TryClaim, and the ends of claims.
	Neighbours    uint64 `json:"neighbours"`     // claimed by TryClaim
	Fills         uint64 `json:"fills"`          // published
	LateFills     uint64 `json:"late_fills"`     // dropped: a write, trim or hole had withdrawn the claim
	FillsUncached uint64 `json:"fills_uncached"` // dropped: no frame could be had
	Abandons      uint64 `json:"abandons"`       // given up, after read errors and for neighbours not wanted
	// Blocks installed, by what was visible before.
	WritesAbsent    uint64 `json:"writes_absent"` // nothing, or a claim or hole
	WritesClean     uint64 `json:"writes_clean"`
	WritesDirty     uint64 `json:"writes_dirty"`     // dirty in the same epoch
	WritesFrozen    uint64 `json:"writes_frozen"`    // dirty in the frozen epoch: it became the shadow
	WritesWriteback uint64 `json:"writes_writeback"` // in writeback: copy on write
	WritesFailed    uint64 `json:"writes_failed"`
	// Visible versions taken away by holes.
	TrimsClean     uint64 `json:"trims_clean"`
	TrimsDirty     uint64 `json:"trims_dirty"`  // dirty in the same epoch
	TrimsFrozen    uint64 `json:"trims_frozen"` // dirty in the frozen epoch: it became the shadow
	TrimsWriteback uint64 `json:"trims_writeback"`
	TrimsFailed    uint64 `json:"trims_failed"`
	// Writeback.
	FindLocks          uint64 `json:"find_locks"` // LockDirty took a lock
	BusyPages          uint64 `json:"busy_pages"` // LockDirty or StillDirty found none
	LocksLost          uint64 `json:"locks_lost"` // a write or trim of the same epoch dropped a locked version
	HandOffs           uint64 `json:"hand_offs"`
	WritebacksClean    uint64 `json:"writebacks_clean"`    // ended, now clean
	WritebacksDetached uint64 `json:"writebacks_detached"` // ended, replaced or trimmed meanwhile
	WritebackErrors    uint64 `json:"writeback_errors"`
	Evictions          uint64 `json:"evictions"`

	// Versions, in blocks.
	Cached    int64 `json:"cached"` // all of them; what CacheMax limits
	Clean     int64 `json:"clean"`  // visible and clean
	Dirty     int64 `json:"dirty"`  // not handed off, shadows included
	Shadow    int64 `json:"shadow"`
	Locked    int64 `json:"locked"` // between LockDirty and HandOff or UnlockDirty
	Writeback int64 `json:"writeback"`
	Failed    int64 `json:"failed"`
	Admitted  int64 `json:"admitted"` // by BalanceDirty, and not installed yet
	Payload   int64 `json:"payload"`  // frames of requests; what PayloadMax limits
	Pinned    int64 `json:"pinned"`   // references given to readers
	Claims    int64 `json:"claims"`   // blocks claimed
	Holes     int64 `json:"holes"`    // ranges of pending holes

	DirtyWaiters   int64 `json:"dirty_waiters"`   // callers that wait in BalanceDirty
	PayloadWaiters int64 `json:"payload_waiters"` // callers that wait in AdmitPayload

	CacheMax   block.Count `json:"cache_max"`
	PayloadMax block.Count `json:"payload_max"`
	DirtyMax   block.Count `json:"dirty_max"`
	Background block.Count `json:"background"`
}

// Metrics takes a snapshot. It takes the mutexes of the shards in turn.
func (c *Cache) Metrics() Metrics {
	var n [eventCount]uint64
	var m Metrics
	// Before the versions: an Install in between then makes Admitted too small
	// by one, a writeback that ends too large, and nothing worse.
	charged := c.charged.Load()
	for i := range c.shards {
		sh := &c.shards[i]
		sh.mu.Lock()
		for e, v := range sh.events {
			n[e] += v
		}
		m.Clean += sh.versions.clean
		m.Dirty += sh.versions.dirty
		m.Shadow += sh.versions.shadow
		m.Locked += sh.versions.locked
		m.Writeback += sh.versions.writeback
		m.Failed += sh.versions.failed
		m.Claims += int64(len(sh.claims))
		sh.mu.Unlock()
	}
	m.Admitted = charged - m.Dirty - m.Writeback - m.Failed
	m.Cached, m.Payload = cachedPayload(c.budget.Load())
	for i := range c.pins {
		m.Pinned += c.pins[i].Load()
	}
	m.Holes = c.holes.count.Load()
	m.DirtyWaiters = c.dirtyGate.waiting.Load()
	m.PayloadWaiters = c.payloadGate.waiting.Load()
	m.CacheMax, m.PayloadMax = block.Count(c.cacheMax), block.Count(c.payloadMax)
	m.DirtyMax, m.Background = block.Count(c.dirtyMax), block.Count(c.background)

	m.Hits, m.HoleHits, m.FillWaits, m.Misses = n[hits], n[holeHits], n[fillWaits], n[misses]
	m.Hits += c.peekHits.Load()
	m.HoleHits += c.peekHoles.Load()
	m.Neighbours, m.Fills, m.LateFills = n[neighbours], n[fills], n[lateFills]
	m.FillsUncached, m.Abandons = n[fillsUncached], n[abandons]
	m.WritesAbsent, m.WritesClean, m.WritesDirty = n[writesAbsent], n[writesClean], n[writesDirty]
	m.WritesFrozen, m.WritesWriteback, m.WritesFailed = n[writesFrozen], n[writesWriteback], n[writesFailed]
	m.TrimsClean, m.TrimsDirty, m.TrimsFrozen = n[trimsClean], n[trimsDirty], n[trimsFrozen]
	m.TrimsWriteback, m.TrimsFailed = n[trimsWriteback], n[trimsFailed]
	m.FindLocks, m.BusyPages, m.LocksLost, m.HandOffs = n[findLocks], n[busyPages], n[locksLost], n[handOffs]
	m.WritebacksClean, m.WritebacksDetached = n[writebacksClean], n[writebacksDetached]
	m.WritebackErrors, m.Evictions = n[writebackErrors], n[evictions]
	return m
}
