package store

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// overtaken has blocks overwritten in the middle of their being moved, at each
// operation of the disk where that can be, and compares what the map leads to, at
// once and after a restart, with the truth (rule R7).
func overtaken(seed uint64) error {
	for at := 1; ; at++ {
		reached, err := overtakenAt(seed, at)
		if err != nil {
			return fmt.Errorf("overwritten at operation %d of the cleaning: %w", at, err)
		}
		if !reached {
			if at < 4 {
				return fmt.Errorf("cleaning had only %d operations", at-1)
			}
			return nil
		}
	}
}

func overtakenAt(seed uint64, at int) (reached bool, err error) {
	d := disktest.New(seed, disktest.Options{})
	if err := Format(d, testGeometry(512, 60)); err != nil {
		return false, err
	}
	want := make(chan struct{}, 1)
	s, err := Open(d, Options{NeedCommit: func() {
		select {
		case want <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	truth := make([]byte, 512*block.Size)
	rng := rand.New(rand.NewPCG(seed, 0))
	write := func(start, n int) error {
		p := truth[start*block.Size : (start+n)*block.Size]
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return s.AppendData(extents.Blob{Start: block.Index(start), Count: uint8(n), Present: ^uint32(0) >> (32 - n), Parts: [][]byte{bytes.Clone(p)}})
	}
	commit := func() error {
		c, ok, err := s.AppendCommit()
		if err != nil || !ok {
			return err
		}
		return s.Sync(c)
	}
	checkpoint := func() error {
		done := make(chan error, 1)
		go func() { done <- s.Checkpoint() }()
		for {
			select {
			case err := <-done:
				return err
			case <-want:
				if err := commit(); err != nil {
					return err
				}
			}
		}
	}
	for start := 0; start < 512; start += 8 {
		err = errors.Join(err, write(start, 8))
	}
	for start := 0; start < 512; start += 32 { // a quarter of each segment dies
		err = errors.Join(err, write(start, 8))
	}
	if err = errors.Join(err, commit(), checkpoint()); err != nil {
		return false, err
	}
	ops := 0
	d.SetHook(func(disktest.Op) {
		if ops++; ops == at {
			reached = true
			for start := 0; start < 512; start += 16 {
				err = errors.Join(err, write(start+3, 1), write(start+8, 2))
			}
		}
	})
	s.cleaner.turn <- struct{}{}
	progress, cleanErr := s.cleaner.clean(false)
	<-s.cleaner.turn
	d.SetHook(nil)
	if !progress {
		err = errors.Join(err, errors.New("nothing was cleaned"))
	}
	if err = errors.Join(err, cleanErr, commit()); err != nil {
		return reached, err
	}
	check := func(s *Store) error {
		got := make([]byte, len(truth))
		if _, err := (contents{s}).ReadAt(got, 0); err != nil {
			return err
		}
		for b := range 512 {
			if !bytes.Equal(got[b*block.Size:][:block.Size], truth[b*block.Size:][:block.Size]) {
				return fmt.Errorf("block %d is wrong", b)
			}
		}
		return nil
	}
	if err := check(s); err != nil {
		return reached, err
	}
	again, err := Open(d.Crash(disktest.LoseAll), Options{})
	if err != nil {
		return reached, err
	}
	if err := errors.Join(check(again), again.Close()); err != nil {
		return reached, fmt.Errorf("after a restart: %w", err)
	}
	// And when what was replayed is in the tree.
	if err := checkpoint(); err != nil {
		return reached, err
	}
	return reached, check(s)
}

// TestOvertakenByWrites: the cleaner does not bring back what was overwritten while
// it was at it.
func TestOvertakenByWrites(t *testing.T) {
	if err := overtaken(disktest.Seed(t)); err != nil {
		t.Fatal(err)
	}
}

// TestCleanDamaged: of a segment with a damaged blob the rest is moved, and the
// blob stays where it is, to be read by whoever can.
func TestCleanDamaged(t *testing.T) {
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(512, 60)))
	warned := 0
	c := openCommitted(t, d, Options{Warn: func(string, error) { warned++ }})
	for start := 0; start < 128; start += 8 {
		must(t, c.blob(start, 8, 0xff))
	}
	must(t, c.commit())
	must(t, c.Checkpoint())
	list, err := c.Lookup(block.Span(0, 128), nil)
	must(t, err)
	bad := list[2].Addr // not of the first blob
	d.Corrupt(c.segments.base(bad.Segment)+int64(bad.Offset)+100, 1)
	for start := 32; start < 48; start += 8 {
		must(t, c.hole(block.Span(block.Index(start), 8)))
	}
	must(t, c.commit())
	must(t, c.Compact(t.Context(), nil))
	after, err := c.Lookup(block.Span(0, 32), nil)
	must(t, err)
	stayed := 0
	for _, e := range after {
		switch {
		case e.Addr == bad:
			stayed++
		case e.Addr.Segment == bad.Segment:
			t.Errorf("%v is still in the segment", e.Range())
		default:
			must(t, c.ReadBlob(make([]byte, e.Addr.Length), e.Addr))
		}
	}
	if stayed != 1 || warned == 0 {
		t.Errorf("%d damaged blobs have stayed, %d warnings", stayed, warned)
	}
	must(t, c.Close())
}
