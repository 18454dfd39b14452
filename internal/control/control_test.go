package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func serve(t *testing.T, status func(context.Context) (any, error)) (*Server, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, Handlers{Status: status})
	return s, socket
}

func TestStatus(t *testing.T) {
	type answer struct{ A, B int }
	s, socket := serve(t, func(context.Context) (any, error) { return answer{1, 2}, nil })
	var got answer
	if err := Status(t.Context(), socket, &got); err != nil || got != (answer{1, 2}) {
		t.Errorf("Status: %v, %v", got, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := Status(t.Context(), socket, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v, want no socket", err)
	}
}

func TestStatusErrors(t *testing.T) {
	s, socket := serve(t, func(context.Context) (any, error) { return nil, errors.New("store 7 has failed") })
	defer s.Close()
	var v any
	err := Status(t.Context(), socket, &v)
	if err == nil || !strings.Contains(err.Error(), "store 7 has failed") || !strings.Contains(err.Error(), socket) {
		t.Errorf("an error of the server arrives as %v", err)
	}

	stale := filepath.Join(t.TempDir(), "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if err := Status(t.Context(), stale, &v); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v, want ECONNREFUSED", err)
	}
}

// TestOneAtATime has many clients ask at once.
func TestOneAtATime(t *testing.T) {
	var running, calls atomic.Int32
	s, socket := serve(t, func(context.Context) (any, error) {
		if running.Add(1) != 1 {
			t.Error("two status calls at a time")
		}
		defer running.Add(-1)
		return calls.Add(1), nil
	})
	defer s.Close()
	errs := make(chan error)
	const clients = 20
	for range clients {
		go func() {
			var v int
			errs <- Status(t.Context(), socket, &v)
		}()
	}
	for range clients {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if calls.Load() != clients {
		t.Errorf("%d calls, want %d", calls.Load(), clients)
	}
}

// TestCloseWaits has Close come while a status runs that ends with its context
// only: Close returns after it, and the client learns of it.
func TestCloseWaits(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	s, socket := serve(t, func(ctx context.Context) (any, error) {
		close(started)
		<-ctx.Done()
		defer close(ended)
		return nil, ctx.Err()
	})
	got := make(chan error)
	go func() {
		var v any
		got <- Status(t.Context(), socket, &v)
	}()
	<-started
	s.Close()
	select {
	case <-ended:
	default:
		t.Error("Close has returned while the status function runs")
	}
	if err := <-got; err == nil {
		t.Error("the client that was cut off has an answer")
	}
}

// TestGarbage checks that what is no request is refused, and that the server
// goes on.
func TestGarbage(t *testing.T) {
	s, socket := serve(t, func(context.Context) (any, error) { return 1, nil })
	defer s.Close()
	for _, text := range []string{
		"\x00\x01\x02\r\n\r\n",
		"GET /v1/other HTTP/1.0\r\n\r\n",
		"POST /v1/status HTTP/1.0\r\nContent-Length: 0\r\n\r\n",
		"POST /v1/resize?size=much HTTP/1.0\r\nContent-Length: 0\r\n\r\n",
		"GET /" + strings.Repeat("x", 64<<10) + " HTTP/1.0\r\n\r\n",
	} {
		nc, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(nc, text)
		answer, _ := io.ReadAll(nc)
		if a := string(answer); a != "" && !strings.HasPrefix(a, "HTTP/1.0 4") && !strings.HasPrefix(a, "HTTP/1.1 4") {
			t.Errorf("%.30q is answered with %.60q", text, a)
		}
		nc.Close()
	}
	var v int
	if err := Status(t.Context(), socket, &v); err != nil || v != 1 {
		t.Errorf("afterwards: %d, %v", v, err)
	}
}

func serveHandlers(t *testing.T, h Handlers) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, h)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return socket
}

func TestResize(t *testing.T) {
	socket := serveHandlers(t, Handlers{Resize: func(_ context.Context, r ResizeRequest) (any, error) {
		switch r.Size {
		case 1:
			return nil, fmt.Errorf("%w: no device is so small", ErrRefused)
		case 2:
			return nil, errors.New("the disk is gone")
		}
		return r, nil
	}})
	var got ResizeRequest
	wish := ResizeRequest{Size: 1 << 60, Capacity: 77}
	if err := Resize(t.Context(), socket, wish, &got); err != nil || got != wish {
		t.Errorf("Resize: %+v, %v", got, err)
	}
	if err := Resize(t.Context(), socket, ResizeRequest{Size: 1}, &got); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "no device is so small") {
		t.Errorf("a refusal arrives as %v", err)
	}
	if err := Resize(t.Context(), socket, ResizeRequest{Size: 2}, &got); err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "the disk is gone") {
		t.Errorf("an error arrives as %v", err)
	}
}

func TestCompact(t *testing.T) {
	told := make(chan struct{})
	socket := serveHandlers(t, Handlers{Compact: func(ctx context.Context, progress func(dead, live uint64)) (any, error) {
		progress(5, 6)
		select {
		case <-told:
			return "done", nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}})
	var v string
	err := Compact(t.Context(), socket, func(dead, live uint64) {
		if dead == 5 && live == 6 {
			close(told)
		}
	}, &v)
	if err != nil || v != "done" {
		t.Errorf("Compact: %q, %v", v, err)
	}
}

func TestCompactFails(t *testing.T) {
	socket := serveHandlers(t, Handlers{Compact: func(context.Context, func(dead, live uint64)) (any, error) {
		return nil, errors.New("the disk is gone")
	}})
	var v string
	if err := Compact(t.Context(), socket, func(dead, live uint64) {}, &v); err == nil || !strings.Contains(err.Error(), "the disk is gone") {
		t.Errorf("an error arrives as %v", err)
	}
}

// TestCompactGivenUp: the server learns that the client has gone.
func TestCompactGivenUp(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	socket := serveHandlers(t, Handlers{Compact: func(ctx context.Context, _ func(dead, live uint64)) (any, error) {
		close(started)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	go func() {
		var v string
		got <- Compact(ctx, socket, func(dead, live uint64) {}, &v)
	}()
	<-started
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("Compact: %v", err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the server goes on")
	}
}

// TestSnapshot: the connection is handed over, one at a time, and Close waits until
// it is given back.
func TestSnapshot(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	fail := true
	ended := make(chan struct{})
	s := Serve(l, Handlers{Snapshot: func(ctx context.Context, take func() (net.Conn, error)) error {
		if fail {
			return errors.New("no commit")
		}
		nc, err := take()
		if err != nil {
			return err
		}
		defer close(ended)
		defer nc.Close()
		if _, err := io.WriteString(nc, "greeting"); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	}})
	if _, err := Snapshot(t.Context(), socket); err == nil || !strings.Contains(err.Error(), "no commit") {
		t.Errorf("an error arrives as %v", err)
	}
	fail = false
	nc, err := Snapshot(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	p := make([]byte, 8)
	if _, err := io.ReadFull(nc, p); err != nil || string(p) != "greeting" {
		t.Errorf("%q, %v", p, err)
	}
	if _, err := Snapshot(t.Context(), socket); err == nil || !strings.Contains(err.Error(), "somebody else") {
		t.Errorf("a second one: %v", err)
	}
	s.Close()
	select {
	case <-ended:
	default:
		t.Error("Close has returned while the connection is served")
	}
	if _, err := Snapshot(t.Context(), socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Close: %v", err)
	}
}

func TestRegions(t *testing.T) {
	socket := serveHandlers(t, Handlers{Regions: func(context.Context) (any, error) { return []int{1, 2}, nil }})
	var v []int
	if err := Regions(t.Context(), socket, &v); err != nil || len(v) != 2 {
		t.Errorf("%v, %v", v, err)
	}
}
