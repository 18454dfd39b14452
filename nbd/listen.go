package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrSocketBusy is the error of [Listen] for a unix socket that a living
// process listens on.
var ErrSocketBusy = errors.New("socket is busy")

// socketPathMax is the longest path that fits a unix address (sun_path, less
// its NUL).
const socketPathMax = 107

// Listen listens where spec says:
//
//	unix:PATH        a unix socket, which must not exist, unless as a socket that
//	                 nobody listens on any more: that is replaced. Closing the
//	                 listener removes it, if it is still its own.
//	tcp:[HOST][:PORT] a TCP address; HOST defaults to 127.0.0.1, PORT to 10809.
//	                 An IPv6 address stands in brackets.
//
// mode are the permissions of a unix socket, whatever the umask; 0 means 0600.
// At no moment does the socket have more of them.
func Listen(spec string, mode fs.FileMode) (net.Listener, error) {
	kind, rest, _ := strings.Cut(spec, ":")
	var l net.Listener
	var err error
	switch kind {
	case "unix":
		l, err = listenUnix(rest, mode)
	case "tcp":
		l, err = listenTCP(rest)
	default:
		err = errors.New("want unix:PATH or tcp:HOST:PORT")
	}
	if err != nil {
		return nil, fmt.Errorf("nbd: listen on %q: %w", spec, err)
	}
	return l, nil
}

func listenTCP(addr string) (net.Listener, error) {
	host, port := addr, ""
	if i := strings.LastIndexByte(addr, ':'); i >= 0 && !strings.HasSuffix(addr, "]") {
		host, port = addr[:i], addr[i+1:]
	}
	if h, ok := strings.CutPrefix(host, "["); ok {
		if host, ok = strings.CutSuffix(h, "]"); !ok {
			return nil, errors.New("missing ]")
		}
	} else if strings.Contains(host, ":") {
		return nil, errors.New("an IPv6 address must stand in brackets")
	}
	if host == "" {
		host = "127.0.0.1"
	}
	if port == "" {
		port = strconv.Itoa(DefaultPort)
	}
	// A client's host that vanishes is noticed in about two minutes.
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
	}}
	return lc.Listen(context.Background(), "tcp", net.JoinHostPort(host, port))
}

func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if path == "" {
		return nil, errors.New("no path")
	}
	if mode == 0 {
		mode = 0o600
	}
	if mode&^fs.ModePerm != 0 {
		return nil, fmt.Errorf("mode %#o is not from 0 to 0777", uint32(mode))
	}
	// Absolute, for a URI made of it; and then it is never an abstract socket,
	// which has no permissions.
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if len(path) > socketPathMax {
		return nil, fmt.Errorf("path is longer than %d bytes", socketPathMax)
	}
	// Between the bind and the listen of another server its socket looks dead.
	// So all of it happens under a lock.
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer unlock()

	l, err := bindUnix(path, mode)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err = removeStale(path); err == nil {
			l, err = bindUnix(path, mode)
		}
	}
	return l, err
}

// lockDir locks the directory dir against other calls of Listen, in whatever
// process. The lock ends with the process.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	// Held for microseconds by us; not to be waited for without end, because
	// anyone who can read the directory can hold it.
	for range 500 {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		d.Close()
		return nil, &fs.PathError{Op: "flock", Path: dir, Err: err}
	}
	return func() { d.Close() }, nil
}

// bindUnix creates the socket path with the permissions mode and listens on it.
func bindUnix(path string, mode fs.FileMode) (net.Listener, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		// The file that bind makes gets the mode of the socket, less the umask,
		// so there is no moment at which others may connect.
		if e := raw.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode)) }); e != nil {
			return e
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	ul := &unixListener{UnixListener: l.(*net.UnixListener), path: path}
	ul.SetUnlinkOnClose(false) // Close knows better
	if ul.made, err = chmodSocket(path, mode); err != nil {
		ul.Close()
		return nil, err
	}
	return ul, nil
}

// chmodSocket gives the socket path, which was just made, what the umask took
// from its mode, and returns what it is.
func chmodSocket(path string, mode fs.FileMode) (fs.FileInfo, error) {
	// By a descriptor: a link that was put in its place is not followed.
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	made, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if made.Mode().Type() != fs.ModeSocket {
		return nil, errors.New("another file has taken its place")
	}
	if made.Mode().Perm() == mode {
		return made, nil
	}
	// O_PATH takes no fchmod; by way of /proc it does.
	return made, os.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode)
}

// removeStale removes path if it is a socket on which nobody listens.
func removeStale(path string) error {
	found, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // its owner was just closing it
	}
	if err != nil {
		return err
	}
	if found.Mode().Type() != fs.ModeSocket {
		return errors.New("file exists and is not a socket")
	}
	nc, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		nc.Close()
		return ErrSocketBusy
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%w: %w", ErrSocketBusy, err)
	}
	return removeIfSame(path, found)
}

// removeIfSame removes path if it still is the file that was found.
func removeIfSame(path string, found fs.FileInfo) error {
	now, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(now, found) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Remove(path)
}

// A unixListener removes its socket when it is closed, and never another one
// that has come to bear its name.
type unixListener struct {
	*net.UnixListener
	path string
	made fs.FileInfo
	once sync.Once
}

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if l.made != nil {
			removeIfSame(l.path, l.made) // first, while nobody can take it for stale
		}
	})
	return l.UnixListener.Close()
}
