package store

import (
	"encoding/binary"
	"math"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
)

// Recompression takes the time of an idle device to encode its data anew, extent
// by extent in the order of blocks: pieces that were written one by one become
// whole extents, what was written in a hurry gets a higher level, and what was
// overwritten in part loses its waste. What is stored already as it would come out
// is only looked at: codec and level stand in the map.
//
// When clients have asked for nothing for long it comes once more, and packs: the largest
// extents that there are, and the highest level. To read a block of such an extent costs more, so regions
// that are read at random are left out, and unpacked if they were packed before.
//
// The results are copies as the cleaner makes them, so they can be overtaken,
// interrupted and lost like those.

const (
	// recompressBytes is the data that one turn looks at most.
	recompressBytes = 4 << 20

	// recompressParts is how many parts of a region, most of them holes, one turn
	// looks at most.
	recompressParts = 1024

	// recompressBurst is after how long a turn on a device in use ends, with the
	// extent at hand. What a turn appends is padded to a block of the file, so small
	// extents do not get a turn each.
	recompressBurst = 4 * time.Millisecond

	// recompressGain is the least part of what an extent takes, as a divisor, that
	// encoding it anew must save, unless it makes one extent of several; packGain that
	// of packing.
	recompressGain = 32
	packGain       = 128

	// randomExtent is that of so many blocks of a region one read at random is, on average,
	// when the region is said to be read at random.
	randomExtent = 16

	// fadeAfter is when half of the reads at random are forgotten.
	fadeAfter = time.Hour

	// vainSlots is how many extents are remembered that did not get smaller, so that one
	// write into a region, or a request that ends packing before the region does, does not have all
	// of them tried again: those of 2 to 4 GiB.
	vainSlots = 1 << 15

	// regionsMax bounds the number of regions of which is known whether they were
	// touched. It is format.
	regionsMax = 8192
)

// touched knows which regions of the device may have something to encode: those
// that were written or trimmed since they were looked at. It is kept in the
// superblock, so that a restart does not begin anew.
type touched struct {
	shift   uint          // log2 of the blocks of a region
	regions atomic.Uint64 // number of regions
	bits    regionSet     // that were touched
	loose   regionSet     // that have been encoded anew, and are to be packed

	// misses counts reads at random, by region, since the opening; half of them are
	// forgotten now and then.
	misses [regionsMax]atomic.Uint32

	taken atomic.Int64 // number of the region whose bit was taken, -1 if nothing is left of it

	// Guarded by the cleaner's turn.
	at, end block.Index // what is left to look at of that region
	packing bool        // it
	faded   time.Time   // when misses were last halved
}

// A regionSet is a set of regions. It is safe for concurrent use.
type regionSet [regionsMax / 64]atomic.Uint64

func (s *regionSet) add(n uint64) {
	if w := &s[n/64]; w.Load()>>(n%64)&1 == 0 {
		w.Or(1 << (n % 64))
	}
}

func (s *regionSet) remove(n uint64)   { s[n/64].And(^(uint64(1) << (n % 64))) }
func (s *regionSet) has(n uint64) bool { return s[n/64].Load()>>(n%64)&1 != 0 }

// newTouched is what sb, which encode made, says; or one where all regions are touched.
func newTouched(blocks block.Count, sb *superblock) *touched {
	const least = 8 // 1 MiB
	t := &touched{shift: least}
	for uint64(blocks)>>t.shift >= regionsMax {
		t.shift++
	}
	t.grow(blocks)
	t.taken.Store(-1)
	known := uint(sb.touchedShift) == t.shift
	for i := range t.bits {
		t.bits[i].Store(^uint64(0))
		if known {
			t.bits[i].Store(binary.LittleEndian.Uint64(sb.touched[8*i:]))
			t.loose[i].Store(binary.LittleEndian.Uint64(sb.loose[8*i:]))
		}
	}
	return t
}

// grow makes it that of a device of so many blocks. Of one that needs larger regions
// what is beyond these is looked at after the next opening, with all the rest.
func (t *touched) grow(blocks block.Count) {
	if n := uint64(blocks)>>t.shift + 1; n > t.regions.Load() {
		t.regions.Store(min(n, regionsMax)) // whose bits are set since the beginning
	}
}

// encode notes in sb which regions are touched, and which are to be packed.
func (t *touched) encode(sb *superblock) {
	sb.touchedShift = uint8(t.shift)
	// The region that is taken comes out of a set before this has read it, and may go into
	// one behind that.
	taken := [2]int64{t.taken.Load()}
	for i := range t.bits {
		binary.LittleEndian.PutUint64(sb.touched[8*i:], t.bits[i].Load())
		binary.LittleEndian.PutUint64(sb.loose[8*i:], t.loose[i].Load())
	}
	taken[1] = t.taken.Load()
	for _, n := range taken {
		if n >= 0 {
			sb.touched[n/8] |= 1 << (n % 8)
		}
	}
}

// touchedSize is the encoded size of the bitmap.
const touchedSize = regionsMax / 8

// note says that r has been written, or trimmed. It may be called concurrently.
func (t *touched) note(r block.Range) {
	last := min(uint64(r.End-1)>>t.shift, t.regions.Load()-1)
	for i := uint64(r.Start) >> t.shift; i <= last; i++ {
		t.bits.add(i)
	}
}

// noteRandomRead says that r has been read by itself. It may be called concurrently.
func (t *touched) noteRandomRead(r block.Range) {
	n := uint64(r.Start) >> t.shift
	if n < t.regions.Load() && t.misses[n].Add(1) == t.randomMin() {
		t.bits.add(n) // it may have been packed
	}
}

// randomMin is how many reads at random make a region one that is read so: as many as it
// has extents. Who goes through large files once, in any order, has fewer.
func (t *touched) randomMin() uint32 { return 1 << t.shift / randomExtent }

// random tells whether region n is read at random.
func (t *touched) random(n uint64) bool { return t.misses[n].Load() >= t.randomMin() }

// fade forgets half of the reads at random when it is time. It may be called once at a time.
func (t *touched) fade() {
	if time.Since(t.faded) < fadeAfter {
		return
	}
	t.faded = time.Now()
	for i := range t.regions.Load() {
		t.misses[i].Store(t.misses[i].Load() / 2) // a read that comes between does not matter
	}
}

// next takes the next region that was touched, or with pack, if there is none, the next one
// to be packed, in the order of blocks and then from the first on, and reports whether
// there is one. The one that is done with is to be packed.
func (t *touched) next(pack bool) bool {
	if n := t.taken.Load(); n >= 0 && !t.packing {
		t.loose.add(uint64(n))
	}
	t.taken.Store(-1) // behind that: encode sees one or the other
	return t.take(&t.bits, false) || pack && t.take(&t.loose, true)
}

// take takes the next region of s.
func (t *touched) take(s *regionSet, packing bool) bool {
	from := uint64(t.end) >> t.shift
	regions := t.regions.Load()
	for n := range regions {
		i := (from + n) % regions
		if !s.has(i) {
			continue
		}
		if packing && t.random(i) {
			continue
		}
		t.taken.Store(int64(i)) // before the bit goes
		s.remove(i)
		t.packing = packing
		t.at, t.end = block.Index(i<<t.shift), block.Index((i+1)<<t.shift)
		return true
	}
	return false
}

// putBack has the region that was taken to be packed wait until it may be again.
func (t *touched) putBack() {
	t.loose.add(uint64(t.taken.Load()))
	t.taken.Store(-1)
	t.at = t.end
}

// NoteRandomRead says that r, smaller than an extent, was read from the store without what
// lies beside it. Regions of which much is read so are not packed. It may be called
// concurrently.
func (s *Store) NoteRandomRead(r block.Range) {
	if s.cleaner != nil && s.cleaner.packAfter > 0 {
		s.touched.noteRandomRead(r)
	}
}

// roomy tells whether there is so much free that data may be stored larger than it is, for
// those who read it.
func (s *Store) roomy() bool {
	free, _ := s.segments.room()
	return free > s.segments.total.Load()/8
}

// recompress does a turn of recompression, and reports whether there was anything
// to look at. REQUIRES: the turn of the cleaner.
func (c *cleaner) recompress() (worked bool, err error) {
	s := c.s
	t := s.touched
	began := time.Now()
	enough := func() bool {
		return c.stopping() || c.waiting.Load() > 0 || time.Since(began) >= recompressBurst && c.inUse()
	}
	view := s.View()
	defer s.Unview(view)
	s.mu.RLock()
	root, stale := s.mu.root, s.mu.sequence != view.version
	s.mu.RUnlock()
	if stale {
		return true, nil
	}
	pack := c.packs()
	if t.at < t.end && t.packing && !pack {
		t.putBack()
	}
	const changes = recompressBytes/block.Size + ExtentBlocksMax
	const worst = changes * (block.Size + recordHeader)
	if !c.claim(worst, changes) {
		return false, nil
	}
	defer c.unclaim(worst, changes)
	for n, looked := 0, uint64(0); n < recompressParts && looked < recompressBytes && !enough(); n++ {
		if t.at >= t.end {
			// What was noted before this has to be in the tree, or it would be
			// skipped and forgotten.
			if s.appended() != c.settled {
				break
			}
			if !t.next(pack) {
				break
			}
		}
		worked = true
		window, effort, unpack := block.Index(max(s.geometry.ExtentBlocks, 1)), Relaxed, false
		if t.packing {
			window, effort = ExtentBlocksMax, Packing
		} else {
			unpack = c.packAfter > 0 && t.random(uint64(t.taken.Load())) && s.roomy()
		}
		// All extents from here to the end of the region, as many as may be.
		part := block.Range{Start: t.at, End: min(t.end, t.at+block.Index((recompressBytes-looked+block.Size-1)/block.Size))}
		part.End = (part.End + ExtentBlocksMax - 1) / ExtentBlocksMax * ExtentBlocksMax // no extent lies on both sides
		t.at = part.End
		list, ok, err := c.extents(root, part, view.version)
		if err != nil {
			s.opts.Warn("a part of the map cannot be read, and is not recompressed", err)
			continue
		}
		if !ok {
			// The cleaner has moved some of it, or a client changed it: once more
			// when that is in the tree too.
			t.at = part.Start
			c.settled = math.MaxUint64
			break
		}
		for len(list) > 0 {
			r, n := group(list, window)
			packed := slices.ContainsFunc(list[:n], func(e extents.Extent) bool {
				return block.Index(e.Addr.Blocks) > window && (!unpack || c.recoder.Done(e.Addr.Codec, e.Addr.Level, Packing))
			})
			if packed && !unpack {
				r, n = group(list, ExtentBlocksMax) // what is left of it becomes one extent again
			}
			for _, e := range list[:n] {
				looked += e.Count.Bytes()
			}
			err := error(nil)
			if packed && unpack {
				err = c.unpack(list[:n], window, view.version)
			} else {
				err = c.recompressExtent(list[:n], r, effort, view.version)
			}
			if err != nil {
				if s.Err() != nil {
					return worked, s.Err()
				}
				s.opts.Warn("an extent is not recompressed", err)
			}
			if list = list[n:]; len(list) > 0 && enough() { // not before the first: each turn gets on
				t.at = list[0].Start / window * window
				break
			}
		}
	}
	_, err = c.enter(view.version)
	return worked, err
}

// group is the place of the extent of size blocks in which list begins, and how many of
// list begin in it.
func group(list []extents.Extent, size block.Index) (r block.Range, n int) {
	r.Start = list[0].Start / size * size
	r.End = r.Start + size
	for n < len(list) && list[n].Start < r.End {
		n++
	}
	return r, n
}

// extents returns the extents of kinds Data and Lost of the tree in r. ok is false
// if something newer than the tree knows of any of r, or there is a newer tree.
func (c *cleaner) extents(root extents.Root, r block.Range, sequence uint64) (list []extents.Extent, ok bool, err error) {
	s := c.s
	s.mu.RLock()
	ok = s.untouchedLocked(r, sequence)
	s.mu.RUnlock()
	if !ok {
		return nil, false, nil
	}
	list = c.list[:0]
	err = s.tree.Lookup(root, r, func(e extents.Extent) error {
		list = append(list, e)
		return nil
	})
	c.list = list
	return list, true, err
}

// recompressExtent encodes the extents in window, the place of one extent, as one,
// if they are smaller then, and appends that.
func (c *cleaner) recompressExtent(list []extents.Extent, window block.Range, effort Effort, sequence uint64) error {
	stored, present, count, blobs, raw := uint64(0), uint32(0), block.Count(0), 0, true
	var last extents.Addr
	for _, e := range list {
		if e.Kind != extents.Data || uint64(e.Skip) > uint64(e.Start-window.Start) || !window.Covers(e.Range()) ||
			e.Start-block.Index(e.Skip)+block.Index(e.Addr.Blocks) > window.End {
			return nil // damaged, or of an extent of another size
		}
		if e.Addr != last {
			last = e.Addr
			blobs++
			stored += recordHeader
			raw = raw && e.Addr.Codec == 0
		}
		stored += uint64(e.LiveBytes())
		present |= (^uint32(0) >> (32 - e.Count)) << (e.Start - window.Start)
		count += e.Count
	}
	// All of one blob; there may be holes between its blocks.
	one := blobs == 1 && count == block.Count(last.Blocks)
	if one && c.recoder.Done(list[0].Addr.Codec, list[0].Addr.Level, effort) {
		return nil
	}
	key := vainKey(list, effort)
	vain := &c.vain[key%vainSlots]
	if *vain == key {
		return nil
	}
	// The blocks of all, in order.
	c.blocks = c.blocks[:0]
	last = extents.Addr{}
	for _, e := range list {
		if e.Addr != last {
			if err := c.decode(e.Addr); err != nil {
				return err
			}
			last = e.Addr
		}
		c.blocks = append(c.blocks, c.decoded[int(e.Skip)*block.Size:][:e.Count.Bytes()]...)
	}
	packing := effort == Packing
	if packing && raw {
		effort = PackingRaw
	}
	out, codec, level, ok := c.recoder.Encode(c.encoded[:0], c.blocks, effort)
	c.encoded = out[:0]
	switch {
	case !ok && packing:
		*vain = key
		return nil
	case !ok:
		out, codec, level = c.blocks, 0, 0
	}
	after := recordHeader + uint64(len(out))
	gain := uint64(recompressGain)
	if packing {
		gain = packGain
	}
	if after > stored || one && after+stored/gain > stored {
		*vain = key
		return nil
	}
	c.s.metrics.recompressedBytes.Add(uint64(len(c.blocks)))
	first := bits.TrailingZeros32(present)
	h := header{kind: recordData, codec: codec, level: level, start: window.Start + block.Index(first),
		count: block.Count(bits.Len32(present) - first), present: present >> first}
	return c.copyRecord(h, out, sequence)
}

// vainKey stands for encoding list, which is not empty, with that effort.
func vainKey(list []extents.Extent, effort Effort) uint64 {
	h := uint64(effort) + 1
	for _, e := range list {
		for _, v := range [...]uint64{uint64(e.Start)<<8 | uint64(e.Count), uint64(e.Addr.Segment)<<32 | uint64(e.Addr.Offset), uint64(e.Addr.Checksum)<<32 | uint64(e.Addr.Length)} {
			h = (h ^ v) * 0x9e3779b97f4a7c15 // the golden ratio, as in Knuth's multiplicative hashing
			h ^= h >> 32
		}
	}
	return h
}

// unpack encodes those of list that are of blobs longer than window as extents of window,
// whatever they take. What lies between them is encoded with its neighbours when the
// region is looked at once more.
func (c *cleaner) unpack(list []extents.Extent, window block.Index, sequence uint64) error {
	others := false
	for _, e := range list {
		if e.Kind != extents.Data || block.Index(e.Addr.Blocks) <= window {
			others = true
			continue
		}
		if err := c.decode(e.Addr); err != nil {
			return err
		}
		blocks := c.decoded[int(e.Skip)*block.Size:][:e.Count.Bytes()]
		for r := e.Range(); !r.Empty(); {
			piece := block.Range{Start: r.Start, End: min(r.End, (r.Start/window+1)*window)}
			part := blocks[:piece.Len().Bytes()]
			blocks, r.Start = blocks[len(part):], piece.End
			if err := c.encodeCopy(piece, part, Relaxed, sequence); err != nil {
				return err
			}
		}
		c.s.metrics.recompressedBytes.Add(e.Count.Bytes())
	}
	if others { // not before all of it could be read, or it would be looked at for ever
		c.s.touched.note(list[0].Range())
	}
	return nil
}

// decode reads a blob into c.decoded.
func (c *cleaner) decode(a extents.Addr) (err error) {
	if cap(c.window) < int(a.Length) {
		c.window = make([]byte, readChunk)
	}
	stored := c.window[:a.Length]
	if err := c.s.readBlob(stored, blobRef{a.Segment, a.Offset, a.Length, a.Checksum}); err != nil {
		return err
	}
	if a.Codec == 0 {
		c.decoded = append(c.decoded[:0], stored...)
		return nil
	}
	c.decoded, err = c.recoder.Decode(c.decoded[:0], stored, a)
	return err
}
