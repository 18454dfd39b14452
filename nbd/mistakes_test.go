package nbd

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// hangsUp is the answer to a client that cannot be understood any more.
const hangsUp = ^Errno(0)

// mistakes of clients in the transmission: what they send, and the answer. The export
// has 128 KiB, the largest payload 64 KiB.
var mistakes = []struct {
	name   string
	h      header
	extra  string // behind the header, of no announced length
	export string
	want   Errno
	modes  []ReplyMode // nil: all
}{
	{"unknown command", header{cmd: 0x1234, n: 4}, "", "", EINVAL, nil},
	{"command of an extension that is not there", header{cmd: 8, off: 1 << 20}, "", "", EINVAL, nil},
	{"READ past the end", header{cmd: CmdRead, off: 128<<10 - 1, n: 2}, "", "", EINVAL, nil},
	{"READ behind the end", header{cmd: CmdRead, off: 1 << 40, n: 1}, "", "", EINVAL, nil},
	{"READ where offset and length overflow", header{cmd: CmdRead, off: 1<<64 - 1, n: 2}, "", "", EINVAL, nil},
	{"READ longer than the largest payload", header{cmd: CmdRead, n: 64<<10 + 1}, "", "", EINVAL, nil},
	{"READ in one chunk longer than the largest payload", header{cmd: CmdRead, flags: cmdFlagDF, n: 64<<10 + 1}, "", "", EOVERFLOW, []ReplyMode{StructuredReplies, ExtendedHeaders}},
	{"READ of nothing", header{cmd: CmdRead}, "", "", 0, nil},
	{"READ of nothing behind the end", header{cmd: CmdRead, off: 128<<10 + 1}, "", "", EINVAL, nil},
	{"READ with a flag of another command", header{cmd: CmdRead, flags: cmdFlagNoHole, n: 4}, "", "", EINVAL, nil},
	{"READ with DF that was not negotiated", header{cmd: CmdRead, flags: cmdFlagDF, n: 4}, "", "", EINVAL, []ReplyMode{SimpleReplies}},
	{"READ with an unknown flag", header{cmd: CmdRead, flags: 1 << 15, n: 4}, "", "", EINVAL, nil},
	{"READ that is not aligned, which is allowed", header{cmd: CmdRead, off: 4095, n: 2}, "", "", 0, nil},
	{"WRITE past the end", header{cmd: CmdWrite, off: 128<<10 - 1, n: 2}, "", "", ENOSPC, nil},
	{"WRITE where offset and length overflow", header{cmd: CmdWrite, off: 1<<64 - 1, n: 2}, "", "", ENOSPC, nil},
	{"WRITE longer than the largest payload", header{cmd: CmdWrite, n: 64<<10 + 1}, "", "", EINVAL, []ReplyMode{SimpleReplies, StructuredReplies}},
	{"WRITE longer than the largest payload, extended", header{cmd: CmdWrite, n: 64<<10 + 1}, "", "", hangsUp, []ReplyMode{ExtendedHeaders}},
	{"WRITE of nothing", header{cmd: CmdWrite}, "", "", 0, nil},
	{"WRITE to a read-only export", header{cmd: CmdWrite, n: 4}, "", "ro", EPERM, nil},
	{"WRITE without the flag for its payload", header{cmd: CmdWrite, flags: cmdFlagFUA, n: 4}, "", "", EINVAL, []ReplyMode{ExtendedHeaders}},
	{"TRIM past the end", header{cmd: CmdTrim, n: 128<<10 + 1}, "", "", EINVAL, nil},
	{"TRIM of a read-only export", header{cmd: CmdTrim, n: 4}, "", "ro", EPERM, nil},
	{"TRIM of nothing", header{cmd: CmdTrim}, "", "", 0, nil},
	{"WRITE_ZEROES past the end", header{cmd: CmdWriteZeroes, n: 128<<10 + 1}, "", "", ENOSPC, nil},
	{"WRITE_ZEROES of a read-only export", header{cmd: CmdWriteZeroes, n: 4}, "", "ro", EPERM, nil},
	{"WRITE_ZEROES where offset and length overflow", header{cmd: CmdWriteZeroes, off: 1 << 63, n: 1<<32 - 1}, "", "", ENOSPC, nil},
	{"CACHE past the end", header{cmd: CmdCache, off: 128 << 10, n: 1}, "", "", EINVAL, nil},
	{"FLUSH with a range", header{cmd: CmdFlush, off: 1, n: 1}, "", "", EINVAL, nil},
	{"FLUSH with a length", header{cmd: CmdFlush, n: 4096}, "", "", EINVAL, nil},
	{"FLUSH with a payload", header{cmd: CmdFlush, flags: cmdFlagPayloadLen, n: 4}, "abcd", "", EINVAL, []ReplyMode{ExtendedHeaders}},
	{"FLUSH with a payload that nobody expects", header{cmd: CmdFlush}, strings.Repeat("payload", 8), "", hangsUp, nil},
	{"READ with a payload", header{cmd: CmdRead, flags: cmdFlagPayloadLen, n: 4}, "abcd", "", EINVAL, []ReplyMode{ExtendedHeaders}},
	{"the flag for a payload without extended headers", header{cmd: CmdRead, flags: cmdFlagPayloadLen, n: 4}, "", "", EINVAL, []ReplyMode{SimpleReplies, StructuredReplies}},
	{"BLOCK_STATUS without a context", header{cmd: CmdBlockStatus, n: 4}, "", "", EINVAL, []ReplyMode{SimpleReplies}},
	{"BLOCK_STATUS of nothing", header{cmd: CmdBlockStatus}, "", "", EINVAL, nil},
	{"BLOCK_STATUS past the end", header{cmd: CmdBlockStatus, off: 1, n: 128 << 10}, "", "", EINVAL, nil},
}

// putRequest sends a request of form m, and a WRITE's payload.
func (rc rawConn) putRequest(h header, m ReplyMode) {
	rc.t.Helper()
	if m < ExtendedHeaders {
		rc.put(h.appendTo(nil))
	} else {
		if h.cmd == CmdWrite && h.flags == 0 { // with other flags it goes without one
			h.flags |= cmdFlagPayloadLen
		}
		rc.put(h.appendExtended(nil))
	}
	if h.cmd == CmdWrite && (m < ExtendedHeaders || h.flags&cmdFlagPayloadLen != 0) {
		rc.Write(make([]byte, h.n)) // who is hung up on need not get it out
	}
}

// answer receives the reply to h, in one chunk at most, and returns its error.
func (rc rawConn) answer(h header, m ReplyMode) Errno {
	rc.t.Helper()
	be := binary.BigEndian
	b := rc.get(simpleReplySize)
	if e, cookie, ok := decodeSimpleReply(b); ok && m < ExtendedHeaders {
		if cookie != h.cookie || m > SimpleReplies && (e != 0 || h.cmd == CmdRead) {
			rc.t.Fatalf("reply %x to %+v", b, h)
		}
		if h.cmd == CmdRead && e == 0 {
			rc.get(int(h.n))
		}
		return e
	}
	if m == ExtendedHeaders {
		b = append(b, rc.get(chunkExtSize-simpleReplySize)...)
	} else {
		b = append(b, rc.get(chunkSize-simpleReplySize)...)
	}
	k, ok := decodeChunk(b, m)
	if !ok || k.cookie != h.cookie || k.flags != chunkFlagDone || m == ExtendedHeaders && k.off != h.off {
		rc.t.Fatalf("chunk %+v to %+v", k, h)
	}
	body := rc.get(int(k.n))
	if k.kind != chunkError {
		return 0
	}
	if len(body) < 7 || len(body) != 6+int(be.Uint16(body[4:])) {
		rc.t.Fatalf("error without a text: %x", body)
	}
	return Errno(be.Uint32(body))
}

// TestMistakes: each mistake has the answer that the document asks for, or the end of
// the connection where nothing can be understood any more. What is refused changes
// nothing, the connection goes on, and another client does not notice.
func TestMistakes(t *testing.T) {
	ro := newMemDisk(128 << 10)
	ro.readOnly = true
	rw := newMemDisk(128 << 10)
	busy := newMemDisk(1 << 20)
	s := serve(t, Options{PayloadBytesMax: 64 << 10, Exports: []Export{{Backend: rw}, {Name: "ro", Backend: ro}, {Name: "busy", Backend: busy}}})
	good := workingClient(t, s, "busy")
	for m := SimpleReplies; m <= ExtendedHeaders; m++ {
		for _, tc := range mistakes {
			if tc.modes != nil && !slices.Contains(tc.modes, m) {
				continue
			}
			t.Run(m.String()+"/"+tc.name, func(t *testing.T) {
				rc := s.rawMode(m, tc.export)
				rc.t = t
				h := tc.h
				h.cookie = 7
				rc.putRequest(h, m)
				if tc.want == hangsUp {
					// It may have hung up on the request already.
					if _, err := rc.Write([]byte(tc.extra)); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
						t.Error(err)
					}
					// What was right before may be answered, or not.
					if _, err := io.ReadAll(rc); errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("the server does not hang up")
					}
				} else {
					rc.put([]byte(tc.extra))
					if e := rc.answer(h, m); e != tc.want {
						t.Errorf("%v, want %v", e, tc.want)
					}
					again := header{cmd: CmdRead, cookie: 8, n: 4096}
					rc.putRequest(again, m)
					if e := rc.answer(again, m); e != 0 {
						t.Errorf("the next request: %v", e)
					}
				}
			})
		}
	}
	good()
	for name, d := range map[string]*memDisk{"rw": rw, "ro": ro} {
		if data, _ := d.contents(); !isZero(data) {
			t.Errorf("%s was changed", name)
		}
	}
}

// TestMistakesInTheHandshake: as TestMistakes, of options.
func TestMistakesInTheHandshake(t *testing.T) {
	s := serve(t, Options{Exports: []Export{{Name: "", Backend: newMemDisk(1 << 20)}}, HandshakeTimeout: time.Hour})
	good := workingClient(t, s, "")
	wrongMagic := appendOption(nil, optList, nil)
	wrongMagic[0]++
	for _, tc := range []struct {
		name string
		send []byte // behind the greeting
		want optReply
	}{
		{"client flags that are unknown", []byte{0, 0, 0, 7}, 0},
		{"magic of an option is wrong", append([]byte{0, 0, 0, 3}, wrongMagic...), 0},
		{"a request instead of an option", append([]byte{0, 0, 0, 3}, header{}.appendTo(nil)...), 0},
		{"an option of fixed newstyle without its flag", appendOption([]byte{0, 0, 0, 0}, optList, nil), 0},
		{"unknown option", appendOption([]byte{0, 0, 0, 3}, 99, []byte("what?")), repErrUnsup},
		{"option of an extension that was withdrawn", appendOption([]byte{0, 0, 0, 3}, 4, nil), repErrUnsup},
		{"option too long", appendOption([]byte{0, 0, 0, 3}, optInfo, make([]byte, optionBytesMax+1)), repErrTooBig},
		{"option absurdly long", binary.BigEndian.AppendUint32(appendOption([]byte{0, 0, 0, 3}, 99, nil)[:16], optionDiscardMax+1), 0},
		{"LIST with data", appendOption([]byte{0, 0, 0, 3}, optList, []byte{0}), repErrInvalid},
		{"STRUCTURED_REPLY with data", appendOption([]byte{0, 0, 0, 3}, optStructured, []byte{0}), repErrInvalid},
		{"EXTENDED_HEADERS with data", appendOption([]byte{0, 0, 0, 3}, optExtended, []byte{0}), repErrInvalid},
		{"metadata contexts without structured replies", appendOption([]byte{0, 0, 0, 3}, optSetMeta, appendMetaQuery(nil, "", contextAllocation)), repErrInvalid},
		{"export that does not exist", appendOption([]byte{0, 0, 0, 3}, optGo, appendInfoQuery(nil, "no")), repErrUnknown},
		{"export that does not exist, the old way", appendOption([]byte{0, 0, 0, 3}, optExportName, []byte("no")), 0},
		{"name longer than the option", appendOption([]byte{0, 0, 0, 3}, optGo, []byte{0, 0, 0, 9, 'x', 0, 0}), repErrInvalid},
		{"kinds of information that are not there", appendOption([]byte{0, 0, 0, 3}, optGo, []byte{0, 0, 0, 0, 0, 2, 0, 3}), repErrInvalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rc := rawDial(t, "unix", s.path)
			rc.get(18)
			rc.put(tc.send)
			if tc.want == 0 {
				rc.eof()
				return
			}
			r := rc.get(optReplySize)
			if got := optReply(binary.BigEndian.Uint32(r[12:])); got != tc.want {
				t.Errorf("%v, want %v", got, tc.want)
			}
			rc.get(int(binary.BigEndian.Uint32(r[16:])))
			rc.put(appendOption(nil, optGo, appendInfoQuery(nil, "")))
			if r = rc.get(optReplySize); optReply(binary.BigEndian.Uint32(r[12:])) != repInfo {
				t.Errorf("the next option: %x", r)
			}
		})
	}
	good()
}

// TestGarbageAfterGo: a client that sends garbage once it may send requests is hung
// up on, however much of it there is.
func TestGarbageAfterGo(t *testing.T) {
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(1 << 20)}}})
	good := workingClient(t, s, "")
	r := testRand(t)
	for range 50 {
		rc := s.rawMode(SimpleReplies, "")
		garbage := make([]byte, requestSize+r.IntN(200<<10))
		for i := range garbage {
			garbage[i] = byte(r.Uint32())
		}
		garbage[0] = 0 // no magic
		rc.Write(garbage)
		rc.eof()
	}
	good()
}

// TestDisconnectInEachMessage: a client may go away at any byte.
func TestDisconnectInEachMessage(t *testing.T) {
	r := testRand(t)
	for m := SimpleReplies; m <= ExtendedHeaders; m++ {
		stream := fluent(r, m)
		cut := 0
		for _, msg := range messagesOf(stream) {
			for _, n := range []int{1, len(msg.bytes) / 2, requestSize, len(msg.bytes) - 1, len(msg.bytes)} {
				converse(t, stream[:cut+min(n, len(msg.bytes))])
			}
			cut += len(msg.bytes)
		}
	}
}

// workingClient begins to read and write all of an export, and to compare. What it
// returns ends that, and fails the test if anything was not as it should be, or if
// nothing got done.
func workingClient(t *testing.T, s *testServer, export string) (end func()) {
	c := s.dial(export)
	r := testRand(t)
	stop := make(chan struct{})
	done := 0
	var group sync.WaitGroup
	group.Go(func() {
		p, q := make([]byte, 20_000), make([]byte, 20_000)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			off := r.Uint64N(c.Size() - uint64(len(p)))
			if err := errors.Join(c.WriteAt(t.Context(), p, off, false), c.ReadAt(t.Context(), q, off)); err != nil {
				t.Errorf("the other client: %v", err)
				return
			}
			if !slices.Equal(p, q) {
				t.Errorf("the other client reads something else than it wrote")
				return
			}
			done++
		}
	})
	return func() {
		t.Helper()
		close(stop)
		group.Wait()
		if done == 0 {
			t.Error("the other client got nothing done")
		}
	}
}

// TestBlockStatusNotTaken: answers to BLOCK_STATUS are long and cost a client
// nothing to ask for; those that are not taken count, and are bounded.
func TestBlockStatusNotTaken(t *testing.T) {
	const size, hogs = 2 * 2 * extentsMax * 4096, 4
	d := newMemDisk(size)
	for off := 0; off < size; off += 2 * 4096 {
		d.data[off] = 1
	}
	s := serve(t, Options{Exports: []Export{{Backend: d}}, RequestsMax: 16, ConnectionsMax: hogs + 1, PayloadBytesMax: 64 << 10, BytesMax: 512 << 10})
	for range hogs {
		rc := s.rawMode(StructuredReplies, "")
		go func() {
			for cookie := uint64(0); ; cookie++ {
				if _, err := rc.Write(header{cmd: CmdBlockStatus, cookie: cookie, n: size}.appendTo(nil)); err != nil {
					return // at the end of the test
				}
			}
		}()
	}
	eventually(t, "answers wait to be taken", func() bool { return s.Metrics().BytesInFlight > s.opts.BytesMax/2 })
	good := s.dial("")
	for range 20 {
		extents, err := good.BlockStatus(t.Context(), 0, size, false)
		if err != nil {
			t.Fatal(err)
		}
		if len(extents) != extentsMax || extents[0] != (Extent{4096, 0}) || extents[1] != (Extent{4096, StateHole | StateZero}) {
			t.Fatalf("%d extents, from %v on", len(extents), extents[:2])
		}
		if m := s.Metrics(); m.BytesInFlight > m.BytesMax {
			t.Fatalf("%d bytes in flight, limit %d", m.BytesInFlight, m.BytesMax)
		}
	}
}
