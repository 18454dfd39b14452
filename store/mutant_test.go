//go:build mutant

package store

import (
	"errors"
	"fmt"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/mutant"
)

// TestMutants: each mistake in the store is found by the test that is there for it.
func TestMutants(t *testing.T) {
	powerCuts := func(seed uint64) error { return (&crashRun{}).history(seed, 0) }
	faults := func(seed uint64) error { _, err := faultHistory(seed, 0); return err }
	for _, m := range []struct {
		name  string
		m     mutant.Mutant
		tries int
		try   func(seed uint64) error
	}{
		{"commit without sync", mutant.CommitWithoutSync, 20, powerCuts},
		// A history shows it about once in ten.
		{"reuse before the checkpoint", mutant.ReuseBeforeCheckpoint, 100, powerCuts},
		{"reuse behind one checkpoint", mutant.ReuseBehindOne, 20, func(seed uint64) error { return rottenHistory(seed, 0) }},
		{"log unverified", mutant.LogUnverified, 20, powerCuts},
		{"stale life", mutant.StaleLife, 20, powerCuts},
		{"open from the page cache", mutant.OpenFromCache, 20, faults},
		{"blob unverified", mutant.BlobUnverified, 20, damagedBlob},
		{"dropped reservation", mutant.DropReservation, 20, fullStore},
		{"copy over newer", mutant.CopyOverNewer, 1, overtaken},
		{"map over newer", mutant.MapOverNewer, 1, overtaken},
		{"resize in one slot", mutant.ResizeOneSlot, 20, func(seed uint64) error { return (&crashRun{}).resizeHistory(seed, 0) }},
	} {
		t.Run(m.name, func(t *testing.T) { mutant.Caught(t, m.m, disktest.Seed(t), m.tries, m.try) })
	}
}

// damagedBlob flips bits in a blob, which must not be returned then.
func damagedBlob(seed uint64) error {
	r := &crashRun{}
	r.begin(seed, 0)
	if err := Format(r.disk, r.geo); err != nil {
		return err
	}
	s, err := Open(r.disk, testOptions())
	if err != nil {
		return err
	}
	defer s.Close()
	r.store = s
	for range 20 {
		if err := r.step(); err != nil {
			return err
		}
	}
	if err := r.commit(); err != nil {
		return err
	}
	list, err := s.Lookup(block.Range{End: block.Index(r.geo.Blocks())}, nil)
	if err != nil {
		return err
	}
	seen := make(map[extents.Addr]bool)
	for _, e := range list {
		if e.Addr.Length > 0 && !seen[e.Addr] {
			seen[e.Addr] = true
			r.disk.Corrupt(s.segments.base(e.Addr.Segment)+int64(e.Addr.Offset), 1)
			if err := s.ReadBlob(make([]byte, e.Addr.Length), e.Addr); !errors.Is(err, ErrCorrupt) {
				return fmt.Errorf("damaged bytes at %+v are returned: %w", e.Addr, err)
			}
		}
	}
	return nil
}

// fullStore writes until the store is full; all that was accepted is stored.
func fullStore(seed uint64) error {
	d := disktest.New(seed, disktest.Options{})
	if err := Format(d, testGeometry(4096, 16)); err != nil {
		return err
	}
	c := &committed{want: make(chan struct{}, 1)}
	var err error
	if c.Store, err = Open(d, Options{}); err != nil {
		return err
	}
	defer c.Store.Close()
	for at := 0; ; at = (at + 16) % 4096 {
		if err := c.Reserve(16, Growth); errors.Is(err, ErrNoSpace) {
			return c.commit()
		} else if err != nil {
			return err
		}
		if err := c.blob(at, 16, 0xffff); err != nil {
			return fmt.Errorf("what was accepted cannot be stored: %w", err)
		}
		c.Release(16)
	}
}
