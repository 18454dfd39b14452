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
