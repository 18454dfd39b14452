//go:build !race && !invariants

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cnbd/device"
	"cnbd/internal/monitor"
	"cnbd/nbd"
)

func TestQuantile(t *testing.T) {
	const ms = time.Millisecond
	var l nbd.Latency
	bucket := func(bound time.Duration) *uint64 {
		for i, b := range nbd.LatencyBounds {
			if b == bound {
				return &l.Buckets[i]
			}
		}
		t.Fatalf("no bound %v", bound)
		return nil
	}
	check := func(q float64, want time.Duration) {
		t.Helper()
		if got := quantile(&l, q); got != want {
			t.Errorf("%v of %v: %v, want %v", q, l.Buckets, got, want)
		}
	}
	*bucket(10 * ms) = 100 // from 5 ms on
	check(0.5, 7500*time.Microsecond)
	check(1, 10*ms)
	*bucket(100 * ms) = 100 // from 50 ms on
	check(0.5, 10*ms)
	check(0.75, 75*ms)
	l.Buckets[len(l.Buckets)-1] = 200
	check(0.99, 10*time.Second)
	*bucket(10 * time.Microsecond) = 400
	check(0.25, 5*time.Microsecond)
}

// liveOf is an answer, at so many seconds, after n writes of 4 KiB that took a
// millisecond each.
func liveOf(name string, seconds int, n uint64) *liveStatus {
	e := nbd.ExportMetrics{Name: name, Connections: 1}
	e.Write = nbd.CommandMetrics{Requests: n, Bytes: n << 12}
	e.Write.Latency.Sum = time.Duration(n) * time.Millisecond
	for i, b := range nbd.LatencyBounds {
		if b == time.Millisecond {
			e.Write.Latency.Buckets[i] = n
		}
	}
	st := device.Status{DeviceSize: 1 << 30, Capacity: 1 << 30, Codec: "zstd", Ratio: 2, Healthy: true}
	st.Store.DataBytes, st.Store.StoredBytes, st.Store.HostBytes = 512<<20, 256<<20, 300<<20
	st.Store.LogWritten, st.Store.Moved = n<<11, n<<10
	st.Cache.CacheMax, st.Cache.DirtyMax, st.Cache.Dirty, st.Cache.Cached = 1<<16, 1<<15, 1<<14, 1<<15
	st.Cache.Hits, st.Cache.Misses = 3*n, n
	at := time.Unix(int64(seconds), 0)
	return &liveStatus{Time: at, Export: name, Sample: &monitor.Sample{Time: at, Status: st},
		Server: nbd.Metrics{Connections: 2, ConnectionsMax: 128, ConnectionsTotal: 9, BytesMax: 64 << 20, Exports: []nbd.ExportMetrics{{Name: "other"}, e}}}
}

// TestScreen compares screens with what they should be.
func TestScreen(t *testing.T) {
	a := &topStore{path: "/srv/a.cnbd"}
	b := &topStore{path: "/srv/b.cnbd"}
	a.add(liveOf("a", 100, 1000), nil)
	a.add(liveOf("a", 110, 3000), nil)
	b.add(nil, errors.New("/srv/b.cnbd is not served"))
	top := &topper{interval: time.Second, stores: []*topStore{a, b}}

	text := func(rows, columns int) []string {
		lines := strings.Split(top.screen(rows, columns), "\n")
		for i := range lines {
			for _, code := range []string{"\x1b[H", "\x1b[K", "\x1b[J", "\r"} {
				lines[i] = strings.ReplaceAll(lines[i], code, "")
			}
		}
		if !strings.HasPrefix(lines[0], "cnbd top   ") || columns != 30 && !strings.Contains(lines[0], "every 1s") {
			t.Errorf("head %q", lines[0])
		}
		return lines[1:]
	}
	compare := func(name string, got []string, want string) {
		t.Helper()
		if g := strings.TrimSpace(strings.Join(got, "\n")); g != strings.TrimSpace(want) {
			t.Errorf("%s:\n%s\nwant:\n%s", name, g, strings.TrimSpace(want))
		}
	}
	block := `
a   /srv/a.cnbd   1 GiB, zstd, ratio 2.00   good
             requests/s      bytes/s    average     median       99 %   errors
  read                0            0          -          -          -        0
  write             200    800 KiB/s     1.0 ms     750 us     995 us        0
  flush               0            0          -          -          -        0
  trim                0            0          -          -          -        0
  clients  1 (server: 2 of 128); in flight: 0 requests, 0 bytes of 64 MiB
  dirty    [##########..........] 64 MiB of 128 MiB
  cache    [##########..........] 128 MiB of 256 MiB, 75 % hits
  space    [#####...............] 256 MiB of 1 GiB, and 0 bytes garbage
  data     512 MiB stored as 256 MiB; on the host 300 MiB
  cleaner  200 KiB/s moved, 0 recompressed
  backing  400 KiB/s written, 0 read

b.cnbd: /srv/b.cnbd is not served`
	compare("text", text(0, 0), block)
	compare("a large screen", text(40, 100), block)
	table := `
export         state           read     written      flush  ratio  dirty  space  reads/s writes/s
a              good               0   800 KiB/s          -   2.00   50 %   25 %        0      200
b.cnbd         /srv/b.cnbd is not served`
	compare("a small screen", text(10, 100), table)
	for _, line := range text(10, 30) {
		if len([]rune(line)) > 30 {
			t.Errorf("too long for 30 columns: %q", line)
		}
	}
	if lines := text(4, 80); len(lines) != 3 || !strings.HasPrefix(lines[2], "… and 2 lines more") {
		t.Errorf("a tiny screen: %q", lines)
	}
	for i, line := range text(40, 200) {
		if len([]rune(line)) > 80 {
			t.Errorf("line %d does not fit in 80 columns: %q", i, line)
		}
	}

	// A new server begins at 0, and a store that has failed says so.
	again := liveOf("a", 120, 10)
	again.Server.ConnectionsTotal = 1
	again.Fault = "store: sync: I/O error"
	a.add(again, nil)
	lines := text(0, 0)
	if !strings.HasSuffix(lines[1], "FAILED: store: sync: I/O error") || !strings.Contains(strings.Join(lines, "\n"), "  write               0 ") ||
		!strings.Contains(strings.Join(lines, "\n"), "20 KiB written, 0 bytes read since the start") {
		t.Errorf("after a restart:\n%s", strings.Join(lines, "\n"))
	}
}

// TestTop watches two servers, as text and on a terminal, and stores that nobody
// serves.
func TestTop(t *testing.T) {
	dir := t.TempDir()
	s := serve(t, "--size=64MiB", "--export=first", dir+"/one")
	serve(t, "--size=64MiB", dir+"/two")
	do(t, binary, "create", "--size=64MiB", dir+"/idle")
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
				if err := c.WriteAt(t.Context(), make([]byte, 4096), 0, false); err != nil {
					done <- err
					return
				}
			}
		}
	}()
	out := do(t, binary, "top", "--interval=200ms", dir+"/one", dir+"/two")
	for _, want := range []string{"\nfirst   " + dir + "/one   64 MiB, auto", "\ntwo   " + dir + "/two   64 MiB, auto", "  clients  1 (server: 1 of 128); in flight", "  clients  0 (server: 0 of 128)"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("codes of a terminal: %q", out)
	}
	var requests float64
	var unit string
	_, writes, _ := strings.Cut(out, "\n  write ")
	if _, err := fmt.Sscan(writes, &requests, new(string), &unit); err != nil || requests < 10 {
		t.Errorf("%v writes in a second, %v:\n%s", requests, err, out)
	}

	if r := try(t, binary, "top", "--interval=200ms", "--once", dir+"/one", dir+"/idle"); r.status != exitFailed ||
		!strings.Contains(r.stdout, "first   ") || !strings.Contains(r.stdout, "idle: "+dir+"/idle is not served") || r.stderr != "cnbd: "+dir+"/idle is not served\n" {
		t.Errorf("one of two that is not served: %+v", r)
	}
	for args, want := range map[string]result{
		dir + "/idle":                    {"", "cnbd: " + dir + "/idle is not served\n", exitFailed},
		dir + "/missing":                 {"", "cnbd: stat " + dir + "/missing: no such file or directory\n", exitFailed},
		"":                               {"", "cnbd: a BACKING is expected, or a configuration file; cnbd top --help tells more\n", exitUsage},
		"--interval=1ms " + dir + "/one": {"", "cnbd: --interval: 1ms is out of range: give 100ms to 1h\n", exitUsage},
	} {
		if r := try(t, binary, append([]string{"top"}, strings.Fields(args)...)...); r != want {
			t.Errorf("%q: %+v, want %+v", args, r, want)
		}
	}
	file := configFile(t, dir, "exports:\n  - {name: first, path: %s/one}\n  - {name: second, path: %s/two}\n", dir, dir)
	if out := do(t, binary, "top", "--once", "--interval=100ms", "--config="+file); !strings.Contains(out, dir+"/one ") || !strings.Contains(out, dir+"/two ") {
		t.Errorf("all of a file:\n%s", out)
	}
	if out := do(t, binary, "top", "--once", "--interval=100ms", "--config="+file, "second"); strings.Contains(out, dir+"/one ") || !strings.Contains(out, dir+"/two ") {
		t.Errorf("one of a file:\n%s", out)
	}

	for _, end := range []string{"q", "\x03", "signal"} {
		screen := onTerminal(t, end, "top", "--interval=100ms", dir+"/one", dir+"/two")
		if !strings.HasPrefix(screen, "\x1b[?1049h\x1b[?25l\x1b[H") || !strings.HasSuffix(screen, "\x1b[?25h\x1b[?1049l") || !strings.Contains(screen, "q ends it") || strings.Contains(screen, "cancel") {
			t.Errorf("ended by %q, the terminal got %q", end, screen)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
	info := do(t, binary, "info", dir+"/one")
	for _, want := range []string{"\nrequests        0 reads of 0 bytes, ", " writes of ", "; 0 errors\n", "\nlatency         write ", " for each byte that clients wrote; ", "\ncache           "} {
		if !strings.Contains(info, want) {
			t.Errorf("no %q in\n%s", want, info)
		}
	}
}

// onTerminal runs the program on a terminal until it has shown something twice, ends
// it by a key or a signal, and returns all that it has shown. The terminal must be
// left as it was.
func onTerminal(t *testing.T, end string, args ...string) string {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminals: %v", err)
	}
	defer master.Close()
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	limit := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer limit.Stop()
	var shown strings.Builder
	buf := make([]byte, 64<<10)
	sent := false
	for !strings.HasSuffix(shown.String(), "\x1b[?1049l") {
		n, err := master.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, shown.String())
		}
		shown.Write(buf[:n])
		if !sent && strings.Count(shown.String(), "\x1b[H") == 2 {
			sent = true
			if end == "signal" {
				err = cmd.Process.Signal(syscall.SIGTERM)
			} else {
				_, err = master.WriteString(end)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := <-exited; err != nil {
		t.Errorf("ended by %q: %v", end, err)
	}
	if after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || *after != *before {
		t.Errorf("ended by %q, the terminal is %+v, %v; it was %+v", end, after, err, before)
	}
	return shown.String()
}
