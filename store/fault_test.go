package store

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// TestFaultAtEveryOperation has one operation of the disk fail, each in turn, a
// failed sync losing some of what it covered for good. From the failure of a write
// or a sync on nothing is acknowledged any more, and what was acknowledged before
// is there after a restart, on a host whose page cache shows more than the medium
// has, and after a power cut (promises P1, P2, P5, rule R5).
func TestFaultAtEveryOperation(t *testing.T) {
	seed := disktest.Seed(t)
	failed := 0
	for h := range 2 * disktest.Scale(t) {
		n, err := faultHistory(seed, h)
		if err != nil {
			t.Fatalf("seed %d, history %d: %v", seed, h, err)
		}
		failed += n
	}
	t.Logf("seed %d: %d failures", seed, failed)
	if failed == 0 {
		t.Error("nothing has failed")
	}
}

// faultHistory has each operation of history h of seed fail, and tells how often
// the store has failed with it.
func faultHistory(seed uint64, h int) (failed int, err error) {
	for k := 0; ; k++ {
		r := &crashRun{}
		r.begin(seed, h)
		stopped, err := r.faultAt(k, disktest.Random(seed^uint64(k)))
		if err != nil {
			return failed, fmt.Errorf("fault at operation %d: %w", k, err)
		}
		if stopped {
			failed++
		}
		if int64(k) > r.disk.Ops() {
			return failed, nil // no operation was struck
		}
	}
}

// faultAt has operation k of a history fail, and tells whether the store has
// failed with it.
func (r *crashRun) faultAt(k int, loss disktest.Loss) (failed bool, err error) {
	if err := Format(r.disk, r.geo); err != nil {
		return false, err
	}
	// A write that fails may be short.
	r.disk.Inject(disktest.Fault{Kinds: disktest.Changes, After: k, Times: 1, Loss: loss, Partial: k % 5 * 1000})
	if r.store, err = Open(r.disk, r.opts); err == nil {
		for i := 0; i < 60 && err == nil; i++ {
			err = r.step()
		}
		if err == nil {
			err = r.commit()
		}
		if failed = r.store.Err() != nil; failed {
			for range 3 {
				if _, _, err := r.store.AppendCommit(); err == nil {
					return failed, errors.New("a failed store takes commits")
				}
			}
		} else if err != nil {
			return failed, fmt.Errorf("%w, and the store goes on", err)
		}
		r.store.Close()
	} else if !errors.Is(err, syscall.EIO) {
		return failed, fmt.Errorf("open: %w", err)
	}
	for _, d := range []*disktest.Disk{r.disk.Clone(), r.disk.Crash(disktest.LoseAll), r.disk.Crash(disktest.Random(uint64(k)))} {
		s, first, err := r.verify(d, r.disk.Ops())
		if err != nil {
			return failed, fmt.Errorf("after a restart: %w", err)
		}
		s.Close()
		// What is shown now is on the medium.
		s, second, err := r.verify(d.Crash(disktest.LoseAll), r.disk.Ops())
		if err != nil || first != second {
			return failed, fmt.Errorf("commit point %d after a restart, and %d after a power cut then: %w", first, second, err)
		}
		s.Close()
	}
	return failed, nil
}

// TestLyingDisk: a disk that now and then reads something else than was written,
// flipped, stale or of another place, gives the right data or an error, whether it
// lies to a start or to a reader, and never wrong data (promise P3).
func TestLyingDisk(t *testing.T) {
	seed := disktest.Seed(t)
	var right, failed, refused, started int
	for h := range 40 * disktest.Scale(t) {
		r := &crashRun{}
		r.begin(seed, h)
		must(t, Format(r.disk, r.geo))
		s, err := Open(r.disk, r.opts)
		must(t, err)
		r.store = s
		for range 60 {
			must(t, r.step())
		}
		old := r.disk.Clone()
		for range 60 {
			must(t, r.step())
		}
		must(t, r.commit())
		must(t, r.checkpoint()) // so that the last commit is known to be durable
		must(t, s.Close())
		d := r.disk.Clone()
		lie := []disktest.Lie{{Old: old}, {Shift: 4096 << r.rng.IntN(8)}, {Shift: -512}, {Flip: true}, {Old: old, Shift: SegmentSizeMin}}[h%5]
		start := r.rng.IntN(2) == 0
		if start {
			d.Inject(disktest.Fault{Kinds: disktest.Read, After: r.rng.IntN(12), Times: 1, Lie: lie})
		}
		if s, err = Open(d, r.opts); err != nil {
			if !IsDamage(err) && !errors.Is(err, ErrNotStore) {
				t.Fatalf("seed %d, history %d, %+v: open: %v", seed, h, lie, err)
			}
			refused++
			continue
		}
		started++
		for b := range int64(r.geo.Blocks()) {
			if !start && r.rng.IntN(3) == 0 {
				d.Inject(disktest.Fault{Kinds: disktest.Read, Times: 1, Lie: lie})
			}
			page := make([]byte, block.Size)
			if _, err := (contents{s}).ReadAt(page, b*block.Size); err != nil {
				failed++
				continue
			}
			if err := r.model.CheckRange(bytes.NewReader(append(make([]byte, b*block.Size), page...)), b*block.Size, block.Size); err != nil {
				t.Fatalf("seed %d, history %d, %+v, at the start %v: %v", seed, h, lie, start, err)
			}
			right++
		}
		must(t, s.Close())
	}
	t.Logf("%d started, %d refused; %d blocks right, %d errors, none wrong", started, refused, right, failed)
	if failed == 0 || right == 0 {
		t.Error("an outcome is missing")
	}
}
