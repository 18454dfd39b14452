package disktest

import (
	"bytes"
	"maps"
)

const (
	pageSize   = 4096
	chunkPages = 256
	chunkSize  = pageSize * chunkPages
)

// An owner is the identity of the one image that may change a page or chunk in
// place. It has a size, for pointers to things without one may be equal.
type owner struct{ _ byte }

// A page is 4 KiB of an image and the space that it takes. One without an owner
// has the bytes of somebody else, such as those of a recorded write.
type page struct {
	owner *owner
	free  bool // punched: it reads as data but takes no space
	data  *[pageSize]byte
}

// A chunk is a MiB of an image. nil pages are holes.
type chunk struct {
	owner *owner
	pages [chunkPages]*page
}

// Pages that belong to nobody and are never changed.
var (
	zeroPage = &page{data: new([pageSize]byte)} // allocated, never written
	junkPage = func() *page {
		p := &page{free: true, data: new([pageSize]byte)}
		for i := range p.data {
			p.data[i] = byte(mix(0xdb, uint64(i)))
		}
		return p
	}()
)

// An image is the content of a disk: sparse, and cheap to clone, for chunks and
// pages are shared until they are changed. It is not safe for concurrent use,
// but images that share pages may be used at the same time.
type image struct {
	owner     *owner
	chunks    map[int64]*chunk // by offset / chunkSize
	size      int64
	allocated int64 // bytes in pages that take space
}

func newImage(size int64) *image {
	return &image{owner: new(owner), chunks: map[int64]*chunk{}, size: size}
}

// clone is a copy. It costs a map entry for each MiB in use.
func (m *image) clone() *image {
	m.owner = new(owner) // what was m's own is now shared
	return &image{owner: new(owner), chunks: maps.Clone(m.chunks), size: m.size, allocated: m.allocated}
}

// page is page number i, nil for a hole.
func (m *image) page(i int64) *page {
	if c := m.chunks[i/chunkPages]; c != nil {
		return c.pages[i%chunkPages]
	}
	return nil
}

// setPage replaces page i and keeps account of the space.
func (m *image) setPage(i int64, p *page) {
	c := m.chunks[i/chunkPages]
	if c == nil || c.owner != m.owner {
		if c == nil && p == nil {
			return
		}
		own := &chunk{owner: m.owner}
		if c != nil {
			own.pages = c.pages
		}
		m.chunks[i/chunkPages] = own
		c = own
	}
	slot := &c.pages[i%chunkPages]
	if takesSpace(*slot) {
		m.allocated -= pageSize
	}
	if takesSpace(p) {
		m.allocated += pageSize
	}
	*slot = p
}

func takesSpace(p *page) bool { return p != nil && !p.free }

// own makes page i m's own, allocated and writable, with its content.
func (m *image) own(i int64) *[pageSize]byte {
	old := m.page(i)
	if old != nil && old.owner == m.owner && !old.free {
		return old.data
	}
	p := &page{owner: m.owner, data: new([pageSize]byte)}
	if old != nil {
		*p.data = *old.data
	}
	m.setPage(i, p)
	return p.data
}

// pieces calls fn for the part of [off, off+n) in each page: [lo, hi) of page i.
func pieces(off, n int64, fn func(i int64, lo, hi int)) {
	for end := off + n; off < end; {
		i, lo := off/pageSize, int(off%pageSize)
		hi := int(min(pageSize, end-i*pageSize))
		fn(i, lo, hi)
		off += int64(hi - lo)
	}
}

// read fills p. Bytes beyond the size are the caller's care.
func (m *image) read(p []byte, off int64) {
	pieces(off, int64(len(p)), func(i int64, lo, hi int) {
		if pg := m.page(i); pg != nil {
			copy(p, pg.data[lo:hi])
		} else {
			clear(p[:hi-lo])
		}
		p = p[hi-lo:]
	})
}

// equal tells whether p is what is at off.
func (m *image) equal(p []byte, off int64) bool {
	same := true
	pieces(off, int64(len(p)), func(i int64, lo, hi int) {
		want := zeroPage.data[lo:hi]
		if pg := m.page(i); pg != nil {
			want = pg.data[lo:hi]
		}
		same = same && bytes.Equal(p[:hi-lo], want)
		p = p[hi-lo:]
	})
	return same
}

// same tells whether m and o certainly have the same bytes: they share all of
// their memory.
func (m *image) same(o *image) bool { return m.size == o.size && maps.Equal(m.chunks, o.chunks) }

// write puts p at off. It does not change the size. p is kept and must not be
// changed any more: one copy of a write serves all images that it reaches.
func (m *image) write(p []byte, off int64) {
	pieces(off, int64(len(p)), func(i int64, lo, hi int) {
		if hi-lo == pageSize {
			m.setPage(i, &page{data: (*[pageSize]byte)(p)})
		} else {
			copy(m.own(i)[lo:hi], p)
		}
		p = p[hi-lo:]
	})
}

// allocate gives space to the holes in [off, off+n). It does not change the size.
func (m *image) allocate(off, n int64) {
	pieces(off, n, func(i int64, _, _ int) {
		if p := m.page(i); p == nil {
			m.setPage(i, zeroPage)
		} else if p.free {
			m.own(i)
		}
	})
}

// punch takes away the pages wholly in [off, off+n) and zeroes the parts of
// others. With junk, the range reads as junk instead. Its cost grows with what
// is there, not with n.
func (m *image) punch(off, n int64, junk bool) {
	first, last := off/chunkSize, (off+n-1)/chunkSize
	if last-first > int64(len(m.chunks)) {
		for c := range m.chunks {
			m.punchIn(c, off, n, junk)
		}
		return
	}
	for c := first; c <= last; c++ {
		m.punchIn(c, off, n, junk)
	}
}

// punchIn punches the part of [off, off+n) that lies in chunk c.
func (m *image) punchIn(c, off, n int64, junk bool) {
	if m.chunks[c] == nil {
		return
	}
	lo, hi := max(off, c*chunkSize), min(off+n, (c+1)*chunkSize)
	pieces(lo, hi-lo, func(i int64, lo, hi int) {
		switch old := m.page(i); {
		case old == nil:
		case hi-lo < pageSize && junk:
			copy(m.own(i)[lo:hi], junkPage.data[lo:hi])
		case hi-lo < pageSize:
			clear(m.own(i)[lo:hi])
		case junk:
			m.setPage(i, junkPage)
		default:
			m.setPage(i, nil)
		}
	})
}

// truncate sets the size; what was beyond a smaller one reads as zeros later.
func (m *image) truncate(size int64) {
	m.size = size
	for c := range m.chunks {
		start, end := c*chunkSize, (c+1)*chunkSize
		if end > size {
			m.punchIn(c, size, end-size, false)
		}
		if start >= size {
			delete(m.chunks, c)
		}
	}
}

// room is how many bytes from off on, up to n, can be written when free bytes
// of space are left.
func (m *image) room(off, n, free int64) (room int64) {
	full := false
	pieces(off, n, func(i int64, lo, hi int) {
		if !full && !takesSpace(m.page(i)) {
			free -= pageSize
			full = free < 0
		}
		if !full {
			room += int64(hi - lo)
		}
	})
	return room
}

// apply carries out an operation. Sync and none do nothing to an image.
func (m *image) apply(o op) {
	switch o.kind {
	case Write:
		m.write(o.data, o.off)
	case Allocate:
		m.allocate(o.off, o.n)
	case Punch:
		// What is behind the end reads as zeros when the file grows.
		if n := min(o.n, m.size-o.off); n > 0 {
			m.punch(o.off, n, o.junk)
		}
	case Truncate:
		m.truncate(o.off)
	}
	m.size = max(m.size, o.end())
}

// mix is a hash of two numbers (the finalizer of SplitMix64).
func mix(a, b uint64) uint64 {
	z := a + (b+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
