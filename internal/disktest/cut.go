package disktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"slices"
	"sort"
	"strings"
	"sync"

	"cnbd/internal/block"
)

// A CutLog is the history of what several clients asked of one device at the
// same time, and the judge of what a crash has left of it (promises P1 and P2).
//
// Requests are of whole blocks. Each block written tells who wrote it: its place,
// the client, the number of the request, and a checksum. Each request is stamped
// when it is sent and when it is answered. [CutLog.Check] reads the whole device
// and decides whether one cut through the history explains it, that is, whether
// there are a set S of requests and an order of them such that
//
//  1. every request in S was sent;
//  2. if b is in S, so is every a that was answered before b was sent, and comes
//     before b in the order;
//  3. S has every request answered before the last answered FLUSH was sent, and
//     every answered request with FUA;
//  4. each block holds what the last request of S that changed it has put there,
//     or what was there in the beginning if there is none.
//
// A request is in S with all of its blocks, and the order is one for all blocks:
// what is left is the state of one moment between whole requests.
//
// The first two rules make S a cut at one time T: all that was answered before T,
// nothing sent after it, and some of what was under way. The check finds the
// times at which each block can be explained, and then which of the requests
// under way must have happened. Its cost is that of one pass over all blocks of
// all requests, with a logarithm. Where several requests could have zeroed a
// block last, the order of rule 2 is not examined for that block; apart from
// that the answer is exact.
//
// All methods may be called concurrently.
type CutLog struct {
	opts CutOptions

	mu    sync.Mutex
	clock int64
	first uint64   // number of ops[0]
	ops   []*CutOp // in the order in which they were sent
	base  []uint64 // by block: what it held in the beginning, the number of a request plus 1, or 0 for zeros
}

// CutOptions are the options of a CutLog.
type CutOptions struct {
	Seed   uint64 // marks the blocks, so that those of another run are not taken for ours
	Blocks int    // size of the device

	// Split says that requests are cut into blocks on their way, as by the block
	// layer of a client: then each block of a request is one of its own.
	Split bool

	// Now is the place in the history of the disk underneath, such as [Disk.Ops],
	// for CheckAt. It may be nil.
	Now func() int64
}

// A CutOp is one request: write, zeroes, trim or flush.
type CutOp struct {
	Number uint64 // in the log
	Client uint32
	Verb   Verb
	Range  block.Range
	FUA    bool

	seed             uint64
	refused          bool
	sent, answered   int64 // by the log's clock, which counts from 1
	sentAt, answerAt int64 // by CutOptions.Now
}

// never is the time of an answer that has not come.
const never = math.MaxInt64

func (o *CutOp) String() string {
	s := fmt.Sprintf("#%d (client %d, %s", o.Number, o.Client, o.Verb)
	if o.Verb != VerbFlush {
		s += " " + o.Range.String()
	}
	if o.FUA {
		s += " fua"
	}
	s += fmt.Sprintf(", sent at %d", o.sent)
	switch {
	case o.refused:
		s += ", refused"
	case o.answered != never:
		s += fmt.Sprintf(", answered at %d", o.answered)
	}
	return s + ")"
}

// NewCutLog is the log of a device that is all zeros.
func NewCutLog(o CutOptions) *CutLog {
	if o.Now == nil {
		o.Now = func() int64 { return 0 }
	}
	return &CutLog{opts: o, base: make([]uint64, o.Blocks)}
}

// Send notes a request that is about to be sent. r is ignored for a flush.
func (l *CutLog) Send(client int, v Verb, r block.Range, fua bool) *CutOp {
	if v == VerbRead || v != VerbFlush && (r.Empty() || r.End > block.Index(l.opts.Blocks)) {
		panic(fmt.Sprintf("disktest: %v of %v in a CutLog of %d blocks", v, r, l.opts.Blocks))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	o := &CutOp{Number: l.first + uint64(len(l.ops)), Client: uint32(client), Verb: v, Range: r, FUA: fua,
		seed: l.opts.Seed, sent: l.clock, answered: never, sentAt: l.opts.Now(), answerAt: never}
	if v == VerbFlush {
		o.Range = block.Range{}
	}
	l.ops = append(l.ops, o)
	return o
}

// Answer notes that o was answered with success. One that failed, or was never
// answered, may have happened or not.
func (l *CutLog) Answer(o *CutOp) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.clock++
	o.answered, o.answerAt = l.clock, l.opts.Now()
}

// Refuse notes that o was refused, so that nothing of it can have happened.
func (l *CutLog) Refuse(o *CutOp) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o.refused = true
}

// Restart forgets all requests and begins anew with what the device in r holds,
// after a crash: what clients have read then is durable.
func (l *CutLog) Restart(r io.ReaderAt) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	base := make([]uint64, len(l.base))
	if err := eachBlock(r, len(base), func(b int, p []byte) error {
		h, err := decodeCut(p, l.opts.Seed, b)
		if err == nil && h != nil {
			base[b] = h.number + 1
		}
		return err
	}); err != nil {
		return err
	}
	l.first += uint64(len(l.ops))
	l.ops, l.base = nil, base
	return nil
}

// Ops is the number of requests since the beginning or the last Restart.
func (l *CutLog) Ops() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ops)
}

// A block that was written:
//
//	 0  8  cutMagic
//	 8  8  seed of the log
//	16  8  its place, in blocks
//	24  8  number of the request
//	32  4  client
//	36  4  CRC-32C of the other bytes
//	40     noise, then one byte over and over: blocks that compress well, badly,
//	       and not at all
const (
	cutMagic  = 0xb10c_5e1f_de5c_21be
	cutHeader = 40
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Payload appends the bytes of a write to dst.
func (o *CutOp) Payload(dst []byte) []byte {
	for b := o.Range.Start; b < o.Range.End; b++ {
		n := len(dst)
		dst = slices.Grow(dst, block.Size)[:n+block.Size]
		o.fill(dst[n:], b)
	}
	return dst
}

func (o *CutOp) fill(p []byte, b block.Index) {
	order := binary.LittleEndian
	order.PutUint64(p, cutMagic)
	order.PutUint64(p[8:], o.seed)
	order.PutUint64(p[16:], uint64(b))
	order.PutUint64(p[24:], o.Number)
	order.PutUint32(p[32:], o.Client)
	chance := mix(o.seed, mix(o.Number, uint64(b)))
	noise := cutHeader + int(chance>>8)%(block.Size-cutHeader)
	switch chance % 4 {
	case 0:
		noise = block.Size
	case 1:
		noise = cutHeader
	}
	fill(p[cutHeader:noise], Noise, 0, 0, chance)
	fill(p[noise:], Constant, 0, 0, chance)
	order.PutUint32(p[36:], cutSum(p))
}

func cutSum(p []byte) uint32 {
	return crc32.Update(crc32.Checksum(p[:36], castagnoli), castagnoli, p[cutHeader:])
}

// A cutHead is what a block says of itself.
type cutHead struct {
	number uint64
	client uint32
}

// decodeCut is what the block b with the bytes p says; nil for zeros.
func decodeCut(p []byte, seed uint64, b int) (*cutHead, error) {
	if isZero(p) {
		return nil, nil
	}
	order := binary.LittleEndian
	h := &cutHead{order.Uint64(p[24:]), order.Uint32(p[32:])}
	place := order.Uint64(p[16:])
	switch {
	case order.Uint64(p) != cutMagic:
		return nil, fmt.Errorf("block %d is from nowhere: %x", b, p[:16])
	case order.Uint32(p[36:]) != cutSum(p):
		return nil, fmt.Errorf("block %d is torn: it says #%d of client %d for block %d", b, h.number, h.client, place)
	case order.Uint64(p[8:]) != seed:
		return nil, fmt.Errorf("block %d is from nowhere: it is of the run with seed %d", b, order.Uint64(p[8:]))
	case place != uint64(b):
		return nil, fmt.Errorf("block %d has what #%d of client %d wrote to block %d", b, h.number, h.client, place)
	}
	return h, nil
}

var zeroBlock [block.Size]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }

// eachBlock calls f with each of the n blocks of r. It ends at once if r cannot
// be read, and goes on over the first few errors of f.
func eachBlock(r io.ReaderAt, n int, f func(b int, p []byte) error) error {
	const step, errorsMax = 16, 8
	var errs []error
	buf := make([]byte, min(n, step)*block.Size)
	for b := 0; b < n && len(errs) < errorsMax; {
		p := buf[:min(n-b, step)*block.Size]
		if err := readFull(r, p, int64(b)*block.Size); err != nil {
			return err
		}
		for ; len(p) > 0; b, p = b+1, p[block.Size:] {
			if err := f(b, p[:block.Size]); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Check reads the device in r and tells why no cut explains what it holds; nil
// if one does.
func (l *CutLog) Check(r io.ReaderAt) error { return l.CheckAt(r, never) }

// CheckAt is Check as of place at of the disk's history, see CutOptions.Now:
// what was sent after it was never sent, what was answered after it was not
// answered.
func (l *CutLog) CheckAt(r io.ReaderAt, at int64) error {
	c := l.cut(at)
	if err := eachBlock(r, len(c.blocks), c.read); err != nil {
		return err
	}
	return c.decide()
}

// Dump is the history up to at and what the device in r holds, a line for each
// event in order, to be kept with a failure:
//
//	send 3 1 write [0,2) fua     request 3 of client 1
//	answer 3
//	refuse 4
//	holds 0 3                    block 0 has what request 3 wrote; others have zeros
//
// Of a block that is not as a request wrote it, it says why.
func (l *CutLog) Dump(r io.ReaderAt, at int64) string {
	c := l.cut(at)
	type event struct {
		at   int64
		text string
	}
	var events []event
	for _, o := range c.sent {
		s := fmt.Sprintf("send %d %d %s", o.Number, o.Client, o.Verb)
		if o.Verb != VerbFlush {
			s += " " + o.Range.String()
		}
		if o.FUA {
			s += " fua"
		}
		if o.refused {
			s += fmt.Sprintf("\nrefuse %d", o.Number)
		}
		events = append(events, event{o.sent, s})
		if o.answered != never {
			events = append(events, event{o.answered, fmt.Sprintf("answer %d", o.Number)})
		}
	}
	slices.SortFunc(events, func(a, b event) int { return int(a.at - b.at) })
	var s strings.Builder
	for _, e := range events {
		fmt.Fprintln(&s, e.text)
	}
	err := eachBlock(r, len(c.blocks), func(b int, p []byte) error {
		switch h, err := decodeCut(p, l.opts.Seed, b); {
		case err != nil:
			fmt.Fprintf(&s, "# %v\n", err)
		case h != nil:
			fmt.Fprintf(&s, "holds %d %d\n", b, h.number)
		}
		return nil
	})
	if err != nil {
		fmt.Fprintf(&s, "# %v\n", err)
	}
	return s.String()
}

// A cutCheck is a history as of one moment, and what the device held after it.
type cutCheck struct {
	log  *CutLog
	sent []CutOp // copies, of the log's requests that had been sent
	ops  []cutOp // of them, those that change blocks, in order
	// index is by number, from log.first on, the place in ops of a request, or
	// of its first block if they are split.
	index  []int
	blocks []cutBlock
}

type cutOp struct {
	*CutOp
	r    block.Range
	zero bool
}

// A cutBlock is one block of the device.
type cutBlock struct {
	base    uint64
	holds   int   // place in ops of the request that wrote what it holds, or one of the below
	changes []int // places in ops of those that change it, in order
	// soonest is, for each of changes, that of it and all later ones which was
	// answered first.
	soonest []int
}

const (
	holdsZeros = -1 // by some request, or from the beginning
	holdsBase  = -2 // not zeros
)

// cut makes the check as of place at.
func (l *CutLog) cut(at int64) *cutCheck {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &cutCheck{log: l, blocks: make([]cutBlock, len(l.base))}
	for b := range c.blocks {
		c.blocks[b].base = l.base[b]
	}
	for _, o := range l.ops {
		if o.sentAt > at {
			break
		}
		c.sent = append(c.sent, *o)
		if o.answerAt > at {
			c.sent[len(c.sent)-1].answered = never
		}
	}
	for i := range c.sent {
		o := &c.sent[i]
		c.index = append(c.index, len(c.ops))
		if o.refused {
			continue
		}
		step := o.Range.Len()
		if l.opts.Split {
			step = 1
		}
		for r := o.Range; !r.Empty(); r.Start += block.Index(step) {
			c.ops = append(c.ops, cutOp{o, block.Span(r.Start, step), o.Verb != VerbWrite})
		}
	}
	for i, o := range c.ops {
		for b := o.r.Start; b < o.r.End; b++ {
			c.blocks[b].changes = append(c.blocks[b].changes, i)
		}
	}
	for b := range c.blocks {
		k := &c.blocks[b]
		k.soonest = slices.Clone(k.changes)
		for i := len(k.soonest) - 2; i >= 0; i-- {
			if c.ops[k.soonest[i+1]].answered < c.ops[k.soonest[i]].answered {
				k.soonest[i] = k.soonest[i+1]
			}
		}
	}
	return c
}

// read notes what block b holds.
func (c *cutCheck) read(b int, p []byte) error {
	k := &c.blocks[b]
	h, err := decodeCut(p, c.log.opts.Seed, b)
	switch {
	case err != nil:
		return err
	case h == nil:
		k.holds = holdsZeros
		return nil
	case h.number+1 == k.base:
		k.holds = holdsBase
		return nil
	case h.number < c.log.first:
		return fmt.Errorf("block %d holds #%d of client %d, which was gone before the history began", b, h.number, h.client)
	}
	n := h.number - c.log.first
	if n >= uint64(len(c.sent)) {
		return fmt.Errorf("block %d is from nowhere: #%d of client %d had not been sent", b, h.number, h.client)
	}
	o := &c.sent[n]
	if o.Verb != VerbWrite || o.refused || !o.Range.Contains(block.Index(b)) || o.Client != h.client {
		return fmt.Errorf("block %d is from nowhere: it says #%d of client %d, which was %v", b, h.number, h.client, o)
	}
	k.holds = c.index[n]
	if c.log.opts.Split {
		k.holds += b - int(o.Range.Start)
	}
	return nil
}

// until is the last time of a cut in which a version of block k that was there at
// the time answered can be the newest, and the request that ends this, if any.
func (c *cutCheck) until(k *cutBlock, answered int64) (int64, *cutOp) {
	i := sort.Search(len(k.changes), func(i int) bool { return c.ops[k.changes[i]].sent > answered })
	if i == len(k.changes) {
		return never, nil
	}
	o := &c.ops[k.soonest[i]]
	return o.answered, o
}

// held is the time at which what block k holds was certainly there.
func (c *cutCheck) held(k *cutBlock) int64 {
	if k.holds >= 0 {
		return c.ops[k.holds].answered
	}
	return 0
}

func (c *cutCheck) describe(b int) string {
	k := &c.blocks[b]
	switch {
	case k.holds >= 0:
		return fmt.Sprintf("block %d holds %v", b, c.ops[k.holds])
	case k.holds == holdsBase:
		return fmt.Sprintf("block %d holds #%d, as in the beginning", b, k.base-1)
	}
	return fmt.Sprintf("block %d holds zeros", b)
}

// decide looks for a cut.
func (c *cutCheck) decide() error {
	// least and most are the bounds that blocks with known writers set, and the
	// requests that are certainly in the set.
	least, leastWhy := int64(0), "in the beginning"
	later := func(t int64, why func() string) {
		if t > least {
			least, leastWhy = t, why()
		}
	}
	for i := range c.sent {
		o := &c.sent[i]
		if o.answered == never {
			continue
		}
		if o.Verb == VerbFlush || o.FUA {
			later(o.sent, func() string { return fmt.Sprintf("%v was answered", o) })
		}
	}
	most, mostWhy := int64(never), ""
	for b := range c.blocks {
		k := &c.blocks[b]
		if k.holds == holdsZeros {
			continue
		}
		if k.holds >= 0 {
			later(c.ops[k.holds].sent, func() string { return c.describe(b) })
		}
		if t, o := c.until(k, c.held(k)); t < most {
			most, mostWhy = t, fmt.Sprintf("%s, and lacks %v", c.describe(b), o)
		}
	}
	if least > most {
		return fmt.Errorf("a mixed state: %s; %s, and that was answered before", leastWhy, mostWhy)
	}

	// Within the bounds an earlier cut is easier, but for the zeros that a later
	// one has.
	times := []int64{least}
	for _, o := range c.ops {
		if o.zero && o.sent > times[len(times)-1] && o.sent <= most {
			times = append(times, o.sent)
		}
	}
	explained := make([]int, len(times)+1) // differences of the number of zero blocks that a cut then explains
	zeros := 0
	for b := range c.blocks {
		if k := &c.blocks[b]; k.holds == holdsZeros {
			zeros++
			c.zeroTimes(k, times, func(i, j int) { explained[i]++; explained[j]-- })
		}
	}
	var first error
	n, best, bestAt := 0, -1, 0
	for i, t := range times {
		n += explained[i]
		if n > best {
			best, bestAt = n, i
		}
		if n < zeros {
			continue
		}
		err := c.try(t)
		if err == nil {
			return nil
		}
		if first == nil {
			first = err
		}
	}
	if first == nil {
		first = c.unexplainedZeros(times, bestAt)
	}
	return fmt.Errorf("a mixed state: %s; then: %w", leastWhy, first)
}

// zeroTimes calls f with the disjoint ranges [i,j) of times at which a cut can
// explain that k holds zeros, looking at k alone.
func (c *cutCheck) zeroTimes(k *cutBlock, times []int64, f func(i, j int)) {
	done := 0
	add := func(from, to int64) {
		i := sort.Search(len(times), func(i int) bool { return times[i] >= from })
		j := sort.Search(len(times), func(i int) bool { return times[i] > to })
		if i = max(i, done); i < j {
			f(i, j)
			done = j
		}
	}
	if k.base == 0 {
		t, _ := c.until(k, 0)
		add(0, t)
	}
	for _, i := range k.changes { // in the order of from
		if o := &c.ops[i]; o.zero {
			t, _ := c.until(k, o.answered)
			add(o.sent, t)
		}
	}
}

// unexplainedZeros names a block whose zeros a cut at times[at] does not explain.
func (c *cutCheck) unexplainedZeros(times []int64, at int) error {
	for b := range c.blocks {
		k := &c.blocks[b]
		if k.holds != holdsZeros {
			continue
		}
		ok := false
		c.zeroTimes(k, times, func(i, j int) { ok = ok || i <= at && at < j })
		if ok {
			continue
		}
		return c.unexplained(b, cutSet{at: times[at]})
	}
	return nil
}

// unexplained is the error for block b, which holds zeros and should not after s.
func (c *cutCheck) unexplained(b int, s cutSet) error {
	for _, i := range slices.Backward(c.blocks[b].changes) {
		if c.has(s, i) && !c.ops[i].zero {
			return fmt.Errorf("block %d holds zeros, and lacks %v", b, c.ops[i])
		}
	}
	return fmt.Errorf("block %d holds zeros, and lacks what it held in the beginning", b)
}

// A cutSet are the requests of a cut: those answered before at, and those of the
// requests under way then that are in the map.
type cutSet struct {
	at       int64
	underWay map[int]bool
}

func (c *cutCheck) has(s cutSet, i int) bool {
	return c.ops[i].answered < s.at || s.underWay[i]
}

// try tells why a cut at time at, which no block by itself speaks against, does
// not explain the device.
func (c *cutCheck) try(at int64) error {
	s := cutSet{at, map[int]bool{}}
	var zeros []int // blocks with zeros that requests under way change
	seen := map[int]bool{}
	for i, o := range c.ops {
		if o.sent > at {
			break
		}
		if o.answered < at {
			continue
		}
		if o.FUA && o.answered != never {
			if err := c.add(s, i); err != nil {
				return err
			}
		}
		for b := int(o.r.Start); b < int(o.r.End); b++ {
			k := &c.blocks[b]
			if k.holds == holdsZeros && !seen[b] {
				seen[b] = true
				zeros = append(zeros, b)
			}
			if k.holds == i {
				if err := c.add(s, i); err != nil {
					return err
				}
			}
		}
	}
	budget := 1000
	return c.settle(s, zeros, &budget)
}

// add adds request i, which is under way, to s, and tells what speaks against it.
func (c *cutCheck) add(s cutSet, i int) error {
	if s.underWay[i] {
		return nil
	}
	s.underWay[i] = true
	o := &c.ops[i]
	for b := int(o.r.Start); b < int(o.r.End); b++ {
		k := &c.blocks[b]
		if k.holds == i || k.holds == holdsZeros {
			continue
		}
		if c.held(k) < o.sent {
			return fmt.Errorf("%s, and lacks %v", c.describe(b), o)
		}
	}
	return nil
}

// settle completes s by requests under way that zeroed blocks, which are among
// zeros, and checks the order. budget bounds the number of combinations tried.
func (c *cutCheck) settle(s cutSet, zeros []int, budget *int) error {
	for n, b := range zeros {
		k := &c.blocks[b]
		if slices.ContainsFunc(c.lastZeroes(s, k), func(i int) bool { return c.has(s, i) }) || k.base == 0 && !slices.ContainsFunc(k.changes, func(i int) bool { return c.has(s, i) }) {
			continue
		}
		err := c.unexplained(b, s)
		for _, i := range k.changes {
			o := &c.ops[i]
			if !o.zero || o.sent > s.at || c.has(s, i) {
				continue
			}
			if o.r.Len() == 1 { // a choice for this block alone
				s.underWay[i] = true
				err = nil
				break
			}
			if *budget--; *budget < 0 {
				return errors.New("too many combinations of requests that may have happened")
			}
			with := cutSet{s.at, maps.Clone(s.underWay)}
			if err = c.add(with, i); err == nil {
				if err = c.settle(with, zeros[n:], budget); err == nil {
					return nil
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return c.order(s)
}

// lastZeroes are those requests that can have zeroed k last if s has happened:
// requests of s, and some that were under way.
func (c *cutCheck) lastZeroes(s cutSet, k *cutBlock) (last []int) {
	newest := int64(0)
	for _, i := range k.changes {
		if c.has(s, i) {
			newest = c.ops[i].sent // they ascend
		}
	}
	for _, i := range k.changes {
		if o := &c.ops[i]; o.zero && o.sent <= s.at && o.answered >= newest {
			last = append(last, i)
		}
	}
	return last
}

// order tells why the requests of s have no common order: one in which each is at
// a moment between being sent and being answered, and behind all those whose
// changes it has covered.
func (c *cutCheck) order(s cutSet) error {
	before := map[int][]int{} // by request, those under way with it that it covered
	for b := range c.blocks {
		k := &c.blocks[b]
		w := k.holds
		if w == holdsZeros && len(k.changes) > 0 {
			if z := c.lastZeroes(s, k); len(z) == 1 && c.has(s, z[0]) {
				w = z[0]
			}
		}
		if w < 0 {
			continue
		}
		for _, i := range k.changes {
			if i != w && c.has(s, i) && c.ops[i].answered > c.ops[w].sent {
				if p := before[w]; len(p) == 0 || p[len(p)-1] != i {
					before[w] = append(p, i)
				}
			}
		}
	}
	const visiting = -1
	moments := map[int]int64{}
	var moment func(i int) (int64, error)
	moment = func(i int) (int64, error) {
		if t, ok := moments[i]; ok {
			if t == visiting {
				return 0, fmt.Errorf("%v covers part of what covers part of it", c.ops[i])
			}
			return t, nil
		}
		moments[i] = visiting
		t := c.ops[i].sent
		for _, j := range before[i] {
			u, err := moment(j)
			if err != nil {
				return 0, err
			}
			if t = max(t, u); t > c.ops[i].answered {
				return 0, fmt.Errorf("%v was answered, and covers %v, which comes after it on another block", c.ops[i], c.ops[j])
			}
		}
		moments[i] = t
		return t, nil
	}
	for _, i := range slices.Sorted(maps.Keys(before)) {
		if _, err := moment(i); err != nil {
			return err
		}
	}
	return nil
}
