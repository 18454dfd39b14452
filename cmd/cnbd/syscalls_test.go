//go:build !race && !invariants

package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"cnbd/nbd"
)

// TestSystemCalls counts what the program asks the kernel for: a write of 4 KiB and
// a FLUSH are one write and one fdatasync of the backing file.
func TestSystemCalls(t *testing.T) {
	strace := tool(t, "strace")
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.cnbd")
	s := serve(t, "--size", "64MiB", "--commit-interval", "1h", "--writeback-expire", "1h", path)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	write := func(i int) {
		if err := c.WriteAt(t.Context(), []byte(strings.Repeat(fmt.Sprint(i%10), 4096)), uint64(i)*65536, false); err != nil {
			t.Fatal(err)
		}
		if err := c.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	out := filepath.Join(dir, "trace")
	cmd := exec.Command(strace, "-f", "-y", "-e", "trace=pwrite64,pwritev,pwritev2,write,fdatasync,fsync,sync_file_range", "-o", out, "-p", fmt.Sprint(s.cmd.Process.Pid))
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := bufio.NewScanner(stderr)
	for said.Scan() && !strings.Contains(said.Text(), "attached") {
		if strings.Contains(said.Text(), "Operation not permitted") {
			_ = cmd.Wait()
			t.Skip("strace may not attach here")
		}
	}
	const flushes = 20
	for i := range flushes {
		write(i + 1)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for said.Scan() {
	}
	_ = cmd.Wait()
	trace, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	count := make(map[string]int)
	call := regexp.MustCompile(`^\d+ +(\w+)\(\d+<([^>]*)>`)
	for line := range strings.Lines(string(trace)) {
		if m := call.FindStringSubmatch(line); m != nil && m[2] == path {
			count[m[1]]++
		}
	}
	if len(count) != 2 || count["pwrite64"] != flushes || count["fdatasync"] != flushes {
		t.Errorf("%d times a write of 4 KiB and a FLUSH: %v\n%s", flushes, count, trace)
	}
	t.Logf("%d times a write of 4 KiB and a FLUSH: %v", flushes, count)
}
