package delalloc

import (
	"slices"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
)

// A pass counts what it hands off, and nothing else and not twice; the budget is
// looked at between ranges; the cursor ends behind the last block handed off.
func TestControl(t *testing.T) {
	three := []block.Range{rng(0, 2), rng(10, 13), rng(20, 22)}
	for _, tc := range []struct {
		name  string
		dirty []block.Range
		holes []block.Range
		in    Control
		// during is called when block b is handed off.
		during  func(g *rig, b block.Index)
		written block.Count
		next    block.Index
		log     []string
		left    block.Count
	}{
		{name: "nothing is dirty", in: Control{Budget: all}},
		{name: "nothing is dirty from here on", dirty: three, in: Control{Budget: all, Next: 30}, next: 30, left: 7},
		{name: "no budget", dirty: three, in: Control{}, left: 7},
		{name: "all", dirty: three, in: Control{Budget: all}, written: 7, next: 22,
			log: []string{"raw [0,2) 11", "raw [10,13) 111", "raw [20,22) 11"}},
		{name: "the budget is met", dirty: three, in: Control{Budget: 5}, written: 5, next: 13,
			log: []string{"raw [0,2) 11", "raw [10,13) 111"}, left: 2},
		{name: "the budget is soft", dirty: three, in: Control{Budget: 3}, written: 5, next: 13,
			log: []string{"raw [0,2) 11", "raw [10,13) 111"}, left: 2},
		{name: "what was written before counts", dirty: three, in: Control{Budget: 10, Written: 9}, written: 11, next: 2,
			log: []string{"raw [0,2) 11"}, left: 5},
		{name: "the budget is used up", dirty: three, in: Control{Budget: 10, Written: 10}, written: 10, left: 7},
		{name: "from the middle", dirty: three, in: Control{Budget: all, Next: 11}, written: 4, next: 22,
			log: []string{"raw [11,13) 11", "raw [20,22) 11"}, left: 3},
		{name: "from the middle with a budget", dirty: three, in: Control{Budget: 1, Next: 11}, written: 2, next: 13,
			log: []string{"raw [11,13) 11"}, left: 5},
		{name: "cyclic", dirty: three, in: Control{Budget: all, Next: 11, Cyclic: true}, written: 7, next: 11,
			log: []string{"raw [11,13) 11", "raw [20,22) 11", "raw [0,2) 11", "raw [10,11) 1"}},
		{name: "cyclic with a budget", dirty: three, in: Control{Budget: 5, Next: 11, Cyclic: true}, written: 6, next: 2,
			log: []string{"raw [11,13) 11", "raw [20,22) 11", "raw [0,2) 11"}, left: 1},
		{name: "cyclic from behind all", dirty: three, in: Control{Budget: all, Next: 400, Cyclic: true}, written: 7, next: 22,
			log: []string{"raw [0,2) 11", "raw [10,13) 111", "raw [20,22) 11"}},
		{name: "cyclic from the start", dirty: three, in: Control{Budget: all, Cyclic: true}, written: 7, next: 22,
			during: func(g *rig, b block.Index) {
				if b == 20 {
					g.write(rng(0, 2), text)
				}
			},
			log: []string{"raw [0,2) 11", "raw [10,13) 111", "raw [20,22) 11"}, left: 2},
		{name: "cyclic ends where it began", dirty: three, in: Control{Budget: all, Next: 11, Cyclic: true}, written: 7, next: 11,
			during: func(g *rig, b block.Index) {
				if b == 0 {
					g.write(rng(30, 32), text)
				}
			},
			log: []string{"raw [11,13) 11", "raw [20,22) 11", "raw [0,2) 11", "raw [10,11) 1"}, left: 2},
		{name: "a writer behind the cursor", dirty: three, in: Control{Budget: all}, written: 7, next: 22,
			during: func(g *rig, b block.Index) {
				if b == 10 || b == 20 {
					g.write(rng(b-10, b-8), text)
				}
			},
			log: []string{"raw [0,2) 11", "raw [10,13) 111", "raw [20,22) 11"}, left: 4},
		{name: "a writer before the cursor", dirty: three, in: Control{Budget: all}, written: 9, next: 32,
			during: func(g *rig, b block.Index) {
				if b == 20 {
					g.write(rng(30, 32), text)
				}
			},
			log: []string{"raw [0,2) 11", "raw [10,13) 111", "raw [20,22) 11", "raw [30,32) 11"}},
		{name: "holes count", holes: []block.Range{rng(100, 140), rng(200, 300)}, in: Control{Budget: 10}, written: 40, next: 140,
			log: []string{"hole [100,140)"}, left: 100},
		{name: "a hole from the middle", holes: []block.Range{rng(100, 140)}, in: Control{Budget: all, Next: 110}, written: 30, next: 140,
			log: []string{"hole [110,140)"}, left: 10},
		{name: "by address, whatever it is", dirty: []block.Range{rng(0, 2), rng(4, 5)}, holes: []block.Range{rng(2, 4), rng(5, 9)}, in: Control{Budget: all},
			written: 9, next: 9, log: []string{"raw [0,2) 11", "hole [2,4)", "raw [4,5) 1", "hole [5,9)"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newRig(t, rigOptions{})
			for _, r := range tc.dirty {
				g.write(r, text)
			}
			for _, r := range tc.holes {
				g.trim(r)
			}
			if tc.during != nil {
				g.pages.handedOff = func(b block.Index, _ uint64) { tc.during(g, b) }
			}
			c := tc.in
			g.background(&c)
			g.pages.handedOff = func(block.Index, uint64) {}
			if c.Written != tc.written || c.Next != tc.next {
				t.Errorf("%d blocks written, next is %d; want %d and %d", c.Written, c.Next, tc.written, tc.next)
			}
			c.Written, c.Next = tc.in.Written, tc.in.Next
			if c != tc.in {
				t.Errorf("the pass has changed %+v to %+v", tc.in, c)
			}
			g.settle()
			if got := g.log.take("release"); !slices.Equal(got, tc.log) {
				t.Errorf("the log has %v, want %v", got, tc.log)
			}
			if n := g.es.open.State.Count(extents.Delalloc | extents.DirtyHole); n != tc.left {
				t.Errorf("%d blocks are left, want %d", n, tc.left)
			}
			g.commit()
			g.read(rng(0, 512))
			g.close()
		})
	}
}

// A range that was found passes whole, and is counted once: by its pages, not by
// those and the range.
func TestBudgetAndLongRange(t *testing.T) {
	g := newRig(t, rigOptions{blocks: 4096})
	g.write(rng(0, 3000), text)
	g.write(rng(3001, 3002), text)
	c := Control{Budget: passBlocks}
	g.background(&c)
	if c.Written != 3000 || c.Next != 3000 || g.w.Metrics().HandOffs != 1 || g.w.Metrics().Pages != 3000 {
		t.Errorf("%d blocks written, next is %d, %+v", c.Written, c.Next, g.w.Metrics())
	}
	// A commit has no budget.
	for i := range block.Index(30) {
		g.write(block.Span(120*i, 100), text)
	}
	e := g.es.Open()
	g.commit()
	if !e.State.Empty() {
		t.Errorf("the commit has left %d blocks", e.State.Count(extents.Delalloc))
	}
	g.close()
}
