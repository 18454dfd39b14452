// Package disk is the seam between the store and the operating system: a File
// is one backing file or block device, with just the operations that the store
// needs and the durability that each of them has. Tests put a simulated disk
// under it (package disktest).
package disk

import "io"

// A MediumReader is what File.Medium returns. ReadAt may be called concurrently.
type MediumReader interface {
	io.ReaderAt
	io.Closer
}

// A File is the backing medium of a store. All methods may be called
// concurrently; overlapping writes are the caller's mistake.
//
// Durability: what WriteAt, Allocate, Punch and Truncate did may be lost, kept
// or torn at sector borders in any order at a power cut, until a Sync that
// began after they returned has returned nil. After a failed Sync nothing is
// known of what was written since the last successful one, and ReadAt may show
// bytes that are not on the medium (see DropCache).
type File interface {
	// ReadAt is io.ReaderAt. It may be answered from the host's page cache.
	// Reading past the end gives io.EOF and the bytes there are.
	ReadAt(p []byte, off int64) (int, error)

	// WriteAt is io.WriterAt. It extends the file when needed. p is borrowed
	// until the call returns. A full backing filesystem is syscall.ENOSPC.
	WriteAt(p []byte, off int64) (int, error)

	// WriteBehind asks the host to begin to bring what was written to [off, off+n) to
	// the medium, so that little is left for the next Sync, and its page cache does
	// not fill with data that wait. nil says nothing of durability; an error is one of
	// Sync that came early. Where the host cannot do it nothing happens. It waits while
	// the medium has more to do than it takes on.
	WriteBehind(off, n int64) error

	// Sync is fdatasync(2): data, and what metadata is needed to read it.
	Sync() error

	// DropCache makes later ReadAt calls read the medium and not the host's
	// page cache (rule R5). The caller has called Sync before. An error says
	// that this could not be ensured.
	DropCache() error

	// Medium returns a reader of what the medium holds, past the host's page
	// cache where the host can do that, beside all other methods. The caller
	// closes it before the File. It waits for others that read by it.
	Medium() (MediumReader, error)

	// Allocate ensures that the bytes [off, off+n) have space on the medium, as
	// fallocate(2) mode 0 does; it extends the size. On a block device, or where
	// the host cannot do it, it returns nil when the range lies in the size or
	// can be extended sparsely. A full host is syscall.ENOSPC.
	Allocate(off, n int64) error

	// AllocatesUnwritten tells whether what Allocate gives is marked as not written,
	// which the first Sync after its first write has to change in a journal. That can
	// take longer than all the rest of it: what has been written before, if only
	// zeros, is then cheaper to write.
	AllocatesUnwritten() bool

	// Punch gives the space of [off, off+n) back to the host: holes for a file,
	// discard for a block device. Afterwards the range reads as anything. Where
	// the host cannot do it, nothing happens and the error is nil.
	Punch(off, n int64) error

	// Size is the size in bytes.
	Size() (int64, error)

	// Truncate sets the size of a file; on a block device it does nothing.
	Truncate(size int64) error

	// Allocated is the number of bytes of the medium in use by a file
	// (st_blocks * 512), and the size for a block device.
	Allocated() (int64, error)

	// Close releases the file and its lock.
	Close() error
}
