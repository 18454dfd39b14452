//go:build !race && !invariants

// The tests of this package run the shipped program, built without cgo, from
// outside, and so once: the builds with the race detector and the invariants
// have the same code tested in its packages.

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// binary is the program under test.
var binary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "cnbd-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		// As another user must be able to run it.
		if err := os.Chmod(dir, 0o755); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		binary = filepath.Join(dir, "cnbd")
		build := exec.Command("go", "build", "-trimpath", "-o", binary, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "go build: %v\n%s", err, out)
			return 1
		}
		// Variables of whoever runs the tests are no part of them.
		for _, e := range os.Environ() {
			name, _, _ := strings.Cut(e, "=")
			if strings.HasPrefix(name, "CNBD_") && name != "CNBD_SEED" && name != "CNBD_TEST_SCALE" {
				os.Unsetenv(name)
			}
		}
		return m.Run()
	}())
}

// tool is the path of a program that is no part of the project. Without it the
// test is skipped; the message is one that the test script counts.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("MISSING TOOL: %s", name)
	}
	return path
}

// needRoot skips a test that mounts.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

// result is what a program that has ended gave.
type result struct {
	stdout, stderr string
	status         int
}

// try runs a program to its end, which comes within a minute.
func try(t testing.TB, name string, args ...string) result {
	t.Helper()
	return tryFor(t, time.Minute, name, args...)
}

func tryFor(t testing.TB, limit time.Duration, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || !exit.Exited()) {
		t.Fatalf("%s %q: %v after %v\n%s%s", name, args, err, limit, &stdout, &stderr)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// do runs a program that must succeed and returns its standard output.
func do(t testing.TB, name string, args ...string) string {
	t.Helper()
	return doFor(t, time.Minute, name, args...)
}

func doFor(t testing.TB, limit time.Duration, name string, args ...string) string {
	t.Helper()
	r := tryFor(t, limit, name, args...)
	if r.status != 0 {
		t.Fatalf("%s %q: status %d\n%s%s", name, args, r.status, r.stdout, r.stderr)
	}
	return r.stdout
}

// A server is a cnbd serve that runs.
type server struct {
	cmd    *exec.Cmd
	uri    string // of the first export
	socket string // of uri
	log    *lockedBuffer
	exited chan struct{}
}

// serve starts cnbd serve with args and waits until it is ready. The test ends
// it if it still runs.
func serve(t testing.TB, args ...string) *server {
	t.Helper()
	s, err := start(args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		if t.Failed() {
			t.Logf("log of the server %q:\n%s", args, tail(s.log.String(), 4000))
		}
	})
	return s
}

// start is serve outside of a test's own goroutine.
func start(args ...string) (*server, error) {
	s := &server{cmd: exec.Command(binary, append([]string{"serve"}, args...)...), log: &lockedBuffer{}, exited: make(chan struct{})}
	s.cmd.Stderr = s.log
	// A test that dies takes its servers along.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	ready := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			select {
			case ready <- lines.Text():
			default:
			}
		}
		_ = s.cmd.Wait() // cmd.ProcessState tells
		close(s.exited)
	}()
	select {
	case s.uri = <-ready:
	case <-s.exited:
		return nil, fmt.Errorf("cnbd serve %q ended: %v\n%s", args, s.cmd.ProcessState, s.log)
	case <-time.After(time.Minute):
		s.kill()
		return nil, fmt.Errorf("cnbd serve %q is not ready after a minute\n%s", args, s.log)
	}
	_, s.socket, _ = strings.Cut(s.uri, "?socket=")
	return s, nil
}

// kill ends the server at once, as SIGKILL does.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	<-s.exited
}

// stop ends the server in good order.
func (s *server) stop(t testing.TB) {
	t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatalf("%v\n%s", err, s.log)
	}
	select {
	case <-s.exited:
	case <-time.After(2 * time.Minute):
		t.Fatalf("the server does not stop\n%s", s.log)
	}
	if code := s.cmd.ProcessState.ExitCode(); code != 0 {
		t.Fatalf("the server ended with status %d\n%s", code, s.log)
	}
}

// lockedBuffer takes the log of a server while the test may read it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// tail is the end of s, n bytes at most.
func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}
