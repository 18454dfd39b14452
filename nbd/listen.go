package nbd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrSocketBusy is the error of [Listen] for a unix socket that a living
// process listens on.
var ErrSocketBusy = errors.New("socket is busy")

// socketPathMax is the longest path that fits a unix address (sun_path, less
// its NUL).
const socketPathMax = 107

// A ListenConfig says to whom a unix socket is open.
type ListenConfig struct {
	// Mode are the permissions, whatever the umask; 0 means 0600. At no moment
	// does the socket have more of them.
	Mode fs.FileMode

	// Owner and Group are a user and a group, by name or number, that the
	// socket is given to; empty: those of the process. Names are looked up in
	// /etc/passwd and /etc/group; the errors are those of os/user.
	Owner, Group string
}

// Listen is [ListenConfig.Listen] with the permissions mode.
func Listen(spec string, mode fs.FileMode) (net.Listener, error) {
	return ListenConfig{Mode: mode}.Listen(spec)
}

// Listen listens where spec says:
//
//	unix:PATH        a unix socket, which must not exist, unless as a socket that
//	                 nobody listens on any more: that is replaced. Closing the
//	                 listener removes it, if it is still its own.
//	unix:@NAME       a unix socket in the abstract namespace of Linux, which has
//	                 no file. Who may connect is decided for it by a [Server]
//	                 in the way of a file: by the client's user and groups.
//	tcp:[HOST][:PORT] a TCP address; HOST defaults to 127.0.0.1, PORT to 10809.
//	                 An IPv6 address stands in brackets.
func (lc ListenConfig) Listen(spec string) (net.Listener, error) {
	kind, rest, _ := strings.Cut(spec, ":")
	var l net.Listener
	var err error
	switch kind {
	case "unix":
		var who access
		if who, err = lc.access(); err != nil {
			break
		}
		if strings.HasPrefix(rest, "@") {
			l, err = listenAbstract(rest, who)
		} else {
			l, err = listenUnix(rest, who)
		}
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

// access is a [ListenConfig] that was looked up.
type access struct {
	mode     fs.FileMode
	uid, gid int // -1: those of the process
}

// access looks lc up.
func (lc ListenConfig) access() (access, error) {
	a := access{mode: lc.Mode, uid: -1, gid: -1}
	if a.mode == 0 {
		a.mode = 0o600
	}
	if a.mode&^fs.ModePerm != 0 {
		return a, fmt.Errorf("mode %#o is not from 0 to 0777", uint32(a.mode))
	}
	id := func(s string, byName func() (string, error)) (int, error) {
		n, err := strconv.ParseUint(s, 10, 31)
		if err != nil {
			if s, err = byName(); err != nil {
				return -1, err
			}
			n, err = strconv.ParseUint(s, 10, 31)
		}
		return int(n), err
	}
	var err error
	if lc.Owner != "" {
		if a.uid, err = id(lc.Owner, func() (string, error) {
			u, err := user.Lookup(lc.Owner)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		}); err != nil {
			return a, fmt.Errorf("owner: %w", err)
		}
	}
	if lc.Group != "" {
		if a.gid, err = id(lc.Group, func() (string, error) {
			g, err := user.LookupGroup(lc.Group)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		}); err != nil {
			return a, fmt.Errorf("group: %w", err)
		}
	}
	return a, nil
}

// listenAbstract listens on the abstract name that follows the @.
func listenAbstract(name string, who access) (net.Listener, error) {
	if len(name) < 2 || len(name) > socketPathMax {
		return nil, fmt.Errorf("an abstract name has 1 to %d bytes", socketPathMax-1)
	}
	l, err := net.Listen("unix", name)
	if errors.Is(err, syscall.EADDRINUSE) {
		err = ErrSocketBusy
	}
	if err != nil {
		return nil, err
	}
	return &abstractListener{l, who}, nil
}

// An abstractListener knows who may connect, which the kernel does not check.
type abstractListener struct {
	net.Listener
	who access
}

// errPeer is the error of a client that the permissions of its socket keep out.
var errPeer = errors.New("nbd: the client has no permission for the socket")

// permits tells whether the client of nc may connect, as the kernel would for a
// socket that is a file: by the permission to write.
func (l *abstractListener) permits(nc net.Conn) error {
	raw, err := nc.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var groups []uint32
	if e := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			groups, err = peerGroups(int(fd))
		}
	}); e != nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errPeer, err)
	}
	uid, gid := l.who.uid, l.who.gid
	if uid < 0 {
		uid = os.Geteuid()
	}
	if gid < 0 {
		gid = os.Getegid()
	}
	bit := fs.FileMode(0o002)
	switch {
	case cred.Uid == 0:
		return nil
	case int(cred.Uid) == uid:
		bit = 0o200
	case int(cred.Gid) == gid || slices.Contains(groups, uint32(gid)):
		bit = 0o020
	}
	if l.who.mode&bit == 0 {
		return fmt.Errorf("%w: user %d, process %d", errPeer, cred.Uid, cred.Pid)
	}
	return nil
}

// peerGroups are the supplementary groups of the process at the other end of the
// unix socket fd.
func peerGroups(fd int) ([]uint32, error) {
	for groups := make([]uint32, 64); ; groups = make([]uint32, 2*len(groups)) {
		size := uint32(4 * len(groups))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0:
			return groups[:size/4], nil
		case errno != unix.ERANGE || len(groups) > 1<<16: // NGROUPS_MAX
			return nil, os.NewSyscallError("getsockopt", errno)
		}
	}
}

func listenUnix(path string, who access) (net.Listener, error) {
	if path == "" {
		return nil, errors.New("no path")
	}
	// Absolute, for a URI made of it.
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

	l, err := bindUnix(path, who)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err = removeStale(path); err == nil {
			l, err = bindUnix(path, who)
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

// bindUnix creates the socket path for who and listens on it.
func bindUnix(path string, who access) (net.Listener, error) {
	mode := who.mode
	if who.uid >= 0 || who.gid >= 0 {
		mode &= 0o700 // as long as owner and group are the wrong ones
	}
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
	if ul.made, err = giveSocket(path, who); err != nil {
		ul.Close()
		return nil, err
	}
	return ul, nil
}

// giveSocket gives the socket path, which was just made, to who, and what the umask
// took from its mode, and returns what it is.
func giveSocket(path string, who access) (fs.FileInfo, error) {
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
	if who.uid >= 0 || who.gid >= 0 {
		if err := unix.Fchownat(fd, "", who.uid, who.gid, unix.AT_EMPTY_PATH); err != nil {
			return made, &fs.PathError{Op: "chown", Path: path, Err: err}
		}
	}
	if made.Mode().Perm() == who.mode {
		return made, nil
	}
	// O_PATH takes no fchmod; by way of /proc it does.
	return made, os.Chmod("/proc/self/fd/"+strconv.Itoa(fd), who.mode)
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
