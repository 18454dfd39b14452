package nbd

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// holedPage is a payload some of whose segments are holes.
type holedPage struct {
	nullPage
	holes []bool
}

func (p *holedPage) Zero(i int) bool { return p.holes[i] }

// randomReply is a request of cmd that has been executed; size is that of a READ.
func randomReply(rng *rand.Rand, size int) *request {
	r := &request{header: header{cookie: rng.Uint64(), off: rng.Uint64N(1 << 40)}}
	switch rng.IntN(10) {
	case 0:
		r.cmd = CmdWrite
	case 1:
		r.cmd = CmdRead
		r.refuse(EIO, "damaged")
	case 2:
		r.cmd, r.extents = CmdBlockStatus, []Extent{{4096, 0}, {8192, 3}}
	default:
		r.cmd, r.n = CmdRead, uint64(size)
		p := new(holedPage)
		for n := size; n > 0; {
			seg := make([]byte, min(n, 1+rng.IntN(4096)))
			hole := rng.IntN(8) == 0
			if !hole {
				for i := 0; i+8 <= len(seg); i += 8 {
					binary.NativeEndian.PutUint64(seg[i:], rng.Uint64())
				}
			}
			p.segs, p.holes = append(p.segs, seg), append(p.holes, hole)
			n -= len(seg)
		}
		r.payload = p
	}
	return r
}

// Replies that are sent together are the bytes of each of them, whatever of them is
// copied; long data is not, and the memory for what is stays within bounds.
func TestRepliesTogether(t *testing.T) {
	rng := testRand(t)
	var together encoder
	for round := range 100 {
		m := ReplyMode(rng.IntN(int(ExtendedHeaders) + 1))
		long := rng.IntN(2) * rng.IntN(3*gatherMax)
		var want []byte
		var far [][]byte // data that is not to be copied
		together.gather = true
		for range 2 + rng.IntN(40) {
			r := randomReply(rng, 1+rng.IntN(max(long, gatherMax)))
			together.append(r, m)
			var alone encoder
			alone.append(r, m)
			want = append(want, bytes.Join(alone.iov, nil)...)
			if r.payload != nil && r.n > gatherMax && m < StructuredReplies {
				far = append(far, r.payload.Segments()...)
			}
		}
		if got := bytes.Join(together.iov, nil); !bytes.Equal(got, want) {
			t.Fatalf("round %d, %v: %d bytes together are not the %d of each", round, m, len(got), len(want))
		}
		for i, b := range together.iov {
			if len(b) == 0 {
				t.Fatalf("round %d: piece %d of %d is empty", round, i, len(together.iov))
			}
			if len(far) > 0 && &b[0] == &far[0][0] {
				far = far[1:]
			}
		}
		if len(far) > 0 {
			t.Fatalf("round %d: %d long segments are copied", round, len(far))
		}
		together.reset()
		if n := cap(together.head); n > headBytesKept {
			t.Fatalf("round %d: %d bytes are kept", round, n)
		}
	}
}

// As many short replies as the reader keeps back are a few pieces.
func TestShortRepliesAreOnePiece(t *testing.T) {
	for m := SimpleReplies; m <= ExtendedHeaders; m++ {
		e := encoder{gather: true}
		for range sendRepliesSoon {
			p := newNullDisk(gatherMax).page
			e.append(&request{header: header{cmd: CmdRead, n: gatherMax}, payload: &p}, m)
		}
		if len(e.iov) != 1 {
			t.Errorf("%v: %d pieces", m, len(e.iov))
		}
	}
}
