package estimate

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/store"
)

var (
	raw  = compression.Setting{}
	zstd = compression.Setting{Codec: compression.Zstd, Level: compression.ZstdFastest}
)

// noise is n bytes that do not compress.
func noise(n int) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{7}).Read(p)
	return p
}

func write(t *testing.T, path string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func estimateOf(t *testing.T, o Options, paths ...string) *Report {
	t.Helper()
	if o.Settings == nil {
		o.Settings = []compression.Setting{raw}
	}
	if o.Extents == nil {
		o.Extents = []uint32{64 << 10}
	}
	o.Unreadable = func(err error) { t.Errorf("unreadable: %v", err) }
	r, err := Estimate(t.Context(), paths, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestWhatIsCounted: of the kinds of files and of data, what a store would hold.
func TestWhatIsCounted(t *testing.T) {
	const b = block.Size
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range []struct {
		name    string
		prepare func()
		path    string
		files   uint64
		data    uint64 // blocks
		zeros   uint64
		payload uint64 // blocks, stored raw
		records uint64
	}{
		{"an empty file", func() { write(t, at("a/empty"), 0, nil) }, "a", 1, 0, 0, 0, 0},
		{"parts of blocks", func() { write(t, at("b/one"), 0, noise(1)); write(t, at("b/two"), 0, noise(b+1)) }, "b", 2, 3, 0, 3, 1},
		{"zeros", func() { write(t, at("c/zeros"), 0, make([]byte, 64*b)) }, "c", 1, 64, 64, 0, 0},
		{"two names", func() { write(t, at("d/x"), 0, noise(b)); _ = os.Link(at("d/x"), at("d/y")) }, "d", 1, 1, 0, 1, 1},
		{"a link to a name", func() { write(t, at("e/x"), 0, noise(b)); _ = os.Symlink("x", at("e/y")) }, "e", 1, 1, 0, 1, 1},
		{"a hole of a file in a directory", func() { write(t, at("f/x"), 0, noise(b)); write(t, at("f/x"), 64<<20, noise(b)) }, "f", 1, 2, 0, 2, 1},
		{"a hole of an image", func() { write(t, at("g/x"), 0, noise(b)); write(t, at("g/x"), 1<<40, noise(b)) }, "g/x", 1, 2, 0, 2, 2},
		{"extents of an image", func() { write(t, at("h/x"), 15*b, noise(2*b)) }, "h/x", 1, 2, 0, 2, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := os.Mkdir(at(c.path[:1]), 0o755); err != nil {
				t.Fatal(err)
			}
			c.prepare()
			r := estimateOf(t, Options{}, at(c.path))
			x := r.Results[0]
			if r.Files != c.files || r.DataBytes != c.data*b || r.SampleBytes != c.data*b || r.ZeroBytes != c.zeros*b ||
				x.PayloadBytes != c.payload*b || x.HeaderBytes != c.records*store.RecordOverhead {
				t.Errorf("%+v", r)
			}
		})
	}
}

// TestSample: a sample is about as large as asked for, and tells nearly what all of
// it tells.
func TestSample(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(3, 4))
	random := noise(1 << 20)
	for i := range 64 {
		// Of each file a random part is zeros, noise, and what compresses.
		data := make([]byte, 1<<20)
		n := rng.IntN(len(data))
		copy(data[:n], random)
		for j := n / 2; j < n; j++ {
			data[j] &= 0x0f
		}
		write(t, filepath.Join(dir, string(rune('a'+i%26))+string(rune('a'+i/26))), 0, data)
	}
	o := Options{Settings: []compression.Setting{zstd}}
	all := estimateOf(t, o, dir)
	o.SampleBytes = 24 << 20
	part := estimateOf(t, o, dir)
	t.Logf("%+v", all)
	t.Logf("%+v", part)
	if all.SampleBytes != all.DataBytes || part.DataBytes != all.DataBytes {
		t.Error("not all of it was looked at")
	}
	if part.SampleBytes < o.SampleBytes/2 || part.SampleBytes > o.SampleBytes {
		t.Errorf("a sample of %d bytes", part.SampleBytes)
	}
	if a, b := float64(all.Results[0].StoredBytes), float64(part.Results[0].StoredBytes); b < 0.75*a || b > 1.25*a {
		t.Errorf("%.0f bytes by a sample, %.0f by all", b, a)
	}
}

func TestErrors(t *testing.T) {
	if _, err := Estimate(t.Context(), []string{filepath.Join(t.TempDir(), "none")}, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no such file: %v", err)
	}
	if _, err := Estimate(t.Context(), []string{"/dev/null"}, Options{}); err == nil {
		t.Error("/dev/null was estimated")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Estimate(ctx, []string{t.TempDir()}, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
