package device

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/pagecache"
	"cnbd/store"
)

func noise(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// TestTwoEdgesRetried: two writes have the same two blocks at their edges, both
// of which they have to read. While the first reads the second block, the first
// block is trimmed, and claimed by the other write, which then waits for the
// second block. The first write has to begin again, and must not wait for the
// first block with the second in its hands.
func TestTwoEdgesRetried(t *testing.T) {
	const last = 20 // in another blob than block 0
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.None))
	o := Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour}
	d := open(t, f, o)
	before := noise(1, 32*block.Size)
	if _, err := d.WriteAt(before, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)

	blobs := 0
	reading, proceed := make(chan struct{}), make(chan struct{})
	f.SetHook(func(op disktest.Op) {
		if op.Kind != disktest.Read || op.Len != 16*block.Size {
			return
		}
		if blobs++; blobs == 2 {
			close(reading)
			<-proceed
		}
	})
	written := make(chan error, 2)
	write := func(seed uint64) {
		_, err := d.WriteAt(noise(seed, last*block.Size), 100)
		written <- err
	}
	go write(2)
	<-reading
	f.SetHook(nil)
	if err := d.Trim(t.Context(), 0, block.Size, true); err != nil {
		t.Fatal(err)
	}
	go write(3)
	for claimed := false; !claimed; {
		switch _, cl, status := d.cache.Get(0); status {
		case pagecache.Claimed:
			d.cache.Abandon(cl)
		case pagecache.Filling:
			claimed = true
		default:
			t.Fatalf("block 0 is a %v", status)
		}
	}
	close(proceed)
	for range 2 {
		select {
		case err := <-written:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the writes wait for each other")
		}
	}
	got := make([]byte, len(before))
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	ok := false
	for _, seed := range []uint64{2, 3} {
		want := append(make([]byte, 100), noise(seed, last*block.Size)...)
		want = append(want, before[len(want):]...)
		ok = ok || differ(got, want) < 0
	}
	if !ok {
		t.Error("the device has neither write as a whole")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFullDevice: a device whose capacity is used up answers ENOSPC to writes, as
// often as they come, and to nothing else; it takes trims and flushes, gives back
// what was trimmed without a restart, and opens again.
func TestFullDevice(t *testing.T) {
	const size, unit = 16 << 20, 64 << 10
	f := disktest.New(1, disktest.Options{})
	g := testGeometry(size, compression.None)
	g.Capacity = 24 * store.SegmentSizeMin
	format(t, f, g)
	o := Options{CacheBytes: 4 << 20, Workers: 2, Warn: func(msg string, err error) { t.Errorf("warning: %s: %v", msg, err) }}
	d := open(t, f, o)
	model := disktest.NewModel(size)
	write := func(i int) error {
		b := noise(uint64(i), unit)
		_, err := d.WriteAt(b, int64(i)*unit)
		if err == nil {
			model.Write(b, int64(i)*unit)
		}
		return err
	}
	trim := func(block, n int64) {
		t.Helper()
		if err := d.Trim(t.Context(), uint64(block*4096), uint64(n*4096), true); err != nil {
			t.Fatalf("trim: %v", err)
		}
		model.Trim(block*4096, n*4096)
	}
	full := 0
	for ; write(full) == nil; full++ {
	}
	if full < 16 {
		t.Fatalf("full after %d writes", full)
	}
	refused := 0
	for i := range 100 {
		// Now and then one fits: the log of the trims comes back too.
		if err := write(full + i%4); errors.Is(err, syscall.ENOSPC) {
			refused++
		} else if err != nil {
			t.Fatalf("write to a full device: %v, want ENOSPC", err)
		}
		trim(int64(i), 1)
		if i%10 == 9 {
			if err := d.Abort(); err != nil {
				t.Fatal(err)
			}
			f = f.Clone()
			d = open(t, f, o)
		}
	}
	if refused < 50 {
		t.Errorf("%d of 100 writes to a full device were refused", refused)
	}
	trim(0, int64(full+4)*16)
	for i := range full / 2 {
		if err := write(i); err != nil {
			t.Fatalf("write %d after a trim of everything: %v", i, err)
		}
	}
	if err := model.Check(d); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	rep, err := store.Check(f.Clone(), store.CheckOptions{Data: true})
	if err != nil || !rep.Clean {
		t.Fatalf("check: %+v, %v", rep, err)
	}
}

// TestSpaceOfLargeTrim: a trim that takes many checkpoints to work off gives all
// of its space back before a write is refused.
func TestSpaceOfLargeTrim(t *testing.T) {
	const size, unit = 32 << 20, 1 << 20
	f := disktest.New(1, disktest.Options{})
	g := testGeometry(size, compression.None)
	g.Capacity = 100 * store.SegmentSizeMin
	format(t, f, g)
	d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, trimLeaves: 1})
	// Every other block is zeros, so that the map has many leaves.
	b := noise(1, unit)
	for i := 0; i < len(b); i += 2 * block.Size {
		clear(b[i:][:block.Size])
	}
	for off := int64(0); off < size; off += unit {
		if _, err := d.WriteAt(b, off); err != nil {
			t.Fatalf("at %d: %v", off, err)
		}
	}
	st, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Store.Nodes < 8 || st.Store.FreeBytes > size/4 {
		t.Fatalf("a map of %d nodes and %d bytes free show nothing", st.Store.Nodes, st.Store.FreeBytes)
	}
	if err := d.Trim(t.Context(), 0, size, true); err != nil {
		t.Fatal(err)
	}
	w, err := d.PrepareWrite(t.Context(), 0, size/4)
	if err != nil {
		t.Fatal(err)
	}
	w.Abort()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTrimsWaitForRoom: where a checkpoint takes long and the device is full, trims
// wait for it, and do not use up the room that it needs.
func TestTrimsWaitForRoom(t *testing.T) {
	const unit = 64 << 10
	f := disktest.New(1, disktest.Options{})
	g := testGeometry(16<<20, compression.None)
	g.Capacity = 24 * store.SegmentSizeMin
	format(t, f, g)
	d := open(t, f, Options{CacheBytes: 4 << 20, Workers: 2})
	n := int64(0)
	for ; ; n += unit {
		if _, err := d.WriteAt(noise(uint64(n), unit), n); err != nil {
			break
		}
	}
	proceed := make(chan struct{})
	f.SetHook(func(op disktest.Op) {
		if op.Kind == disktest.Write && op.Off < 1<<20 {
			<-proceed // a superblock
		}
	})
	trimmed := make(chan error, 1)
	go func() {
		for i := range uint64(1000) {
			if err := d.Trim(t.Context(), i%1000*block.Size, block.Size, true); err != nil {
				trimmed <- err
				return
			}
		}
		trimmed <- nil
	}()
	for waiting := false; !waiting; {
		select {
		case err := <-trimmed:
			t.Fatalf("the trims have not waited: %v", err)
		case <-time.After(time.Millisecond):
			if waiting = !d.room.TryLock(); !waiting {
				d.room.Unlock()
			}
		}
	}
	close(proceed)
	if err := <-trimmed; err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestBackingSaysNoSpace: where a write of the backing file fails for want of space,
// in spite of all that was allocated, the device has failed: flushes and writes
// answer EIO and not ENOSPC (P4, P5).
func TestBackingSaysNoSpace(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.None))
	d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour})
	if _, err := d.WriteAt(noise(1, 8192), 0); err != nil {
		t.Fatal(err)
	}
	f.Inject(disktest.Fault{Kinds: disktest.Write, Times: 1, Err: syscall.ENOSPC})
	for range 2 {
		if err := d.Sync(); !errors.Is(err, syscall.EIO) || firstErrno(err) != syscall.EIO {
			t.Errorf("flush: %v, want EIO before all others", err)
		}
		if _, err := d.WriteAt(noise(1, 100), 50); firstErrno(err) != syscall.EIO {
			t.Errorf("write: %v, want EIO before all others", err)
		}
	}
	got := make([]byte, 8192)
	if _, err := d.ReadAt(got, 0); err != nil || differ(got, noise(1, 8192)) >= 0 {
		t.Errorf("read: %v", err)
	}
	d.Abort()
}

// firstErrno is what a server answers.
func firstErrno(err error) (n syscall.Errno) {
	errors.As(err, &n)
	return n
}

// What one write dirties beyond the background threshold is written out, although the
// flusher was called for it while the write had its range locked.
func TestLargeWriteIsWrittenOut(t *testing.T) {
	data := noise(1, 4<<20)
	for range 30 {
		f := disktest.New(1, disktest.Options{})
		format(t, f, testGeometry(8<<20, compression.None))
		d := open(t, f, Options{
			CacheBytes: 16 << 20, Workers: 2, DirtyBytesMax: 8 << 20, BackgroundBytes: 256 << 10,
			CommitInterval: time.Hour, WritebackPeriod: time.Hour, CleanPeriod: time.Hour,
		})
		if _, err := d.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); d.cache.OverBackground(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d blocks stay dirty: %+v", d.cache.DirtyBlocks(), d.back.Metrics())
			}
		}
		if err := d.Abort(); err != nil {
			t.Fatal(err)
		}
	}
}
