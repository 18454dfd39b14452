package disktest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"cnbd/internal/disk"
)

// Seed is the seed of a random test: CNBD_SEED, or a new one. It is logged, so
// that a failure can be repeated.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("CNBD_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 0, 64); err != nil {
			t.Fatalf("CNBD_SEED: %v", err)
		}
	}
	t.Logf("CNBD_SEED=%d", seed)
	return seed
}

// Scale is how many times longer than by default a test shall run:
// CNBD_TEST_SCALE, or 1.
func Scale(t testing.TB) int {
	t.Helper()
	s := os.Getenv("CNBD_TEST_SCALE")
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("CNBD_TEST_SCALE: bad value %q", s)
	}
	return n
}

// RunFile tests that an empty regular file f behaves as disk.File says, as long
// as nothing fails. It leaves content in f.
func RunFile(t *testing.T, f disk.File) {
	t.Helper()
	rng := rand.New(rand.NewPCG(Seed(t), 4))
	const limit = 256 << 10
	var want []byte
	grow := func(n int64) {
		if n > int64(len(want)) {
			want = append(want, make([]byte, n-int64(len(want)))...)
		}
	}
	any := make([]bool, 2*limit) // punched bytes read as anything
	got := make([]byte, limit+100)
	for range 400 * Scale(t) {
		off, n := rng.Int64N(limit), rng.Int64N(16<<10)
		switch rng.IntN(12) {
		case 0:
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		case 1:
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := f.DropCache(); err != nil {
				t.Fatal(err)
			}
		case 2:
			if err := f.Allocate(off, n); err != nil {
				t.Fatal(err)
			}
			if n > 0 {
				grow(off + n)
			}
		case 3:
			if err := f.Punch(off, n); err != nil {
				t.Fatal(err)
			}
			for i := off; i < min(off+n, int64(len(want))); i++ {
				any[i] = true
			}
		case 4:
			size := rng.Int64N(limit)
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			clear(any[size:])
			want = want[:min(size, int64(len(want)))]
			grow(size)
		case 5, 6, 7, 8:
			p := make([]byte, n)
			fill(p, Noise, off, 0, rng.Uint64())
			clear(any[off : off+n])
			if k, err := f.WriteAt(p, off); k != len(p) || err != nil {
				t.Fatalf("write [%d,%d) = %d, %v", off, off+n, k, err)
			}
			if rng.IntN(2) == 0 {
				if err := f.WriteBehind(off, n); err != nil {
					t.Fatal(err)
				}
			}
			if n > 0 {
				grow(off + n)
				copy(want[off:], p)
			}
		default:
			p := got[:n]
			k, err := f.ReadAt(p, off)
			exp := want[min(off, int64(len(want))):min(off+n, int64(len(want)))]
			if k != len(exp) || err != nil && !errors.Is(err, io.EOF) || (k < len(p)) != (err == io.EOF) {
				t.Fatalf("read [%d,%d) of %d = %d, %v", off, off+n, len(want), k, err)
			}
			for i := range exp {
				if p[i] != exp[i] && !any[off+int64(i)] {
					t.Fatalf("read [%d,%d): byte %d is %#x, want %#x", off, off+n, off+int64(i), p[i], exp[i])
				}
			}
		}
		if size, err := f.Size(); err != nil || size != int64(len(want)) {
			t.Fatalf("size %d, %v, want %d", size, err, len(want))
		}
	}
	// Space is taken by writing and given back by punching.
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte("x"), limit), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	full, err := f.Allocated()
	if err != nil || full < limit {
		t.Fatalf("%d bytes of a file of %d bytes allocated, %v", full, limit, err)
	}
	if err := f.Punch(0, limit/2); err != nil {
		t.Fatal(err)
	}
	if n, err := f.Allocated(); err != nil || n > full-limit/2 {
		t.Fatalf("%d of %d bytes still allocated after punching %d, %v", n, full, limit/2, err)
	}
	if n, err := f.Size(); err != nil || n != limit {
		t.Fatalf("size %d, %v after a punch", n, err)
	}
}
