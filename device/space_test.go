package device

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// fullDevice formats a device that just has the capacity of DefaultCapacity, and
// fills it with noise.
func fullDevice(t *testing.T, seed uint64, size uint64) (d *Device, f *disktest.Disk, truth []byte) {
	t.Helper()
	o := smallOptions(t)
	o.CacheBytes, o.CommitInterval = 256*block.Size, time.Hour
	g := testGeometry(size, compression.Auto)
	g.DirtyMax = uint64(o.CacheBytes)
	g.Capacity = store.DefaultCapacity(size, g.SegmentSize, g.DirtyMax, o.CheckpointBytes)
	f = disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d = open(t, f, o)
	truth = make([]byte, size)
	fill(truth, seed)
	if _, err := d.WriteAt(truth, 0); err != nil {
		t.Fatal(err)
	}
	return d, f, truth
}

// fill makes p noise.
func fill(p []byte, seed uint64) {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	rand.NewChaCha8(key).Read(p)
}

// compareAll reads all of the device.
func compareAll(t *testing.T, d *Device, truth []byte) {
	t.Helper()
	got := make([]byte, len(truth))
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if i := differ(got, truth); i >= 0 {
		t.Fatalf("byte %d is wrong", i)
	}
}

// TestFullDeviceOverwritten: a device whose capacity covers its size and the
// overhead takes overwriting in any order, for ever (promise P4), also where it
// does not compress. Before there was a cleaner it was full after less than one
// time over.
func TestFullDeviceOverwritten(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 12 << 20
	d, f, truth := fullDevice(t, seed, size)
	rng := rand.New(rand.NewPCG(seed, 0))
	page := make([]byte, block.Size)
	for round := range 3 {
		for i, b := range rng.Perm(size / block.Size) {
			fill(page, rng.Uint64())
			if _, err := d.WriteAt(page, int64(b)*block.Size); err != nil {
				t.Fatalf("CNBD_SEED=%d: round %d, write %d: %v", seed, round, i, err)
			}
			copy(truth[b*block.Size:], page)
			if rng.IntN(64) == 0 {
				if err := d.Sync(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	compareAll(t, d, truth)
	st, err := d.store.Stats()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d segments cleaned, %d MiB moved, %d MiB of log for %d MiB stored; writes waited %d times",
		st.Cleaned, st.Moved>>20, st.LogWritten>>20, st.BlobStored>>20, st.Shortages)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	checkClean(t, f)
	d = open(t, f, smallOptions(t))
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func checkClean(t *testing.T, f *disktest.Disk) {
	t.Helper()
	rep, err := store.Check(f.Clone(), store.CheckOptions{Data: true})
	if err != nil || !rep.Clean {
		t.Fatalf("check: %+v, %v", rep, err)
	}
}

// TestThinDeviceFull: a device that shows more than there is answers ENOSPC to
// writes alone, and takes them again when something was trimmed.
func TestThinDeviceFull(t *testing.T) {
	seed := disktest.Seed(t)
	o := smallOptions(t)
	g := testGeometry(64<<20, compression.None)
	g.Capacity = 80 * store.SegmentSizeMin
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	truth := make([]byte, g.DeviceSize)
	page := make([]byte, 64<<10)
	fillUp := func(from int) (at int) {
		t.Helper()
		for at = from; ; at += len(page) {
			fill(page, seed+uint64(at))
			_, err := d.WriteAt(page, int64(at))
			if errors.Is(err, syscall.ENOSPC) {
				return at
			}
			if err != nil {
				t.Fatal(err)
			}
			copy(truth[at:], page)
		}
	}
	full := fillUp(0)
	if most := int(g.Capacity); full > most || full < most/2 {
		t.Errorf("it was full after %d bytes of a capacity of %d", full, most)
	}
	// Again and again: no trim, flush or read fails for want of space.
	rng := rand.New(rand.NewPCG(seed, 1))
	for round := range 3 {
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		compareAll(t, d, truth)
		for range full / block.Size / 4 {
			b := rng.IntN(full/block.Size) * block.Size
			if err := d.Trim(t.Context(), uint64(b), block.Size, rng.IntN(8) == 0); err != nil {
				t.Fatal(err)
			}
			clear(truth[b:][:block.Size])
		}
		// What was trimmed, less what the rest of it needs, fits elsewhere.
		more := fillUp(full)
		t.Logf("round %d: %d KiB more", round, (more-full)>>10)
		if more == full {
			t.Errorf("round %d: nothing can be written after a fifth was trimmed", round)
		}
		if err := d.Trim(t.Context(), uint64(full), uint64(more-full), false); err != nil {
			t.Fatal(err)
		}
		clear(truth[full:])
		if round == 1 {
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := d.Abort(); err != nil {
				t.Fatal(err)
			}
			f = f.Crash(disktest.LoseAll)
			d = open(t, f, o)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}

// TestTrimmedSpaceReturns: after most of a device was trimmed in pieces, what the
// store takes on its host falls to little more than what is alive, with nobody
// doing anything.
func TestTrimmedSpaceReturns(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 32 << 20
	d, f, truth := fullDevice(t, seed, size)
	rng := rand.New(rand.NewPCG(seed, 1))
	for b := 0; b < size; b += block.Size {
		if rng.IntN(10) > 0 {
			if err := d.Trim(t.Context(), uint64(b), block.Size, false); err != nil {
				t.Fatal(err)
			}
			clear(truth[b:][:block.Size])
		}
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	// A sixteenth, four segments of garbage, those being written, and those kept warm.
	const reserve = 20 * store.SegmentSizeMin
	deadline := time.Now().Add(10 * time.Second)
	for {
		st, err := d.store.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if st.HostBytes < (st.StoredBytes+st.MapBytes)*11/10+reserve {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes on the host for %d stored and %d of map: %+v", st.HostBytes, st.StoredBytes, st.MapBytes, st)
		}
		time.Sleep(time.Millisecond) // polling: the cleaner tells nobody
	}
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f)
}

// TestBookendsAreCleaned: extents that were overwritten in part are encoded anew
// when their segment is cleaned, and their waste goes.
func TestBookendsAreCleaned(t *testing.T) {
	seed := disktest.Seed(t)
	o := smallOptions(t)
	g := testGeometry(16<<20, compression.Zstd)
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	truth := make([]byte, g.DeviceSize)
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range truth {
		truth[i] = "0123456789abcdef"[rng.IntN(16)]
	}
	if _, err := d.WriteAt(truth, 0); err != nil {
		t.Fatal(err)
	}
	for b := 0; b < len(truth); b += 2 * block.Size {
		if err := d.Trim(t.Context(), uint64(b), block.Size, false); err != nil {
			t.Fatal(err)
		}
		clear(truth[b:][:block.Size])
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		st, err := d.store.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if st.Cleaned > 10 && st.HostBytes < (st.StoredBytes+st.MapBytes)*11/10+20*store.SegmentSizeMin {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes on the host for %d stored and %d of map: %+v", st.HostBytes, st.StoredBytes, st.MapBytes, st)
		}
		time.Sleep(time.Millisecond) // polling: the cleaner tells nobody
	}
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	checkClean(t, f)
	d = open(t, f, o)
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRecompressed: a device that was written in small pieces at random, by a fast
// codec, is in the end, when nobody does anything, as small as one that was written in
// sequence at the level of recompression; and then nothing more is done, not after a
// restart either.
func TestRecompressed(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 8 << 20
	rng := rand.New(rand.NewPCG(seed, 0))
	truth := make([]byte, size)
	words := make([][]byte, 500)
	for i := range words {
		words[i] = make([]byte, 3+rng.IntN(12))
		fill(words[i], rng.Uint64())
	}
	for at := 0; at < size; {
		at += copy(truth[at:], words[rng.IntN(1+rng.IntN(len(words)))])
	}
	fill(truth[1<<20:2<<20], seed) // does not compress
	clear(truth[2<<20 : 2<<20+300<<10])
	o := smallOptions(t)
	o.Background = &compression.Setting{Codec: compression.Zstd, Level: compression.ZstdBetter}
	make := func(codec compression.Codec, level compression.Level) (*Device, *disktest.Disk) {
		g := testGeometry(size, codec)
		g.Level = uint8(level)
		f := disktest.New(seed, disktest.Options{})
		format(t, f, g)
		return open(t, f, o), f
	}
	stored := func(d *Device) uint64 {
		st, err := d.Status(t.Context()) // with a checkpoint first
		if err != nil {
			t.Fatal(err)
		}
		return st.Store.StoredBytes
	}
	d, _ := make(compression.Zstd, compression.ZstdBetter)
	if _, err := d.WriteAt(truth, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	fresh := stored(d)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	d, f := make(compression.Zstd, compression.ZstdFastest)
	for _, b := range rng.Perm(size / block.Size) {
		if _, err := d.WriteAt(truth[b*block.Size:][:block.Size], int64(b)*block.Size); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	at := stored(d)
	wait := func(d *Device, what string, done func(store.Stats) bool) (st store.Stats) {
		deadline := time.Now().Add(time.Minute)
		for {
			var err error
			if st, err = d.store.Stats(); err != nil {
				t.Fatal(err)
			}
			if done(st) {
				return st
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d bytes stored, %d of a fresh copy: %+v", what, st.StoredBytes, fresh, st)
			}
			time.Sleep(time.Millisecond) // polling: the cleaner tells nobody
		}
	}
	most := fresh + fresh/50
	wait(d, "recompression", func(st store.Stats) bool { return st.StoredBytes <= most && stored(d) <= most })
	// It ends: no more commits in a time in which there were many.
	last, quiet := uint64(0), 0
	st := wait(d, "the end of recompression", func(st store.Stats) bool {
		if quiet++; st.Commits != last {
			last, quiet = st.Commits, 0
		}
		return quiet > 200
	})
	t.Logf("%d bytes stored, then %d, of a fresh copy %d; %d recompressed", at, st.StoredBytes, fresh, st.Recompressed)
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	checkClean(t, f)
	d = open(t, f, o)
	compareAll(t, d, truth)
	time.Sleep(50 * time.Millisecond) // 20 looks of the cleaner: it must not do anything
	if st, err := d.store.Stats(); err != nil || st.Recompressed != 0 {
		t.Errorf("after a restart %d bytes were recompressed again, %v", st.Recompressed, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestHostFull: on a host that is full a write is refused, soon, and taken when
// there is space again.
func TestHostFull(t *testing.T) {
	o := smallOptions(t)
	f := disktest.New(1, disktest.Options{Capacity: 12 << 20})
	format(t, f, testGeometry(64<<20, compression.None))
	d := open(t, f, o)
	page := make([]byte, 16*block.Size)
	fill(page, 7)
	at := int64(0)
	var err error
	for ; err == nil; at += int64(len(page)) {
		_, err = d.WriteAt(page, at)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("at %d: %v, want ENOSPC", at, err)
	}
	if n := f.Counts().Allocates; n > 1000 {
		t.Errorf("the host was asked for space %d times", n)
	}
	f.SetCapacity(64 << 20)
	if _, err := d.WriteAt(page, at); err != nil {
		t.Errorf("with more space on the host: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Clone())
}

// TestHostFullOverwritten: on a host that is full what is stored can be overwritten
// for ever, for what is dead has its space there: ENOSPC is not a matter of how
// fast the cleaner is (promise P4).
func TestHostFullOverwritten(t *testing.T) {
	seed := disktest.Seed(t)
	o := smallOptions(t)
	o.CleanPeriod = time.Hour
	f := disktest.New(seed, disktest.Options{Capacity: 12 << 20})
	format(t, f, testGeometry(64<<20, compression.None))
	d := open(t, f, o)
	const size = 4 << 20
	truth := make([]byte, d.Bytes())
	fill(truth[:size], seed)
	if _, err := d.WriteAt(truth[:size], 0); err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range 6 * size / block.Size {
		b := rng.IntN(size/block.Size) * block.Size
		page := truth[b:][:block.Size]
		fill(page, rng.Uint64())
		if _, err := d.WriteAt(page, int64(b)); err != nil {
			t.Fatalf("CNBD_SEED=%d: write %d: %v", seed, i, err)
		}
	}
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Clone())
}

// TestTrimsWaitForCheckpoint: trims that come faster than checkpoints work them off
// wait, before what is not in the tree yet takes memory without a bound (promise P6).
func TestTrimsWaitForCheckpoint(t *testing.T) {
	const trims = 2000
	o := smallOptions(t)
	o.CheckpointRecords, o.CleanPeriod = 16, time.Hour
	f := disktest.New(1, disktest.Options{})
	g := testGeometry(64<<20, compression.None)
	g.Capacity = 400 * store.SegmentSizeMin
	format(t, f, g)
	d := open(t, f, o)
	proceed := make(chan struct{})
	f.SetHook(func(o disktest.Op) {
		if o.Kind == disktest.Write && o.Off < 1<<20 { // a superblock
			<-proceed
		}
	})
	var count atomic.Int64
	done := make(chan error, 1)
	go func() {
		for i := range uint64(trims) {
			if err := d.Trim(t.Context(), 2*i*block.Size, block.Size, true); err != nil {
				done <- err
				return
			}
			count.Add(1)
		}
		done <- nil
	}()
	// polling: it is to stand still
	for last := int64(-1); last != count.Load() || last == 0; time.Sleep(20 * time.Millisecond) {
		last = count.Load()
	}
	if n := count.Load(); n > 8*int64(o.CheckpointRecords) {
		t.Errorf("%d trims while a checkpoint that is due every %d does not end", n, o.CheckpointRecords)
	}
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// onFullHost makes a store in segments of 2 MiB that is full of raw data, stops it, and
// opens it on a host that has room for so many segments more. data is what is in it.
func onFullHost(t *testing.T, size int, spare int64, o Options) (d *Device, f *disktest.Disk, data []byte) {
	t.Helper()
	const segment = 2 << 20
	f = disktest.New(1, disktest.Options{})
	g := testGeometry(uint64(size), compression.None)
	g.SegmentSize, g.Capacity = segment, 100*segment
	format(t, f, g)
	d = open(t, f, o)
	data = make([]byte, size)
	fill(data, 1)
	if _, err := d.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	n, err := f.Allocated()
	if err != nil {
		t.Fatal(err)
	}
	f.SetCapacity(n + spare*segment)
	return open(t, f, o), f, data
}

// TestTrimAllOnFullHost: on a host that has room for little more than what an opening
// takes, trimming gives the host its space back (promise P4).
func TestTrimAllOnFullHost(t *testing.T) {
	const size = 32 << 20
	for _, spare := range []int64{2, 3, 5} {
		o := smallOptions(t)
		o.CleanPeriod, o.CheckpointBytes = time.Hour, 64<<20
		o.Warn = func(msg string, err error) { t.Log(spare, msg, err) }
		d, f, _ := onFullHost(t, size, spare, o)
		if err := d.Trim(t.Context(), 0, size, false); err != nil {
			t.Errorf("%d segments: %v", spare, err)
		}
		for range 3 {
			if err := d.store.Checkpoint(); err != nil {
				t.Fatalf("%d segments: %v", spare, err)
			}
		}
		if n, err := f.Allocated(); err != nil || n > size/2 {
			t.Errorf("%d segments: the host still has %d bytes of it, %v", spare, n, err)
		}
		got := make([]byte, 256<<10)
		if _, err := d.ReadAt(got, size/2); err != nil || !compression.IsZero(got) {
			t.Errorf("%d segments: %v, or what was trimmed is not zero", spare, err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRefusedTrimsUseNothing: trims that are refused do not use the log up.
func TestRefusedTrimsUseNothing(t *testing.T) {
	const size = 12 << 20
	o := smallOptions(t)
	o.CleanPeriod, o.CheckpointBytes = time.Hour, 64<<20
	o.Warn = func(string, error) {}
	d, _, data := onFullHost(t, size, 2, o)
	refused := 0
	var written uint64
	for i := 0; refused < 50; i++ {
		d.room.Lock()
		d.room.failed = time.Time{} // as if roomRetry had passed
		d.room.Unlock()
		b := i * 37 % (size / block.Size) * block.Size
		err := d.Trim(t.Context(), uint64(b), block.Size, true)
		switch {
		case err == nil:
			clear(data[b:][:block.Size])
		case !errors.Is(err, syscall.ENOSPC):
			t.Fatalf("trim %d: %v", i, err)
		default:
			st, err := d.Look()
			if err != nil {
				t.Fatal(err)
			}
			if refused++; refused == 10 {
				written = st.Store.LogWritten
			} else if refused > 10 && st.Store.LogWritten != written {
				t.Fatalf("refused trims have written %d bytes", st.Store.LogWritten-written)
			}
		}
		if i > 1<<20 {
			t.Fatal("trims are not refused")
		}
	}
	compareAll(t, d, data)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTrimsWithoutRoom: on a host that is full trims are refused, with nothing changed,
// before a checkpoint of what they change of the map would run out of space. They go
// on when the host has space again.
func TestTrimsWithoutRoom(t *testing.T) {
	const size = 128 << 20
	warnings := 0
	o := smallOptions(t)
	o.CleanPeriod = time.Hour
	o.Warn = func(msg string, err error) {
		if strings.HasPrefix(msg, "trims are left undone") {
			warnings++
		}
		t.Log(msg, err)
	}
	f := disktest.New(1, disktest.Options{})
	g := testGeometry(size, compression.None)
	g.Capacity = 2 * size
	format(t, f, g)
	d := open(t, f, o)
	truth := make([]byte, size)
	for b := 0; b < size; b += 2 * block.Size {
		fill(truth[b:][:512], uint64(b))
		if _, err := d.WriteAt(truth[b:][:block.Size], int64(b)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := f.Clone().Allocated()
	if err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	f.SetCapacity(n + 4*store.SegmentSizeMin)
	d = open(t, f, o)
	if n, err = f.Allocated(); err != nil {
		t.Fatal(err)
	}
	f.SetCapacity(n)
	trim := func(i int) error {
		b := uint64(i*38*2%(size/block.Size)) * block.Size
		err := d.Trim(t.Context(), b, block.Size, false)
		if err == nil {
			clear(truth[b:][:block.Size])
		}
		return err
	}
	done := 0
	for err = error(nil); err == nil && done < 1000; done++ {
		err = trim(done)
	}
	t.Logf("%d trims", done)
	if !errors.Is(err, syscall.ENOSPC) || warnings != 1 {
		t.Fatalf("trim %d: %v, %d warnings", done, err, warnings)
	}
	if err := trim(done); !errors.Is(err, syscall.ENOSPC) || warnings != 1 {
		t.Fatalf("the trim behind it: %v, %d warnings", err, warnings)
	}
	if err := d.WriteZeroes(t.Context(), 0, block.Size, false); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("zeroes: %v", err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	// All of it takes long, beside the race detector.
	compare := func() {
		t.Helper()
		got := make([]byte, 64<<10)
		for at := 0; at < size; at += 16 * len(got) {
			if _, err := d.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, truth[at:][:len(got)]) {
				t.Fatalf("at %d: %v, or what is read is wrong", at, err)
			}
		}
	}
	compare()
	f.SetCapacity(2 * size)
	for i := range 2000 {
		if err := trim(i); err != nil {
			t.Fatalf("trim %d with space: %v", i, err)
		}
	}
	compare()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Clone())
}

// TestWritesBesideTrims: on a device that just has the capacity for its size and the
// overhead no write and no trim is refused because others trim the same blocks without
// end, which changes the map again and again.
func TestWritesBesideTrims(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 12 << 20
	d, _, truth := fullDevice(t, seed, size)
	rng := rand.New(rand.NewPCG(seed, 0))
	quit := make(chan struct{})
	var wg sync.WaitGroup
	const trimmers = 3
	for i := range trimmers {
		wg.Go(func() {
			for {
				select {
				case <-quit:
					return
				default:
				}
				if err := d.Trim(t.Context(), uint64(i)*block.Size, block.Size, false); err != nil {
					t.Errorf("trim: %v", err)
					return
				}
			}
		})
	}
	for i := 0; i < 1000*disktest.Scale(t) && !t.Failed(); i++ {
		b := (trimmers + rng.IntN(size/block.Size-trimmers)) * block.Size
		page := truth[b:][:block.Size]
		fill(page, rng.Uint64())
		if _, err := d.WriteAt(page, int64(b)); err != nil {
			t.Errorf("write %d: %v", i, err)
		}
	}
	close(quit)
	wg.Wait()
	clear(truth[:trimmers*block.Size])
	compareAll(t, d, truth)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// fillUp writes every step-th block of a thin device until it is full, and returns the
// last one.
func fillUp(t *testing.T, d *Device, step int64) (last int64) {
	t.Helper()
	page := make([]byte, block.Size)
	for b := int64(0); ; b += step {
		fill(page, uint64(b)+1)
		_, err := d.WriteAt(page, b*block.Size)
		if errors.Is(err, syscall.ENOSPC) {
			return b - step
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestThinDeviceOverwritten: on a thin device that is full of single blocks what is
// stored can be overwritten, and trimmed.
func TestThinDeviceOverwritten(t *testing.T) {
	seed := disktest.Seed(t)
	o := smallOptions(t)
	o.CommitInterval = time.Second
	g := testGeometry(64<<20, compression.None)
	g.Capacity = 24 * store.SegmentSizeMin
	f := disktest.New(seed, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	rng := rand.New(rand.NewPCG(seed, 0))
	page := make([]byte, block.Size)
	last := fillUp(t, d, 2)
	for i := range 800 * disktest.Scale(t) {
		fill(page, rng.Uint64())
		if _, err := d.WriteAt(page, rng.Int64N(last+1)&^1*block.Size); err != nil {
			t.Fatalf("overwriting %d of %d blocks: %v", i, last/2+1, err)
		}
		if i%8 == 0 {
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for b := int64(0); b <= last; b += 4 {
		if err := d.Trim(t.Context(), uint64(b)*block.Size, block.Size, false); err != nil {
			t.Fatalf("trim of block %d of %d: %v", b, last, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Clone())
}

// TestThinDeviceFourthOverwritten: on a thin device that is full every fourth block can
// be overwritten: what that leaves dead lies in segments that are partly alive, and
// behind the newest checkpoint.
func TestThinDeviceFourthOverwritten(t *testing.T) {
	o := smallOptions(t)
	o.CacheBytes = 8 << 20
	g := testGeometry(64<<20, compression.None)
	g.Capacity = 40 * store.SegmentSizeMin
	f := disktest.New(7, disktest.Options{})
	format(t, f, g)
	d := open(t, f, o)
	page := make([]byte, block.Size)
	last := fillUp(t, d, 1)
	for b := int64(0); b <= last; b += 4 {
		fill(page, uint64(b)+99)
		if _, err := d.WriteAt(page, b*block.Size); err != nil {
			t.Fatalf("overwriting block %d of %d: %v", b, last, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Clone())
}

// TestLookingOnFullHost: asking for the state of a device whose host is full, and that
// refuses trims, does not use its log up.
func TestLookingOnFullHost(t *testing.T) {
	const size = 12 << 20
	o := smallOptions(t)
	o.CleanPeriod, o.CheckpointBytes = time.Hour, 64<<20
	o.Warn = func(string, error) {}
	for _, spare := range []int64{2, 3} {
		d, _, data := onFullHost(t, size, spare, o)
		for b := 0; ; b += 5 * block.Size {
			b %= size
			err := d.Trim(t.Context(), uint64(b), block.Size, true)
			if errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			clear(data[b:][:block.Size])
		}
		for i := range 400 {
			if _, err := d.Status(t.Context()); err != nil {
				t.Fatalf("%d segments, look %d: %v", spare, i, err)
			}
		}
		compareAll(t, d, data)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
