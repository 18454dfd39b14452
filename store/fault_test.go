package store

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"cnbd/internal/disktest"
)

// TestFaultAtEveryOperation has one operation of the disk fail, each in turn, a
// failed sync losing some of what it covered for good. From the failure of a write
// or a sync on nothing is acknowledged any more, and what was acknowledged before
// is there after a restart, on a host whose page cache shows more than the medium
// has, and after a power cut (promises P1, P2, P5, rule R5).
func TestFaultAtEveryOperation(t *testing.T) {
	seed := disktest.Seed(t)
	failed, history := 0, 0
	for k := 0; ; k++ {
		r := &crashRun{t: t, rng: rand.New(rand.NewPCG(seed, uint64(history))), geo: testGeometry(96, 40)}
		r.disk = disktest.New(seed+uint64(history), disktest.Options{})
		must(t, Format(r.disk, r.geo))
		r.disk.Inject(disktest.Fault{Kinds: disktest.Changes, After: k, Times: 1, Loss: disktest.Random(seed ^ uint64(k))})
		r.model = disktest.NewModel(int64(r.geo.DeviceSize))
		o := testOptions()
		var err error
		if r.store, err = Open(r.disk, o); err == nil {
			for i := 0; i < 60 && err == nil; i++ {
				err = r.step()
			}
			if err == nil {
				err = r.commit()
			}
			if r.store.Err() != nil {
				failed++
				for range 3 {
					if _, _, err := r.store.AppendCommit(); err == nil {
						t.Fatalf("seed %d, fault at operation %d: a failed store takes commits", seed, k)
					}
				}
			} else if err != nil {
				t.Fatalf("seed %d, fault at operation %d: %v, and the store goes on", seed, k, err)
			}
			r.store.Close()
		} else if !errors.Is(err, syscall.EIO) {
			t.Fatalf("seed %d, fault at operation %d: open: %v", seed, k, err)
		}
		for _, d := range []*disktest.Disk{r.disk.Clone(), r.disk.Crash(disktest.LoseAll), r.disk.Crash(disktest.Random(uint64(k)))} {
			s, first, err := r.verify(d, r.disk.Ops(), o)
			if err != nil {
				t.Fatalf("seed %d, fault at operation %d: after a restart: %v", seed, k, err)
			}
			s.Close()
			// What is shown now is on the medium.
			s, second, err := r.verify(d.Crash(disktest.LoseAll), r.disk.Ops(), o)
			if err != nil || first != second {
				t.Fatalf("seed %d, fault at operation %d: commit point %d after a restart, and %d after a power cut then: %v", seed, k, first, second, err)
			}
			s.Close()
		}
		if int64(k) > r.disk.Ops() {
			// No operation was struck.
			k = -1
			if history++; history == 2*disktest.Scale(t) {
				break
			}
		}
	}
	t.Logf("seed %d: %d failures", seed, failed)
	if failed == 0 {
		t.Error("nothing has failed")
	}
}
