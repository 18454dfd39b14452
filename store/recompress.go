package store

import (
	"encoding/binary"
	"math"
	"math/bits"
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
	// encoding it anew must save, unless it makes one extent of several.
	recompressGain = 32

	// regionsMax bounds the number of regions of which is known whether they were
	// touched. It is format.
	regionsMax = 8192
)

// touched knows which regions of the device may have something to encode: those
// that were written or trimmed since they were looked at. It is kept in the
// superblock, so that a restart does not begin anew.
type touched struct {
	shift   uint                           // log2 of the blocks of a region
	regions atomic.Uint64                  // number of regions
	bits    [regionsMax / 64]atomic.Uint64 // 1: touched

	at, end block.Index  // what is left to look at of the region whose bit was taken; guarded by the cleaner's turn
	taken   atomic.Int64 // number of that region, -1 if nothing is left of it
}

// newTouched is one where all regions are touched, unless regions, as append made
// it, says otherwise.
func newTouched(blocks block.Count, shift uint8, regions []byte) *touched {
	const least = 8 // 1 MiB
	t := &touched{shift: least}
	for uint64(blocks)>>t.shift >= regionsMax {
		t.shift++
	}
	t.grow(blocks)
	t.taken.Store(-1)
	for i := range t.bits {
		word := ^uint64(0)
		if uint(shift) == t.shift {
			word = binary.LittleEndian.Uint64(regions[8*i:])
		}
		t.bits[i].Store(word)
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

// encode puts which regions are touched into dst, touchedSize bytes.
func (t *touched) encode(dst []byte) {
	for i := range t.bits {
		word := t.bits[i].Load()
		if n := t.taken.Load(); n >= 0 && n/64 == int64(i) {
			word |= 1 << (n % 64)
		}
		binary.LittleEndian.PutUint64(dst[8*i:], word)
	}
}

// touchedSize is the encoded size of the bitmap.
const touchedSize = regionsMax / 8

// note says that r has been written, or trimmed. It may be called concurrently.
func (t *touched) note(r block.Range) {
	last := min(uint64(r.End-1)>>t.shift, t.regions.Load()-1)
	for i := uint64(r.Start) >> t.shift; i <= last; i++ {
		if w := &t.bits[i/64]; w.Load()>>(i%64)&1 == 0 {
			w.Or(1 << (i % 64))
		}
	}
}

// next takes the next region that was touched, in the order of blocks and then from
// the first on, and reports whether there is one.
func (t *touched) next() bool {
	t.taken.Store(-1)
	from := uint64(t.end) >> t.shift
	regions := t.regions.Load()
	for n := range regions {
		i := (from + n) % regions
		if w := &t.bits[i/64]; w.Load()>>(i%64)&1 != 0 {
			t.taken.Store(int64(i)) // before the bit goes: encode sees one or the other
			w.And(^(uint64(1) << (i % 64)))
			t.at, t.end = block.Index(i<<t.shift), block.Index((i+1)<<t.shift)
			return true
		}
	}
	return false
}

// recompress does a turn of recompression, and reports whether there was anything
// to look at. REQUIRES: the turn of the cleaner.
func (c *cleaner) recompress() (worked bool, err error) {
	s := c.s
	t := s.touched
	c.hurry = false
	began := time.Now()
	enough := func() bool {
		return c.stopping() || time.Since(began) >= recompressBurst && c.inUse()
	}
	view := s.View()
	defer s.Unview(view)
	s.mu.RLock()
	root, stale := s.mu.root, s.mu.sequence != view.version
	s.mu.RUnlock()
	if stale {
		return true, nil
	}
	const worst = recompressBytes + recompressBytes/block.Size*recordHeader
	changes := int64(recompressBytes / block.Size)
	if !c.claim(worst, changes) {
		return false, nil
	}
	defer c.unclaim(worst, changes)
	window := block.Index(max(s.geometry.ExtentBlocks, 1))
	for n, looked := 0, uint64(0); n < recompressParts && looked < recompressBytes && !enough(); n++ {
		if t.at >= t.end {
			// What was noted before this has to be in the tree, or it would be
			// skipped and forgotten.
			if s.appended() != c.settled {
				break
			}
			if !t.next() {
				break
			}
		}
		worked = true
		// All extents from here to the end of the region, as many as may be.
		part := block.Range{Start: t.at, End: min(t.end, t.at+block.Index((recompressBytes-looked+block.Size-1)/block.Size))}
		part.End = (part.End + window - 1) / window * window
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
			at := list[0].Start / window * window
			n := 0
			for n < len(list) && list[n].Start < at+window {
				looked += list[n].Count.Bytes()
				n++
			}
			if err := c.recompressExtent(list[:n], block.Range{Start: at, End: at + window}, view.version); err != nil {
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
func (c *cleaner) recompressExtent(list []extents.Extent, window block.Range, sequence uint64) error {
	stored, present, count, blobs := uint64(0), uint32(0), block.Count(0), 0
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
		}
		stored += uint64(e.LiveBytes())
		present |= (^uint32(0) >> (32 - e.Count)) << (e.Start - window.Start)
		count += e.Count
	}
	// All of one blob; there may be holes between its blocks.
	one := blobs == 1 && count == block.Count(last.Blocks)
	if one && c.recoder.Done(list[0].Addr.Codec, list[0].Addr.Level) {
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
	out, codec, level, ok := c.recoder.Encode(c.encoded[:0], c.blocks, false)
	c.encoded = out[:0]
	if !ok {
		out, codec, level = c.blocks, 0, 0
	}
	after := recordHeader + uint64(len(out))
	if after > stored || one && after+stored/recompressGain > stored {
		return nil
	}
	c.s.metrics.recompressedBytes.Add(uint64(len(c.blocks)))
	first := bits.TrailingZeros32(present)
	h := header{kind: recordData, codec: codec, level: level, start: window.Start + block.Index(first),
		count: block.Count(bits.Len32(present) - first), present: present >> first}
	return c.copyRecord(h, out, sequence)
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
