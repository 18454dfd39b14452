package disk_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"cnbd/internal/disk"
)

func fillWith(s string) func(disk.File) error {
	return func(f disk.File) error {
		_, err := f.WriteAt([]byte(s), 0)
		return err
	}
}

// files are the names in dir and what is in them.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(dir, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		m[n.Name()] = string(b)
	}
	return m
}

func only(t *testing.T, dir, name, content string) {
	t.Helper()
	if m := files(t, dir); len(m) != 1 || m[name] != content {
		t.Errorf("the directory has %q, want only %s with %q", m, name, content)
	}
}

func TestCreateFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	if err := disk.CreateFile(path, false, fillWith("one")); err != nil {
		t.Fatal(err)
	}
	only(t, dir, "store", "one")
	if st, _ := os.Stat(path); st.Mode() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	called := false
	err := disk.CreateFile(path, false, func(disk.File) error { called = true; return nil })
	if !errors.Is(err, fs.ErrExist) || called {
		t.Errorf("over an existing file: %v, called %v", err, called)
	}
	if err := disk.CreateFile(path, true, fillWith("two")); err != nil {
		t.Fatal(err)
	}
	only(t, dir, "store", "two")
	open(t, path, disk.OpenOptions{})
}

func TestCreateFileLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	broken := errors.New("broken")
	fail := func(f disk.File) error {
		if err := fillWith("half")(f); err != nil {
			return err
		}
		return broken
	}
	if err := disk.CreateFile(path, false, fail); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if m := files(t, dir); len(m) != 0 {
		t.Errorf("%q is left", m)
	}
	func() {
		defer func() { recover() }()
		disk.CreateFile(path, false, func(disk.File) error { panic("broken") })
	}()
	if m := files(t, dir); len(m) != 0 {
		t.Errorf("%q is left after a panic", m)
	}
	if err := disk.CreateFile(path, false, fillWith("old")); err != nil {
		t.Fatal(err)
	}
	if err := disk.CreateFile(path, true, fail); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	only(t, dir, "store", "old")
	if err := disk.CreateFile(filepath.Join(dir, "no", "store"), false, fillWith("x")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// What appears at the path while the file is filled is kept.
func TestCreateFileReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	for _, force := range []bool{false, true} {
		err := disk.CreateFile(path, force, func(f disk.File) error {
			return os.WriteFile(path, []byte("other"), 0o600)
		})
		if !errors.Is(err, fs.ErrExist) {
			t.Errorf("force %v: %v", force, err)
		}
		only(t, dir, "store", "other")
		os.Remove(path)
	}
}

func TestCreateFileInUse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	if err := disk.CreateFile(path, false, fillWith("old")); err != nil {
		t.Fatal(err)
	}
	f := open(t, path, disk.OpenOptions{ReadOnly: true})
	if err := disk.CreateFile(path, true, fillWith("new")); !errors.Is(err, disk.ErrLocked) {
		t.Fatal(err)
	}
	f.Close()
	only(t, dir, "store", "old")
	// Nobody can open the old one between the lock and the rename.
	err := disk.CreateFile(path, true, func(f disk.File) error {
		if _, err := disk.Open(path, disk.OpenOptions{}); !errors.Is(err, disk.ErrLocked) {
			t.Errorf("open while it is replaced: %v", err)
		}
		return fillWith("new")(f)
	})
	if err != nil {
		t.Fatal(err)
	}
	only(t, dir, "store", "new")
}

func TestCreateFileRemains(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	temp := filepath.Join(dir, ".store.new")
	if err := os.WriteFile(temp, []byte("of a killed creation"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := disk.CreateFile(path, false, fillWith("a")); err != nil {
		t.Fatal(err)
	}
	only(t, dir, "store", "a")
	os.Remove(path)

	if err := os.WriteFile(temp, []byte("of one at work"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := open(t, temp, disk.OpenOptions{})
	if err := disk.CreateFile(path, false, fillWith("b")); !errors.Is(err, disk.ErrLocked) {
		t.Error(err)
	}
	only(t, dir, ".store.new", "of one at work")
	f.Close()
}

func TestCreateFileThroughLink(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	path, link := filepath.Join(other, "store"), filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := disk.CreateFile(link, false, fillWith("x")); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	if err := disk.CreateFile(path, false, fillWith("old")); err != nil {
		t.Fatal(err)
	}
	if err := disk.CreateFile(link, true, fillWith("new")); err != nil {
		t.Fatal(err)
	}
	only(t, other, "store", "new")
	only(t, dir, "link", "new")
	if st, _ := os.Lstat(link); st.Mode()&fs.ModeSymlink == 0 {
		t.Error("the link was replaced")
	}
	if err := disk.CreateFile("/dev/null", true, fillWith("x")); !errors.Is(err, disk.ErrFileType) {
		t.Error(err)
	}
	if err := disk.CreateFile(dir, true, fillWith("x")); err == nil {
		t.Error("a directory was replaced")
	}
}

// Of many who create one path at the same time exactly one succeeds.
func TestCreateFileRace(t *testing.T) {
	for range 20 {
		dir := t.TempDir()
		path := filepath.Join(dir, "store")
		var wg sync.WaitGroup
		var won atomic.Int32
		for range 8 {
			wg.Go(func() {
				err := disk.CreateFile(path, false, fillWith("x"))
				if err == nil {
					won.Add(1)
				} else if !errors.Is(err, fs.ErrExist) && !errors.Is(err, disk.ErrLocked) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 {
			t.Errorf("%d succeeded", won.Load())
		}
		only(t, dir, "store", "x")
	}
}

// What a creation has kept, or left when it was killed, is there for the next one that
// asks for it, and for no other.
func TestCreateResume(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "store")
	stopped, broken := errors.New("stopped"), errors.New("broken")
	keep := func(err error) bool { return err == stopped }
	create := func(resume bool, then error) (size int64, err error) {
		err = disk.Create(path, disk.CreateOptions{Resume: resume, Keep: keep}, func(f disk.File, temp string) error {
			if temp != disk.TemporaryName(path) {
				t.Errorf("it is called %s", temp)
			}
			if _, err := disk.Open(temp, disk.OpenOptions{}); !errors.Is(err, disk.ErrLocked) {
				t.Errorf("it is not locked: %v", err)
			}
			size, _ = f.Size()
			if _, err := f.WriteAt([]byte("x"), size); err != nil {
				return err
			}
			return then
		})
		return size, err
	}
	for i, step := range []struct {
		resume bool
		then   error
		size   int64 // that it finds
		left   string
	}{
		{true, stopped, 0, "x"}, {true, stopped, 1, "xx"}, {false, stopped, 0, "x"}, {true, broken, 1, ""}, {false, stopped, 0, "x"}, {true, nil, 1, "done"},
	} {
		if size, err := create(step.resume, step.then); err != step.then || size != step.size {
			t.Errorf("step %d: found %d bytes, want %d; %v", i, size, step.size, err)
		}
		switch step.left {
		case "":
			if m := files(t, dir); len(m) != 0 {
				t.Errorf("step %d: %q is left", i, m)
			}
		case "done":
			only(t, dir, "store", "xx")
		default:
			only(t, dir, ".store.new", step.left)
		}
	}
}
