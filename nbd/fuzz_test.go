package nbd

import (
	"bytes"
	"net"
	"slices"
	"testing"
	"time"
)

// FuzzHeader: every header that is decoded is encoded to the same bytes, and
// only the magic number decides.
func FuzzHeader(f *testing.F) {
	f.Add(header{flags: cmdFlagFUA, cmd: CmdWrite, cookie: 1, off: 1 << 40, n: 4096}.appendTo(nil))
	f.Add(header{flags: cmdFlagFUA, cmd: CmdTrim, cookie: 1, off: 1 << 40, n: 1 << 50}.appendExtended(nil))
	f.Add(append(chunk{flags: chunkFlagDone, kind: chunkData, n: 100}.appendTo(nil, StructuredReplies), make([]byte, 12)...))
	f.Add(chunk{flags: chunkFlagDone, kind: chunkStatusExt, n: 100}.appendTo(nil, ExtendedHeaders))
	f.Add(make([]byte, requestExtSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < requestSize {
			return
		}
		short := b[:requestSize]
		h, ok := decodeHeader(short)
		if got := h.appendTo(nil); ok != bytes.Equal(got, short) {
			t.Errorf("%x decodes (%v) to %+v, which is %x", short, ok, h, got)
		}
		if len(b) < requestExtSize {
			return
		}
		b = b[:requestExtSize]
		h, ok = decodeExtended(b)
		if got := h.appendExtended(nil); ok != bytes.Equal(got, b) {
			t.Errorf("%x decodes (%v) to %+v, which is %x", b, ok, h, got)
		}
		for m, n := range map[ReplyMode]int{StructuredReplies: chunkSize, ExtendedHeaders: chunkExtSize} {
			k, ok := decodeChunk(b[:n], m)
			if got := k.appendTo(nil, m); ok != bytes.Equal(got, b[:n]) {
				t.Errorf("%v: %x decodes (%v) to %+v, which is %x", m, b[:n], ok, k, got)
			}
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

// FuzzMetaQuery: a query that is accepted is one that its parts encode to.
func FuzzMetaQuery(f *testing.F) {
	f.Add(appendMetaQuery(nil, "export", "base:", contextAllocation, "qemu:x"))
	f.Add(appendMetaQuery(nil, ""))
	f.Add(appendMetaQuery(nil, "export", contextsAbout))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		q, ok := decodeMetaQuery(b)
		if !ok {
			return
		}
		if !bytes.HasPrefix(b, appendMetaQuery(nil, q.export)[:4+len(q.export)]) || uint64(len(b)) < 8+uint64(len(q.export))+4*uint64(q.queries) {
			t.Errorf("%x accepted as %+v", b, q)
		}
		if q.allocation && !bytes.Contains(b, []byte(contextAllocation)) {
			t.Errorf("%x asks for no %s", b, contextAllocation)
		}
		if q.about && !bytes.Contains(b, []byte(contextsAbout)) {
			t.Errorf("%x asks for no %s", b, contextsAbout)
		}
	})
}

// FuzzClient: whatever a server says, in the handshake and in a reply, the client ends
// when the server does, and does not hold more than it was told.
func FuzzClient(f *testing.F) {
	for _, m := range []ReplyMode{StructuredReplies, ExtendedHeaders} {
		put := func(kind chunkType, body ...byte) []byte {
			return append(chunk{flags: chunkFlagDone, kind: kind, cookie: 1, n: uint64(len(body))}.appendTo(nil, m), body...)
		}
		extended := m == ExtendedHeaders
		f.Add(handshakeOf(m), put(chunkData, make([]byte, 108)...), extended, false)
		f.Add(handshakeOf(m), put(chunkHole, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100), extended, false)
		f.Add(handshakeOf(m), put(chunkError, 0, 0, 0, 5, 0, 1, 'x'), extended, false)
		f.Add(handshakeOf(m), put(chunkStatus, 0, 0, 0, 5, 0, 0, 0, 100, 0, 0, 0, 3), extended, true)
		f.Add(handshakeOf(m), put(chunkStatusExt, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0, 3), extended, true)
	}
	f.Add(append(greeting(0), export(4096, FlagHasFlags, 124)...), appendSimpleReply(nil, 0, 1), false, false)
	f.Fuzz(func(t *testing.T, handshake, reply []byte, extended, status bool) {
		nc := new(streamConn)
		nc.in.Reset(handshake)
		if c, err := NewClient(t.Context(), nc, ""); err == nil {
			c.Close()
		}
		m := StructuredReplies
		if extended {
			m = ExtendedHeaders
		}
		c, err := NewClient(t.Context(), replyServer(t, handshakeOf(m), reply), "")
		if err != nil {
			t.Fatal(err)
		}
		if status {
			extents, err := c.BlockStatus(t.Context(), 0, 100, false)
			if err == nil && (len(extents) == 0 || len(extents) > len(reply)/8) {
				t.Errorf("%d extents in %d bytes", len(extents), len(reply))
			}
		} else {
			c.ReadAt(t.Context(), make([]byte, 100), 0)
		}
		c.Close()
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

	for _, stream := range recorded(f) {
		f.Add(stream)
	}
	f.Fuzz(converse)
}
