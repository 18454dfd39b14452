package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"cnbd/internal/disktest"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	l, err := Listen("unix:"+path, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:"+path, 0o600); !errors.Is(err, ErrSocketBusy) || !strings.Contains(err.Error(), path) {
		t.Errorf("a live socket: %v", err)
	}
	if nc, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	} else {
		nc.Close()
	}
	if got := l.Addr().String(); got != path {
		t.Errorf("address %s", got)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

// The socket has the mode asked for, whatever the umask.
func TestListenMode(t *testing.T) {
	dir := socketDir(t)
	for _, umask := range []int{0, 0o022, 0o777} {
		for mode, want := range map[fs.FileMode]fs.FileMode{0: 0o600, 0o600: 0o600, 0o660: 0o660, 0o666: 0o666, 0o777: 0o777} {
			path := filepath.Join(dir, "s")
			before := unix.Umask(umask)
			l, err := Listen("unix:"+path, mode)
			unix.Umask(before)
			if err != nil {
				t.Fatal(err)
			}
			if fi, err := os.Lstat(path); err != nil || fi.Mode() != fs.ModeSocket|want {
				t.Errorf("umask %03o, mode %03o: %v, %v", umask, mode, fi.Mode(), err)
			}
			l.Close()
		}
	}
	for _, mode := range []fs.FileMode{0o1600, fs.ModeSetuid | 0o600, fs.ModeSocket | 0o600} {
		if l, err := Listen("unix:"+filepath.Join(dir, "t"), mode); err == nil {
			l.Close()
			t.Errorf("mode %v works", mode)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("left over: %v, %v", names, err)
	}
}

// Nobody else may connect, from the first moment on: with no umask to help, the
// socket is watched while it comes and goes.
func TestListenModeIsNeverWider(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	defer unix.Umask(unix.Umask(0))
	stop, seen := make(chan struct{}), make(chan map[fs.FileMode]int)
	var watched atomic.Bool // a mode has been seen
	go func() {
		modes := map[fs.FileMode]int{}
		for {
			select {
			case <-stop:
				seen <- modes
				return
			default:
			}
			if fi, err := os.Lstat(path); err == nil {
				modes[fi.Mode().Perm()]++
				watched.Store(true)
			}
		}
	}()
	// On busy processors it takes a while until anything is seen.
	for n := 0; n < 300*disktest.Scale(t) || !watched.Load(); n++ {
		l, err := Listen("unix:"+path, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	close(stop)
	modes := <-seen
	if modes[0o600] == 0 || len(modes) != 1 {
		t.Errorf("modes seen: %v", modes)
	}
}

// stale leaves a socket at path on which nobody listens.
func stale(t *testing.T, path string) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestListenReplacesStaleSocketsOnly(t *testing.T) {
	dir := socketDir(t)
	path := filepath.Join(dir, "s")
	stale(t, path)
	l, err := Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()

	for name, make := range map[string]func(path string) error{
		"file":    func(p string) error { return os.WriteFile(p, []byte("precious"), 0o600) },
		"dir":     func(p string) error { return os.Mkdir(p, 0o700) },
		"symlink": func(p string) error { stale(t, p+".target"); return os.Symlink(p+".target", p) },
		"fifo":    func(p string) error { return unix.Mkfifo(p, 0o600) },
		"datagram socket": func(p string) error {
			l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: p, Net: "unixgram"})
			if err == nil {
				t.Cleanup(func() { l.Close() })
			}
			return err
		},
	} {
		p := filepath.Join(dir, name)
		if err := make(p); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(p)
		if l, err := Listen("unix:"+p, 0o600); err == nil {
			l.Close()
			t.Errorf("%s was replaced", name)
		}
		if after, err := os.Lstat(p); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was touched: %v", name, err)
		}
	}
}

// A listener whose socket was taken away does not remove the one now there.
func TestListenRemovesItsOwnSocketOnly(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	a, err := Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".aside"); err != nil { // keeps the inode's number in use
		t.Fatal(err)
	}
	b, err := Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	a.Close()
	a.Close()
	if nc, err := net.Dial("unix", path); err != nil {
		t.Errorf("the second listener's socket: %v", err)
	} else {
		nc.Close()
	}
}

// Of many that want the same stale socket exactly one gets it.
func TestListenRace(t *testing.T) {
	for range 20 * disktest.Scale(t) {
		path := filepath.Join(socketDir(t), "s")
		stale(t, path)
		var won atomic.Int64
		var group sync.WaitGroup
		listeners := make([]net.Listener, 8)
		for i := range listeners {
			group.Go(func() {
				l, err := Listen("unix:"+path, 0o600)
				if err == nil {
					won.Add(1)
					listeners[i] = l
				} else if !errors.Is(err, ErrSocketBusy) {
					t.Error(err)
				}
			})
		}
		group.Wait()
		if won.Load() != 1 {
			t.Errorf("%d listeners", won.Load())
		}
		if nc, err := net.Dial("unix", path); err != nil {
			t.Error(err)
		} else {
			nc.Close()
		}
		for _, l := range listeners {
			if l != nil {
				l.Close()
			}
		}
	}
}

func TestListenTCP(t *testing.T) {
	for spec, want := range map[string]string{
		"tcp::0":          "127.0.0.1:",
		"tcp:127.0.0.1:0": "127.0.0.1:",
		"tcp:[::1]:0":     "[::1]:",
	} {
		l, err := Listen(spec, 0o600)
		if err != nil {
			if strings.Contains(spec, "::1") && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)) {
				t.Logf("%s: no IPv6 here: %v", spec, err)
			} else {
				t.Errorf("%s: %v", spec, err)
			}
			continue
		}
		if got := l.Addr().String(); !strings.HasPrefix(got, want) {
			t.Errorf("%s listens on %s", spec, got)
		}
		keepsAlive(t, l)
		l.Close()
	}
	for _, spec := range []string{
		"", "unix:", "unix", "tcp:::1:0", "tcp:::1", "tcp:[::1:0", "tcp:127.0.0.1:99999999", "http:x",
		"unix:" + strings.Repeat("x", 200), "unix:/nonexistent/dir/s",
	} {
		if l, err := Listen(spec, 0o600); err == nil {
			l.Close()
			t.Errorf("Listen(%q) works, on %v", spec, l.Addr())
		}
	}
}

// connected is both ends of a connection to l, closed at the end of the test.
func connected(t *testing.T, l net.Listener) (client, server net.Conn) {
	t.Helper()
	client, err := net.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// keepsAlive checks that a client's host that vanishes is noticed.
func keepsAlive(t *testing.T, l net.Listener) {
	t.Helper()
	_, nc := connected(t, l)
	raw, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for _, o := range []struct{ level, opt, want int }{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.SOL_TCP, unix.TCP_KEEPIDLE, 60},
			{unix.SOL_TCP, unix.TCP_KEEPINTVL, 15}, {unix.SOL_TCP, unix.TCP_KEEPCNT, 4},
			{unix.SOL_TCP, unix.TCP_NODELAY, 1},
		} {
			if got, err := unix.GetsockoptInt(int(fd), o.level, o.opt); err != nil || got != o.want {
				t.Errorf("socket option %d/%d: %d, %v; want %d", o.level, o.opt, got, err, o.want)
			}
		}
	})
}

// as runs f on a thread that has other credentials, and reports the error.
func as(uid, gid int, groups []int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		list := make([]uint32, len(groups)+1)
		for i, g := range groups {
			list[i] = uint32(g)
		}
		for _, call := range [][4]uintptr{
			{unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&list[0]))},
			{unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)},
			{unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)},
		} {
			if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
				done <- errno
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// Who may connect is the same for a socket with a file, where the kernel decides,
// and an abstract one, where the server does: owner, group and mode are kept.
func TestListenPermissions(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := socketDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	many := make([]int, 200) // more than a first look takes
	for i := range many {
		many[i] = 3000 + i
	}
	type who struct {
		uid, gid int
		groups   []int
	}
	owner, member, primary, other := who{1001, 9, nil}, who{1002, 9, append(many, 2001)}, who{1003, 2001, nil}, who{1004, 9, []int{2002}}
	for _, tc := range []struct {
		lc  ListenConfig
		may []who
	}{
		{ListenConfig{}, nil},
		{ListenConfig{Owner: "1001"}, []who{owner}},
		{ListenConfig{Owner: "1001", Group: "2001", Mode: 0o660}, []who{owner, member, primary}},
		{ListenConfig{Group: "2001", Mode: 0o660}, []who{member, primary}},
		{ListenConfig{Group: "2001", Mode: 0o620}, []who{member, primary}},
		{ListenConfig{Group: "2001", Mode: 0o640}, nil}, // to read is not enough
		{ListenConfig{Group: "2001", Mode: 0o606}, []who{owner, other}},
		{ListenConfig{Owner: "1001", Mode: 0o466}, []who{member, primary, other}},
		{ListenConfig{Mode: 0o666}, []who{owner, member, primary, other}},
		{ListenConfig{Owner: "root", Group: "root", Mode: 0o666}, []who{owner, member, primary, other}},
	} {
		for _, address := range []string{filepath.Join(dir, "s"), fmt.Sprintf("@cnbd test %d", os.Getpid())} {
			s, err := NewServer(Options{Exports: []Export{{Backend: newMemDisk(4096)}}})
			if err != nil {
				t.Fatal(err)
			}
			l, err := tc.lc.Listen("unix:" + address)
			if err != nil {
				t.Fatalf("%+v: %v", tc.lc, err)
			}
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			uri := URIOf(l.Addr(), "").String()
			for _, w := range []who{owner, member, primary, other, {}} {
				want := w.uid == 0 || slices.ContainsFunc(tc.may, func(m who) bool { return m.uid == w.uid })
				err := as(w.uid, w.gid, w.groups, func() error {
					c, err := Dial(t.Context(), uri)
					if err == nil {
						c.Close()
					}
					return err
				})
				if (err == nil) != want {
					t.Errorf("%+v, %s: user %d: %v", tc.lc, address, w.uid, err)
				}
			}
			if refused := s.Metrics().ConnectionsRefused; strings.HasPrefix(address, "@") && refused != uint64(4-len(tc.may)) {
				t.Errorf("%+v: %d refusals counted", tc.lc, refused)
			}
			if _, err := Listen("unix:"+address, 0); !errors.Is(err, ErrSocketBusy) {
				t.Errorf("%s a second time: %v", address, err)
			}
			s.Close()
			<-served
		}
	}
	for _, lc := range []ListenConfig{{Owner: "nobody-at-all"}, {Group: "no-such-group"}, {Owner: "4294967295"}} {
		path := filepath.Join(dir, "t")
		_, err := lc.Listen("unix:" + path)
		if err == nil {
			t.Errorf("%+v works", lc)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%+v leaves a socket", lc)
		}
	}
	// A socket that cannot be given away is none.
	path := filepath.Join(dir, "u")
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := as(1001, 9, nil, func() error {
		_, err := ListenConfig{Owner: "root", Mode: 0o666}.Listen("unix:" + path)
		return err
	}); !errors.Is(err, unix.EPERM) {
		t.Errorf("given away by who cannot: %v", err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("and it is there all the same")
	}
}
