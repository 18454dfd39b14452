package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"cnbd/internal/disktest"
)

func confirmed(*RepairReport) bool { return true }

// repaired repairs d, and proves what comes of it: the store opens and checks as
// whole but for what is reported as lost, and holds the state of one commit, the
// newest unless commits were given up. It returns the number of the state.
func (s *damageStore) repaired(d *disktest.Disk, givenUp bool) (*RepairReport, int, error) {
	plan := d.Clone()
	if _, err := Repair(plan, RepairOptions{Confirm: func(*RepairReport) bool { return false }}); err != nil {
		return nil, 0, fmt.Errorf("plan: %w", err)
	}
	if c := plan.Counts(); c.Writes+c.Punches+c.Truncates+c.Allocates > 0 {
		return nil, 0, fmt.Errorf("a repair that was not confirmed has written: %+v", c)
	}
	f := d.Clone()
	rep, err := Repair(f, RepairOptions{Confirm: confirmed})
	if err != nil {
		return rep, 0, fmt.Errorf("repair: %w", err)
	}
	if rep.Needed != rep.Repaired {
		return rep, 0, errors.New("needed, and not done")
	}
	f = f.Crash(disktest.LoseAll)
	check, err := Check(f.Clone(), CheckOptions{})
	if err != nil {
		return rep, 0, fmt.Errorf("check: %w", err)
	}
	if len(check.Problems) > 0 {
		return rep, 0, fmt.Errorf("repaired, and it has problems: %v", check.Problems)
	}
	for i := len(s.states) - 1; ; i-- {
		o, err := judge(f.Clone(), s.states[i])
		if err == nil && o.refused {
			err = errors.New("it does not open")
		}
		if err == nil || i == 0 || !givenUp && rep.GivenUp == 0 {
			return rep, i, err
		}
	}
}

// TestRepair damages what a store cannot be opened without.
func TestRepair(t *testing.T) {
	s := newDamageStore(t, false)
	clean, err := Repair(s.disk.Clone(), RepairOptions{Confirm: confirmed})
	if err != nil || clean.Needed {
		t.Fatalf("a store that is whole: %+v, %v", clean, err)
	}
	sb, other, err := readSuperblocks(s.disk.Clone(), func(string, error) {})
	must(t, err)
	base := func(n uint32) int64 { return segmentsOffset + int64(n)*SegmentSizeMin }
	heads := &repair{file: s.disk.Clone(), notes: &CheckReport{}}
	heads.readHeads(&sb.Geometry)
	var behind segmentHead // the first segment behind that in which replay begins
	for _, h := range heads.heads {
		if h.serial == sb.replay.serial+1 {
			behind = h
		}
	}
	for _, c := range []struct {
		name    string
		damage  func(d *disktest.Disk)
		givenUp bool
	}{
		{"one superblock", func(d *disktest.Disk) { d.Corrupt(0, 100) }, false},
		{"both superblocks", func(d *disktest.Disk) { d.Zero(0, segmentsOffset) }, false},
		{"both superblocks and the first segment", func(d *disktest.Disk) { d.Zero(0, base(0)+segmentData) }, false},
		{"the newest segment table", func(d *disktest.Disk) { d.Corrupt(base(sb.usage.segment)+int64(sb.usage.offset), 1) }, false},
		{"both segment tables", func(d *disktest.Disk) {
			for _, u := range []blobRef{sb.usage, other.usage} {
				d.Corrupt(base(u.segment)+int64(u.offset), 1)
			}
		}, false},
		{"the segment in which replay begins", func(d *disktest.Disk) { d.Zero(base(sb.replay.segment), segmentData) }, true},
		{"a segment of the log", func(d *disktest.Disk) { d.Corrupt(base(behind.number), segmentData) }, true},
		{"a record header of the log", func(d *disktest.Disk) { d.Corrupt(base(behind.number)+segmentData+8, 1) }, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := s.disk.Clone()
			c.damage(d)
			rep, _, err := s.repaired(d, false)
			if err != nil {
				t.Fatalf("%v; %+v", err, rep)
			}
			if !rep.Needed || c.givenUp != (rep.GivenUp > 0) {
				t.Errorf("%+v", rep)
			}
			t.Logf("%q; %d commits given up, changed %v, %d bytes unread, lost %v", rep.Problems, rep.GivenUp, rep.Changed, rep.Unread, rep.Lost)
		})
	}
}

// TestRepairAnything: whatever has been damaged, a repair ends with a store that is
// whole, or says that it cannot; and it may be interrupted at any moment.
func TestRepairAnything(t *testing.T) {
	seed := disktest.Seed(t)
	s := newDamageStore(t, false)
	repaired, givenUp, lossy, hopeless, interrupted := 0, 0, 0, 0, 0
	for i := range 100 * disktest.Scale(t) {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		d := s.disk.Clone()
		headers := make([]byte, segmentData)
		_, err := d.ReadAt(headers, s.last)
		must(t, err)
		for range 1 + rng.IntN(2) {
			r := s.used[rng.IntN(len(s.used))]
			n := int64(1) << rng.IntN(15)
			off := r.off + rng.Int64N(r.n)
			if rng.IntN(3) == 0 {
				off = r.off // headers, superblocks
			}
			d.Corrupt(off, n)
		}
		// With both copies of the newest header gone, and the last commit as well,
		// that is what a power cut before the last sync leaves.
		now := make([]byte, segmentData)
		_, err = d.ReadAt(now, s.last)
		must(t, err)
		unnamed := !bytes.Equal(now[:segmentHeader], headers[:segmentHeader]) && !bytes.Equal(now[segmentHeader:], headers[segmentHeader:])
		rep, state, err := s.repaired(d, unnamed)
		switch {
		case errors.Is(err, ErrCorrupt) && rep == nil:
			hopeless++
		case err != nil:
			t.Fatalf("seed %d, damage %d: %v; %+v", seed, i, err, rep)
		case rep.GivenUp > 0:
			givenUp++
		case len(rep.Lost) > 0:
			lossy++
		case rep.Repaired:
			repaired++
		}
		if err != nil || !rep.Repaired {
			continue
		}
		f := d.Clone()
		if _, err := Repair(f, RepairOptions{Confirm: confirmed}); err != nil {
			t.Fatal(err)
		}
		cut := d.Clone()
		cut.CutAt(rng.Int64N(f.Ops()))
		if _, err := Repair(cut, RepairOptions{Confirm: confirmed}); cut.IsCut() && !errors.Is(err, disktest.ErrPowerCut) {
			t.Fatalf("seed %d, damage %d: power cut in a repair: %v", seed, i, err)
		}
		again, other, err := s.repaired(cut.Crash(disktest.Random(uint64(i))), unnamed || rep.GivenUp > 0)
		if err != nil || other != state {
			t.Fatalf("seed %d, damage %d: repaired after a power cut in a repair: %v; %+v, before %+v", seed, i, err, again, rep)
		}
		interrupted++
	}
	t.Logf("%d repaired, %d with lost blocks, %d with commits given up, %d cannot be; %d interrupted", repaired, lossy, givenUp, hopeless, interrupted)
	if repaired == 0 || interrupted == 0 {
		t.Error("nothing was repaired")
	}
}
