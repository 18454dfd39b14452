package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
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
		}
	}
	if err := json.Unmarshal(tool(t, "nbdinfo", "--json", "--no-content", s.uri("")), &info); err != nil {
		t.Fatal(err)
	}
	e := info.Exports[0]
	if info.Protocol != "newstyle-fixed" || e.Size != strangersSize || e.ReadOnly || !e.FUA || !e.Multi || !e.Trim || !e.Zero || !e.FastZero {
		t.Errorf("%+v", info)
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

func TestNbdcopy(t *testing.T) {
	s, d := serveStrangers(t)
	copy(d.data, pattern(strangersSize, 77)) // to be overwritten, holes too
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
	copy(d.data, pattern(strangersSize, 77))
	// -n: into what is there; -W: out of order.
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, s.uri(""))
	data, _ := d.contents()
	mustEqual(t, "converted", data, p)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri(""))
	qcow := image + ".qcow2"
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri(""), qcow)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, qcow)
	if errs := s.Metrics().Errors; len(errs) != 0 {
		t.Errorf("errors: %v", errs)
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
