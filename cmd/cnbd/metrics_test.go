//go:build !race && !invariants

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cnbd/nbd"
)

// get asks the HTTP server at a unix socket.
func get(t testing.TB, socket, path string) (code int, body string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	r, err := client.Get("http://cnbd" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

// TestMetrics does a known amount of work on one of three exports, of which one
// cannot be opened and one waits for its first client.
func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/cnbd.yaml"
	text := fmt.Sprintf("metrics: unix:%[1]s/metrics\nsocket-mode: 0640\nlisten: [\"unix:%[1]s/nbd\"]\nexports:\n"+
		"  - {name: one, path: %[1]s/one, size: 64MiB}\n  - {name: missing, path: %[1]s/missing}\n  - {name: later, path: %[1]s/later, size: 64MiB, lazy: true}\n", dir)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serve(t, "--config="+file)
	if fi, err := os.Stat(dir + "/metrics"); err != nil || fi.Mode().Perm() != 0o640 {
		t.Errorf("the socket: %v, %v", fi, err)
	}
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const n = 10
	data := []byte(strings.Repeat("compress me ", 1<<16/12+1))[:1<<16]
	for i := range n {
		if err := c.WriteAt(t.Context(), data, uint64(i)<<16, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	code, body := get(t, dir+"/metrics", "/metrics")
	if code != http.StatusOK {
		t.Errorf("/metrics: %d", code)
	}
	for _, want := range []string{
		`cnbd_request_duration_seconds_count{command="write",export="one"} 10`,
		`cnbd_request_bytes_total{command="write",export="one"} 655360`,
		`cnbd_request_duration_seconds_count{command="write",export="later"} 0`,
		`cnbd_export_connections{export="one"} 1`,
		`cnbd_export_up{export="one"} 1`, `cnbd_export_up{export="later"} 1`, `cnbd_export_up{export="missing"} 0`,
		`cnbd_store_data_bytes{export="one"} 655360`,
		`cnbd_codec_pieces_total{export="one",result="compressed"} 10`,
	} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	if strings.Contains(body, `cnbd_store_data_bytes{export="later"}`) {
		t.Error("a store that is not open has numbers")
	}
	if code, body := get(t, dir+"/metrics", "/readyz"); code != http.StatusServiceUnavailable || !strings.HasPrefix(body, `export "missing": `) || strings.Count(body, "\n") != 1 {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if code, body := get(t, dir+"/metrics", "/healthz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/healthz: %d %q", code, body)
	}
	do(t, binary, "create", "--size=64MiB", dir+"/missing")
	if other, err := nbd.Dial(t.Context(), strings.Replace(s.uri, "/one?", "/missing?", 1)); err != nil {
		t.Error(err)
	} else {
		other.Close()
	}
	if code, body := get(t, dir+"/metrics", "/readyz"); code != http.StatusOK || body != "ok\n" {
		t.Errorf("/readyz when all is well: %d %q", code, body)
	}
	if code, _ := get(t, dir+"/metrics", "/debug/pprof/cmdline"); code != http.StatusNotFound {
		t.Errorf("profiles that were not asked for: %d", code)
	}
	s.stop(t)
	if _, err := os.Stat(dir + "/metrics"); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}

// TestFailureIsSeen has the backing fail under a server: whoever watches is told.
func TestFailureIsSeen(t *testing.T) {
	dir := t.TempDir()
	s := serve(t, "--size=64MiB", "--metrics=unix:"+dir+"/m", dir+"/disk")
	if code, body := get(t, dir+"/m", "/readyz"); code != http.StatusOK {
		t.Fatalf("/readyz: %d %q", code, body)
	}
	// Writes of the log get EFBIG from now on.
	limit := unix.Rlimit{Cur: 4096, Max: 4096}
	if err := unix.Prlimit(s.cmd.Process.Pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
		t.Skipf("no limit can be set: %v", err)
	}
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := errors.Join(c.WriteAt(t.Context(), make([]byte, 4096), 0, false), c.Flush(t.Context())); err == nil {
		t.Fatal("the backing does not fail")
	}
	const why = "file too large"
	if code, body := get(t, dir+"/m", "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, why) {
		t.Errorf("/readyz: %d %q", code, body)
	}
	if code, body := get(t, dir+"/m", "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz: %d %q", code, body)
	}
	_, body := get(t, dir+"/m", "/metrics")
	for _, want := range []string{`cnbd_export_up{export=""} 0`, `cnbd_store_failed{export=""} 1`} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no line %s", want)
		}
	}
	if top := do(t, binary, "top", "--once", "--interval=100ms", dir+"/disk"); !strings.Contains(top, "FAILED: ") || !strings.Contains(top, why) {
		t.Errorf("top:\n%s", top)
	}
}

// TestMetricsSettings has profiles, and addresses that cannot be had.
func TestMetricsSettings(t *testing.T) {
	dir := t.TempDir()
	s := serve(t, "--size=64MiB", "--metrics=unix:"+dir+"/m", "--pprof", dir+"/disk")
	if code, body := get(t, dir+"/m", "/debug/pprof/cmdline"); code != http.StatusOK || !strings.Contains(body, "--pprof") {
		t.Errorf("profiles: %d %q", code, body)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for address, why := range map[string]string{"unix:" + dir + "/m": "socket is busy", "tcp:" + l.Addr().String(): "address already in use"} {
		r := try(t, binary, "serve", "--size=64MiB", "--metrics="+address, dir+"/other")
		if r.status != exitFailed || !strings.Contains(r.stderr, "cnbd: metrics: ") || !strings.Contains(r.stderr, why) {
			t.Errorf("%s is taken: %+v", address, r)
		}
		if _, err := os.Stat(dir + "/other"); !os.IsNotExist(err) {
			t.Error("a store was made all the same")
		}
	}
	s.stop(t)

	s = serve(t, "--size=64MiB", "--metrics=tcp:0.0.0.0:0", dir+"/disk")
	if log := s.log.String(); !strings.Contains(log, `"level":"warn"`) || !strings.Contains(log, "whoever reaches this address can read metrics") {
		t.Errorf("no warning that other hosts can read them:\n%s", log)
	}
	s.stop(t)
}
