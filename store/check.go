package store

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
)

// CheckOptions are the settings of Check.
type CheckOptions struct {
	// Data verifies the checksum of every stored blob too.
	Data bool
	// Progress is called now and then with the work done and all of it, in
	// references of the map. It may be nil.
	Progress func(done, total uint64)
}

// A CheckReport is what Check found.
type CheckReport struct {
	Clean    bool          `json:"clean"`
	Problems []string      `json:"problems"`       // in words, at most problemsMax
	More     int           `json:"more,omitempty"` // problems beyond those
	Lost     []block.Range `json:"lost"`           // ranges of blocks that cannot be read

	DataBytes   uint64 `json:"data_bytes"`
	StoredBytes uint64 `json:"stored_bytes"`
	Extents     uint64 `json:"extents"`
	Nodes       uint64 `json:"nodes"`
	Segments    uint64 `json:"segments"`
	Records     uint64 `json:"records"` // of the log behind the checkpoint
	Blobs       uint64 `json:"blobs"`   // verified, with Data
	Epoch       uint64 `json:"epoch"`
}

// problemsMax bounds the report of a store that is damaged all over.
const problemsMax = 1000

// Check proves the store in f without changing it: that it can be opened and
// every record behind its checkpoint verifies; that every node of the map can be
// read in each of its copies; that every extent lies within the device and its
// segment, with no two blobs or nodes over each other, and that a segment to which
// the map refers is not free; that the accounting of each segment is what the map
// refers to; and that the checkpoint before the newest one can be loaded. With
// o.Data every blob is read, and every record header and segment header that leads
// to it: each place that the map refers to is a record of that kind.
//
// f must be locked; Check closes it. An error says that the store could not be
// opened at all; if that is for damage, it wraps ErrCorrupt.
func Check(f disk.File, o CheckOptions) (*CheckReport, error) {
	rep := &CheckReport{Problems: []string{}, Lost: []block.Range{}}
	s, err := Open(f, Options{ReadOnly: true, Warn: func(msg string, err error) {
		rep.problem("%s: %v", msg, err)
	}})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	c := &checker{s: s, opts: o, rep: rep, used: make(map[uint32]*usage)}
	c.checkOther()
	if err := c.run(); err != nil {
		return nil, err
	}
	if o.Data {
		c.checkHeads()
	}
	rep.Lost = mergeRanges(rep.Lost)
	rep.Clean = len(rep.Problems) == 0 && len(rep.Lost) == 0
	return rep, nil
}

func (r *CheckReport) problem(format string, args ...any) {
	r.Problems, r.More = addProblem(r.Problems, r.More, format, args...)
}

// addProblem adds to a list of problems what fits into it.
func addProblem(list []string, more int, format string, args ...any) ([]string, int) {
	if len(list) == problemsMax {
		return list, more + 1
	}
	return append(list, fmt.Sprintf(format, args...)), more
}

type checker struct {
	s     *Store
	opts  CheckOptions
	rep   *CheckReport
	used  map[uint32]*usage
	done  uint64 // steps, of total
	total uint64

	// What can be read of the map.
	entries, nodes uint64
	totals         nodeTotals
	worn           []block.Range // of nodes of which a copy is damaged, and another is not
}

// usage is what the map refers to in one segment.
type usage struct {
	refs, bytes uint64
	places      []place
	// Of them, the nodes that cannot be read.
	goneRefs, goneBytes uint64
}

// A place is a run of bytes in a segment that a blob or a node takes.
type place struct {
	offset, length uint32
	blob           extents.Addr // zero for a node
}

func (c *checker) at(n uint32) *usage {
	u := c.used[n]
	if u == nil {
		u = &usage{}
		c.used[n] = u
	}
	return u
}

func (c *checker) run() error {
	s, rep := c.s, c.rep
	s.mu.RLock()
	defer s.mu.RUnlock()
	rep.Epoch, rep.Records = s.recovery.Epoch, s.recovery.Records
	c.total = s.mu.root.Entries + s.mu.root.Nodes
	if c.opts.Data {
		c.total += s.mu.root.Entries
	}
	device := block.Range{End: block.Index(s.geometry.Blocks())}
	last := extents.Extent{}
	err := s.tree.Walk(s.mu.root, func(n extents.WalkNode) error {
		c.step()
		rep.Nodes++
		for i, at := range n.Places[:n.Copies] {
			u := c.at(at.Segment)
			u.refs++
			u.bytes += uint64(n.Length)
			u.places = append(u.places, place{offset: at.Offset, length: uint32(n.Length)})
			if n.Err != nil {
				u.goneRefs++
				u.goneBytes += uint64(n.Length)
			} else {
				c.totals.copies++
				c.totals.bytes += uint64(n.Length)
			}
			b := make([]byte, n.Length)
			if err := s.readBlob(b, blobRef{at.Segment, at.Offset, uint32(n.Length), at.Checksum}); err != nil {
				rep.problem("map node of %v, copy %d: %v", n.Keys, i+1, err)
				if n.Err == nil {
					c.worn = append(c.worn, n.Keys)
				}
			}
		}
		if n.Err != nil {
			rep.problem("map node of %v cannot be read: %v", n.Keys, n.Err)
			c.lost(n.Keys)
		} else {
			c.nodes++
		}
		return nil
	}, func(e extents.Extent) error {
		c.step()
		c.entries++
		if e.Start < last.Range().End {
			rep.problem("extents %v and %v overlap", last.Range(), e.Range())
		}
		if !device.Covers(e.Range()) {
			rep.problem("extent %v lies beyond the device", e.Range())
		}
		last = e
		if e.Kind == extents.Data {
			u := c.at(e.Addr.Segment)
			u.refs += uint64(e.Count)
			u.bytes += uint64(e.LiveBytes())
			c.count(e)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.entries != s.mu.root.Entries && len(rep.Problems) == 0 {
		rep.problem("the map has %d extents, its root says %d", c.entries, s.mu.root.Entries)
	}
	c.checkAccounting()
	// What the device reads as: overlay, pending trims and tree together.
	c.checkVisible(device)
	c.checkPlaces()
	if c.opts.Progress != nil {
		c.opts.Progress(c.total, c.total)
	}
	return nil
}

// checkOther loads the checkpoint that is not in use: the newest one may rot.
func (c *checker) checkOther() {
	newest, other, err := readSuperblocks(c.s.file, func(string, error) {}) // Open has told of it
	if err != nil || other == nil {
		return
	}
	if newest.sequence != c.s.recovery.Checkpoint {
		return // it is the damaged one
	}
	o := &Store{opts: c.s.opts, file: c.s.file}
	o.reset(other.Geometry)
	if err := o.loadCheckpoint(other); err != nil {
		c.rep.problem("the checkpoint before the newest cannot be used: %v", err)
	}
}

// checkHeads reads both copies of the headers of the segments that the map refers
// to.
func (c *checker) checkHeads() {
	s := c.s
	var b [segmentData]byte
	s.segments.visit(func(n uint32, g segment) {
		if u := c.used[n]; u == nil || u.refs == 0 {
			return
		}
		k, err := s.file.ReadAt(b[:], s.segments.base(n))
		if err != nil && err != io.EOF {
			c.rep.problem("header of segment %d: %v", n, err)
			return
		}
		clear(b[k:])
		for i := range 2 {
			h, ok := decodeSegmentHead(b[i*segmentHeader:], s.geometry.UUID, n)
			if !ok || identitySeed(s.geometry.UUID, n, h.life, h.serial) != g.seed {
				c.rep.problem("header of segment %d, copy %d: not that of the segment: %v", n, i+1, ErrCorrupt)
			}
		}
	})
}

func (c *checker) step() {
	c.done++
	if c.opts.Progress != nil && c.done%1024 == 0 {
		c.opts.Progress(min(c.done, c.total), c.total)
	}
}

func (c *checker) count(e extents.Extent) {
	u := c.at(e.Addr.Segment)
	u.places = append(u.places, place{e.Addr.Offset, e.Addr.Length, e.Addr})
}

// lost notes a range that cannot be read, unless newer data covers it.
func (c *checker) lost(r block.Range) {
	for _, e := range c.s.lookupOverlaysLocked(r, nil) {
		if e.Kind == inTree || e.Kind == extents.Lost {
			c.rep.Lost = append(c.rep.Lost, e.Range())
		}
	}
}

// checkAccounting compares the segment table with what the tree refers to.
func (c *checker) checkAccounting() {
	seen := make(map[uint32]bool)
	c.s.segments.visit(func(n uint32, g segment) {
		c.rep.Segments++
		seen[n] = true
		u := c.at(n)
		// An unreadable node stays counted although what is below it is unknown.
		if g.refs != u.refs || g.bytes != u.bytes {
			c.rep.problem("segment %d: the table counts %d references and %d bytes, the map has %d and %d", n, g.refs, g.bytes, u.refs, u.bytes)
		}
		if g.refs > 0 && g.emptyAt != 0 {
			c.rep.problem("segment %d is referred to, and counted as empty since checkpoint %d", n, g.emptyAt)
		}
	})
	for n, u := range c.used {
		if !seen[n] && u.refs > 0 {
			c.rep.problem("segment %d is free, and the map refers to %d blocks or nodes in it", n, u.refs)
		}
	}
}

// checkVisible counts what the device holds, and adds the blobs of the overlay to
// the places that are taken.
func (c *checker) checkVisible(device block.Range) {
	s, rep := c.s, c.rep
	s.mu.open.Ascend(0, func(e extents.Extent) bool {
		if !device.Covers(e.Range()) {
			rep.problem("extent %v of the log lies beyond the device", e.Range())
		}
		if e.Kind == extents.Data {
			c.count(e)
		}
		return true
	})
	const window = 1 << 16
	visit := func(r block.Range) {
		ext, err := s.lookupLocked(r)
		if err != nil {
			rep.problem("look up %v: %v", r, err)
			return
		}
		for _, e := range ext {
			switch e.Kind {
			case extents.Data:
				rep.Extents++
				rep.DataBytes += e.Count.Bytes()
				rep.StoredBytes += uint64(e.LiveBytes())
			case extents.Lost:
				rep.Lost = append(rep.Lost, e.Range())
			}
		}
	}
	// Only where there is something: a device can be far larger than its data.
	var windows []block.Range
	add := func(r block.Range) {
		w := block.Range{Start: r.Start &^ (window - 1), End: min(device.End, (r.End+window-1)&^(window-1))}
		if n := len(windows); n > 0 && windows[n-1].End >= w.Start {
			windows[n-1].End = max(windows[n-1].End, w.End)
			return
		}
		windows = append(windows, w)
	}
	_ = s.tree.Walk(s.mu.root, func(n extents.WalkNode) error {
		if n.Level == 0 {
			add(n.Keys.Intersect(device))
		}
		return nil
	}, func(extents.Extent) error { return nil })
	s.mu.open.Ascend(0, func(e extents.Extent) bool {
		if e.Kind != extents.Hole {
			windows = append(windows, e.Range())
		}
		return true
	})
	for _, r := range mergeRanges(windows) {
		for at := r.Start; at < r.End; at += window {
			visit(block.Range{Start: at, End: min(r.End, at+window)})
		}
	}
}

// checkPlaces looks for bytes that two blobs or nodes claim, and with Data reads
// every blob.
func (c *checker) checkPlaces() {
	s, rep := c.s, c.rep
	bad := make(map[extents.Addr]bool)
	for _, n := range slices.Sorted(maps.Keys(c.used)) { // as they lie on the disk
		u := c.used[n]
		slices.SortFunc(u.places, func(a, b place) int {
			if a.offset != b.offset {
				return int(int64(a.offset) - int64(b.offset))
			}
			return int(int64(a.length) - int64(b.length))
		})
		end := uint32(segmentData)
		var prev place
		for i, p := range u.places {
			if i > 0 && p == prev {
				continue // another extent of the same blob
			}
			if p.offset < end+recordHeader {
				rep.problem("segment %d: bytes %d to %d are taken twice", n, p.offset, end)
			}
			if p.offset > s.geometry.SegmentSize || p.length > s.geometry.SegmentSize-p.offset {
				rep.problem("segment %d: place %d+%d is outside of it", n, p.offset, p.length)
			} else {
				end = p.offset + p.length
			}
			prev = p
			if !c.opts.Data {
				continue
			}
			if err := c.checkRecord(n, p); err != nil {
				rep.problem("header of the record at %d of segment %d: %v", p.offset-recordHeader, n, err)
			}
			if p.blob.Blocks > 0 {
				c.step()
				rep.Blobs++
				if err := s.readBlob(make([]byte, p.length), blobRef{n, p.offset, p.length, p.blob.Checksum}); err != nil {
					rep.problem("%v", err)
					bad[p.blob] = true
				}
			}
		}
	}
	if len(bad) > 0 {
		c.locate(bad)
	}
}

// checkRecord proves that what lies at p is the payload of a record of that kind.
func (c *checker) checkRecord(n uint32, p place) error {
	var b [recordHeader]byte
	at := p.offset - recordHeader
	if _, err := c.s.file.ReadAt(b[:], c.s.segments.base(n)+int64(at)); err != nil {
		return err
	}
	h, _, err := decodeHeader(b[:], c.s.segments.seed(n), at)
	if err != nil {
		return err
	}
	same := h.kind == recordNode && h.length == p.length
	if a := p.blob; a.Blocks > 0 {
		same = h.kind == recordData && h.length == p.length && h.checksum == a.Checksum && h.codec == a.Codec && h.level == a.Level &&
			bits.OnesCount32(h.present) == int(a.Blocks)
	}
	if !same {
		return fmt.Errorf("it is another record than the map refers to: %w", ErrCorrupt)
	}
	return nil
}

// locate finds the blocks whose blob is bad.
func (c *checker) locate(bad map[extents.Addr]bool) {
	c.s.mu.open.Ascend(0, func(e extents.Extent) bool {
		if e.Kind == extents.Data && bad[e.Addr] {
			c.rep.Lost = append(c.rep.Lost, e.Range())
		}
		return true
	})
	_ = c.s.tree.Walk(c.s.mu.root, func(extents.WalkNode) error { return nil }, func(e extents.Extent) error {
		if e.Kind == extents.Data && bad[e.Addr] {
			c.lost(e.Range())
		}
		return nil
	})
}

// mergeRanges sorts ranges and joins those that touch.
func mergeRanges(rs []block.Range) []block.Range {
	slices.SortFunc(rs, func(a, b block.Range) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && out[n-1].End >= r.Start {
			out[n-1].End = max(out[n-1].End, r.End)
		} else {
			out = append(out, r)
		}
	}
	return out
}

// IsDamage tells whether err, of Open or Check, says that a store is damaged, and
// not that it is missing, foreign, locked or of another version.
func IsDamage(err error) bool { return errors.Is(err, ErrCorrupt) }
