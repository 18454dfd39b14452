package store

import (
	"bytes"
	"math/bits"
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// rawBlob is a random raw blob at start whose parts are cut anywhere.
func rawBlob(rng *rand.Rand, start block.Index) (b extents.Blob, stored []byte) {
	n := 2 + rng.IntN(ExtentBlocksMax-1)
	for bits.OnesCount32(b.Present) < 2 {
		b = extents.Blob{Start: start, Count: uint8(n), Present: rng.Uint32() >> (ExtentBlocksMax - n)}
	}
	stored = make([]byte, bits.OnesCount32(b.Present)*block.Size)
	for i := range stored {
		stored[i] = byte(rng.Uint32())
	}
	for rest := stored; len(rest) > 0; {
		k := min(1+rng.IntN(3*block.Size), len(rest))
		b.Parts, rest = append(b.Parts, rest[:k]), rest[k:]
	}
	return b, stored
}

func TestCutRaw(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	for range 1000 {
		b, stored := rawBlob(rng, 100)
		held := bits.OnesCount32(b.Present)
		n := 1 + rng.IntN(held-1)
		head, tail := cutRaw(b, n)
		if got := append(bytes.Join(head.Parts, nil), bytes.Join(tail.Parts, nil)...); !bytes.Equal(got, stored) {
			t.Fatalf("%b cut at %d: other bytes", b.Present, n)
		}
		if len(bytes.Join(head.Parts, nil)) != n*block.Size || bits.OnesCount32(head.Present) != n ||
			head.Start != b.Start || tail.Start != b.Start+block.Index(head.Count) || head.Count+tail.Count != b.Count ||
			tail.Present&1 == 0 || head.Present|tail.Present<<head.Count != b.Present || uint64(head.Present)>>head.Count != 0 {
			t.Fatalf("%+v cut at %d: %+v and %+v", b, n, head, tail)
		}
	}
}

// TestSegmentsAreFilled: blobs that do not compress leave less than a block of
// each segment unused, and read as what they are.
func TestSegmentsAreFilled(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	const blocks = 1024
	d := disktest.New(1, disktest.Options{})
	if err := Format(d, testGeometry(blocks, 64)); err != nil {
		t.Fatal(err)
	}
	s, err := Open(d, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := make([][]byte, blocks)
	for at := block.Index(0); at+ExtentBlocksMax <= blocks; {
		b, stored := rawBlob(rng, at)
		if err := s.AppendData(b); err != nil {
			t.Fatal(err)
		}
		for i := range int(b.Count) {
			if b.Present>>i&1 != 0 {
				want[int(at)+i], stored = stored[:block.Size], stored[block.Size:]
			}
		}
		at += block.Index(b.Count)
	}
	c, ok, err := s.AppendCommit()
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	if err := s.Sync(c); err != nil {
		t.Fatal(err)
	}
	list, err := s.Lookup(block.Range{End: blocks}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ends := map[uint32]uint32{}
	for _, e := range list {
		if e.Kind != extents.Data {
			for i := e.Start; i < e.Range().End; i++ {
				if want[i] != nil {
					t.Fatalf("block %d is %v", i, e.Kind)
				}
			}
			continue
		}
		ends[e.Addr.Segment] = max(ends[e.Addr.Segment], e.Addr.Offset+e.Addr.Length)
		blob := make([]byte, e.Addr.Length)
		if err := s.ReadBlob(blob, e.Addr); err != nil {
			t.Fatal(err)
		}
		for i := range int(e.Count) {
			if !bytes.Equal(blob[(int(e.Skip)+i)*block.Size:][:block.Size], want[int(e.Start)+i]) {
				t.Fatalf("block %d has other bytes", int(e.Start)+i)
			}
		}
	}
	full := 0
	for n, end := range ends {
		if n == s.log.mu.head.number {
			continue
		}
		full++
		if left := SegmentSizeMin - end; left >= block.Size+recordHeader {
			t.Errorf("segment %d has %d bytes left", n, left)
		}
	}
	if full < 5 {
		t.Errorf("%d segments are full", full)
	}
}
