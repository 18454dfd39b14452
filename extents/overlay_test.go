package extents

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

// A mapCell is what a map says of one block: the plain form that all structures
// of the map are compared in.
type mapCell struct {
	known bool // false: nothing is said of it
	kind  Kind
	addr  Addr
	pos   uint8 // block of the blob
}

type mapCells []mapCell

// paint says of the blocks of e what e says.
func (c mapCells) paint(e Extent) {
	for i := range e.Count {
		cell := mapCell{known: true, kind: e.Kind, addr: e.Addr}
		if e.Kind == Data {
			cell.pos = e.Skip + uint8(i)
		}
		c[e.Start+block.Index(i)] = cell
	}
}

// diff fails the test at the first block of r that differs.
func (c mapCells) diff(t testing.TB, what string, want mapCells, r block.Range) {
	t.Helper()
	for i := r.Start; i < r.End; i++ {
		if c[i] != want[i] {
			t.Fatalf("%s: block %d is %+v, expected %+v", what, i, c[i], want[i])
		}
	}
}

// A blobMaker makes extents of blobs that are all different.
type blobMaker struct {
	rand            *rand.Rand
	segment, offset uint32
	blobMax         int // blocks of a blob; 0 is BlobBlocksMax
}

func (m *blobMaker) addr(blocks uint8) Addr {
	if m.rand.IntN(50) == 0 || m.offset > 1<<22 {
		m.segment, m.offset = m.segment+1+m.rand.Uint32N(3), 4096
	}
	a := Addr{
		Segment: m.segment, Offset: m.offset, Length: 1 + m.rand.Uint32N(uint32(blocks)*block.Size),
		Checksum: m.rand.Uint32(), Blocks: blocks, Codec: uint8(m.rand.IntN(10) / 8), Level: uint8(m.rand.IntN(10) / 7),
	}
	m.offset += a.Length + 40
	return a
}

// extent is a random extent that begins at start; often the whole of its blob.
func (m *blobMaker) extent(start block.Index) Extent {
	blobMax := m.blobMax
	if blobMax == 0 {
		blobMax = BlobBlocksMax
	}
	a := m.addr(uint8(1 + m.rand.IntN(blobMax)))
	e := Extent{Start: start, Count: block.Count(a.Blocks), Kind: Data, Addr: a}
	if m.rand.IntN(5) == 0 {
		e.Skip = uint8(m.rand.IntN(int(a.Blocks)))
		e.Count = 1 + block.Count(m.rand.IntN(int(a.Blocks-e.Skip)))
	}
	return e
}

// random is an extent or hole somewhere in the first n blocks, n at least 64.
func (m *blobMaker) random(n int) Extent {
	start := block.Index(m.rand.IntN(n - BlobBlocksMax))
	switch m.rand.IntN(20) {
	case 0:
		if m.rand.IntN(20) == 0 {
			return Extent{Start: start, Count: 1 + block.Count(m.rand.IntN(n-int(start))), Kind: Hole}
		}
		return Extent{Start: start, Count: 1 + block.Count(m.rand.IntN(min(400, n-int(start)))), Kind: Hole}
	case 1, 2, 3:
		return Extent{Start: start, Count: 1 + block.Count(m.rand.IntN(BlobBlocksMax)), Kind: Hole}
	case 4:
		return Extent{Start: start, Count: 1 + block.Count(m.rand.IntN(BlobBlocksMax)), Kind: Lost}
	}
	return m.extent(start)
}

// short is for the table tests: 4+2:D7.1/4 is blocks 4 and 5, blocks 1 and 2
// of the blob 7, which has 4.
func (e Extent) short() string {
	switch e.Kind {
	case Hole:
		return fmt.Sprintf("%d+%d:H", e.Start, e.Count)
	case Lost:
		return fmt.Sprintf("%d+%d:L", e.Start, e.Count)
	}
	return fmt.Sprintf("%d+%d:D%d.%d/%d", e.Start, e.Count, e.Addr.Offset, e.Skip, e.Addr.Blocks)
}

func dataExtent(start block.Index, blob uint32, blocks uint8) Extent {
	return Extent{Start: start, Count: block.Count(blocks), Kind: Data, Addr: Addr{Segment: 1, Offset: blob, Length: 100, Blocks: blocks}}
}

func holeExtent(start, end block.Index) Extent {
	return Extent{Start: start, Count: block.Count(end - start), Kind: Hole}
}

func TestOverlayInsert(t *testing.T) {
	d := dataExtent
	for _, c := range []struct {
		name string
		in   []Extent
		want string
	}{
		{"apart", []Extent{d(8, 2, 4), d(0, 1, 4)}, "0+4:D1.0/4 8+4:D2.0/4"},
		{"adjoining blobs stay", []Extent{d(0, 1, 4), d(4, 2, 4)}, "0+4:D1.0/4 4+4:D2.0/4"},
		{"same range, put together with what is behind", []Extent{{Start: 2, Count: 6, Kind: Data, Skip: 2, Addr: d(0, 1, 8).Addr}, d(0, 2, 2), {Start: 0, Count: 2, Kind: Data, Addr: d(0, 1, 8).Addr}}, "0+8:D1.0/8"},
		{"same range", []Extent{d(0, 1, 4), d(0, 2, 4)}, "0+4:D2.0/4"},
		{"head", []Extent{d(4, 1, 4), d(2, 2, 4)}, "2+4:D2.0/4 6+2:D1.2/4"},
		{"tail", []Extent{d(4, 1, 4), d(6, 2, 4)}, "4+2:D1.0/4 6+4:D2.0/4"},
		{"middle", []Extent{d(0, 1, 8), d(2, 2, 4)}, "0+2:D1.0/8 2+4:D2.0/4 6+2:D1.6/8"},
		{"cover many", []Extent{d(1, 1, 1), d(3, 2, 1), d(5, 3, 4), d(0, 4, 6)}, "0+6:D4.0/6 6+3:D3.1/4"},
		{"parts put together", []Extent{d(0, 1, 8), d(2, 2, 4), {Start: 2, Count: 4, Kind: Data, Skip: 2, Addr: d(0, 1, 8).Addr}}, "0+8:D1.0/8"},
		{"same blob, other alignment", []Extent{d(0, 1, 4), {Start: 4, Count: 2, Kind: Data, Skip: 1, Addr: d(0, 1, 4).Addr}}, "0+4:D1.0/4 4+2:D1.1/4"},
		{"holes join", []Extent{holeExtent(0, 4), holeExtent(8, 12), holeExtent(4, 8)}, "0+12:H"},
		{"holes overlap", []Extent{holeExtent(0, 6), holeExtent(8, 12), holeExtent(4, 10)}, "0+12:H"},
		{"hole in hole", []Extent{holeExtent(0, 12), holeExtent(4, 6)}, "0+12:H"},
		{"data in hole", []Extent{holeExtent(0, 1<<32), d(1<<20, 1, 4)}, "0+1048576:H 1048576+4:D1.0/4 1048580+4293918716:H"},
		{"hole over data", []Extent{d(0, 1, 8), d(8, 2, 8), holeExtent(4, 12)}, "0+4:D1.0/8 4+8:H 12+4:D2.4/8"},
		{"lost joins lost only", []Extent{{Start: 0, Count: 4, Kind: Lost}, holeExtent(4, 8), {Start: 8, Count: 4, Kind: Lost}, {Start: 12, Count: 1, Kind: Lost}}, "0+4:L 4+4:H 8+5:L"},
		{"end of the key space", []Extent{holeExtent(keyEnd-4, keyEnd), d(keyEnd-2, 1, 2)}, "4503599627370492+2:H 4503599627370494+2:D1.0/2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := NewOverlay()
			for _, e := range c.in {
				o.Insert(e)
			}
			var got []string
			o.Ascend(0, func(e Extent) bool { got = append(got, e.short()); return true })
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("got  %s\nwant %s", s, c.want)
			}
			if o.Len() != len(got) {
				t.Errorf("Len is %d, expected %d", o.Len(), len(got))
			}
		})
	}
}

func TestOverlayModel(t *testing.T) {
	const blocks = 600
	rand := rand.New(rand.NewPCG(disktest.Seed(t), 1))
	for range 20 * disktest.Scale(t) {
		maker := blobMaker{rand: rand}
		o, model := NewOverlay(), make(mapCells, blocks)
		for range 200 {
			e := maker.random(blocks)
			o.Insert(e)
			model.paint(e)
			start := block.Index(rand.IntN(blocks))
			r := rng(start, start+block.Index(rand.IntN(blocks-int(start)+1)))
			got, last := make(mapCells, blocks), r.Start
			o.Lookup(r, func(e Extent) {
				if e.Start < last || !r.Covers(e.Range()) || e.Count == 0 {
					t.Fatalf("lookup of %v: %s behind %d", r, e.short(), last)
				}
				last = e.Range().End
				got.paint(e)
			})
			got.diff(t, "overlay", model, r)
			// Ascend gives them whole, and none that could be joined.
			var prev Extent
			o.Ascend(start, func(e Extent) bool {
				if e.Range().End <= start || prev.Count > 0 && (prev.continues(e) || e.Start < prev.Range().End) {
					t.Fatalf("from %d: %s behind %s", start, e.short(), prev.short())
				}
				prev = e
				return true
			})
		}
	}
}

func TestOverlayAllocates(t *testing.T) {
	maker := blobMaker{rand: rand.New(rand.NewPCG(1, 1))}
	o := NewOverlay()
	for i := range 10000 {
		o.Insert(maker.extent(block.Index(i) * 32))
	}
	visited := 0
	if n := testing.AllocsPerRun(100, func() {
		o.Lookup(rng(1000, 1200), func(Extent) { visited++ })
	}); n > 0 {
		t.Errorf("a lookup allocates %v times", n)
	}
	if visited == 0 {
		t.Error("nothing was visited")
	}
	if invariants.Enabled {
		return // the arguments of a check are allocated
	}
	e := maker.extent(3200)
	if n := testing.AllocsPerRun(100, func() { o.Insert(e) }); n > 0 {
		t.Errorf("an insert over an equal extent allocates %v times", n)
	}
}

func BenchmarkOverlayInsert(b *testing.B) {
	for _, c := range []string{"sequential", "random", "over"} {
		b.Run(c, func(b *testing.B) {
			maker := blobMaker{rand: rand.New(rand.NewPCG(1, 1))}
			es := make([]Extent, 1<<16)
			for i := range es {
				es[i] = maker.extent(block.Index(i) * 16)
			}
			if c != "sequential" {
				maker.rand.Shuffle(len(es), func(i, j int) { es[i], es[j] = es[j], es[i] })
			}
			b.ReportAllocs()
			o := NewOverlay()
			for _, e := range es {
				o.Insert(e)
			}
			for i := 0; b.Loop(); i++ {
				if i%len(es) == 0 && c != "over" {
					o = NewOverlay()
				}
				o.Insert(es[i%len(es)])
			}
		})
	}
}

func BenchmarkOverlayLookup(b *testing.B) {
	maker := blobMaker{rand: rand.New(rand.NewPCG(1, 1))}
	o := NewOverlay()
	const n = 1 << 18
	for i := range n {
		o.Insert(maker.extent(block.Index(i) * 16))
	}
	b.ReportAllocs()
	for b.Loop() {
		start := block.Index(maker.rand.IntN(n * 16))
		o.Lookup(rng(start, start+32), func(Extent) {})
	}
}

func TestRangeSet(t *testing.T) {
	const blocks = 300
	rand := rand.New(rand.NewPCG(disktest.Seed(t), 2))
	for range 6 * disktest.Scale(t) {
		s, model := NewRangeSet(), make([]bool, blocks)
		for range 150 {
			start := rand.IntN(blocks)
			end := start + rand.IntN(min(blocks-start, 1+rand.IntN(blocks))+1)
			r := rng(block.Index(start), block.Index(end))
			before := s.Clone()
			add := rand.IntN(2) == 0
			if add {
				s.Add(r)
			} else {
				s.Remove(r)
			}
			if before.Overlaps(r) != slices.Contains(model[start:end], true) {
				t.Fatalf("Overlaps(%v) is %v", r, before.Overlaps(r))
			}
			if before.Covers(r) == slices.Contains(model[start:end], false) {
				t.Fatalf("Covers(%v) is %v", r, before.Covers(r))
			}
			checkRangeSet(t, before, model)
			for i := start; i < end; i++ {
				model[i] = add
			}
			checkRangeSet(t, s, model)
			checkRangeSet(t, s.Clone(), model)

			data := s.Append([]byte("x"))[1:]
			decoded, err := DecodeRangeSet(data)
			if err != nil {
				t.Fatal(err)
			}
			checkRangeSet(t, decoded, model)
			if _, err := DecodeRangeSet(append(data, 0)); err == nil {
				t.Fatal("a trailing byte was decoded")
			}
			if _, err := DecodeRangeSet(data[:len(data)-1]); err == nil {
				t.Fatal("a cut set was decoded")
			}

			got := make([]bool, blocks)
			s.Visit(r, func(x block.Range) {
				if x.Empty() || !r.Covers(x) {
					t.Fatalf("visit of %v: %v", r, x)
				}
				for i := x.Start; i < x.End; i++ {
					got[i] = true
				}
			})
			if !slices.Equal(got[start:end], model[start:end]) {
				t.Fatalf("visit of %v differs", r)
			}
		}
	}
}

func checkRangeSet(t *testing.T, s *RangeSet, model []bool) {
	t.Helper()
	ranges, blocks := 0, 0
	for i, want := range model {
		if s.Contains(block.Index(i)) != want {
			t.Fatalf("Contains(%d) is %v", i, !want)
		}
		if want {
			blocks++
			if i == 0 || !model[i-1] {
				ranges++
			}
		}
	}
	if s.Len() != ranges || s.Blocks() != block.Count(blocks) {
		t.Fatalf("%d ranges of %d blocks, expected %d of %d", s.Len(), s.Blocks(), ranges, blocks)
	}
}

func FuzzDecodeRangeSet(f *testing.F) {
	s := NewRangeSet()
	f.Add(s.Append(nil))
	s.Add(rng(0, 5))
	s.Add(rng(1000, 1<<40))
	s.Add(rng(keyEnd-1, keyEnd))
	f.Add(s.Append(nil))
	f.Add([]byte{1, 0x80, 0, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := DecodeRangeSet(data)
		if err != nil {
			mustBeCorrupt(t, err)
			return
		}
		if again := s.Append(nil); !slices.Equal(again, data) {
			t.Fatalf("% x decodes and encodes to % x", data, again)
		}
	})
}
