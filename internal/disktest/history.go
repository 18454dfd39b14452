package disktest

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
)

// A Verb is what a client asks for.
type Verb uint8

const (
	VerbRead Verb = iota
	VerbWrite
	VerbZeroes
	VerbTrim
	VerbFlush
)

func (v Verb) String() string {
	return [...]string{"read", "write", "zeroes", "trim", "flush"}[v]
}

// A Content is the kind of bytes that a write carries.
type Content uint8

const (
	// Described bytes tell the request and the place that they were written by.
	Described Content = iota
	// Text compresses two to four times.
	Text
	// Noise does not compress.
	Noise
	// Zeros are zeros.
	Zeros
	// Constant is one byte, not zero, over and over.
	Constant
	// Mixed is something else in each block.
	Mixed

	contents = iota
)

// A Request is one request of a client. It is a value; its payload is made on
// demand and always the same.
type Request struct {
	Seq     uint64 // number in its history, from 0
	Verb    Verb
	Off     int64 // in bytes
	Len     int64
	FUA     bool // of a write, zeroes or trim
	NoHole  bool // of zeroes
	Content Content
	seed    uint64
}

func (r Request) String() string {
	s := fmt.Sprintf("#%d %s", r.Seq, r.Verb)
	if r.Verb != VerbFlush {
		s += fmt.Sprintf(" [%d,%d)", r.Off, r.Off+r.Len)
	}
	if r.FUA {
		s += " fua"
	}
	return s
}

// Payload appends the bytes of a write to dst.
func (r Request) Payload(dst []byte) []byte {
	n := len(dst)
	dst = slices.Grow(dst, int(r.Len))[:n+int(r.Len)]
	if r.Content != Mixed {
		fill(dst[n:], r.Content, r.Off, r.Seq, r.seed)
		return dst
	}
	p := dst[n:]
	pieces(r.Off, r.Len, func(i int64, lo, hi int) {
		seed := mix(r.seed, uint64(i))
		fill(p[:hi-lo], Content(seed%uint64(Mixed)), i*pageSize+int64(lo), r.Seq, seed)
		p = p[hi-lo:]
	})
	return dst
}

// A cell of described bytes is at a multiple of cellSize: the request's number
// under a mark, and the cell's place.
const (
	cellSize = 16
	cellMark = 0xc0de << 48
)

// Describe tells by which request p was written, when it holds described bytes
// from the device's offset off on.
func Describe(p []byte, off int64) string {
	zero := true
	for _, b := range p {
		zero = zero && b == 0
	}
	if zero {
		return "zeros"
	}
	if skip := int(-off & (cellSize - 1)); len(p) >= skip+cellSize {
		p = p[skip:]
		seq, at := binary.BigEndian.Uint64(p), int64(binary.BigEndian.Uint64(p[8:]))
		if seq&cellMark == cellMark && seq>>48 == cellMark>>48 {
			if at == off+int64(skip) {
				return fmt.Sprintf("written by #%d", seq&^cellMark)
			}
			return fmt.Sprintf("written by #%d at %d", seq&^cellMark, at)
		}
	}
	return "not described"
}

// fill makes the bytes of one content for the place off.
func fill(p []byte, c Content, off int64, seq, seed uint64) {
	switch c {
	case Described:
		var cell [cellSize]byte
		binary.BigEndian.PutUint64(cell[:], cellMark|seq)
		for len(p) > 0 {
			start := off &^ (cellSize - 1)
			binary.BigEndian.PutUint64(cell[8:], uint64(start))
			n := copy(p, cell[off-start:])
			p, off = p[n:], off+int64(n)
		}
	case Text:
		for at := seed % textSize; len(p) > 0; at = 0 {
			n := copy(p, text()[at:])
			p = p[n:]
		}
	case Noise:
		var key [32]byte
		binary.LittleEndian.PutUint64(key[:], seed)
		rand.NewChaCha8(key).Read(p)
	case Zeros:
		clear(p)
	case Constant:
		if len(p) > 0 {
			p[0] = byte(seed%255) + 1
		}
		for n := 1; n < len(p); n *= 2 {
			copy(p[n:], p[:n])
		}
	}
}

// text is what texts are parts of: made once, for it takes longer than to store it.
var text = sync.OnceValue(func() []byte {
	rng := rand.New(rand.NewPCG(0, 2))
	b := make([]byte, 0, textSize+16)
	for len(b) < textSize {
		// Small numbers are likelier, as common words are.
		b = append(b, words[min(rng.IntN(len(words)), rng.IntN(len(words)))]...)
	}
	return b[:textSize]
})

const textSize = 1 << 20

var words = []string{
	"the ", "of ", "and ", "to ", "in ", "a ", "is ", "that ", "for ", "it ", "was ", "on ", "with ", "be ",
	"return ", "error ", "nil\n", "{\n", "}\n", "\t", "\t\t", "if ", "func ", "block ", "extent ", "segment ",
	"2024-05-17T10:", "INFO ", "WARN ", "request ", "id=", "0x7f", "server ", "client ", "journal ", "checkpoint ",
	"select ", "from ", "where ", "insert into ", "values (", "), (", "0000", "1234", "98.6", "user", "name=", ";\n",
}

// HistoryOptions parametrise a History.
type HistoryOptions struct {
	// Size is the size of the device in bytes.
	Size int64
	// RequestMax is the largest request in bytes; 0 is 128 KiB. TRIM and
	// WRITE_ZEROES now and then go far beyond it.
	RequestMax int64
	// UsualMax bounds all requests but one in 32, for histories of many cheap
	// requests; 0 is RequestMax.
	UsualMax int64
	// Align is the unit of offsets and lengths in bytes; 0 is 1. Whatever it
	// is, most requests are aligned to blocks or to sectors.
	Align int64
}

// A History is an endless sequence of requests, the same for the same seed and
// options: mostly writes, many to a few hot spots, some in sequence, of sizes
// from the smallest to the largest. It is not safe for concurrent use.
type History struct {
	opts HistoryOptions
	rng  *rand.Rand
	hot  []int64
	next uint64
	tail int64 // end of the last write: where a sequential one begins
}

// NewHistory panics if the device is smaller than the alignment.
func NewHistory(seed uint64, o HistoryOptions) *History {
	if o.RequestMax == 0 {
		o.RequestMax = 128 << 10
	}
	if o.UsualMax == 0 {
		o.UsualMax = o.RequestMax
	}
	if o.Align == 0 {
		o.Align = 1
	}
	if o.Size < o.Align {
		panic("disktest: history of a device that is too small")
	}
	h := &History{opts: o, rng: rand.New(rand.NewPCG(seed, 3))}
	for range 4 {
		h.hot = append(h.hot, h.rng.Int64N(o.Size))
	}
	return h
}

// Next is the next request.
func (h *History) Next() Request {
	r := Request{Seq: h.next, seed: h.rng.Uint64()}
	h.next++
	switch p := h.rng.IntN(100); {
	case p < 60:
		r.Verb = VerbWrite
		r.Content = Content(h.rng.IntN(contents))
	case p < 80:
		r.Verb = VerbRead
	case p < 87:
		r.Verb = VerbTrim
	case p < 94:
		r.Verb = VerbZeroes
		r.NoHole = h.rng.IntN(3) == 0
	default:
		r.Verb = VerbFlush
		return r
	}
	if r.Verb != VerbRead {
		r.FUA = h.rng.IntN(12) == 0
	}
	r.Off, r.Len = h.place(r.Verb == VerbTrim || r.Verb == VerbZeroes)
	if r.Verb == VerbWrite {
		h.tail = r.Off + r.Len
	}
	return r
}

// place chooses where; large allows more than RequestMax.
func (h *History) place(large bool) (off, n int64) {
	rng, size := h.rng, h.opts.Size
	unit := h.opts.Align
	switch rng.IntN(10) {
	case 0, 1:
	case 2, 3:
		unit = max(unit, 512)
	default:
		unit = max(unit, pageSize)
	}
	if unit > size {
		unit = h.opts.Align
	}
	units := size / unit
	lengthMax := max(1, min(h.opts.RequestMax, size)/unit)
	if large && rng.IntN(20) == 0 {
		lengthMax = units
	} else if h.opts.UsualMax < h.opts.RequestMax && rng.IntN(32) > 0 {
		lengthMax = max(1, min(h.opts.UsualMax, size)/unit)
	}
	// As many requests of one order of magnitude as of the next.
	n = 1 + rng.Int64N(int64(1)<<rng.IntN(bits.Len64(uint64(lengthMax))))
	n = min(n, lengthMax)
	if rng.IntN(20) == 0 {
		n = lengthMax
	}

	switch at := rng.IntN(10); {
	case at < 2:
		off = h.tail / unit
	case at < 7: // near a hot spot
		off = h.hot[rng.IntN(len(h.hot))]/unit + rng.Int64N(min(units, 16*max(1, pageSize/unit)))
	default:
		off = rng.Int64N(units)
	}
	if off+n > units {
		off = units - n // the end of the device is a place of interest
	}
	return off * unit, n * unit
}
