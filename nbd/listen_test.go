package nbd

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func TestListenUnix(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	// Whatever the umask: nobody else may connect, from the first moment on.
	defer unix.Umask(unix.Umask(0))
	l, err := Listen("unix:"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := Listen("unix:"+path, 0o600); !errors.Is(err, ErrSocketBusy) {
		t.Errorf("a live socket: %v", err)
	}
	if nc, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	} else {
		nc.Close()
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
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
	if nc, err := net.Dial("unix", path); err != nil {
		t.Errorf("the second listener's socket: %v", err)
	} else {
		nc.Close()
	}
}

// Of many that want the same stale socket exactly one gets it.
func TestListenRace(t *testing.T) {
	for range 20 * testScale(t) {
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
