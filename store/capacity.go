package store

import (
	"fmt"
	"math/bits"

	"cnbd/internal/disk"
)

// segmentsWanted is into how many segments the data of a device is divided, about:
// enough that one that is partly dead ties up little, few enough that the table
// of them stays small.
const segmentsWanted = 512

// DefaultSegmentSize is the segment size of a store that holds up to size bytes:
// size/512, rounded down to a power of two, from 2 MiB, so that headers are half
// a percent, to [SegmentSizeMax].
func DefaultSegmentSize(size uint64) uint32 {
	const least = 2 << 20
	n := min(max(size/segmentsWanted, least), SegmentSizeMax)
	return 1 << (bits.Len64(n) - 1)
}

// DefaultCapacity is the capacity that a device of size bytes needs to take any
// data, compressible or not, in bytes: the size and the overhead, which is
//
//	an eighth of size      record headers (56 bytes for a lone block, 1.4 %), the
//	                       map and its two newest checkpoints, padding at commits,
//	                       blobs that are overwritten in part and not yet moved, and what makes
//	                       cleaning cheap: the fuller, the more is copied
//	dirtyMax               the largest dirty limit, for overwriting needs the new
//	                       place before the old one is free
//	2 * checkpoint         the log behind the two newest checkpoints, which cannot
//	                       be reused (rule R4)
//	18 segments            the one being written, its successor, the reserves of
//	                       commits and checkpoints and of the cleaner, and what
//	                       their ends leave unused
//
// rounded up to whole segments of segment bytes. It is a limit and takes no
// space by itself. size is at most [DeviceSizeMax].
func DefaultCapacity(size uint64, segment uint32, dirtyMax, checkpoint uint64) uint64 {
	s := uint64(segment)
	n := size + (size+7)/8 + dirtyMax + 2*checkpoint + 18*s
	return (n + s - 1) / s * s
}

// RecordOverhead is what a stored extent takes beside its stored bytes and its entry
// in the map: the header of its record.
const RecordOverhead = recordHeader

// MinCapacity is the smallest capacity that a store can work with, in bytes.
func MinCapacity(segment uint32) uint64 { return segmentsMin * uint64(segment) }

// FitCapacity is the largest capacity that fits into a backing of size bytes,
// such as a block device.
func FitCapacity(size uint64, segment uint32) uint64 {
	if size < segmentsOffset {
		return 0
	}
	return (size - segmentsOffset) / uint64(segment) * uint64(segment)
}

// ReadGeometry is what the store in f was made with. It reads the superblocks
// and nothing else, changes nothing, and leaves f open. The errors are those with
// which [Open] refuses: ErrNotStore, ErrVersion, or damage, which wraps ErrCorrupt.
func ReadGeometry(f disk.File) (Geometry, error) {
	sb, _, err := readSuperblocks(f, func(string, error) {})
	if err != nil {
		return Geometry{}, err
	}
	size, err := f.Size()
	if err != nil {
		return Geometry{}, fmt.Errorf("store: %w", err)
	}
	if uint64(size) < segmentsOffset {
		return Geometry{}, fmt.Errorf("store: the backing ends at byte %d, before the first segment: %w", size, ErrCorrupt)
	}
	return sb.Geometry, nil
}
