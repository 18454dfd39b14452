//go:build !race && !invariants

package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

// emptyBytes is what a store that nothing was ever written to takes of its host
// after a clean stop: two superblocks, and the first pages of its segments.
func emptyBytes(t *testing.T, args ...string) uint64 {
	t.Helper()
	path := filepath.Join(t.TempDir(), "empty")
	serve(t, append(args, path)...).stop(t)
	return hostBytes(t, path)
}

// TestIncompressible writes random bytes in sequence, to devices with segments of
// 2 and of 16 MiB. What is fixed is an empty store. The rest is 56 bytes for each
// extent, 8 KiB for each segment, and less than a block at its end.
func TestIncompressible(t *testing.T) {
	nbdcopy, qemuImg := tool(t, "nbdcopy"), tool(t, "qemu-img")
	var seed [32]byte
	copy(seed[:], fmt.Sprint(disktest.Seed(t)))
	const size = 256 << 20
	dir := t.TempDir()
	random := filepath.Join(dir, "random")
	f, err := os.Create(random)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.NewChaCha8(seed), size); err != nil {
		t.Fatal(err)
	}
	for _, device := range []string{"256MiB", "10GiB"} {
		path := filepath.Join(dir, device)
		s := serve(t, "--size", device, path)
		do(t, nbdcopy, "--flush", random, s.uri)
		s.stop(t)
		host, empty := hostBytes(t, path), emptyBytes(t, "--size", device)
		st := &infoOf(t, path).Store
		t.Logf("%d bytes of %s stored in %d, on the host %d: an empty store of %d, and %+.2f %%", size, device, st.StoredBytes, host, empty, percent(host-empty, size))
		if st.DataBytes != size || st.StoredBytes != size {
			t.Errorf("info tells of %d bytes of data stored in %d, want %d stored raw", st.DataBytes, st.StoredBytes, size)
		}
		if p := percent(host-empty, size); p < 0 || p >= 1 {
			t.Errorf("%d bytes take %d of the host beyond the %d of an empty store: %+.2f %%, want less than 1", size, host-empty, empty, p)
		}
		s = serve(t, path)
		// What follows in the device is zeros.
		do(t, qemuImg, "compare", "-f", "raw", "-F", "raw", random, s.uri)
		s.stop(t)
	}
}

// TestZeroes fills a device with zeros that come as data, as from a client that
// does not know better.
func TestZeroes(t *testing.T) {
	fio, qemuIO := tool(t, "fio"), tool(t, "qemu-io")
	const size = 1 << 30
	path := filepath.Join(t.TempDir(), "store")
	s := serve(t, "--size", fmt.Sprint(size), path)
	do(t, qemuIO, "-f", "raw", "-c", "write -P 0 0 64M", s.uri)
	do(t, fio, "--name=zeroes", "--ioengine=nbd", "--uri="+s.uri, "--rw=write", "--bs=1m", "--iodepth=16",
		fmt.Sprint("--size=", size), "--zero_buffers", "--end_fsync=1")
	st := infoOf(t, path)
	if n := st.Writeback.Pages * 4096; n < size {
		t.Errorf("%d bytes were written as data, want %d at least", n, size)
	}
	s.stop(t)

	st = infoOf(t, path)
	if st.Store.DataBytes != 0 || st.Store.StoredBytes != 0 || st.Store.MapBytes != 0 {
		t.Errorf("zeros are kept as %d bytes of data, %d stored, with a map of %d", st.Store.DataBytes, st.Store.StoredBytes, st.Store.MapBytes)
	}
	beyond := []uint64{hostBytes(t, path)}
	for range 2 {
		serve(t, path).stop(t)
		beyond = append(beyond, hostBytes(t, path))
	}
	empty := emptyBytes(t, "--size", fmt.Sprint(size))
	for i := range beyond {
		beyond[i] -= min(empty, beyond[i])
	}
	t.Logf("%d bytes of zeros take %d of the host beyond an empty store, after one, two and three stops", size, beyond)
	// The log has 56 bytes for each 512 KiB, as much for commits, and is kept for
	// two checkpoints.
	const log = 2 * 56 * (size + 64<<20) / (512 << 10)
	if beyond[0] > 64<<10+log || beyond[2] > 64<<10 {
		t.Errorf("zeros take %d of the host, want %d at most, and after three stops %d", beyond, 64<<10+log, 64<<10)
	}
}

// TestLargest makes, serves and uses a device of 16 TiB, at both of its ends.
func TestLargest(t *testing.T) {
	qemuIO := tool(t, "qemu-io")
	path := filepath.Join(t.TempDir(), "store")
	const size, n = 16 << 40, 64 << 10
	began := time.Now()
	do(t, binary, "create", "--size", "16TiB", path)
	created := time.Since(began)
	s := serve(t, path)
	served := time.Since(began)
	ends := func(command string, pattern int) {
		t.Helper()
		do(t, qemuIO, "-f", "raw", "-c", fmt.Sprintf("%s -P %d 0 %d", command, pattern, n),
			"-c", fmt.Sprintf("%s -P %d %d %d", command, pattern, size-n, n), "-c", "flush", s.uri)
	}
	ends("read", 0)
	ends("write", 0xa5)
	s.stop(t)
	s = serve(t, path)
	ends("read", 0xa5)
	if r := try(t, qemuIO, "-r", "-f", "raw", "-c", fmt.Sprintf("read %d 4096", size), s.uri); r.status == 0 {
		t.Errorf("a read behind the end succeeds: %s", r.stdout)
	}
	s.stop(t)
	st := infoOf(t, path)
	t.Logf("created in %v, served after %v; %d bytes of data on %d of the host", created.Round(time.Millisecond), served.Round(time.Millisecond), st.Store.DataBytes, st.Store.HostBytes)
	if st.DeviceSize != size || st.Store.DataBytes != 2*n || st.Store.HostBytes > 1<<20 {
		t.Errorf("size %d, %d bytes of data, %d on the host; want %d, %d, 1 MiB at most", st.DeviceSize, st.Store.DataBytes, st.Store.HostBytes, size, 2*n)
	}
}

// TestMkfs makes filesystems on a device of 1 TiB, which mkfs discards first. It
// takes seconds, hardly more than without, and little of the host.
func TestMkfs(t *testing.T) {
	needRoot(t)
	needBlockDevice(t)
	for _, f := range []struct {
		mkfs, keep, fsck []string // keep: without discarding
		hostMax          uint64
	}{
		// Its inode tables are written when it is mounted.
		{[]string{"mkfs.ext4", "-q", "-F"}, []string{"-E", "nodiscard"}, []string{"e2fsck", "-fn"}, 4 << 20},
		{[]string{"mkfs.xfs", "-q", "-f"}, []string{"-K"}, []string{"xfs_repair", "-n"}, 1 << 20},
	} {
		t.Run(f.mkfs[0], func(t *testing.T) {
			tool(t, f.mkfs[0])
			tool(t, f.fsck[0])
			isolateMounts(t)
			m := &machine{t: t, backing: filepath.Join(t.TempDir(), "disk"), sector: "512"}
			m.start("--size", "1TiB", m.backing)
			m.attach()
			mkfs := func(args []string) time.Duration {
				began := time.Now()
				do(t, f.mkfs[0], slices.Concat(f.mkfs[1:], args, []string{m.loop})...)
				return time.Since(began)
			}
			took := mkfs(nil)
			m.detach()
			m.server.stop(t)
			st := &infoOf(t, m.backing).Store
			t.Logf("%v; %d bytes of data stored in %d, %d on the host", took.Round(time.Millisecond), st.DataBytes, st.StoredBytes, st.HostBytes)
			if took > 15*time.Second || st.DataBytes == 0 || st.HostBytes > f.hostMax {
				t.Errorf("took %v, %d bytes of data, %d on the host; want seconds, some, %d at most", took, st.DataBytes, st.HostBytes, f.hostMax)
			}
			m.start(m.backing)
			m.attach()
			keeps, discards := []time.Duration{}, []time.Duration{}
			for range 3 {
				keeps, discards = append(keeps, mkfs(f.keep)), append(discards, mkfs(nil))
			}
			t.Logf("again without discarding %v, with %v", keeps, discards)
			if with, without := slices.Min(discards), slices.Min(keeps); with > 2*without+time.Second {
				t.Errorf("discarding takes long: %v, without it %v", with, without)
			}
			do(t, f.fsck[0], slices.Concat(f.fsck[1:], []string{m.loop})...)
			m.detach()
			m.server.stop(t)
		})
	}
}
