package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

func TestClientNegotiates(t *testing.T) {
	ro := newMemDisk(8192)
	ro.readOnly = true
	s := serve(t, Options{Exports: []Export{
		{Name: "", Backend: newMemDisk(4096)},
		{Name: "a name/with ?#% and ü", Description: "odd", Backend: ro},
	}})
	list, err := List(t.Context(), s.uri(""))
	if err != nil || len(list) != 2 || list[1] != (ExportInfo{"a name/with ?#% and ü", "odd"}) {
		t.Errorf("List: %q, %v", list, err)
	}
	c := s.dial("a name/with ?#% and ü")
	if c.Size() != 8192 || c.Flags()&FlagReadOnly == 0 || c.Flags()&FlagSendTrim != 0 {
		t.Errorf("size %d, flags %#x", c.Size(), c.Flags())
	}
	if c.Description() != "odd" || c.BlockSizes() != (BlockSizes{1, 4096, 32 << 20}) || c.Replies() != ExtendedHeaders {
		t.Errorf("description %q, %+v, %v", c.Description(), c.BlockSizes(), c.Replies())
	}
	if _, err := Dial(t.Context(), s.uri("nope")); !errors.Is(err, errOption(repErrUnknown)) {
		t.Errorf("an unknown export: %v", err)
	}
	err = c.WriteAt(t.Context(), []byte{1}, 0, false)
	if !errors.Is(err, EPERM) || !errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EIO) {
		t.Errorf("write to a read-only export: %v", err)
	}
	if _, err := Dial(t.Context(), "nbd+unix:///?socket=/nonexistent/s"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no server: %v", err)
	}
}

// Requests longer than the server takes are sent in pieces.
func TestClientCutsLongRequests(t *testing.T) {
	d := newMemDisk(1 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, PayloadBytesMax: 64 << 10})
	c := s.dial("")
	p, q := pattern(500_001, 3), make([]byte, 500_001)
	if err := errors.Join(c.WriteAt(t.Context(), p, 11, false), c.ReadAt(t.Context(), q, 11)); err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "read back", q, p)
	if n := s.Metrics().Write.Requests; n != 8 {
		t.Errorf("%d writes", n)
	}
	// TRIM is not bound to the payload's limit, only to 32 bits, and with extended
	// headers not to them.
	big := &hugeDisk{memDisk: newMemDisk(4096), trims: make(chan [2]uint64, 8)}
	s = serveDisk(t, big)
	for mode, want := range map[ReplyMode][][2]uint64{
		SimpleReplies:   {{4096, 2 << 30}, {4096 + 2<<30, 2 << 30}, {4096 + 4<<30, 1 << 30}},
		ExtendedHeaders: {{4096, 5 << 30}},
	} {
		if err := s.dialMode("", mode).Trim(t.Context(), 4096, 5<<30, false); err != nil {
			t.Fatal(err)
		}
		for _, want := range want {
			if got := <-big.trims; got != want {
				t.Errorf("%v: trim %v, want %v", mode, got, want)
			}
		}
	}
}

// A hugeDisk is a hole of 16 TiB.
type hugeDisk struct {
	*memDisk
	trims chan [2]uint64
}

func (d *hugeDisk) Size() uint64 { return 16 << 40 }
func (d *hugeDisk) Trim(_ context.Context, off, n uint64, _ bool) error {
	d.trims <- [2]uint64{off, n}
	return nil
}

func (d *hugeDisk) BlockStatus(_ context.Context, _, n uint64, visit func(n uint64, s BlockState) bool) error {
	visit(n, StateHole|StateZero)
	return nil
}

// A cancelled call returns at once and leaves the connection in sync.
func TestClientContext(t *testing.T) {
	d := newMemDisk(1 << 20)
	copy(d.data, pattern(1<<20, 1))
	g := newGate()
	d.onRead = func(ctx context.Context, off uint64) error {
		if off == 0 {
			return g.wait(ctx)
		}
		return nil
	}
	c := serveDisk(t, d).dial("")
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	p := make([]byte, 100_000)
	go func() { failed <- c.ReadAt(ctx, p, 0) }()
	<-g.entered
	cancel()
	if err := <-failed; err != context.Canceled {
		t.Fatal(err)
	}
	clear(p) // it is ours again
	g.open(1)
	q := make([]byte, 4096)
	for range 10 {
		if err := c.ReadAt(t.Context(), q, 4096); err != nil {
			t.Fatal(err)
		}
		mustEqual(t, "a later read", q, d.data[4096:8192])
	}
	mustEqual(t, "the buffer of the cancelled read", p, make([]byte, len(p)))
	if err := c.ReadAt(ctx, q, 4096); err != context.Canceled {
		t.Fatal(err)
	}
}

func TestClientClose(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onRead = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	s := serveDisk(t, d)

	c := s.dial("")
	failed := make(chan error, 1)
	go func() { failed <- c.ReadAt(t.Context(), make([]byte, 10), 0) }()
	<-g.entered
	c.Close()
	if err := <-failed; err != ErrClientClosed {
		t.Errorf("read during Close: %v", err)
	}
	if err := c.Flush(t.Context()); err != ErrClientClosed {
		t.Errorf("flush after Close: %v", err)
	}
	// Or its read takes the token that is meant for the next one.
	eventually(t, "the server has seen the end", func() bool { return s.Metrics().Connections == 0 })

	c = s.dial("")
	go func() { failed <- c.ReadAt(t.Context(), make([]byte, 10), 0) }()
	<-g.entered
	ended := make(chan error, 1)
	go func() { ended <- c.Disconnect(t.Context()) }()
	eventually(t, "requests are refused", func() bool { return c.Flush(t.Context()) == ErrClientClosed })
	g.open(1)
	if err := errors.Join(<-failed, <-ended); err != nil {
		t.Errorf("Disconnect answers what is in flight: %v", err)
	}

	c = s.dial("")
	s.Close()
	if err := c.Flush(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("flush without a server: %v", err)
	}
}

// script is a server that sends out, and takes what comes.
func scriptServer(t *testing.T, out ...[]byte) (nc net.Conn) {
	a, b := net.Pipe()
	var group sync.WaitGroup
	group.Go(func() { io.Copy(io.Discard, b) })
	group.Go(func() {
		for _, p := range out {
			b.Write(p)
		}
	})
	t.Cleanup(func() { a.Close(); b.Close(); group.Wait() })
	return a
}

// replyServer is a server that says handshake, and, when it has been sent a
// request, reply, and then closes.
func replyServer(t *testing.T, handshake, reply []byte) (nc net.Conn) {
	a, b := net.Pipe()
	var group sync.WaitGroup
	group.Go(func() { b.Write(handshake) })
	group.Go(func() {
		defer b.Close()
		buf := make([]byte, 1000) // a message of the client is one Write
		for {
			n, err := b.Read(buf)
			if err != nil {
				return
			}
			if m := binary.BigEndian.Uint32(buf); n >= requestSize && (m == magicRequest || m == magicRequestExt) {
				b.Write(reply)
				return
			}
		}
	})
	t.Cleanup(func() { a.Close(); b.Close(); group.Wait() })
	return a
}

func greeting(flags uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte("NBDMAGICIHAVEOPT"), flags)
}

// handshakeOf is what a server says that grants messages of form m, with chunks, and
// block status with number 5.
func handshakeOf(m ReplyMode) []byte {
	b := greeting(3)
	if m == StructuredReplies {
		b = appendOptReply(b, optExtended, repErrUnsup, nil)
		b = appendOptReply(b, optStructured, repAck, nil)
	} else {
		b = appendOptReply(b, optExtended, repAck, nil)
	}
	b = appendOptReply(b, optSetMeta, repMeta, append([]byte{0, 0, 0, 5}, contextAllocation...))
	b = appendOptReply(b, optSetMeta, repAck, nil)
	b = appendOptReply(b, optGo, repInfo, append([]byte{0, 0}, export(1<<20, FlagHasFlags, 0)...))
	return appendOptReply(b, optGo, repAck, nil)
}

func export(size uint64, flags TransmissionFlags, zeroes int) []byte {
	b := binary.BigEndian.AppendUint64(nil, size)
	b = binary.BigEndian.AppendUint16(b, uint16(flags))
	return append(b, make([]byte, zeroes)...)
}

func TestClientOfOldServers(t *testing.T) {
	unsup := func(opts ...option) (b []byte) {
		for _, opt := range opts {
			b = appendOptReply(b, opt, repErrUnsup, []byte("what?"))
		}
		return b
	}
	for name, out := range map[string][][]byte{
		"without GO":        {greeting(3), unsup(optExtended, optStructured, optGo), export(4096, FlagHasFlags, 0)},
		"without NO_ZEROES": {greeting(1), unsup(optExtended, optStructured, optGo), export(4096, FlagHasFlags, 124)},
		"structured, no GO": {greeting(3), unsup(optExtended), appendOptReply(nil, optStructured, repAck, nil),
			unsup(optSetMeta, optGo), export(4096, FlagHasFlags, 0)},
		"not fixed":          {greeting(0), export(4096, FlagHasFlags, 124)},
		"not fixed, zeroing": {greeting(2), export(4096, FlagHasFlags, 0)},
	} {
		c, err := NewClient(t.Context(), scriptServer(t, out...), "x")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.Size() != 4096 || c.Flags() != FlagHasFlags || c.CanBlockStatus() || (c.Replies() == SimpleReplies) != (name != "structured, no GO") {
			t.Errorf("%s: size %d, flags %#x, %v", name, c.Size(), c.Flags(), c.Replies())
		}
		if _, err := c.BlockStatus(t.Context(), 0, 1, false); !errors.Is(err, EINVAL) {
			t.Errorf("%s: block status: %v", name, err)
		}
		c.Close()
	}
}

func TestClientOfBrokenServers(t *testing.T) {
	reply := func(e Errno, cookie uint64) []byte { return appendSimpleReply(nil, e, cookie) }
	old := append(greeting(0), export(4096, FlagHasFlags, 124)...)
	for _, tc := range []struct {
		name string
		out  []byte
		want string
	}{
		{"not NBD", []byte("SSH-2.0-OpenSSH_9.2p1\r\n"), "magic"},
		{"oldstyle", []byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00"), "oldstyle"},
		{"wrong magic of an option's reply", append(greeting(3), make([]byte, 20)...), "magic"},
		{"endless option", append(greeting(3), append(appendOptReply(nil, optGo, repInfo, nil)[:16], 0xff, 0, 0, 0)...), "absurdly"},
		{"GO that tells nothing", append(greeting(3), appendOptReply(nil, optGo, repAck, nil)...), "nothing"},
		{"answer to no request", append(old, reply(0, 99)...), "no request"},
		{"wrong magic of a reply", append(old, make([]byte, 16)...), "magic"},
		{"refusal", old, "ENOSPC"},
	} {
		ctx := t.Context()
		nc := scriptServer(t, tc.out)
		if tc.name == "refusal" {
			nc = replyServer(t, tc.out, reply(ENOSPC, 1))
		}
		c, err := Dialer{Replies: SimpleReplies}.NewClient(ctx, nc, "")
		if err == nil {
			err = c.ReadAt(ctx, make([]byte, 100), 0)
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want something with %q", tc.name, err, tc.want)
		}
	}
	// One that says nothing is given up with the context.
	ctx, cancel := context.WithCancel(t.Context())
	nc := scriptServer(t)
	go cancel()
	if _, err := NewClient(ctx, nc, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("a silent server: %v", err)
	}
}

// What a server can do wrong, or right, in a reply of chunks, to a request at 4096
// of 100 bytes.
func TestClientOfBrokenChunks(t *testing.T) {
	be := binary.BigEndian
	for _, m := range []ReplyMode{StructuredReplies, ExtendedHeaders} {
		put := func(flags uint16, kind chunkType, body ...byte) []byte {
			return append(chunk{flags: flags, kind: kind, cookie: 1, off: 4096, n: uint64(len(body))}.appendTo(nil, m), body...)
		}
		data := func(off uint64, n int) []byte { return append(be.AppendUint64(nil, off), make([]byte, n)...) }
		hole := func(off uint64, n uint32) []byte { return be.AppendUint32(be.AppendUint64(nil, off), n) }
		failure := func(e Errno, text string, n int) []byte {
			return append(be.AppendUint16(be.AppendUint32(nil, uint32(e)), uint16(n)), text...)
		}
		const done = chunkFlagDone
		wrongOffset := chunk{flags: done, kind: chunkNone, cookie: 1, off: 1}.appendTo(nil, ExtendedHeaders)
		for _, tc := range []struct {
			name   string
			status bool // of a BLOCK_STATUS, else of a READ
			out    []byte
			want   string // in the error; empty for success
		}{
			{"in order", false, slices.Concat(put(0, chunkData, data(4096, 60)...), put(done, chunkHole, hole(4156, 40)...)), ""},
			{"out of order", false, slices.Concat(put(0, chunkHole, hole(4156, 40)...), put(0, chunkData, data(4096, 60)...), put(done, chunkNone)), ""},
			{"an error with a text", false, put(done, chunkError, failure(EIO, "broken", 6)...), "EIO (\"broken\")"},
			{"an error with an offset", false, put(done, chunkErrorOffset, append(failure(EIO, "", 0), data(4100, 0)...)...), "EIO"},
			{"an error of unknown type", false, put(done, chunkErr|77, failure(EPERM, "x", 1)...), "EPERM"},
			{"data and then an error", false, slices.Concat(put(0, chunkData, data(4096, 100)...), put(done, chunkError, failure(EIO, "", 0)...)), "EIO"},
			{"an error that is none", false, put(done, chunkError, failure(0, "", 0)...), "malformed"},
			{"a text longer than its chunk", false, put(done, chunkError, failure(EIO, "x", 2)...), "malformed"},
			{"too little", false, put(done, chunkData, data(4096, 99)...), "without an answer"},
			{"nothing", false, put(done, chunkNone), "without an answer"},
			{"too much", false, put(done, chunkData, data(4096, 101)...), "malformed"},
			{"before the range", false, put(done, chunkData, data(4095, 10)...), "malformed"},
			{"a hole beyond the range", false, put(done, chunkHole, hole(4096, 101)...), "malformed"},
			{"a hole of nothing", false, put(done, chunkHole, hole(4096, 0)...), "malformed"},
			{"a hole of the wrong length", false, put(done, chunkHole, append(hole(4096, 100), 0)...), "malformed"},
			{"the same twice", false, slices.Concat(put(0, chunkData, data(4096, 100)...), put(done, chunkData, data(4096, 1)...)), "malformed"},
			{"data without an offset", false, put(done, chunkData, 1, 2, 3), "malformed"},
			{"an end that is not the last", false, put(0, chunkNone), "malformed"},
			{"an unknown type", false, put(done, 77), "malformed"},
			{"a status of a READ", false, put(done, chunkStatus, make([]byte, 12)...), "malformed"},
			{"to no request", false, chunk{kind: chunkNone, cookie: 99, off: 4096}.appendTo(nil, m), "no request"},
			{"wrong magic", false, make([]byte, chunkExtSize), "magic"},
			{"cut off", false, put(done, chunkData, data(4096, 100)...)[:50], "EOF"},
			{"another offset than the request's", false, wrongOffset, map[ReplyMode]string{StructuredReplies: "magic", ExtendedHeaders: "which was at"}[m]},
			{"a simple reply to READ", false, appendSimpleReply(nil, 0, 1), map[ReplyMode]string{StructuredReplies: "simple reply", ExtendedHeaders: "magic"}[m]},

			{"extents", true, put(done, chunkStatus, be.AppendUint64(be.AppendUint32(nil, 5), 100<<32|3)...), ""},
			{"of another context", true, put(done, chunkStatus, be.AppendUint64(be.AppendUint32(nil, 4), 100<<32|3)...), "malformed"},
			{"an extent of nothing", true, put(done, chunkStatus, be.AppendUint64(be.AppendUint32(nil, 5), 3)...), "nothing"},
			{"no extents", true, put(done, chunkStatus, be.AppendUint32(nil, 5)...), "malformed"},
			{"half an extent", true, put(done, chunkStatus, be.AppendUint64(nil, 5<<32)...), "malformed"},
			{"extents twice", true, slices.Concat(put(0, chunkStatus, be.AppendUint64(be.AppendUint32(nil, 5), 100<<32)...),
				put(done, chunkStatus, be.AppendUint64(be.AppendUint32(nil, 5), 100<<32)...)), "malformed"},
			{"no status", true, put(done, chunkNone), "without an answer"},
			{"data of a BLOCK_STATUS", true, put(done, chunkData, data(4096, 100)...), "malformed"},
			{"a simple reply to BLOCK_STATUS", true, appendSimpleReply(nil, 0, 1), map[ReplyMode]string{StructuredReplies: "simple reply", ExtendedHeaders: "magic"}[m]},
			{"long extents", true, put(done, chunkStatusExt, be.AppendUint64(be.AppendUint64(be.AppendUint64(nil, 5<<32|1), 1<<40), 3)...),
				map[ReplyMode]string{StructuredReplies: "malformed"}[m]},
			{"a wrong number of extents", true, put(done, chunkStatusExt, be.AppendUint64(be.AppendUint64(be.AppendUint64(nil, 5<<32|2), 1<<40), 3)...), "malformed"},
		} {
			c, err := NewClient(t.Context(), replyServer(t, handshakeOf(m), tc.out), "")
			if err != nil {
				t.Fatalf("%v, %s: %v", m, tc.name, err)
			}
			p := bytes.Repeat([]byte{1}, 100)
			if tc.status {
				_, err = c.BlockStatus(t.Context(), 4096, 100, false)
			} else if err = c.ReadAt(t.Context(), p, 4096); err == nil && !isZero(p) {
				t.Errorf("%v, %s: read %x", m, tc.name, p)
			}
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, %s: %v, want something with %q", m, tc.name, err, tc.want)
			}
			c.Close()
		}
	}
}

// What a server tells of its block size is kept to, as the client asked for it.
func TestClientKeepsToTheBlockSize(t *testing.T) {
	dial := func(least, most uint32) (*Client, error) {
		info := binary.BigEndian.AppendUint16(nil, infoExport)
		info = append(info, export(1<<20, FlagHasFlags, 0)...)
		sizes := binary.BigEndian.AppendUint16(nil, infoBlockSize)
		for _, n := range []uint32{least, max(least, 4096), most} {
			sizes = binary.BigEndian.AppendUint32(sizes, n)
		}
		return Dialer{Replies: SimpleReplies}.NewClient(t.Context(), scriptServer(t, greeting(3), appendOptReply(nil, optGo, repInfo, info),
			appendOptReply(nil, optGo, repInfo, sizes), appendOptReply(nil, optGo, repAck, nil)), "")
	}
	c, err := dial(512, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.lenMin != 512 || c.lenMax != 9728 {
		t.Errorf("from %d to %d", c.lenMin, c.lenMax)
	}
	for name, err := range map[string]error{
		"read":   c.ReadAt(t.Context(), make([]byte, 512), 100),
		"write":  c.WriteAt(t.Context(), make([]byte, 513), 0, false),
		"trim":   c.Trim(t.Context(), 0, 1, false),
		"zeroes": c.WriteZeroes(t.Context(), 511, 512, ZeroFlags{}),
	} {
		if err != EINVAL {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, sizes := range [][2]uint32{{0, 4096}, {3, 4096}, {1 << 17, 1 << 20}, {512, 511}, {1, 0}} {
		if c, err := dial(sizes[0], sizes[1]); err == nil || !strings.Contains(err.Error(), "block sizes") {
			t.Errorf("%v: %v", sizes, err)
			if err == nil {
				c.Close()
			}
		}
	}
	if c, err := dial(1, 1<<32-1); err != nil || c.lenMax != clientPayloadMax {
		t.Errorf("no limit: %v", err)
	} else {
		c.Close()
	}
}

// Disconnect ends with its context, even where another call is stuck sending.
func TestClientDisconnectContext(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	go func() { // a server that answers the handshake and then takes nothing
		b.Write(greeting(0))
		io.ReadFull(b, make([]byte, 4+optionSize))
		b.Write(export(1<<20, FlagHasFlags, reservedZeroes))
	}()
	c, err := NewClient(t.Context(), a, "")
	if err != nil {
		t.Fatal(err)
	}
	stuck := make(chan error, 1)
	go func() { stuck <- c.WriteAt(t.Context(), make([]byte, 1000), 0, false) }()
	eventually(t, "it is sending", func() bool {
		if c.send.TryLock() {
			c.send.Unlock()
			return false
		}
		return true
	})
	ctx, cancel := context.WithCancel(t.Context())
	go cancel()
	if err := c.Disconnect(ctx); err != context.Canceled {
		t.Errorf("Disconnect: %v", err)
	}
	if err := <-stuck; err != ErrClientClosed {
		t.Errorf("the write: %v", err)
	}
}

// A connection that was handed over answers requests in the simple form, with
// nothing lost between.
func TestNegotiate(t *testing.T) {
	d := newMemDisk(64 << 10)
	copy(d.data, pattern(64<<10, 1))
	s := serveDisk(t, d)
	n, err := Negotiate(t.Context(), s.uri(""))
	if err != nil {
		t.Fatal(err)
	}
	defer n.Conn.Close()
	if n.Size != 64<<10 || n.Flags&(FlagSendFlush|FlagCanMultiConn) != FlagSendFlush|FlagCanMultiConn || n.Sizes.Minimum == 0 {
		t.Errorf("told %+v", n)
	}
	rc := rawConn{n.Conn, t}
	rc.request(CmdRead, 7, 512, 1024)
	if errno, cookie := rc.reply(); errno != 0 || cookie != 7 {
		t.Fatalf("read: %v, cookie %d", errno, cookie)
	}
	mustEqual(t, "data", rc.get(1024), d.data[512:][:1024])

	if _, err := Negotiate(t.Context(), s.uri("nothing here")); err == nil || !strings.Contains(err.Error(), "nothing here") {
		t.Errorf("an export that is not there: %v", err)
	}
	if _, err := Negotiate(t.Context(), strings.Replace(s.uri(""), "nbd", "nbds", 1)); err == nil || !strings.Contains(err.Error(), "TLS") {
		t.Errorf("TLS: %v", err)
	}
}
