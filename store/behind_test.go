package store

import (
	"errors"
	"sync"
	"syscall"
	"testing"

	"cnbd/internal/disktest"
)

// A behindDisk notes what it was asked to write behind, which it answers with err.
type behindDisk struct {
	*disktest.Disk
	mu    sync.Mutex
	bytes int64
	err   error
}

func (d *behindDisk) WriteBehind(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bytes += n
	return d.err
}

// Large writes of the log are sent on to the medium, small commits are not: their sync
// follows at once.
func TestWriteBehind(t *testing.T) {
	d := &behindDisk{Disk: disktest.New(1, disktest.Options{})}
	g := testGeometry(64*ExtentBlocksMax, 400)
	g.SegmentSize = 2 * writeBufferSize
	must(t, Format(d, g))
	c := openCommitted(t, d, Options{})
	must(t, c.Reserve(1000, Growth))
	for i := range 8 {
		must(t, c.blob(i, 1, 1))
		must(t, c.commit())
	}
	if d.bytes != 0 {
		t.Errorf("%d bytes of small commits were sent on", d.bytes)
	}
	for i := range 8 {
		must(t, c.blob(32*i, 32, 1<<32-1))
	}
	must(t, c.commit())
	if all, _ := c.Appended(); d.bytes < int64(all)/2 {
		t.Errorf("%d bytes of %d were sent on", d.bytes, all)
	}

	// A failure is that of a write, and not forgotten by the sync behind it.
	d.mu.Lock()
	d.err = syscall.EIO
	d.mu.Unlock()
	for i := range 8 {
		_ = c.blob(32*i, 32, 1<<32-1) // fails once the store has
	}
	if err := c.commit(); !errors.Is(err, syscall.EIO) || !errors.Is(c.Err(), syscall.EIO) {
		t.Errorf("commit: %v, the store: %v; want EIO", err, c.Err())
	}
	must(t, c.Close())
}
