//go:build !race && !invariants

package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/nbd"
)

// TestDeletedFilesLeaveHost: when nine in ten files of a filled ext4 were deleted
// and fstrim has said so, what the backing file takes of its host falls, within a
// minute and with nobody asking for it, to what is alive, a tenth more, and the
// fixed part (docs/architecture.md). CNBD_TEST_SCALE multiplies the size.
func TestDeletedFilesLeaveHost(t *testing.T) {
	needRoot(t)
	needBlockDevice(t)
	tool(t, "fstrim")
	tool(t, "mkfs.ext4")
	tool(t, "e2fsck")
	needFilesystem(t, "ext4")
	isolateMounts(t)
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	files := int64(128<<20) * int64(disktest.Scale(t))

	m := &machine{t: t, backing: filepath.Join(t.TempDir(), "disk"), sector: "4096"}
	watch := time.AfterFunc(hangLimit*time.Duration(disktest.Scale(t)), m.abort)
	t.Cleanup(func() { watch.Stop() })
	// What is alive is not to get smaller while it is compared with.
	m.start(m.backing, "--recompress", "off", "--size", fmt.Sprint(files*3/2))
	m.attach()
	do(t, "mkfs.ext4", "-q", "-i", "8192", m.loop)
	began := time.Now()
	tree := &fileTree{want: map[string]content{}, maybe: map[string]content{}}
	tree.root = m.mount("ext4", "nodiscard")
	tree.fill(t, readSources(t), files)
	tree.sync(t)
	full, fullFiles := m.info(), tree.bytes()
	m.log(began, "filled: %d files of %d bytes", len(tree.want), tree.bytes())
	for _, name := range tree.names() {
		if rng.IntN(10) == 0 {
			continue
		}
		tree.remove(name)
		if err := tree.root.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	tree.sync(t)

	// Only the host is looked at: to ask the server takes a checkpoint, which is a
	// help. About so much is expected to be alive.
	const limit = time.Minute
	fixed := fixedSegments * uint64(full.SegmentSize)
	enough := fixed + uint64(float64(full.Store.StoredBytes)*float64(tree.bytes())/float64(fullFiles))
	type moment struct {
		after time.Duration
		host  uint64
	}
	began = time.Now()
	do(t, "fstrim", m.mnt)
	trimmed := time.Since(began)
	seen := []moment{{0, full.Store.HostBytes}}
	for last := seen[0]; last.host > enough && last.after < limit; time.Sleep(100 * time.Millisecond) {
		last = moment{time.Since(began), hostBytes(t, m.backing)}
		if last.host != seen[len(seen)-1].host {
			seen = append(seen, last)
		}
	}
	st := m.info()
	live := st.Store.StoredBytes + st.Store.MapBytes
	most := live*11/10 + fixed
	took := time.Duration(-1)
	for i, x := range seen {
		if x.host > most {
			took = -1
		} else if took < 0 {
			took = seen[i].after
		}
	}
	m.log(began, "%d files of %d bytes are left; fstrim took %v", len(tree.want), tree.bytes(), trimmed)
	t.Logf("on the host %d before, %d in the end, %d stored and %d of map before, %d and %d after; the limit of %d (%d of it the fixed part) was reached after %v",
		seen[0].host, seen[len(seen)-1].host, full.Store.StoredBytes, full.Store.MapBytes, st.Store.StoredBytes, st.Store.MapBytes, most, fixed, took)
	if took < 0 || took > limit {
		t.Errorf("not within %v: %v", limit, seen)
	}
	if full.Store.StoredBytes < 4*live {
		t.Errorf("most is still alive: %d of %d bytes", live, full.Store.StoredBytes)
	}
	m.unmount()
	do(t, "e2fsck", "-fn", m.loop)
	tree.root = m.mount("ext4", "ro")
	tree.verify(t)
	m.unmount()
	m.detach()
	m.server.stop(t)
	m.check()
}

// fixedSegments is how many segments a store takes of its host beside what is
// alive, a tenth of it and the map: those that are kept, written, and not worth
// cleaning.
const fixedSegments = 14

// TestRecompressionInUse: a device that was filled at the lowest level is encoded
// anew while fio reads it, and while fio writes, when it has to wait; it is ended
// by SIGKILL and by SIGTERM in the middle, and the data stays the same. The log
// tells by how much the foreground's slowest hundredth is slower for it.
// CNBD_TEST_SCALE multiplies the size.
func TestRecompressionInUse(t *testing.T) {
	fio, nbdcopy, cmp := tool(t, "fio"), tool(t, "nbdcopy"), tool(t, "cmp")
	scale := int64(disktest.Scale(t))
	limit := time.Minute * time.Duration(scale)
	size := 192 << 20 * scale
	image := realImage(t, size, 160<<20*scale)
	const scratch = 64 << 20 // behind the image, for writes
	path := filepath.Join(t.TempDir(), "store")
	do(t, binary, "create", "--size", fmt.Sprint(size+scratch), "--codec", "zstd", "--level", "1", path)
	open := func(recompress string) *server {
		return serve(t, "--recompress", recompress, "--cache", "32MiB", path)
	}
	compare := func(s *server) {
		t.Helper()
		doFor(t, limit, "sh", "-c", `"$0" "$1" - | "$2" -n "$3" - "$4"`, nbdcopy, s.uri, cmp, fmt.Sprint(size), image)
	}
	// begun waits until encoding anew is under way, unless nothing is left to do.
	begun := func(limit time.Duration) uint64 {
		t.Helper()
		for began := time.Now(); time.Since(began) < limit; time.Sleep(100 * time.Millisecond) {
			if n := infoOf(t, path).Store.Recompressed; n > 0 {
				return n
			}
		}
		return 0
	}
	runtime := max(2, min(20, scale)) // seconds
	reads := func(s *server) fioSide {
		t.Helper()
		return fioReport(t, limit, fio, "--name=r", "--ioengine=nbd", "--uri="+s.uri, "--rw=randread", "--bs=4k", "--iodepth=4",
			fmt.Sprintf("--size=%d", size), "--time_based", fmt.Sprintf("--runtime=%d", runtime)).Jobs[0].Read
	}
	both := func(s *server) (read, write fioSide) {
		t.Helper()
		jobs := fioReport(t, limit, fio, "--ioengine=nbd", "--uri="+s.uri, "--bs=4k", "--iodepth=4", "--time_based", fmt.Sprintf("--runtime=%d", runtime),
			"--name=r", "--rw=randread", fmt.Sprintf("--size=%d", size),
			"--name=w", "--rw=randwrite", fmt.Sprintf("--offset=%d", size), fmt.Sprintf("--size=%d", scratch), "--fsync=64", "--buffer_compress_percentage=50").Jobs
		return jobs[0].Read, jobs[1].Write
	}

	s := open("off")
	doFor(t, limit, nbdcopy, "--flush", image, s.uri)
	before := infoOf(t, path)
	interrupted := false
	for round := range min(scale, 5) {
		off := reads(s)
		s.stop(t)
		s = open("zstd:better")
		from := begun(20 * time.Second)
		on := reads(s)
		n := infoOf(t, path).Store.Recompressed
		s.kill()
		interrupted = interrupted || n > from && from > 0
		t.Logf("round %d: p99 of random reads %v, beside recompression (%d MiB of it) %v, ratio %.2f; %d and %d reads, ratio %.2f", round, off.p99(), (n-from)>>20, on.p99(),
			float64(on.p99())/float64(off.p99()), off.Count, on.Count, float64(on.Count)/float64(off.Count))

		s = open("zstd:better")
		compare(s)
		begun(8 * time.Second)
		s.stop(t)

		s = open("off")
		compare(s)
		offR, offW := both(s)
		s.stop(t)
		s = open("zstd:better")
		onR, onW := both(s)
		n = infoOf(t, path).Store.Recompressed
		t.Logf("round %d: p99 of random reads and writes together %v and %v, where recompression would have something to do (%d MiB of it) %v and %v, ratios %.2f and %.2f",
			round, offR.p99(), offW.p99(), n>>20, onR.p99(), onW.p99(), float64(onR.p99())/float64(offR.p99()), float64(onW.p99())/float64(offW.p99()))
		if round < min(scale, 5)-1 {
			s.stop(t)
			s = open("off")
		}
	}
	if !interrupted {
		t.Error("recompression was over before fio read anything beside it")
	}
	compare(s)
	// What fio has written is no part of the comparison of sizes.
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Trim(t.Context(), uint64(size), scratch, true); err != nil {
		t.Fatal(err)
	}
	c.Close()
	after := settled(t, path, limit)
	t.Logf("ratio before %.3f, after %.3f: stored bytes %+.1f %%", before.Ratio, after.Ratio, percent(after.Store.StoredBytes, before.Store.StoredBytes))
	if after.Store.DataBytes != before.Store.DataBytes || after.Ratio < before.Ratio*1.02 {
		t.Errorf("%d bytes of data, ratio %.3f; before %d, %.3f", after.Store.DataBytes, after.Ratio, before.Store.DataBytes, before.Ratio)
	}
	compare(s)
	s.stop(t)
	doFor(t, limit, binary, "check", "--data", path)
}

// settled waits until an idle server has nothing more to do, and is what it tells
// then.
func settled(t *testing.T, path string, limit time.Duration) *storeStatus {
	t.Helper()
	began := time.Now()
	last, since := infoOf(t, path), began
	for time.Since(since) < 8*time.Second { // the cleaner looks every second, three times before it takes a device for idle
		if time.Since(began) > limit {
			t.Fatalf("the store is not at rest after %v", limit)
		}
		time.Sleep(500 * time.Millisecond) // polling: it tells nobody
		st := infoOf(t, path)
		if st.Store.Recompressed != last.Store.Recompressed || st.Store.Moved != last.Store.Moved {
			last, since = st, time.Now()
		}
	}
	return infoOf(t, path)
}

// TestSmallRandomWrites: an image that was written block by block in random order
// takes, when the device has been idle, as little as one that was copied in order.
// CNBD_TEST_SCALE multiplies the size.
func TestSmallRandomWrites(t *testing.T) {
	nbdcopy, cmp := tool(t, "nbdcopy"), tool(t, "cmp")
	seed := disktest.Seed(t)
	scale := int64(disktest.Scale(t))
	limit := time.Minute * time.Duration(scale)
	size := 48 << 20 * scale
	image := realImage(t, size, 32<<20*scale)
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()

	ordered := filepath.Join(dir, "ordered")
	s := serve(t, "--size", fmt.Sprint(size), ordered)
	doFor(t, limit, nbdcopy, "--flush", image, s.uri)
	copied := infoOf(t, ordered)
	rested := settled(t, ordered, limit)
	s.stop(t)
	if err := os.Remove(ordered); err != nil {
		t.Fatal(err)
	}

	path := filepath.Join(dir, "random")
	s = serve(t, "--size", fmt.Sprint(size), path)
	order := rand.New(rand.NewPCG(seed, 0)).Perm(int(size / block.Size))
	next := atomic.Int64{}
	err = inParallel(func() error {
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			return err
		}
		defer c.Close()
		p := make([]byte, block.Size)
		for i := next.Add(1) - 1; i < int64(len(order)); i = next.Add(1) - 1 {
			off := int64(order[i]) * block.Size
			if _, err := f.ReadAt(p, off); err != nil {
				return err
			}
			if err := c.WriteAt(t.Context(), p, uint64(off), false); err != nil {
				return err
			}
			if i%4096 == 0 {
				if err := c.Flush(t.Context()); err != nil {
					return err
				}
			}
		}
		return c.Flush(t.Context())
	})()
	if err != nil {
		t.Fatal(err)
	}
	written := infoOf(t, path)
	after := settled(t, path, limit)
	t.Logf("%d bytes of data: copied in order, ratio %.3f, %.3f when idle; at random, %.3f, %.3f when idle: %.3f and %.3f of the copy's",
		after.Store.DataBytes, copied.Ratio, rested.Ratio, written.Ratio, after.Ratio, after.Ratio/copied.Ratio, after.Ratio/rested.Ratio)
	t.Logf("on the host: %d and %d", rested.Store.HostBytes, after.Store.HostBytes)
	if after.Store.DataBytes != copied.Store.DataBytes || after.Ratio < copied.Ratio*0.95 || after.Ratio < rested.Ratio*0.95 {
		t.Errorf("%d bytes of data where the copy has %d, or less than 0.95 of its ratio", after.Store.DataBytes, copied.Store.DataBytes)
	}
	doFor(t, limit, "sh", "-c", `"$0" "$1" - | "$2" - "$3"`, nbdcopy, s.uri, cmp, image)
	s.stop(t)
	doFor(t, limit, binary, "check", "--data", path)
}
