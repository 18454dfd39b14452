package store

import (
	"math/rand/v2"
	"strings"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// TestCheckFinds: whatever byte is damaged of what a store consists of, check --data
// finds it, and blocks that are lost are those that it lists.
func TestCheckFinds(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	s := newDamageStore(t, true)
	rep, err := Check(s.disk.Clone(), CheckOptions{Data: true})
	if err != nil || !rep.Clean {
		t.Fatalf("of a store that is whole: %+v, %v", rep, err)
	}
	live, err := Open(s.disk.Clone(), Options{ReadOnly: true})
	must(t, err)
	defer live.Close()
	c := &checker{s: live, opts: CheckOptions{Data: true}, rep: &CheckReport{}, used: make(map[uint32]*usage)}
	must(t, c.run())
	var parts []byteRange // of the file, that the newest checkpoint refers to
	add := func(n, off, length uint32) {
		parts = append(parts, byteRange{live.segments.base(n) + int64(off), int64(length)})
	}
	for n, u := range c.used {
		if u.refs > 0 {
			add(n, 0, segmentData)
		}
		for _, p := range u.places {
			add(n, p.offset-recordHeader, p.length+recordHeader)
		}
	}
	parts = append(parts, byteRange{0, superblockSize}, byteRange{superblockStride, superblockSize})
	refused := 0
	for range 300 * disktest.Scale(t) {
		p := parts[rng.IntN(len(parts))]
		off := p.off + rng.Int64N(p.n)
		d := s.disk.Clone()
		d.Corrupt(off, 1)
		rep, err := Check(d.Clone(), CheckOptions{Data: true})
		if err != nil {
			if !IsDamage(err) {
				t.Fatalf("byte %d: %v", off, err)
			}
			refused++
			continue
		}
		if rep.Clean {
			t.Fatalf("byte %d is damaged, and not found", off)
		}
		o, err := s.judge(d)
		must(t, err)
		var lost block.Count
		for _, r := range rep.Lost {
			lost += r.Len()
		}
		if int(lost) != o.lost {
			t.Fatalf("byte %d: %d blocks are listed as lost, %d are: %+v", off, lost, o.lost, rep)
		}
	}
	t.Logf("%d refused at open", refused)
}

// TestCheckOtherCheckpoint: the checkpoint that is not in use is looked at too.
func TestCheckOtherCheckpoint(t *testing.T) {
	s := newDamageStore(t, true)
	d := s.disk.Clone()
	_, other, err := readSuperblocks(d, func(string, error) {})
	must(t, err)
	d.Corrupt(segmentsOffset+int64(other.usage.segment)*SegmentSizeMin+int64(other.usage.offset), 1)
	rep, err := Check(d, CheckOptions{})
	must(t, err)
	if rep.Clean || !strings.Contains(strings.Join(rep.Problems, ""), "before the newest") {
		t.Errorf("%+v", rep)
	}
}
