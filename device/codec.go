package device

import (
	"cnbd/internal/block"
	"cnbd/internal/compression"
)

// compressor is the transform of the writeback: one encoder for each worker.
type compressor struct {
	setting  compression.Setting
	encoders []*compression.Encoder
	regions  *compression.RegionMemory
}

func newCompressor(s compression.Setting, workers int) *compressor {
	c := &compressor{setting: s, regions: compression.NewRegionMemory()}
	for range workers {
		c.encoders = append(c.encoders, compression.NewEncoder())
	}
	return c
}

// Encode implements delalloc.Transform. Regions where data did not compress
// lately are tried with less effort.
func (c *compressor) Encode(worker int, dst, src []byte, start block.Index) (out []byte, codec, level uint8, ok bool) {
	region := compression.RegionOf(start.Bytes())
	s := c.regions.Effort(region, c.setting)
	out, used, ok := c.encoders[worker].Encode(dst, src, s)
	c.regions.Record(region, len(src), ok)
	return out, uint8(used.Codec), uint8(used.Level), ok
}
