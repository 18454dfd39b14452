package delalloc

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/asyncq"
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/buffer"
	"cnbd/internal/compression"
)

// A fakePages is a page cache without a limit, as simple as can be, that holds
// its user to what package pagecache says of hand-off and end of writeback.
type fakePages struct {
	t testing.TB

	// keep spares the bytes of pages whose writeback has ended. Set before use.
	keep bool
	// locked is called after each LockDirty that succeeds, with nothing held.
	// Set before use.
	locked func(block.Index)
	// handedOff is called before each HandOff. Set before use.
	handedOff func(b block.Index, epoch uint64)
	// frozen is called by HoleSeq. Set before use.
	frozen func()

	mu       sync.Mutex // guards all below
	versions []version  // by Frame-1
	visible  map[block.Index]buffer.Frame
	dirty    map[dirtyKey]buffer.Frame
	holes    map[block.Index]uint64 // pending ones, by their number
	seq      uint64
	held     []block.Index // by LockDirty, in the order of locking
	flying   int           // versions in writeback
	failed   int           // versions whose writeback failed
	ended    int           // calls of EndWriteback
	applied  []uint64      // the numbers that HolesApplied was called with
}

var poison = bytes.Repeat([]byte{0xDB}, block.Size)

type dirtyKey struct {
	block block.Index
	epoch uint64
}

type version struct {
	block                    block.Index
	epoch                    uint64
	data                     []byte
	dirty, locked, writeback bool
	failed                   error
}

func newFakePages(t testing.TB) *fakePages {
	return &fakePages{
		t: t, visible: make(map[block.Index]buffer.Frame), dirty: make(map[dirtyKey]buffer.Frame), holes: make(map[block.Index]uint64),
		locked: func(block.Index) {}, handedOff: func(block.Index, uint64) {}, frozen: func() {},
	}
}

// install publishes data, which is given, as block b, dirty in epoch. It reports
// whether that replaced a version dirty in the same epoch.
func (p *fakePages) install(b block.Index, data []byte, epoch uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	replaced := p.dropLocked(b, epoch)
	p.versions = append(p.versions, version{block: b, epoch: epoch, data: data, dirty: true})
	f := buffer.Frame(len(p.versions))
	p.visible[b], p.dirty[dirtyKey{b, epoch}] = f, f
	delete(p.holes, b)
	return replaced
}

// installHole makes r a pending hole, and returns how many versions dirty in
// epoch that has dropped.
func (p *fakePages) installHole(r block.Range, epoch uint64) (dropped block.Count) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq++
	for b := r.Start; b < r.End; b++ {
		p.holes[b] = p.seq
		delete(p.visible, b)
		if p.dropLocked(b, epoch) {
			dropped++
		}
	}
	return dropped
}

// drop takes away the version of b that is dirty in epoch.
func (p *fakePages) drop(b block.Index, epoch uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dropLocked(b, epoch)
}

func (p *fakePages) dropLocked(b block.Index, epoch uint64) bool {
	f, ok := p.dirty[dirtyKey{b, epoch}]
	if ok {
		delete(p.dirty, dirtyKey{b, epoch})
		p.versions[f-1].dirty = false
	}
	return ok
}

// read is the visible content of b; ok is false when the map has it.
func (p *fakePages) read(b block.Index) (data []byte, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f, ok := p.visible[b]; ok {
		return bytes.Clone(p.versions[f-1].data), true
	}
	if _, ok := p.holes[b]; ok {
		return make([]byte, block.Size), true
	}
	return nil, false
}

func (p *fakePages) LockDirty(b block.Index, epoch uint64) (buffer.Frame, bool) {
	p.mu.Lock()
	f, ok := p.dirty[dirtyKey{b, epoch}]
	if !ok || p.versions[f-1].locked {
		p.mu.Unlock()
		return 0, false
	}
	if n := len(p.held); n > 0 && p.held[n-1] >= b {
		p.t.Errorf("page %d is locked after page %d", b, p.held[n-1])
	}
	p.held = append(p.held, b)
	p.versions[f-1].locked = true
	p.mu.Unlock()
	p.locked(b)
	return f, true
}

// unlockLocked ends what LockDirty began.
func (p *fakePages) unlockLocked(f buffer.Frame, what string) *version {
	v := &p.versions[f-1]
	if !v.locked {
		p.t.Errorf("%s of page %d, which is not locked", what, v.block)
		return v
	}
	v.locked = false
	if i := slices.Index(p.held, v.block); i == 0 {
		p.held = p.held[1:]
	} else if i > 0 {
		p.held = slices.Delete(p.held, i, i+1)
	}
	return v
}

func (p *fakePages) UnlockDirty(f buffer.Frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.unlockLocked(f, "UnlockDirty")
}

func (p *fakePages) StillDirty(f buffer.Frame, epoch uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := &p.versions[f-1]
	if !v.locked {
		p.t.Errorf("StillDirty of page %d, which is not locked", v.block)
	}
	return v.dirty && v.epoch == epoch
}

func (p *fakePages) HandOff(f buffer.Frame) {
	p.mu.Lock()
	v := p.unlockLocked(f, "HandOff")
	if !v.dirty {
		p.t.Errorf("page %d of epoch %d is handed off and not dirty", v.block, v.epoch)
	}
	p.dropLocked(v.block, v.epoch)
	v.writeback = true
	p.flying++
	b, epoch := v.block, v.epoch
	p.mu.Unlock()
	p.handedOff(b, epoch)
}

func (p *fakePages) EndWriteback(f buffer.Frame, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := &p.versions[f-1]
	p.ended++
	if !v.writeback {
		p.t.Errorf("EndWriteback of page %d of epoch %d, which is not in writeback", v.block, v.epoch)
		return
	}
	v.writeback, v.failed = false, err
	p.flying--
	if err != nil {
		p.failed++
		return
	}
	if p.visible[v.block] == f {
		delete(p.visible, v.block) // evicted at once: from here on the map answers
	}
	if !p.keep {
		copy(v.data, poison) // whoever still uses it will notice
	}
}

func (p *fakePages) Bytes(f buffer.Frame) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	v := &p.versions[f-1]
	if !v.writeback {
		p.t.Errorf("Bytes of page %d of epoch %d, which is not in writeback", v.block, v.epoch)
	}
	return v.data
}

func (p *fakePages) HoleSeq() uint64 {
	p.frozen()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seq
}

func (p *fakePages) HolesApplied(r block.Range, seq uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied = append(p.applied, seq)
	for b, s := range p.holes {
		if r.Contains(b) && s <= seq {
			delete(p.holes, b)
		}
	}
}

// heldPages are the blocks of the pages that are locked.
func (p *fakePages) heldPages() []block.Index {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.held)
}

// counts are the numbers of pages dirty, locked and in writeback, and of holes
// pending.
func (p *fakePages) counts() (dirty, locked, writeback, holes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.dirty), len(p.held), p.flying, len(p.holes)
}

// A fakeLog is the store: a map of what was appended, a plain byte slice, and a
// list of what was done. Unless hold is set, what is appended is written when
// AfterWrite is called; else when a commit or AfterWrite with now asks for it, or
// when limit completions wait, by a goroutine of its own.
type fakeLog struct {
	t      testing.TB
	extent block.Index
	hold   bool
	limit  int
	decode *compression.Decoder

	// fail is asked before each operation and may give an error. Set before use.
	fail func(op string) error
	// data is called before each AppendData. Set before use.
	data func(block.Range)
	// committed is called by AppendCommit with the contents of the map.
	committed func(epoch uint64, image []byte)
	// syncing is called by each sync.
	syncing func(epoch uint64)

	busy  atomic.Bool // the ordered side is in a method
	queue chan func() // to the writer
	done  sync.WaitGroup

	mu       sync.Mutex // guards all below
	image    []byte     // what the map says, of the whole device
	events   []string
	waiting  []Completion
	released block.Count
	epoch    uint64 // the number of commits so far
	dirty    bool   // something has been appended since
	durable  uint64
	kicks    int // AfterWrite with now
	encoded  int
	raw      int
	holes    int
}

// enter and leave bracket the methods that must not overlap.
func (l *fakeLog) enter() {
	if !l.busy.CompareAndSwap(false, true) {
		l.t.Error("two methods of the log at once")
	}
}

func (l *fakeLog) leave() { l.busy.Store(false) }

func (l *fakeLog) eventLocked(format string, args ...any) {
	l.events = append(l.events, fmt.Sprintf(format, args...))
}

// codecs of the transforms below; real ones keep their numbers.
const codecXor = 200

func (l *fakeLog) AppendData(b extents.Blob) error {
	l.enter()
	defer l.leave()
	r := block.Span(b.Start, block.Count(b.Count))
	l.data(r)
	if err := l.fail("data"); err != nil {
		return err
	}
	stored := bytes.Join(b.Parts, nil)
	n := bits.OnesCount32(b.Present)
	var data []byte
	switch b.Codec {
	case 0:
		data = stored
	case codecXor:
		data = xor(nil, stored)
	default:
		var err error
		if data, err = l.decode.Decode(nil, stored, compression.Codec(b.Codec), n*block.Size); err != nil {
			l.t.Errorf("blob %v: %v", r, err)
			return nil
		}
	}
	switch {
	case b.Count == 0 || n == 0 || uint64(b.Present)>>b.Count != 0:
		l.t.Errorf("blob %v with present %b", r, b.Present)
	case r.Start/l.extent != (r.End-1)/l.extent:
		l.t.Errorf("blob %v crosses a multiple of %d", r, l.extent)
	case len(data) != n*block.Size:
		l.t.Errorf("blob %v with present %b has %d bytes", r, b.Present, len(data))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dirty = true
	kind := "encoded"
	if b.Codec == 0 {
		kind = "raw"
		l.raw++
	} else {
		l.encoded++
	}
	l.eventLocked("%s %v %0*b", kind, r, b.Count, bits.Reverse32(b.Present)>>(32-b.Count))
	for i := range int(b.Count) {
		if b.Present>>i&1 == 0 {
			l.storeLocked(b.Start+block.Index(i), zeroPage[:])
			continue
		}
		l.storeLocked(b.Start+block.Index(i), data[:block.Size])
		data = data[block.Size:]
	}
	return nil
}

func (l *fakeLog) AppendHole(r block.Range) error {
	l.enter()
	defer l.leave()
	if err := l.fail("hole"); err != nil {
		return err
	}
	if r.Empty() {
		l.t.Errorf("a record of an empty hole")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dirty = true
	l.holes++
	l.eventLocked("hole %v", r)
	for b := r.Start; b < min(r.End, block.Index(len(l.image)/block.Size)); b++ {
		l.storeLocked(b, zeroPage[:])
	}
	return nil
}

func (l *fakeLog) storeLocked(b block.Index, data []byte) {
	if b.Bytes() < uint64(len(l.image)) {
		copy(l.image[b.Bytes():], data)
	}
}

// read is what the map says of block b.
func (l *fakeLog) read(b block.Index) []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Clone(l.image[b.Bytes():][:block.Size])
}

func (l *fakeLog) AfterWrite(c Completion, now bool) error {
	l.enter()
	defer l.leave()
	if err := l.fail("after"); err != nil {
		return err
	}
	l.mu.Lock()
	if now {
		l.kicks++
		l.eventLocked("now")
	}
	l.waiting = append(l.waiting, c)
	full := !l.hold || now || len(l.waiting) == l.limit
	l.mu.Unlock()
	if full {
		l.write(nil)
	}
	return nil
}

// write tells all who wait that what was appended before is written, or why not.
func (l *fakeLog) write(err error) {
	l.mu.Lock()
	waiting := l.waiting
	l.waiting = nil
	l.mu.Unlock()
	l.queue <- func() {
		for _, c := range waiting {
			c.Written(err)
		}
	}
}

// drain returns when all that was given to the writer is written.
func (l *fakeLog) drain() {
	done := make(chan struct{})
	l.queue <- func() { close(done) }
	<-done
}

func (l *fakeLog) Release(n block.Count) {
	l.enter()
	defer l.leave()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.released += n
	l.eventLocked("release %d", n)
}

func (l *fakeLog) AppendCommit() (func() error, bool, error) {
	l.enter()
	defer l.leave()
	if err := l.fail("commit"); err != nil {
		return nil, false, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	n := l.epoch
	if l.durable != n-1 {
		l.t.Errorf("commit %d, and %d is the newest durable one", n, l.durable)
	}
	l.committed(n, l.image)
	if !l.dirty {
		l.durable = n
		return nil, false, nil
	}
	l.dirty = false
	l.eventLocked("commit %d", n)
	return func() error {
		l.write(nil)
		l.drain()
		if err := l.fail("sync"); err != nil {
			return err
		}
		l.syncing(n)
		l.mu.Lock()
		defer l.mu.Unlock()
		l.durable = n
		return nil
	}, true, nil
}

// take returns the events since the last call, without those of the given kinds.
func (l *fakeLog) take(without ...string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var events []string
next:
	for _, e := range l.events {
		for _, w := range without {
			if len(e) >= len(w) && e[:len(w)] == w {
				continue next
			}
		}
		events = append(events, e)
	}
	l.events = nil
	return events
}

// commits is the number of commits and the newest durable one.
func (l *fakeLog) commits() (n, durable uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.epoch, l.durable
}

// A fakeTransform is one of three transforms: "none" saves nothing, "xor" changes
// the bytes and not their number, "zstd" is the real thing.
type fakeTransform struct {
	t    testing.TB
	kind string
	busy []atomic.Bool // by worker

	// before is called before each Encode. It may wait or panic. Set before use.
	before func(start block.Index)

	encoders []*compression.Encoder
}

func newFakeTransform(t testing.TB, kind string, workers int) *fakeTransform {
	f := &fakeTransform{t: t, kind: kind, busy: make([]atomic.Bool, workers), before: func(block.Index) {}}
	for range workers {
		f.encoders = append(f.encoders, compression.NewEncoder())
	}
	return f
}

func (f *fakeTransform) Encode(worker int, dst, src []byte, start block.Index) ([]byte, uint8, uint8, bool) {
	if !f.busy[worker].CompareAndSwap(false, true) {
		f.t.Errorf("worker %d twice at once", worker)
	}
	defer f.busy[worker].Store(false)
	f.before(start)
	switch f.kind {
	case "xor":
		return xor(dst, src), codecXor, 0, true
	case "zstd":
		out, used, ok := f.encoders[worker].Encode(dst, src, compression.Setting{Codec: compression.Zstd, Level: 1})
		return out, uint8(used.Codec), uint8(used.Level), ok
	}
	return dst, 0, 0, false
}

func xor(dst, src []byte) []byte {
	n := len(dst)
	dst = append(dst, src...)
	subtle.XORBytes(dst[n:], src, mask[:len(src)])
	return dst
}

// mask is as long as the largest piece.
var mask = bytes.Repeat([]byte{0x5A}, 32*block.Size)

// rigOptions are those of a rig; zero values have defaults.
type rigOptions struct {
	blocks    int // of the device: 512
	extent    int // 16
	workers   int // 2
	bytesMax  int64
	transform string // "none"
	hold      bool   // the log does not write at once
	limit     int    // of completions that the log holds: 4
}

// A rig is a Writeback over fakes, with what a device does on top of it, and the
// truth: a plain byte slice.
type rig struct {
	t         testing.TB
	o         rigOptions
	pages     *fakePages
	log       *fakeLog
	transform *fakeTransform
	queue     *asyncq.Queue
	w         *Writeback
	es        *Epochs
	owners    atomic.Uint64
	reserved  atomic.Int64 // blocks
	stopped   sync.Once

	// truth is what was written, each block guarded by its range lock; frozen is
	// what it was at the newest freeze, guarded by Writeback.handOff.
	truth, frozen []byte
}

func newRig(t testing.TB, o rigOptions) *rig {
	t.Helper()
	if o.blocks == 0 {
		o.blocks = 512
	}
	if o.extent == 0 {
		o.extent = 16
	}
	if o.workers == 0 {
		o.workers = 2
	}
	if o.transform == "" {
		o.transform = "none"
	}
	if o.limit == 0 {
		o.limit = 4
	}
	g := &rig{t: t, o: o, pages: newFakePages(t), es: NewEpochs(), transform: newFakeTransform(t, o.transform, o.workers+1)}
	g.owners.Store(Owner)
	g.truth = make([]byte, o.blocks*block.Size)
	g.log = &fakeLog{
		t: t, extent: block.Index(o.extent), hold: o.hold, limit: o.limit, queue: make(chan func(), 1024),
		image: make([]byte, len(g.truth)), decode: compression.NewDecoder(1),
		fail: func(string) error { return nil }, data: func(block.Range) {}, syncing: func(uint64) {},
	}
	g.log.done.Go(func() {
		for f := range g.log.queue {
			f()
		}
	})
	// At the instant of a freeze the gate is closed, and only then.
	g.pages.frozen = func() {
		if g.es.gate.TryRLock() {
			g.es.gate.RUnlock()
			return
		}
		g.frozen = append(g.frozen[:0], g.truth...)
	}
	g.log.committed = func(epoch uint64, image []byte) {
		if i := differ(image, g.frozen); i >= 0 {
			t.Errorf("commit %d: block %d is %.16x, want %.16x", epoch, i/block.Size, image[i&^(block.Size-1):], g.frozen[i&^(block.Size-1):])
		}
	}
	// Invariant 2: while its pages are handed off, the range is locked and delalloc.
	g.pages.handedOff = func(b block.Index, epoch uint64) {
		e := g.es.open
		if e.Number != epoch {
			e = g.es.frozen
		}
		if e == nil || e.Number != epoch {
			t.Errorf("page %d of epoch %d is handed off in another", b, epoch)
		} else if !e.State.Test(block.Span(b, 1), extents.Locked|extents.Delalloc, true) {
			t.Errorf("page %d of epoch %d is handed off, and is not both locked and delalloc", b, epoch)
		}
	}
	g.queue = asyncq.New(asyncq.Options{Workers: o.workers, BytesMax: o.bytesMax})
	t.Cleanup(g.stop)
	g.w = New(Options{Pages: g.pages, Log: g.log, Queue: g.queue, Transform: g.transform, Workers: o.workers, ExtentBlocks: o.extent})
	return g
}

// differ is the first place where a and b differ, -1 if there is none.
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

// A content makes a page.
type content func(page []byte)

// zeros is a page of zeros.
func zeros(page []byte) { clear(page) }

var stamps atomic.Uint64

// text compresses well, and is no other page.
func text(page []byte) {
	clear(page)
	copy(page, fmt.Sprintf("page %d", stamps.Add(1)))
}

// noise does not compress.
func noise(page []byte) {
	r := rand.NewPCG(stamps.Add(1), 0)
	for i := 0; i < len(page); i += 8 {
		binary.LittleEndian.PutUint64(page[i:], r.Uint64())
	}
}

// write does what a device does for a WRITE of r and returns the epoch it joined.
func (g *rig) write(r block.Range, c content) entered {
	pages := make([][]byte, r.Len())
	for i := range pages {
		pages[i] = make([]byte, block.Size)
		c(pages[i])
	}
	owner := g.owners.Add(1)
	g.reserved.Add(int64(r.Len()))
	e := g.es.Enter()
	e.State.Lock(r, owner)
	for i, p := range pages {
		b := r.Start + block.Index(i)
		copy(g.truth[b.Bytes():], p)
		if g.pages.install(b, p, e.Number) {
			g.reserved.Add(-1)
		}
	}
	e.State.Unlock(r, owner, extents.Delalloc, extents.DirtyHole)
	e.Touch(time.Now())
	in := entered{e, e.Number}
	g.es.Leave()
	return in
}

// entered is the epoch that a request was in, and its number then: when it has been
// stored it is used again for another.
type entered struct {
	*Epoch
	Number uint64
}

// trim does what a device does for a TRIM of r.
func (g *rig) trim(r block.Range) entered {
	owner := g.owners.Add(1)
	e := g.es.Enter()
	e.State.Lock(r, owner)
	clear(g.truth[r.Start.Bytes():r.End.Bytes()])
	g.reserved.Add(-int64(g.pages.installHole(r, e.Number)))
	e.State.Unlock(r, owner, extents.DirtyHole, extents.Delalloc)
	e.Touch(time.Now())
	in := entered{e, e.Number}
	g.es.Leave()
	return in
}

// read compares r with the truth.
func (g *rig) read(r block.Range) {
	owner := g.owners.Add(1)
	e := g.es.Enter()
	e.State.Lock(r, owner)
	for b := r.Start; b < r.End; b++ {
		data, ok := g.pages.read(b)
		if !ok {
			data = g.log.read(b)
		}
		if want := g.truth[b.Bytes():][:block.Size]; !bytes.Equal(data, want) {
			g.t.Errorf("block %d reads as %.16x, want %.16x", b, data, want)
		}
	}
	e.State.Unlock(r, owner, 0, 0)
	g.es.Leave()
}

// background is one pass over the open epoch.
func (g *rig) background(c *Control) {
	g.t.Helper()
	if err := g.w.Background(context.Background(), g.es, c, false); err != nil {
		g.t.Errorf("Background: %v", err)
	}
}

func (g *rig) commit() {
	g.t.Helper()
	if err := g.w.Commit(context.Background(), g.es); err != nil {
		g.t.Errorf("Commit: %v", err)
	}
}

// settle waits until everything handed off is in the log and written.
func (g *rig) settle() {
	g.t.Helper()
	if err := g.queue.Drain(context.Background()); err != nil {
		g.t.Error(err)
	}
	g.log.write(nil)
	g.log.drain()
}

// stop ends the goroutines of the rig.
func (g *rig) stop() {
	g.stopped.Do(func() {
		g.queue.Close()
		close(g.log.queue)
		g.log.done.Wait()
		g.log.decode.Close()
	})
}

// close ends the rig: nothing may be left, neither pages nor tokens nor
// reservations, but for pages that are still dirty.
func (g *rig) close() {
	g.t.Helper()
	g.settle()
	g.stop()
	if m := g.queue.Metrics(); m.Bytes != 0 || m.Submitted != m.Completed {
		g.t.Errorf("the queue is left with %+v", m)
	}
	dirty, locked, writeback, _ := g.pages.counts()
	if locked != 0 || writeback != 0 {
		g.t.Errorf("%d pages are left locked, %d in writeback", locked, writeback)
	}
	if left := g.reserved.Load() - int64(g.log.released); left != int64(dirty) {
		g.t.Errorf("%d blocks are left reserved, %d dirty", left, dirty)
	}
	if n := g.es.open.State.Count(extents.Locked); n != 0 {
		g.t.Errorf("%d blocks are left locked", n)
	}
	if n := g.es.open.State.Count(extents.Delalloc); n != block.Count(dirty) {
		g.t.Errorf("%d blocks are delalloc, %d pages dirty", n, dirty)
	}
}

// newGate returns a channel to receive from, which blocks until open is called, at
// the latest at the end of the test.
func newGate(t testing.TB) (gate <-chan struct{}, open func()) {
	c := make(chan struct{})
	open = sync.OnceFunc(func() { close(c) })
	t.Cleanup(open)
	return c, open
}

func rng(start, end block.Index) block.Range { return block.Range{Start: start, End: end} }

var errFake = errors.New("fake failure")

// all is a budget without a bound.
const all = ^block.Count(0)
