package device

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// crashHistories is how many histories each of the two tests of power cuts runs
// at least. At a CNBD_TEST_SCALE of 1000 they are 10,000 together.
const crashHistories = 5

// powerCuts are histories of one device under power cuts. Each is run once over a
// recording disk; then what a cut at each operation of that disk would have left
// is opened and judged. The next one goes on from there.
type powerCuts struct {
	rng  *rand.Rand
	size int64 // of the device
	opts Options
	disk *disktest.Disk // of the history being run, recording
	from int64          // its first operation that can be cut
	thin bool           // there is less than it shows, so writes are refused

	mu    sync.Mutex
	kills []kill // guarded by mu; what the history has gone through

	decoder         *compression.Decoder
	stored, decoded [store.ExtentBlocksMax * block.Size]byte // scratch

	histories, cuts, recoveries int
	stats                       store.Stats // sums of some of its counters
	frozen                      uint64      // blocks changed between the freeze of what they had and its hand-off
	refused                     uint64      // requests for which there was no space
}

// A kill is the disk that is found, with no power cut, when the process was killed
// at operation at.
type kill struct {
	disk *disktest.Disk
	at   int64
}

// thinBlocks is the size of a thin device, which is a bit more than what fits into the
// smallest capacity; thinStep the bytes of the requests that fill it.
const (
	thinBlocks = 256
	thinStep   = 16 * block.Size
)

// newPowerCuts formats a device of some blocks and a bit. A quarter of them are thin.
func newPowerCuts(t *testing.T, seed uint64, blocks, bit int64) *powerCuts {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	thin := seed%4 == 1
	if thin {
		blocks = thinBlocks
	}
	p := &powerCuts{rng: rng, thin: thin, size: blocks*block.Size + bit, decoder: compression.NewDecoder(1)}
	t.Cleanup(p.decoder.Close)
	p.opts = Options{CacheBytes: block.Size * 8 << rng.IntN(4), PayloadBytes: 128 * block.Size, MapCacheBytes: 32 << 10, Workers: 2, zeroCommits: 1 + rng.IntN(4),
		CheckpointBytes: 4 << 10 << rng.IntN(5), CommitInterval: 300 * time.Microsecond << rng.IntN(4),
		WritebackPeriod: 200 * time.Microsecond, DirtyExpire: 300 * time.Microsecond << rng.IntN(4), CleanPeriod: 100 * time.Microsecond << rng.IntN(6), PackAfter: 100 * time.Microsecond << rng.IntN(10)}
	codec := []compression.Codec{compression.Zstd, compression.S2, compression.None}[rng.IntN(3)]
	if thin {
		codec = compression.None
	}
	g := testGeometry(uint64(p.size), codec)
	g.ExtentBlocks = 4 << rng.IntN(4)
	g.Capacity = 24 * store.SegmentSizeMin
	o := disktest.Options{SectorSize: []int{512, 4096}[rng.IntN(2)]}
	switch {
	case thin && rng.IntN(2) == 0: // it is the host that has less
		o.Capacity = 1<<20 + 13*store.SegmentSizeMin
	case thin:
		g.Capacity = store.MinCapacity(store.SegmentSizeMin)
	}
	f := disktest.New(seed, o)
	format(t, f, g)
	if rng.IntN(4) == 0 && !thin {
		f = p.age(t, f)
	}
	p.begin(f)
	return p
}

// age has the device filled and emptied so often that segments of the log are
// used again, which are full of records of an earlier life (rule R2).
func (p *powerCuts) age(t *testing.T, f *disktest.Disk) *disktest.Disk {
	t.Helper()
	all := make([]byte, p.size)
	for i := range 8 + p.rng.IntN(8) {
		d := open(t, f, p.opts)
		rand.NewChaCha8([32]byte{byte(i)}).Read(all)
		if _, err := d.WriteAt(all, 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Trim(t.Context(), 0, uint64(p.size), true); err != nil {
			t.Fatal(err)
		}
		// The last block may be there in part, which TRIM leaves alone.
		if err := d.WriteZeroes(t.Context(), 0, uint64(p.size), true); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		f = f.Crash(disktest.LoseAll)
	}
	return f
}

func (p *powerCuts) begin(f *disktest.Disk) {
	p.histories++
	p.disk, p.from, p.kills = f, f.Ops(), nil
	f.Record()
	// Before a sync the log shows more than is durable.
	f.SetHook(func(op disktest.Op) {
		if op.Kind == disktest.Sync {
			k := kill{f.Clone(), f.Ops()}
			k.disk.SetCapacity(0)
			p.mu.Lock()
			p.kills = append(p.kills, k)
			p.mu.Unlock()
		}
	})
}

// end ends a history in which no power cut has happened, with or without a commit.
func (p *powerCuts) end(d *Device) error {
	st, err := d.store.Stats()
	if err != nil {
		return err
	}
	p.stats.Checkpoints += st.Checkpoints
	p.stats.Commits += st.Commits
	p.stats.LogWritten += st.LogWritten
	p.stats.Moved += st.Moved
	m := d.cache.Metrics()
	p.frozen += m.WritesFrozen + m.TrimsFrozen
	defer p.disk.SetHook(nil)
	if p.rng.IntN(2) == 0 {
		return d.Close()
	}
	return d.Abort()
}

// read opens f, reads all of the device into all, and ends as in a crash. With an
// error that is ErrPowerCut the power has gone.
func (p *powerCuts) read(f *disktest.Disk, all []byte) error {
	p.recoveries++
	o := p.opts
	o.ReadOnly = p.rng.IntN(4) == 0
	o.CommitInterval, o.WritebackPeriod, o.Workers = time.Hour, time.Hour, 1
	d, err := Open(f, o)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	_, err = d.ReadAt(all, 0)
	return errors.Join(err, d.Abort())
}

// readStore is read without what package device has around the store: the same
// recovery for a fraction of the time.
func (p *powerCuts) readStore(f *disktest.Disk, all []byte) (err error) {
	p.recoveries++
	s, err := store.Open(f, store.Options{MapCacheBytes: p.opts.MapCacheBytes, CheckpointBytes: p.opts.CheckpointBytes})
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	view := s.View()
	defer s.Unview(view)
	ext, err := s.Lookup(block.Covering(0, uint64(p.size)), nil)
	if err != nil {
		return err
	}
	clear(all)
	for _, e := range ext {
		if e.Kind == extents.Hole {
			continue
		}
		if e.Kind != extents.Data {
			return fmt.Errorf("%v is lost", e.Range())
		}
		blob := p.stored[:e.Addr.Length]
		if err := s.ReadBlob(blob, e.Addr); err != nil {
			return err
		}
		if c := compression.Codec(e.Addr.Codec); c != compression.None {
			if blob, err = p.decoder.Decode(p.decoded[:0], blob, c, int(e.Addr.Blocks)*block.Size); err != nil {
				return err
			}
		}
		copy(all[e.Start.Bytes():], blob[int(e.Skip)*block.Size:][:e.Count.Bytes()])
	}
	return nil
}

// sweep has judge tell whether the device may hold what a cut at each operation
// of the history has left. While it is opened the power goes again, and what has
// been seen once must then be there still.
func (p *powerCuts) sweep(judge func(all []byte, at int64) error) error {
	if n := p.disk.Ops() - p.from; n > 1000 {
		// Less than a hundred are usual.
		return fmt.Errorf("%d operations of the disk for some dozens of requests: something went round and round", n)
	}
	for _, k := range p.kills {
		if err := p.killed(k, judge); err != nil {
			return fmt.Errorf("killed at operation %d: %w", k.at, err)
		}
	}
	var before *disktest.Disk
	held := make([]byte, p.size) // by before
	all, again := make([]byte, p.size), make([]byte, p.size)
	for at := p.from; at <= p.disk.Ops(); at++ {
		for _, loss := range []disktest.Loss{disktest.LoseAll, disktest.KeepAll, disktest.Random(p.rng.Uint64())} {
			p.cuts++
			left := p.disk.At(at, loss)
			left.SetCapacity(0) // a full host is one that nothing opens on to write
			if loss == disktest.LoseAll && before != nil && left.Same(before) {
				if err := judge(held, at); err != nil {
					return fmt.Errorf("power cut at operation %d, %v: %w", at, loss, err)
				}
				continue
			}
			used := left.Clone()
			read := p.readStore
			if loss == disktest.LoseAll || p.rng.IntN(32) == 0 {
				read = p.read
			}
			err := read(used, all)
			if err == nil {
				err = judge(all, at)
			}
			if err == nil {
				err = p.cutAgain(left, used.Ops(), all, again)
			}
			if err != nil {
				return fmt.Errorf("power cut at operation %d, %v: %w", at, loss, err)
			}
			if loss == disktest.LoseAll {
				before = left
				copy(held, all)
			}
		}
	}
	return nil
}

// killed has judge tell whether the device may hold what was found after a kill.
// What was read then has to survive a power cut (promise P1).
func (p *powerCuts) killed(k kill, judge func(all []byte, at int64) error) error {
	p.cuts++
	all, again := make([]byte, p.size), make([]byte, p.size)
	err := p.readStore(k.disk, all)
	if err == nil {
		err = judge(all, k.at)
	}
	if err == nil {
		err = p.readStore(k.disk.Crash(disktest.LoseAll), again)
	}
	if i := differ(all, again); err == nil && i >= 0 {
		err = fmt.Errorf("after a power cut it holds something else at byte %d", i)
	}
	return err
}

// cutAgain cuts the power in one of the ops operations of opening and reading
// left, which held all. got is scratch.
func (p *powerCuts) cutAgain(left *disktest.Disk, ops int64, all, got []byte) error {
	again := left.Clone()
	at := p.rng.Int64N(ops + 1)
	again.CutAt(at)
	if err := p.readStore(again, got); err == nil {
		if i := differ(got, all); i >= 0 {
			return fmt.Errorf("opened a second time it holds something else at byte %d", i)
		}
	} else if !errors.Is(err, disktest.ErrPowerCut) {
		return fmt.Errorf("opened again until the power goes at operation %d: %w", at, err)
	}
	if err := p.readStore(again.Crash(disktest.Random(p.rng.Uint64())), got); err != nil {
		return fmt.Errorf("after a cut at operation %d of the recovery: %w", at, err)
	}
	if i := differ(got, all); i >= 0 {
		return fmt.Errorf("after a cut at operation %d of the recovery it holds something else at byte %d", at, i)
	}
	return nil
}

// next begins another history with what a cut somewhere in this one has left, and
// tells what that holds.
func (p *powerCuts) next() (all []byte, at int64, err error) {
	at = p.from + p.rng.Int64N(p.disk.Ops()-p.from+1)
	left := p.disk.At(at, disktest.Random(p.rng.Uint64()))
	left.SetCapacity(0)
	all = make([]byte, p.size)
	err = p.read(left.Clone(), all)
	p.begin(left)
	return all, at, err
}

// runPowerCuts has f run histories of one device after the other.
func runPowerCuts(t *testing.T, f func(t *testing.T, seed uint64) (*powerCuts, error)) {
	seed := disktest.Seed(t)
	var sum powerCuts
	start := time.Now()
	histories := crashHistories * disktest.Scale(t)
	if disktest.Scale(t) > 1 {
		histories *= 10 // a long run: 10,000 in both tests at the scale of `make test-long`
	}
	for ; sum.histories < histories || sum.refused == 0 && sum.histories < histories+200; seed++ {
		p, err := f(t, seed)
		if err != nil {
			t.Fatalf("CNBD_SEED=%d, history %d of the device: %v", seed, p.histories, err)
		}
		sum.histories += p.histories
		sum.cuts += p.cuts
		sum.recoveries += p.recoveries
		sum.stats.Commits += p.stats.Commits
		sum.stats.Checkpoints += p.stats.Checkpoints
		sum.stats.LogWritten += p.stats.LogWritten
		sum.stats.Moved += p.stats.Moved
		sum.frozen += p.frozen
		sum.refused += p.refused
	}
	t.Logf("%d histories, %d power cuts, %d recoveries; %d commits, %d checkpoints, %d MiB of log, %d KiB moved, %d frozen blocks changed, %d requests refused; %v", sum.histories,
		sum.cuts, sum.recoveries, sum.stats.Commits, sum.stats.Checkpoints, sum.stats.LogWritten>>20, sum.stats.Moved>>10, sum.frozen, sum.refused, time.Since(start).Round(time.Millisecond))
	if sum.histories > 50 && sum.stats.Checkpoints == 0 {
		t.Error("no history reached a checkpoint")
	}
	if sum.refused == 0 {
		t.Error("no request was refused for want of space")
	}
}

// refuses tells whether err, of a request of this verb, says that there is no space,
// and counts that. A thin device may say so to what writes (promise P4).
func (p *powerCuts) refuses(v disktest.Verb, err error) bool {
	if !p.thin || !errors.Is(err, syscall.ENOSPC) || v != disktest.VerbWrite && v != disktest.VerbZeroes {
		return false
	}
	p.mu.Lock()
	p.refused++
	p.mu.Unlock()
	return true
}

// TestPowerCutOneClient: one connection with requests of any alignment. After a
// cut the device has the state after some prefix of the requests, which contains
// all that was answered before the last answered flush was sent. In half of the
// histories nothing commits by itself: then it has the state at a flush.
func TestPowerCutOneClient(t *testing.T) {
	t.Parallel()
	runPowerCuts(t, oneClient)
}

func oneClient(t *testing.T, seed uint64) (*powerCuts, error) {
	p := newPowerCuts(t, seed, 48+rand.New(rand.NewPCG(seed, 0)).Int64N(64), 1536)
	model := disktest.NewModel(p.size)
	hist := disktest.NewHistory(seed, disktest.HistoryOptions{Size: p.size, RequestMax: 32 << 10})
	quiet := seed%2 == 0
	if quiet {
		p.opts.CommitInterval, p.opts.CheckpointBytes, p.opts.CleanPeriod = time.Hour, 1<<30, time.Hour
	}
	type mark struct {
		at    int64 // the operation of the disk after which it was durable
		point int   // of the model
	}
	for n := 1; ; n++ {
		durable := []mark{{0, model.Commit()}}
		d, err := Open(p.disk, p.opts)
		if err != nil {
			return p, err
		}
		for i := int64(0); i < 16+p.rng.Int64N(24); i++ {
			r := hist.Next()
			if p.thin && n == 1 && p.refused == 0 {
				r.Verb, r.Content, r.Off, r.Len = disktest.VerbWrite, disktest.Described, i*thinStep%p.size, thinStep
				r.Len = min(r.Len, p.size-r.Off)
			}
			if _, err := do(t.Context(), d, r, 0, nil); p.refuses(r.Verb, err) {
				continue // nothing has changed
			} else if err != nil {
				return p, fmt.Errorf("%v: %w", r, err)
			}
			model.Do(r)
			flushed := r.Verb == disktest.VerbFlush || r.FUA
			if quiet && !flushed {
				continue
			}
			if point := model.Commit(); flushed {
				durable = append(durable, mark{p.disk.Ops(), point})
			}
		}
		model.Commit() // of Close
		if err := p.end(d); err != nil {
			return p, err
		}
		oldest := func(at int64) (point int) {
			for _, m := range durable {
				if m.at <= at {
					point = m.point
				}
			}
			return point
		}
		if err := p.sweep(func(all []byte, at int64) error {
			_, err := model.Find(bytes.NewReader(all), oldest(at))
			return err
		}); err != nil || n == 3 {
			return p, err
		}
		all, at, err := p.next()
		if err != nil {
			return p, err
		}
		point, err := model.Find(bytes.NewReader(all), oldest(at))
		if err != nil {
			return p, err
		}
		model.Revert(point)
	}
}

// TestPowerCutManyClients: several connections write, trim and flush the same
// blocks at the same time. After a cut one moment of the history explains the
// whole device.
func TestPowerCutManyClients(t *testing.T) {
	t.Parallel()
	runPowerCuts(t, manyClients)
}

func manyClients(t *testing.T, seed uint64) (*powerCuts, error) {
	p := newPowerCuts(t, seed, 32+int64(seed%64), 0)
	blocks := int(p.size / block.Size)
	log := disktest.NewCutLog(disktest.CutOptions{Seed: seed, Blocks: blocks, Now: func() int64 { return p.disk.Ops() }})
	for n := 1; ; n++ {
		d, err := Open(p.disk, p.opts)
		if err != nil {
			return p, err
		}
		for at := 0; p.thin && n == 1 && p.refused == 0; at = (at + 16) % blocks {
			op := log.Send(0, disktest.VerbWrite, block.Span(block.Index(at), 16), false)
			if err := p.do(t.Context(), d, log, op); err != nil {
				return p, errors.Join(err, d.Abort())
			}
		}
		errs := make([]error, 2+p.rng.IntN(3))
		var wg sync.WaitGroup
		for c := range errs {
			rng := rand.New(rand.NewPCG(p.rng.Uint64(), 0))
			wg.Go(func() { errs[c] = p.client(t.Context(), d, log, rng, c, blocks) })
		}
		stop := make(chan struct{})
		var beside sync.WaitGroup
		beside.Go(func() { stall(d, stop) })
		if p.rng.IntN(2) == 0 {
			beside.Go(func() { compact(d, stop) })
		}
		wg.Wait()
		close(stop)
		beside.Wait()
		if err := errors.Join(errs...); err != nil {
			return p, errors.Join(err, d.Abort())
		}
		if err := p.end(d); err != nil {
			return p, err
		}
		if err := p.sweep(func(all []byte, at int64) error {
			err := log.CheckAt(bytes.NewReader(all), at)
			if err != nil {
				t.Logf("what was recorded:\n%s", log.Dump(bytes.NewReader(all), at))
			}
			return err
		}); err != nil || n == 3 {
			return p, err
		}
		all, _, err := p.next()
		if err != nil {
			return p, err
		}
		if err := log.Restart(bytes.NewReader(all)); err != nil {
			return p, err
		}
	}
}

// stall has commits stop between freezing their epoch and handing it off, for
// longer than they would, so that requests of the next epoch come in between: it
// keeps the lock of the first dirty block beyond its epoch, as no request does.
func stall(d *Device, stop chan struct{}) {
	owner := d.owners.Add(1)
	for {
		select {
		case <-stop:
			return
		default:
		}
		e := d.epochs.Enter()
		first, _, dirty := e.State.Find(0, extents.Delalloc|extents.DirtyHole, 1)
		if dirty {
			e.State.Lock(first, owner)
		}
		d.epochs.Leave()
		time.Sleep(50 * time.Microsecond)
		if dirty {
			e.State.Unlock(first, owner, 0, 0)
		}
		time.Sleep(100 * time.Microsecond) // for who waits
	}
}

// compact has the cleaner at work beside the clients: now and then, for its
// checkpoints are operations of the disk, each of which is cut.
func compact(d *Device, stop chan struct{}) {
	for range 3 {
		select {
		case <-stop:
			return
		default:
		}
		if d.store.Compact(context.Background(), nil) != nil {
			return // the history ends with the same
		}
	}
}

// client is one connection of a history: some requests, one after the other.
func (p *powerCuts) client(ctx context.Context, d *Device, log *disktest.CutLog, rng *rand.Rand, client, blocks int) error {
	for range 4 + rng.IntN(8) {
		verb := disktest.VerbWrite
		switch n := rng.IntN(20); {
		case n < 2:
			verb = disktest.VerbTrim
		case n < 4:
			verb = disktest.VerbZeroes
		case n < 7:
			verb = disktest.VerbFlush
		}
		n := 1 + rng.IntN(1<<rng.IntN(5))
		if verb == disktest.VerbTrim && rng.IntN(4) == 0 {
			n = blocks
		}
		start := rng.IntN(blocks - n + 1)
		if rng.IntN(2) == 0 {
			start = min(start, rng.IntN(8)) // where the others are
		}
		r := block.Span(block.Index(start), block.Count(n))
		fua := verb != disktest.VerbFlush && rng.IntN(16) == 0
		if err := p.do(ctx, d, log, log.Send(client, verb, r, fua)); err != nil {
			return err
		}
	}
	return nil
}

// do carries op out on the device and notes the answer.
func (p *powerCuts) do(ctx context.Context, d *Device, log *disktest.CutLog, op *disktest.CutOp) error {
	switch err := doCut(ctx, d, op); {
	case err == nil:
		log.Answer(op)
	case p.refuses(op.Verb, err):
		log.Refuse(op)
	default:
		return fmt.Errorf("%v: %w", op, err)
	}
	return nil
}

// doCut carries op out on the device.
func doCut(ctx context.Context, d *Device, op *disktest.CutOp) error {
	off, n := op.Range.Start.Bytes(), op.Range.Len().Bytes()
	switch op.Verb {
	case disktest.VerbTrim:
		return d.Trim(ctx, off, n, op.FUA)
	case disktest.VerbZeroes:
		return d.WriteZeroes(ctx, off, n, op.FUA)
	case disktest.VerbFlush:
		return d.Flush(ctx)
	}
	return write(ctx, d, off, op.Payload(nil), block.Size, op.FUA)
}
