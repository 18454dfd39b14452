package device

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"cnbd/delalloc"
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/pagecache"
	"cnbd/store"
)

// A Write is a write whose payload is being received.
type Write struct {
	d        *Device
	off      uint64
	n        uint64
	r        block.Range // blocks touched
	segments [][]byte
	end      uint64           // if not 0, the write is of whole blocks only while this is the size of the device
	frames   []pagecache.Ref  // of the blocks of r, as far as Next has handed them out
	edges    [2]edge          // the first and the last block, where they are written in part
	ext      []extents.Extent // of readClaimed
}

// An edge is a block that is written in part: [from, to) of its bytes. The rest
// keeps what the block had before.
type edge struct {
	block    block.Index
	from, to int
	frame    int // in Write.frames; -1: there is no such edge
}

// PrepareWrite admits a write of n bytes at off: it waits until the limits of
// dirty data and payload memory allow it, and reserves space for the worst case.
// Next hands out the memory.
// An error that wraps syscall.ENOSPC says that there is none. n > 0.
func (d *Device) PrepareWrite(ctx context.Context, off uint64, n uint32) (*Write, error) {
	if err := d.admitWrite(off, uint64(n)); err != nil {
		return nil, err
	}
	return d.prepare(ctx, off, uint64(n))
}

func (d *Device) prepare(ctx context.Context, off, n uint64) (*Write, error) {
	r := block.Covering(off, n)
	if err := d.balance(ctx, r.Len()); err != nil {
		return nil, err
	}
	if err := d.reserve(ctx, r.Len(), r); err != nil {
		d.cache.CancelDirty(r.Len())
		return nil, err
	}
	if err := d.cache.AdmitPayload(ctx, int(r.Len())); err != nil {
		d.store.Release(r.Len())
		d.cache.CancelDirty(r.Len())
		return nil, err
	}
	return d.newWrite(off, n, r), nil
}

// PrepareWritePromptly is PrepareWrite if that waits for nothing. Where it reports
// false nothing has happened.
func (d *Device) PrepareWritePromptly(off uint64, n uint32) (*Write, bool) {
	if size := d.Bytes(); d.opts.ReadOnly || off > size || uint64(n) > size-off {
		return nil, false
	}
	r := block.Covering(off, uint64(n))
	if !d.cache.TryBalanceDirty(r.Len()) {
		return nil, false
	}
	if !d.store.TryReserve(r.Len(), wanted(r.Len())) {
		d.cache.CancelDirty(r.Len())
		return nil, false
	}
	if !d.cache.TryAdmitPayload(int(r.Len())) {
		d.store.Release(r.Len())
		d.cache.CancelDirty(r.Len())
		return nil, false
	}
	d.requests.Add(1)
	return d.newWrite(off, uint64(n), r), true
}

// newWrite returns the write of n bytes at off, which has been admitted.
func (d *Device) newWrite(off, n uint64, r block.Range) *Write {
	w := d.writes.Get().(*Write)
	w.off, w.n, w.r, w.frames, w.segments = off, n, r, w.frames[:0], w.segments[:0]
	head, tail := w.ends()
	w.edges = [2]edge{{frame: -1}, {frame: -1}}
	last := int(r.Len()) - 1
	switch {
	case last == 0 && (head > 0 || tail < block.Size):
		w.edges[0] = edge{r.Start, head, tail, 0}
	case last > 0:
		if head > 0 {
			w.edges[0] = edge{r.Start, head, block.Size, 0}
		}
		if tail < block.Size {
			w.edges[1] = edge{r.End - 1, 0, tail, last}
		}
	}
	return w
}

// ends is where the payload begins in its first block, and where it ends in its
// last one.
func (w *Write) ends() (head, tail int) {
	return int(w.off % block.Size), int((w.off+w.n-1)%block.Size) + 1
}

// balance waits for the dirty limit.
func (d *Device) balance(ctx context.Context, n block.Count) error {
	err := d.cache.BalanceDirty(ctx, n)
	if err != nil && d.store.Err() != nil {
		return fmt.Errorf("device: %w: %w", syscall.EIO, err)
	}
	return err
}

// reserve reserves space for n blocks, all in those ranges. When there is none it
// waits until what was overwritten has come back, before it gives up.
func (d *Device) reserve(ctx context.Context, n block.Count, in ...block.Range) error {
	w := wanted(n)
	for {
		err := d.store.Reserve(n, w)
		if err == nil || !errors.Is(err, store.ErrNoSpace) {
			return d.noSpace(err)
		}
		err = d.store.MakeRoom(ctx, n, w)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return ctx.Err()
		case w < store.Overwriting && errors.Is(err, store.ErrNoSpace) && !errors.Is(err, store.ErrHostFull) && d.allStored(in):
			w = store.Overwriting
		default:
			return d.noSpace(err)
		}
	}
}

// wanted is what a reservation of n blocks is for, as long as nobody knows better.
func wanted(n block.Count) store.Want {
	if n <= store.SmallBlocks {
		return store.SmallGrowth
	}
	return store.Growth
}

// allStored tells whether the store has data for all blocks of the ranges.
func (d *Device) allStored(in []block.Range) bool {
	view := d.store.View()
	defer d.store.Unview(view)
	for _, r := range in {
		list, err := d.store.Lookup(r, nil)
		if err != nil || slices.ContainsFunc(list, func(e extents.Extent) bool { return e.Kind != extents.Data }) {
			return false
		}
	}
	return true
}

func (d *Device) noSpace(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, store.ErrNoSpace):
		return fmt.Errorf("device: %w: %w", syscall.ENOSPC, err)
	}
	return fmt.Errorf("device: %w: %w", syscall.EIO, err)
}

// Next hands out the memory for the following bytes of the payload, in order: for
// n of them, and on to the end of a block, but not beyond the payload. It is the
// caller's to fill until Commit, which wants all of it handed out, or Abort. Next
// does not block: all memory was promised before, and is taken only here, so a
// client that announces much and sends nothing occupies none. n > 0.
func (w *Write) Next(n int) [][]byte {
	from := len(w.frames)
	left := int(w.r.Len()) - from
	if left == 0 {
		return nil
	}
	head, tail := w.ends()
	if from > 0 {
		head = 0
	}
	take := min(left, (head+n+block.Size-1)/block.Size)
	w.frames = w.d.cache.TakePayload(take, w.frames)
	for _, f := range w.frames[from:] {
		w.segments = append(w.segments, w.d.cache.Bytes(f))
	}
	next := w.segments[from:]
	if take == left {
		next[take-1] = next[take-1][:tail]
	}
	next[0] = next[0][head:]
	return next
}

// Abort gives everything back; nothing has changed.
func (w *Write) Abort() {
	w.d.cache.FreePayload(w.frames)
	w.d.cache.CancelPayload(int(w.r.Len()) - len(w.frames))
	w.giveUp()
}

// giveUp gives admission and reservation back.
func (w *Write) giveUp() {
	w.d.store.Release(w.r.Len())
	w.d.cache.CancelDirty(w.r.Len())
	w.recycle()
}

func (w *Write) recycle() {
	clear(w.segments)
	w.frames, w.end = w.frames[:0], 0
	w.d.writes.Put(w)
}

// Commit makes the payload the contents of the range, in one epoch. It reads what
// blocks that are written in part had before. With fua it is durable when Commit
// returns nil.
func (w *Write) Commit(ctx context.Context, fua bool) error {
	d := w.d
	if len(w.frames) < int(w.r.Len()) {
		w.Abort()
		return fmt.Errorf("device: commit of a write of %d bytes whose memory was not all handed out", w.n)
	}
	if err := w.install(ctx, block.Range{}); err != nil {
		w.Abort()
		return err
	}
	w.recycle()
	if fua {
		return d.Flush(ctx)
	}
	return nil
}

// CommitPromptly is Commit without fua, if that waits for nothing: a write of whole
// blocks need not know what they had before. Where it reports false nothing has
// happened, and w is still to be ended.
func (w *Write) CommitPromptly() bool {
	if len(w.frames) < int(w.r.Len()) || w.edges[0].frame >= 0 || w.edges[1].frame >= 0 {
		return false
	}
	if err := w.install(context.Background(), block.Range{}); err != nil {
		return false
	}
	w.recycle()
	return true
}

// install publishes the frames of w and the hole, all in one epoch. w may have
// gaps where the hole is: then w.frames are just the edges.
func (w *Write) install(ctx context.Context, hole block.Range) error {
	d := w.d
	var old [2]oldBlock
	defer func() {
		for i := range old {
			old[i].release(d)
		}
	}()
	for {
		// What the edges had before is read outside of the epoch and the lock. All
		// of it is given up first: with a claim of the second block held, waiting
		// for somebody who has claimed the first could be for ever.
		for i := range old {
			old[i].release(d)
		}
		for i, e := range w.edges {
			if e.frame < 0 {
				continue
			}
			var err error
			if old[i], err = w.readOld(ctx, e); err != nil {
				return err
			}
		}
		owner := d.owners.Add(1)
		epoch := d.epochs.Enter()
		epoch.State.Lock(w.r, owner)
		if w.end != 0 && d.Bytes() != w.end {
			epoch.State.Unlock(w.r, owner, 0, 0)
			d.epochs.Leave()
			return errGrown
		}
		stands := true
		for i, e := range w.edges {
			stands = stands && (e.frame < 0 || old[i].stands(d, e.block))
		}
		if !stands {
			epoch.State.Unlock(w.r, owner, 0, 0)
			d.epochs.Leave()
			d.metrics.rmwRetries.Add(1)
			continue
		}
		for _, e := range w.edges {
			if e.frame >= 0 {
				d.metrics.rmws.Add(1)
			}
		}
		var spare block.Count
		if hole.Empty() {
			for i, f := range w.frames {
				if d.cache.Install(w.r.Start+block.Index(i), f, epoch.Number) {
					spare++
				}
			}
			epoch.State.Unlock(w.r, owner, extents.Delalloc, extents.DirtyHole)
		} else {
			spare = w.installAround(epoch, owner, hole)
		}
		epoch.Touch(time.Now())
		d.epochs.Leave()
		d.store.Release(spare)
		d.flusher.Dirtied()
		if d.cache.OverBackground() {
			// Install has called for it too, but while this range was locked, and all of
			// what is dirty may be in it.
			d.flusher.Kick()
		}
		return nil
	}
}

// errGrown says that the device has another end by now than the write was made for.
var errGrown = errors.New("device: grown")

// installAround publishes the edges of w and the hole between them. The caller
// holds the range lock of w.r, which covers both.
func (w *Write) installAround(epoch *delalloc.Epoch, owner uint64, hole block.Range) (spare block.Count) {
	d := w.d
	d.epochs.Trimmed(epoch)
	dropped, _ := d.cache.InstallHole(hole, epoch.Number)
	spare = dropped
	for _, e := range w.edges {
		if e.frame >= 0 && d.cache.Install(e.block, w.frames[e.frame], epoch.Number) {
			spare++
		}
	}
	for _, r := range []block.Range{{Start: w.r.Start, End: hole.Start}, {Start: hole.End, End: w.r.End}} {
		epoch.State.Unlock(r, owner, extents.Delalloc, extents.DirtyHole)
	}
	epoch.State.Unlock(hole, owner, extents.DirtyHole, extents.Delalloc)
	return spare
}

// An oldBlock is what a block had before a write of a part of it, with the means
// to tell whether it still has: a pinned page, or a claim that a write withdraws,
// or nothing for a block in a pending hole.
type oldBlock struct {
	ref    pagecache.Ref
	claim  pagecache.Claim
	status pagecache.Status
	held   bool
}

// readOld reads what block e.block has beside e into its frame, for a
// read-modify-write.
func (w *Write) readOld(ctx context.Context, e edge) (o oldBlock, err error) {
	d := w.d
	for {
		ref, cl, status := d.cache.Get(e.block)
		switch status {
		case pagecache.Hit:
			w.keep(e, d.cache.Bytes(ref))
			return oldBlock{ref: ref, status: status, held: true}, nil
		case pagecache.Hole:
			w.keep(e, zeroPage[:])
			return oldBlock{status: status}, nil
		case pagecache.Filling:
			if err := d.cache.WaitFill(ctx, e.block); err != nil {
				return o, err
			}
			continue
		}
		// The claim is kept, and not filled: it stands until somebody writes the block.
		err := w.readClaimed(e, cl)
		if err == errLate {
			continue
		}
		if err != nil {
			return o, err
		}
		return oldBlock{claim: cl, status: status, held: true}, nil
	}
}

// keep makes old the contents of e.block beside e.
func (w *Write) keep(e edge, old []byte) {
	page := w.d.cache.Bytes(w.frames[e.frame])
	copy(page[:e.from], old[:e.from])
	copy(page[e.to:], old[e.to:])
}

// errLate says that a write has overtaken a claim before it was looked up.
var errLate = errors.New("device: late")

// readClaimed is readOld from the store. The claim is of e.block, and stays unless
// there is an error, errLate among them.
func (w *Write) readClaimed(e edge, cl pagecache.Claim) (err error) {
	d := w.d
	defer func() {
		if err != nil {
			d.cache.Abandon(cl)
		}
	}()
	d.metrics.misses.Add(1)
	view := d.store.View()
	defer d.store.Unview(view)
	w.ext, err = d.store.Lookup(block.Span(e.block, 1), w.ext[:0])
	d.metrics.lookups.Add(1)
	if err != nil {
		return fmt.Errorf("device: %w: %w", syscall.EIO, err)
	}
	if !d.cache.Stands(cl) {
		d.metrics.late.Add(1)
		return errLate // see reading.standing
	}
	switch x := w.ext[0]; x.Kind {
	case extents.Hole:
		w.keep(e, zeroPage[:])
		return nil
	case extents.Data:
		blob, buf, err := d.decode(x.Addr)
		if err != nil {
			return err
		}
		defer d.scratch.Put(buf)
		w.keep(e, pageOf(blob, x, e.block))
		return nil
	}
	return fmt.Errorf("device: block %d was damaged in the store, and can be written as a whole only: %w", e.block, syscall.EIO)
}

// stands tells whether block b still has what o says. REQUIRES: its range lock.
func (o *oldBlock) stands(d *Device, b block.Index) bool {
	if o.status == pagecache.Claimed {
		return d.cache.Stands(o.claim)
	}
	ref, cl, status := d.cache.Get(b)
	switch status {
	case pagecache.Hit:
		d.cache.Unpin(ref)
	case pagecache.Claimed:
		d.cache.Abandon(cl)
	}
	return status == o.status && ref == o.ref
}

// release gives up what o holds.
func (o *oldBlock) release(d *Device) {
	if !o.held {
		return
	}
	o.held = false
	if o.status == pagecache.Claimed {
		d.cache.Abandon(o.claim)
	} else {
		d.cache.Unpin(o.ref)
	}
}

// dirtyRangesMax bounds the memory of the state tree, and rangeBytes, which is more
// than the record of one takes, the part of the log's reserve that trims use before
// anybody looks: trims and writes of single blocks far from each other are committed
// when there are so many.
const (
	dirtyRangesMax = 64 << 10
	rangeBytes     = 64
)

// rangesMax is the number of dirty ranges from which on trims have them committed.
func (d *Device) rangesMax() int {
	g := d.store.Geometry()
	return min(dirtyRangesMax, int(g.SegmentSize)/rangeBytes)
}

// Trim makes the whole blocks inside [off, off+n) read as zeros and frees their
// space; the parts of blocks at the edges keep their data. It is answered at
// once whatever the range; with fua it is durable. ENOSPC says that nothing has
// changed: on a host that is full there is not even room for what a checkpoint
// would append of the map.
func (d *Device) Trim(ctx context.Context, off, n uint64, fua bool) error {
	if err := d.admitWrite(off, n); err != nil {
		return err
	}
	if r := block.Within(off, n); !r.Empty() {
		if err := d.trim(ctx, r); err != nil {
			return err
		}
	}
	if fua {
		return d.Flush(ctx)
	}
	return nil
}

// trim makes r a hole.
func (d *Device) trim(ctx context.Context, r block.Range) error {
	d.trimming.Add(1)
	defer d.trimming.Add(-1)
	if err := d.bound(ctx, true); err != nil {
		return err
	}
	w := d.writes.Get().(*Write)
	defer w.recycle()
	w.r, w.frames, w.segments = r, w.frames[:0], w.segments[:0]
	w.edges = [2]edge{{frame: -1}, {frame: -1}}
	return w.install(ctx, r)
}

// bound commits when the state tree has grown too large. It waits for checkpoints
// when there is much that they have to work off, and when so little room is left that
// the log needs it for them: trims do not reserve any. If they and cleaning do not
// make room the error wraps ENOSPC. advice is for what may be left undone.
func (d *Device) bound(ctx context.Context, advice bool) error {
	if err := d.store.WaitOverlay(); err != nil {
		return fmt.Errorf("device: %w: %w", syscall.EIO, err)
	}
	if d.store.Short() {
		if err := d.makeRoom(ctx, advice); err != nil {
			return err
		}
	}
	if d.epochs.Open().State.Ranges() < d.rangesMax() {
		return nil
	}
	return d.Flush(ctx)
}

// makeRoom takes checkpoints and cleans, until what has changed of the map so far has
// room, one caller at a time. Advice is left undone while that has just been in vain.
func (d *Device) makeRoom(ctx context.Context, advice bool) error {
	d.room.Lock()
	defer d.room.Unlock()
	if !d.store.Short() {
		return nil
	}
	if advice && time.Since(d.room.failed) < roomRetry {
		return d.noSpace(store.ErrNoSpace)
	}
	err := d.store.MakeRoom(ctx, 0, store.Trimming)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !errors.Is(err, store.ErrNoSpace) {
		d.room.failed = time.Time{}
		return d.noSpace(err)
	}
	if d.room.failed.IsZero() {
		d.opts.Warn("trims are left undone until there is space for what they change of the map", err)
	}
	d.room.failed = time.Now()
	return d.noSpace(err)
}

// roomRetry is how long trims are refused without another try when one was in vain:
// what could be cleaned is read for it.
const roomRetry = time.Second

// WriteZeroes makes [off, off+n) read as zeros: whole blocks become holes, and
// the parts of blocks at the edges are written. It happens in one epoch.
func (d *Device) WriteZeroes(ctx context.Context, off, n uint64, fua bool) error {
	if err := d.admitWrite(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	for {
		if err := d.writeZeroes(ctx, off, n); err != errGrown {
			if err == nil && fua {
				err = d.Flush(ctx)
			}
			return err
		}
	}
}

// writeZeroes is WriteZeroes without fua. The error errGrown asks for another try.
func (d *Device) writeZeroes(ctx context.Context, off, n uint64) error {
	d.trimming.Add(1)
	defer d.trimming.Add(-1)
	if err := d.bound(ctx, false); err != nil {
		return err
	}
	inner := block.Within(off, n)
	if inner.Empty() {
		// One or two blocks, each in part.
		w, err := d.prepare(ctx, off, n)
		if err != nil {
			return err
		}
		for _, s := range w.Next(int(n)) {
			clear(s)
		}
		return w.Commit(ctx, false)
	}
	head := off % block.Size
	tail := (off + n) % block.Size
	end := uint64(0)
	if off+n == d.Bytes() && tail != 0 {
		// Nothing lies behind the end, as long as it is that.
		inner.End, tail, end = inner.End+1, 0, off+n
	}
	w := d.writes.Get().(*Write)
	w.r, w.frames, w.segments = block.Covering(off, n), w.frames[:0], w.segments[:0]
	w.edges, w.end = [2]edge{{frame: -1}, {frame: -1}}, end
	edges := 0
	var in [2]block.Range
	if head != 0 {
		w.edges[0] = edge{w.r.Start, int(head), block.Size, edges}
		in[edges] = block.Span(w.r.Start, 1)
		edges++
	}
	if tail != 0 {
		w.edges[1] = edge{w.r.End - 1, 0, int(tail), edges}
		in[edges] = block.Span(w.r.End-1, 1)
		edges++
	}
	if edges > 0 {
		if err := d.balance(ctx, block.Count(edges)); err != nil {
			w.recycle()
			return err
		}
		err := d.reserve(ctx, block.Count(edges), in[:edges]...)
		if err == nil {
			if w.frames, err = d.cache.AllocPayload(ctx, edges, w.frames); err != nil {
				d.store.Release(block.Count(edges))
			}
		}
		if err != nil {
			d.cache.CancelDirty(block.Count(edges))
			w.recycle()
			return err
		}
		for _, f := range w.frames {
			clear(d.cache.Bytes(f))
		}
	}
	if err := w.install(ctx, inner); err != nil {
		d.cache.FreePayload(w.frames)
		d.store.Release(block.Count(edges))
		d.cache.CancelDirty(block.Count(edges))
		w.recycle()
		return err
	}
	w.recycle()
	return nil
}
