package buffer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"unsafe"

	"cnbd/internal/block"
	"cnbd/internal/invariants"
)

// A Pool is a fixed number of page-aligned buffers of one size, in one mapping
// outside the Go heap: for scratch memory and the buffers of a log, 64 KiB to
// 1 MiB each. All methods but Close may be called concurrently.
type Pool struct {
	// Immutable after NewPool.
	memory []byte
	size   int // bytes of a buffer
	stride int // size rounded up to pages

	// tokens has one token for each free buffer: whoever has received one
	// finds a buffer on the stack. Waiting on it is fair and can be cancelled.
	tokens chan struct{}

	mu struct {
		sync.Mutex
		free []int32 // stack of free buffers
		used []bool  // by buffer: given out
	}
}

// NewPool maps count buffers of size bytes each. They become resident when they
// are first used.
func NewPool(size, count int) (*Pool, error) {
	if size <= 0 || count <= 0 {
		return nil, fmt.Errorf("buffer: pool of %d buffers of %d bytes", count, size)
	}
	stride := (size + block.Size - 1) &^ (block.Size - 1)
	memory, err := mapMemory(stride * count)
	if err != nil {
		return nil, err
	}
	p := &Pool{memory: memory, size: size, stride: stride, tokens: make(chan struct{}, count)}
	p.mu.used = make([]bool, count)
	for i := count - 1; i >= 0; i-- {
		p.mu.free = append(p.mu.free, int32(i))
		p.tokens <- struct{}{}
		if invariants.Enabled {
			poison(p.buffer(i))
		}
	}
	return p, nil
}

// Get waits for a free buffer and gives it to the caller, who gives it back with
// Put. Its length and capacity are Size, its content is undefined. The error is
// the context's.
func (p *Pool) Get(ctx context.Context) ([]byte, error) {
	select {
	case <-p.tokens:
		return p.pop(), nil
	default:
	}
	select {
	case <-p.tokens:
		return p.pop(), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// TryGet is Get without waiting: nil if no buffer is free.
func (p *Pool) TryGet() []byte {
	select {
	case <-p.tokens:
		return p.pop()
	default:
		return nil
	}
}

// Put gives back b, which Get or TryGet gave out; b may have been cut at its end
// but not at its beginning. Nobody may touch it afterwards. Memory of others, or
// given back before, panics.
func (p *Pool) Put(b []byte) {
	off := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) - uintptr(unsafe.Pointer(unsafe.SliceData(p.memory))))
	i := off / p.stride
	if off < 0 || off >= len(p.memory) || off%p.stride != 0 {
		panic("buffer: Put of memory that is not of this pool")
	}
	if invariants.Enabled {
		poison(p.buffer(i))
	}
	p.mu.Lock()
	if !p.mu.used[i] {
		p.mu.Unlock()
		panic("buffer: Put of a buffer that is free")
	}
	p.mu.used[i] = false
	p.mu.free = append(p.mu.free, int32(i))
	p.mu.Unlock()
	p.tokens <- struct{}{}
}

// Size is the size of each buffer in bytes.
func (p *Pool) Size() int { return p.size }

// Len is the number of buffers, free or not.
func (p *Pool) Len() int { return cap(p.tokens) }

// Outstanding is the number of buffers given out.
func (p *Pool) Outstanding() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.Len() - len(p.mu.free)
}

// Close gives the memory back to the system. If buffers are still given out it
// leaves everything as it is and returns an error: a leak does less harm than
// memory that vanishes under its user.
func (p *Pool) Close() error {
	if p.memory == nil {
		return errors.New("buffer: pool is closed")
	}
	if n := p.Outstanding(); n > 0 {
		return fmt.Errorf("buffer: close of a pool with %d buffers outstanding", n)
	}
	m := p.memory
	p.memory = nil
	return unmapMemory(m)
}

// pop takes the most recently freed buffer. REQUIRES: a token was received.
func (p *Pool) pop() []byte {
	p.mu.Lock()
	last := len(p.mu.free) - 1
	i := int(p.mu.free[last])
	p.mu.free = p.mu.free[:last]
	p.mu.used[i] = true
	p.mu.Unlock()
	b := p.buffer(i)
	invariants.Assertf(!invariants.Enabled || poisoned(b), "buffer %d was written while it was free", i)
	return b
}

func (p *Pool) buffer(i int) []byte {
	off := i * p.stride
	return p.memory[off : off+p.size : off+p.size]
}
