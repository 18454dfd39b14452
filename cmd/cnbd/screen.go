package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"cnbd/internal/block"
	"cnbd/internal/monitor"
	"cnbd/nbd"
)

// A topStore is what top knows of one store.
type topStore struct {
	path            string
	before, now     *liveStatus     // the two newest; before may be nil, then now as well
	earlier, sample *monitor.Sample // the two newest; either may be nil
	err             error           // of the last attempt
}

// add takes the newest answer.
func (s *topStore) add(st *liveStatus, err error) {
	if s.err = err; err != nil {
		s.before, s.now, s.earlier, s.sample = nil, nil, nil, nil // it may be another server next time
		return
	}
	s.before, s.now = s.now, st
	switch {
	case st.Sample == nil:
		s.earlier, s.sample = nil, nil
	case s.sample == nil || !st.Sample.Time.Equal(s.sample.Time):
		s.earlier, s.sample = s.sample, st.Sample
	}
	if s.before != nil && s.before.Server.ConnectionsTotal > st.Server.ConnectionsTotal { // a new server
		s.before, s.earlier = nil, nil
	}
}

// clients are the numbers of the export of s in st, zeros without st.
func (s *topStore) clients(st *liveStatus) nbd.ExportMetrics {
	if st == nil {
		return nbd.ExportMetrics{}
	}
	return exportOf(&st.Server, st.Export)
}

// exportOf are the numbers of the export of that name.
func exportOf(m *nbd.Metrics, name string) nbd.ExportMetrics {
	for _, e := range m.Exports {
		if e.Name == name {
			return e
		}
	}
	return nbd.ExportMetrics{}
}

// activity is what was done of one command in an interval.
type activity struct {
	requests, bytes float64       // per second
	average         time.Duration // and the other two: 0 if there was no request
	median, most    time.Duration // of 100, 99 are quicker than most
	errors          uint64
}

// doing compares two counts of a command, d apart.
func doing(before, now *nbd.CommandMetrics, d time.Duration) (a activity) {
	n := now.Requests - before.Requests
	a.errors = now.Errors - before.Errors
	if n == 0 || d <= 0 {
		return a
	}
	a.requests = float64(n) / d.Seconds()
	a.bytes = float64(now.Bytes-before.Bytes) / d.Seconds()
	a.average = (now.Latency.Sum - before.Latency.Sum) / time.Duration(n)
	l := now.Latency
	for i := range l.Buckets {
		l.Buckets[i] -= before.Latency.Buckets[i]
	}
	a.median, a.most = quantile(&l, 0.5), quantile(&l, 0.99)
	return a
}

// quantile is the time that a share q of l takes at most, as near as its buckets
// tell; of those that took longer than every bound, the highest bound.
func quantile(l *nbd.Latency, q float64) time.Duration {
	var total uint64
	for _, n := range l.Buckets {
		total += n
	}
	rank := q * float64(total)
	from := time.Duration(0)
	for i, to := range nbd.LatencyBounds {
		n := float64(l.Buckets[i])
		if n > 0 && rank <= n {
			return from + time.Duration(float64(to-from)*rank/n)
		}
		rank -= n
		from = to
	}
	return from
}

// screen is what is shown, of so many rows and columns; with 0 rows it is text of any
// length, without the codes of a terminal.
func (t *topper) screen(rows, columns int) string {
	head := fmt.Sprintf("cnbd top   %s   every %v", time.Now().Format(time.DateTime), t.interval)
	var lines []string
	for _, s := range t.stores {
		if len(lines) > 0 {
			lines = append(lines, "")
		}
		lines = append(lines, s.block()...)
	}
	if rows > 0 && len(lines)+2 > rows {
		lines = t.table()
	}
	if rows == 0 {
		return strings.Join(append([]string{head, ""}, lines...), "\n") + "\n"
	}
	lines = append([]string{head + "   q ends it", ""}, lines...)
	if len(lines) > rows {
		lines = append(lines[:rows-1], fmt.Sprintf("… and %d lines more: the window is too small", len(lines)-rows+1))
	}
	for i, l := range lines {
		if utf8.RuneCountInString(l) > columns {
			lines[i] = string([]rune(l)[:columns])
		}
	}
	// From the top left; each line's rest is cleared, and what is below the last.
	return "\x1b[H" + strings.Join(lines, "\x1b[K\r\n") + "\x1b[K\x1b[J"
}

// name is that of the export, or of the file where it has none.
func (s *topStore) name() string {
	if s.now != nil && s.now.Export != "" {
		return s.now.Export
	}
	return filepath.Base(s.path)
}

// state is how the store is, in a word or with its error.
func (s *topStore) state() string {
	switch {
	case s.err != nil:
		return s.err.Error()
	case s.now.Fault != "":
		return "FAILED: " + s.now.Fault
	case s.sample != nil && !s.sample.Status.Healthy:
		return "DAMAGED"
	}
	return "good"
}

// topCommands are the commands that are always shown, and those that are when
// there is something to show.
var topCommands = []struct {
	name   string
	of     func(*nbd.Requests) *nbd.CommandMetrics
	always bool
}{
	{"read", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.Read }, true},
	{"write", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.Write }, true},
	{"flush", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.Flush }, true},
	{"trim", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.Trim }, true},
	{"zeroes", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.WriteZeroes }, false},
	{"cache", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.Cache }, false},
	{"status", func(r *nbd.Requests) *nbd.CommandMetrics { return &r.BlockStatus }, false},
}

// block is s in full.
func (s *topStore) block() []string {
	if s.err != nil {
		return []string{fmt.Sprintf("%s: %s", s.name(), s.state())}
	}
	var lines []string
	row := func(name, format string, args ...any) {
		lines = append(lines, fmt.Sprintf("  %-8s %s", name, fmt.Sprintf(format, args...)))
	}
	head := s.name() + "   " + s.path
	if s.sample != nil {
		st := &s.sample.Status
		head += fmt.Sprintf("   %s, %s", short(st.DeviceSize), st.Codec)
		if st.Store.StoredBytes > 0 {
			head += fmt.Sprintf(", ratio %.2f", st.Ratio)
		}
	}
	lines = append(lines, head+"   "+s.state())
	row("", "%12s %12s %10s %10s %10s %8s", "requests/s", "bytes/s", "average", "median", "99 %", "errors")
	now, before := s.clients(s.now), s.clients(s.before)
	interval := time.Duration(0)
	if s.before != nil {
		interval = s.now.Time.Sub(s.before.Time)
	}
	for _, c := range topCommands {
		a := doing(c.of(&before.Requests), c.of(&now.Requests), interval)
		if s.before == nil { // no interval yet: no errors of it either
			a = activity{}
		}
		if c.always || a.requests > 0 {
			row(c.name, "%12s %12s %10s %10s %10s %8d", count(a.requests), rate(a.bytes), latency(a.average), latency(a.median), latency(a.most), a.errors)
		}
	}
	m := &s.now.Server
	refused := ""
	if n := m.Refusals(); n > 0 {
		refused = fmt.Sprintf("; %d refused", n)
	}
	row("clients", "%d (server: %d of %d); in flight: %d requests, %s of %s%s",
		now.Connections, m.Connections, m.ConnectionsMax, m.RequestsInFlight, short(m.BytesInFlight), short(m.BytesMax), refused)
	if s.sample == nil {
		return lines
	}
	st := &s.sample.Status
	c := &st.Cache
	dirty := uint64(max(0, c.Dirty+c.Writeback)) * block.Size
	waiters := ""
	if c.DirtyWaiters > 0 {
		waiters = fmt.Sprintf(", %d writers wait", c.DirtyWaiters)
	}
	row("dirty", "%s %s of %s%s", bar(dirty, c.DirtyMax.Bytes()), short(dirty), short(c.DirtyMax.Bytes()), waiters)
	cached := uint64(max(0, c.Cached)) * block.Size
	row("cache", "%s %s of %s%s", bar(cached, c.CacheMax.Bytes()), short(cached), short(c.CacheMax.Bytes()), s.hits())
	x := &st.Store
	alive := x.StoredBytes + x.MapBytes
	row("space", "%s %s of %s, and %s garbage", bar(alive, st.Capacity), short(alive), short(st.Capacity), short(x.GarbageBytes))
	row("data", "%s stored as %s; on the host %s", short(x.DataBytes), short(x.StoredBytes), short(x.HostBytes))
	old, since, seconds := &monitor.Sample{}, " since the start", 0.0
	if s.earlier != nil {
		old, since, seconds = s.earlier, "", s.sample.Time.Sub(s.earlier.Time).Seconds()
	}
	// what is what has become of a counter of bytes: in a second, or in all.
	o := &old.Status.Store
	what := func(before, now uint64) string {
		if seconds > 0 {
			return rate(float64(now-before) / seconds)
		}
		return short(now)
	}
	waits := ""
	if n := x.Shortages - o.Shortages; n > 0 {
		waits = fmt.Sprintf("; writes waited %d times for space", n)
	}
	row("cleaner", "%s moved, %s recompressed%s%s", what(o.Moved, x.Moved), what(o.Recompressed, x.Recompressed), since, waits)
	row("backing", "%s written, %s read%s", what(o.LogWritten, x.LogWritten), what(o.ReadBytes, x.ReadBytes), since)
	return lines
}

// hits is the share of blocks that reads found in the cache between the last two
// samples.
func (s *topStore) hits() string {
	if s.earlier == nil {
		return ""
	}
	a, b := &s.earlier.Status.Cache, &s.sample.Status.Cache
	return hits(b.Hits+b.HoleHits+b.FillWaits-a.Hits-a.HoleHits-a.FillWaits, b.Misses-a.Misses)
}

// hits is the share of blocks that were found, empty if there were none.
func hits(found, missed uint64) string {
	if found+missed == 0 {
		return ""
	}
	return fmt.Sprintf(", %s hits", share(found, found+missed))
}

// table is all stores in a line each, the most important first: what does not fit on
// the screen is cut off.
func (t *topper) table() []string {
	const format = "%-14s %-8s %11s %11s %10s %6s %6s %6s %8s %8s"
	lines := []string{fmt.Sprintf(format, "export", "state", "read", "written", "flush", "ratio", "dirty", "space", "reads/s", "writes/s")}
	for _, s := range t.stores {
		name := s.name()
		if utf8.RuneCountInString(name) > 14 {
			name = string([]rune(name)[:13]) + "…"
		}
		if s.err != nil {
			lines = append(lines, fmt.Sprintf("%-14s %s", name, s.state()))
			continue
		}
		now, before := s.clients(s.now), s.clients(s.before)
		var read, write, flush activity
		if s.before != nil {
			d := s.now.Time.Sub(s.before.Time)
			read, write, flush = doing(&before.Read, &now.Read, d), doing(&before.Write, &now.Write, d), doing(&before.Flush, &now.Flush, d)
		}
		ratio, dirty, space := "-", "-", "-"
		if s.sample != nil {
			st := &s.sample.Status
			if st.Store.StoredBytes > 0 {
				ratio = fmt.Sprintf("%.2f", st.Ratio)
			}
			dirty = share(uint64(max(0, st.Cache.Dirty+st.Cache.Writeback)), uint64(st.Cache.DirtyMax))
			space = share(st.Store.StoredBytes+st.Store.MapBytes, st.Capacity)
		}
		state, _, _ := strings.Cut(s.state(), ":")
		lines = append(lines, fmt.Sprintf(format, name, state, rate(read.bytes), rate(write.bytes), latency(flush.most), ratio, dirty, space,
			count(read.requests), count(write.requests)))
	}
	return lines
}

// bar shows n of most.
func bar(n, most uint64) string {
	const width = 20
	full := int(width * float64(min(n, most)) / float64(max(most, 1)))
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", width-full) + "]"
}

// share is how much n is of most.
func share(n, most uint64) string {
	return fmt.Sprintf("%.0f %%", 100*float64(n)/float64(max(most, 1)))
}

// count is a number of things per second.
func count(n float64) string {
	if n > 0 && n < 10 {
		return fmt.Sprintf("%.1f", n)
	}
	return fmt.Sprintf("%.0f", n)
}

// rate is bytes per second.
func rate(n float64) string {
	if n == 0 {
		return "0"
	}
	return short(uint64(n)) + "/s"
}

// latency is d in three digits at most, or a dash for none.
func latency(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case d == 0:
		return "-"
	case d < time.Millisecond:
		return fmt.Sprintf("%d us", d.Microseconds())
	case ms < 9.95:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 999.5:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
