package monitor

import (
	"context"
	"runtime"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/nbd"
	"cnbd/store"
)

// A family is a metric that is read from a T.
type family[T any] struct {
	name   string
	labels []string // beside export, which all have that are read from an export
	help   string
	read   func(v *T, put putter)

	desc *prometheus.Desc
	kind prometheus.ValueType
}

// A putter takes one value of a family, with the values of its labels.
type putter func(v float64, labels ...string)

// counter and gauge are families; a counter's name ends in _total.
func counter[T any](name, help string, read func(*T, putter), labels ...string) *family[T] {
	return &family[T]{name: name, help: help, read: read, labels: labels, kind: prometheus.CounterValue}
}

func gauge[T any](name, help string, read func(*T, putter), labels ...string) *family[T] {
	return &family[T]{name: name, help: help, read: read, labels: labels, kind: prometheus.GaugeValue}
}

// one is the only value of a family without labels of its own.
func one[T any, N int | int64 | uint32 | uint64 | float64](get func(*T) N) func(*T, putter) {
	return func(v *T, put putter) { put(float64(get(v))) }
}

// truth is 1 or 0.
func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

type (
	server  = nbd.Metrics
	clients = nbd.ExportMetrics
	status  = device.Status
)

// commands are those of r, by the value of the label.
func commands(r *nbd.Requests) map[string]*nbd.CommandMetrics {
	return map[string]*nbd.CommandMetrics{
		"read": &r.Read, "write": &r.Write, "flush": &r.Flush, "trim": &r.Trim,
		"cache": &r.Cache, "write_zeroes": &r.WriteZeroes, "block_status": &r.BlockStatus, "unknown": &r.Unknown,
	}
}

// errnos are all that a request can be answered with. Each is told from the start: a
// counter that comes up as 6 has not risen, for Prometheus, and no alert sees it.
var errnos = []nbd.Errno{nbd.EPERM, nbd.EIO, nbd.ENOMEM, nbd.EINVAL, nbd.ENOSPC, nbd.EOVERFLOW, nbd.ENOTSUP, nbd.ESHUTDOWN}

// ofServer are the families of the NBD server as a whole.
var ofServer = []*family[server]{
	gauge("cnbd_connections", "Connections that are open, handshakes included.", one(func(m *server) int { return m.Connections })),
	gauge("cnbd_connections_limit", "Connections that may be open (connections-max).", one(func(m *server) int { return m.ConnectionsMax })),
	counter("cnbd_connections_accepted_total", "Connections that were let in.", one(func(m *server) uint64 { return m.ConnectionsTotal })),
	counter("cnbd_connections_cut_total", "Connections that the server has ended since the client stalled, or was idle for longer than idle-timeout.",
		func(m *server, put putter) {
			put(float64(m.ConnectionsStalled), "stalled")
			put(float64(m.ConnectionsIdle), "idle")
		}, "reason"),
	counter("cnbd_handshakes_failed_total", "Connections that ended before the client had its export.", one(func(m *server) uint64 { return m.HandshakesFailed })),
	counter("cnbd_refusals_total", "What clients asked for and did not get, before any request: a connection (connections: too many, displaced: it was too slow in its handshake), TLS (tls_failed, tls_missing), a list of exports (list), an export (export_unknown, export_forbidden, export_unavailable, export_full).",
		func(m *server, put putter) {
			put(float64(m.ConnectionsRefused), "connections")
			put(float64(m.ConnectionsDisplaced), "displaced")
			put(float64(m.TLSFailed), "tls_failed")
			put(float64(m.TLSMissing), "tls_missing")
			put(float64(m.ListsRefused), "list")
			put(float64(m.ExportsUnknown), "export_unknown")
			put(float64(m.ExportsForbidden), "export_forbidden")
			put(float64(m.ExportsUnavailable), "export_unavailable")
			put(float64(m.ExportsFull), "export_full")
		}, "reason"),
	gauge("cnbd_requests_in_flight", "Requests that were received and whose answers are not sent yet.", one(func(m *server) int64 { return m.RequestsInFlight })),
	gauge("cnbd_connection_requests_limit", "Requests that may be in flight on one connection (requests-max).", one(func(m *server) int { return m.RequestsMax })),
	gauge("cnbd_payload_bytes", "Memory that requests in flight count for.", one(func(m *server) uint64 { return m.BytesInFlight })),
	gauge("cnbd_payload_limit_bytes", "Bound of cnbd_payload_bytes (payload); where it is reached, requests wait.", one(func(m *server) uint64 { return m.BytesMax })),
}

// ofClients are the families of an export's clients.
var ofClients = []*family[clients]{
	gauge("cnbd_export_connections", "Clients that use the export.", one(func(m *clients) int64 { return m.Connections })),
	counter("cnbd_request_errors_total", "Requests that were answered with an error.", func(m *clients, put putter) {
		for name, c := range commands(&m.Requests) {
			put(float64(c.Errors), name)
		}
	}, "command"),
	counter("cnbd_error_answers_total", "The same by the error number that was answered.", func(m *clients, put putter) {
		for _, e := range errnos {
			put(float64(m.Errors[e]), strings.TrimPrefix(e.Error(), "nbd: "))
		}
	}, "errno"),
	counter("cnbd_request_bytes_total", "Length of the requests that succeeded: what was read, written, trimmed.", func(m *clients, put putter) {
		for name, c := range commands(&m.Requests) {
			if name != "flush" && name != "unknown" { // they have no length
				put(float64(c.Bytes), name)
			}
		}
	}, "command"),
}

// durations is the one histogram.
var durations = &family[clients]{
	name: "cnbd_request_duration_seconds", labels: []string{"command"},
	help: "Time from the arrival of a request's header until its answer was ready, with the receipt of a payload and every wait for memory and space, without the sending. Its count is that of the requests.",
}

// ofStatus are the families of an export's device and store.
var ofStatus = []*family[status]{
	gauge("cnbd_device_size_bytes", "Size of the device.", one(func(s *status) uint64 { return s.DeviceSize })),
	gauge("cnbd_device_info", "Always 1; tells what the store was made as.", func(s *status, put putter) {
		put(1, s.UUID, s.Codec)
	}, "uuid", "codec"),

	// Space.
	gauge("cnbd_store_capacity_bytes", "What the store may take of its backing.", one(func(s *status) uint64 { return s.Capacity })),
	gauge("cnbd_store_data_bytes", "Data that is stored: blocks that are not holes.", one(func(s *status) uint64 { return s.Store.DataBytes })),
	gauge("cnbd_store_stored_bytes", "What that data takes, compressed.", one(func(s *status) uint64 { return s.Store.StoredBytes })),
	gauge("cnbd_store_compression_ratio", "Data by stored bytes; 0 while nothing is stored.", one(func(s *status) float64 { return s.Ratio })),
	gauge("cnbd_store_map_bytes", "What the map from blocks to places takes.", one(func(s *status) uint64 { return s.Store.MapBytes })),
	gauge("cnbd_store_map_nodes", "Nodes of the map.", one(func(s *status) uint64 { return s.Store.Nodes })),
	gauge("cnbd_store_extents", "Extents in the map.", one(func(s *status) uint64 { return s.Store.Extents })),
	gauge("cnbd_store_used_bytes", "Segments in use: live data, garbage, and the log behind the checkpoints.", one(func(s *status) uint64 { return s.Store.UsedBytes })),
	gauge("cnbd_store_free_bytes", "Segments that can be used.", one(func(s *status) uint64 { return s.Store.FreeBytes })),
	gauge("cnbd_store_garbage_bytes", "Dead part of the segments in use: what cleaning can win.", one(func(s *status) uint64 { return s.Store.GarbageBytes })),
	gauge("cnbd_store_reserved_bytes", "Promised to writes that were answered and are not stored yet.", one(func(s *status) uint64 { return s.Store.ReservedBytes })),
	gauge("cnbd_store_pending_trim_bytes", "Trimmed, and still to be taken out of the map.", one(func(s *status) uint64 { return s.Store.PendingTrims })),
	gauge("cnbd_store_host_bytes", "What the store takes on its host.", one(func(s *status) uint64 { return s.Store.HostBytes })),
	counter("cnbd_store_space_waits_total", "Times that writes had to wait for space to be cleaned.", one(func(s *status) uint64 { return s.Store.Shortages })),

	// Health.
	gauge("cnbd_store_failed", "1 if a write or sync of the backing has failed, so that the store refuses writes until the server is started anew.",
		one(func(s *status) float64 { return truth(s.Store.Failure != "") })),
	counter("cnbd_store_checksum_errors_total", "Stored bytes that did not verify when they were read.", one(func(s *status) uint64 { return s.Store.Corrupt })),
	gauge("cnbd_recovery_log_bytes", "Log that the last start has read.", one(func(s *status) uint64 { return s.Recovery.Bytes })),
	gauge("cnbd_recovery_records", "Records that the last start has applied.", one(func(s *status) uint64 { return s.Recovery.Records })),
	gauge("cnbd_recovery_dropped_records", "Records that the last start has dropped, since no commit closed them.", one(func(s *status) uint64 { return s.Recovery.Dropped })),
	gauge("cnbd_recovery_damaged_records", "Committed records that the last start could not read; their blocks are lost.", one(func(s *status) uint64 { return s.Recovery.Damaged })),
	gauge("cnbd_scrub_running", "1 while a scrub runs.", func(s *status, put putter) {
		put(truth(s.Scrub != nil && s.Scrub.Running))
	}),
	gauge("cnbd_scrub_problems", "What the newest scrub has found; not there before the first since the start.", ofScrub(func(r *store.ScrubReport) float64 {
		return float64(len(r.Problems) + r.More)
	})),
	gauge("cnbd_scrub_begun_timestamp_seconds", "When the newest scrub began, in seconds since 1970; not there before the first since the start.",
		ofScrub(func(r *store.ScrubReport) float64 { return float64(r.Began.UnixMilli()) / 1000 })),

	// The log.
	counter("cnbd_store_commits_total", "Commits: moments to which a crash can lead back.", one(func(s *status) uint64 { return s.Store.Commits })),
	counter("cnbd_store_syncs_total", "Syncs of the backing (fdatasync).", one(func(s *status) uint64 { return s.Store.Syncs })),
	counter("cnbd_store_checkpoints_total", "Checkpoints of the map.", one(func(s *status) uint64 { return s.Store.Checkpoints })),
	counter("cnbd_store_written_bytes_total", "Bytes written to the backing: data, map, copies of the cleaner. By the bytes that clients wrote it is the write amplification.", one(func(s *status) uint64 { return s.Store.LogWritten })),
	counter("cnbd_store_reads_total", "Stored extents read from the backing.", one(func(s *status) uint64 { return s.Store.Reads })),
	counter("cnbd_store_read_bytes_total", "Stored bytes of them.", one(func(s *status) uint64 { return s.Store.ReadBytes })),
	counter("cnbd_store_map_nodes_read_total", "Nodes of the map read from the backing.", one(func(s *status) uint64 { return s.Store.NodesRead })),
	gauge("cnbd_store_map_cache_bytes", "Nodes of the map in memory.", one(func(s *status) int64 { return s.Store.MapCacheBytes })),

	// Codec.
	counter("cnbd_codec_data_bytes_total", "Data that was encoded and stored, zeros left out, by clients and cleaner.", one(func(s *status) uint64 { return s.Store.BlobData })),
	counter("cnbd_codec_stored_bytes_total", "What it took. The rates of both give the ratio of what is written now.", one(func(s *status) uint64 { return s.Store.BlobStored })),
	counter("cnbd_codec_pieces_total", "Pieces of data written back, by result: compressed, raw (compressing was not worth it), zero (left out).", func(s *status, put putter) {
		put(float64(s.Writeback.Encoded), "compressed")
		put(float64(s.Writeback.Raw), "raw")
		put(float64(s.Writeback.Zero), "zero")
	}, "result"),
	counter("cnbd_codec_failures_total", "Pieces of work that were stored raw since the encoder failed.", one(func(s *status) uint64 { return s.Writeback.EncodeFailures })),
	counter("cnbd_codec_decodes_total", "Stored extents decoded for reads.", one(func(s *status) uint64 { return s.Reads.Decodes })),

	// Cleaner.
	counter("cnbd_cleaner_segments_total", "Segments that the cleaner has emptied.", one(func(s *status) uint64 { return s.Store.Cleaned })),
	counter("cnbd_cleaner_moved_bytes_total", "Stored bytes that it has copied for that.", one(func(s *status) uint64 { return s.Store.Moved })),
	counter("cnbd_cleaner_recompressed_bytes_total", "Data that was encoded anew while the device was idle.", one(func(s *status) uint64 { return s.Store.Recompressed })),

	// Cache and writeback.
	counter("cnbd_cache_lookups_total", "Blocks looked up for reads, by result: hit, hole (trimmed, not written back yet), wait (another reader had it on its way), miss.", func(s *status, put putter) {
		put(float64(s.Cache.Hits), "hit")
		put(float64(s.Cache.HoleHits), "hole")
		put(float64(s.Cache.FillWaits), "wait")
		put(float64(s.Cache.Misses), "miss")
	}, "result"),
	gauge("cnbd_cache_bytes", "Memory for pages, by state.", func(s *status, put putter) {
		put(blocks(s.Cache.Clean), "clean")
		put(blocks(s.Cache.Dirty), "dirty")
		put(blocks(s.Cache.Writeback), "writeback")
		put(blocks(s.Cache.Failed), "failed")
	}, "state"),
	gauge("cnbd_cache_limit_bytes", "Bound of the sum of cnbd_cache_bytes.", one(func(s *status) uint64 { return s.Cache.CacheMax.Bytes() })),
	counter("cnbd_cache_evictions_total", "Clean pages that had to make room.", one(func(s *status) uint64 { return s.Cache.Evictions })),
	gauge("cnbd_dirty_limit_bytes", "Dirty pages from which on writers wait (dirty-max).", one(func(s *status) uint64 { return s.Cache.DirtyMax.Bytes() })),
	gauge("cnbd_dirty_background_bytes", "Dirty pages from which on writeback runs (background).", one(func(s *status) uint64 { return s.Cache.Background.Bytes() })),
	gauge("cnbd_dirty_waiters", "Writers that wait because too much is dirty.", one(func(s *status) int64 { return s.Cache.DirtyWaiters })),
	gauge("cnbd_payload_waiters", "Requests of the export that wait for memory for their payload.", one(func(s *status) int64 { return s.Cache.PayloadWaiters })),
	counter("cnbd_writeback_bytes_total", "Pages handed to writeback.", func(s *status, put putter) {
		put(float64(block.Count(s.Writeback.Pages).Bytes()))
	}),
	counter("cnbd_writeback_holes_total", "Trimmed and zeroed ranges handed to writeback.", one(func(s *status) uint64 { return s.Writeback.Holes })),
	counter("cnbd_writeback_chunks_total", "Pieces of work for the compressors, of up to 512 KiB.", one(func(s *status) uint64 { return s.Writeback.Chunks })),
	gauge("cnbd_writeback_queued_chunks", "Pieces of work in the queue of the compressors, by state: waiting, running, done (to be appended in order).", func(s *status, put putter) {
		put(float64(s.Queue.Waiting), "waiting")
		put(float64(s.Queue.Running), "running")
		put(float64(s.Queue.Unordered), "done")
	}, "state"),
	gauge("cnbd_writeback_queued_bytes", "Pages in the queue of the compressors.", one(func(s *status) int64 { return s.Queue.Bytes })),
	gauge("cnbd_writeback_queue_limit_bytes", "Pages in the queue from which on writeback waits for the compressors.", one(func(s *status) int64 { return s.Queue.BytesMax })),
	counter("cnbd_writeback_throttled_total", "Times that writeback waited for the compressors.", one(func(s *status) uint64 { return s.Queue.Throttled })),
	counter("cnbd_writeback_throttled_seconds_total", "How long it waited.", func(s *status, put putter) {
		put(s.Queue.ThrottledTime.Seconds())
	}),
	gauge("cnbd_writeback_workers", "Goroutines that compress.", one(func(s *status) int64 { return int64(s.Queue.Workers) })),
	counter("cnbd_writeback_errors_total", "Pages that could not be written back.", one(func(s *status) uint64 { return s.Cache.WritebackErrors })),
	counter("cnbd_read_errors_total", "Reads of the store that failed.", one(func(s *status) uint64 { return s.Reads.Errors })),
	counter("cnbd_read_neighbours_total", "Pages filled beside those that were asked for, from the same extent.", one(func(s *status) uint64 { return s.Reads.Neighbours })),
	counter("cnbd_read_ahead_total", "Pieces of up to 128 KiB read before they were asked for, since a client reads in order, or beside a large read.", one(func(s *status) uint64 { return s.Reads.Ahead })),
	counter("cnbd_read_modify_writes_total", "Writes of parts of blocks, for which the block was read first.", one(func(s *status) uint64 { return s.Reads.ReadModifyWrites })),
}

// ofScrub is a value of the newest scrub, if there is one.
func ofScrub(get func(*store.ScrubReport) float64) func(*status, putter) {
	return func(s *status, put putter) {
		if s.Scrub != nil {
			put(get(s.Scrub))
		}
	}
}

// blocks are n blocks in bytes.
func blocks(n int64) float64 { return float64(n) * block.Size }

// up, sampled and build are the families that are read from none of these.
var (
	up = gauge[Export]("cnbd_export_up", "1 if the export can be used: its store is open and has not failed, or waits for its first client (lazy).", func(e *Export, put putter) {
		put(truth(e.Err() == nil))
	})
	sampled = gauge[Sample]("cnbd_status_timestamp_seconds", "When the numbers of device and store were gathered, in seconds since 1970.", func(s *Sample, put putter) {
		put(float64(s.Time.UnixMilli()) / 1000)
	})
	build = gauge[Source]("cnbd_build_info", "Always 1; tells the version.", func(s *Source, put putter) {
		put(1, s.Version, runtime.Version())
	}, "version", "goversion")
)

func init() {
	build.describe()
	up.describe("export")
	sampled.describe("export")
	durations.describe("export")
	for _, f := range ofServer {
		f.describe()
	}
	for _, f := range ofClients {
		f.describe("export")
	}
	for _, f := range ofStatus {
		f.describe("export")
	}
}

func (f *family[T]) describe(before ...string) {
	f.labels = append(before, f.labels...)
	f.desc = prometheus.NewDesc(f.name, f.help, f.labels, nil)
}

// collect sends what v says; before are the values of the labels that describe put
// before those of the family.
func (f *family[T]) collect(ch chan<- prometheus.Metric, v *T, before ...string) {
	f.read(v, func(n float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(f.desc, f.kind, n, append(before[:len(before):len(before)], labels...)...)
	})
}

// A collector reads a Source for every scrape.
type collector struct{ src Source }

// Describe implements prometheus.Collector.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{build.desc, up.desc, sampled.desc, durations.desc} {
		ch <- d
	}
	for _, f := range ofServer {
		ch <- f.desc
	}
	for _, f := range ofClients {
		ch <- f.desc
	}
	for _, f := range ofStatus {
		ch <- f.desc
	}
}

// Collect implements prometheus.Collector. It waits for samples that are on their
// way, for a bounded time.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	build.collect(ch, &c.src)
	m := c.src.Server()
	for _, f := range ofServer {
		f.collect(ch, &m)
	}
	for i := range m.Exports {
		e := &m.Exports[i]
		for _, f := range ofClients {
			f.collect(ch, e, e.Name)
		}
		for name, c := range commands(&e.Requests) {
			ch <- histogram(durations.desc, c, e.Name, name)
		}
	}
	var all sync.WaitGroup
	for i := range c.src.Exports {
		e := &c.src.Exports[i]
		up.collect(ch, e, e.Name)
		all.Go(func() {
			s := e.Sample(context.Background())
			if s == nil {
				return
			}
			sampled.collect(ch, s, e.Name)
			for _, f := range ofStatus {
				f.collect(ch, &s.Status, e.Name)
			}
		})
	}
	all.Wait()
}

// histogram is the latency of c.
func histogram(desc *prometheus.Desc, c *nbd.CommandMetrics, labels ...string) prometheus.Metric {
	buckets := make(map[float64]uint64, len(nbd.LatencyBounds))
	count := uint64(0)
	for i, bound := range nbd.LatencyBounds {
		count += c.Latency.Buckets[i]
		buckets[bound.Seconds()] = count // cumulative
	}
	count += c.Latency.Buckets[len(nbd.LatencyBounds)]
	return prometheus.MustNewConstHistogram(desc, count, c.Latency.Sum.Seconds(), buckets, labels...)
}
