//go:build race

package buffer

import (
	"unsafe"

	"cnbd/internal/block"
)

// mapMemory is n bytes of zeroed, page-aligned memory of the Go heap: the race
// detector does not watch mappings of our own.
func mapMemory(n int) ([]byte, error) {
	b := make([]byte, n+block.Size)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % block.Size
	return b[skip : skip+uintptr(n) : skip+uintptr(n)], nil
}

func useHugePages([]byte) {}

func unmapMemory([]byte) error { return nil }
