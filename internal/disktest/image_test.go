package disktest

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Clones of clones, each changed at random around the border of two chunks, must
// each equal its own slice.
func TestImageClones(t *testing.T) {
	rng := rand.New(rand.NewPCG(Seed(t), 0))
	const size = 32 * pageSize
	const base = chunkSize - size/2
	type pair struct {
		img  *image
		want []byte
	}
	pairs := []pair{{newImage(base + size), make([]byte, size)}}
	got := make([]byte, size)
	for step := range 2000 * Scale(t) {
		p := &pairs[rng.IntN(len(pairs))]
		off := rng.Int64N(size)
		if rng.IntN(2) == 0 {
			off &^= pageSize - 1
		}
		n := min(rng.Int64N(5*pageSize), size-off)
		switch rng.IntN(10) {
		case 0:
			c := pair{p.img.clone(), bytes.Clone(p.want)}
			if len(pairs) < 8 {
				pairs = append(pairs, c)
			} else {
				pairs[rng.IntN(len(pairs))] = c
			}
		case 1:
			p.img.punch(base+off, n, false)
			clear(p.want[off : off+n])
		case 2:
			p.img.allocate(base+off, n)
		case 3:
			p.img.truncate(base + off)
			p.img.truncate(base + size)
			clear(p.want[off:])
		default:
			b := make([]byte, n)
			fill(b, Described, base+off, uint64(step), 0)
			p.img.write(b, base+off)
			copy(p.want[off:], b)
		}
		if step%10 != 0 {
			continue
		}
		for i, p := range pairs {
			if p.img.read(got, base); !bytes.Equal(got, p.want) {
				t.Fatalf("step %d: clone %d differs", step, i)
			}
			var allocated int64
			for _, c := range p.img.chunks {
				for _, pg := range c.pages {
					if takesSpace(pg) {
						allocated += pageSize
					}
				}
			}
			if allocated != p.img.allocated {
				t.Fatalf("step %d: %d bytes allocated, counted %d", step, allocated, p.img.allocated)
			}
		}
	}
	if *zeroPage.data != [pageSize]byte{} {
		t.Fatal("the shared zero page was written to")
	}
}

func TestImagePunchOfHugeRange(t *testing.T) {
	m := newImage(1 << 60)
	m.write([]byte("x"), 1<<59)
	m.write([]byte("y"), 1<<60-1)
	m.punch(0, 1<<60-1, true)
	var b [1]byte
	if m.read(b[:], 1<<60-1); b[0] != 'y' {
		t.Fatalf("got %q behind the punched range", b)
	}
	if m.read(b[:], 1<<59); b[0] == 'x' {
		t.Fatal("not punched")
	}
	// The last page was only zeroed, that of the first was given back.
	if m.allocated != pageSize {
		t.Fatalf("%d bytes allocated", m.allocated)
	}
}
