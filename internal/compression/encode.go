package compression

import (
	"slices"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"cnbd/internal/invariants"
)

// An Encoder encodes for one worker. It is not safe for concurrent use.
type Encoder struct {
	zstd [ZstdBest]*zstd.Encoder // by level, from ZstdFastest up to ZstdBetter
}

// NewEncoder makes an Encoder. It has nothing to close.
func NewEncoder() *Encoder { return new(Encoder) }

// EncodedLenMax is the spare capacity of dst with which Encode of n bytes does
// not allocate.
func EncodedLenMax(n int) int {
	return max(n, s2.MaxEncodedLen(n)) + zstdSlack
}

// zstdSlack is how far zstd may be beyond the input before it sees that it has
// failed.
const zstdSlack = 1 << 10

// Encode appends the encoding of src by s to dst and returns it with the codec
// and level to be stored: those that s resolves to. ok is false when it is not
// worth it: src is to be stored as it is unless a sixteenth is saved. Codec None is
// never worth it. dst is returned as it was then, but for more capacity perhaps,
// which who encodes again should keep: what does not compress takes the most.
//
// src and dst are borrowed and must not overlap; src has at most SizeMax bytes.
// Encode at level ZstdBest waits for other Encoders that are at it.
func (e *Encoder) Encode(dst, src []byte, s Setting) (out []byte, used Setting, ok bool) {
	invariants.Assertf(len(src) <= SizeMax, "encode %d bytes", len(src))
	s = s.Resolve()
	switch s.Codec {
	case S2:
		dst = slices.Grow(dst, s2.MaxEncodedLen(len(src)))
		free := dst[len(dst):cap(dst)]
		var enc []byte
		if s.Level == S2Better {
			enc = s2.EncodeBetter(free, src)
		} else {
			enc = s2.Encode(free, src)
		}
		out = dst[:len(dst)+len(enc)] // enc lies in free, which is large enough
	case Zstd:
		out = e.zstdEncoder(s.Level).EncodeAll(src, slices.Grow(dst, len(src)+zstdSlack))
	default:
		return dst, Setting{}, false
	}
	if len(out)-len(dst) > len(src)-(len(src)+15)/16 {
		return out[:len(dst)], Setting{}, false
	}
	return out, s, true
}

func (e *Encoder) zstdEncoder(l Level) *zstd.Encoder {
	if l == ZstdBest {
		return bestEncoder()
	}
	z := &e.zstd[l]
	if *z == nil {
		*z = newZstdEncoder(l)
	}
	return *z
}

// bestEncoder is the one encoder of level ZstdBest: 37 MB whatever the window
// is, too much for every worker to have its own. Calls take turns.
var bestEncoder = sync.OnceValue(func() *zstd.Encoder { return newZstdEncoder(ZstdBest) })

func newZstdEncoder(l Level) *zstd.Encoder {
	e, err := zstd.NewWriter(nil,
		// Before the level, which else decides the size of tables. It also
		// makes every extent one block.
		zstd.WithWindowSize(SizeMax),
		zstd.WithEncoderLevel(zstdLevels[l]),
		// The two fast levels would store what has no matches but few symbols
		// as it is: hex, base64, PCM.
		zstd.WithAllLitEntropyCompression(true),
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false),
		zstd.WithLowerEncoderMem(true),
	)
	if err != nil {
		panic(err) // only for options that do not fit
	}
	return e
}

// zstdLevels is written out: the numbers of ours are format, those of the
// library are its own affair.
var zstdLevels = [...]zstd.EncoderLevel{
	ZstdFastest: zstd.SpeedFastest,
	ZstdDefault: zstd.SpeedDefault,
	ZstdBetter:  zstd.SpeedBetterCompression,
	ZstdBest:    zstd.SpeedBestCompression,
}
