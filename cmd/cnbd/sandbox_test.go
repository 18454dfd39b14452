//go:build !race && !invariants

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cnbd/nbd"
)

// TestSandbox: what a server asks the kernel for, from its start to its end, is what
// its unit lets it have. (No service manager is at hand in a test, so the calls are
// compared with what the unit says.)
func TestSandbox(t *testing.T) {
	strace := tool(t, "strace")
	if r := try(t, strace, "-o", "/dev/null", "true"); r.status != 0 {
		t.Skipf("strace may not trace here: %s", r.stderr)
	}
	allowed := unitSystemCalls(t, "../../systemd/cnbd.service")

	dir := t.TempDir()
	out, file := filepath.Join(dir, "trace"), filepath.Join(dir, "cnbd.yaml")
	text := fmt.Sprintf("exports: [{path: %[1]s/s, size: 64MiB}]\nlisten: ['unix:%[1]s/sock', 'tcp:127.0.0.1:0', 'unix:@%[1]s']\n"+
		"metrics: unix:%[1]s/metrics\nsocket-owner: '%[2]d'\nsocket-group: '%[3]d'\n", dir, os.Getuid(), os.Getgid())
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	// serve starts a program; here it is one that starts ours.
	shell := filepath.Join(dir, "traced")
	script := fmt.Sprintf("#!/bin/sh\nexec %s -f -qq -o %s %s \"$@\"\n", strace, out, binary)
	if err := os.WriteFile(shell, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	u := startUnitOf(t, shell, nil, nil, "--config", file)
	u.expect(t, "READY=1")
	c, err := nbd.Dial(t.Context(), "nbd+unix:///?socket="+dir+"/sock")
	if err != nil {
		t.Fatal(err)
	}
	data := []byte(strings.Repeat("0123456789abcdef", 4096))
	for i := range uint64(32) {
		if err := c.WriteAt(t.Context(), data, i<<20, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Trim(t.Context(), 0, 16<<20, true); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadAt(t.Context(), make([]byte, 1<<20), 20<<20); err != nil {
		t.Fatal(err)
	}
	c.Close()
	scrape := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", dir+"/metrics")
	}}}
	r, err := scrape.Get("http://cnbd/metrics")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, r.Body); err != nil || r.StatusCode != http.StatusOK {
		t.Errorf("metrics: %s, %v", r.Status, err)
	}
	r.Body.Close()
	scrape.CloseIdleConnections()
	do(t, binary, "info", dir+"/s")
	do(t, binary, "compact", dir+"/s")
	do(t, binary, "check", "--data", dir+"/s")
	u.signalChild(t, syscall.SIGTERM)
	if err := u.cmd.Wait(); err != nil {
		t.Error(err)
	}

	trace, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]string{}
	call := regexp.MustCompile(`^\d+ +(?:<\.\.\. )?(\w+)[ (]`)
	for line := range strings.Lines(string(trace)) {
		if m := call.FindStringSubmatch(line); m != nil {
			used[m[1]] = line
		}
		if strings.Contains(line, "PROT_WRITE|PROT_EXEC") {
			t.Errorf("MemoryDenyWriteExecute= forbids %s", line)
		}
		if m := regexp.MustCompile(`socket\((AF_\w+)`).FindStringSubmatch(line); m != nil && !slices.Contains([]string{"AF_UNIX", "AF_INET", "AF_INET6"}, m[1]) {
			t.Errorf("RestrictAddressFamilies= forbids %s", line)
		}
	}
	for _, must := range []string{"execve", "pwrite64", "fdatasync", "fallocate", "accept4"} {
		if used[must] == "" {
			t.Errorf("the trace has no %s, it is not of a whole life", must)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(used)) {
		if !allowed[name] {
			t.Errorf("SystemCallFilter= forbids %s", used[name])
		}
	}
	t.Logf("%d system calls, all allowed: %q", len(used), slices.Sorted(maps.Keys(used)))
}

// unitSystemCalls are the calls that the unit allows.
func unitSystemCalls(t *testing.T, path string) map[string]bool {
	t.Helper()
	analyze := tool(t, "systemd-analyze")
	sets := map[string][]string{}
	name := ""
	cmd := exec.Command(analyze, "syscall-filter", "--no-pager")
	cmd.Env = append(os.Environ(), "SYSTEMD_COLORS=0")
	list, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(list)) {
		switch word := strings.TrimSpace(line); {
		case word == "" || word[0] == '#':
		case line[0] == '@':
			name = word
		case line[0] == ' ':
			sets[name] = append(sets[name], word)
		}
	}
	allowed := map[string]bool{}
	var put func(word string, value bool)
	put = func(word string, value bool) {
		if word[0] != '@' {
			allowed[word] = value
			return
		}
		if len(sets[word]) == 0 {
			t.Fatalf("systemd knows no set %s", word)
		}
		for _, w := range sets[word] {
			put(w, value)
		}
	}
	unit, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^SystemCallFilter=(~?)(.*)$`).FindAllStringSubmatch(string(unit), -1) {
		for _, word := range strings.Fields(m[2]) {
			put(word, m[1] == "")
		}
	}
	put("@default", true) // always
	allowed["execve"] = true
	if allowed["mount"] || !allowed["read"] {
		t.Fatalf("the filter of %s is not understood", path)
	}
	return allowed
}
