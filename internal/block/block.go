// Package block has the integer types of everything below the door of the
// device: block numbers, block counts and half-open block ranges. The wire and
// package device speak in bytes; from the page cache downwards everything
// speaks in blocks of [Size] bytes, and the conversion stands here alone.
package block

import "fmt"

const (
	// Shift is log2 of [Size].
	Shift = 12
	// Size is the size of a block and of a cache page in bytes. It is the
	// page size of the common architectures and the block size that all
	// filesystems of interest use by default.
	Size = 1 << Shift
)

// An Index is the number of a block on the device, counted from 0.
type Index uint64

// A Count is a number of blocks.
type Count uint64

// Bytes is the byte offset of the first byte of block i.
func (i Index) Bytes() uint64 { return uint64(i) << Shift }

// Bytes is the size of c blocks in bytes.
func (c Count) Bytes() uint64 { return uint64(c) << Shift }

// CountFor is the number of blocks that hold n bytes, the last perhaps in part.
// n must be at most 1<<64 - Size.
func CountFor(n uint64) Count { return Count((n + Size - 1) >> Shift) }

// A Range is the half-open range of blocks [Start, End). The zero Range is empty.
type Range struct {
	Start, End Index
}

// Span is the range of n blocks that begins at start.
func Span(start Index, n Count) Range { return Range{start, start + Index(n)} }

// Covering is the smallest range of blocks that covers the bytes [off, off+n).
// It is empty for n == 0. off+n must not overflow.
func Covering(off, n uint64) Range {
	if n == 0 {
		return Range{}
	}
	return Range{Index(off >> Shift), Index((off + n + Size - 1) >> Shift)}
}

// Within is the largest range of whole blocks inside the bytes [off, off+n);
// empty when no block lies wholly inside. off+n must not overflow.
func Within(off, n uint64) Range {
	r := Range{Index((off + Size - 1) >> Shift), Index((off + n) >> Shift)}
	if r.End <= r.Start {
		return Range{}
	}
	return r
}

// Len is the number of blocks in r, 0 for an empty or inverted range.
func (r Range) Len() Count {
	if r.End <= r.Start {
		return 0
	}
	return Count(r.End - r.Start)
}

// Empty reports whether r has no blocks.
func (r Range) Empty() bool { return r.End <= r.Start }

// Contains reports whether block i lies in r.
func (r Range) Contains(i Index) bool { return r.Start <= i && i < r.End }

// Covers reports whether all of o lies in r. An empty o is covered by every range.
func (r Range) Covers(o Range) bool { return o.Empty() || r.Start <= o.Start && o.End <= r.End }

// Overlaps reports whether r and o have a block in common.
func (r Range) Overlaps(o Range) bool { return max(r.Start, o.Start) < min(r.End, o.End) }

// Intersect is the range of the blocks common to r and o, the zero Range if none.
func (r Range) Intersect(o Range) Range {
	x := Range{max(r.Start, o.Start), min(r.End, o.End)}
	if x.Empty() {
		return Range{}
	}
	return x
}

// String prints r as [start,end) in blocks.
func (r Range) String() string { return fmt.Sprintf("[%d,%d)", uint64(r.Start), uint64(r.End)) }
