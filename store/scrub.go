package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
)

// ErrScrubbing says that a scrub is running already.
var ErrScrubbing = errors.New("store: a scrub is running already")

// A ScrubReport tells how far a scrub is and what it has found.
type ScrubReport struct {
	Running bool      `json:"running"`
	Began   time.Time `json:"began"`
	Ended   time.Time `json:"ended"`           // zero while it runs
	Stopped bool      `json:"stopped"`         // before its end
	Error   string    `json:"error,omitempty"` // that ended it

	Done  uint64 `json:"done"`  // extents of the map
	Total uint64 `json:"total"` // about
	Nodes uint64 `json:"nodes"` // copies of map nodes verified
	Blobs uint64 `json:"blobs"` // verified
	Bytes uint64 `json:"bytes"` // read

	Problems []string      `json:"problems"`       // in words, at most problemsMax
	More     int           `json:"more,omitempty"` // problems beyond those
	Lost     []block.Range `json:"lost"`           // blocks that cannot be read
}

// A scrub verifies a store while it is in use.
type scrub struct {
	mu     sync.Mutex
	report *ScrubReport // guarded by mu; nil: there was none since the store was opened
	cancel context.CancelFunc
	done   sync.WaitGroup
}

// StartScrub begins to verify, in the background, all that the map leads to: each
// copy of its nodes, and every stored blob. It reads the medium, not what the host
// has in memory, at most rate bytes in a second (0 is no limit), beside everything
// else. What the newest checkpoint does not have is not looked at, nor what is
// written meanwhile. The error is ErrScrubbing if one is running. Close ends it.
func (s *Store) StartScrub(rate uint64) error {
	sc := &s.scrub
	sc.mu.Lock()
	defer sc.mu.Unlock()
	if sc.report != nil && sc.report.Running {
		return ErrScrubbing
	}
	medium, err := s.file.Medium()
	if err != nil {
		return fmt.Errorf("store: scrub: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	sc.cancel = cancel
	sc.report = &ScrubReport{Running: true, Began: time.Now(), Problems: []string{}, Lost: []block.Range{}}
	sc.done.Go(func() {
		defer cancel()
		r := &scrubber{s: s, ctx: ctx, medium: medium, rate: rate, began: time.Now()}
		err := errors.Join(r.run(), medium.Close())
		sc.mu.Lock()
		defer sc.mu.Unlock()
		sc.report.Running, sc.report.Ended = false, time.Now()
		sc.report.Stopped = ctx.Err() != nil
		if err != nil && !sc.report.Stopped {
			sc.report.Error = err.Error()
		}
	})
	return nil
}

// StopScrub ends the scrub that is running, and returns when it has ended.
func (s *Store) StopScrub() {
	s.scrub.mu.Lock()
	if s.scrub.cancel != nil {
		s.scrub.cancel()
	}
	s.scrub.mu.Unlock()
	s.scrub.done.Wait()
}

// Scrub is the newest scrub since the store was opened, nil if there was none.
func (s *Store) Scrub() *ScrubReport {
	s.scrub.mu.Lock()
	defer s.scrub.mu.Unlock()
	if s.scrub.report == nil {
		return nil
	}
	r := *s.scrub.report
	r.Problems = slices.Clone(r.Problems)
	r.Lost = mergeRanges(slices.Clone(r.Lost))
	return &r
}

// A scrubber is a scrub that runs.
type scrubber struct {
	s      *Store
	ctx    context.Context
	medium io.ReaderAt
	rate   uint64
	began  time.Time
	read   uint64 // bytes so far
	buf    []byte
}

// errLeafEnd ends a walk behind a leaf.
var errLeafEnd = errors.New("behind a leaf")

// run goes through the map leaf by leaf. Each View is as short as one read, so that
// no segment waits for the scrub.
func (r *scrubber) run() error {
	for next := block.Index(0); ; {
		end, list, err := r.leaf(next)
		if err != nil || end == 0 {
			return err
		}
		good := make(map[extents.Addr]bool, len(list))
		for _, e := range list {
			if !good[e.Addr] {
				if err := r.wait(); err != nil {
					return err
				}
				good[e.Addr] = r.extent(e)
			}
			r.note(func(rep *ScrubReport) { rep.Done++ })
		}
		next = end
	}
}

// leaf verifies the first leaf of the map that has something from block next on,
// and the nodes above it that begin there. It returns what is in the leaf, and
// where it ends: 0 if there is none.
func (r *scrubber) leaf(next block.Index) (end block.Index, list []extents.Extent, err error) {
	if err := r.wait(); err != nil {
		return 0, nil, err
	}
	s := r.s
	v := s.View()
	defer s.Unview(v)
	s.mu.RLock()
	root := s.mu.root
	s.mu.RUnlock()
	r.note(func(rep *ScrubReport) { rep.Total = root.Entries })
	err = s.tree.WalkFrom(root, next, func(n extents.WalkNode) error {
		if end > 0 {
			return errLeafEnd
		}
		if n.Level == 0 || n.Keys.Start >= next {
			r.node(n)
		}
		if n.Level == 0 || n.Err != nil {
			end = n.Keys.End
		}
		return nil
	}, func(e extents.Extent) error {
		if e.Kind == extents.Data {
			list = append(list, e)
		}
		return nil
	})
	if errors.Is(err, errLeafEnd) {
		err = nil
	}
	return end, list, err
}

// node verifies each copy of a node.
func (r *scrubber) node(n extents.WalkNode) {
	for i, at := range n.Places[:n.Copies] {
		err := r.verify(blobRef{at.Segment, at.Offset, uint32(n.Length), at.Checksum})
		r.note(func(rep *ScrubReport) {
			rep.Nodes++
			if err != nil {
				rep.problem("map node of %v, copy %d: %v", n.Keys, i+1, err)
			}
		})
	}
	if n.Err == nil {
		return
	}
	r.s.mu.RLock()
	runs := r.s.lookupOverlaysLocked(n.Keys, nil)
	r.s.mu.RUnlock()
	r.note(func(rep *ScrubReport) {
		for _, e := range runs {
			if e.Kind == inTree {
				rep.Lost = append(rep.Lost, e.Range())
			}
		}
	})
}

// extent verifies the blob of e, and tells whether it is whole, unless it has been
// overwritten since e was found.
func (r *scrubber) extent(e extents.Extent) bool {
	v := r.s.View()
	defer r.s.Unview(v)
	now, err := r.s.Lookup(e.Range(), nil)
	if err != nil {
		r.note(func(rep *ScrubReport) { rep.problem("look up %v: %v", e.Range(), err) })
		return false
	}
	now = slices.DeleteFunc(now, func(x extents.Extent) bool { return !x.SameBlob(e) })
	if len(now) == 0 {
		return false
	}
	err = r.verify(blobRef{e.Addr.Segment, e.Addr.Offset, e.Addr.Length, e.Addr.Checksum})
	r.note(func(rep *ScrubReport) {
		rep.Blobs++
		if err != nil {
			rep.problem("blocks %v: %v", e.Range(), err)
			for _, x := range now {
				rep.Lost = append(rep.Lost, x.Range())
			}
		}
	})
	return err == nil
}

// wait waits until the rate allows for another read.
func (r *scrubber) wait() error {
	if r.rate > 0 {
		due := time.Duration(float64(r.read) / float64(r.rate) * float64(time.Second))
		if wait := due - time.Since(r.began); wait > 0 {
			select {
			case <-time.After(wait):
			case <-r.ctx.Done():
			}
		}
	}
	return r.ctx.Err()
}

// verify reads what ref refers to from the medium.
func (r *scrubber) verify(ref blobRef) error {
	if int(ref.length) > len(r.buf) {
		r.buf = make([]byte, ref.length)
	}
	r.read += uint64(ref.length)
	r.note(func(rep *ScrubReport) { rep.Bytes += uint64(ref.length) })
	return r.s.readBlobFrom(r.medium, r.buf[:ref.length], ref)
}

func (r *scrubber) note(fn func(rep *ScrubReport)) {
	r.s.scrub.mu.Lock()
	fn(r.s.scrub.report)
	r.s.scrub.mu.Unlock()
}

func (r *ScrubReport) problem(format string, args ...any) {
	r.Problems, r.More = addProblem(r.Problems, r.More, format, args...)
}

// Clean tells whether nothing was found.
func (r *ScrubReport) Clean() bool { return len(r.Problems) == 0 && len(r.Lost) == 0 }
