package disk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// deviceSize is the size of a block device in bytes.
func deviceSize(fd int) (int64, error) {
	var size uint64
	if err := ioctl(fd, unix.BLKGETSIZE64, unsafe.Pointer(&size)); err != nil {
		return 0, err
	}
	return int64(size), nil
}

// discard tells a block device that the sectors wholly inside [off, off+n) are
// no longer needed.
func discard(fd int, off, n int64) error {
	var sector int32 // an int in C
	if err := ioctl(fd, unix.BLKSSZGET, unsafe.Pointer(&sector)); err != nil {
		return err
	}
	mask := int64(sector) - 1
	start, end := (off+mask)&^mask, (off+n)&^mask
	if start >= end {
		return nil
	}
	return ioctl(fd, unix.BLKDISCARD, unsafe.Pointer(&[2]uint64{uint64(start), uint64(end - start)}))
}

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// inMemory reports whether the page cache itself is the medium of the file.
func inMemory(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, err
	}
	var mode unix.Stat_t
	if err := unix.Fstat(fd, &mode); err != nil {
		return false, err
	}
	// A device node lies on such a filesystem, its data does not.
	regular := mode.Mode&unix.S_IFMT == unix.S_IFREG
	return regular && (int64(st.Type) == unix.TMPFS_MAGIC || int64(st.Type) == unix.RAMFS_MAGIC), nil
}

// cachedPages is the number of pages of the file in the host's page cache
// (cachestat(2), Linux 6.5).
func cachedPages(fd int) (uint64, error) {
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &st, 0); err != nil {
		return 0, err
	}
	return st.Cache, nil
}
