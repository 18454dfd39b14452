package device

import (
	"errors"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// compareSnapshot reads all of s, in pieces that are not aligned, and what it tells of
// holes. It reports false if s is lost.
func compareSnapshot(t *testing.T, s *Snapshot, truth []byte, rng *rand.Rand) bool {
	t.Helper()
	for off := 0; off < len(truth); {
		got := make([]byte, min(1+rng.IntN(300<<10), len(truth)-off))
		err := s.ReadAt(t.Context(), got, uint64(off))
		if errors.Is(err, store.ErrPinLost) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		if i := differ(got, truth[off:][:len(got)]); i >= 0 {
			t.Fatalf("byte %d of the snapshot is wrong", off+i)
		}
		off += len(got)
	}
	at := 5
	err := s.Allocation(t.Context(), 5, uint64(len(truth)-10), func(n uint64, hole bool) bool {
		if hole && differ(truth[at:][:n], make([]byte, n)) >= 0 {
			t.Errorf("%d bytes at %d are told to be a hole", n, at)
		}
		at += int(n)
		return true
	})
	if errors.Is(err, store.ErrPinLost) {
		return false
	}
	if err != nil || at != len(truth)-5 {
		t.Fatalf("told the allocation to %d: %v", at, err)
	}
	return true
}

// TestSnapshot: a snapshot has all that was answered before, and stays so while
// histories of requests, cleaning and recompression go on.
func TestSnapshot(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 6 << 20
	v := newRandomDevice(t, seed, size, 4, map[string]uint64{})
	warn := v.opts.Warn
	v.opts.Warn = func(msg string, err error) {
		if !errors.Is(err, store.ErrPinLost) {
			warn(msg, err)
		}
	}
	d := open(t, v.disk, v.opts)
	rounds, lost := 8*disktest.Scale(t), 0
	for range rounds {
		if err := v.each(func(r *region) error { return r.run(t.Context(), d, 40) }); err != nil {
			t.Fatal(err)
		}
		var truth []byte
		for _, r := range v.regions {
			truth = append(truth, r.bytes...)
		}
		s, err := d.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- v.each(func(r *region) error { return r.run(t.Context(), d, 40) }) }()
		if !compareSnapshot(t, s, truth, v.rng) {
			lost++
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		s.Close()
	}
	t.Logf("%d of %d snapshots were lost to writes", lost, rounds)
	if lost == rounds {
		t.Error("all snapshots were lost")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	checkClean(t, v.disk.Clone())

	v.opts.ReadOnly = true
	d = open(t, v.disk.Clone(), v.opts)
	s, err := d.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var truth []byte
	for _, r := range v.regions {
		truth = append(truth, r.bytes...)
	}
	compareSnapshot(t, s, truth, v.rng)
	if err := s.ReadAt(t.Context(), make([]byte, 2), size-1); !errors.Is(err, ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
	s.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRegions: what is told of regions adds up, and tells scattered data from what
// lies in order.
func TestRegions(t *testing.T) {
	const size, part = 8 << 20, 1 << 20
	o := smallOptions(t)
	o.NoRecompress = true
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(size, compression.Zstd))
	d := open(t, f, o)
	defer d.Close()
	noise := make([]byte, part)
	fill(noise, 1)
	write := func(p []byte, off int64) {
		t.Helper()
		if _, err := d.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	write(noise, 0)
	write(slices.Repeat([]byte("compresses"), part/20), 2*part)
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	for i, b := range rand.New(rand.NewPCG(1, 1)).Perm(part / block.Size) {
		write(noise[:block.Size], 4*part+int64(b)*block.Size)
		if i%16 == 15 {
			if err := d.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, err := d.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	got, err := s.Regions(t.Context(), part)
	if err != nil || len(got) != size/part {
		t.Fatalf("%d regions, %v", len(got), err)
	}
	st, err := d.store.Stats()
	if err != nil {
		t.Fatal(err)
	}
	var sum Region
	for i, x := range got {
		t.Logf("%d: %+v", i, x)
		sum.Data += x.Data
		sum.Stored += x.Stored
	}
	if sum.Data != st.DataBytes || sum.Stored != st.StoredBytes {
		t.Errorf("%d bytes of data, %d stored; the store has %d and %d", sum.Data, sum.Stored, st.DataBytes, st.StoredBytes)
	}
	if got[0].Data != part || got[0].Fragments > 8 || got[1] != (Region{}) || got[2].Stored > got[2].Data/4 || got[4].Data != part || got[4].Fragments < 32 {
		t.Errorf("%+v", got)
	}
}

// TestSnapshotOfFailed: a device that has failed has no snapshot, for what is read of
// it may not be stored.
func TestSnapshotOfFailed(t *testing.T) {
	o := smallOptions(t)
	o.Warn = nil
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(1<<20, compression.None))
	d := open(t, f, o)
	if _, err := d.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	f.FailSync(1, disktest.LoseAll)
	if _, err := d.Snapshot(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("%v", err)
	}
	d.Close()
}
