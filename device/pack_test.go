package device

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
)

// TestPacked: data that nobody asks for is packed, and stays what it is while it is read
// at random, which has it unpacked, and overwritten, again and again.
func TestPacked(t *testing.T) {
	const size = 1 << 20
	seed := disktest.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	truth := make([]byte, size)
	words := make([][]byte, 3000) // more than occur in a small extent, so that a large one is smaller
	for i := range words {
		words[i] = make([]byte, 6+rng.IntN(12))
		fill(words[i], rng.Uint64())
	}
	// compose fills p with words.
	compose := func(p []byte) {
		for len(p) > 0 {
			p = p[copy(p, words[rng.IntN(len(words))]):]
		}
	}
	o := smallOptions(t)
	o.CleanPeriod, o.PackAfter = 500*time.Microsecond, 5*time.Millisecond
	g := testGeometry(size, compression.Zstd)
	g.ExtentBlocks, g.Level = 8, uint8(compression.ZstdFastest)
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	// await waits until as many blocks as enough says are packed, and returns how many.
	await := func(what string, enough func(block.Count) bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) { // polling: the cleaner tells nobody
			list, err := d.store.Lookup(block.Range{End: d.end()}, nil)
			if err != nil {
				t.Fatal(err)
			}
			packed, longest := block.Count(0), uint8(0)
			for _, e := range list {
				if e.Kind == extents.Data && e.Addr.Level == uint8(compression.ZstdBest) {
					packed += e.Count
					longest = max(longest, e.Addr.Blocks)
				}
			}
			if enough(packed) {
				if packed > 0 && longest != 32 {
					t.Errorf("%s: the longest packed extent has %d blocks", what, longest)
				}
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d blocks are packed", what, packed)
			}
		}
	}
	write := func(at, n int) {
		t.Helper()
		compose(truth[at : at+n])
		if _, err := d.WriteAt(truth[at:at+n], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	write(0, size)
	all := func(n block.Count) bool { return n == size/block.Size }
	await("after writing", all)
	for round := range 2 {
		compareAll(t, d, truth)
		// Beside packing, which goes on in the pauses.
		for range 40 {
			n := block.Size * (1 + rng.IntN(4))
			write(rng.IntN(size-n), n)
			if rng.IntN(4) == 0 {
				time.Sleep(time.Duration(rng.IntN(8)) * time.Millisecond)
			}
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		await(fmt.Sprint("overwritten, ", round), all)
		compareAll(t, d, truth)
		if round == 0 { // as a crash leaves it
			if err := d.Abort(); err != nil {
				t.Fatal(err)
			}
			f = f.Crash(disktest.LoseAll)
			checkClean(t, f)
			d = open(t, f, o)
		}
	}
	// The cache has an eighth of it. Blocks are read until all is unpacked.
	read, p := 0, make([]byte, block.Size)
	await("read at random", func(n block.Count) bool {
		for range 64 {
			read++
			at := rng.IntN(size/block.Size) * block.Size
			if _, err := d.ReadAt(p, int64(at)); err != nil || !bytes.Equal(p, truth[at:at+block.Size]) {
				t.Fatalf("the block at %d differs, %v", at, err)
			}
		}
		return n == 0
	})
	t.Logf("unpacked after %d reads", read)
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}
