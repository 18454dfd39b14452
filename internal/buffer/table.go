package buffer

import (
	"errors"
	"fmt"
	"unsafe"
)

// A Table is a fixed number of values of type T in a mapping outside the Go heap,
// zero at first. T must have no pointers: the garbage collector does not see them
// there. What was never used occupies no memory.
type Table[T any] struct {
	memory []byte
	values []T
}

// NewTable maps a table of n values; n must be positive.
func NewTable[T any](n int) (*Table[T], error) {
	var v T
	if n <= 0 || n > framesMax {
		return nil, fmt.Errorf("buffer: table of %d values: want 1 to %d", n, framesMax)
	}
	memory, err := mapMemory(n * int(unsafe.Sizeof(v)))
	if err != nil {
		return nil, err
	}
	return &Table[T]{memory: memory, values: unsafe.Slice((*T)(unsafe.Pointer(&memory[0])), n)}, nil
}

// Values are the values, borrowed until Close.
func (t *Table[T]) Values() []T { return t.values }

// Close gives the memory back to the system. Nobody may use the values any more.
func (t *Table[T]) Close() error {
	if t.memory == nil {
		return errors.New("buffer: table is closed")
	}
	m := t.memory
	t.memory, t.values = nil, nil
	return unmapMemory(m)
}
