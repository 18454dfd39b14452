package pagecache

import (
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"unsafe"

	"cnbd/internal/block"
	"cnbd/internal/buffer"
	"cnbd/internal/invariants"
)

const (
	// shardCount is the number of shards of the index, a power of two. With
	// tens of goroutines at work two of them rarely want the same one.
	shardCount = 64

	// shardBlocksMin is how many blocks of a cache there are for each shard, else it
	// has fewer: the small queue of a shard is to have some extents in it.
	shardBlocksMin = 512

	// groupShift says how many blocks in a row are in one shard, 16: as many as are
	// decoded together by default, so that they are also evicted together. Half an
	// extent in the cache saves no decoding to who reads all of it.
	groupShift = 4

	defaultCacheBytes   = 256 << 20
	defaultPayloadBytes = 64 << 20

	// blocksMin and blocksMax bound each of the two budgets, in blocks: the
	// smallest cache that a test can make sense of, and what fits in a frame
	// number with both together.
	blocksMin = 4
	blocksMax = 1 << 30
)

// Options are the limits of a Cache. Sizes are in bytes and count whole blocks of
// [block.Size], rounded down.
type Options struct {
	// CacheBytes bounds the versions: clean, dirty, in writeback, shadows. A
	// version moves here from the payload budget when it is installed, and
	// while nothing can be evicted for it exceeds the limit; the payload budget
	// is that much smaller then. Default 256 MiB, at least 4 blocks.
	CacheBytes int64

	// PayloadBytes bounds the memory of requests being received, and with it
	// the size of one request. Default 64 MiB, at least 4 blocks.
	PayloadBytes int64

	// DirtyBytesMax bounds what is not in the extent map yet: dirty versions,
	// those in writeback, and those that BalanceDirty has admitted. Default
	// half of CacheBytes, at most CacheBytes, at least one block.
	DirtyBytesMax int64

	// BackgroundBytes is the amount of dirty data above which writeback is asked
	// for. Default an eighth of CacheBytes or half of DirtyBytesMax, whichever
	// is less; must be less than DirtyBytesMax.
	BackgroundBytes int64

	// NeedWriteback is called when dirty data rises above BackgroundBytes, and
	// whenever somebody waits for memory or for the dirty limit. It is called
	// often, from any goroutine, and must not block. Nil means nothing is called.
	NeedWriteback func()
}

// withDefaults is o with its zeros replaced.
func (o Options) withDefaults() Options {
	if o.CacheBytes == 0 {
		o.CacheBytes = defaultCacheBytes
	}
	if o.PayloadBytes == 0 {
		o.PayloadBytes = defaultPayloadBytes
	}
	if o.DirtyBytesMax == 0 {
		o.DirtyBytesMax = o.CacheBytes / 2
	}
	if o.BackgroundBytes == 0 {
		o.BackgroundBytes = min(o.CacheBytes/8, o.DirtyBytesMax/2)
	}
	if o.NeedWriteback == nil {
		o.NeedWriteback = func() {}
	}
	return o
}

// Validate reports every fault of o.
func (o Options) Validate() error {
	o = o.withDefaults()
	var errs []error
	budget := func(name string, v int64) {
		if n := v >> block.Shift; n < blocksMin || n > blocksMax {
			errs = append(errs, fmt.Errorf("pagecache: %s of %d: want %d to %d", name, v, int64(blocksMin)<<block.Shift, int64(blocksMax)<<block.Shift))
		}
	}
	budget("CacheBytes", o.CacheBytes)
	budget("PayloadBytes", o.PayloadBytes)
	if o.DirtyBytesMax < block.Size || o.DirtyBytesMax > o.CacheBytes {
		errs = append(errs, fmt.Errorf("pagecache: DirtyBytesMax of %d: want %d to CacheBytes (%d)", o.DirtyBytesMax, block.Size, o.CacheBytes))
	}
	if o.BackgroundBytes < 0 || o.BackgroundBytes >= o.DirtyBytesMax {
		errs = append(errs, fmt.Errorf("pagecache: BackgroundBytes of %d: want 0 to less than DirtyBytesMax (%d)", o.BackgroundBytes, o.DirtyBytesMax))
	}
	return errors.Join(errs...)
}

// A Ref names a version, or a frame of payload. The zero Ref is none. Whoever
// holds a Ref holds a reference that keeps the frame, and gives it up in the way
// that its function says.
type Ref = buffer.Frame

// A Claim is the right to fill one block that is absent. It is given up by
// exactly one call of Fill, FillPinned or Abandon.
type Claim struct {
	block block.Index
	seq   uint64 // 0 for no claim
}

// Block is the claimed block.
func (cl Claim) Block() block.Index { return cl.block }

// Bits of a version's state. A free frame, and a detached version that only
// readers hold, have none.
const (
	attached  uint32 = 1 << iota // in the index
	shadow                       // attached, but not visible
	dirty                        // not handed off; epoch says of which epoch
	locked                       // a flusher is between LockDirty and HandOff or UnlockDirty
	writeback                    // between HandOff and EndWriteback
	failed                       // its writeback failed; kept, to be read
	payload                      // not a version: owned by a request
)

// A header is what the cache knows of the frame with the same number.
type header struct {
	// block and state are written under the mutex of block's shard, or by the
	// owner of a frame that is not attached. InstallHole reads them without.
	block atomic.Uint64
	state atomic.Uint32
	// refs: invariant 9.
	refs atomic.Int32
	// epoch, next and the neighbours in a queue are guarded like state.
	epoch        uint64
	next         Ref // in the chain of the index
	newer, older Ref // in the queue of a clean version, see evict.go
	// rank is written under the mutex of block's shard, but for reads that count
	// themselves: see evict.go.
	rank atomic.Uint32
}

// The memory for one cached block beside its frame is said in doc.go.
const (
	_ = uint(40 - unsafe.Sizeof(header{}))
	_ = uint(8 - unsafe.Sizeof(bucket{}))
)

// A Cache is the page cache of one device. All methods but Close may be called
// concurrently, under the conditions that they state.
type Cache struct {
	// Immutable after New.
	arena         *buffer.Arena[header]
	cacheMax      int64 // the limits, in blocks
	payloadMax    int64
	dirtyMax      int64
	background    int64
	needWriteback func()
	hashSeed      [2]uint64
	bucketMask    uint64

	index  *buffer.Table[bucket]
	shards []shard // a power of two of them
	holes  holeMap

	// hand says where evict is: its upper bits are the shard.
	hand atomic.Uint64

	// budget has the number of cached frames in its low and of payload frames
	// in its high half: one word, so that Install moves a frame from one to the
	// other in one step and nobody sees a frame twice or not at all.
	budget atomic.Uint64
	// charged is what BalanceDirty limits: invariant 7.
	charged atomic.Int64
	// dirty is the number of dirty versions, shadows included.
	dirty atomic.Int64
	// clean is the number of clean visible versions, so that the evictor knows
	// when there is nothing to look for.
	clean atomic.Int64
	// small is how many of them are in small queues.
	small atomic.Int64
	// pins is the number of references given to readers, in stripes by frame.
	pins [16]struct {
		atomic.Int64
		_ [56]byte
	}

	// Of CountPeeks.
	peekHits, peekHoles atomic.Uint64

	payloadGate gate
	dirtyGate   gate
}

// A shard is a part of the index.
type shard struct {
	mu sync.Mutex // guards all below, and the headers of versions attached here
	// buckets are the shard's part of the index.
	buckets []bucket
	// small and main have the clean versions: see evict.go.
	small, main queue
	// claims has the blocks that somebody is about to fill. It is as large as
	// the readers at work make it.
	claims   map[block.Index]claimed
	claimSeq uint64
	events   [eventCount]uint64
	// versions counts versions by state.
	versions struct{ clean, dirty, shadow, locked, writeback, failed int64 }
}

// A bucket is a place of the index.
type bucket struct {
	first Ref    // version of the chain, or 0
	ghost uint32 // the trace of a block that was evicted, or 0: see evict.go
}

// claimed is a claim that stands.
type claimed struct {
	seq  uint64
	done chan struct{} // closed when the claim is gone; nil while nobody waits
}

// New makes an empty cache. Close gives its memory back.
func New(o Options) (*Cache, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	o = o.withDefaults()
	c := &Cache{
		cacheMax:      o.CacheBytes >> block.Shift,
		payloadMax:    o.PayloadBytes >> block.Shift,
		dirtyMax:      o.DirtyBytesMax >> block.Shift,
		background:    o.BackgroundBytes >> block.Shift,
		needWriteback: o.NeedWriteback,
		// Random, so that a client cannot choose blocks that share a chain.
		hashSeed: [2]uint64{rand.Uint64(), rand.Uint64() | 1},
	}
	frames := c.cacheMax + c.payloadMax
	var err error
	if c.arena, err = buffer.NewArena[header](int(frames)); err != nil {
		return nil, fmt.Errorf("pagecache: %w", err)
	}
	// One bucket for each frame that can be cached, or up to twice as many.
	c.shards = make([]shard, 1<<min(bits.Len64(uint64(c.cacheMax)/shardBlocksMin/2), bits.Len64(shardCount)-1))
	perShard := uint64(1) << bits.Len64(uint64(c.cacheMax-1)/uint64(len(c.shards)))
	c.bucketMask = perShard - 1
	if c.index, err = buffer.NewTable[bucket](int(perShard) * len(c.shards)); err != nil {
		return nil, errors.Join(fmt.Errorf("pagecache: %w", err), c.arena.Close())
	}
	buckets := c.index.Values()
	for i := range c.shards {
		c.shards[i].buckets = buckets[uint64(i)*perShard:][:perShard:perShard]
		c.shards[i].claims = make(map[block.Index]claimed)
	}
	c.payloadGate.try = c.tryChargePayload
	c.dirtyGate.try = c.tryChargeDirty
	return c, nil
}

// Close drops everything, dirty versions too, and gives the memory back. Nobody
// may call the cache any more. If references, payload, claims, locks or writeback
// are outstanding it keeps the memory and returns an error (builds with
// invariants panic): a leak does less harm than memory that vanishes under its
// user.
func (c *Cache) Close() error {
	m := c.Metrics()
	var errs []error
	for _, left := range []struct {
		what string
		n    int64
	}{
		{"pins", m.Pinned}, {"blocks of payload", m.Payload}, {"claims", m.Claims},
		{"locked versions", m.Locked}, {"versions in writeback", m.Writeback}, {"admitted dirty blocks", m.Admitted},
	} {
		if left.n != 0 {
			errs = append(errs, fmt.Errorf("pagecache: close with %d %s outstanding", left.n, left.what))
		}
	}
	if err := errors.Join(errs...); err != nil {
		invariants.Assertf(false, "%v", err)
		return err
	}
	return errors.Join(c.arena.Close(), c.index.Close())
}

// Bytes is the memory of r, [block.Size] bytes. Of payload it is the caller's to
// fill; of a version it is shared: read-only, and borrowed while the caller holds
// its reference.
func (c *Cache) Bytes(r Ref) []byte { return c.arena.Bytes(r) }

// home is where b is in the index: its shard, and in it the number of its bucket.
func (c *Cache) home(b block.Index) (*shard, uint64) {
	h := c.hash(b)
	// The blocks of a group have buckets side by side, in an order of its own: where
	// many groups have one block here, these have all buckets.
	return &c.shards[h%uint64(len(c.shards))], (h/shardCount ^ uint64(b)%(1<<groupShift)) & c.bucketMask
}

// hash is the hash of b's group. Groups in a row are to be in different shards, whatever the
// seed: without the second multiplication half of 64 are in one, for one seed of a thousand.
func (c *Cache) hash(b block.Index) uint64 {
	hi, lo := bits.Mul64(uint64(b)>>groupShift^c.hashSeed[0], c.hashSeed[1])
	return bits.RotateLeft64((hi^lo)*c.hashSeed[1], 32)
}

// find is the visible version of b, or 0. REQUIRES: sh.mu held.
func (c *Cache) find(sh *shard, bucket uint64, b block.Index) Ref {
	for r := sh.buckets[bucket].first; r != 0; {
		h := c.arena.Header(r)
		if h.block.Load() == uint64(b) && h.state.Load()&shadow == 0 {
			return r
		}
		r = h.next
	}
	return 0
}

// findDirty is the version of b that is dirty in epoch, visible or not, or 0.
// REQUIRES: sh.mu held.
func (c *Cache) findDirty(sh *shard, bucket uint64, b block.Index, epoch uint64) Ref {
	for r := sh.buckets[bucket].first; r != 0; {
		h := c.arena.Header(r)
		if h.block.Load() == uint64(b) && h.state.Load()&dirty != 0 && h.epoch == epoch {
			return r
		}
		r = h.next
	}
	return 0
}

// attach makes r the visible version of its block, which has none. The caller has
// set block, epoch and refs; rank is that of the version it replaces, or how often
// it was read. REQUIRES: sh.mu held.
func (c *Cache) attach(sh *shard, bucket uint64, r Ref, state, rank uint32) {
	h := c.arena.Header(r)
	if invariants.Enabled {
		b := block.Index(h.block.Load())
		invariants.Assertf(c.find(sh, bucket, b) == 0, "block %d has a visible version already", b)
	}
	h.next = sh.buckets[bucket].first
	sh.buckets[bucket].first = r
	c.enter(sh, bucket, h, rank)
	c.setState(sh, r, state|attached)
}

// unlink takes r out of the index; the caller then sets its state, and drops the
// reference of the index after it has let sh.mu go. REQUIRES: sh.mu held.
func (c *Cache) unlink(sh *shard, bucket uint64, r Ref) {
	for p := &sh.buckets[bucket].first; ; {
		if *p == 0 {
			panic(fmt.Sprintf("pagecache: version %d is not in the index", r))
		}
		h := c.arena.Header(*p)
		if *p == r {
			*p = h.next
			return
		}
		p = &h.next
	}
}

// setState sets the state of a version, and keeps the counters of states and the
// queues of what is clean. REQUIRES: sh.mu held.
func (c *Cache) setState(sh *shard, r Ref, state uint32) {
	h := c.arena.Header(r)
	old := h.state.Load()
	h.state.Store(state)
	delta := func(bits uint32) int64 { return btoi(state&bits != 0) - btoi(old&bits != 0) }
	v := &sh.versions
	v.dirty += delta(dirty)
	v.shadow += delta(shadow)
	v.locked += delta(locked)
	v.writeback += delta(writeback)
	v.failed += delta(failed)
	if d := btoi(isClean(state)) - btoi(isClean(old)); d != 0 {
		v.clean += d
		c.clean.Add(d)
		if d > 0 {
			c.push(sh, r)
		} else {
			c.pull(sh, r)
		}
	}
}

// isClean tells that a version in this state can be had again from the store.
func isClean(state uint32) bool { return state == attached }

func btoi(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// unref drops a reference to r, which is perhaps the last. It must not be called
// with a shard's mutex held.
func (c *Cache) unref(r Ref) {
	h := c.arena.Header(r)
	switch n := h.refs.Add(-1); {
	case n == 0:
		invariants.Assertf(h.state.Load() == 0, "last reference to frame %d in state %b", r, h.state.Load())
		c.release(r)
		c.payloadGate.serve()
	case n < 0:
		panic(fmt.Sprintf("pagecache: reference to frame %d dropped twice", r))
	}
}

// release gives the frame of a dead version back, and its place in the budget.
func (c *Cache) release(r Ref) {
	c.arena.Free(r) // first, so that what is charged exists: invariant 6
	c.budget.Add(^cachedUnit + 1)
}

// takeFrame takes the frame that the caller has charged to the budget.
func (c *Cache) takeFrame() Ref {
	r, ok := c.arena.Alloc()
	if !ok {
		panic("pagecache: no frame for what was charged to the budget")
	}
	return r
}

// Units of the word of the budget, and what moves one frame from payload to cached.
const (
	cachedUnit      uint64 = 1
	payloadUnit     uint64 = 1 << 32
	payloadToCached uint64 = ^payloadUnit + 1 + cachedUnit
)

// cachedPayload splits the word of the budget.
func cachedPayload(v uint64) (cached, payload int64) {
	return int64(v % payloadUnit), int64(v / payloadUnit)
}
