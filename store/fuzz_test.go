package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"

	"github.com/google/uuid"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disktest"
)

// seal puts the right checksum on a superblock or segment header, so that the
// fuzzer gets behind it.
func seal(b []byte) []byte {
	p := make([]byte, 4096)
	copy(p, b)
	binary.LittleEndian.PutUint32(p[4092:], crc32.Checksum(p[:4092], castagnoli))
	return p
}

// FuzzSuperblock: what decodes encodes to the same bytes, and everything else is
// one of three errors.
func FuzzSuperblock(f *testing.F) {
	g := testGeometry(1000, 16)
	g.UUID = uuid.UUID{1, 2, 3}
	f.Add((&superblock{Geometry: g}).encode()[:256]) // short, for the fuzzer minimizes
	f.Add((&superblock{Geometry: g, sequence: 7, epoch: 9, replay: position{3, 8192, 4}, usage: blobRef{1, 2, 3, 4}, trims: blobRef{5, 6, 7, 8},
		root: extents.Root{Pointer: extents.Pointer{Places: [2]extents.Place{{Segment: 1, Offset: 9000, Checksum: 5}}, Copies: 1, Length: 100},
			Height: 1, Keys: block.Range{Start: 1, End: 9}, Entries: 4, Nodes: 1},
		segments: 3, nodes: nodeTotals{1, 100}}).encode()[:256])
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, b := range [][]byte{b, seal(b)} {
			sb, err := decodeSuperblock(b)
			if err != nil {
				if !errors.Is(err, ErrNotStore) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrCorrupt) {
					t.Errorf("error %v", err)
				}
				continue
			}
			if got := sb.encode(); !bytes.Equal(got, b[:superblockSize]) {
				t.Errorf("decodes to %+v, which encodes otherwise", sb)
			}
		}
	})
}

// FuzzSegmentHead: what decodes encodes to the same bytes, as far as the header
// has meaning.
func FuzzSegmentHead(f *testing.F) {
	id := uuid.UUID{1, 2, 3}
	g := testGeometry(1000, 16)
	g.UUID = id
	var b [segmentHeader]byte
	(&segmentHead{number: 5, life: 6, serial: 7, next: 8, prev: 9, pserial: 10, plife: 11, pend: 12, durable: 13}).encode(b[:], &g)
	f.Add(b[:128])
	f.Fuzz(func(t *testing.T, in []byte) {
		b := seal(in)
		h, ok := decodeSegmentHead(b, id, 5)
		if !ok {
			return
		}
		var again [segmentHeader]byte
		h.encode(again[:], &g)
		if !bytes.Equal(again[:76], b[:76]) || !bytes.Equal(again[80:88], b[80:88]) {
			t.Errorf("decodes to %+v, which encodes otherwise", h)
		}
	})
}

// FuzzRecordHeader: what decodes is in range, and encodes to the same bytes.
func FuzzRecordHeader(f *testing.F) {
	const seed, offset = 0x1234, 8192
	for _, h := range []header{
		{kind: recordData, codec: 2, level: 1, epoch: 5, durable: 4, start: 10, count: 16, present: 0xff0f, length: 3000, checksum: 7, offset: offset},
		{kind: recordHole, epoch: 5, durable: 4, start: 10, count: 1 << 40, offset: offset},
		{kind: recordCommit, epoch: 5, durable: 4, length: commitPayload, checksum: 7, offset: offset},
		{kind: recordNode, epoch: 5, durable: 4, length: 400, checksum: 7, offset: offset},
	} {
		b := make([]byte, recordHeader)
		h.encode(b, seed)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		b := make([]byte, recordHeader)
		copy(b, in)
		binary.LittleEndian.PutUint32(b[52:], crc32.Update(seed, castagnoli, b[:52]))
		h, sum, err := decodeHeader(b, seed, offset)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		again := make([]byte, recordHeader)
		if got := h.encode(again, seed); got != sum || !bytes.Equal(again, b) {
			t.Errorf("decodes to %+v, which encodes otherwise", h)
		}
		if h.durable >= h.epoch || h.kind == recordData && (h.count < 1 || h.count > ExtentBlocksMax || uint64(h.present)>>h.count != 0) ||
			uint64(h.start)+uint64(h.count) < uint64(h.start) {
			t.Errorf("out of range: %+v", h)
		}
	})
}

// FuzzUsage: the segment table is decoded within its bytes, or is corrupt.
func FuzzUsage(f *testing.F) {
	b := make([]byte, usageHead+2*usageEntry)
	binary.LittleEndian.PutUint32(b[16:], 2)
	putUsageEntry(b[usageHead:], 1, &segment{seed: 2, serial: 3, refs: 4, bytes: 5})
	putUsageEntry(b[usageHead+usageEntry:], 2, &segment{seed: 2, serial: 3, emptyAt: 6})
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		again := make([]byte, usageHead)
		prev, err := decodeUsage(b, func(n uint32, s segment) error {
			e := make([]byte, usageEntry)
			putUsageEntry(e, n, &s)
			again = append(again, e...)
			return nil
		})
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		putBlobRef(again, prev)
		copy(again[16:20], b[16:20])
		if !bytes.Equal(again, b) {
			t.Errorf("decodes to other bytes")
		}
	})
}

// FuzzDamage damages a store anywhere. It opens or is refused; what it then
// gives for a block is what was written, or an error, and never anything else.
func FuzzDamage(f *testing.F) {
	const blocks = 64
	page := func(b, version int) []byte {
		p := make([]byte, block.Size)
		for i := range p {
			p[i] = byte(b + i*version>>3)
		}
		return p
	}
	d := disktest.New(1, disktest.Options{})
	if err := Format(d, testGeometry(blocks, 16)); err != nil {
		f.Fatal(err)
	}
	s, err := Open(d, testOptions())
	if err != nil {
		f.Fatal(err)
	}
	const versions = 6
	for v := 1; v <= versions; v++ {
		for b := 0; b < blocks; b += 2 {
			if b%(v+1) != 0 {
				continue
			}
			if err := s.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Parts: [][]byte{page(b, v)}}); err != nil {
				f.Fatal(err)
			}
		}
		c, ok, err := s.AppendCommit()
		if err != nil || !ok {
			f.Fatal(ok, err)
		}
		if err := s.Sync(c); err != nil {
			f.Fatal(err)
		}
	}
	size, err := d.Size()
	if err != nil {
		f.Fatal(err)
	}
	image := make([]byte, size)
	if _, err := d.ReadAt(image, 0); err != nil {
		f.Fatal(err)
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(40), uint32(0), []byte{1})
	f.Add(uint32(segmentsOffset+segmentData), uint32(200), []byte{0xff, 1, 2})
	f.Add(uint32(superblockStride), uint32(4096), []byte{0x80})
	f.Fuzz(func(t *testing.T, at, step uint32, flips []byte) {
		damaged := bytes.Clone(image)
		for i, x := range flips[:min(len(flips), 64)] {
			damaged[(uint64(at)+uint64(i)*uint64(step))%uint64(len(damaged))] ^= x
		}
		d := disktest.New(1, disktest.Options{})
		if _, err := d.WriteAt(damaged, 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		s, err := Open(d, testOptions())
		if err != nil {
			if !IsDamage(err) && !errors.Is(err, ErrNotStore) && !errors.Is(err, ErrVersion) {
				t.Errorf("refused with %v", err)
			}
			return
		}
		defer s.Close()
		for b := range blocks {
			list, err := s.Lookup(block.Span(block.Index(b), 1), nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(list) != 1 {
				t.Fatalf("block %d: %d extents", b, len(list))
			}
			newest := 0
			for v := 1; v <= versions; v++ {
				if b%2 == 0 && b%(v+1) == 0 {
					newest = v
				}
			}
			switch e := list[0]; e.Kind {
			case extents.Hole:
				if newest != 0 {
					t.Errorf("block %d reads as zeros, it has version %d", b, newest)
				}
			case extents.Data:
				p := make([]byte, e.Addr.Length)
				if err := s.ReadBlob(p, e.Addr); err != nil {
					if !errors.Is(err, ErrCorrupt) {
						t.Error(err)
					}
				} else if newest == 0 || !bytes.Equal(p, page(b, newest)) {
					t.Errorf("block %d has other data than version %d", b, newest)
				}
			}
		}
	})
}

// FuzzTally: the payload of a commit record decodes to what encodes to it.
func FuzzTally(f *testing.F) {
	f.Add(tally{3, 4096, 7}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := decodeTally(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		if !bytes.Equal(got.encode(), b) {
			t.Errorf("decodes to %+v, which encodes otherwise", got)
		}
	})
}
