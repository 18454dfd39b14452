package nbd

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"
)

// ErrServerClosed is returned by [Server.Serve] after Shutdown or Close.
var ErrServerClosed = errors.New("nbd: server closed")

var (
	errTooManyConnections = errors.New("nbd: too many connections")
	errDisplaced          = errors.New("nbd: too slow in the handshake, with too many connections")
)

// An Export is a backend under the name by which clients ask for it.
type Export struct {
	// Name is what clients ask for. The empty name is the export of clients
	// that ask for none.
	Name string
	// Description is shown to people who list the exports. May be empty.
	Description string
	// Backend is the disk; nil with Open.
	Backend Backend

	// Open returns the disk to a client that asks for the export, when Backend
	// is nil. It is called for each, concurrently; the first may open what the
	// others share, and the one that made it closes it, after the server has
	// ended. It may take its time, which is not the client's, until ctx ends.
	// With an error the client is told that the export is not available.
	Open func(ctx context.Context) (Backend, error)

	// About tells clients that ask, by [About], what the server has to say of the
	// export for programs: a few short texts. It is called concurrently, and before
	// Open too. May be nil.
	About func() []string

	// ConnectionsMax bounds the clients that use the export; further ones are
	// refused. 0: no bound but that of the server.
	ConnectionsMax int

	// Allow are the names of the clients that may use it: the common name or
	// an alternative name in a certificate that was verified under TLS, exactly.
	// Empty: every client may.
	Allow []string
}

// Options configure a [Server].
type Options struct {
	// Exports are what is served: at least one, with distinct names.
	Exports []Export

	// ConnectionsMax bounds the connections. A further one takes the place of the
	// one that has been in its handshake for longest, so that whoever just
	// connects and waits keeps nobody out; a client that has shown a certificate
	// or has its export keeps its place. When all have, it is closed as soon as
	// it is accepted. Default 256.
	ConnectionsMax int

	// RequestsMax bounds the requests in flight on each connection. Default 128.
	RequestsMax int

	// PayloadBytesMax is the longest READ or WRITE, in bytes; longer ones are
	// answered with EINVAL. A power of two, from 64 KiB to 1 GiB. Default 32 MiB,
	// which every client may assume.
	PayloadBytesMax uint32

	// BytesMax bounds the payload in flight on all connections together, in
	// bytes: data of reads not yet taken by the client, and of writes not yet
	// done, counted in blocks of 4096 bytes. A request without data counts as one
	// block, so this bounds the requests of all connections as well. PayloadBytesMax of it are for one
	// long request at a time, a quarter is divided among ConnectionsMax
	// connections, the rest is for those who come; so clients that do not read
	// or send on cannot keep the others out. At least, and by default, twice
	// PayloadBytesMax.
	BytesMax uint64

	// HandshakeTimeout bounds the handshake. Default 10 s.
	HandshakeTimeout time.Duration

	// StallTimeout is how long a client may take to send the rest of a header,
	// to send a payload, or to take what is sent to it at once (the replies that
	// are ready, up to 1 MiB, or one), before it is cut off. It is what ends the
	// claim of a stopped client on memory. Default 5 min, in which 1 Mbit/s moves
	// the longest payload; negative means no limit.
	StallTimeout time.Duration

	// DefaultExport is the name of the export for clients that ask for none.
	// Default: the one with the empty name, if there is one.
	DefaultExport string

	// ListOff refuses to list the exports.
	ListOff bool

	// TLS is offered to clients; nil means that there is none. See
	// [Certificates] for one that follows the files it was read from.
	TLS *tls.Config

	// TLSRequired refuses everything to clients that do not use TLS.
	TLSRequired bool

	// IdleTimeout is how long a client may want nothing before it is cut off; the
	// Linux client does not mind only with its option for persistence. It is at
	// least this long and at most twice that. Default 0: for ever.
	IdleTimeout time.Duration

	// BusyPoll is how long the server looks for the next request of a client that has
	// none in flight, before it sleeps: on many machines, virtual ones most of all,
	// waking up takes longer than a small request. It does so for one client at a
	// time, while no other wants anything, and only as long as clients are that
	// quick; meanwhile it uses a processor, for which others have to wait when all
	// are busy. With a single one it never does. At most 1 ms; default 50 us; negative means never.
	BusyPoll time.Duration

	// Log is called for what operators may want to know; nil means nobody
	// does. It is called concurrently, from the goroutine that has the event,
	// and must not block.
	Log func(Event)
}

func (o Options) withDefaults() Options {
	setDefault(&o.ConnectionsMax, 256)
	setDefault(&o.RequestsMax, 128)
	setDefault(&o.PayloadBytesMax, 32<<20)
	setDefault(&o.BytesMax, 2*uint64(o.PayloadBytesMax))
	setDefault(&o.HandshakeTimeout, 10*time.Second)
	setDefault(&o.StallTimeout, 5*time.Minute)
	setDefault(&o.BusyPoll, busyPollDefault)
	return o
}

func setDefault[T comparable](p *T, v T) {
	if *p == *new(T) {
		*p = v
	}
}

// Validate reports all faults of o together. Zero values mean defaults and are
// no faults.
func (o Options) Validate() error {
	o = o.withDefaults()
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf("nbd: "+format, args...)) }
	if len(o.Exports) == 0 {
		fault("no exports")
	}
	seen := make(map[string]bool)
	for i, e := range o.Exports {
		if err := checkString(e.Name); err != nil {
			fault("export %d: name: %w", i, err)
		}
		if err := checkString(e.Description); err != nil {
			fault("export %q: description: %w", e.Name, err)
		}
		if (e.Backend == nil) == (e.Open == nil) {
			fault("export %q: want either Backend or Open", e.Name)
		}
		if e.ConnectionsMax < 0 {
			fault("export %q: ConnectionsMax %d is negative", e.Name, e.ConnectionsMax)
		}
		if len(e.Allow) > 0 && o.TLS == nil {
			fault("export %q: Allow without TLS", e.Name)
		}
		if seen[e.Name] {
			fault("export %q: exists twice", e.Name)
		}
		seen[e.Name] = true
	}
	if d := o.DefaultExport; d != "" {
		if !seen[d] {
			fault("DefaultExport %q is no export", d)
		} else if seen[""] {
			fault("DefaultExport %q, and an export with the empty name", d)
		}
	}
	if o.ConnectionsMax < 1 {
		fault("ConnectionsMax %d is not positive", o.ConnectionsMax)
	}
	if o.RequestsMax < 1 {
		fault("RequestsMax %d is not positive", o.RequestsMax)
	}
	if p := o.PayloadBytesMax; p < 64<<10 || p > 1<<30 || p&(p-1) != 0 {
		fault("PayloadBytesMax %d is not a power of two from 64 KiB to 1 GiB", p)
	}
	if o.BytesMax < 2*uint64(o.PayloadBytesMax) {
		fault("BytesMax %d is less than twice PayloadBytesMax %d", o.BytesMax, o.PayloadBytesMax)
	}
	if o.IdleTimeout < 0 {
		fault("IdleTimeout %v is negative", o.IdleTimeout)
	}
	if o.BusyPoll > busyPollMax {
		fault("BusyPoll %v is more than %v", o.BusyPoll, busyPollMax)
	}
	if o.HandshakeTimeout < 0 {
		fault("HandshakeTimeout %v is negative", o.HandshakeTimeout)
	}
	if o.TLSRequired && o.TLS == nil {
		fault("TLS is required, and there is none")
	}
	return errors.Join(faults...)
}

// checkString checks s against the document's rules for strings.
func checkString(s string) error {
	if len(s) > stringBytesMax {
		return fmt.Errorf("longer than %d bytes", stringBytesMax)
	}
	if !utf8.ValidString(s) || strings.IndexByte(s, 0) >= 0 {
		return fmt.Errorf("%.64q is not UTF-8 without NUL", s)
	}
	return nil
}

// An EventKind says what happened.
type EventKind int

const (
	EventOpen          EventKind = iota + 1 // a handshake has ended with an export
	EventClose                              // a connection has ended; Err tells why, nil is in good order
	EventRefused                            // a connection, or the first export that it asked for in vain, with Err
	EventRequestFailed                      // the backend failed a request with Err
	EventAcceptFailing                      // accepting fails for now, with Err; it is tried again
)

// An Event is what [Options.Log] is told. Fields that do not apply are zero.
type Event struct {
	Kind   EventKind
	Conn   uint64 // number of the connection, from 1
	Remote string // address of the client; often empty for a unix socket
	Export string
	Err    error

	// Of EventOpen.
	TLS    string // version, such as "TLS 1.3"; empty without TLS
	Client string // first name in the client's verified certificate

	// Of EventRequestFailed.
	Command Command
	Offset  uint64
	Length  uint64
}

// A namedExport is an export of a running server.
type namedExport struct {
	*Export               // in Options.Exports
	clients  atomic.Int64 // that use it
	counters requestCounters
}

// A Server serves exports to any number of connections, from any number of
// listeners. All methods may be called concurrently.
type Server struct {
	opts    Options                 // immutable
	exports map[string]*namedExport // immutable, by the names that clients may ask for

	budget    budget
	turns     turns
	poller    poller
	reliever  reliever
	relieving sync.Once
	counters  counters

	mu struct {
		sync.Mutex
		stopping  bool
		listeners map[net.Listener]struct{}
		conns     map[*conn]struct{}
		shaking   list.List // of the *conn that may be displaced, in the order of their coming
		displaced int       // of conns that have lost their places, and end
		connID    uint64
	}
	stopping chan struct{} // closed when mu.stopping is set
	idle     chan struct{} // closed when, after that, mu.conns is empty
}

// NewServer returns a server for opts. It starts nothing.
func NewServer(opts Options) (*Server, error) {
	if err := opts.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		opts:     opts.withDefaults(),
		exports:  make(map[string]*namedExport),
		stopping: make(chan struct{}),
		idle:     make(chan struct{}),
	}
	if err := s.turns.init(); err != nil {
		return nil, err
	}
	s.poller.inFlight = &s.counters.inFlight
	if min(runtime.NumCPU(), runtime.GOMAXPROCS(0)) > 1 {
		s.poller.limit = s.opts.BusyPoll
	}
	s.reliever.wake = make(chan struct{}, 1)
	s.budget.init(s.opts.BytesMax, uint64(s.opts.PayloadBytesMax), s.opts.ConnectionsMax)
	s.opts.Exports = append([]Export(nil), opts.Exports...)
	for i := range s.opts.Exports {
		s.exports[s.opts.Exports[i].Name] = &namedExport{Export: &s.opts.Exports[i]}
	}
	if e := s.exports[s.opts.DefaultExport]; e != nil {
		s.exports[""] = e
	}
	s.mu.listeners = make(map[net.Listener]struct{})
	s.mu.conns = make(map[*conn]struct{})
	return s, nil
}

// Serve accepts connections from l and serves them until Shutdown or Close, and
// then returns [ErrServerClosed]; or until accepting fails for good. It owns l
// and has closed it when it returns; connections may outlive it.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.mu.stopping {
		s.mu.Unlock()
		return ErrServerClosed
	}
	s.mu.listeners[l] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.mu.listeners, l)
		s.mu.Unlock()
	}()

	const delayMin, delayMax = 5 * time.Millisecond, time.Second
	delay := delayMin
	for {
		nc, err := l.Accept()
		if err == nil {
			delay = delayMin
			if a, ok := l.(*abstractListener); ok {
				err = a.permits(nc)
			}
			s.start(nc, err)
			continue
		}
		select {
		case <-s.stopping:
			return ErrServerClosed
		default:
		}
		if !acceptAgain(err) {
			return fmt.Errorf("nbd: accept: %w", err)
		}
		s.log(Event{Kind: EventAcceptFailing, Err: err})
		select {
		case <-time.After(delay):
			delay = min(2*delay, delayMax)
		case <-s.stopping:
			return ErrServerClosed
		}
	}
}

// acceptAgain reports whether accepting may succeed later: the host is short of
// something, or it is an error of the client's connection, which Linux passes on
// (accept(2) lists them).
func acceptAgain(err error) bool {
	for _, n := range []syscall.Errno{
		syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EINTR,
		syscall.EPERM, syscall.EPROTO, syscall.ENOPROTOOPT, syscall.ENETDOWN, syscall.ENETUNREACH,
		syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENONET, syscall.ETIMEDOUT,
	} {
		if errors.Is(err, n) {
			return true
		}
	}
	return false
}

// start serves nc on a goroutine of its own, if there is room for it and no
// reason not to.
func (s *Server) start(nc net.Conn, reason error) {
	s.mu.Lock()
	var c, slow *conn
	stopping := s.mu.stopping
	if !stopping && reason == nil && len(s.mu.conns)-s.mu.displaced >= s.opts.ConnectionsMax {
		if e := s.mu.shaking.Front(); e != nil {
			slow = e.Value.(*conn)
			s.mu.shaking.Remove(e)
			slow.shaking = nil
			slow.displaced = true
			s.mu.displaced++
		} else {
			reason = errTooManyConnections
		}
	}
	if !stopping && reason == nil {
		c = newConn(s, nc)
		s.mu.connID++
		c.id = s.mu.connID
		s.mu.conns[c] = struct{}{}
		c.shaking = s.mu.shaking.PushBack(c)
	}
	s.mu.Unlock()
	if slow != nil {
		s.counters.connectionsDisplaced.Add(1)
		slow.fail(errDisplaced)
	}
	if c == nil {
		if !stopping {
			s.counters.connectionsRefused.Add(1)
			s.log(Event{Kind: EventRefused, Remote: remoteOf(nc), Err: reason})
		}
		nc.Close()
		return
	}
	s.counters.connectionsTotal.Add(1)
	go pprof.Do(c.ctx, pprof.Labels("nbd", "connection"), func(context.Context) {
		s.ended(c, c.serve())
	})
}

// settle gives c its place for good; false means that it has been displaced.
func (s *Server) settle(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.shaking != nil {
		s.mu.shaking.Remove(c.shaking)
		c.shaking = nil
	}
	return !c.displaced
}

// ended forgets c.
func (s *Server) ended(c *conn, err error) {
	e := Event{Kind: EventClose, Conn: c.id, Remote: remoteOf(c.nc.Conn), Err: err}
	if c.export != nil {
		e.Export = c.export.Name
	}
	s.log(e)
	s.settle(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.mu.conns, c)
	if c.displaced {
		s.mu.displaced--
	}
	if s.mu.stopping && len(s.mu.conns) == 0 {
		s.end()
	}
}

// end is the end of the last connection. REQUIRES: s.mu held.
func (s *Server) end() {
	s.turns.close()
	close(s.idle)
}

// stop closes the listeners and, in good order, the connections.
func (s *Server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.stopping {
		return
	}
	s.mu.stopping = true
	close(s.stopping)
	for l := range s.mu.listeners {
		l.Close()
	}
	for c := range s.mu.conns {
		c.in.stop()
	}
	if len(s.mu.conns) == 0 {
		s.end()
	}
}

// Shutdown ends the server in good order: it accepts no connection any more, executes
// what clients have sent and send, and holds the answers back. When a client has sent
// nothing for 20 ms, and all is executed, it is kept from sending more, as far as a unix
// socket can, gets its answers, and its connection is closed. One that sends without a
// pause for a second, whatever it waits for, may lose answers, and so may one over TCP
// that sends in just that moment. When ctx ends before that it does what Close does, and returns
// the error of ctx. It does not flush any backend.
func (s *Server) Shutdown(ctx context.Context) error {
	s.stop()
	select {
	case <-s.idle:
		return nil
	case <-ctx.Done():
		s.Close()
		return ctx.Err()
	}
}

// Close ends the server at once: connections are closed and the contexts of the
// requests in flight are cancelled. It returns when no connection uses a backend
// any more. The error is always nil.
func (s *Server) Close() error {
	s.stop()
	s.mu.Lock()
	for c := range s.mu.conns {
		c.fail(ErrServerClosed)
	}
	s.mu.Unlock()
	<-s.idle
	return nil
}

func (s *Server) log(e Event) {
	if s.opts.Log != nil {
		s.opts.Log(e)
	}
}

// remoteOf is the address of nc's client, empty if it has none.
func remoteOf(nc net.Conn) string {
	if a := nc.RemoteAddr(); a != nil && a.String() != "@" {
		return a.String()
	}
	return ""
}
