//go:build !race && !invariants

package main

import (
	"bytes"
	endian "encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/internal/control"
	"cnbd/nbd"
)

const mib = 1 << 20

// shownBy are the keys whose effect another test shows.
var shownBy = map[string]string{
	"exports":           "TestExports",
	"listen":            "TestExports",
	"socket-mode":       "TestSocketSettings",
	"socket-owner":      "TestSocketSettings",
	"socket-group":      "TestSocketSettings",
	"exit-with-parent":  "TestExitWithParent",
	"allow-plaintext":   "TestAllowPlaintext",
	"tls":               "TestSettingsOfClients",
	"tls-certificates":  "TestTLS",
	"tls-verify-peer":   "TestSettingsOfClients",
	"default-export":    "TestSettingsOfClients",
	"list-exports":      "TestSettingsOfClients",
	"handshake-timeout": "TestSettingsOfClients",
	"stall-timeout":     "TestSettingsOfClients",
	"idle-timeout":      "TestSettingsOfClients",
	"connections-max":   "TestSettingsOfClients",
	"io-flusher":        "TestProtection",
	"lock-memory":       "TestProtection",
	"oom-score-adjust":  "TestProtection",
	"log-level":         "TestReload",
	"metrics":           "TestMetrics",
	"pprof":             "TestMetricsSettings",

	"exports.name":            "TestExports",
	"exports.path":            "TestExports",
	"exports.size":            "TestExports",
	"exports.lazy":            "TestExportFails",
	"exports.allow":           "TestSettingsOfClients",
	"exports.connections-max": "TestSettingsOfClients",
	"exports.read-only":       "TestLife",
	"exports.description":     "TestExports",
}

// A pair are two servers, with the same arguments but for the keys of rows: one has
// their defaults, the other their other values.
type pair struct {
	name string
	args []string
	rows []row
}

// A row is a key with a value that is not the default, and what tells the servers of
// the pair apart by it.
type row struct {
	key, other string
	tell       func(t *testing.T, plain, other *twin)
}

// Nothing is written back or committed by itself.
const (
	noCommit = "--commit-interval=1h"
	noExpiry = "--writeback-expire=24h"
)

// pairs are the keys whose effect is shown here. The rows of a pair are gone through in
// their order.
var pairs = []pair{
	{"period", []string{noCommit, "--writeback-expire=10ms"}, []row{
		{"writeback-period", "1h", func(t *testing.T, plain, other *twin) { writtenBack(t, plain, other, block.Size) }},
	}},
	{"log", nil, []row{
		{"checkpoint-interval", "16MiB", func(t *testing.T, plain, other *twin) {
			// At once: an idle device takes one.
			for s, least := range map[*twin]uint64{plain: 0, other: 1} {
				for off := uint64(0); off < 48*mib; off += 4 * mib {
					s.write(t, noise(4*mib), off)
					s.flush(t)
				}
				if n := s.sample(t).Store.Checkpoints; n < least || least == 0 && n > 0 {
					t.Errorf("%s: %d checkpoints after 48 MiB of log", s.name, n)
				}
			}
		}},
		{"cache", "16MiB", func(t *testing.T, plain, other *twin) { // after 48 MiB of writes
			for _, s := range []*twin{plain, other} {
				if n := s.status(t).Cache.Cached * block.Size; n > 16*mib != (s == plain) {
					t.Errorf("%s: %d bytes are cached", s.name, n)
				}
			}
		}},
		{"workers", "11", func(t *testing.T, plain, other *twin) {
			for s, want := range map[*twin]int{plain: config.Default().WorkerCount(), other: 11} {
				_, profile := get(t, s.dir+"/metrics", "/debug/pprof/goroutine?debug=1")
				if n := strings.Count(profile, `"asyncq":"worker"`); n != want {
					t.Errorf("%s: %d goroutines compress, want %d", s.name, n, want)
				}
			}
		}},
		{"requests-max", "8", func(t *testing.T, plain, other *twin) {
			for s, most := range map[*twin]int64{plain: 128, other: 8} {
				c := s.raw(t)
				defer c.Close()
				request(t, c, nbd.CmdRead, 32<<10, 300) // none of whose answers is taken
				s.until(t, "requests are in flight", func(st *storeStatus) bool { return st.Server.RequestsInFlight == most })
			}
			for s, most := range map[*twin]int64{plain: 128, other: 8} {
				if n := s.status(t).Server.RequestsInFlight; n != most {
					t.Errorf("%s: %d requests are in flight, want %d", s.name, n, most)
				}
			}
		}},
		{"payload", "128MiB", func(t *testing.T, plain, other *twin) {
			// The payload never comes. The second finds room in the larger memory alone.
			const length = 24 * mib
			for s, n := range map[*twin]uint64{plain: 1, other: 2} {
				for range 2 {
					c := s.raw(t)
					defer c.Close()
					request(t, c, nbd.CmdWrite, length, 1)
				}
				s.until(t, "writes are admitted", func(st *storeStatus) bool { return st.Server.BytesInFlight == n*length })
			}
			if n := plain.status(t).Server.BytesInFlight; n != length {
				t.Errorf("%s: %d bytes are in flight", plain.name, n)
			}
		}},
		{"log-format", "console", func(t *testing.T, plain, other *twin) {
			for s, isJSON := range map[*twin]bool{plain: true, other: false} {
				if log := s.log.String(); log == "" || strings.HasPrefix(log, "{") != isJSON {
					t.Errorf("%s: the log is\n%s", s.name, log)
				}
			}
		}},
	}},
	{"map", nil, []row{
		{"extent", "32KiB", func(t *testing.T, plain, other *twin) {
			for s, want := range map[*twin]uint64{plain: 16, other: 32} {
				s.write(t, text(t, mib), 0)
				s.flush(t)
				if n := s.status(t).Store.Extents; n != want {
					t.Errorf("%s: 1 MiB is stored in %d extents, want %d", s.name, n, want)
				}
			}
		}},
		{"map-cache", "1MiB", func(t *testing.T, plain, other *twin) {
			// Every second block, so that there is an extent for each, and 1.2 MB of map.
			scattered := make([]byte, 8*mib)
			for off := 0; off < len(scattered); off += 2 * block.Size {
				copy(scattered[off:off+block.Size], bytes.Repeat([]byte{1}, block.Size))
			}
			for _, s := range []*twin{plain, other} {
				for off := uint64(8 * mib); off < 712*mib; off += 8 * mib {
					s.write(t, scattered, off)
				}
				s.flush(t)
				s.status(t)                  // takes a checkpoint, which has the map on disk
				do(t, binary, "info", s.uri) // looks at all of it
				if n := s.status(t).Store.MapCacheBytes; n > mib != (s == plain) {
					t.Errorf("%s: %d bytes of nodes of the map are in memory", s.name, n)
				}
			}
		}},
	}},
	{"dirty pages", []string{noCommit, noExpiry}, []row{
		{"dirty-max", "4MiB", func(t *testing.T, plain, other *twin) {
			for s, most := range map[*twin]uint64{plain: 128 * mib, other: 4 * mib} {
				for off := uint64(0); off < 12*mib; off += mib {
					s.write(t, text(t, mib), off)
				}
				c := s.sample(t).Cache
				dirty := uint64(c.Dirty+c.Writeback) * block.Size
				if c.DirtyMax.Bytes() != most || dirty > most || s == plain && dirty != 12*mib {
					t.Errorf("%s: of 12 MiB that were written, %d bytes are dirty, of at most %d", s.name, dirty, c.DirtyMax.Bytes())
				}
			}
		}},
	}},
	{"background", []string{noCommit, noExpiry}, []row{
		{"background", "1MiB", func(t *testing.T, plain, other *twin) { writtenBack(t, other, plain, 24*mib) }},
	}},
	{"commit", []string{noExpiry}, []row{
		{"commit-interval", "1h", func(t *testing.T, plain, other *twin) { writtenBack(t, plain, other, block.Size) }},
	}},
	{"expiry", []string{noCommit, "--writeback-period=100ms"}, []row{
		{"writeback-expire", "10ms", func(t *testing.T, plain, other *twin) { writtenBack(t, other, plain, block.Size) }},
	}},
	{"clients", nil, []row{
		{"busy-poll", "1ms", func(t *testing.T, plain, other *twin) {
			var used [2]float64 // s of the processors
			for i, s := range []*twin{plain, other} {
				used[i] = -s.metric(t, "process_cpu_seconds_total")
				for range 500 {
					s.flush(t)
					time.Sleep(400 * time.Microsecond) // longer than the one looks, and shorter than the other
				}
				used[i] += s.metric(t, "process_cpu_seconds_total")
			}
			if used[1] < 3*max(used[0], 0.02) {
				t.Errorf("500 requests took %.2f s of the processors with the default, and %.2f s when each is looked for", used[0], used[1])
			}
		}},
	}},
	{"store", nil, []row{
		{"exports.codec", "none", func(t *testing.T, plain, other *twin) {
			for _, s := range []*twin{plain, other} {
				s.write(t, text(t, mib), 0)
				s.flush(t)
				if st := s.status(t).Store; st.BlobData != mib || st.BlobStored < mib != (s == plain) {
					t.Errorf("%s: %d bytes of text are stored in %d", s.name, st.BlobData, st.BlobStored)
				}
			}
		}},
		{"exports.capacity", "64MiB", func(t *testing.T, plain, other *twin) {
			for _, s := range []*twin{plain, other} {
				var err error
				for off := uint64(0); off < 96*mib && err == nil; off += 4 * mib {
					err = s.client.WriteAt(t.Context(), noise(4*mib), off, false)
				}
				if err != nil != (s == other) || s == other && !errors.Is(err, nbd.ENOSPC) {
					t.Errorf("%s: 96 MiB that do not compress: %v", s.name, err)
				}
			}
		}},
	}},
	{"level", []string{"--codec=zstd", "--recompress=off"}, []row{
		{"exports.level", "4", func(t *testing.T, plain, other *twin) {
			var stored [2]uint64
			for i, s := range []*twin{plain, other} {
				s.write(t, text(t, mib), 0)
				s.flush(t)
				stored[i] = s.status(t).Store.BlobStored
			}
			if stored[1] >= stored[0] {
				t.Errorf("1 MiB of text takes %d bytes by default, and %d with a higher level", stored[0], stored[1])
			}
		}},
	}},
	{"recompression", []string{"--codec=zstd", "--level=1"}, []row{
		{"exports.recompress", "off", func(t *testing.T, plain, other *twin) {
			for _, s := range []*twin{other, plain} {
				s.write(t, text(t, mib), 0)
				s.flush(t)
			}
			plain.until(t, "data is encoded anew", func(st *storeStatus) bool { return st.Store.Recompressed > 0 })
			if n := other.status(t).Store.Recompressed; n > 0 {
				t.Errorf("%s: %d bytes were encoded anew", other.name, n)
			}
		}},
	}},
}

// metric is the value of a metric without labels.
func (s *twin) metric(t *testing.T, name string) (v float64) {
	t.Helper()
	_, all := get(t, s.dir+"/metrics", "/metrics")
	_, rest, ok := strings.Cut(all, "\n"+name+" ")
	if _, err := fmt.Sscan(rest, &v); !ok || err != nil {
		t.Fatalf("no metric %s: %v", name, err)
	}
	return v
}

// writtenBack writes n bytes to both, waits until they are in the backing of soon, and
// looks that they are not in that of late: their time comes 30 s later, if at all.
func writtenBack(t *testing.T, soon, late *twin, n int) {
	t.Helper()
	data := noise(n) // which is stored as it is
	written := func(s *twin) bool {
		backing, err := os.ReadFile(s.dir + "/disk")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(backing, data[:block.Size])
	}
	began := time.Now()
	for _, s := range []*twin{late, soon} {
		for off := 0; off < n; off += mib {
			s.write(t, data[off:min(off+mib, n)], uint64(off))
		}
	}
	await(t, 25*time.Second, soon.name+": the data is written back", func() bool { return written(soon) })
	if written(late) && time.Since(began) < 30*time.Second {
		t.Errorf("%s: the data is written back after %v", late.name, time.Since(began))
	}
}

// TestEverySetting has each key do what it is there for: told from its default on two
// servers, or in a test that is named. Values and their faults are the matter of
// TestEveryKey in config.
func TestEverySetting(t *testing.T) {
	flags := map[string]string{}
	for prefix, of := range map[string]reflect.Type{"": reflect.TypeFor[config.Config](), "exports.": reflect.TypeFor[config.Export]()} {
		for f := range of.NumField() {
			tag := of.Field(f).Tag
			flags[prefix+tag.Get("key")] = tag.Get(map[string]string{"": "key", "exports.": "single"}[prefix])
		}
	}
	missing := map[string]bool{}
	for key := range flags {
		missing[key] = true
	}
	take := func(key string) {
		if !missing[key] {
			t.Errorf("%s is no key, or has two rows", key)
		}
		delete(missing, key)
	}
	sources := testFunctions(t)
	for key, test := range shownBy {
		take(key)
		if source, word := sources[test], strings.TrimPrefix(key, "exports."); !strings.Contains(source, word) {
			t.Errorf("there is no %s that has to do with %s", test, word)
		}
	}
	for _, p := range pairs {
		for _, r := range p.rows {
			take(r.key)
		}
	}
	for key := range missing {
		t.Errorf("nothing shows the effect of %s", key)
	}

	for _, p := range pairs {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			args := slices.Clone(p.args)
			for _, r := range p.rows {
				args = append(args, "--"+flags[r.key]+"="+r.other)
			}
			// What other does less often would be seen first if it did not.
			other := newTwin(t, "with other values", args)
			plain := newTwin(t, "with the defaults", p.args)
			for _, r := range p.rows {
				t.Run(r.key, func(t *testing.T) { r.tell(t, plain, other) })
			}
			plain.stop(t)
			other.stop(t)
		})
	}
}

// testFunctions are the functions of the test files here: their source by name.
func testFunctions(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	functions := map[string]string{}
	for _, path := range files {
		source, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		positions := token.NewFileSet()
		file, err := parser.ParseFile(positions, path, source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil {
				functions[f.Name.Name] = string(source[positions.Position(f.Pos()).Offset:positions.Position(f.End()).Offset])
			}
		}
	}
	return functions
}

// A twin is a server of a pair.
type twin struct {
	*server
	name    string
	dir     string
	control string // socket
	client  *nbd.Client
}

func newTwin(t *testing.T, name string, args []string) *twin {
	t.Helper()
	dir := t.TempDir()
	args = append([]string{"--size=1GiB", "--metrics=unix:" + dir + "/metrics", "--pprof"}, args...)
	s := &twin{server: serve(t, append(args, dir+"/disk")...), name: name, dir: dir, control: dir + "/disk.control"}
	var err error
	if s.client, err = nbd.Dial(t.Context(), s.uri); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.client.Close() })
	return s
}

func (s *twin) write(t *testing.T, p []byte, off uint64) {
	t.Helper()
	if err := s.client.WriteAt(t.Context(), p, off, false); err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
}

func (s *twin) flush(t *testing.T) {
	t.Helper()
	if err := s.client.Flush(t.Context()); err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
}

// status is what info shows; everything is committed for it.
func (s *twin) status(t *testing.T) *storeStatus {
	t.Helper()
	var st storeStatus
	if err := control.Status(t.Context(), s.control, &st); err != nil {
		t.Fatalf("%s: %v", s.name, err)
	}
	return &st
}

// sample is the state of the device, for which it does nothing. It may be that of 10 s
// ago, but for the first time.
func (s *twin) sample(t *testing.T) *device.Status {
	t.Helper()
	var st liveStatus
	if err := control.Live(t.Context(), s.control, &st); err != nil || st.Sample == nil {
		t.Fatalf("%s: %v, %v", s.name, err, st.Fault)
	}
	return &st.Sample.Status
}

// until waits until something is true of s.
func (s *twin) until(t *testing.T, what string, is func(*storeStatus) bool) {
	t.Helper()
	await(t, time.Minute, s.name+": "+what, func() bool { return is(s.status(t)) })
}

// await waits until something is true, up to limit.
func await(t *testing.T, limit time.Duration, what string, is func() bool) {
	t.Helper()
	for began := time.Now(); !is(); time.Sleep(20 * time.Millisecond) { // polling: nobody tells
		if time.Since(began) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// raw is a connection whose handshake is over, and of which nothing is read any more.
func (s *twin) raw(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", s.dir+"/disk.sock")
	if err != nil {
		t.Fatal(err)
	}
	// Fixed newstyle without the zeros, and EXPORT_NAME of the export without a name.
	if _, err := io.WriteString(c, "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x00"); err != nil {
		t.Fatal(err)
	}
	// Greeting and answer: NBDMAGIC, IHAVEOPT, flags; size, flags.
	if _, err := io.ReadFull(c, make([]byte, 8+8+2+8+2)); err != nil {
		t.Fatal(err)
	}
	return c
}

// request sends n headers of requests for the first bytes of the device, and no payload.
func request(t *testing.T, c net.Conn, command nbd.Command, length uint32, n uint64) {
	t.Helper()
	var b []byte
	for cookie := range n {
		b = endian.BigEndian.AppendUint32(b, 0x25609513) // NBD_REQUEST_MAGIC
		b = endian.BigEndian.AppendUint16(b, 0)
		b = endian.BigEndian.AppendUint16(b, uint16(command))
		b = endian.BigEndian.AppendUint64(b, cookie)
		b = endian.BigEndian.AppendUint64(b, 0)
		b = endian.BigEndian.AppendUint32(b, length)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

// text is n bytes of text: the source of the program, again and again.
func text(t *testing.T, n int) []byte {
	t.Helper()
	var b bytes.Buffer
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for b.Len() < n {
		for _, path := range files {
			source, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b.Write(source)
		}
	}
	return b.Bytes()[:n]
}

// noise is n bytes that do not compress.
func noise(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(p)
	return p
}
