package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/disktest"
)

// A crashRun is a store on a recording disk, driven by one goroutine with raw
// blobs and holes, beside a model. Commits are marked with the operation number
// of the disk at which they were known to be durable.
type crashRun struct {
	rng     *rand.Rand
	disk    *disktest.Disk
	store   *Store
	model   *disktest.Model
	durable []durableMark
	geo     Geometry
	resizes []resizeMark
	opts    Options

	points, checkpoints int // power cuts, and checkpoints of the history
	moved               int // bytes that the cleaner has moved
}

// A durableMark says that from operation op on, commit point point is durable.
type durableMark struct {
	op    int64
	point int
}

func testGeometry(blocks int, segments int) Geometry {
	return Geometry{DeviceSize: uint64(blocks) * block.Size, Capacity: uint64(segments) * SegmentSizeMin,
		SegmentSize: SegmentSizeMin, ExtentBlocks: 16}
}

func testOptions() Options {
	return Options{CheckpointBytes: 96 << 10, MapCacheBytes: 64 << 10, TrimLeaves: 2, ZeroCommits: 2}
}

// commit closes the epoch and makes it durable.
func (r *crashRun) commit() error {
	c, ok, err := r.store.AppendCommit()
	if err != nil || !ok {
		return err
	}
	point := r.model.Commit()
	if err := r.store.Sync(c); err != nil {
		return err
	}
	r.durable = append(r.durable, durableMark{r.disk.Ops(), point})
	return nil
}

// step does one random thing.
func (r *crashRun) step() error {
	size := block.Count(r.geo.Blocks())
	switch k := r.rng.IntN(20); {
	case k < 13:
		n := 1 + r.rng.IntN(16)
		start := r.rng.IntN(int(size) - n + 1)
		present := r.rng.Uint32() | r.rng.Uint32()
		present &= 1<<n - 1
		if present == 0 {
			present = 1
		}
		b := extents.Blob{Start: block.Index(start), Count: uint8(n), Present: present}
		for i := range n {
			page := make([]byte, block.Size)
			if present>>i&1 != 0 {
				for j := 0; j < len(page); j += 8 {
					page[j] = byte(r.rng.Uint32())
					page[j+1] = byte(start + i)
					page[j+2] = 1
				}
				b.Parts = append(b.Parts, page)
			}
			r.model.Write(page, int64(start+i)*block.Size)
		}
		return r.store.AppendData(b)
	case k < 15:
		n := 1 + r.rng.IntN(int(size)/2)
		start := r.rng.IntN(int(size) - n + 1)
		r.model.Zero(int64(start)*block.Size, int64(n)*block.Size)
		return r.store.AppendHole(block.Span(block.Index(start), block.Count(n)))
	case k < 16:
		r.store.Kick()
		return r.store.Err()
	case k < 17:
		// Nothing is appended meanwhile: the histories of package device have that.
		r.store.cleaner.turn <- struct{}{}
		defer func() { <-r.store.cleaner.turn }()
		_, err := r.store.cleaner.clean(r.rng.IntN(2) == 0)
		return err
	default:
		return r.commit()
	}
}

// contents reads the device through the store, one lookup for each window.
type contents struct{ s *Store }

func (c contents) ReadAt(p []byte, off int64) (int, error) {
	v := c.s.View()
	defer c.s.Unview(v)
	r := block.Covering(uint64(off), uint64(len(p)))
	ext, err := c.s.Lookup(r, nil)
	if err != nil {
		return 0, err
	}
	var all []byte
	pos := r.Start
	for _, e := range ext {
		if e.Start != pos {
			return 0, fmt.Errorf("lookup of %v: gap before %v", r, e.Range())
		}
		pos = e.Range().End
		switch e.Kind {
		case extents.Hole:
			all = append(all, make([]byte, e.Count.Bytes())...)
		case extents.Data:
			blob := make([]byte, e.Addr.Length)
			if err := c.s.ReadBlob(blob, e.Addr); err != nil {
				return 0, err
			}
			all = append(all, blob[int(e.Skip)*block.Size:][:e.Count.Bytes()]...)
		default:
			return 0, fmt.Errorf("%v is lost", e.Range())
		}
	}
	if pos != r.End {
		return 0, fmt.Errorf("lookup of %v ends at %d", r, pos)
	}
	return copy(p, all[uint64(off)-r.Start.Bytes():]), nil
}

var _ io.ReaderAt = contents{}

// verify opens what a power cut has left and finds the commit point that it
// holds, which must not be older than what was durable before operation k.
func (r *crashRun) verify(d disk.File, k int64) (*Store, int, error) {
	s, err := Open(d, r.opts)
	if err != nil {
		return nil, 0, fmt.Errorf("open: %w", err)
	}
	oldest := 0
	for _, m := range r.durable {
		if m.op <= k {
			oldest = m.point
		}
	}
	all := make([]byte, r.model.Size()) // beyond the end: zeros
	if _, err := (contents{s}).ReadAt(all[:s.Geometry().DeviceSize], 0); err != nil {
		s.Close()
		return nil, 0, err
	}
	if err := r.allowed(s.Geometry(), k); err != nil {
		s.Close()
		return nil, 0, err
	}
	point, err := r.model.Find(bytes.NewReader(all), oldest)
	if err != nil {
		s.Close()
		return nil, 0, err
	}
	return s, point, nil
}

// TestPowerCutAtEveryOperation runs random histories once, and then, for each
// operation of the disk, opens what a power cut during it would have left, for
// several ways of losing unsynced writes. The store must hold exactly one commit
// point, not older than the last one synced. Then the power goes again, at a
// random operation of that recovery and of the commits after it.
func TestPowerCutAtEveryOperation(t *testing.T) {
	seed := disktest.Seed(t)
	histories := 6 * disktest.Scale(t)
	var points, checkpoints, moved int
	for h := range histories {
		r := &crashRun{}
		if err := r.history(seed, h); err != nil {
			t.Fatalf("history %d of seed %d: %v", h, seed, err)
		}
		points += r.points
		checkpoints += r.checkpoints
		moved += r.moved
	}
	t.Logf("seed %d: %d histories, %d cuts, %d checkpoints, %d bytes moved", seed, histories, points, checkpoints, moved)
	if checkpoints == 0 || histories > 50 && moved == 0 {
		t.Error("no history reached a checkpoint, or in none anything was moved")
	}
}

// history runs history h of seed, and the power cuts in it.
func (r *crashRun) history(seed uint64, h int) error {
	r.begin(seed, h)
	if err := Format(r.disk, r.geo); err != nil {
		return err
	}
	r.disk.Record()
	from := r.disk.Ops()
	s, err := Open(r.disk, r.opts)
	if err != nil {
		return err
	}
	r.store = s
	for i := range 120 {
		if err := r.step(); err != nil {
			return errors.Join(fmt.Errorf("step %d: %w", i, err), s.Close())
		}
	}
	if err := r.commit(); err != nil { // reads are of what has been written
		return err
	}
	err = r.model.Check(contents{s})
	if err != nil {
		err = fmt.Errorf("before any cut: %w", err)
	}
	r.checkpoints, r.moved = int(s.metrics.checkpoints.Load()), int(s.metrics.movedBytes.Load())
	s.Close()
	if err != nil {
		return err
	}
	return r.cuts(seed, from, r.cutAgain)
}

// cuts has the power go at each operation of the disk from from on, and then do what
// is to be done with what that has left.
func (r *crashRun) cuts(seed uint64, from int64, then func(d *disktest.Disk, k int64) error) error {
	for k := from; k <= r.disk.Ops(); k++ {
		for _, loss := range []disktest.Loss{disktest.LoseAll, disktest.KeepAll, disktest.Random(seed ^ uint64(k))} {
			r.points++
			if err := then(r.disk.At(k, loss), k); err != nil {
				return fmt.Errorf("power cut at operation %d, %v: %w", k, loss, err)
			}
		}
	}
	return nil
}

// begin makes the disk and the model of history h of seed.
func (r *crashRun) begin(seed uint64, h int) {
	r.rng, r.geo, r.opts = rand.New(rand.NewPCG(seed, uint64(h))), testGeometry(96, 40), testOptions()
	r.disk = disktest.New(seed+uint64(h), disktest.Options{SectorSize: []int{512, 4096}[h%2]})
	r.model = disktest.NewModel(int64(r.geo.DeviceSize))
	r.model.Commit()
}

// cutAgain verifies what a cut has left, with the power going again at a random
// operation while it is opened and used.
func (r *crashRun) cutAgain(d *disktest.Disk, k int64) error {
	again := d.Clone()
	s, first, err := r.verify(d, k)
	if err != nil {
		return err
	}
	ops := d.Ops()
	s.Close()

	again.CutAt(int64(r.rng.IntN(int(ops) + 1)))
	s, _, err = r.verify(again, k)
	if err == nil {
		s.Close()
	} else if !errors.Is(err, disktest.ErrPowerCut) {
		return fmt.Errorf("opened again until a cut: %w", err)
	}
	s, second, err := r.verify(again.Crash(disktest.Random(uint64(k))), k)
	if err != nil {
		return fmt.Errorf("after a cut during recovery: %w", err)
	}
	defer s.Close()
	// What the first opening showed was on the medium: the second must show it too.
	if second != first {
		return fmt.Errorf("recovered to commit point %d, and after a cut during recovery to %d", first, second)
	}
	// And it goes on from there.
	if err := s.AppendHole(block.Span(0, 1)); err != nil {
		return err
	}
	c, _, err := s.AppendCommit()
	if err != nil {
		return err
	}
	return s.Sync(c)
}

// TestRottenSuperblock: after any commit, and whatever has been used again since,
// the newest superblock can rot: the checkpoint before it and the log behind that
// are whole, and lead to the same state (rule R4).
func TestRottenSuperblock(t *testing.T) {
	seed := disktest.Seed(t)
	for h := range 3 * disktest.Scale(t) {
		if err := rottenHistory(seed, h); err != nil {
			t.Fatalf("history %d of seed %d: %v", h, seed, err)
		}
	}
}

func rottenHistory(seed uint64, h int) error {
	r := &crashRun{}
	r.begin(seed, h)
	// More than a segment from one checkpoint to the next, so that what is free is
	// used again at once.
	r.opts.CheckpointBytes = SegmentSizeMin * 5 / 4
	if err := Format(r.disk, r.geo); err != nil {
		return err
	}
	s, err := Open(r.disk, r.opts)
	if err != nil {
		return err
	}
	defer s.Close()
	r.store = s
	for i := range 600 {
		commits := len(r.durable)
		if err := r.step(); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
		if len(r.durable) == commits {
			continue
		}
		d := r.disk.Crash(disktest.LoseAll)
		sb, other, err := readSuperblocks(d, s.opts.Warn)
		if err != nil {
			return err
		}
		if other == nil { // one is being written
			continue
		}
		d.Corrupt(int64(sb.sequence%2)*superblockStride, superblockSize)
		o, _, err := r.verify(d, r.disk.Ops())
		if err != nil {
			return fmt.Errorf("step %d, checkpoint %d has rotted: %w", i, sb.sequence, err)
		}
		if err := o.Close(); err != nil {
			return err
		}
	}
	return nil
}

// TestReopen alternates histories and openings, clean and not.
func TestReopen(t *testing.T) {
	seed := disktest.Seed(t)
	r := &crashRun{rng: rand.New(rand.NewPCG(seed, 1)), geo: testGeometry(200, 64)}
	r.disk = disktest.New(seed, disktest.Options{})
	if err := Format(r.disk, r.geo); err != nil {
		t.Fatal(err)
	}
	r.model = disktest.NewModel(int64(r.geo.DeviceSize))
	r.model.Commit()
	for i := range 60 * disktest.Scale(t) {
		s, err := Open(r.disk, testOptions())
		if err != nil {
			t.Fatalf("seed %d: opening %d: %v", seed, i, err)
		}
		r.store = s
		if err := r.model.Check(contents{s}); err != nil {
			t.Fatalf("seed %d: after opening %d: %v", seed, i, err)
		}
		for range r.rng.IntN(80) {
			if err := r.step(); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if r.rng.IntN(2) == 0 {
			if err := r.checkpoint(); err != nil {
				t.Fatalf("seed %d: checkpoint: %v", seed, err)
			}
			if err := s.TrimHost(); err != nil {
				t.Fatal(err)
			}
		} else if err := r.commit(); err != nil {
			t.Fatal(err)
		}
		s.Close()
		r.disk = r.disk.Crash(disktest.LoseAll)
	}
}

// checkpoint takes one with the commits that it needs.
func (r *crashRun) checkpoint() error { return r.committing(r.store.Checkpoint) }

// committing runs fn, and commits whenever the store asks for it.
func (r *crashRun) committing(fn func() error) error {
	want := make(chan struct{}, 1)
	r.store.progress.Lock() // a checkpoint may be running
	r.store.opts.NeedCommit = func() {
		select {
		case want <- struct{}{}:
		default:
		}
	}
	r.store.progress.Unlock()
	done := make(chan error, 1)
	go func() { done <- fn() }()
	for {
		select {
		case err := <-done:
			return err
		case <-want:
			if err := r.commit(); err != nil {
				return err
			}
		}
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	h := header{kind: recordData, codec: 2, level: 3, epoch: 9, durable: 8, start: 77, count: 5, present: 0b10101, length: 100, checksum: 1, offset: 8192}
	var b [recordHeader]byte
	sum := h.encode(b[:], 42)
	got, gotSum, err := decodeHeader(b[:], 42, 8192)
	if err != nil || got != h || gotSum != sum {
		t.Fatalf("got %+v, %v", got, err)
	}
	for i := range b {
		c := bytes.Clone(b[:])
		c[i] ^= 4
		if _, _, err := decodeHeader(c, 42, 8192); !errors.Is(err, ErrCorrupt) {
			t.Errorf("byte %d changed: %v", i, err)
		}
	}
	if _, _, err := decodeHeader(b[:], 43, 8192); err == nil {
		t.Error("accepted with the seed of another segment")
	}
}

// TestTally: the running checksum is that of the checksums, one behind the other.
func TestTally(t *testing.T) {
	var got tally
	var sums []byte
	for i := range uint32(100) {
		sum := i * 2654435761
		got.add(sum, i)
		sums = binary.LittleEndian.AppendUint32(sums, sum)
		if want := (tally{uint64(i) + 1, uint64(i+1)*recordHeader + uint64(i*(i+1)/2), crc32.Checksum(sums, castagnoli)}); got != want {
			t.Fatalf("after %d records: %+v, want %+v", i+1, got, want)
		}
	}
}
