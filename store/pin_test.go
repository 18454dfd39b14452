package store

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// pinned reads all blocks of a pin, by runs that NextMapped finds.
func pinned(p *Pin, blocks block.Count) (map[block.Index][]byte, error) {
	got := make(map[block.Index][]byte)
	if err := p.Enter(); err != nil {
		return nil, err
	}
	defer p.Leave()
	for r := block.Span(0, blocks); !r.Empty(); {
		at, err := p.NextMapped(r)
		if err != nil {
			return nil, err
		}
		r.Start = min(at+block.Index(1+at%50), r.End)
		list, err := p.Lookup(block.Range{Start: at, End: r.Start}, nil)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			if e.Kind == extents.Hole {
				continue
			}
			blob := make([]byte, e.Addr.Length)
			if err := p.s.ReadBlob(blob, e.Addr); err != nil {
				return nil, err
			}
			for i := range e.Count {
				got[e.Start+block.Index(i)] = blob[(int(e.Skip)+int(i))*block.Size:][:block.Size]
			}
		}
	}
	return got, nil
}

// TestPin: what a pin shows stays as it was, through overwriting, trims, checkpoints
// and cleaning, and its space comes back when it is released.
func TestPin(t *testing.T) {
	seed := disktest.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	const blocks = 2048
	d := disktest.New(seed, disktest.Options{})
	must(t, Format(d, testGeometry(blocks, 400)))
	c := openCommitted(t, d, Options{})
	want := make(map[block.Index][]byte)
	page := byte(0)
	change := func(n int) {
		t.Helper()
		for range n {
			r := block.Span(block.Index(rng.IntN(blocks-32)), block.Count(1+rng.IntN(32)))
			if rng.IntN(4) == 0 {
				must(t, c.hole(r))
				for b := r.Start; b < r.End; b++ {
					delete(want, b)
				}
				continue
			}
			blob := extents.Blob{Start: r.Start, Count: uint8(r.Len()), Present: ^uint32(0) >> (32 - r.Len())}
			for b := r.Start; b < r.End; b++ {
				page++
				p := bytes.Repeat([]byte{page, byte(b)}, block.Size/2)
				blob.Parts = append(blob.Parts, p)
				want[b] = p
			}
			must(t, c.Reserve(r.Len(), Growth))
			c.mu.Lock()
			must(t, c.AppendData(blob))
			c.mu.Unlock()
			c.Release(r.Len())
		}
	}
	compare := func(what string, p *Pin, want map[block.Index][]byte) {
		t.Helper()
		got, err := pinned(p, blocks)
		must(t, err)
		for b := range block.Index(blocks) {
			if !bytes.Equal(got[b], want[b]) {
				t.Fatalf("%s: block %d is wrong", what, b)
			}
		}
	}
	change(300)
	must(t, c.Checkpoint())
	p, then := c.Pin(), make(map[block.Index][]byte)
	for b, data := range want {
		then[b] = data
	}
	for range 10 {
		change(50)
		must(t, c.commit())
		must(t, c.Checkpoint())
		compare("pinned", p, then)
	}
	must(t, c.Compact(t.Context(), nil))
	compare("after cleaning", p, then)
	now := c.Pin()
	compare("a second pin", now, want)
	free, _ := c.segments.room()
	p.Release()
	now.Release()
	for range 3 {
		must(t, c.Checkpoint())
	}
	if after, _ := c.segments.room(); after <= free {
		t.Errorf("%d segments are free after the release, before it %d", after, free)
	}
	if len(c.segments.pins)+len(c.segments.held) > 0 {
		t.Error("pins are left")
	}
	c.closeClean()

	s, err := Open(d.Clone(), Options{ReadOnly: true})
	must(t, err)
	p = s.Pin()
	compare("read-only", p, want)
	p.Release()
	must(t, s.Close())
}

// TestPinOfLog: of a store that is opened for reading the pin has what its log has.
func TestPinOfLog(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(4096, 60)))
	c := openCommitted(t, d, Options{})
	must(t, c.blob(0, 8, 0xff))
	must(t, c.blob(3000, 8, 0xff))
	must(t, c.hole(block.Span(3, 2)))
	must(t, c.commit())
	must(t, c.Close())
	s, err := Open(d.Clone(), Options{ReadOnly: true})
	must(t, err)
	p := s.Pin()
	got, err := pinned(p, 4096)
	must(t, err)
	if len(got) != 14 || got[0] == nil || got[3] != nil || got[3007] == nil {
		t.Errorf("%d blocks", len(got))
	}
	p.Release()
	must(t, s.Close())
}

// TestPinGivesWay: a pin is given up, and says so, when writes need what it holds:
// they are neither refused nor do they wait.
func TestPinGivesWay(t *testing.T) {
	for _, hostFull := range []bool{false, true} {
		d := disktest.New(1, disktest.Options{})
		must(t, Format(d, testGeometry(1024, 64)))
		var warned error
		c := openCommitted(t, d, Options{Warn: func(_ string, err error) { warned = err }})
		write := func(i int) error {
			err := c.Reserve(8, Growth)
			for tries := 0; errors.Is(err, ErrNoSpace) && tries < 3; tries++ {
				if errors.Is(err, ErrHostFull) {
					must(t, c.Checkpoint())
				} else {
					must(t, c.MakeRoom(t.Context(), 8, Growth))
				}
				err = c.Reserve(8, Growth)
			}
			if err != nil {
				return err
			}
			defer c.Release(8)
			return c.blob(i%128*8, 8, 0xff)
		}
		for i := range 128 {
			must(t, write(i))
		}
		must(t, c.Checkpoint())
		p, kept := c.Pin(), c.Pin()
		must(t, kept.Enter()) // a read in progress
		got, err := pinned(p, 1024)
		must(t, err)
		if len(got) != 1024 {
			t.Fatalf("%d blocks", len(got))
		}
		if hostFull {
			n, err := d.Allocated()
			must(t, err)
			d.SetCapacity(n + 10*SegmentSizeMin)
		}
		lost, released := false, make(chan struct{})
		within(t, "writes", func() error {
			for i, after := 0, 0; i < 10000 && after < 200; i++ {
				if lost {
					after++
				} else {
					if _, err := pinned(p, 16); errors.Is(err, ErrPinLost) {
						lost = true
					}
					if i == 10 { // long before the space is short
						kept.Leave()
						close(released)
					}
				}
				if err := write(i); err != nil {
					return err
				}
			}
			return nil
		})
		<-released
		if !lost || !errors.Is(warned, ErrPinLost) {
			t.Errorf("host full %v: the pin is lost: %v; warned of %v", hostFull, lost, warned)
		}
		if err := kept.Enter(); !errors.Is(err, ErrPinLost) {
			t.Errorf("the other pin: %v", err)
		}
		p.Release()
		kept.Release()
		if len(c.segments.pins)+len(c.segments.held) > 0 {
			t.Error("pins are left")
		}
		must(t, c.Close())
	}
}

// TestPinLostByCommit: who is told of a pin that a commit has given up holds up no
// append.
func TestPinLostByCommit(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(128, 64)))
	var c *committed
	warned := make(chan error, 1)
	c = openCommitted(t, d, Options{Warn: func(_ string, err error) {
		c.log.mu.Lock()
		defer c.log.mu.Unlock()
		warned <- err
	}})
	must(t, c.blob(0, 8, 0xff))
	must(t, c.Checkpoint())
	p := c.Pin()
	within(t, "commits", func() error {
		for i := 0; len(warned) == 0; i++ {
			if err := c.blob(i%16*8, 8, 0xff); err != nil {
				return err
			}
			if err := c.commit(); err != nil {
				return err
			}
		}
		return nil
	})
	if err := <-warned; !errors.Is(err, ErrPinLost) {
		t.Errorf("warned of %v", err)
	}
	p.Release()
	must(t, c.Close())
}
