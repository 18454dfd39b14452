package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cnbd/internal/disk"
)

// loop makes a block device of the file at path. Both fds close with the test.
func loop(t *testing.T, path string) string {
	t.Helper()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no loop devices: ", err)
	}
	defer ctl.Close()
	back, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	for range 10 {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skip("no free loop device: ", err)
		}
		dev := fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skip("loop device: ", err)
		}
		err = unix.IoctlLoopConfigure(int(f.Fd()), &unix.LoopConfig{Fd: uint32(back.Fd())})
		if errors.Is(err, syscall.EBUSY) { // somebody was faster
			f.Close()
			continue
		}
		if err != nil {
			f.Close()
			t.Skip("loop device: ", err)
		}
		t.Cleanup(func() {
			unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
			f.Close()
		})
		return dev
	}
	t.Skip("no free loop device")
	return ""
}

func TestDevice(t *testing.T) {
	const size = 4 << 20
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, bytes.Repeat([]byte{1}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	dev := loop(t, path)
	f := open(t, dev, disk.OpenOptions{})
	if n, err := f.Size(); n != size || err != nil {
		t.Fatal(n, err)
	}
	if n, err := f.Allocated(); n != size || err != nil {
		t.Fatal(n, err)
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if err := f.Allocate(size-4096, 4096); err != nil {
		t.Fatal(err)
	}
	if err := f.Allocate(size-4096, 4097); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	for _, o := range []disk.OpenOptions{{}, {ReadOnly: true}} {
		if _, err := disk.Open(dev, o); !errors.Is(err, disk.ErrLocked) {
			t.Fatalf("opened twice: %v", err)
		}
	}
	if err := disk.CreateFile(dev, true, fillWith("x")); err == nil {
		t.Fatal("a device was replaced")
	}

	want := bytes.Repeat([]byte("cnbd"), 25000)
	if _, err := f.WriteAt(want, 12345); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	back, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(back[12345:12345+len(want)], want) {
		t.Fatal("synced bytes are not on the medium", err)
	}

	// What the page cache of the device shows is not what the medium has: as
	// after a failed writeback. DropCache must make the difference visible.
	got := make([]byte, 1000)
	read := func() {
		t.Helper()
		if _, err := f.ReadAt(got, 1<<20+100); err != nil {
			t.Fatal(err)
		}
	}
	read()
	b, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.WriteAt(bytes.Repeat([]byte{2}, 1<<20), 1<<20); err != nil {
		t.Fatal(err)
	}
	if read(); got[0] != 1 {
		t.Fatal("the page cache does not hide the medium: this test tests nothing")
	}
	if err := f.DropCache(); err != nil {
		t.Fatal(err)
	}
	if read(); !bytes.Equal(got, bytes.Repeat([]byte{2}, 1000)) {
		t.Fatal("after DropCache reads do not show the medium")
	}
	if _, err := f.WriteAt([]byte{3}, 1<<20+100); err != nil {
		t.Fatal(err)
	}
	if read(); got[0] != 3 || got[1] != 2 {
		t.Fatalf("after a write reads show %v", got[:2])
	}

	var before, after unix.Stat_t
	if err := unix.Stat(path, &before); err != nil {
		t.Fatal(err)
	}
	if err := f.Punch(1<<20+100, 1<<20); err != nil { // ends inside sectors
		t.Fatal(err)
	}
	if err := unix.Stat(path, &after); err != nil {
		t.Fatal(err)
	}
	if after.Blocks >= before.Blocks {
		t.Errorf("%d blocks before and %d after a discard of 1 MiB", before.Blocks, after.Blocks)
	}
	if read(); got[0] != 3 {
		t.Error("a byte outside of whole sectors was discarded")
	}
	if err := f.Punch(7, 100); err != nil {
		t.Fatal(err)
	}
}
