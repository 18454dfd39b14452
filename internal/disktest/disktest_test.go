package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
)

func TestFile(t *testing.T) {
	for _, o := range []Options{{}, {SectorSize: 4096}, {Capacity: 8 << 20}} {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) { RunFile(t, New(1, o)) })
	}
}

func mustWrite(t testing.TB, d *Disk, p []byte, off int64) {
	t.Helper()
	if n, err := d.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("write at %d: %d, %v", off, n, err)
	}
}

func mustSync(t testing.TB, d *Disk) {
	t.Helper()
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
}

// content is all bytes of d.
func content(t testing.TB, d *Disk) []byte {
	t.Helper()
	size, err := d.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if n, err := d.ReadAt(b, 0); n != len(b) || err != nil && err != io.EOF {
		t.Fatal(n, err)
	}
	return b
}

// change makes one random change of d.
func change(d *Disk, rng *rand.Rand) error {
	off, n := rng.Int64N(64<<10), 1+rng.Int64N(16<<10)
	if rng.IntN(3) > 0 {
		off, n = off&^511, (n+511)&^511
	}
	switch rng.IntN(16) {
	case 0:
		return d.Truncate(off)
	case 1:
		return d.Punch(off, n)
	case 2:
		return d.Allocate(off, n)
	case 3, 4:
		return d.Sync()
	default:
		p := make([]byte, n)
		fill(p, Described, off, rng.Uint64(), 0)
		_, err := d.WriteAt(p, off)
		return err
	}
}

func TestSyncedSurvivesEverything(t *testing.T) {
	d := New(1, Options{})
	a, b := bytes.Repeat([]byte("a"), 10000), bytes.Repeat([]byte("b"), 10000)
	mustWrite(t, d, a, 100)
	mustSync(t, d)
	synced := content(t, d)
	mustWrite(t, d, b, 50000) // does not touch the first
	if got := content(t, d.Crash(LoseAll)); !bytes.Equal(got, synced) {
		t.Fatal("losing all does not give what was synced")
	}
	if got := content(t, d.Crash(KeepAll)); !bytes.Equal(got, content(t, d)) {
		t.Fatal("keeping all does not give what was written")
	}
	for seed := range uint64(200) {
		if got := content(t, d.Crash(Random(seed))); !bytes.Equal(got[100:10100], a) {
			t.Fatalf("seed %d: synced bytes were lost", seed)
		}
	}
	if d.Pending() != 1 {
		t.Fatalf("%d pending", d.Pending())
	}
}

// Every kind of loss that the model promises must be seen.
func TestRandomLosses(t *testing.T) {
	const size = 16 << 10
	for _, sector := range []int{512, 4096} {
		d := New(1, Options{SectorSize: sector})
		old, one, two := bytes.Repeat([]byte{1}, size), bytes.Repeat([]byte{2}, size), bytes.Repeat([]byte{3}, size)
		mustWrite(t, d, old, 0)
		mustSync(t, d)
		mustWrite(t, d, one, 0)
		mustWrite(t, d, two, 0)
		mustWrite(t, d, one, size) // grows
		if err := d.Punch(2*size, size); err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		units := map[int]bool{}
		for seed := range uint64(2000) {
			got := content(t, d.Crash(Random(seed)))
			if again := content(t, d.Crash(Random(seed))); !bytes.Equal(got, again) {
				t.Fatalf("seed %d gives two results", seed)
			}
			for i := 0; i < size; i += sector {
				if !bytes.Equal(got[i:i+sector], bytes.Repeat(got[i:i+1], sector)) {
					t.Fatalf("seed %d: a sector of %d bytes at %d is torn", seed, sector, i)
				}
			}
			count := [4]int{}
			for i, c := range got[:size] {
				count[c]++
				if i > 0 && got[i-1] != c {
					units[i&-i] = true
				}
			}
			switch {
			case count[1] == size:
				seen["both lost"]++
			case count[2] == size:
				seen["earlier one wins"]++
			case count[3] == size:
				seen["later one wins"]++
			case count[0] != 0:
				t.Fatal("zeros where bytes were synced")
			case count[1] > 0 && count[2] > 0 && count[3] > 0:
				seen["torn, old and both"]++
			case count[1] > 0:
				seen["torn, old and new"]++
			default:
				seen["torn, both new"]++
			}
			switch grown := got[size:]; {
			case len(grown) == 0:
				seen["growth lost"]++
			case bytes.Equal(grown, one):
				seen["growth kept"]++
			case bytes.Equal(grown, make([]byte, len(grown))):
				seen["size kept, data lost"]++
			default:
				seen["growth torn"]++
			}
		}
		for _, s := range []string{
			"both lost", "earlier one wins", "later one wins", "torn, old and both", "torn, old and new", "torn, both new",
			"growth lost", "growth kept", "size kept, data lost", "growth torn",
		} {
			if seen[s] < 5 {
				t.Errorf("sector %d: %q seen %d times of 2000", sector, s, seen[s])
			}
		}
		if units[512] != (sector == 512) || !units[4096] {
			t.Errorf("sector %d: torn at units %v", sector, units)
		}
	}
}

func TestPunchAndAllocateMayBeLost(t *testing.T) {
	d := New(1, Options{})
	mustWrite(t, d, bytes.Repeat([]byte{1}, 64<<10), 0)
	mustSync(t, d)
	for _, change := range []func() error{
		func() error { return d.Punch(0, 64<<10) },
		func() error { return d.Allocate(1<<20, 64<<10) },
		func() error { return d.Truncate(4096) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		now, _ := d.Allocated()
		kept, lost := 0, 0
		for seed := range uint64(100) {
			if n, _ := d.Crash(Random(seed)).Allocated(); n == now {
				kept++
			} else {
				lost++
			}
		}
		if kept < 5 || lost < 5 {
			t.Errorf("kept %d times, lost %d times", kept, lost)
		}
		mustSync(t, d)
	}
}

// A punched range reads as zeros for some and as something else for others.
func TestPunchedReadsAsAnything(t *testing.T) {
	zeros, junk := 0, 0
	for seed := range uint64(50) {
		d := New(seed, Options{})
		mustWrite(t, d, bytes.Repeat([]byte{1}, 8192), 0)
		if err := d.Punch(0, 8192); err != nil {
			t.Fatal(err)
		}
		if n, _ := d.Allocated(); n != 0 {
			t.Fatalf("%d bytes allocated", n)
		}
		if bytes.Equal(content(t, d), make([]byte, 8192)) {
			zeros++
		} else {
			junk++
		}
	}
	if zeros < 5 || junk < 5 {
		t.Errorf("zeros %d times, junk %d times", zeros, junk)
	}
}

// A sync covers what returned before it began, and nothing else.
func TestSyncCoversWhatCameBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(1, Options{})
		mustWrite(t, d, []byte("before"), 0)
		release := make(chan struct{})
		d.SetHook(func(o Op) {
			if o.Kind == Sync {
				<-release
			}
		})
		done := make(chan error)
		go func() { done <- d.Sync() }()
		synctest.Wait()
		mustWrite(t, d, []byte("during"), 4096)
		close(release)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if got := content(t, d.Crash(LoseAll)); !bytes.Equal(got, []byte("before")) {
			t.Fatalf("%q is durable", got)
		}
	})
}

// For each k, running a history up to a cut at k and materialising the cut from
// one recorded run must give the same disk.
func TestRecordingEqualsCutting(t *testing.T) {
	seed := Seed(t)
	const n = 60
	for _, o := range []Options{{}, {SectorSize: 4096}, {Device: true, Size: 96 << 10}} {
		run := func(d *Disk) {
			rng := rand.New(rand.NewPCG(seed, 0))
			d.FailSync(3, Random(seed))
			for range n {
				if err := change(d, rng); errors.Is(err, ErrPowerCut) {
					return
				} else if err != nil && !errors.Is(err, syscall.EIO) {
					t.Fatal(err)
				}
			}
		}
		start := New(seed, o)
		rng := rand.New(rand.NewPCG(seed, 1))
		for range 5 {
			if err := change(start, rng); err != nil {
				t.Fatal(err)
			}
		}
		rec := start.Clone()
		rec.Record()
		run(rec)
		if rec.Ops() != n {
			t.Fatalf("%d operations", rec.Ops())
		}
		for k := range int64(n + 1) {
			live := start.Clone()
			live.CutAt(k)
			run(live)
			if live.IsCut() != (k < n) {
				t.Fatalf("cut at %d of %d: %v", k, n, live.IsCut())
			}
			for _, loss := range []Loss{LoseAll, KeepAll, Random(seed + uint64(k)), Random(uint64(k))} {
				a, b := live.Crash(loss), rec.At(k, loss)
				if !bytes.Equal(content(t, a), content(t, b)) || a.cache.allocated != b.cache.allocated {
					t.Fatalf("%+v: cut at %d with %+v: live and recorded differ", o, k, loss)
				}
			}
		}
		// The cursor goes back too.
		if !bytes.Equal(content(t, rec.At(n/2, LoseAll)), content(t, rec.At(n/2, LoseAll))) {
			t.Fatal("At is not repeatable")
		}
	}
}

func TestEverythingFailsAfterTheCut(t *testing.T) {
	d := New(1, Options{})
	mustWrite(t, d, []byte("one"), 0)
	d.CutAt(1)
	if n, err := d.WriteAt([]byte("two"), 0); n != 0 || !errors.Is(err, ErrPowerCut) {
		t.Fatal(n, err)
	}
	for name, f := range map[string]func() error{
		"read":       func() error { _, err := d.ReadAt(make([]byte, 1), 0); return err },
		"write":      func() error { _, err := d.WriteAt([]byte("x"), 0); return err },
		"sync":       d.Sync,
		"allocate":   func() error { return d.Allocate(0, 1) },
		"punch":      func() error { return d.Punch(0, 1) },
		"truncate":   func() error { return d.Truncate(0) },
		"drop cache": d.DropCache,
		"size":       func() error { _, err := d.Size(); return err },
	} {
		if err := f(); !errors.Is(err, ErrPowerCut) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := content(t, d.Crash(KeepAll)); string(got) != "two" {
		t.Errorf("what was in flight is lost though all is kept: %q", got)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Sync(); !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}

// The sync in flight may or may not have happened.
func TestSyncInFlight(t *testing.T) {
	d := New(1, Options{})
	for i := range 20 {
		mustWrite(t, d, bytes.Repeat([]byte{1}, 4096), int64(i)*4096)
	}
	d.CutAt(d.Ops())
	if err := d.Sync(); !errors.Is(err, ErrPowerCut) {
		t.Fatal(err)
	}
	all, some := 0, 0
	for seed := range uint64(200) {
		if bytes.Count(content(t, d.Crash(Random(seed))), []byte{1}) == 20*4096 {
			all++
		} else {
			some++
		}
	}
	if all < 20 || some < 20 {
		t.Fatalf("durable %d times, in part %d times", all, some)
	}
}

// The loss that fsync reports once and the page cache hides.
func TestFailedSync(t *testing.T) {
	d := New(1, Options{})
	mustWrite(t, d, []byte("old."), 0)
	mustSync(t, d)
	mustWrite(t, d, []byte("new."), 0)
	d.FailSync(2, LoseAll)
	mustSync(t, d)
	mustWrite(t, d, []byte("lost"), 0)
	if err := d.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	mustSync(t, d) // and nobody knows
	if got := content(t, d); string(got) != "lost" {
		t.Fatalf("the page cache shows %q", got)
	}
	if got := content(t, d.Clone()); string(got) != "lost" {
		t.Fatalf("the page cache shows the next process %q", got)
	}
	if got := content(t, d.Crash(KeepAll)); string(got) != "new." {
		t.Fatalf("the medium has %q", got)
	}
	mustWrite(t, d, []byte("!"), 3) // pending: stays through DropCache
	if err := d.DropCache(); err != nil {
		t.Fatal(err)
	}
	if got := content(t, d); string(got) != "new!" {
		t.Fatalf("after DropCache: %q", got)
	}
}

func TestFaults(t *testing.T) {
	d := New(1, Options{})
	mustWrite(t, d, bytes.Repeat([]byte{1}, 100000), 0)
	mustSync(t, d)

	d.FailReads(5000, 10)
	for _, c := range []struct {
		off, n int64
		fails  bool
	}{{0, 5000, false}, {0, 5001, true}, {5009, 1, true}, {5010, 10, false}, {0, 100000, true}} {
		if _, err := d.ReadAt(make([]byte, c.n), c.off); errors.Is(err, syscall.EIO) != c.fails {
			t.Errorf("read [%d,%d): %v", c.off, c.off+c.n, err)
		}
	}
	d.ClearFaults()

	d.Inject(Fault{Kinds: Write, After: 1, Times: 1, Partial: 3, Err: syscall.ENXIO})
	mustWrite(t, d, []byte("......"), 0)
	if n, err := d.WriteAt([]byte("abcdef"), 0); n != 3 || !errors.Is(err, syscall.ENXIO) {
		t.Errorf("short write: %d, %v", n, err)
	}
	mustWrite(t, d, []byte("f"), 5)
	if got := content(t, d)[:6]; string(got) != "abc..f" {
		t.Errorf("after a short write: %q", got)
	}

	d.Inject(Fault{Kinds: Write | Allocate | Punch | Truncate | DropCache})
	for range 3 {
		if _, err := d.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.EIO) {
			t.Errorf("persistent: %v", err)
		}
		if err := d.Allocate(1<<20, 1); !errors.Is(err, syscall.EIO) {
			t.Errorf("persistent: %v", err)
		}
		if err := d.Truncate(0); !errors.Is(err, syscall.EIO) {
			t.Errorf("persistent: %v", err)
		}
		if err := d.DropCache(); !errors.Is(err, syscall.EIO) {
			t.Errorf("persistent: %v", err)
		}
	}
	if got := content(t, d); len(got) != 100000 || got[0] != 'a' {
		t.Errorf("failed operations had an effect: %d bytes, %q", len(got), got[:6])
	}
	if c := d.Counts(); c.Writes != 7 || c.Syncs != 1 || c.Reads != 7 || c.Allocates != 3 || c.Truncates != 3 {
		t.Errorf("%+v", c)
	}
}

// A sweep over all operations, each failing in its turn, ends.
func TestFaultSweep(t *testing.T) {
	for k := 0; ; k++ {
		d := New(1, Options{})
		d.Inject(Fault{Kinds: Changes, After: k, Times: 1})
		failed := -1
		for i, f := range []func() error{
			func() error { return d.Allocate(0, 4096) },
			func() error { _, err := d.WriteAt([]byte("x"), 0); return err },
			d.Sync,
			func() error { return d.Punch(0, 4096) },
			func() error { return d.Truncate(0) },
		} {
			if f() != nil {
				failed = i
			}
		}
		if failed < 0 {
			if k != 5 {
				t.Fatalf("no operation failed at %d", k)
			}
			return
		}
		if failed != k {
			t.Fatalf("operation %d failed, not %d", failed, k)
		}
	}
}

func TestCapacity(t *testing.T) {
	d := New(1, Options{Capacity: 64 << 10})
	if err := d.Allocate(0, 32<<10); err != nil {
		t.Fatal(err)
	}
	if err := d.Allocate(32<<10, 36<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if n, _ := d.Size(); n != 32<<10 {
		t.Fatalf("size %d after a refused Allocate", n)
	}
	mustWrite(t, d, make([]byte, 32<<10), 0) // has its space
	if n, err := d.WriteAt(make([]byte, 64<<10), 16<<10); n != 48<<10 || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(n, err)
	}
	mustWrite(t, d, make([]byte, 64<<10), 0)
	if err := d.Punch(0, 4096); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, d, []byte("x"), 1<<30)
	if _, err := d.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	d.SetCapacity(1 << 20)
	mustWrite(t, d, []byte("x"), 0)
}

func TestDevice(t *testing.T) {
	d := New(1, Options{Device: true, Size: 1 << 20})
	if err := d.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if n, _ := d.Size(); n != 1<<20 {
		t.Fatalf("size %d", n)
	}
	if n, _ := d.Allocated(); n != 1<<20 {
		t.Fatalf("allocated %d", n)
	}
	if n, err := d.WriteAt(make([]byte, 1024), 1<<20-512); n != 512 || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(n, err)
	}
	if err := d.Allocate(1<<20, 1); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	for seed := range uint64(50) {
		if n, _ := d.Crash(Random(seed)).Size(); n != 1<<20 {
			t.Fatalf("size %d after a crash", n)
		}
	}
}

func TestDamageAtRest(t *testing.T) {
	d := New(1, Options{})
	b := make([]byte, 4*4096)
	for i := range b {
		b[i] = byte(i / 4096)
	}
	mustWrite(t, d, b, 0)
	mustSync(t, d)
	old := d.Clone()
	mustWrite(t, d, bytes.Repeat([]byte{9}, 4096), 0)
	mustSync(t, d)

	d.Corrupt(2*4096, 3)
	d.Copy(4096, 3*4096, 4096)
	d.Restore(old, 0, 4096)
	for name, d := range map[string]*Disk{"cache": d, "medium": d.Crash(LoseAll)} {
		got := content(t, d)
		for i := range 3 {
			if x := got[2*4096+i] ^ b[2*4096+i]; x == 0 || x&(x-1) != 0 {
				t.Errorf("%s: byte %d of the corrupt ones differs by %#x", name, i, x)
			}
		}
		if !bytes.Equal(got[2*4096+3:], b[2*4096+3:]) {
			t.Errorf("%s: Corrupt changed other bytes", name)
		}
		if !bytes.Equal(got[4096:2*4096], b[3*4096:]) {
			t.Errorf("%s: Copy did not copy", name)
		}
		if !bytes.Equal(got[:4096], b[:4096]) {
			t.Errorf("%s: Restore did not restore", name)
		}
	}
}

// Clones go their own ways, also at the same time.
func TestClonesAreIndependent(t *testing.T) {
	seed := Seed(t)
	d := New(seed, Options{})
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		if err := change(d, rng); err != nil {
			t.Fatal(err)
		}
	}
	mustWrite(t, d, []byte("not synced"), 1000)
	before := content(t, d)
	var wg sync.WaitGroup
	for i := range uint64(4) {
		c, again := d.Clone(), d.Clone()
		wg.Go(func() {
			a, b := rand.New(rand.NewPCG(seed, i)), rand.New(rand.NewPCG(seed, i))
			for range 100 {
				if change(c, a) != nil || change(again, b) != nil {
					t.Error("change failed")
				}
			}
			if !bytes.Equal(content(t, c), content(t, again)) {
				t.Error("the same changes give two results")
			}
		})
	}
	wg.Wait()
	if !bytes.Equal(content(t, d), before) {
		t.Fatal("a clone changed its origin")
	}
	// What is pending in the origin is pending in the clone, and synced with it.
	c := d.Clone()
	if c.Pending() != d.Pending() || d.Pending() == 0 {
		t.Fatalf("%d pending, in the clone %d", d.Pending(), c.Pending())
	}
	mustSync(t, c)
	if !bytes.Equal(content(t, c.Crash(LoseAll)), before) {
		t.Fatal("a sync in the clone does not cover what the origin wrote")
	}
}

func BenchmarkWriteSync(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			d := New(1, Options{})
			p := make([]byte, size)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				mustWrite(b, d, p, int64(i%1000)*int64(size))
				if i%8 == 7 {
					mustSync(b, d)
				}
			}
		})
	}
}

// BenchmarkAt is one step of a crash sweep over a recorded history.
func BenchmarkAt(b *testing.B) {
	d := New(1, Options{})
	d.Record()
	p := make([]byte, 64<<10)
	for i := range 2000 {
		mustWrite(b, d, p, int64(i%500)*int64(len(p)))
		if i%8 == 7 {
			mustSync(b, d)
		}
	}
	for i := 0; b.Loop(); i++ {
		d.At(int64(i)%d.Ops(), Random(uint64(i)))
	}
}

// TestSame: between two syncs a cut that loses all leaves the same disk.
func TestSame(t *testing.T) {
	f := New(1, Options{})
	f.Record()
	write := func(off int64) {
		t.Helper()
		if _, err := f.WriteAt(make([]byte, 100), off); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	write(4096)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	write(1 << 20)
	for k, want := range []bool{true, true, true, false} { // with operation k
		if got := f.At(0, LoseAll).Same(f.At(int64(k), LoseAll)); got != want {
			t.Errorf("cut at 0 and at %d: %v, want %v", k, got, want)
		}
	}
	if f.At(3, LoseAll).Same(f.At(4, KeepAll)) {
		t.Error("a disk with a write is the same as one without")
	}
}
