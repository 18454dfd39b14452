package device

import (
	"cnbd/extents"
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

// recoder is the codec of the cleaner (store.Recoder).
type recoder struct {
	decoder *compression.Decoder
	encoder *compression.Encoder
	setting compression.Setting
}

// Decode implements store.Recoder.
func (r *recoder) Decode(dst, src []byte, a extents.Addr) ([]byte, error) {
	return r.decoder.Decode(dst, src, compression.Codec(a.Codec), int(a.Blocks)*block.Size)
}

// Encode implements store.Recoder.
func (r *recoder) Encode(dst, src []byte) (out []byte, codec, level uint8, ok bool) {
	out, used, ok := r.encoder.Encode(dst, src, r.setting)
	return out, uint8(used.Codec), uint8(used.Level), ok
}
