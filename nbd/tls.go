package nbd

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tlsRecordBytes is the most that a TLS record holds (RFC 8446, section 5.1).
const tlsRecordBytes = 16 << 10

var (
	errTLSRequired  = errors.New("nbd: client goes without TLS, which is required")
	errTLSPipelined = errors.New("nbd: client sent on before STARTTLS was answered")
	errTLS          = errors.New("nbd: TLS handshake")
	errExportTLS    = errors.New("nbd: export needs TLS")
	errNotAllowed   = errors.New("nbd: export is not for this client")
)

// A link is the way to a client: its socket, and TLS on it once that is agreed on.
// What is embedded is the socket, so deadlines, addresses and Close are those of it.
type link struct {
	net.Conn
	tls *tls.Conn     // nil: none; set in the handshake, before anybody else sends
	out *bufio.Writer // to tls: gathers segments into whole records

	raw syscall.RawConn // of the socket; nil if it has no descriptor

	// The state of tryWritev, so that none allocates.
	iov       []unix.Iovec
	writevFn  func(fd uintptr)
	writevN   int
	writevErr syscall.Errno
}

// newLink returns the link of a client without TLS.
func newLink(nc net.Conn) link {
	l := link{Conn: nc}
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			l.raw = raw
		}
	}
	return l
}

// Write sends p.
func (l *link) Write(p []byte) (int, error) {
	if l.tls != nil {
		return l.tls.Write(p)
	}
	return l.Conn.Write(p)
}

// writev sends iov, and may change it.
func (l *link) writev(iov *net.Buffers) error {
	if l.tls == nil {
		_, err := iov.WriteTo(l.Conn)
		return err
	}
	for _, b := range *iov {
		if _, err := l.out.Write(b); err != nil {
			return err
		}
	}
	return l.out.Flush()
}

// tryWritev sends of iov, which it may change, what the socket takes at once, and
// leaves the rest in it. It reports whether that is nothing. Deadlines do not matter.
func (l *link) tryWritev(iov *net.Buffers) (done bool, err error) {
	if l.tls != nil || l.raw == nil {
		return false, nil
	}
	if l.writevFn == nil {
		l.writevFn = func(fd uintptr) {
			for {
				n, _, errno := unix.Syscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&l.iov[0])), uintptr(len(l.iov)))
				if l.writevN, l.writevErr = int(n), errno; errno != unix.EINTR {
					return
				}
			}
		}
	}
	for len(*iov) > 0 {
		l.iov = l.iov[:0]
		for _, b := range (*iov)[:min(len(*iov), iovMax)] {
			l.iov = appendIovec(l.iov, b)
		}
		err := l.raw.Control(l.writevFn)
		clear(l.iov) // the memory is only borrowed
		switch {
		case err != nil:
			return false, err
		case l.writevErr == unix.EAGAIN:
			return false, nil
		case l.writevErr != 0:
			return false, os.NewSyscallError("writev", l.writevErr)
		}
		consume(iov, l.writevN)
	}
	return true, nil
}

// consume takes the first n bytes away from iov.
func consume(iov *net.Buffers, n int) {
	for len(*iov) > 0 && n >= len((*iov)[0]) {
		n -= len((*iov)[0])
		(*iov)[0] = nil
		*iov = (*iov)[1:]
	}
	if n > 0 {
		(*iov)[0] = (*iov)[0][n:]
	}
}

// CloseWrite tells the client that nothing more comes.
func (l *link) CloseWrite() error {
	if l.tls != nil {
		if err := l.tls.CloseWrite(); err != nil {
			return err
		}
	}
	half, ok := l.Conn.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}

// startTLS answers STARTTLS and, if it is granted, lets TLS begin. Nothing that
// was said before it counts any more: somebody between may have said it.
func (c *conn) startTLS(data []byte) error {
	switch {
	case c.s.opts.TLS == nil:
		return c.refuse(optStartTLS, repErrPolicy, "no TLS here")
	case c.nc.tls != nil:
		return c.refuse(optStartTLS, repErrInvalid, "TLS has begun already")
	case len(data) != 0:
		return c.refuse(optStartTLS, repErrInvalid, "STARTTLS takes no data")
	case c.in.buffered() != 0:
		return errTLSPipelined
	}
	if _, err := c.nc.Write(appendOptReply(nil, optStartTLS, repAck, nil)); err != nil {
		return err
	}
	tc := tls.Server(c.nc.Conn, c.s.opts.TLS)
	if err := c.in.startTLS(tc); err != nil {
		if errors.Is(err, errStopped) {
			return err
		}
		c.s.counters.tlsFailed.Add(1)
		return fmt.Errorf("%w: %w", errTLS, err)
	}
	c.nc.tls, c.nc.out = tc, bufio.NewWriterSize(tc, tlsRecordBytes)
	c.export, c.agreed = nil, agreement{}
	if st := tc.ConnectionState(); len(st.VerifiedChains) > 0 {
		c.names = certificateNames(st.PeerCertificates[0])
		if !c.s.settle(c) {
			return errDisplaced
		}
	}
	return nil
}

// certificateNames are the names that cert vouches for: the common name, and the
// alternative names of every kind.
func certificateNames(cert *x509.Certificate) []string {
	var names []string
	if cn := cert.Subject.CommonName; cn != "" {
		names = append(names, cn)
	}
	names = append(names, cert.DNSNames...)
	names = append(names, cert.EmailAddresses...)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	return names
}

// admits reports whether the client may use e.
func (c *conn) admits(e *Export) bool {
	return len(e.Allow) == 0 || slices.ContainsFunc(c.names, func(n string) bool { return slices.Contains(e.Allow, n) })
}

// tlsName describes the protection of the connection and who is at the other end
// of it, both empty without TLS.
func (c *conn) tlsName() (version, client string) {
	if c.nc.tls == nil {
		return "", ""
	}
	if len(c.names) > 0 {
		client = c.names[0]
	}
	return tls.VersionName(c.nc.tls.ConnectionState().Version), client
}
