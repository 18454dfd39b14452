package store

import (
	"fmt"

	"cnbd/extents"
	"cnbd/internal/mutant"
)

// A snapshot is the state of one commit, about to be merged into the tree.
type snapshot struct {
	epoch   uint64
	replay  position // behind the commit's record
	overlay *extents.Overlay
}

// takeSnapshot makes the commit just appended the one of a checkpoint, unless
// one is still running, or the cleaner has copies that are not in the map yet. REQUIRES: s.log.mu held, and called by the ordered side,
// so that nothing is entered in the overlay between the record and this.
func (s *Store) takeSnapshot(epoch uint64) *snapshot {
	s.progress.Lock()
	defer s.progress.Unlock()
	if s.progress.running || s.cleaner.copying.Load() {
		return nil
	}
	s.progress.running = true
	s.snapshot.Store(false)
	l := s.log
	l.mu.since, l.mu.records, l.mu.snapshot = 0, 0, l.mu.head.serial
	snap := &snapshot{epoch: epoch, replay: position{l.mu.head.number, l.mu.end, l.mu.head.serial}}
	s.mu.Lock()
	snap.overlay = s.mu.open
	s.mu.merging, s.mu.open = s.mu.open, extents.NewOverlay()
	s.mu.Unlock()
	return snap
}

// checkpoint makes a snapshot, whose commit is durable, the newest checkpoint.
// It runs beside everything else, one at a time.
func (s *Store) checkpoint(snap *snapshot) {
	err := s.runCheckpoint(snap)
	if err != nil {
		s.fail(fmt.Errorf("store: checkpoint of epoch %d: %w", snap.epoch, err))
	}
	s.progress.Lock()
	s.progress.running = false
	s.progress.cond.Broadcast()
	s.progress.Unlock()
}

func (s *Store) runCheckpoint(snap *snapshot) error {
	s.mu.RLock()
	root, trims, sequence, totals, geometry := s.mu.root, s.mu.trims, s.mu.sequence, s.mu.nodes, s.mu.target
	s.mu.RUnlock()

	evacuation := s.cleaner.takeEvacuation()
	root, trims, err := s.tree.Merge(root, snap.overlay, trims, s.opts.TrimLeaves, evacuation, &accounting{s.segments, &totals})
	if err != nil {
		return err
	}
	sb := &superblock{Geometry: geometry, sequence: sequence + 1, epoch: snap.epoch, replay: snap.replay, root: root, nodes: totals}
	s.touched.encode(sb)
	s.segments.markEmpty(sb.sequence, snap.replay.serial)
	if mutant.Is(mutant.ReuseBeforeCheckpoint) {
		s.segments.release(sb.sequence + 1)
	}
	epoch := s.nodes.epoch
	if sb.usage, sb.segments, err = s.appendUsage(&epoch); err != nil {
		return err
	}
	if trims.Len() > 0 {
		if sb.trims, epoch, err = s.log.append(recordTrims, trims.Append(nil)); err != nil {
			return err
		}
	}
	sb.seeds = [2]uint32{s.segments.seed(sb.usage.segment), s.segments.seed(sb.trims.segment)}
	// Should both superblocks be lost, the log has what they said.
	if _, epoch, err = s.log.append(recordSuper, sb.encode()[:superFields]); err != nil {
		return err
	}
	// Invariant 3: a commit closes the epoch of the last of these records and is
	// durable, before the superblock leads to them.
	if err := s.waitDurable(epoch); err != nil {
		return err
	}
	if err := s.writeSuperblock(sb); err != nil {
		return err
	}
	s.mu.Lock()
	s.mu.root, s.mu.trims, s.mu.sequence, s.mu.nodes = root, trims, sb.sequence, totals
	s.mu.replay = snap.replay.serial
	s.mu.merging = nil
	s.entries.Store(s.overlayLenLocked())
	s.mu.Unlock()
	s.cleaner.nodes.Add(-int64(len(evacuation.Keys)))
	s.metrics.checkpoints.Add(1)

	s.segments.release(sb.sequence)
	// What commits and trims have used of the space that is kept for them, before the
	// host is given any. When it is full they go on with what checkpoints set free:
	// see AppendCommit.
	if s.segments.ensure(s.file, reserveSegments) != nil {
		s.givePinsUp()
	}
	s.chill()
	s.progress.Lock()
	s.progress.sequence = sb.sequence
	s.progress.cond.Broadcast()
	s.progress.Unlock()
	return nil
}

// chill gives the space of free segments back to the host, but for those that are
// kept warm.
func (s *Store) chill() {
	s.mu.RLock()
	nodes := s.mu.root.Nodes
	s.mu.RUnlock()
	if err := s.segments.chill(s.file, func() uint32 { return s.keepWarm(nodes) }); err != nil {
		// Nothing is lost by that.
		s.opts.Warn("freed space could not be given back to the host", err)
	}
}

// keepWarm is how many free segments keep their space on the host. nodes is the
// size of the map.
func (s *Store) keepWarm(nodes uint64) uint32 {
	return warmSegments + cleanSegments + uint32(s.segmentsFor(s.promised(), nodes))
}

// appendUsage appends the segment table.
func (s *Store) appendUsage(epoch *uint64) (last blobRef, entries uint64, err error) {
	b := make([]byte, usageHead, usageHead+usageBatch*usageEntry)
	n := 0
	flush := func() {
		if err != nil || n == 0 {
			return
		}
		putBlobRef(b, last)
		b[16], b[17] = byte(n), byte(n>>8)
		last, *epoch, err = s.log.append(recordUsage, b)
		b, n = b[:usageHead], 0
	}
	// A copy first: append may take a segment, under the lock that visit holds.
	type entry struct {
		n uint32
		s segment
	}
	var all []entry
	s.segments.visit(func(n uint32, g segment) {
		if g.serial != 0 {
			all = append(all, entry{n, g})
		}
	})
	for _, e := range all {
		var x [usageEntry]byte
		putUsageEntry(x[:], e.n, &e.s)
		b = append(b, x[:]...)
		if n++; n == usageBatch {
			flush()
		}
	}
	flush()
	return last, uint64(len(all)), err
}

// waitDurable blocks until epoch is durable, and sees to it that it will be.
func (s *Store) waitDurable(epoch uint64) error {
	s.progress.Lock()
	defer s.progress.Unlock()
	for s.progress.durable < epoch {
		if err := s.Err(); err != nil {
			return err
		}
		s.opts.NeedCommit()
		s.progress.cond.Wait()
	}
	return nil
}

// writeSuperblock writes the slot that does not hold the newest checkpoint.
func (s *Store) writeSuperblock(sb *superblock) error {
	if _, err := s.file.WriteAt(sb.encode(), int64(sb.sequence%2)*superblockStride); err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	return s.sync()
}

// Checkpoint takes a checkpoint of a commit made from now on and returns when it
// is durable. The caller, or another goroutine by way of NeedCommit, commits.
func (s *Store) Checkpoint() error {
	if err := s.writable(); err != nil {
		return err
	}
	s.progress.Lock()
	defer s.progress.Unlock()
	// One that runs now may be of an earlier commit.
	for s.progress.running && s.Err() == nil {
		s.askLocked()
		s.progress.cond.Wait()
	}
	want := s.progress.sequence + 1
	s.snapshot.Store(true)
	for s.progress.sequence < want || s.progress.running {
		if err := s.Err(); err != nil {
			return err
		}
		s.askLocked()
		s.progress.cond.Wait()
	}
	return s.Err()
}

// askLocked asks for the commit with which a checkpoint begins, or that the one that
// runs waits for: whoever it has asked may not have been there yet. While the cleaner
// is copying none can begin, and it tells when it has done: commits that lead to
// nothing would use the log up. REQUIRES: progress held.
func (s *Store) askLocked() {
	if s.progress.running || !s.cleaner.copying.Load() {
		s.opts.NeedCommit()
	}
}

// accounting is the tree's view of the segment table, and sums the nodes up.
type accounting struct {
	segments *segments
	nodes    *nodeTotals
}

// Extent implements extents.Usage.
func (a *accounting) Extent(e extents.Extent, delta int) {
	a.segments.account(e.Addr.Segment, int64(delta)*int64(e.Count), int64(delta)*int64(e.LiveBytes()))
}

// Node implements extents.Usage.
func (a *accounting) Node(p extents.Pointer, delta int) {
	for _, at := range p.Places[:p.Copies] {
		a.segments.account(at.Segment, int64(delta), int64(delta)*int64(p.Length))
		a.nodes.copies += uint64(delta)
		a.nodes.bytes += uint64(delta * int(p.Length))
	}
}
