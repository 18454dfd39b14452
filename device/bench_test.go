package device

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/invariants"
)

// benchBlocks is the size of the device of benchmarks, all of which is stored.
const benchBlocks = 32 << 20 / block.Size

// newBenchDevice opens a device in a file, all of whose blocks are stored, in
// extents of 64 KiB that compress to less than half, and in no page cache but the
// kernel's. Nothing goes on in the background but what o asks for.
func newBenchDevice(tb testing.TB, o Options) *Device {
	path := filepath.Join(tb.TempDir(), "store")
	codec := compression.Setting{Codec: compression.Zstd, Level: compression.ZstdFastest}
	if err := Create(path, CreateOptions{Bytes: benchBlocks * block.Size, Codec: &codec}); err != nil {
		tb.Fatal(err)
	}
	open := func() *Device {
		o.NoRecompress, o.CleanPeriod, o.CommitInterval = true, time.Hour, time.Hour
		o.Warn = func(msg string, err error) { tb.Errorf("warning: %s: %v", msg, err) }
		d, err := OpenFile(path, o)
		if err != nil {
			tb.Fatal(err)
		}
		return d
	}
	d := open()
	for b := range benchBlocks / 256 {
		p := make([]byte, 256*block.Size)
		for i := range 256 {
			benchBlock(p[i*block.Size:], uint64(b*256+i))
		}
		if _, err := d.WriteAt(p, int64(b*len(p))); err != nil {
			tb.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		tb.Fatal(err)
	}
	d = open()
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

// benchBlock makes p, a block, one of text that seed chooses.
func benchBlock(p []byte, seed uint64) {
	words := []string{"page ", "extent ", "dirty ", "segment ", "hole ", "replay\n", "0x7f", "block ", "commit ", "log\t", "map", "="}
	rng := rand.New(rand.NewPCG(seed, 1))
	for n := 0; n < block.Size; {
		n += copy(p[n:block.Size], words[rng.IntN(len(words))])
	}
}

// A load asks one device for one kind of request after the other.
type load struct {
	d   *Device
	rng *rand.Rand
	p   []byte // a block
}

func newLoad(tb testing.TB, o Options) *load {
	l := &load{d: newBenchDevice(tb, o), rng: rand.New(rand.NewPCG(1, 2)), p: make([]byte, block.Size)}
	benchBlock(l.p, 1)
	return l
}

func (l *load) read(tb testing.TB, b block.Index, n block.Count) {
	p, err := l.d.Read(tb.Context(), b.Bytes(), uint32(n.Bytes()))
	if err != nil {
		tb.Fatal(err)
	}
	p.Release()
}

// hit reads a block that is in the cache from the second time on.
func (l *load) hit(tb testing.TB) { l.read(tb, 7, 1) }

// miss reads a random block: with a small cache none that is in it, mostly.
func (l *load) miss(tb testing.TB) { l.read(tb, l.random(), 1) }

// large reads 1 MiB.
func (l *load) large(tb testing.TB) { l.read(tb, l.random()&^255, 256) }

// write writes a random block.
func (l *load) write(tb testing.TB) { l.writeAt(tb, l.random().Bytes(), block.Size) }

// noise writes a random block that does not compress.
func (l *load) noise(tb testing.TB) {
	for i := 0; i < len(l.p); i += 8 {
		binary.LittleEndian.PutUint64(l.p[i:], l.rng.Uint64())
	}
	l.write(tb)
}

// part writes a sector of a random block, which has to be read for that, mostly.
func (l *load) part(tb testing.TB) { l.writeAt(tb, l.random().Bytes()+512, 512) }

func (l *load) writeAt(tb testing.TB, off uint64, n int) {
	l.p[l.rng.IntN(len(l.p))]++
	w, err := l.d.PrepareWrite(tb.Context(), off, uint32(n))
	if err != nil {
		tb.Fatal(err)
	}
	for _, s := range w.Next(n) {
		copy(s, l.p)
	}
	if err := w.Commit(tb.Context(), false); err != nil {
		tb.Fatal(err)
	}
}

func (l *load) flush(tb testing.TB) {
	if err := l.d.Flush(tb.Context()); err != nil {
		tb.Fatal(err)
	}
}

// batch is 32 random writes and a flush.
func (l *load) batch(tb testing.TB) {
	for range 32 {
		l.write(tb)
	}
	l.flush(tb)
}

func (l *load) random() block.Index { return block.Index(l.rng.IntN(benchBlocks)) }

// smallCache is a cache for an eighth of the device.
var smallCache = Options{CacheBytes: 4 << 20}

// loads are what is measured: kinds of requests, and what they may allocate. What
// is allocated for each of many requests, or for each block of a large one, is more.
var loads = []struct {
	name   string
	o      Options
	f      func(l *load, tb testing.TB)
	blocks int     // for each f
	most   float64 // allocations of one f
}{
	{"ReadHit", Options{}, (*load).hit, 1, 0},
	{"ReadMiss", smallCache, (*load).miss, 1, 0.1},
	{"ReadMiss1M", smallCache, (*load).large, 256, 0.5},
	{"ReadMiss1MOf4K", Options{CacheBytes: 4 << 20, ExtentBytes: block.Size}, (*load).large, 256, 0.5},
	// Now and then the trees of what is dirty, and of what the log has, get nodes.
	{"Write", smallCache, (*load).write, 1, 0.5},
	{"WritePart", smallCache, (*load).part, 1, 0.5},
	{"WriteNoise", smallCache, (*load).noise, 1, 0.5},
	// A commit has a few objects of its own.
	{"WriteFlush", Options{}, func(l *load, tb testing.TB) { l.write(tb); l.flush(tb) }, 1, 9},
	{"Write32Flush", Options{}, (*load).batch, 32, 14},
}

// TestRequestsDoNotAllocate: nothing is allocated for a block that is read, cached or
// not, or written and stored, but for what is shared by many.
func TestRequestsDoNotAllocate(t *testing.T) {
	if invariants.Enabled {
		t.Skip("the race detector allocates")
	}
	for _, ld := range loads {
		t.Run(ld.name, func(t *testing.T) {
			l := newLoad(t, ld.o)
			l.d.ahead.stop() // who waits for what another goroutine reads makes a channel for that
			n := max(20, 2000/ld.blocks)
			if ld.most >= 1 {
				n = 100 // each waits for the disk
			}
			least := math.Inf(1)
			for range 4 { // others may allocate meanwhile: the first round warms up
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				for range n {
					ld.f(l, t)
				}
				runtime.ReadMemStats(&after)
				least = min(least, float64(after.Mallocs-before.Mallocs)/float64(n))
			}
			t.Logf("%.3f allocations", least)
			if slack := 20 / float64(n); least > ld.most+slack { // the runtime has some of its own
				t.Errorf("%.2f allocations each of %d times, want at most %.2f", least, n, ld.most)
			}
		})
	}
}

// BenchmarkDevice measures the device alone, in a file that the kernel has cached.
func BenchmarkDevice(b *testing.B) {
	for _, ld := range loads {
		b.Run(ld.name, func(b *testing.B) {
			l := newLoad(b, ld.o)
			for range 200 {
				ld.f(l, b)
			}
			b.SetBytes(int64(ld.blocks) * block.Size)
			b.ReportAllocs()
			for b.Loop() {
				ld.f(l, b)
			}
		})
	}
}
