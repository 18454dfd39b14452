package store

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"testing"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// A damageStore is a small store at rest with all that a store can have, and what
// it holds: a map of several nodes, two checkpoints, pending trims, a log behind
// them, and lives that a kill and a clean stop have ended.
type damageStore struct {
	disk *disktest.Disk
	want map[block.Index][]byte // stored bytes by block; the others are holes
	used []byteRange            // of the file, that a store has ever written
	last int64                  // where the newest segment lies, whose header alone names the last commit as durable

	states []map[block.Index][]byte // want at each commit that changed something
}

type byteRange struct{ off, n int64 }

const damageBlocks = 1 << 12

// newDamageStore makes one whose last life with a commit was killed, or stopped in
// good order: then two places that are apart from its log know its last epoch, and
// else one does.
func newDamageStore(t *testing.T, stopped bool) *damageStore {
	t.Helper()
	s := &damageStore{want: make(map[block.Index][]byte)}
	s.states = append(s.states, maps.Clone(s.want))
	d := disktest.New(1, disktest.Options{})
	must(t, Format(d, testGeometry(damageBlocks, 24)))
	opts := Options{CheckpointBytes: 1 << 30, TrimLeaves: 1, ZeroCommits: 1}
	write := func(c *committed, from, to, step, version int) {
		for b := from; b < to; b += step {
			p := []byte(fmt.Sprintf("%d of block %d", version, b))
			must(t, c.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Codec: 1, Parts: [][]byte{p}}))
			s.want[block.Index(b)] = p
		}
		must(t, c.commit())
		s.states = append(s.states, maps.Clone(s.want))
	}
	hole := func(c *committed, r block.Range) {
		must(t, c.hole(r))
		for b := r.Start; b < r.End; b++ {
			delete(s.want, b)
		}
	}
	c := openCommitted(t, d, opts)
	write(c, 0, damageBlocks, 3, 1)
	must(t, c.Checkpoint())
	write(c, 0, 300, 5, 2)
	must(t, c.Close()) // killed
	d = d.Clone()
	c = openCommitted(t, d, opts)
	hole(c, block.Range{Start: 1000, End: 3500}) // more leaves than one checkpoint visits
	write(c, 500, 900, 4, 3)
	must(t, c.Checkpoint())
	write(c, 2000, 2200, 7, 4)
	must(t, c.commit())
	c.closeClean()
	d = d.Clone()
	c = openCommitted(t, d, opts)
	write(c, 100, 160, 6, 5)
	if stopped {
		c.closeClean()
	} else {
		must(t, c.Close())
	}
	d = d.Clone()
	c = openCommitted(t, d, opts) // names the commit before as durable
	s.last = c.segments.base(c.log.mu.head.number)
	must(t, c.Close())
	s.disk = d.Crash(disktest.LoseAll)
	s.used = []byteRange{{0, superblockSize}, {superblockStride, superblockSize}}
	c.segments.visit(func(n uint32, _ segment) {
		b := make([]byte, SegmentSizeMin)
		_, _ = s.disk.ReadAt(b, c.segments.base(n)) // the last one may lie behind the end
		if end := len(bytes.TrimRight(b, "\x00")); end > 0 {
			s.used = append(s.used, byteRange{c.segments.base(n), int64(end)})
		}
	})
	return s
}

// An outcome is what became of a damaged store: refused as damaged, or the number
// of blocks that are right, and that cannot be read.
type outcome struct {
	refused     bool
	right, lost int
}

// judge opens d and compares all blocks. Wrong data, wrong zeros, and errors that
// are not for damage are an error.
func (s *damageStore) judge(d *disktest.Disk) (o outcome, err error) { return judge(d, s.want) }

func judge(d *disktest.Disk, state map[block.Index][]byte) (o outcome, err error) {
	st, err := Open(d, Options{MapCacheBytes: 1 << 20})
	if err != nil {
		if !IsDamage(err) && !errors.Is(err, ErrNotStore) && !errors.Is(err, ErrVersion) {
			return o, fmt.Errorf("refused with %w", err)
		}
		return outcome{refused: true}, nil
	}
	defer st.Close()
	list, err := st.Lookup(block.Range{End: damageBlocks}, nil)
	if err != nil {
		return o, err
	}
	next := block.Index(0)
	for _, e := range list {
		if e.Start != next {
			return o, fmt.Errorf("block %d is missing", next)
		}
		next = e.Range().End
		for b := e.Start; b < next; b++ {
			want := state[b]
			switch e.Kind {
			case extents.Lost:
				o.lost++
				continue
			case extents.Hole:
				if want != nil {
					return o, fmt.Errorf("block %d reads as zeros, and held %q", b, want)
				}
			case extents.Data:
				p := make([]byte, e.Addr.Length)
				if err := st.ReadBlob(p, e.Addr); errors.Is(err, ErrCorrupt) {
					o.lost++
					continue
				} else if err != nil {
					return o, err
				}
				if !bytes.Equal(p, want) {
					return o, fmt.Errorf("block %d reads as %q, and held %q", b, p, want)
				}
			}
			o.right++
		}
	}
	return o, nil
}

// A damageCount sums up outcomes.
type damageCount struct{ tried, harmless, lossy, refused, right, lost int }

func (c *damageCount) add(o outcome) {
	c.tried++
	switch {
	case o.refused:
		c.refused++
	case o.lost > 0:
		c.lossy++
	default:
		c.harmless++
	}
	c.right += o.right
	c.lost += o.lost
}

func (c damageCount) String() string {
	return fmt.Sprintf("%d tried: %d harmless, %d cost blocks, %d refused at open; %d blocks right, %d errors, 0 wrong",
		c.tried, c.harmless, c.lossy, c.refused, c.right, c.lost)
}

// TestFlippedBytes flips a bit of each byte in turn of a store at rest (of a share
// of them; of all from a CNBD_TEST_SCALE of about 700 on). What the store then
// gives for any block is right or an error, or it is not opened (promise P3).
func TestFlippedBytes(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	s := newDamageStore(t, false)
	total := int64(0)
	for _, r := range s.used {
		total += r.n
	}
	step := max(1, total/int64(1000*disktest.Scale(t)))
	var count damageCount
	for _, r := range s.used {
		for off := r.off + rng.Int64N(step); off < r.off+r.n; off += step {
			d := s.disk.Clone()
			d.Corrupt(off, 1)
			o, err := s.judge(d)
			if err != nil {
				t.Fatalf("byte %d flipped: %v", off, err)
			}
			count.add(o)
		}
	}
	t.Logf("one of %d bytes of %d: %v", step, total, count)
	if count.lossy == 0 || count.harmless == 0 || count.refused == 0 && disktest.Scale(t) > 10 {
		t.Error("an outcome is missing")
	}
}

// TestDamagedRanges flips, zeroes and swaps ranges, from a sector up, of a store at
// rest.
func TestDamagedRanges(t *testing.T) {
	seed := disktest.Seed(t)
	killed, stopped := newDamageStore(t, false), newDamageStore(t, true)
	somewhere := func(s *damageStore, rng *rand.Rand, n int64) int64 {
		r := s.used[rng.IntN(len(s.used))]
		return max(0, r.off+rng.Int64N(r.n)&^511-rng.Int64N(n)&^511)
	}
	for _, kind := range []string{"flipped", "zeroed", "swapped", "copied"} {
		var count damageCount
		s := killed
		if kind == "swapped" {
			s = stopped
		}
		for i := range 250 * disktest.Scale(t) {
			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			d := s.disk.Clone()
			n := int64(512) << rng.IntN(8) // up to 64 KiB
			a, b := somewhere(s, rng, n), somewhere(s, rng, n)
			if b < a {
				a, b = b, a
			}
			n = min(n, max(b-a, 512)) // swapped ranges do not overlap
			switch kind {
			case "flipped":
				d.Corrupt(a, n)
			case "zeroed":
				d.Zero(a, n)
			case "copied":
				d.Copy(b, a, n)
			case "swapped":
				d.Swap(a, b, n)
			}
			o, err := s.judge(d)
			if err != nil {
				t.Fatalf("%d bytes at %d (and %d) %s: %v", n, a, b, kind, err)
			}
			count.add(o)
		}
		t.Logf("%s: %v", kind, count)
	}
}
