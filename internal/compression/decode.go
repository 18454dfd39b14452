package compression

import (
	"fmt"
	"slices"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// A Decoder decodes. It is safe for concurrent use.
type Decoder struct {
	zstd *zstd.Decoder
}

// NewDecoder makes a Decoder for at most concurrency calls at a time, from 1 up,
// of codec Zstd; more wait. All of its memory is taken at first use and kept
// until Close.
func NewDecoder(concurrency int) *Decoder {
	z, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(max(concurrency, 1)),
		// What a damaged frame says of its size takes no memory.
		zstd.WithDecoderMaxMemory(SizeMax),
		zstd.WithDecoderMaxWindow(SizeMax),
		zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderLowmem(true),
	)
	if err != nil {
		panic(err) // only for options that do not fit
	}
	return &Decoder{z}
}

// Decode appends the size bytes that src is the encoding of to dst. With that
// much spare capacity it does not allocate. If src is not the encoding by c of
// exactly size bytes, the error wraps ErrCorrupt, dst is returned as it was, and
// its spare capacity holds anything. src and dst are borrowed and must not
// overlap.
func (d *Decoder) Decode(dst, src []byte, c Codec, size int) ([]byte, error) {
	if size < 0 || size > SizeMax {
		return dst, fmt.Errorf("%w: size %d", ErrCorrupt, size)
	}
	out := slices.Grow(dst, size)
	free := out[len(dst) : len(dst)+size : len(dst)+size]
	got, err := 0, error(nil)
	switch c {
	case None:
		got = copy(free, src)
		if len(src) > size {
			got = len(src)
		}
	case S2:
		if got, err = s2.DecodedLen(src); err == nil && got == size {
			_, err = s2.Decode(free, src)
		}
	case Zstd:
		var b []byte
		b, err = d.zstd.DecodeAll(src, free[:0])
		got = len(b)
	default:
		return dst, fmt.Errorf("%w: unknown %s", ErrCorrupt, c)
	}
	if err != nil {
		return dst, fmt.Errorf("%w: %s: %w", ErrCorrupt, c, err)
	}
	if got != size {
		return dst, fmt.Errorf("%w: %s: %d bytes, want %d", ErrCorrupt, c, got, size)
	}
	return out[:len(dst)+size], nil
}

// Close releases the memory. Decode must not be running nor be called any more.
func (d *Decoder) Close() { d.zstd.Close() }
