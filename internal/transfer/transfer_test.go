package transfer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// sparseFile makes a file of that size that has data here and there.
func sparseFile(t *testing.T, size int64) (*os.File, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	truth := make([]byte, size)
	noise := rand.NewChaCha8([32]byte{1})
	rng := rand.New(noise)
	for range size >> 20 {
		at := rng.Int64N(size)
		p := truth[at:min(size, at+rng.Int64N(600<<10))]
		noise.Read(p)
		if _, err := f.WriteAt(p, at); err != nil {
			t.Fatal(err)
		}
	}
	return f, truth
}

// TestCopy: a sparse file comes out as it is, its holes are passed over, and the digest
// is that of all of it.
func TestCopy(t *testing.T) {
	for _, size := range []int64{1, 4096, chunkBytes, chunkBytes + 1, 40<<20 + 12345} {
		f, truth := sparseFile(t, size)
		sum := sha256.Sum256(truth)
		src, err := NewFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		told := uint64(0)
		r, err := Copy(t.Context(), NewOutput(&out), src, Options{Digest: true, Progress: func(done, total uint64) {
			if done <= told || total != uint64(size) {
				t.Errorf("told of %d after %d, of %d", done, told, total)
			}
			told = done
		}})
		if err != nil || !bytes.Equal(out.Bytes(), truth) || told != uint64(size) {
			t.Fatalf("%d bytes: %v, or it differs; told of %d", size, err, told)
		}
		if r.Bytes != uint64(size) || r.SHA256 != hex.EncodeToString(sum[:]) || size > chunkBytes && r.Data > r.Bytes*3/4 {
			t.Errorf("%+v", r)
		}
		if err := r.Verify(t.Context(), src, nil); err != nil {
			t.Error(err)
		}
		if _, err := f.WriteAt([]byte{^truth[size/2]}, size/2); err != nil {
			t.Fatal(err)
		}
		if err := r.Verify(t.Context(), src, nil); !errors.Is(err, ErrDiffers) {
			t.Errorf("a changed byte: %v", err)
		}
	}
}

// failing fails from an offset on.
type failing struct {
	Source
	from uint64
	err  error
}

func (f failing) ReadAt(ctx context.Context, p []byte, off uint64) error {
	if off+uint64(len(p)) > f.from {
		return f.err
	}
	return f.Source.ReadAt(ctx, p, off)
}

// TestCopyFails: the first error ends it, and so does the context.
func TestCopyFails(t *testing.T) {
	broken := errors.New("broken")
	src := NewStream(bytes.NewReader(make([]byte, 20<<20)), 20<<20)
	if _, err := Copy(t.Context(), nil, failing{src, 9 << 20, broken}, Options{}); err != broken {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	src = NewStream(bytes.NewReader(make([]byte, 20<<20)), 20<<20)
	_, err := Copy(ctx, nil, src, Options{Progress: func(done, total uint64) { cancel(broken) }})
	if err != broken {
		t.Errorf("%v", err)
	}
}

// TestFormats: a name tells the format, and what is inside warns only.
func TestFormats(t *testing.T) {
	for name, want := range map[string]string{"a.qcow2": "qcow2", "A.VHD": "vpc", "a.img": Raw, "qcow2": Raw, "a.qcow2.bak": Raw} {
		if got := FormatOf(name); got != want {
			t.Errorf("%s is taken for %s, want %s", name, got, want)
		}
	}
	for head, want := range map[string]string{"QFI\xfb\x00\x00\x00\x03": "qcow2", "QFI\xfb\x00\x00\x00\x01": "qcow", "KDMVx": "vmdk", "KD": "", "": ""} {
		if got := LooksLike([]byte(head)); got != want {
			t.Errorf("%q looks like %q, want %q", head, got, want)
		}
	}
}
