//go:build !race && !invariants

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	endian "encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cnbd/nbd"
)

// superblockStride is where the second superblock lies (docs/format.md).
const superblockStride = 64 << 10

// contents describes all that is in dir, so that a change of anything shows.
func contents(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v", path, info.Mode())
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %v %x", info.ModTime(), sha256.Sum256(data))
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// edit changes a file through f.
func edit(t *testing.T, path string, f func(b []byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestBadInput gives the program what it must refuse: with one clear line, the
// documented exit status, and nothing changed on disk.
func TestBadInput(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"good", "oneslot", "noslot", "newer", "short"} {
		do(t, binary, "create", "--size", "64MiB", at(name))
	}
	damage := func(b []byte, slots ...int) []byte {
		for _, s := range slots {
			b[s*superblockStride+40] ^= 1
		}
		return b
	}
	edit(t, at("oneslot"), func(b []byte) []byte { return damage(b, 0) })
	edit(t, at("noslot"), func(b []byte) []byte { return damage(b, 0, 1) })
	edit(t, at("newer"), func(b []byte) []byte {
		for s := range 2 {
			slot := b[s*superblockStride:][:4096]
			endian.LittleEndian.PutUint32(slot[8:], 1000)
			endian.LittleEndian.PutUint32(slot[4092:], crc32.Checksum(slot[:4092], crc32.MakeTable(crc32.Castagnoli)))
		}
		return b
	})
	edit(t, at("short"), func(b []byte) []byte { return b[:superblockStride/2] })
	for name, text := range map[string]string{
		"text": "This is no store.\n", "empty": "", "zeroes": strings.Repeat("\x00", 2<<20),
		"unknown.yaml": "cachee: 1GiB\nexports: [{path: x}]\n", "broken.yaml": "exports: [\n",
	} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(at("directory"), 0o755); err != nil {
		t.Fatal(err)
	}
	busy, err := net.Listen("unix", at("busy.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	go func() {
		for {
			c, err := busy.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	port, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	do(t, binary, "create", "--size", "64MiB", at("served"))
	owner := serve(t, "--recompress", "off", at("served")) // which in time would write what it has looked at
	before := contents(t, dir)

	for _, c := range []struct {
		args   string // BACKINGs and sockets are relative to dir
		status int
		want   string // a part of the line, $DIR for dir
	}{
		{"", exitUsage, "a command is needed"},
		{"serv good", exitUsage, `unknown command "serv"`},
		{"serve", exitUsage, "name a BACKING"},
		{"serve good text", exitUsage, "one expected, not 2"},
		{"serve --frobnicate good", exitUsage, "unknown flag: --frobnicate"},
		{"serve --size", exitUsage, "flag needs an argument: --size"},
		{"create new", exitUsage, "--size is needed"},
		{"create --size 1GiB", exitUsage, "one BACKING is expected"},
		{"info", exitUsage, "one BACKING is expected"},
		{"check good good", exitUsage, "one BACKING is expected"},

		{"create --size 1X new", exitUsage, `--size: "1X" is not a size`},
		{"create --size ten new", exitUsage, `--size: "ten" is not a size`},
		{"create --size -5GiB new", exitUsage, `--size: "-5GiB" is not a size`},
		{"create --size 0 new", exitUsage, "--size is needed"},
		{"create --size 1000 new", exitUsage, "multiple of 512"},
		{"create --size 2EiB new", exitUsage, "out of range: at most 1EiB"},
		{"create --size 99999999999EiB new", exitUsage, "--size:"},
		{"create --size 1GiB --capacity 1MiB new", exitUsage, "too little: at least"},
		{"create --size 1GiB --codec lzma new", exitUsage, "lzma is not allowed: give one of auto, zstd, s2, none"},
		{"create --size 1GiB --codec zstd --level 9 new", exitUsage, "9 is out of range"},
		{"create --size 1GiB --extent 5KiB new", exitUsage, "5KiB is not allowed"},
		{"serve --size 1X new", exitUsage, `--size: "1X" is not a size`},
		{"serve --size 1000 new", exitUsage, "multiple of 512"},
		{"serve --cache 1KiB good", exitUsage, "--cache: 1KiB is out of range"},

		{"create --size 1GiB good", exitFailed, "--force replaces it"},
		{"create --size 1GiB directory", exitFailed, "directory"},
		{"create --size 1GiB nowhere/new", exitFailed, "nowhere"},
		{"serve new", exitFailed, "--size makes a new store"},
		{"serve --size 1GiB good", exitUsage, "cnbd resize"},
		{"serve --capacity 1GiB good", exitUsage, "cnbd resize"},
		{"serve --read-only --size 1GiB new", exitFailed, "no such file"},

		{"resize good", exitUsage, "--size is needed"},
		{"resize --size 1GiB", exitUsage, "one BACKING is expected"},
		{"resize --size 1X good", exitUsage, `--size: "1X" is not a size`},
		{"resize --size 1000 good", exitUsage, "multiple of 512"},
		{"resize --size 2EiB good", exitUsage, "out of range: at most 1EiB"},
		{"resize --size 1TiB good", exitUsage, "has a capacity of"},
		{"resize --capacity 1MiB good", exitUsage, "capacity 1048576"},
		{"resize --size 32MiB served", exitUsage, "only grows"},
		{"resize --size 1000GiB served", exitUsage, "has a capacity of"},
		{"resize --size 1GiB text", exitFailed, "not a cnbd store"},
		{"resize --size 1GiB new", exitFailed, "no such file"},
		{"resize --size 1GiB noslot", exitDamage, "no superblock can be read"},
		{"estimate", exitUsage, "a PATH is expected"},
		{"estimate --codec lzma good", exitUsage, "must be auto, zstd, s2 or none"},
		{"estimate --sample some good", exitUsage, "is not a size"},
		{"estimate --sample 1KiB good", exitUsage, "at least 1MiB"},
		{"estimate new", exitFailed, "no such file"},
		{"estimate /dev/null", exitFailed, "is not a file, directory or block device"},
		{"compact", exitUsage, "one BACKING is expected"},
		{"compact text", exitFailed, "not a cnbd store"},
		{"compact new", exitFailed, "no such file"},
		{"compact noslot", exitDamage, "no superblock can be read"},
		{"compact --config none.yaml vm", exitFailed, "no such file"},

		{"serve text", exitFailed, "not a cnbd store"},
		{"serve --size 64MiB text", exitFailed, "not a cnbd store"},
		{"serve --size 64MiB empty", exitFailed, "not a cnbd store"},
		{"info text", exitFailed, "not a cnbd store"},
		{"check text", exitFailed, "not a cnbd store"},
		{"info empty", exitFailed, "not a cnbd store"},
		{"check zeroes", exitFailed, "not a cnbd store"},
		{"info new", exitFailed, "no such file"},
		{"check new", exitFailed, "no such file"},
		{"info directory", exitFailed, "directory"},
		{"serve directory", exitFailed, "directory"},
		{"info /dev/null", exitFailed, "not a regular file or block device"},

		{"serve noslot", exitDamage, "no superblock can be read"},
		{"info noslot", exitDamage, "no superblock can be read"},
		{"check noslot", exitDamage, "no superblock can be read"},
		{"check oneslot", exitDamage, "is damaged"},
		{"info short", exitDamage, "corrupt"},
		{"serve short", exitDamage, "corrupt"},
		{"serve newer", exitFailed, "format 1000, this program knows 1, a newer cnbd does"},
		{"serve --size 64MiB newer", exitFailed, "format 1000, this program knows 1, a newer cnbd does"},
		{"info newer", exitFailed, "format 1000, this program knows 1, a newer cnbd does"},
		{"check newer", exitFailed, "format 1000, this program knows 1, a newer cnbd does"},

		{"serve --listen unix:$DIR/busy.sock good", exitFailed, "socket is busy"},
		{"serve --size 64MiB --listen unix:$DIR/busy.sock new", exitFailed, "socket is busy"},
		{"serve --listen tcp:" + port.Addr().String() + " good", exitFailed, "address already in use"},
		{"serve --listen unix:$DIR/text good", exitFailed, "is not a socket"},
		{"serve --listen tcp:0.0.0.0:0 good", exitUsage, "can be reached by other hosts"},
		{"serve --listen foo good", exitUsage, "is not an address"},
		{"serve --listen unix:/" + strings.Repeat("x", 120) + " good", exitUsage, "too long"},
		{"serve --tls on --tls-certificates directory good", exitFailed, "server-cert.pem: no such file"},
		{"serve --tls require good", exitUsage, "tls-certificates"},

		{"serve served", exitFailed, "in use by another process"},
		{"serve --read-only served", exitFailed, "in use by another process"},
		{"serve --listen unix:$DIR/other.sock served", exitFailed, "in use by another process"},
		{"check served", exitFailed, "in use by another process"},
		{"create --size 1GiB --force served", exitFailed, "in use by another process"},

		{"serve --config none.yaml", exitFailed, "no such file"},
		{"serve --config unknown.yaml", exitUsage, "cachee"},
		{"serve --config broken.yaml", exitUsage, "broken.yaml"},
	} {
		args := strings.Fields(strings.ReplaceAll(c.args, "$DIR", dir))
		cmd := exec.Command(binary, args...)
		cmd.Dir = dir
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		_ = cmd.Wait()
		timer.Stop()
		text := stderr.String()
		lines := slices.DeleteFunc(strings.Split(text, "\n"), func(l string) bool { return l == "" || l[0] == '{' })
		if cmd.ProcessState.ExitCode() != c.status || len(lines) != 1 || !strings.HasPrefix(lines[0], "cnbd: ") || !strings.Contains(lines[0], c.want) {
			t.Errorf("cnbd %s: status %d, want %d and a line with %q; it says\n%s", c.args, cmd.ProcessState.ExitCode(), c.status, c.want, text)
		}
		if stdout.Len() > 0 && !strings.HasPrefix(c.args, "check oneslot") {
			t.Errorf("cnbd %s: prints %q", c.args, &stdout)
		}
		if now := contents(t, dir); now != before {
			t.Fatalf("cnbd %s has changed something: before\n%snow\n%s", c.args, before, now)
		}
	}
	owner.stop(t)
}

// TestOneDamagedSuperblock: the other one carries the store.
func TestOneDamagedSuperblock(t *testing.T) {
	for slot := range 2 {
		path := filepath.Join(t.TempDir(), "s")
		do(t, binary, "create", "--size", "64MiB", path)
		edit(t, path, func(b []byte) []byte { b[slot*superblockStride+100] ^= 4; return b })
		s := serve(t, path)
		s.stop(t)
		if !strings.Contains(s.log.String(), fmt.Sprintf("superblock %d is damaged", slot)) {
			t.Errorf("the log does not tell:\n%s", s.log)
		}
		// The stop has written checkpoints; both are good again after two.
		serve(t, path).stop(t)
		serve(t, path).stop(t)
		do(t, binary, "check", path)
	}
}

// TestPermission: another user is refused, and says why.
func TestPermission(t *testing.T) {
	needRoot(t)
	setpriv := tool(t, "setpriv")
	dir, err := os.MkdirTemp("", "cnbd-test-") // which others can enter
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	do(t, binary, "create", "--size", "64MiB", path)
	before := contents(t, dir)
	for _, args := range [][]string{
		{"info", path}, {"check", path}, {"serve", path}, {"serve", "--read-only", path},
		{"create", "--size", "1GiB", filepath.Join(dir, "new")},
		{"serve", "--size", "1GiB", filepath.Join(dir, "new")},
		{"create", "--size", "1GiB", "--force", path},
	} {
		r := try(t, setpriv, append([]string{"--reuid=65534", "--regid=65534", "--clear-groups", binary}, args...)...)
		if r.status != exitFailed || !strings.Contains(r.stderr, "permission denied") || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("cnbd %q: status %d\n%s", args, r.status, r.stderr)
		}
		if now := contents(t, dir); now != before {
			t.Fatalf("cnbd %q has changed something: before\n%snow\n%s", args, before, now)
		}
	}
}

// TestLife: what is written stays over a clean stop and a kill, info tells the
// same of a store that is served and of one that is not, and sockets go with
// their server.
func TestLife(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.cnbd")
	s := serve(t, "--size", "256MiB", path)
	if want := path + ".sock"; s.socket != want {
		t.Fatalf("serves on %s, want %s", s.socket, want)
	}
	for _, suffix := range []string{"", ".sock", ".control"} {
		info, err := os.Stat(path + suffix)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s%s: %v, %v; want mode 0600", path, suffix, info.Mode(), err)
		}
	}
	data := bytes.Repeat([]byte("Data that compresses. "), 1<<20/22)
	client, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	if client.Size() != 256<<20 {
		t.Errorf("size %d", client.Size())
	}
	if err := client.WriteAt(t.Context(), data, 12345, false); err != nil {
		t.Fatal(err)
	}
	if err := client.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}

	info := func() storeStatus {
		t.Helper()
		var st storeStatus
		if err := json.Unmarshal([]byte(do(t, binary, "info", "--json", path)), &st); err != nil {
			t.Fatal(err)
		}
		return st
	}
	served := info()
	if text := do(t, binary, "info", path); !strings.Contains(text, "(served)") || !strings.Contains(text, "good") {
		t.Errorf("info:\n%s", text)
	}
	// A client that is connected does not keep the server from stopping.
	s.stop(t)
	if err := client.WriteAt(t.Context(), data, 0, false); err == nil {
		t.Error("a write after the stop is answered")
	}
	for _, suffix := range []string{".sock", ".control"} {
		if _, err := os.Lstat(path + suffix); err == nil {
			t.Errorf("%s%s is still there", path, suffix)
		}
	}
	still := info()
	if !served.Served || still.Served {
		t.Errorf("served: %v, then %v", served.Served, still.Served)
	}
	if a, b := served.Store, still.Store; a.DataBytes == 0 || a.DataBytes != b.DataBytes || a.StoredBytes != b.StoredBytes || a.Extents != b.Extents {
		t.Errorf("info says %+v of the served store, and %+v later", a, b)
	}
	do(t, binary, "check", "--data", path)

	read := func(s *server, off uint64, want []byte) {
		t.Helper()
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got := make([]byte, len(want))
		if err := c.ReadAt(t.Context(), got, off); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Error("the data is not what was written")
		}
	}
	s = serve(t, path)
	read(s, 12345, data)
	if c, err := nbd.Dial(t.Context(), s.uri); err != nil {
		t.Fatal(err)
	} else if err := c.WriteAt(t.Context(), data[:5000], 100<<20, true); err != nil { // FUA
		t.Fatal(err)
	}
	s.kill()
	s = serve(t, path) // over the sockets that the dead one has left
	read(s, 12345, data)
	read(s, 100<<20, data[:5000])
	s.stop(t)

	// A codec and an extent for new data alone.
	s = serve(t, "--codec", "s2", "--extent", "128KiB", path)
	if st := info(); st.Codec != "s2:fast" || st.ExtentSize != 128<<10 {
		t.Errorf("served with s2 and extents of 128 KiB, info tells %s and %d", st.Codec, st.ExtentSize)
	}
	read(s, 12345, data)
	s.stop(t)
	if st := info(); st.Codec != still.Codec || st.ExtentSize != 64<<10 {
		t.Errorf("the store has become one of %s and extents of %d", st.Codec, st.ExtentSize)
	}

	// Read-only: nothing changes, and several may.
	before := contents(t, filepath.Dir(path))
	a := serve(t, "--read-only", path)
	b := serve(t, "--read-only", "--listen", "unix:"+filepath.Join(t.TempDir(), "b"), path)
	read(a, 12345, data)
	read(b, 12345, data)
	do(t, binary, "info", path)
	c, err := nbd.Dial(t.Context(), a.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.Flags()&nbd.FlagReadOnly == 0 {
		t.Error("clients are not told that it is read-only")
	}
	a.stop(t)
	b.stop(t)
	if now := contents(t, filepath.Dir(path)); now != before {
		t.Errorf("serving read-only has changed something: before\n%snow\n%s", before, now)
	}
}

// TestLogReaderGone: a server whose log nobody reads any more goes on.
func TestLogReaderGone(t *testing.T) {
	if signal.Ignored(syscall.SIGHUP) {
		t.Skip("SIGHUP is ignored, as below nohup, and the server keeps to that")
	}
	path := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command(binary, "serve", "--size", "64MiB", path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
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
		t.Fatal(err)
	}
	stderr.Close()
	for range 3 { // each connection is logged
		c, err := nbd.Dial(t.Context(), strings.TrimSpace(uri))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Disconnect(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGHUP: %v", err)
	}
}

// TestExports: many exports from a file, each with its store, by name, over TCP.
func TestExports(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "cnbd.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, `
listen: ["tcp:127.0.0.1:0", "unix:%[1]s/both"]
cache: 64MiB
socket-mode: 0666
exports:
  - {name: a, path: %[1]s/a, size: 64MiB, description: the first}
  - {name: b, path: %[1]s/b, size: 128MiB, codec: s2}
`, dir), 0o600); err != nil {
		t.Fatal(err)
	}
	s := serve(t, "--config", file)
	if !strings.HasPrefix(s.uri, "nbd://127.0.0.1:") {
		t.Fatalf("URI %s", s.uri)
	}
	if info, err := os.Stat(dir + "/both"); err != nil || info.Mode().Perm() != 0o666 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	list, err := nbd.List(t.Context(), s.uri)
	if err != nil || !slices.Equal(list, []nbd.ExportInfo{{Name: "a", Description: "the first"}, {Name: "b"}}) {
		t.Errorf("list: %v, %v", list, err)
	}
	data := bytes.Repeat([]byte{1, 2, 3, 4}, 10000)
	for i, uri := range []string{s.uri, "nbd+unix:///b?socket=" + dir + "/both"} {
		c, err := nbd.Dial(t.Context(), uri)
		if err != nil {
			t.Fatal(err)
		}
		if want := uint64(64<<20) << i; c.Size() != want {
			t.Errorf("%s has %d bytes, want %d", uri, c.Size(), want)
		}
		if err := c.WriteAt(t.Context(), data[i:], 0, true); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	s.stop(t)
	for i, name := range []string{"a", "b"} {
		s := serve(t, filepath.Join(dir, name))
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 8)
		if err := c.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, data[i:i+8]) {
			t.Errorf("export %s: %v, %v", name, got, err)
		}
		c.Close()
		s.stop(t)
	}
}
