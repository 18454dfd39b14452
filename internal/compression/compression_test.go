package compression_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	. "cnbd/internal/compression"
	"cnbd/internal/disktest"
)

var settings = []Setting{
	{S2, S2Fast}, {S2, S2Better},
	{Zstd, ZstdFastest}, {Zstd, ZstdDefault}, {Zstd, ZstdBetter}, {Zstd, ZstdBest},
}

// fast are the settings but ZstdBest, which takes a second for some inputs
// under the race detector.
var fast = settings[:5]

func noise(rng *rand.Rand, n int) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], rng.Uint64())
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// A corpus is SizeMax bytes of one kind and what it must encode to by zstd, in
// percent; 0 is not at all.
type corpus struct {
	name    string
	data    []byte
	percent int
}

func corpora(rng *rand.Rand) []corpus {
	const n = SizeMax
	text := new(bytes.Buffer)
	for text.Len() < n {
		fmt.Fprintf(text, "%d: request %d of client %d took %d us\n", text.Len(), rng.IntN(1e6), rng.IntN(50), rng.IntN(1e4))
	}
	half := noise(rng, n)
	clear(half[:n/2])
	return []corpus{
		{"text", text.Bytes()[:n], 50},
		{"noise", noise(rng, n), 0},
		{"zeros", make([]byte, n), 1},
		{"hex", []byte(hex.EncodeToString(noise(rng, n/2))), 55},
		{"base64", []byte(base64.StdEncoding.EncodeToString(noise(rng, n))[:n]), 80},
		{"four bytes", bytes.Repeat([]byte("\x00\x01\xfe\x07"), n/4), 1},
		{"half zeros", half, 51},
	}
}

func TestRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	dst := make([]byte, 0, 2+EncodedLenMax(SizeMax))
	out := make([]byte, 0, SizeMax+2)
	for _, c := range corpora(rng) {
		for _, s := range settings {
			var lengths []int
			switch s {
			case Setting{Zstd, ZstdBest}:
				lengths = []int{4 << 10, 64 << 10}
			case Setting{Zstd, ZstdFastest}, Setting{S2, S2Fast}:
				for n := 4 << 10; n <= SizeMax; n += 4 << 10 {
					lengths = append(lengths, n)
				}
			default:
				for n := rng.IntN(6) << 12; n <= SizeMax; n += 20 << 10 {
					lengths = append(lengths, n)
				}
			}
			lengths = append(lengths, 1, 15, 16, 17, 512, 4095, 4097)
			worth := 0
			for _, n := range lengths {
				src := c.data[:n]
				enc, used, ok := e.Encode(append(dst, "ab"...), src, s)
				if string(enc[:2]) != "ab" || &enc[0] != &dst[:1][0] {
					t.Fatalf("%s, %s, %d bytes: Encode does not append in place", c.name, s, n)
				}
				enc = enc[2:]
				if !ok {
					if used != (Setting{}) || len(enc) != 0 {
						t.Fatalf("%s, %s, %d bytes: not worth it, but %s and %d bytes", c.name, s, n, used, len(enc))
					}
					continue
				}
				worth++
				if used != s || len(enc) > n-n/16 {
					t.Fatalf("%s, %s: %d bytes to %d by %s", c.name, s, n, len(enc), used)
				}
				got, err := d.Decode(append(out, "xy"...), enc, used.Codec, n)
				if err != nil || string(got[:2]) != "xy" || !bytes.Equal(got[2:], src) {
					t.Fatalf("%s, %s, %d bytes: not what was encoded, %v", c.name, s, n, err)
				}
				for _, wrong := range []int{0, n - 1, n + 1, SizeMax, SizeMax + 1, -1} {
					if n%(16<<10) != 0 {
						break
					}
					if got, err := d.Decode(out, enc, used.Codec, wrong); wrong != n && (!errors.Is(err, ErrCorrupt) || len(got) != 0) {
						t.Fatalf("%s, %s, %d bytes: decoded to %d, %v", c.name, s, n, wrong, err)
					}
				}
			}
			if c.percent == 0 && worth > 0 {
				t.Errorf("%s, %s: worth it %d times", c.name, s, worth)
			}
			if s.Codec != Zstd || s.Level == ZstdBest || c.percent == 0 {
				continue
			}
			if enc, _, ok := e.Encode(dst, c.data, s); !ok || len(enc)*100 > SizeMax*c.percent {
				t.Errorf("%s, %s: %d bytes of %d, want %d %%", c.name, s, len(enc), SizeMax, c.percent)
			}
		}
	}
}

// Raw unless a sixteenth is saved: the border is hit with zeros before
// noise, for an encoder looks ever less closely where nothing matches.
func TestWorthASixteenth(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	e := NewEncoder()
	b := noise(rng, 64<<10)
	dst := make([]byte, 0, EncodedLenMax(len(b)))
	for _, s := range fast {
		for zeros := 0; zeros < len(b)/8; zeros += 256 {
			src := slices.Clone(b)
			clear(src[:zeros])
			out, _, ok := e.Encode(dst, src, s)
			// A codec needs a few bytes for itself. In one that splits the noise has a block,
			// from a border of chunks on, in which the rest of the zeros is too little to be
			// looked for.
			slack := 512
			if s.Codec == Zstd && s.Level >= ZstdBetter {
				slack = 4 << 10
			}
			if ok && zeros < len(b)/16 || !ok && zeros > len(b)/16+slack {
				t.Fatalf("%s: %d zeros in %d bytes: %v, %d bytes", s, zeros, len(b), ok, len(out))
			}
			if ok && len(out) > len(b)-len(b)/16 {
				t.Fatalf("%s: %d bytes kept of %d", s, len(out), len(b))
			}
		}
	}
}

func TestNone(t *testing.T) {
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	for _, s := range []Setting{{}, {None, 7}, {Zstd, 5}, {S2, 3}, {77, 1}} {
		if out, used, ok := e.Encode(nil, make([]byte, 4096), s); ok || len(out) != 0 || used != (Setting{}) {
			t.Errorf("%v: %d bytes, %s, %v", s, len(out), used, ok)
		}
	}
	if out, err := d.Decode(nil, []byte("abc"), None, 3); string(out) != "abc" || err != nil {
		t.Error(out, err)
	}
	for _, n := range []int{0, 2, 4} {
		if _, err := d.Decode(nil, []byte("abc"), None, n); !errors.Is(err, ErrCorrupt) {
			t.Errorf("3 bytes as %d: %v", n, err)
		}
	}
	for _, c := range []Codec{3, 77, Auto} {
		if _, err := d.Decode(nil, []byte("abc"), c, 3); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", c, err)
		}
	}
	// Auto encodes, and says what by.
	if _, used, ok := e.Encode(nil, make([]byte, 4096), Setting{Codec: Auto}); !ok || used != (Setting{Zstd, ZstdFastest}) {
		t.Errorf("auto uses %s, %v", used, ok)
	}
}

func TestParse(t *testing.T) {
	for in, want := range map[string]Setting{
		"none": {}, "auto": {Auto, 0}, "s2": {S2, S2Fast}, "s2:better": {S2, S2Better}, "zstd": {Zstd, ZstdDefault},
		"zstd:fastest": {Zstd, ZstdFastest}, "ZSTD:Best ": {Zstd, ZstdBest}, "zstd:3": {Zstd, ZstdBetter},
	} {
		got, err := Parse(in)
		if got != want || err != nil {
			t.Errorf("%q: %v, %v", in, got, err)
		}
		if again, err := Parse(got.String()); again != got || err != nil {
			t.Errorf("%q: %q is parsed as %v, %v", in, got, again, err)
		}
		var u Setting
		if b, _ := got.MarshalText(); u.UnmarshalText(b) != nil || u != got {
			t.Errorf("%q: %v after marshalling", in, u)
		}
		if got.Valid() != (want.Codec != Auto) {
			t.Errorf("%q: valid %v", in, got.Valid())
		}
	}
	for _, in := range []string{"", "lz4", "zstd:", "zstd:0", "zstd:5", "none:1", "auto:1", "s2:best", "zstd:better:x"} {
		if s, err := Parse(in); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", in)) {
			t.Errorf("%q: %v, %v", in, s, err)
		}
	}
	for _, s := range []Setting{{Zstd, 0}, {Zstd, 5}, {S2, 0}, {S2, 3}, {None, 1}, {3, 0}, {Auto, 0}, {Auto, 1}} {
		if s.Valid() {
			t.Errorf("%v is valid", s)
		}
	}
}

// What the numbers of the format mean cannot change.
func TestFormatNumbers(t *testing.T) {
	for s, want := range map[Setting][2]uint8{
		{None, 0}: {0, 0}, {S2, S2Fast}: {1, 1}, {S2, S2Better}: {1, 2}, {Zstd, ZstdFastest}: {2, 1},
		{Zstd, ZstdDefault}: {2, 2}, {Zstd, ZstdBetter}: {2, 3}, {Zstd, ZstdBest}: {2, 4},
	} {
		if uint8(s.Codec) != want[0] || uint8(s.Level) != want[1] {
			t.Errorf("%s is stored as %d, %d", s, s.Codec, s.Level)
		}
	}
	// Bytes made by an earlier version of the libraries.
	d := NewDecoder(1)
	defer d.Close()
	want := bytes.Repeat([]byte("cnbd stores blocks. "), 205)[:4096]
	for c, golden := range map[Codec]string{
		S2:   "80204c636e62642073746f72657320626c6f636b732e2011141900e00e",
		Zstd: "28b52ffd60000ff500004401636e62642073746f72657320626c6f636b732e20015412042fd27f01",
	} {
		src, err := hex.DecodeString(golden)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := d.Decode(nil, src, c, len(want)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: bytes of an earlier version are not decoded: %v", c, err)
		}
	}
}

// Damaged and random input: an error or the right length, no panic.
func TestDecodeDamaged(t *testing.T) {
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	e, d := NewEncoder(), NewDecoder(1)
	defer d.Close()
	failed, passed := 0, 0
	for _, c := range corpora(rng) {
		for _, s := range fast {
			n := (1 + rng.IntN(8)) << 12
			enc, used, ok := e.Encode(nil, c.data[:n], s)
			if !ok {
				continue
			}
			for range 40 * disktest.Scale(t) {
				b := slices.Clone(enc)
				switch rng.IntN(4) {
				case 0:
					b = b[:rng.IntN(len(b))]
				case 1:
					b = append(b, noise(rng, 1+rng.IntN(20))...)
				case 2:
					b = append(b, b...) // two frames
				default:
					for range 1 + rng.IntN(3) {
						b[min(rng.IntN(len(b)), rng.IntN(len(b)))] ^= 1 << rng.IntN(8)
					}
				}
				got, err := d.Decode([]byte("ab"), b, used.Codec, n)
				switch {
				case err == nil && len(got) == 2+n:
					passed++
				case errors.Is(err, ErrCorrupt) && string(got) == "ab":
					failed++
				default:
					t.Fatalf("%s, %s: %d bytes, %v", c.name, s, len(got), err)
				}
			}
		}
	}
	if failed < 100 || passed == 0 {
		t.Errorf("%d failed, %d passed: not all cases were met", failed, passed)
	}
}

func FuzzDecode(f *testing.F) {
	e := NewEncoder()
	for _, c := range corpora(rand.New(rand.NewPCG(1, 1))) {
		for _, s := range fast {
			if enc, used, ok := e.Encode(nil, c.data[:8<<10], s); ok {
				f.Add(enc, uint8(used.Codec), 8<<10)
			}
		}
	}
	d := NewDecoder(1)
	f.Fuzz(func(t *testing.T, src []byte, codec uint8, size int) {
		got, err := d.Decode(nil, src, Codec(codec), size)
		if err == nil && len(got) != size || err != nil && (len(got) != 0 || !errors.Is(err, ErrCorrupt)) {
			t.Fatalf("%d bytes of %d, %v", len(got), size, err)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("abcabcabcabcabc"), uint8(0))
	e, d := NewEncoder(), NewDecoder(1)
	f.Fuzz(func(t *testing.T, src []byte, k uint8) {
		// Repeated, for else nothing so short is worth it.
		src = bytes.Repeat(src, 1+4096/(len(src)+1))
		src = src[:min(len(src), SizeMax)]
		enc, used, ok := e.Encode(nil, src, fast[int(k)%len(fast)])
		if !ok {
			return
		}
		if got, err := d.Decode(nil, enc, used.Codec, len(src)); err != nil || !bytes.Equal(got, src) {
			t.Fatalf("%s: %v", used, err)
		}
	})
}

// One Decoder, and the shared encoder of level best, for many.
func TestConcurrent(t *testing.T) {
	cs := corpora(rand.New(rand.NewPCG(disktest.Seed(t), 0)))
	d := NewDecoder(2)
	defer d.Close()
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			e := NewEncoder()
			for i := range 40 {
				c, s := cs[(w+i)%len(cs)], settings[i%len(settings)]
				src := c.data[i<<10 : i<<10+8<<10]
				enc, used, ok := e.Encode(nil, src, s)
				if !ok {
					continue
				}
				if got, err := d.Decode(nil, enc, used.Codec, len(src)); err != nil || !bytes.Equal(got, src) {
					t.Errorf("%s, %s: %v", c.name, s, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestIsZero(t *testing.T) {
	b := make([]byte, 9000)
	for _, n := range []int{0, 1, 7, 8, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 8192} {
		for _, at := range []int{0, 1, 5} {
			p := b[at : at+n]
			if !IsZero(p) {
				t.Fatalf("%d zeros are not zero", n)
			}
			for i := range p {
				p[i] = 0x80
				if IsZero(p) {
					t.Fatalf("%d bytes with byte %d set are zero", n, i)
				}
				p[i] = 0
			}
		}
		// What repeats every 64 bytes is not zero for that.
		p := b[:n]
		for i := 40; i < n; i += 64 {
			p[i] = 1
		}
		if IsZero(p) != (n <= 40) {
			t.Fatalf("%d bytes with a period of 64", n)
		}
		clear(p)
	}
}

// goroot is up to n bytes of the sources and binaries of the Go distribution.
func goroot(tb testing.TB, n int) []byte {
	tb.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		tb.Skip("no Go distribution: ", err)
	}
	var b []byte
	for _, dir := range []string{"src/cmd/compile", "pkg/tool", "doc", "lib"} {
		end := len(b) + n/2
		filepath.WalkDir(filepath.Join(string(bytes.TrimSpace(root)), dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() || len(b) >= end {
				return nil
			}
			p, _ := os.ReadFile(path)
			b = append(b, p[:min(len(p), end-len(b))]...)
			return nil
		})
	}
	if len(b) < n/2 {
		tb.Skip("little in ", string(root))
	}
	return b[:min(n, len(b))]
}

func BenchmarkEncode(b *testing.B) {
	data := goroot(b, 16<<20)
	for _, size := range []int{4 << 10, 64 << 10, 128 << 10} {
		for _, s := range settings {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, s), func(b *testing.B) {
				e := NewEncoder()
				dst := make([]byte, 0, EncodedLenMax(size))
				var in, out int64
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for i := 0; b.Loop(); i = (i + 1) % (len(data)/size - 1) {
					enc, _, ok := e.Encode(dst, data[i*size:(i+1)*size], s)
					in += int64(size)
					if ok {
						out += int64(len(enc))
					} else {
						out += int64(size)
					}
				}
				b.ReportMetric(float64(in)/float64(out), "ratio")
			})
		}
	}
	for _, s := range fast {
		b.Run("noise/"+s.String(), func(b *testing.B) {
			e := NewEncoder()
			src := noise(rand.New(rand.NewPCG(1, 1)), 64<<10)
			dst := make([]byte, 0, EncodedLenMax(len(src)))
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				e.Encode(dst, src, s)
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	data := goroot(b, 8<<20)
	const size = 64 << 10
	for _, s := range fast {
		b.Run(s.String(), func(b *testing.B) {
			e, d := NewEncoder(), NewDecoder(1)
			defer d.Close()
			var encs [][]byte
			for i := 0; i+size <= len(data); i += size {
				if enc, _, ok := e.Encode(nil, data[i:i+size], s); ok {
					encs = append(encs, enc)
				}
			}
			dst := make([]byte, 0, size)
			b.SetBytes(size)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if _, err := d.Decode(dst, encs[i%len(encs)], s.Codec, size); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkIsZero(b *testing.B) {
	for _, size := range []int{4 << 10, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			p := make([]byte, size)
			b.SetBytes(int64(size))
			for b.Loop() {
				if !IsZero(p) {
					b.Fatal()
				}
			}
		})
	}
}
