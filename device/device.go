// Package device is the disk: the page cache, the writeback, the store and the
// codecs joined to one block device of byte ranges. What nbd.Backend asks for is
// here by shape, and so is go-nbd's backend.Backend (ReadAt, WriteAt, Size, Sync).
//
// # The way of a write
//
// [Device.PrepareWrite] waits for the dirty limit and for payload memory, and
// reserves space; [Write.Next] hands out cache memory as the payload comes, which is
// received into it; [Write.Commit] enters the open epoch, locks the range of blocks, publishes the pages, marks the range
// delalloc, and leaves. From there writeback takes it (package delalloc).
//
// # The way of a read
//
// Pages that are present are shared with the caller. Absent ones are claimed, then
// looked up in the map, and each stored blob is read, verified and decoded once;
// it fills every absent page that the mapping covers, before and behind the
// request.
//
// # Lock order
//
// Epochs.gate, then range locks, then the mutexes of the cache. A request waits
// for nothing but range locks between Enter and Leave; whoever holds a range lock
// waits for nothing at all. Claims are never held while waiting for a claim of
// somebody else, but by read-modify-write for a higher block than its own.
package device

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cnbd/asyncq"
	"cnbd/delalloc"
	"cnbd/internal/block"
	"cnbd/internal/buffer"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/pagecache"
	"cnbd/store"
)

// Options are the settings of a Device. Zero means the default.
type Options struct {
	// ReadOnly refuses every change; the store is replayed in memory.
	ReadOnly bool

	// CacheBytes is the size of the page cache, clean and dirty. Default 256 MiB.
	CacheBytes int64
	// PayloadBytes bounds the memory of writes being received. Default 64 MiB.
	PayloadBytes int64
	// DirtyBytesMax bounds dirty data; writers wait beyond it. Default half of
	// the cache.
	DirtyBytesMax int64
	// BackgroundBytes is the amount of dirty data from which on it is written
	// out. Default an eighth of the cache.
	BackgroundBytes int64
	// MapCacheBytes bounds the cache of map nodes. Default 32 MiB.
	MapCacheBytes int64

	// Codec is the codec for new data. Default: the store's.
	Codec *compression.Setting
	// ExtentBytes is how much new data is compressed as one: a power of two
	// from 4 KiB to 128 KiB. Default: the store's.
	ExtentBytes uint32
	// Workers is the number of compression workers. Default: GOMAXPROCS, at most 8. Where
	// they are as many, requests wait for them while much is written.
	Workers int

	// CommitInterval is the longest time that a write waits for a commit. Default 5 s.
	CommitInterval time.Duration
	// WritebackPeriod is how often the age of dirty data is looked at. Default 5 s.
	WritebackPeriod time.Duration
	// DirtyExpire is the age at which dirty data is written out. Default 30 s.
	DirtyExpire time.Duration
	// CheckpointBytes is the length of log after which a checkpoint is taken.
	// Default 256 MiB.
	CheckpointBytes uint64
	// CheckpointRecords is the number of records after which one is taken.
	// Default 128 Ki.
	CheckpointRecords uint64

	// Background is the codec for data that is encoded anew while the device is
	// idle. Default: zstd:better if new data is encoded by zstd or auto, s2:better
	// for s2, and none for none.
	Background *compression.Setting
	// PackAfter is for how long clients must have asked for nothing until data that
	// nobody reads at random is encoded once more, by zstd:best in extents of 128 KiB, if the
	// background's codec is the default and zstd. Default 30 s.
	PackAfter time.Duration
	// NoRecompress leaves data as it was written, but for what the cleaner has to
	// cut.
	NoRecompress bool
	// CleanPeriod is how often the cleaner looks whether there is something to
	// do. Default 1 s.
	CleanPeriod time.Duration

	// Warn is told of damage, failures, and what else an administrator should
	// know. It may be nil.
	Warn func(msg string, err error)

	trimLeaves  int // store.Options.TrimLeaves, for tests
	zeroCommits int // store.Options.ZeroCommits, for tests
}

func (o *Options) setDefaults() {
	if o.CacheBytes == 0 {
		o.CacheBytes = 256 << 20
	}
	if o.PayloadBytes == 0 {
		o.PayloadBytes = 64 << 20
	}
	if o.Workers == 0 {
		o.Workers = min(runtime.GOMAXPROCS(0), 8)
	}
	if o.CommitInterval == 0 {
		o.CommitInterval = 5 * time.Second
	}
	if o.WritebackPeriod == 0 {
		o.WritebackPeriod = 5 * time.Second
	}
	if o.DirtyExpire == 0 {
		o.DirtyExpire = 30 * time.Second
	}
	if o.CleanPeriod == 0 {
		o.CleanPeriod = time.Second
	}
	if o.PackAfter == 0 {
		o.PackAfter = 30 * time.Second
	}
	if o.Warn == nil {
		o.Warn = func(string, error) {}
	}
}

var (
	// ErrReadOnly is the answer to a change of a read-only device.
	ErrReadOnly = fmt.Errorf("device: read-only: %w", syscall.EPERM)
	// ErrRange is the answer to a request beyond the end of the device.
	ErrRange = fmt.Errorf("device: range beyond the end: %w", syscall.EINVAL)
	// ErrClosed is the answer after Close.
	ErrClosed = fmt.Errorf("device: closed: %w", syscall.ESHUTDOWN)
)

// A Device is an open device. All methods but Close and Abort may be called
// concurrently.
type Device struct {
	opts    Options
	size    atomic.Uint64 // of the device in bytes; Resize changes it
	store   *store.Store
	cache   *pagecache.Cache
	epochs  *delalloc.Epochs
	queue   *asyncq.Queue       // nil if read-only
	back    *delalloc.Writeback // nil if read-only
	flusher *delalloc.Flusher   // nil if read-only
	codec   compression.Setting
	decoder *compression.Decoder
	scratch *buffer.Pool // stored and decoded bytes of extents being read

	requests atomic.Uint64 // admitted so far
	owners   atomic.Uint64 // of range locks; delalloc has number 1
	// trimming counts requests that ask for room for a hole, or have it and are in
	// no epoch yet.
	trimming atomic.Int64
	room     struct { // for trims
		sync.Mutex           // one at a time forces checkpoints
		failed     time.Time // guarded by it; when they made no room, zero if they did
	}
	resize sync.Mutex // one Resize at a time

	mu     sync.RWMutex
	closed bool // guarded by mu

	payloads sync.Pool
	writes   sync.Pool

	ahead      readahead
	walks      chan *walk    // idle; who walks takes one
	prefetches chan struct{} // full when as many are at work as may be

	metrics struct {
		misses, decodes, neighbours, holesRead, bookends, lookups, stale, late, ahead, readErrors atomic.Uint64
		rmws, rmwRetries                                                                          atomic.Uint64
	}
}

// readScratch is the number of buffers for extents being read, one for each read
// in progress, 8 MiB in all. Reads beyond that wait.
const readScratch = 32

const (
	// walksMax is the number of walks of Allocation at a time, which bounds the
	// memory for them: each holds about a megabyte.
	walksMax = 4
	// prefetchesMax is the number of Prefetches that read at a time.
	prefetchesMax = 2
)

// Open opens the device whose store is in f, which must be locked against other
// openers, and recovers it. It owns f from now on, also on an error.
func Open(f disk.File, o Options) (_ *Device, err error) {
	o.setDefaults()
	d := &Device{opts: o, epochs: delalloc.NewEpochs()}
	d.owners.Store(delalloc.Owner)
	d.payloads.New = func() any { return &Payload{d: d} }
	d.writes.New = func() any { return &Write{d: d} }
	d.walks = make(chan *walk, walksMax)
	for range walksMax {
		d.walks <- new(walk)
	}
	d.prefetches = make(chan struct{}, prefetchesMax)
	d.store, err = store.Open(f, store.Options{
		ReadOnly: o.ReadOnly, MapCacheBytes: o.MapCacheBytes,
		CheckpointBytes: o.CheckpointBytes, CheckpointRecords: o.CheckpointRecords,
		NeedCommit: d.needCommit, Trims: func() (coming, held int64) { return d.trimming.Load(), d.epochs.Trims() }, Warn: o.Warn, TrimLeaves: o.trimLeaves, ZeroCommits: o.zeroCommits,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.store.Close()
			d.free()
		}
	}()
	g := d.store.Geometry()
	d.size.Store(g.DeviceSize)
	if d.cache, err = pagecache.New(pagecache.Options{
		CacheBytes: o.CacheBytes, PayloadBytes: o.PayloadBytes,
		DirtyBytesMax: o.DirtyBytesMax, BackgroundBytes: o.BackgroundBytes,
		NeedWriteback: d.needWriteback,
	}); err != nil {
		return nil, fmt.Errorf("device: %w", err)
	}
	if d.scratch, err = buffer.NewPool(2*store.ExtentBlocksMax*block.Size, readScratch); err != nil {
		return nil, fmt.Errorf("device: %w", err)
	}
	d.decoder = compression.NewDecoder(runtime.GOMAXPROCS(0))
	d.codec = compression.Setting{Codec: compression.Codec(g.Codec), Level: compression.Level(g.Level)}
	if o.Codec != nil {
		d.codec = *o.Codec
	}
	if d.opts.ExtentBytes == 0 {
		d.opts.ExtentBytes = g.ExtentBlocks * block.Size
	}
	if e := d.opts.ExtentBytes; e < block.Size || e > store.ExtentBlocksMax*block.Size || e&(e-1) != 0 {
		return nil, fmt.Errorf("device: extents of %d bytes: want a power of two from %d to %d", e, block.Size, store.ExtentBlocksMax*block.Size)
	}
	d.ahead.start(d)
	if o.ReadOnly {
		return d, nil
	}
	// Tokens for half of what can be dirty, so that a hand-off never takes all
	// that writers could use.
	inFlight := min(64<<20, max(o.CacheBytes/4, 1<<20))
	d.queue = asyncq.New(asyncq.Options{Workers: o.Workers, BytesMax: inFlight, BytesLow: inFlight / 2})
	d.back = delalloc.New(delalloc.Options{
		Pages: d.cache, Log: storeLog{d.store}, Queue: d.queue, Transform: newCompressor(d.codec, o.Workers, d.hurry),
		Workers: o.Workers, ExtentBlocks: int(d.opts.ExtentBytes / block.Size),
	})
	d.flusher = delalloc.StartFlusher(delalloc.FlusherOptions{
		Writeback: d.back, Epochs: d.epochs,
		CommitInterval: o.CommitInterval, Period: o.WritebackPeriod, Expire: o.DirtyExpire,
		Background: func() bool { return d.cache.OverBackground() || d.cache.WaitersForDirty() },
		Pressure:   d.cache.WaitersForDirty,
		Failed:     func(err error) { o.Warn("a commit has failed", err) },
	})
	behind, packAfter := background(d.codec), o.PackAfter
	if o.Background != nil {
		behind = *o.Background
	}
	if behind.Codec != compression.Zstd || o.Background != nil {
		packAfter = 0
	}
	d.store.StartCleaning(store.CleanerOptions{
		Recoder:    &recoder{d.decoder, compression.NewEncoder(), d.codec, behind},
		Recompress: !o.NoRecompress, PackAfter: packAfter, Period: o.CleanPeriod, Requests: d.requests.Load,
	})
	return d, nil
}

func (d *Device) needCommit() {
	// The store asks only once it is open, and the flusher is there before the
	// first write.
	if d.flusher != nil {
		d.flusher.NeedCommit()
	}
}

func (d *Device) needWriteback() {
	if d.flusher != nil {
		d.flusher.Kick()
	}
}

// storeLog is the writeback's view of the store.
type storeLog struct{ *store.Store }

// AfterWrite implements delalloc.Log.
func (l storeLog) AfterWrite(c delalloc.Completion, now bool) error {
	return l.Store.AfterWrite(c, now)
}

// AppendCommit implements delalloc.Log.
func (l storeLog) AppendCommit() (sync func() error, ok bool, err error) {
	c, ok, err := l.Store.AppendCommit()
	if err != nil || !ok {
		return nil, ok, err
	}
	return func() error { return l.Store.Sync(c) }, true, nil
}

// Close ends the device in the orderly way: everything is committed, a
// checkpoint taken, and space that was allocated ahead given back. No request may
// be in progress or come any more. An error says that this could not be done;
// what was flushed before is durable nevertheless. The device is closed in any case.
func (d *Device) Close() error {
	if d.shut() {
		return ErrClosed
	}
	d.ahead.stop()
	if d.opts.ReadOnly {
		return errors.Join(d.store.Close(), d.free())
	}
	d.store.StopCleaning()
	err := d.flusher.Flush(context.Background())
	if err == nil {
		err = d.store.Checkpoint()
	}
	d.flusher.Stop()
	d.queue.Close()
	if err == nil {
		err = d.store.TrimHost()
	}
	return errors.Join(err, d.store.Close(), d.free())
}

// Abort ends the device without a commit, as a crash would, but for memory and
// goroutines. It is for tests and for a store that has failed.
func (d *Device) Abort() error {
	if d.shut() {
		return ErrClosed
	}
	d.ahead.stop()
	if d.queue != nil {
		d.flusher.Stop()
		d.queue.Close()
	}
	return errors.Join(d.store.Close(), d.free())
}

// shut marks the device closed and tells whether it was.
func (d *Device) shut() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.closed
	d.closed = true
	return was
}

// free gives back what there is of memory: all of it once Open has succeeded.
func (d *Device) free() (err error) {
	if d.decoder != nil {
		d.decoder.Close()
	}
	if d.cache != nil {
		err = d.cache.Close()
	}
	if d.scratch != nil {
		err = errors.Join(err, d.scratch.Close())
	}
	return err
}

// Bytes is the size of the device in bytes.
func (d *Device) Bytes() uint64 { return d.size.Load() }

// ReadOnly tells whether changes are refused from the start.
func (d *Device) ReadOnly() bool { return d.opts.ReadOnly }

// Geometry is what the store was made with, or has been resized to.
func (d *Device) Geometry() store.Geometry { return d.store.Geometry() }

// Recovery tells what opening the store found.
func (d *Device) Recovery() store.Recovery { return d.store.Recovery() }

// DurableEpoch is the number of the newest commit that is durable, after Close as
// well: what the next opening recovers, if nobody has written meanwhile.
func (d *Device) DurableEpoch() uint64 { return d.store.DurableEpoch() }

// Appended is how many bytes of data have gone to the store since the device was
// opened, and what they have taken there. It does not block.
func (d *Device) Appended() (data, stored uint64) { return d.store.Appended() }

// Err is the failure that has made the device read-only (promise P5), or nil.
func (d *Device) Err() error { return d.store.Err() }

// admit refuses a range beyond the end, and counts the request.
func (d *Device) admit(off, n uint64) error {
	if size := d.Bytes(); off > size || n > size-off {
		return ErrRange
	}
	d.requests.Add(1)
	return nil
}

// admitWrite is admit, and refuses what cannot be changed.
func (d *Device) admitWrite(off, n uint64) error {
	if d.opts.ReadOnly {
		return ErrReadOnly
	}
	if err := d.admit(off, n); err != nil {
		return err
	}
	if err := d.store.Err(); err != nil {
		return fmt.Errorf("device: the store has failed before: %w: %w", syscall.EIO, err)
	}
	return nil
}

// Flush makes durable everything that was answered before it was called, on any
// connection. It blocks for a commit; concurrent calls share one.
func (d *Device) Flush(ctx context.Context) error {
	if d.opts.ReadOnly {
		return nil
	}
	switch err := d.flusher.Flush(ctx); {
	case err == nil:
		return nil
	case d.store.Err() != nil:
		// Whatever the disk has said: a flush does not answer ENOSPC (promise P4).
		return fmt.Errorf("device: flush: %w: %w", syscall.EIO, err)
	default:
		return fmt.Errorf("device: flush: %w", err)
	}
}

// Size is the size of the device in bytes, as go-nbd's backend.Backend has it.
func (d *Device) Size() (int64, error) { return int64(d.Bytes()), nil }

// Sync is Flush, as go-nbd's backend.Backend has it.
func (d *Device) Sync() error { return d.Flush(context.Background()) }

// ReadAt is io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	n := uint64(len(p))
	size := d.Bytes()
	if uint64(off) >= size {
		return 0, io.EOF
	}
	n = min(n, size-uint64(off))
	for done := uint64(0); done < n; {
		step := min(n-done, 1<<20)
		pl, err := d.Read(context.Background(), uint64(off)+done, uint32(step))
		if err != nil {
			return int(done), err
		}
		for _, s := range pl.Segments() {
			done += uint64(copy(p[done:], s))
		}
		pl.Release()
	}
	if n < uint64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt is io.WriterAt; it does not extend the device. What was written is not
// durable before Sync.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrRange
	}
	for done := 0; done < len(p); {
		step := min(len(p)-done, 1<<20)
		w, err := d.PrepareWrite(context.Background(), uint64(off)+uint64(done), uint32(step))
		if err != nil {
			return done, err
		}
		from := done
		for _, s := range w.Next(step) {
			from += copy(s, p[from:])
		}
		if err := w.Commit(context.Background(), false); err != nil {
			return done, err
		}
		done += step
	}
	return len(p), nil
}

// StartScrub begins to verify all that is stored, in the background and reading at
// most rate bytes in a second (0: no limit). It takes a checkpoint first, so that
// what was committed is looked at. Scrub tells what it finds; Close ends it.
func (d *Device) StartScrub(rate uint64) error {
	if !d.opts.ReadOnly && d.store.Err() == nil {
		if err := d.store.Settle(); err != nil {
			return d.noSpace(err)
		}
	}
	return d.store.StartScrub(rate)
}

// StopScrub ends the scrub that is running.
func (d *Device) StopScrub() { d.store.StopScrub() }

// Scrub is the newest scrub since the device was opened, nil if there was none.
func (d *Device) Scrub() *store.ScrubReport { return d.store.Scrub() }

// A Status is what an administrator wants to know of a device.
type Status struct {
	UUID        string  `json:"uuid"`
	DeviceSize  uint64  `json:"device_size"`
	Capacity    uint64  `json:"capacity"`
	SegmentSize uint32  `json:"segment_size"`
	ExtentSize  uint32  `json:"extent_size"` // for new data
	Codec       string  `json:"codec"`       // for new data
	ReadOnly    bool    `json:"read_only"`
	Healthy     bool    `json:"healthy"`
	DirtyBytes  uint64  `json:"dirty_bytes"`    // not yet in the log
	Ratio       float64 `json:"ratio"`          // data bytes by stored bytes
	Overhead    uint64  `json:"overhead_bytes"` // host bytes that are not stored data

	Scrub *store.ScrubReport `json:"scrub,omitempty"` // the newest since the device was opened

	Store     store.Stats       `json:"store"`
	Recovery  store.Recovery    `json:"recovery"`
	Cache     pagecache.Metrics `json:"cache"`
	Writeback delalloc.Metrics  `json:"writeback"`
	Queue     asyncq.Metrics    `json:"queue"` // of the writeback
	Reads     ReadMetrics       `json:"reads"`
}

// ReadMetrics count what reads had to do since the device was opened.
type ReadMetrics struct {
	Misses           uint64 `json:"misses"`     // requests, or parts, that were not in the cache
	Lookups          uint64 `json:"lookups"`    // of the map
	Decodes          uint64 `json:"decodes"`    // blobs read and decoded
	Neighbours       uint64 `json:"neighbours"` // pages filled beside those asked for
	Bookends         uint64 `json:"bookends"`   // blobs read that were overwritten in part
	Holes            uint64 `json:"holes"`      // runs answered as zeros
	Stale            uint64 `json:"stale"`      // neighbours not filled since the map had changed
	Late             uint64 `json:"late"`       // blocks read again since a write had come before the lookup
	Ahead            uint64 `json:"ahead"`      // pieces of up to 128 KiB read before they were asked for, or beside that
	Errors           uint64 `json:"errors"`
	ReadModifyWrites uint64 `json:"read_modify_writes"`
	Retries          uint64 `json:"read_modify_write_retries"`
}

// Status gathers the state of the device. On a device that can be written it
// takes a checkpoint first, so that the sizes are those of what was committed, unless
// the log of a full host has no room for it.
func (d *Device) Status(ctx context.Context) (Status, error) {
	if !d.opts.ReadOnly && d.store.Err() == nil {
		if err := d.store.Settle(); err != nil && !errors.Is(err, store.ErrNoSpace) {
			return Status{}, fmt.Errorf("device: %w", err)
		}
	}
	return d.Look()
}

// Look is Status without a checkpoint, for those who look often: nothing is written
// for it. Sizes are those of what is in the log already, and while a checkpoint runs,
// those of the commit that it is of.
func (d *Device) Look() (Status, error) {
	stats, err := d.store.Stats()
	if err != nil {
		return Status{}, err
	}
	g, m := d.store.Geometry(), &d.metrics
	st := Status{
		UUID: g.UUID.String(), DeviceSize: g.DeviceSize, Capacity: g.Capacity, SegmentSize: g.SegmentSize,
		ExtentSize: d.opts.ExtentBytes, Codec: d.codec.String(), ReadOnly: d.opts.ReadOnly,
		Healthy: stats.Failure == "" && stats.Corrupt == 0, DirtyBytes: d.cache.DirtyBlocks().Bytes(),
		Ratio: stats.Ratio(), Overhead: stats.HostBytes - min(stats.HostBytes, stats.StoredBytes),
		Scrub: d.store.Scrub(), Store: stats, Recovery: d.Recovery(), Cache: d.cache.Metrics(),
		Reads: ReadMetrics{
			Misses: m.misses.Load(), Lookups: m.lookups.Load(), Decodes: m.decodes.Load(),
			Neighbours: m.neighbours.Load(), Bookends: m.bookends.Load(), Holes: m.holesRead.Load(),
			Stale: m.stale.Load(), Late: m.late.Load(), Ahead: m.ahead.Load(), Errors: m.readErrors.Load(),
			ReadModifyWrites: m.rmws.Load(), Retries: m.rmwRetries.Load(),
		},
	}
	if d.back != nil {
		st.Writeback, st.Queue = d.back.Metrics(), d.queue.Metrics()
	}
	return st, nil
}
