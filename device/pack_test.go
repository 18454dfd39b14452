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
	"cnbd/store"
)

// words returns what fills a slice with words: more of them than occur in a small extent, so
// that a large one takes less.
func words(rng *rand.Rand) func(p []byte) {
	words := make([][]byte, 3000)
	for i := range words {
		words[i] = make([]byte, 6+rng.IntN(12))
		fill(words[i], rng.Uint64())
	}
	return func(p []byte) {
		for len(p) > 0 {
			p = p[copy(p, words[rng.IntN(len(words))]):]
		}
	}
}

// awaitPacked waits until as many blocks of d as enough says are packed.
func awaitPacked(t *testing.T, d *Device, what string, enough func(block.Count) bool) {
	t.Helper()
	g := d.Geometry()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) { // polling: the cleaner tells nobody
		list, err := d.store.Lookup(block.Range{End: d.end()}, nil)
		if err != nil {
			t.Fatal(err)
		}
		packed, longest := block.Count(0), uint8(0)
		for _, e := range list {
			// One that is no longer than others, as at the end of the device, need not be unpacked.
			if e.Kind == extents.Data && e.Addr.Level == uint8(compression.ZstdBest) && uint32(e.Addr.Blocks) > g.ExtentBlocks {
				packed += e.Count
				longest = max(longest, e.Addr.Blocks)
			}
		}
		if enough(packed) {
			if packed > 0 && longest <= store.ExtentBlocksMax/2 { // there may be holes at both ends of all
				t.Errorf("%s: the longest packed extent has %d blocks", what, longest)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %d blocks are packed", what, packed)
		}
	}
}

// TestPacked: data that nobody asks for is packed, and stays what it is while it is read
// at random, which has it unpacked, and overwritten, again and again.
func TestPacked(t *testing.T) {
	const size = 1 << 20
	seed := disktest.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	truth := make([]byte, size)
	compose := words(rng)
	o := smallOptions(t)
	o.CleanPeriod, o.PackAfter = 500*time.Microsecond, 5*time.Millisecond
	g := testGeometry(size, compression.Zstd)
	g.ExtentBlocks, g.Level = 8, uint8(compression.ZstdFastest)
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	await := func(what string, enough func(block.Count) bool) {
		t.Helper()
		awaitPacked(t, d, what, enough)
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

// TestUnpackedParts: packed extents of which parts were overwritten and trimmed come back right when they
// are unpacked, whatever the sizes of extents: of a device that ends inside a block, and that is
// made smaller, into the middle of an extent, and larger.
func TestUnpackedParts(t *testing.T) {
	for i, extent := range []uint32{8 << 10, 64 << 10} {
		testUnpackedParts(t, disktest.Seed(t)+uint64(i), extent)
	}
}

func testUnpackedParts(t *testing.T, seed uint64, extent uint32) {
	const size, small = 2<<20 + 5*512, 1<<20 + 13*block.Size + 3*512
	rng := rand.New(rand.NewPCG(seed, 0))
	truth := make([]byte, size)
	write := words(rng)
	write(truth)
	fill(truth[512<<10:1<<20], seed) // does not compress
	o := smallOptions(t)
	o.CleanPeriod, o.PackAfter, o.ExtentBytes = 500*time.Microsecond, 5*time.Millisecond, extent
	g := testGeometry(size, compression.Zstd)
	g.ExtentBlocks, g.Level = 8, uint8(compression.ZstdFastest)
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	if _, err := d.WriteAt(truth, 0); err != nil {
		t.Fatal(err)
	}
	awaitPacked(t, d, "after writing", func(n block.Count) bool { return n >= (size-512<<10)/block.Size*9/10 })
	reopen := func() {
		t.Helper()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		f = f.Clone()
		checkClean(t, f)
		d = open(t, f, o)
	}
	o.PackAfter = time.Hour
	reopen()
	for range 60 {
		n := block.Size * (1 + rng.IntN(3))
		at := rng.IntN((size-n)/block.Size) * block.Size
		var err error
		if rng.IntN(2) == 0 {
			write(truth[at : at+n])
			_, err = d.WriteAt(truth[at:at+n], int64(at))
		} else {
			clear(truth[at : at+n])
			err = d.WriteZeroes(t.Context(), uint64(at), uint64(n), true)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	readAtRandom := func() {
		for i := range 40 * (size/(1<<20) + 1) {
			d.store.NoteRandomRead(block.Span(block.Index(i%(size/(1<<20)+1)*256), 1))
		}
	}
	readAtRandom()
	awaitPacked(t, d, "unpacked", func(n block.Count) bool { return n == 0 })
	compareAll(t, d, truth)
	o.PackAfter = 5 * time.Millisecond
	reopen()
	awaitPacked(t, d, "packed again", func(n block.Count) bool { return n > size/block.Size/3 })
	if _, err := d.Resize(t.Context(), ResizeOptions{Bytes: small, CapacityBytes: g.Capacity, Drop: true}); err != nil {
		t.Fatal(err)
	}
	clear(truth[small:])
	compareAll(t, d, truth[:small])
	readAtRandom()
	if _, err := d.Resize(t.Context(), ResizeOptions{Bytes: size, CapacityBytes: g.Capacity}); err != nil {
		t.Fatal(err)
	}
	awaitPacked(t, d, "unpacked again", func(n block.Count) bool { return n == 0 })
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}
