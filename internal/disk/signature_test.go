package disk_test

import (
	"encoding/binary"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"

	"cnbd/internal/disk"
	"cnbd/internal/disktest"
)

func signature(t *testing.T, f disk.File) string {
	t.Helper()
	s, err := disk.ForeignSignature(f)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestForeignSignature(t *testing.T) {
	const size = 8<<20 + 12345
	for _, c := range []struct {
		want string
		at   map[int64]string
	}{
		{"", nil},
		{"ext2 filesystem", map[int64]string{1080: "\x53\xef"}},
		{"ext3 filesystem", map[int64]string{1080: "\x53\xef", 1024 + 0x5c: "\x3c\x00\x00\x00", 1024 + 0x60: "\x02\x00\x00\x00"}},
		{"ext4 filesystem", map[int64]string{1080: "\x53\xef", 1024 + 0x5c: "\x3c\x00\x00\x00", 1024 + 0x60: "\xc2\x02\x00\x00"}},
		{"XFS filesystem", map[int64]string{0: "XFSB"}},
		{"Btrfs filesystem", map[int64]string{65600: "_BHRfS_M"}},
		{"LUKS encrypted volume", map[int64]string{0: "LUKS\xba\xbe\x00\x02"}},
		{"LVM2 physical volume", map[int64]string{512: "LABELONE"}},
		{"swap space", map[int64]string{4086: "SWAPSPACE2"}},
		{"swap space", map[int64]string{65526: "SWAPSPACE2"}},
		{"MBR partition table", map[int64]string{510: "\x55\xaa"}},
		{"GPT partition table", map[int64]string{510: "\x55\xaa", 512: "EFI PART"}},
		{"GPT partition table", map[int64]string{510: "\x55\xaa", 4096: "EFI PART"}},
		{"NTFS filesystem", map[int64]string{510: "\x55\xaa", 3: "NTFS    "}},
		{"FAT filesystem", map[int64]string{510: "\x55\xaa", 82: "FAT32   "}},
		{"Linux RAID member", map[int64]string{0: "\xfc\x4e\x2b\xa9"}},
		{"Linux RAID member", map[int64]string{4096: "\xfc\x4e\x2b\xa9"}},
		{"Linux RAID member", map[int64]string{size&^65535 - 65536: "\xa9\x2b\x4e\xfc"}},
		{"Linux RAID member", map[int64]string{(size - 8192) &^ 4095: "\xfc\x4e\x2b\xa9"}},
		{"ZFS pool member", map[int64]string{128 << 10: "\x0c\xb1\xba\x00\x00\x00\x00\x00"}},
		{"ZFS pool member", map[int64]string{(256 + 128 + 77) << 10: "\x00\x00\x00\x00\x00\xba\xb1\x0c"}},
		{"", map[int64]string{257 << 10: "\x0c\xb1\xba\x00\x00\x00\x00\x00"}}, // not in the ring
		{"qcow2 image", map[int64]string{0: "QFI\xfb\x00\x00\x00\x03"}},
		{"", map[int64]string{1: "XFSB"}},
	} {
		d := disktest.New(1, disktest.Options{Device: true, Size: size})
		for off, b := range c.at {
			if _, err := d.WriteAt([]byte(b), off); err != nil {
				t.Fatal(err)
			}
		}
		if got := signature(t, d); got != c.want {
			t.Errorf("%v: got %q, want %q", c.at, got, c.want)
		}
	}
}

// Files of every small size, and random bytes, are no error and no match.
func TestForeignSignatureOfOthers(t *testing.T) {
	for size := int64(0); size < 9000; size += 7 {
		d := disktest.New(1, disktest.Options{Size: size})
		if got := signature(t, d); got != "" {
			t.Fatalf("%d zeros: %q", size, got)
		}
	}
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	d := disktest.New(1, disktest.Options{Device: true, Size: 2 << 20})
	matches := 0
	for range 20 {
		b := make([]byte, 2<<20)
		for i := 0; i < len(b); i += 8 {
			binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
		}
		if _, err := d.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		if signature(t, d) != "" {
			matches++
		}
	}
	if matches > 1 { // two bytes match once in 30000
		t.Errorf("%d of 20 random devices have a signature", matches)
	}
	d.FailReads(4096, 1)
	if _, err := disk.ForeignSignature(d); err == nil {
		t.Error("a read error is not reported")
	}
}

// The tools themselves, as far as they are installed.
func TestForeignSignatureByTools(t *testing.T) {
	ran := 0
	for _, c := range []struct {
		want string
		tool []string
	}{
		{"ext2 filesystem", []string{"mkfs.ext2", "-q"}},
		{"ext3 filesystem", []string{"mkfs.ext3", "-q"}},
		{"ext4 filesystem", []string{"mkfs.ext4", "-q"}},
		{"XFS filesystem", []string{"mkfs.xfs", "-q"}},
		{"Btrfs filesystem", []string{"mkfs.btrfs", "-q"}},
		{"FAT filesystem", []string{"mkfs.vfat"}},
		{"swap space", []string{"mkswap"}},
	} {
		tool, err := exec.LookPath(c.tool[0])
		if err != nil {
			t.Logf("not run: %s is not installed", c.tool[0])
			continue
		}
		path := filepath.Join(t.TempDir(), "image")
		if err := disk.CreateFile(path, false, func(f disk.File) error { return f.Truncate(400 << 20) }); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tool, append(c.tool[1:], path)...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v: %s", c.tool, err, out)
			continue
		}
		ran++
		if got := signature(t, open(t, path, disk.OpenOptions{ReadOnly: true})); got != c.want {
			t.Errorf("%s: got %q, want %q", c.tool[0], got, c.want)
		}
	}
	if ran == 0 {
		t.Skip("none of the tools is installed")
	}
}
