package disktest

import (
	"math/rand/v2"
	"sync"
)

// A Loss decides what becomes of operations that no Sync covered. The zero value
// is LoseAll.
type Loss struct {
	mode lossMode
	seed uint64
}

type lossMode uint8

const (
	loseAll lossMode = iota
	keepAll
	random
)

var (
	// LoseAll keeps nothing that was not synced.
	LoseAll = Loss{mode: loseAll}
	// KeepAll keeps everything, the operation in flight too.
	KeepAll = Loss{mode: keepAll}
)

// Random has each operation lost, kept or torn by the chances of a seed, in any
// order, and what grew the file may be kept or lost apart from the data. How
// much is lost differs from seed to seed.
func Random(seed uint64) Loss { return Loss{random, seed} }

// An op is an operation with its effect. The zero op has none. It is immutable
// once it has taken effect, and shared.
type op struct {
	kind Kind
	num  int64
	off  int64  // for Truncate the new size
	n    int64  // Allocate, Punch
	data []byte // Write
	junk bool   // Punch: reads as junk

	covered int64 // Sync: it covers the operations with lower numbers
	failed  bool  // Sync
	loss    Loss  // failed Sync: what becomes of what it covered
}

// end is the size that o extends a disk to, 0 if it does not extend.
func (o op) end() int64 {
	switch o.kind {
	case Write:
		if len(o.data) == 0 {
			return 0
		}
		return o.off + int64(len(o.data))
	case Allocate:
		return o.off + o.n
	}
	return 0
}

// A medium is the durable state of a disk and the operations since.
type medium struct {
	opts    Options
	img     *image
	pending []op // in order of effect
}

// advance lets o happen.
func (m *medium) advance(o op) {
	switch o.kind {
	case 0:
	case Sync:
		// Numbers rise in pending, so that what is covered is a prefix.
		n := 0
		for n < len(m.pending) && m.pending[n].num < o.covered {
			n++
		}
		if o.failed {
			o.loss.settle(m.img, m.pending[:n], m.opts)
		} else {
			KeepAll.settle(m.img, m.pending[:n], m.opts)
		}
		m.pending = append([]op(nil), m.pending[n:]...)
	default:
		m.pending = append(m.pending, o)
	}
}

// crash is the image found after the power went in flight, which may be nil.
func (m *medium) crash(flight *op, loss Loss) *image {
	img := m.img.clone()
	after := medium{opts: m.opts, img: img, pending: m.pending[:len(m.pending):len(m.pending)]}
	if flight != nil && flight.kind != Sync {
		after.pending = append(after.pending, *flight)
	}
	if flight != nil && flight.kind == Sync && loss.mode == random && mix(loss.seed, 0)%4 == 0 {
		// The disk was done and only the answer was lost.
		after.advance(*flight)
	}
	loss.settle(img, after.pending, m.opts)
	return img
}

// settle decides which of ops reach img.
func (l Loss) settle(img *image, ops []op, opts Options) {
	switch l.mode {
	case loseAll:
		return
	case keepAll:
		for _, o := range ops {
			img.apply(o)
		}
		return
	}
	rng := rand.New(rand.NewPCG(l.seed, 1))
	// From "hardly anything made it" to "hardly anything is missing": the
	// single exception is what a recovery overlooks.
	keep := []float64{0.02, 0.2, 0.5, 0.8, 0.98}[rng.IntN(5)]
	tear := []float64{0, 0.05, 0.5}[rng.IntN(3)]
	order := make([]int, len(ops))
	for i := range order {
		order[i] = i
	}
	if rng.IntN(2) == 0 {
		rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	size := img.size
	for _, i := range order {
		o := ops[i]
		kept := rng.Float64() < keep
		if o.kind == Truncate {
			if kept {
				img.truncate(o.off)
				size = o.off
			}
			continue
		}
		switch {
		case len(o.data) > 0 && rng.Float64() < tear:
			tornWrite(img, o, opts.SectorSize, rng)
		case kept:
			img.apply(o)
		}
		// The new size is the filesystem's own metadata, written at its own time.
		if sized := rng.Float64() < 0.85; sized && (kept || rng.IntN(3) == 0) {
			size = max(size, o.end())
		}
	}
	// What lies beyond a size that was lost is lost.
	img.truncate(size)
}

// tornWrite writes some sectors of o and not others. A write inside one sector
// cannot be torn: it is kept.
func tornWrite(img *image, o op, sector int, rng *rand.Rand) {
	unit := int64(sector)
	if rng.IntN(2) == 0 {
		unit = pageSize
	}
	end := o.off + int64(len(o.data))
	first, last := o.off/unit, (end-1)/unit
	var has func(s int64) bool
	switch cut := first + rng.Int64N(last-first+1); rng.IntN(4) {
	case 0: // a beginning
		has = func(s int64) bool { return s <= cut }
	case 1: // an end
		has = func(s int64) bool { return s >= cut }
	case 2: // all but one
		has = func(s int64) bool { return s != cut || first == last }
	default: // any
		seed := rng.Uint64()
		has = func(s int64) bool { return s == cut || mix(seed, uint64(s))&1 != 0 }
	}
	for s := first; s <= last; s++ {
		if has(s) {
			lo, hi := max(o.off, s*unit), min(end, (s+1)*unit)
			img.write(o.data[lo-o.off:hi-o.off], lo)
		}
	}
}

// A recording is the log of what happened to a disk since it was started.
type recording struct {
	mu     sync.Mutex
	opts   Options
	base   medium // at the start; its image and slice are never changed
	first  int64  // number of log[0]
	log    []op
	replay medium // the state before operation next: a cursor
	next   int64
}

func (r *recording) append(o op) {
	r.mu.Lock()
	r.log = append(r.log, o)
	r.mu.Unlock()
}

// rewind puts the cursor to the start.
func (r *recording) rewind() {
	r.next = r.first
	r.replay = medium{opts: r.opts, img: r.base.img.clone(), pending: append([]op(nil), r.base.pending...)}
}

// Record keeps everything that happens to d from now on in memory, for At.
func (d *Disk) Record() {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &recording{opts: d.opts, first: d.ops}
	r.base = medium{img: d.medium.img.clone(), pending: append([]op(nil), d.medium.pending...)}
	r.rewind()
	d.recs = r
}

// At is the disk that is found if the power had gone with operation k in flight
// and the losses had been those of loss. With k = d.Ops() nothing was in flight.
// It is cheap when k grows from call to call. It panics if k was not recorded.
// Corrupt, Copy and Restore are not recorded.
func (d *Disk) At(k int64, loss Loss) *Disk {
	d.mu.Lock()
	r := d.recs
	d.mu.Unlock()
	if r == nil {
		panic("disktest: At without Record")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if k < r.first || k > r.first+int64(len(r.log)) {
		panic("disktest: At outside of the recording")
	}
	if k < r.next {
		r.rewind()
	}
	for ; r.next < k; r.next++ {
		r.replay.advance(r.log[r.next-r.first])
	}
	var flight *op
	if i := k - r.first; i < int64(len(r.log)) {
		o := r.log[i]
		o.failed = false // the power was faster than the fault
		flight = &o
	}
	return d.from(r.replay.crash(flight, loss))
}

// Same tells whether d and o, disks of At that nobody has written to, are certainly
// the same: then what one is judged to hold the other holds as well. It costs little,
// and finds that nothing is lost or kept by cuts between two syncs with LoseAll.
func (d *Disk) Same(o *Disk) bool {
	d.mu.Lock()
	img := d.medium.img
	d.mu.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	return img.same(o.medium.img)
}
