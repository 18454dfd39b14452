//go:build !race

package buffer

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mapMemory is n bytes of zeroed, page-aligned memory outside the Go heap. It
// takes address space only: a page of it becomes resident when it is touched.
func mapMemory(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("buffer: map %d bytes: %w", n, err)
	}
	return b, nil
}

// useHugePages asks the system for huge pages in b, a part of a mapping that begins at
// a page. It is free to refuse: a kernel may have none. A page of 2 MiB is taken with
// the first touch of any of its bytes; where ordinary pages are larger than 4 KiB huge
// ones have 32 or 512 MiB, which is too much.
func useHugePages(b []byte) {
	if unix.Getpagesize() == 4096 {
		_ = unix.Madvise(b, unix.MADV_HUGEPAGE)
	}
}

func unmapMemory(b []byte) error {
	if err := unix.Munmap(b); err != nil {
		return fmt.Errorf("buffer: unmap %d bytes: %w", len(b), err)
	}
	return nil
}
