package pagecache

import (
	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// This file is the replacement policy, and the place for another one: the cache
// tells it what becomes clean, what stops being clean, and what is read, and asks
// it whom to evict.
//
// It is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction",
// SOSP 2023). What enters stands in the small queue, a tenth of what is clean. At
// its end a version that was read three times moves to the main queue, and any other
// goes: a scan, and the neighbours that came with a block and were never wanted,
// pass through that tenth and leave the rest alone. In the main queue each read, up
// to three, is worth another round. A ghost is a trace of a block that was read and
// evicted from the small queue: if it is read again soon it belongs to the hot ones,
// although the small queue was too short to see that.
//
// Two reads would do a little better for random reads. But a scan reads each block
// twice when it was read ahead, or when the client's partition does not begin at a
// whole block, and would then sweep the cache.
//
// Here it is made for blocks that are decoded sixteen at a time, and overwritten:
//
//   - A neighbour enters as not read. Its first read is what the miss of another
//     block is; so a scan in small requests does not look like two reads of each.
//   - A write leaves to a block the rank that it had, and is no read: what is written
//     and never read goes first.
//   - Only clean versions are in the queues, so that what is dirty costs the evictor
//     nothing. They enter when their writeback ends.
//
//   - What is read together goes together, for half an extent saves nothing to who
//     reads all of it. The blocks of a group, which is an extent mostly, are in one
//     shard, and the evictor takes as many versions from a shard as a group has before
//     it goes on to the next. The ghosts of a group lie side by side, where those of
//     another one replace them all.
//
// The queues are in shards like the index, under the same mutexes, and linked
// through the headers. From which of the two queues comes the next one to go is
// decided by their lengths in all shards together: in one shard alone the small
// queue is short by chance often enough for a long scan to drain the main queue.
// Ghosts have a place for each bucket of the index, where the next one of the
// bucket replaces them.

// header.rank says where a version stands, and how often it was read: in the low
// bits, in the small queue since it entered, in the main queue less the rounds that
// this was good for. It may exceed readsMax by those who read at the same time.
const (
	readsMask uint32 = 1<<16 - 1
	readsMax  uint32 = 3

	// mainRank is that of the versions of the main queue, and of those which will
	// stand there when they are clean.
	mainRank uint32 = 1 << 16
	// ghostRank: the block had a ghost when it entered, and moves to the main
	// queue if it was read at all.
	ghostRank uint32 = 1 << 17
)

const (
	// smallShare is the part of the clean versions that the small queue has. More
	// and less of it make little difference.
	smallShare = 10

	// trimSteps bounds what one call of trim looks at, about a microsecond's work:
	// Install calls it.
	trimSteps = 64

	// visitSteps bounds what the evictor looks at with the mutex of a shard held, and
	// lastSteps when it has been in all of them in vain: enough to see that all of a shard is
	// pinned, in a cache so small that its readers can pin all of it.
	visitSteps = 128
	lastSteps  = 2048
)

// A queue is a FIFO of clean versions, linked through their headers.
type queue struct {
	newest, oldest Ref
	n              int
}

// touch counts a read of a version. The caller holds a reference.
func touch(h *header) {
	// Most hits find it read often enough, and do not write to a shared cache line.
	if h.rank.Load()&readsMask < readsMax {
		h.rank.Add(1)
	}
}

// enter gives a version that becomes visible its rank: that of the version it
// replaces, or how often it was read. REQUIRES: sh.mu held.
func (c *Cache) enter(sh *shard, bucket uint64, h *header, rank uint32) {
	if rank&mainRank == 0 && sh.buckets[bucket].ghost == c.ghostOf(h) {
		rank |= ghostRank
	}
	h.rank.Store(rank)
}

// ghostOf is the trace of a block: bits of its hash that do not choose the bucket,
// and never 0. Two blocks have the same one in the same bucket seldom enough.
func (c *Cache) ghostOf(h *header) uint32 { return uint32(c.hash(block.Index(h.block.Load()))>>32) | 1 }

// queueOf is the queue for versions of this rank. REQUIRES: sh.mu held.
func (sh *shard) queueOf(rank uint32) *queue {
	if rank&mainRank != 0 {
		return &sh.main
	}
	return &sh.small
}

// isHot tells that a version of this rank in the small queue is to move to the main one.
func isHot(rank uint32) bool {
	return rank&readsMask >= readsMax || rank&readsMask > 0 && rank&ghostRank != 0
}

// push puts r, which has become clean, at the new end of its queue. REQUIRES: sh.mu held.
func (c *Cache) push(sh *shard, r Ref) {
	h := c.arena.Header(r)
	rank := h.rank.Load()
	q := sh.queueOf(rank)
	h.newer, h.older = 0, q.newest
	if q.newest != 0 {
		c.arena.Header(q.newest).newer = r
	} else {
		q.oldest = r
	}
	q.newest = r
	q.n++
	if rank&mainRank == 0 {
		c.small.Add(1)
	}
}

// pull takes r out of its queue. REQUIRES: sh.mu held.
func (c *Cache) pull(sh *shard, r Ref) {
	h := c.arena.Header(r)
	rank := h.rank.Load()
	q := sh.queueOf(rank)
	invariants.Assertf(q.n > 0, "version %d is in no queue", r)
	if h.newer != 0 {
		c.arena.Header(h.newer).older = h.older
	} else {
		q.newest = h.older
	}
	if h.older != 0 {
		c.arena.Header(h.older).newer = h.newer
	} else {
		q.oldest = h.newer
	}
	q.n--
	if rank&mainRank == 0 {
		c.small.Add(-1)
	}
}

// victim is the next version of sh to go, with 0 if it finds none. It looks at the
// queue from which the next one should come, or at either if the other has none,
// and in all at no more than limit versions. With fair it takes none from a shard whose
// part of that queue is shorter than that of the mean shard. It returns at how many it has
// looked, and whether all that are in sh are pinned. REQUIRES: sh.mu held.
func (c *Cache) victim(sh *shard, fair, either bool, limit int) (r Ref, looked int, pinned bool) {
	small, main, free := sh.small.n, sh.main.n, false // small and main are still to be looked at
	for looked < limit {
		allSmall, clean := c.small.Load(), c.clean.Load()
		fromSmall := allSmall*smallShare > clean
		if fair && looked == 0 {
			n, all := main, clean-allSmall
			if fromSmall {
				n, all = small, allSmall
			}
			if int64(n)*int64(len(c.shards)) < all {
				return 0, looked, false
			}
		}
		if either {
			fromSmall = fromSmall && small > 0 || main == 0
		}
		if fromSmall && small == 0 || !fromSmall && main == 0 {
			return 0, looked, small+main == 0 && !free
		}
		looked++
		if fromSmall {
			r = sh.small.oldest
		} else {
			r = sh.main.oldest
		}
		h := c.arena.Header(r)
		reads := h.rank.Load() & readsMask
		switch {
		case h.refs.Load() != 1:
			// Pinned: it is passed over.
			c.pull(sh, r)
			c.push(sh, r)
			if fromSmall {
				small--
			} else {
				main--
			}
		case fromSmall && isHot(h.rank.Load()):
			c.pull(sh, r)
			h.rank.Add(mainRank - reads)
			c.push(sh, r)
			small--
			main++
			free = true
		case !fromSmall && reads > 0:
			c.pull(sh, r)
			h.rank.Add(^uint32(0))
			c.push(sh, r)
			free = true
		default:
			return r, looked, false
		}
	}
	return 0, looked, false
}

// evict detaches a clean version that nobody holds, the first that the policy finds
// in about steps steps, and returns its frame, which is still charged to the budget.
// It must not be called with a shard's mutex held.
func (c *Cache) evict(steps int) (Ref, bool) {
	at, pinned, shards := uint64(0), 0, len(c.shards)
	for visit := 0; steps > 0 && c.clean.Load() > 0; visit++ {
		// First where the hand is, for as many versions as a group has, and where a queue
		// is long: of shards that all give as much, while chance says what they get, some would
		// soon have next to nothing, and give what has just come. Then all in turn: when
		// they have nothing but pinned versions, there is nothing to be had.
		either, fair, most := visit >= shards, false, visitSteps
		if either {
			at++
			most = lastSteps
		} else {
			hand := c.hand.Load()
			at, fair = hand>>groupShift, hand%(1<<groupShift) == 0
		}
		sh := &c.shards[at%uint64(shards)]
		sh.mu.Lock()
		r, looked, allPinned := c.victim(sh, fair, either, min(steps, most))
		if r != 0 {
			h := c.arena.Header(r)
			_, bucket := c.home(block.Index(h.block.Load()))
			if rank := h.rank.Load(); rank&mainRank == 0 && rank&readsMask > 0 {
				sh.buckets[bucket].ghost = c.ghostOf(h)
			}
			c.unlink(sh, bucket, r)
			c.setState(sh, r, 0)
			h.refs.Store(0)
			sh.events[evictions]++
			sh.mu.Unlock()
			c.hand.Add(1)
			return r, true
		}
		sh.mu.Unlock()
		c.hand.Add(1 << groupShift)
		steps -= 1 + looked
		if !either || !allPinned {
			pinned = 0
		} else if pinned++; pinned == shards {
			break
		}
	}
	return 0, false
}

// evictAll are steps enough to find what can be evicted, if all of it is in one
// shard, and was read as often as counts.
func (c *Cache) evictAll() int { return 16 * (int(c.clean.Load()) + len(c.shards)) }

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
