package compression

import (
	"math"
	"math/bits"
)

// A frame of zstd is a sequence of blocks, each with tables of its own for how often
// which byte and which length occurs. An extent of several small files, or of blocks
// that were overwritten one by one, takes less where each kind of data has a block: the
// tables fit better, and what does not compress is stored as it is and costs the decoder
// nothing. The library makes one block of an extent. Where to begin a new one is what
// newer versions of the zstd library do (1.5.7, ZSTD_splitBlock, which compares how
// often pairs of bytes occur); here it is the order-0 entropy: a block ends where one
// table for both sides would cost more than a second table does.

const (
	// splitChunk is where blocks can begin: blocks of a filesystem are what
	// differs from each other.
	splitChunk = 4 << 10

	// splitSample is that of so many bytes of a chunk one is counted.
	splitSample = 2

	// splitGain is what the entropy of a chunk must gain from a block of its own, in
	// parts of 256 of the chunk. A block takes 3 bytes of header and 20 to 130 for its
	// tables, and the decoder some microseconds.
	splitGain = 24

	// splitLevel is the first level that splits. On extents of 64 KiB of a root filesystem
	// it makes zstd:better 0.5 % smaller, of one that was overwritten at random 3 %, encoding 5 to 10 %
	// slower and decoding 7 and 25 %; zstd:fastest would be 0.9 % smaller and a fifth slower.
	splitLevel = ZstdBetter
)

// A splitter finds out where an extent is better cut into blocks.
type splitter struct {
	block, chunk, both histogram
	ends               []int
}

// split returns the ends of the blocks that src is best cut into, in ascending order; the
// last one is len(src). They are valid until the next call.
func (s *splitter) split(src []byte) []int {
	s.ends = s.ends[:0]
	if len(src) > splitChunk {
		s.block.count(src[:splitChunk])
		for at := splitChunk; at < len(src); at += splitChunk {
			chunk := src[at:min(at+splitChunk, len(src))]
			s.chunk.count(chunk)
			s.both.add(&s.block, &s.chunk)
			if s.both.bits-s.block.bits-s.chunk.bits > float32(s.chunk.n*8*splitGain/256) {
				s.ends = append(s.ends, at)
				s.block = s.chunk
			} else {
				s.block = s.both
			}
		}
	}
	s.ends = append(s.ends, len(src))
	return s.ends
}

// A histogram counts the bytes of a sample.
type histogram struct {
	n    uint32
	bits float32 // that the sample takes at the least
	of   [256]uint32
}

// count makes h the histogram of a sample of p.
func (h *histogram) count(p []byte) {
	clear(h.of[:])
	var other [256]uint32 // equal bytes in a row would wait for each other's increment
	i := 0
	for ; i+2*splitSample <= len(p); i += 2 * splitSample {
		h.of[p[i]]++
		other[p[i+splitSample]]++
	}
	h.n = uint32(i / splitSample)
	sum := float32(0)
	for b, n := range other {
		h.of[b] += n
		sum += weight(h.of[b])
	}
	h.bits = weight(h.n) - sum
}

// add makes h the histogram of both samples.
func (h *histogram) add(a, b *histogram) {
	h.n = a.n + b.n
	sum := float32(0)
	for i := range h.of {
		h.of[i] = a.of[i] + b.of[i]
		sum += weight(h.of[i])
	}
	h.bits = weight(h.n) - sum
}

// weight is n log2 n.
func weight(n uint32) float32 {
	if n < uint32(len(weights)) {
		return weights[n]
	}
	// The eight bits below the highest decide: an error of up to 1/1024 of a bit for each byte.
	shift := bits.Len32(n) - weightBits
	return float32(n) * (weights[n>>shift]/float32(n>>shift) + float32(shift))
}

const weightBits = 11

var weights = func() (w [1 << weightBits]float32) {
	for n := range w {
		if n > 1 {
			w[n] = float32(float64(n) * math.Log2(float64(n)))
		}
	}
	return w
}()
