package store

import (
	"errors"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// scrubbed waits for the end of the scrub that runs.
func scrubbed(s *Store) *ScrubReport {
	s.scrub.done.Wait()
	return s.Scrub()
}

// TestScrub: a scrub reads everything once, and finds what is damaged, unless it
// has been overwritten.
func TestScrub(t *testing.T) {
	ds := newDamageStore(t, true)
	f := ds.disk.Clone()
	c := openCommitted(t, f, Options{})
	defer c.Close()
	if c.Scrub() != nil {
		t.Error("a report before the first scrub")
	}
	must(t, c.StartScrub(0))
	r := scrubbed(c.Store)
	if !r.Clean() || r.Running || r.Stopped || r.Error != "" {
		t.Fatalf("of a store that is whole: %+v", r)
	}
	var nodes uint64
	blobs := make(map[extents.Addr]bool)
	must(t, c.tree.Walk(c.Store.mu.root, func(n extents.WalkNode) error {
		nodes += uint64(n.Copies)
		return nil
	}, func(e extents.Extent) error {
		blobs[e.Addr] = e.Kind == extents.Data
		return nil
	}))
	if r.Nodes != nodes || r.Blobs != uint64(len(blobs)) || r.Done != c.Store.mu.root.Entries {
		t.Errorf("%d nodes, %d blobs and %d extents verified, there are %d, %d and %d", r.Nodes, r.Blobs, r.Done, nodes, len(blobs), c.Store.mu.root.Entries)
	}
	// One blob that counts, one that has been overwritten, and a leaf.
	var leaf extents.WalkNode
	must(t, c.tree.Walk(c.Store.mu.root, func(n extents.WalkNode) error {
		if n.Level == 0 {
			leaf = n // the last
		}
		return nil
	}, func(extents.Extent) error { return nil }))
	damage := func(b block.Index) {
		list, err := c.Lookup(block.Span(b, 1), nil)
		must(t, err)
		f.Corrupt(c.segments.base(list[0].Addr.Segment)+int64(list[0].Addr.Offset), 1)
	}
	damage(0)
	damage(300)
	must(t, c.hole(block.Span(300, 1)))
	must(t, c.commit())
	f.Corrupt(c.segments.base(leaf.Places[0].Segment)+int64(leaf.Places[0].Offset), 1)
	must(t, c.StartScrub(0))
	r = scrubbed(c.Store)
	if len(r.Lost) != 2 || r.Lost[0] != block.Span(0, 1) || r.Lost[1] != leaf.Keys || len(r.Problems) != 2 {
		t.Errorf("found %+v, want block 0 and %v", r, leaf.Keys)
	}
}

// TestScrubRate: a scrub keeps to its rate, is alone, and ends when it is told to,
// and with the store.
func TestScrubRate(t *testing.T) {
	ds := newDamageStore(t, true)
	c := openCommitted(t, ds.disk.Clone(), Options{})
	must(t, c.StartScrub(1000)) // a minute or so
	if err := c.StartScrub(0); !errors.Is(err, ErrScrubbing) {
		t.Errorf("a second scrub: %v", err)
	}
	within(t, "stop", func() error { c.StopScrub(); return nil })
	if r := c.Scrub(); !r.Stopped || r.Running || r.Ended.IsZero() {
		t.Errorf("stopped: %+v", r)
	}
	must(t, c.StartScrub(200<<10))
	began := time.Now()
	r := scrubbed(c.Store)
	if least := time.Duration(float64(r.Bytes-16<<10) / (200 << 10) * float64(time.Second)); time.Since(began) < least || !r.Clean() {
		t.Errorf("%d bytes in %v, want at least %v; %+v", r.Bytes, time.Since(began), least, r)
	}
	must(t, c.StartScrub(1000))
	within(t, "close", c.Close)
}

// TestScrubBesideWriters: a scrub of a store in use, whose segments are used again
// and again meanwhile, finds no damage where there is none.
func TestScrubBesideWriters(t *testing.T) {
	seed := disktest.Seed(t)
	r := &crashRun{}
	r.begin(seed, 0)
	r.opts.CheckpointBytes = SegmentSizeMin * 5 / 4
	r.geo = testGeometry(96, 400) // for step reserves nothing
	must(t, Format(r.disk, r.geo))
	s, err := Open(r.disk, r.opts)
	must(t, err)
	defer s.Close()
	r.store = s
	scrubs := 0
	for range 1500 * disktest.Scale(t) {
		must(t, r.step())
		if rep := s.Scrub(); rep == nil || !rep.Running {
			if rep != nil {
				if scrubs++; !rep.Clean() || rep.Error != "" {
					t.Fatalf("scrub %d: %+v", scrubs, rep)
				}
			}
			must(t, s.StartScrub(0))
		}
	}
	if scrubs == 0 {
		t.Error("no scrub has ended")
	}
	t.Logf("%d scrubs", scrubs)
}
