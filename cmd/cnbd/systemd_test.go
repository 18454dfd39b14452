//go:build !race && !invariants

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cnbd/nbd"
)

// A unit is a cnbd serve that runs as under systemd.
type unit struct {
	cmd    *exec.Cmd
	stderr *os.File // a file has all that was logged before a notification
	notify *net.UnixConn
}

func (u *unit) log(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(u.stderr.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// startUnit runs cnbd serve with args; variables are added to its environment,
// and files are what systemd passes.
func startUnit(t *testing.T, variables []string, files []*os.File, args ...string) *unit {
	t.Helper()
	return startUnitOf(t, binary, variables, files, args...)
}

// startUnitOf is startUnit with another program for cnbd.
func startUnitOf(t *testing.T, program string, variables []string, files []*os.File, args ...string) *unit {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { notify.Close() })
	stderr, err := os.Create(filepath.Join(dir, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stderr.Close() })
	// LISTEN_PID is that of the server, which only a shell between can know.
	script := `exec "$@"`
	if len(files) > 0 {
		script = fmt.Sprintf(`LISTEN_FDS=%d LISTEN_PID=$$ exec "$@"`, len(files))
	}
	u := &unit{exec.Command("/bin/sh", append([]string{"-c", script, "sh", program, "serve"}, args...)...), stderr, notify}
	u.cmd.Env = append(append(os.Environ(), "NOTIFY_SOCKET="+path), variables...)
	u.cmd.ExtraFiles = files
	u.cmd.Stderr = stderr
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := u.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = u.cmd.Process.Kill()
		_ = u.cmd.Wait()
		if t.Failed() {
			t.Logf("log of the server:\n%s", tail(u.log(t), 4000))
		}
	})
	return u
}

// expect waits for the next notification, which has to match the pattern.
func (u *unit) expect(t *testing.T, pattern string) {
	t.Helper()
	b := make([]byte, 1024)
	u.notify.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := u.notify.Read(b)
	if err != nil || !regexp.MustCompile("^"+pattern+"$").Match(b[:n]) {
		t.Fatalf("notified of %q, %v; want %q", b[:n], err, pattern)
	}
}

func (u *unit) signal(t *testing.T, sig os.Signal) {
	t.Helper()
	if err := u.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// signalChild signals the server where the program runs it as its child.
func (u *unit) signalChild(t *testing.T, sig os.Signal) {
	t.Helper()
	pid := u.cmd.Process.Pid
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(child, sig.(syscall.Signal)); err != nil {
		t.Fatal(err)
	}
}

// stop ends the server in good order.
func (u *unit) stop(t *testing.T) {
	t.Helper()
	u.signal(t, syscall.SIGTERM)
	u.expect(t, "STOPPING=1")
	if err := u.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestSystemd: a passed socket is served on, and readiness is told.
func TestSystemd(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "passed"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	u := startUnit(t, nil, []*os.File{f}, "--size", "64MiB", filepath.Join(dir, "s"))
	u.expect(t, "READY=1")
	c, err := nbd.Dial(t.Context(), "nbd+unix:///?socket="+filepath.Join(dir, "passed"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := os.Lstat(filepath.Join(dir, "s.sock")); err == nil {
		t.Error("it listens on a socket of its own as well")
	}
	u.stop(t)
}

// TestWatchdog: the server tells again and again that it is alive if systemd asks
// for it, and one that hangs does not.
func TestWatchdog(t *testing.T) {
	dir := t.TempDir()
	u := startUnit(t, []string{"WATCHDOG_USEC=200000"}, nil, "--size", "64MiB", filepath.Join(dir, "s"))
	u.expect(t, "READY=1")
	for range 5 {
		u.expect(t, "WATCHDOG=1")
	}
	u.signal(t, syscall.SIGSTOP)
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(u.cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("not stopped: %v, %v", status, err)
	}
	// What it had sent before it was stopped is in the socket.
	b := make([]byte, 64)
	u.notify.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	n := 0
	for _, err := u.notify.Read(b); err == nil; _, err = u.notify.Read(b) {
		n++
	}
	if n > 2 {
		t.Errorf("a stopped server has sent %d notifications", n)
	}
	u.signal(t, syscall.SIGCONT)
	u.expect(t, "WATCHDOG=1")
	u.signal(t, syscall.SIGTERM)
	for { // pings may be on their way
		u.notify.SetReadDeadline(time.Now().Add(20 * time.Second))
		n, err := u.notify.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if string(b[:n]) == "STOPPING=1" {
			break
		}
	}
	if err := u.cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestReload: SIGHUP applies what can change while clients are served, names
// what cannot, and a file with faults changes nothing.
func TestReload(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "cnbd.yaml")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("exports: [{path: %s/s, size: 64MiB}]\nlog-format: json\n%s\n", dir, more)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("log-level: error")
	u := startUnit(t, nil, nil, "--config", file)
	u.expect(t, "READY=1")
	if log := u.log(t); log != "" {
		t.Errorf("logged with level error: %s", log)
	}
	reload := func(want ...string) {
		t.Helper()
		before := len(u.log(t))
		u.signal(t, syscall.SIGHUP)
		u.expect(t, `RELOADING=1\nMONOTONIC_USEC=[0-9]+`)
		u.expect(t, "READY=1")
		log := u.log(t)[before:]
		for _, w := range want {
			if !strings.Contains(log, w) {
				t.Errorf("logged %q, want %s in it", log, w)
			}
		}
	}
	write("log-level: info")
	reload(`"message":"reloaded"`)
	write("log-level: info\ncache: 300MiB\nidle-timeout: 1h")
	reload(`"keys":["cache","idle-timeout"]`)
	reload(`"keys":["cache","idle-timeout"]`) // still to be done
	write("log-level: debug\ncache: 1MiB")
	reload("cache: 1MiB is out of range", "not reloaded")
	if log := u.log(t); strings.Contains(log, `"level":"debug"`) {
		t.Errorf("a file with faults was applied: %s", log)
	}
	// Clients have been served all the time.
	c, err := nbd.Dial(t.Context(), "nbd+unix:///?socket="+dir+"/s.sock")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	write("log-level: error")
	reload()
	before := len(u.log(t))
	u.stop(t)
	if log := u.log(t)[before:]; log != "" {
		t.Errorf("logged with level error: %s", log)
	}
}
