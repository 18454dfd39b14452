package device

import (
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/store"
)

// compressor is the transform of the writeback: one encoder for each worker.
type compressor struct {
	setting  compression.Setting
	hurry    func(n int) bool // auto shall take less time for n bytes
	encoders []*compression.Encoder
	regions  *compression.RegionMemory
}

func newCompressor(s compression.Setting, workers int, hurry func(n int) bool) *compressor {
	c := &compressor{setting: s, hurry: hurry, regions: compression.NewRegionMemory()}
	for range workers + 1 { // one for who helps
		c.encoders = append(c.encoders, compression.NewEncoder())
	}
	return c
}

// Encode implements delalloc.Transform. Regions where data did not compress
// lately are tried with less effort.
func (c *compressor) Encode(worker int, dst, src []byte, start block.Index) (out []byte, codec, level uint8, ok bool) {
	region := compression.RegionOf(start.Bytes())
	s := c.setting
	if s.Codec == compression.Auto && c.hurry(len(src)) {
		s = compression.Setting{Codec: compression.S2, Level: compression.S2Fast}
	}
	s = c.regions.Effort(region, s)
	out, used, ok := c.encoders[worker].Encode(dst, src, s)
	c.regions.Record(region, len(src), ok)
	return out, uint8(used.Codec), uint8(used.Level), ok
}

// scatteredBytes is the size of the pieces of writes at random places, at most. Zstd
// makes tables for each piece, however small, so that of a block of 4 KiB costs three
// and a half times what s2 does (28 and 8 us) to be a quarter smaller; and those
// pieces are what the cleaner and recompression make whole extents of again, better
// encoded than either.
const scatteredBytes = 16 << 10

// hurry is the policy of auto: whether n bytes are encoded with s2, which takes a third
// of the time of zstd and leaves a third more, until recompression finds them.
// Scattered pieces are when a flush waits for them, or more is written than goes out;
// whole extents when clients are about to be held up, so that of a stream as many of them
// are as its speed asks for, and no more, and where recompression will come. Space that runs
// short is worth more than time.
func (d *Device) hurry(n int) bool {
	flushed, behind := d.flusher.Awaited(), d.cache.Backlogged()
	if n > scatteredBytes {
		if d.opts.NoRecompress {
			return false
		}
		flushed, behind = flushed && behind, d.cache.Throttles()
	}
	return (flushed || behind) && !d.store.Scarce()
}

// recoder is the codec of the cleaner (store.Recoder).
type recoder struct {
	decoder *compression.Decoder
	encoder *compression.Encoder
	hurried compression.Setting // as for new data
	setting compression.Setting // when there is time
}

// Decode implements store.Recoder.
func (r *recoder) Decode(dst, src []byte, a extents.Addr) ([]byte, error) {
	return r.decoder.Decode(dst, src, compression.Codec(a.Codec), int(a.Blocks)*block.Size)
}

// Encode implements store.Recoder.
func (r *recoder) Encode(dst, src []byte, e store.Effort) (out []byte, codec, level uint8, ok bool) {
	var used compression.Setting
	switch e {
	case store.Packing, store.PackingRaw:
		out, used, ok = r.encoder.Pack(dst, src, e == store.PackingRaw)
	case store.Hurried:
		out, used, ok = r.encoder.Encode(dst, src, r.hurried)
	default:
		out, used, ok = r.encoder.Encode(dst, src, r.setting)
	}
	return out, uint8(used.Codec), uint8(used.Level), ok
}

// Done implements store.Recoder. The numbers of codecs and of their levels ascend
// with what they save.
func (r *recoder) Done(codec, level uint8, e store.Effort) bool {
	s := r.setting.Resolve()
	if e == store.Packing {
		s = compression.Setting{Codec: compression.Zstd, Level: compression.ZstdBest}
	}
	return codec > uint8(s.Codec) || codec == uint8(s.Codec) && level >= uint8(s.Level)
}

// background is the setting for data that is encoded anew in the background, for a
// store whose new data are encoded with s: no codec that is slower to decode.
func background(s compression.Setting) compression.Setting {
	better := compression.Setting{Codec: compression.Zstd, Level: compression.ZstdBetter}
	switch s = s.Resolve(); {
	case s.Codec == compression.Zstd && s.Level < better.Level:
		return better
	case s.Codec == compression.S2:
		return compression.Setting{Codec: compression.S2, Level: compression.S2Better}
	}
	return s
}
