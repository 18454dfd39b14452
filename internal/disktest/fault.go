package disktest

import (
	"fmt"
	"syscall"
)

// A Fault makes operations fail.
type Fault struct {
	// Kinds are the operations that it strikes.
	Kinds Kind
	// Off and Len limit it to operations that touch [Off, Off+Len); Len 0 is
	// anywhere. Sync and DropCache touch everything.
	Off, Len int64
	// After is how many such operations succeed before it strikes.
	After int
	// Times is how many it strikes; 0 is all from then on.
	Times int
	// Err is the error, nil is syscall.EIO.
	Err error
	// Partial is how many bytes of a struck WriteAt are written (a short write).
	Partial int
	// Lie has a struck ReadAt succeed, with other bytes.
	Lie Lie
	// Loss is what becomes of the operations that a struck Sync covered. What it
	// loses is gone, and no later Sync brings it back, but ReadAt goes on to
	// show it until DropCache: Linux marks pages clean whose writeback failed.
	Loss Loss
}

// A Lie is how a disk reads wrong without a word.
type Lie struct {
	// Old is an earlier Clone: what it had there is read (stale blocks).
	Old *Disk
	// Shift is how far away from where it was asked for what is read lies, in bytes
	// (misdirected blocks).
	Shift int64
	// Flip flips a bit of what is read.
	Flip bool
}

// read reads what a disk that lies shows instead of d.
func (l Lie) read(d *Disk, p []byte, off int64) {
	img := d.cache
	if l.Old != nil {
		l.Old.mu.Lock()
		defer l.Old.mu.Unlock()
		img = l.Old.cache
	}
	img.read(p, max(0, off+l.Shift))
	if l.Flip && len(p) > 0 {
		bit := mix(d.seed, uint64(d.counts.Reads)) % uint64(8*len(p))
		p[bit/8] ^= 1 << (bit % 8)
	}
}

// Inject adds a fault. Of several that match an operation, the first that is
// due strikes it.
func (d *Disk) Inject(f Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = append(d.faults, &f)
}

// FailSync has the n-th Sync from now (1 is the next) fail, once, with the given
// fate of what it covered.
func (d *Disk) FailSync(n int, loss Loss) {
	d.Inject(Fault{Kinds: Sync, After: n - 1, Times: 1, Loss: loss})
}

// FailReads has every ReadAt that touches [off, off+n) fail: a bad sector.
func (d *Disk) FailReads(off, n int64) { d.Inject(Fault{Kinds: Read, Off: off, Len: n}) }

// ClearFaults removes all faults.
func (d *Disk) ClearFaults() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = nil
}

// faultLocked is the fault that strikes an operation, nil if none does.
func (d *Disk) faultLocked(k Kind, off, n int64) (struck *Fault) {
	for i := 0; i < len(d.faults); i++ {
		f := d.faults[i]
		if f.Kinds&k == 0 {
			continue
		}
		if ranged := k&(Sync|DropCache) == 0; ranged && f.Len != 0 && (off >= f.Off+f.Len || off+max(n, 1) <= f.Off) {
			continue
		}
		if f.After > 0 {
			f.After--
			continue
		}
		if struck != nil {
			continue // its After still counts
		}
		struck = f
		if f.Times > 0 {
			if f.Times--; f.Times == 0 {
				d.faults = append(d.faults[:i:i], d.faults[i+1:]...)
				i--
			}
		}
	}
	return struck
}

func (f *Fault) error(what string, off int64) error {
	err := f.Err
	if err == nil {
		err = syscall.EIO
	}
	return fmt.Errorf("disktest: %s at %d: %w", what, off, err)
}

// Corrupt flips bits in each of the bytes [off, off+n), which must not be
// pending, at rest: on the medium and in what reads show.
func (d *Disk) Corrupt(off, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := make([]byte, n)
	d.medium.img.read(b, off)
	for i := range b {
		b[i] ^= 1 << (mix(d.seed, uint64(off)+uint64(i)) % 8)
	}
	d.putLocked(b, off)
}

// Copy puts the n bytes at src also at dst: a write that went to the wrong
// place. They must not be pending.
func (d *Disk) Copy(dst, src, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := make([]byte, n)
	d.medium.img.read(b, src)
	d.putLocked(b, dst)
}

// Swap exchanges the n bytes at a and at b, which do not overlap: two writes that
// went to each other's place. They must not be pending.
func (d *Disk) Swap(a, b, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, q := make([]byte, n), make([]byte, n)
	d.medium.img.read(p, a)
	d.medium.img.read(q, b)
	d.putLocked(q, a)
	d.putLocked(p, b)
}

// Zero has the bytes [off, off+n) read as zeros: an erased block. They must not be
// pending.
func (d *Disk) Zero(off, n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.putLocked(make([]byte, n), off)
}

// Restore puts the bytes [off, off+n) of old, an earlier Clone or Crash, back:
// a write that was acknowledged and never happened. They must not be pending.
func (d *Disk) Restore(old *Disk, off, n int64) {
	old.mu.Lock()
	b := make([]byte, n)
	old.cache.read(b, off)
	old.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.putLocked(b, off)
}

func (d *Disk) putLocked(b []byte, off int64) {
	d.medium.img.write(b, off)
	d.cache.write(b, off)
}
