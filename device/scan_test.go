package device

import (
	"testing"

	"cnbd/internal/block"
)

// What a client reads again and again stays in the cache while it, or another, reads
// all of a device that is eight times as large: with requests of each kind.
func TestScanLeavesHotBlocks(t *testing.T) {
	const hot = 256
	d := newBenchDevice(t, Options{CacheBytes: 4 * hot * block.Size, PayloadBytes: 4 << 20})
	read := func(r block.Range) {
		t.Helper()
		p, _ := request(t, d, int(r.Start.Bytes()), int(r.Len().Bytes()))
		p.Release()
	}
	for _, scan := range []struct {
		name     string
		request  block.Count
		from     block.Index // where it begins, within an extent
		prefetch bool
	}{
		{name: "4 KiB", request: 1},
		{name: "128 KiB", request: 32},
		{name: "128 KiB across extents", request: 32, from: 5},
		{name: "28 KiB", request: 7},
		{name: "128 KiB, prefetched", request: 32, prefetch: true},
	} {
		for range 3 {
			for b := range block.Index(hot) {
				read(block.Span(b, 1))
			}
		}
		before := d.cache.Metrics().Evictions
		for b := hot + scan.from; b+block.Index(scan.request) <= benchBlocks; b += block.Index(scan.request) {
			r := block.Span(b, scan.request)
			if scan.prefetch {
				if err := d.Prefetch(t.Context(), r.Start.Bytes(), r.Len().Bytes()); err != nil {
					t.Fatal(err)
				}
			}
			read(r)
		}
		if n := d.cache.Metrics().Evictions - before; n < 6*4*hot {
			t.Errorf("%s: %d evictions: it was no scan", scan.name, n)
		}
		gone := 0
		for b := range block.Index(hot) {
			if p, ok := d.ReadPromptly(b.Bytes(), block.Size); ok {
				p.Release()
			} else {
				gone++
			}
		}
		t.Logf("%s: %d of %d hot blocks are gone", scan.name, gone, hot)
		if gone > hot/20 {
			t.Errorf("%s: %d of %d hot blocks are gone", scan.name, gone, hot)
		}
	}
}
