package nbdkernel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseDevice(t *testing.T) {
	link := filepath.Join(t.TempDir(), "disk")
	if err := os.Symlink("/dev/nbd3", link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/dev/nbd0": 0, "/dev/nbd15": 15, "/dev//nbd7": 7, "/dev/../dev/nbd1": 1,
		"nbd0": -1, "/dev/nbd": -1, "/dev/nbd0p1": -1, "/dev/nbd-1": -1, "/dev/nbd+1": -1, "/dev/nbd01": -1,
		"/dev/sda": -1, "/dev/nbd4294967296": -1, "": -1,
	} {
		d, err := ParseDevice(path)
		if want < 0 && err == nil || want >= 0 && (err != nil || d != Device(want)) {
			t.Errorf("%q: %v, %v, want %d", path, d, err, want)
		}
	}
}

// The message that attaches, byte by byte as the kernel's nbd-netlink.h and netlink(7)
// have it: length and type of each attribute, its value, padding to 4.
func TestAttributes(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the bytes are those of a little-endian machine")
	}
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := Config{Sockets: []*os.File{f, f}, Size: 1 << 33, BlockSize: 512, Flags: 0x16d, Backend: "nbd://a",
		Timeout: time.Minute, DeadConnTimeout: 7 * time.Second}
	got, err := c.attributes(3).Encode()
	if err != nil {
		t.Fatal(err)
	}
	fd := byte(f.Fd())
	want := slices.Concat(
		[]byte{8, 0, 1, 0, 3, 0, 0, 0},
		[]byte{12, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0},
		[]byte{12, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0},
		[]byte{12, 0, 4, 0, 60, 0, 0, 0, 0, 0, 0, 0},
		[]byte{12, 0, 8, 0, 7, 0, 0, 0, 0, 0, 0, 0},
		[]byte{12, 0, 5, 0, 0x6d, 1, 0, 0, 0, 0, 0, 0},
		[]byte{28, 0, 7, 0x80}, // nested
		[]byte{12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0},
		[]byte{12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0},
		[]byte("\x0c\x00\x0a\x00nbd://a\x00"),
	)
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%x, want\n%x", got, want)
	}
	got, err = reconfigureAttributes(3, "nbd://a").Encode()
	if err != nil {
		t.Fatal(err)
	}
	want = slices.Concat(
		[]byte{8, 0, 1, 0, 3, 0, 0, 0},
		[]byte("\x0c\x00\x0a\x00nbd://a\x00"),
	)
	if !bytes.Equal(got, want) {
		t.Errorf("for a change\n%x, want\n%x", got, want)
	}
}

// Each connection is tried by a processor that it serves.
func TestProcessors(t *testing.T) {
	mq := t.TempDir()
	for queue, list := range map[string]string{"0": "1, 3\n", "1": "0, 2\n", "2": "\n", "3": "12\n"} {
		dir := filepath.Join(mq, queue)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "cpu_list"), []byte(list), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	got, err := processors(mq)
	if want := []int{1, 0, 12}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
}

// A device that udev or another looks at is detached when they have let go.
func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	open := func() *os.File {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	other, own := open(), open()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := lock(ended, own); !errors.Is(err, context.Canceled) {
		t.Errorf("locked by another: %v, want %v", err, context.Canceled)
	}
	done := make(chan error)
	go func() { done <- lock(t.Context(), own) }()
	select {
	case err := <-done:
		t.Fatalf("has not waited: %v", err)
	case <-time.After(30 * time.Millisecond):
	}
	other.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := unix.Flock(int(open().Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a third may have it as well: %v", err)
	}
}

// Who uses a device is told from what the kernel shows in /proc and /sys.
func TestUsers(t *testing.T) {
	const own = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
	for _, tc := range []struct {
		name, mounts, swaps string
		holders             []string
		want                []string
	}{
		{name: "nobody", mounts: own},
		{name: "ext4", mounts: own + "36 22 43:0 / /mnt/a\\040b rw - ext4 /dev/nbd0 rw\n", want: []string{"nbd0 is mounted on /mnt/a b"}},
		{name: "Btrfs, which has numbers of its own", mounts: own + "36 22 0:41 /sub /mnt rw shared:5 master:2 - btrfs /dev/nbd0 rw,space_cache\n",
			want: []string{"nbd0 is mounted on /mnt"}},
		{name: "by another path", mounts: own + "36 22 43:0 / /mnt rw - xfs /dev/disk/by-uuid/1 rw\n", want: []string{"nbd0 is mounted on /mnt"}},
		{name: "a partition", mounts: own + "36 22 43:1 / /mnt rw - xfs /dev/nbd0p1 rw\n", want: []string{"nbd0p1 is mounted on /mnt"}},
		{name: "another device", mounts: own + "36 22 43:16 / /mnt rw - xfs /dev/nbd01 rw\n36 22 43:160 / /mnt rw - xfs /dev/nbd10 rw\n"},
		{name: "swap", mounts: own, swaps: "/dev/nbd0 partition 1024 0 -2\n", want: []string{"nbd0 is swapped to"}},
		{name: "device mapper", mounts: own, holders: []string{"dm-0"}, want: []string{"nbd0 is held by dm-0"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := t.TempDir()
			put := func(name, text string) {
				path := filepath.Join(root, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			put("self/mountinfo", tc.mounts)
			put("swaps", "Filename Type Size Used Priority\n"+tc.swaps)
			put("block/nbd0/dev", "43:0\n")
			put("block/nbd0/nbd0p1/dev", "43:1\n")
			for _, dir := range []string{"block/nbd0/holders", "block/nbd0/nbd0p1/holders"} {
				if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, h := range tc.holders {
				put("block/nbd0/holders/"+h, "")
			}
			got, err := Device(0).users(root, root)
			if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("%q, %v, want %q", got, err, tc.want)
			}
		})
	}
}
