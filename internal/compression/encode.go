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
	zstd     [ZstdBest]*zstdEncoder // by level, from ZstdFastest up to ZstdBetter
	splitter splitter
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
	return e.encode(dst, src, s, worth)
}

// Pack is Encode at level ZstdBest for data that is hardly ever read: it is worth it from
// a sixty-fourth on. If that is doubtful ZstdBetter, which takes a quarter of the time,
// has to find so much first. (ZstdFastest finds nothing of what that does.)
func (e *Encoder) Pack(dst, src []byte, doubtful bool) (out []byte, used Setting, ok bool) {
	n := len(dst)
	if doubtful {
		if dst, _, ok = e.encode(dst, src, Setting{Zstd, ZstdBetter}, packWorth); !ok {
			return dst, Setting{}, false
		}
	}
	return e.encode(dst[:n], src, Setting{Zstd, ZstdBest}, packWorth)
}

// What encoding must save to be worth it, as a divisor of the size.
const (
	worth     = 16
	packWorth = 64
)

func (e *Encoder) encode(dst, src []byte, s Setting, worth int) (out []byte, used Setting, ok bool) {
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
		dst = slices.Grow(dst, len(src)+zstdSlack)
		z := e.zstdEncoder(s.Level)
		if s.Level >= splitLevel {
			out = z.encodeBlocks(dst, src, e.splitter.split(src))
		} else {
			out = z.stream.EncodeAll(src, dst)
		}
	default:
		return dst, Setting{}, false
	}
	if len(out)-len(dst) > len(src)-(len(src)+worth-1)/worth {
		return out[:len(dst)], Setting{}, false
	}
	return out, s, true
}

// A zstdEncoder encodes at one level. The library's Encoder has memory for EncodeAll and
// for a stream, each from its first use on; of a level only one is used.
type zstdEncoder struct {
	mu     sync.Mutex
	stream *zstd.Encoder
	out    []byte // appended to by Write; guarded by mu
}

func (e *Encoder) zstdEncoder(l Level) *zstdEncoder {
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
var bestEncoder = sync.OnceValue(func() *zstdEncoder { return newZstdEncoder(ZstdBest) })

func newZstdEncoder(l Level) *zstdEncoder {
	e, err := zstd.NewWriter(nil,
		// Before the level, which else decides the size of tables. It is also the
		// most that a block has.
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
	return &zstdEncoder{stream: e}
}

// encodeBlocks appends src to dst as one frame, with blocks that end at ends. It waits for
// others that use z.
func (z *zstdEncoder) encodeBlocks(dst, src []byte, ends []int) []byte {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.out = dst
	z.stream.ResetContentSize(z, int64(len(src)))
	at := 0
	for i, end := range ends {
		_, err := z.stream.Write(src[at:end])
		if at = end; err == nil && i < len(ends)-1 {
			err = z.stream.Flush()
		}
		if err != nil {
			panic(err) // Write has none
		}
	}
	if err := z.stream.Close(); err != nil {
		panic(err)
	}
	dst, z.out = z.out, nil
	return dst
}

// Write implements io.Writer.
func (z *zstdEncoder) Write(p []byte) (int, error) {
	z.out = append(z.out, p...)
	return len(p), nil
}

// zstdLevels is written out: the numbers of ours are format, those of the
// library are its own affair.
var zstdLevels = [...]zstd.EncoderLevel{
	ZstdFastest: zstd.SpeedFastest,
	ZstdDefault: zstd.SpeedDefault,
	ZstdBetter:  zstd.SpeedBetterCompression,
	ZstdBest:    zstd.SpeedBestCompression,
}
