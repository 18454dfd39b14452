package extents

import (
	"encoding/binary"
	"errors"
	"fmt"

	"cnbd/internal/block"
)

// The stored form of the tree is a set of nodes. Numbers of fixed size are
// little-endian; a uvarint is the one of encoding/binary in its shortest form;
// a zigzag is a signed difference d as the uvarint of d<<1 ^ d>>63.
//
// A node:
//
//	offset size
//	 0     4    magic "CNMN"
//	 4     1    version of the node format, 1
//	 5     1    level: 0 for a leaf, else one more than its children's
//	 6     2    number of entries, at least 1
//	 8     8    lo: first block of the first entry
//	16     8    hi: block behind the last entry; at most 1<<52
//	24          entries, ascending, to the end of the node
//
// A node answers for [lo, hi) exactly. What no node answers for is a hole, and
// so is what no entry of a leaf covers: holes take no space. The node has no
// checksum of its own: the pointer to it has it.
//
// An entry is coded relative to the entry before it. For the first one, the
// entry before ends at lo, and its segments, offsets, codec and level are 0;
// a lost entry sets them to 0 too.
//
// An entry of a leaf (an extent):
//
//	size     present if   value
//	1                     flags: 1 lost, 2 gap, 4 part, 8 codec, 16 segment;
//	                      the other bits are 0
//	uvarint  gap          blocks between the entry before and this one, not 0
//	uvarint               blocks of the extent, not 0
//	  and, unless lost (which has no flag but gap):
//	1        part         first block of the blob that belongs to the extent
//	1        part         blocks of the blob, 1 to 32; without the flag the
//	                      extent is the whole blob
//	1        codec        codec, and
//	1        codec        its level; without the flag as before
//	zigzag   segment      segment less the segment before, not 0
//	uvarint  segment      offset in the segment; without the flag
//	zigzag   not segment  offset less the end of the blob before (mod 1<<32)
//	uvarint               stored bytes of the blob
//	4                     checksum
//
// An entry of an inner node (a child):
//
//	uvarint               blocks between the entry before and this one
//	uvarint               hi - lo of the child, not 0
//	uvarint               bytes of the child's node
//	  and for its one place if it is a leaf, for each of its two places if not:
//	zigzag                segment less the segment before (of the same place)
//	uvarint               if that is not 0: offset in the segment; else
//	zigzag                offset less the end of the node before (mod 1<<32)
//	4                     checksum
//
// The root, in the superblock, is of fixed size; all of it is 0 for an empty
// tree:
//
//	offset size
//	 0     4+4+4  first place: segment, offset, checksum
//	12     4+4+4  second place, 0 if the root is a leaf
//	24     2      bytes of the node
//	26     1      copies: 1 if the root is a leaf, else 2
//	27     1      height: levels of the tree
//	28     4      reserved, 0
//	32     8      extents in the tree
//	40     8      nodes in the tree
//	48     8      lo
//	56     8      hi
const (
	nodeMagic   = "CNMN"
	nodeVersion = 1

	nodeHeaderSize = 24

	// NodeSizeMax is the largest size of a node in bytes (rule R9). Damage of
	// one node loses no more than it holds, about 600 extents.
	NodeSizeMax = 8192

	// RootSize is the encoded size of a Root.
	RootSize = 64

	// BlobBlocksMax is the largest number of blocks in one blob: 128 KiB.
	BlobBlocksMax = 32

	// heightMax bounds what is believed of a stored height. Four levels are
	// enough for 16 TiB of single blocks.
	heightMax = 16

	flagLost    = 1 << 0
	flagGap     = 1 << 1
	flagPart    = 1 << 2
	flagCodec   = 1 << 3
	flagSegment = 1 << 4
	flagsKnown  = 1<<5 - 1
)

// ErrCorrupt marks bytes that are not what was written. The error that wraps it
// tells place, expected and found.
var ErrCorrupt = errors.New("corrupt")

// ErrUnreadable marks a node that the medium refuses to give, now and when it is
// asked again: a bad sector. What it held may be whole.
var ErrUnreadable = errors.New("unreadable")

// isLost reports whether err says that a node is not to be had, so that what it
// answers for is lost.
func isLost(err error) bool { return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnreadable) }

func corruptf(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, ErrCorrupt)...)
}

// A Place is where one copy of a node is.
type Place struct {
	Segment  uint32
	Offset   uint32 // of the node's first byte in that segment
	Checksum uint32 // CRC-32C of the node's bytes, seeded by the segment's identity
}

// A Pointer leads to a node: Places[:Copies] hold the same Length bytes. Leaves
// have one copy; inner nodes two, for an inner node lost is many extents lost.
type Pointer struct {
	Places [2]Place
	Copies uint8
	Length uint16 // bytes
}

// Copies is the number of places that a node of this level is stored in.
func Copies(level uint8) int {
	if level == 0 {
		return 1
	}
	return 2
}

// checkPointer tells what is wrong with p as pointer to a node of this level.
func checkPointer(p Pointer, level uint8) string {
	switch {
	case int(p.Copies) != Copies(level):
		return "wrong number of copies"
	case p.Length <= nodeHeaderSize || p.Length > NodeSizeMax:
		return "impossible length"
	case p.Copies == 1 && p.Places[1] != Place{}:
		return "a place that is not used"
	case p.Copies == 2 && p.Places[0].Segment == p.Places[1].Segment && p.Places[0].Offset == p.Places[1].Offset:
		return "both copies in one place"
	}
	return ""
}

// A Root is one state of the tree, for ever: nodes are never changed. The zero
// Root is the empty tree.
type Root struct {
	Pointer
	Height  uint8       // levels; 0 is the empty tree
	Keys    block.Range // what the root node answers for; all else is a hole
	Entries uint64      // extents
	Nodes   uint64      // nodes, each counted once
	// Entries and Nodes go on counting what was in a node that was found
	// unreadable, as the space accounting does.
}

// child is the root node as its parent would have it.
func (r Root) child() child { return child{r.Keys, r.Pointer} }

// Append appends the RootSize bytes of the encoded form of r to dst.
func (r Root) Append(dst []byte) []byte {
	le := binary.LittleEndian
	for _, p := range r.Places {
		dst = le.AppendUint32(dst, p.Segment)
		dst = le.AppendUint32(dst, p.Offset)
		dst = le.AppendUint32(dst, p.Checksum)
	}
	dst = le.AppendUint16(dst, r.Length)
	dst = append(dst, r.Copies, r.Height, 0, 0, 0, 0)
	dst = le.AppendUint64(dst, r.Entries)
	dst = le.AppendUint64(dst, r.Nodes)
	dst = le.AppendUint64(dst, uint64(r.Keys.Start))
	return le.AppendUint64(dst, uint64(r.Keys.End))
}

// DecodeRoot decodes the RootSize bytes that Append made. Any others are an
// error that wraps ErrCorrupt. data is borrowed.
func DecodeRoot(data []byte) (Root, error) {
	if len(data) != RootSize {
		return Root{}, corruptf("extents: root: expected %d bytes, found %d", RootSize, len(data))
	}
	le := binary.LittleEndian
	var r Root
	for i := range r.Places {
		p := data[12*i:]
		r.Places[i] = Place{le.Uint32(p), le.Uint32(p[4:]), le.Uint32(p[8:])}
	}
	r.Length, r.Copies, r.Height = le.Uint16(data[24:]), data[26], data[27]
	r.Entries, r.Nodes = le.Uint64(data[32:]), le.Uint64(data[40:])
	r.Keys = block.Range{Start: block.Index(le.Uint64(data[48:])), End: block.Index(le.Uint64(data[56:]))}
	switch reserved := le.Uint32(data[28:]); {
	case reserved != 0:
		return Root{}, corruptf("extents: root: expected reserved bytes of 0, found %#x", reserved)
	case r == Root{}:
		return r, nil
	case r.Height == 0 || r.Height > heightMax:
		return Root{}, corruptf("extents: root: expected a height of 1 to %d, found %d", heightMax, r.Height)
	case r.Keys.Empty() || r.Keys.End > keyEnd:
		return Root{}, corruptf("extents: root: expected a range of blocks within [0,%d), found %v", keyEnd, r.Keys)
	case r.Entries == 0 || r.Nodes < uint64(r.Height):
		return Root{}, corruptf("extents: root: expected extents, and a node for each of %d levels, found %d and %d", r.Height, r.Entries, r.Nodes)
	}
	if wrong := checkPointer(r.Pointer, r.Height-1); wrong != "" {
		return Root{}, corruptf("extents: root: %s: expected a node of level %d, found %+v", wrong, r.Height-1, r.Pointer)
	}
	return r, nil
}

// A child is an entry of an inner node.
type child struct {
	keys block.Range // that the node answers for, exactly
	Pointer
}

// Range is the blocks that the child answers for.
func (c child) Range() block.Range { return c.keys }

// restartEvery is the number of entries of a decoded node from one restart to
// the next: a lookup decodes half as many before the one it looks for, and the
// restarts cost 2 bytes for each entry.
const restartEvery = 16

// A node is a node as kept in memory: its stored bytes, proven well-formed, and
// restarts into them, for entries can only be decoded one after the other. So a
// node in memory is little larger than stored: about 15 bytes for an extent,
// where an Extent has 40. A node is immutable.
type node struct {
	level    uint8
	keys     block.Range
	count    int // entries
	data     []byte
	restarts []cursor // restarts[i] is in front of entry i*restartEvery
}

// nodeOverhead is the memory of a node beside its bytes and its restarts, with
// that of its cache entry and its share of the cache's map, in bytes.
const nodeOverhead = 256

// memory is the memory that n takes in bytes.
func (n *node) memory() int64 { return int64(cap(n.data) + cap(n.restarts)*32 + nodeOverhead) }

// decodeNode checks all of data, which it keeps, and makes a node of it. What is
// not exactly what encodeNode makes is an error that wraps ErrCorrupt.
func decodeNode(data []byte) (*node, error) {
	le := binary.LittleEndian
	if len(data) <= nodeHeaderSize || len(data) > NodeSizeMax {
		return nil, corruptf("node: expected %d to %d bytes, found %d", nodeHeaderSize+1, NodeSizeMax, len(data))
	}
	if magic := data[:4]; string(magic) != nodeMagic {
		return nil, corruptf("node: expected magic %q, found %q", nodeMagic, magic)
	}
	if data[4] != nodeVersion {
		return nil, corruptf("node: expected version %d, found %d", nodeVersion, data[4])
	}
	n := &node{
		level: data[5],
		count: int(le.Uint16(data[6:])),
		keys:  block.Range{Start: block.Index(le.Uint64(data[8:])), End: block.Index(le.Uint64(data[16:]))},
		data:  data,
	}
	switch {
	case n.level >= heightMax:
		return nil, corruptf("node: expected a level below %d, found %d", heightMax, n.level)
	case n.keys.Empty() || n.keys.End > keyEnd:
		return nil, corruptf("node: expected a range of blocks within [0,%d), found %v", keyEnd, n.keys)
	case n.count == 0 || n.count > len(data):
		return nil, corruptf("node: expected 1 to %d entries, found %d", len(data), n.count)
	}
	n.restarts = make([]cursor, 0, (n.count+restartEvery-1)/restartEvery)
	at := n.first()
	for i := range n.count {
		if i%restartEvery == 0 {
			n.restarts = append(n.restarts, at)
		}
		was := at
		var start block.Index
		var wrong string
		if n.level == 0 {
			var e Extent
			e, wrong = at.extent(data, n.keys.End)
			start = e.Start
		} else {
			var c child
			c, wrong = at.child(data, n.keys.End, n.level)
			start = c.keys.Start
		}
		if wrong == "" && i == 0 && start != n.keys.Start {
			wrong = "does not begin at the first block of the node"
		}
		if wrong != "" {
			return nil, corruptf("node of level %d for %v: entry %d of %d at byte %d, behind block %d: %s: found % x",
				n.level, n.keys, i, n.count, was.pos, was.end, wrong, data[was.pos:min(len(data), int(was.pos)+24)])
		}
	}
	if at.end != n.keys.End || int(at.pos) != len(data) {
		return nil, corruptf("node of level %d for %v: expected the last entry to end at block %d and byte %d, found block %d and byte %d",
			n.level, n.keys, n.keys.End, len(data), at.end, at.pos)
	}
	return n, nil
}

// encodeNode appends the stored form of a node with these entries, at least one
// and in order, to dst.
func encodeNode[T entry[T]](dst []byte, level uint8, entries []T) []byte {
	keys := block.Range{Start: entries[0].Range().Start, End: entries[len(entries)-1].Range().End}
	dst = append(dst, nodeMagic...)
	dst = append(dst, nodeVersion, level)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(entries)))
	dst = binary.LittleEndian.AppendUint64(dst, uint64(keys.Start))
	dst = binary.LittleEndian.AppendUint64(dst, uint64(keys.End))
	at := cursor{end: keys.Start}
	for _, e := range entries {
		dst = e.put(dst, &at)
		e.after(&at)
	}
	return dst
}

// An entry is an entry of a leaf (Extent) or of an inner node (child), as needed
// where both are treated alike.
type entry[T any] interface {
	Range() block.Range
	// put appends the coded form of the entry to dst, when it stands at c.
	put(dst []byte, c *cursor) []byte
	// after makes c the state that follows the entry. pos is left alone.
	after(c *cursor)
	// take decodes the entry at c of n, and moves c behind it.
	take(n *node, c *cursor) T
	// joined is the entry and next, which follows it, as one, if that can be.
	joined(next T) (T, bool)
}

// first is the cursor in front of the first entry.
func (n *node) first() cursor { return cursor{end: n.keys.Start, pos: nodeHeaderSize} }

// seek is the cursor in front of an entry, and its number, such that all entries
// before it end at or before block i, and few of those after it.
func (n *node) seek(i block.Index) (cursor, int) {
	lo, hi := 0, len(n.restarts)-1
	for lo < hi {
		mid := (lo + hi + 1) / 2
		if n.restarts[mid].end <= i {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return n.restarts[lo], lo * restartEvery
}

// extent decodes the entry at c of the leaf n and moves c behind it.
func (n *node) extent(c *cursor) Extent {
	e, wrong := c.extent(n.data, n.keys.End)
	if wrong != "" {
		panic("extents: a leaf that was proven well-formed: " + wrong)
	}
	return e
}

// child decodes the entry at c of the inner node n and moves c behind it.
func (n *node) child(c *cursor) child {
	e, wrong := c.child(n.data, n.keys.End, n.level)
	if wrong != "" {
		panic("extents: an inner node that was proven well-formed: " + wrong)
	}
	return e
}

// overlaps reports whether an entry of the leaf n has blocks in r.
func (n *node) overlaps(r block.Range) bool {
	at, i := n.seek(r.Start)
	for ; i < n.count && at.end < r.End; i++ {
		if n.extent(&at).Range().Overlaps(r) {
			return true
		}
	}
	return false
}

// A cursor is a position between two entries of a node, with all of the entry in
// front that the coding of the next depends on.
type cursor struct {
	end     block.Index // of the entry before; lo for the first entry
	segment [2]uint32   // of each place of the entry before
	offset  [2]uint32   // end of each place of the entry before (mod 1<<32)
	pos     uint16      // of the next entry's first byte
	codec   uint8
	level   uint8 // of the codec
}

// extent decodes the entry of a leaf at c, no part of which may be behind hi,
// and moves c behind it; or it tells what is wrong.
func (c *cursor) extent(data []byte, hi block.Index) (e Extent, wrong string) {
	in := reader{rest: data[c.pos:]}
	flags := in.byte()
	var gap uint64
	if flags&flagGap != 0 {
		gap = in.uvarint()
	}
	count := in.uvarint()
	switch {
	case flags&^flagsKnown != 0:
		return e, "unknown flags"
	case flags&flagGap != 0 && gap == 0:
		return e, "a gap of 0 blocks"
	case gap > uint64(hi-c.end) || count > uint64(hi-c.end)-gap:
		return e, "extent behind the end of the node"
	case count == 0:
		return e, "extent of 0 blocks"
	}
	e.Start, e.Count = c.end+block.Index(gap), block.Count(count)
	if flags&flagLost != 0 {
		e.Kind = Lost
		if flags&^(flagLost|flagGap) != 0 {
			return e, "lost extent with a blob"
		}
	} else {
		e.Kind = Data
		if wrong = c.blob(&in, flags, &e); wrong != "" {
			return e, wrong
		}
	}
	if in.failed {
		return e, "ends early or has a number that is not in the shortest form"
	}
	e.after(c)
	c.pos = uint16(len(data) - len(in.rest))
	return e, ""
}

// blob decodes the second half of a leaf's entry of kind Data.
func (c *cursor) blob(in *reader, flags byte, e *Extent) (wrong string) {
	a := &e.Addr
	if flags&flagPart != 0 {
		e.Skip, a.Blocks = in.byte(), in.byte()
		if e.Skip == 0 && block.Count(a.Blocks) == e.Count {
			return "a whole blob coded as a part"
		}
	} else {
		a.Blocks = uint8(min(e.Count, BlobBlocksMax))
	}
	if a.Blocks > BlobBlocksMax || e.Count > BlobBlocksMax || uint64(e.Skip)+uint64(e.Count) > uint64(a.Blocks) {
		return "extent larger than its blob"
	}
	a.Codec, a.Level = c.codec, c.level
	if flags&flagCodec != 0 {
		a.Codec, a.Level = in.byte(), in.byte()
		if a.Codec == c.codec && a.Level == c.level {
			return "the codec before coded as another"
		}
	}
	var segments int64
	if flags&flagSegment != 0 {
		if segments = in.zigzag(); segments == 0 {
			return "the segment before coded as another"
		}
	}
	wrong = c.place(in, 0, segments, &a.Segment, &a.Offset)
	length := in.uvarint()
	if wrong == "" && length != uint64(uint32(length)) {
		wrong = "blob too long"
	}
	a.Length, a.Checksum = uint32(length), in.uint32()
	return wrong
}

// child decodes the entry at c of an inner node of this level as extent does.
func (c *cursor) child(data []byte, hi block.Index, level uint8) (e child, wrong string) {
	in := reader{rest: data[c.pos:]}
	gap, span, length := in.uvarint(), in.uvarint(), in.uvarint()
	switch {
	case gap > uint64(hi-c.end) || span > uint64(hi-c.end)-gap:
		return e, "child behind the end of the node"
	case span == 0:
		return e, "child of 0 blocks"
	case length > NodeSizeMax:
		return e, "impossible length"
	}
	start := c.end + block.Index(gap)
	e.keys = block.Range{Start: start, End: start + block.Index(span)}
	e.Length, e.Copies = uint16(length), uint8(Copies(level-1))
	for i := range e.Places[:e.Copies] {
		p := &e.Places[i]
		if wrong = c.place(&in, i, in.zigzag(), &p.Segment, &p.Offset); wrong != "" {
			return e, wrong
		}
		p.Checksum = in.uint32()
	}
	if in.failed {
		return e, "ends early or has a number that is not in the shortest form"
	}
	if wrong = checkPointer(e.Pointer, level-1); wrong != "" {
		return e, wrong
	}
	e.after(c)
	c.pos = uint16(len(data) - len(in.rest))
	return e, ""
}

// place decodes the rest of place i, whose segment is d more than the one before.
func (c *cursor) place(in *reader, i int, d int64, segment, offset *uint32) (wrong string) {
	s := int64(c.segment[i]) + d
	var o int64
	if d == 0 {
		o = int64(c.offset[i]) + in.zigzag()
	} else {
		o = int64(min(in.uvarint(), 1<<32))
	}
	if s != int64(uint32(s)) || o != int64(uint32(o)) {
		return "place out of bounds"
	}
	*segment, *offset = uint32(s), uint32(o)
	return ""
}

func (e Extent) put(dst []byte, c *cursor) []byte {
	at := len(dst)
	dst = append(dst, 0)
	var flags byte
	if gap := e.Start - c.end; gap != 0 {
		flags |= flagGap
		dst = binary.AppendUvarint(dst, uint64(gap))
	}
	dst = binary.AppendUvarint(dst, uint64(e.Count))
	if e.Kind == Lost {
		dst[at] = flags | flagLost
		return dst
	}
	a := e.Addr
	if e.Skip != 0 || block.Count(a.Blocks) != e.Count {
		flags |= flagPart
		dst = append(dst, e.Skip, a.Blocks)
	}
	if a.Codec != c.codec || a.Level != c.level {
		flags |= flagCodec
		dst = append(dst, a.Codec, a.Level)
	}
	if d := int64(a.Segment) - int64(c.segment[0]); d != 0 {
		flags |= flagSegment
		dst = appendZigzag(dst, d)
		dst = binary.AppendUvarint(dst, uint64(a.Offset))
	} else {
		dst = appendZigzag(dst, int64(a.Offset)-int64(c.offset[0]))
	}
	dst = binary.AppendUvarint(dst, uint64(a.Length))
	dst[at] = flags
	return binary.LittleEndian.AppendUint32(dst, a.Checksum)
}

// after needs no case for Lost: its Addr is zero.
func (e Extent) after(c *cursor) {
	c.end = e.Start + block.Index(e.Count)
	c.segment[0], c.offset[0] = e.Addr.Segment, e.Addr.Offset+e.Addr.Length
	c.codec, c.level = e.Addr.Codec, e.Addr.Level
}

func (Extent) take(n *node, c *cursor) Extent { return n.extent(c) }

func (e Extent) joined(next Extent) (Extent, bool) {
	if !e.continues(next) {
		return e, false
	}
	e.Count += next.Count
	return e, true
}

func (c child) put(dst []byte, at *cursor) []byte {
	dst = binary.AppendUvarint(dst, uint64(c.keys.Start-at.end))
	dst = binary.AppendUvarint(dst, uint64(c.keys.Len()))
	dst = binary.AppendUvarint(dst, uint64(c.Length))
	for i, p := range c.Places[:c.Copies] {
		d := int64(p.Segment) - int64(at.segment[i])
		dst = appendZigzag(dst, d)
		if d != 0 {
			dst = binary.AppendUvarint(dst, uint64(p.Offset))
		} else {
			dst = appendZigzag(dst, int64(p.Offset)-int64(at.offset[i]))
		}
		dst = binary.LittleEndian.AppendUint32(dst, p.Checksum)
	}
	return dst
}

func (c child) after(at *cursor) {
	at.end = c.keys.End
	for i, p := range c.Places[:c.Copies] {
		at.segment[i], at.offset[i] = p.Segment, p.Offset+uint32(c.Length)
	}
}

func (child) take(n *node, c *cursor) child { return n.child(c) }

func (c child) joined(child) (child, bool) { return c, false }

// A reader takes numbers from the front of rest. Once failed, it gives zeros.
type reader struct {
	rest   []byte
	failed bool
}

func (r *reader) byte() byte {
	if len(r.rest) == 0 {
		r.failed = true
		return 0
	}
	b := r.rest[0]
	r.rest = r.rest[1:]
	return b
}

func (r *reader) uint32() uint32 {
	if len(r.rest) < 4 {
		r.failed, r.rest = true, nil
		return 0
	}
	v := binary.LittleEndian.Uint32(r.rest)
	r.rest = r.rest[4:]
	return v
}

// uvarint fails for a number that is not in its shortest form, so that nothing
// has two encodings.
func (r *reader) uvarint() uint64 {
	if len(r.rest) > 0 && r.rest[0] < 0x80 {
		return uint64(r.byte())
	}
	v, n := binary.Uvarint(r.rest)
	if n <= 0 || r.rest[n-1] == 0 {
		r.failed, r.rest = true, nil
		return 0
	}
	r.rest = r.rest[n:]
	return v
}

func (r *reader) zigzag() int64 {
	v := r.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

func appendZigzag(dst []byte, d int64) []byte {
	return binary.AppendUvarint(dst, uint64(d)<<1^uint64(d>>63))
}
