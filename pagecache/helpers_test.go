package pagecache

import (
	"context"
	"encoding/binary"
	"testing"

	"cnbd/internal/block"
)

// blocks is a size in bytes.
func blocks(n int) int64 { return int64(n) * block.Size }

func newCache(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// closeCache closes c; nothing may be outstanding.
func closeCache(t testing.TB, c *Cache) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// fillPage writes a page of block b that carries stamp in each of its words.
func fillPage(p []byte, b block.Index, stamp uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.NativeEndian.PutUint64(p[i:], stampWord(b, stamp, i))
	}
}

func stampWord(b block.Index, stamp uint64, i int) uint64 {
	if stamp == 0 {
		return 0 // a page of a hole
	}
	return stamp<<24 | uint64(b)<<12 | uint64(i)
}

// pageStamp is the stamp of a page of b; false if it is not of b or is torn.
func pageStamp(p []byte, b block.Index) (uint64, bool) {
	stamp := binary.NativeEndian.Uint64(p) >> 24
	for i := 0; i < len(p); i += 8 {
		if binary.NativeEndian.Uint64(p[i:]) != stampWord(b, stamp, i) {
			return stamp, false
		}
	}
	return stamp, true
}

func pageOf(b block.Index, stamp uint64) []byte {
	p := make([]byte, block.Size)
	fillPage(p, b, stamp)
	return p
}

// write installs stamp as the content of b.
func write(t testing.TB, c *Cache, b block.Index, stamp, epoch uint64) bool {
	t.Helper()
	if err := c.BalanceDirty(context.Background(), 1); err != nil {
		t.Fatal(err)
	}
	return writeAdmitted(t, c, b, stamp, epoch)
}

func writeAdmitted(t testing.TB, c *Cache, b block.Index, stamp, epoch uint64) bool {
	t.Helper()
	refs, err := c.AllocPayload(context.Background(), 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	fillPage(c.Bytes(refs[0]), b, stamp)
	return c.Install(b, refs[0], epoch)
}

// load makes stamp the clean content of b, which is absent.
func load(t testing.TB, c *Cache, b block.Index, stamp uint64) {
	t.Helper()
	_, cl, st := c.Get(b)
	if st != Claimed {
		t.Fatalf("block %d: %v, want it absent", b, st)
	}
	if !c.Fill(cl, pageOf(b, stamp)) {
		t.Fatalf("block %d could not be filled", b)
	}
}

// handOff locks the version of b dirty in epoch and hands it off.
func handOff(t testing.TB, c *Cache, b block.Index, epoch uint64) Ref {
	t.Helper()
	r, ok := c.LockDirty(b, epoch)
	if !ok || !c.StillDirty(r, epoch) {
		t.Fatalf("block %d is not dirty in epoch %d", b, epoch)
	}
	c.HandOff(r)
	return r
}

// flush writes back the version of b dirty in epoch.
func flush(t testing.TB, c *Cache, b block.Index, epoch uint64) {
	t.Helper()
	c.EndWriteback(handOff(t, c, b, epoch), nil)
}

// expect checks that b reads as stamp from a version that is present.
func expect(t testing.TB, c *Cache, b block.Index, stamp uint64) {
	t.Helper()
	r, cl, st := c.Get(b)
	if st != Hit {
		if st == Claimed {
			c.Abandon(cl)
		}
		t.Fatalf("block %d: %v, want a hit with stamp %d", b, st, stamp)
	}
	if got, whole := pageStamp(c.Bytes(r), b); got != stamp || !whole {
		t.Errorf("block %d has stamp %d (whole %v), want %d", b, got, whole, stamp)
	}
	c.Unpin(r)
}

// expectStatus checks the answer of Get, which is not Hit.
func expectStatus(t testing.TB, c *Cache, b block.Index, want Status) {
	t.Helper()
	r, cl, st := c.Get(b)
	switch st {
	case Hit:
		c.Unpin(r)
	case Claimed:
		c.Abandon(cl)
	}
	if st != want {
		t.Errorf("block %d: %v, want %v", b, st, want)
	}
}

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}

// edges counts how often a test went each way that a block can go.
type edges map[string]uint64

func (e edges) add(x Metrics) {
	for name, n := range map[string]uint64{
		"Hits": x.Hits, "HoleHits": x.HoleHits, "FillWaits": x.FillWaits, "Misses": x.Misses, "Neighbours": x.Neighbours,
		"Fills": x.Fills, "LateFills": x.LateFills, "Abandons": x.Abandons, "WritesAbsent": x.WritesAbsent,
		"WritesClean": x.WritesClean, "WritesDirty": x.WritesDirty, "WritesFrozen": x.WritesFrozen, "WritesWriteback": x.WritesWriteback,
		"TrimsClean": x.TrimsClean, "TrimsDirty": x.TrimsDirty, "TrimsFrozen": x.TrimsFrozen, "TrimsWriteback": x.TrimsWriteback,
		"FindLocks": x.FindLocks, "BusyPages": x.BusyPages, "LocksLost": x.LocksLost, "HandOffs": x.HandOffs,
		"WritebacksClean": x.WritebacksClean, "WritebacksDetached": x.WritebacksDetached, "Evictions": x.Evictions,
	} {
		e[name] += n
	}
}

// check fails the test if it never went one of them: then it does not show what
// it is there to show.
// all tells whether each way was gone.
func (e edges) all() bool {
	for _, n := range e {
		if n == 0 {
			return false
		}
	}
	return len(e) > 0
}

func (e edges) check(t *testing.T) {
	t.Helper()
	for name, n := range e {
		if n == 0 {
			t.Errorf("the test never met %s", name)
		}
	}
	t.Logf("met %v", map[string]uint64(e))
}
