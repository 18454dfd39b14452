package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// A File is a regular file or a block device as a Source, whose holes are found by
// SEEK_DATA.
type File struct {
	f    *os.File
	size uint64
}

// NewFile is f as a source; it stays the caller's. What is neither a regular file nor
// a block device is an error.
func NewFile(f *os.File) (*File, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); !mode.IsRegular() && (mode&fs.ModeDevice == 0 || mode&fs.ModeCharDevice != 0) {
		return nil, fmt.Errorf("%s is neither a regular file nor a block device", f.Name())
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return &File{f, uint64(size)}, nil
}

// Size implements Source.
func (f *File) Size() uint64 { return f.size }

// Serial implements Source.
func (f *File) Serial() bool { return false }

// Next implements Source.
func (f *File) Next(_ context.Context, off uint64) (n uint64, hole bool, err error) {
	switch data, err := unix.Seek(int(f.f.Fd()), int64(off), unix.SEEK_DATA); {
	case err == unix.ENXIO:
		return f.size - off, true, nil
	case err != nil: // it cannot tell, as block devices cannot
		return f.size - off, false, nil
	case uint64(data) > off:
		return uint64(data) - off, true, nil
	}
	end, err := unix.Seek(int(f.f.Fd()), int64(off), unix.SEEK_HOLE)
	if err != nil || uint64(end) <= off {
		return f.size - off, false, nil
	}
	return uint64(end) - off, false, nil
}

// ReadAt implements Source.
func (f *File) ReadAt(_ context.Context, p []byte, off uint64) error {
	_, err := f.f.ReadAt(p, int64(off))
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s has become shorter while it was read", f.f.Name())
	}
	return err
}

// A RawFile is a new file, empty and sparse, as a Target: what reads as zeros is left
// out.
type RawFile struct{ w io.WriterAt }

// NewRawFile is w as a target.
func NewRawFile(w io.WriterAt) *RawFile { return &RawFile{w} }

// WriteAt implements Target.
func (f *RawFile) WriteAt(_ context.Context, p []byte, off uint64) error {
	_, err := f.w.WriteAt(p, int64(off))
	return err
}

// Zero implements Target.
func (f *RawFile) Zero(context.Context, uint64, uint64) error { return nil }

// A BlockDevice is one as a Target.
type BlockDevice struct {
	f      *os.File
	zeroes bool // it can be told to
}

// NewBlockDevice is the block device f as a target.
func NewBlockDevice(f *os.File) *BlockDevice { return &BlockDevice{f, true} }

// WriteAt implements Target.
func (b *BlockDevice) WriteAt(_ context.Context, p []byte, off uint64) error {
	_, err := b.f.WriteAt(p, int64(off))
	return err
}

// Zero implements Target.
func (b *BlockDevice) Zero(ctx context.Context, off, n uint64) error {
	const most = 1 << 30 // a time, so that it can be interrupted
	for n > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		step := min(n, most)
		if b.zeroes && unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(step)) != nil {
			b.zeroes = false
		}
		if !b.zeroes {
			if err := writeZeros(ctx, io.NewOffsetWriter(b.f, int64(off)), step); err != nil {
				return err
			}
		}
		off, n = off+step, n-step
	}
	return nil
}
