// Package delalloc is the writeback of a device: it finds ranges of blocks whose
// dirty pages have no place in the log yet (delayed allocation), locks them,
// hands them to an ordered work queue that compresses them in parallel, and has
// the results appended to the log in the order of the hand-off.
//
//	dirty range --FindLock--> locked pages, locked range --HandOff--> chunks in
//	the queue --Do: encode, in parallel--> pieces --Complete: append, in
//	order--> log --Written--> pages are clean
//
// It is the pipeline of Btrfs' compressed writeback (commit 771ed689d2cd of
// Linux, November 2008) with copy-on-write instead of waiting: a page that is
// handed off never changes, because a write publishes a new version of it.
//
// # Epochs
//
// What requests change belongs to the open [Epoch]. A commit freezes it
// ([Epochs]), hands all of it off, and behind it, in the same queue, the commit
// record. Nothing of a later epoch is handed off before that (rule R3).
//
// # Invariants
//
//  1. When a chunk enters the queue, its range carries neither Locked nor
//     Delalloc: the bits are cleared before the first chunk of a hand-off is
//     queued, or items of the queue and those who wait for the bits could wait
//     for each other.
//  2. A found range intersects the block that was asked for, is at most as long
//     as the tokens taken for it, and all of it is locked and was Delalloc, with
//     its pages dirty in the epoch, when it was re-tested under the locks.
//  3. Pages are locked in ascending order, then the range. Tokens of the queue
//     are taken before any page is locked, so nobody sleeps with page locks.
//  4. Each page that was handed off ends its writeback exactly once.
//
// Lock order: Writeback.handOff, tokens of the queue, page locks, range locks.
package delalloc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"cnbd/asyncq"
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/buffer"
	"cnbd/internal/invariants"
)

const (
	// chunkBlocks is the unit of queueing: 512 KiB, as in Btrfs.
	chunkBlocks = 512 << 10 / block.Size

	// rangeBlocksMax bounds one find-and-lock: 128 MiB, as in Btrfs; here it is hard.
	rangeBlocksMax = 128 << 20 / block.Size

	// Owner is the owner number of the range locks of writeback. Requests take others.
	Owner = 1
)

// Pages is what writeback needs of the page cache. Package pagecache has the
// meaning of each.
type Pages interface {
	// LockDirty locks the version of block b that is dirty in the epoch. false:
	// there is none, or someone else has it locked; it does not wait.
	LockDirty(b block.Index, epoch uint64) (buffer.Frame, bool)
	// UnlockDirty undoes LockDirty.
	UnlockDirty(p buffer.Frame)
	// StillDirty tells whether the locked version has not been replaced.
	StillDirty(p buffer.Frame, epoch uint64) bool
	// HandOff moves a locked dirty version to the caller, as one in writeback.
	HandOff(p buffer.Frame)
	// EndWriteback ends the writeback of a version; without an error it is clean.
	EndWriteback(p buffer.Frame, err error)
	// Bytes is the contents of a version: block.Size bytes that do not change.
	Bytes(p buffer.Frame) []byte
	// HoleSeq is the sequence number of the newest hole.
	HoleSeq() uint64
	// HolesApplied says that the holes in r up to that number are in the map.
	HolesApplied(r block.Range, seq uint64)
}

// A Completion is told that what was appended to the log has been handed to the
// backing file, or will never be. Written must not block.
type Completion interface{ Written(err error) }

// Log is what writeback needs of the store. Its methods are called by the
// ordered side of the queue only, one at a time.
type Log interface {
	// AppendData appends a blob and enters it in the map; it copies the parts.
	AppendData(extents.Blob) error
	// AppendHole appends a hole and enters it in the map.
	AppendHole(block.Range) error
	// AfterWrite has c told, once and in log order, when what was appended has
	// been written; now says that nothing follows soon. On an error c is not told.
	AfterWrite(c Completion, now bool) error
	// Release gives back the reservation of n blocks that have been appended.
	Release(n block.Count)
	// AppendCommit appends a commit record; ok is false when there is nothing to
	// commit. sync then makes it durable; it is called outside the queue.
	AppendCommit() (sync func() error, ok bool, err error)
}

// A Transform is what is done to data between the cache and the log.
type Transform interface {
	// Encode appends the stored form of src, whole blocks of the device from
	// start on, to dst. ok is false when it is not worth it: src is then stored
	// as it is, and out is dst, with more capacity perhaps. worker tells calls
	// that may run at the same time apart.
	Encode(worker int, dst, src []byte, start block.Index) (out []byte, codec, level uint8, ok bool)
}

// Options are the settings of a Writeback; all must be given.
type Options struct {
	Pages        Pages
	Log          Log
	Queue        *asyncq.Queue
	Transform    Transform
	Workers      int // of Queue, without who helps
	ExtentBlocks int // pieces end at multiples of it; a power of two up to 32
}

// A Writeback writes dirty ranges of epochs out. Hand-offs are serialized by its
// mutex; everything else may be called at any time.
type Writeback struct {
	opts    Options    // immutable after New
	handOff sync.Mutex // serializes hand-offs, so that log order is epoch order
	scratch []scratch  // by worker
	chunks  sync.Pool
	locked  []buffer.Frame // guarded by handOff; the pages of the range being handed off

	metrics struct {
		finds, busy, retests, handOffs, pages, holes     atomic.Uint64
		chunks, encoded, raw, zeroPieces, encodeFailures atomic.Uint64
	}
}

// New makes a Writeback.
func New(o Options) *Writeback {
	w := &Writeback{opts: o, scratch: make([]scratch, o.Workers+1)} // one for who helps
	for i := range w.scratch {
		w.scratch[i].piece = make([]byte, o.ExtentBlocks*block.Size)
	}
	w.chunks.New = func() any { return &chunk{w: w} }
	return w
}

// scratch is the memory that one worker encodes in. Of a chunk there is one for each
// run of dirty blocks in the queue, thousands of single blocks perhaps: they keep
// what comes out, and not what an encoder wants to have while it tries.
type scratch struct {
	piece   []byte // gathered
	encoded []byte
}

// A Control steers one pass over an epoch, as writeback_control does in Linux.
type Control struct {
	// Budget is how many blocks to hand off; soft: a found range passes whole.
	// Blocks are counted when they are handed off, not when they are written.
	Budget block.Count
	// Next is where the pass begins, and afterwards where it ended: behind the
	// last block handed off.
	Next block.Index
	// Cyclic wraps around at the end, back to where the pass began.
	Cyclic bool
	// Sync waits for ranges that are locked by somebody, which else are left, and
	// leaves it to the caller to help the queue.
	Sync bool
	// Written is the number of blocks handed off so far.
	Written block.Count
}

// writepages hands dirty ranges of e off until the budget is used up or nothing
// is dirty. It sleeps for tokens of the queue. REQUIRES: w.handOff held, and
// e is the oldest epoch with anything dirty.
func (w *Writeback) writepages(ctx context.Context, e *Epoch, c *Control) error {
	begin, wrapped := c.Next, false
	for c.Written < c.Budget {
		r, have, ok := e.State.Find(c.Next, extents.Delalloc|extents.DirtyHole, 0)
		if ok && wrapped && r.Start >= begin {
			ok = false
		}
		switch {
		case !ok && c.Cyclic && !wrapped && begin > 0:
			c.Next, wrapped = 0, true
			continue
		case !ok:
			return nil
		}
		var done block.Range
		var err error
		if have&extents.DirtyHole != 0 {
			// A hole has no pages: all of its run, however long. It is not looked
			// for again, since it may be gone by then.
			done, ok = w.handOffHole(e, r, c.Sync)
		} else {
			r.End = min(r.End, r.Start+rangeBlocksMax)
			done, ok, err = w.writeRange(ctx, e, r, c.Sync)
		}
		if err != nil {
			return err
		}
		if !ok {
			// Somebody is changing it right now. He holds the range lock.
			if c.Sync {
				one := block.Span(r.Start, 1)
				e.State.Lock(one, Owner)
				e.State.Unlock(one, Owner, 0, 0)
				continue
			}
			c.Next = r.Start + 1
			continue
		}
		c.Written += min(done.Len(), rangeBlocksMax)
		c.Next = done.End
	}
	return nil
}

// writeRange hands off the beginning of r, which was found delalloc; false: busy.
func (w *Writeback) writeRange(ctx context.Context, e *Epoch, r block.Range, helped bool) (block.Range, bool, error) {
	// Invariant 3: tokens first.
	least := int64(min(r.Len(), block.Count(w.opts.ExtentBlocks)).Bytes())
	tokens, err := w.opts.Queue.Acquire(ctx, least, int64(r.Len().Bytes()))
	if err != nil {
		return r, false, err
	}
	if n := block.Count(tokens / block.Size); n < r.Len() {
		r.End = r.Start + block.Index(n)
		// Not in the middle of an extent, if that leaves anything.
		if cut := r.End &^ block.Index(w.opts.ExtentBlocks-1); cut > r.Start {
			r.End = cut
		}
	}
	found, pages, ok := w.findLock(e, r)
	if !ok {
		w.opts.Queue.Return(tokens)
		return r, false, nil
	}
	w.handOffRange(e, found, pages, tokens, helped)
	return found, true, nil
}

// findLock locks the pages of r, then the range, and re-tests that all of it is
// still delalloc. When a page has gone it tries once more with one block, as
// find_lock_delalloc_range does; false: that was busy too, and nothing is locked.
func (w *Writeback) findLock(e *Epoch, r block.Range) (block.Range, []buffer.Frame, bool) {
	for try := range 2 {
		if try > 0 {
			r.End = r.Start + 1
		}
		w.metrics.finds.Add(1)
		pages, ok := w.lockPages(e, r)
		if !ok {
			w.metrics.busy.Add(1)
			continue
		}
		e.State.Lock(r, Owner)
		ok = e.State.Test(r, extents.Delalloc, true)
		for _, p := range pages {
			ok = ok && w.opts.Pages.StillDirty(p, e.Number)
		}
		if ok {
			return r, pages, true
		}
		w.metrics.retests.Add(1)
		e.State.Unlock(r, Owner, 0, 0)
		w.unlockPages(pages)
	}
	return r, nil, false
}

// lockPages locks the dirty pages of r in ascending order, all or none.
func (w *Writeback) lockPages(e *Epoch, r block.Range) ([]buffer.Frame, bool) {
	pages := w.locked[:0]
	for b := r.Start; b < r.End; b++ {
		p, ok := w.opts.Pages.LockDirty(b, e.Number)
		if !ok {
			w.unlockPages(pages)
			return nil, false
		}
		pages = append(pages, p)
	}
	w.locked = pages
	return pages, true
}

func (w *Writeback) unlockPages(pages []buffer.Frame) {
	for _, p := range pages {
		w.opts.Pages.UnlockDirty(p)
	}
}

// handOffRange gives the locked pages of r to the queue, in chunks.
func (w *Writeback) handOffRange(e *Epoch, r block.Range, pages []buffer.Frame, tokens int64, helped bool) {
	for _, p := range pages {
		w.opts.Pages.HandOff(p)
	}
	// Invariant 1: before the first chunk is queued.
	e.State.Unlock(r, Owner, 0, extents.Delalloc)
	w.metrics.handOffs.Add(1)
	w.metrics.pages.Add(uint64(len(pages)))
	for len(pages) > 0 {
		// Chunks end at multiples of their size: no extent is cut by them.
		end := min(r.End, (r.Start+chunkBlocks)&^(chunkBlocks-1))
		n := int(end - r.Start)
		c := w.chunks.Get().(*chunk)
		c.begin(block.Range{Start: r.Start, End: end}, pages[:n])
		w.metrics.chunks.Add(1)
		w.submit(c, int64(n)*block.Size, helped)
		tokens -= int64(n) * block.Size
		pages, r.Start = pages[n:], end
	}
	w.opts.Queue.Return(tokens)
}

// handOffHole queues a record for the dirty hole r; false: it has changed.
func (w *Writeback) handOffHole(e *Epoch, r block.Range, helped bool) (block.Range, bool) {
	e.State.Lock(r, Owner)
	if !e.State.Test(r, extents.DirtyHole, true) {
		w.metrics.retests.Add(1)
		e.State.Unlock(r, Owner, 0, 0)
		return r, false
	}
	// Under the range lock no newer hole comes into r in this epoch.
	seq := e.holeSeq
	if seq == 0 {
		seq = w.opts.Pages.HoleSeq()
	}
	e.State.Unlock(r, Owner, 0, extents.DirtyHole)
	w.metrics.holes.Add(1)
	w.submit(&holeTask{w: w, r: r, seq: seq}, 0, helped)
	return r, true
}

// submit queues t. With helped the caller does what few tasks there are itself.
func (w *Writeback) submit(t asyncq.Task, tokens int64, helped bool) asyncq.Ticket {
	if helped {
		return w.opts.Queue.SubmitLater(t, tokens)
	}
	return w.opts.Queue.Submit(t, tokens)
}

type holeTask struct {
	w   *Writeback
	r   block.Range
	seq uint64
}

func (t *holeTask) Do(int) error { return nil }
func (t *holeTask) Complete(error) {
	if err := t.w.opts.Log.AppendHole(t.r); err != nil {
		return // the store has failed; the hole stays pending, and reads are right
	}
	t.w.opts.Pages.HolesApplied(t.r, t.seq)
}
func (t *holeTask) Free() {}

// A piece of a chunk is what becomes one record.
type piece struct {
	blob   extents.Blob
	hole   bool
	offset int // of the encoded bytes in chunk.out
	length int // 0: raw
}

// A chunk is an item of the queue: pages that were handed off.
type chunk struct {
	w       *Writeback
	r       block.Range
	pages   []buffer.Frame
	pieces  []piece
	out     []byte   // encoded bytes of all pieces
	parts   [][]byte // of raw pieces
	pending atomic.Int32
}

func (c *chunk) begin(r block.Range, pages []buffer.Frame) {
	c.r = r
	c.pages = append(c.pages[:0], pages...)
	c.pieces, c.out, c.parts = c.pieces[:0], c.out[:0], c.parts[:0]
	c.pending.Store(2) // Free, and Written
}

// Do cuts the chunk into pieces and encodes them.
func (c *chunk) Do(worker int) error {
	w := c.w
	extent := block.Index(w.opts.ExtentBlocks)
	for at := c.r.Start; at < c.r.End; {
		end := min(c.r.End, (at+extent)&^(extent-1))
		pages := c.pages[at-c.r.Start : end-c.r.Start]
		c.pieces = append(c.pieces, c.encode(worker, at, pages))
		at = end
	}
	return nil
}

// encode makes a piece of pages. Zero pages are left out of it.
func (c *chunk) encode(worker int, start block.Index, pages []buffer.Frame) piece {
	w := c.w
	p := piece{blob: extents.Blob{Start: start, Count: uint8(len(pages))}}
	s := &w.scratch[worker]
	src := s.piece[:0]
	for i, f := range pages {
		if b := w.opts.Pages.Bytes(f); !isZero(b) {
			p.blob.Present |= 1 << i
			src = append(src, b...) // the codecs want contiguous input
		}
	}
	if p.blob.Present == 0 {
		w.metrics.zeroPieces.Add(1)
		p.hole = true
		return p
	}
	out, codec, level, ok := w.opts.Transform.Encode(worker, s.encoded[:0], src, start)
	s.encoded = out
	if ok {
		w.metrics.encoded.Add(1)
		p.offset, p.length = len(c.out), len(out)
		c.out = append(c.out, out...)
		p.blob.Codec, p.blob.Level = codec, level
		return p
	}
	w.metrics.raw.Add(1)
	return p
}

// Complete appends the pieces in order.
func (c *chunk) Complete(err error) {
	w := c.w
	if err != nil {
		// A failure of the encoder, not of the disk: the data goes out raw.
		w.metrics.encodeFailures.Add(1)
		c.pieces, c.out = c.pieces[:0], c.out[:0]
		extent := block.Index(w.opts.ExtentBlocks)
		for at := c.r.Start; at < c.r.End; {
			end := min(c.r.End, (at+extent)&^(extent-1))
			n := uint8(end - at)
			c.pieces = append(c.pieces, piece{blob: extents.Blob{Start: at, Count: n, Present: uint32(1<<n - 1)}})
			at = end
		}
	}
	err = c.appendAll()
	w.opts.Log.Release(block.Count(len(c.pages)))
	if err == nil {
		err = w.opts.Log.AfterWrite(c, false)
	}
	if err != nil {
		c.Written(err)
	}
}

// appendAll appends the pieces, and one hole for each run of pieces that are all
// zeros.
func (c *chunk) appendAll() error {
	for i := 0; i < len(c.pieces); i++ {
		p := &c.pieces[i]
		if !p.hole {
			if err := c.append(p); err != nil {
				return err
			}
			continue
		}
		r := block.Span(p.blob.Start, block.Count(p.blob.Count))
		for i+1 < len(c.pieces) && c.pieces[i+1].hole {
			i++
			r.End += block.Index(c.pieces[i].blob.Count)
		}
		if err := c.w.opts.Log.AppendHole(r); err != nil {
			return err
		}
	}
	return nil
}

func (c *chunk) append(p *piece) error {
	c.parts = c.parts[:0]
	if p.length > 0 {
		c.parts = append(c.parts, c.out[p.offset:p.offset+p.length])
	} else {
		first := int(p.blob.Start - c.r.Start)
		for i := range int(p.blob.Count) {
			if p.blob.Present>>i&1 != 0 {
				c.parts = append(c.parts, c.w.opts.Pages.Bytes(c.pages[first+i]))
			}
		}
	}
	p.blob.Parts = c.parts
	return c.w.opts.Log.AppendData(p.blob)
}

// Written implements Completion: it ends the writeback of the pages: the log has them.
func (c *chunk) Written(err error) {
	for _, p := range c.pages {
		c.w.opts.Pages.EndWriteback(p, err)
	}
	c.release()
}

// Free is called by the queue after Complete.
func (c *chunk) Free() { c.release() }

// release puts the chunk back after its last user: the queue or the log's writer.
func (c *chunk) release() {
	if c.pending.Add(-1) == 0 {
		c.w.chunks.Put(c)
	}
}

// isZero tells whether all bytes of a page are zero.
func isZero(b []byte) bool { return string(b) == string(zeroPage[:]) }

var zeroPage [block.Size]byte

// commitTask is the commit record's place in the queue.
type commitTask struct {
	log  Log
	sync func() error
	ok   bool
	err  error
}

func (t *commitTask) Do(int) error   { return nil }
func (t *commitTask) Complete(error) { t.sync, t.ok, t.err = t.log.AppendCommit() }
func (t *commitTask) Free()          {}

// kickTask has what was appended before it written soon.
type kickTask struct{ log Log }

func (t *kickTask) Do(int) error      { return nil }
func (t *kickTask) Complete(error)    { _ = t.log.AfterWrite(t, true) } // a failure is told to those whose pages wait
func (t *kickTask) Free()             {}
func (t *kickTask) Written(err error) {}

// Commit freezes the open epoch of es, writes all of it out, and commits it.
// When it returns nil, everything that had left es.Enter/Leave before the call
// is durable. One at a time.
func (w *Writeback) Commit(ctx context.Context, es *Epochs) error {
	w.handOff.Lock()
	e := es.freeze(w.opts.Pages.HoleSeq)
	c := Control{Budget: ^block.Count(0), Sync: true}
	err := w.writepages(ctx, e, &c)
	if err != nil {
		// Only the context can end it; the rest of the epoch would be lost to
		// the next commit, so it is the end of the device.
		w.handOff.Unlock()
		return fmt.Errorf("delalloc: commit: %w", err)
	}
	if invariants.Enabled {
		r, _, dirty := e.State.Find(0, extents.Delalloc|extents.DirtyHole, 0)
		invariants.Assertf(!dirty, "epoch %d has %v dirty after writing it out", e.Number, r)
	}
	t := &commitTask{log: w.opts.Log}
	ticket := w.submit(t, 0, true)
	es.frozen = nil
	w.handOff.Unlock()
	if err := w.opts.Queue.Help(ctx, ticket); err != nil {
		return fmt.Errorf("delalloc: commit: %w", err)
	}
	es.trims.Add(-e.trims.Swap(0)) // they are appended
	es.recycle(e)
	if t.err != nil || !t.ok {
		return t.err
	}
	return t.sync()
}

// Background hands off dirty ranges of the open epoch, from c.Next on. With
// pressure what was handed off is written even if it fills no buffer of the log:
// somebody waits for the pages.
func (w *Writeback) Background(ctx context.Context, es *Epochs, c *Control, pressure bool) error {
	w.handOff.Lock()
	defer w.handOff.Unlock()
	e := es.Open()
	if err := w.writepages(ctx, e, c); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	e.settle()
	if pressure {
		w.opts.Queue.Submit(&kickTask{w.opts.Log}, 0)
	}
	return nil
}

// Metrics count what writeback has done.
type Metrics struct {
	Finds          uint64 `json:"finds"`           // find-and-lock attempts
	Busy           uint64 `json:"busy"`            // of them, a page had gone
	Retests        uint64 `json:"retests"`         // of them, the range had changed before it was locked
	HandOffs       uint64 `json:"hand_offs"`       // ranges
	Pages          uint64 `json:"pages"`           // handed off
	Holes          uint64 `json:"holes"`           // hole ranges handed off
	Chunks         uint64 `json:"chunks"`          // queued
	Encoded        uint64 `json:"encoded"`         // pieces stored compressed
	Raw            uint64 `json:"raw"`             // pieces stored as they are
	Zero           uint64 `json:"zero"`            // pieces of zeros, stored as holes
	EncodeFailures uint64 `json:"encode_failures"` // chunks stored raw since the encoder failed
}

// Metrics is a snapshot.
func (w *Writeback) Metrics() Metrics {
	m := &w.metrics
	return Metrics{
		Finds: m.finds.Load(), Busy: m.busy.Load(), Retests: m.retests.Load(), HandOffs: m.handOffs.Load(),
		Pages: m.pages.Load(), Holes: m.holes.Load(), Chunks: m.chunks.Load(), Encoded: m.encoded.Load(),
		Raw: m.raw.Load(), Zero: m.zeroPieces.Load(), EncodeFailures: m.encodeFailures.Load(),
	}
}
