package store

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/google/uuid"

	"cnbd/extents"
	"cnbd/internal/disk"
	"cnbd/internal/mutant"
)

// Format makes an empty store in f, which has nothing in it that matters. A new
// UUID is drawn if g has none. The superblocks are written last, after a sync,
// and synced.
func Format(f disk.File, g Geometry) error {
	if g.UUID == (uuid.UUID{}) {
		id, err := uuid.NewRandom()
		if err != nil {
			return fmt.Errorf("store: draw a UUID: %w", err)
		}
		g.UUID = id
	}
	if err := g.Validate(); err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := f.Truncate(segmentsOffset); err != nil {
		return fmt.Errorf("store: set the size: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("store: sync: %w", err)
	}
	for sequence := range uint64(2) {
		sb := &superblock{Geometry: g, sequence: sequence}
		if _, err := f.WriteAt(sb.encode(), int64(sequence)*superblockStride); err != nil {
			return fmt.Errorf("store: write superblock: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("store: sync: %w", err)
	}
	return nil
}

// Close stops the store without a commit or a checkpoint, and closes the file.
// What was not synced is lost, as in a power cut. The caller has ended all
// Views and calls to the store. The orderly way is Checkpoint and TrimHost before.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.mu.closed {
		s.mu.Unlock()
		return ErrClosed
	}
	s.mu.closed = true
	s.mu.Unlock()
	s.StopScrub()
	if s.log != nil {
		// A checkpoint, and who asks for one, waits for a commit that will not come.
		closed := fmt.Errorf("%w", ErrClosed)
		s.failure.CompareAndSwap(nil, &closed)
		s.progress.Lock()
		s.progress.cond.Broadcast()
		s.progress.Unlock()
		s.cleaner.stop()
		s.checkpoints.Wait()
		s.log.stop()
	}
	return s.file.Close()
}

// TrimHost gives what the store has allocated ahead, and does not use, back to
// the host. Nothing may be appended any more. It is for a clean stop, after
// Checkpoint.
func (s *Store) TrimHost() error {
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.segments.chill(s.file, func() uint32 { return 0 }); err != nil {
		return err
	}
	l := s.log
	l.mu.Lock()
	defer l.mu.Unlock()
	l.padLocked()
	if err := l.waitWritten(l.mu.queued); err != nil {
		return err
	}
	l.settle()
	// The rest of the segment being written, and its successor, are not written
	// by this life any more; the next one begins with the successor.
	if rest := int64(s.segments.size) - int64(l.mu.end); rest > 0 {
		if err := s.file.Punch(s.segments.base(l.mu.head.number)+int64(l.mu.end), rest); err != nil {
			return fmt.Errorf("store: punch: %w", err)
		}
	}
	if err := s.file.Punch(s.segments.base(l.mu.head.next), int64(s.segments.size)); err != nil {
		return fmt.Errorf("store: punch: %w", err)
	}
	return nil
}

// Open opens the store in f and recovers it: it reads the newest checkpoint,
// replays the log behind it, and begins a new life of the log. The store then
// holds the state of the last commit that is on the medium, and all of that is
// durable. On an error f is closed. f must be locked against other openers.
func Open(f disk.File, opts Options) (*Store, error) {
	opts.setDefaults()
	s := &Store{opts: opts, file: f}
	if err := s.open(); err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) open() error {
	// Rule R5: what a client could read before a crash may be in the host's page
	// cache only, and what is in the cache may never have reached the medium.
	if !s.opts.ReadOnly && !mutant.Is(mutant.OpenWithoutSync) {
		if err := s.file.Sync(); err != nil {
			return fmt.Errorf("store: sync before recovery: %w", err)
		}
	}
	if !mutant.Is(mutant.OpenFromCache) {
		if err := s.file.DropCache(); err != nil {
			return fmt.Errorf("store: drop cached pages before recovery: %w", err)
		}
	}
	sb, other, err := readSuperblocks(s.file, s.opts.Warn)
	if err != nil {
		return err
	}
	newest := sb
	s.reset(sb.Geometry)
	durable := sb.epoch // the newest one, whether its checkpoint can be used or not
	if err := s.loadCheckpoint(sb); err != nil {
		if other == nil {
			return err
		}
		// The older checkpoint and the log behind it are whole as well (rule R4).
		s.opts.Warn("the newest checkpoint is damaged, the one before is used", err)
		sb = other
		s.reset(sb.Geometry)
		if err := s.loadCheckpoint(sb); err != nil {
			return err
		}
	}
	if other != nil {
		durable = max(durable, other.epoch)
	}
	end, err := s.replay(sb, durable)
	if err != nil {
		return err
	}
	s.progress.durable = s.recovery.Epoch
	s.progress.sequence = sb.sequence
	if s.opts.ReadOnly {
		return nil
	}
	if err := s.beginLife(end); err != nil {
		return err
	}
	if other != nil && newest.Geometry != other.Geometry {
		// A resize was interrupted: what is served must fit both slots. If this fails
		// the store has failed, and can be read.
		_ = s.checkpointAlone()
	}
	return nil
}

// reset empties s for a store of that geometry.
func (s *Store) reset(g Geometry) {
	s.geometry, s.mu.target = g, g
	s.segments = newSegments(&s.geometry)
	s.segments.marks = s.file.AllocatesUnwritten()
	s.nodes = &nodeStore{s: s}
	s.tree = extents.NewTree(s.nodes, extents.TreeOptions{CacheBytes: s.opts.MapCacheBytes})
	s.mu.open = extents.NewOverlay()
	s.progress.cond = sync.NewCond(&s.progress.Mutex)
}

// readSuperblocks gives the newest good checkpoint, and the other one if it is good.
func readSuperblocks(f disk.File, warn func(string, error)) (newest, other *superblock, err error) {
	var slots [2]*superblock
	var errs [2]error
	for i := range slots {
		b := make([]byte, superblockSize)
		if _, err := f.ReadAt(b, int64(i)*superblockStride); err != nil && !errors.Is(err, io.EOF) {
			errs[i] = fmt.Errorf("store: read superblock %d: %w", i, err)
			continue
		}
		slots[i], errs[i] = decodeSuperblock(b)
		if errs[i] == nil && slots[i].sequence%2 != uint64(i) {
			slots[i], errs[i] = nil, fmt.Errorf("superblock %d lies in slot %d: %w", slots[i].sequence, i, ErrCorrupt)
		}
	}
	for i := range slots {
		if errors.Is(errs[i], ErrVersion) {
			return nil, nil, fmt.Errorf("store: %w", errs[i])
		}
	}
	switch {
	case slots[0] == nil && slots[1] == nil:
		// A damaged superblock is damage also where the other has lost its magic.
		for _, err := range errs {
			if !errors.Is(err, ErrNotStore) {
				return nil, nil, fmt.Errorf("store: no superblock can be read: %w", err)
			}
		}
		return nil, nil, fmt.Errorf("store: %w", ErrNotStore)
	case slots[0] != nil && slots[1] != nil:
		if slots[0].UUID != slots[1].UUID {
			return nil, nil, fmt.Errorf("store: superblocks of two stores: %w", ErrCorrupt)
		}
		if slots[0].sequence > slots[1].sequence {
			return slots[0], slots[1], nil
		}
		return slots[1], slots[0], nil
	}
	for i := range slots {
		if slots[i] == nil {
			warn(fmt.Sprintf("superblock %d is damaged, the other one is used", i), errs[i])
		}
	}
	if slots[0] != nil {
		return slots[0], nil, nil
	}
	return slots[1], nil, nil
}

// loadCheckpoint reads what sb leads to: the segment table and the pending trims.
func (s *Store) loadCheckpoint(sb *superblock) error {
	t := s.segments
	entries := uint64(0)
	seen := make(map[blobRef]bool)
	seed := sb.seeds[0]
	for ref := sb.usage; ref.length != 0; {
		if seen[ref] || ref.length > usageHead+usageBatch*usageEntry {
			return fmt.Errorf("store: segment table: %w", ErrCorrupt)
		}
		seen[ref] = true
		b, err := s.readOwn(ref, seed)
		if err != nil {
			return fmt.Errorf("store: segment table: %w", err)
		}
		ref, err = decodeUsage(b, func(n uint32, g segment) error {
			if total := t.total.Load(); n >= total {
				return fmt.Errorf("segment table: segment %d of %d: %w", n, total, ErrCorrupt)
			}
			t.useLocked(n)
			t.table[n] = g
			entries++
			return nil
		})
		if err != nil {
			return fmt.Errorf("store: %w", err)
		}
	}
	if entries != sb.segments {
		return fmt.Errorf("store: segment table of %d entries, want %d: %w", entries, sb.segments, ErrCorrupt)
	}
	s.mu.trims = extents.NewRangeSet()
	if sb.trims.length != 0 {
		if uint64(sb.trims.length) > uint64(t.size) {
			return fmt.Errorf("store: pending trims: %w", ErrCorrupt)
		}
		b, err := s.readOwn(sb.trims, sb.seeds[1])
		if err != nil {
			return fmt.Errorf("store: pending trims: %w", err)
		}
		if s.mu.trims, err = extents.DecodeRangeSet(b); err != nil {
			return fmt.Errorf("store: pending trims: %w", err)
		}
	}
	s.mu.root, s.mu.sequence, s.mu.nodes = sb.root, sb.sequence, sb.nodes
	s.mu.replay = sb.replay.serial
	s.touched = newTouched(s.geometry.Blocks(), sb)
	// What the two newest checkpoints do not need is free (rule R4); the log
	// behind them takes back what it has been given since.
	t.release(sb.sequence)
	return nil
}

// readOwn reads a record of the store's own. Its segment need not be in the
// table yet, so its header tells who it is, and seed, if it is not 0, when that is
// lost.
func (s *Store) readOwn(ref blobRef, seed uint32) ([]byte, error) {
	if ref.segment >= s.segments.total.Load() || uint64(ref.offset)+uint64(ref.length) > uint64(s.segments.size) {
		return nil, fmt.Errorf("record at %d of segment %d: %w", ref.offset, ref.segment, ErrCorrupt)
	}
	h, ok, err := s.readSegmentHead(ref.segment)
	switch {
	case ok:
		seed = identitySeed(s.geometry.UUID, h.number, h.life, h.serial)
	case seed != 0:
	case err != nil:
		return nil, err
	default:
		return nil, fmt.Errorf("header of segment %d: %w", ref.segment, ErrCorrupt)
	}
	b := make([]byte, ref.length)
	return b, s.readSeeded(b, ref, seed)
}

// readSegmentHead reads the header of segment n, from its second copy if need be.
func (s *Store) readSegmentHead(n uint32) (h segmentHead, ok bool, err error) {
	var b [segmentHeader]byte
	for i := range int64(2) {
		k, rerr := s.file.ReadAt(b[:], s.segments.base(n)+i*segmentHeader)
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			err = fmt.Errorf("store: read header of segment %d: %w", n, rerr)
			continue
		}
		clear(b[k:])
		if h, ok = decodeSegmentHead(b[:], s.geometry.UUID, n); ok {
			return h, true, nil
		}
	}
	return h, false, err
}

// beginLife begins to append behind the end that recovery accepted, in a segment
// of its own whose header names that end, and makes that durable before anything
// is served (rule R2).
func (s *Store) beginLife(end logEnd) error {
	var life [8]byte
	if _, err := rand.Read(life[:]); err != nil {
		return fmt.Errorf("store: draw a life id: %w", err)
	}
	s.entries.Store(s.overlayLenLocked()) // what replay has entered, and nobody else can yet
	s.cleaner = newCleaner(s)
	s.segments.use(end.head.next)
	if err := s.segments.allocate(s.file, end.head.next); err != nil {
		return err
	}
	// Room for commits, checkpoints and trims, which do not reserve (promise P4): all
	// of reserveSegments, and the next segment, which nothing counts.
	if err := s.ensureFirst(uint32(s.need()/s.segments.usable()) + reserveSegments + 1); err != nil {
		s.opts.Warn("the space kept for commits is not there; writes will be refused", err)
	}
	next, ok := s.segments.take()
	if !ok {
		return fmt.Errorf("store: no free segment to go on in: %w", ErrNoSpace)
	}
	if err := s.segments.allocate(s.file, next); err != nil {
		return err
	}
	l := &log{file: s.file, segments: s.segments, store: &s.geometry, life: binary.LittleEndian.Uint64(life[:]), fail: s.fail, zeroCommits: s.opts.ZeroCommits}
	head := segmentHead{
		number: end.head.next, life: l.life, serial: end.serials + 1, next: next,
		prev: end.head.number, pserial: end.head.serial, plife: end.head.life, pend: end.offset, durable: s.recovery.Epoch,
	}
	s.segments.identify(head.number, head.serial, identitySeed(s.geometry.UUID, head.number, head.life, head.serial))
	var b [segmentData]byte
	head.encode(b[:segmentHeader], &s.geometry)
	head.encode(b[segmentHeader:], &s.geometry)
	if _, err := s.file.WriteAt(b[:], s.segments.base(head.number)); err != nil {
		return fmt.Errorf("store: write header of segment %d: %w", head.number, err)
	}
	if !mutant.Is(mutant.OpenWithoutSync) {
		if err := s.file.Sync(); err != nil {
			return fmt.Errorf("store: sync: %w", err)
		}
	}
	s.log = l
	l.mu.since, l.mu.records, l.mu.snapshot = end.bytes, s.recovery.Records, end.replay
	l.start(head, end.epochs+1, s.recovery.Epoch)
	s.makeRoom()
	return nil
}

// ensureFirst is segments.ensure at the start. When the host is full, what a process
// that was killed had allocated is looked for.
func (s *Store) ensureFirst(want uint32) error {
	err := s.segments.ensure(s.file, want)
	if !errors.Is(err, ErrHostFull) {
		return err
	}
	size, serr := s.file.Size()
	if serr != nil {
		return fmt.Errorf("store: %w", serr)
	}
	if s.segments.find(s.file, want, size) {
		return nil
	}
	return err
}

// makeRoom takes checkpoints while room is short, before anything is served: each
// opening takes a segment, and lives that are too short for a checkpoint would in
// the end leave none to open with. If it fails the store has failed, and can be
// read.
func (s *Store) makeRoom() {
	for range 2 { // rule R4
		if free, _ := s.segments.room(); free >= reserveSegments || s.checkpointAlone() != nil {
			return
		}
	}
}

// checkpointAlone takes a checkpoint, with the commits that it needs, while nobody
// else uses the store.
func (s *Store) checkpointAlone() error {
	need := s.opts.NeedCommit
	defer func() { s.setNeedCommit(need) }()
	want := make(chan struct{}, 1)
	s.setNeedCommit(func() {
		select {
		case want <- struct{}{}:
		default:
		}
	})
	done := make(chan error, 1)
	go func() { done <- s.Checkpoint() }()
	for {
		select {
		case err := <-done:
			return err
		case <-want:
			if c, ok, err := s.AppendCommit(); err == nil && ok {
				_ = s.Sync(c) // a failure ends the checkpoint too
			}
		}
	}
}

// setNeedCommit replaces the option, which is called with the mutex held.
func (s *Store) setNeedCommit(f func()) {
	s.progress.Lock()
	s.opts.NeedCommit = f
	s.progress.Unlock()
}
