package store

import (
	"bytes"
	"errors"
	"syscall"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// TestStatsBesideSnapshot: stats that wait for a read of the map, and a commit
// that begins a checkpoint meanwhile, do not wait for each other.
func TestStatsBesideSnapshot(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 60)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 32, ^uint32(0)))
	must(t, c.Checkpoint())
	must(t, c.Close())
	d = d.Clone()
	c = openCommitted(t, d, Options{})
	must(t, c.hole(block.Span(3, 1)))

	reading, proceed := make(chan struct{}), make(chan struct{})
	first := true
	d.SetHook(func(o disktest.Op) {
		if o.Kind == disktest.Read && first {
			first = false
			close(reading)
			<-proceed
		}
	})
	stats := make(chan error, 1)
	go func() {
		_, err := c.Stats()
		stats <- err
	}()
	<-reading
	d.SetHook(nil)
	c.snapshot.Store(true)
	within(t, "append", func() error { return c.hole(block.Span(5, 1)) })
	within(t, "commit", c.commit)
	close(proceed)
	within(t, "stats", func() error { return <-stats })
	must(t, c.Close())
}

// TestEmptyHole: a hole of no blocks leaves no record, which recovery would take
// for damage.
func TestEmptyHole(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(64, 40)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 8, 0xff))
	must(t, c.hole(block.Range{}))
	must(t, c.hole(block.Range{Start: 5, End: 5}))
	must(t, c.commit())
	must(t, c.blob(8, 8, 0xff))
	must(t, c.commit()) // names the epoch before as durable
	must(t, c.Close())
	c = openCommitted(t, d.Clone(), Options{})
	if r := c.Recovery(); r.Epoch != 2 {
		t.Errorf("recovered to epoch %d, want 2", r.Epoch)
	}
	must(t, c.Close())
}

// TestOlderCheckpointKnowsNewest: where the newest checkpoint cannot be loaded, and
// the log behind the one before does not reach it any more, commits that were
// acknowledged are gone: that is damage, and not the torn tail of a crash.
func TestOlderCheckpointKnowsNewest(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(256, 40)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 8, 0xff))
	must(t, c.Checkpoint())
	c.mu.Lock()
	from := c.segments.base(c.log.mu.head.number) + int64(c.log.mu.end)
	c.mu.Unlock()
	must(t, c.blob(8, 8, 0xff))
	must(t, c.commit())
	must(t, c.Checkpoint())
	must(t, c.Close())
	d = d.Crash(disktest.LoseAll)
	size, err := d.Size()
	must(t, err)
	d.Corrupt(from, size-from)
	if s, err := Open(d, Options{}); !errors.Is(err, ErrCorrupt) {
		if err == nil {
			t.Errorf("opened at epoch %d, without what was acknowledged", s.Recovery().Epoch)
			s.Close()
		} else {
			t.Error(err)
		}
	}
}

type told chan error

func (c told) Written(err error) { c <- err }

// TestFailureTellsWhoWaits: when the store fails while completions wait in a
// buffer that is not full, the next call hands it over.
func TestFailureTellsWhoWaits(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(64, 40)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 8, 0xff))
	commit, ok, err := c.AppendCommit()
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	must(t, c.blob(8, 8, 0xff)) // of the next epoch
	waiting := make(told, 1)
	must(t, c.AfterWrite(waiting, false))
	d.FailSync(1, disktest.LoseAll)
	if err := c.Sync(commit); err == nil {
		t.Fatal("a failed sync was answered with success")
	}
	if err := c.AfterWrite(make(told, 1), true); err == nil {
		t.Error("a failed store takes a completion")
	}
	within(t, "completion", func() error { <-waiting; return nil })
	must(t, c.Close())
}

// TestRecordBeyondSegment: a record that does not fit into any segment fails, and
// does not run over into the segment behind.
func TestRecordBeyondSegment(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(64, 40)))
	c := openCommitted(t, d, Options{})
	if _, _, err := c.log.append(recordTrims, make([]byte, SegmentSizeMin)); err == nil {
		t.Error("accepted")
	}
	if c.Err() == nil {
		t.Error("the store goes on")
	}
	must(t, c.Close())
}

// TestUnreadableLog: a place of the log that cannot be read costs the blocks of
// its record, where something says that the record was durable (P3). Where nothing
// does it may still have been: then the store is not opened without it.
func TestUnreadableLog(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(256, 40)))
	c := openCommitted(t, d, Options{})
	var at [3]int64
	for i := range at {
		must(t, c.blob(i*8, 8, 0xff))
		c.log.mu.Lock()
		at[i] = c.segments.base(c.log.mu.head.number) + int64(c.log.mu.end) - 5000
		c.log.mu.Unlock()
		must(t, c.commit())
	}
	must(t, c.Close())
	d = d.Clone()
	d.FailReads(at[1], 1)
	c = openCommitted(t, d, Options{})
	if r := c.Recovery(); r.Epoch != 3 || r.Damaged != 1 {
		t.Errorf("recovered %+v, want epoch 3 with one damaged record", r)
	}
	ext, err := c.Lookup(block.Range{End: 24}, nil)
	if err != nil || len(ext) != 3 || ext[0].Kind != extents.Data || ext[1].Kind != extents.Lost || ext[2].Kind != extents.Data {
		t.Errorf("the map has %+v, %v", ext, err)
	}
	must(t, c.Close())

	d = d.Crash(disktest.LoseAll)
	must(t, Format(d, testGeometry(256, 40)))
	c = openCommitted(t, d, Options{})
	must(t, c.blob(0, 8, 0xff))
	must(t, c.commit())
	must(t, c.Close())
	d = d.Clone()
	d.FailReads(at[0], 1)
	if s, err := Open(d, Options{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("open: %v, want EIO", err)
		if err == nil {
			s.Close()
		}
	}
}

// TestTornPadding: a power cut leaves a commit whole, and behind it, up to the
// border, what the segment held in an earlier life. The commit counts, and so do
// those of the lives that follow.
func TestTornPadding(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	if err := Format(f, testGeometry(100, 16)); err != nil {
		t.Fatal(err)
	}
	page := bytes.Repeat([]byte{7}, block.Size)
	for life := range 4 {
		s, err := Open(f.Clone(), testOptions())
		if err != nil {
			t.Fatalf("life %d: %v", life, err)
		}
		f = s.file.(*disktest.Disk)
		list, err := s.Lookup(block.Span(0, 4), nil)
		if err != nil {
			t.Fatal(err)
		}
		held := 0
		for _, e := range list {
			if e.Kind == extents.Data {
				held += int(e.Count)
			}
		}
		if held != life {
			t.Errorf("life %d has %d blocks of those before", life, held)
		}
		if err := s.AppendData(extents.Blob{Start: block.Index(life), Count: 1, Present: 1, Parts: [][]byte{page}}); err != nil {
			t.Fatal(err)
		}
		c, ok, err := s.AppendCommit()
		if err != nil || !ok {
			t.Fatal(ok, err)
		}
		if err := s.Sync(c); err != nil {
			t.Fatal(err)
		}
		head, end := s.log.mu.head.number, s.log.mu.end
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		f = f.Crash(disktest.KeepAll)
		// The last byte of the padding, in another sector than the commit.
		if _, err := f.WriteAt([]byte{0xff}, s.segments.base(head)+int64(end)-1); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStatsHoldNothing: while it looks up what it does not know, Stats keeps no
// segment from being free but for one look-up, and a checkpoint that overtakes it does
// not falsify what it tells.
func TestStatsHoldNothing(t *testing.T) {
	const far = 1 << 20 // in another leaf of the map
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(2*far, 60)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 32, ^uint32(0)))
	must(t, c.blob(far, 32, ^uint32(0)))
	must(t, c.Checkpoint())
	must(t, c.Close())
	d = d.Clone()
	c = openCommitted(t, d, Options{MapCacheBytes: 1}) // each look-up reads
	must(t, c.hole(block.Span(3, 1)))
	must(t, c.hole(block.Span(far+3, 2)))
	must(t, c.commit())

	reads, reading, proceed, held := 0, make(chan struct{}), make(chan struct{}), 0
	var newest uint64
	hook := func(o disktest.Op) {
		if o.Kind != disktest.Read {
			return
		}
		if reads++; reads == 1 {
			close(reading)
			<-proceed
			return
		}
		c.segments.mu.RLock()
		defer c.segments.mu.RUnlock()
		if c.segments.oldestPinLocked() < newest {
			held++
		}
	}
	d.SetHook(hook)
	var st Stats
	stats := make(chan error, 1)
	go func() {
		var err error
		st, err = c.Stats()
		stats <- err
	}()
	<-reading
	d.SetHook(nil)
	within(t, "checkpoint", c.Checkpoint)
	c.mu.Lock()
	newest = c.Store.mu.sequence
	c.mu.Unlock()
	must(t, c.hole(block.Span(far+9, 4)))
	d.SetHook(hook)
	close(proceed)
	within(t, "stats", func() error { return <-stats })
	if held > 0 {
		t.Error("an old checkpoint is held beyond one look-up")
	}
	if st.DataBytes != (64-1-2-4)*block.Size || st.Checkpoint != newest {
		t.Errorf("%d bytes of data at checkpoint %d, want %d at %d", st.DataBytes, st.Checkpoint, (64-1-2-4)*block.Size, newest)
	}
	must(t, c.Close())
}
