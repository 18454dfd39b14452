package store

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A resizeMark says that the store was given a geometry between two operations of
// the disk.
type resizeMark struct {
	begun, done int64
	geo         Geometry
}

// allowed tells whether a power cut at operation k may leave a store of that
// geometry.
func (r *crashRun) allowed(g Geometry, k int64) error {
	first := 0
	for i, m := range r.resizes {
		if m.done <= k {
			first = i
		}
	}
	if len(r.resizes) == 0 {
		return nil
	}
	for _, m := range r.resizes[first:] {
		if m.begun <= k && m.geo.DeviceSize == g.DeviceSize && m.geo.Capacity == g.Capacity {
			return nil
		}
	}
	return fmt.Errorf("a device of %d bytes, in %d bytes", g.DeviceSize, g.Capacity)
}

const (
	resizeBlocksMax   = 160
	resizeSegmentsMax = 56
)

// resize gives the store a random geometry. The tail of a device that shrinks is
// dropped before.
func (r *crashRun) resize() error {
	next := r.geo
	blocks := 40 + r.rng.IntN(resizeBlocksMax-40)
	next.DeviceSize = uint64(blocks) * block.Size
	switch r.rng.IntN(3) {
	case 0:
		next.Capacity = uint64(24+r.rng.IntN(resizeSegmentsMax-24)) * SegmentSizeMin
	case 1:
		next.Capacity = max(next.Capacity, uint64(r.rng.IntN(resizeSegmentsMax))*SegmentSizeMin)
	}
	if err := r.store.CanResize(next.DeviceSize, next.Capacity); errors.Is(err, ErrInUse) || errors.Is(err, ErrNoSpace) {
		next.Capacity = r.geo.Capacity
	}
	if n := next.Blocks(); n < r.geo.Blocks() {
		tail := block.Range{Start: block.Index(n), End: block.Index(r.geo.Blocks())}
		r.model.Zero(int64(tail.Start.Bytes()), int64(tail.Len().Bytes()))
		if err := r.store.AppendHole(tail); err != nil {
			return err
		}
	}
	mark := resizeMark{begun: r.disk.Ops(), geo: next}
	if err := r.committing(func() error { return r.store.Resize(next.DeviceSize, next.Capacity) }); err != nil {
		return err
	}
	mark.done = r.disk.Ops()
	r.resizes = append(r.resizes, mark)
	r.geo = next
	return nil
}

// resizeHistory runs history h of seed, in which the store grows and shrinks, and the
// power cuts in it.
func (r *crashRun) resizeHistory(seed uint64, h int) error {
	r.begin(seed, h)
	r.opts.CheckpointBytes = 512 << 10
	r.model = disktest.NewModel(resizeBlocksMax * block.Size)
	r.model.Commit()
	if err := Format(r.disk, r.geo); err != nil {
		return err
	}
	r.resizes = []resizeMark{{geo: r.geo}}
	r.disk.Record()
	from := r.disk.Ops()
	s, err := Open(r.disk, r.opts)
	if err != nil {
		return err
	}
	r.store = s
	for i := range 4 {
		for range 12 {
			if err == nil {
				err = r.step()
			}
		}
		if err == nil {
			if err = r.resize(); err != nil {
				err = fmt.Errorf("resize %d: %w", i, err)
			}
		}
	}
	for range 8 {
		if err == nil {
			err = r.step()
		}
	}
	if err == nil {
		err = r.commit()
	}
	r.checkpoints = int(s.metrics.checkpoints.Load())
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	return r.cuts(seed, from, r.resizeCut)
}

// resizeCut verifies what a cut has left, also with its newest superblock rotten, and
// goes on with it at the end of the device, and then the newest superblock rots.
func (r *crashRun) resizeCut(d *disktest.Disk, k int64) error {
	rotten := d.Clone()
	if newest, other, err := readSuperblocks(rotten, func(string, error) {}); err != nil {
		return err
	} else if other != nil {
		rotten.Corrupt(int64(newest.sequence%2)*superblockStride, superblockSize)
		s, _, err := r.verify(rotten, k)
		if err != nil {
			return fmt.Errorf("with a rotten superblock: %w", err)
		}
		if err := s.Close(); err != nil {
			return err
		}
	}
	s, _, err := r.verify(d, k)
	if err != nil {
		return err
	}
	g := s.Geometry()
	page := bytes.Repeat([]byte{0xa5}, block.Size)
	last := block.Index(g.Blocks() - 1)
	err = s.AppendData(extents.Blob{Start: last, Count: 1, Present: 1, Parts: [][]byte{page}})
	if err == nil {
		var c Commit
		if c, _, err = s.AppendCommit(); err == nil {
			err = s.Sync(c)
		}
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	d = d.Crash(disktest.LoseAll)
	newest, other, err := readSuperblocks(d, func(string, error) {})
	if err != nil || other == nil {
		return err // or the cut has torn one
	}
	rep, err := Check(d.Clone(), CheckOptions{Data: true})
	if err != nil {
		return err
	}
	if !rep.Clean {
		return fmt.Errorf("check: %v", rep.Problems)
	}
	d.Corrupt(int64(newest.sequence%2)*superblockStride, superblockSize)
	if s, err = Open(d, r.opts); err != nil {
		return fmt.Errorf("checkpoint %d has rotted: %w", newest.sequence, err)
	}
	defer s.Close()
	got := make([]byte, block.Size)
	if _, err := (contents{s}).ReadAt(got, int64(last.Bytes())); err != nil {
		return err
	}
	if !bytes.Equal(got, page) || s.Geometry() != g {
		return fmt.Errorf("checkpoint %d has rotted: the geometry is %+v, was %+v; the last block is right: %v", newest.sequence, s.Geometry(), g, bytes.Equal(got, page))
	}
	return nil
}

// TestPowerCutDuringResize: a device that grows and shrinks has its old size or the
// new one after a power cut at any operation, the new one once that was answered,
// and in either case one commit's contents, with nothing beyond an end coming back.
func TestPowerCutDuringResize(t *testing.T) {
	seed := disktest.Seed(t)
	histories := 4 * disktest.Scale(t)
	var points, grown, shrunk int
	for h := range histories {
		r := &crashRun{}
		if err := r.resizeHistory(seed, h); err != nil {
			t.Fatalf("history %d of seed %d: %v", h, seed, err)
		}
		points += r.points
		for i, m := range r.resizes[1:] {
			if was := r.resizes[i].geo; m.geo.DeviceSize > was.DeviceSize {
				grown++
			} else if m.geo.DeviceSize < was.DeviceSize {
				shrunk++
			}
		}
	}
	t.Logf("seed %d: %d histories, %d cuts, grown %d times, shrunk %d times", seed, histories, points, grown, shrunk)
	if grown == 0 || shrunk == 0 {
		t.Error("no history has grown and shrunk")
	}
}

// TestResizeRefused: what cannot be is refused, and nothing has changed.
func TestResizeRefused(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 60)))
	c := openCommitted(t, d, Options{})
	for start := 0; start < 1024; start += 16 {
		must(t, c.blob(start, 16, 0xffff))
	}
	must(t, c.commit())
	was := c.Geometry()
	last, _ := c.segments.last()
	for _, x := range []struct {
		what            string
		bytes, capacity uint64
		want            error // nil: any other
	}{
		{"no size", 0, was.Capacity, nil},
		{"a part of a sector", 1000, was.Capacity, nil},
		{"no capacity", was.DeviceSize, 0, nil},
		{"more segments than a table may have", was.DeviceSize, 1 << 40, nil},
		{"a tail in use", was.DeviceSize / 2, was.Capacity, ErrInUse},
		{"a segment in use", was.DeviceSize, uint64(last) * SegmentSizeMin, ErrInUse},
		{"no room to work in", was.DeviceSize, uint64(last+1) * SegmentSizeMin, ErrNoSpace},
	} {
		err := c.Resize(x.bytes, x.capacity)
		if err == nil || x.want != nil && !errors.Is(err, x.want) || x.want == nil && (errors.Is(err, ErrInUse) || errors.Is(err, ErrNoSpace)) {
			t.Errorf("%s: %v", x.what, err)
		}
		if c.Geometry() != was || c.Err() != nil {
			t.Fatalf("%s: now %+v, %v", x.what, c.Geometry(), c.Err())
		}
	}
	must(t, c.Close())
}
