// Package store keeps the contents of one device in one backing file or block
// device: a log of segments, and a map that says where in the log each block's
// newest bytes are. It survives a power cut at any moment.
//
// # Log, epochs, commits
//
// Everything is appended to the log: blobs of data, holes, the nodes of the map
// ([Store.AppendData], [Store.AppendHole]). Records belong to the current epoch.
// A commit record closes it ([Store.AppendCommit]); when the commit is synced
// ([Store.Sync]) the epoch is durable. After a crash the store holds exactly
// the state of one commit, at or after the last one whose Sync returned nil.
//
// The map is an overlay in memory (what was appended since the last checkpoint)
// over a tree on the medium. A checkpoint merges the overlay of one commit into
// the tree, appends the changed nodes, waits until a later commit has made them
// durable, and writes a superblock that points to them. Recovery reads the
// superblock, then replays the log behind the checkpoint's commit.
//
// # Invariants
//
//  1. No byte of a segment is written twice before the segment is free again.
//  2. Log order is epoch order; the next commit record is appended only after
//     the sync of the one before (rule R1, R3).
//  3. All that a superblock leads to lies before the end of an epoch that was
//     durable before the superblock was written, so recovery's end of the log
//     lies behind it.
//  4. A segment is written again only when neither of the two newest durable
//     checkpoints, nor the log behind them, nor a [View] needs it (rule R4).
//  5. The accounting of segments is that of the newest durable checkpoint.
//  6. After the first failed write or sync nothing is appended or synced with
//     success any more (promise P5).
//
// # Concurrency and lock order
//
// AppendData, AppendHole and AppendCommit must come from one goroutine at a
// time, the ordered side of the work queue; Sync likewise. Everything else may
// be called at any time. Locks, outermost first: log.mu, Store.progress, Store.mu,
// Store.reserving, segments.alloc, segments.mu, log.written. Store.progress and
// Store.syncing are taken with none of them but log.mu held.
package store

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"sync"
	"sync/atomic"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/invariants"
	"cnbd/internal/mutant"
)

var (
	// ErrNoSpace says that a write does not fit, into the store's capacity or
	// onto the host.
	ErrNoSpace = errors.New("no space left in the store")
	// ErrHostFull is the ErrNoSpace of a host that is full.
	ErrHostFull = fmt.Errorf("the host is full: %w", ErrNoSpace)
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("store: closed")
	// ErrReadOnly says that the store was opened for reading.
	ErrReadOnly = errors.New("store: opened read-only")
)

// Options are the settings of an open store. Zero means the default.
type Options struct {
	// ReadOnly opens without writing anything: the log is replayed in memory.
	ReadOnly bool

	// CheckpointBytes is the length of log after which a checkpoint is taken.
	// Recovery reads at most about two of these. Default 256 MiB.
	CheckpointBytes uint64

	// CheckpointRecords is the number of records after which a checkpoint is
	// taken; it bounds the memory of the overlay (about 100 bytes each, twice).
	// Default 128 Ki.
	CheckpointRecords uint64

	// MapCacheBytes bounds the cache of map nodes. Default 32 MiB.
	MapCacheBytes int64

	// TrimLeaves is how many leaves of the map one checkpoint visits to work off
	// large trims (rule R11). Default 4096.
	TrimLeaves int

	// ZeroCommits is how many commits in sequence have to be small before zeros are
	// written ahead of the log. Default 32.
	ZeroCommits int

	// NeedCommit is called, from any goroutine, when the store needs a commit
	// to finish a checkpoint although nobody flushes. It must not block. It may
	// be nil if the caller commits anyhow.
	NeedCommit func()

	// Trims returns how many holes the caller may have soon, for what asks whether
	// the store is Short counts itself before, and how many it holds that it will
	// append, at most; in this order, for what is coming is held before it comes no
	// more. They change the map without a reservation, so that what they take at
	// the next checkpoint is kept free for them. It is called from any goroutine and
	// must not block. It may be nil if there are none.
	Trims func() (coming, held int64)

	// Warn is told of damage that was found and of other things that an
	// administrator should know. It may be nil.
	Warn func(msg string, err error)
}

func (o *Options) setDefaults() {
	if o.CheckpointBytes == 0 {
		o.CheckpointBytes = 256 << 20
	}
	if o.CheckpointRecords == 0 {
		o.CheckpointRecords = 128 << 10
	}
	if o.MapCacheBytes == 0 {
		o.MapCacheBytes = 32 << 20
	}
	if o.ZeroCommits == 0 {
		o.ZeroCommits = 32
	}
	if o.TrimLeaves == 0 {
		o.TrimLeaves = 4096
	}
	if o.NeedCommit == nil {
		o.NeedCommit = func() {}
	}
	if o.Trims == nil {
		o.Trims = func() (coming, held int64) { return 0, 0 }
	}
	if o.Warn == nil {
		o.Warn = func(string, error) {}
	}
}

// A Store is an open store. It owns its file from Open to Close.
type Store struct {
	geometry Geometry // what is in force; Resize changes it with s.mu and log.mu held
	opts     Options
	file     disk.File
	segments *segments
	nodes    *nodeStore
	tree     *extents.Tree
	log      *log     // nil if read-only
	cleaner  *cleaner // nil if read-only
	touched  *touched // for recompression

	salvage  bool                  // recovery goes on where it would refuse: see Repair
	failure  atomic.Pointer[error] // the first failed write or sync
	snapshot atomic.Bool           // the next commit is to be a checkpoint's

	syncing  sync.Mutex // one sync at a time
	resizing sync.Mutex // one Resize at a time; taken before all others

	reserving sync.Mutex   // one at a time tries to raise reserved; segments.mu is taken under it
	reserved  atomic.Int64 // blocks reserved for writes
	asking    atomic.Int64 // blocks that Reserve is about to reserve, if it can
	entries   atomic.Int64 // extents in both overlays, about

	mu struct {
		sync.RWMutex
		target   Geometry         // of the next superblock
		open     *extents.Overlay // of what was appended since the newest snapshot
		merging  *extents.Overlay // of the snapshot being merged; nil if none is
		trims    *extents.RangeSet
		root     extents.Root
		nodes    nodeTotals
		sequence uint64 // of the newest durable checkpoint, whose root and trims these are
		replay   uint64 // the serial of the segment in which replay from it starts
		closed   bool
	}

	progress struct {
		sync.Mutex
		cond     *sync.Cond
		durable  uint64 // newest durable epoch
		sequence uint64 // newest durable checkpoint
		running  bool   // a checkpoint is
	}
	checkpoints sync.WaitGroup

	scrub scrub

	recovery Recovery
	metrics  struct {
		reads, readBytes, corrupt, commits, syncs, checkpoints atomic.Uint64
		dataRecords, dataBytes, storedBytes, rawRecords, holes atomic.Uint64
		cleaned, movedBytes, recompressedBytes, shortages      atomic.Uint64
	}
}

// Geometry is what the store was made with, or has been resized to.
func (s *Store) Geometry() Geometry {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.geometry
}

// Err is the failed write or sync after which nothing can be stored any more,
// nil if there was none.
func (s *Store) Err() error {
	if p := s.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// fail notes the first failure, wakes whoever waits, and returns the first.
func (s *Store) fail(err error) error {
	if s.failure.CompareAndSwap(nil, &err) {
		s.opts.Warn("the store has failed and takes no more writes", err)
	}
	if s.progress.cond != nil {
		s.progress.Lock()
		s.progress.cond.Broadcast()
		s.progress.Unlock()
	}
	return s.Err()
}

// AppendData appends one blob to the current epoch and enters it in the map. It
// copies the parts and returns without waiting for the disk, unless all write
// buffers are full.
func (s *Store) AppendData(b extents.Blob) error {
	if err := s.writable(); err != nil {
		return err
	}
	invariants.Assertf(b.Count > 0 && b.Count <= ExtentBlocksMax && b.Present != 0 && uint64(b.Present)>>b.Count == 0, "blob %d+%d %b", b.Start, b.Count, b.Present)
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if b.Codec == 0 {
		// Raw blocks can be cut anywhere, so they fill a segment to its end.
		if n := int(s.log.tailLocked() / block.Size); n > 0 && n < bits.OnesCount32(b.Present) {
			var head extents.Blob
			head, b = cutRaw(b, n)
			if err := s.appendBlobLocked(head); err != nil {
				return err
			}
		}
	}
	return s.appendBlobLocked(b)
}

// appendBlobLocked appends b as one record. REQUIRES: log.mu held.
func (s *Store) appendBlobLocked(b extents.Blob) error {
	h := header{kind: recordData, codec: b.Codec, level: b.Level, start: b.Start, count: block.Count(b.Count), present: b.Present}
	ref, err := s.log.appendLocked(h, b.Parts...)
	if err != nil {
		return err
	}
	s.mu.Lock()
	insertBlob(s.mu.open, extents.Data, h, ref)
	s.entries.Store(s.overlayLenLocked())
	s.mu.Unlock()
	s.metrics.dataRecords.Add(1)
	s.metrics.dataBytes.Add(uint64(bits.OnesCount32(b.Present)) * block.Size)
	s.metrics.storedBytes.Add(uint64(ref.length))
	if b.Codec == 0 {
		s.metrics.rawRecords.Add(1)
	}
	s.touched.note(block.Span(h.start, h.count))
	return nil
}

// cutRaw cuts the blob b, whose stored bytes are its blocks, behind the first n
// of those that it holds, of which there are more.
func cutRaw(b extents.Blob, n int) (head, tail extents.Blob) {
	rest := b.Present
	for range n {
		rest &= rest - 1
	}
	first := bits.TrailingZeros32(rest) // block of the tail
	head, tail = b, b
	head.Count, head.Present = uint8(first), b.Present&^rest
	tail.Start, tail.Count, tail.Present = b.Start+block.Index(first), b.Count-uint8(first), rest>>first
	head.Parts, tail.Parts = nil, nil
	left := n * block.Size
	for _, p := range b.Parts {
		k := min(left, len(p))
		left -= k
		if k > 0 {
			head.Parts = append(head.Parts, p[:k])
		}
		if k < len(p) {
			tail.Parts = append(tail.Parts, p[k:])
		}
	}
	return head, tail
}

// insertBlob enters a data record in an overlay: a run of present blocks is an
// extent of the blob, a run of absent ones a hole. With kind Lost the blob is
// known to be damaged.
func insertBlob(o *extents.Overlay, kind extents.Kind, h header, ref blobRef) {
	addr := extents.Addr{Segment: ref.segment, Offset: ref.offset, Length: ref.length, Checksum: ref.checksum,
		Blocks: uint8(bits.OnesCount32(h.present)), Codec: h.codec, Level: h.level}
	skip := uint8(0)
	for i := 0; i < int(h.count); {
		rest := h.present >> i
		e := extents.Extent{Start: h.start + block.Index(i)}
		if rest&1 != 0 {
			e.Kind = kind
			if kind == extents.Data {
				e.Skip, e.Addr = skip, addr
			}
			e.Count = block.Count(bits.TrailingZeros32(^rest))
			skip += uint8(e.Count)
		} else {
			e.Count = min(block.Count(bits.TrailingZeros32(rest)), h.count-block.Count(i))
		}
		o.Insert(e)
		i += int(e.Count)
	}
}

// AppendHole appends a record that says that r reads as zeros from here on, and
// enters it in the map. It does not walk the map, whatever the size of r.
func (s *Store) AppendHole(r block.Range) error {
	if err := s.writable(); err != nil {
		return err
	}
	if r.Empty() {
		return nil // a record of no blocks is none that recovery takes
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if _, err := s.log.appendLocked(header{kind: recordHole, start: r.Start, count: r.Len()}); err != nil {
		return err
	}
	s.mu.Lock()
	s.mu.open.Insert(extents.Extent{Start: r.Start, Count: r.Len(), Kind: extents.Hole})
	s.entries.Store(s.overlayLenLocked())
	s.mu.Unlock()
	s.metrics.holes.Add(1)
	s.touched.note(r)
	return nil
}

func (s *Store) overlayLenLocked() int64 {
	n := s.mu.open.Len()
	if s.mu.merging != nil {
		n += s.mu.merging.Len()
	}
	return int64(n)
}

// AfterWrite has c told when everything appended so far has been handed to the
// backing file. With now the buffers are not kept for more to come: the log is
// padded to the next border.
func (s *Store) AfterWrite(c Completion, now bool) error {
	if s.log == nil {
		return ErrReadOnly
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	if err := s.Err(); err != nil {
		// Nothing more comes that would fill the buffer, and somebody may wait
		// for what is in it.
		s.log.handOverLocked()
		return err
	}
	s.log.completeLocked(c)
	if now {
		s.log.padLocked()
	}
	return nil
}

// Kick hands everything appended so far to the backing file.
func (s *Store) Kick() {
	if s.writable() == nil {
		s.log.mu.Lock()
		s.log.padLocked()
		s.log.mu.Unlock()
	}
}

// A Commit is a commit record that has been appended.
type Commit struct {
	Epoch   uint64
	buffers uint64
	snap    *snapshot
}

// DurableEpoch is the number of the newest commit that is durable, after Close as
// well. It does not block.
func (s *Store) DurableEpoch() uint64 {
	if s.log == nil {
		return s.recovery.Epoch
	}
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.log.mu.durable
}

// AppendCommit closes the current epoch. Sync makes it durable. An epoch without
// a record needs none: ok is false, and everything before is durable already.
// REQUIRES: the Sync of the commit before has returned.
func (s *Store) AppendCommit() (c Commit, ok bool, err error) {
	if err := s.writable(); err != nil {
		return c, false, err
	}
	l := s.log
	l.mu.Lock()
	lost := false
	defer func() {
		l.mu.Unlock()
		if lost {
			s.warnPinLost() // which may block
		}
	}()
	if l.idleLocked() && !s.snapshot.Load() {
		return c, false, nil
	}
	invariants.Assertf(l.mu.durable >= l.mu.epoch-1 || l.mu.durable == s.recovery.Epoch, "one commit in flight: %d durable, %d open", l.mu.durable, l.mu.epoch)
	c.Epoch, c.buffers, err = l.commitLocked()
	if err != nil {
		return c, false, err
	}
	s.metrics.commits.Add(1)
	// When room is short, what is overwritten must come back soon: a checkpoint
	// for each segment, for trims and commits take space without reserving it.
	free, warm := s.segments.room()
	few := free < 2*reserveSegments
	short := (few || warm < reserveSegments) && l.mu.head.serial > l.mu.snapshot
	if short && few {
		lost = s.segments.giveUp()
	}
	if s.snapshot.Load() || short || s.dueLocked() {
		c.snap = s.takeSnapshot(c.Epoch)
	}
	return c, true, nil
}

// dueLocked tells whether so much has been appended that it is time for a
// checkpoint. REQUIRES: log.mu held.
func (s *Store) dueLocked() bool {
	return s.log.mu.since >= s.opts.CheckpointBytes || s.log.mu.records >= s.opts.CheckpointRecords
}

// checkpointDue is dueLocked without the lock.
func (s *Store) checkpointDue() bool {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return s.dueLocked()
}

// Sync makes c durable with one fdatasync. A failure is final: the store has
// failed.
func (s *Store) Sync(c Commit) error {
	err := s.log.waitWritten(c.buffers)
	if err == nil && !mutant.Is(mutant.CommitWithoutSync) {
		err = s.sync()
	}
	if err != nil {
		return s.fail(fmt.Errorf("store: commit of epoch %d: %w", c.Epoch, err))
	}
	s.log.mu.Lock()
	s.log.mu.durable = c.Epoch
	s.log.mu.Unlock()
	s.log.synced()
	s.progress.Lock()
	s.progress.durable = c.Epoch
	s.progress.cond.Broadcast()
	s.progress.Unlock()
	if c.snap != nil {
		s.checkpoints.Go(func() { s.checkpoint(c.snap) })
	}
	return nil
}

// sync is one fdatasync. They go one at a time, and a failure is noted before
// the next begins: the kernel tells of lost pages once for each open file, and
// which of two syncs at the same time is told says nothing about whose pages.
func (s *Store) sync() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.metrics.syncs.Add(1)
	if err := s.file.Sync(); err != nil {
		return s.fail(fmt.Errorf("store: sync: %w", err))
	}
	return s.Err()
}

// Durable is the newest durable epoch.
func (s *Store) Durable() uint64 {
	s.progress.Lock()
	defer s.progress.Unlock()
	return s.progress.durable
}

func (s *Store) writable() error {
	if s.log == nil {
		return ErrReadOnly
	}
	return s.Err()
}

// A View keeps what the map refers to from being overwritten, so that places
// found by Lookup stay readable until Close. It does not freeze the contents:
// each Lookup sees the newest map.
type View struct{ version uint64 }

// View begins a view. It does not block.
func (s *Store) View() View {
	s.mu.RLock()
	v := View{s.mu.sequence}
	s.segments.pin(v.version)
	s.mu.RUnlock()
	return v
}

// Unview ends a view.
func (s *Store) Unview(v View) { s.segments.unpin(v.version) }

// Lookup appends to out the extents that cover r without gaps, in ascending
// order, clipped to r. It may read map nodes. REQUIRES: an open View of the
// caller's. A node that is damaged gives extents of kind Lost; err is another
// failure to read it.
func (s *Store) Lookup(r block.Range, out []extents.Extent) ([]extents.Extent, error) {
	if r.Empty() {
		return out, nil
	}
	s.mu.RLock()
	root := s.mu.root
	from := len(out)
	out = s.lookupOverlaysLocked(r, out)
	s.mu.RUnlock()
	return s.lookupTree(root, out, from)
}

// lookupLocked is Lookup. REQUIRES: s.mu held for reading.
func (s *Store) lookupLocked(r block.Range) ([]extents.Extent, error) {
	return s.lookupTree(s.mu.root, s.lookupOverlaysLocked(r, nil), 0)
}

// lookupTree replaces the runs of kind inTree in out[from:] by what the tree has.
func (s *Store) lookupTree(root extents.Root, out []extents.Extent, from int) ([]extents.Extent, error) {
	missing := false
	for _, e := range out[from:] {
		missing = missing || e.Kind == inTree
	}
	if !missing {
		return out, nil
	}
	// What comes in their place goes behind all of it, and is then moved there.
	n := len(out) - from
	for i := range n {
		p := out[from+i]
		if p.Kind != inTree {
			out = append(out, p)
			continue
		}
		pos, end := p.Start, p.Range().End
		err := s.tree.Lookup(root, p.Range(), func(e extents.Extent) error {
			if e.Start > pos {
				out = append(out, hole(block.Range{Start: pos, End: e.Start}))
			}
			out = append(out, e)
			pos = e.Range().End
			return nil
		})
		if err != nil {
			return out[:from], fmt.Errorf("store: look up %v: %w", p.Range(), err)
		}
		if pos < end {
			out = append(out, hole(block.Range{Start: pos, End: end}))
		}
	}
	return append(out[:from], out[from+n:]...), nil
}

// inTree marks, inside Lookup, a run that only the tree knows of.
const inTree = extents.Kind(255)

func hole(r block.Range) extents.Extent {
	return extents.Extent{Start: r.Start, Count: r.Len(), Kind: extents.Hole}
}

// lookupOverlaysLocked covers r by what is in the open overlay, else in the one
// being merged, else in the pending trims, else by runs of kind inTree.
func (s *Store) lookupOverlaysLocked(r block.Range, out []extents.Extent) []extents.Extent {
	return lookupLayers(r, out, s.mu.open, s.mu.merging, s.mu.trims)
}

// lookupLayers covers r by what is in the overlays, which may be nil, else in the
// pending trims, else by runs of kind inTree.
func lookupLayers(r block.Range, out []extents.Extent, upper, lower *extents.Overlay, pending *extents.RangeSet) []extents.Extent {
	trims := func(r block.Range) {
		pos := r.Start
		pending.Visit(r, func(t block.Range) {
			if t.Start > pos {
				out = append(out, extents.Extent{Start: pos, Count: block.Count(t.Start - pos), Kind: inTree})
			}
			out = append(out, hole(t))
			pos = t.End
		})
		if pos < r.End {
			out = append(out, extents.Extent{Start: pos, Count: block.Count(r.End - pos), Kind: inTree})
		}
	}
	layer := func(o *extents.Overlay, below func(block.Range)) func(block.Range) {
		if o == nil {
			return below
		}
		return func(r block.Range) {
			pos := r.Start
			o.Lookup(r, func(e extents.Extent) {
				if e.Start > pos {
					below(block.Range{Start: pos, End: e.Start})
				}
				out = append(out, e)
				pos = e.Range().End
			})
			if pos < r.End {
				below(block.Range{Start: pos, End: r.End})
			}
		}
	}
	layer(upper, layer(lower, trims))(r)
	return out
}

// ReadBlob reads the stored bytes of a blob into dst, which must be a.Length
// long, and verifies their checksum. An error that wraps ErrCorrupt says that
// they are not what was written. REQUIRES: the View under which a was looked up.
func (s *Store) ReadBlob(dst []byte, a extents.Addr) error {
	s.metrics.reads.Add(1)
	s.metrics.readBytes.Add(uint64(a.Length))
	return s.readBlob(dst, blobRef{a.Segment, a.Offset, a.Length, a.Checksum})
}

func (s *Store) readBlob(dst []byte, ref blobRef) error { return s.readBlobFrom(s.file, dst, ref) }

// readBlobFrom is readBlob from another reader of the file.
func (s *Store) readBlobFrom(f io.ReaderAt, dst []byte, ref blobRef) error {
	if uint64(ref.offset)+uint64(ref.length) > uint64(s.segments.size) || ref.segment >= s.segments.total.Load() {
		return fmt.Errorf("store: place %d+%d of segment %d is outside of it: %w", ref.offset, ref.length, ref.segment, ErrCorrupt)
	}
	off := s.segments.base(ref.segment) + int64(ref.offset)
	n, err := f.ReadAt(dst[:ref.length], off)
	if n < int(ref.length) && err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("store: read %d bytes at %d of segment %d: %w", ref.length, ref.offset, ref.segment, err)
	}
	clear(dst[n:ref.length])
	if sum := crc32.Update(s.segments.seed(ref.segment), castagnoli, dst[:ref.length]); sum != ref.checksum && !mutant.Is(mutant.BlobUnverified) {
		s.metrics.corrupt.Add(1)
		return fmt.Errorf("store: %d bytes at %d of segment %d (file offset %d): checksum %08x, want %08x: %w",
			ref.length, ref.offset, ref.segment, off, sum, ref.checksum, ErrCorrupt)
	}
	return nil
}

// A Want says what a reservation is for. When a store is nearly full the earlier
// ones are refused first, so that a filesystem on a thin device that is full can
// still write its journal and what else it has of its own, delete files and trim.
type Want uint8

const (
	// Growth is for blocks that may not be stored yet.
	Growth Want = iota
	// SmallGrowth is the same for a request of at most SmallBlocks, as journals and
	// inodes are written, and as most data is not.
	SmallGrowth
	// Overwriting is for blocks that are stored: what they take now comes back.
	Overwriting
	// Trimming is for no blocks at all, and only for MakeRoom: what trims change of
	// the map, see Store.Short.
	Trimming

	// SmallBlocks is just less than the 128 KiB into which the kernel's nbd driver
	// cuts large writes.
	SmallBlocks block.Count = 31
)

// Reserve promises space for n blocks of writes in their worst case, in
// segments that have space on the host. It may ask the host for more. If there
// is none, the error wraps ErrNoSpace and nothing is reserved; space that a
// checkpoint would free, or the cleaner, is not waited for: see MakeRoom.
func (s *Store) Reserve(n block.Count, w Want) error {
	_, err := s.reserve(n, w, true)
	return err
}

// TryReserve is Reserve, if that waits for nothing: neither for a checkpoint nor for
// the host. Where it reports false nothing is reserved, and Reserve may say why.
func (s *Store) TryReserve(n block.Count, w Want) bool {
	ok, err := s.reserve(n, w, false)
	return ok && err == nil
}

// reserve is Reserve, or TryReserve without wait.
func (s *Store) reserve(n block.Count, w Want, wait bool) (ok bool, err error) {
	if err := s.writable(); err != nil {
		return false, err
	}
	if mutant.Is(mutant.DropReservation) {
		s.reserved.Add(int64(n))
		return true, nil
	}
	if !wait && s.overlayFull() {
		return false, nil
	}
	if err := s.WaitOverlay(); err != nil {
		return false, err
	}
	s.mu.RLock()
	nodes := s.mu.root.Nodes
	s.mu.RUnlock()
	// One at a time, or what a large request asks for in vain would for that
	// moment refuse a small one.
	s.reserving.Lock()
	s.asking.Add(int64(n)) // before the look at the segments: see chill
	total := s.promised()
	free, warm := s.segments.room()
	want := s.segmentsFor(total, nodes)
	fits := want+s.kept(w) <= uint64(free)
	if !fits {
		s.asking.Add(-int64(n))
	}
	s.reserving.Unlock()
	if !fits {
		return false, fmt.Errorf("store: %d blocks need %d segments, %d are free: %w", total, want, free, ErrNoSpace)
	}
	if want += cleanSegments; want > uint64(warm) {
		if !wait {
			s.asking.Add(-int64(n))
			return false, nil
		}
		if err := s.segments.ensure(s.file, uint32(want)); err != nil {
			s.asking.Add(-int64(n))
			s.givePinsUp() // what they hold has its space on the host
			return false, err
		}
	}
	s.reserved.Add(int64(n))
	s.asking.Add(-int64(n))
	return true, nil
}

// overlayFull tells whether WaitOverlay waits.
func (s *Store) overlayFull() bool { return uint64(s.entries.Load()) > 4*s.opts.CheckpointRecords }

// promised is how many blocks are reserved, or just being reserved, which may fail.
func (s *Store) promised() int64 {
	asking := s.asking.Load() // first: see the end of Reserve
	return asking + s.reserved.Load()
}

// WaitOverlay blocks while the overlays have grown so much that what is to be appended
// must wait for the checkpoint that is running. Reserve does so too.
func (s *Store) WaitOverlay() error {
	if !s.overlayFull() {
		return nil
	}
	s.progress.Lock()
	defer s.progress.Unlock()
	for s.overlayFull() && s.Err() == nil {
		if !s.progress.running {
			// The lengths of the log alone may not ask for one: a record can be
			// many extents.
			s.snapshot.Store(true)
		}
		s.askLocked()
		s.progress.cond.Wait()
	}
	return s.Err()
}

// Release gives back what Reserve promised for n blocks: they have been
// appended, or will not be.
func (s *Store) Release(n block.Count) {
	if left := s.reserved.Add(-int64(n)); left < 0 {
		invariants.Assertf(false, "%d blocks reserved", left)
	}
}

// blockWorst is what one block takes at worst: a record of its own, raw.
const blockWorst = block.Size + recordHeader

// kept is how many segments such a reservation leaves free, beside those of
// segmentsFor.
func (s *Store) kept(w Want) uint64 {
	return s.segments.cleanReserve() + uint64(Overwriting-w)*s.segments.growthReserve()
}

// segmentsFor is how many free segments writes of n blocks need at worst, with what
// is kept from them for commits and checkpoints, but not for the cleaner. nodes is
// the size of the map.
func (s *Store) segmentsFor(n int64, nodes uint64) uint64 {
	need := uint64(n)*blockWorst + uint64(s.cleaner.claimed.Load()) + s.mapWorst(uint64(n), nodes)
	return reserveSegments + (need+s.segments.usable()-1)/s.segments.usable()
}

// mapWorst is the most that two checkpoints may append for n more blocks, and for
// what the cleaner moves: one leaf for each change, though no more than there are
// leaves.
func (s *Store) mapWorst(n, nodes uint64) uint64 {
	_, held := s.opts.Trims()
	return mapBytes(s.changes(cleanChanges)+uint64(held)+n, nodes)
}

// changes is how many extents and nodes of the map the next checkpoints change beside
// trims, of which the cleaner moves that many at least.
func (s *Store) changes(moves int64) uint64 {
	return uint64(s.entries.Load() + max(moves, s.cleaner.moving.Load()+s.cleaner.nodes.Load()))
}

// mapBytes is the most that two checkpoints append of a map of so many nodes.
func mapBytes(changes, nodes uint64) uint64 {
	return 2 * extents.NodeSizeMax * min(2*changes, nodes+changes/128+2)
}

// Short tells whether what does not reserve any room, such as a trim, must wait for
// MakeRoom: since so little is left that what checkpoints append would not fit beside
// what is reserved, or since writes wait there, which need more than that left and
// would wait for ever behind trims that go on. It may ask the host for space.
func (s *Store) Short() bool { return s.cleaner.waiting.Load() > 0 || s.short() }

// short is Short but for writes that wait.
func (s *Store) short() bool {
	need := s.need()
	if _, warm := s.segments.room(); warm >= reserveSegments/2 && need <= s.left() {
		return false
	}
	// A host that is full leaves it short.
	_ = s.segments.allocateUsed(s.file, s.log.successor())
	_ = s.segments.ensure(s.file, uint32(max(need/s.segments.usable()+2, reserveSegments)))
	return need > s.left()
}

// need is how many bytes the checkpoints of all that has changed so far append at
// most, and those that set free what they leave behind, beside what is reserved.
func (s *Store) need() uint64 {
	s.mu.RLock()
	nodes := s.mu.root.Nodes
	s.mu.RUnlock()
	coming, held := s.opts.Trims()
	n := uint64(s.promised())
	return 3*s.fixed() + mapBytes(s.changes(0)+uint64(held+coming)+n, nodes) + n*blockWorst + uint64(s.cleaner.claimed.Load())
}

// fixed is how many bytes a checkpoint appends beside nodes: the segment table, the
// trims, the superblock, and some commits.
func (s *Store) fixed() uint64 {
	s.mu.RLock()
	trims := uint64(s.mu.trims.Len())
	s.mu.RUnlock()
	return uint64(s.segments.used())*(usageEntry+1) + trims*32 + 4*alignment
}

// left is how many bytes the log surely takes with a free segment that has space on the
// host left in the end, beside the one that it goes on in: what an opening needs, should
// the process be killed. Of what is left in the segment that is written no roll takes any.
func (s *Store) left() uint64 {
	s.log.mu.Lock()
	tail, next := s.segments.size-min(s.segments.size, s.log.mu.end), s.log.mu.head.next
	s.log.mu.Unlock()
	waste := uint64(s.segments.size) - s.segments.usable()
	bytes := max(uint64(tail), waste) - waste
	if !s.segments.allocated(next) {
		return bytes
	}
	free, warm := s.segments.room()
	return bytes + uint64(max(min(free, warm), 1)-1)*s.segments.usable()
}

// Scarce reports whether less than an eighth of the capacity is left for new data: what
// they take is then worth more than the time that it takes to make them smaller.
func (s *Store) Scarce() bool {
	free, _ := s.segments.room()
	return uint64(free) < s.kept(Growth)+uint64(s.segments.total.Load()/8)
}

// mayCheckpoint tells whether there is room for one that nobody has to have. For what
// has changed there is: see Short.
func (s *Store) mayCheckpoint() bool {
	_, held := s.opts.Trims()
	return held > 0 || s.entries.Load() > 0 || s.fixed()+uint64(s.promised())*blockWorst <= s.left()
}

// settled tells whether checkpoints and commits would change nothing: what was
// appended is in the map, and what is dead is known to be so.
func (s *Store) settled() bool {
	_, held := s.opts.Trims()
	if held > 0 || s.entries.Load() > 0 || s.reserved.Load() > 0 || s.trimsPending() > 0 || s.cleaner.nodes.Load() > 0 {
		return false
	}
	s.log.mu.Lock()
	serial := s.log.mu.head.serial
	s.log.mu.Unlock()
	s.mu.RLock()
	replay := s.mu.replay
	s.mu.RUnlock()
	return serial == replay && !s.segments.spent(serial)
}

// Settle takes a checkpoint, as Checkpoint does, unless it would change nothing. If
// the log has no room for one that nobody has to have, the error wraps ErrNoSpace.
func (s *Store) Settle() error {
	if err := s.writable(); err != nil {
		return err
	}
	if s.settled() {
		return nil
	}
	if !s.mayCheckpoint() {
		return fmt.Errorf("store: a checkpoint needs %d bytes, there is room for %d: %w", s.fixed(), s.left(), ErrNoSpace)
	}
	return s.Checkpoint()
}

// trimsPending is the number of blocks in pending trims, of which the next
// checkpoint works off some.
func (s *Store) trimsPending() block.Count {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.trims.Blocks()
}
