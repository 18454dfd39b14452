package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/delalloc"
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// What go-nbd's backend.Backend asks for: a program that has go-nbd can serve a
// Device.
var _ interface {
	ReadAt(p []byte, off int64) (n int, err error)
	WriteAt(p []byte, off int64) (n int, err error)
	Size() (int64, error)
	Sync() error
} = (*Device)(nil)

// testGeometry is a small device in small segments with much room.
func testGeometry(size uint64, codec compression.Codec) store.Geometry {
	return store.Geometry{DeviceSize: size, Capacity: 400 * store.SegmentSizeMin, SegmentSize: store.SegmentSizeMin,
		ExtentBlocks: 16, Codec: uint8(codec), Level: 1}
}

// smallOptions make a device whose every limit is reached all the time: a cache
// of 64 pages, short checkpoints.
func smallOptions(t testing.TB) Options {
	return Options{CacheBytes: 64 * block.Size, PayloadBytes: 4 << 20, MapCacheBytes: 64 << 10, Workers: 3, zeroCommits: 2,
		CheckpointBytes: 256 << 10, CommitInterval: 20 * time.Millisecond, WritebackPeriod: 5 * time.Millisecond,
		DirtyExpire: 10 * time.Millisecond, CleanPeriod: 2 * time.Millisecond,
		Warn: func(msg string, err error) {
			if !errors.Is(err, disktest.ErrPowerCut) && !errors.Is(err, store.ErrClosed) {
				t.Errorf("warning: %s: %v", msg, err)
			}
		}}
}

func format(t testing.TB, f disk.File, g store.Geometry) {
	t.Helper()
	if err := store.Format(f, g); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, f disk.File, o Options) *Device {
	t.Helper()
	d, err := Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// do carries a request out on the device. What a read returns, or a write writes,
// is appended to buf.
func do(ctx context.Context, d *Device, r disktest.Request, off int64, buf []byte) ([]byte, error) {
	at, n := uint64(off+r.Off), uint64(r.Len)
	switch r.Verb {
	case disktest.VerbRead:
		p, ok := d.ReadPromptly(at, uint32(n))
		if !ok {
			var err error
			if p, err = d.Read(ctx, at, uint32(n)); err != nil {
				return buf, err
			}
		}
		for _, s := range p.Segments() {
			buf = append(buf, s...)
		}
		p.Release()
		return buf, nil
	case disktest.VerbWrite:
		buf = r.Payload(buf)
		return buf, write(ctx, d, at, buf[len(buf)-int(n):], 1+int(at*7%20000), r.FUA)
	case disktest.VerbZeroes:
		return buf, d.WriteZeroes(ctx, at, n, r.FUA)
	case disktest.VerbTrim:
		return buf, d.Trim(ctx, at, n, r.FUA)
	}
	return buf, d.Flush(ctx)
}

// write writes p as a server does: at once if that can be done, and its memory handed
// out for step bytes at a time.
func write(ctx context.Context, d *Device, at uint64, p []byte, step int, fua bool) error {
	w, ok := d.PrepareWritePromptly(at, uint32(len(p)))
	if !ok {
		var err error
		if w, err = d.PrepareWrite(ctx, at, uint32(len(p))); err != nil {
			return err
		}
	}
	if err := receive(w, p, step); err != nil {
		return err
	}
	if !fua && w.CommitPromptly() {
		return nil
	}
	return w.Commit(ctx, fua)
}

// receive has the memory of w handed out for step bytes at a time, and fills it with p.
func receive(w *Write, p []byte, step int) error {
	for len(p) > 0 {
		n := 0
		for _, s := range w.Next(step) {
			n += len(s)
			if copy(s, p) < len(s) {
				return fmt.Errorf("memory for more than the payload: a piece of %d bytes, %d are left", len(s), len(p))
			}
			p = p[len(s):]
		}
		if n < step && len(p) > 0 || n >= step+block.Size {
			return fmt.Errorf("asked for the next %d bytes, got memory for %d; %d are left", step, n, len(p))
		}
	}
	if more := w.Next(1); len(more) > 0 {
		return fmt.Errorf("memory for more than the payload")
	}
	return nil
}

// A region is the part of a device that one connection changes, and the truth
// about it. Regions border in the middle of blocks.
type region struct {
	base    int64 // in the device
	bytes   []byte
	history *disktest.History
	buf     []byte
	old     []byte
	events  map[string]uint64 // requests done, by kind
}

// run carries out the next n requests of r's history.
func (r *region) run(ctx context.Context, d *Device, n int) error {
	for range n {
		if err := r.do(ctx, d, r.history.Next()); err != nil {
			return err
		}
	}
	return nil
}

// do carries out q on the device and compares, or on the truth.
func (r *region) do(ctx context.Context, d *Device, q disktest.Request) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%v at %d: %w", q, r.base, err)
		}
	}()
	if r.buf, err = do(ctx, d, q, r.base, r.buf[:0]); err != nil {
		return err
	}
	r.events["requests: "+q.Verb.String()]++
	if (r.base+q.Off)%block.Size != 0 || q.Len%block.Size != 0 {
		r.events["requests: not aligned"]++
	}
	if q.Len == 1<<20 {
		r.events["requests: of 1 MiB"]++
	}
	if q.Len == 1 {
		r.events["requests: of 1 byte"]++
	}
	switch q.Verb {
	case disktest.VerbRead:
		return errors.Join(r.compare(r.buf, q.Off), r.checkHoles(ctx, d, q.Off, q.Len))
	case disktest.VerbFlush:
		return r.checkHoles(ctx, d, 0, int64(len(r.bytes)))
	}
	r.apply(q)
	return nil
}

// checkHoles checks that what is told to be holes in [off, off+n) of r is zeros.
func (r *region) checkHoles(ctx context.Context, d *Device, off, n int64) (err error) {
	end := off + n
	failed := d.Allocation(ctx, uint64(r.base+off), uint64(n), func(n uint64, hole bool) bool {
		if run := r.bytes[off:][:n]; hole {
			r.events["bytes told to be holes"] += n
			if i := differ(run, make([]byte, n)); i >= 0 {
				at := r.base + off + int64(i)
				err = fmt.Errorf("byte %d (block %d) is told to be in a hole, and is %#x", at, at/block.Size, run[i])
			}
		}
		off += int64(n)
		return err == nil
	})
	if failed == nil && err == nil && off != end {
		err = fmt.Errorf("told the allocation to %d instead of %d", off, end)
	}
	return errors.Join(failed, err)
}

// duel does n requests to a few blocks where others do the same: the border with
// the next region, and a range that is written out again and again.
func (r *region) duel(ctx context.Context, d *Device, rng *rand.Rand, n int) error {
	size := int64(len(r.bytes))
	for i := range n {
		q := disktest.Request{Seq: uint64(i), Verb: disktest.VerbWrite, Len: 1 + rng.Int64N(40), Content: disktest.Described}
		switch rng.IntN(12) {
		case 0, 1:
			q.Off = 0
		case 2, 3:
			q.Off = size - q.Len
		case 4:
			q.Verb, q.Off, q.Len = disktest.VerbRead, size-40, 40
		case 5:
			q.Verb, q.Off, q.Len = disktest.VerbTrim, size/2, 100*block.Size
		case 6:
			q.Verb, q.Off, q.Len = disktest.VerbZeroes, size/2, 16*block.Size
		case 7, 8:
			q.Verb, q.Off, q.Len = disktest.VerbRead, size/2+rng.Int64N(16)*block.Size, 4*block.Size
		default:
			q.Off, q.Len, q.Content = size/2, 16*block.Size, disktest.Constant
		}
		if err := r.do(ctx, d, q); err != nil {
			return err
		}
	}
	return nil
}

// apply makes q part of the truth. r.buf has its payload.
func (r *region) apply(q disktest.Request) {
	switch q.Verb {
	case disktest.VerbWrite:
		copy(r.bytes[q.Off:], r.buf)
	case disktest.VerbZeroes:
		clear(r.bytes[q.Off:][:q.Len])
	case disktest.VerbTrim:
		if whole := block.Within(uint64(r.base+q.Off), uint64(q.Len)); !whole.Empty() {
			clear(r.bytes[int64(whole.Start.Bytes())-r.base:][:whole.Len().Bytes()])
		}
	}
}

// compare compares what was read at off of r.
func (r *region) compare(got []byte, off int64) error {
	i := differ(got, r.bytes[off:][:len(got)])
	if i < 0 {
		return nil
	}
	at := r.base + off + int64(i)
	return fmt.Errorf("byte %d (block %d) is %#x, want %#x (%s)", at, at/block.Size, got[i], r.bytes[off:][i], disktest.Describe(got[i:min(len(got), i+16)], at))
}

// check reads all of r.
func (r *region) check(d *Device) error {
	got := make([]byte, 64<<10)
	for off := 0; off < len(r.bytes); off += len(got) {
		got = got[:min(len(got), len(r.bytes)-off)]
		if _, err := d.ReadAt(got, r.base+int64(off)); err != nil {
			return err
		}
		if err := r.compare(got, int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// runFailed is run on a device that fails in the midst of it (promise P5). Once a
// change was answered with EIO all are; such a change may have happened or not.
// Reads are right.
func (r *region) runFailed(ctx context.Context, d *Device, n int) error {
	failed := false
	for range n {
		q := r.history.Next()
		r.old = append(r.old[:0], r.bytes...)
		err := r.do(ctx, d, q)
		switch {
		case err == nil && failed && q.Verb != disktest.VerbRead && q.Verb != disktest.VerbFlush:
			return fmt.Errorf("%v was answered with success after an error", q)
		case err == nil:
			continue
		case !errors.Is(err, syscall.EIO) || q.Verb == disktest.VerbRead:
			return err
		}
		failed = true
		if q.Verb == disktest.VerbFlush {
			continue
		}
		if q.Verb == disktest.VerbWrite {
			r.buf = q.Payload(r.buf[:0])
		}
		r.apply(q)
		got := make([]byte, q.Len)
		if _, err := d.ReadAt(got, r.base+q.Off); err != nil {
			return err
		}
		if differ(got, r.old[q.Off:][:q.Len]) < 0 {
			copy(r.bytes, r.old)
		} else if err := r.compare(got, q.Off); err != nil {
			return fmt.Errorf("after the failure of %v: %w", q, err)
		}
	}
	return nil
}

// A randomDevice is a device under random histories, with what is true of it.
type randomDevice struct {
	rng     *rand.Rand
	disk    *disktest.Disk
	opts    Options
	regions []*region
	events  map[string]uint64 // sums of the counters over all lives
	packed  uint64            // extents seen so after a rest
}

func newRandomDevice(t *testing.T, seed uint64, size int64, conns int, events map[string]uint64) *randomDevice {
	rng := rand.New(rand.NewPCG(seed, 0))
	v := &randomDevice{rng: rng, disk: disktest.New(seed, disktest.Options{}), opts: smallOptions(t), events: events}
	v.opts.PayloadBytes = 2 << 20
	v.opts.Workers = 1 + rng.IntN(4)
	v.opts.CheckpointBytes = 64 << 10 << rng.IntN(4)
	v.opts.CleanPeriod, v.opts.PackAfter = 200*time.Microsecond<<rng.IntN(4), time.Millisecond<<rng.IntN(4)
	g := testGeometry(uint64(size), []compression.Codec{compression.Zstd, compression.S2, compression.None}[rng.IntN(3)])
	g.ExtentBlocks = 8 << rng.IntN(3)
	if rng.IntN(2) == 0 {
		// As little room as is enough for all of it.
		g.DirtyMax = uint64(v.opts.CacheBytes)
		g.Capacity = store.DefaultCapacity(g.DeviceSize, g.SegmentSize, g.DirtyMax, v.opts.CheckpointBytes)
	}
	format(t, v.disk, g)
	for c := range conns {
		base := size / int64(conns) * int64(c)
		n := size/int64(conns)*int64(c+1) - base
		v.regions = append(v.regions, &region{base: base, bytes: make([]byte, n), events: map[string]uint64{}, history: disktest.NewHistory(rng.Uint64(),
			disktest.HistoryOptions{Size: n, RequestMax: 1 << 20, UsualMax: 16 << 10})})
	}
	return v
}

// each calls f for all regions at the same time.
func (v *randomDevice) each(f func(r *region) error) error {
	errs := make([]error, len(v.regions))
	var wg sync.WaitGroup
	for i, r := range v.regions {
		wg.Go(func() { errs[i] = f(r) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// count adds the counters of d, which is about to end, to v.events.
func (v *randomDevice) count(d *Device) error {
	for _, r := range v.regions {
		for name, n := range r.events {
			v.events[name] += n
		}
		clear(r.events)
	}
	st, err := d.Status(context.Background())
	v.events["store.Stats.Cleaned"] += st.Store.Cleaned
	v.events["store.Stats.Moved"] += st.Store.Moved
	for _, m := range []any{st.Cache, st.Writeback, st.Reads} {
		for i, s := 0, reflect.ValueOf(m); i < s.NumField(); i++ {
			if n, ok := s.Field(i).Interface().(uint64); ok {
				v.events[s.Type().String()+"."+s.Type().Field(i).Name] += n
			}
		}
	}
	return err
}

// live has each connection do n requests and more between two restarts, while
// somebody else reads. Every other time the end is as in a crash after a flush.
func (v *randomDevice) live(ctx context.Context, n, duels int, check bool) error {
	if v.rng.IntN(2) == 0 { // on a slow disk
		v.disk.SetHook(func(disktest.Op) {
			if n := rand.IntN(64); n < 8 {
				time.Sleep(time.Duration(n) * 20 * time.Microsecond)
			}
		})
	}
	d, err := Open(v.disk, v.opts)
	if err != nil {
		return err
	}
	steps := []func() error{
		func() error { return v.rest(d) }, // nothing is known of how it is read
		func() error { return v.each(func(r *region) error { return r.run(ctx, d, n) }) },
		func() error { return v.rest(d) },
		func() error { return v.duel(ctx, d, duels) },
		func() error { return v.count(d) },
	}
	if check {
		steps = append(steps, func() error { return v.each(func(r *region) error { return r.check(d) }) })
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return errors.Join(err, d.Abort())
		}
	}
	if v.rng.IntN(2) == 0 {
		err = d.Close()
	} else if err = d.Flush(ctx); err == nil {
		err = d.Abort()
	}
	v.disk = v.disk.Crash(disktest.LoseAll)
	return err
}

// rest leaves d alone, every other time, until it has encoded anew and packed something, but
// not for long.
func (v *randomDevice) rest(d *Device) error {
	if d.codec.Codec != compression.Zstd || v.rng.IntN(2) == 0 {
		return nil
	}
	packed := uint64(0)
	for end := time.Now().Add(200 * time.Millisecond); packed == 0 && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond) // polling: the cleaner tells nobody
		list, err := d.store.Lookup(block.Range{End: d.end()}, nil)
		if err != nil {
			return err
		}
		for _, e := range list {
			if e.Kind == extents.Data && e.Addr.Level == uint8(compression.ZstdBest) {
				packed++
			}
		}
	}
	v.packed += packed
	return nil
}

// duel has the connections get in each other's way, and in that of commits and of
// reads of the same blocks, of which nobody knows what they should see.
func (v *randomDevice) duel(ctx context.Context, d *Device, n int) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	errs := make([]error, 2)
	during := func(i int, f func(rng *rand.Rand) error) {
		rng := rand.New(rand.NewPCG(v.rng.Uint64(), 0))
		wg.Go(func() {
			for errs[i] == nil && ctx.Err() == nil {
				errs[i] = f(rng)
			}
		})
	}
	if v.rng.IntN(2) == 0 { // else it is written out in the background
		during(0, func(*rand.Rand) error { return d.Flush(context.WithoutCancel(ctx)) })
	}
	during(1, func(rng *rand.Rand) error {
		r := v.regions[rng.IntN(len(v.regions))]
		off := []int64{0, int64(len(r.bytes)) / 2, int64(len(r.bytes)) - 40, rng.Int64N(int64(len(r.bytes)))}[rng.IntN(4)]
		p, err := d.Read(context.WithoutCancel(ctx), uint64(r.base+off), uint32(1+rng.Int64N(min(64<<10, int64(len(r.bytes))-off))))
		if err == nil {
			p.Release()
		}
		return err
	})
	seeds := v.rng.Uint64()
	err := v.each(func(r *region) error { return r.duel(ctx, d, rand.New(rand.NewPCG(seeds, uint64(r.base))), n) })
	stop()
	wg.Wait()
	return errors.Join(err, errs[0], errs[1])
}

// quiet opens the device so that nothing is written out unless it is asked for.
func (v *randomDevice) quiet() (*Device, error) {
	o := v.opts
	o.CommitInterval, o.WritebackPeriod, o.DirtyExpire, o.Warn = time.Hour, time.Hour, time.Hour, nil
	o.BackgroundBytes, o.CheckpointBytes = 24*block.Size, 1<<30
	v.disk = v.disk.Clone()
	d, err := Open(v.disk, o)
	if err == nil {
		d.store.StopCleaning() // its checkpoints need commits
	}
	return d, err
}

// meet has requests and writeback meet at moments that last for nanoseconds, by
// holding a range lock for longer.
func (v *randomDevice) meet(ctx context.Context) (err error) {
	d, err := v.quiet()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.count(d), d.Close()) }()
	r := v.regions[0]
	request := func(verb disktest.Verb, at, n int64) error {
		return r.do(ctx, d, disktest.Request{Seq: uint64(n), Verb: verb, Off: at * block.Size, Len: n * block.Size})
	}
	for _, n := range []int64{1, 3} {
		if err := request(disktest.VerbWrite, 2*n, n); err != nil { // blocks 2, and 6 to 8
			return err
		}
	}
	// A commit has frozen its epoch, and not yet handed it off.
	owner, first := d.owners.Add(1), block.Span(2, 1)
	e := d.epochs.Enter()
	e.State.Lock(first, owner)
	d.epochs.Leave()
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(ctx) }()
	for d.epochs.Open() == e {
		runtime.Gosched()
	}
	err = errors.Join(request(disktest.VerbWrite, 6, 1), request(disktest.VerbTrim, 7, 1), request(disktest.VerbRead, 2, 7))
	e.State.Unlock(first, owner, 0, 0)
	if err = errors.Join(err, <-flushed); err != nil {
		return err
	}

	// A trim of four blocks drops their pages before the writeback wants to lock
	// them, or after it did.
	trim := block.Span(2, 4)
	for _, late := range []bool{false, true} {
		if err := request(disktest.VerbWrite, 2, 4); err != nil {
			return err
		}
		written := make(chan error, 1)
		background := func() { written <- d.back.Background(ctx, d.epochs, &delalloc.Control{Budget: 100}, false) }
		e = d.epochs.Enter()
		e.State.Lock(trim, owner)
		if late {
			go background()
			for d.cache.Metrics().Locked == 0 {
				runtime.Gosched()
			}
		}
		dropped, _ := d.cache.InstallHole(trim, e.Number)
		if !late {
			background()
		}
		e.State.Unlock(trim, owner, extents.DirtyHole, extents.Delalloc)
		d.epochs.Leave()
		d.store.Release(dropped)
		clear(r.bytes[trim.Start.Bytes():trim.End.Bytes()])
		if err := errors.Join(<-written, request(disktest.VerbRead, 0, 16)); err != nil {
			return err
		}
	}

	// A trim is queued behind something slow; its range is written and queued, and
	// trimmed again. When the first trim is done the second has still to come.
	slow := slowTask(make(chan struct{}))
	if err := request(disktest.VerbTrim, 2, 4); err != nil {
		return err
	}
	d.queue.Submit(slow, 0)
	handOff := func() error {
		return d.back.Background(ctx, d.epochs, &delalloc.Control{Budget: 100}, true)
	}
	err = errors.Join(handOff(), request(disktest.VerbWrite, 2, 4), handOff(), request(disktest.VerbTrim, 2, 4))
	close(slow)
	for d.cache.Metrics().Writeback > 0 {
		runtime.Gosched()
	}
	if err := errors.Join(err, request(disktest.VerbRead, 0, 16)); err != nil {
		return err
	}

	// Two writes of parts of a block, which both have read.
	if err := request(disktest.VerbWrite, 2, 1); err != nil {
		return err
	}
	e = d.epochs.Enter()
	e.State.Lock(first, owner)
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		off, p := 2*block.Size+100+10*i, []byte("a part")
		copy(r.bytes[off:], p)
		wg.Go(func() { _, errs[i] = d.WriteAt(p, r.base+int64(off)) })
	}
	for d.cache.Metrics().Pinned < 2 {
		runtime.Gosched()
	}
	e.State.Unlock(first, owner, 0, 0)
	d.epochs.Leave()
	wg.Wait()
	return errors.Join(errs[0], errs[1], request(disktest.VerbRead, 2, 1))
}

// A slowTask is an item of the queue that takes until the channel is closed.
type slowTask chan struct{}

func (t slowTask) Do(int) error   { return nil }
func (t slowTask) Complete(error) { <-t }
func (t slowTask) Free()          {}

// fail is the last life: a write or sync of the disk fails, while requests are
// under way that were admitted before. Then there are n requests.
func (v *randomDevice) fail(ctx context.Context, kind disktest.Kind, n int) error {
	d, err := v.quiet()
	if err != nil {
		return err
	}
	r := v.regions[1]
	start := (r.base/block.Size + 8) / 8 * 8 // of 16 blocks
	q := disktest.Request{Verb: disktest.VerbWrite, Off: start*block.Size - r.base, Len: 16 * block.Size, Content: disktest.Noise}
	if err := errors.Join(r.do(ctx, d, q), d.Close()); err != nil {
		return err
	}
	if d, err = v.quiet(); err != nil {
		return err
	}
	// One reads the block at its edge, which takes until the disk has failed, and
	// the payload of the other takes as long.
	zeroes := disktest.Request{Verb: disktest.VerbZeroes, Off: q.Off + 1, Len: 8*block.Size - 1}
	reading, failed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	v.disk.SetHook(func(op disktest.Op) {
		if op.Kind == disktest.Read {
			once.Do(func() { close(reading) })
			<-failed
		}
	})
	zeroed := make(chan error, 1)
	go func() { zeroed <- d.WriteZeroes(ctx, uint64(r.base+zeroes.Off), uint64(zeroes.Len), false) }()
	<-reading
	w, err := d.PrepareWrite(ctx, uint64(start+9)*block.Size, block.Size)
	if err != nil {
		return err
	}
	inner := disktest.Request{Seq: 1, Verb: disktest.VerbWrite, Off: q.Off + block.Size, Len: 15 * block.Size}
	if err := r.do(ctx, d, inner); err != nil {
		return err
	}
	v.disk.Inject(disktest.Fault{Kinds: kind})
	if err := d.Flush(ctx); err == nil {
		return errors.New("a flush was answered with success after the disk had failed")
	}
	close(failed)
	if err := <-zeroed; err != nil {
		return err
	}
	r.apply(zeroes)
	clear(w.Next(block.Size)[0])
	if err := w.Commit(ctx, false); err != nil {
		return err
	}
	clear(r.bytes[q.Off+9*block.Size:][:block.Size])
	err = v.each(func(r *region) error { return errors.Join(r.runFailed(ctx, d, n), r.check(d)) })
	if err == nil {
		err = v.count(d)
	}
	return errors.Join(err, d.Abort())
}

// TestRandomHistories has several connections change and read a device at once,
// each in a region of its own with borders in the middle of blocks, over many
// restarts, against a plain byte slice. The range is 24 times the cache, and
// every limit is reached all the time. At a CNBD_TEST_SCALE of 100 it does more
// than a million requests and 1000 restarts.
func TestRandomHistories(t *testing.T) {
	seed := disktest.Seed(t)
	const size, conns, requests, duels, lives = 6<<20 + 1536, 4, 250, 60, 5
	devices := 2 * disktest.Scale(t)
	events := map[string]uint64{}
	// missing are the events of which there are none yet.
	missing := func() (names []string) {
		for name, n := range events {
			if n == 0 && !slices.Contains(neverCounted, name) {
				names = append(names, name)
			}
		}
		return names
	}
	ops, restarts, packed := 0, 0, uint64(0)
	// Some are a matter of nanoseconds: for them it goes on for a while.
	for n := 0; n < devices || n < 3*devices && len(missing()) > 0; n++ {
		seed := seed + uint64(n)
		v := newRandomDevice(t, seed, size, conns, events)
		for life := range lives {
			if err := v.live(t.Context(), requests, duels, life == lives-1); err != nil {
				t.Fatalf("CNBD_SEED=%d, life %d: %v", seed, life, err)
			}
			restarts++
			ops += conns * (requests + duels)
		}
		packed += v.packed
		rep, err := store.Check(v.disk.Clone(), store.CheckOptions{Data: true})
		if err != nil || !rep.Clean {
			t.Fatalf("CNBD_SEED=%d: check: %+v, %v", seed, rep, err)
		}
		if err := v.meet(t.Context()); err != nil {
			t.Fatalf("CNBD_SEED=%d, where requests meet writeback: %v", seed, err)
		}
		if err := v.fail(t.Context(), []disktest.Kind{disktest.Write, disktest.Sync}[n%2], 40); err != nil {
			t.Fatalf("CNBD_SEED=%d, the last life: %v", seed, err)
		}
	}
	t.Logf("%d requests, %d restarts, %d packed extents seen (TestPacked has them for certain)", ops, restarts, packed)
	for _, name := range slices.Sorted(maps.Keys(events)) {
		t.Logf("%9d %s", events[name], name)
	}
	if names := missing(); len(names) > 0 {
		t.Errorf("never happened: %v", names)
	}
}

// neverCounted are the counters that may stay 0: encoders do not fail, no blob is
// damaged, and what is late is so by nanoseconds (TestReadOfBlockBeingWritten has it).
var neverCounted = []string{"delalloc.Metrics.EncodeFailures", "device.ReadMetrics.Errors", "device.ReadMetrics.Late"}

// differ is the first place where a and b differ, -1 if nowhere.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// TestColdRead: a 4 KiB read in a stored extent reads the store once, and its
// neighbours are then served without another read.
func TestColdRead(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := Options{CacheBytes: 8 << 20, Workers: 2}
	d := open(t, f, o)
	data := disktest.Request{Verb: disktest.VerbWrite, Len: 64 << 10, Content: disktest.Text}.Payload(nil)
	for _, off := range []int64{128 << 10, 1 << 20} {
		if _, err := d.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Crash(disktest.LoseAll)
	d = open(t, f, o)
	defer d.Close()
	one := make([]byte, block.Size)
	if _, err := d.ReadAt(one, 1<<20); err != nil { // its map leaf
		t.Fatal(err)
	}
	before := f.Counts()
	if _, err := d.ReadAt(one, 128<<10+5*block.Size); err != nil {
		t.Fatal(err)
	}
	if n := f.Counts().Sub(before).Reads; n != 1 {
		t.Errorf("a cold read of one block read the store %d times, want 1", n)
	}
	got := make([]byte, len(data))
	if _, err := d.ReadAt(got, 128<<10); err != nil {
		t.Fatal(err)
	}
	if n := f.Counts().Sub(before).Reads; n != 1 {
		t.Errorf("its neighbours read the store %d times more, want 0", n-1)
	}
	if differ(got, data) >= 0 {
		t.Error("the data differs")
	}
}

// TestReadOfBlockBeingWritten: a read finds that a block is absent, and before it
// comes to look up where it is stored, the block is written and appended to the
// log. The map then names a place that is not in the file yet, which is not damage.
func TestReadOfBlockBeingWritten(t *testing.T) {
	const last = 290 // in another window of the map than block 0
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.None))
	o := smallOptions(t)
	o.CommitInterval, o.WritebackPeriod, o.CacheBytes = time.Hour, time.Hour, 8<<20
	d := open(t, f, o)
	data := disktest.Request{Len: block.Size, Content: disktest.Noise}.Payload(nil)
	if _, err := d.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	d.ahead.stop() // it would read the second half

	reading, looked, writing, written := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	var first, second sync.Once
	f.SetHook(func(op disktest.Op) {
		switch {
		case op.Kind == disktest.Read && op.Len == block.Size:
			first.Do(func() { // it is of block 0
				close(reading)
				<-looked
			})
		case op.Kind == disktest.Write:
			second.Do(func() {
				close(writing)
				<-written
			})
		}
	})
	read := make(chan error, 1)
	go func() {
		p, err := d.Read(t.Context(), 0, (last+1)*block.Size)
		if err == nil {
			p.Release()
		}
		read <- err
	}()
	<-reading
	if _, err := d.WriteAt(data, last*block.Size); err != nil {
		t.Fatal(err)
	}
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(t.Context()) }()
	<-writing
	close(looked)
	time.AfterFunc(20*time.Millisecond, func() { close(written) }) // a read that waits for it may do so
	if err := <-read; err != nil {
		t.Errorf("read: %v", err)
	}
	if err := <-flushed; err != nil {
		t.Error(err)
	}
	f.SetHook(nil)
	if st, err := d.Status(t.Context()); err != nil || !st.Healthy || st.Reads.Late != 1 {
		t.Errorf("status: %v, %d corrupt, %d late", err, st.Store.Corrupt, st.Reads.Late)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestNeighbours: a block that is read brings those before and behind it that its
// extent has, but not what is mapped elsewhere by then: one of them is trimmed while
// the extent is read.
func TestNeighbours(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.None))
	o := Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour}
	d := open(t, f, o)
	want := noise(1, 16*block.Size)
	over := noise(2, block.Size)
	if _, err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(over, 4*block.Size); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	f.SetHook(func(op disktest.Op) {
		if op.Kind != disktest.Read || op.Len != int64(len(want)) {
			return
		}
		f.SetHook(nil)
		if err := d.Trim(t.Context(), 12*block.Size, block.Size, true); err != nil {
			t.Error(err)
		}
	})
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got[:block.Size], 7*block.Size); err != nil || !bytes.Equal(got[:block.Size], want[7*block.Size:][:block.Size]) {
		t.Fatalf("block 7: %v, or other data", err)
	}
	// Of the 16 blocks one is what was asked for, one is elsewhere, one is trimmed.
	if st, err := d.Look(); err != nil || st.Reads.Decodes != 1 || st.Reads.Neighbours != 13 || st.Reads.Stale != 1 || st.Reads.Bookends != 1 {
		t.Errorf("%+v, %v", st.Reads, err)
	}
	copy(want[4*block.Size:], over)
	clear(want[12*block.Size:][:block.Size])
	if _, err := d.ReadAt(got, 0); err != nil || differ(got, want) >= 0 {
		t.Errorf("%v, or byte %d differs", err, differ(got, want))
	}
	if st, err := d.Look(); err != nil || st.Reads.Decodes != 2 {
		t.Errorf("%+v, %v", st.Reads, err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestFailedReadLeavesNothing: of a read that fails while it has a block to look at
// again, since that was written meanwhile, nothing is left to the next read, which
// uses its memory.
func TestFailedReadLeavesNothing(t *testing.T) {
	const written, failing = 290, 600 // in other windows of the map than block 0
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.None))
	o := Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour}
	d := open(t, f, o)
	data := noise(1, block.Size)
	for _, b := range []int64{0, failing} {
		if _, err := d.WriteAt(data, b*block.Size); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	d.ahead.stop() // it would read the second half

	reading, proceed := make(chan struct{}), make(chan struct{})
	var first sync.Once
	f.SetHook(func(op disktest.Op) {
		if op.Kind == disktest.Read && op.Len == block.Size {
			first.Do(func() { // it is of block 0
				close(reading)
				<-proceed
			})
		}
	})
	read := make(chan error, 1)
	go func() {
		_, err := d.Read(t.Context(), 0, (failing+1)*block.Size)
		read <- err
	}()
	<-reading
	if _, err := d.WriteAt(data, written*block.Size); err != nil {
		t.Fatal(err)
	}
	f.Inject(disktest.Fault{Kinds: disktest.Read, After: 1, Times: 1})
	close(proceed)
	if err := <-read; !errors.Is(err, syscall.EIO) {
		t.Fatalf("read: %v, want EIO", err)
	}
	if st, err := d.Look(); err != nil || st.Reads.Late != 1 {
		t.Fatalf("%d late, %v", st.Reads.Late, err)
	}
	got := make([]byte, block.Size)
	for _, b := range []int64{0, written, failing} {
		if _, err := d.ReadAt(got, b*block.Size); err != nil || !bytes.Equal(got, data) {
			t.Errorf("block %d: %v, or other data", b, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestCommitIsOneWriteAndOneSync: a small write and a flush cost one write and one
// sync of the backing file.
func TestCommitIsOneWriteAndOneSync(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour})
	defer d.Close()
	data := make([]byte, block.Size)
	data[5] = 1
	for i := range 10 {
		before := f.Counts()
		if _, err := d.WriteAt(data, int64(i)*40960); err != nil {
			t.Fatal(err)
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		if c := f.Counts().Sub(before); i > 0 && (c.Writes != 1 || c.Syncs != 1) {
			t.Errorf("commit %d: %d writes and %d syncs, want 1 and 1", i, c.Writes, c.Syncs)
		}
	}
}

// TestFlushesShareACommit: flushes that come while a commit is synced are answered
// together, by one write and one sync.
func TestFlushesShareACommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clients = 32
		f := disktest.New(1, disktest.Options{})
		format(t, f, testGeometry(4<<20, compression.Zstd))
		d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: 1000 * time.Hour, WritebackPeriod: 1000 * time.Hour, DirtyExpire: 1000 * time.Hour})
		before := f.Counts()
		syncing, proceed := make(chan struct{}), make(chan struct{})
		var once sync.Once
		f.SetHook(func(o disktest.Op) {
			if o.Kind == disktest.Sync {
				once.Do(func() {
					close(syncing)
					<-proceed
				})
			}
		})
		var wg sync.WaitGroup
		flush := func(i int) {
			wg.Go(func() {
				if _, err := d.WriteAt([]byte{1, byte(i)}, int64(i)*block.Size); err != nil {
					t.Error(err)
				}
				if err := d.Sync(); err != nil {
					t.Error(err)
				}
			})
		}
		flush(0)
		<-syncing
		for i := range clients {
			flush(i + 1)
		}
		synctest.Wait() // until all of them wait
		close(proceed)
		wg.Wait()
		if c := f.Counts().Sub(before); c.Syncs != 2 || c.Writes != 2 {
			t.Errorf("%d flushes at once cost %d writes and %d syncs, want 1 and 1 behind those of the first", clients, c.Writes-1, c.Syncs-1)
		}
		f.SetHook(nil)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestFailedSync: after a failed sync nothing is acknowledged any more, reads go
// on, and a restart has the last commit that is on the medium (P5).
func TestFailedSync(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour}
	d := open(t, f, o)
	model := disktest.NewModel(4 << 20)
	write := func(seq uint64, off int64) error {
		r := disktest.Request{Seq: seq, Verb: disktest.VerbWrite, Off: off, Len: 10000}
		_, err := do(t.Context(), d, r, 0, nil)
		if err == nil {
			model.Do(r)
		}
		return err
	}
	if err := write(1, 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	good := model.Commit()
	if err := write(2, 8192); err != nil {
		t.Fatal(err)
	}
	f.FailSync(1, disktest.LoseAll)
	for i := range 3 {
		if err := d.Sync(); err == nil {
			t.Fatalf("flush %d after a failed sync was answered with success", i)
		}
	}
	if err := write(3, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("write after a failed sync: %v, want EIO", err)
	}
	if err := model.Check(d); err != nil {
		t.Errorf("reads after a failed sync: %v", err)
	}
	d.Abort()
	// The host's page cache still shows what is not on the medium.
	d = open(t, f.Clone(), o)
	defer d.Abort()
	if err := model.CheckCommit(d, good); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// TestWriteGivesBack: a write that is given up gives back all that it was admitted
// for, however much of its memory was handed out; and so does one that is committed
// before all of it was, which is refused.
func TestWriteGivesBack(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(16<<20, compression.None))
	d := open(t, f, Options{CacheBytes: 4 << 20, PayloadBytes: 1 << 20, Workers: 1})
	before, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 1, 5000, 1<<20 - 2*block.Size} {
		for _, end := range []func(*Write) error{
			func(w *Write) error { w.Abort(); return errors.New("given up") },
			func(w *Write) error { return w.Commit(t.Context(), false) },
		} {
			w, err := d.PrepareWrite(t.Context(), 100, 1<<20-block.Size)
			if err != nil {
				t.Fatal(err)
			}
			if n > 0 {
				w.Next(n)
			}
			if taken := len(w.frames); taken > (n+2*block.Size)/block.Size {
				t.Errorf("%d frames taken for %d bytes", taken, n)
			}
			if end(w) == nil {
				t.Errorf("committed with memory for %d bytes", n)
			}
			if m := d.cache.Metrics(); m.Payload != 0 || m.Admitted != 0 {
				t.Errorf("%d blocks of payload and %d of dirty data are admitted still", m.Payload, m.Admitted)
			}
		}
	}
	after, err := d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.Store.ReservedBytes != before.Store.ReservedBytes {
		t.Errorf("%d bytes reserved, before %d", after.Store.ReservedBytes, before.Store.ReservedBytes)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRequestsAreCounted: what clients ask for makes the background give way, and
// what the server reads for itself does not.
func TestRequestsAreCounted(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(40*block.Size, compression.Zstd))
	d := open(t, f, smallOptions(t))
	page := make([]byte, block.Size)
	for _, x := range []struct {
		name string
		do   func() error
		n    uint64
	}{
		{"write", func() error { _, err := d.WriteAt(page, 0); return err }, 1},
		{"read", func() error { _, err := d.ReadAt(page, 0); return err }, 1},
		{"trim", func() error { return d.Trim(t.Context(), 0, block.Size, false) }, 1},
		{"zeroes", func() error { return d.WriteZeroes(t.Context(), 0, block.Size, false) }, 1},
		{"block status", func() error { return d.Allocation(t.Context(), 0, block.Size, func(uint64, bool) bool { return true }) }, 1},
		{"a read beyond the end", func() error {
			if _, err := d.Read(t.Context(), d.Bytes(), 1); !errors.Is(err, ErrRange) {
				return fmt.Errorf("answered with %v", err)
			}
			return nil
		}, 0},
		{"status", func() error { _, err := d.Status(t.Context()); return err }, 0},
		{"scrub", func() error {
			if err := d.StartScrub(0); err != nil {
				return err
			}
			d.StopScrub()
			return nil
		}, 0},
	} {
		before := d.requests.Load()
		if err := x.do(); err != nil {
			t.Errorf("%s: %v", x.name, err)
		}
		if n := d.requests.Load() - before; n != x.n {
			t.Errorf("%s counts as %d requests, want %d", x.name, n, x.n)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestDurableEpoch: what a clean end, and one in the middle of writes, leaves is what
// the next opening finds.
func TestDurableEpoch(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(1<<20, compression.None))
	o := smallOptions(t)
	for i, end := range []func(*Device) error{(*Device).Close, (*Device).Abort, (*Device).Close} {
		d := open(t, f, o)
		if _, err := d.WriteAt(noise(uint64(i), 4096), int64(i)*8192); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := end(d); err != nil {
			t.Fatal(err)
		}
		f = f.Clone()
		next := open(t, f, o)
		if got, want := d.DurableEpoch(), next.Recovery().Epoch; got != want || got == 0 {
			t.Errorf("%d: the end was at epoch %d, %d was found", i, got, want)
		}
		if err := next.Close(); err != nil {
			t.Fatal(err)
		}
		f = f.Clone()
	}
}
