//go:build !race && !invariants

package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

// TestThinFilesystem: a filesystem on a device that shows more than there is gets
// errors when that is used up, is not corrupted by them, and can be used again when
// files were deleted and the space was trimmed.
func TestThinFilesystem(t *testing.T) {
	needRoot(t)
	needBlockDevice(t)
	tool(t, "fstrim")
	for _, f := range filesystems {
		if f.name == "btrfs" {
			continue // its own copies on write need new space to delete
		}
		t.Run(f.name, func(t *testing.T) {
			tool(t, f.mkfs[0])
			tool(t, f.fsck[0])
			needFilesystem(t, f.name)
			isolateMounts(t)

			m := &machine{t: t, backing: filepath.Join(t.TempDir(), "disk"), sector: f.sector}
			serveArgs := append([]string{m.backing, "--recompress", "off"}, f.serve...)
			watch := time.AfterFunc(hangLimit*time.Duration(disktest.Scale(t)), m.abort)
			t.Cleanup(func() { watch.Stop() })
			m.start(append(serveArgs, "--size", "2GiB", "--capacity", "192MiB", "--checkpoint-interval", "16MiB", "--dirty-max", "16MiB")...)
			m.attach()
			do(t, f.mkfs[0], append(slices.Clone(f.mkfs[1:]), m.loop)...)
			root := m.mount(f.name, "defaults")

			// Noise, until it is refused: by the write or by its sync.
			want := map[string]content{}
			fillUp := func(dir string) (files int, err error) {
				if err := root.Mkdir(dir, 0o755); err != nil {
					return 0, err
				}
				for ; files < 2000; files++ {
					name := fmt.Sprintf("%s/%d", dir, files)
					data := make([]byte, 1<<20)
					rand.Read(data)
					file, err := root.Create(name)
					if err != nil {
						return files, err
					}
					_, err = file.Write(data)
					err = errors.Join(err, file.Sync(), file.Close())
					if err != nil {
						return files, err
					}
					want[name] = contentOf(data)
				}
				return files, nil
			}
			files, err := fillUp("a")
			if err == nil || files < 20 {
				t.Fatalf("%d files of 1 MiB on 192 MiB, then: %v", files, err)
			}
			t.Logf("%d files, then: %v", files, err)
			verify := func() {
				t.Helper()
				for name, sum := range want {
					file, err := root.Open(name)
					if err != nil {
						t.Fatalf("%s, which was synced: %v", name, err)
					}
					data, err := io.ReadAll(file)
					file.Close()
					if err != nil || contentOf(data) != sum {
						t.Fatalf("%s, which was synced, has other contents: %v", name, err)
					}
				}
			}
			verify()
			for i := range files {
				if name := fmt.Sprintf("a/%d", i); i%4 != 0 {
					if err := root.Remove(name); err != nil {
						t.Fatal(err)
					}
					delete(want, name)
				}
			}
			try(t, "sync", "-f", m.mnt) // tells of the failed write above, once
			do(t, "sync", "-f", m.mnt)
			do(t, "fstrim", m.mnt)
			again, err := fillUp("b")
			if again < files/3 {
				t.Errorf("%d files of %d were deleted, and %d more fit: %v", files-files/4, files, again, err)
			}
			t.Logf("%d more files, then: %v", again, err)
			// Mounting XFS clears a part of its log, which a full device may refuse.
			for i := range again {
				name := fmt.Sprintf("b/%d", i)
				if err := root.Remove(name); err != nil {
					t.Fatal(err)
				}
				delete(want, name)
			}
			try(t, "sync", "-f", m.mnt) // as above
			do(t, "sync", "-f", m.mnt)
			do(t, "fstrim", m.mnt)
			m.unmount()
			do(t, f.fsck[0], append(slices.Clone(f.fsck[1:]), m.loop)...)
			root = m.mount(f.name, "ro")
			verify()
			m.unmount()
			m.detach()
			m.server.stop(t)
			t.Log(do(t, binary, "check", "--data", m.backing))
		})
	}
}
