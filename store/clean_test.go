package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// overtaken has blocks overwritten in the middle of their being moved, at each
// operation of the disk where that can be, and compares what the map leads to, at
// once and after a restart, with the truth (rule R7).
func overtaken(seed uint64) error {
	for at := 1; ; at++ {
		reached, err := overtakenAt(seed, at)
		if err != nil {
			return fmt.Errorf("overwritten at operation %d of the cleaning: %w", at, err)
		}
		if !reached {
			if at < 4 {
				return fmt.Errorf("cleaning had only %d operations", at-1)
			}
			return nil
		}
	}
}

func overtakenAt(seed uint64, at int) (reached bool, err error) {
	d := disktest.New(seed, disktest.Options{})
	if err := Format(d, testGeometry(512, 60)); err != nil {
		return false, err
	}
	want := make(chan struct{}, 1)
	s, err := Open(d, Options{NeedCommit: func() {
		select {
		case want <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	truth := make([]byte, 512*block.Size)
	rng := rand.New(rand.NewPCG(seed, 0))
	write := func(start, n int) error {
		p := truth[start*block.Size : (start+n)*block.Size]
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return s.AppendData(extents.Blob{Start: block.Index(start), Count: uint8(n), Present: ^uint32(0) >> (32 - n), Parts: [][]byte{bytes.Clone(p)}})
	}
	commit := func() error {
		c, ok, err := s.AppendCommit()
		if err != nil || !ok {
			return err
		}
		return s.Sync(c)
	}
	checkpoint := func() error {
		done := make(chan error, 1)
		go func() { done <- s.Checkpoint() }()
		for {
			select {
			case err := <-done:
				return err
			case <-want:
				if err := commit(); err != nil {
					return err
				}
			}
		}
	}
	for start := 0; start < 512; start += 8 {
		err = errors.Join(err, write(start, 8))
	}
	for start := 0; start < 512; start += 32 { // a quarter of each segment dies
		err = errors.Join(err, write(start, 8))
	}
	if err = errors.Join(err, commit(), checkpoint()); err != nil {
		return false, err
	}
	var ops atomic.Int64 // of the cleaner, and of the log's writer beside it
	d.SetHook(func(disktest.Op) {
		if ops.Add(1) == int64(at) {
			reached = true
			for start := 0; start < 512; start += 16 {
				err = errors.Join(err, write(start+3, 1), write(start+8, 2))
			}
		}
	})
	s.cleaner.turn <- struct{}{}
	progress, cleanErr := s.cleaner.clean(false)
	<-s.cleaner.turn
	d.SetHook(nil)
	if !progress {
		err = errors.Join(err, errors.New("nothing was cleaned"))
	}
	if err = errors.Join(err, cleanErr, commit()); err != nil {
		return reached, err
	}
	check := func(s *Store) error {
		got := make([]byte, len(truth))
		if _, err := (contents{s}).ReadAt(got, 0); err != nil {
			return err
		}
		for b := range 512 {
			if !bytes.Equal(got[b*block.Size:][:block.Size], truth[b*block.Size:][:block.Size]) {
				return fmt.Errorf("block %d is wrong", b)
			}
		}
		return nil
	}
	if err := check(s); err != nil {
		return reached, err
	}
	again, err := Open(d.Crash(disktest.LoseAll), Options{})
	if err != nil {
		return reached, err
	}
	if err := errors.Join(check(again), again.Close()); err != nil {
		return reached, fmt.Errorf("after a restart: %w", err)
	}
	// And when what was replayed is in the tree.
	if err := checkpoint(); err != nil {
		return reached, err
	}
	return reached, check(s)
}

// TestOvertakenByWrites: the cleaner does not bring back what was overwritten while
// it was at it.
func TestOvertakenByWrites(t *testing.T) {
	if err := overtaken(disktest.Seed(t)); err != nil {
		t.Fatal(err)
	}
}

// TestCleanDamaged: of a segment with a damaged blob the rest is moved, and the
// blob stays where it is, to be read by whoever can.
func TestCleanDamaged(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(512, 60)))
	warned := 0
	c := openCommitted(t, d, Options{Warn: func(string, error) { warned++ }})
	for start := 0; start < 128; start += 8 {
		must(t, c.blob(start, 8, 0xff))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	list, err := c.Lookup(block.Span(0, 128), nil)
	must(t, err)
	bad := list[2].Addr // not of the first blob
	d.Corrupt(c.segments.base(bad.Segment)+int64(bad.Offset)+100, 1)
	for start := 32; start < 48; start += 8 {
		must(t, c.hole(block.Span(block.Index(start), 8)))
	}
	must(t, c.commit())
	must(t, c.Compact(t.Context(), nil))
	after, err := c.Lookup(block.Span(0, 32), nil)
	must(t, err)
	stayed := 0
	for _, e := range after {
		switch {
		case e.Addr == bad:
			stayed++
		case e.Addr.Segment == bad.Segment:
			t.Errorf("%v is still in the segment", e.Range())
		default:
			must(t, c.ReadBlob(make([]byte, e.Addr.Length), e.Addr))
		}
	}
	if stayed != 1 || warned == 0 {
		t.Errorf("%d damaged blobs have stayed, %d warnings", stayed, warned)
	}
	must(t, c.Close())
}

// nodesAmongData is a store with a segment in which map nodes and data are alive
// beside much that is dead, and the place of a leaf in it.
func nodesAmongData(t *testing.T, o Options) (c *committed, d *disktest.Disk, leaf extents.Place) {
	const blocks = 8192
	d = disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 400)))
	c = openCommitted(t, d, o)
	for _, half := range []int{0, blocks / 2} {
		for start := half; start < half+blocks/2; start += 8 {
			must(t, c.blob(start, 8, 0x55))
		}
		must(t, c.commit())
		must(t, c.Checkpoint())
	}
	for start := blocks / 2; start < blocks; start += 32 {
		must(t, c.hole(block.Span(block.Index(start), 24)))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	must(t, c.Checkpoint())
	p, ok, err := c.tree.Locate(c.Store.mu.root, 0, 0)
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	return c, d, p.Places[0]
}

// TestIdleCleanerEnds: an idle store is cleaned, map nodes included, and then
// nothing more is done.
func TestIdleCleanerEnds(t *testing.T) {
	c, _, _ := nodesAmongData(t, Options{})
	c.StartCleaning(CleanerOptions{Period: time.Millisecond})
	deadline := time.Now().Add(30 * time.Second)
	quiet := 0
	for last := uint64(0); quiet < 200; quiet++ {
		dead, live := c.segments.garbage(1 << 60)
		n := c.metrics.cleaned.Load() + c.metrics.checkpoints.Load()
		if n != last || dead > live/16+5*SegmentSizeMin {
			last, quiet = n, 0
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d segments cleaned, %d bytes dead, %d alive, %d nodes to be moved", c.metrics.cleaned.Load(), dead, live, c.cleaner.nodes.Load())
		}
		time.Sleep(time.Millisecond) // polling: the cleaner tells nobody
	}
	must(t, c.Close())
}

// TestEvacuationOfUnreadableLeaf: a leaf that cannot be read when it is only to be
// moved stays where it is, and can be read when the medium gives it again.
func TestEvacuationOfUnreadableLeaf(t *testing.T) {
	c, d, leaf := nodesAmongData(t, Options{MapCacheBytes: 1})
	evacuated := false
	c.cleaner.turn <- struct{}{}
	for _, v := range c.segments.victims(c.Store.mu.replay, true, func(uint64, uint64) bool { return false }) {
		if v.number == leaf.Segment {
			_, err := c.cleaner.evacuate(v)
			must(t, err)
			evacuated = c.cleaner.nodes.Load() > 0
		}
	}
	<-c.cleaner.turn
	if !evacuated {
		t.Fatal("no node is to be moved")
	}
	d.Inject(disktest.Fault{Kinds: disktest.Read, Off: c.segments.base(leaf.Segment) + int64(leaf.Offset), Len: 1, Times: 1 << 20, Err: syscall.EIO})
	must(t, c.Checkpoint())
	d.ClearFaults()
	list, err := c.Lookup(block.Span(0, 8192), nil)
	must(t, err)
	for _, e := range list {
		if e.Kind == extents.Lost {
			t.Fatalf("%v is lost, which nobody has written to", e.Range())
		}
	}
	must(t, c.Close())
}

// TestCleanManyRecords: a segment of more records than are looked at in one go is
// cleaned to its end.
func TestCleanManyRecords(t *testing.T) {
	const blocks = 240000
	d := disktest.New(1, disktest.Options{})
	g := testGeometry(blocks, 0)
	g.SegmentSize = 16 << 20
	g.Capacity = 40 * uint64(g.SegmentSize)
	must(t, Format(d, g))
	c := openCommitted(t, d, Options{CheckpointRecords: 1 << 20})
	for b := range blocks {
		must(t, c.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Codec: 2, Level: 1, Parts: [][]byte{{byte(b), byte(b >> 8), byte(b >> 16)}}}))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	for b := 0; b < blocks; b += 4 {
		must(t, c.hole(block.Span(block.Index(b), 3)))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	first, err := c.Lookup(block.Span(3, 1), nil)
	must(t, err)
	must(t, c.Compact(t.Context(), nil))
	list, err := c.Lookup(block.Span(0, blocks), nil)
	must(t, err)
	for _, e := range list {
		if e.Kind == extents.Data && e.Addr.Segment == first[0].Addr.Segment {
			t.Fatalf("%v is still in segment %d", e.Range(), e.Addr.Segment)
		}
	}
	must(t, c.Close())
}

// TestRoomBehindReader: while a reader is at what would be free, a write waits for it
// and neither is refused nor uses the log up with checkpoints.
func TestRoomBehindReader(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(4096, 60)))
	c := openCommitted(t, d, Options{})
	for i := 0; c.Reserve(8, Growth) == nil; i++ {
		must(t, c.blob(i%128*8, 8, 0xff))
		c.Release(8)
	}
	v := c.View()
	before := c.metrics.checkpoints.Load()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	if err := c.MakeRoom(ctx, 8, Growth); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a reader: %v", err)
	}
	cancel()
	if n := c.metrics.checkpoints.Load() - before; n > 8 {
		t.Errorf("%d checkpoints while waiting for a reader", n)
	}
	done := make(chan error, 1)
	go func() { done <- c.MakeRoom(t.Context(), 8, Growth) }()
	c.Unview(v)
	within(t, "room", func() error { return <-done })
	must(t, c.Close())
}

// TestCheckpointCommits: who waits for a checkpoint that cannot begin, since the
// cleaner is in the middle of copying, has no commits made meanwhile: each takes of
// the log, which nobody has reserved.
func TestCheckpointCommits(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 400)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 32, ^uint32(0)))
	must(t, c.commit())
	must(t, c.Checkpoint())
	list, err := c.Lookup(block.Span(0, 32), nil)
	must(t, err)
	stored := make([]byte, list[0].Addr.Length)
	must(t, c.ReadBlob(stored, list[0].Addr))
	c.cleaner.turn <- struct{}{}
	must(t, c.cleaner.copy(list[0].Range(), 0, 0, stored, c.Store.mu.sequence))
	done := make(chan error, 1)
	go func() { done <- c.Checkpoint() }()
	for !c.snapshot.Load() {
	}
	before := c.metrics.commits.Load()
	const commits = 50
	for i := range commits {
		must(t, c.hole(block.Span(block.Index(64+i), 1)))
		must(t, c.commit())
		time.Sleep(100 * time.Microsecond) // in which others would make many
	}
	if n := c.metrics.commits.Load() - before; n > commits+2 {
		t.Errorf("%d commits beside those of others", n-commits)
	}
	_, err = c.cleaner.enter(c.Store.mu.sequence)
	must(t, err)
	<-c.cleaner.turn
	within(t, "checkpoint", func() error { return <-done })
	must(t, c.Close())
}

// TestCheckpointAsksAgain: who waits for a checkpoint asks for the commit that the one
// that runs is waiting for, should nobody have been there when that asked.
func TestCheckpointAsksAgain(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 60)))
	c := openCommitted(t, d, Options{})
	asked := make(chan struct{})
	answer := c.opts.NeedCommit
	c.setNeedCommit(sync.OnceFunc(func() { close(asked) }))
	must(t, c.blob(0, 32, ^uint32(0)))
	c.snapshot.Store(true)
	must(t, c.commit())
	<-asked
	c.setNeedCommit(answer)
	within(t, "checkpoint", c.Checkpoint)
	must(t, c.Close())
}

// TestTrimsBeforeCleaning: an idle device works off what was trimmed before it cleans:
// what trims cover still counts as alive, and segments are looked through for nothing.
func TestTrimsBeforeCleaning(t *testing.T) {
	const blocks = 1 << 13
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 800)))
	c := openCommitted(t, d, Options{TrimLeaves: 1})
	for b := 0; b < blocks; b += 2 {
		must(t, c.Reserve(1, Growth))
		must(t, c.blob(b, 1, 1))
		c.Release(1)
		if b%8 == 6 { // three in four are overwritten, so cleaning would be worth it
			for over := b - 6; over < b; over += 2 {
				must(t, c.Reserve(1, Growth))
				must(t, c.blob(over, 1, 1))
				c.Release(1)
			}
		}
	}
	must(t, c.commit())
	for range 3 {
		must(t, c.Checkpoint())
	}
	must(t, c.hole(block.Span(0, blocks)))
	must(t, c.commit())
	c.cleaner.appended, c.cleaner.quiet = c.appended(), quietLooks // it is idle
	pending := 0
	for i := 0; ; i++ {
		c.cleaner.turn <- struct{}{}
		worked, _ := c.cleaner.work()
		<-c.cleaner.turn
		if c.trimsPending() > 0 {
			pending++
			if n := len(c.cleaner.futile); n > 0 || c.metrics.cleaned.Load() > 0 {
				t.Fatalf("step %d: %d segments were looked through, %d cleaned, with %d blocks of trims pending", i, n, c.metrics.cleaned.Load(), c.trimsPending())
			}
		}
		if !worked && pending > 0 && c.trimsPending() == 0 {
			break
		}
		if i > 10000 {
			t.Fatal("the trims are not worked off")
		}
	}
	if pending < 3 {
		t.Errorf("trims were pending at %d steps only", pending)
	}
	must(t, c.Close())
}
