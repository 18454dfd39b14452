package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync"
)

// ErrClientClosed is the error of calls on a client that has been closed.
var ErrClientClosed = errors.New("nbd: client closed")

// clientPayloadMax is the longest request of a client whose server does not
// tell a limit; the document allows it to assume this one.
const clientPayloadMax = 32 << 20

// A Client is one connection to one export. All methods may be called
// concurrently; requests are sent as they come and may be answered in any order.
//
// The context of a call ends its waiting; the request is not taken back, and a
// write may yet happen. Sending is not ended by a context, only by Close.
// Errors that the server answers wrap an [Errno], and EINVAL is that of a request
// which does not fit the server's block size, or which was not negotiated. Any
// other error means that the connection is dead, and all later calls fail with it.
type Client struct {
	nc      net.Conn
	br      *bufio.Reader // of the goroutine receive, after the handshake
	mode    ReplyMode
	context bool   // base:allocation was selected
	id      uint32 // its number
	size    uint64
	flags   TransmissionFlags
	about   string // description, for people
	sizes   BlockSizes
	lenMin  uint32        // what offsets and lengths are multiples of; a power of two
	lenMax  uint32        // of READ and WRITE
	stopped chan struct{} // closed when receive has ended

	send struct {
		sync.Mutex // held while a request is written
		hdr        []byte
		iov        net.Buffers
	}
	mu struct { // inside send
		sync.Mutex
		calls  map[uint64]*call // sent, not answered
		cookie uint64
		err    error // of a dead connection
		closed bool  // Disconnect has been called: no further requests
	}
	pool sync.Pool
}

// A call is a request that waits for its answer.
type call struct {
	header
	read    []byte   // where the data of a READ goes; nil: nowhere
	got     uint64   // bytes of it that have been told
	extents []Extent // the answer to BLOCK_STATUS
	told    bool     // it has come
	err     error
	gone    bool          // who has called does not wait for the end; guarded by mu
	done    chan struct{} // capacity 1
}

// A Dialer has options for clients. The zero Dialer is the usual one.
type Dialer struct {
	// Replies is the newest form of messages that is asked for; the server may
	// know older ones only. Default [ExtendedHeaders].
	Replies ReplyMode
}

// Dial connects to the export that uri names, with TLS if it says so.
func Dial(ctx context.Context, uri string) (*Client, error) { return Dialer{}.Dial(ctx, uri) }

// NewClient negotiates the export on nc, which it owns from now on; on an error
// it is closed.
func NewClient(ctx context.Context, nc net.Conn, export string) (*Client, error) {
	return Dialer{}.NewClient(ctx, nc, export)
}

// Dial connects to the export that uri names, with TLS if it says so.
func (d Dialer) Dial(ctx context.Context, uri string) (*Client, error) {
	nc, u, config, err := dial(ctx, uri)
	if err != nil {
		return nil, err
	}
	return d.newClient(ctx, nc, u.Export, config)
}

// dial connects to the server of uri. The configuration is nil without TLS.
func dial(ctx context.Context, uri string) (nc net.Conn, u URI, config *tls.Config, err error) {
	if u, err = ParseURI(uri); err != nil {
		return nil, u, nil, err
	}
	if u.TLS {
		name := "localhost" // at the other end of a unix socket
		if host, _, err := net.SplitHostPort(u.Address); err == nil && u.Network == "tcp" {
			name = host
		}
		if config, err = clientTLS(u.Certificates, name); err != nil {
			return nil, u, nil, err
		}
	}
	if nc, err = new(net.Dialer).DialContext(ctx, u.Network, u.Address); err != nil {
		err = fmt.Errorf("nbd: %w", err)
	}
	return nc, u, config, err
}

// NewClient negotiates the export on nc, which it owns from now on; on an error
// it is closed.
func (d Dialer) NewClient(ctx context.Context, nc net.Conn, export string) (*Client, error) {
	return d.newClient(ctx, nc, export, nil)
}

// newClient is NewClient, with TLS unless config is nil.
func (d Dialer) newClient(ctx context.Context, nc net.Conn, export string, config *tls.Config) (*Client, error) {
	mode := d.Replies
	setDefault(&mode, ExtendedHeaders)
	c, err := negotiated(ctx, nc, mode, export, config)
	if err != nil {
		return nil, err
	}
	go c.receive()
	return c, nil
}

// negotiated is a client past its negotiation that does not receive answers yet.
func negotiated(ctx context.Context, nc net.Conn, mode ReplyMode, export string, config *tls.Config) (*Client, error) {
	c := &Client{nc: nc, br: bufio.NewReaderSize(nc, 64<<10), mode: mode, lenMin: 1, lenMax: clientPayloadMax, stopped: make(chan struct{})}
	c.mu.calls = make(map[uint64]*call)
	c.pool.New = func() any { return &call{done: make(chan struct{}, 1)} }
	if err := withContext(ctx, nc, func() error { return c.negotiate(export, config) }); err != nil {
		nc.Close()
		return nil, fmt.Errorf("nbd: export %q: %w", export, err)
	}
	return c, nil
}

// A Negotiated is a connection past its negotiation, for somebody else to send
// requests on, as the kernel does. Replies are simple.
type Negotiated struct {
	Conn  net.Conn // the caller's; a *net.TCPConn or a *net.UnixConn
	Size  uint64   // of the export, in bytes
	Flags TransmissionFlags
	Sizes BlockSizes
}

// Negotiate connects to the export that uri names, and hands the connection over
// before the first request. TLS cannot be handed over and is an error.
func Negotiate(ctx context.Context, uri string) (*Negotiated, error) {
	u, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	if u.TLS {
		return nil, errors.New("nbd: a connection with TLS cannot be handed over")
	}
	nc, _, _, err := dial(ctx, uri)
	if err != nil {
		return nil, err
	}
	c, err := negotiated(ctx, nc, SimpleReplies, u.Export, nil)
	if err != nil {
		return nil, err
	}
	if c.br.Buffered() != 0 {
		nc.Close()
		return nil, fmt.Errorf("nbd: export %q: server sent on before the first request", u.Export)
	}
	return &Negotiated{Conn: nc, Size: c.size, Flags: c.flags, Sizes: c.sizes}, nil
}

// ExportInfo is one line of [List].
type ExportInfo struct {
	Name, Description string
}

// List asks the server of uri for its exports. The export in uri is ignored.
func List(ctx context.Context, uri string) (list []ExportInfo, err error) {
	err = negotiateOnly(ctx, uri, func(c *Client, _ URI) error {
		return c.ask(optList, nil, func(r optReply, data []byte) error {
			if r != repServer {
				return nil
			}
			if len(data) < 4 || uint64(binary.BigEndian.Uint32(data)) > uint64(len(data)-4) {
				return errors.New("malformed reply")
			}
			n := binary.BigEndian.Uint32(data)
			list = append(list, ExportInfo{string(data[4 : 4+n]), string(data[4+n:])})
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("nbd: list exports: %w", err)
	}
	return list, nil
}

// About asks the server of uri what it has to say of the export for programs, see
// [Export.About]. Servers of others have nothing to say.
func About(ctx context.Context, uri string) (about []string, err error) {
	err = negotiateOnly(ctx, uri, func(c *Client, u URI) error {
		// Without structured replies there are no contexts.
		if err := c.ask(optStructured, nil, func(optReply, []byte) error { return nil }); err != nil {
			return err
		}
		return c.ask(optListMeta, appendMetaQuery(nil, u.Export, contextsAbout), func(r optReply, data []byte) error {
			if r == repMeta && len(data) > 4 {
				if s, ok := strings.CutPrefix(string(data[4:]), contextsAbout); ok {
					about = append(about, s)
				}
			}
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("nbd: ask about %s: %w", uri, err)
	}
	return about, nil
}

// negotiateOnly connects to the server of uri for f to ask it options, and leaves.
func negotiateOnly(ctx context.Context, uri string, f func(c *Client, u URI) error) error {
	nc, u, config, err := dial(ctx, uri)
	if err != nil {
		return err
	}
	defer nc.Close()
	return withContext(ctx, nc, func() error {
		c := &Client{nc: nc, br: bufio.NewReader(nc)}
		if _, err := c.greet(config); err != nil {
			return err
		}
		err := f(c, u)
		c.nc.Write(appendOption(nil, optAbort, nil)) // out of courtesy
		return err
	})
}

// withContext runs f, whose I/O on nc ends when ctx does.
func withContext(ctx context.Context, nc net.Conn, f func() error) error {
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(aLongTimeAgo) })
	err := f()
	if !stop() && err == nil || errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// negotiate chooses the export: by GO, or by EXPORT_NAME if the server is too
// old for that.
func (c *Client) negotiate(export string, config *tls.Config) error {
	flags, err := c.greet(config)
	if err != nil {
		return err
	}
	if flags&flagFixedNewstyle == 0 {
		c.mode = SimpleReplies
	} else {
		if err := c.upgrade(export); err != nil {
			return err
		}
		found := false
		err := c.ask(optGo, appendInfoQuery(nil, export, infoDescription, infoBlockSize), func(r optReply, data []byte) error {
			if r != repInfo || len(data) < 2 {
				return nil
			}
			switch kind, data := binary.BigEndian.Uint16(data), data[2:]; {
			case kind == infoExport && len(data) == 10:
				c.size = binary.BigEndian.Uint64(data)
				c.flags = TransmissionFlags(binary.BigEndian.Uint16(data[8:]))
				found = true
			case kind == infoDescription:
				c.about = string(data)
			case kind == infoBlockSize && len(data) == 12:
				least, most := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[8:])
				c.sizes = BlockSizes{least, binary.BigEndian.Uint32(data[4:]), most}
				if least == 0 || least > 64<<10 || least&(least-1) != 0 || most < least {
					return fmt.Errorf("block sizes from %d to %d", least, most)
				}
				c.lenMin, c.lenMax = least, min(most, clientPayloadMax)&^(least-1)
			}
			return nil
		})
		if err == nil && !found {
			return errors.New("server told nothing about it")
		}
		if err == nil || !errors.Is(err, errOption(repErrUnsup)) || c.mode >= ExtendedHeaders {
			return err
		}
	}
	if _, err := c.nc.Write(appendOption(nil, optExportName, []byte(export))); err != nil {
		return err
	}
	n := 10
	if flags&flagNoZeroes == 0 {
		n += reservedZeroes
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c.br, b); err != nil {
		return unexpected(err) // which is also how a server says no
	}
	c.size = binary.BigEndian.Uint64(b)
	c.flags = TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	return nil
}

// upgrade asks for the newest form of messages that both sides know, and for the
// metadata context that needs it.
func (c *Client) upgrade(export string) error {
	refused := func(err error) bool {
		_, ok := errors.AsType[errOption](err)
		return ok
	}
	none := func(optReply, []byte) error { return nil }
	for ; c.mode > SimpleReplies; c.mode-- {
		opt := optStructured
		if c.mode == ExtendedHeaders {
			opt = optExtended
		}
		err := c.ask(opt, nil, none)
		if err == nil {
			break
		}
		if !refused(err) {
			return err
		}
	}
	if c.mode == SimpleReplies {
		return nil
	}
	err := c.ask(optSetMeta, appendMetaQuery(nil, export, contextAllocation), func(r optReply, data []byte) error {
		if r == repMeta && len(data) > 4 && string(data[4:]) == contextAllocation {
			c.context, c.id = true, binary.BigEndian.Uint32(data)
		}
		return nil
	})
	if refused(err) {
		c.context, err = false, nil // GO will tell what is wrong, or nothing is
	}
	return err
}

// greet exchanges the greetings, begins with TLS unless config is nil, and returns
// the flags that both sides have.
func (c *Client) greet(config *tls.Config) (flags uint16, err error) {
	var b [18]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return 0, unexpected(err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicServer {
		return 0, errBadMagic
	}
	switch binary.BigEndian.Uint64(b[8:]) {
	case magicOption:
	case magicOldstyle:
		return 0, errors.New("server speaks oldstyle only")
	default:
		return 0, errBadMagic
	}
	flags = binary.BigEndian.Uint16(b[16:]) & handshakeFlags
	_, err = c.nc.Write(binary.BigEndian.AppendUint32(nil, uint32(flags)))
	if err != nil || config == nil {
		return flags, err
	}
	if flags&flagFixedNewstyle == 0 {
		return flags, errors.New("server is too old for TLS")
	}
	if err := c.ask(optStartTLS, nil, func(optReply, []byte) error { return errBadMagic }); err != nil {
		return flags, fmt.Errorf("STARTTLS: %w", err)
	}
	if c.br.Buffered() != 0 {
		return flags, errors.New("server sent on before TLS") // or somebody between
	}
	tc := tls.Client(c.nc, config)
	if err := tc.Handshake(); err != nil {
		return flags, err
	}
	c.nc = tc
	c.br.Reset(tc)
	return flags, nil
}

// errOption is an option refused by the server.
type errOption optReply

func (e errOption) Error() string { return optReply(e).String() }

// ask sends an option and calls each for its replies, until the last. It returns
// an errOption, perhaps wrapped, if the server refuses.
func (c *Client) ask(opt option, data []byte, each func(r optReply, data []byte) error) error {
	if _, err := c.nc.Write(appendOption(nil, opt, data)); err != nil {
		return err
	}
	for range 1 << 16 {
		var b [optReplySize]byte
		if _, err := io.ReadFull(c.br, b[:]); err != nil {
			return unexpected(err)
		}
		r := optReply(binary.BigEndian.Uint32(b[12:]))
		n := binary.BigEndian.Uint32(b[16:])
		if binary.BigEndian.Uint64(b[:]) != magicOptReply || option(binary.BigEndian.Uint32(b[8:])) != opt {
			return errBadMagic
		}
		if n > optionBytesMax {
			return errOptionTooLong
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.br, data); err != nil {
			return unexpected(err)
		}
		if r&repErr != 0 {
			if len(data) > 0 {
				return fmt.Errorf("%w: %q", errOption(r), data)
			}
			return errOption(r)
		}
		if r == repAck {
			return nil
		}
		if err := each(r, data); err != nil {
			return err
		}
	}
	return errors.New("server does not stop replying")
}

// Size is the size of the export in bytes.
func (c *Client) Size() uint64 { return c.size }

// Flags tell what the export can do.
func (c *Client) Flags() TransmissionFlags { return c.flags }

// Description is what the server says of the export to people; may be empty.
func (c *Client) Description() string { return c.about }

// BlockSizes are what a server tells of the lengths that it takes, in bytes; zero if
// it tells nothing.
type BlockSizes struct {
	Minimum   uint32 // offsets and lengths are multiples of it
	Preferred uint32
	Maximum   uint32 // of READ and WRITE
}

// BlockSizes are the server's.
func (c *Client) BlockSizes() BlockSizes { return c.sizes }

// Replies is the form of messages that was agreed on.
func (c *Client) Replies() ReplyMode { return c.mode }

// CanBlockStatus tells whether BlockStatus can be asked for.
func (c *Client) CanBlockStatus() bool { return c.context }

// ReadAt fills p, borrowed, with the bytes at off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off uint64) error {
	for {
		n := min(len(p), int(c.lenMax))
		if err := c.do(ctx, header{cmd: CmdRead, off: off, n: uint64(n)}, nil, p[:n]); err != nil {
			return err
		}
		if p, off = p[n:], off+uint64(n); len(p) == 0 {
			return nil
		}
	}
}

// WriteAt writes p, borrowed, at off; with fua it is durable on return.
func (c *Client) WriteAt(ctx context.Context, p []byte, off uint64, fua bool) error {
	for {
		n := min(len(p), int(c.lenMax))
		h := header{cmd: CmdWrite, flags: fuaFlag(fua), off: off, n: uint64(n)}
		if err := c.do(ctx, h, p[:n], nil); err != nil {
			return err
		}
		if p, off = p[n:], off+uint64(n); len(p) == 0 {
			return nil
		}
	}
}

// Flush makes durable what was answered, on any connection, before it was called.
func (c *Client) Flush(ctx context.Context) error {
	return c.do(ctx, header{cmd: CmdFlush}, nil, nil)
}

// Trim tells that the n bytes at off are no longer needed.
func (c *Client) Trim(ctx context.Context, off, n uint64, fua bool) error {
	return c.ranged(ctx, header{cmd: CmdTrim, flags: fuaFlag(fua), off: off}, n)
}

// Cache tells that the n bytes at off will be read soon.
func (c *Client) Cache(ctx context.Context, off, n uint64) error {
	return c.ranged(ctx, header{cmd: CmdCache, off: off}, n)
}

// BlockStatus tells what of the n bytes at off is allocated: runs from off on, as
// many as the server tells at once, and with one just the first. There is one at
// least; the last may end beyond what was asked for. n > 0.
func (c *Client) BlockStatus(ctx context.Context, off, n uint64, one bool) ([]Extent, error) {
	if !c.context {
		return nil, fmt.Errorf("%w: block status was not negotiated", EINVAL)
	}
	h := header{cmd: CmdBlockStatus, off: off, n: n}
	if c.mode < ExtendedHeaders {
		h.n = min(n, math.MaxUint32&^uint64(c.lenMin-1))
	}
	if one {
		h.flags = cmdFlagReqOne
	}
	k, err := c.call(ctx, h, nil, nil)
	if err != nil {
		return nil, err
	}
	extents := k.extents
	c.recycle(k)
	return extents, nil
}

// WriteZeroes makes the n bytes at off zero.
func (c *Client) WriteZeroes(ctx context.Context, off, n uint64, f ZeroFlags) error {
	flags := fuaFlag(f.FUA)
	if f.NoHole {
		flags |= cmdFlagNoHole
	}
	if f.FastZero {
		flags |= cmdFlagFastZero
	}
	return c.ranged(ctx, header{cmd: CmdWriteZeroes, flags: flags, off: off}, n)
}

// ranged does h, which has no payload, for n bytes, in pieces that fit a header
// and keep the alignment.
func (c *Client) ranged(ctx context.Context, h header, n uint64) error {
	pieceMax := uint64(1 << 31)
	if c.mode >= ExtendedHeaders {
		pieceMax = 1 << 63
	}
	for {
		m := min(n, pieceMax)
		h.n = m
		if err := c.do(ctx, h, nil, nil); err != nil {
			return err
		}
		if n, h.off = n-m, h.off+m; n == 0 {
			return nil
		}
	}
}

func fuaFlag(fua bool) uint16 {
	if fua {
		return cmdFlagFUA
	}
	return 0
}

// do sends one request with the payload out and waits for its answer, whose data
// goes to in.
func (c *Client) do(ctx context.Context, h header, out, in []byte) error {
	k, err := c.call(ctx, h, out, in)
	if k != nil {
		c.recycle(k)
	}
	return err
}

// call is do, and returns the answered call for the caller to recycle: nil if it
// has not been answered, or with an error.
func (c *Client) call(ctx context.Context, h header, out, in []byte) (*call, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if (h.off|h.n)&uint64(c.lenMin-1) != 0 {
		return nil, EINVAL // as the server would say, or worse: it told its block size
	}
	k := c.pool.Get().(*call)
	*k = call{read: in, done: k.done}

	c.send.Lock()
	c.mu.Lock()
	if err := c.mu.err; err != nil || c.mu.closed {
		c.mu.Unlock()
		c.send.Unlock()
		if err == nil {
			err = ErrClientClosed
		}
		return nil, err
	}
	c.mu.cookie++
	h.cookie = c.mu.cookie
	k.header = h
	c.mu.calls[h.cookie] = k
	c.mu.Unlock()
	err := c.write(h, out)
	c.send.Unlock()
	if err != nil {
		c.fail(err) // answers k too
	}

	select {
	case <-k.done:
	case <-ctx.Done():
		c.mu.Lock()
		waiting := c.mu.calls[h.cookie] == k
		if waiting {
			k.read = nil // the answer comes, later, to nobody
		}
		k.gone = true
		c.mu.Unlock()
		if waiting {
			return nil, ctx.Err()
		}
		if <-k.done; k.err == errGone { // in was being filled
			err = ctx.Err()
			c.recycle(k)
			return nil, err
		}
	}
	if k.err != nil {
		err = k.err
		c.recycle(k)
		return nil, err
	}
	return k, nil
}

// errGone ends a call of which a part of the answer has still to come.
var errGone = errors.New("nbd: nobody waits")

// recycle keeps k for another call.
func (c *Client) recycle(k *call) {
	k.read, k.extents, k.err = nil, nil, nil
	c.pool.Put(k)
}

// write writes a request. REQUIRES: c.send held.
func (c *Client) write(h header, out []byte) error {
	if c.mode >= ExtendedHeaders {
		if h.cmd == CmdWrite {
			h.flags |= cmdFlagPayloadLen
		}
		c.send.hdr = h.appendExtended(c.send.hdr[:0])
	} else {
		c.send.hdr = h.appendTo(c.send.hdr[:0])
	}
	if len(out) == 0 {
		_, err := c.nc.Write(c.send.hdr)
		return err
	}
	iov := append(c.send.iov[:0], c.send.hdr, out)
	c.send.iov = iov
	_, err := c.send.iov.WriteTo(c.nc)
	clear(iov)
	c.send.iov = iov[:0]
	return err
}

// receive takes the answers until the connection is dead.
func (c *Client) receive() {
	defer close(c.stopped)
	for {
		k, done, err := c.answer()
		if err != nil {
			c.fail(err) // before k is answered, so that later calls have the same error
			if k != nil {
				k.err = unexpected(err)
				k.done <- struct{}{}
			}
			return
		}
		if done {
			k.done <- struct{}{}
			continue
		}
		// More is to come.
		c.mu.Lock()
		err = c.mu.err
		gone := k.gone
		if err == nil {
			rest := k
			if gone {
				rest = &call{header: k.header, got: k.got, told: k.told, done: make(chan struct{}, 1)}
			}
			c.mu.calls[k.cookie] = rest
		}
		c.mu.Unlock()
		if err != nil {
			k.err = err
			k.done <- struct{}{}
			return
		}
		if gone {
			k.err = errGone
			k.done <- struct{}{}
		}
	}
}

// answer takes one message of the server: a simple reply, or a chunk of a reply.
// It returns the call that it belongs to, which is not in mu.calls any more, and
// whether the reply is complete. An error is the connection's death.
func (c *Client) answer() (k *call, done bool, err error) {
	magic, err := c.br.Peek(4)
	if err != nil {
		return nil, false, err
	}
	if c.mode >= StructuredReplies && binary.BigEndian.Uint32(magic) != magicSimple {
		return c.chunk()
	}
	var b [simpleReplySize]byte
	if _, err := io.ReadFull(c.br, b[:]); err != nil {
		return nil, false, err
	}
	errno, cookie, ok := decodeSimpleReply(b[:])
	if !ok || c.mode >= ExtendedHeaders {
		return nil, false, errBadMagic
	}
	if k, err = c.take(cookie); err != nil {
		return nil, false, err
	}
	switch {
	case errno != 0:
		k.err = errno
	case k.cmd == CmdRead && c.mode >= StructuredReplies && k.n > 0, k.cmd == CmdBlockStatus:
		err = fmt.Errorf("nbd: simple reply to %v", k.cmd)
	case k.cmd == CmdRead:
		err = c.fill(k, 0, k.n)
	}
	return k, true, err
}

// take takes the call of cookie out of those that wait.
func (c *Client) take(cookie uint64) (*call, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.mu.calls[cookie]
	if k == nil {
		return nil, fmt.Errorf("nbd: answer to no request (cookie %d)", cookie)
	}
	delete(c.mu.calls, cookie)
	return k, nil
}

// fill receives n bytes of data that belong at from of what k reads.
func (c *Client) fill(k *call, from, n uint64) (err error) {
	if k.read == nil {
		for ; n > 0 && err == nil; n -= min(n, 1<<30) {
			_, err = c.br.Discard(int(min(n, 1<<30)))
		}
		return err
	}
	_, err = io.ReadFull(c.br, k.read[from:][:n])
	return err
}

// chunk takes one chunk; see answer.
func (c *Client) chunk() (k *call, done bool, err error) {
	size := chunkSize
	if c.mode >= ExtendedHeaders {
		size = chunkExtSize
	}
	b, err := c.br.Peek(size)
	if err != nil {
		return nil, false, err
	}
	h, ok := decodeChunk(b, c.mode)
	if !ok {
		return nil, false, errBadMagic
	}
	c.br.Discard(size)
	if k, err = c.take(h.cookie); err != nil {
		return nil, false, err
	}
	if c.mode >= ExtendedHeaders && h.off != k.off {
		return k, false, fmt.Errorf("nbd: chunk of a request at %d, which was at %d", h.off, k.off)
	}
	done = h.flags&chunkFlagDone != 0
	if err := c.content(k, h); err != nil {
		return k, false, err
	}
	if done && k.err == nil && (k.cmd == CmdRead && k.got != k.n || k.cmd == CmdBlockStatus && !k.told) {
		return k, false, fmt.Errorf("nbd: success without an answer to %v", k.cmd)
	}
	return k, done, nil
}

// content takes what follows the header h of a chunk for k.
func (c *Client) content(k *call, h chunk) error {
	bad := func(what string) error {
		return fmt.Errorf("nbd: malformed chunk of type %d and %d bytes in the reply to %v: %s", h.kind, h.n, k.cmd, what)
	}
	var buf [16]byte // for what precedes data, and for an extent
	fixed := func(n int) ([]byte, error) {
		b := buf[:n]
		if h.n < uint64(n) {
			return nil, bad("too short")
		}
		_, err := io.ReadFull(c.br, b)
		return b, unexpected(err)
	}
	be := binary.BigEndian
	switch {
	case h.kind == chunkNone:
		if h.n != 0 || h.flags&chunkFlagDone == 0 {
			return bad("not the last, or not empty")
		}
		return nil

	case h.kind&chunkErr != 0:
		b, err := fixed(6)
		if err != nil {
			return err
		}
		errno, text := Errno(be.Uint32(b)), int(be.Uint16(b[4:]))
		if uint64(text) > h.n-6 || text > stringBytesMax || h.n > 6+stringBytesMax+64 || errno == 0 {
			return bad("length of the message")
		}
		rest := make([]byte, h.n-6) // the message, and what types of errors have beside it
		if _, err := io.ReadFull(c.br, rest); err != nil {
			return unexpected(err)
		}
		if k.err == nil {
			k.err = errno
			if text > 0 {
				k.err = fmt.Errorf("%w (%q)", errno, rest[:text])
			}
		}
		return nil

	case k.cmd == CmdRead && (h.kind == chunkData || h.kind == chunkHole):
		least := 8
		if h.kind == chunkHole {
			least = 12
		}
		b, err := fixed(least)
		if err != nil {
			return err
		}
		off, n := be.Uint64(b), h.n-8
		if h.kind == chunkHole {
			n = uint64(be.Uint32(b[8:]))
			if h.n != 12 {
				return bad("length of a hole")
			}
		}
		if n == 0 || off < k.off || off-k.off > k.n || n > k.n-(off-k.off) || n > k.n-k.got {
			return bad("not within the request, or twice")
		}
		k.got += n
		if h.kind == chunkData {
			return unexpected(c.fill(k, off-k.off, n))
		}
		if k.read != nil {
			clear(k.read[off-k.off:][:n])
		}
		return nil

	case k.cmd == CmdBlockStatus && (h.kind == chunkStatus || h.kind == chunkStatusExt && c.mode >= ExtendedHeaders):
		head, each := 4, 8
		if h.kind == chunkStatusExt {
			head, each = 8, 16
		}
		b, err := fixed(head)
		if err != nil {
			return err
		}
		count := (h.n - uint64(head)) / uint64(each)
		if be.Uint32(b) != c.id || k.told || count == 0 || count > 1<<20 || h.n != uint64(head)+count*uint64(each) {
			return bad("not one list of extents of the context")
		}
		if head == 8 && be.Uint32(b[4:]) != 0 && uint64(be.Uint32(b[4:])) != count {
			return bad("number of extents")
		}
		k.told = true
		for range count {
			b := buf[:each]
			if _, err := io.ReadFull(c.br, b); err != nil {
				return unexpected(err)
			}
			x := Extent{uint64(be.Uint32(b)), BlockState(be.Uint32(b[4:]))}
			if each == 16 {
				x = Extent{be.Uint64(b), BlockState(be.Uint64(b[8:]))}
			}
			if x.Length == 0 {
				return bad("an extent of nothing")
			}
			k.extents = append(k.extents, x)
		}
		return nil
	}
	return bad("unexpected")
}

// fail is the death of the connection: all who wait, and all later calls, get
// the first error.
func (c *Client) fail(err error) {
	defer c.nc.Close() // not before the reason is set, for this gives receive another one
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.err == nil {
		if err == io.EOF {
			err = fmt.Errorf("nbd: server closed the connection: %w", io.ErrUnexpectedEOF)
			if c.mu.closed {
				err = ErrClientClosed
			}
		}
		c.mu.err = err
	}
	for cookie, k := range c.mu.calls {
		delete(c.mu.calls, cookie)
		k.err = c.mu.err
		k.done <- struct{}{}
	}
}

// Disconnect ends the connection in good order: it tells the server, which
// answers what it has been asked and closes. When ctx ends before that it does
// what Close does, and returns the error of ctx.
func (c *Client) Disconnect(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.fail(ErrClientClosed) })
	c.send.Lock()
	c.mu.Lock()
	first := !c.mu.closed && c.mu.err == nil
	c.mu.closed = true
	c.mu.Unlock()
	if first {
		if err := c.write(header{cmd: CmdDisc}, nil); err != nil {
			c.fail(err)
		}
	}
	c.send.Unlock()
	<-c.stopped
	if !stop() {
		return ctx.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(c.mu.err, ErrClientClosed) {
		return nil
	}
	return c.mu.err
}

// Close ends the connection at once. Calls that wait fail with [ErrClientClosed].
// The error is always nil.
func (c *Client) Close() error {
	c.fail(ErrClientClosed)
	<-c.stopped
	return nil
}
