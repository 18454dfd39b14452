package nbd

import "sync/atomic"

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
}

// counters are the server's live numbers, written without a lock.
type counters struct {
	connectionsTotal, connectionsRefused, handshakesFailed atomic.Uint64
	connectionsDisplaced                                   atomic.Uint64
	tlsFailed, tlsMissing, listsRefused                    atomic.Uint64
	exportsUnknown, exportsForbidden                       atomic.Uint64
	exportsUnavailable, exportsFull, stalled, idle         atomic.Uint64

	inFlight atomic.Int64
	commands [len(commandSlots)]struct{ requests, errors, bytes atomic.Uint64 }
	errnos   [len(errnoSlots)]atomic.Uint64
}

// The slots of counters; what is in no slot is counted in slot 0.
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

// finished counts the answer to r.
func (cs *counters) finished(r *request) {
	cmd := &cs.commands[slot(commandSlots[:], r.cmd)]
	cmd.requests.Add(1)
	if r.errno == 0 {
		cmd.bytes.Add(r.n)
		return
	}
	cmd.errors.Add(1)
	cs.errnos[slot(errnoSlots[:], r.errno)].Add(1)
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
		Errors:               make(map[Errno]uint64),
	}
	for i, dst := range []*CommandMetrics{&m.Unknown, &m.Read, &m.Write, &m.Flush, &m.Trim, &m.Cache, &m.WriteZeroes, &m.BlockStatus} {
		c := &cs.commands[i]
		*dst = CommandMetrics{c.requests.Load(), c.errors.Load(), c.bytes.Load()}
	}
	for i, e := range errnoSlots {
		if n := cs.errnos[i].Load(); n > 0 {
			m.Errors[e] = n
		}
	}
	return m
}
