package nbd

import (
	"sync/atomic"
	"time"
)

// Metrics is a snapshot of what a [Server] has done and is doing. Each number
// is exact; they are not of one instant.
type Metrics struct {
	Connections          int    `json:"connections"`           // open
	ConnectionsMax       int    `json:"connections_max"`       // the bound of Connections
	ConnectionsTotal     uint64 `json:"connections_total"`     // let in
	ConnectionsRefused   uint64 `json:"connections_refused"`   // not let in
	ConnectionsDisplaced uint64 `json:"connections_displaced"` // ended in the handshake to make room for others
	HandshakesFailed     uint64 `json:"handshakes_failed"`
	ConnectionsStalled   uint64 `json:"connections_stalled"` // cut off for taking too long, handshakes included
	ConnectionsIdle      uint64 `json:"connections_idle"`    // cut off for wanting nothing
	TLSFailed            uint64 `json:"tls_failed"`          // of HandshakesFailed, in TLS: no certificate, a wrong one, another protocol
	TLSMissing           uint64 `json:"tls_missing"`         // options refused since they came without TLS
	ListsRefused         uint64 `json:"lists_refused"`       // since listing is off
	ExportsUnknown       uint64 `json:"exports_unknown"`     // asked for and not there
	ExportsForbidden     uint64 `json:"exports_forbidden"`   // refused to clients that they are not for
	ExportsUnavailable   uint64 `json:"exports_unavailable"` // could not be opened
	ExportsFull          uint64 `json:"exports_full"`        // refused since they had enough clients

	RequestsInFlight int64 `json:"requests_in_flight"` // admitted, reply not yet sent; over all connections
	RequestsMax      int   `json:"requests_max"`       // the bound for each connection

	BytesInFlight uint64 `json:"bytes_in_flight"` // what requests in flight count for, payload above all; over all connections
	BytesMax      uint64 `json:"bytes_max"`       // the bound of BytesInFlight

	// Those of all exports together.
	Requests
	// Exports are those that are served, in the order of Options.Exports.
	Exports []ExportMetrics `json:"exports"`
}

// ExportMetrics are what a [Server] has done for the clients of one export.
type ExportMetrics struct {
	Name        string `json:"name"`
	Connections int64  `json:"connections"` // that use it
	Requests
}

// Requests count what has been answered.
type Requests struct {
	Read        CommandMetrics `json:"read"`
	Write       CommandMetrics `json:"write"`
	Flush       CommandMetrics `json:"flush"`
	Trim        CommandMetrics `json:"trim"`
	Cache       CommandMetrics `json:"cache"`
	WriteZeroes CommandMetrics `json:"write_zeroes"`
	BlockStatus CommandMetrics `json:"block_status"`
	Unknown     CommandMetrics `json:"unknown"`

	// Errors are the errors answered, by number.
	Errors map[Errno]uint64 `json:"errors"`
}

// commands are the fields of r in the order of commandSlots.
func (r *Requests) commands() [len(commandSlots)]*CommandMetrics {
	return [...]*CommandMetrics{&r.Unknown, &r.Read, &r.Write, &r.Flush, &r.Trim, &r.Cache, &r.WriteZeroes, &r.BlockStatus}
}

// Refusals is how many times clients did not get what they asked for, before any
// request.
func (m *Metrics) Refusals() uint64 {
	return m.ConnectionsRefused + m.ConnectionsDisplaced + m.TLSFailed + m.TLSMissing + m.ListsRefused +
		m.ExportsUnknown + m.ExportsForbidden + m.ExportsUnavailable + m.ExportsFull
}

// CommandMetrics count the requests of one command that have been answered.
type CommandMetrics struct {
	Requests uint64 `json:"requests"` // errors included
	Errors   uint64 `json:"errors"`
	Bytes    uint64 `json:"bytes"` // lengths of those that succeeded
	// Latency is that of all Requests, from the arrival of the header until the
	// answer was ready to be sent: with the wait for room and memory, the receipt of
	// a payload, and the backend, and without the sending, for which a client may
	// take its time.
	Latency Latency `json:"latency"`
}

// Latency is how long requests have taken.
type Latency struct {
	Sum time.Duration `json:"sum_ns"`
	// Buckets are how many took at most as long as the [LatencyBounds] of the same
	// index, and longer than the one before; the last, how many took longer than all.
	Buckets [len(LatencyBounds) + 1]uint64 `json:"buckets"`
}

// LatencyBounds are the bounds between the buckets of a [Latency], ascending. They
// must not be changed.
var LatencyBounds = [...]time.Duration{
	10 * time.Microsecond, 20 * time.Microsecond, 50 * time.Microsecond,
	100 * time.Microsecond, 200 * time.Microsecond, 500 * time.Microsecond,
	1 * time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond,
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	1 * time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
}

// counters are the server's live numbers, written without a lock.
type counters struct {
	connectionsTotal, connectionsRefused, handshakesFailed atomic.Uint64
	connectionsDisplaced                                   atomic.Uint64
	tlsFailed, tlsMissing, listsRefused                    atomic.Uint64
	exportsUnknown, exportsForbidden                       atomic.Uint64
	exportsUnavailable, exportsFull, stalled, idle         atomic.Uint64

	inFlight atomic.Int64
}

// requestCounters are the live numbers of Requests, written without a lock.
type requestCounters struct {
	commands [len(commandSlots)]struct {
		errors, bytes atomic.Uint64
		nanoseconds   atomic.Int64
		latency       [len(LatencyBounds) + 1]atomic.Uint64 // their sum is the number of requests
	}
	errnos [len(errnoSlots)]atomic.Uint64
}

// The slots of requestCounters; what is in no slot is counted in slot 0.
var (
	commandSlots = [...]Command{0xffff, CmdRead, CmdWrite, CmdFlush, CmdTrim, CmdCache, CmdWriteZeroes, CmdBlockStatus}
	errnoSlots   = [...]Errno{EIO, EPERM, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN}
)

func slot[T comparable](slots []T, v T) int {
	for i, s := range slots {
		if s == v {
			return i
		}
	}
	return 0
}

// finished counts the answer to r, which has taken so long.
func (rc *requestCounters) finished(r *request, took time.Duration) {
	cmd := &rc.commands[slot(commandSlots[:], r.cmd)]
	bucket := 0
	for bucket < len(LatencyBounds) && took > LatencyBounds[bucket] {
		bucket++
	}
	cmd.latency[bucket].Add(1)
	cmd.nanoseconds.Add(int64(took))
	if r.errno == 0 {
		cmd.bytes.Add(r.n)
		return
	}
	cmd.errors.Add(1)
	rc.errnos[slot(errnoSlots[:], r.errno)].Add(1)
}

// addTo adds what is counted to r.
func (rc *requestCounters) addTo(r *Requests) {
	for i, dst := range r.commands() {
		c := &rc.commands[i]
		dst.Errors += c.errors.Load()
		dst.Bytes += c.bytes.Load()
		dst.Latency.Sum += time.Duration(c.nanoseconds.Load())
		for b := range c.latency {
			n := c.latency[b].Load()
			dst.Latency.Buckets[b] += n
			dst.Requests += n
		}
	}
	for i, e := range errnoSlots {
		if n := rc.errnos[i].Load(); n > 0 {
			r.Errors[e] += n
		}
	}
}

// Metrics returns a snapshot.
func (s *Server) Metrics() Metrics {
	cs := &s.counters
	s.mu.Lock()
	open := len(s.mu.conns)
	s.mu.Unlock()
	m := Metrics{
		Connections:          open,
		ConnectionsMax:       s.opts.ConnectionsMax,
		ConnectionsTotal:     cs.connectionsTotal.Load(),
		ConnectionsRefused:   cs.connectionsRefused.Load(),
		ConnectionsDisplaced: cs.connectionsDisplaced.Load(),
		HandshakesFailed:     cs.handshakesFailed.Load(),
		ConnectionsStalled:   cs.stalled.Load(),
		ConnectionsIdle:      cs.idle.Load(),
		TLSFailed:            cs.tlsFailed.Load(),
		TLSMissing:           cs.tlsMissing.Load(),
		ListsRefused:         cs.listsRefused.Load(),
		ExportsUnknown:       cs.exportsUnknown.Load(),
		ExportsForbidden:     cs.exportsForbidden.Load(),
		ExportsUnavailable:   cs.exportsUnavailable.Load(),
		ExportsFull:          cs.exportsFull.Load(),
		RequestsInFlight:     cs.inFlight.Load(),
		RequestsMax:          s.opts.RequestsMax,
		BytesInFlight:        s.budget.used(),
		BytesMax:             s.opts.BytesMax,
		Requests:             Requests{Errors: make(map[Errno]uint64)},
	}
	for i := range s.opts.Exports {
		e := s.exports[s.opts.Exports[i].Name]
		own := ExportMetrics{Name: e.Name, Connections: e.clients.Load(), Requests: Requests{Errors: make(map[Errno]uint64)}}
		e.counters.addTo(&own.Requests)
		m.Exports = append(m.Exports, own)
		e.counters.addTo(&m.Requests)
	}
	return m
}
