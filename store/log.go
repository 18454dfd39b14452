package store

import (
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"sync"
	"syscall"
	"time"

	"cnbd/extents"
	"cnbd/internal/disk"
)

const (
	// writeBufferSize is the size of a write to the backing file when there is
	// much to write: large enough for a disk to stream, small enough that four of
	// them are little memory.
	writeBufferSize = 1 << 20
	writeBuffers    = 4
	// What is written in pieces of this size or more is sent on to the medium at once.
	// Of 512 MiB in pieces of a MiB, with a sync at the end, the page cache then holds 1 to 135 MiB
	// at a time instead of all, and it takes 275 ms instead of 345; direct I/O, which has
	// nothing to do while it waits, 360 (medians, ext4).
	writeBehindSize = 256 << 10
)

// A Completion is told when the bytes of a record have been handed to the
// backing file. That is not yet durable; it is when reads of the place give
// these bytes.
type Completion interface {
	// Written is called once, by who writes the log, in log order. It must not
	// block. err is not nil when the bytes will never be there.
	Written(err error)
}

// A log appends records to segments. What is appended is copied into buffers; a
// writer goroutine writes them in order, one write for each full buffer, unless
// somebody who waits for them is there sooner and does it himself. No
// byte of a record is written twice before its segment is free again: a buffer
// ends at a border of 4096 unless it is full and the next one goes on from there.
//
// While commits are small, zeros are written ahead of them: see zeroLocked.
type log struct {
	file     disk.File
	segments *segments
	store    *Geometry
	life     uint64
	fail     func(error) error // notes the store's first failure and returns it

	zeroCommits int // Options.ZeroCommits

	free chan *writeBuffer // empty buffers
	done sync.WaitGroup

	// mu is the append lock. It is held while waiting for a free buffer: whoever
	// wants to append has to wait for that anyway.
	mu struct {
		sync.Mutex
		head    segmentHead // of the segment being written
		seed    uint32
		end     uint32 // offset in the segment at which the next record goes
		buffer  *writeBuffer
		epoch   uint64 // that records are appended to
		durable uint64 // newest durable epoch
		tally   tally  // of epoch
		serials uint64 // the newest serial given to a segment
		queued  uint64 // buffers queued so far
		since   uint64 // bytes appended since the last snapshot
		records uint64 // records appended since the last snapshot
		// snapshot is the serial of the segment that the last snapshot ends in.
		snapshot uint64
		// header is what a record header is encoded in: what the checksum is
		// computed of would be allocated each time.
		header [recordHeader]byte
	}

	written struct {
		sync.Mutex
		queue   []*writeBuffer // to be written, in log order; at most writeBuffers
		writing bool           // somebody writes what was the first of queue
		stopped bool
		work    *sync.Cond // the writer waits for work or stopped
		cond    *sync.Cond // others wait for buffers or err
		buffers uint64     // buffers written so far
		bytes   uint64
		err     error // the first failure

		segment uint32 // that the last bytes were written to
		fresh   bool   // it was never written before
		end     int64  // offset in the file behind them
		zeros   int64  // offset in the file up to which zeros have been written ahead in segment; 0: none have
		goal    int64  // offset in the file up to which the writer is to write them
		small   int    // small commits in sequence
		synced  uint64 // bytes, when the last commit was synced
	}
}

const (
	// Zeros are written ahead by zeroAhead bytes at a time, once
	// Options.ZeroCommits commits in sequence were of at most zeroCommit bytes each.
	zeroAhead  = 1 << 20
	zeroCommit = 64 << 10
)

type writeBuffer struct {
	segment     uint32
	unwritten   bool  // that segment was never written before
	offset      int64 // in the file
	data        []byte
	completions []Completion
}

// start begins to append to the segment that head names, a new one of a new
// life. The caller has written the header, and set what is counted since the
// last snapshot.
func (l *log) start(head segmentHead, epoch, durable uint64) {
	l.mu.head = head
	l.mu.seed = identitySeed(l.store.UUID, head.number, head.life, head.serial)
	l.mu.end = segmentData
	l.mu.epoch, l.mu.durable = epoch, durable
	l.mu.serials = head.serial
	l.written.cond, l.written.work = sync.NewCond(&l.written.Mutex), sync.NewCond(&l.written.Mutex)
	l.free = make(chan *writeBuffer, writeBuffers)
	for range writeBuffers {
		l.free <- &writeBuffer{}
	}
	l.done.Add(1)
	go l.writeLoop()
}

// stop ends the writer when it has written what is queued. What is still in the
// buffer is dropped: the caller has synced, or the store has failed.
func (l *log) stop() {
	l.mu.Lock()
	if b := l.mu.buffer; b != nil {
		l.mu.buffer = nil
		for _, c := range b.completions {
			c.Written(ErrClosed)
		}
	}
	l.mu.Unlock()
	l.written.Lock()
	l.written.stopped = true
	l.written.work.Signal()
	l.written.Unlock()
	l.done.Wait()
}

func (l *log) writeLoop() {
	defer l.done.Done()
	w := &l.written
	w.Lock()
	defer w.Unlock()
	for {
		switch {
		case len(w.queue) > 0 && !w.writing:
			l.writeLocked()
		case w.goal > 0 && !w.writing && !w.stopped:
			l.zeroLocked()
		case len(w.queue) == 0 && !w.writing && w.stopped:
			return
		default:
			w.work.Wait()
		}
	}
}

// writeLocked writes the first buffer of the queue. It drops and retakes the mutex.
// REQUIRES: l.written held, there is one, and nobody writes.
func (l *log) writeLocked() {
	w := &l.written
	b := w.queue[0]
	w.queue = append(w.queue[:0], w.queue[1:]...)
	w.writing = true
	err := w.err
	w.Unlock()
	if err == nil && len(b.data) > 0 {
		_, werr := l.file.WriteAt(b.data, b.offset)
		if werr == nil && len(b.data) >= writeBehindSize {
			werr = l.file.WriteBehind(b.offset, int64(len(b.data)))
		}
		if werr != nil {
			err = l.fail(fmt.Errorf("store: write %d bytes at %d: %w", len(b.data), b.offset, werr))
		}
	}
	for i, c := range b.completions {
		c.Written(err)
		b.completions[i] = nil
	}
	n, segment, fresh, end := len(b.data), b.segment, b.unwritten, b.offset+int64(len(b.data))
	b.data, b.completions = b.data[:0], b.completions[:0]
	w.Lock()
	w.writing = false
	w.buffers++
	w.bytes += uint64(n)
	if n > 0 {
		if segment != w.segment {
			w.zeros = 0 // they were for the one before
		}
		w.segment, w.fresh, w.end = segment, fresh, end
	}
	if w.err == nil {
		w.err = err
	}
	w.cond.Broadcast()
	if w.stopped {
		w.work.Signal() // the writer may wait for this to end
	}
	l.free <- b // there is room
}

// waitWritten returns when the first n buffers are written, which it does itself if
// nobody is at it.
func (l *log) waitWritten(n uint64) error {
	w := &l.written
	w.Lock()
	defer w.Unlock()
	for w.buffers < n && w.err == nil {
		if len(w.queue) > 0 && !w.writing {
			l.writeLocked()
		} else {
			w.cond.Wait()
		}
	}
	if len(w.queue) > 0 {
		w.work.Signal() // who queued it may have seen this goroutine at work
	}
	return w.err
}

// synced tells that a commit has become durable. When there have been some small ones
// it has zeros written ahead of the next.
func (l *log) synced() {
	w := &l.written
	w.Lock()
	defer w.Unlock()
	w.small++
	if w.bytes-w.synced > zeroCommit {
		w.small = 0
	}
	w.synced = w.bytes
	if w.small >= l.zeroCommits && w.zeros-w.end < zeroCommit && w.fresh {
		w.goal = w.end + zeroAhead
		w.work.Signal()
	}
}

// zeroLocked writes a piece of zeros behind what has been written. A host marks
// space that it gives as not written, and changing that in its journal takes a sync
// twice as long as writing a block does (ext4: 190 and 100 us; the tenth slowest 3.5
// and 0.2 ms), so it is done for many commits at once, and while nobody waits.
//
// Nothing that has been written lies behind written.end in that segment, and what
// comes is written after the zeros: only one writes at a time. They say nothing: what
// the host gives reads as zeros too. It drops and retakes the mutex. REQUIRES:
// l.written held, and nobody writes.
func (l *log) zeroLocked() {
	w := &l.written
	base := l.segments.base(w.segment)
	from := max(w.zeros, (w.end+alignment-1)&^(alignment-1))
	n := min(zeroAhead, w.goal-from, base+int64(l.segments.size)-from)
	if n <= 0 || w.err != nil || !w.fresh {
		w.goal = 0
		w.cond.Broadcast()
		return
	}
	w.writing = true
	w.Unlock()
	_, err := l.file.WriteAt(zeroAheads[:n], from)
	w.Lock()
	w.writing = false
	w.zeros = from + n
	if err != nil {
		w.goal = 0 // a record that is written there will tell
	}
	w.cond.Broadcast()
}

var zeroAheads [zeroAhead]byte

// settle has no zeros written ahead any more.
func (l *log) settle() {
	w := &l.written
	w.Lock()
	defer w.Unlock()
	w.goal, w.small = 0, math.MinInt
	for w.writing {
		w.cond.Wait()
	}
}

// wakeWriter has the writer look at the queue.
func (l *log) wakeWriter() {
	l.written.Lock()
	l.written.work.Signal()
	l.written.Unlock()
}

// copyLocked appends p to the buffers at the current end. REQUIRES: l.mu held,
// and that p fits into the segment.
func (l *log) copyLocked(p []byte) {
	for len(p) > 0 {
		if l.mu.buffer == nil {
			l.takeBufferLocked()
		}
		b := l.mu.buffer
		n := min(len(p), cap(b.data)-len(b.data))
		b.data = append(b.data, p[:n]...)
		p = p[n:]
		l.mu.end += uint32(n)
		if len(b.data) == cap(b.data) {
			l.handOverLocked()
		}
	}
}

// takeBufferLocked waits for an empty buffer and makes it the one for what comes
// next.
func (l *log) takeBufferLocked() {
	var b *writeBuffer
	select {
	case b = <-l.free:
	default:
		l.wakeWriter() // for what queueLocked has left to somebody
		b = <-l.free
	}
	if b.data == nil {
		b.data = make([]byte, 0, min(writeBufferSize, l.segments.size))
	}
	b.segment, b.unwritten = l.mu.head.number, l.segments.unwritten(l.mu.head.number)
	b.offset = l.segments.base(l.mu.head.number) + int64(l.mu.end)
	l.mu.buffer = b
}

// handOverLocked queues the buffer as it is, if there is one, for the writer.
func (l *log) handOverLocked() {
	if l.queueLocked() {
		l.wakeWriter()
	}
}

// queueLocked queues the buffer as it is, if there is one. The caller calls waitWritten
// soon: the writer is not woken for what takes no longer than to wake it.
func (l *log) queueLocked() bool {
	b := l.mu.buffer
	if b == nil {
		return false
	}
	l.mu.buffer = nil
	l.mu.queued++
	l.written.Lock()
	l.written.queue = append(l.written.queue, b)
	l.written.Unlock()
	return true
}

var zeros [alignment]byte

// padLocked fills up to the next border with zeros and queues the buffer for the writer.
func (l *log) padLocked() {
	l.fillLocked()
	l.handOverLocked()
}

// fillLocked fills up to the next border with zeros.
func (l *log) fillLocked() {
	if n := -l.mu.end & (alignment - 1); n > 0 {
		l.copyLocked(zeros[:n])
	}
}

// completeLocked has c told when everything appended so far is written. REQUIRES: l.mu held.
func (l *log) completeLocked(c Completion) {
	if b := l.mu.buffer; b != nil {
		b.completions = append(b.completions, c)
		return
	}
	// All of it is queued: an empty buffer goes behind it.
	l.takeBufferLocked()
	l.mu.buffer.completions = append(l.mu.buffer.completions, c)
	l.handOverLocked()
}

// rollLocked goes on in the next segment, whose successor it chooses.
func (l *log) rollLocked() error {
	next, ok := l.segments.take()
	if !ok {
		return l.fail(errors.New("store: no free segment left in spite of the reserve"))
	}
	l.handOverLocked()
	old := l.mu.head
	l.segments.wrote(old.number)
	l.mu.serials++
	l.mu.head = segmentHead{
		number: old.next, life: l.life, serial: l.mu.serials, next: next,
		prev: old.number, pserial: old.serial, plife: old.life, pend: l.mu.end, durable: l.mu.durable,
	}
	l.mu.seed = identitySeed(l.store.UUID, l.mu.head.number, l.life, l.mu.serials)
	l.segments.identify(l.mu.head.number, l.mu.serials, l.mu.seed)
	l.mu.end = 0
	var b [segmentHeader]byte
	l.mu.head.encode(b[:], l.store)
	l.copyLocked(b[:])
	l.copyLocked(b[:])
	l.mu.since += segmentData
	return nil
}

// successor is the segment that the log goes on in when this one is full.
func (l *log) successor() uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mu.head.next
}

// tailLocked is the longest payload that fits into what is left of the segment.
func (l *log) tailLocked() uint32 {
	return l.segments.size - min(l.segments.size, l.mu.end+recordHeader)
}

// appendLocked appends one record, whose payload is the concatenation of parts,
// and returns the place of the payload. The parts are borrowed. The record
// belongs to the current epoch. REQUIRES: l.mu held.
func (l *log) appendLocked(h header, parts ...[]byte) (blobRef, error) {
	for _, p := range parts {
		h.length += uint32(len(p))
	}
	if uint64(l.mu.end)+recordHeader+uint64(h.length) > uint64(l.segments.size) {
		if err := l.rollLocked(); err != nil {
			return blobRef{}, err
		}
	}
	if uint64(l.mu.end)+recordHeader+uint64(h.length) > uint64(l.segments.size) {
		// It would be written over the segment behind.
		return blobRef{}, l.fail(fmt.Errorf("store: a record of %d bytes does not fit into a segment", h.length))
	}
	h.epoch, h.durable, h.offset = l.mu.epoch, l.mu.durable, l.mu.end
	if h.length > 0 {
		sum := l.mu.seed
		for _, p := range parts {
			sum = crc32.Update(sum, castagnoli, p)
		}
		h.checksum = sum
	}
	l.mu.tally.add(h.encode(l.mu.header[:], l.mu.seed), h.length)
	l.copyLocked(l.mu.header[:])
	ref := blobRef{l.mu.head.number, l.mu.end, h.length, h.checksum}
	for _, p := range parts {
		l.copyLocked(p)
	}
	l.mu.since += uint64(recordHeader + h.length)
	l.mu.records++
	return ref, nil
}

// append appends one record of the store's own, of any goroutine.
func (l *log) append(kind recordType, payload []byte) (ref blobRef, epoch uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ref, err = l.appendLocked(header{kind: kind}, payload)
	return ref, l.mu.epoch, err
}

// commitLocked closes the current epoch, pads, and begins the next epoch. It
// returns the epoch closed and how many buffers have to be written for it, for which
// the caller calls waitWritten soon.
func (l *log) commitLocked() (epoch, queued uint64, err error) {
	t := l.mu.tally
	if _, err := l.appendLocked(header{kind: recordCommit}, t.encode()); err != nil {
		return 0, 0, err
	}
	l.fillLocked()
	l.queueLocked()
	epoch = l.mu.epoch
	l.mu.epoch++
	l.mu.tally = tally{}
	return epoch, l.mu.queued, nil
}

// idle tells whether the current epoch has no record.
func (l *log) idleLocked() bool { return l.mu.tally.count == 0 }

// A nodeStore is the tree's view of the store: nodes are records of the log.
type nodeStore struct {
	s *Store
	// epoch is the newest epoch that a node was appended to; only the
	// checkpoint's goroutine writes nodes.
	epoch uint64
}

// WriteNode implements extents.NodeStore. Inner nodes are written twice (rule R9).
func (n *nodeStore) WriteNode(level uint8, data []byte) (extents.Pointer, error) {
	p := extents.Pointer{Copies: 1, Length: uint16(len(data))}
	if level > 0 {
		p.Copies = 2
	}
	for i := range p.Copies {
		ref, epoch, err := n.s.log.append(recordNode, data)
		if err != nil {
			return extents.Pointer{}, err
		}
		n.epoch = epoch
		p.Places[i] = extents.Place{Segment: ref.segment, Offset: ref.offset, Checksum: ref.checksum}
	}
	return p, nil
}

// nodeRetries are the pauses before a node that the medium refuses to give is
// asked for again: the kernel has tried for long already, so a path that failed
// over is most of what they help with.
var nodeRetries = []time.Duration{10 * time.Millisecond, 100 * time.Millisecond}

// ReadNode implements extents.NodeStore.
func (n *nodeStore) ReadNode(p extents.Pointer) ([]byte, error) {
	b, err := n.readCopies(p)
	for _, pause := range nodeRetries {
		if !mediumError(err) {
			break
		}
		time.Sleep(pause)
		b, err = n.readCopies(p)
	}
	if mediumError(err) {
		err = fmt.Errorf("%w: %w", extents.ErrUnreadable, err)
	}
	if err != nil {
		n.s.opts.Warn("a node of the map cannot be read, its blocks are lost", err)
		return nil, fmt.Errorf("map node: %w", err)
	}
	return b, nil
}

// readCopies reads a node from the first of its copies that is whole. Without one
// the error is an I/O error if there was any, since that may pass.
func (n *nodeStore) readCopies(p extents.Pointer) ([]byte, error) {
	var worst error
	for _, at := range p.Places[:p.Copies] {
		b := make([]byte, p.Length)
		err := n.s.readBlob(b, blobRef{at.Segment, at.Offset, uint32(p.Length), at.Checksum})
		if err == nil {
			return b, nil
		}
		if worst == nil || errors.Is(worst, ErrCorrupt) {
			worst = err
		}
	}
	return nil, worst
}

// mediumError reports whether err is what the kernel answers to a read of a bad
// place, and not of a disk that is gone or of a file that is closed.
func mediumError(err error) bool {
	for _, e := range []error{
		syscall.EIO,       // most
		syscall.ENODATA,   // medium errors of a SCSI or NVMe disk
		syscall.EILSEQ,    // dm-integrity, T10 protection
		syscall.EBADMSG,   // checksums of a filesystem
		syscall.EREMOTEIO, // target errors
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
