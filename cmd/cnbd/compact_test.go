//go:build !race && !invariants

package main

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cnbd/nbd"
)

// punctured writes noise to the device at uri and trims all but a sixteenth of it,
// in pieces that are spread over all segments.
func punctured(t *testing.T, uri string, bytes uint64) {
	t.Helper()
	c, err := nbd.Dial(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const step = 256 << 10
	p := make([]byte, step)
	rng := rand.NewChaCha8([32]byte{1})
	for off := uint64(0); off < bytes; off += step {
		rng.Read(p)
		if err := c.WriteAt(t.Context(), p, off, false); err != nil {
			t.Fatal(err)
		}
	}
	for off := uint64(0); off < bytes; off += step {
		if err := c.Trim(t.Context(), off, step*15/16, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestCompact: the space of what was trimmed comes back, from a store that is served
// and from one that is not, and the rest stays.
func TestCompact(t *testing.T) {
	const data = 96 << 20
	for _, served := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "s")
		s := serve(t, "--size", "128MiB", path)
		punctured(t, s.uri, data)
		if !served {
			s.kill()
		}
		var r compactReport
		if err := json.Unmarshal([]byte(do(t, binary, "compact", "--json", path)), &r); err != nil {
			t.Fatal(err)
		}
		t.Logf("served %v: %+v", served, r)
		// What is alive, and the fixed part of what a store takes (docs/architecture.md).
		const live, fixed = data / 16, 14 * 2 << 20
		if r.Served != served || r.HostBefore < data/2 || r.HostAfter > live*9/8+fixed || !served && r.HostAfter > live*9/8+4<<20 {
			t.Errorf("served %v: %+v", served, r)
		}
		if text := do(t, binary, "compact", path); !strings.Contains(text, "on the host before") {
			t.Errorf("the second time it says %q", text)
		}
		if served {
			s.stop(t)
		}
		do(t, binary, "check", "--data", path)
	}
}

// TestCompactByName finds the store in a configuration.
func TestCompactByName(t *testing.T) {
	dir := t.TempDir()
	path, file := filepath.Join(dir, "s"), filepath.Join(dir, "c.yaml")
	do(t, binary, "create", "--size", "64MiB", path)
	if err := os.WriteFile(file, []byte("exports:\n  - name: vm1\n    path: "+path+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	do(t, binary, "compact", "--config", file, "vm1")
	if r := try(t, binary, "compact", "--config", file, "vm2"); r.status != exitUsage || !strings.Contains(r.stderr, `no export named "vm2"`) {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
}

// TestCompactStopped: Ctrl-C ends it in good order.
func TestCompactStopped(t *testing.T) {
	for _, served := range []bool{true, false} {
		path := filepath.Join(t.TempDir(), "s")
		s := serve(t, "--size", "512MiB", path)
		punctured(t, s.uri, 384<<20)
		if !served {
			s.kill()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, binary, "compact", path)
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// At whatever moment: it has ended by itself, or says that it was stopped.
		time.Sleep(100 * time.Millisecond)
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Wait()
		text := out.String()
		switch code := cmd.ProcessState.ExitCode(); {
		case code == exitFailed && strings.Contains(text, "stopped; what is done stays done") && strings.Count(text, "\n") == 1:
		case code == exitDone && strings.Contains(text, "on the host before"):
		default:
			t.Errorf("served %v: status %d\n%s", served, code, text)
		}
		t.Logf("served %v: %s", served, text)
		if served {
			s.stop(t)
		}
		do(t, binary, "check", path)
	}
}
