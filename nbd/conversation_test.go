package nbd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

// recorded are conversations, what the client sends of each: those of testdata/script,
// and those of other people's clients in testdata/recorded.
func recorded(t testing.TB) (streams [][]byte) {
	scripts, err := filepath.Glob("testdata/script/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range scripts {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var stream []byte
		for line := range strings.Lines(string(text)) {
			line, _, _ = strings.Cut(line, "#")
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "C" || words[1] == "EOF" {
				if len(words) > 0 && slices.Contains([]string{"hello", "go", "structured", "extended"}, words[0]) {
					stream = append(stream, opening(words[0], strings.Join(words[1:], ""))...)
				}
				continue
			}
			b, err := scriptBytes(words[1:])
			if err != nil {
				t.Fatal(err)
			}
			stream = append(stream, b...)
		}
		if len(stream) < 200<<10 {
			streams = append(streams, stream)
		}
	}
	strangers, err := filepath.Glob("testdata/recorded/*")
	if err != nil || len(strangers) == 0 {
		t.Fatalf("no recordings: %v", err)
	}
	for _, file := range strangers {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, b)
	}
	return streams
}

// A message is one of what a client sends, with the places of its numbers.
type message struct {
	bytes   []byte
	numbers [][2]int // offset, size
}

func (m message) isRequest() bool { return len(m.numbers) == 6 }

func (m message) clone() message { return message{bytes.Clone(m.bytes), m.numbers} }

// messagesOf cuts a stream into messages, taking every option for granted.
func messagesOf(stream []byte) (msgs []message) {
	take := func(n uint64, numbers ...[2]int) []byte {
		n = min(n, uint64(len(stream)))
		b := stream[:n:n]
		stream = stream[n:]
		if n > 0 {
			msgs = append(msgs, message{b, numbers})
		}
		return b
	}
	be := binary.BigEndian
	take(4, [2]int{0, 4})
	mode := SimpleReplies
	for len(stream) >= optionSize {
		opt, n := option(be.Uint32(stream[8:])), uint64(be.Uint32(stream[12:]))
		numbers := [][2]int{{0, 8}, {8, 4}, {12, 4}}
		for at := optionSize; at+4 <= optionSize+int(min(n, 64)); at += 4 {
			numbers = append(numbers, [2]int{at, 4})
		}
		take(optionSize+n, numbers...)
		switch opt {
		case optStructured:
			mode = StructuredReplies
		case optExtended:
			mode = ExtendedHeaders
		}
		if opt == optGo && len(stream) >= 8 && be.Uint64(stream) != magicOption || opt == optExportName {
			break
		}
	}
	size, lengthBytes := requestSize, 4
	if mode == ExtendedHeaders {
		size, lengthBytes = requestExtSize, 8
	}
	for len(stream) >= size {
		decode := decodeHeader
		if mode == ExtendedHeaders {
			decode = decodeExtended
		}
		h, _ := decode(stream)
		n := uint64(size)
		if mode == ExtendedHeaders && h.flags&cmdFlagPayloadLen != 0 || mode < ExtendedHeaders && h.cmd == CmdWrite {
			n += min(h.n, uint64(len(stream)))
		}
		take(n, [2]int{0, 4}, [2]int{4, 2}, [2]int{6, 2}, [2]int{8, 8}, [2]int{16, 8}, [2]int{24, lengthBytes})
	}
	take(uint64(len(stream)))
	return msgs
}

// mutate makes a conversation of messages of several others: mostly as they were,
// with some left out, repeated, moved, or changed in a number or a byte.
func mutate(r *rand.Rand, all [][]message) []byte {
	msgs := slices.Clone(all[r.IntN(len(all))])
	for range 1 + r.IntN(4) {
		i := r.IntN(len(msgs))
		// What is wrong in the handshake is often its end, so mostly go on behind it.
		if first := slices.IndexFunc(msgs, message.isRequest); first >= 0 && r.IntN(8) > 0 {
			i = first + r.IntN(len(msgs)-first)
		}
		switch r.IntN(9) {
		case 0:
			if len(msgs) > 1 {
				msgs = slices.Delete(msgs, i, i+1)
			}
		case 1:
			msgs = slices.Insert(msgs, i, msgs[r.IntN(len(msgs))])
		case 2:
			j := r.IntN(len(msgs))
			msgs[i], msgs[j] = msgs[j], msgs[i]
		case 3: // of another conversation
			other := all[r.IntN(len(all))]
			from := r.IntN(len(other))
			msgs = slices.Insert(msgs, i, other[from:min(len(other), from+1+r.IntN(3))]...)
		case 4:
			m := msgs[i].clone()
			if len(m.bytes) > 0 {
				m.bytes[r.IntN(len(m.bytes))] ^= 1 << r.IntN(8)
			}
			msgs[i] = m
		case 5: // too short or too long for what it says
			m := msgs[i].clone()
			m.bytes = m.bytes[:r.IntN(len(m.bytes)+1)]
			if r.IntN(2) == 0 {
				m.bytes = append(m.bytes, make([]byte, r.IntN(100))...)
			}
			msgs[i] = m
		default:
			m := msgs[i].clone()
			if len(m.numbers) == 0 {
				continue
			}
			number := m.numbers[r.IntN(len(m.numbers))]
			if number[0]+number[1] > len(m.bytes) {
				continue
			}
			var v uint64
			switch r.IntN(4) {
			case 0:
				v = r.Uint64N(20)
			case 1:
				v = uint64(1)<<r.IntN(64) + r.Uint64N(3) - 1
			case 2:
				v = 128<<10 + r.Uint64N(3) - 1
			case 3:
				v = r.Uint64N(128 << 10)
			}
			var b [8]byte
			binary.BigEndian.PutUint64(b[:], v)
			copy(m.bytes[number[0]:], b[8-number[1]:])
			msgs[i] = m
		}
	}
	var stream []byte
	for _, m := range msgs {
		stream = append(stream, m.bytes...)
	}
	if r.IntN(8) == 0 {
		stream = stream[:r.IntN(len(stream)+1)]
	}
	return stream
}

// fluent is a conversation of a client that makes no mistakes, in messages of form m.
func fluent(r *rand.Rand, m ReplyMode) []byte {
	stream := opening(map[ReplyMode]string{SimpleReplies: "go", StructuredReplies: "structured", ExtendedHeaders: "extended"}[m], "")
	for cookie := range uint64(40) {
		h := header{cookie: cookie, off: r.Uint64N(128 << 10)}
		h.n = min(1+r.Uint64N(1<<(1+r.IntN(15))), 128<<10-h.off)
		var payload []byte
		switch r.IntN(10) {
		case 0, 1:
			h.cmd = CmdWrite
			payload = pattern(int(h.n), byte(cookie))
			if m == ExtendedHeaders {
				h.flags = cmdFlagPayloadLen
			}
		case 2:
			h.cmd, h.flags = CmdWriteZeroes, cmdFlagNoHole*uint16(r.IntN(2))
		case 3:
			h.cmd = CmdTrim
		case 4:
			h.cmd, h.off, h.n = CmdFlush, 0, 0
		case 5:
			h.cmd = CmdCache
		case 6, 7:
			if m > SimpleReplies {
				h.cmd, h.flags = CmdBlockStatus, cmdFlagReqOne*uint16(r.IntN(2))
			}
		default:
			if m > SimpleReplies {
				h.flags = cmdFlagDF * uint16(r.IntN(2))
			}
		}
		if m == ExtendedHeaders {
			stream = h.appendExtended(stream)
		} else {
			stream = h.appendTo(stream)
		}
		stream = append(stream, payload...)
	}
	end := header{cmd: CmdDisc}
	if m == ExtendedHeaders {
		return end.appendExtended(stream)
	}
	return end.appendTo(stream)
}

// TestMutatedConversations: no crash, no hang, no leak and no wrong data, whatever
// becomes of conversations that were right. A CNBD_TEST_SCALE of 1000 takes about
// 30 minutes.
func TestMutatedConversations(t *testing.T) {
	r := testRand(t)
	var all [][]message
	streams := recorded(t)
	for range len(streams) / 3 { // as many again
		for m := SimpleReplies; m <= ExtendedHeaders; m++ {
			stream := fluent(r, m)
			converse(t, stream)
			streams = append(streams, stream)
		}
	}
	for _, stream := range streams {
		if msgs := messagesOf(stream); len(msgs) > 0 {
			all = append(all, msgs)
		}
	}
	before := runtime.NumGoroutine()
	for i := range 1000 * disktest.Scale(t) {
		stream := mutate(r, all)
		overdue := time.AfterFunc(30*time.Second, func() {
			panic(fmt.Sprintf("conversation %d hangs: %x", i, stream))
		})
		converse(t, stream)
		overdue.Stop()
		if t.Failed() {
			t.Fatalf("conversation %d: %x", i, stream)
		}
	}
	noLeaks(t, before)
}

// converse lets a server have a conversation, of a client that sends stream and
// closes: it ends, gives everything back, and says nothing but what it should.
func converse(t *testing.T, stream []byte) {
	d := newMemDisk(128 << 10)
	copy(d.data[32<<10:], pattern(32<<10, 1)) // between holes
	was, _ := d.contents()
	s, err := NewServer(Options{Exports: []Export{{Backend: d}}, PayloadBytesMax: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	nc := new(streamConn)
	nc.in.Reset(stream)
	defer s.Close()
	err = newConn(s, nc).serve()
	d.idle(t)
	if n := s.Metrics().RequestsInFlight; n != 0 {
		t.Errorf("%d requests in flight at the end", n)
	}
	is, _ := d.contents()
	(&judge{t: t, in: stream, out: nc.out.Bytes(), was: was, payloadMax: 64 << 10}).judge(is, err == nil)
}

// A judge knows what a server may say (out) to a client that says in.
type judge struct {
	t          *testing.T
	in, out    []byte
	was        []byte // contents of the export at the beginning
	payloadMax uint64

	mode    ReplyMode
	context bool
	asked   map[uint64]*question
	writes  []*question // and trims
}

type question struct {
	header
	payload []byte
	status  bool   // a block status that may be answered
	covered uint64 // bytes of a READ
	content int    // chunks of data or holes, or lists of extents
	failed  bool
}

// take takes the next n bytes of b, or those that are left.
func take(b *[]byte, n uint64) []byte {
	p := (*b)[:min(n, uint64(len(*b)))]
	*b = (*b)[len(p):]
	return p
}

// judge fails the test if out is wrong; polite tells that the connection ended in
// good order, and is is the contents at the end.
func (j *judge) judge(is []byte, polite bool) {
	t := j.t
	if !bytes.Equal(take(&j.out, 18), greeting(3)) {
		t.Fatal("greeting")
	}
	if !j.handshake() {
		if !bytes.Equal(is, j.was) {
			t.Fatal("the export was changed in the handshake")
		}
		return
	}
	if !j.questions() {
		return // which request an answer is for cannot be told
	}
	for len(j.out) > 0 {
		j.answer()
	}
	if polite && len(j.asked) > 0 {
		t.Fatalf("without an answer: %v", slices.Collect(maps.Keys(j.asked)))
	}
	j.data("the export at the end", 0, is)
}

// handshake judges the options; it reports whether there is a transmission.
func (j *judge) handshake() bool {
	t, be := j.t, binary.BigEndian
	j.mode = SimpleReplies
	zeroes := uint64(reservedZeroes)
	flags := take(&j.in, 4)
	if len(flags) < 4 {
		return false
	}
	if flags[3]&flagNoZeroes != 0 {
		zeroes = 0
	}
	for {
		o := take(&j.in, optionSize)
		if len(o) < optionSize || len(j.out) == 0 {
			if len(j.out) != 0 {
				t.Fatalf("said to nothing: %x", j.out)
			}
			return false
		}
		opt := option(be.Uint32(o[8:]))
		take(&j.in, uint64(be.Uint32(o[12:])))
		if opt == optExportName {
			if got := take(&j.out, 10+zeroes); uint64(len(got)) != 10+zeroes {
				t.Fatalf("reply to EXPORT_NAME of %d bytes", len(got))
			}
			return true
		}
		if opt == optSetMeta {
			j.context = false
		}
		found := false
		for final := false; !final; {
			r := take(&j.out, optReplySize)
			if len(r) < optReplySize || be.Uint64(r) != magicOptReply || option(be.Uint32(r[8:])) != opt {
				t.Fatalf("reply %x to option %d", r, opt)
			}
			kind, n := optReply(be.Uint32(r[12:])), uint64(be.Uint32(r[16:]))
			if got := take(&j.out, n); uint64(len(got)) != n {
				t.Fatalf("reply to option %d is cut off", opt)
			}
			found = found || kind == repMeta
			final = kind == repAck || kind&repErr != 0
			if kind == repAck {
				switch opt {
				case optStructured:
					j.mode = StructuredReplies
				case optExtended:
					j.mode = ExtendedHeaders
				case optSetMeta:
					j.context = found
				case optGo:
					return true
				}
			}
		}
	}
}

// questions collects the requests; false: two have the same cookie.
func (j *judge) questions() bool {
	j.asked = map[uint64]*question{}
	for {
		var h header
		ok := false
		if j.mode == ExtendedHeaders {
			if len(j.in) < requestExtSize {
				return true
			}
			h, ok = decodeExtended(take(&j.in, requestExtSize))
		} else {
			if len(j.in) < requestSize {
				return true
			}
			h, ok = decodeHeader(take(&j.in, requestSize))
		}
		if !ok || h.cmd == CmdDisc {
			return true
		}
		q := &question{header: h}
		payload := uint64(0)
		if j.mode == ExtendedHeaders {
			if h.flags&cmdFlagPayloadLen != 0 {
				if payload = h.n; payload > j.payloadMax {
					return true
				}
			}
		} else if h.cmd == CmdWrite {
			if payload = h.n; payload > writeHangUpBytes {
				return true
			}
		}
		q.payload = take(&j.in, payload)
		if uint64(len(q.payload)) < payload {
			// Not arrived, so not asked: an answer would be wrong, and a change
			// of the export too.
			return true
		}
		q.status = h.cmd == CmdBlockStatus && j.context
		if q.status && payload == contextQuerySize {
			q.n = binary.BigEndian.Uint64(q.payload)
		}
		if _, twice := j.asked[h.cookie]; twice {
			return false
		}
		j.asked[h.cookie] = q
		switch h.cmd {
		case CmdWrite, CmdTrim, CmdWriteZeroes:
			j.writes = append(j.writes, q)
		}
	}
}

// answer judges the next message of the server.
func (j *judge) answer() {
	t, be := j.t, binary.BigEndian
	find := func(cookie uint64, what []byte) *question {
		q := j.asked[cookie]
		if q == nil {
			t.Fatalf("%x is an answer to no request", what)
		}
		return q
	}
	known := func(e Errno) {
		if _, ok := errnoNames[e]; !ok {
			t.Fatalf("error number %d", e)
		}
	}
	if len(j.out) >= 4 && be.Uint32(j.out) == magicSimple {
		r := take(&j.out, simpleReplySize)
		if len(r) < simpleReplySize {
			t.Fatalf("half a reply: %x", r)
		}
		e, cookie, _ := decodeSimpleReply(r)
		q := find(cookie, r)
		delete(j.asked, cookie)
		if j.mode >= ExtendedHeaders || j.mode >= StructuredReplies && (q.cmd == CmdRead || q.cmd == CmdBlockStatus || e != 0) {
			t.Fatalf("simple reply %x to %+v", r, q.header)
		}
		if e != 0 {
			known(e)
		} else if q.cmd == CmdRead {
			got := take(&j.out, q.n)
			if uint64(len(got)) != q.n {
				t.Fatalf("data of %d bytes instead of %d", len(got), q.n)
			}
			j.data("data", q.off, got)
		}
		return
	}
	size := chunkSize
	if j.mode >= ExtendedHeaders {
		size = chunkExtSize
	}
	r := take(&j.out, uint64(size))
	if len(r) < size || j.mode < StructuredReplies {
		t.Fatalf("half a reply, or none: %x", r)
	}
	k, ok := decodeChunk(r, j.mode)
	if !ok {
		t.Fatalf("wrong magic: %x", r)
	}
	q := find(k.cookie, r)
	if j.mode >= ExtendedHeaders && k.off != q.off {
		t.Fatalf("offset %d of a chunk for %+v", k.off, q.header)
	}
	body := take(&j.out, k.n)
	if uint64(len(body)) != k.n {
		t.Fatalf("chunk is cut off")
	}
	bad := func() { t.Fatalf("chunk %+v, %.64x for %+v", k, body, q.header) }
	done := k.flags&chunkFlagDone != 0
	switch {
	case k.kind == chunkNone:
		if k.n != 0 || !done {
			bad()
		}
	case k.kind == chunkError:
		if len(body) < 6 || len(body) != 6+int(be.Uint16(body[4:])) {
			bad()
		}
		known(Errno(be.Uint32(body)))
		q.failed = true
	case k.kind == chunkData && q.cmd == CmdRead && len(body) > 8:
		j.part(q, be.Uint64(body), uint64(len(body)-8), bad)
		j.data("data", be.Uint64(body), body[8:])
	case k.kind == chunkHole && q.cmd == CmdRead && len(body) == 12:
		n := uint64(be.Uint32(body[8:]))
		j.part(q, be.Uint64(body), n, bad)
		j.data("hole", be.Uint64(body), make([]byte, n))
	case q.status && (k.kind == chunkStatusExt) == (j.mode >= ExtendedHeaders) && (k.kind == chunkStatusExt || k.kind == chunkStatus):
		head, each := 4, 8
		if k.kind == chunkStatusExt {
			head, each = 8, 16
		}
		if len(body) < head+each || (len(body)-head)%each != 0 || be.Uint32(body) != contextID {
			bad()
		}
		count := (len(body) - head) / each
		if q.content++; q.content > 1 || q.flags&cmdFlagReqOne != 0 && count != 1 || head == 8 && int(be.Uint32(body[4:])) != count {
			bad()
		}
		off := q.off
		for x := body[head:]; len(x) > 0; x = x[each:] {
			n, state := uint64(be.Uint32(x)), BlockState(be.Uint32(x[4:]))
			if each == 16 {
				n, state = be.Uint64(x), BlockState(be.Uint64(x[8:]))
			}
			if n == 0 || n > q.n-(off-q.off) {
				bad()
			}
			if state == StateHole|StateZero {
				j.data("hole", off, make([]byte, n))
			} else if state != 0 {
				bad()
			}
			off += n
		}
	default:
		bad()
	}
	if done {
		delete(j.asked, k.cookie)
		if !q.failed && (q.cmd == CmdRead && q.covered != q.n || q.status && q.content == 0) {
			t.Fatalf("success with %d bytes, %d chunks for %+v", q.covered, q.content, q.header)
		}
	}
}

// part judges a chunk of n bytes at off of the READ q.
func (j *judge) part(q *question, off, n uint64, bad func()) {
	// The server sends them in order.
	if n == 0 || off != q.off+q.covered || n > q.n-q.covered {
		bad()
	}
	q.covered += n
	if q.content++; q.content > 1 && q.flags&cmdFlagDF != 0 {
		bad()
	}
}

// data judges bytes at off of the export: each is what it was at the beginning, or
// what some request may have made of it.
func (j *judge) data(what string, off uint64, p []byte) {
	if off > uint64(len(j.was)) || uint64(len(p)) > uint64(len(j.was))-off {
		j.t.Fatalf("%s: %d bytes at %d, beyond the end", what, len(p), off)
	}
	if bytes.Equal(p, j.was[off:][:len(p)]) {
		return
	}
	for i, b := range p {
		at := off + uint64(i)
		if b == j.was[at] || slices.ContainsFunc(j.writes, func(q *question) bool {
			if at < q.off || at-q.off >= q.n {
				return false
			}
			if q.cmd == CmdWrite {
				return at-q.off < uint64(len(q.payload)) && q.payload[at-q.off] == b
			}
			return b == 0
		}) {
			continue
		}
		j.t.Fatalf("%s: byte %d is %#x, which nobody has written", what, at, b)
	}
}
