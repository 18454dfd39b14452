package nbd

import (
	"encoding/binary"
	"net"
	"slices"
)

const (
	// extentsMax bounds the extents in one answer to BLOCK_STATUS; a client
	// asks again for what follows.
	extentsMax = 2048
	// extentBytes is what one takes, in memory and, at most, on the wire.
	extentBytes = 16

	// headBytesKept and iovKept bound the memory for headers, and the pieces, that
	// are kept between batches.
	headBytesKept = 64 << 10
	iovKept       = 2 << 10

	// gatherMax is the length of data, in bytes, up to which it is copied behind its
	// header when several replies are sent together: for a page of the cache that costs
	// less than two more pieces cost the kernel. There is room for gatherBytesMax; the
	// rest of headBytesKept is for headers.
	gatherMax      = 4 << 10
	gatherBytesMax = 48 << 10
)

// An encoder collects replies for one writev: headers in memory of its own, which
// is used again, and data where it lies, but for short ones, which gather has copied.
type encoder struct {
	head []byte // of what is collected, appended to; parts of older arrays may be in iov
	iov  net.Buffers
	keep net.Buffers // what the kernel has not taken of iov; nil before it has been given any

	open   bool // the last piece of iov is the end of head
	gather bool // several replies are being collected
}

// begin starts a piece that is appended to e.head.
func (e *encoder) begin() int { return len(e.head) }

// end makes what was appended since begin a part of the last piece of the output, or the
// next one.
func (e *encoder) end(from int) {
	if last := len(e.iov) - 1; e.open {
		from -= len(e.iov[last]) // which has been moved with head, if that was
		e.iov = e.iov[:last]
	}
	e.iov = append(e.iov, e.head[from:len(e.head):len(e.head)])
	e.open = true
}

// payload collects segs, n bytes of data.
func (e *encoder) payload(segs [][]byte, n uint64) {
	if !e.gather || n > gatherMax || uint64(len(e.head))+n > gatherBytesMax {
		e.iov = append(e.iov, segs...)
		e.open = false
		return
	}
	e.head = slices.Grow(e.head, max(0, headBytesKept-len(e.head))) // once
	from := e.begin()
	for _, s := range segs {
		e.head = append(e.head, s...)
	}
	e.end(from)
}

// reset forgets everything.
func (e *encoder) reset() {
	clear(e.iov) // the memory is only borrowed
	e.iov, e.head, e.keep, e.open = e.iov[:0], e.head[:0], nil, false
	if cap(e.head) > headBytesKept {
		e.head = nil
	}
	if cap(e.iov) > iovKept {
		e.iov = nil
	}
}

// writeTo writes what is collected, or what tryWriteTo has left of it.
func (e *encoder) writeTo(l *link) error { return l.writev(e.pending()) }

// tryWriteTo writes of it what l takes at once, and reports whether that is all.
func (e *encoder) tryWriteTo(l *link) (bool, error) { return l.tryWritev(e.pending()) }

// pending is what is not written yet, to be consumed by who writes.
func (e *encoder) pending() *net.Buffers {
	if e.keep == nil {
		e.keep = e.iov // a variable, which must not be allocated each time
	}
	return &e.keep
}

// append collects the reply to r.
func (e *encoder) append(r *request, m ReplyMode) {
	switch {
	case m < StructuredReplies:
		e.simple(r)
		if r.payload != nil {
			e.payload(r.payload.Segments(), r.n)
		}
	case r.errno != 0:
		e.failure(r, m)
	case r.payload != nil:
		e.data(r, m)
	case r.extents != nil:
		e.status(r, m)
	case m >= ExtendedHeaders || r.cmd == CmdRead:
		from := e.begin()
		e.chunk(r, m, chunkNone, true, 0)
		e.end(from)
	default:
		e.simple(r) // shorter than a chunk, and allowed
	}
}

func (e *encoder) simple(r *request) {
	from := e.begin()
	e.head = appendSimpleReply(e.head, r.errno, r.cookie)
	e.end(from)
}

// chunk appends the header of a chunk with n bytes behind it.
func (e *encoder) chunk(r *request, m ReplyMode, kind chunkType, last bool, n uint64) {
	k := chunk{kind: kind, cookie: r.cookie, off: r.off, n: n}
	if last {
		k.flags = chunkFlagDone
	}
	e.head = k.appendTo(e.head, m)
}

// failure collects the one chunk of an error.
func (e *encoder) failure(r *request, m ReplyMode) {
	from := e.begin()
	e.chunk(r, m, chunkError, true, uint64(4+2+len(r.why)))
	e.head = binary.BigEndian.AppendUint32(e.head, uint32(r.errno))
	e.head = binary.BigEndian.AppendUint16(e.head, uint16(len(r.why)))
	e.head = append(e.head, r.why...)
	e.end(from)
}

// status collects the one chunk of a block status.
func (e *encoder) status(r *request, m ReplyMode) {
	from := e.begin()
	be := binary.BigEndian
	if m >= ExtendedHeaders {
		e.chunk(r, m, chunkStatusExt, true, uint64(8+16*len(r.extents)))
		e.head = be.AppendUint32(e.head, contextID)
		e.head = be.AppendUint32(e.head, uint32(len(r.extents)))
		for _, x := range r.extents {
			e.head = be.AppendUint64(e.head, x.Length)
			e.head = be.AppendUint64(e.head, uint64(x.State))
		}
	} else {
		e.chunk(r, m, chunkStatus, true, uint64(4+8*len(r.extents)))
		e.head = be.AppendUint32(e.head, contextID)
		for _, x := range r.extents {
			e.head = be.AppendUint32(e.head, uint32(x.Length)) // not longer than the request
			e.head = be.AppendUint32(e.head, uint32(x.State))
		}
	}
	e.end(from)
}

// data collects the chunks of a READ: data, and holes of a block at least. All of
// it is here already, so nothing can go wrong behind the last of them.
func (e *encoder) data(r *request, m ReplyMode) {
	segs := r.payload.Segments()
	off := r.off
	for i := 0; i < len(segs); {
		next, n, hole := nextRun(r.payload, segs, i, r.flags&cmdFlagDF != 0)
		from := e.begin()
		if hole {
			e.chunk(r, m, chunkHole, next == len(segs), 8+4)
			e.head = binary.BigEndian.AppendUint64(e.head, off)
			e.head = binary.BigEndian.AppendUint32(e.head, uint32(n))
			e.end(from)
		} else {
			e.chunk(r, m, chunkData, next == len(segs), 8+n)
			e.head = binary.BigEndian.AppendUint64(e.head, off)
			e.end(from)
			e.payload(segs[i:next], n)
		}
		i, off = next, off+n
	}
}

// nextRun is the run of segments of p that begins at i and becomes one chunk: its
// end, its length in bytes, and whether it is a hole. With whole it is everything,
// and a hole only if everything is.
func nextRun(p Payload, segs [][]byte, i int, whole bool) (next int, n uint64, hole bool) {
	for next = i; next < len(segs); {
		zeroes, end := uint64(0), next
		for end < len(segs) && p.Zero(end) {
			zeroes += uint64(len(segs[end]))
			end++
		}
		isHole := zeroes >= blockPreferred && !whole || zeroes > 0 && next == 0 && end == len(segs)
		switch {
		case isHole && next == i:
			return end, zeroes, true
		case isHole:
			return next, n, false
		}
		// Too short for a chunk of its own: it goes with the data around it.
		n += zeroes
		if next = end; next < len(segs) {
			n += uint64(len(segs[next]))
			next++
		}
	}
	return next, n, false
}
