//go:build !race

package buffer

import (
	"testing"
	"unsafe"

	"cnbd/internal/block"

	"golang.org/x/sys/unix"
)

// What was never used is not resident, but for the rest of a huge page, whether the
// frames lie in such pages or not.
func TestArenaTakesWhatIsUsed(t *testing.T) {
	const hugePage = 2 << 20
	for _, size := range []int{hugeFramesMin / 2, 16 * hugeFramesMin} {
		a := newArena[[40]byte](t, size/block.Size)
		for touched := 0; touched < 5<<20; {
			for range 100 {
				f, _ := a.Alloc()
				a.Bytes(f)[0] = 1
				a.Header(f)[0] = 1
				touched += block.Size
			}
			allowed := touched + touched/64 + 4*block.Size // headers, links, and the pages where they end
			if size >= hugeFramesMin {
				allowed += hugePage
			}
			if n := resident(t, a.memory); n < touched || n > allowed {
				t.Fatalf("%d bytes resident of %d; %d of frames are in use", n, len(a.memory), touched)
			}
		}
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}
}

// resident is how many bytes of a mapping have memory.
func resident(t *testing.T, mapping []byte) (n int) {
	t.Helper()
	pages := make([]byte, (len(mapping)+block.Size-1)/block.Size)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapping[0])), uintptr(len(mapping)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		t.Fatal(errno)
	}
	for _, p := range pages {
		n += int(p&1) * block.Size
	}
	return n
}
