package delalloc

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// Invariant 1: before the first chunk of a hand-off enters the queue, the whole
// range has neither Locked nor Delalloc, and each of its pages is handed off.
func TestHandOffClearsBitsFirst(t *testing.T) {
	g := newRig(t, rigOptions{})
	g.write(rng(5, 405), text)
	calls := 0
	g.w.chunks.New = func() any { // a chunk is made when it is queued
		calls++
		if n := g.es.open.State.Count(extents.Locked | extents.Delalloc); n != 0 {
			t.Errorf("chunk %d: %d blocks are locked or delalloc", calls, n)
		}
		if dirty, locked, writeback, _ := g.pages.counts(); dirty+locked > 0 || calls == 1 && writeback != 400 {
			t.Errorf("chunk %d: %d pages are dirty, %d locked, %d in writeback", calls, dirty, locked, writeback)
		}
		return &chunk{w: g.w}
	}
	g.background(&Control{Budget: all})
	if calls == 0 {
		t.Error("no chunk was made")
	}
	g.commit()
	g.close()
}

// Items of the queue may lock the range that they are of, as the second phase of
// Btrfs does. With the bits still set, or with a queue of one chunk for a range of
// 64, they and the hand-off would wait for each other.
func TestItemsMayLockTheRange(t *testing.T) {
	for _, bytesMax := range []int64{chunkBlocks * block.Size, 64 << 20} {
		synctest.Test(t, func(t *testing.T) {
			g := newRig(t, rigOptions{blocks: 64 * chunkBlocks, bytesMax: bytesMax})
			lock := func(r block.Range) {
				owner := g.owners.Add(1)
				g.es.open.State.Lock(r, owner)
				g.es.open.State.Unlock(r, owner, 0, 0)
			}
			g.transform.before = func(start block.Index) { lock(block.Span(start, 16)) }
			g.log.data = lock
			g.write(rng(0, 64*chunkBlocks), text)
			c := Control{Budget: all}
			g.background(&c)
			if c.Written != 64*chunkBlocks {
				t.Errorf("%d blocks handed off", c.Written)
			}
			g.settle()
			if m := g.w.Metrics(); m.Chunks != 64 || m.Raw != 64*chunkBlocks/16 {
				t.Errorf("%+v", m)
			}
			g.close()
		})
	}
}

// Chunks end at multiples of 512 KiB, pieces at multiples of the extent size, and
// never behind the range.
func TestChunksAndPieces(t *testing.T) {
	for _, tc := range []struct {
		r      block.Range
		extent int
		chunks []int
		pieces string // starts
	}{
		{rng(0, 1), 16, []int{1}, "0"},
		{rng(7, 8), 16, []int{1}, "7"},
		{rng(0, 128), 32, []int{128}, "0 32 64 96"},
		{rng(127, 129), 32, []int{1, 1}, "127 128"},
		{rng(100, 300), 32, []int{28, 128, 44}, "100 128 160 192 224 256 288"},
		{rng(120, 140), 8, []int{8, 12}, "120 128 136"},
		{rng(120, 140), 1, []int{8, 12}, "120 121 122 123 124 125 126 127 128 129 130 131 132 133 134 135 136 137 138 139"},
		{rng(250, 400), 32, []int{6, 128, 16}, "250 256 288 320 352 384"},
	} {
		t.Run(fmt.Sprintf("%v by %d", tc.r, tc.extent), func(t *testing.T) {
			for _, fails := range []bool{false, true} { // the encoder
				g := newRig(t, rigOptions{extent: tc.extent, transform: "xor"})
				if fails {
					g.transform.before = func(block.Index) { panic("broken") }
				}
				g.write(tc.r, text)
				g.commit()
				var chunks []int
				var pieces []string
				for _, e := range g.log.take() {
					var n int
					var start block.Index
					if _, err := fmt.Sscanf(e, "release %d", &n); err == nil {
						chunks = append(chunks, n)
					} else if _, err := fmt.Sscanf(e[strings.Index(e, " "):], " [%d", &start); err == nil {
						pieces = append(pieces, fmt.Sprint(start))
					}
				}
				if !slices.Equal(chunks, tc.chunks) || strings.Join(pieces, " ") != tc.pieces {
					t.Errorf("chunks %v, want %v; pieces %s, want %s", chunks, tc.chunks, pieces, tc.pieces)
				}
				if m := g.w.Metrics(); int(m.Chunks) != len(tc.chunks) || m.HandOffs != 1 || m.Pages != uint64(tc.r.Len()) {
					t.Errorf("%+v", m)
				}
				g.read(rng(0, 512))
				g.close()
			}
		})
	}
}

// What the log gets for pages of zeros (.), text (t) and noise (n), in pieces of
// eight from block 0 on; a space is a page that is not dirty.
func TestPieces(t *testing.T) {
	for _, tc := range []struct{ pages, want string }{
		{"tttttttt", "encoded [0,8) 11111111"},
		{"nnnnnnnn", "raw [0,8) 11111111"},
		{"nnnnnnnntttttttt", "raw [0,8) 11111111; encoded [8,16) 11111111"},
		{"ttttttttnnnnnnnntttt", "encoded [0,8) 11111111; raw [8,16) 11111111; encoded [16,20) 1111"},
		{"t", "encoded [0,1) 1"}, // one block is tried too
		{"n", "raw [0,1) 1"},
		{"n.n", "raw [0,3) 101"},
		{"t..t....", "encoded [0,8) 10010000"},
		{"....nn..", "raw [0,8) 00001100"},
		{"........", "hole [0,8)"},
		{"................", "hole [0,16)"}, // one record for both
		{"..................", "hole [0,18)"},
		{"tttttttt................t", "encoded [0,8) 11111111; hole [8,24); encoded [24,25) 1"},
		{"........nnnnnnnn........", "hole [0,8); raw [8,16) 11111111; hole [16,24)"},
		{".", "hole [0,1)"},
		{"tt tt", "encoded [0,2) 11; encoded [3,5) 11"},
		{"   ...  .", "hole [3,6); hole [8,9)"},
		{"      tttt", "encoded [6,8) 11; encoded [8,10) 11"},
	} {
		t.Run(tc.pages, func(t *testing.T) {
			g := newRig(t, rigOptions{extent: 8, transform: "zstd"})
			for i, c := range tc.pages {
				if make := map[rune]content{'.': zeros, 't': text, 'n': noise}[c]; make != nil {
					g.write(rng(block.Index(i), block.Index(i)+1), make)
				}
			}
			g.commit()
			if got := strings.Join(g.log.take("release", "commit"), "; "); got != tc.want {
				t.Errorf("the log has %s, want %s", got, tc.want)
			}
			m := g.w.Metrics()
			if int(m.Encoded) != strings.Count(tc.want, "encoded") || int(m.Raw) != strings.Count(tc.want, "raw") || m.EncodeFailures != 0 {
				t.Errorf("%+v", m)
			}
			g.read(rng(0, 32))
			g.close()
		})
	}
}

// The largest extent, of 32 blocks, fills the bitmap of a blob.
func TestLargestPiece(t *testing.T) {
	for _, fails := range []bool{false, true} {
		g := newRig(t, rigOptions{extent: 32, transform: "zstd"})
		if fails {
			g.transform.before = func(block.Index) { panic("broken") }
		}
		g.write(rng(32, 64), noise)
		g.commit()
		if got := g.log.take("release", "commit"); len(got) != 1 || got[0] != "raw [32,64) "+strings.Repeat("1", 32) {
			t.Errorf("the log has %v", got)
		}
		g.read(rng(0, 64))
		g.close()
	}
}

// An encoder that fails costs its chunk the compression, and nothing else.
func TestEncoderFails(t *testing.T) {
	g := newRig(t, rigOptions{transform: "xor"})
	g.transform.before = func(start block.Index) {
		if start == 128+32 { // the third piece of the second chunk
			panic("broken")
		}
	}
	g.write(rng(0, 384), text)
	g.commit()
	want := []string{}
	for at := block.Index(0); at < 384; at += 16 {
		kind := "encoded"
		if at/128 == 1 {
			kind = "raw"
		}
		want = append(want, fmt.Sprintf("%s %v 1111111111111111", kind, rng(at, at+16)))
	}
	if got := g.log.take("release", "commit"); !slices.Equal(got, want) {
		t.Errorf("the log has\n%v, want\n%v", got, want)
	}
	if m := g.w.Metrics(); m.EncodeFailures != 1 {
		t.Errorf("%+v", m)
	}
	if g.pages.failed != 0 {
		t.Errorf("%d pages have failed", g.pages.failed)
	}
	g.read(rng(0, 384))
	g.close()
}

// However long each encoding takes, the log has the pieces in the order in which
// they were handed off, and so the newest version of a block is the one that stays.
func TestLogOrderIsHandOffOrder(t *testing.T) {
	seed := disktest.Seed(t)
	for round := range 10 * disktest.Scale(t) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, uint64(round)))
			g := newRig(t, rigOptions{workers: 1 + r.IntN(8), transform: "xor"})
			var encodes atomic.Uint64
			g.transform.before = func(block.Index) {
				time.Sleep(time.Duration(rand.NewPCG(seed, encodes.Add(1)).Uint64() % 1000))
			}
			var want []string
			for range 20 {
				at := block.Index(r.IntN(400))
				w := rng(at, at+1+block.Index(r.IntN(100)))
				g.write(w, text)
				// This range is all there is in the epoch.
				g.background(&Control{Budget: all})
				for at := w.Start; at < w.End; {
					end := min(w.End, (at+16)&^15)
					want = append(want, fmt.Sprintf("encoded %v %s", rng(at, end), strings.Repeat("1", int(end-at))))
					at = end
				}
			}
			g.commit()
			if got := g.log.take("release", "commit"); !slices.Equal(got, want) {
				t.Fatalf("round %d: the log has\n%v, want\n%v", round, got, want)
			}
			g.read(rng(0, 512))
			g.close()
		})
	}
}

// A slow encoder holds up neither the flusher nor a writer of the same blocks, nor
// other encoders, but what comes after it in the log.
func TestSlowEncoder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{transform: "xor"})
		gate, open := newGate(t)
		var encoding atomic.Int64
		g.transform.before = func(start block.Index) {
			if encoding.Add(1) == 1 {
				<-gate
			}
		}
		for i := range 4 {
			g.write(rng(7, 9), text)
			c := Control{Budget: all}
			g.background(&c)
			if c.Written != 2 {
				t.Errorf("pass %d: %d blocks handed off, want 2", i, c.Written)
			}
			synctest.Wait() // the first is the first to be encoded
		}
		if n := encoding.Load(); n != 4 {
			t.Errorf("%d of 4 chunks are or were being encoded", n)
		}
		if events := g.log.take(); len(events) != 0 {
			t.Errorf("before the first is encoded the log has %v", events)
		}
		g.read(rng(7, 9))
		open()
		g.commit()
		if events := g.log.take("release", "commit"); len(events) != 4 {
			t.Errorf("the log has %v", events)
		}
		g.read(rng(7, 9))
		g.close()
	})
}

// Tokens come back when a chunk is in the log, not when it is encoded, nor only
// when it is written.
func TestTokensComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{hold: true, limit: 1 << 20})
		g.write(rng(0, 20), text)
		gate, open := newGate(t)
		g.log.data = func(block.Range) { <-gate }
		g.background(&Control{Budget: all})
		synctest.Wait()
		if m := g.queue.Metrics(); m.Bytes != 20*block.Size {
			t.Errorf("while its pieces are appended: %+v", m)
		}
		open()
		synctest.Wait()
		if m := g.queue.Metrics(); m.Bytes != 0 {
			t.Errorf("when they are: %+v", m)
		}
		if _, _, n, _ := g.pages.counts(); n != 20 {
			t.Errorf("%d pages are in writeback, want 20: nothing is written yet", n)
		}
		g.close()
	})
}

// Pages end their writeback when the log says that they are written, each once,
// however late that is and however many chunks have been used meanwhile.
func TestWritebackEndsWhenWritten(t *testing.T) {
	g := newRig(t, rigOptions{hold: true, limit: 1 << 20, transform: "zstd"})
	const n = 300
	for i := range n {
		g.write(block.Span(block.Index(i), 1), text)
		g.background(&Control{Budget: all})
		if i%10 == 0 {
			if err := g.queue.Drain(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := g.queue.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, w, _ := g.pages.counts(); w != n || g.pages.ended != 0 {
		t.Errorf("%d pages in writeback, %d ended, want %d and 0", w, g.pages.ended, n)
	}
	g.read(rng(0, n))
	g.log.write(nil)
	g.log.drain()
	if _, _, w, _ := g.pages.counts(); w != 0 || g.pages.ended != n {
		t.Errorf("%d pages in writeback, %d ended, want 0 and %d", w, g.pages.ended, n)
	}
	g.commit()
	g.read(rng(0, n))
	g.close()
}

// A chunk is used again when both the queue and the log have done with it, in
// either order, and not before.
func TestChunkIsFreeAfterItsLastUser(t *testing.T) {
	g := newRig(t, rigOptions{})
	g.w.chunks.New = func() any { return nil }
	last := 0
	for i := range 200 {
		c := &chunk{w: g.w}
		c.begin(rng(0, 0), nil)
		steps := []func(){c.Free, func() { c.Written(nil) }}
		if i%2 == 0 {
			slices.Reverse(steps)
		}
		steps[0]()
		if g.w.chunks.Get() != nil {
			t.Error("free after its first user")
		}
		steps[1]()
		// A pool may forget what it has, and does so under the race detector.
		if g.w.chunks.Get() != nil {
			last++
		}
		if g.w.chunks.Get() != nil {
			t.Error("free twice")
		}
	}
	if last == 0 {
		t.Error("not free after its last user")
	}
}

// What fails in the log ends the writeback of the chunk's pages, once each, with
// that error; the reservation and the tokens come back nevertheless, the data stays
// readable, and every later commit fails.
func TestLogFails(t *testing.T) {
	for _, tc := range []struct {
		op     string
		nth    int
		failed int // pages; of 80, in pieces of 16
	}{
		{"data", 0, 80}, {"data", 2, 80}, {"data", 4, 80}, {"after", 0, 80},
		{"hole", 0, 16}, {"commit", 0, 0}, {"sync", 0, 0},
	} {
		t.Run(fmt.Sprintf("%s %d", tc.op, tc.nth), func(t *testing.T) {
			g := newRig(t, rigOptions{})
			g.write(rng(0, 80), text)
			g.write(rng(200, 216), zeros) // stored as a hole
			g.trim(rng(300, 310))
			g.write(rng(300, 302), text)
			g.trim(rng(300, 302))
			n, failed := 0, false
			g.log.fail = func(op string) error {
				if op == tc.op {
					if n == tc.nth {
						failed = true
					}
					n++
				}
				if failed {
					return errFake
				}
				return nil
			}
			for range 3 {
				if err := g.w.Commit(t.Context(), g.es); !errors.Is(err, errFake) {
					t.Errorf("Commit: %v", err)
				}
			}
			g.settle()
			want := tc.failed
			if want == 80 {
				want += 16 // whatever comes after it fails too
			}
			if g.pages.failed != want || g.pages.ended != 96 {
				t.Errorf("%d pages ended, %d with an error, want 96 and %d", g.pages.ended, g.pages.failed, want)
			}
			if g.log.released != 96 {
				t.Errorf("%d blocks released, want 96", g.log.released)
			}
			if tc.op == "data" || tc.op == "hole" {
				// The holes are not in the map, and stay pending.
				if _, _, _, holes := g.pages.counts(); holes != 10 {
					t.Errorf("%d blocks are pending holes, want 10", holes)
				}
			}
			g.read(rng(0, 512))
			g.close()
		})
	}
}

// One failure in the middle of a chunk is the failure of the chunk, whatever
// succeeds after it.
func TestLogFailsOnce(t *testing.T) {
	for _, op := range []string{"data", "hole", "after"} {
		g := newRig(t, rigOptions{extent: 8})
		for _, at := range []block.Index{0, 128, 256} { // three chunks
			g.write(block.Span(at, 8), text)
			g.write(block.Span(at+8, 8), zeros)
			g.write(block.Span(at+16, 8), text)
		}
		n := 0
		g.log.fail = func(o string) error {
			if o == op {
				n++
			}
			if o == op && n == 2 {
				return errFake
			}
			return nil
		}
		g.background(&Control{Budget: all})
		g.settle()
		if g.pages.failed != 24 || g.pages.ended != 72 || g.log.released != 72 {
			t.Errorf("%s: %d pages failed, %d ended, %d blocks released, want 24, 72, 72", op, g.pages.failed, g.pages.ended, g.log.released)
		}
		g.read(rng(0, 512))
		g.close()
	}
}

// The log's writer tells of an error: the pages end with it.
func TestWriteFails(t *testing.T) {
	g := newRig(t, rigOptions{hold: true, limit: 1 << 20})
	g.write(rng(0, 40), text)
	g.background(&Control{Budget: all})
	if err := g.queue.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.log.write(errFake)
	g.log.drain()
	if g.pages.failed != 40 || g.pages.ended != 40 {
		t.Errorf("%d pages ended, %d with an error, want 40", g.pages.ended, g.pages.failed)
	}
	if !errors.Is(g.pages.versions[0].failed, errFake) {
		t.Errorf("the error is %v", g.pages.versions[0].failed)
	}
	g.read(rng(0, 40))
	g.close()
}

// A write during writeback does not wait, and the end of the old version's
// writeback does not clean the new one.
func TestWriteDuringWriteback(t *testing.T) {
	for _, again := range []string{"written", "trimmed", "handed off"} {
		t.Run(again, func(t *testing.T) {
			g := newRig(t, rigOptions{hold: true, limit: 1 << 20, transform: "xor"})
			g.write(rng(10, 12), text)
			g.background(&Control{Budget: all})
			if again == "trimmed" {
				g.trim(rng(10, 12))
			} else {
				g.write(rng(10, 12), text)
			}
			if again == "handed off" {
				g.background(&Control{Budget: all})
			}
			g.settle() // the old version is written
			g.read(rng(10, 12))
			if again == "written" {
				if dirty, _, _, _ := g.pages.counts(); dirty != 2 || g.es.open.State.Count(extents.Delalloc) != 2 {
					t.Errorf("%d pages are dirty, %d delalloc, want 2", dirty, g.es.open.State.Count(extents.Delalloc))
				}
			}
			g.commit()
			g.read(rng(10, 12))
			g.close()
		})
	}
}

// A hole goes to the log as one record, however long it is, and then is not
// pending any more.
func TestHoleIsOneRecord(t *testing.T) {
	g := newRig(t, rigOptions{})
	g.write(rng(0, 100), text)
	g.commit()
	g.log.take()
	g.trim(rng(10, 90))
	c := Control{Budget: all}
	g.background(&c)
	g.settle()
	if got := g.log.take(); !slices.Equal(got, []string{"hole [10,90)"}) {
		t.Errorf("the log has %v", got)
	}
	if _, _, _, holes := g.pages.counts(); holes != 0 || !g.es.open.State.Empty() {
		t.Errorf("%d blocks are pending, the state is empty: %t", holes, g.es.open.State.Empty())
	}
	if m := g.w.Metrics(); m.Holes != 1 || c.Written != 80 || c.Next != 90 {
		t.Errorf("%d holes, %d blocks, next %d", m.Holes, c.Written, c.Next)
	}
	g.read(rng(0, 100))
	// Of 16 TiB.
	g.es.Open().State.Set(rng(0, 1<<32), extents.DirtyHole)
	c = Control{Budget: all}
	g.background(&c)
	g.settle()
	if c.Written != rangeBlocksMax || c.Next != 1<<32 {
		t.Errorf("it counts as %d blocks, next is %d", c.Written, c.Next)
	}
	if got := g.log.take(); !slices.Equal(got, []string{"hole [0,4294967296)"}) {
		t.Errorf("the log has %v", got)
	}
}

// A hole that is written into while its range lock is waited for is left: the
// re-test. What remains of it goes by itself.
func TestHoleIsRetested(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{})
		e := g.trim(rng(10, 20))
		e.State.Lock(rng(12, 13), 99)
		go g.background(&Control{Budget: all})
		synctest.Wait()
		page := make([]byte, block.Size)
		text(page)
		copy(g.truth[12*block.Size:], page)
		g.pages.install(12, page, 1)
		g.reserved.Add(1)
		e.State.Unlock(rng(12, 13), 99, extents.Delalloc, extents.DirtyHole)
		synctest.Wait()
		g.settle()
		// The pass goes on behind the first block of what it has to leave.
		if got := g.log.take("release"); !slices.Equal(got, []string{"hole [11,12)", "raw [12,13) 1", "hole [13,20)"}) {
			t.Errorf("the log has %v", got)
		}
		if m := g.w.Metrics(); m.Retests != 1 || m.Holes != 2 {
			t.Errorf("%+v", m)
		}
		g.commit()
		if got := g.log.take(); !slices.Equal(got, []string{"hole [10,11)", "commit 1"}) {
			t.Errorf("the log has %v", got)
		}
		g.read(rng(0, 30))
		g.close()
	})
}

// A hole that vanishes while a pass looks at it makes no record.
func TestHoleVanishes(t *testing.T) {
	g := newRig(t, rigOptions{})
	e := g.es.Open()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range block.Index(2) {
		wg.Go(func() {
			r := block.Span(100*i, 1)
			owner := 100 + uint64(i)
			for {
				select {
				case <-stop:
					return
				default:
				}
				e.State.Lock(r, owner)
				e.State.Unlock(r, owner, extents.DirtyHole, 0)
				e.State.Lock(r, owner)
				e.State.Unlock(r, owner, 0, extents.DirtyHole)
			}
		})
	}
	for until := time.Now().Add(300 * time.Millisecond); time.Now().Before(until) && !t.Failed(); {
		g.background(&Control{Budget: all, Next: 50, Cyclic: true})
	}
	close(stop)
	wg.Wait()
	g.settle()
	t.Logf("%d holes", g.log.holes)
}

// The number under which a hole is no longer pending is that of the hand-off for
// the open epoch, and that of the freeze for a frozen one: a newer hole in the same
// place has a record to come.
func TestHoleNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, rigOptions{workers: 1, bytesMax: 16 * block.Size})
		gate, open := newGate(t)
		g.transform.before = func(block.Index) { <-gate }
		applied := func(want ...uint64) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(g.pages.applied, want) {
				t.Errorf("holes are applied up to %v, want %v", g.pages.applied, want)
			}
			g.read(rng(0, 512))
		}
		g.trim(rng(110, 120)) // 1
		g.write(rng(0, 8), text)
		g.background(&Control{Budget: all}) // keeps the worker, and 1 behind it
		g.trim(rng(112, 114))               // 2, after the hand-off of 1
		g.write(rng(0, 16), text)
		go g.commit()
		synctest.Wait()       // for tokens, before the hole
		g.trim(rng(112, 113)) // 3, after the freeze with 2
		applied()
		open()
		applied(1, 2)
		if _, _, _, holes := g.pages.counts(); holes != 1 {
			t.Errorf("%d blocks are pending, want 1", holes)
		}
		g.commit()
		applied(1, 2, 3)
		g.close()
	})
}

// With pressure, what was handed off is written although it fills no buffer of the
// log; without, it waits there.
func TestPressure(t *testing.T) {
	g := newRig(t, rigOptions{hold: true, limit: 1 << 20})
	g.write(rng(0, 4), text)
	for i, pressure := range []bool{false, true, true} {
		// The second pass finds nothing to hand off, and somebody waits all the same.
		if err := g.w.Background(context.Background(), g.es, &Control{Budget: all}, pressure); err != nil {
			t.Fatal(err)
		}
		if err := g.queue.Drain(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.log.drain()
		want := 4
		if pressure {
			want = 0
		}
		if _, _, n, _ := g.pages.counts(); n != want || g.log.kicks != i {
			t.Errorf("pass %d: %d pages in writeback, %d kicks, want %d and %d", i, n, g.log.kicks, want, i)
		}
	}
	g.log.fail = func(string) error { return errFake }
	if err := g.w.Background(context.Background(), g.es, &Control{Budget: all}, true); err != nil {
		t.Errorf("Background: %v", err)
	}
	g.close()
}
