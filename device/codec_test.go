package device

import (
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

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
			o := Options{CacheBytes: 8 << 20, Workers: 2, Codec: &tc.setting, NoRecompress: true, CommitInterval: time.Hour}
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
