package device

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/internal/disktest"
	"cnbd/store"
)

// What go-nbd's backend.Backend asks for: a program that has go-nbd can serve a
// Device.
var _ interface {
	ReadAt(p []byte, off int64) (n int, err error)
	WriteAt(p []byte, off int64) (n int, err error)
	Size() (int64, error)
	Sync() error
} = (*Device)(nil)

// testGeometry is a small device in small segments with much room.
func testGeometry(size uint64, codec compression.Codec) store.Geometry {
	return store.Geometry{DeviceSize: size, Capacity: 400 * store.SegmentSizeMin, SegmentSize: store.SegmentSizeMin,
		ExtentBlocks: 16, Codec: uint8(codec), Level: 1}
}

// smallOptions make a device whose every limit is reached all the time: a cache
// of 64 pages, short checkpoints.
func smallOptions(t testing.TB) Options {
	return Options{CacheBytes: 64 * block.Size, PayloadBytes: 4 << 20, MapCacheBytes: 64 << 10, Workers: 3,
		CheckpointBytes: 256 << 10, CommitInterval: 20 * time.Millisecond, WritebackPeriod: 5 * time.Millisecond,
		DirtyExpire: 10 * time.Millisecond,
		Warn: func(msg string, err error) {
			if !errors.Is(err, disktest.ErrPowerCut) && !errors.Is(err, store.ErrClosed) {
				t.Errorf("warning: %s: %v", msg, err)
			}
		}}
}

func format(t testing.TB, f disk.File, g store.Geometry) {
	t.Helper()
	if err := store.Format(f, g); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, f disk.File, o Options) *Device {
	t.Helper()
	d, err := Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// do carries a request out on the device. What a read returns is appended to buf.
func do(ctx context.Context, d *Device, r disktest.Request, off int64, buf []byte) ([]byte, error) {
	at, n := uint64(off+r.Off), uint64(r.Len)
	switch r.Verb {
	case disktest.VerbRead:
		p, err := d.Read(ctx, at, uint32(n))
		if err != nil {
			return buf, err
		}
		for _, s := range p.Segments() {
			buf = append(buf, s...)
		}
		p.Release()
		return buf, nil
	case disktest.VerbWrite:
		w, err := d.PrepareWrite(ctx, at, uint32(n))
		if err != nil {
			return buf, err
		}
		payload := r.Payload(nil)
		for _, s := range w.Segments() {
			payload = payload[copy(s, payload):]
		}
		if len(payload) > 0 {
			return buf, fmt.Errorf("segments are %d bytes short", len(payload))
		}
		return buf, w.Commit(ctx, r.FUA)
	case disktest.VerbZeroes:
		return buf, d.WriteZeroes(ctx, at, n, r.FUA)
	case disktest.VerbTrim:
		return buf, d.Trim(ctx, at, n, r.FUA)
	}
	return buf, d.Flush(ctx)
}

// shared is a model that several connections change, each in its own region.
type shared struct {
	mu    sync.Mutex
	model *disktest.Model
}

// shift is r in the device's offsets.
func (s *shared) apply(r disktest.Request, off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Verb {
	case disktest.VerbWrite:
		s.model.Write(r.Payload(nil), off+r.Off)
	case disktest.VerbZeroes:
		s.model.Zero(off+r.Off, r.Len)
	case disktest.VerbTrim:
		s.model.Trim(off+r.Off, r.Len)
	}
}

func (s *shared) read(p []byte, off int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.model.Read(p, off)
}

// TestRandomHistories has several connections change and read a device at once,
// each in a region of its own with borders in the middle of blocks, over many
// restarts, against a plain byte slice. The range is many times the cache.
func TestRandomHistories(t *testing.T) {
	seed := disktest.Seed(t)
	const size, conns = 8<<20 + 1536, 4
	restarts := 12 * disktest.Scale(t)
	ops := 0
	for _, codec := range []compression.Codec{compression.Zstd, compression.S2, compression.None} {
		f := disktest.New(seed, disktest.Options{})
		var file disk.File = f
		format(t, file, testGeometry(size, codec))
		sh := &shared{model: disktest.NewModel(size)}
		rng := rand.New(rand.NewPCG(seed, uint64(codec)))
		var total Status
		for restart := range restarts {
			d := open(t, file, smallOptions(t))
			if restart%4 == 3 {
				sh.mu.Lock()
				if err := sh.model.Check(d); err != nil {
					t.Fatalf("seed %d, %v, after restart %d: %v", seed, codec, restart, err)
				}
				sh.mu.Unlock()
			}
			var wg sync.WaitGroup
			for c := range conns {
				region := int64(size / conns)
				base := int64(c) * region
				h := disktest.NewHistory(seed^uint64(restart*conns+c)<<8, disktest.HistoryOptions{Size: region, RequestMax: 1 << 20})
				wg.Go(func() {
					var got, want []byte
					for range 60 {
						r := h.Next()
						var err error
						if got, err = do(t.Context(), d, r, base, got[:0]); err != nil {
							t.Errorf("seed %d, %v, restart %d, connection %d: %v: %v", seed, codec, restart, c, r, err)
							return
						}
						sh.apply(r, base)
						if r.Verb == disktest.VerbRead {
							want = append(want[:0], make([]byte, r.Len)...)
							sh.read(want, base+r.Off)
							if i := differ(got, want); i >= 0 {
								t.Errorf("seed %d, %v, restart %d, connection %d: %v: byte %d is %#x, want %#x (%s)", seed, codec, restart, c, r,
									base+r.Off+int64(i), got[i], want[i], disktest.Describe(got[i:min(len(got), i+16)], base+r.Off+int64(i)))
								return
							}
						}
					}
				})
			}
			wg.Wait()
			ops += 60 * conns
			if t.Failed() {
				return
			}
			if st, err := d.Status(t.Context()); err != nil {
				t.Fatal(err)
			} else {
				total.Reads.Bookends += st.Reads.Bookends
				total.Reads.Neighbours += st.Reads.Neighbours
				total.Reads.ReadModifyWrites += st.Reads.ReadModifyWrites
				total.Writeback.Raw += st.Writeback.Raw
				total.Writeback.Encoded += st.Writeback.Encoded
				total.Writeback.Busy += st.Writeback.Busy
				total.Writeback.Retests += st.Writeback.Retests
			}
			if rng.IntN(2) == 0 {
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			} else {
				if err := d.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := d.Abort(); err != nil {
					t.Fatal(err)
				}
			}
			f = f.Crash(disktest.LoseAll)
			file = f
			rep, err := store.Check(f.Clone(), store.CheckOptions{Data: true})
			if err != nil {
				t.Fatalf("seed %d, %v: check after restart %d: %v", seed, codec, restart, err)
			}
			if !rep.Clean {
				t.Fatalf("seed %d, %v: check after restart %d: %+v", seed, codec, restart, rep)
			}
		}
		t.Logf("seed %d, %v: %d requests so far; reads %+v; writeback %+v", seed, codec, ops, total.Reads, total.Writeback)
		if total.Reads.Bookends == 0 || total.Reads.ReadModifyWrites == 0 || total.Writeback.Raw == 0 {
			t.Errorf("something never happened: %+v, %+v", total.Reads, total.Writeback)
		}
	}
}

func differ(a, b []byte) int {
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestPowerCut runs one connection over a recording disk, with commits, write
// out and checkpoints going on by themselves, and opens what a power cut at each
// operation of the disk would have left. The device must have the state after
// some prefix of the requests, which contains all that was answered before the
// last flush was answered.
func TestPowerCut(t *testing.T) {
	seed := disktest.Seed(t)
	const size = 1 << 20
	cuts := 0
	for h := range 4 * disktest.Scale(t) {
		seed := seed + uint64(h)
		f := disktest.New(seed, disktest.Options{SectorSize: []int{512, 4096}[h%2]})
		g := testGeometry(size, compression.Zstd)
		format(t, f, g)
		f.Record()
		from := f.Ops()
		model := disktest.NewModel(size)
		o := smallOptions(t)
		o.CheckpointBytes = 64 << 10
		d := open(t, f, o)
		type mark struct {
			op    int64
			point int
		}
		var durable []mark
		hist := disktest.NewHistory(seed, disktest.HistoryOptions{Size: size, RequestMax: 64 << 10})
		for range 120 {
			r := hist.Next()
			if _, err := do(t.Context(), d, r, 0, nil); err != nil {
				t.Fatalf("seed %d: %v: %v", seed, r, err)
			}
			model.Do(r)
			point := model.Commit()
			if r.Verb == disktest.VerbFlush || r.FUA {
				durable = append(durable, mark{f.Ops(), point})
			}
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		for k := from; k <= f.Ops(); k++ {
			for _, loss := range []disktest.Loss{disktest.LoseAll, disktest.KeepAll, disktest.Random(seed ^ uint64(k)<<20)} {
				cuts++
				oldest := 0
				for _, m := range durable {
					if m.op <= k {
						oldest = m.point
					}
				}
				left := f.At(k, loss)
				o := smallOptions(t)
				o.Warn = nil // of a superblock that the cut has torn
				s, err := Open(left, o)
				if err != nil {
					t.Fatalf("seed %d, cut at operation %d, %v: %v", seed, k, loss, err)
				}
				all := make([]byte, size)
				if _, err := s.ReadAt(all, 0); err != nil {
					t.Fatalf("seed %d, cut at operation %d, %v: %v", seed, k, loss, err)
				}
				if _, err := model.Find(readerAt(all), oldest); err != nil {
					t.Fatalf("seed %d, cut at operation %d, %v: %v", seed, k, loss, err)
				}
				s.Abort()
			}
		}
	}
	t.Logf("seed %d: %d cuts", seed, cuts)
}

type readerAt []byte

func (r readerAt) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(r)) {
		return 0, io.EOF
	}
	n := copy(p, r[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TestColdRead: a 4 KiB read in a stored extent reads the store once, and its
// neighbours are then served without another read.
func TestColdRead(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := Options{CacheBytes: 8 << 20, Workers: 2}
	d := open(t, f, o)
	data := disktest.Request{Verb: disktest.VerbWrite, Len: 64 << 10, Content: disktest.Text}.Payload(nil)
	for _, off := range []int64{128 << 10, 1 << 20} {
		if _, err := d.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	f = f.Crash(disktest.LoseAll)
	d = open(t, f, o)
	defer d.Close()
	one := make([]byte, block.Size)
	if _, err := d.ReadAt(one, 1<<20); err != nil { // its map leaf
		t.Fatal(err)
	}
	before := f.Counts()
	if _, err := d.ReadAt(one, 128<<10+5*block.Size); err != nil {
		t.Fatal(err)
	}
	if n := f.Counts().Sub(before).Reads; n != 1 {
		t.Errorf("a cold read of one block read the store %d times, want 1", n)
	}
	got := make([]byte, len(data))
	if _, err := d.ReadAt(got, 128<<10); err != nil {
		t.Fatal(err)
	}
	if n := f.Counts().Sub(before).Reads; n != 1 {
		t.Errorf("its neighbours read the store %d times more, want 0", n-1)
	}
	if differ(got, data) >= 0 {
		t.Error("the data differs")
	}
}

// TestCommitIsOneWriteAndOneSync: a small write and a flush cost one write and one
// sync of the backing file.
func TestCommitIsOneWriteAndOneSync(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	d := open(t, f, Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour})
	defer d.Close()
	data := make([]byte, block.Size)
	data[5] = 1
	for i := range 10 {
		before := f.Counts()
		if _, err := d.WriteAt(data, int64(i)*40960); err != nil {
			t.Fatal(err)
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
		if c := f.Counts().Sub(before); i > 0 && (c.Writes != 1 || c.Syncs != 1) {
			t.Errorf("commit %d: %d writes and %d syncs, want 1 and 1", i, c.Writes, c.Syncs)
		}
	}
}

// TestFailedSync: after a failed sync nothing is acknowledged any more, reads go
// on, and a restart has the last commit that is on the medium (P5).
func TestFailedSync(t *testing.T) {
	f := disktest.New(1, disktest.Options{})
	format(t, f, testGeometry(4<<20, compression.Zstd))
	o := Options{CacheBytes: 8 << 20, Workers: 2, CommitInterval: time.Hour}
	d := open(t, f, o)
	model := disktest.NewModel(4 << 20)
	write := func(seq uint64, off int64) error {
		r := disktest.Request{Seq: seq, Verb: disktest.VerbWrite, Off: off, Len: 10000}
		_, err := do(t.Context(), d, r, 0, nil)
		if err == nil {
			model.Do(r)
		}
		return err
	}
	if err := write(1, 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	good := model.Commit()
	if err := write(2, 8192); err != nil {
		t.Fatal(err)
	}
	f.FailSync(1, disktest.LoseAll)
	for i := range 3 {
		if err := d.Sync(); err == nil {
			t.Fatalf("flush %d after a failed sync was answered with success", i)
		}
	}
	if err := write(3, 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("write after a failed sync: %v, want EIO", err)
	}
	if err := model.Check(d); err != nil {
		t.Errorf("reads after a failed sync: %v", err)
	}
	d.Abort()
	// The host's page cache still shows what is not on the medium.
	d = open(t, f.Clone(), o)
	defer d.Abort()
	if err := model.CheckCommit(d, good); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}
