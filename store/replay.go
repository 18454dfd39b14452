package store

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/mutant"
)

// Recovery tells what opening a store found.
type Recovery struct {
	Checkpoint uint64 `json:"checkpoint"` // sequence number of the checkpoint that replay started from
	Epoch      uint64 `json:"epoch"`      // of the commit whose state the store has now
	Segments   int    `json:"segments"`   // segments of the log that were read
	Bytes      uint64 `json:"bytes"`      // of the log that was accepted
	Records    uint64 `json:"records"`    // that were applied
	Dropped    uint64 `json:"dropped"`    // records of an epoch that no commit closed
	Damaged    uint64 `json:"damaged"`    // records of durable epochs that could not be read; their blocks are lost
}

// Recovery is what opening found.
func (s *Store) Recovery() Recovery { return s.recovery }

// A logEnd is where the accepted log ends, and what must not be used again.
type logEnd struct {
	head    segmentHead // of the segment that it ends in; serial 0: there is none
	offset  uint32      // in it
	serials uint64      // the largest serial seen
	epochs  uint64      // the largest epoch seen
	replay  uint64      // the serial of the segment where replay began
	bytes   uint64      // of the accepted log behind that
	durable uint64      // the newest epoch that anything names as durable
}

// A scanned record is what replay keeps of a record until its epoch is judged.
type scanned struct {
	header
	segment uint32
	sum     uint32 // of the header
	bad     bool   // the payload is damaged
	err     error  // why it could not even be read, or nil
	tally   tally  // of a commit record: its payload
	end     position
}

// A fault is a place where the log cannot be parsed.
type fault struct {
	at  position
	err error
}

// replay reads the log behind sb, judges its epochs, and applies those that are
// committed. durable is an epoch known to be durable from the superblocks.
//
// The rules (R1): an epoch is accepted when its commit record is there and
// agrees with every record before it, each with its payload verified. When a
// record behind it, or a superblock, says that it was durable, then a payload
// that does not verify is damage, costs its own blocks, and the epoch stands;
// else the epoch is the torn tail of a crash, and it and all behind it are
// dropped; but a payload that the disk refuses to read may be of a commit that
// was acknowledged, and the store is not opened without it. A header that cannot
// be parsed is the end of the log, unless something behind it says that it was
// durable: then the store is damaged in a way that would lose acknowledged writes,
// and is not opened.
func (s *Store) replay(sb *superblock, durable uint64) (logEnd, error) {
	s.recovery = Recovery{Checkpoint: sb.sequence, Epoch: sb.epoch}
	sc := &scanner{s: s, end: logEnd{epochs: durable, replay: sb.replay.serial}, durable: durable, tail: position{sb.replay.segment, sb.replay.offset, sb.replay.serial}}
	if err := sc.scan(sb); err != nil && !s.salvage {
		return logEnd{}, err
	}
	sc.probeSegments()
	s.recovery.Segments = sc.segments

	var t tally
	first := 0 // the first record of the epoch being judged
	end := sc.tail
	for i := range sc.records {
		r := &sc.records[i]
		if r.kind != recordCommit {
			t.add(r.sum, r.length)
			continue
		}
		// foreign: the commit record does not belong to what stands before it.
		foreign := !r.bad && r.tally != t || r.epoch <= s.recovery.Epoch
		bad, unread := r.bad, r.err
		for _, q := range sc.records[first:i] {
			bad = bad || q.bad
			foreign = foreign || q.epoch != r.epoch
			if unread == nil {
				unread = q.err
			}
		}
		if (bad || foreign) && r.epoch > sc.durable {
			if unread != nil && !s.salvage {
				// It may be the last commit that was acknowledged.
				return logEnd{}, fmt.Errorf("store: epoch %d, which may be durable: %w", r.epoch, unread)
			}
			break // a torn tail
		}
		if foreign && s.salvage {
			break
		}
		if foreign {
			return logEnd{}, fmt.Errorf("store: epoch %d was durable, and its commit record does not agree with the log before it: %w", r.epoch, ErrCorrupt)
		}
		for j := first; j < i; j++ {
			s.apply(&sc.records[j])
			sc.end.bytes += recordHeader + uint64(sc.records[j].length)
		}
		s.recovery.Epoch = r.epoch
		first, t, end = i+1, tally{}, r.end
	}
	s.recovery.Dropped = uint64(len(sc.records) - first)
	sc.end.durable = sc.durable
	if s.recovery.Epoch < sc.durable && !s.salvage {
		err := fmt.Errorf("store: epoch %d was durable, and the log can be read up to epoch %d only: %w", sc.durable, s.recovery.Epoch, ErrCorrupt)
		if sc.fault != nil {
			err = fmt.Errorf("%w: segment %d at %d: %w", err, sc.fault.at.segment, sc.fault.at.offset, sc.fault.err)
		}
		return logEnd{}, err
	}
	if s.recovery.Damaged > 0 {
		s.opts.Warn(fmt.Sprintf("%d records of the log are damaged, their blocks are lost", s.recovery.Damaged), ErrCorrupt)
	}
	s.recovery.Bytes = sc.end.bytes
	// The accepted log ends in the segment of end, whose header names where to go on.
	sc.end.head, sc.end.offset = sc.heads[end.serial], end.offset
	return sc.end, nil
}

// apply enters one record of an accepted epoch in the map.
func (s *Store) apply(r *scanned) {
	s.recovery.Records++
	switch r.kind {
	case recordData:
		kind := extents.Data
		if r.bad {
			s.recovery.Damaged++
			kind = extents.Lost
		}
		insertBlob(s.mu.open, kind, r.header, blobRef{r.segment, r.offset + recordHeader, r.length, r.checksum})
		s.touched.note(block.Span(r.start, r.count))
	case recordHole:
		s.mu.open.Insert(extents.Extent{Start: r.start, Count: r.count, Kind: extents.Hole})
		s.touched.note(block.Span(r.start, r.count))
	default:
		if r.bad {
			// A node or a table is verified again when it is used.
			s.recovery.Damaged++
		}
	}
}

// A scanner reads the log from a position to its end.
type scanner struct {
	s       *Store
	records []scanned
	heads   map[uint64]segmentHead // by serial
	tail    position               // where the log ends as far as it parses
	end     logEnd
	durable uint64 // the newest epoch that anything names as durable
	fault   *fault

	segments int
	buf      []byte
}

// readChunk is how much of the log is read at once.
const readChunk = 1 << 20

func (sc *scanner) scan(sb *superblock) error {
	s := sc.s
	sc.heads = make(map[uint64]segmentHead)
	sc.buf = make([]byte, min(readChunk, s.segments.size))
	var head segmentHead
	from := uint32(segmentData)
	if sb.replay.serial == 0 {
		// The log is empty: its first segment, if it was begun, is segment 0.
		head = segmentHead{number: noSegment, next: sb.replay.segment}
		sc.heads[0] = head
	} else {
		h, ok, err := s.readSegmentHead(sb.replay.segment)
		if err != nil {
			return err
		}
		if !ok || h.serial != sb.replay.serial {
			return fmt.Errorf("store: header of segment %d, where replay starts: %w", sb.replay.segment, ErrCorrupt)
		}
		head, from = h, sb.replay.offset
	}
	for {
		if head.serial != 0 {
			sc.segments++
			sc.heads[head.serial] = head
			sc.end.serials = max(sc.end.serials, head.serial)
			sc.durable = max(sc.durable, head.durable)
			s.segments.adopt(head.number, head.serial, identitySeed(s.geometry.UUID, head.number, head.life, head.serial))
		}
		next, ok, err := sc.successor(head)
		if err != nil {
			return err
		}
		if head.serial != 0 {
			limit := s.segments.size
			if ok {
				limit = next.pend
			}
			if err := sc.scanSegment(head, from, limit); err != nil {
				return err
			}
		}
		if !ok {
			return nil
		}
		head, from = next, segmentData
	}
}

// successor reads the header of the segment behind head, and says whether the
// log goes on there.
func (sc *scanner) successor(head segmentHead) (segmentHead, bool, error) {
	if head.next >= sc.s.segments.total.Load() {
		return segmentHead{}, false, nil
	}
	next, ok, err := sc.s.readSegmentHead(head.next)
	if err != nil {
		return next, false, err
	}
	if ok && mutant.Is(mutant.StaleLife) && next.serial > head.serial {
		next.pend = sc.s.segments.size
		return next, true, nil
	}
	ok = ok && next.prev == head.number && next.pserial == head.serial && next.plife == head.life &&
		next.serial > head.serial && next.pend <= sc.s.segments.size
	return next, ok, nil
}

// scanSegment parses the records of a segment in [from, limit), up to the first
// place where there is none.
func (sc *scanner) scanSegment(head segmentHead, from, limit uint32) error {
	s := sc.s
	seed := identitySeed(s.geometry.UUID, head.number, head.life, head.serial)
	w := &recordWindow{file: s.file, number: head.number, base: s.segments.base(head.number), seed: seed, limit: limit, buf: sc.buf, start: from}
	defer func() { sc.buf = w.buf }()
	device := block.Range{End: block.Index(s.geometry.Blocks())}
	for off := from; off < limit; {
		h, sum, at, err := w.next(off)
		if err == nil && h.count > 0 && !device.Covers(block.Span(h.start, h.count)) {
			err = fmt.Errorf("record does not fit: %w", ErrCorrupt)
		}
		if errors.Is(err, ErrCorrupt) {
			if sc.fault == nil {
				sc.fault = &fault{position{head.number, at, head.serial}, err}
			}
			return sc.probe(at, w)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		r := scanned{header: h, segment: head.number, sum: sum}
		payload, err := w.bytes(at+recordHeader, h.length)
		r.err = err
		r.bad = err != nil || uint32(len(payload)) != h.length || h.length > 0 && crc32.Update(seed, castagnoli, payload) != h.checksum && !mutant.Is(mutant.LogUnverified)
		if h.kind == recordCommit && !r.bad {
			r.tally, err = decodeTally(payload)
			r.bad = err != nil
		}
		sc.durable = max(sc.durable, h.durable)
		sc.end.epochs = max(sc.end.epochs, h.epoch)
		off = h.end(at)
		r.end = position{head.number, off, head.serial}
		if sc.fault == nil {
			sc.records = append(sc.records, r)
		}
	}
	return nil
}

// end is where, behind this record at offset at, the next one is looked for.
func (h *header) end(at uint32) uint32 {
	off := at + recordHeader + h.length
	if h.kind == recordCommit {
		// Nothing stands before the border, and what does is not looked at: a
		// power cut may have left the commit whole and its padding as it was.
		off = (off + alignment - 1) &^ (alignment - 1)
	}
	return off
}

// A recordWindow reads the records of one segment, with read-ahead.
type recordWindow struct {
	file   disk.File
	number uint32 // of the segment
	base   int64  // of the segment in the file
	seed   uint32 // of its checksums
	limit  uint32 // offset at which its records end

	buf   []byte // may be used; it grows to what one record needs
	ahead uint32 // bytes to be read at once; 0 is readChunk
	start uint32 // offset in the segment of data
	data  []byte // what was read
}

// bytes returns n bytes at off, fewer at the limit and at the end of the file.
// They stand until the next call.
func (w *recordWindow) bytes(off, n uint32) ([]byte, error) {
	n = min(n, w.limit-off)
	if off < w.start || uint64(off)+uint64(n) > uint64(w.start)+uint64(len(w.data)) {
		if w.ahead == 0 {
			w.ahead = readChunk
		}
		want := min(max(n, w.ahead), w.limit-off)
		if want > uint32(len(w.buf)) {
			w.buf = make([]byte, want)
		}
		w.data = nil
		k, err := w.file.ReadAt(w.buf[:want], w.base+int64(off))
		if err != nil && !errors.Is(err, io.EOF) && want > n {
			// There is a bad place somewhere: no more at once than must be.
			w.ahead, want = n, n
			k, err = w.file.ReadAt(w.buf[:want], w.base+int64(off))
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("store: read segment %d at %d: %w", w.number, off, err)
		}
		w.data, w.start = w.buf[:k], off
	}
	d := w.data[off-w.start:]
	return d[:min(int(n), len(d))], nil
}

// next finds the record that stands at off or, if there is padding, at the next
// border, and returns its header, with the checksum of that, and where it is. An
// error that wraps ErrCorrupt says that there is none, or none that can be parsed,
// at that place; io.EOF that only padding was left; any other that it could not be
// read. REQUIRES: off < w.limit.
func (w *recordWindow) next(off uint32) (h header, sum, at uint32, err error) {
	for {
		b, err := w.bytes(off, recordHeader)
		if err != nil {
			return h, 0, off, err
		}
		if len(b) == 0 || b[0] == 0 && off%alignment == 0 {
			// The end of the log, unless a record is missing there.
			return h, 0, off, fmt.Errorf("no record: %w", ErrCorrupt)
		}
		if b[0] != 0 {
			h, sum, err = decodeHeader(b, w.seed, off)
			if err == nil && uint64(off)+recordHeader+uint64(h.length) > uint64(w.limit) {
				err = fmt.Errorf("record does not fit: %w", ErrCorrupt)
			}
			return h, sum, off, err
		}
		// Padding up to the next border.
		border := (off + alignment) &^ (alignment - 1)
		pad, err := w.bytes(off, border-off)
		if err != nil {
			return h, 0, off, err
		}
		if !allZero(pad) {
			return h, 0, off, fmt.Errorf("padding is not zero: %w", ErrCorrupt)
		}
		if off = border; off >= w.limit {
			return h, 0, off, io.EOF
		}
	}
}

// probe looks, behind a place that cannot be parsed, for records that can, at
// the borders where commits begin a new one, and learns what they name as
// durable. Their contents are not used.
func (sc *scanner) probe(off uint32, w *recordWindow) error {
	for off = (off + alignment) &^ (alignment - 1); off < w.limit; off += alignment {
		b, err := w.bytes(off, recordHeader)
		if err != nil {
			return err
		}
		if len(b) < recordHeader {
			return nil
		}
		if h, _, err := decodeHeader(b, w.seed, off); err == nil {
			sc.durable = max(sc.durable, h.durable)
			sc.end.epochs = max(sc.end.epochs, h.epoch)
		}
	}
	return nil
}

// segmentProbes is how many segments probeSegments looks at. The log goes on in
// the lowest free ones, or nearly so (see segments.take).
const segmentProbes = 64

// probeSegments looks in free segments for headers that name as durable what the
// log does not reach, because a header in between is gone: to lose both copies of
// it is damage, and would look like the end of the log.
func (sc *scanner) probeSegments() {
	free := sc.s.segments.lowestFree(segmentProbes)
	for _, n := range free {
		if h, ok, err := sc.s.readSegmentHead(n); err == nil && ok {
			sc.durable = max(sc.durable, h.durable)
			sc.end.epochs = max(sc.end.epochs, h.durable)
			sc.end.serials = max(sc.end.serials, h.serial)
		}
	}
}

// readSeeded reads and verifies a record's payload with a known seed.
func (s *Store) readSeeded(dst []byte, ref blobRef, seed uint32) error {
	n, err := s.file.ReadAt(dst, s.segments.base(ref.segment)+int64(ref.offset))
	if n < len(dst) && err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read %d bytes at %d of segment %d: %w", len(dst), ref.offset, ref.segment, err)
	}
	clear(dst[n:])
	if sum := crc32.Update(seed, castagnoli, dst); sum != ref.checksum {
		return fmt.Errorf("%d bytes at %d of segment %d: checksum %08x, want %08x: %w",
			len(dst), ref.offset, ref.segment, sum, ref.checksum, ErrCorrupt)
	}
	return nil
}
