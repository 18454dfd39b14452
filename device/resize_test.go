package device

import (
	"bytes"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// TestGrowInUse: a device grows while it is read and written, by little and not by
// whole blocks, and what was beyond its end reads as zeros.
func TestGrowInUse(t *testing.T) {
	const size = 256 * block.Size
	seed := disktest.Seed(t)
	v := newRandomDevice(t, seed, size, 3, make(map[string]uint64))
	d := open(t, v.disk, smallOptions(t))
	defer func() { _ = d.Close() }()
	done := make(chan error, 1)
	go func() {
		done <- v.each(func(r *region) error { return r.run(t.Context(), d, 200) })
	}()
	grown := uint64(size)
	page := bytes.Repeat([]byte{0x5a}, block.Size)
	for i := range 12 {
		was := grown
		grown += uint64(1+i%3) * 2560
		if _, err := d.Resize(t.Context(), ResizeOptions{Bytes: grown, CapacityBytes: d.Geometry().Capacity + store.SegmentSizeMin}); err != nil {
			t.Fatal(err)
		}
		if d.Bytes() != grown {
			t.Fatalf("%d bytes, want %d", d.Bytes(), grown)
		}
		got := make([]byte, grown-was)
		if _, err := d.ReadAt(got, int64(was)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, make([]byte, len(got))) {
			t.Fatalf("what was beyond byte %d is not zeros", was)
		}
		if _, err := d.WriteAt(page[:min(len(got), len(page))], int64(was)); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(page[:1], int64(grown)); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("a write at the end: %v", err)
		}
		if err := d.WriteZeroes(t.Context(), was, grown-was, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := v.each(func(r *region) error { return r.check(d) }); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, v.disk.Crash(disktest.LoseAll), smallOptions(t))
	if d.Bytes() != grown {
		t.Errorf("opened again it has %d bytes, want %d", d.Bytes(), grown)
	}
}

// TestShrinkRefused: a device does not shrink over its data, and nothing has changed.
func TestShrinkRefused(t *testing.T) {
	disk := disktest.New(1, disktest.Options{})
	format(t, disk, testGeometry(64*block.Size, compression.None))
	d := open(t, disk, smallOptions(t))
	defer d.Close()
	data := bytes.Repeat([]byte("data"), block.Size/4)
	if _, err := d.WriteAt(data, 40*block.Size); err != nil {
		t.Fatal(err)
	}
	capacity := d.Geometry().Capacity
	for bytes, beyond := range map[uint64]uint64{40 * block.Size: block.Size, 40*block.Size + 512: block.Size - 512, 1000: 0} {
		_, err := d.Resize(t.Context(), ResizeOptions{Bytes: bytes, CapacityBytes: capacity})
		tail, ok := errors.AsType[*TailError](err)
		if beyond == 0 && !errors.Is(err, syscall.EINVAL) || beyond != 0 && (!ok || tail.Bytes != beyond) {
			t.Errorf("%d bytes: %v", bytes, err)
		}
	}
	if _, err := d.Resize(t.Context(), ResizeOptions{Bytes: 41 * block.Size, CapacityBytes: capacity}); err != nil {
		t.Error(err)
	}
	got := make([]byte, len(data))
	if _, err := d.ReadAt(got, 40*block.Size); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the last block: %v, or is wrong", err)
	}
}

// TestZeroesBesideGrow: zeroes up to the end of a device, which are whole blocks as
// nothing lies behind it, do not take what is written there once it has grown.
func TestZeroesBesideGrow(t *testing.T) {
	const size = 8*block.Size + 512
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(size, compression.None))
	d := open(t, f, smallOptions(t))
	page := bytes.Repeat([]byte{0x5a}, block.Size)
	if _, err := d.WriteAt(page, block.Size); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, smallOptions(t))
	// It waits for what the block has before it, of which it zeroes a part.
	reading, proceed := make(chan struct{}), make(chan struct{})
	var first atomic.Bool
	f.SetHook(func(o disktest.Op) {
		if o.Kind == disktest.Read && !first.Swap(true) {
			close(reading)
			<-proceed
		}
	})
	done := make(chan error, 1)
	go func() { done <- d.WriteZeroes(t.Context(), block.Size+100, size-block.Size-100, false) }()
	<-reading
	f.SetHook(nil)
	if _, err := d.Resize(t.Context(), ResizeOptions{Bytes: size + 1024, CapacityBytes: d.Geometry().Capacity}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(page[:512], size); err != nil {
		t.Fatal(err)
	}
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size+1024)
	copy(want[block.Size:], page[:100])
	copy(want[size:], page[:512])
	compareAll(t, d, want)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestShrinkCountsAll: all that lies beyond the new end is counted, however far it is
// spread.
func TestShrinkCountsAll(t *testing.T) {
	const blocks, step = 300, 64 << 20
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(blocks*step, compression.Zstd))
	d := open(t, f, smallOptions(t))
	for i := range int64(blocks) {
		if _, err := d.WriteAt(bytes.Repeat([]byte{1}, block.Size), i*step); err != nil {
			t.Fatal(err)
		}
	}
	var tail *TailError
	_, err := d.Resize(t.Context(), ResizeOptions{Bytes: step, CapacityBytes: d.Geometry().Capacity})
	if !errors.As(err, &tail) || tail.Bytes != (blocks-1)*block.Size {
		t.Errorf("%v: want %d bytes", err, (blocks-1)*block.Size)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
