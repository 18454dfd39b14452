package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/google/uuid"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/mutant"
)

// The format of a store, version 1. docs/format.md describes it for people;
// here each structure has its byte table, its encoder and its decoder side by
// side. All integers are little-endian, all sizes in bytes, all reserved bytes
// are zero and checked.
//
//	offset        length        what
//	0             4096          superblock slot 0
//	65536         4096          superblock slot 1
//	1 MiB + i*S   S             segment i, S being the segment size
//
// A segment:
//
//	0             4096          segment header
//	4096          4096          the same header again
//	8192          …             records, packed to the byte, up to a border of
//	                            4096 at each commit; padding is zero bytes

const (
	// Version is the format that this package writes and reads.
	Version = 1

	// SegmentSizeMin and SegmentSizeMax bound the size of a segment, a power of two.
	SegmentSizeMin = 256 << 10
	SegmentSizeMax = 64 << 20

	// ExtentBlocksMax is the largest number of blocks in one blob: 128 KiB, as
	// in Btrfs (its BTRFS_MAX_UNCOMPRESSED), and the width of the record's
	// presence bitmap.
	ExtentBlocksMax = 32

	// DeviceSizeMax is the largest size of a device: 2^60 bytes, so that sums of
	// two offsets never overflow.
	DeviceSizeMax = 1 << 60

	superblockSize   = 4096
	superblockStride = 64 << 10 // distance of the two slots: other sectors, other flash pages
	segmentsOffset   = 1 << 20
	segmentHeader    = 4096
	segmentData      = 2 * segmentHeader // offset of the first record in a segment
	recordHeader     = 56
	commitPayload    = 24
	alignment        = 4096 // commits are padded to it: no committed block is written again

	noSegment = ^uint32(0)
)

var (
	superMagic   = [8]byte{'C', 'N', 'B', 'D', 's', 'u', 'p', 0x1a}
	segmentMagic = [8]byte{'C', 'N', 'B', 'D', 's', 'e', 'g', 0x1a}
)

const recordMagic = uint32('C') | uint32('r')<<8 | uint32('e')<<16 | uint32('c')<<24

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is wrapped by every error that says that bytes on the medium are
// not those that were written. It is the marker of package extents, whose nodes
// have it too.
var ErrCorrupt = extents.ErrCorrupt

// ErrNotStore says that a file has never been a store.
var ErrNotStore = errors.New("not a cnbd store")

// ErrVersion says that a store has a format that this program does not know.
var ErrVersion = errors.New("unknown format version")

// A recordType tells what a record of the log is.
type recordType uint8

const (
	recordData   recordType = 1 // a blob: the stored bytes of up to 32 blocks
	recordHole   recordType = 2 // a range that reads as zeros from here on; no payload
	recordCommit recordType = 3 // closes an epoch
	recordNode   recordType = 4 // a node of the extent map
	recordUsage  recordType = 5 // a part of the segment table
	recordTrims  recordType = 6 // the trims not yet worked into the map
	recordSuper  recordType = 7 // a copy of the superblock that is about to be written
)

// A Geometry is what is fixed when a store is made, or changed by a resize.
type Geometry struct {
	UUID         uuid.UUID
	DeviceSize   uint64 // bytes that the device shows, a multiple of 512
	Capacity     uint64 // bytes of segments that may be used at most
	SegmentSize  uint32 // bytes, a power of two
	ExtentBlocks uint32 // blocks of an extent at most, a power of two up to ExtentBlocksMax
	Codec        uint8  // default codec and level for new data, ids of package compression
	Level        uint8
	DirtyMax     uint64 // the largest dirty limit that a server may use, in bytes (rule R8)
}

// geometrySize is the size of an encoded geometry without its UUID:
//
//	0     8   device size
//	8     8   capacity
//	16    4   segment size
//	20    4   blocks of an extent
//	24    1   default codec
//	25    1   default level
//	26    6   reserved
//	32    8   largest dirty limit
const geometrySize = 40

func (g *Geometry) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, g.DeviceSize)
	le.PutUint64(b[8:], g.Capacity)
	le.PutUint32(b[16:], g.SegmentSize)
	le.PutUint32(b[20:], g.ExtentBlocks)
	b[24], b[25] = g.Codec, g.Level
	le.PutUint64(b[32:], g.DirtyMax)
}

// decodeGeometry decodes all but the UUID, and says whether it is sound.
func decodeGeometry(b []byte) (g Geometry, err error) {
	le := binary.LittleEndian
	g = Geometry{
		DeviceSize: le.Uint64(b), Capacity: le.Uint64(b[8:]),
		SegmentSize: le.Uint32(b[16:]), ExtentBlocks: le.Uint32(b[20:]),
		Codec: b[24], Level: b[25], DirtyMax: le.Uint64(b[32:]),
	}
	if !allZero(b[26:32]) {
		return g, errors.New("reserved bytes are not zero")
	}
	return g, g.Validate()
}

// Segments is the number of segments that the capacity allows.
func (g *Geometry) Segments() uint32 { return uint32(g.Capacity / uint64(g.SegmentSize)) }

// Blocks is the number of blocks of the device, the last perhaps partly used.
func (g *Geometry) Blocks() block.Count { return block.CountFor(g.DeviceSize) }

// Validate reports all faults of g together.
func (g *Geometry) Validate() error {
	var errs []error
	if g.DeviceSize == 0 || g.DeviceSize%512 != 0 || g.DeviceSize > DeviceSizeMax {
		errs = append(errs, fmt.Errorf("device size %d: want a multiple of 512 from 512 to 2^60", g.DeviceSize))
	}
	if s := g.SegmentSize; s < SegmentSizeMin || s > SegmentSizeMax || s&(s-1) != 0 {
		errs = append(errs, fmt.Errorf("segment size %d: want a power of two from %d to %d", s, SegmentSizeMin, SegmentSizeMax))
	} else {
		if n := g.Capacity / uint64(s); n < segmentsMin || n >= uint64(noSegment) {
			errs = append(errs, fmt.Errorf("capacity %d: want %d to 2^32-2 segments of %d bytes", g.Capacity, segmentsMin, s))
		}
	}
	if e := g.ExtentBlocks; e == 0 || e > ExtentBlocksMax || e&(e-1) != 0 {
		errs = append(errs, fmt.Errorf("extent of %d blocks: want a power of two up to %d", e, ExtentBlocksMax))
	}
	return errors.Join(errs...)
}

// A position is a place in the log.
type position struct {
	segment uint32
	offset  uint32 // in the segment; 0: before the segment's header
	serial  uint64 // of the segment; 0 with segment 0: the log is empty
}

// A blobRef points to a record of the store's own, by its payload.
type blobRef struct {
	segment, offset, length, checksum uint32
}

// A superblock is one checkpoint: everything that opening needs to know.
//
//	0     8   magic "CNBDsup" 0x1a
//	8     4   format version
//	12    4   reserved
//	16    16  UUID of the store
//	32    40  geometry
//	72    8   sequence number of the checkpoint; it lies in slot (number mod 2)
//	80    8   epoch of the commit whose state this is
//	88    4   replay starts here: segment,
//	92    4     offset,
//	96    8     serial of the segment
//	104   16  segment table: last record of its chain (segment, offset, length, checksum)
//	120   16  pending trims: record (length 0: none)
//	136   64  root of the extent map (package extents)
//	200   4   seed of the checksums in the segment of the segment table's last record
//	204   4   the same of the pending trims; both for when its header is lost
//	208   24  reserved
//	232   8   entries of the segment table
//	240   8   copies of map nodes that are referred to
//	248   8   bytes of them
//	256   1   log2 of the blocks of a region (0: all of the device is touched)
//	257   7   reserved
//	264   1024 bitmap of the regions that were touched since they were recompressed
//	1288 1024 bitmap of the regions that were recompressed and are to be packed
//	2312  …   reserved
//	4092  4   CRC-32C of bytes 0 to 4091
type superblock struct {
	Geometry
	sequence uint64
	epoch    uint64
	replay   position
	usage    blobRef
	trims    blobRef
	root     extents.Root
	seeds    [2]uint32 // of the segments of usage and trims
	segments uint64
	nodes    nodeTotals

	touchedShift   uint8
	touched, loose [touchedSize]byte
}

// nodeTotals are what the nodes of the map take: the copies, and their bytes.
type nodeTotals struct{ copies, bytes uint64 }

const (
	superRoot     = 136
	superRootSize = 64
	superFields   = 256 // what a record of type recordSuper holds: all but hints
)

// The encoded root must fit into its place.
var _ [superRootSize - extents.RootSize]struct{}

func (sb *superblock) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, superblockSize)
	copy(b, superMagic[:])
	le.PutUint32(b[8:], Version)
	copy(b[16:], sb.UUID[:])
	sb.Geometry.encode(b[32:])
	le.PutUint64(b[72:], sb.sequence)
	le.PutUint64(b[80:], sb.epoch)
	le.PutUint32(b[88:], sb.replay.segment)
	le.PutUint32(b[92:], sb.replay.offset)
	le.PutUint64(b[96:], sb.replay.serial)
	putBlobRef(b[104:], sb.usage)
	putBlobRef(b[120:], sb.trims)
	sb.root.Append(b[:superRoot])
	le.PutUint32(b[200:], sb.seeds[0])
	le.PutUint32(b[204:], sb.seeds[1])
	le.PutUint64(b[232:], sb.segments)
	le.PutUint64(b[240:], sb.nodes.copies)
	le.PutUint64(b[248:], sb.nodes.bytes)
	b[256] = sb.touchedShift
	copy(b[264:], sb.touched[:])
	copy(b[264+touchedSize:], sb.loose[:])
	le.PutUint32(b[4092:], crc32.Checksum(b[:4092], castagnoli))
	return b
}

// decodeSuperblock decodes one slot. ErrNotStore: there is no magic; ErrVersion;
// ErrCorrupt: it is a superblock, and damaged.
func decodeSuperblock(b []byte) (*superblock, error) {
	le := binary.LittleEndian
	if len(b) < superblockSize || !bytes.Equal(b[:8], superMagic[:]) {
		return nil, ErrNotStore
	}
	if got, want := crc32.Checksum(b[:4092], castagnoli), le.Uint32(b[4092:]); got != want {
		return nil, fmt.Errorf("superblock: checksum %08x, want %08x: %w", got, want, ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != Version {
		return nil, fmt.Errorf("format %d, this program knows %d, a newer cnbd does: %w", v, Version, ErrVersion)
	}
	if !allZero(b[257:264]) || !allZero(b[264+2*touchedSize:4092]) {
		return nil, fmt.Errorf("superblock: reserved bytes are not zero: %w", ErrCorrupt)
	}
	sb, err := decodeSuperFields(b)
	if err != nil {
		return nil, err
	}
	sb.touchedShift = b[256]
	copy(sb.touched[:], b[264:])
	copy(sb.loose[:], b[264+touchedSize:])
	return sb, nil
}

// decodeSuperFields decodes the first superFields bytes of a superblock, which are
// known to be what was written.
func decodeSuperFields(b []byte) (*superblock, error) {
	le := binary.LittleEndian
	g, err := decodeGeometry(b[32:])
	if err != nil {
		return nil, fmt.Errorf("superblock: %w: %w", ErrCorrupt, err)
	}
	sb := &superblock{
		Geometry: g,
		sequence: le.Uint64(b[72:]),
		epoch:    le.Uint64(b[80:]),
		replay:   position{le.Uint32(b[88:]), le.Uint32(b[92:]), le.Uint64(b[96:])},
		usage:    getBlobRef(b[104:]),
		trims:    getBlobRef(b[120:]),
		seeds:    [2]uint32{le.Uint32(b[200:]), le.Uint32(b[204:])},
		segments: le.Uint64(b[232:]),
		nodes:    nodeTotals{le.Uint64(b[240:]), le.Uint64(b[248:])},
	}
	copy(sb.UUID[:], b[16:32])
	root, err := extents.DecodeRoot(b[superRoot : superRoot+extents.RootSize])
	if err != nil {
		return nil, fmt.Errorf("superblock: root: %w", err)
	}
	sb.root = root
	if n := sb.Segments(); sb.replay.segment >= n || sb.segments > uint64(n) || sb.replay.offset > sb.SegmentSize {
		return nil, fmt.Errorf("superblock: replay from segment %d of %d: %w", sb.replay.segment, n, ErrCorrupt)
	}
	if !allZero(b[12:16]) || !allZero(b[208:232]) {
		return nil, fmt.Errorf("superblock: reserved bytes are not zero: %w", ErrCorrupt)
	}
	return sb, nil
}

func putBlobRef(b []byte, r blobRef) {
	le := binary.LittleEndian
	le.PutUint32(b, r.segment)
	le.PutUint32(b[4:], r.offset)
	le.PutUint32(b[8:], r.length)
	le.PutUint32(b[12:], r.checksum)
}

func getBlobRef(b []byte) blobRef {
	le := binary.LittleEndian
	return blobRef{le.Uint32(b), le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint32(b[12:])}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// A segmentHead is the header of a segment: who the segment is, which one comes
// after it in the log, and where the log ended in the one before it.
//
//	0     8   magic "CNBDseg" 0x1a
//	8     4   format version
//	12    4   number of this segment
//	16    16  UUID of the store
//	32    8   life: a random number drawn at each opening of the store
//	40    8   serial: counts the segments of the log, never used twice in one life
//	48    4   number of the segment that the log goes on in
//	52    4   number of the segment before (2^32-1: none, this is the log's first)
//	56    8   its serial
//	64    8   its life
//	72    4   offset in it at which the log ended
//	76    4   reserved
//	80    8   newest durable epoch when this header was made
//	88    40  geometry of the store, for a repair without superblocks
//	128   …   reserved
//	4092  4   CRC-32C of bytes 0 to 4091
//
// Bytes 8 to 47 are the segment's identity; their CRC-32C is the seed of every
// other checksum in the segment, so a record of another store, another place or
// an earlier life of the place has a wrong checksum (rule R2).
type segmentHead struct {
	number  uint32
	life    uint64
	serial  uint64
	next    uint32
	prev    uint32
	pserial uint64
	plife   uint64
	pend    uint32
	durable uint64
}

func (h *segmentHead) encode(b []byte, store *Geometry) {
	le := binary.LittleEndian
	clear(b[:segmentHeader])
	copy(b, segmentMagic[:])
	le.PutUint32(b[8:], Version)
	le.PutUint32(b[12:], h.number)
	copy(b[16:], store.UUID[:])
	le.PutUint64(b[32:], h.life)
	le.PutUint64(b[40:], h.serial)
	le.PutUint32(b[48:], h.next)
	le.PutUint32(b[52:], h.prev)
	le.PutUint64(b[56:], h.pserial)
	le.PutUint64(b[64:], h.plife)
	le.PutUint32(b[72:], h.pend)
	le.PutUint64(b[80:], h.durable)
	store.encode(b[88 : 88+geometrySize])
	le.PutUint32(b[4092:], crc32.Checksum(b[:4092], castagnoli))
}

// decodeSegmentHead decodes a header of segment number of the store, and says
// whether it is one.
func decodeSegmentHead(b []byte, store uuid.UUID, number uint32) (h segmentHead, ok bool) {
	le := binary.LittleEndian
	if len(b) < segmentHeader || !bytes.Equal(b[:8], segmentMagic[:]) || le.Uint32(b[8:]) != Version ||
		le.Uint32(b[12:]) != number || !bytes.Equal(b[16:32], store[:]) ||
		crc32.Checksum(b[:4092], castagnoli) != le.Uint32(b[4092:]) {
		return h, false
	}
	return segmentHead{
		number: number, life: le.Uint64(b[32:]), serial: le.Uint64(b[40:]), next: le.Uint32(b[48:]),
		prev: le.Uint32(b[52:]), pserial: le.Uint64(b[56:]), plife: le.Uint64(b[64:]), pend: le.Uint32(b[72:]),
		durable: le.Uint64(b[80:]),
	}, true
}

// identitySeed is the seed of all checksums in the segment.
func identitySeed(store uuid.UUID, number uint32, life, serial uint64) uint32 {
	var b [40]byte
	le := binary.LittleEndian
	le.PutUint32(b[0:], Version)
	le.PutUint32(b[4:], number)
	copy(b[8:], store[:])
	if !mutant.Is(mutant.StaleLife) {
		le.PutUint64(b[24:], life)
		le.PutUint64(b[32:], serial)
	}
	return crc32.Checksum(b[:], castagnoli)
}

// A header is the header of a record.
//
//	0     4   magic "Crec"
//	4     1   type
//	5     1   codec                        (data)
//	6     1   level of the codec           (data)
//	7     1   reserved
//	8     8   epoch that the record belongs to
//	16    8   newest durable epoch when it was made
//	24    8   first block                  (data, hole)
//	32    4   number of blocks             (data)
//	36    4   bitmap of the blocks that the blob holds; bit i is block first+i.
//	          The others are holes         (data)
//	32    8   number of blocks             (hole)
//	40    4   length of the payload
//	44    4   CRC-32C of the payload, seeded by the segment's identity
//	48    4   offset of this record in the segment
//	52    4   CRC-32C of bytes 0 to 51, seeded by the segment's identity
//	56    …   payload
//
// Fields that a type does not use are zero.
type header struct {
	kind     recordType
	codec    uint8
	level    uint8
	epoch    uint64
	durable  uint64
	start    block.Index
	count    block.Count // of a data record: at most ExtentBlocksMax
	present  uint32
	length   uint32
	checksum uint32
	offset   uint32
}

func (h *header) encode(b []byte, seed uint32) (sum uint32) {
	le := binary.LittleEndian
	b = b[:recordHeader]
	le.PutUint32(b, recordMagic)
	b[4], b[5], b[6], b[7] = byte(h.kind), h.codec, h.level, 0
	le.PutUint64(b[8:], h.epoch)
	le.PutUint64(b[16:], h.durable)
	le.PutUint64(b[24:], uint64(h.start))
	if h.kind == recordData {
		le.PutUint32(b[32:], uint32(h.count))
		le.PutUint32(b[36:], h.present)
	} else {
		le.PutUint64(b[32:], uint64(h.count))
	}
	le.PutUint32(b[40:], h.length)
	le.PutUint32(b[44:], h.checksum)
	le.PutUint32(b[48:], h.offset)
	sum = crc32.Update(seed, castagnoli, b[:52])
	le.PutUint32(b[52:], sum)
	return sum
}

// decodeHeader decodes the record header at offset of a segment with that seed;
// sum is its checksum, which goes into the epoch's running checksum. It checks
// the header alone, not that the record fits its segment and its device.
func decodeHeader(b []byte, seed, offset uint32) (h header, sum uint32, err error) {
	le := binary.LittleEndian
	if len(b) < recordHeader || le.Uint32(b) != recordMagic {
		return h, 0, fmt.Errorf("no record: %w", ErrCorrupt)
	}
	sum = crc32.Update(seed, castagnoli, b[:52])
	if want := le.Uint32(b[52:]); sum != want {
		return h, 0, fmt.Errorf("record header: checksum %08x, want %08x: %w", sum, want, ErrCorrupt)
	}
	h = header{
		kind: recordType(b[4]), codec: b[5], level: b[6],
		epoch: le.Uint64(b[8:]), durable: le.Uint64(b[16:]), start: block.Index(le.Uint64(b[24:])),
		length: le.Uint32(b[40:]), checksum: le.Uint32(b[44:]), offset: le.Uint32(b[48:]),
	}
	ok := b[7] == 0 && h.offset == offset && h.durable < h.epoch
	switch h.kind {
	case recordData:
		h.count, h.present = block.Count(le.Uint32(b[32:])), le.Uint32(b[36:])
		ok = ok && h.count >= 1 && h.count <= ExtentBlocksMax && h.present != 0 && uint64(h.present)>>h.count == 0 && h.length > 0
	case recordHole:
		h.count = block.Count(le.Uint64(b[32:]))
		ok = ok && h.count >= 1 && h.length == 0
	case recordCommit:
		ok = ok && h.length == commitPayload
	case recordNode, recordUsage, recordTrims:
		ok = ok && h.length > 0
	case recordSuper:
		ok = ok && h.length == superFields
	default:
		ok = false
	}
	if h.kind != recordData && h.kind != recordHole {
		ok = ok && h.start == 0 && le.Uint64(b[32:]) == 0
	}
	if h.kind != recordData {
		ok = ok && h.codec == 0 && h.level == 0
	}
	// A sum of two of these cannot overflow after this check.
	ok = ok && h.start <= DeviceSizeMax>>block.Shift && h.count <= DeviceSizeMax>>block.Shift
	if !ok {
		return h, 0, fmt.Errorf("record header: fields out of range: %w", ErrCorrupt)
	}
	return h, sum, nil
}

// A tally sums up the records of one epoch, in log order, without its commit
// record. It is the payload of that (rule R1):
//
//	0     8   number of records
//	8     8   bytes of their headers and payloads
//	16    4   CRC-32C of the checksums of their headers, each 4 bytes
//	20    4   reserved
type tally struct {
	count, bytes uint64
	running      uint32
}

func (t *tally) add(headerSum, length uint32) {
	// What crc32.Update does to four bytes, which it would have allocated.
	sum := ^t.running
	for range 4 {
		sum = castagnoli[byte(sum^headerSum)] ^ sum>>8
		headerSum >>= 8
	}
	t.running = ^sum
	t.count++
	t.bytes += recordHeader + uint64(length)
}

func (t tally) encode() []byte {
	b := make([]byte, commitPayload)
	le := binary.LittleEndian
	le.PutUint64(b, t.count)
	le.PutUint64(b[8:], t.bytes)
	le.PutUint32(b[16:], t.running)
	return b
}

func decodeTally(b []byte) (tally, error) {
	le := binary.LittleEndian
	if len(b) != commitPayload || !allZero(b[20:]) {
		return tally{}, fmt.Errorf("commit record: bad payload: %w", ErrCorrupt)
	}
	return tally{le.Uint64(b), le.Uint64(b[8:]), le.Uint32(b[16:])}, nil
}

// The segment table is a chain of usage records, each pointing to the one
// before. Their payload:
//
//	0     16  the record before (length 0: none)
//	16    4   number of entries
//	20    …   entries of 40 bytes, ascending by segment
//
// An entry:
//
//	0     4   segment
//	4     4   seed of its checksums
//	8     8   serial
//	16    8   live references: blocks of data and copies of nodes
//	24    8   live bytes
//	32    8   checkpoint from which on nothing in it is referenced (0: it is)
const (
	usageHead  = 20
	usageEntry = 40
	usageBatch = 1024 // entries of a record at most: 40 KiB
)

func putUsageEntry(b []byte, n uint32, s *segment) {
	le := binary.LittleEndian
	le.PutUint32(b, n)
	le.PutUint32(b[4:], s.seed)
	le.PutUint64(b[8:], s.serial)
	le.PutUint64(b[16:], s.refs)
	le.PutUint64(b[24:], s.bytes)
	le.PutUint64(b[32:], s.emptyAt)
}

func decodeUsage(b []byte, visit func(n uint32, s segment) error) (prev blobRef, err error) {
	le := binary.LittleEndian
	if len(b) < usageHead {
		return prev, fmt.Errorf("segment table: short record: %w", ErrCorrupt)
	}
	prev = getBlobRef(b)
	n := int(le.Uint32(b[16:]))
	if n > usageBatch || len(b) != usageHead+n*usageEntry {
		return prev, fmt.Errorf("segment table: %d entries in %d bytes: %w", n, len(b), ErrCorrupt)
	}
	for i := range n {
		e := b[usageHead+i*usageEntry:]
		s := segment{state: segmentUsed, seed: le.Uint32(e[4:]), serial: le.Uint64(e[8:]),
			refs: le.Uint64(e[16:]), bytes: le.Uint64(e[24:]), emptyAt: le.Uint64(e[32:])}
		if err := visit(le.Uint32(e), s); err != nil {
			return prev, err
		}
	}
	return prev, nil
}
