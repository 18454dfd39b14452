// Package extents has the interval structures of a device: what is going on
// with its blocks, and where their bytes are stored. All of them work on
// half-open [block.Range]s and hold runs, never single blocks, so that a range
// of 16 TiB costs as much as one block.
//
// # StateTree
//
// A [StateTree] tells which ranges of the device have which [Bits]:
//
//	block     0       4       8       12  14  16      20
//	Delalloc  |---------------|       |-------|
//	DirtyHole                                 |-------|
//	Locked            |-------------------|
//	          |       |       |       |   |   |       |
//	states    |   D   |  LD   |   L   |LD | D |   H   |
//
// It is the range lock of the device (Locked, exclusive and sleeping) and its
// account of work to do (Delalloc, DirtyHole) in one structure, so that the holder
// of a range can take the lock off and change what is left to do in one step.
//
// Invariants:
//
//  1. States are disjoint, ordered and not empty; each has at least one bit.
//  2. Adjacent states with equal bits are merged, but a state that carries
//     Locked is never merged with a neighbour.
//  3. The counters are the sums of the lengths of the states.
//  4. A locked block has exactly one owner.
//  5. One owner locks ranges in ascending order only.
//  6. Whoever waits, waits for a block that is locked now.
//
// # Map
//
// The map of logical blocks to stored ones is an [Overlay] of new extents over a
// copy-on-write, paged [Tree] of stored ones. Lookups ask the overlay first;
// checkpoints merge it into the tree.
//
// # Lock order
//
// A locked range of a StateTree is outermost, and ranges are locked in ascending
// order; the StateTree's mutex is a leaf: nothing is called, and no other lock
// taken, under it. Waiting for a range is waiting without the mutex.
package extents
