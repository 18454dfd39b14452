package store

import (
	"errors"
	"fmt"

	"cnbd/extents"
	"cnbd/internal/block"
)

// ErrPinLost says that writes needed the space of what was overwritten since a
// commit was pinned, so that it cannot be read any more.
var ErrPinLost = errors.New("the pinned commit is lost: writes needed the space of what was overwritten since")

// A Pin is the state of one commit, kept readable while the store goes on (rule
// R12). What is overwritten meanwhile, and would become free, is not, so a store
// that is short of space gives its pins up: writes never wait for a pin, nor are
// they refused for one. All methods may be called concurrently.
type Pin struct {
	s       *Store
	root    extents.Root
	trims   *extents.RangeSet
	overlay *extents.Overlay // of a store that is read-only, whose log is replayed in memory; else nil
	version uint64           // of the checkpoint
}

// Pin pins the commit of the newest checkpoint; Release gives it back, before the
// store is closed. Call Checkpoint before, on a store in use.
func (s *Store) Pin() *Pin {
	s.mu.RLock()
	defer s.mu.RUnlock()
	p := &Pin{s: s, root: s.mu.root, trims: s.mu.trims, version: s.mu.sequence}
	if s.log == nil {
		p.overlay = s.mu.open
	}
	s.segments.hold(p)
	return p
}

// Release gives the pin back. It must be called once, and nothing else after it.
func (p *Pin) Release() { p.s.segments.letGo(p) }

// Enter keeps what was pinned from being given up until Leave: places found
// by Lookup stay readable meanwhile. It is for the time of one read. The error is
// ErrPinLost.
func (p *Pin) Enter() error {
	if !p.s.segments.enter(p) {
		return fmt.Errorf("store: %w", ErrPinLost)
	}
	return nil
}

// Leave ends what Enter has begun.
func (p *Pin) Leave() { p.s.segments.unpin(p.version) }

// Lookup is Store.Lookup of the pinned state. REQUIRES: between Enter and Leave.
func (p *Pin) Lookup(r block.Range, out []extents.Extent) ([]extents.Extent, error) {
	if r.Empty() {
		return out, nil
	}
	from := len(out)
	return p.s.lookupTree(p.root, lookupLayers(r, out, p.overlay, nil, p.trims), from)
}

// NextMapped is Store.NextMapped of the pinned state. REQUIRES: between Enter and
// Leave.
func (p *Pin) NextMapped(r block.Range) (block.Index, error) {
	if r.Empty() {
		return r.End, nil
	}
	return p.s.nextInTree(p.root, r, nextInOverlays(r, p.overlay))
}

// hold pins the checkpoint of p until letGo, or until it is given up.
func (t *segments) hold(p *Pin) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pins[p.version]++
	t.held[p] = struct{}{}
}

func (t *segments) letGo(p *Pin) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.letGoLocked(p)
}

func (t *segments) letGoLocked(p *Pin) {
	if _, held := t.held[p]; held {
		delete(t.held, p)
		t.unpinLocked(p.version)
	}
}

// enter pins the checkpoint of p until unpin, unless p has been given up.
func (t *segments) enter(p *Pin) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, held := t.held[p]
	if held {
		t.pins[p.version]++
	}
	return held
}

// giveUp gives up the pins that keep empty segments from being free, and reports
// whether there were any.
func (t *segments) giveUp() (any bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	newest := uint64(0)
	for n := range t.table {
		if s := &t.table[n]; s.state == segmentUsed {
			newest = max(newest, s.emptyAt)
		}
	}
	for p := range t.held {
		if p.version < newest {
			t.letGoLocked(p)
			any = true
		}
	}
	return any
}

// holding tells whether there are pins.
func (t *segments) holding() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.held) > 0
}

// givePinsUp gives up the pins that are in the way of writes, and warns of that.
func (s *Store) givePinsUp() {
	if s.segments.giveUp() {
		s.warnPinLost()
	}
}

func (s *Store) warnPinLost() {
	s.opts.Warn("a reader of an older state of the device, such as an export, has lost it", ErrPinLost)
}
