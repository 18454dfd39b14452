package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests of this file let other people's clients judge the server.

// tool runs a program and returns its standard output. It skips the test if the
// program is not installed; the message is one that the test script counts.
func tool(t *testing.T, name string, args ...string) []byte {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("MISSING TOOL: %s", name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, &stderr)
	}
	return out
}

// background starts a program that runs until the end of the test.
func background(t *testing.T, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("MISSING TOOL: %s", name)
	}
	cmd := exec.Command(path, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(unix.SIGTERM)
		overdue := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		defer overdue.Stop()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %v\n%s", name, cmd.ProcessState, &output)
		}
	})
}

// listens waits until a program accepts connections on a unix socket, which is a
// moment after its file is there.
func listens(t *testing.T, socket string) {
	t.Helper()
	eventually(t, "it listens on "+socket, func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// tempFile returns the path of a new file that holds p.
func tempFile(t *testing.T, p []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// strangersSize is the size of the disk that strangers write to.
const strangersSize = 9 << 20

// serveStrangers serves that disk under the empty name, and a read-only one.
func serveStrangers(t *testing.T) (*testServer, *memDisk) {
	d, ro := newMemDisk(strangersSize), newMemDisk(1<<20)
	ro.readOnly = true
	copy(ro.data, pattern(1<<20, 9))
	return serve(t, Options{Exports: []Export{
		{Name: "", Backend: d},
		{Name: "a disk/1", Description: "read-only", Backend: ro},
	}}), d
}

// holey is an image with data, zeroes inside data and long holes.
func holey(n int) []byte {
	p := make([]byte, n)
	for off := 0; off < n; off += 3 << 20 {
		copy(p[off:], pattern(min(1<<20+777, n-off), byte(off>>20)+1))
	}
	return p
}

func TestNbdinfo(t *testing.T) {
	s, _ := serveStrangers(t)
	var info struct {
		Protocol string
		Exports  []struct {
			Name        string `json:"export-name"`
			Description string
			Size        uint64 `json:"export-size"`
			ReadOnly    bool   `json:"is_read_only"`
			FUA         bool   `json:"can_fua"`
			Multi       bool   `json:"can_multi_conn"`
			Trim        bool   `json:"can_trim"`
			Zero        bool   `json:"can_zero"`
			FastZero    bool   `json:"can_fast_zero"`
			Minimum     uint64 `json:"block_size_minimum"`
			Preferred   uint64 `json:"block_size_preferred"`
			Maximum     uint64 `json:"block_size_maximum"`
			DF          bool   `json:"can_df"`
			Cache       bool   `json:"can_cache"`
			Contexts    []string
		}
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--json", "--no-content", s.uri("")), &info); err != nil {
		t.Fatal(err)
	}
	e := info.Exports[0]
	if info.Protocol != "newstyle-fixed" || e.Size != strangersSize || e.ReadOnly || !e.FUA || !e.Multi || !e.Trim || !e.Zero || !e.FastZero {
		t.Errorf("%+v", info)
	}
	if !e.DF || !e.Cache || !slices.Equal(e.Contexts, []string{contextAllocation}) {
		t.Errorf("what structured replies bring: %+v", e)
	}
	if e.Minimum != 1 || e.Preferred != 4096 || e.Maximum != 32<<20 {
		t.Errorf("block sizes: %+v", e)
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--json", "--no-content", s.uri("a disk/1")), &info); err != nil {
		t.Fatal(err)
	}
	if e := info.Exports[0]; e.Name != "a disk/1" || e.Size != 1<<20 || !e.ReadOnly || e.Trim {
		t.Errorf("%+v", e)
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--list", "--json", "--no-content", s.uri("")), &info); err != nil {
		t.Fatal(err)
	}
	if len(info.Exports) != 2 || info.Exports[1].Description != "read-only" {
		t.Errorf("list: %+v", info.Exports)
	}
}

// What is allocated, as nbdinfo and qemu-img see it.
func TestMaps(t *testing.T) {
	s, d := serveStrangers(t)
	d.change(1<<20, pattern(1<<20, 1), false)
	d.change(4<<20+12288, pattern(4096, 1), false)
	want := []struct{ Offset, Length, Type uint64 }{
		{0, 1 << 20, 3}, {1 << 20, 1 << 20, 0}, {2 << 20, 2<<20 + 12288, 3}, {4<<20 + 12288, 4096, 0}, {4<<20 + 16384, 5<<20 - 16384, 3},
	}
	got := want[:0:0]
	if err := json.Unmarshal(tool(t, "nbdinfo", "--map", "--json", s.uri("")), &got); err != nil || !slices.Equal(got, want) {
		t.Errorf("nbdinfo: %v, %v", got, err)
	}
	var qemu []struct {
		Start, Length uint64
		Zero, Data    bool
	}
	if err := json.Unmarshal(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri("")), &qemu); err != nil || len(qemu) != len(want) {
		t.Fatalf("qemu-img: %v, %v", qemu, err)
	}
	for i, q := range qemu {
		if w := want[i]; q.Start != w.Offset || q.Length != w.Length || q.Zero != (w.Type == 3) || q.Data == q.Zero {
			t.Errorf("qemu-img: %+v, want %v", q, w)
		}
	}
	// More extents than one answer has.
	for off := 0; off < strangersSize; off += 4 * 4096 {
		d.change(uint64(off), append(pattern(4096, 1), make([]byte, 3*4096)...), false)
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--map", "--json", s.uri("")), &got); err != nil || len(got) != 2*strangersSize/(4*4096) {
		t.Errorf("nbdinfo: %d extents, %v", len(got), err)
	}
	if m := s.Metrics(); len(m.Errors) != 0 || m.BlockStatus.Requests == 0 {
		t.Errorf("%+v", m)
	}
}

// A script for libnbd's shell: see there.
func TestNbdsh(t *testing.T) {
	s, _ := serveStrangers(t)
	script, err := os.ReadFile("testdata/libnbd.py")
	if err != nil {
		t.Fatal(err)
	}
	// The module belongs to the system's Python, which need not be the first.
	t.Setenv("PATH", "/usr/bin:"+os.Getenv("PATH"))
	tool(t, "nbdsh", "-c", fmt.Sprintf("uri = %q", s.uri("")), "-c", string(script))
}

func TestNbdcopy(t *testing.T) {
	s, d := serveStrangers(t)
	d.change(0, pattern(strangersSize, 77), false) // to be overwritten, holes too
	p := holey(strangersSize)
	tool(t, "nbdcopy", "--flush", "--threads=4", "--connections=4", "--requests=32", tempFile(t, p), s.uri(""))
	data, durable := d.contents()
	mustEqual(t, "copied in", data, p)
	mustEqual(t, "flushed", durable, p)
	out := tempFile(t, nil)
	tool(t, "nbdcopy", "--threads=4", "--connections=4", s.uri(""), out)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "copied out", got, p)
	if m := s.Metrics(); m.ConnectionsTotal < 8 || len(m.Errors) != 0 {
		t.Errorf("%d connections, errors %v", m.ConnectionsTotal, m.Errors)
	}
}

func TestQemuImg(t *testing.T) {
	s, d := serveStrangers(t)
	var info struct {
		Size   uint64 `json:"virtual-size"`
		Format string
	}
	if err := json.Unmarshal(tool(t, "qemu-img", "info", "--output=json", s.uri("")), &info); err != nil {
		t.Fatal(err)
	}
	if info.Size != strangersSize || info.Format != "raw" {
		t.Errorf("%+v", info)
	}
	p := holey(strangersSize)
	image := tempFile(t, p)
	d.change(0, pattern(strangersSize, 77), false)
	// -n: into what is there; -W: out of order.
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, s.uri(""))
	data, _ := d.contents()
	mustEqual(t, "converted", data, p)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri(""))
	qcow := image + ".qcow2"
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri(""), qcow)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, qcow)
	if out := tool(t, "qemu-img", "bench", "-c", "2000", "-d", "32", "-f", "raw", "-t", "none", "-w", "--flush-interval=100", s.uri("")); !bytes.Contains(out, []byte("Run completed")) {
		t.Errorf("bench: %s", out)
	}
	m := s.Metrics()
	if len(m.Errors) != 0 || m.BlockStatus.Requests == 0 || m.Flush.Requests < 20 {
		t.Errorf("%+v", m)
	}
}

func TestQemuIO(t *testing.T) {
	s, d := serveStrangers(t)
	// qemu-io tells a wrong pattern by its output and its exit code.
	out := tool(t, "qemu-io", "-f", "raw",
		"-c", "write -P 0x11 0 1M",
		"-c", "write -P 0x22 512 1024", // not aligned to pages
		"-c", "write -f -P 0x33 2M 64k", // FUA
		"-c", "write -z 256k 128k", "-c", "write -z -u 512k 64k", "-c", "write -z -n 576k 64k", // zeroes: no hole, hole, fast
		"-c", "aio_write -P 0x44 4M 2M", "-c", "aio_write -P 0x55 6M 2M", "-c", "aio_flush",
		"-c", "discard 3M 64k",
		"-c", "flush",
		"-c", "read -P 0x11 0 512", "-c", "read -P 0x22 512 1024", "-c", "read -P 0x11 1536 200k",
		"-c", "read -P 0 256k 128k", "-c", "read -P 0 512k 128k", "-c", "read -P 0x33 2M 64k",
		"-c", "read -P 0x44 4M 2M", "-c", "read -P 0x55 6M 2M",
		s.uri(""))
	if bytes.Contains(out, []byte("failed")) {
		t.Errorf("%s", out)
	}
	data, durable := d.contents()
	mustEqual(t, "written", data[512:1536], bytes.Repeat([]byte{0x22}, 1024))
	mustEqual(t, "flushed", durable, data)
	m := s.Metrics()
	if m.Flush.Requests == 0 || m.Trim.Requests == 0 || m.WriteZeroes.Requests < 3 || len(m.Errors) != 0 {
		t.Errorf("%+v", m)
	}
}

func TestFio(t *testing.T) {
	if _, err := exec.LookPath("fio"); err != nil {
		t.Skip("MISSING TOOL: fio")
	}
	if out, err := exec.CommandContext(t.Context(), "fio", "--enghelp=nbd").CombinedOutput(); err != nil || bytes.Contains(out, []byte("not loadable")) {
		t.Skipf("MISSING TOOL: fio with ioengine nbd: %s", out)
	}
	s, _ := serveStrangers(t)
	// Three connections, each with a part of its own, writing blocks of mixed
	// sizes, and then reading all of it back.
	var result struct {
		Jobs []struct {
			Error int
			Read  struct {
				Bytes uint64 `json:"io_bytes"`
			}
		}
	}
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "fio", "--output="+out, "--output-format=json", "--name=verify", "--ioengine=nbd", "--uri="+s.uri(""),
		"--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--size=3m", "--offset_increment=3m", "--numjobs=3",
		"--iodepth=16", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randrepeat=1")
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text[max(0, bytes.IndexByte(text, '{')):], &result); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if len(result.Jobs) != 3 {
		t.Errorf("%d jobs", len(result.Jobs))
	}
	for _, j := range result.Jobs {
		if j.Error != 0 || j.Read.Bytes == 0 {
			t.Errorf("%+v", j)
		}
	}
	if m := s.Metrics(); m.Flush.Requests == 0 || len(m.Errors) != 0 {
		t.Errorf("%+v", m)
	}
}

// A libnbd with extended headers, of a newer Debian than most.
func TestLibnbdOfDebian13(t *testing.T) {
	tree := "../build/debian13"
	if _, err := os.Stat(tree + "/usr/bin/nbdsh"); err != nil || os.Geteuid() != 0 {
		t.Skip("no tree of Debian 13, or not root: make debian13")
	}
	big := &hugeDisk{memDisk: newMemDisk(4096), trims: make(chan [2]uint64, 1)}
	s := serve(t, Options{Exports: []Export{{Name: "", Backend: newMemDisk(strangersSize)}, {Name: "huge", Backend: big}}})
	dir, err := os.MkdirTemp(tree+"/tmp", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := Listen("unix:"+dir+"/s", 0o600)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	inside := URI{Network: "unix", Address: filepath.Join("/tmp", filepath.Base(dir), "s")}
	uri := inside.String()
	inside.Export = "huge"
	script, err := os.ReadFile("testdata/libnbd13.py")
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs(tree)
	if err != nil {
		t.Fatal(err)
	}
	tool(t, "chroot", root, "nbdsh", "-c", fmt.Sprintf("uri, huge = %q, %q", uri, inside.String()), "-c", string(script))
	if got := <-big.trims; got != [2]uint64{4096, 16<<40 - 4096} {
		t.Errorf("trim %v", got)
	}
	out := tool(t, "chroot", root, "nbdinfo", "--map", "--totals", inside.String())
	if !bytes.Contains(out, []byte("17592186044416 100.0%   3 hole,zero")) {
		t.Errorf("totals: %s", out)
	}
}

// nbdkit stands between: what it speaks to us is what its clients speak to it.
func TestNbdkitProxy(t *testing.T) {
	if _, err := exec.LookPath("nbdcopy"); err != nil {
		t.Skip("MISSING TOOL: nbdcopy")
	}
	s, d := serveStrangers(t)
	p := holey(strangersSize)
	image, out := tempFile(t, p), filepath.Join(t.TempDir(), "out")
	tool(t, "nbdkit", "--exit-with-parent", "-U", "-", "nbd", "uri="+s.uri(""), "--run",
		"nbdcopy --flush '"+image+"' \"$uri\" && nbdcopy \"$uri\" '"+out+"'")
	data, durable := d.contents()
	mustEqual(t, "copied in", data, p)
	mustEqual(t, "flushed", durable, p)
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "copied out", got, p)
	if errs := s.Metrics().Errors; len(errs) != 0 {
		t.Errorf("errors: %v", errs)
	}
}

// The disk as a file: what the kernel's page cache reads and writes through FUSE.
func TestNbdfuse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("no FUSE here")
	}
	s, d := serveStrangers(t)
	dir := t.TempDir()
	background(t, "nbdfuse", dir, s.uri(""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "nbd")
	eventually(t, "it is mounted", func() bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Size() == strangersSize
	})
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := pattern(2<<20+777, 3)
	if _, err := f.WriteAt(p, 12345); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(p))
	if _, err := f.ReadAt(got, 12345); err != nil {
		t.Error(err)
	}
	f.Close()
	mustEqual(t, "read back", got, p)
	_, durable := d.contents()
	mustEqual(t, "synced", durable[12345:][:len(p)], p)
	if errs := s.Metrics().Errors; len(errs) != 0 {
		t.Errorf("errors: %v", errs)
	}
}

// The client of the kernel's driver, as far as it comes without the driver: it
// lists, and it negotiates before it wants its device.
func TestNbdClient(t *testing.T) {
	opened := make(chan string, 1)
	s := serve(t, Options{
		Exports: []Export{{Name: "a", Backend: newMemDisk(1 << 20)}, {Name: "b", Description: "the second", Backend: newMemDisk(1 << 20)}},
		Log: func(e Event) {
			if e.Kind == EventOpen {
				opened <- e.Export
			}
		},
	})
	l, err := Listen("tcp:127.0.0.1:0", 0)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	_, port, _ := strings.Cut(l.Addr().String(), ":")
	out := tool(t, "nbd-client", "-l", "127.0.0.1", port)
	if !bytes.Contains(out, []byte("a\nb")) {
		t.Errorf("list: %q", out)
	}
	if m := s.Metrics(); m.HandshakesFailed != 0 {
		t.Errorf("%+v", m)
	}
	path, err := exec.LookPath("nbd-client")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), path, "-L", "-N", "b", "-unix", s.path, "/dev/null").CombinedOutput(); err == nil {
		t.Fatalf("it took /dev/null for its device: %s", out)
	} else if !bytes.Contains(out, []byte("size = 1MB")) {
		t.Fatalf("it did not negotiate: %s", out)
	}
	if name := <-opened; name != "b" {
		t.Errorf("it opened %q", name)
	}
}

// Other people's servers judge the client.
func TestClientOfStrangers(t *testing.T) {
	const size = 4 << 20
	for name, args := range map[string]func(socket string) []string{
		"nbdkit": func(socket string) []string { return []string{"-f", "-U", socket, "memory", fmt.Sprint(size)} },
		"qemu-nbd": func(socket string) []string {
			return []string{"-k", socket, "-f", "raw", "--persistent", "--discard=unmap", "-x", "", tempFile(t, make([]byte, size))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(socketDir(t), "s")
			background(t, name, args(socket)...)
			uri := URI{Network: "unix", Address: socket}.String()
			var c *Client
			eventually(t, "it listens", func() bool {
				var err error
				c, err = Dial(t.Context(), uri)
				return err == nil
			})
			if c.Size() != size || c.Flags()&FlagSendFlush == 0 {
				t.Errorf("size %d, flags %#x", c.Size(), c.Flags())
			}
			r := testRand(t)
			model := make([]byte, size)
			for range 300 {
				n := 1 + r.IntN(1<<(1+r.IntN(17)))
				off := r.IntN(size - n + 1)
				got := make([]byte, n)
				var err error
				switch r.IntN(8) {
				case 0:
					clear(model[off:][:n])
					err = c.WriteZeroes(t.Context(), uint64(off), uint64(n), ZeroFlags{})
				case 1:
					err = c.Flush(t.Context())
				case 2, 3, 4:
					p := pattern(n, byte(r.Uint32()))
					copy(model[off:], p)
					err = c.WriteAt(t.Context(), p, uint64(off), r.IntN(4) == 0)
				default:
					err = c.ReadAt(t.Context(), got, uint64(off))
					mustEqual(t, "read", got, model[off:][:n])
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := c.ReadAt(t.Context(), make([]byte, 1), size); !errors.Is(err, EINVAL) {
				t.Errorf("read past the end: %v", err)
			}
			if err := c.Disconnect(t.Context()); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
			if list, err := List(t.Context(), uri); err != nil || len(list) != 1 {
				t.Errorf("List: %v, %v", list, err)
			}
		})
	}
}
