package store

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/disktest"
)

// A committed store has a goroutine that commits whenever the store asks for it,
// as the flusher of a device does.
type committed struct {
	*Store
	t    testing.TB
	mu   sync.Mutex // appends and commits go one at a time
	want chan struct{}
	quit chan struct{}
	done sync.WaitGroup
}

// openCommitted opens the store in d. Its Close is that of a killed process.
func openCommitted(t testing.TB, d disk.File, o Options) *committed {
	t.Helper()
	c := &committed{t: t, want: make(chan struct{}, 1), quit: make(chan struct{})}
	o.NeedCommit = func() {
		select {
		case c.want <- struct{}{}:
		default:
		}
	}
	var err error
	if c.Store, err = Open(d, o); err != nil {
		t.Fatal(err)
	}
	c.done.Go(func() {
		for {
			select {
			case <-c.quit:
				return
			case <-c.want:
				_ = c.commit() // a failure is told to who waits for the commit
			}
		}
	})
	return c
}

func (c *committed) Close() error {
	close(c.quit)
	c.done.Wait()
	return c.Store.Close()
}

func (c *committed) commit() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	commit, ok, err := c.AppendCommit()
	if err != nil || !ok {
		return err
	}
	return c.Sync(commit)
}

// blob appends n blocks of noise from start on as one raw blob; of the blocks
// only those in present are data.
func (c *committed) blob(start, n int, present uint32) error {
	rng := rand.New(rand.NewPCG(uint64(start), 5))
	b := extents.Blob{Start: block.Index(start), Count: uint8(n), Present: present}
	for i := range n {
		if present>>i&1 != 0 {
			page := make([]byte, block.Size)
			for j := range page {
				page[j] = byte(rng.Uint32())
			}
			b.Parts = append(b.Parts, page)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.AppendData(b)
}

func (c *committed) hole(r block.Range) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.AppendHole(r)
}

// idle waits for the checkpoint that is running.
func (c *committed) idle() {
	c.progress.Lock()
	defer c.progress.Unlock()
	for c.progress.running {
		c.progress.cond.Wait()
	}
}

// within fails the test when fn does not return: it waits for what never comes.
func within(t testing.TB, what string, fn func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: still waiting", what)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fillHost leaves no space on the host beyond what is in use.
func fillHost(t testing.TB, d *disktest.Disk) {
	t.Helper()
	n, err := d.Allocated()
	must(t, err)
	d.SetCapacity(n)
}

// closeClean stops as a device does.
func (c *committed) closeClean() {
	c.t.Helper()
	must(c.t, c.Checkpoint())
	must(c.t, c.TrimHost())
	must(c.t, c.Close())
}

// TestReservedFitsOnFullHost: what was reserved can be stored although the host
// is full since, right after an opening and after a checkpoint has given space
// back. A segment takes just one blob of the size used.
func TestReservedFitsOnFullHost(t *testing.T) {
	const blobs = 30
	all := ^uint32(0)
	for _, checkpoint := range []bool{false, true} {
		d := disktest.New(1, disktest.Options{})
		must(t, Format(d, testGeometry(blobs*ExtentBlocksMax, 100)))
		c := openCommitted(t, d, Options{})
		must(t, c.blob(0, 32, all))
		c.closeClean() // leaves nothing allocated ahead
		d = d.Clone()
		c = openCommitted(t, d, Options{})
		must(t, c.Reserve(blobs*ExtentBlocksMax, Growth))
		if checkpoint {
			must(t, c.Checkpoint())
		}
		fillHost(t, d)
		for i := range blobs {
			if err := c.blob(i*32, 32, all); err != nil {
				t.Fatalf("checkpoint %v: blob %d of what was reserved: %v", checkpoint, i, err)
			}
			c.Release(ExtentBlocksMax)
		}
		if err := c.commit(); err != nil {
			t.Fatalf("checkpoint %v: %v", checkpoint, err)
		}
		if c.TryReserve(4000, Growth) {
			t.Errorf("checkpoint %v: TryReserve finds space on a full host", checkpoint)
		}
		if err := c.Reserve(4000, Growth); !errors.Is(err, ErrNoSpace) {
			t.Errorf("checkpoint %v: more on a full host: %v, want ErrNoSpace", checkpoint, err)
		}
		must(t, c.Close())
	}
}

// TryReserve asks the host for nothing, and reserves nothing where it reports false.
func TestTryReserve(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(64*ExtentBlocksMax, 100)))
	c := openCommitted(t, d, Options{})
	const n = 64 * ExtentBlocksMax
	ops := d.Ops()
	if c.TryReserve(n, Growth) || c.promised() != 0 || d.Ops() != ops {
		t.Errorf("%d blocks are promised, after %d operations of the host", c.promised(), d.Ops()-ops)
	}
	must(t, c.Reserve(n, Growth))
	c.Release(n)
	if !c.TryReserve(n, Growth) || c.promised() != n {
		t.Errorf("%d blocks are promised, want %d, for which there is space on the host", c.promised(), n)
	}
	c.Release(n)
	must(t, c.Close())
}

// TestAllocatedIsOnTheHost: a freed segment counts as having space on the host
// only if all of it is there: not one of an earlier life, which was punched in
// part when that ended. And what there is of such a one goes back to the host.
func TestAllocatedIsOnTheHost(t *testing.T) {
	const lives = 16
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(lives*32, 60)))
	for life := range lives {
		c := openCommitted(t, d, Options{})
		must(t, c.blob(life*32, 32, ^uint32(0)))
		must(t, c.commit())
		c.closeClean()
		d = d.Clone()
	}
	c := openCommitted(t, d, Options{})
	must(t, c.hole(block.Span(0, lives*32)))
	must(t, c.commit())
	for range 3 {
		must(t, c.Checkpoint())
	}
	used := int64(0)
	c.segments.visit(func(uint32, segment) { used++ })
	_, warm := c.segments.room()
	n, err := d.Allocated()
	must(t, err)
	if most := (used+int64(warm))*SegmentSizeMin + segmentsOffset; n > most {
		t.Errorf("%d bytes on the host, with %d segments in use and %d allocated: want at most %d", n, used, warm, most)
	}
	fillHost(t, d)
	for n := range c.segments.table {
		if g := &c.segments.table[n]; g.state == segmentFree && g.allocated {
			if _, err := d.WriteAt(make([]byte, SegmentSizeMin), c.segments.base(uint32(n))); err != nil {
				t.Errorf("segment %d is free and counted as allocated: %v", n, err)
			}
		}
	}
	must(t, c.Close())
}

// TestOverlayOfManyExtents: where records are many extents each, so that the
// overlay is full long before the log asks for a checkpoint, a writer waits for
// one and not for ever.
func TestOverlayOfManyExtents(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 40)))
	c := openCommitted(t, d, Options{CheckpointRecords: 8})
	defer c.Close()
	for i := range 4 {
		must(t, c.blob(i*32, 32, 0x55555555))
	}
	must(t, c.commit())
	within(t, "reserve", func() error { return c.Reserve(1, Growth) })
	c.Release(1)
}

// TestTrimsOnFullStore: trims and commits reserve no space. However many there
// are on a store that has none left, they go on, and so do openings.
func TestTrimsOnFullStore(t *testing.T) {
	const segments = 24
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(4096, segments)))
	o := Options{Warn: func(msg string, err error) { t.Errorf("warning: %s: %v", msg, err) }}
	c := openCommitted(t, d, o)
	blocks := 0
	for ; c.Reserve(16, Growth) == nil; blocks += 16 {
		must(t, c.blob(blocks, 16, 0xffff))
		c.Release(16)
	}
	must(t, c.commit())
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 1500 {
		// As long as checkpoints keep up with the commits, nobody waits for them.
		if i < 750 {
			if c.idle(); c.Short() {
				t.Fatalf("trim %d: room is short in spite of checkpoints", i)
			}
		}
		if c.Short() { // as a device does
			for range 2 {
				within(t, "checkpoint", c.Checkpoint)
			}
		}
		if err := c.hole(block.Span(block.Index(rng.IntN(blocks)), 1)); err != nil {
			t.Fatalf("trim %d: %v", i, err)
		}
		if err := c.commit(); err != nil {
			t.Fatalf("commit of trim %d: %v", i, err)
		}
		if i >= 750 && i%100 == 99 { // killed
			must(t, c.Close())
			d = d.Clone()
			c = openCommitted(t, d, o)
		}
	}
	for i := range 3 * segments {
		must(t, c.Close())
		d = d.Clone()
		c = openCommitted(t, d, o)
		must(t, c.hole(block.Span(block.Index(i), 1)))
		must(t, c.commit())
	}
	must(t, c.Close())
	rep, err := Check(d.Clone(), CheckOptions{Data: true})
	if err != nil || !rep.Clean {
		t.Fatalf("check: %+v, %v", rep, err)
	}
}

// TestShortLivesCheckpoint: lives that each end before they have written enough
// for a checkpoint do not make the log that an opening reads longer and longer (P10).
func TestShortLivesCheckpoint(t *testing.T) {
	const limit = 64 << 10
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 200)))
	for life := range 60 {
		c := openCommitted(t, d, Options{CheckpointBytes: limit})
		if n := c.Recovery().Records; n > 40 { // two each of about five lives, and those of checkpoints
			t.Fatalf("opening %d applied %d records", life, n)
		}
		must(t, c.blob(0, 4, 0xf))
		must(t, c.commit())
		c.idle()
		must(t, c.Close())
		d = d.Clone()
	}
}

// TestFailedPunch: a host that cannot take space back does no harm.
func TestFailedPunch(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(1024, 100)))
	warned := 0
	c := openCommitted(t, d, Options{Warn: func(string, error) { warned++ }})
	must(t, c.Reserve(1024, Growth)) // allocates far more than is kept
	c.Release(1024)
	d.Inject(disktest.Fault{Kinds: disktest.Punch, Times: 2, Err: syscall.EIO})
	for range 4 {
		must(t, c.blob(0, 32, ^uint32(0)))
		must(t, c.commit())
		must(t, c.Checkpoint())
	}
	if warned == 0 {
		t.Error("nothing was told")
	}
	free, _ := c.segments.room()
	used := uint32(0)
	c.segments.visit(func(uint32, segment) { used++ })
	if free+used != 100 {
		t.Errorf("%d segments free and %d used, of 100", free, used)
	}
	must(t, c.Close())
}

// TestHostIsAskedBeside: while a slow host takes or gives the space of many
// segments, one after the other, a write that needs one does not wait for all.
func TestHostIsAskedBeside(t *testing.T) {
	const segments = 300
	for _, what := range []string{"ensure", "chill", "sweep"} {
		d := disktest.New(1, disktest.Options{})
		must(t, Format(d, testGeometry(4096, segments+100)))
		c := openCommitted(t, d, Options{})
		kind, work := disktest.Punch, func() error { return c.segments.chill(d, func() uint32 { return 0 }) }
		switch what {
		case "chill":
			must(t, c.segments.ensure(d, segments))
		case "sweep":
			work = func() error { return c.segments.sweep(t.Context(), d, c.segments.base(segments)) }
		case "ensure":
			kind, work = disktest.Allocate, func() error { return c.segments.ensure(d, segments) }
		}
		began := make(chan struct{})
		var asked atomic.Int64
		d.SetHook(func(o disktest.Op) {
			if o.Kind == kind {
				if asked.Add(1) == 3 {
					close(began)
				}
				time.Sleep(time.Millisecond) // the host takes its time
			}
		})
		done := make(chan error, 1)
		go func() { done <- work() }()
		<-began
		must(t, c.segments.ensure(d, 1))
		if n := asked.Load(); n > segments/4 {
			t.Errorf("%s: a write waited for %d segments", what, n)
		}
		must(t, <-done)
		if n := asked.Load(); n < segments/2 {
			t.Errorf("%s: the host was asked %d times", what, n)
		}
		must(t, c.Close())
	}
}

// TestTrimsOnFullHost: trims and commits reserve no space. However many there are
// on a host that has none left, they go on (promise P4).
func TestTrimsOnFullHost(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(4096, 400)))
	c := openCommitted(t, d, Options{})
	const blocks = 2048
	for b := 0; b < blocks; b += 16 {
		must(t, c.Reserve(16, Growth))
		must(t, c.blob(b, 16, 0xffff))
		c.Release(16)
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	fillHost(t, d)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range 3000 {
		if c.Short() { // as a device does
			for range 2 {
				within(t, "checkpoint", c.Checkpoint)
			}
		}
		if err := c.hole(block.Span(block.Index(rng.IntN(blocks)), 1)); err != nil {
			t.Fatalf("trim %d: %v", i, err)
		}
		if err := c.commit(); err != nil {
			t.Fatalf("commit of trim %d: %v", i, err)
		}
	}
	must(t, c.Close())
}

// TestPunchedIsFree: a segment whose space is given back to the host at this moment
// counts as free: what fits is not refused for it.
func TestPunchedIsFree(t *testing.T) {
	const segments = 60
	for _, what := range []string{"chill", "sweep"} {
		d := disktest.New(1, disktest.Options{})
		must(t, Format(d, testGeometry(4096, segments)))
		c := openCommitted(t, d, Options{})
		if what == "chill" {
			must(t, c.segments.ensure(d, segments))
		}
		free, _ := c.segments.room()
		punched := 0
		d.SetHook(func(o disktest.Op) {
			if o.Kind == disktest.Punch {
				punched++
				if n, _ := c.segments.room(); n != free {
					t.Errorf("%s: %d segments are free while one is punched, %d before", what, n, free)
				}
			}
		})
		if what == "chill" {
			must(t, c.segments.chill(d, func() uint32 { return 0 }))
		} else {
			must(t, c.segments.sweep(t.Context(), d, c.segments.base(segments)))
		}
		if n, _ := c.segments.room(); n != free || punched < segments/2 {
			t.Errorf("%s: %d segments are free afterwards, %d before; %d were punched", what, n, free, punched)
		}
		must(t, c.Close())
	}
}
