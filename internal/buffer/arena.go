package buffer

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// A Frame is the number of a frame in its Arena, counted from 1. The zero Frame
// is no frame.
type Frame uint32

// framesMax bounds an arena: 8 TiB of frames. The value above it, in a link,
// marks a frame that is in use.
const (
	framesMax = 1<<31 - 1
	linkInUse = 1 << 31
)

// hugeFramesMin is the size of frames, in bytes, from which on they lie in huge pages.
// Where those were measured a first touch cost a third, and a copy of a block or of a
// MiB out of 256 MiB took 6 to 25 % less time. In less than this the rest of a page
// that is not used yet would be a larger part.
const hugeFramesMin = 32 << 20

// An Arena is a fixed number of frames of [block.Size] bytes, each with a header
// of type H, in one mapping outside the Go heap. H must have no pointers: the
// garbage collector does not see them there. All methods but Close may be called
// concurrently, and none blocks.
//
// Free frames form a lock-free stack. Frames that were never used are not on it
// and are taken, in order, only when it is empty: so a cache that is not full
// occupies no memory for what it has not used yet, but for the rest of a huge page.
type Arena[H any] struct {
	// Immutable after NewArena.
	memory  []byte
	frames  []byte          // n frames; frame f is the (f-1)th
	headers []H             // n+1, so that a Frame is an index; header 0 is not used
	links   []atomic.Uint32 // n+1: the next free frame under f, or linkInUse

	// top is the uppermost free frame in the low half, and in the high half a
	// count of the changes of the stack: without it, a frame that was popped and
	// pushed again between the two looks of a third goroutine would let that
	// one install a next frame that is no longer free.
	top atomic.Uint64
	// used is the number of frames that have ever been given out.
	used atomic.Uint32
	// outstanding is the number of frames in use.
	outstanding atomic.Int64
}

// NewArena maps an arena of n frames; n must be positive.
func NewArena[H any](n int) (*Arena[H], error) {
	if n <= 0 || n > framesMax {
		return nil, fmt.Errorf("buffer: arena of %d frames: want 1 to %d", n, framesMax)
	}
	var h H
	frames := n * block.Size
	headers := (n + 1) * int(unsafe.Sizeof(h))
	headersEnd := (frames + headers + 7) &^ 7
	memory, err := mapMemory(headersEnd + (n+1)*4)
	if err != nil {
		return nil, err
	}
	// The frames alone: headers are small, and would take a whole one each time.
	if frames >= hugeFramesMin {
		useHugePages(memory[:frames])
	}
	return &Arena[H]{
		memory:  memory,
		frames:  memory[:frames:frames],
		headers: unsafe.Slice((*H)(unsafe.Pointer(&memory[frames])), n+1),
		links:   unsafe.Slice((*atomic.Uint32)(unsafe.Pointer(&memory[headersEnd])), n+1),
	}, nil
}

// Alloc takes a free frame; false if there is none. The content is undefined,
// the header is as its last owner left it, or zero.
func (a *Arena[H]) Alloc() (Frame, bool) {
	for {
		top := a.top.Load()
		if f := Frame(top); f != 0 {
			// The link may be that of a frame that has just been taken by
			// another: then the count has changed, and the swap fails.
			next := a.links[f].Load()
			if a.top.CompareAndSwap(top, restacked(top, next)) {
				invariants.Assertf(!invariants.Enabled || poisoned(a.Bytes(f)), "frame %d was written while it was free", f)
				return a.take(f), true
			}
			continue
		}
		if n := a.used.Load(); int(n) < a.Len() {
			if a.used.CompareAndSwap(n, n+1) {
				return a.take(Frame(n + 1)), true
			}
			continue
		}
		// Only if the stack has not changed since it was seen empty were there
		// no free frames at one moment.
		if a.top.Load() == top {
			return 0, false
		}
	}
}

func (a *Arena[H]) take(f Frame) Frame {
	a.links[f].Store(linkInUse)
	a.outstanding.Add(1)
	return f
}

// Free gives f back. The caller owns it and does not touch it any more.
func (a *Arena[H]) Free(f Frame) {
	if invariants.Enabled {
		poison(a.Bytes(f))
	}
	if !a.links[f].CompareAndSwap(linkInUse, 0) {
		panic(fmt.Sprintf("buffer: frame %d freed twice", f))
	}
	a.outstanding.Add(-1)
	for {
		top := a.top.Load()
		a.links[f].Store(uint32(top))
		if a.top.CompareAndSwap(top, restacked(top, uint32(f))) {
			return
		}
	}
}

// restacked is the word that follows top when f is the uppermost free frame.
func restacked(top uint64, f uint32) uint64 { return (top>>32+1)<<32 | uint64(f) }

// Bytes is the memory of f, borrowed while the caller owns or shares f.
func (a *Arena[H]) Bytes(f Frame) []byte {
	off := (int(f) - 1) * block.Size
	return a.frames[off : off+block.Size : off+block.Size]
}

// Header is the header of f. It exists whether f is in use or not, and keeps its
// value over Free and Alloc.
func (a *Arena[H]) Header(f Frame) *H { return &a.headers[f] }

// Len is the number of frames.
func (a *Arena[H]) Len() int { return len(a.links) - 1 }

// Used is the number of frames that have ever been in use: they are the frames 1
// to Used.
func (a *Arena[H]) Used() int { return int(a.used.Load()) }

// Outstanding is the number of frames in use.
func (a *Arena[H]) Outstanding() int { return int(a.outstanding.Load()) }

// Close gives the memory back to the system. Nobody may use the arena, a frame
// or a header any more.
func (a *Arena[H]) Close() error {
	if a.memory == nil {
		return errors.New("buffer: arena is closed")
	}
	m := a.memory
	a.memory, a.frames, a.headers, a.links = nil, nil, nil, nil
	return unmapMemory(m)
}
