package device

import (
	"cmp"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/store"
)

// CreateOptions describe a new store. Zero means the default.
type CreateOptions struct {
	// Bytes is the size of the device: a multiple of 512, at least one.
	Bytes uint64

	// CapacityBytes is the space that the store may take in its backing.
	// Default: enough for data that does not compress, and the overhead.
	CapacityBytes uint64

	// Codec is the codec for data, until another one is asked for. Default: auto.
	Codec *compression.Setting

	// ExtentBytes is how much data is compressed as one: a power of two from
	// 4 KiB to 128 KiB. Default 64 KiB.
	ExtentBytes uint32

	// DirtyBytesMax is the largest [Options.DirtyBytesMax] that the store has
	// room for, ever. Default 128 MiB.
	DirtyBytesMax uint64

	// CheckpointBytes is the largest [Options.CheckpointBytes] that the default
	// capacity has room for. Default 256 MiB.
	CheckpointBytes uint64
}

// Geometry is what a store by o is made with. It is not validated.
func (o CreateOptions) Geometry() store.Geometry {
	codec := compression.Setting{Codec: compression.Auto}
	if o.Codec != nil {
		codec = *o.Codec
	}
	g := store.Geometry{
		DeviceSize: o.Bytes, Capacity: o.CapacityBytes, SegmentSize: store.DefaultSegmentSize(o.Bytes),
		ExtentBlocks: cmp.Or(o.ExtentBytes, 64<<10) / block.Size,
		Codec:        uint8(codec.Codec), Level: uint8(codec.Level),
		DirtyMax: cmp.Or(o.DirtyBytesMax, 128<<20),
	}
	if g.Capacity != 0 {
		g.SegmentSize = min(g.SegmentSize, store.DefaultSegmentSize(g.Capacity))
	} else {
		g.Capacity = store.DefaultCapacity(g.DeviceSize, g.SegmentSize, g.DirtyMax, cmp.Or(o.CheckpointBytes, 256<<20))
	}
	return g
}

// Create makes a store in a new file at path, wholly or not at all. What is there
// already is kept: the error is fs.ErrExist.
func Create(path string, o CreateOptions) error {
	g := o.Geometry()
	if err := g.Validate(); err != nil {
		return err
	}
	return disk.CreateFile(path, false, func(f disk.File) error { return store.Format(f, g) })
}

// OpenFile opens the device whose store is at path, a file or a block device, and
// locks it against other openers, as Open does it.
func OpenFile(path string, o Options) (*Device, error) {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	return Open(f, o)
}
