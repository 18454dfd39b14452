package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// directAlign is the least alignment of direct I/O; it satisfies the
	// devices with sectors of 512 and of 4096 bytes.
	directAlign = 4096
	// directBuffers bounds the reads in flight and directBufferSize the bytes
	// of each: recovery reads in long runs, by few readers.
	directBuffers    = 2
	directBufferSize = 256 << 10
)

var errNoDirect = errors.New("direct I/O is not supported")

// A directReader reads a file past the page cache (O_DIRECT). It may be closed
// while reads are in flight.
type directReader struct {
	file    *os.File
	raw     syscall.RawConn
	align   int64
	buffers chan []byte // free bounce buffers, aligned
}

// openDirect opens f a second time, by its descriptor: its path may be gone.
func openDirect(f *osFile) (*directReader, error) {
	align := int64(directAlign)
	var fd int
	err := f.control("direct I/O", func(orig int) (err error) {
		var stx unix.Statx_t
		if unix.Statx(orig, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx) == nil && stx.Mask&unix.STATX_DIOALIGN != 0 {
			if stx.Dio_offset_align == 0 {
				return errNoDirect
			}
			align = max(align, int64(stx.Dio_offset_align), int64(stx.Dio_mem_align))
		}
		fd, err = unix.Open("/proc/self/fd/"+strconv.Itoa(orig), unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, err
	}
	d := &directReader{
		file:    os.NewFile(uintptr(fd), f.file.Name()),
		align:   align,
		buffers: make(chan []byte, directBuffers),
	}
	for range directBuffers {
		d.buffers <- alignedBuffer(max(directBufferSize, int(align)), int(align))
	}
	if d.raw, err = d.file.SyscallConn(); err == nil {
		// Some filesystems accept the flag and refuse the read.
		if _, err = d.ReadAt(make([]byte, 1), 0); err == io.EOF {
			err = nil
		}
	}
	if err != nil {
		d.file.Close()
		return nil, err
	}
	return d, nil
}

// Close ends the reader. Reads in flight fail with fs.ErrClosed.
func (d *directReader) Close() error { return d.file.Close() }

// ReadAt is io.ReaderAt. It waits for a free bounce buffer.
func (d *directReader) ReadAt(p []byte, off int64) (n int, err error) {
	if off < 0 {
		return 0, pathError("read", d.file.Name(), syscall.EINVAL)
	}
	buf := <-d.buffers
	defer func() { d.buffers <- buf }()
	for n < len(p) {
		pos := off + int64(n)
		start := pos &^ (d.align - 1)
		skip := int(pos - start)
		want := (int64(skip+len(p)-n) + d.align - 1) &^ (d.align - 1)
		got, err := d.read(buf[:min(want, int64(len(buf)))], start)
		if err != nil {
			return n, err
		}
		if got <= skip {
			return n, io.EOF
		}
		n += copy(p[n:], buf[skip:got])
		// Only the end of the file ends a transfer off the alignment.
		if n < len(p) && int64(got)%d.align != 0 {
			return n, io.EOF
		}
	}
	return n, nil
}

func (d *directReader) read(p []byte, off int64) (n int, err error) {
	err = control(d.raw, "read", d.file.Name(), func(fd int) (err error) {
		n, err = unix.Pread(fd, p, off)
		return err
	})
	if err != nil && errors.Is(err, fs.ErrClosed) {
		return 0, fs.ErrClosed
	}
	return n, err
}

// alignedBuffer is n bytes that begin at a multiple of align, a power of two.
// Heap objects do not move.
func alignedBuffer(n, align int) []byte {
	b := make([]byte, n+align)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	return b[skip : skip+n : skip+n]
}
