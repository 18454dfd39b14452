package disk_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cnbd/internal/disk"
	"cnbd/internal/disktest"
)

// touch makes an empty file.
func touch(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "store")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o disk.OpenOptions) disk.File {
	t.Helper()
	f, err := disk.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFile(t *testing.T) {
	disktest.RunFile(t, open(t, touch(t, t.TempDir()), disk.OpenOptions{}))
}

// On tmpfs the page cache is the medium.
func TestFileInMemory(t *testing.T) {
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skip("/dev/shm is no tmpfs")
	}
	dir, err := os.MkdirTemp("/dev/shm", "cnbd")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	disktest.RunFile(t, open(t, touch(t, dir), disk.OpenOptions{}))
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	fifo, sock := filepath.Join(dir, "fifo"), filepath.Join(dir, "dangling")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", sock); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want error
	}{
		{filepath.Join(dir, "missing"), fs.ErrNotExist},
		{sock, fs.ErrNotExist},
		{dir, syscall.EISDIR},
		{fifo, disk.ErrFileType},
		{"/dev/null", disk.ErrFileType},
		{filepath.Join(touch(t, dir), "below"), syscall.ENOTDIR},
	} {
		for _, ro := range []bool{false, true} {
			f, err := disk.Open(c.path, disk.OpenOptions{ReadOnly: ro})
			if !errors.Is(err, c.want) || f != nil {
				t.Errorf("open %s: %v, %v, want %v", c.path, f, err, c.want)
			} else if !strings.Contains(err.Error(), c.path) {
				t.Errorf("the error %q does not name %s", err, c.path)
			}
		}
	}
}

func TestPermission(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root may do everything")
	}
	path := touch(t, t.TempDir())
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Open(path, disk.OpenOptions{}); !errors.Is(err, fs.ErrPermission) {
		t.Fatal(err)
	}
}

func TestReadOnly(t *testing.T) {
	path := touch(t, t.TempDir())
	f := open(t, path, disk.OpenOptions{ReadOnly: true})
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Fatal("written")
	}
}

func TestLock(t *testing.T) {
	for _, c := range []struct {
		name          string
		first, second disk.OpenOptions
		locked        bool
	}{
		{"two writers", disk.OpenOptions{}, disk.OpenOptions{}, true},
		{"reader beside writer", disk.OpenOptions{}, disk.OpenOptions{ReadOnly: true}, true},
		{"writer beside reader", disk.OpenOptions{ReadOnly: true}, disk.OpenOptions{}, true},
		{"two readers", disk.OpenOptions{ReadOnly: true}, disk.OpenOptions{ReadOnly: true}, false},
		{"exclusive reader beside reader", disk.OpenOptions{ReadOnly: true}, disk.OpenOptions{ReadOnly: true, Exclusive: true}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := touch(t, t.TempDir())
			first := open(t, path, c.first)
			second, err := disk.Open(path, c.second)
			if errors.Is(err, disk.ErrLocked) != c.locked || (err != nil) != c.locked {
				t.Fatal(err)
			}
			if err == nil {
				second.Close()
			} else if !strings.Contains(err.Error(), path) {
				t.Errorf("%q does not name %s", err, path)
			}
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, path, c.second)
		})
	}
}

// A process that is killed leaves no lock, and its children inherit none.
func TestLockEndsWithProcess(t *testing.T) {
	if os.Getenv("CNBD_LOCK_PATH") != "" {
		holdLock() // until it is killed, so that it may leave nothing behind
	}
	path := touch(t, t.TempDir())
	cmd := exec.Command(os.Args[0], "-test.run=TestLockEndsWithProcess")
	cmd.Env = append(os.Environ(), "CNBD_LOCK_PATH="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.Open(path, disk.OpenOptions{}); !errors.Is(err, disk.ErrLocked) {
		t.Errorf("beside another process: %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	open(t, path, disk.OpenOptions{})
}

func holdLock() {
	if _, err := disk.Open(os.Getenv("CNBD_LOCK_PATH"), disk.OpenOptions{}); err != nil {
		panic(err)
	}
	// A child that outlives us must not keep the lock.
	if err := exec.Command("sleep", "5").Start(); err != nil {
		panic(err)
	}
	os.Stdout.WriteString("locked")
	select {}
}

// Who opens a path while it is replaced gets the file that is there afterwards,
// and never a file that is no longer there.
func TestOpenWhileReplaced(t *testing.T) {
	dir := t.TempDir()
	path := touch(t, dir)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			temp := filepath.Join(dir, "new")
			if os.WriteFile(temp, nil, 0o600) != nil || os.Rename(temp, path) != nil {
				t.Error("cannot replace")
				return
			}
		}
	})
	opened := 0
	for range 300 {
		f, err := disk.Open(path, disk.OpenOptions{})
		if errors.Is(err, disk.ErrLocked) {
			continue // replaced too often
		}
		if err != nil {
			t.Error(err)
			break
		}
		opened++
		f.Close()
	}
	close(stop)
	wg.Wait()
	if opened == 0 {
		t.Error("never opened")
	}
}

// After DropCache reads come from the medium, at any offset and length, until
// the next write, and concurrently with it.
func TestDropCache(t *testing.T) {
	path := touch(t, t.TempDir())
	f := open(t, path, disk.OpenOptions{})
	want := make([]byte, 1<<20+1234)
	rand.Read(want)
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.DropCache(); err != nil {
		t.Fatal(err)
	}
	check := func(off, n int) {
		t.Helper()
		got := make([]byte, n)
		k, err := f.ReadAt(got, int64(off))
		exp := want[min(off, len(want)):min(off+n, len(want))]
		if !bytes.Equal(got[:k], exp) || (err == io.EOF) != (k < n) || err != nil && err != io.EOF {
			t.Fatalf("read [%d,%d): %d bytes, %v", off, off+n, k, err)
		}
	}
	all := func() {
		t.Helper()
		for _, off := range []int{0, 1, 511, 4095, 4096, 300001, len(want) - 1, len(want), len(want) + 9000} {
			for _, n := range []int{0, 1, 512, 4096, 4097, 300000, 4 << 20} {
				check(off, n)
			}
		}
	}
	all()
	if _, err := f.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("read at -1")
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(all)
	}
	for i := range 50 {
		if _, err := f.WriteAt(want[i*1000:(i+1)*1000], int64(i)*1000); err != nil {
			t.Error(err)
		}
		if err := f.DropCache(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	copy(want[5000:], "written after DropCache")
	if _, err := f.WriteAt(want[5000:5100], 5000); err != nil {
		t.Fatal(err)
	}
	all()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(want, 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	if err := f.Sync(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("sync after Close: %v", err)
	}
}

func TestNoSpace(t *testing.T) {
	f := open(t, touch(t, t.TempDir()), disk.OpenOptions{})
	for _, c := range [][2]int64{{-1, 1}, {0, -1}, {1 << 62, 1 << 62}} {
		if err := f.Allocate(c[0], c[1]); err == nil {
			t.Errorf("allocate %v", c)
		}
	}
	if err := f.Allocate(0, 1<<50); !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EFBIG) {
		t.Errorf("a PiB: %v", err)
	}
}
