package device

import (
	"math/rand/v2"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// When auto takes s2: by what is dirty, and where it would not be mended.
func TestHurry(t *testing.T) {
	const large = scatteredBytes + block.Size
	for _, tc := range []struct {
		name         string
		dirty        block.Count // of 1024 at most, 256 of them in the background
		capacity     uint64
		noRecompress bool
		full         bool // of noise, as far as it becomes scarce
		small, large bool
	}{
		{"little is dirty", 256, 64 << 20, false, false, false, false},
		{"more than goes out", 257, 64 << 20, false, false, true, false},
		{"half way to the limit", 640, 64 << 20, false, false, true, false},
		{"clients will wait", 641, 64 << 20, false, false, true, true},
		{"space is scarce", 641, 12 << 20, false, true, false, false},
		{"it would stay so", 641, 64 << 20, true, false, true, false},
	} {
		f := disktest.New(1, disktest.Options{})
		format(t, f, store.Geometry{DeviceSize: 8 << 20, Capacity: max(tc.capacity, store.MinCapacity(store.SegmentSizeMin)), SegmentSize: store.SegmentSizeMin, ExtentBlocks: 16})
		d := open(t, f, Options{
			CacheBytes: 8 << 20, DirtyBytesMax: 1024 * block.Size, BackgroundBytes: 256 * block.Size,
			NoRecompress: tc.noRecompress, CleanPeriod: time.Hour, CommitInterval: time.Hour,
		})
		noise := make([]byte, 64<<10)
		for at := int64(0); tc.full && !d.store.Scarce(); at = (at + 64<<10) % (8 << 20) {
			rand.NewChaCha8([32]byte{byte(at >> 16)}).Read(noise)
			if _, err := d.WriteAt(noise, at); err != nil {
				t.Fatal(err)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.cache.BalanceDirty(t.Context(), tc.dirty); err != nil {
			t.Fatal(err)
		}
		if s, l := d.hurry(scatteredBytes), d.hurry(large); s != tc.small || l != tc.large {
			t.Errorf("%s: %v and %v, want %v and %v", tc.name, s, l, tc.small, tc.large)
		}
		d.cache.CancelDirty(tc.dirty)
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Auto takes s2 for small pieces that somebody waits for, and zstd for all others; a
// codec that was chosen is taken for all.
func TestAutoHurries(t *testing.T) {
	const large = 64 << 10
	auto := compression.Setting{Codec: compression.Auto}
	zstd := compression.Setting{Codec: compression.Zstd, Level: compression.ZstdFastest}
	for _, tc := range []struct {
		name    string
		setting compression.Setting
		n       int
		flushed bool
		want    compression.Codec
	}{
		{"small, flushed", auto, block.Size, true, compression.S2},
		{"four blocks, flushed", auto, scatteredBytes, true, compression.S2},
		{"large, flushed", auto, large, true, compression.Zstd},
		{"small, nobody waits", auto, block.Size, false, compression.Zstd},
		{"zstd, small, flushed", zstd, block.Size, true, compression.Zstd},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := disktest.New(1, disktest.Options{})
			format(t, f, store.Geometry{DeviceSize: 8 << 20, Capacity: 32 << 20, SegmentSize: store.SegmentSizeMin, ExtentBlocks: 16})
			o := Options{CacheBytes: 8 << 20, Workers: 2, Codec: &tc.setting, CleanPeriod: time.Hour, CommitInterval: time.Hour}
			if !tc.flushed {
				o.CommitInterval = 10 * time.Millisecond
			}
			d := open(t, f, o)
			defer d.Close()
			data := make([]byte, tc.n)
			for i := range data {
				data[i] = "some text, "[i%11] + byte(i/1000)
			}
			if _, err := d.WriteAt(data, 0); err != nil {
				t.Fatal(err)
			}
			if tc.flushed {
				if err := d.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for d.cache.DirtyBlocks() > 0 || d.back.Metrics().Pages == 0 || d.cache.Metrics().Writeback > 0 {
				time.Sleep(time.Millisecond)
			}
			view := d.store.View()
			defer d.store.Unview(view)
			ext, err := d.store.Lookup(block.Span(0, 1), nil)
			if err != nil || len(ext) != 1 || compression.Codec(ext[0].Addr.Codec) != tc.want {
				t.Errorf("stored as %+v (%v), want %v", ext, err, tc.want)
			}
		})
	}
}
