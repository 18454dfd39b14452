package buffer

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"unsafe"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/internal/invariants"
)

func mustPanic(t *testing.T, what string, f func()) {
	t.Helper()
	defer func() {
		t.Helper()
		if recover() == nil {
			t.Errorf("%s did not panic", what)
		}
	}()
	f()
}

func newArena[H any](t testing.TB, n int) *Arena[H] {
	t.Helper()
	a, err := NewArena[H](n)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestArenaGivesEachFrameOnce(t *testing.T) {
	const n = 7
	a := newArena[[3]uint16](t, n)
	seen := map[Frame]bool{}
	for range n {
		f, ok := a.Alloc()
		if !ok || f == 0 || f > n || seen[f] {
			t.Fatalf("Alloc = %d, %v after %v", f, ok, seen)
		}
		seen[f] = true
		b := a.Bytes(f)
		if len(b) != block.Size || cap(b) != block.Size || uintptr(unsafe.Pointer(&b[0]))%block.Size != 0 {
			t.Fatalf("frame %d: len %d cap %d at %p", f, len(b), cap(b), &b[0])
		}
		for i := range b {
			b[i] = byte(f)
		}
		*a.Header(f) = [3]uint16{uint16(f), uint16(f), uint16(f)}
	}
	if _, ok := a.Alloc(); ok {
		t.Fatal("Alloc succeeded with no frame free")
	}
	if a.Outstanding() != n || a.Used() != n || a.Len() != n {
		t.Fatalf("outstanding %d, used %d, len %d", a.Outstanding(), a.Used(), a.Len())
	}
	for f := range seen { // no frame or header overlaps another, or the links
		if b := a.Bytes(f); b[0] != byte(f) || b[block.Size-1] != byte(f) {
			t.Fatalf("frame %d was overwritten", f)
		}
		if h := *a.Header(f); h != [3]uint16{uint16(f), uint16(f), uint16(f)} {
			t.Fatalf("header of %d is %v", f, h)
		}
		a.Free(f)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if a.Close() == nil {
		t.Fatal("second Close succeeded")
	}
}

func TestTable(t *testing.T) {
	if _, err := NewTable[uint64](0); err == nil {
		t.Error("a table of nothing was made")
	}
	table, err := NewTable[[3]uint32](1000)
	if err != nil {
		t.Fatal(err)
	}
	values := table.Values()
	if len(values) != 1000 {
		t.Fatalf("%d values", len(values))
	}
	for i := range values {
		if values[i] != [3]uint32{} {
			t.Fatalf("value %d is %v at first", i, values[i])
		}
		values[i] = [3]uint32{uint32(i), 1, 2}
	}
	if values[7] != [3]uint32{7, 1, 2} {
		t.Errorf("value 7 is %v", values[7])
	}
	if err := table.Close(); err != nil {
		t.Error(err)
	}
	if table.Close() == nil {
		t.Error("closed twice")
	}
}

func TestArenaReusesTheLatestFirst(t *testing.T) {
	a := newArena[struct{}](t, 8)
	defer a.Close()
	var fs []Frame
	for range 3 {
		f, _ := a.Alloc()
		fs = append(fs, f)
	}
	for _, f := range fs {
		a.Free(f)
	}
	for i := range fs {
		if f, _ := a.Alloc(); f != fs[len(fs)-1-i] {
			t.Fatalf("Alloc %d = %d, want %d", i, f, fs[len(fs)-1-i])
		}
	}
	if a.Used() != 3 {
		t.Fatalf("%d frames touched, want 3", a.Used())
	}
}

func TestArenaCatchesMistakes(t *testing.T) {
	a := newArena[struct{}](t, 2)
	defer a.Close()
	f, _ := a.Alloc()
	g, _ := a.Alloc()
	a.Free(f)
	mustPanic(t, "a second Free", func() { a.Free(f) })
	if invariants.Enabled {
		a.Bytes(f)[17] = 1
		mustPanic(t, "Alloc of a frame written after Free", func() { a.Alloc() })
	}
	a.Free(g)
	for _, n := range []int{0, -1, framesMax + 1} {
		if _, err := NewArena[struct{}](n); err == nil {
			t.Errorf("arena of %d frames was made", n)
		}
	}
}

// Many goroutines take and free frames of a small arena. Each marks what it owns
// and finds its mark again; with as many owners as frames, none ever fails.
func TestArenaConcurrent(t *testing.T) {
	const workers, each = 8, 3
	a := newArena[uint64](t, workers*each)
	defer a.Close()
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	var wg sync.WaitGroup
	for w := range workers {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		wg.Go(func() {
			var own []Frame
			for i := range 4000 * disktest.Scale(t) {
				if len(own) < each && rng.IntN(2) == 0 {
					f, ok := a.Alloc()
					if !ok {
						t.Errorf("worker %d: no frame although %d of %d are mine", w, len(own), each)
						return
					}
					mark := uint64(w)<<32 | uint64(i)
					binary.NativeEndian.PutUint64(a.Bytes(f), mark)
					*a.Header(f) = mark
					own = append(own, f)
				} else if len(own) > 0 {
					k := rng.IntN(len(own))
					f := own[k]
					own[k] = own[len(own)-1]
					own = own[:len(own)-1]
					if m := binary.NativeEndian.Uint64(a.Bytes(f)); m != *a.Header(f) || m>>32 != uint64(w) {
						t.Errorf("frame %d has two owners: %x, %x", f, m, *a.Header(f))
						return
					}
					a.Free(f)
				}
			}
			for _, f := range own {
				a.Free(f)
			}
		})
	}
	wg.Wait()
	if n := a.Outstanding(); n != 0 {
		t.Fatalf("%d frames outstanding", n)
	}
}

func TestPoolIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, err := NewPool(5000, 2)
		if err != nil {
			t.Fatal(err)
		}
		a, b := p.TryGet(), p.TryGet()
		if len(a) != 5000 || cap(a) != 5000 || uintptr(unsafe.Pointer(&a[0]))%block.Size != 0 {
			t.Fatalf("len %d cap %d at %p", len(a), cap(a), &a[0])
		}
		if b == nil || p.TryGet() != nil || p.Outstanding() != 2 || p.Len() != 2 || p.Size() != 5000 {
			t.Fatalf("pool of 2: second %p, outstanding %d", b, p.Outstanding())
		}
		a[4999], b[0] = 1, 2

		got := make(chan []byte)
		go func() {
			c, err := p.Get(context.Background())
			if err != nil {
				t.Error(err)
			}
			got <- c
		}()
		synctest.Wait()
		select {
		case <-got:
			t.Fatal("Get did not wait")
		default:
		}
		p.Put(a[:100])
		if c := <-got; unsafe.SliceData(c) != unsafe.SliceData(a) || len(c) != 5000 {
			t.Fatal("Get did not return the whole buffer that became free")
		}

		why := errors.New("gone")
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(why)
		if _, err := p.Get(ctx); err != why {
			t.Fatalf("Get with a dead context: %v", err)
		}
		if p.Close() == nil {
			t.Fatal("Close with buffers outstanding succeeded")
		}
		p.Put(b)
		p.Put(a)
		if c, err := p.Get(ctx); err != nil || unsafe.SliceData(c) != unsafe.SliceData(a) {
			t.Fatal("a free buffer, the latest one, was not given at once")
		}
		mustPanic(t, "Put of a free buffer", func() { p.Put(b) })
		mustPanic(t, "Put of foreign memory", func() { p.Put(make([]byte, 5000)) })
		mustPanic(t, "Put of the middle of a buffer", func() { p.Put(a[block.Size:]) })
		if invariants.Enabled {
			b[3] = 0
			mustPanic(t, "Get of a buffer written after Put", func() { p.TryGet() })
		}
	})
}

func TestPoolConcurrent(t *testing.T) {
	p, err := NewPool(block.Size, 3)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for range 500 * disktest.Scale(t) {
				b, err := p.Get(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				b[0], b[block.Size-1] = byte(w), byte(w)
				if b[0] != byte(w) || b[block.Size-1] != byte(w) {
					t.Error("buffer has two owners")
				}
				p.Put(b)
			}
		})
	}
	wg.Wait()
	if p.Outstanding() != 0 {
		t.Fatalf("%d buffers outstanding", p.Outstanding())
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkArenaAllocFree(b *testing.B) {
	a := newArena[uint64](b, 1024)
	defer a.Close()
	b.ReportAllocs()
	for b.Loop() {
		f, _ := a.Alloc()
		a.Free(f)
	}
}
