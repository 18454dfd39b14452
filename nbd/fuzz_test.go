package nbd

import (
	"bytes"
	"encoding/binary"
	"net"
	"slices"
	"testing"
	"time"
)

// FuzzHeader: every header that is decoded is encoded to the same bytes, and
// only the magic number decides.
func FuzzHeader(f *testing.F) {
	f.Add(header{flags: cmdFlagFUA, cmd: CmdWrite, cookie: 1, off: 1 << 40, n: 4096}.appendTo(nil))
	f.Add(make([]byte, requestSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < requestSize {
			return
		}
		b = b[:requestSize]
		h, ok := decodeHeader(b)
		if got := h.appendTo(nil); ok != bytes.Equal(got, b) {
			t.Errorf("%x decodes (%v) to %+v, which is %x", b, ok, h, got)
		}
	})
}

// FuzzInfoQuery: a query that is accepted is the one that its parts encode to,
// but for the kinds, which may be repeated, unordered and unknown.
func FuzzInfoQuery(f *testing.F) {
	f.Add(appendInfoQuery(nil, "export", infoName, infoBlockSize))
	f.Add(appendInfoQuery(nil, ""))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		q, ok := decodeInfoQuery(b)
		if !ok {
			return
		}
		if len(q.export) > stringBytesMax || len(b) < 6+len(q.export) || len(b)%2 != len(q.export)%2 {
			t.Errorf("%x accepted with a name of %d bytes", b, len(q.export))
		}
		if !bytes.HasPrefix(b, appendInfoQuery(nil, q.export)[:4+len(q.export)]) {
			t.Errorf("%x accepted as %+v", b, q)
		}
	})
}

func FuzzURI(f *testing.F) {
	f.Add("nbd://host:1/export")
	f.Add("nbd+unix:///a%20b?socket=/run/x+y")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		if again, err := ParseURI(u.String()); err != nil || again != u {
			t.Errorf("%q is %+v, prints as %q, which is %+v, %v", s, u, u.String(), again, err)
		}
	})
}

// A streamConn is the server's side of a connection whose client sends all it
// has at once, closes, and records what it gets.
type streamConn struct {
	in  bytes.Reader
	out bytes.Buffer // of one writer at a time, as the server guarantees
}

func (c *streamConn) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *streamConn) Write(p []byte) (int, error)      { return c.out.Write(p) }
func (c *streamConn) Close() error                     { return nil }
func (c *streamConn) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (c *streamConn) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (c *streamConn) SetDeadline(time.Time) error      { return nil }
func (c *streamConn) SetReadDeadline(time.Time) error  { return nil }
func (c *streamConn) SetWriteDeadline(time.Time) error { return nil }

// FuzzConnection feeds a whole connection, handshake and requests. Whatever
// comes, the server ends, gives all memory back, and says nothing that is not
// the protocol's; if the requests end with DISC, each has exactly one answer.
func FuzzConnection(f *testing.F) {
	hello := []byte{0, 0, 0, 3}
	begin := appendOption(hello, optExportName, nil)
	add := func(parts ...[]byte) { f.Add(slices.Concat(parts...)) }
	add(hello, appendOption(nil, optList, nil), appendOption(nil, optAbort, nil))
	add(hello, appendOption(nil, optInfo, appendInfoQuery(nil, "", infoName, infoDescription, infoBlockSize)),
		appendOption(nil, optGo, appendInfoQuery(nil, "")), header{cmd: CmdFlush}.appendTo(nil))
	add(begin, header{cmd: CmdWrite, off: 100, n: 5}.appendTo(nil), []byte("hello"),
		header{cmd: CmdRead, cookie: 1, off: 98, n: 9}.appendTo(nil), header{cmd: CmdDisc}.appendTo(nil))
	add(begin, header{cmd: CmdWrite, off: 1 << 60, n: 5}.appendTo(nil), []byte("hello"),
		header{cmd: CmdTrim, off: 10, n: 10}.appendTo(nil), header{cmd: 9}.appendTo(nil),
		header{cmd: CmdWriteZeroes, flags: cmdFlagNoHole, n: 64 << 10}.appendTo(nil),
		header{cmd: CmdRead, n: 1 << 31}.appendTo(nil), header{cmd: CmdDisc}.appendTo(nil))
	add(begin, header{cmd: CmdWrite, n: 1 << 31}.appendTo(nil))
	add([]byte{0, 0, 0, 0}, appendOption(nil, optList, nil))
	add(hello, appendOption(nil, 77, make([]byte, 1000)), appendOption(nil, optGo, []byte("no query")))

	f.Fuzz(func(t *testing.T, stream []byte) {
		d := newMemDisk(128 << 10)
		s, err := NewServer(Options{Exports: []Export{{Backend: d}}, PayloadBytesMax: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		nc := new(streamConn)
		nc.in.Reset(stream)
		err = newConn(s, nc).serve()
		d.idle(t)
		if n := s.Metrics().RequestsInFlight; n != 0 {
			t.Errorf("%d requests in flight at the end", n)
		}
		checkConversation(t, stream, nc.out.Bytes(), err == nil)
	})
}

// checkConversation checks what the server said (out) to a client that said in;
// polite tells that the connection ended in good order.
func checkConversation(t *testing.T, in, out []byte, polite bool) {
	take := func(b *[]byte, n int) []byte {
		if len(*b) < n {
			n = len(*b)
		}
		p := (*b)[:n]
		*b = (*b)[n:]
		return p
	}
	if !bytes.Equal(take(&out, 18), greeting(3)) {
		t.Fatal("greeting")
	}
	if len(in) < 4 {
		return
	}
	zeroes := reservedZeroes
	if take(&in, 4)[3]&flagNoZeroes != 0 {
		zeroes = 0
	}
	be32 := binary.BigEndian.Uint32
	// The handshake: each option has replies, the last of which is final.
	for transmission := false; !transmission; {
		o := take(&in, optionSize)
		if len(o) < optionSize || len(out) == 0 {
			if len(out) != 0 {
				t.Fatalf("said to nothing: %x", out)
			}
			return
		}
		opt := option(be32(o[8:]))
		take(&in, int(be32(o[12:])))
		if opt == optExportName {
			if got := take(&out, 10+zeroes); len(got) != 10+zeroes {
				t.Fatalf("reply to EXPORT_NAME of %d bytes", len(got))
			}
			break
		}
		for final := false; !final; {
			r := take(&out, optReplySize)
			if len(r) < optReplySize || binary.BigEndian.Uint64(r) != magicOptReply || option(be32(r[8:])) != opt {
				t.Fatalf("reply %x to option %d", r, opt)
			}
			kind, n := optReply(be32(r[12:])), int(be32(r[16:]))
			if got := take(&out, n); len(got) != n {
				t.Fatalf("reply to option %d is cut off", opt)
			}
			final = kind == repAck || kind&repErr != 0
			transmission = kind == repAck && opt == optGo
		}
	}
	// Transmission: one answer for each request, in any order.
	asked := map[uint64]header{}
	for len(in) >= requestSize {
		h, ok := decodeHeader(take(&in, requestSize))
		if !ok || h.cmd == CmdDisc {
			break
		}
		if h.cmd == CmdWrite && len(take(&in, int(h.n))) < int(h.n) {
			break // not arrived, so not asked
		}
		if _, twice := asked[h.cookie]; twice {
			return // which one an answer is for cannot be told
		}
		asked[h.cookie] = h
	}
	for len(out) > 0 {
		r := take(&out, simpleReplySize)
		if len(r) < simpleReplySize {
			t.Fatalf("half a reply: %x", r)
		}
		e, cookie, ok := decodeSimpleReply(r)
		h, was := asked[cookie]
		if !ok || !was {
			t.Fatalf("reply %x to no request", r)
		}
		delete(asked, cookie)
		if _, known := errnoNames[e]; e != 0 && !known {
			t.Fatalf("error number %d", e)
		}
		if e == 0 && h.cmd == CmdRead {
			if got := take(&out, int(h.n)); len(got) != int(h.n) {
				t.Fatalf("data of %d bytes instead of %d", len(got), h.n)
			}
		}
	}
	if polite && len(asked) > 0 {
		t.Fatalf("without an answer: %v", asked)
	}
}
