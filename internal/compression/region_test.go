package compression

import (
	"math/rand/v2"
	"sync"
	"testing"
)

var better = Setting{Zstd, ZstdBetter}

// efforts are the next n settings for r.
func efforts(m *RegionMemory, r Region, s Setting, n int) (e []Setting) {
	for range n {
		e = append(e, m.Effort(r, s))
	}
	return e
}

func count(all []Setting, s Setting) (n int) {
	for _, e := range all {
		if e == s {
			n++
		}
	}
	return n
}

func TestRegionLowersEffort(t *testing.T) {
	m := NewRegionMemory()
	for range failuresLow {
		if e := m.Effort(7, better); e != better {
			t.Fatalf("%s before it has failed often", e)
		}
		m.Record(7, SizeMax, false)
	}
	// For ever so long, one of four is a full try.
	for range 100 {
		e := efforts(m, 7, better, 4)
		if count(e, better) != 1 || count(e, Setting{S2, S2Fast}) != 3 {
			t.Fatalf("tries are %v", e)
		}
		for range e {
			m.Record(7, SizeMax, false)
		}
	}
	if e := efforts(m, 7, Setting{S2, S2Better}, 4); count(e, Setting{S2, S2Better}) != 1 || count(e, Setting{}) != 3 {
		t.Fatalf("tries of s2 are %v", e)
	}
	if e := m.Effort(7, Setting{}); e != (Setting{}) {
		t.Fatalf("none became %s", e)
	}
	for _, r := range []Region{6, 8, 7 + regionSlots} {
		if e := efforts(m, r, better, 8); count(e, better) != 8 {
			t.Fatalf("region %d: %v", r, e)
		}
	}
	// One success, and all is forgotten.
	m.Record(7, SizeMax, true)
	if e := efforts(m, 7, better, 8); count(e, better) != 8 {
		t.Fatalf("after a success: %v", e)
	}
}

func TestRegionSingleBlocksSayNothing(t *testing.T) {
	m := NewRegionMemory()
	for range 100 {
		m.Record(1, 4<<10, false)
	}
	if e := efforts(m, 1, Setting{Codec: Auto}, 8); count(e, Setting{Zstd, ZstdFastest}) != 8 {
		t.Fatalf("tries are %v", e)
	}
	// Their success does.
	for range failuresLow {
		m.Record(1, 8<<10, false)
	}
	m.Record(1, 4<<10, true)
	if e := efforts(m, 1, better, 8); count(e, better) != 8 {
		t.Fatalf("tries are %v", e)
	}
}

// Data of which a part compresses is tried with full effort nearly always.
func TestRegionMixedData(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	m := NewRegionMemory()
	full := 0
	const n = 10000
	for range n {
		ok := rng.IntN(2) == 0
		if m.Effort(3, better) == better {
			full++
			m.Record(3, SizeMax, ok)
		} else {
			m.Record(3, SizeMax, false) // what s2 cannot do
		}
	}
	if full < n*8/10 {
		t.Fatalf("%d of %d tries with full effort", full, n)
	}
}

// Two regions of one slot disturb each other's memory, no more.
func TestRegionCollision(t *testing.T) {
	m := NewRegionMemory()
	a := Region(5)
	b := a
	for b = a + 1; m.slot(b) != m.slot(a); b++ {
	}
	for range failuresLow {
		m.Record(a, SizeMax, false)
	}
	m.Record(b, SizeMax, true)
	if e := efforts(m, a, better, 4); count(e, better) != 1 {
		t.Fatal("another region's success was taken for this one's")
	}
	m.Record(b, SizeMax, false)
	if e := efforts(m, a, better, 4); count(e, better) != 4 {
		t.Fatal("another region's failure was taken for this one's")
	}
}

func TestRegionNumbers(t *testing.T) {
	if RegionOf(1<<20-1) != 0 || RegionOf(1<<20) != 1 || RegionOf(1<<63) != 1<<43 {
		t.Fatal("RegionOf")
	}
	m := NewRegionMemory()
	r := RegionOf(1<<64 - 1)
	for range failuresLow {
		m.Record(r, SizeMax, false)
	}
	if e := efforts(m, r, better, 4); count(e, better) != 1 {
		t.Fatalf("the last region is not remembered: %v", e)
	}
}

func TestRegionConcurrent(t *testing.T) {
	m := NewRegionMemory()
	var wg sync.WaitGroup
	for w := range uint64(4) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(w, 1))
			for range 20000 {
				r := Region(rng.IntN(64))
				m.Effort(r, better)
				m.Record(r, SizeMax, r%2 == 0)
			}
		})
	}
	wg.Wait()
	for r := range Region(64) {
		want := 4
		if r%2 != 0 {
			want = 1
		}
		if e := efforts(m, r, better, 4); count(e, better) != want {
			t.Errorf("region %d: %v", r, e)
		}
	}
}
