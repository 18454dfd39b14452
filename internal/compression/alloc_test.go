//go:build !race && !invariants

package compression_test

import (
	"math/rand/v2"
	"runtime"
	"testing"

	. "cnbd/internal/compression"
)

// In the steady state nothing is allocated, but for the header of a frame with more than
// one block, by the library. The race detector and the checks of invariants allocate
// themselves.
func TestNoAllocations(t *testing.T) {
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	dst := make([]byte, 0, EncodedLenMax(SizeMax))
	out := make([]byte, 0, SizeMax)
	m := NewRegionMemory()
	for _, c := range corpora(rand.New(rand.NewPCG(1, 1))) {
		for _, s := range settings {
			if c.name == "hex" && s.Level == ZstdBest {
				continue // a quarter of a second each
			}
			for _, n := range []int{4 << 10, 64 << 10, SizeMax} {
				src := c.data[:n]
				enc, used, ok := e.Encode(nil, src, s)
				most := 0.0
				if s.Codec == Zstd && s.Level >= ZstdBetter && n > 4<<10 {
					most = 1
				}
				if a := testing.AllocsPerRun(5, func() { e.Encode(dst, src, s) }); a > most {
					t.Errorf("%s, %s: encoding %d bytes allocates %v times", c.name, s, n, a)
				}
				// What comes back is memory enough for the next time, also when it is not
				// worth it.
				if a := testing.AllocsPerRun(5, func() { enc, _, _ = e.Encode(enc[:0], src, s) }); a > most {
					t.Errorf("%s, %s: encoding %d bytes into what came back allocates %v times", c.name, s, n, a)
				}
				if !ok {
					continue
				}
				if a := testing.AllocsPerRun(5, func() { d.Decode(out, enc, used.Codec, n) }); a != 0 {
					t.Errorf("%s, %s: decoding %d bytes allocates %v times", c.name, s, n, a)
				}
			}
		}
	}
	if a := testing.AllocsPerRun(100, func() { m.Record(1, SizeMax, false); m.Effort(1, settings[0]) }); a != 0 {
		t.Errorf("the region memory allocates %v times", a)
	}
}

// The memory that the package doc promises, and DESIGN.md's 12 MiB a worker.
func TestMemory(t *testing.T) {
	cs := corpora(rand.New(rand.NewPCG(1, 1)))
	held := func(make func() any) float64 {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&before)
		x := make()
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(x)
		return float64(int64(after.HeapAlloc)-int64(before.HeapAlloc)) / 1e6
	}
	encode := func(settings []Setting) func() any {
		return func() any {
			e := NewEncoder()
			for _, c := range cs {
				for _, s := range settings {
					e.Encode(nil, c.data, s)
				}
			}
			return e
		}
	}
	if m := held(encode(fast)); m > 9 {
		t.Errorf("an Encoder holds %.1f MB", m)
	} else {
		t.Logf("an Encoder holds %.1f MB", m)
	}
	NewEncoder().Encode(nil, cs[0].data, Setting{Zstd, ZstdBest})
	if m := held(encode([]Setting{{Zstd, ZstdBest}})); m > 1 {
		t.Errorf("a second Encoder of level best holds %.1f MB", m)
	}
	e := NewEncoder()
	var encs [][]byte
	for _, c := range cs {
		if enc, _, ok := e.Encode(nil, c.data, Setting{Zstd, ZstdBetter}); ok {
			encs = append(encs, enc)
		}
	}
	const n = 8
	decoder := func() any {
		d := NewDecoder(n)
		out := make([]byte, 0, SizeMax)
		for range 10 * n { // they take turns
			for _, enc := range encs {
				if _, err := d.Decode(out, enc, Zstd, SizeMax); err != nil {
					t.Error(err)
				}
			}
		}
		return d
	}
	if m := held(decoder) / n; m > 0.4 {
		t.Errorf("a Decoder holds %.2f MB for each call", m)
	} else {
		t.Logf("a Decoder holds %.2f MB for each call", m)
	}
}
