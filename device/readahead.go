package device

import (
	"sync"
	"sync/atomic"

	"cnbd/internal/block"
	"cnbd/store"
)

const (
	// streamsMax is how many readers that go through the device in order are known at
	// a time, whatever connections they use.
	streamsMax = 8
	// streamReads is how many reads in sequence make a stream.
	streamReads = 3
	// streamSlack is how far from its expected place a read of a stream may begin, in
	// lengths of the read: those of a client with several in flight come out of order.
	streamSlack = 8

	// The window that is read ahead begins with aheadLeast and doubles up to aheadMost, or
	// a part of the cache, aheadShare: two of them, and what was just read, are to fit into
	// the small queue of the cache, which is a tenth of what is clean, or what was read ahead
	// goes before it is asked for.
	aheadLeast = 256 << 10 / block.Size
	aheadMost  = 2 << 20 / block.Size
	aheadShare = 64
	// aheadPiece is what one goroutine reads of it at a time: two extents, or so.
	aheadPiece = store.ExtentBlocksMax
)

// A readahead finds out who reads the device in order, and has the extents that come next
// read and decoded before they are asked for, on the processors that the readers leave
// idle: with as many misses in progress as there are processors nothing is read ahead,
// for it would only come before what somebody waits for.
//
// As in Linux a stream goes on when the first block of its newest window is read, which
// the cache answers, so the windows follow each other without a pause.
type readahead struct {
	d     *Device
	most  block.Count // of a window
	procs int64       // goroutines that read ahead
	work  chan fetch
	ended sync.WaitGroup // goroutines
	busy  sync.WaitGroup // work that was given and is not done

	// reading counts requests for what the cache did not have at once.
	reading atomic.Int64
	// marks are the blocks, plus 1, at which streams go on; 0: at none. They are
	// looked at by each read, without the mutex.
	marks [streamsMax]atomic.Uint64

	mu      sync.Mutex
	streams [streamsMax]stream // guarded by mu, as all below
	reads   uint64             // noted so far
	stopped bool
}

// A fetch is something to be read into the cache: every step-th piece of r from a piece on.
type fetch struct {
	r    block.Range
	step block.Index // in blocks
}

// A stream is reads that follow each other.
type stream struct {
	next   block.Index // where the next one is expected
	seen   int         // so many in sequence
	ahead  block.Index // up to where it was read ahead
	window block.Count // to be read next
	last   uint64      // the number of its last read
}

func (a *readahead) start(d *Device) {
	a.d = d
	a.most = min(aheadMost, block.Count(d.opts.CacheBytes/aheadShare/block.Size))
	a.procs = int64(min(d.opts.Workers, 4))
	a.work = make(chan fetch, a.procs)
	for range a.procs {
		a.ended.Go(a.run)
	}
}

// stop returns when nothing is read ahead any more, and nothing will be.
func (a *readahead) stop() {
	a.mu.Lock()
	if !a.stopped {
		a.stopped = true
		close(a.work)
	}
	a.mu.Unlock()
	a.ended.Wait()
}

// run is a goroutine that reads ahead.
func (a *readahead) run() {
	p := &Payload{d: a.d}
	for f := range a.work {
		for r := f.r; !r.Empty(); r.Start += f.step {
			a.d.metrics.ahead.Add(1)
			// Who asks for it is told what is wrong.
			_ = p.fetch(block.Span(r.Start, aheadPiece).Intersect(r))
			p.drop()
		}
		a.busy.Done()
	}
}

// missed is told of a read of r that the cache could not answer at once, and is counted in
// reading. It returns the block from which on somebody else reads r too, or 0.
func (a *readahead) missed(r block.Range) (half block.Index) {
	if !a.mu.TryLock() {
		return 0 // all this is to be faster
	}
	defer a.mu.Unlock()
	if r.Len() > 2*aheadPiece && r.Len() <= 2*a.most {
		half = (r.Start + block.Index(r.Len()/2)) &^ (store.ExtentBlocksMax - 1)
		if !a.launch(block.Range{Start: half, End: r.End}, 1) {
			half = 0
		}
	}
	s, i := a.find(r)
	if s.seen == 1 && r.Len() < store.ExtentBlocksMax {
		a.d.store.NoteRandomRead(r)
	}
	// It may have overtaken what was read ahead, if anything was.
	if s.seen >= streamReads && r.End >= s.ahead {
		s.ahead = r.End
		a.goOn(s, i)
	}
	return half
}

// find is the stream that a read of r continues, or a new one in the place of the one that
// rests for longest. REQUIRES: a.mu held.
func (a *readahead) find(r block.Range) (*stream, int) {
	a.reads++
	oldest, slack := 0, block.Index(streamSlack*r.Len())
	gap := max(slack, store.ExtentBlocksMax) // the rest of an extent came with the last one
	for i := range a.streams {
		s := &a.streams[i]
		// What was read ahead of it has moved it on unseen.
		if s.seen > 0 && r.Start <= max(s.next, s.ahead)+gap && r.Start+slack >= s.next && r.End > s.next {
			s.seen++
			s.next, s.last = r.End, a.reads
			return s, i
		}
		if s.last < a.streams[oldest].last {
			oldest = i
		}
	}
	a.marks[oldest].Store(0)
	s := &a.streams[oldest]
	*s = stream{next: r.End, seen: 1, window: min(aheadLeast, a.most), last: a.reads}
	return s, oldest
}

// hit is told of a read of r that the cache has answered.
func (a *readahead) hit(r block.Range) {
	for i := range a.marks {
		if m := a.marks[i].Load(); m != 0 && r.Contains(block.Index(m-1)) && a.marks[i].CompareAndSwap(m, 0) {
			a.mu.Lock()
			s := &a.streams[i]
			if s.ahead > r.Start { // it is the stream still that made the mark
				a.reads++
				s.next, s.last = r.End, a.reads
				a.goOn(s, i)
			}
			a.mu.Unlock()
		}
	}
}

// goOn has the next window of s read ahead. REQUIRES: a.mu held.
func (a *readahead) goOn(s *stream, i int) {
	r := block.Span(s.ahead, s.window).Intersect(block.Range{End: a.d.end()})
	if r.Empty() || !a.launch(r, a.procs) {
		return // the next miss tries again
	}
	s.ahead = r.End
	s.window = min(2*s.window, a.most)
	a.marks[i].Store(uint64(r.Start) + 1)
}

// launch has r read by up to n goroutines, unless there is enough to do. REQUIRES: a.mu
// held.
func (a *readahead) launch(r block.Range, n int64) bool {
	if a.stopped || a.reading.Load() > a.procs {
		return false
	}
	n = min(n, int64(r.Len()+aheadPiece-1)/aheadPiece)
	for i := range n {
		a.busy.Add(1)
		select {
		case a.work <- fetch{block.Range{Start: r.Start + block.Index(i)*aheadPiece, End: r.End}, block.Index(n) * aheadPiece}:
		default:
			a.busy.Done()
			return i > 0 // the rest is read when it is asked for
		}
	}
	return true
}
