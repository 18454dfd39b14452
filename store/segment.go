package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"cnbd/internal/disk"
	"cnbd/internal/mutant"
)

const (
	// segmentsMin is the fewest segments that a store can work with: one being
	// written, its successor, the reserves, what changes of the map need, and one for
	// data.
	segmentsMin = reserveSegments + cleanSegments + 2*growthSegments + 4

	// reserveSegments are kept from client writes, so that commits, trims and
	// checkpoints always find room (rule R8).
	reserveSegments = 4

	// cleanSegments, or one in cleanReserve if that is more, are kept from client
	// writes for the cleaner: it needs space before it gains any (rule R8). What it
	// gains in one go must be more than the checkpoints cost that set it free. Only
	// the former have their space on the host: how full that is changes little.
	cleanSegments = 4
	cleanReserve  = 32

	// growthSegments, or one in growthReserve if that is more, are kept from each
	// kind of reservation for the next one (see Want).
	growthSegments = 2
	growthReserve  = 64

	// warmSegments is how many freed segments keep their space on the host:
	// overwriting written blocks makes a sync cheaper than extending the file.
	warmSegments = 2
)

// A segmentState is where a segment is in its life:
//
//	free -> used (named as successor, then written, then sealed) -> free
//
// It goes back to free when neither of the two newest durable checkpoints, nor
// a reader, needs it (rule R4).
type segmentState uint8

const (
	segmentFree segmentState = iota
	segmentUsed
)

// A segment is an entry of the segment table. refs, bytes and emptyAt are those
// of the newest merged map, not of the running overlay (rule R3).
type segment struct {
	state     segmentState
	allocated bool   // the host has given all of its space, as far as this process knows
	unwritten bool   // allocated, and no byte of it was ever written, or few
	remains   bool   // free, not allocated, and the host may hold some of its space
	seed      uint32 // of its checksums
	serial    uint64
	refs      uint64 // blocks of data and copies of nodes that the map refers to
	bytes     uint64 // live share of its stored bytes
	emptyAt   uint64 // the first checkpoint that refers to nothing in it; 0: it is referred to
}

// segments is the table of all segments: what they are, and which may be written.
// Safe for concurrent use.
type segments struct {
	size  uint32
	total atomic.Uint32 // how many the capacity allows; changed with mu held
	marks bool          // the host marks what it gives as not written; set before use

	alloc sync.Mutex // one at a time asks the host for space; taken before mu

	mu    sync.RWMutex
	table []segment         // guarded by mu; grows up to total, index is the segment number
	free  uint32            // guarded by mu; number of free ones, those beyond the table included
	warm  uint32            // guarded by mu; number of free ones that have space on the host
	rests uint32            // guarded by mu; number of free ones with remains
	going uint32            // guarded by mu; number of those that are punched now, and free in a moment
	low   uint32            // guarded by mu; no free segment lies below it
	pins  map[uint64]int    // guarded by mu; number of readers at a checkpoint
	held  map[*Pin]struct{} // guarded by mu; each has one of pins until it is given up
}

func newSegments(g *Geometry) *segments {
	t := &segments{size: g.SegmentSize, free: g.Segments(), pins: make(map[uint64]int), held: make(map[*Pin]struct{})}
	t.total.Store(g.Segments())
	return t
}

// at is the entry of segment n, which is made if need be. REQUIRES: t.mu held.
func (t *segments) atLocked(n uint32) *segment {
	for uint32(len(t.table)) <= n {
		t.table = append(t.table, segment{})
	}
	return &t.table[n]
}

// base is the offset of segment n in the file.
func (t *segments) base(n uint32) int64 { return segmentsOffset + int64(n)*int64(t.size) }

// seed is the seed of the checksums in segment n, 0 if it is not used.
func (t *segments) seed(n uint32) uint32 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if n >= uint32(len(t.table)) || t.table[n].state != segmentUsed {
		return 0
	}
	return t.table[n].seed
}

// take makes a free segment used and returns its number: an allocated one if
// there is one, else the lowest, so that the file stays short.
func (t *segments) take() (uint32, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free == 0 {
		return 0, false
	}
	found, first := noSegment, noSegment
	for n := t.low; n < uint32(len(t.table)); n++ {
		if s := &t.table[n]; s.state == segmentFree {
			if first == noSegment {
				first = n
			}
			if s.allocated {
				found = n
			}
			if s.allocated || t.warm == 0 {
				break
			}
		}
	}
	if first == noSegment {
		first = uint32(len(t.table))
	}
	t.low = first
	if found == noSegment {
		found = first
	}
	t.useLocked(found)
	return found, true
}

// adopt makes segment n, found in the log by recovery, used. If the checkpoint
// knows it by that serial, its accounting stays.
func (t *segments) adopt(n uint32, serial uint64, seed uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.atLocked(n); s.state != segmentUsed || s.serial != serial {
		t.useLocked(n)
		t.table[n].serial, t.table[n].seed = serial, seed
	}
}

// use makes segment n used, as one not yet begun.
func (t *segments) use(n uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.useLocked(n)
}

func (t *segments) useLocked(n uint32) {
	s := t.atLocked(n)
	if s.state == segmentFree {
		t.free--
		if s.allocated {
			t.warm--
		}
		if s.remains {
			t.rests--
		}
	}
	*s = segment{state: segmentUsed, allocated: s.allocated, unwritten: s.unwritten}
}

// identify notes who segment n, which is used, is from now on.
func (t *segments) identify(n uint32, serial uint64, seed uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := &t.table[n]
	s.serial, s.seed = serial, seed
}

// wrote notes that segment n has been written to its end.
func (t *segments) wrote(n uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.table[n].unwritten = false
}

// unwritten tells whether segment n, which has its space, was never written before.
func (t *segments) unwritten(n uint32) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return n < uint32(len(t.table)) && t.table[n].unwritten
}

// account changes what the merged map refers to in segment n.
func (t *segments) account(n uint32, refs, bytes int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.atLocked(n)
	s.refs = uint64(int64(s.refs) + refs)
	s.bytes = uint64(int64(s.bytes) + bytes)
}

// recount replaces the accounting by what the map refers to, and takes segments
// that it refers to and that counted as free. Segments without a reference whose
// serial is below spare are free. It is for a repair.
func (t *segments) recount(used map[uint32]*usage, spare uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n, u := range used {
		if u.refs > u.goneRefs && t.atLocked(n).state == segmentFree {
			t.useLocked(n)
			t.table[n].serial = 1 // unknown, and before all others
		}
	}
	for n := range t.table {
		s := &t.table[n]
		if s.state != segmentUsed {
			continue
		}
		s.refs, s.bytes = 0, 0
		if u := used[uint32(n)]; u != nil {
			s.refs, s.bytes = u.refs-u.goneRefs, u.bytes-u.goneBytes
		}
		switch {
		case s.refs > 0:
			s.emptyAt = 0
		case s.serial < spare:
			*s = segment{remains: true}
			t.free++
			t.rests++
			t.low = min(t.low, uint32(n))
		}
	}
}

// pin keeps every segment that the state of checkpoint version, or a later one,
// refers to from being reused until unpin.
func (t *segments) pin(version uint64) {
	t.mu.Lock()
	t.pins[version]++
	t.mu.Unlock()
}

func (t *segments) unpin(version uint64) {
	t.mu.Lock()
	t.unpinLocked(version)
	t.mu.Unlock()
}

func (t *segments) unpinLocked(version uint64) {
	if t.pins[version]--; t.pins[version] == 0 {
		delete(t.pins, version)
	}
}

// markEmpty notes for checkpoint sequence, whose map has just been merged and
// whose replay starts in the segment with that serial, which segments it does
// not refer to. Segments from that serial on hold what is not merged yet.
func (t *segments) markEmpty(sequence, replaySerial uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for n := range t.table {
		s := &t.table[n]
		switch {
		case s.state != segmentUsed:
		case s.refs > 0:
			s.emptyAt = 0
		case s.emptyAt == 0 && s.serial != 0 && s.serial < replaySerial:
			s.emptyAt = sequence
		}
	}
}

// release frees the segments that neither checkpoint sequence nor the one before
// it needs, both being durable, and that no reader can be at (rule R4: a
// checkpoint that refers to nothing in a segment has a later place to start
// replay from than the segment, so its log is not needed either). It returns
// their numbers.
func (t *segments) release(sequence uint64) (freed []uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	oldest := t.oldestPinLocked()
	for n := range t.table {
		s := &t.table[n]
		if s.state == segmentUsed && s.emptyAt != 0 && (s.emptyAt < sequence || mutant.Is(mutant.ReuseBehindOne)) && s.emptyAt <= oldest {
			// Of one that was used before this process began nobody knows how much
			// of it the host has given: the space cannot be promised, but is to go.
			*s = segment{allocated: s.allocated, unwritten: s.unwritten, remains: !s.allocated}
			t.free++
			if s.allocated {
				t.warm++
			} else {
				t.rests++
			}
			t.low = min(t.low, uint32(n))
			freed = append(freed, uint32(n))
		}
	}
	return freed
}

// usable is the number of bytes of records that one segment surely takes.
func (t *segments) usable() uint64 {
	return uint64(t.size) - segmentData - recordHeader - ExtentBlocksMax*alignment - 2*alignment
}

// cleanReserve is the number of segments that are kept for the cleaner.
func (t *segments) cleanReserve() uint64 {
	return max(cleanSegments, uint64(t.total.Load())/cleanReserve)
}

// growthReserve is the number of segments that one kind of Want leaves to the next.
func (t *segments) growthReserve() uint64 {
	return max(growthSegments, uint64(t.total.Load())/growthReserve)
}

// room is the number of free segments, and of those with space on the host. One whose
// space is on its way back to the host counts: what fits is not refused for that.
func (t *segments) room() (free, warm uint32) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.free + t.going, t.warm
}

// ensure asks the host for space until want free segments have it, or all free
// ones. A host that is full is ErrHostFull.
func (t *segments) ensure(f disk.File, want uint32) error {
	for {
		done, err := t.ensureOne(f, want)
		if errors.Is(err, ErrHostFull) && t.keep(f, want) {
			return nil
		}
		if done || err != nil {
			return err
		}
	}
}

// keep asks for what the host still holds of free segments, which may be all of
// their space, until want have it, and tells whether they do.
func (t *segments) keep(f disk.File, want uint32) bool {
	return t.allocateAny(f, want, func(s *segment) bool { return s.remains })
}

// find does so for all free segments in the first bytes of the file: one call for
// each, and for the start alone.
func (t *segments) find(f disk.File, want uint32, bytes int64) bool {
	if bytes > segmentsOffset {
		t.mu.Lock()
		last := min(uint64(t.total.Load()), uint64(bytes-segmentsOffset-1)/uint64(t.size)+1) - 1
		t.atLocked(uint32(last))
		t.mu.Unlock()
	}
	return t.allocateAny(f, want, func(*segment) bool { return true })
}

// allocateAny asks for the space of the free segments of the table that which is true
// of, until want have it, and tells whether they do.
func (t *segments) allocateAny(f disk.File, want uint32, which func(*segment) bool) bool {
	for n := uint32(0); ; n++ {
		t.mu.RLock()
		end := min(uint32(len(t.table)), t.total.Load())
		for n < end && !(t.table[n].state == segmentFree && !t.table[n].allocated && which(&t.table[n])) {
			n++
		}
		enough := t.warm >= want || t.warm == t.free
		t.mu.RUnlock()
		if enough || n == end {
			return enough
		}
		t.alloc.Lock()
		err := t.allocate(f, n)
		t.alloc.Unlock()
		if err != nil && !errors.Is(err, ErrHostFull) {
			return false
		}
	}
}

// allocated tells whether the host has given the space of segment n, as far as this
// process knows.
func (t *segments) allocated(n uint32) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return n < uint32(len(t.table)) && t.table[n].allocated
}

// allocateUsed asks for the space of segment n, which is used, if it has none.
func (t *segments) allocateUsed(f disk.File, n uint32) error {
	if t.allocated(n) {
		return nil
	}
	t.alloc.Lock()
	defer t.alloc.Unlock()
	return t.allocate(f, n)
}

// used is the number of segments that are not free.
func (t *segments) used() uint32 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.total.Load() - t.free - t.going
}

// ensureOne is a step of ensure, and tells whether there was nothing left to do.
// The lock is given up behind each segment, here and where space goes back to the
// host: a host takes its time, and who needs one segment does not wait for all.
func (t *segments) ensureOne(f disk.File, want uint32) (done bool, err error) {
	t.alloc.Lock()
	defer t.alloc.Unlock()
	n, ok := t.nextCold(want)
	if !ok {
		return true, nil
	}
	err = t.allocate(f, n)
	if errors.Is(err, ErrHostFull) {
		// A host may have given a part (ext4 does), which is of no use here.
		t.mu.Lock()
		if s := t.atLocked(n); s.state == segmentFree && !s.remains {
			s.remains = true
			t.rests++
		}
		t.mu.Unlock()
	}
	return false, err
}

// allocate asks the host for the space of segment n. A host that is full is
// ErrNoSpace. REQUIRES: t.alloc held, or nobody else uses t yet.
func (t *segments) allocate(f disk.File, n uint32) error {
	if err := f.Allocate(t.base(n), int64(t.size)); err != nil {
		// EFBIG: the filesystem has no larger files.
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
			return fmt.Errorf("store: the backing filesystem has no space for segment %d: %w: %w", n, ErrHostFull, err)
		}
		return fmt.Errorf("store: allocate segment %d: %w", n, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.atLocked(n); !s.allocated {
		s.allocated, s.unwritten = true, t.marks
		if s.state == segmentFree {
			t.warm++
		}
		if s.remains {
			s.remains = false
			t.rests--
		}
	}
	return nil
}

// nextCold is the lowest free segment without space, if fewer than want have it.
func (t *segments) nextCold(want uint32) (uint32, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.warm >= want || t.warm == t.free {
		return 0, false
	}
	for n := t.low; n < uint32(len(t.table)); n++ {
		if s := &t.table[n]; s.state == segmentFree && !s.allocated {
			return n, true
		}
	}
	return uint32(len(t.table)), true
}

// chill gives the space of all free segments back to the host, the highest
// first, but leaves keep of them allocated. The space is noted as gone before it
// is: a segment that is taken meanwhile is asked for again. keep is called with
// t.mu held: what has been reserved before a segment goes is seen.
func (t *segments) chill(f disk.File, keep func() uint32) error {
	for {
		if done, err := t.chillOne(f, keep); done || err != nil {
			return err
		}
	}
}

// chillOne is a step of chill, and tells whether there was nothing left to do.
func (t *segments) chillOne(f disk.File, keep func() uint32) (done bool, err error) {
	t.alloc.Lock()
	defer t.alloc.Unlock()
	n, ok := t.nextWarm(keep)
	if !ok {
		return true, nil
	}
	return false, t.punch(f, n)
}

// sweep gives back what the host may hold of the free segments in the first bytes
// of the file, but for those that have their space on purpose: a process that was
// killed leaves some, and of what it has asked for nothing is known. When ctx ends
// its error is returned.
func (t *segments) sweep(ctx context.Context, f disk.File, bytes int64) error {
	most := (max(bytes, segmentsOffset) - segmentsOffset + int64(t.size) - 1) / int64(t.size)
	for n := uint32(min(most, int64(t.total.Load()))); n > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n--
		if err := t.sweepOne(f, n); err != nil {
			return err
		}
	}
	return nil
}

// sweepOne gives back what the host may hold of segment n, if it is free and does
// not have its space on purpose.
func (t *segments) sweepOne(f disk.File, n uint32) error {
	t.alloc.Lock()
	defer t.alloc.Unlock()
	t.mu.Lock()
	cold := false
	if n < t.total.Load() { // it may have been made smaller meanwhile
		s := t.atLocked(n)
		if cold = s.state == segmentFree && !s.allocated; cold {
			t.useLocked(n)
			t.going++
		}
	}
	t.mu.Unlock()
	if !cold {
		return nil
	}
	return t.punch(f, n)
}

// punch gives the space of segment n back to the host. It was free, is noted as
// used without space meanwhile, and is free again afterwards.
func (t *segments) punch(f disk.File, n uint32) error {
	err := f.Punch(t.base(n), int64(t.size))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.table[n].state = segmentFree
	t.going--
	t.free++
	t.low = min(t.low, n)
	if err != nil {
		return fmt.Errorf("store: punch segment %d: %w", n, err)
	}
	return nil
}

// nextWarm takes the highest free segment that is to be punched out of the free
// ones: one with remains, or one with space if more than keep have it.
func (t *segments) nextWarm(keep func() uint32) (uint32, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	spare := t.warm > keep()
	if !spare && t.rests == 0 {
		return 0, false
	}
	for n := len(t.table) - 1; n >= 0; n-- {
		if s := &t.table[n]; s.state == segmentFree && (s.remains || spare && s.allocated) {
			t.useLocked(uint32(n))
			t.going++
			s.allocated, s.unwritten = false, false
			return uint32(n), true
		}
	}
	return 0, false
}

// lowestFree returns up to most free segments, the lowest, of those in the table
// and behind it.
func (t *segments) lowestFree(most int) (free []uint32) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for n := t.low; n < t.total.Load() && len(free) < most; n++ {
		if n >= uint32(len(t.table)) || t.table[n].state == segmentFree {
			free = append(free, n)
		}
	}
	return free
}

// emptying is the number of segments that are empty, and that the next checkpoint
// sets free.
func (t *segments) emptying() (count uint64) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	oldest := t.oldestPinLocked()
	for n := range t.table {
		if s := &t.table[n]; s.state == segmentUsed && s.emptyAt != 0 && s.emptyAt <= oldest {
			count++
		}
	}
	return count
}

// spent tells whether checkpoints would set a segment free that was begun before that
// serial, the one of the segment that is written: it is empty, or may be found so.
func (t *segments) spent(before uint64) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	oldest := t.oldestPinLocked()
	for n := range t.table {
		if s := &t.table[n]; s.state == segmentUsed && s.refs == 0 && s.serial != 0 && s.serial < before && s.emptyAt <= oldest {
			return true
		}
	}
	return false
}

// pinned tells whether a segment is empty that only readers keep from being free.
func (t *segments) pinned() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	oldest := t.oldestPinLocked()
	for n := range t.table {
		if s := &t.table[n]; s.state == segmentUsed && s.emptyAt > oldest {
			return true
		}
	}
	return false
}

// oldestPinLocked is the oldest checkpoint that a reader is at. REQUIRES: t.mu held.
func (t *segments) oldestPinLocked() uint64 {
	oldest := uint64(math.MaxUint64)
	for v := range t.pins {
		oldest = min(oldest, v)
	}
	return oldest
}

// garbage is how many bytes of the segments that were begun before that serial
// are dead, and how many alive.
func (t *segments) garbage(before uint64) (dead, live uint64) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for n := range t.table {
		if s := &t.table[n]; s.state == segmentUsed && s.serial != 0 && s.serial < before && s.emptyAt == 0 {
			live += s.bytes
			dead += uint64(t.size) - segmentData - min(s.bytes, uint64(t.size)-segmentData)
		}
	}
	return dead, live
}

// A victim is a segment that may be cleaned.
type victim struct {
	number uint32
	seed   uint32
	serial uint64
	refs   uint64
	score  float64
}

// gains tells whether it is worth cleaning a segment with live bytes in it.
func (t *segments) gains(live uint64) bool {
	return live+uint64(t.size)/cleanGain <= uint64(t.size)-segmentData
}

// victims are the segments begun before that serial that are worth cleaning, the
// best first: greedy, those with the least alive; else by benefit and cost, where
// age tells how long what is alive will stay so (Rosenblum and Ousterhout, The
// Design and Implementation of a Log-Structured File System, 1992). skip is asked
// with t.mu held.
func (t *segments) victims(before uint64, greedy bool, skip func(serial, refs uint64) bool) []victim {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var all []victim
	for n := range t.table {
		s := &t.table[n]
		if s.state != segmentUsed || s.serial == 0 || s.serial >= before || s.refs == 0 || s.emptyAt != 0 || skip(s.serial, s.refs) {
			continue
		}
		// A record for each extent of full length is the least.
		live := s.bytes + s.refs/ExtentBlocksMax*recordHeader
		if !t.gains(live) {
			continue
		}
		u := float64(live) / float64(t.size)
		score := 1 - u
		if !greedy {
			score *= float64(before-s.serial) / (1 + u)
		}
		all = append(all, victim{uint32(n), s.seed, s.serial, s.refs, score})
	}
	slices.SortFunc(all, func(a, b victim) int { return cmp.Compare(b.score, a.score) })
	return all
}

// visit calls fn for each used segment in ascending order, with a copy.
func (t *segments) visit(fn func(n uint32, s segment)) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for n := range t.table {
		if t.table[n].state == segmentUsed {
			fn(uint32(n), t.table[n])
		}
	}
}
