// Package transfer copies the contents of disks: from files, block devices, streams,
// disk images of formats that qemu knows, and NBD exports, to the same and to devices
// of ours. Holes are skipped, and what is copied is summed up by a digest.
//
// A copy goes through the source from its beginning to its end, in chunks. While one
// is written and digested, the next is read. Memory does not depend on the size.
package transfer

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"

	"golang.org/x/sync/errgroup"
)

const (
	// chunkBytes is how much is copied at a time, in requests of requestBytes, that
	// go beside each other. A chunk of a source that is compressed is many extents.
	chunkBytes   = 4 << 20
	requestBytes = 1 << 20
)

// A Source is a disk that is read. Next and ReadAt are called for ascending offsets,
// ReadAt for several requests of a chunk at a time unless the source is Serial.
type Source interface {
	// Size is the size in bytes.
	Size() uint64
	// Next tells of the bytes at off, of which there are some, how many, at least
	// one, are holes, which read as zeros, or are not known to be such.
	Next(ctx context.Context, off uint64) (n uint64, hole bool, err error)
	// ReadAt fills p with the bytes at off.
	ReadAt(ctx context.Context, p []byte, off uint64) error
	// Serial tells that ReadAt takes one request at a time, in order.
	Serial() bool
}

// A Target is a disk that is written, or a stream. It is called with all bytes from
// the first to the last, in order.
type Target interface {
	// WriteAt writes p, borrowed, at off.
	WriteAt(ctx context.Context, p []byte, off uint64) error
	// Zero sees to it that the n bytes at off read as zeros.
	Zero(ctx context.Context, off, n uint64) error
}

// Options are the settings of Copy.
type Options struct {
	// Digest has the SHA-256 of all bytes, holes included, reported.
	Digest bool
	// Progress is told after each chunk how far the copy is; it may be nil.
	Progress func(done, total uint64)
}

// A Report is what was copied.
type Report struct {
	Bytes  uint64 `json:"bytes"`            // of the source
	Data   uint64 `json:"data_bytes"`       // of them, those that were no holes
	SHA256 string `json:"sha256,omitempty"` // of the source, in hex
}

// A chunk is a part of the source on its way.
type chunk struct {
	off, n uint64
	hole   bool
	data   []byte
}

// Copy copies all of src to dst, which may be nil: then src is just read. It blocks
// until that is done, ctx ends, or there is an error of one of the two.
func Copy(ctx context.Context, dst Target, src Source, o Options) (*Report, error) {
	r := &Report{Bytes: src.Size()}
	var sum hash.Hash
	if o.Digest {
		sum = sha256.New()
	}
	var this, next chunk
	buffers := [2][]byte{make([]byte, chunkBytes), make([]byte, chunkBytes)}
	for i, off := 0, uint64(0); off < r.Bytes || this.n > 0; i++ {
		var g errgroup.Group
		next = chunk{off: off, data: buffers[i%2]}
		if off < r.Bytes {
			g.Go(func() error { return next.read(ctx, src, r.Bytes) })
		}
		if c := this; c.n > 0 {
			if dst != nil {
				g.Go(func() error { return c.write(ctx, dst) })
			}
			if sum != nil {
				g.Go(func() error { return c.digest(ctx, sum) })
			}
		}
		if err := g.Wait(); err != nil {
			return r, err
		}
		if err := ctx.Err(); err != nil {
			return r, context.Cause(ctx)
		}
		if !this.hole {
			r.Data += this.n
		}
		if o.Progress != nil && this.n > 0 {
			o.Progress(this.off+this.n, r.Bytes)
		}
		this, off = next, off+next.n
	}
	if sum != nil {
		r.SHA256 = hex.EncodeToString(sum.Sum(nil))
	}
	return r, nil
}

// read reads what comes next.
func (c *chunk) read(ctx context.Context, src Source, size uint64) (err error) {
	if c.n, c.hole, err = src.Next(ctx, c.off); err != nil {
		return err
	}
	c.n = min(c.n, size-c.off)
	if c.hole {
		return nil
	}
	// To the end of an aligned chunk, so that no extent is read twice.
	c.n = min(c.n, chunkBytes-c.off%chunkBytes)
	c.data = c.data[:c.n]
	if src.Serial() {
		return src.ReadAt(ctx, c.data, c.off)
	}
	var g errgroup.Group
	for at := uint64(0); at < c.n; at += requestBytes {
		g.Go(func() error { return src.ReadAt(ctx, c.data[at:min(c.n, at+requestBytes)], c.off+at) })
	}
	return g.Wait()
}

func (c *chunk) write(ctx context.Context, dst Target) error {
	if c.hole {
		return dst.Zero(ctx, c.off, c.n)
	}
	return dst.WriteAt(ctx, c.data, c.off)
}

var zeros [64 << 10]byte

func (c *chunk) digest(ctx context.Context, sum hash.Hash) error {
	if !c.hole {
		sum.Write(c.data)
		return nil
	}
	return writeZeros(ctx, sum, c.n)
}

// writeZeros writes n zeros to w.
func writeZeros(ctx context.Context, w io.Writer, n uint64) error {
	for n > 0 && ctx.Err() == nil {
		m, err := w.Write(zeros[:min(n, uint64(len(zeros)))])
		if err != nil {
			return err
		}
		n -= uint64(m)
	}
	return context.Cause(ctx)
}

// A Stream is a Source of that many bytes that can be read once, such as a pipe.
type Stream struct {
	r    io.Reader
	size uint64
	read uint64
}

// NewStream is a stream of size bytes of r.
func NewStream(r io.Reader, size uint64) *Stream { return &Stream{r: r, size: size} }

// Size implements Source.
func (s *Stream) Size() uint64 { return s.size }

// Serial implements Source.
func (s *Stream) Serial() bool { return true }

// Next implements Source: all may be data.
func (s *Stream) Next(_ context.Context, off uint64) (uint64, bool, error) {
	return s.size - off, false, nil
}

// ReadAt implements Source. A stream that is too short, or at its end too long, is an
// error: it may have broken off.
func (s *Stream) ReadAt(_ context.Context, p []byte, off uint64) error {
	n, err := io.ReadFull(s.r, p)
	s.read += uint64(n)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("the stream has ended after %d bytes, of %d that it should have", s.read, s.size)
	}
	if err == nil && off+uint64(n) == s.size {
		if n, err := io.ReadFull(s.r, make([]byte, 1)); n > 0 {
			return fmt.Errorf("the stream goes on after the %d bytes that it should have", s.size)
		} else if err != io.EOF {
			return err
		}
	}
	return err
}

// An Output is a Target that takes all bytes in order, such as a pipe.
type Output struct{ w io.Writer }

// NewOutput is w as a Target.
func NewOutput(w io.Writer) *Output { return &Output{w} }

// WriteAt implements Target.
func (o *Output) WriteAt(_ context.Context, p []byte, _ uint64) error {
	_, err := o.w.Write(p)
	return err
}

// Zero implements Target.
func (o *Output) Zero(ctx context.Context, _, n uint64) error { return writeZeros(ctx, o.w, n) }

// ErrDiffers says that what was read back is not what was written.
var ErrDiffers = errors.New("what was read back differs")

// Verify reads all of copied and compares its digest with that of r.
func (r *Report) Verify(ctx context.Context, copied Source, progress func(done, total uint64)) error {
	again, err := Copy(ctx, nil, limited{copied, r.Bytes}, Options{Digest: true, Progress: progress})
	if err == nil && (copied.Size() < r.Bytes || again.SHA256 != r.SHA256) {
		err = fmt.Errorf("%w: %d bytes of SHA-256 %s, of what was copied it is %s", ErrDiffers, min(copied.Size(), r.Bytes), again.SHA256, r.SHA256)
	}
	return err
}

// limited is the beginning of a source: a copy may be larger, by less than a sector.
type limited struct {
	Source
	size uint64
}

func (l limited) Size() uint64 { return min(l.size, l.Source.Size()) }
