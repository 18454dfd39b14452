//go:build !race && !invariants

package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/disk"
	"cnbd/nbd"
)

// TestSocketSettings: who a unix socket is given to, and a socket that has no file.
func TestSocketSettings(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	name := fmt.Sprintf("@cnbd-%d", os.Getpid())
	s := serve(t, "--size=64MiB", "--socket-owner=nobody", "--socket-group=12345", "--socket-mode=0660",
		"--listen=unix:"+dir+"/s", "--listen=unix:"+name, dir+"/disk")
	info, err := os.Stat(dir + "/s")
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if st.Uid != 65534 || st.Gid != 12345 || info.Mode().Perm() != 0o660 {
		t.Errorf("the socket belongs to %d:%d, mode %v", st.Uid, st.Gid, info.Mode())
	}
	for _, uri := range []string{"nbd+unix:///?socket=" + dir + "/s", "nbd+unix:///?socket=" + name} {
		c, err := nbd.Dial(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	do(t, tool(t, "qemu-img"), "info", "--image-opts", "driver=nbd,server.type=unix,server.abstract=on,server.path="+name[1:])
	s.stop(t)
	for args, want := range map[string]string{
		"--socket-owner=nobody-at-all": "socket-owner: user: unknown user nobody-at-all",
		"--socket-group=no-such-group": "socket-group: group: unknown group no-such-group",
	} {
		if r := try(t, binary, "serve", args, dir+"/disk"); r.status != exitUsage || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: status %d: %s", args, r.status, r.stderr)
		}
	}
}

// startPassing starts cnbd serve with args and the sockets of listeners, as
// systemd passes them.
func startPassing(t *testing.T, stderr *lockedBuffer, listeners []net.Listener, args ...string) *exec.Cmd {
	t.Helper()
	// LISTEN_PID is that of the server, which only a shell between can know.
	cmd := exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh", binary, "serve"}, args...)...)
	cmd.Env = append(os.Environ(), fmt.Sprintf("LISTEN_FDS=%d", len(listeners)))
	for _, l := range listeners {
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestPassedSockets: several at once, of all kinds; one that other hosts can reach
// needs TLS, or leave.
func TestPassedSockets(t *testing.T) {
	dir := t.TempDir()
	do(t, binary, "create", "--size=64MiB", dir+"/disk")
	listen := func(network, address string) net.Listener {
		t.Helper()
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	local := []net.Listener{listen("unix", dir+"/one"), listen("tcp", "127.0.0.1:0"), listen("unix", fmt.Sprintf("@cnbd-passed-%d", os.Getpid())), listen("tcp", "[::1]:0")}
	var log lockedBuffer
	cmd := startPassing(t, &log, local, dir+"/disk")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for _, l := range local {
		if !lines.Scan() || lines.Text() != nbd.URIOf(l.Addr(), "").String() {
			t.Fatalf("URI %q for %v\n%s", lines.Text(), l.Addr(), &log)
		}
		c, err := nbd.Dial(t.Context(), lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.WriteAt(t.Context(), []byte{1}, 0, true); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
	if _, err := os.Stat(dir + "/one"); err != nil {
		t.Errorf("the socket of systemd is gone: %v", err)
	}

	open := []net.Listener{listen("unix", dir+"/two"), listen("tcp", "0.0.0.0:0")}
	var refusal lockedBuffer
	cmd = startPassing(t, &refusal, open, dir+"/disk")
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != exitUsage || !strings.Contains(refusal.String(), "passed by systemd, can be reached by other hosts") {
		t.Errorf("%v: %s", err, &refusal)
	}
}

// TestExitWithParent: the server goes, in good order, when the process does that
// has started it.
func TestExitWithParent(t *testing.T) {
	dir := t.TempDir()
	// The shell waits, so it is the parent; nobody kills the server.
	cmd := exec.Command("/bin/sh", "-c", `"$@" & wait`, "sh", binary, "serve", "--exit-with-parent", "--size=64MiB", dir+"/disk")
	var log lockedBuffer
	cmd.Stderr = &log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	uri, err := lines.ReadString('\n')
	if err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	c, err := nbd.Dial(t.Context(), strings.TrimSpace(uri))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt(t.Context(), []byte("not flushed"), 0, false); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := lines.ReadByte(); ended <- err }() // its last descriptor closes with the server
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatalf("it goes on\n%s", &log)
	}
	_ = cmd.Wait()
	if !strings.Contains(log.String(), "the parent process has ended") || !strings.Contains(log.String(), "everything is committed") {
		t.Errorf("log: %s", &log)
	}
	f, err := disk.Open(dir+"/disk", disk.OpenOptions{})
	if err != nil {
		t.Fatalf("the store is not free: %v", err)
	}
	f.Close()
	s := serve(t, dir+"/disk")
	if c, err = nbd.Dial(t.Context(), s.uri); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 11)
	if err := c.ReadAt(t.Context(), got, 0); err != nil || string(got) != "not flushed" {
		t.Errorf("%q, %v", got, err)
	}
	s.stop(t)
}

// TestOwnUser: the server needs no privileges, and what it makes is closed to others.
func TestOwnUser(t *testing.T) {
	needRoot(t)
	setpriv := tool(t, "setpriv")
	dir, err := os.MkdirTemp("", "cnbd-own-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, err := range []error{os.Chmod(dir, 0o755), os.Chown(dir, 65534, 65534)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	as := func(id string, args ...string) []string {
		return append([]string{"--reuid", id, "--regid", id, "--clear-groups", "--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all"}, args...)
	}
	cmd := exec.Command(setpriv, as("65534", binary, "serve", "--size=64MiB", dir+"/disk")...)
	var log lockedBuffer
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	uri, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	for _, name := range []string{"disk", "disk.sock", "disk.control"} {
		info, err := os.Stat(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 65534 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s belongs to %d, mode %v", name, st.Uid, info.Mode())
		}
	}
	c, err := nbd.Dial(t.Context(), strings.TrimSpace(uri)) // root may
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt(t.Context(), []byte{1}, 0, true); err != nil {
		t.Error(err)
	}
	c.Close()
	nbdinfo := tool(t, "nbdinfo")
	if r := try(t, setpriv, as("65534", nbdinfo, strings.TrimSpace(uri))...); r.status != 0 {
		t.Errorf("its own user: %s", r.stderr)
	}
	for _, args := range [][]string{{nbdinfo, strings.TrimSpace(uri)}, {binary, "info", dir + "/disk"}, {"cat", dir + "/disk"}} {
		if r := try(t, setpriv, as("65533", args...)...); r.status == 0 || !strings.Contains(r.stderr, "ermission denied") {
			t.Errorf("another user, %q: status %d: %s", args, r.status, r.stderr)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
}
