package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
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
// Errors that the server answers are an [Errno], and EINVAL is that of a request
// which does not fit the server's block size. Any other error means that the
// connection is dead, and all later calls fail with it.
type Client struct {
	nc      net.Conn
	br      *bufio.Reader // of the goroutine receive, after the handshake
	size    uint64
	flags   TransmissionFlags
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
	read []byte // where the data of a READ goes; nil: nowhere
	n    int    // length of that data
	err  error
	done chan struct{} // capacity 1
}

// Dial connects to the export that uri names, with TLS if it says so.
func Dial(ctx context.Context, uri string) (*Client, error) {
	nc, u, config, err := dial(ctx, uri)
	if err != nil {
		return nil, err
	}
	return newClient(ctx, nc, u.Export, config)
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
func NewClient(ctx context.Context, nc net.Conn, export string) (*Client, error) {
	return newClient(ctx, nc, export, nil)
}

// newClient is NewClient, with TLS unless config is nil.
func newClient(ctx context.Context, nc net.Conn, export string, config *tls.Config) (*Client, error) {
	c := &Client{nc: nc, br: bufio.NewReaderSize(nc, 64<<10), lenMin: 1, lenMax: clientPayloadMax, stopped: make(chan struct{})}
	c.mu.calls = make(map[uint64]*call)
	c.pool.New = func() any { return &call{done: make(chan struct{}, 1)} }
	if err := withContext(ctx, nc, func() error { return c.negotiate(export, config) }); err != nil {
		nc.Close()
		return nil, fmt.Errorf("nbd: export %q: %w", export, err)
	}
	go c.receive()
	return c, nil
}

// ExportInfo is one line of [List].
type ExportInfo struct {
	Name, Description string
}

// List asks the server of uri for its exports. The export in uri is ignored.
func List(ctx context.Context, uri string) (list []ExportInfo, err error) {
	nc, _, config, err := dial(ctx, uri)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	c := &Client{nc: nc, br: bufio.NewReader(nc)}
	err = withContext(ctx, nc, func() error {
		if _, err := c.greet(config); err != nil {
			return err
		}
		err := c.ask(optList, nil, func(r optReply, data []byte) error {
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
		c.nc.Write(appendOption(nil, optAbort, nil)) // out of courtesy
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("nbd: list exports: %w", err)
	}
	return list, nil
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
	if flags&flagFixedNewstyle != 0 {
		found := false
		err := c.ask(optGo, appendInfoQuery(nil, export, infoBlockSize), func(r optReply, data []byte) error {
			if r != repInfo || len(data) < 2 {
				return nil
			}
			switch kind, data := binary.BigEndian.Uint16(data), data[2:]; {
			case kind == infoExport && len(data) == 10:
				c.size = binary.BigEndian.Uint64(data)
				c.flags = TransmissionFlags(binary.BigEndian.Uint16(data[8:]))
				found = true
			case kind == infoBlockSize && len(data) == 12:
				least, most := binary.BigEndian.Uint32(data), binary.BigEndian.Uint32(data[8:])
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
		if err == nil || !errors.Is(err, errOption(repErrUnsup)) {
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

// ReadAt fills p, borrowed, with the bytes at off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off uint64) error {
	for {
		n := min(len(p), int(c.lenMax))
		if err := c.do(ctx, header{cmd: CmdRead, off: off, n: uint32(n)}, nil, p[:n]); err != nil {
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
		h := header{cmd: CmdWrite, flags: fuaFlag(fua), off: off, n: uint32(n)}
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
	const pieceMax = 1 << 31
	for {
		m := min(n, pieceMax)
		h.n = uint32(m)
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
	if err := ctx.Err(); err != nil {
		return err
	}
	if (h.off|uint64(h.n))&uint64(c.lenMin-1) != 0 {
		return EINVAL // as the server would say, or worse: it told its block size
	}
	k := c.pool.Get().(*call)
	k.read, k.n, k.err = in, len(in), nil

	c.send.Lock()
	c.mu.Lock()
	if err := c.mu.err; err != nil || c.mu.closed {
		c.mu.Unlock()
		c.send.Unlock()
		if err == nil {
			err = ErrClientClosed
		}
		return err
	}
	c.mu.cookie++
	h.cookie = c.mu.cookie
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
		c.mu.Unlock()
		if waiting {
			return ctx.Err()
		}
		<-k.done // in is being filled
	}
	err = k.err
	k.read = nil
	c.pool.Put(k)
	return err
}

// write writes a request. REQUIRES: c.send held.
func (c *Client) write(h header, out []byte) error {
	c.send.hdr = h.appendTo(c.send.hdr[:0])
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
	var b [simpleReplySize]byte
	for {
		if _, err := io.ReadFull(c.br, b[:]); err != nil {
			c.fail(err)
			return
		}
		errno, cookie, ok := decodeSimpleReply(b[:])
		c.mu.Lock()
		k := c.mu.calls[cookie]
		delete(c.mu.calls, cookie)
		c.mu.Unlock()
		if !ok || k == nil {
			err := errBadMagic
			if ok {
				err = fmt.Errorf("nbd: answer to no request (cookie %d)", cookie)
			}
			c.fail(err)
			if k != nil {
				k.err = err
				k.done <- struct{}{}
			}
			return
		}
		var err error
		if errno != 0 {
			k.err = errno
		} else if k.read == nil {
			_, err = c.br.Discard(k.n)
		} else {
			_, err = io.ReadFull(c.br, k.read)
		}
		if err != nil {
			k.err = unexpected(err)
			c.fail(k.err)
		}
		k.done <- struct{}{}
		if err != nil {
			return
		}
	}
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
