package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/mutant"
)

// The cleaner empties segments that are partly dead: it copies what is alive to
// the end of the log, and when two checkpoints do not refer to the segment any
// more it is free (rule R4).
//
// What it copies are data records like any other, of the newest contents, so
// replay needs to know nothing of it. That it cannot bring back what was
// overwritten meanwhile (rule R7) rests on one check, made twice: nothing has
// been appended over the blocks since the tree was asked for them. It is made
// with the log's lock held when the copy is appended, so the copy stands in the
// log before all that is newer; and again when the copy has been written, and
// the map is to lead to it: until then readers find the old place, which a View
// holds. No checkpoint begins between the two, or it might count the segment that
// the copy is in as empty; one that ends there ends the attempt.
//
// An extent that is a whole blob is copied as it is. A blob that was overwritten
// in part is decoded, and each run of blocks that is left is encoded anew.

const (
	// cleanBatchBytes is how much the cleaner appends before it waits until that
	// is written. It bounds the time that a stop waits for it.
	cleanBatchBytes = 4 << 20

	// cleanRecords bounds the records of a segment that are looked at in one
	// attempt, and so the memory for them, about 64 bytes each.
	cleanRecords = 128 << 10

	// cleanChanges is how many extents and nodes, at least, the cleaner can move
	// between two checkpoints: so much space for the changes of the map is kept
	// from client writes.
	cleanChanges = 1024

	// cleanGain is the least part of a segment, as a divisor, that cleaning it
	// must give back to be worth it.
	cleanGain = 32
)

// A Recoder decodes and encodes blobs for the cleaner. It is used by one
// goroutine at a time.
type Recoder interface {
	// Decode appends the blocks of the blob at a, whose stored bytes are src, to
	// dst. Both are borrowed.
	Decode(dst, src []byte, a extents.Addr) ([]byte, error)
	// Encode appends the encoding of src, whole blocks, at most 128 KiB, to dst,
	// and says how it was made. ok is false if it is not worth it. Both are
	// borrowed.
	Encode(dst, src []byte, e Effort) (out []byte, codec, level uint8, ok bool)
	// Done tells whether what is stored by this codec and level is as small as
	// Encode with that effort would make it, or smaller.
	Done(codec, level uint8, e Effort) bool
}

// Effort is how much time encoding may take.
type Effort uint8

const (
	Hurried    Effort = iota // writes are waiting
	Relaxed                  // nobody waits
	Packing                  // nobody waits, and nothing has been asked for for long
	PackingRaw               // as Packing, what was left raw: most of it is not worth it
)

// CleanerOptions are the settings of the cleaner.
type CleanerOptions struct {
	// Recoder is needed to clean blobs that were overwritten in part, unless
	// they are raw. Without one they stay where they are.
	Recoder Recoder

	// Recompress has an idle device's data encoded anew where it gets smaller.
	Recompress bool

	// PackAfter is for how long clients must have asked for nothing until data that
	// has been encoded anew is packed: encoded in the largest extents, with the
	// effort Packing, unless it is read at random. 0: it never is.
	PackAfter time.Duration

	// Requests counts what clients have asked for, reads too. While it goes up the
	// work in the background gives way. It is called often, and must not block;
	// nil: nobody asks for anything.
	Requests func() uint64

	// Period is how often the cleaner looks whether there is something to do.
	// 0: it works only when a write needs space (see MakeRoom).
	Period time.Duration
}

// A cleaner is the cleaner of an open store.
type cleaner struct {
	s       *Store
	recoder Recoder       // nil: there is none
	turn    chan struct{} // of capacity 1; holds a token while somebody cleans
	quit    chan struct{}
	stopped sync.Once
	done    sync.WaitGroup

	// claimed are the bytes, and moving the extents, that are about to be
	// appended; nodes the map nodes that the next checkpoint is to move.
	claimed, moving, nodes atomic.Int64

	// copying says that copies have been appended that are not in the map yet: no
	// checkpoint begins meanwhile. Changed with log.mu held.
	copying atomic.Bool

	// The rest belongs to whose turn it is.
	futile  map[uint64]uint64 // by serial of a segment: its live references when cleaning it gained nothing
	records []liveRecord
	pending []copied     // that are not in the map yet
	effort  Effort       // Hurried: writes are waiting
	trims   bool         // trims are waiting, and no writes
	waiting atomic.Int32 // writes that wait for room
	window  []byte
	blocks  []byte // of a decoded blob, or of several
	decoded []byte
	list    []extents.Extent
	vain    []uint64 // vainKey of what has been encoded anew without getting smaller; vainSlots
	encoded []byte
	overlay []extents.Extent // scratch

	// Of the loop alone.
	appended  uint64        // records of clients at the last look
	settled   uint64        // the same at the last checkpoint of an idle device
	quiet     int           // looks since a client has appended something
	requests  func() uint64 // CleanerOptions.Requests, never nil
	requested uint64        // requests at the last look
	asked     time.Time     // when they were last seen to go up

	recompresses bool          // if idle
	packAfter    time.Duration // CleanerOptions.PackAfter
	began        time.Time     // when the loop has begun

	evacuation struct {
		sync.Mutex
		keys     []block.Index
		segments map[uint32]bool
	}
}

// A copied record is a data record that the cleaner has appended.
type copied struct {
	header
	ref blobRef
}

// A liveRecord is a data record of a segment that is being cleaned.
type liveRecord struct {
	r      block.Range
	offset uint32 // of its payload
}

func newCleaner(s *Store) *cleaner {
	c := &cleaner{s: s, turn: make(chan struct{}, 1), quit: make(chan struct{}), futile: make(map[uint64]uint64), settled: math.MaxUint64,
		requests: func() uint64 { return 0 }}
	c.evacuation.segments = make(map[uint32]bool)
	return c
}

// stop ends what the cleaner does after at most one batch, and the loop.
func (c *cleaner) stop() {
	c.stopped.Do(func() { close(c.quit) })
	c.done.Wait()
}

func (c *cleaner) stopping() bool {
	select {
	case <-c.quit:
		return true
	default:
		return c.s.Err() != nil
	}
}

// StartCleaning gives the cleaner its settings and, with a period, starts its work
// in the background. It is called at most once, before the first write; without it
// the cleaner works without a Recoder. From now on somebody commits when the store
// asks for it.
func (s *Store) StartCleaning(o CleanerOptions) {
	c := s.cleaner
	c.recoder = o.Recoder
	c.recompresses = o.Recompress && o.Recoder != nil
	c.packAfter, c.began = o.PackAfter, time.Now()
	if c.recompresses {
		c.vain = make([]uint64, vainSlots)
	}
	s.touched.faded = c.began
	if o.Requests != nil {
		c.requests = o.Requests
	}
	if o.Period > 0 {
		c.done.Go(func() { c.loop(o.Period) })
	}
}

// StopCleaning ends the cleaner's work in the background. It blocks for at most
// one batch, and one checkpoint, for which the caller goes on committing.
func (s *Store) StopCleaning() {
	if s.cleaner != nil {
		s.cleaner.stop()
	}
}

// fits returns nil if a reservation of n blocks would find free segments that have
// space on the host, which it may ask for some, and else why not.
func (s *Store) fits(n block.Count, w Want) error {
	if w == Trimming {
		if s.short() {
			return fmt.Errorf("store: checkpoints of what has changed need %d bytes, there is room for %d: %w", s.need(), s.left(), ErrNoSpace)
		}
		return nil
	}
	s.mu.RLock()
	nodes := s.mu.root.Nodes
	s.mu.RUnlock()
	free, warm := s.segments.room()
	want := s.segmentsFor(s.promised()+int64(n), nodes)
	if want+s.kept(w) > uint64(free) {
		return fmt.Errorf("store: %d blocks and what is reserved need %d segments, %d are free: %w", n, want, free, ErrNoSpace)
	}
	if want += cleanSegments; want > uint64(warm) {
		return s.segments.ensure(s.file, uint32(want))
	}
	return nil
}

// MakeRoom blocks until a reservation of n blocks may succeed: it takes
// checkpoints and cleans segments. The error wraps ErrNoSpace when what is alive
// leaves no room, however it is arranged. The caller, or another goroutine by
// way of NeedCommit, goes on committing.
func (s *Store) MakeRoom(ctx context.Context, n block.Count, w Want) error {
	if err := s.writable(); err != nil {
		return err
	}
	c := s.cleaner
	if w != Trimming {
		c.waiting.Add(1) // trims wait behind it: see Short
		defer c.waiting.Add(-1)
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.turn }()
	s.metrics.shortages.Add(1)
	err := s.makeRoomFor(ctx, n, w)
	if errors.Is(err, ErrNoSpace) {
		// What others held may have come back while the last means was tried.
		return s.fits(n, w)
	}
	return err
}

// makeRoomFor is MakeRoom. REQUIRES: the cleaner's turn.
func (s *Store) makeRoomFor(ctx context.Context, n block.Count, w Want) error {
	c := s.cleaner
	c.trims = w == Trimming
	defer func() { c.trims = false }()
	most := uint32(0)
	for fruitless := 0; fruitless <= fruitlessMax; fruitless++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		short := s.fits(n, w)
		if !errors.Is(short, ErrNoSpace) {
			return short
		}
		if free, warm := s.segments.room(); free+warm > most {
			most, fruitless = free+warm, 0
		}
		pending := s.trimsPending()
		// What is empty with one checkpoint is free with the next, unless a reader
		// holds it (rule R4).
		took := false
		for left := 3; left > 0 && !s.settled() && s.mayCheckpoint(); left-- {
			took = true
			if err := s.Checkpoint(); err != nil {
				return err
			}
			if short = s.fits(n, w); !errors.Is(short, ErrNoSpace) {
				return short
			}
			if s.segments.emptying() == 0 {
				break
			}
		}
		if !took {
			// What it was short of may just have come back.
			if short = s.fits(n, w); !errors.Is(short, ErrNoSpace) {
				return short
			}
			if !s.settled() && s.mayCheckpoint() {
				continue
			}
		}
		if s.segments.pinned() {
			// Readers are at what would be free. Those that take long have to give
			// way, the others are waited for: more checkpoints would only take more
			// of the log.
			s.givePinsUp()
			if err := s.waitUnpinned(ctx); err != nil {
				return err
			}
			continue
		}
		if left := s.trimsPending(); left != pending {
			if left < pending {
				fruitless = 0
			}
			continue
		}
		if !s.canFit(n, w, errors.Is(short, ErrHostFull)) {
			return fmt.Errorf("store: %d blocks do not fit beside what is stored: %w", n, short)
		}
		progress, err := c.clean(true)
		if err != nil {
			return err
		}
		if !progress && s.segments.emptying() == 0 {
			return fmt.Errorf("store: %d blocks do not fit, and there is nothing to clean: %w", n, short)
		}
	}
	return fmt.Errorf("store: cleaning does not make room for %d blocks: %w", n, ErrNoSpace)
}

// Compact cleans until nothing is left that is worth it, takes the checkpoints that
// set the space free, and gives the host what it still holds of free segments. It
// blocks for as long as that takes, while everything else goes on; the caller, or
// another goroutine by way of NeedCommit, commits.
// progress is told now and then how many bytes of the log are dead and how many are
// alive; it may be nil. When ctx ends, what is done stays done.
func (s *Store) Compact(ctx context.Context, progress func(dead, live uint64)) error {
	if err := s.writable(); err != nil {
		return err
	}
	c := s.cleaner
	least, fruitless := uint64(math.MaxUint64), 0
	for {
		if err := s.Checkpoint(); err != nil {
			return err
		}
		s.mu.RLock()
		before := s.mu.replay
		s.mu.RUnlock()
		dead, live := s.segments.garbage(before)
		if progress != nil {
			progress(dead, live)
		}
		// What others overwrite meanwhile is not waited for.
		if dead < least {
			least, fruitless = dead, 0
		} else if fruitless++; fruitless > 8 {
			break
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		select {
		case c.turn <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		cleaned, err := c.clean(true)
		<-c.turn
		if err != nil {
			return err
		}
		if c.stopping() {
			return ErrClosed
		}
		if !cleaned {
			break
		}
	}
	for left := 2; left > 0 && s.segments.emptying() > 0; left-- {
		if err := s.Checkpoint(); err != nil {
			return err
		}
	}
	size, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	return s.segments.sweep(ctx, s.file, size)
}

// waitUnpinned blocks while readers keep empty segments from being free.
func (s *Store) waitUnpinned(ctx context.Context) error {
	ticker := time.NewTicker(10 * time.Millisecond) // a rare case, and unpinning is a frequent one
	defer ticker.Stop()
	for s.segments.pinned() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if err := s.Err(); err != nil {
			return err
		}
	}
	return nil
}

// fruitlessMax is how often MakeRoom goes on, each time with as much cleaning as is
// kept free for it, without having one segment more in the end.
const fruitlessMax = 64

// canFit tells whether a reservation of n blocks would find free segments if what
// is alive were packed: all of it, but for the part of each segment that cleaning
// does not care for. Of a host that is full they are those that have their space.
func (s *Store) canFit(n block.Count, w Want, hostFull bool) bool {
	s.mu.RLock()
	nodes, before := s.mu.root.Nodes, s.mu.replay
	s.mu.RUnlock()
	dead, live := s.segments.garbage(before)
	size := uint64(s.segments.size)
	dead -= min(dead, (dead+live)/cleanGain)
	gain := s.segments.emptying() + dead/size
	if w == Trimming {
		return s.need() <= s.left()+gain*s.segments.usable()
	}
	free, warm := s.segments.room()
	want := s.segmentsFor(s.promised()+int64(n), nodes)
	return want+s.kept(w) <= uint64(free)+gain && (!hostFull || want+cleanSegments <= uint64(warm)+gain)
}

// errNoRoom says that the cleaner's reserve is used up until the next checkpoints.
var errNoRoom = errors.New("no room to clean")

// clean cleans some segments, and reports whether anything was moved, or will be
// by the next checkpoint. With urgent it takes those that have least in them, else
// the one that costs least for what it gains, and just that one. REQUIRES: the turn.
func (c *cleaner) clean(urgent bool) (progress bool, err error) {
	s := c.s
	c.effort = Relaxed
	if urgent {
		c.effort = Hurried
	}
	s.mu.RLock()
	before := s.mu.replay
	s.mu.RUnlock()
	victims := s.segments.victims(before, urgent, func(serial, refs uint64) bool {
		was, ok := c.futile[serial]
		return ok && was == refs
	})
	const most = 16 // as many as a checkpoint is worth
	for i, v := range victims {
		if c.stopping() || i == most {
			break
		}
		moved, err := c.evacuate(v)
		progress = progress || moved
		switch {
		case errors.Is(err, errNoRoom):
			return progress, nil
		case err != nil:
			return progress, err
		case moved && !urgent:
			return true, nil
		}
	}
	return progress, s.Err()
}

// evacuate copies what is alive in a segment to the end of the log, and has the
// next checkpoint move the nodes of the map. It reports whether that is anything.
// A segment that is not worth it, or from which not all can be moved, is not
// looked at again until less is alive in it.
func (c *cleaner) evacuate(v victim) (moved bool, err error) {
	s := c.s
	view := s.View()
	defer s.Unview(view)
	s.mu.RLock()
	root, stale := s.mu.root, s.mu.sequence != view.version
	s.mu.RUnlock()
	if stale {
		return true, nil // a checkpoint has ended meanwhile: once more
	}
	live, nodes, err := c.survey(v, root, view.version)
	if err != nil {
		s.opts.Warn("a segment cannot be cleaned", err)
		c.giveUp(v)
		return false, nil
	}
	bytes := uint64(len(nodes)) * extents.NodeSizeMax
	for _, e := range live {
		bytes += recordHeader + uint64(e.LiveBytes())
	}
	if len(live)+len(nodes) == 0 || !s.segments.gains(bytes) {
		c.giveUp(v)
		return false, nil
	}
	if len(nodes) > 0 {
		moved = c.evacuateNodes(v.number, nodes)
	}
	copied, all, err := c.move(v.number, live, view.version)
	moved = moved || copied
	s.mu.RLock()
	stale = s.mu.sequence != view.version
	s.mu.RUnlock()
	switch {
	case stale && err == nil:
		return true, nil // a checkpoint has ended the attempt
	case moved || err == nil:
		// Until the next checkpoint nothing changes here; and if nothing does then,
		// what is left cannot be moved.
		c.giveUp(v)
	}
	if all {
		s.metrics.cleaned.Add(1)
	}
	return moved, err
}

// giveUp has v left alone until less is alive in it.
func (c *cleaner) giveUp(v victim) {
	if len(c.futile) >= cleanRecords {
		clear(c.futile)
	}
	c.futile[v.serial] = v.refs
}

// survey returns the extents of the tree that lie in the segment and that nothing
// newer hides, in the order of their places there, and the first blocks of the
// map nodes in it, ascending.
func (c *cleaner) survey(v victim, root extents.Root, sequence uint64) (live []extents.Extent, nodes []block.Index, err error) {
	s := c.s
	c.records = c.records[:0]
	w := &recordWindow{file: s.file, number: v.number, base: s.segments.base(v.number), seed: v.seed, limit: s.segments.size, buf: c.window, start: segmentData}
	for off, unread := uint32(segmentData), 0; off < w.limit; {
		if len(c.records) == cleanRecords {
			if live, err = c.resolve(v, root, sequence, live); err != nil {
				return nil, nil, err
			}
			if len(live) > 0 {
				break // the rest is for the next time
			}
		}
		h, _, at, err := w.next(off)
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			if unread++; unread > 64 {
				return nil, nil, err
			}
		}
		if err != nil {
			// The end, unless it is damage: then there is more behind the next
			// border at which a commit has ended.
			off = (at + alignment) &^ (alignment - 1)
			continue
		}
		off = h.end(at)
		switch h.kind {
		case recordData:
			c.records = append(c.records, liveRecord{block.Span(h.start, h.count), at + recordHeader})
		case recordNode:
			head, err := w.bytes(at+recordHeader, h.length)
			if err != nil {
				continue
			}
			level, first, ok := extents.NodeKey(head)
			if !ok || len(nodes) == cleanChanges {
				continue
			}
			p, ok, err := s.tree.Locate(root, level, first)
			if err != nil {
				return nil, nil, err
			}
			if ok && slices.ContainsFunc(p.Places[:p.Copies], func(x extents.Place) bool {
				return x.Segment == v.number && x.Offset == at+recordHeader
			}) {
				nodes = append(nodes, first)
			}
		}
	}
	c.window = w.buf
	if live, err = c.resolve(v, root, sequence, live); err != nil {
		return nil, nil, err
	}
	slices.SortFunc(live, func(a, b extents.Extent) int {
		return cmp.Or(cmp.Compare(a.Addr.Offset, b.Addr.Offset), cmp.Compare(a.Start, b.Start))
	})
	slices.Sort(nodes)
	return live, slices.Compact(nodes), nil
}

// resolve appends the extents of the tree that lie in the records that survey has
// found so far, and that nothing newer hides, to live. The records are forgotten.
func (c *cleaner) resolve(v victim, root extents.Root, sequence uint64, live []extents.Extent) ([]extents.Extent, error) {
	s := c.s
	// Leaves of the map are looked at in their order.
	slices.SortFunc(c.records, func(a, b liveRecord) int {
		return cmp.Or(cmp.Compare(a.r.Start, b.r.Start), cmp.Compare(a.offset, b.offset))
	})
	for _, rec := range c.records {
		visible, ok := c.visible(rec.r, sequence)
		if !ok {
			break
		}
		for _, part := range visible {
			err := s.tree.Lookup(root, part.Range(), func(e extents.Extent) error {
				if e.Kind == extents.Data && e.Addr.Segment == v.number && e.Addr.Offset == rec.offset {
					live = append(live, e)
				}
				return nil
			})
			if err != nil {
				return nil, err
			}
		}
	}
	c.records = c.records[:0]
	return live, nil
}

// visible returns the parts of r, as extents of kind inTree, of which only the
// tree of that checkpoint knows. ok is false if there is a newer one. The result
// stands until the next call.
func (c *cleaner) visible(r block.Range, sequence uint64) (parts []extents.Extent, ok bool) {
	s := c.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mu.sequence != sequence {
		return nil, false
	}
	c.overlay = s.lookupOverlaysLocked(r, c.overlay[:0])
	return slices.DeleteFunc(c.overlay, func(e extents.Extent) bool { return e.Kind != inTree }), true
}

// untouchedLocked tells whether only the tree of that checkpoint, which is the
// newest, knows of r. REQUIRES: s.mu held.
func (s *Store) untouchedLocked(r block.Range, sequence uint64) bool {
	return s.mu.sequence == sequence && !s.mu.open.Overlaps(r) && (s.mu.merging == nil || !s.mu.merging.Overlaps(r)) && !s.mu.trims.Overlaps(r)
}

// evacuateNodes has the next checkpoint move the nodes of a segment whose ranges
// begin with keys.
func (c *cleaner) evacuateNodes(number uint32, keys []block.Index) bool {
	if !c.claim(0, int64(len(keys))) {
		return false
	}
	c.moving.Add(-int64(len(keys)))
	ev := &c.evacuation
	ev.Lock()
	defer ev.Unlock()
	was := len(ev.keys)
	ev.keys = append(ev.keys, keys...)
	slices.Sort(ev.keys)
	ev.keys = slices.Compact(ev.keys)
	ev.segments[number] = true
	c.nodes.Add(int64(len(ev.keys) - was))
	return len(ev.keys) > was
}

// takeEvacuation returns the nodes that a checkpoint is to move.
func (c *cleaner) takeEvacuation() extents.Evacuation {
	ev := &c.evacuation
	ev.Lock()
	defer ev.Unlock()
	segments := ev.segments
	e := extents.Evacuation{Keys: ev.keys, From: func(n uint32) bool { return segments[n] }}
	ev.keys, ev.segments = nil, make(map[uint32]bool)
	return e
}

// claim sets space for bytes of records, and for the changes of the map by so many
// extents, aside. It is given back by unclaim.
func (c *cleaner) claim(bytes, changes int64) bool {
	s := c.s
	s.mu.RLock()
	nodes := s.mu.root.Nodes
	s.mu.RUnlock()
	s.reserving.Lock()
	c.claimed.Add(bytes)
	c.moving.Add(changes)
	free, warm := s.segments.room()
	// What is kept from clients for the cleaner is there for this.
	want := s.segmentsFor(s.promised(), nodes)
	fits := want <= uint64(free)
	if fits && want > uint64(warm) {
		fits = s.segments.ensure(s.file, uint32(want)) == nil
	}
	s.reserving.Unlock()
	// Room by the byte is for trims alone: a write that waits needs whole segments.
	if !fits && c.trims {
		fits = s.need() <= s.left()
	}
	if !fits {
		c.unclaim(bytes, changes)
	}
	return fits
}

func (c *cleaner) unclaim(bytes, changes int64) {
	c.claimed.Add(-bytes)
	c.moving.Add(-changes)
}

// move copies live, extents of one segment in the order of their places. It
// reports whether it has copied any, and whether all of them. An error that wraps
// errNoRoom says that there was no room for the rest.
func (c *cleaner) move(number uint32, live []extents.Extent, sequence uint64) (copied, all bool, err error) {
	s := c.s
	all = true
	for len(live) > 0 {
		if c.stopping() {
			return copied, false, s.Err()
		}
		n, bytes, blocks := c.claimBatch(live)
		if n == 0 {
			return copied, false, errNoRoom
		}
		moved, err := c.moveBatch(number, live[:n], sequence)
		c.unclaim(bytes, int64(n))
		if err != nil {
			return copied, false, err
		}
		copied = copied || moved > 0
		all = all && moved == blocks
		live = live[n:]
	}
	return copied, all, nil
}

// claimBatch claims what copying the first n of live takes at worst, as many as
// make a batch or as there is room for, and returns that and their blocks.
func (c *cleaner) claimBatch(live []extents.Extent) (n int, bytes int64, blocks block.Count) {
	for most := min(len(live), cleanChanges); most > 0; most = n / 2 {
		n, bytes, blocks = 0, 0, 0
		for n < most && (n == 0 || bytes < cleanBatchBytes) {
			e := live[n]
			if whole(e) {
				bytes += recordHeader + int64(e.Addr.Length)
			} else {
				bytes += recordHeader + int64(e.Count.Bytes())
			}
			blocks += e.Count
			n++
		}
		if c.claim(bytes, int64(n)) {
			return n, bytes, blocks
		}
	}
	return 0, 0, 0
}

// whole tells whether e is all of its blob.
func whole(e extents.Extent) bool { return e.Skip == 0 && e.Count == block.Count(e.Addr.Blocks) }

// moveBatch copies extents of one segment and, when the copies are written, has
// the map lead to them. It returns the number of those blocks.
func (c *cleaner) moveBatch(number uint32, live []extents.Extent, sequence uint64) (moved block.Count, err error) {
	s := c.s
	last := live[len(live)-1].Addr
	w := &recordWindow{file: s.file, number: number, base: s.segments.base(number), limit: last.Offset + last.Length, buf: c.window, start: live[0].Addr.Offset}
	seed := s.segments.seed(number)
	for i := 0; i < len(live); {
		a, k := live[i].Addr, i+1
		for k < len(live) && live[k].Addr == a {
			k++
		}
		stored, err := w.bytes(a.Offset, a.Length)
		if err == nil && (uint32(len(stored)) != a.Length || crc32.Update(seed, castagnoli, stored) != a.Checksum) {
			err = fmt.Errorf("store: %d bytes at %d of segment %d do not verify: %w", a.Length, a.Offset, number, ErrCorrupt)
		}
		if err == nil {
			err = c.copyBlob(live[i:k], stored, sequence)
		}
		if s.Err() != nil {
			return 0, s.Err()
		}
		if err != nil {
			// It stays where it is, for whoever may still read it.
			s.opts.Warn(fmt.Sprintf("blocks from %d on cannot be moved", live[i].Start), err)
		}
		i = k
	}
	c.window = w.buf
	return c.enter(sequence)
}

// copyBlob appends the extents, all of one blob with these stored bytes.
func (c *cleaner) copyBlob(live []extents.Extent, stored []byte, sequence uint64) (err error) {
	a := live[0].Addr
	if whole(live[0]) {
		return c.copy(live[0].Range(), a.Codec, a.Level, stored, sequence)
	}
	blocks, recode := stored, c.recoder
	if a.Codec != 0 {
		if recode == nil {
			return nil
		}
		if c.blocks, err = recode.Decode(c.blocks[:0], stored, a); err != nil {
			return err
		}
		blocks = c.blocks
	}
	for _, e := range live {
		if err := c.encodeCopy(e.Range(), blocks[int(e.Skip)*block.Size:][:e.Count.Bytes()], c.effort, sequence); err != nil {
			return err
		}
	}
	return nil
}

// encodeCopy encodes part, the blocks of r, if there is a recoder, and appends a copy of
// them as copy does.
func (c *cleaner) encodeCopy(r block.Range, part []byte, e Effort, sequence uint64) error {
	codec, level := uint8(0), uint8(0)
	if c.recoder != nil {
		out, k, l, ok := c.recoder.Encode(c.encoded[:0], part, e)
		c.encoded = out[:0]
		if ok {
			part, codec, level = out, k, l
		}
	}
	return c.copy(r, codec, level, part, sequence)
}

// copy appends a copy of the blocks r, unless something newer has been appended
// for any of them.
func (c *cleaner) copy(r block.Range, codec, level uint8, stored []byte, sequence uint64) error {
	return c.copyRecord(header{kind: recordData, codec: codec, level: level, start: r.Start, count: r.Len(), present: ^uint32(0) >> (32 - r.Len())}, stored, sequence)
}

// copyRecord appends a data record that says nothing new, unless something newer has
// been appended for any of its blocks.
func (c *cleaner) copyRecord(h header, stored []byte, sequence uint64) error {
	s := c.s
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.mu.RLock()
	ok := s.untouchedLocked(block.Span(h.start, h.count), sequence)
	s.mu.RUnlock()
	if !ok && !mutant.Is(mutant.CopyOverNewer) {
		s.touched.note(block.Span(h.start, h.count)) // for recompression
		return nil
	}
	if h.codec == 0 {
		// Raw blocks can be cut anywhere, so they fill a segment to its end.
		if n := int(s.log.tailLocked() / block.Size); n > 0 && n < bits.OnesCount32(h.present) {
			b := extents.Blob{Start: h.start, Count: uint8(h.count), Present: h.present, Parts: [][]byte{stored}}
			head, tail := cutRaw(b, n)
			cut := h
			cut.start, cut.count, cut.present = head.Start, block.Count(head.Count), head.Present
			if err := c.appendLocked(cut, stored[:n*block.Size]); err != nil {
				return err
			}
			h.start, h.count, h.present = tail.Start, block.Count(tail.Count), tail.Present
			stored = stored[n*block.Size:]
		}
	}
	return c.appendLocked(h, stored)
}

// appendLocked appends one data record. REQUIRES: s.log.mu held.
func (c *cleaner) appendLocked(h header, stored []byte) error {
	c.copying.Store(true)
	ref, err := c.s.log.appendLocked(h, stored)
	if err == nil {
		c.pending = append(c.pending, copied{h, ref})
	}
	return err
}

// enter waits until the copies are written and has the map lead to those whose
// blocks nothing newer has been appended for. It returns how many blocks that are.
func (c *cleaner) enter(sequence uint64) (entered block.Count, err error) {
	s, l := c.s, c.s.log
	l.mu.Lock()
	if !c.copying.Load() {
		l.mu.Unlock()
		return 0, nil
	}
	l.padLocked()
	queued := l.mu.queued
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		c.copying.Store(false)
		l.mu.Unlock()
		s.progress.Lock()
		s.progress.cond.Broadcast()
		s.progress.Unlock()
	}()
	if err := l.waitWritten(queued); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range c.pending {
		if s.untouchedLocked(block.Span(x.start, x.count), sequence) || mutant.Is(mutant.MapOverNewer) {
			insertBlob(s.mu.open, extents.Data, x.header, x.ref)
			entered += x.count
			s.metrics.movedBytes.Add(uint64(x.ref.length))
		} else {
			s.touched.note(block.Span(x.start, x.count)) // for recompression
		}
	}
	c.pending = c.pending[:0]
	s.entries.Store(s.overlayLenLocked())
	return entered, nil
}

// The loop.

const (
	// quietLooks is after how many looks with nothing appended by clients the
	// device is taken to be idle.
	quietLooks = 3

	// inUseFor is for how long a device is taken to be in use after a request: its
	// clients have hardly left for good.
	inUseFor = time.Second

	// What comes after a piece of work is a pause of so many times as long: on an
	// idle device half of the time is worked; in the way of clients a fifth, for
	// space that they may need soon; and for recompression, which nobody waits for,
	// so little that it meets fewer than one request in twenty. Those it meets wait
	// for a processor: its slice is some milliseconds, more than a read takes.
	pauseIdle       = 1
	pauseInUse      = 4
	pauseRecompress = 31
)

func (c *cleaner) loop(period time.Duration) {
	timer := time.NewTimer(period)
	defer timer.Stop()
	for {
		select {
		case <-c.quit:
			return
		case <-timer.C:
		}
		select {
		case c.turn <- struct{}{}:
			began := time.Now()
			worked, pause := c.work()
			<-c.turn
			wait := period
			if worked {
				wait = pause * time.Since(began)
			}
			timer.Reset(min(wait, 10*period))
		default:
			timer.Reset(period) // a writer is at it
		}
	}
}

// appended counts the records of clients.
func (s *Store) appended() uint64 { return s.metrics.dataRecords.Load() + s.metrics.holes.Load() }

// unused is for how long clients have asked for nothing, as far as was looked.
func (c *cleaner) unused() time.Duration {
	if n := c.requests(); n != c.requested {
		c.requested, c.asked = n, time.Now()
	}
	return time.Since(c.asked)
}

// inUse tells whether clients have asked for anything lately.
func (c *cleaner) inUse() bool { return c.unused() < inUseFor }

// packs tells whether it is time to pack.
func (c *cleaner) packs() bool {
	return c.packAfter > 0 && min(c.unused(), time.Since(c.began)) >= c.packAfter
}

// work does a piece of the background work. It reports whether there was any, and
// how many times as long as it has taken is to pass until the next. REQUIRES: the turn.
func (c *cleaner) work() (worked bool, pause time.Duration) {
	s := c.s
	if n := s.appended(); n != c.appended {
		c.appended, c.quiet = n, 0
	} else {
		c.quiet++
	}
	s.touched.fade()
	busy, used := c.quiet < quietLooks, c.inUse()
	pause = pauseIdle
	if busy || used {
		pause = pauseInUse
	}
	// What is moved while a commit is pinned takes its space twice.
	if c.stopping() || s.segments.holding() {
		return false, pause
	}
	s.mu.RLock()
	before, nodes := s.mu.replay, s.mu.root.Nodes
	s.mu.RUnlock()
	free, _ := s.segments.room()
	low := uint64(free) < s.segmentsFor(s.promised(), nodes)+s.kept(Growth)+max(4, uint64(s.segments.total.Load())/64)
	// What clients have trimmed and overwritten counts as alive until it is worked off:
	// much of what would be cleaned now is going to be empty.
	fresh := s.trimsPending() > 0 || c.settled != c.appended && s.entries.Load() > 0
	if fresh && !busy && !low && s.mayCheckpoint() {
		c.settled = c.appended
		return s.Checkpoint() == nil, pause
	}
	garbage, live := s.segments.garbage(before)
	// Idle: a sixteenth of what is alive. While clients write, what dies by itself
	// is not worth copying.
	allowed := live/16 + 4*uint64(s.segments.size)
	if busy && !low {
		allowed = live/4 + 8*uint64(s.segments.size)
	}
	if garbage > allowed || low {
		progress, err := c.clean(low)
		if err != nil {
			return false, pause // the store has failed, and said so
		}
		if progress {
			// Nobody else may commit, and the log is not to grow without end.
			if s.checkpointDue() {
				return s.Checkpoint() == nil, pause
			}
			return true, pause
		}
	}
	if busy {
		return false, pause
	}
	// Recompression wants all of the map in the tree, and has room for itself.
	if c.recompresses && !low && c.settled == c.appended {
		worked, err := c.recompress()
		if err != nil {
			return false, pause
		}
		if worked {
			if used { // not if the first request has just ended it
				pause = pauseRecompress
			}
			return !s.checkpointDue() || s.Checkpoint() == nil, pause
		}
	}
	// An idle device works off what the next checkpoints free.
	c.settled = c.appended
	if (s.entries.Load() > 0 || s.trimsPending() > 0 || c.nodes.Load() > 0 || s.segments.emptying() > 0) && s.mayCheckpoint() {
		return s.Checkpoint() == nil, pause
	}
	// What the last checkpoint kept warm for work that has ended since.
	if _, warm := s.segments.room(); warm > s.keepWarm(nodes) {
		s.chill()
	}
	return false, pause
}
