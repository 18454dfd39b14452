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

	"golang.org/x/sys/unix"
)

// TestProtection looks at what the kernel shows of a server that may protect itself,
// of one that may not, and of one that is told not to: one warning says what is
// missing, and it serves in any case.
func TestProtection(t *testing.T) {
	needRoot(t)
	setpriv := tool(t, "setpriv")
	const flusher = 0x00080000 // PF_MEMALLOC_NOIO in the kernel's include/linux/sched.h
	ioFlusher := true
	if !capable(unix.CAP_SYS_RESOURCE) {
		ioFlusher = false // the container lacks CAP_SYS_RESOURCE
		t.Log("without CAP_SYS_RESOURCE here: the tests in a virtual machine show the rest (make test-vm)")
	}
	off := []string{"--io-flusher=false", "--lock-memory=false", "--oom-score-adjust=0"}
	for _, tc := range []struct {
		name    string
		caps    string
		args    []string
		locked  bool
		flusher bool
		score   string
		missing []string // in the warning
	}{
		{name: "all", locked: true, flusher: ioFlusher, score: map[bool]string{true: "-999", false: "0"}[ioFlusher],
			missing: map[bool][]string{false: {"io-flusher: it takes CAP_SYS_RESOURCE", "oom-score-adjust: it takes CAP_SYS_RESOURCE"}}[ioFlusher]},
		{name: "nothing permitted", caps: "-sys_resource,-ipc_lock", score: "0",
			missing: []string{"io-flusher: it takes CAP_SYS_RESOURCE", "lock-memory: it takes CAP_IPC_LOCK", "oom-score-adjust: it takes CAP_SYS_RESOURCE"}},
		{name: "nothing wanted", args: off, score: "0"},
		{name: "nothing wanted or permitted", caps: "-sys_resource,-ipc_lock", args: off, score: "0"},
		{name: "memory alone", args: []string{off[0], off[2]}, locked: true, score: "0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			args := []string{}
			if tc.caps != "" {
				args = append(args, "--bounding-set="+tc.caps, "--inh-caps="+tc.caps)
			}
			args = append(append(args, binary, "serve", "--size=64MiB", "--log-format=json"), tc.args...)
			cmd := exec.Command(setpriv, append(args, filepath.Join(t.TempDir(), "disk"))...)
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
			defer cmd.Wait()
			defer cmd.Process.Kill()
			if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
				t.Fatalf("%v\n%s", err, &log)
			}

			proc := fmt.Sprintf("/proc/%d/", cmd.Process.Pid)
			read := func(path string) string {
				b, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return string(b)
			}
			kib := func(key string) (n int) {
				m := regexp.MustCompile(key + `:\s+(\d+) kB`).FindStringSubmatch(read(proc + "status"))
				if _, err := fmt.Sscan(m[1], &n); err != nil {
					t.Fatal(err)
				}
				return n
			}
			// What is locked is all that is mapped, but it is not all in memory.
			if locked := kib("VmLck") > 0; locked != tc.locked || kib("VmRSS") > 100<<10 {
				t.Errorf("locked %v, want %v; %d KiB are resident", locked, tc.locked, kib("VmRSS"))
			}
			if score := strings.TrimSpace(read(proc + "oom_score_adj")); score != tc.score {
				t.Errorf("OOM score %s, want %s", score, tc.score)
			}
			threads, err := filepath.Glob(proc + "task/*/stat")
			if err != nil || len(threads) < 2 {
				t.Fatalf("threads %v, %v", threads, err)
			}
			for _, path := range threads {
				_, stat, _ := strings.Cut(read(path), ") ")
				var flags int
				if _, err := fmt.Sscan(strings.Fields(stat)[6], &flags); err != nil {
					t.Fatal(err)
				}
				if (flags&flusher != 0) != tc.flusher {
					t.Errorf("%s: flags %#x, an IO flusher is wanted: %v", path, flags, tc.flusher)
				}
			}
			// Its end, which is when all of the log is here.
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v\n%s", err, &log)
			}
			warnings := 0
			for line := range strings.Lines(log.String()) {
				if strings.Contains(line, `"level":"warn"`) {
					warnings++
					for _, m := range tc.missing {
						if !strings.Contains(line, m) {
							t.Errorf("warning %s lacks %q", line, m)
						}
					}
				}
			}
			if want := min(len(tc.missing), 1); warnings != want {
				t.Errorf("%d warnings, want %d:\n%s", warnings, want, &log)
			}
		})
	}
}
