package extents

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

func mustBeCorrupt(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) {
		t.Fatalf("%v does not wrap ErrCorrupt", err)
	}
}

// decodeEntries decodes all of n the way the merger does.
func decodeEntries[T entry[T]](n *node) (es []T) {
	var zero T
	at := n.first()
	for range n.count {
		es = append(es, zero.take(n, &at))
	}
	return es
}

// reencode is the stored form of n made anew from its entries.
func reencode(n *node) []byte {
	if n.level == 0 {
		return encodeNode(nil, 0, decodeEntries[Extent](n))
	}
	return encodeNode(nil, n.level, decodeEntries[child](n))
}

// oneOfEach are extents with every form of entry that there is.
func oneOfEach() []Extent {
	a := Addr{Segment: 7, Offset: 4096, Length: 20000, Checksum: 0x01020304, Blocks: 16, Codec: 1, Level: 3}
	next := func(a Addr, d uint32) Addr { a.Offset += a.Length + d; a.Checksum++; return a }
	b := next(a, 48)
	c := next(b, 48)
	c.Codec, c.Level, c.Blocks, c.Length = 0, 0, 1, 4096
	d := next(c, 0)
	d.Segment, d.Offset, d.Blocks = 3, 0, 32
	e := next(d, 1<<20)
	e.Length = 1<<32 - 1
	f := e
	f.Segment, f.Offset, f.Length = 1<<32-1, 1<<32-1, 0
	return []Extent{
		{Start: 1 << 30, Count: 16, Kind: Data, Addr: a},
		{Start: 1<<30 + 16, Count: 16, Kind: Data, Addr: b},
		{Start: 1<<30 + 40, Count: 1, Kind: Data, Addr: c},
		{Start: 1<<30 + 41, Count: 1 << 33, Kind: Lost},
		{Start: 1 << 40, Count: 7, Kind: Data, Skip: 25, Addr: d},
		{Start: 1<<40 + 8, Count: 1, Kind: Data, Addr: e},
		{Start: keyEnd - 2, Count: 1, Kind: Lost},
		{Start: keyEnd - 1, Count: 1, Kind: Data, Skip: 31, Addr: f},
	}
}

func somePointers() []child {
	leafless := Pointer{Copies: 2, Length: 8192, Places: [2]Place{{1, 4096, 0xdeadbeef}, {2, 4096, 0xdeadbeef}}}
	p2 := Pointer{Copies: 2, Length: 100, Places: [2]Place{{1, 4096 + 8192, 5}, {1<<32 - 1, 1<<32 - 1, 6}}}
	p3 := Pointer{Copies: 2, Length: 4000, Places: [2]Place{{0, 0, 7}, {0, 8, 8}}}
	return []child{{rng(16, 1000), leafless}, {rng(1000, 1<<40), p2}, {rng(1<<41, keyEnd), p3}}
}

func someRoot() Root {
	c := somePointers()[0]
	return Root{Pointer: c.Pointer, Height: 3, Keys: c.keys, Entries: 123456, Nodes: 234}
}

// TestNodeGolden proves that what any released version wrote stays readable and
// is still written so. CNBD_GOLDEN=write makes the files anew.
func TestNodeGolden(t *testing.T) {
	for name, data := range map[string][]byte{
		"leaf-v1.golden":  encodeNode(nil, 0, oneOfEach()),
		"inner-v1.golden": encodeNode(nil, 2, somePointers()),
		"root-v1.golden":  someRoot().Append(nil),
	} {
		path := filepath.Join("testdata", name)
		if os.Getenv("CNBD_GOLDEN") == "write" {
			if err := os.WriteFile(path, data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(data, want) {
			t.Errorf("%s: wrote\n% x\nexpected\n% x", name, data, want)
		}
	}
	n, err := decodeNode(encodeNode(nil, 0, oneOfEach()))
	if err != nil {
		t.Fatal(err)
	}
	if got := decodeEntries[Extent](n); !reflect.DeepEqual(got, oneOfEach()) {
		t.Errorf("decoded %+v", got)
	}
	n, err = decodeNode(encodeNode(nil, 2, somePointers()))
	if err != nil {
		t.Fatal(err)
	}
	if got := decodeEntries[child](n); !reflect.DeepEqual(got, somePointers()) {
		t.Errorf("decoded %+v", got)
	}
	r, err := DecodeRoot(someRoot().Append(nil))
	if err != nil || r != someRoot() {
		t.Errorf("decoded %+v, %v", r, err)
	}
	if r, err := DecodeRoot(Root{}.Append(nil)); err != nil || r != (Root{}) {
		t.Errorf("decoded %+v, %v", r, err)
	}
}

// leafBytes is a leaf for [0, hi) of n entries in raw form.
func leafBytes(level uint8, n uint16, hi uint64, entries ...byte) []byte {
	b := append([]byte(nodeMagic), nodeVersion, level)
	b = binary.LittleEndian.AppendUint16(b, n)
	b = binary.LittleEndian.AppendUint64(b, 0)
	b = binary.LittleEndian.AppendUint64(b, hi)
	return append(b, entries...)
}

func TestDecodeNodeRefuses(t *testing.T) {
	good := leafBytes(0, 1, 4, 0, 4, 0, 10, 1, 2, 3, 4)
	if _, err := decodeNode(good); err != nil {
		t.Fatal(err)
	}
	inner := leafBytes(1, 1, 4, 0, 4, 40, 0, 0, 1, 2, 3, 4)
	if _, err := decodeNode(inner); err != nil {
		t.Fatal(err)
	}
	change := func(b []byte, at int, v byte) []byte { b = bytes.Clone(b); b[at] = v; return b }
	for _, c := range []struct {
		name, want string
		data       []byte
	}{
		{"empty", "expected 25 to 8192 bytes", nil},
		{"header only", "expected 25 to 8192 bytes", good[:24]},
		{"too large", "expected 25 to 8192 bytes", make([]byte, NodeSizeMax+1)},
		{"magic", "magic", change(good, 0, 'X')},
		{"version", "version 1, found 2", change(good, 4, 2)},
		{"level", "level below", change(good, 5, heightMax)},
		{"leaf as inner", "entry 0", change(good, 5, 1)},
		{"inner as leaf", "node of level 0", change(inner, 5, 0)},
		{"no entries", "entries, found 0", change(good, 6, 0)},
		{"too many entries", "entry 1 of 2", change(good, 6, 2)},
		{"empty range", "range of blocks", change(good, 16, 0)},
		{"range too large", "range of blocks", change(good, 23, 1)},
		{"hi behind the last", "last entry to end at block 5", change(good, 16, 5)},
		{"lo before the first", "does not begin at the first block", leafBytes(0, 1, 4, flagGap, 1, 3, 0, 10, 1, 2, 3, 4)},
		{"hi inside", "behind the end of the node", change(good, 16, 3)},
		{"trailing byte", "and byte 33, found block 4 and byte 32", append(bytes.Clone(good), 0)},
		{"cut", "ends early", good[:len(good)-1]},
		{"reserved flag", "unknown flags", change(good, 24, 1<<5)},
		{"gap of 0", "gap of 0", leafBytes(0, 1, 4, flagGap, 0, 4, 0, 10, 1, 2, 3, 4)},
		{"gap over hi", "behind the end", leafBytes(0, 1, 4, flagGap, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 4, 0, 10, 1, 2, 3, 4)},
		{"count of 0", "extent of 0", change(good, 25, 0)},
		{"count over 32", "larger than its blob", change(change(good, 25, 33), 16, 33)},
		{"long uvarint", "shortest form", leafBytes(0, 1, 4, 0, 4, 0, 0x8a, 0, 1, 2, 3, 4)},
		{"endless uvarint", "shortest form", leafBytes(0, 1, 4, 0, 4, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4)},
		{"part over the blob", "larger than its blob", leafBytes(0, 1, 4, flagPart, 4, 5, 8, 0, 10, 1, 2, 3, 4)},
		{"part of a large blob", "larger than its blob", leafBytes(0, 1, 4, flagPart, 4, 0, 33, 0, 10, 1, 2, 3, 4)},
		{"part that is whole", "whole blob coded as a part", leafBytes(0, 1, 4, flagPart, 4, 0, 4, 0, 10, 1, 2, 3, 4)},
		{"codec repeated", "codec before", leafBytes(0, 1, 4, flagCodec, 4, 0, 0, 0, 10, 1, 2, 3, 4)},
		{"segment repeated", "segment before", leafBytes(0, 1, 4, flagSegment, 4, 0, 0, 10, 1, 2, 3, 4)},
		{"segment below 0", "out of bounds", leafBytes(0, 1, 4, flagSegment, 4, 1, 0, 10, 1, 2, 3, 4)},
		{"offset below 0", "out of bounds", leafBytes(0, 1, 4, 0, 4, 1, 10, 1, 2, 3, 4)},
		{"length of 33 bits", "blob too long", leafBytes(0, 1, 4, 0, 4, 0, 0x80, 0x80, 0x80, 0x80, 0x10, 1, 2, 3, 4)},
		{"lost with a part", "lost extent with a blob", leafBytes(0, 1, 4, flagLost|flagPart, 4)},
		{"child of 0 blocks", "child of 0", change(inner, 25, 0)},
		{"child too short", "impossible length", change(inner, 26, nodeHeaderSize)},
		{"child too long", "impossible length", leafBytes(1, 1, 4, 0, 4, 0x81, 0x40, 0, 0, 1, 2, 3, 4)},
		{"copies in one place", "both copies", leafBytes(2, 1, 4, 0, 4, 40, 0, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4)},
		{"one copy too few", "ends early", leafBytes(2, 1, 4, 0, 4, 40, 0, 0, 1, 2, 3, 4)},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := decodeNode(c.data)
			mustBeCorrupt(t, err)
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v\ndoes not tell %q", err, c.want)
			}
		})
	}
}

func TestDecodeRootRefuses(t *testing.T) {
	good := someRoot().Append(nil)
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x80
		r, err := DecodeRoot(bad)
		switch {
		case err != nil:
			mustBeCorrupt(t, err)
		case !bytes.Equal(r.Append(nil), bad):
			t.Errorf("byte %d changed: decodes, and encodes otherwise", at)
		}
	}
	for _, bad := range [][]byte{nil, good[:RootSize-1], append(bytes.Clone(good), 0)} {
		_, err := DecodeRoot(bad)
		mustBeCorrupt(t, err)
	}
	wrong := func(name string, f func(r *Root)) {
		r := someRoot()
		f(&r)
		if _, err := DecodeRoot(r.Append(nil)); err == nil {
			t.Errorf("%s: decoded", name)
		} else {
			mustBeCorrupt(t, err)
		}
	}
	wrong("height 0", func(r *Root) { r.Height = 0 })
	wrong("leaf with two copies", func(r *Root) { r.Height = 1 })
	wrong("height", func(r *Root) { r.Height = heightMax + 1 })
	wrong("keys", func(r *Root) { r.Keys.End = r.Keys.Start })
	wrong("keys end", func(r *Root) { r.Keys.End = keyEnd + 1 })
	wrong("nodes", func(r *Root) { r.Nodes = 2 })
	wrong("entries", func(r *Root) { r.Entries = 0 })
	wrong("length", func(r *Root) { r.Length = NodeSizeMax + 1 })
}

func FuzzDecodeNode(f *testing.F) {
	f.Add(encodeNode(nil, 0, oneOfEach()))
	f.Add(encodeNode(nil, 2, somePointers()))
	f.Add(leafBytes(1, 1, 4, 0, 4, 40, 0, 0, 1, 2, 3, 4))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := decodeNode(data)
		if err != nil {
			mustBeCorrupt(t, err)
			return
		}
		if again := reencode(n); !bytes.Equal(again, data) {
			t.Fatalf("% x decodes and encodes to % x", data, again)
		}
		if n.level == 0 {
			last := n.keys.Start
			for _, e := range decodeEntries[Extent](n) {
				if e.Count == 0 || e.Start < last || e.Range().End > n.keys.End ||
					e.Kind == Data && (uint64(e.Skip)+uint64(e.Count) > uint64(e.Addr.Blocks) || e.Addr.Blocks > BlobBlocksMax) {
					t.Fatalf("decoded %+v behind %d in %v", e, last, n.keys)
				}
				last = e.Range().End
			}
		}
	})
}

func FuzzDecodeRoot(f *testing.F) {
	f.Add(someRoot().Append(nil))
	f.Add(Root{}.Append(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := DecodeRoot(data)
		if err != nil {
			mustBeCorrupt(t, err)
		} else if !bytes.Equal(r.Append(nil), data) {
			t.Fatalf("% x decodes and encodes to % x", data, r.Append(nil))
		}
	})
}

// TestNodeMutations changes stored nodes at random: each must decode to
// something that encodes to the same bytes, or be refused.
func TestNodeMutations(t *testing.T) {
	rand := rand.New(rand.NewPCG(disktest.Seed(t), 3))
	seeds := [][]byte{encodeNode(nil, 0, oneOfEach()), encodeNode(nil, 2, somePointers())}
	decoded := 0
	for range 20000 * disktest.Scale(t) {
		data := bytes.Clone(seeds[rand.IntN(len(seeds))])
		for range 1 + rand.IntN(3) {
			switch at := rand.IntN(len(data)); rand.IntN(4) {
			case 0:
				data[at] ^= 1 << rand.IntN(8)
			case 1:
				data[at] = byte(rand.IntN(256))
			case 2:
				data = append(data[:at], data[min(at+1, len(data)-1):]...)
			case 3:
				data = data[:max(at, 1)]
			}
		}
		n, err := decodeNode(data)
		if err != nil {
			mustBeCorrupt(t, err)
			continue
		}
		decoded++
		if !bytes.Equal(reencode(n), data) {
			t.Fatalf("% x decodes, and encodes otherwise", data)
		}
	}
	if decoded == 0 {
		t.Error("nothing was decoded")
	}
}

// TestNodeSize states the size of the usual entries, and that of nodes in memory.
func TestNodeSize(t *testing.T) {
	if size := unsafe.Sizeof(cursor{}); size != 32 {
		t.Errorf("a restart has %d bytes, memory counts 32", size)
	}
	maker := blobMaker{rand: rand.New(rand.NewPCG(1, 1)), segment: 100}
	for _, c := range []struct {
		name string
		make func(i int) Extent
		max  float64
	}{
		{"64 KiB, written in sequence", func(i int) Extent {
			a := Addr{Segment: 100, Offset: uint32(i) * 30048, Length: 30000, Checksum: maker.rand.Uint32(), Blocks: 16, Codec: 1, Level: 3}
			return Extent{Start: block.Index(i) * 16, Count: 16, Kind: Data, Addr: a}
		}, 12},
		{"4 KiB, anywhere in 1000 segments of 64 MiB", func(i int) Extent {
			a := Addr{Segment: maker.rand.Uint32N(1000), Offset: maker.rand.Uint32N(64 << 20), Length: 1800, Checksum: maker.rand.Uint32(), Blocks: 1, Codec: 1, Level: 3}
			return Extent{Start: block.Index(i) * 2, Count: 1, Kind: Data, Addr: a}
		}, 17},
		{"part of 64 KiB, anywhere in 1000 segments of 64 MiB", func(i int) Extent {
			a := Addr{Segment: maker.rand.Uint32N(1000), Offset: maker.rand.Uint32N(64 << 20), Length: 30000, Checksum: maker.rand.Uint32(), Blocks: 16, Codec: 1, Level: 3}
			return Extent{Start: block.Index(i) * 16, Count: 15, Skip: 1, Kind: Data, Addr: a}
		}, 20},
	} {
		var b builder[Extent]
		for i := 0; b.bytes < NodeSizeMax-40; i++ {
			b.add(c.make(i), true)
		}
		data := encodeNode(nil, 0, b.items)
		if len(data) != b.bytes {
			t.Fatalf("a node of %d bytes was counted as %d", len(data), b.bytes)
		}
		n, err := decodeNode(bytes.Clone(data))
		if err != nil {
			t.Fatal(err)
		}
		stored := float64(len(data)) / float64(n.count)
		memory := float64(n.memory()) / float64(n.count)
		t.Logf("%s: %d extents in a leaf, %.1f bytes each stored, %.1f cached", c.name, n.count, stored, memory)
		if stored > c.max || memory > stored+3.5 {
			t.Errorf("expected at most %v bytes", c.max)
		}
	}
}
