// Package pagecache holds the pages of a device: blocks read, and blocks written
// that are on their way to the store. One cache of bounded size serves both, and
// the payload of requests that are still being received.
//
// # Versions
//
// A frame of memory with its header is a version of one block. Published, it
// never changes again: a write publishes another version. So readers, the
// compressor and the socket share frames by reference, nobody waits for
// anybody's copy, and what the writeback encodes is stable. A block can have
//
//   - one visible version, the newest, which reads are answered from;
//   - one shadow: a version dirty in the frozen epoch which a write or trim of the
//     open epoch replaced before it was handed off. Only LockDirty finds it;
//   - detached versions, which only their holders know: those in writeback, those
//     pinned by readers.
//
// Visible versions and shadows are attached: they are in the index, a hash table
// in shards whose chains run through the headers. Header and frame have the same
// number and lie in one mapping without pointers.
//
// # Memory
//
// A frame of [block.Size] bytes has 44 beside it: its header of 40, and its link among
// the free frames. A block that may be cached has a bucket of the index, or up to two,
// of 8 bytes: the head of a chain and a ghost of the replacement policy, whose queues
// run through the headers. So a cached block takes 52 to 60 bytes beside its own, 1.3
// to 1.5 %, and one of payload 44. All of it lies outside the Go heap, and becomes
// resident when it is first used: frames 2 MiB at a time where the system has huge
// pages and they make 32 MiB or more, all else by pages.
//
// What is evicted is chosen by S3-FIFO, whose small queue, main queue and ghosts let
// scans pass and keep what is hot: see evict.go.
//
// # Life of a version
//
//	 ABSENT ──Get, TryClaim──▶ claimed ──Fill──▶ CLEAN ──evict──▶ ABSENT
//	                              └──Abandon──▶ ABSENT
//	 payload ──Install──▶ DIRTY ──LockDirty──▶ DIRTY, locked ──HandOff──▶ WRITEBACK
//	                                               └──UnlockDirty──▶ DIRTY
//	 WRITEBACK ──EndWriteback──▶ CLEAN        ──EndWriteback, error──▶ FAILED
//
//	what a write or a trim does to the visible version:
//	 DIRTY, same epoch    dropped (if it is locked, its flusher will see it in StillDirty)
//	 DIRTY, older epoch   becomes the shadow
//	 WRITEBACK            detached, its item goes on; when it ends the frame is free
//	 CLEAN, FAILED        dropped
//	 claim                withdrawn: its Fill publishes nothing
//
// A claim is what others call a locked page that is not up to date. It has no
// frame and needs none: Fill takes one, copies the bytes and puts the version in
// the place of the claim in one step, and only then are the waiters woken. There
// is no version that is not up to date.
//
// A pending hole is a range that was trimmed or zeroed, while the record that says
// so has not reached the extent map yet. Its blocks read as zeros.
//
// # Reading
//
// The caller of [Cache.Get] that is answered Claimed looks the block up in the
// extent map, reads, verifies and decodes it, with no lock at all, and calls Fill.
// For the neighbours that were decoded with it: TryClaim them, look the mapping
// up again, and Fill those that it still covers with the same blob; Abandon the
// others. What makes this right is the order claim, lookup, fill:
//
//   - What the map said after the claim was made is as new as every version that
//     was ever evicted before, because a version is evicted only when the map
//     has it (invariant 5), and until then it is in the index and nobody can claim.
//   - A write, trim or hole that comes after the claim withdraws the claim, so
//     nothing older is published over it, however late the Fill is, and whatever
//     has been written back and evicted meanwhile (invariant 4).
//
// The bytes of a Fill that came too late are still a correct answer for the
// reader that made the claim: the write overlaps its read in time.
//
// # Invariants
//
//  1. A block has at most one visible version and at most one shadow; a shadow is
//     dirty in an older epoch than every other version of its block that is not
//     in writeback.
//  2. Seen under the mutex of its shard, a block has at most one of: a visible
//     version, a claim. It has none of them when it lies in a pending hole, but
//     for the moment that InstallHole takes to sweep.
//  3. The bytes of a published version do not change before its last reference
//     is gone.
//  4. Fill publishes only in the place of the very claim that it fills.
//  5. Only clean, visible versions without a reference but that of the index are
//     evicted, and exactly the clean, visible ones are in a queue of the replacement
//     policy, once, in the shard of their block. EndWriteback
//     without an error is called when the extent map has the version.
//  6. cached + payload <= CacheBytes + PayloadBytes, cached exceeds CacheBytes
//     only through Install, and payload <= PayloadBytes minus that excess. So a
//     frame that was charged to the budget always exists.
//  7. charged = dirty + writeback + failed versions + admitted blocks.
//  8. A dirty version is let go by hand-off, or by a write or trim of the same
//     epoch, or by Close.
//  9. refs = attached (0 or 1) + locked (0 or 1) + writeback (0 or 1) + pins. It
//     rises from 1 only under the mutex of its shard.
//
// # Waiting and locks
//
// AdmitPayload, AllocPayload, BalanceDirty and WaitFill wait, nothing else does. Memory for
// payload comes back when requests are installed or given up, and the dirty limit
// falls when writeback ends; a reader never waits for memory: where no frame can
// be had, Fill publishes nothing. So readers cannot be part of a deadlock
// however small the cache is.
//
// Lock order, outermost first: a range locked by the caller in its state tree; the
// mutex of the payload gate; the mutex of one shard; the mutex of the pending
// holes. The mutex of the dirty gate is a leaf. The callback NeedWriteback is
// called with none of them.
package pagecache
