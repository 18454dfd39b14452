package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/google/uuid"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
)

// RepairOptions are the settings of Repair.
type RepairOptions struct {
	// Confirm is asked, with a report of what would become of the store, before
	// anything is written. With false, or without it, nothing is.
	Confirm func(*RepairReport) bool
	// Progress is called as for Check. It may be nil.
	Progress func(done, total uint64)
}

// A RepairReport is what Repair found, and what it cost.
type RepairReport struct {
	Needed   bool     `json:"needed"`
	Repaired bool     `json:"repaired"`
	Problems []string `json:"problems"`       // what is wrong, at most problemsMax
	More     int      `json:"more,omitempty"` // problems beyond those

	// Epoch is that of the commit whose state the store has afterwards.
	Epoch uint64 `json:"epoch"`
	// GivenUp is how many later commits were durable and cannot be had any more;
	// Changed what they changed, as far as it can be read: it has older contents.
	GivenUp uint64        `json:"given_up"`
	Changed []block.Range `json:"changed"`
	// Unread is how many bytes of the log, where these commits were, cannot be
	// read: what they changed is not known.
	Unread uint64 `json:"unread_bytes"`
	// Lost are the blocks that read as errors until they are written.
	Lost []block.Range `json:"lost"`
}

// Repair makes the store in f one that opens again, and checks as whole. What it
// does is well defined: of all that is left it takes the newest commit whose state
// is complete, but for blocks of the map that are lost and known to be, and makes
// that the newest checkpoint.
//
//   - Superblocks that are lost are found again by their copies in the log.
//   - A segment table that is lost, or counts wrong, is made anew from the map.
//   - A log that is broken in a commit that was durable ends before that commit;
//     what came later is given up, for a part of it would be no state that the
//     device ever had.
//   - Blocks that an unreadable node of the map answers for become lost.
//
// Damaged data is left as it is: it reads as an error.
//
// The new state is written to free segments, and counts from the moment in which
// its superblock is there: a repair that is interrupted has done nothing. f must be
// locked, for writing with Confirm; Repair closes it. An error says that there is no
// state to be had, or that it could not be written.
func Repair(f disk.File, o RepairOptions) (*RepairReport, error) {
	r := &repair{file: f, opts: o, notes: &CheckReport{}}
	rep, err := r.run()
	if r.store != nil && r.store.log != nil {
		err = errors.Join(err, r.store.Close())
	} else {
		f.Close()
	}
	return rep, err
}

type repair struct {
	file  disk.File
	opts  RepairOptions
	notes *CheckReport // for its problems

	geometry Geometry
	heads    []segmentHead // of all segments that have one, by ascending serial
	durable  uint64        // the newest epoch that anything names as durable

	store *Store      // the best state found
	sb    *superblock // the checkpoint that it comes from
	end   logEnd      // of its log
	spare bool        // its segment table was made anew, with segments that nobody needs
}

// A candidate is a checkpoint that may be used.
type candidate struct {
	*superblock
	// proof is the epoch that has to be reached from it for it to count: that of
	// its record. 0: it was read from its slot.
	proof uint64
}

func (r *repair) run() (*RepairReport, error) {
	if r.opts.Confirm != nil {
		if err := r.file.Sync(); err != nil {
			return nil, fmt.Errorf("store: sync before repair: %w", err)
		}
	}
	if err := r.file.DropCache(); err != nil {
		return nil, fmt.Errorf("store: drop cached pages before repair: %w", err)
	}
	newest, other, err := readSuperblocks(r.file, r.warn)
	var candidates []candidate
	switch {
	case err == nil:
		candidates = append(candidates, candidate{superblock: newest})
		if other != nil {
			candidates = append(candidates, candidate{superblock: other})
		}
		r.readHeads(&newest.Geometry)
	case errors.Is(err, ErrVersion):
		return nil, err
	default:
		r.notes.problem("%v", err)
		if candidates, err = r.findCheckpoints(err); err != nil {
			return nil, err
		}
	}
	var sequence uint64
	for _, c := range candidates {
		sequence = max(sequence, c.sequence)
		if err := r.try(c); err != nil {
			r.notes.problem("checkpoint %d cannot be used: %v", c.sequence, err)
		}
	}
	if r.store == nil {
		return nil, fmt.Errorf("store: there is nothing that it could be repaired from: %s: %w", r.notes.Problems[len(r.notes.Problems)-1], ErrCorrupt)
	}
	rep, err := r.assess()
	if err != nil || !rep.Needed || r.opts.Confirm == nil || !r.opts.Confirm(rep) {
		return rep, err
	}
	sequence++
	if newest != nil && sequence%2 == r.sb.sequence%2 {
		sequence++ // the slot of what is good is not the first to be written
	}
	if err := r.apply(sequence); err != nil {
		return rep, err
	}
	rep.Repaired = true
	return rep, nil
}

func (r *repair) warn(msg string, err error) { r.notes.problem("%s: %v", msg, err) }

// try recovers what it can from the checkpoint c, and keeps it if it is newer than
// what there is.
func (r *repair) try(c candidate) error {
	s := &Store{opts: Options{ReadOnly: true, Warn: func(string, error) {}}, file: r.file, salvage: true}
	s.opts.setDefaults()
	s.reset(c.Geometry)
	err := s.loadCheckpoint(c.superblock)
	rebuilt := err != nil
	if rebuilt {
		// Without its segment table, which can be made anew.
		bare := *c.superblock
		bare.usage, bare.segments = blobRef{}, 0
		s.reset(c.Geometry)
		if again := s.loadCheckpoint(&bare); again != nil {
			return again
		}
		r.notes.problem("the segment table of checkpoint %d: %v", c.sequence, err)
		for _, h := range r.heads {
			if h.number >= s.segments.total.Load() {
				continue // of before the store shrank
			}
			s.segments.adopt(h.number, h.serial, identitySeed(s.geometry.UUID, h.number, h.life, h.serial))
		}
	}
	end, err := s.replay(c.superblock, c.epoch)
	if err != nil {
		return err
	}
	if s.recovery.Epoch < c.proof {
		return fmt.Errorf("nothing shows that it was durable: %w", ErrCorrupt)
	}
	r.durable = max(r.durable, end.durable)
	if r.store == nil || s.recovery.Epoch > r.store.recovery.Epoch {
		r.store, r.sb, r.end, r.spare = s, c.superblock, end, rebuilt
	}
	return nil
}

// assess tells what is wrong with the state found, mends its accounting in memory,
// and enters what its map has lost.
func (r *repair) assess() (*RepairReport, error) {
	s := r.store
	for _, h := range r.heads {
		r.end.serials = max(r.end.serials, h.serial)
		r.durable = max(r.durable, h.durable)
	}
	r.end.epochs = max(r.end.epochs, r.durable)
	rep := &RepairReport{Epoch: s.recovery.Epoch, Changed: []block.Range{}, Lost: []block.Range{}}
	if r.durable > rep.Epoch {
		rep.GivenUp = r.durable - rep.Epoch
		r.givenUp(rep)
		r.notes.problem("the log is broken behind commit %d: %d later ones, which were durable, cannot be had", rep.Epoch, rep.GivenUp)
	}
	if n := s.recovery.Damaged; n > 0 {
		r.notes.problem("%d records of the log are damaged, their blocks are lost", n)
	}
	c := &checker{s: s, opts: CheckOptions{Progress: r.opts.Progress}, rep: r.notes, used: make(map[uint32]*usage)}
	if err := c.run(); err != nil {
		return rep, err
	}
	spare := uint64(0)
	if r.spare {
		spare = r.sb.replay.serial
	}
	s.segments.recount(c.used, spare)
	s.mu.root.Entries, s.mu.root.Nodes, s.mu.nodes = c.entries, c.nodes, c.totals
	for _, keys := range c.worn {
		if err := r.again(keys); err != nil {
			return rep, err
		}
	}
	rep.Lost = mergeRanges(r.notes.Lost)
	for _, l := range rep.Lost {
		for _, e := range s.lookupOverlaysLocked(l, nil) {
			if e.Kind == inTree {
				s.mu.open.Insert(extents.Extent{Start: e.Start, Count: e.Count, Kind: extents.Lost})
			}
		}
	}
	rep.Problems, rep.More = r.notes.Problems, r.notes.More
	rep.Needed = len(rep.Problems) > 0
	return rep, nil
}

// again enters an extent of the map once more, so that the nodes that lead to it
// are written anew: one of them, which answers for keys, has a damaged copy.
func (r *repair) again(keys block.Range) error {
	s := r.store
	found := false
	for _, run := range s.lookupOverlaysLocked(keys, nil) {
		if run.Kind != inTree || found {
			continue
		}
		if err := s.tree.Lookup(s.mu.root, run.Range(), func(e extents.Extent) error {
			if !found {
				s.mu.open.Insert(e)
			}
			found = true
			return nil
		}); err != nil {
			return fmt.Errorf("store: %w", err)
		}
	}
	return nil
}

// apply makes the state the newest checkpoint, sequence, and the next one too.
func (r *repair) apply(sequence uint64) error {
	s := r.store
	s.opts.ReadOnly, s.salvage = false, false
	s.opts.Warn = r.warn
	s.mu.sequence, s.progress.sequence, s.progress.durable = sequence-1, sequence-1, s.recovery.Epoch
	first, ok := s.segments.take()
	if !ok {
		return fmt.Errorf("store: no free segment to repair with: %w", ErrNoSpace)
	}
	// A log of its own, which nothing leads to before the superblock does.
	r.end.head, r.end.offset, r.end.bytes = segmentHead{number: noSegment, next: first}, 0, 0
	if err := s.beginLife(r.end); err != nil {
		return err
	}
	for range 2 { // both slots
		if err := s.checkpointAlone(); err != nil {
			return err
		}
	}
	return s.TrimHost()
}

// givenUp reads what the commits changed that are given up.
func (r *repair) givenUp(rep *RepairReport) {
	for _, h := range r.heads {
		if h.serial < r.end.head.serial {
			continue
		}
		from := uint32(segmentData)
		if h.serial == r.end.head.serial {
			from = r.end.offset
		}
		bad := r.visit(h, from, func(x *header, _ []byte) {
			if (x.kind == recordData || x.kind == recordHole) && x.epoch > rep.Epoch && x.epoch <= r.durable {
				rep.Changed = append(rep.Changed, block.Span(x.start, x.count))
			}
		})
		rep.Unread += uint64(bad)
	}
	rep.Changed = mergeRanges(rep.Changed)
}

// visit calls fn with the records of a segment from an offset on, also with those
// behind places that do not parse, and returns the number of bytes that such
// places take before a record that does. The payload is nil if it does not verify.
func (r *repair) visit(h segmentHead, from uint32, fn func(x *header, payload []byte)) (bad uint32) {
	g := &r.geometry
	w := &recordWindow{file: r.file, number: h.number, base: segmentsOffset + int64(h.number)*int64(g.SegmentSize),
		seed: identitySeed(g.UUID, h.number, h.life, h.serial), limit: g.SegmentSize, start: from}
	gap := uint32(0)
	for off := from; off < w.limit; {
		x, _, at, err := w.next(off)
		if err == io.EOF {
			break
		}
		if err != nil {
			next := (at + alignment) &^ (alignment - 1)
			gap += next - off
			off = next
			continue
		}
		bad += gap
		gap = 0
		p, err := w.bytes(at+recordHeader, x.length)
		if err != nil || uint32(len(p)) != x.length || x.length > 0 && crc32.Update(w.seed, castagnoli, p) != x.checksum {
			p = nil
		}
		fn(&x, p)
		off = x.end(at)
	}
	return bad
}

// readHeads reads the headers of all segments of a store.
func (r *repair) readHeads(g *Geometry) {
	r.geometry = *g
	s := &Store{file: r.file}
	s.reset(*g)
	size, err := r.file.Size()
	if err != nil {
		r.notes.problem("%v", err)
		return
	}
	// Whatever the capacity: a header of before a resize may have told it.
	for n := uint32(0); n < noSegment && s.segments.base(n) < size; n++ {
		h, ok, err := s.readSegmentHead(n)
		if err != nil {
			r.notes.problem("%v", err)
		}
		if ok {
			r.heads = append(r.heads, h)
		}
	}
	slices.SortFunc(r.heads, func(a, b segmentHead) int { return cmp.Compare(a.serial, b.serial) })
}

// findCheckpoints finds the newest checkpoints of a store that has lost both
// superblocks, by the copies in its log, and failing these the beginning of the
// log. If there is nothing, the error is cause.
func (r *repair) findCheckpoints(cause error) ([]candidate, error) {
	g, ok, err := r.findGeometry()
	if err != nil || !ok {
		return nil, errors.Join(err, cause)
	}
	r.readHeads(&g)
	r.geometry = r.headGeometry(g)
	var found []candidate
	for i := len(r.heads) - 1; i >= 0 && len(found) < 4; i-- {
		r.visit(r.heads[i], segmentData, func(x *header, p []byte) {
			if x.kind != recordSuper || p == nil || !bytes.Equal(p[:8], superMagic[:]) {
				return
			}
			if sb, err := decodeSuperFields(p); err == nil && sb.UUID == g.UUID {
				found = append(found, candidate{sb, x.epoch})
			}
		})
	}
	slices.SortFunc(found, func(a, b candidate) int { return cmp.Compare(b.sequence, a.sequence) })
	for _, h := range r.heads {
		if h.prev == noSegment {
			first := &superblock{Geometry: r.geometry, sequence: 1, replay: position{segment: h.number}}
			return append(found, candidate{superblock: first}), nil
		}
	}
	if len(found) == 0 {
		return nil, cause
	}
	return found, nil
}

// findGeometry looks for a header of a segment, which tells what the store was
// made with.
func (r *repair) findGeometry() (g Geometry, ok bool, err error) {
	size, err := r.file.Size()
	if err != nil {
		return g, false, fmt.Errorf("store: %w", err)
	}
	for off := int64(segmentsOffset); off < size; off += SegmentSizeMin {
		if g, ok := r.geometryAt(off); ok {
			return g, true, nil
		}
	}
	return g, false, nil
}

// geometryAt is what a header at that place says, if there is one.
func (r *repair) geometryAt(off int64) (g Geometry, ok bool) {
	var b [segmentHeader]byte
	for i := range int64(2) {
		if n, err := r.file.ReadAt(b[:], off+i*segmentHeader); n < len(b) || err != nil && err != io.EOF {
			continue
		}
		id, err := uuid.FromBytes(b[16:32])
		if err != nil {
			continue
		}
		number := binary.LittleEndian.Uint32(b[12:])
		if _, ok := decodeSegmentHead(b[:], id, number); !ok {
			continue
		}
		if g, err = decodeGeometry(b[88:]); err == nil && segmentsOffset+int64(number)*int64(g.SegmentSize) == off {
			g.UUID = id
			return g, true
		}
	}
	return g, false
}

// headGeometry is what the newest segment's header says: a resize may have changed
// it since an older one was written.
func (r *repair) headGeometry(g Geometry) Geometry {
	if n := len(r.heads); n > 0 {
		if newest, ok := r.geometryAt(segmentsOffset + int64(r.heads[n-1].number)*int64(g.SegmentSize)); ok {
			return newest
		}
	}
	return g
}
