// Package buffer has the memory of the data path: it lies outside the Go heap,
// is aligned to pages, bounded when it is made, and reused most recently freed
// first, because the first touch of a page of fresh memory costs several times
// what filling it costs.
//
// An [Arena] is N frames of one block each, with a small header for each frame,
// in one mapping; frames are named by number, so structures that refer to them
// hold no pointers and the garbage collector scans nothing. A [Pool] is a fixed
// number of larger buffers of one size.
//
// Invariants:
//
//  1. A frame or buffer is either free or has exactly one owner; freeing what is
//     free panics in every build.
//  2. Nobody touches memory that is free. In builds with invariants it is filled
//     with a pattern when it is freed, and the pattern is verified when it is
//     given out again.
//
// Under the race detector the memory comes from the Go heap, the only memory
// that the detector watches.
//
// Locks: the Arena has none; a Pool's mutex is a leaf.
package buffer

import "bytes"

// poisonByte fills free memory in builds with invariants.
const poisonByte = 0xDB

// poison copies the pattern over itself, twice as far each time: a loop over
// bytes is a hundred times slower under the race detector.
func poison(b []byte) {
	if len(b) > 0 {
		b[0] = poisonByte
	}
	for n := 1; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

// poisoned reports whether all of b still has the pattern. Comparing b with
// itself, one byte further, is one pass at the speed of memory.
func poisoned(b []byte) bool {
	return len(b) == 0 || b[0] == poisonByte && bytes.Equal(b[:len(b)-1], b[1:])
}
