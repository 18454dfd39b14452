package compression_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	. "cnbd/internal/compression"
	"cnbd/internal/disktest"
)

// What was overwritten block by block with other kinds of data takes little more than
// the kinds apart; one table for all of them took 8 to 14 % more.
func TestMixedBlocks(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	kinds := make(map[string][]byte)
	for _, c := range corpora(rng) {
		kinds[c.name] = c.data
	}
	for _, level := range []Level{ZstdBetter, ZstdBest} {
		for _, pair := range [][2]string{{"hex", "noise"}, {"text", "noise"}} {
			const n = 64 << 10
			apart := 0
			for _, kind := range pair {
				out, _, ok := e.Encode(nil, kinds[kind][:n/2], Setting{Zstd, level})
				if !ok {
					out = kinds[kind][:n/2]
				}
				apart += len(out)
			}
			var mixed []byte
			for at := 0; at < n/2; at += 4 << 10 {
				for _, kind := range pair {
					mixed = append(mixed, kinds[kind][at:at+4<<10]...)
				}
			}
			out, _, ok := e.Encode(nil, mixed, Setting{Zstd, level})
			if !ok {
				t.Errorf("%v at level %d does not compress", pair, level)
				continue
			}
			if got := float64(len(out)) / float64(apart); got > 1.03 {
				t.Errorf("%v at level %d take %.3f of what they take apart, %d bytes", pair, level, got, len(out))
			} else {
				t.Logf("%v at level %d: %.3f", pair, level, got)
			}
			back, err := d.Decode(nil, out, Zstd, n)
			if err != nil || !bytes.Equal(back, mixed) {
				t.Errorf("%v at level %d does not come back: %v", pair, level, err)
			}
		}
	}
}

// Pack keeps what saves a sixty-fourth, and leaves what does not.
func TestPack(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	before := []byte("before")
	for zeros := 0; zeros < 16<<10; zeros += 512 {
		src := noise(rng, SizeMax)
		clear(src[len(src)/2:][:zeros])
		out, used, ok := e.Pack(before, src, zeros%1024 == 0)
		if !bytes.HasPrefix(out, before) {
			t.Fatal("what was there is gone")
		}
		// The rest of a chunk with noise in it is not found.
		if least := SizeMax / 64; ok && zeros < least || !ok && zeros > least+4<<10+512 {
			t.Errorf("%d zeros in noise: %v, %d bytes", zeros, ok, len(out))
		}
		if !ok {
			continue
		}
		if back, err := d.Decode(nil, out[len(before):], used.Codec, len(src)); err != nil || !bytes.Equal(back, src) || used != (Setting{Zstd, ZstdBest}) {
			t.Errorf("%d zeros in noise do not come back from %v: %v", zeros, used, err)
		}
	}
}
