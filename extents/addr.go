package extents

import "cnbd/internal/block"

// An Addr is the place and the form of one stored blob: the payload of one data
// record of the log.
type Addr struct {
	Segment  uint32 // segment of the store that holds the blob
	Offset   uint32 // of the payload's first byte in that segment
	Length   uint32 // stored bytes of the payload
	Checksum uint32 // CRC-32C of the stored bytes, seeded by the segment's identity
	Blocks   uint8  // blocks that the blob decodes to, 1 to 32
	Codec    uint8  // id of package compression
	Level    uint8  // level of the codec that made it
}

// A Kind tells what an Extent's blocks are.
type Kind uint8

const (
	// Hole blocks read as zeros and have no stored bytes.
	Hole Kind = iota
	// Data blocks are blocks Skip … of the blob at Addr.
	Data
	// Lost blocks were damaged on the medium: reading them is EIO until they
	// are written whole.
	Lost
)

// An Extent maps a run of blocks to where their bytes are. For kind Data,
// block Start+i is block Skip+i of the blob, and Skip+Count <= Addr.Blocks;
// Skip is not zero for a bookend, whose blob was overwritten in part. For Hole
// and Lost, Skip and Addr are zero.
type Extent struct {
	Start block.Index
	Count block.Count
	Kind  Kind
	Skip  uint8
	Addr  Addr
}

// Range is the blocks that e maps.
func (e Extent) Range() block.Range { return block.Span(e.Start, e.Count) }

// Clip is the part of e that lies in r, which must overlap e.
func (e Extent) Clip(r block.Range) Extent {
	x := e.Range().Intersect(r)
	if e.Kind == Data {
		e.Skip += uint8(x.Start - e.Start)
	}
	e.Start, e.Count = x.Start, x.Len()
	return e
}

// SameBlob reports whether e and o refer to one blob with one alignment, so
// that both can be filled from one decoding: the same place, and the same
// block of the device where the blob's first block would lie. Comparing the
// place alone returned wrong data in Btrfs three times over.
func (e Extent) SameBlob(o Extent) bool {
	return e.Kind == Data && o.Kind == Data && e.Addr == o.Addr &&
		e.Start-block.Index(e.Skip) == o.Start-block.Index(o.Skip)
}

// LiveBytes is the share of the blob's stored bytes that blocks [Skip,
// Skip+Count) account for. Shares are additive: however an extent is split, the
// shares of the parts add up to the share of the whole.
func (e Extent) LiveBytes() uint32 {
	if e.Kind != Data {
		return 0
	}
	n, l := uint64(e.Addr.Blocks), uint64(e.Addr.Length)
	return uint32((uint64(e.Skip)+uint64(e.Count))*l/n - uint64(e.Skip)*l/n)
}

// A Blob is what is to be stored as one unit: blocks [Start, Start+Count), of
// which those in Present are in the stored bytes, in order, and the others are
// zeros.
type Blob struct {
	Start   block.Index
	Count   uint8    // 1 to 32
	Present uint32   // bit i: block Start+i; not 0, and no bit from Count on
	Codec   uint8    // id of package compression
	Level   uint8    // of the codec
	Parts   [][]byte // the stored bytes are their concatenation
}
