package compression

import "sync/atomic"

const (
	// regionShift is log2 of the bytes in a Region: 1 MiB, 8 to 32 extents, is
	// less than most files that do not compress.
	regionShift = 20
	// regionSlots is how many regions are remembered: those that were last
	// written, 16 GiB when all are different. They take 128 KiB.
	regionSlots = 1 << 14
	// failuresLow is after how many failures in sequence the effort is lowered.
	// In data of which half compresses that is one extent in sixteen.
	failuresLow = 4
	// fullEvery is that of so many tries with lowered effort one is made with
	// the full one.
	fullEvery = 4
)

// A Region is a MiB of the device.
type Region uint64

// RegionOf is the region of the device's byte off.
func RegionOf(off uint64) Region { return Region(off >> regionShift) }

// A RegionMemory remembers which regions of a device have lately failed to
// compress, so that less effort is wasted on them. It forgets at the first
// success, and when another region needs the slot; and every fourth try is made
// with full effort whatever it remembers. Its size does not depend on that of
// the device. It is safe for concurrent use: a race costs a try, no more.
type RegionMemory struct {
	slots []atomic.Uint64
}

// NewRegionMemory remembers nothing yet.
func NewRegionMemory() *RegionMemory {
	return &RegionMemory{slots: make([]atomic.Uint64, regionSlots)}
}

// A slot packs the region + 1 (0 is nobody), the failures in sequence and the
// tries made since the effort was lowered. A device has less than 1<<43 regions.
type slot uint64

func newSlot(r Region, failures, tries uint64) slot {
	return slot((uint64(r)+1)<<16 | failures<<8 | tries)
}

func (s slot) is(r Region) bool { return uint64(s>>16) == (uint64(r)+1)&(1<<48-1) }
func (s slot) failures() uint64 { return uint64(s >> 8 & 0xff) }
func (s slot) tries() uint64    { return uint64(s & 0xff) }

func (m *RegionMemory) slot(r Region) *atomic.Uint64 {
	// Neighbours have different slots.
	return &m.slots[(uint64(r)^uint64(r)/regionSlots)%regionSlots]
}

// Effort is the setting to try data of region r with when s is asked for: s
// itself, resolved, or less if the region keeps failing. Of Zstd less is S2,
// which sees at several GB/s whether there are any matches; of S2 it is None,
// which is not to try at all.
func (m *RegionMemory) Effort(r Region, s Setting) Setting {
	s = s.Resolve()
	p := m.slot(r)
	v := slot(p.Load())
	if !v.is(r) || v.failures() < failuresLow {
		return s
	}
	tries := (v.tries() + 1) % fullEvery
	p.CompareAndSwap(uint64(v), uint64(newSlot(r, v.failures(), tries)))
	switch {
	case tries == 0:
		return s
	case s.Codec == Zstd:
		return Setting{S2, S2Fast}
	default:
		return Setting{}
	}
}

// Record tells m how a try on n bytes of region r went. A single block that
// fails says nothing of its region and is not remembered. What was not tried,
// because Effort was None, is not to be recorded.
func (m *RegionMemory) Record(r Region, n int, ok bool) {
	const block = 4 << 10
	p := m.slot(r)
	v := slot(p.Load())
	switch {
	case ok && v.is(r):
		p.CompareAndSwap(uint64(v), 0)
	case !ok && n > block && !v.is(r):
		p.CompareAndSwap(uint64(v), uint64(newSlot(r, 1, 0)))
	case !ok && n > block && v.failures() < failuresLow:
		p.CompareAndSwap(uint64(v), uint64(newSlot(r, v.failures()+1, 0)))
	}
}
