// Package disktest has what tests of the store need in the place of a real disk
// and a real client: a simulated disk that loses power ([Disk]), a plain model
// of a device with its commit points ([Model]), and seeded histories of client
// requests ([History]). It is imported by tests only.
//
// # The simulated disk
//
// A Disk has two states. The cache is what ReadAt shows: the sum of all that was
// written. The medium is what a power cut leaves: everything that a successful
// Sync covered, and of the operations since then any part that chance, which is
// a seed, decides:
//
//	WriteAt ──▶ cache            ReadAt ◀── cache
//	    └─────▶ pending ──Sync──▶ medium
//	                └────Crash───▶ medium, each operation lost, kept or torn,
//	                               in any order
//
// Operations that change a disk (WriteAt, Sync, Allocate, Punch, Truncate) are
// counted from 0 in the order in which they take effect, failed ones included.
// Cutting the power at operation k lets 0 … k-1 happen; k is in flight and may
// happen in part; it and everything later fails. A test can run a history once
// for each k ([Disk.CutAt] and [Disk.Crash]), or once in all: a Disk that has
// been told to [Disk.Record] materialises the disk after a cut at any k
// ([Disk.At]).
//
// Invariants:
//
//  1. An operation is pending from its effect until a Sync that began later has
//     succeeded; then the medium has it whatever happens.
//  2. The same operations and the same seeds give the same bytes.
//  3. Pages are shared between disks and immutable unless their owner's.
//
// Lock order: a Disk's mu, then its recording's mu. Hooks are called with neither.
package disktest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"cnbd/internal/disk"
)

// ErrPowerCut is the error of every operation from the power cut on.
var ErrPowerCut = errors.New("disktest: power cut")

// A Kind is a kind of operation. Kinds can be combined to a set.
type Kind uint8

const (
	Read Kind = 1 << iota
	Write
	Sync
	Allocate
	Punch
	Truncate
	DropCache

	// Changes are the kinds that are numbered and at which power can be cut.
	Changes = Write | Sync | Allocate | Punch | Truncate
)

func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Sync:
		return "sync"
	case Allocate:
		return "allocate"
	case Punch:
		return "punch"
	case Truncate:
		return "truncate"
	case DropCache:
		return "drop cache"
	}
	return fmt.Sprintf("kinds %#x", uint8(k))
}

// An Op is an operation as a hook sees it. Off and Len are in bytes; for
// Truncate, Off is the new size.
type Op struct {
	Kind     Kind
	Off, Len int64
}

// Options of a Disk. The zero value is a file on a large filesystem.
type Options struct {
	// Size is the size of the disk in bytes at first.
	Size int64
	// Device makes it a block device: its size is fixed, Truncate does nothing.
	Device bool
	// Capacity limits the bytes in use, in pages of 4 KiB: what goes beyond is
	// ENOSPC. 0 is no limit.
	Capacity int64
	// SectorSize is the unit that is never torn: 512 (default) or 4096.
	SectorSize int
}

// A Disk is a simulated disk.File. All methods may be called concurrently.
type Disk struct {
	seed uint64
	opts Options

	mu     sync.Mutex
	cache  *image // what reads show
	medium medium // what is durable, and what is pending
	ops    int64  // number of the next operation that changes the disk
	cutAt  int64  // operation at which the power goes, -1 never
	cut    bool
	flight *op // operation during which the power went, if any
	closed bool
	faults []*Fault
	counts Counts
	hook   func(Op)
	recs   *recording // nil unless recording
}

var _ disk.File = (*Disk)(nil)

// Counts are numbers of calls, failed ones included, and of bytes moved.
type Counts struct {
	Reads, Writes, Syncs, Allocates, Punches, Truncates, DropCaches int
	BytesRead, BytesWritten                                         int64
}

// Sub is the difference c - o: what happened between two snapshots.
func (c Counts) Sub(o Counts) Counts {
	return Counts{
		c.Reads - o.Reads, c.Writes - o.Writes, c.Syncs - o.Syncs, c.Allocates - o.Allocates,
		c.Punches - o.Punches, c.Truncates - o.Truncates, c.DropCaches - o.DropCaches,
		c.BytesRead - o.BytesRead, c.BytesWritten - o.BytesWritten,
	}
}

// New makes a disk that reads as zeros. seed decides what punched ranges read
// as; the chances of a crash have seeds of their own.
func New(seed uint64, o Options) *Disk {
	if o.SectorSize == 0 {
		o.SectorSize = 512
	}
	if pageSize%o.SectorSize != 0 {
		panic("disktest: bad sector size")
	}
	img := newImage(o.Size)
	return &Disk{seed: seed, opts: o, cache: img.clone(), medium: medium{img: img, opts: o}, cutAt: -1}
}

// from makes a disk that starts with the medium img and nothing pending.
func (d *Disk) from(img *image) *Disk {
	return &Disk{
		seed: d.seed + 1, opts: d.opts, cutAt: -1,
		cache: img.clone(), medium: medium{img: img, opts: d.opts},
	}
}

// begin waits for the hook, with no lock held, and then locks d. On error d is
// not locked.
func (d *Disk) begin(o Op) error {
	d.mu.Lock()
	hook := d.hook
	d.mu.Unlock()
	if hook != nil {
		hook(o)
	}
	d.mu.Lock()
	if err := d.stateLocked(); err != nil {
		d.mu.Unlock()
		return err
	}
	return nil
}

func (d *Disk) stateLocked() error {
	switch {
	case d.closed:
		return os.ErrClosed
	case d.cut:
		return ErrPowerCut
	}
	return nil
}

// numberLocked gives o its number. If the power goes in it, the error is
// ErrPowerCut and o stays in flight.
func (d *Disk) numberLocked(o *op) error {
	o.num = d.ops
	o.junk = o.kind == Punch && mix(d.seed, uint64(o.num))&1 != 0
	d.ops++
	if o.num == d.cutAt {
		d.cut, d.flight = true, o
		return ErrPowerCut
	}
	return nil
}

// effectLocked enters o, which has its number, into cache, medium and recording.
// A Sync is already judged: it changes no cache.
func (d *Disk) effectLocked(o op) {
	d.cache.apply(o)
	d.medium.advance(o)
	if d.recs != nil {
		d.recs.append(o)
	}
}

// ReadAt implements disk.File.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	if err := d.begin(Op{Read, off, int64(len(p))}); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	d.counts.Reads++
	n := max(0, min(int64(len(p)), d.cache.size-off))
	switch f := d.faultLocked(Read, off, int64(len(p))); {
	case f == nil:
		d.cache.read(p[:n], off)
	case f.Lie != Lie{}:
		f.Lie.read(d, p[:n], off)
	default:
		return 0, f.error("read", off)
	}
	d.counts.BytesRead += n
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt implements disk.File.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, syscall.EINVAL
	}
	n := int64(len(p))
	if err := d.begin(Op{Write, off, n}); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	d.counts.Writes++
	o := op{kind: Write, off: off, data: bytes.Clone(p)}
	if err := d.numberLocked(&o); err != nil {
		return 0, err
	}
	var err error
	if f := d.faultLocked(Write, off, n); f != nil {
		o.data, err = o.data[:min(int64(f.Partial), n)], f.error("write", off)
	} else if room := d.roomLocked(off, n); room < n {
		o.data, err = o.data[:room], fmt.Errorf("disktest: write at %d: %w", off, syscall.ENOSPC)
	}
	d.effectLocked(o)
	d.counts.BytesWritten += int64(len(o.data))
	return len(o.data), err
}

// Sync implements disk.File.
func (d *Disk) Sync() error {
	d.mu.Lock()
	covered := d.ops // what took effect before the Sync began
	d.mu.Unlock()
	if err := d.begin(Op{Kind: Sync}); err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.counts.Syncs++
	o := op{kind: Sync, covered: covered}
	if err := d.numberLocked(&o); err != nil {
		return err
	}
	var err error
	if f := d.faultLocked(Sync, 0, 0); f != nil {
		o.failed, o.loss, err = true, f.Loss, f.error("sync", 0)
	}
	d.effectLocked(o)
	return err
}

// DropCache implements disk.File: from now on ReadAt shows the medium and what
// is pending, not what a failed Sync dropped.
func (d *Disk) DropCache() error {
	if err := d.begin(Op{Kind: DropCache}); err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.counts.DropCaches++
	if f := d.faultLocked(DropCache, 0, 0); f != nil {
		return f.error("drop cache", 0)
	}
	size := d.cache.size // the inode is not dropped
	d.cache = d.medium.img.clone()
	for _, o := range d.medium.pending {
		d.cache.apply(o)
	}
	d.cache.size = max(size, d.cache.size)
	return nil
}

// Medium implements disk.File: its reads show the medium and what is pending, as
// those behind DropCache do.
func (d *Disk) Medium() (disk.MediumReader, error) { return mediumReader{d}, nil }

type mediumReader struct{ d *Disk }

func (m mediumReader) Close() error { return nil }

func (m mediumReader) ReadAt(p []byte, off int64) (int, error) {
	d := m.d
	n := int64(len(p))
	if err := d.begin(Op{Read, off, n}); err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	d.counts.Reads++
	if f := d.faultLocked(Read, off, n); f != nil {
		return 0, f.error("read", off)
	}
	img := d.medium.img.clone()
	for _, o := range d.medium.pending {
		img.apply(o)
	}
	n = max(0, min(n, img.size-off))
	img.read(p[:n], off)
	d.counts.BytesRead += n
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// Allocate implements disk.File.
func (d *Disk) Allocate(off, n int64) error {
	if off < 0 || n < 0 {
		return syscall.EINVAL
	}
	return d.change(op{kind: Allocate, off: off, n: n})
}

// Punch implements disk.File. By the seed, the range then reads as zeros or as
// something else.
func (d *Disk) Punch(off, n int64) error {
	if off < 0 || n < 0 {
		return syscall.EINVAL
	}
	return d.change(op{kind: Punch, off: off, n: n})
}

// Truncate implements disk.File.
func (d *Disk) Truncate(size int64) error {
	if size < 0 {
		return syscall.EINVAL
	}
	return d.change(op{kind: Truncate, off: size})
}

func (d *Disk) change(o op) error {
	if err := d.begin(Op{o.kind, o.off, o.n}); err != nil {
		return err
	}
	defer d.mu.Unlock()
	switch o.kind {
	case Allocate:
		d.counts.Allocates++
	case Punch:
		d.counts.Punches++
	case Truncate:
		d.counts.Truncates++
	}
	if d.opts.Device && o.kind == Truncate {
		o = op{} // does nothing, and has a number
	}
	if err := d.numberLocked(&o); err != nil {
		return err
	}
	var err error
	if f := d.faultLocked(o.kind, o.off, o.n); f != nil {
		err = f.error(o.kind.String(), o.off)
	} else if o.kind == Allocate && d.roomLocked(o.off, o.n) < o.n {
		err = fmt.Errorf("disktest: allocate [%d,%d): %w", o.off, o.off+o.n, syscall.ENOSPC)
	}
	if err != nil {
		o = op{num: o.num}
	}
	d.effectLocked(o)
	return err
}

// roomLocked is how many bytes from off on, up to n, find a place.
func (d *Disk) roomLocked(off, n int64) int64 {
	if d.opts.Device {
		return max(0, min(n, d.cache.size-off))
	}
	if d.opts.Capacity == 0 {
		return n
	}
	return d.cache.room(off, n, d.opts.Capacity-d.cache.allocated)
}

// Size implements disk.File.
func (d *Disk) Size() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cache.size, d.stateLocked()
}

// WriteBehind implements disk.File: what a power cut leaves of a write that was not synced
// is a matter of chance anyway.
func (d *Disk) WriteBehind(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stateLocked()
}

// AllocatesUnwritten implements disk.File.
func (d *Disk) AllocatesUnwritten() bool { return !d.opts.Device }

// Allocated implements disk.File.
func (d *Disk) Allocated() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opts.Device {
		return d.cache.size, d.stateLocked()
	}
	return d.cache.allocated, d.stateLocked()
}

// Close implements disk.File. Nothing is synced. What follows on the same
// medium is made by Clone or Crash.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return os.ErrClosed
	}
	d.closed = true
	return nil
}

// Clone is the disk as another process finds it on the same host, with no power
// cut: what is pending is still pending, and reads show it. Faults, hook, counts,
// recording and a planned cut are not taken over; operations count from 0. d may
// be closed and is not changed. It costs little: pages are shared until written.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.from(d.medium.img.clone())
	c.cache = d.cache.clone()
	for _, o := range d.medium.pending {
		o.num = -1 // before every operation of c
		c.medium.pending = append(c.medium.pending, o)
	}
	return c
}

// CutAt plans the power cut at operation k. An operation that has already been
// numbered cannot be cut.
func (d *Disk) CutAt(k int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutAt = k
}

// Cut cuts the power now, with no operation in flight.
func (d *Disk) Cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut = true
}

// IsCut reports whether the power has gone.
func (d *Disk) IsCut() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cut
}

// Crash is the disk that is found when power returns after it went now, or when
// it went. d is not changed, so that many crashes can be made of it. Like Clone
// it takes over nothing but the medium.
func (d *Disk) Crash(loss Loss) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.from(d.medium.crash(d.flight, loss))
}

// Ops is the number of operations so far: the number of the next one.
func (d *Disk) Ops() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ops
}

// Pending is the number of operations that a power cut could lose now.
func (d *Disk) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.medium.pending)
}

// Counts is a snapshot of the counters.
func (d *Disk) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts
}

// SetHook has hook called at the begin of every operation, with no lock held,
// so that it can delay or block it. nil removes it. What a Sync covers is
// decided before its hook; everything else takes effect after it.
func (d *Disk) SetHook(hook func(Op)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = hook
}

// SetCapacity changes Options.Capacity: somebody else fills or leaves the host.
func (d *Disk) SetCapacity(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opts.Capacity = n
}
