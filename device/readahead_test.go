package device

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disktest"
)

// cold is a device of size bytes whose data, which are returned too, are not in its cache.
func cold(t *testing.T, size int, cache int64) (*Device, []byte) {
	t.Helper()
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(uint64(size), compression.Zstd))
	o := Options{CacheBytes: cache, Workers: 2, CleanPeriod: time.Hour}
	d := open(t, f, o)
	data := disktest.Request{Verb: disktest.VerbWrite, Len: int64(size), Content: disktest.Text}.Payload(nil)
	for at := 0; at < size; at += 1 << 20 {
		if _, err := d.WriteAt(data[at:min(at+1<<20, size)], int64(at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, f.Clone(), o)
	t.Cleanup(func() { d.Close() })
	return d, data
}

// request reads n bytes at off as a connection does, and reports whether the cache had
// them all.
func request(t *testing.T, d *Device, off, n int) (p *Payload, hit bool) {
	t.Helper()
	p, hit = d.ReadPromptly(uint64(off), uint32(n))
	if !hit {
		var err error
		if p, err = d.Read(t.Context(), uint64(off), uint32(n)); err != nil {
			t.Fatal(err)
		}
	}
	return p, hit
}

// sameAt reads n bytes at off, and reports whether the cache had them.
func sameAt(t *testing.T, d *Device, data []byte, off, n int) (hit bool) {
	t.Helper()
	p, hit := request(t, d, off, n)
	defer p.Release()
	at := off
	for _, s := range p.Segments() {
		if differ(s, data[at:at+len(s)]) >= 0 {
			t.Fatalf("the data at %d differ", at)
		}
		at += len(s)
	}
	if at != off+n {
		t.Fatalf("%d bytes were read at %d, want %d", at-off, off, n)
	}
	return hit
}

// Who reads in order finds all but the beginning in the cache, whatever the size of the
// reads, up to the end and not beyond.
func TestReadAhead(t *testing.T) {
	const size = 8 << 20
	for _, n := range []int{block.Size, 20 << 10, 128 << 10, 256 << 10} {
		d, data := cold(t, size, 64<<20)
		missed := 0
		for off := 0; off < size; off += n {
			if !sameAt(t, d, data, off, min(n, size-off)) {
				missed = off + n
			}
			d.ahead.busy.Wait()
		}
		// Small reads have the extents that they are in, until they are a stream.
		if most := streamReads * max(n, 64<<10); missed > most {
			t.Errorf("reads of %d: one missed at %d, want none behind %d", n, missed, most)
		}
		if ahead, all := d.metrics.ahead.Load(), uint64(size/(aheadPiece*block.Size)); ahead == 0 || ahead > all {
			t.Errorf("reads of %d: %d pieces were read ahead of %d", n, ahead, all)
		}
	}
}

// Two that read in order at different places, one of them with reads that come out of
// order, are two streams.
func TestReadAheadOfSeveral(t *testing.T) {
	const size, n = 8 << 20, 64 << 10
	d, data := cold(t, size, 64<<20)
	missed := 0
	for i := 0; i < size/2/n; i++ {
		for _, off := range []int{i * n, size/2 + (i^1)*n} {
			if !sameAt(t, d, data, off, n) {
				missed++
			}
			d.ahead.busy.Wait()
		}
	}
	if missed > 4*streamReads {
		t.Errorf("%d reads missed", missed)
	}
}

// A stream whose next window is refused, since others keep the processors busy, goes on
// with the miss at the end of the last one.
func TestReadAheadGoesOn(t *testing.T) {
	const size, n = 8 << 20, 20 << 10
	d, data := cold(t, size, 64<<20)
	refused, missed := false, 0
	for off := 0; off < size; off += n {
		r := block.Covering(uint64(off), uint64(min(n, size-off)))
		busy := int64(0)
		for i := range d.ahead.marks {
			if m := d.ahead.marks[i].Load(); off > size/4 && !refused && m != 0 && r.Contains(block.Index(m-1)) {
				refused, busy = true, d.ahead.procs+1
			}
		}
		d.ahead.reading.Add(busy)
		if !sameAt(t, d, data, off, min(n, size-off)) && refused {
			missed++
		}
		d.ahead.reading.Add(-busy)
		d.ahead.busy.Wait()
	}
	if !refused || missed != 1 {
		t.Errorf("refused: %v, then %d reads missed, want 1", refused, missed)
	}
}

// What is read in no order is not followed by anything, nor is anything read ahead
// while all processors have misses, or by who reads a file that lies in order for the
// length of two reads.
func TestNoReadAhead(t *testing.T) {
	const size = 16 << 20
	holes := func() *Device {
		f := disktest.New(1, disktest.Options{})
		format(t, f, testGeometry(1<<30, compression.Zstd))
		d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, CleanPeriod: time.Hour})
		t.Cleanup(func() { d.Close() })
		return d
	}()
	for name, read := range map[string]func(d *Device, data []byte){
		"random": func(d *Device, data []byte) {
			rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
			for range 300 {
				p, err := holes.Read(t.Context(), rng.Uint64N(1<<30/block.Size)*block.Size, block.Size)
				if err != nil {
					t.Fatal(err)
				}
				p.Release()
			}
			if n := holes.metrics.ahead.Load(); n > 0 {
				t.Errorf("%d pieces were read ahead of holes", n)
			}
		},
		"two in order": func(d *Device, data []byte) {
			for i := range 8 {
				sameAt(t, d, data, i*2<<20, 64<<10)
				sameAt(t, d, data, i*2<<20+64<<10, 64<<10)
			}
		},
		"busy": func(d *Device, data []byte) {
			d.ahead.reading.Add(2)
			defer d.ahead.reading.Add(-2)
			for i := range 32 {
				sameAt(t, d, data, i*64<<10, 64<<10)
			}
			sameAt(t, d, data, 4<<20, 2<<20)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, data := cold(t, size, 64<<20)
			read(d, data)
			if n := d.metrics.ahead.Load(); n > 0 {
				t.Errorf("%d pieces were read ahead", n)
			}
		})
	}
}

// A large read is the work of two.
func TestLargeReadIsSplit(t *testing.T) {
	d, data := cold(t, 4<<20, 64<<20)
	sameAt(t, d, data, 1<<20-block.Size, 2<<20)
	d.ahead.busy.Wait()
	// Blocks 255 to 766: from 480 on.
	if n := d.metrics.ahead.Load(); n != 9 {
		t.Errorf("%d pieces were read by another, want 9", n)
	}
	if n, all := d.metrics.decodes.Load(), uint64(2<<20/(64<<10)+1); n != all {
		t.Errorf("%d extents were decoded, want each once: %d", n, all)
	}
}

// A device that shrinks is in use by nobody, also not by what is read ahead of requests that
// have ended.
func TestShrinkWaitsForReadAhead(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := Options{CacheBytes: 64 << 20, Workers: 2, CleanPeriod: time.Hour}
	d := open(t, f, o)
	if _, err := d.WriteAt(bytes.Repeat([]byte("some data"), 1<<20/9), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Clone()
	d = open(t, f, o)
	defer d.Close()
	shrunk, reads := make(chan error, 1), make(chan struct{}, 1)
	var once sync.Once
	f.SetHook(func(op disktest.Op) {
		if op.Kind == disktest.Read {
			once.Do(func() {
				reads <- struct{}{}
				select {
				case err := <-shrunk:
					t.Error("the device has shrunk while it was read ahead")
					shrunk <- err
				case <-time.After(100 * time.Millisecond):
				}
			})
		}
	})
	d.ahead.mu.Lock()
	launched := d.ahead.launch(block.Span(0, aheadPiece), 1)
	d.ahead.mu.Unlock()
	if !launched {
		t.Fatal("nothing is read ahead")
	}
	<-reads
	_, err := d.Resize(t.Context(), ResizeOptions{Bytes: 2 << 20, CapacityBytes: d.Geometry().Capacity})
	shrunk <- err
	if err != nil {
		t.Error(err)
	}
	d.ahead.busy.Wait()
}

// In a cache full of what is read often, what is read ahead has little room: it is no more
// than stays until it is asked for, so that nothing is decoded again.
func TestReadAheadBesideHotBlocks(t *testing.T) {
	const cache = 8 << 20
	d := newBenchDevice(t, Options{CacheBytes: cache, PayloadBytes: 4 << 20, Workers: 2})
	read := func(off, n int) {
		t.Helper()
		p, _ := request(t, d, off, n)
		p.Release()
		d.ahead.busy.Wait()
	}
	for _, n := range []int{16 << 10, 64 << 10, 1 << 20, 4 << 20} {
		for range 3 {
			for off := 0; off < cache; off += 64 << 10 {
				read(off, 64<<10)
			}
		}
		const from, to = cache, benchBlocks * block.Size
		before := d.metrics.decodes.Load()
		for off := from; off < to; off += n {
			read(off, n)
		}
		const extents = (to - from) / (64 << 10)
		decodes := d.metrics.decodes.Load() - before
		t.Logf("reads of %d: %d extents of %d were decoded", n, decodes, extents)
		if decodes > extents*5/4 {
			t.Errorf("reads of %d: %d extents were decoded to read %d", n, decodes, extents)
		}
	}
}

// A cache that is smaller than what is read ahead, beside overwriting: what is read is
// right, and closing waits for what is read ahead (or its memory is gone: SIGSEGV).
func TestReadAheadInSmallCache(t *testing.T) {
	const size = 4 << 20
	for range 3 * disktest.Scale(t) {
		d, data := cold(t, size, 1<<20)
		for off := 0; off < size; off += 96 << 10 {
			n := min(96<<10, size-off)
			if off%(5*96<<10) == 0 {
				for i := range data[off : off+block.Size] {
					data[off+i]++
				}
				if _, err := d.WriteAt(data[off:off+block.Size], int64(off)); err != nil {
					t.Fatal(err)
				}
			}
			sameAt(t, d, data, off, n)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
