package device

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/invariants"
	"cnbd/pagecache"
	"cnbd/store"
)

// A Payload is what was read: memory of the cache, shared until Release.
type Payload struct {
	d        *Device
	segments [][]byte
	refs     []pagecache.Ref
	reading  reading // that filled it; kept for its memory
}

// Segments are the bytes in order. They do not change, and are valid until Release.
func (p *Payload) Segments() [][]byte { return p.segments }

// Zero reports whether segment i is known to be zeros: a hole, and no page of the
// cache. False says nothing.
func (p *Payload) Zero(i int) bool {
	s := p.segments[i]
	// A segment may be the page without its beginning or its end; its capacity
	// goes to the end of the page.
	return len(s) > 0 && &s[:cap(s)][cap(s)-1] == &zeroPage[block.Size-1]
}

// Release gives the memory back. It is called once.
func (p *Payload) Release() {
	p.drop()
	p.d.payloads.Put(p)
}

// drop gives up what was read.
func (p *Payload) drop() {
	for _, r := range p.refs {
		p.d.cache.Unpin(r)
	}
	clear(p.segments)
	p.segments, p.refs = p.segments[:0], p.refs[:0]
}

var zeroPage [block.Size]byte

// Read returns the n bytes at off. Damaged blocks are EIO, and only for requests
// that touch them.
func (d *Device) Read(ctx context.Context, off uint64, n uint32) (*Payload, error) {
	if err := d.admit(off, uint64(n)); err != nil {
		return nil, err
	}
	p := d.payloads.Get().(*Payload)
	r := block.Covering(off, uint64(n))
	d.ahead.reading.Add(1)
	defer d.ahead.reading.Add(-1)
	if err := p.readBlocks(ctx, r, d.ahead.missed(r)); err != nil {
		d.metrics.readErrors.Add(1)
		p.Release()
		return nil, err
	}
	p.trim(r, off, uint64(n))
	return p, nil
}

// ReadPromptly is Read if the cache has all of the range. It does not block. Where it
// reports false there is no Payload.
func (d *Device) ReadPromptly(off uint64, n uint32) (*Payload, bool) {
	if size := d.Bytes(); off > size || uint64(n) > size-off {
		return nil, false
	}
	r := block.Covering(off, uint64(n))
	p := d.payloads.Get().(*Payload)
	holes := 0
	for b := r.Start; b < r.End; b++ {
		switch ref, status := d.cache.Peek(b); status {
		case pagecache.Hit:
			p.refs = append(p.refs, ref)
			p.segments = append(p.segments, d.cache.Bytes(ref))
		case pagecache.Hole:
			p.segments = append(p.segments, zeroPage[:])
			holes++
		default:
			p.Release()
			return nil, false
		}
	}
	d.requests.Add(1)
	d.cache.CountPeeks(p.refs, holes)
	d.ahead.hit(r)
	p.trim(r, off, uint64(n))
	return p, true
}

// trim makes p, which has the blocks of r, the n bytes at off: the first and the last
// block may be wanted in part.
func (p *Payload) trim(r block.Range, off, n uint64) {
	if invariants.Enabled {
		for i, s := range p.segments {
			invariants.Assertf(len(s) == block.Size, "block %d of %v was read as %d bytes", i, r, len(s))
		}
	}
	if n == 0 {
		return
	}
	if cut := r.End.Bytes() - (off + n); cut > 0 {
		last := &p.segments[len(p.segments)-1]
		*last = (*last)[:block.Size-cut]
	}
	p.segments[0] = p.segments[0][off%block.Size:]
}

// fetch reads the blocks of r that are absent into the cache, for which nobody has asked
// yet: to the cache they are as neighbours, and what is there counts as read no more often,
// else a scan that was read ahead would look like blocks that are wanted again and again.
func (p *Payload) fetch(r block.Range) error {
	rd := p.begin(r)
	rd.ahead = true
	defer func() { rd.ahead = false }()
	for b := r.Start; b < r.End; b++ {
		if cl, ok := p.d.cache.TryClaim(b); ok {
			rd.claims = append(rd.claims, claim{cl, int(b - r.Start)})
		}
	}
	err := rd.resolve()
	rd.late = nil // they are in the cache
	return err
}

// begin begins to read the blocks of r, a segment each.
func (p *Payload) begin(r block.Range) *reading {
	rd := &p.reading
	rd.d, rd.p = p.d, p
	rd.claims, rd.late = rd.claims[:0], nil // a read that failed may have left some
	for range r.Len() {
		p.segments = append(p.segments, nil)
	}
	return rd
}

// readBlocks puts the blocks of r into p, a segment each. What is behind half is not
// claimed before the rest has been read.
func (p *Payload) readBlocks(ctx context.Context, r block.Range, half block.Index) error {
	rd := p.begin(r)
	for b := r.Start; b < r.End; b++ {
		if b == half {
			if err := rd.resolve(); err != nil {
				return err
			}
		}
		if err := rd.get(ctx, b, int(b-r.Start)); err != nil {
			return err
		}
	}
	for len(rd.claims)+len(rd.late) > 0 {
		if err := rd.resolve(); err != nil {
			return err
		}
		late := rd.late
		rd.late = nil
		for _, c := range late {
			if err := rd.get(ctx, c.Block(), c.segment); err != nil {
				return err
			}
		}
	}
	return nil
}

// reading is a read in progress.
type reading struct {
	d      *Device
	p      *Payload
	claims []claim
	ahead  bool // nobody has asked for the blocks yet
	// late are blocks whose claims a write has overtaken before they were looked
	// up: they are in the cache, and what the map says of them may not be in the
	// file yet.
	late []claim

	// What resolve works with, empty before and after.
	win   block.Range      // a window of the map
	ext   []extents.Extent // what the map says of it
	whole []extents.Extent // what it says of the blocks of one blob
	mine  []claim          // that one blob answers
	near  []claim          // of other blocks that it holds
	again []extents.Extent // what the map says of these
}

// get takes block b from the cache, or claims it.
func (rd *reading) get(ctx context.Context, b block.Index, segment int) error {
	d, p := rd.d, rd.p
	for {
		ref, cl, status := d.cache.Get(b)
		switch status {
		case pagecache.Hit:
			p.refs = append(p.refs, ref)
			p.segments[segment] = d.cache.Bytes(ref)
			return nil
		case pagecache.Hole:
			p.segments[segment] = zeroPage[:]
			return nil
		case pagecache.Claimed:
			rd.claims = append(rd.claims, claim{cl, segment})
			return nil
		}
		// Claims are resolved before waiting for somebody else's.
		if err := rd.resolve(); err != nil {
			return err
		}
		if err := d.cache.WaitFill(ctx, b); err != nil {
			return err
		}
	}
}

// A claim is a block that this read has to fill.
type claim struct {
	pagecache.Claim
	segment int // of the payload, where it goes
}

// resolve reads the claimed blocks, which ascend, from the store, into the cache
// and into the payload, but for those that are late. All claims are given up, also
// on an error.
func (rd *reading) resolve() (err error) {
	d, claims := rd.d, rd.claims
	rd.claims = rd.claims[:0]
	if len(claims) == 0 {
		return nil
	}
	d.metrics.misses.Add(1)
	view := d.store.View()
	defer d.store.Unview(view)
	for len(claims) > 0 {
		// One window of the map at a time, up to a chunk; and no more than is asked
		// for, since there may be an extent for each block.
		limit := claims[0].Block()&^(store.ExtentBlocksMax-1) + 8*store.ExtentBlocksMax
		n := 0
		for n < len(claims) && claims[n].Block() < limit {
			n++
		}
		rd.win = block.Range{Start: claims[0].Block(), End: claims[n-1].Block() + 1}
		rd.ext, err = d.store.Lookup(rd.win, rd.ext[:0])
		d.metrics.lookups.Add(1)
		if err != nil {
			d.abandon(claims)
			return fmt.Errorf("device: %w: %w", syscall.EIO, err)
		}
		if err := rd.resolveWindow(rd.standing(claims[:n])); err != nil {
			d.abandon(claims[n:])
			return err
		}
		claims = claims[n:]
	}
	return nil
}

// standing keeps those of claims, which have been looked up, that no write or trim
// has withdrawn: what the map said of them is older than any that could have, and
// in the file. The others become late.
func (rd *reading) standing(claims []claim) []claim {
	kept := claims[:0]
	for _, c := range claims {
		if rd.d.cache.Stands(c.Claim) {
			kept = append(kept, c)
		} else {
			rd.d.cache.Abandon(c.Claim)
			rd.late = append(rd.late, c)
			rd.d.metrics.late.Add(1)
		}
	}
	return kept
}

func (d *Device) abandon(claims []claim) {
	for _, c := range claims {
		d.cache.Abandon(c.Claim)
	}
}

// resolveWindow fills the claims from the extents that cover them, rd.ext.
func (rd *reading) resolveWindow(claims []claim) error {
	d, ext := rd.d, rd.ext
	for len(claims) > 0 {
		b := claims[0].Block()
		for !ext[0].Range().Contains(b) {
			ext = ext[1:]
		}
		e := ext[0]
		n := 0
		switch e.Kind {
		case extents.Hole:
			for n < len(claims) && e.Range().Contains(claims[n].Block()) {
				// Zeros need no frame; the answer is right although a write may
				// have come since the lookup, for it overlaps this read in time.
				rd.p.segments[claims[n].segment] = zeroPage[:]
				d.cache.Abandon(claims[n].Claim)
				n++
			}
			d.metrics.holesRead.Add(1)
		case extents.Data:
			// Every claim of this blob, also beyond a hole or another extent.
			same := blobExtents(ext, e)
			n = rd.takeMine(claims, same, e)
			if err := rd.fillBlob(e, same); err != nil {
				d.abandon(claims[n:])
				return err
			}
		default:
			d.abandon(claims)
			return fmt.Errorf("device: block %d was damaged in the store: %w", b, syscall.EIO)
		}
		claims = claims[n:]
	}
	return nil
}

// blobExtents is the part of ext, which begins with e, in which extents of its blob
// can be: blocks further away are not in it.
func blobExtents(ext []extents.Extent, e extents.Extent) []extents.Extent {
	end := e.Start + block.Index(e.Addr.Blocks-e.Skip)
	n := 1
	for n < len(ext) && ext[n].Start < end {
		n++
	}
	return ext[:n]
}

// takeMine makes rd.mine the claims that the blob of e answers by one of ext, and
// moves the others up. It returns how many it has taken.
func (rd *reading) takeMine(claims []claim, ext []extents.Extent, e extents.Extent) int {
	rd.mine = rd.mine[:0]
	others, seen := 0, 0
	for _, c := range claims {
		for len(ext) > 0 && ext[0].Range().End <= c.Block() {
			ext = ext[1:]
		}
		if len(ext) == 0 {
			break
		}
		if ext[0].SameBlob(e) {
			rd.mine = append(rd.mine, c)
		} else {
			claims[others] = c
			others++
		}
		seen++
	}
	copy(claims[seen-others:seen], claims[:others])
	return seen - others
}

// fillBlob reads and decodes the blob of e once, and fills from it the claims
// rd.mine, all of which it covers, and every absent page that the mapping covers. ext
// is what the window has of the blob.
func (rd *reading) fillBlob(e extents.Extent, ext []extents.Extent) error {
	d, p := rd.d, rd.p
	near := len(rd.mine) < int(e.Addr.Blocks)
	if near {
		ext = rd.lookupBlob(e, ext)
	}
	blob, buf, err := d.decode(e.Addr)
	if err != nil {
		d.abandon(rd.mine)
		return err
	}
	defer d.scratch.Put(buf)
	if near {
		rd.fillNear(e, ext, blob)
	}
	for _, c := range rd.mine {
		data := pageOf(blob, e, c.Block())
		if rd.ahead {
			d.cache.Fill(c.Claim, data)
			continue
		}
		if ref, ok := d.cache.FillPinned(c.Claim, data); ok {
			p.refs = append(p.refs, ref)
			p.segments[c.segment] = d.cache.Bytes(ref)
		} else {
			// Not cached: a write came, or every frame is in use.
			p.segments[c.segment] = append([]byte(nil), data...)
		}
	}
	return nil
}

// lookupBlob is what the map has of all blocks of the blob of e; ext is what the
// window has of them, which is enough if they lie in it, or if there is an error.
func (rd *reading) lookupBlob(e extents.Extent, ext []extents.Extent) []extents.Extent {
	r := block.Span(e.Start-block.Index(e.Skip), block.Count(e.Addr.Blocks)).Intersect(block.Range{End: rd.d.end()})
	if rd.win.Covers(r) {
		return ext
	}
	var err error
	if rd.whole, err = rd.d.store.Lookup(r, rd.whole[:0]); err != nil {
		return ext
	}
	return rd.whole
}

// fillNear fills the absent pages that the mapping of the blob of e covers, by ext,
// beside those in rd.mine.
func (rd *reading) fillNear(e extents.Extent, ext []extents.Extent, blob []byte) {
	d := rd.d
	// Neighbours first claimed, then looked up again, then filled.
	near, mine, cut := rd.near[:0], rd.mine, true
	for _, x := range ext {
		if !x.SameBlob(e) {
			continue
		}
		cut = cut && x.Count < block.Count(e.Addr.Blocks)
		for b := x.Start; b < x.Range().End; b++ {
			if len(mine) > 0 && mine[0].Block() == b {
				mine = mine[1:]
			} else if cl, ok := d.cache.TryClaim(b); ok {
				near = append(near, claim{Claim: cl})
			}
		}
	}
	rd.near = near
	if cut {
		d.metrics.bookends.Add(1)
	}
	if len(near) == 0 {
		return
	}
	again, err := d.store.Lookup(block.Range{Start: near[0].Block(), End: near[len(near)-1].Block() + 1}, rd.again[:0])
	rd.again = again
	if err != nil {
		d.abandon(near)
		return
	}
	for _, c := range near {
		for !again[0].Range().Contains(c.Block()) {
			again = again[1:]
		}
		if x := again[0]; x.SameBlob(e) {
			if d.cache.Fill(c.Claim, pageOf(blob, x, c.Block())) {
				d.metrics.neighbours.Add(1)
			}
		} else {
			d.metrics.stale.Add(1)
			d.cache.Abandon(c.Claim)
		}
	}
}

// pageOf is block b, which e maps, in the blob of e.
func pageOf(blob []byte, e extents.Extent, b block.Index) []byte {
	i := int(b+block.Index(e.Skip)) - int(e.Start)
	return blob[i*block.Size : (i+1)*block.Size]
}

// decode reads the blob at a and decodes it. The bytes are valid until the caller
// gives buf, where they are, back to d.scratch.
func (d *Device) decode(a extents.Addr) (blob, buf []byte, err error) {
	d.metrics.decodes.Add(1)
	// One buffer for both forms: a reader that held one and waited for another
	// could wait for readers that do the same.
	if buf, err = d.scratch.Get(context.Background()); err != nil {
		return nil, nil, fmt.Errorf("device: %w", err)
	}
	if blob, err = d.decodeInto(buf, a); err != nil {
		d.scratch.Put(buf)
		if errors.Is(err, store.ErrCorrupt) {
			d.opts.Warn("damaged data in the store", err)
		}
		return nil, nil, fmt.Errorf("device: %w: %w", syscall.EIO, err)
	}
	return blob, buf, nil
}

func (d *Device) decodeInto(buf []byte, a extents.Addr) ([]byte, error) {
	const half = store.ExtentBlocksMax * block.Size
	size := int(a.Blocks) * block.Size
	if a.Length > half || size > half {
		return nil, fmt.Errorf("blob of %d bytes for %d blocks: %w", a.Length, a.Blocks, store.ErrCorrupt)
	}
	stored := buf[half:][:a.Length]
	if err := d.store.ReadBlob(stored, a); err != nil {
		return nil, err
	}
	codec := compression.Codec(a.Codec)
	if codec == compression.None {
		if len(stored) != size {
			return nil, fmt.Errorf("raw blob of %d bytes for %d blocks: %w", a.Length, a.Blocks, store.ErrCorrupt)
		}
		return stored, nil
	}
	blob, err := d.decoder.Decode(buf[:0:half], stored, codec, size)
	if err != nil {
		// The checksum was right: it is our mistake, or a crafted store.
		return nil, fmt.Errorf("blob at %d of segment %d: %w: %w", a.Offset, a.Segment, store.ErrCorrupt, err)
	}
	return blob, nil
}
