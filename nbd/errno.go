package nbd

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// An Errno is an error number of the protocol. 0 is success and never an error.
// A backend may return one, wrapped or not; a client gets the server's.
// errors.Is takes an Errno and its namesake of package syscall for the same.
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// The errors that backends have most reason to return, under readable names.
const (
	ErrReadOnly     = EPERM     // the export cannot be written
	ErrNoSpace      = ENOSPC    // a write finds no space
	ErrNotSupported = ENOTSUP   // only for a zeroing with FastZero that would not be fast
	ErrShutdown     = ESHUTDOWN // the backend is closing
)

var errnoNames = map[Errno]string{
	EPERM: "EPERM", EIO: "EIO", ENOMEM: "ENOMEM", EINVAL: "EINVAL", ENOSPC: "ENOSPC",
	EOVERFLOW: "EOVERFLOW", ENOTSUP: "ENOTSUP", ESHUTDOWN: "ESHUTDOWN",
}

func (e Errno) Error() string {
	if name, ok := errnoNames[e]; ok {
		return "nbd: " + name
	}
	return fmt.Sprintf("nbd: error number %d", uint32(e))
}

// Is reports whether target is the system's error number of the same name.
func (e Errno) Is(target error) bool {
	n, ok := target.(syscall.Errno)
	_, known := errnoNames[e]
	return ok && known && n == syscall.Errno(e) // the protocol took its numbers from Linux
}

// ErrnoOf is the one place where errors become error numbers of the protocol:
// 0 for nil, and EIO for an error that it does not know.
func ErrnoOf(err error) Errno {
	if err == nil {
		return 0
	}
	if e, ok := errors.AsType[Errno](err); ok {
		if _, known := errnoNames[e]; known {
			return e
		}
		return EIO
	}
	if n, ok := errors.AsType[syscall.Errno](err); ok {
		return errnoOfSyscall(n)
	}
	if errors.Is(err, context.Canceled) {
		return ESHUTDOWN // only the end of the connection or of the server cancels
	}
	return EIO
}

func errnoOfSyscall(n syscall.Errno) Errno {
	switch n {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return EPERM
	case syscall.ENOMEM:
		return ENOMEM
	case syscall.EINVAL:
		return EINVAL
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return ENOSPC
	case syscall.EOVERFLOW:
		return EOVERFLOW
	case syscall.ENOTSUP, syscall.ENOSYS: // ENOTSUP is EOPNOTSUPP too
		return ENOTSUP
	case syscall.ESHUTDOWN:
		return ESHUTDOWN
	}
	return EIO
}
