package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrLocked says that somebody else has the file or block device open.
	ErrLocked = errors.New("in use by another process")
	// ErrFileType says that a path names something that cannot hold a store.
	ErrFileType = errors.New("not a regular file or block device")
)

const (
	// lockTries bounds how often Open follows a path that is being replaced.
	lockTries = 8
	// deviceLockWait bounds the wait for the lock of a block device: udev holds
	// a shared flock(2) for the moment in which it probes one.
	deviceLockWait  = time.Second
	deviceLockRetry = 10 * time.Millisecond
)

// OpenOptions say how Open opens. The zero value opens for reading and writing.
type OpenOptions struct {
	// ReadOnly opens for reading. Readers of a regular file share its lock with
	// other readers; a writer excludes everybody.
	ReadOnly bool
	// Exclusive keeps other readers out of a file opened ReadOnly.
	Exclusive bool
}

// osFile is a regular file or block device of the host. Everything but direct
// is immutable.
type osFile struct {
	file   *os.File
	raw    syscall.RawConn
	device bool
	// direct answers reads from DropCache until the next WriteAt, else nil.
	direct atomic.Pointer[directReader]
}

// Open opens the regular file or block device at path and locks it before
// anything is read; the lock goes with Close or the death of the process. A
// block device is also claimed with O_EXCL, by readers too, which keeps out
// mounts and users who reach it by another name. After locking, path still
// names what was locked.
//
// Errors name the path and are fs.ErrNotExist, fs.ErrPermission, ErrLocked,
// ErrFileType, syscall.EISDIR or what else the host says.
func Open(path string, opts OpenOptions) (File, error) {
	f, err := open(path, opts)
	if err != nil {
		return nil, err // not f: a nil *osFile is not a nil File
	}
	return f, nil
}

func open(path string, opts OpenOptions) (*osFile, error) {
	for range lockTries {
		f, err := openLocked(path, opts)
		if err != nil {
			return nil, err
		}
		if same, err := f.isAt(path); same {
			return f, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			f.Close()
			return nil, err
		}
		// Replaced or removed between open and lock: what is locked is not
		// what the next one will find at path (rule R12).
		f.Close()
	}
	return nil, pathError("open", path, fmt.Errorf("replaced again and again: %w", ErrLocked))
}

// openLocked opens and locks what path names at this moment.
func openLocked(path string, opts OpenOptions) (*osFile, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, pathError("open", path, err)
	}
	if err := checkType(path, st.Mode()); err != nil {
		return nil, err
	}
	// O_NONBLOCK, that a FIFO which takes the path's place now cannot hang us.
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if opts.ReadOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if st.Mode()&fs.ModeDevice != 0 {
		flags |= unix.O_EXCL
	}
	var fd int
	for {
		if fd, err = unix.Open(path, flags, 0); err != unix.EINTR {
			break
		}
	}
	if err == unix.EBUSY {
		err = fmt.Errorf("%w (%w)", ErrLocked, err)
	}
	if err != nil {
		return nil, pathError("open", path, err)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, pathError("open", path, err)
	}
	f, err := newOSFile(os.NewFile(uintptr(fd), path))
	if err != nil {
		return nil, err
	}
	if err := f.lock(!opts.ReadOnly || opts.Exclusive); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// newOSFile wraps file, which is closed when it is of a type that cannot be used.
func newOSFile(file *os.File) (*osFile, error) {
	st, err := file.Stat()
	if err == nil {
		err = checkType(file.Name(), st.Mode())
	}
	var raw syscall.RawConn
	if err == nil {
		raw, err = file.SyscallConn()
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return &osFile{file: file, raw: raw, device: st.Mode()&fs.ModeDevice != 0}, nil
}

// checkType accepts regular files and block devices.
func checkType(path string, mode fs.FileMode) error {
	switch {
	case mode.IsRegular(), mode.Type() == fs.ModeDevice:
		return nil
	case mode.IsDir():
		return pathError("open", path, syscall.EISDIR)
	default:
		return pathError("open", path, ErrFileType)
	}
}

// lock takes the flock(2) of f without waiting for another owner.
func (f *osFile) lock(exclusive bool) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for deadline := time.Now().Add(deviceLockWait); ; time.Sleep(deviceLockRetry) {
		err := f.control("lock", func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if !f.device || time.Now().After(deadline) {
			return pathError("lock", f.file.Name(), ErrLocked)
		}
	}
}

// isAt reports whether path names f.
func (f *osFile) isAt(path string) (bool, error) {
	at, err := os.Stat(path)
	if err != nil {
		return false, pathError("open", path, err)
	}
	st, err := f.file.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(at, st), nil
}

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	if d := f.direct.Load(); d != nil {
		// A WriteAt at the same time may have closed it.
		if n, err := d.ReadAt(p, off); !errors.Is(err, fs.ErrClosed) {
			return n, err
		}
	}
	return f.file.ReadAt(p, off)
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	f.setDirect(nil)
	return f.file.WriteAt(p, off)
}

func (f *osFile) WriteBehind(off, n int64) error {
	// Without its flags that wait, sync_file_range(2) does not take the error of what
	// was written before away from Sync.
	err := f.control("sync_file_range", func(fd int) error {
		return unix.SyncFileRange(fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
	if unsupported(err) || errors.Is(err, unix.EPERM) { // a sandbox that does not know the call
		return nil
	}
	return err
}

func (f *osFile) Sync() error { return f.control("fdatasync", unix.Fdatasync) }

// DropCache empties the host's page cache of the file and has all reads until
// the next WriteAt made by direct I/O. Where the filesystem has no direct I/O
// it proves that no page is left, and fails if it cannot.
func (f *osFile) DropCache() error {
	f.setDirect(nil)
	var memory bool
	err := f.control("drop cache", func(fd int) (err error) {
		if memory, err = inMemory(fd); memory || err != nil {
			return err
		}
		return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED)
	})
	if err != nil || memory {
		return err
	}
	d, err := openDirect(f)
	if err == nil {
		f.setDirect(d)
		return nil
	}
	// fadvise(2) is advice: pages that are dirty, locked or mapped stay.
	return f.control("drop cache", func(fd int) error {
		if n, cerr := cachedPages(fd); cerr != nil {
			return errors.Join(err, cerr)
		} else if n != 0 {
			return fmt.Errorf("%d pages stay in the page cache and there is no direct I/O: %w", n, err)
		}
		return nil
	})
}

func (f *osFile) Medium() (MediumReader, error) {
	if d, err := openDirect(f); err == nil {
		return d, nil
	}
	return cachedReader{f.file}, nil
}

// A cachedReader reads by way of the page cache.
type cachedReader struct{ io.ReaderAt }

func (cachedReader) Close() error { return nil }

// setDirect replaces the direct reader; reads in flight on the old one finish.
func (f *osFile) setDirect(d *directReader) {
	if d == nil && f.direct.Load() == nil {
		return
	}
	if old := f.direct.Swap(d); old != nil {
		old.file.Close()
	}
}

func (f *osFile) Allocate(off, n int64) error {
	if off < 0 || n < 0 || off > off+n {
		return pathError("allocate", f.file.Name(), syscall.EINVAL)
	}
	if n == 0 {
		return nil
	}
	if !f.device {
		err := f.control("fallocate", func(fd int) error { return unix.Fallocate(fd, 0, off, n) })
		if !unsupported(err) {
			return err
		}
	}
	size, err := f.Size()
	if err != nil || off+n <= size {
		return err
	}
	if f.device {
		return pathError("allocate", f.file.Name(), syscall.ENOSPC)
	}
	// A byte written where nothing is yet, and not ftruncate(2): that would
	// cut off what a WriteAt behind the range adds at the same time.
	_, err = f.file.WriteAt([]byte{0}, off+n-1)
	return err
}

func (f *osFile) Punch(off, n int64) error {
	err := f.control("punch", func(fd int) error {
		if f.device {
			return discard(fd, off, n)
		}
		if n == 0 {
			return nil // EINVAL for fallocate(2)
		}
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if unsupported(err) {
		return nil
	}
	return err
}

func (f *osFile) Size() (size int64, err error) {
	if f.device {
		err = f.control("size", func(fd int) (err error) {
			size, err = deviceSize(fd)
			return err
		})
		return size, err
	}
	st, err := f.file.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f *osFile) Truncate(size int64) error {
	if f.device {
		return nil
	}
	return f.file.Truncate(size)
}

// AllocatesUnwritten implements File. Of the filesystems that are known to mark
// extents as unwritten those count that write in place afterwards.
func (f *osFile) AllocatesUnwritten() bool {
	if f.device {
		return false
	}
	var st unix.Statfs_t
	err := f.control("fstatfs", func(fd int) error { return unix.Fstatfs(fd, &st) })
	return err == nil && (st.Type == unix.EXT4_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC)
}

func (f *osFile) Allocated() (int64, error) {
	if f.device {
		return f.Size()
	}
	st, err := f.file.Stat()
	if err != nil {
		return 0, err
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512, nil
}

func (f *osFile) Close() error {
	f.setDirect(nil)
	return f.file.Close()
}

// control runs fn with the descriptor of f, which stays open meanwhile, until
// it is not interrupted. Its error is given the name of op and the path.
func (f *osFile) control(op string, fn func(fd int) error) error {
	return control(f.raw, op, f.file.Name(), fn)
}

func control(raw syscall.RawConn, op, path string, fn func(fd int) error) error {
	var err error
	if raw.Control(func(fd uintptr) {
		for {
			if err = fn(int(fd)); err != unix.EINTR {
				return
			}
		}
	}) != nil {
		err = fs.ErrClosed
	}
	return pathError(op, path, err)
}

// pathError gives err op and path, once. nil stays nil.
func pathError(op, path string, err error) error {
	if err == nil {
		return nil
	}
	if pe, ok := err.(*fs.PathError); ok {
		err = pe.Err
	}
	return &fs.PathError{Op: op, Path: path, Err: err}
}

// unsupported reports whether err says that the host cannot do it at all.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY)
}
