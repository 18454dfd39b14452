package store

import (
	"errors"
	"syscall"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// leafStore is a store whose map has many leaves, and the leaves.
func leafStore(t *testing.T) (d *disktest.Disk, leaves []extents.WalkNode) {
	t.Helper()
	d = disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1<<14, 64)))
	c := openCommitted(t, d, Options{CheckpointBytes: 1 << 30})
	for b := range 4000 {
		must(t, c.AppendData(extents.Blob{Start: block.Index(b * 4), Count: 1, Present: 1, Codec: 1, Parts: [][]byte{{byte(b), byte(b >> 8), 1}}}))
	}
	must(t, c.Checkpoint())
	must(t, c.tree.Walk(c.Store.mu.root, func(n extents.WalkNode) error {
		if n.Level == 0 {
			leaves = append(leaves, n)
		}
		return nil
	}, func(extents.Extent) error { return nil }))
	must(t, c.Close())
	if len(leaves) < 3 {
		t.Fatalf("%d leaves", len(leaves))
	}
	return d.Crash(disktest.LoseAll), leaves
}

// TestUnreadableLeaf: a leaf of the map in a bad sector costs the blocks that it
// answers for, and not the device: checkpoints go on, and writing heals (rule R9).
// A read that fails once costs nothing.
func TestUnreadableLeaf(t *testing.T) {
	d, leaves := leafStore(t)
	bad := leaves[1]
	for _, transient := range []bool{true, false} {
		c := openCommitted(t, d.Clone(), Options{})
		f := c.file.(*disktest.Disk)
		fault := disktest.Fault{Kinds: disktest.Read, Off: c.segments.base(bad.Places[0].Segment) + int64(bad.Places[0].Offset), Len: int64(bad.Length)}
		if transient {
			fault.Times = 2
		}
		f.Inject(fault)
		must(t, c.hole(block.Span(bad.Keys.Start, 1)))
		within(t, "checkpoint", c.Checkpoint)
		rest := block.Range{Start: bad.Keys.Start + 1, End: bad.Keys.End}
		list, err := c.Lookup(block.Range{Start: 0, End: bad.Keys.End + 4}, nil)
		must(t, err)
		for _, e := range list {
			lost := !transient && e.Range().Overlaps(rest)
			if (e.Kind == extents.Lost) != lost {
				t.Errorf("transient %v: %v of kind %v", transient, e.Range(), e.Kind)
			}
		}
		if transient {
			must(t, c.Close())
			continue
		}
		// What is written is there again, also after the next start.
		must(t, c.hole(rest))
		within(t, "checkpoint", c.Checkpoint)
		must(t, c.Close())
		c = openCommitted(t, f.Crash(disktest.LoseAll), Options{})
		list, err = c.Lookup(bad.Keys, nil)
		must(t, err)
		if len(list) != 1 || list[0].Kind != extents.Hole {
			t.Errorf("written again, the map has %v", list)
		}
		must(t, c.Close())
	}
}

// TestUnreadableLeafIsNotForgotten: what only cannot be read now is not given up
// by reading it.
func TestUnreadableLeafIsNotForgotten(t *testing.T) {
	d, leaves := leafStore(t)
	bad := leaves[1]
	c := openCommitted(t, d, Options{})
	d.FailReads(c.segments.base(bad.Places[0].Segment)+int64(bad.Places[0].Offset), 1)
	list, err := c.Lookup(bad.Keys, nil)
	if err != nil || len(list) != 1 || list[0].Kind != extents.Lost {
		t.Errorf("unreadable, the map has %v, %v", list, err)
	}
	d.ClearFaults()
	if list, err = c.Lookup(bad.Keys, nil); err != nil || len(list) < 2 {
		t.Errorf("readable again, the map has %v, %v", list, err)
	}
	must(t, c.Close())
}

// TestFailingDiskKeepsTheMap: where more of the map cannot be read than a bad place
// explains, or the disk has gone, nothing is given up: the store fails.
func TestFailingDiskKeepsTheMap(t *testing.T) {
	d, leaves := leafStore(t)
	c := openCommitted(t, d.Clone(), Options{})
	f := c.file.(*disktest.Disk)
	f.Inject(disktest.Fault{Kinds: disktest.Read, Err: syscall.ENXIO})
	must(t, c.hole(block.Span(leaves[1].Keys.Start, 1)))
	if err := c.Checkpoint(); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("checkpoint on a disk that has gone: %v", err)
	}
	must(t, c.Close())
	c = openCommitted(t, f.Crash(disktest.LoseAll), Options{})
	list, err := c.Lookup(leaves[1].Keys, nil)
	must(t, err)
	for _, e := range list {
		if e.Kind == extents.Lost {
			t.Errorf("%v is lost", e.Range())
		}
	}
	must(t, c.Close())
}
