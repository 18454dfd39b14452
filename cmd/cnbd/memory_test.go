//go:build !race && !invariants

package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/nbd"
)

// TestMemoryOfRandomWrites: a server that takes small writes at random places as fast as it
// can, until it cleans, keeps the promise of its memory (P6): what is alive of the map and of what is
// being encoded is in it, and the garbage of it too.
func TestMemoryOfRandomWrites(t *testing.T) {
	const size, clients, workers = 1 << 30, 16, 2
	// Cache, map, payload, and the overhead.
	const limit = (256 + 32 + 64 + 64 + 12*workers) << 20
	seed := disktest.Seed(t)
	s := serve(t, "--size", fmt.Sprint(size), "--workers", fmt.Sprint(workers), "--listen", "unix:"+filepath.Join(t.TempDir(), "s"), filepath.Join(t.TempDir(), "disk.cnbd"))
	end := time.Now().Add(time.Duration(disktest.Scale(t)) * 24 * time.Second) // the segments are used up by then, and it cleans
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var wg sync.WaitGroup
	for i := range uint64(clients) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, i))
			noise := make([]byte, 1<<20)
			for j := range noise {
				if j/512%2 == 0 { // the other half is zeros
					noise[j] = byte(rng.Uint32())
				}
			}
			for time.Now().Before(end) {
				p := noise[rng.IntN(len(noise)-block.Size):][:block.Size]
				if err := c.WriteAt(t.Context(), p, uint64(rng.Int64N(size/block.Size))*block.Size, false); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	peak := peakOf(t, status)
	t.Logf("%d MiB at most, of %d", peak>>20, limit>>20)
	if peak > limit {
		t.Errorf("%d bytes were resident, %d are promised", peak, limit)
	}
}

// peakOf is the most memory that was resident, in bytes, as /proc/PID/status says.
func peakOf(t *testing.T, status []byte) (peak int64) {
	t.Helper()
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	if _, err := fmt.Sscanf(after, "%d kB", &peak); err != nil {
		t.Fatal(err)
	}
	return peak << 10
}
