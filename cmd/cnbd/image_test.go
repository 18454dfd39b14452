//go:build !race && !invariants

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
)

// TestImage has a real filesystem of 2 GiB go in and come out again, and holds
// what it takes on the host against what the codec alone makes of it.
func TestImage(t *testing.T) {
	nbdcopy, qemuImg, cmp := tool(t, "nbdcopy"), tool(t, "qemu-img"), tool(t, "cmp")
	image := realImage(t, imageSize, imageFiles)
	const limit = 3 * time.Minute
	for _, c := range []struct {
		flags   []string
		setting compression.Setting
	}{
		{[]string{"--codec", "zstd", "--level", "1"}, compression.Setting{Codec: compression.Zstd, Level: compression.ZstdFastest}},
		{[]string{"--codec", "s2"}, compression.Setting{Codec: compression.S2, Level: compression.S2Fast}},
	} {
		t.Run(c.setting.String(), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "store")
			s := serve(t, append(c.flags, "--size", fmt.Sprint(imageSize), path)...)
			began := time.Now()
			doFor(t, limit, nbdcopy, "--flush", image, s.uri)
			in := time.Since(began)
			s.stop(t)

			host := hostBytes(t, path)
			st := infoOf(t, path)
			data, alone := codecAlone(t, image, c.setting, st.ExtentSize)
			t.Logf("data: %d bytes; the codec alone: %d, ratio %.3f; stored: %d, ratio %.3f; on the host: %d, %+.2f %% of the codec alone",
				data, alone, float64(data)/float64(alone), st.Store.StoredBytes, st.Ratio, host, percent(host, alone))
			if st.Store.DataBytes != data {
				t.Errorf("info tells of %d bytes of data, the image has %d that are not zero", st.Store.DataBytes, data)
			}
			if p := percent(host, alone); p < -5 || p > 5 {
				t.Errorf("the store takes %d bytes of its host, the codec alone %d: %+.2f %%, want 5 at most", host, alone, p)
			}
			if st.Store.HostBytes != host || st.Overhead != host-st.Store.StoredBytes {
				t.Errorf("info tells of %d bytes on the host and %d of overhead; it is %d and %d",
					st.Store.HostBytes, st.Overhead, host, host-st.Store.StoredBytes)
			}
			if want := float64(data) / float64(st.Store.StoredBytes); st.Ratio < want*0.9999 || st.Ratio > want*1.0001 {
				t.Errorf("info tells of a ratio of %v, it is %v", st.Ratio, want)
			}

			s = serve(t, path)
			began = time.Now()
			doFor(t, limit, qemuImg, "compare", "-f", "raw", "-F", "raw", image, s.uri)
			t.Logf("written in %v, compared in %v", in.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
			if c.setting.Codec == compression.Zstd { // one codec is enough for the slower way
				doFor(t, limit, "sh", "-c", `"$0" "$1" - | "$2" - "$3"`, nbdcopy, s.uri, cmp, image)
			}
			s.stop(t)
			doFor(t, limit, binary, "check", "--data", path)
		})
	}
}

const (
	imageSize = 2 << 30
	// imageFiles is how many bytes of files go into it, if the machine has them.
	imageFiles = 1100 << 20
)

// realImage makes a file of size bytes with an ext4 filesystem of files of that
// many bytes, which every machine with a Go toolchain has: sources, objects,
// programs, libraries, texts.
func realImage(t *testing.T, size, files int64) string {
	t.Helper()
	mkfs := tool(t, "mkfs.ext4")
	dir := t.TempDir()
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
	var total int64
	for i, root := range []string{strings.TrimSpace(do(t, "go", "env", "GOROOT")), "/usr"} {
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if total >= files {
				return fs.SkipAll
			}
			if err != nil || !e.Type().IsRegular() {
				return nil // what cannot be read is left out
			}
			if st, err := e.Info(); err != nil || st.Size() > size/8 {
				return nil // one that might not fit as well
			}
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			n, err := linkOrCopy(path, filepath.Join(tree, fmt.Sprint(i), rel))
			total += n
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	doFor(t, 3*time.Minute, mkfs, "-q", "-F", "-d", tree, image, fmt.Sprint(size>>10)+"k")
	if err := os.RemoveAll(tree); err != nil {
		t.Fatal(err)
	}
	t.Logf("files of %d bytes", total)
	return image
}

// linkOrCopy makes the file to with the contents of from, and returns its size.
// A file that may not be read is left out.
func linkOrCopy(from, to string) (int64, error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return 0, err
	}
	src, err := os.Open(from)
	if err != nil {
		return 0, nil
	}
	defer src.Close()
	if os.Link(from, to) == nil { // same filesystem, and allowed
		st, err := src.Stat()
		if err != nil {
			return 0, err
		}
		return st.Size(), nil
	}
	dst, err := os.Create(to)
	if err != nil {
		return 0, err
	}
	n, err := io.Copy(dst, src)
	return n, errors.Join(err, dst.Close())
}

// codecAlone is how many bytes of image are in blocks that are not zero, and
// what the codec makes of them: of each run of such blocks between two borders
// of extents, as package delalloc does, and as it is where that is not worth it.
func codecAlone(t *testing.T, image string, s compression.Setting, extent uint32) (data, stored uint64) {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var next, sumData, sumStored atomic.Uint64
	const step = 1 << 20 // a multiple of every extent
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			enc := compression.NewEncoder()
			buf, out := make([]byte, step), make([]byte, 0, compression.EncodedLenMax(compression.SizeMax))
			for {
				off := next.Add(step) - step
				n, err := f.ReadAt(buf, int64(off))
				if err != nil && err != io.EOF {
					t.Error(err)
					return
				}
				if n == 0 {
					return
				}
				for e := range slices.Chunk(buf[:n], int(extent)) {
					for _, run := range nonzeroRuns(e) {
						size := len(run)
						sumData.Add(uint64(size))
						if enc, _, ok := enc.Encode(out, run, s); ok {
							size = len(enc)
						}
						sumStored.Add(uint64(size))
					}
				}
			}
		})
	}
	wg.Wait()
	return sumData.Load(), sumStored.Load()
}

// nonzeroRuns are the longest runs of blocks of p that are not zero.
func nonzeroRuns(p []byte) (runs [][]byte) {
	start := -1
	for at := 0; at <= len(p); at += block.Size {
		zero := at == len(p) || compression.IsZero(p[at:at+block.Size])
		switch {
		case zero && start >= 0:
			runs = append(runs, p[start:at])
			start = -1
		case !zero && start < 0:
			start = at
		}
	}
	return runs
}

// infoOf is what cnbd info tells of the store at path.
func infoOf(t testing.TB, path string) *storeStatus {
	t.Helper()
	st := &storeStatus{}
	if err := json.Unmarshal([]byte(do(t, binary, "info", "--json", path)), st); err != nil {
		t.Fatal(err)
	}
	return st
}

// hostBytes is what the file at path takes of its filesystem.
func hostBytes(t testing.TB, path string) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return uint64(st.Blocks) * 512 // of stat, whatever the filesystem's blocks are
}

// percent is how much more than b a is.
func percent(a, b uint64) float64 { return 100 * (float64(a) - float64(b)) / float64(b) }
