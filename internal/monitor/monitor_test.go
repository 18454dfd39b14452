package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"cnbd/device"
	"cnbd/nbd"
	"cnbd/store"
)

var update = flag.Bool("update", false, "write the table of docs/monitoring.md")

// full is a Source with two exports, of which the second is not open, and with a
// value for everything that is only there sometimes.
func full() Source {
	m := nbd.Metrics{Connections: 3, ConnectionsIdle: 4, ExportsFull: 5}
	m.Exports = make([]nbd.ExportMetrics, 2)
	m.Exports[1].Name = "two"
	read := &m.Exports[0].Read
	read.Requests, read.Errors, read.Bytes = 10, 1, 4096
	read.Latency.Sum = 90 * time.Second
	read.Latency.Buckets[0] = 2                      // up to 10 us
	read.Latency.Buckets[6] = 3                      // up to 1 ms
	read.Latency.Buckets[len(nbd.LatencyBounds)] = 5 // longer than all
	m.Exports[0].Errors = map[nbd.Errno]uint64{nbd.ENOSPC: 6}
	st := device.Status{UUID: "u", Codec: "zstd", Ratio: 2.5, Scrub: &store.ScrubReport{Began: time.Unix(7, 0), Problems: []string{"a"}, More: 2}}
	st.Cache.Dirty, st.Writeback.Pages = 2, 3
	q := &st.Queue
	q.Workers, q.Waiting, q.Running, q.Unordered, q.Bytes, q.BytesMax = 4, 5, 3, 2, 4096, 8192
	q.Throttled, q.ThrottledTime = 7, 1500*time.Millisecond
	sample := &Sample{time.Unix(100, 0), st}
	return Source{Version: "1.2.3", Server: func() nbd.Metrics { return m }, Exports: []Export{
		{Sample: func(context.Context) *Sample { return sample }, Err: func() error { return nil }},
		{Name: "two", Sample: func(context.Context) *Sample { return nil }, Err: func() error { return errors.New("locked\nby another") }},
	}}
}

// TestNames has the metrics checked by the conventions of Prometheus.
func TestNames(t *testing.T) {
	problems, err := testutil.CollectAndLint(collector{full()})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	if n := len(table(t)); n < 60 {
		t.Errorf("%d metrics are described", n)
	}
}

// TestValues looks for single lines of a scrape.
func TestValues(t *testing.T) {
	w := httptest.NewRecorder()
	Handler(full()).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	lines := strings.Split(w.Body.String(), "\n")
	for _, want := range []string{
		`cnbd_build_info{goversion="GO",version="1.2.3"} 1`,
		`cnbd_connections 3`,
		`cnbd_connections_cut_total{reason="idle"} 4`,
		`cnbd_refusals_total{reason="export_full"} 5`,
		`cnbd_request_errors_total{command="read",export=""} 1`,
		`cnbd_error_answers_total{errno="ENOSPC",export=""} 6`,
		`cnbd_request_bytes_total{command="read",export=""} 4096`,
		`cnbd_request_duration_seconds_bucket{command="read",export="",le="1e-05"} 2`,
		`cnbd_request_duration_seconds_bucket{command="read",export="",le="0.0005"} 2`,
		`cnbd_request_duration_seconds_bucket{command="read",export="",le="0.001"} 5`,
		`cnbd_request_duration_seconds_bucket{command="read",export="",le="10"} 5`,
		`cnbd_request_duration_seconds_bucket{command="read",export="",le="+Inf"} 10`,
		`cnbd_request_duration_seconds_sum{command="read",export=""} 90`,
		`cnbd_request_duration_seconds_count{command="read",export=""} 10`,
		`cnbd_export_up{export=""} 1`,
		`cnbd_export_up{export="two"} 0`,
		`cnbd_status_timestamp_seconds{export=""} 100`,
		`cnbd_device_info{codec="zstd",export="",uuid="u"} 1`,
		`cnbd_store_compression_ratio{export=""} 2.5`,
		`cnbd_scrub_problems{export=""} 3`,
		`cnbd_scrub_begun_timestamp_seconds{export=""} 7`,
		`cnbd_cache_bytes{export="",state="dirty"} 8192`,
		`cnbd_writeback_bytes_total{export=""} 12288`,
		`cnbd_writeback_queued_chunks{export="",state="waiting"} 5`,
		`cnbd_writeback_queued_chunks{export="",state="running"} 3`,
		`cnbd_writeback_queued_chunks{export="",state="done"} 2`,
		`cnbd_writeback_queued_bytes{export=""} 4096`,
		`cnbd_writeback_queue_limit_bytes{export=""} 8192`,
		`cnbd_writeback_throttled_total{export=""} 7`,
		`cnbd_writeback_throttled_seconds_total{export=""} 1.5`,
		`cnbd_writeback_workers{export=""} 4`,
	} {
		if !slices.ContainsFunc(lines, func(line string) bool {
			return regexp.MustCompile(`goversion="[^"]*"`).ReplaceAllString(line, `goversion="GO"`) == want
		}) {
			t.Errorf("no line %s", want)
		}
	}
	for _, line := range lines { // of what is not open nothing is told
		if strings.HasPrefix(line, "cnbd_store") && strings.Contains(line, `"two"`) {
			t.Errorf("unexpected: %s", line)
		}
	}
	for _, of := range []string{"go_goroutines ", "process_resident_memory_bytes "} {
		if !strings.Contains(w.Body.String(), "\n"+of) {
			t.Errorf("no %s", of)
		}
	}
}

// TestErrnos: every error number that has a name has its counter before it occurs.
func TestErrnos(t *testing.T) {
	w := httptest.NewRecorder()
	Handler(full()).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	named := 0
	for e := range nbd.Errno(1 << 12) {
		name := strings.TrimPrefix(e.Error(), "nbd: ")
		if !strings.HasPrefix(name, "E") {
			continue
		}
		named++
		if want := fmt.Sprintf("\ncnbd_error_answers_total{errno=%q,export=\"two\"} 0\n", name); !strings.Contains(w.Body.String(), want) {
			t.Errorf("no line %s", want)
		}
	}
	if named < 8 {
		t.Errorf("%d error numbers have names", named)
	}
}

// A row is a metric as the documentation has it.
type row struct{ name, kind, labels, help string }

// table are all metrics, in the order of their description.
func table(t *testing.T) (rows []row) {
	rows = append(rows, rowOf(build), rowOf(up), rowOf(sampled))
	for _, f := range ofServer {
		rows = append(rows, rowOf(f))
	}
	histogram := rowOf(durations)
	histogram.kind = "histogram"
	rows = append(rows, histogram)
	for _, f := range ofClients {
		rows = append(rows, rowOf(f))
	}
	for _, f := range ofStatus {
		rows = append(rows, rowOf(f))
	}
	described := make(chan *prometheus.Desc, 1000)
	collector{}.Describe(described)
	if len(described) != len(rows) {
		t.Errorf("%d metrics are described, %d in the table", len(described), len(rows))
	}
	return rows
}

func rowOf[T any](f *family[T]) row {
	kind := "gauge"
	if f.kind == prometheus.CounterValue {
		kind = "counter"
	}
	return row{f.name, kind, strings.Join(f.labels, ", "), f.help}
}

// TestDocumentation holds the table of docs/monitoring.md to the code.
func TestDocumentation(t *testing.T) {
	const file, begin, end = "../../docs/monitoring.md", "| metric | type | labels | meaning |\n|---|---|---|---|\n", "\n\n"
	var want strings.Builder
	for _, r := range table(t) {
		fmt.Fprintf(&want, "| `%s` | %s | %s | %s |\n", r.name, r.kind, r.labels, r.help)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no table that begins with %q", file, begin)
	}
	if *update {
		if err := os.WriteFile(file, []byte(before+begin+strings.TrimSuffix(want.String(), "\n")+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got+"\n" != want.String() {
		t.Errorf("the table of %s is not that of the code: go test ./internal/monitor -run Documentation -update writes it", file)
	}
}

// TestDashboard checks that each metric of the dashboard is there, with the labels
// by which it is asked for, and that of the alerts.
func TestDashboard(t *testing.T) {
	known := map[string]row{}
	for _, r := range table(t) {
		known[r.name] = r
		if r.kind == "histogram" {
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				known[r.name+part] = row{labels: r.labels + ", le"}
			}
			delete(known, r.name)
		}
	}
	used := map[string]bool{}
	check := func(where, expr string) {
		names := regexp.MustCompile(`\bcnbd_\w+(\{[^}]*\})?`).FindAllString(expr, -1)
		if len(names) == 0 {
			t.Errorf("%s: no metric in %q", where, expr)
		}
		for _, n := range names {
			name, matchers, _ := strings.Cut(n, "{")
			r, ok := known[name]
			if !ok {
				t.Errorf("%s: there is no %s", where, name)
				continue
			}
			used[name] = true
			for _, m := range regexp.MustCompile(`(\w+) *(=~|!~|!=|=) *"`).FindAllStringSubmatch(matchers, -1) {
				if label := m[1]; label != "instance" && label != "job" && !slices.Contains(strings.Split(r.labels, ", "), label) {
					t.Errorf("%s: %s has no label %s", where, name, label)
				}
			}
		}
	}

	data, err := os.ReadFile("../../docs/grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		UID, Title string
		Templating struct {
			List []struct {
				Name, Type string
				Query      any
			}
		}
		Panels []struct {
			ID          int
			Title, Type string
			Description string
			GridPos     struct{ X, Y, W, H int }
			Targets     []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	filled := map[[2]int]string{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" {
			t.Errorf("panel %d %q: its id is taken, or it has no title", p.ID, p.Title)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			check("panel "+p.Title, target.Expr)
			if p.Type == "timeseries" && target.LegendFormat == "{{export}}" {
				t.Errorf("panel %q has no legend for the export without a name", p.Title)
			}
			// What is filtered by its rate has gaps where nothing happened, and Grafana
			// draws a line from one side to the other.
			if regexp.MustCompile(`\$__rate_interval\]\)+ *[<>]`).MatchString(target.Expr) {
				t.Errorf("panel %q: a rate is filtered by itself: %s", p.Title, target.Expr)
			}
		}
		g := p.GridPos
		if g.X+g.W > 24 || g.W < 1 || g.H < 1 {
			t.Errorf("panel %q does not fit: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := filled[[2]int{x, y}]; other != "" {
					t.Fatalf("panels %q and %q overlap", p.Title, other)
				}
				filled[[2]int{x, y}] = p.Title
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		if v.Type == "query" {
			check("variable "+v.Name, fmt.Sprint(v.Query))
		}
	}
	if len(used) < 30 {
		t.Errorf("the dashboard uses %d metrics", len(used))
	}

	alerts, err := os.ReadFile("../../docs/examples/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	exprs := regexp.MustCompile(`(?m)^ *expr: (.*)$`).FindAllStringSubmatch(string(alerts), -1)
	if len(exprs) == 0 {
		t.Error("no alerts")
	}
	for _, e := range exprs {
		check("alert", e[1])
	}
}

// TestServer asks a server over HTTP.
func TestServer(t *testing.T) {
	for _, profiles := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		src := full()
		s := Serve(l, src, profiles)
		get := func(path string) (int, string) {
			t.Helper()
			r, err := http.Get("http://" + l.Addr().String() + path)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Fatal(err)
			}
			return r.StatusCode, string(body)
		}
		if code, body := get("/metrics"); code != 200 || !strings.Contains(body, "\ncnbd_connections 3\n") {
			t.Errorf("/metrics: %d\n%s", code, body)
		}
		if code, body := get("/healthz"); code != 200 || body != "ok\n" {
			t.Errorf("/healthz: %d %q", code, body)
		}
		if code, body := get("/readyz"); code != 503 || body != "export \"two\": locked; by another\n" {
			t.Errorf("/readyz: %d %q", code, body)
		}
		src.Exports[1].Err = src.Exports[0].Err // of the same slice
		if code, body := get("/readyz"); code != 200 || body != "ok\n" {
			t.Errorf("/readyz when all is well: %d %q", code, body)
		}
		want := map[bool]int{false: 404, true: 200}[profiles]
		if code, _ := get("/debug/pprof/goroutine?debug=1"); code != want {
			t.Errorf("profiles: %d, want %d", code, want)
		}
		if code, _ := get("/"); code != 404 {
			t.Errorf("/: %d", code)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := http.Get("http://" + l.Addr().String() + "/healthz"); err == nil {
			t.Error("it answers after Close")
		}
	}
}

// TestSampler asks a device that is quick, slow, and broken, by a fake clock.
func TestSampler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked, takes, fails := 0, time.Duration(0), error(nil)
		s := NewSampler(func(ctx context.Context) (device.Status, error) {
			asked++
			st := device.Status{DeviceSize: uint64(asked)}
			select {
			case <-time.After(takes):
			case <-ctx.Done():
			}
			return st, fails
		})
		// check wants the number of the status, 0 for none, and when it was there.
		check := func(status uint64, err error, after time.Duration) {
			t.Helper()
			began := time.Now()
			sample, got := s.Sample(t.Context())
			number := uint64(0)
			if sample != nil {
				number = sample.Status.DeviceSize
			}
			if number != status || !errors.Is(got, err) || time.Since(began) != after {
				t.Errorf("status %d, %v after %v; want %d, %v after %v", number, got, time.Since(began), status, err, after)
			}
		}
		broken := errors.New("broken")
		fails = broken
		check(0, broken, 0)
		fails = nil
		check(0, broken, 0) // not asked again so soon
		time.Sleep(sampleAgeMin)
		takes = time.Second
		check(2, nil, time.Second)
		check(2, nil, 0)
		time.Sleep(sampleAgeMin)
		takes = time.Minute
		check(2, nil, sampleWait) // the old one
		check(2, nil, sampleWait)
		time.Sleep(time.Minute)
		check(3, nil, 0) // which has come meanwhile
		time.Sleep(sampleAgeMin)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if sample, _ := s.Sample(ctx); sample.Status.DeviceSize != 3 || ctx.Err() == nil {
			t.Errorf("the end of a context: %+v", sample)
		}
		s.Close() // ends the question that runs
		before := asked
		time.Sleep(time.Hour)
		check(4, nil, 0)
		if asked != before {
			t.Error("the device is asked after Close")
		}
	})
}
