// Command extents makes a store of very many extents and measures what their number
// costs: the size of the map, the time and memory of opening after a clean stop and
// after a crash, the reads of the backing for a read of the device, and a TRIM of all
// of it, which is made of the empty device as well.
//
//	go run ./bench/extents --dir DIR [--size 16TiB] [--count 100000000]
//
// Each extent is a block at a random place with a payload of 64 bytes, appended by
// the store's own code; they are appended in the order of places, or the map would
// be written a hundred times over. The store, about 130 bytes for each extent, is
// made in DIR and removed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cnbd/config"
	"cnbd/device"
	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/store"
)

func main() {
	dir := flag.String("dir", ".", "`directory` for the store")
	size := flag.String("size", "16TiB", "`size` of the device")
	count := flag.Int("count", 100_000_000, "`number` of extents")
	child := flag.String("child", "", "`step` that a process of its own does, internal")
	flag.Parse()
	var err error
	switch b := (bench{path: filepath.Join(*dir, "extents.cnbd"), size: *size, count: *count}); *child {
	case "open":
		err = b.measure()
	case "trim":
		err = b.trim()
	case "crash":
		err = b.append(min(*count, 100_000), false) // and the process ends
	default:
		err = b.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "extents:", err)
		os.Exit(1)
	}
}

type bench struct {
	path  string
	size  string
	count int
}

// place is the block of extent k of count.
func place(k, count int, blocks block.Count) block.Index {
	step := uint64(blocks) / uint64(count)
	x := uint64(k) * 0x9e3779b97f4a7c15 // Weyl sequence: every place in a step is as likely
	return block.Index(uint64(k)*step + (x>>32)*step>>32)
}

func (b bench) run() error {
	n, err := config.ParseSize(b.size)
	if err != nil {
		return err
	}
	size, path := uint64(n), b.path
	g := store.Geometry{DeviceSize: size, Capacity: store.DefaultCapacity(size, store.DefaultSegmentSize(size), 128<<20, 256<<20),
		SegmentSize: store.DefaultSegmentSize(size), ExtentBlocks: 16, Codec: uint8(compression.Zstd), Level: 1, DirtyMax: 128 << 20}
	if err := disk.CreateFile(path, false, func(f disk.File) error { return store.Format(f, g) }); err != nil {
		return err
	}
	defer os.Remove(path)
	if err := b.step("trim"); err != nil {
		return err
	}
	start := time.Now()
	if err := b.append(b.count, true); err != nil {
		return err
	}
	fmt.Printf("%d extents appended in %v\n", b.count, time.Since(start).Round(time.Second))
	for _, step := range []string{"open", "crash", "open", "trim"} {
		if err := b.step(step); err != nil {
			return err
		}
	}
	return nil
}

// step runs a step in a process of its own, of which the memory can be told.
func (b bench) step(name string) error {
	fmt.Println(name)
	c := exec.Command(os.Args[0], "--child", name, "--dir", filepath.Dir(b.path), "--count", fmt.Sprint(b.count))
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	return c.Run()
}

// append appends count extents, and stops in the orderly way or not at all.
func (b bench) append(count int, clean bool) error {
	f, err := disk.Open(b.path, disk.OpenOptions{})
	if err != nil {
		return err
	}
	want := make(chan struct{}, 1)
	s, err := store.Open(f, store.Options{NeedCommit: func() {
		select {
		case want <- struct{}{}:
		default:
		}
	}})
	if err != nil {
		return err
	}
	var appends sync.Mutex // appends and commits go one at a time
	commit := func() error {
		appends.Lock()
		defer appends.Unlock()
		c, ok, err := s.AppendCommit()
		if err != nil || !ok {
			return err
		}
		return s.Sync(c)
	}
	go func() { // until the process ends
		for range want {
			_ = commit() // a failure is told to the next append
		}
	}()
	payload := payloadOf()
	g := s.Geometry()
	for i := 0; i < count; i += 256 {
		n := min(256, count-i)
		if err := s.Reserve(block.Count(n), store.Growth); err != nil { // and waits for the checkpoint
			return err
		}
		appends.Lock()
		for k := i; k < i+n && err == nil; k++ {
			err = s.AppendData(extents.Blob{Start: place(k, count, g.Blocks()), Count: 1, Present: 1, Codec: uint8(compression.Zstd), Level: 1, Parts: [][]byte{payload}})
		}
		appends.Unlock()
		s.Release(block.Count(n))
		if err == nil && i%65536 == 0 {
			err = commit()
		}
		if err != nil {
			return err
		}
	}
	if err := commit(); err != nil || !clean {
		return err // the process goes on, but nothing more is written: a crash
	}
	if err := s.Checkpoint(); err != nil {
		return err
	}
	st, err := s.Stats()
	if err != nil {
		return err
	}
	fmt.Printf("map: %d extents in %d nodes, %d MiB: %.1f bytes for each extent; records %.1f\n", st.Extents, st.Nodes, st.MapBytes>>20,
		float64(st.MapBytes)/float64(st.Extents), float64(st.LogWritten)/float64(st.Extents))
	if err := s.TrimHost(); err != nil {
		return err
	}
	return s.Close()
}

// payloadOf is a block as zstd stores it, in less than 64 bytes.
func payloadOf() []byte {
	page := make([]byte, block.Size)
	copy(page, "a block of a database that holds not much")
	out, _, _ := compression.NewEncoder().Encode(nil, page, compression.Setting{Codec: compression.Zstd, Level: 1})
	return out
}

// open opens the store as a device. cache is the size of its map cache in MiB.
func (b bench) open() (d *device.Device, g store.Geometry, cache int, err error) {
	f, err := disk.Open(b.path, disk.OpenOptions{})
	if err != nil {
		return nil, g, 0, err
	}
	if g, err = store.ReadGeometry(f); err != nil {
		return nil, g, 0, err
	}
	cache = max(32, int(8*(g.DeviceSize>>40))) // MiB: 8 for each TiB
	d, err = device.Open(f, device.Options{CacheBytes: 64 << 20, MapCacheBytes: int64(cache) << 20, NoRecompress: true})
	return d, g, cache, err
}

// trim trims all of the device, and waits until the work behind that is done, with
// nobody asking for it: until the host has what it gets back.
func (b bench) trim() error {
	d, g, _, err := b.open()
	if err != nil {
		return err
	}
	allocated := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(b.path, &st); err != nil {
			return 0
		}
		return st.Blocks * 512
	}
	before, start := allocated(), time.Now()
	if err := d.Trim(context.Background(), 0, g.DeviceSize, false); err != nil {
		return err
	}
	answered := time.Since(start)
	flush := time.Now()
	if err := d.Sync(); err != nil {
		return err
	}
	flushed := time.Since(flush)
	page := make([]byte, block.Size)
	if _, err := d.ReadAt(page, int64(place(b.count/2, b.count, g.Blocks()).Bytes())); err != nil {
		return err
	}
	if !compression.IsZero(page) {
		return errors.New("a trimmed block is not zero")
	}
	const still = 20 * time.Second
	last, changed := before, time.Now()
	for time.Since(changed) < still {
		time.Sleep(100 * time.Millisecond)
		st, err := d.Look() // which asks for nothing
		if err != nil {
			return err
		}
		if n := allocated(); n != last || st.Store.PendingTrims > 0 {
			last, changed = n, time.Now()
		}
	}
	fmt.Printf("  TRIM of %d GiB answered in %v, a FLUSH behind it in %v; on the host %d MiB before, %d MiB after %v; resident %d MiB at most\n", g.DeviceSize>>30,
		answered.Round(time.Microsecond), flushed.Round(time.Microsecond), before>>20, last>>20, changed.Sub(start).Round(100*time.Millisecond), resident("VmHWM:"))
	st, err := d.Status(context.Background())
	if err != nil {
		return err
	}
	fmt.Printf("  then %d extents in %d nodes, %d bytes of data, %d of trims pending, %d checkpoints\n", st.Store.Extents, st.Store.Nodes, st.Store.DataBytes,
		st.Store.PendingTrims, st.Store.Checkpoints)
	return d.Close()
}

// measure opens the store and reads blocks that it has, at random.
func (b bench) measure() error {
	start := time.Now()
	d, g, cache, err := b.open()
	if err != nil {
		return err
	}
	took := time.Since(start)
	r := d.Recovery()
	fmt.Printf("  opened in %v, %d records replayed; resident %d MiB (caches: pages 64, map %d)\n", took.Round(time.Millisecond), r.Records, resident("VmRSS:"), cache)
	st, err := d.Status(context.Background())
	if err != nil {
		return err
	}
	const reads = 20000
	rng := rand.New(rand.NewPCG(1, 1))
	page := make([]byte, block.Size)
	before, nodes := st.Store.Reads, st.Store.NodesRead
	start = time.Now()
	for range reads {
		if _, err := d.ReadAt(page, int64(place(rng.IntN(b.count), b.count, g.Blocks()).Bytes())); err != nil {
			return err
		}
	}
	took = time.Since(start)
	if st, err = d.Status(context.Background()); err != nil {
		return err
	}
	fmt.Printf("  %d random reads of a block: %.2f reads of the map, %.2f of data each, %v; resident %d MiB\n", reads,
		float64(st.Store.NodesRead-nodes)/reads, float64(st.Store.Reads-before)/reads, (took / reads).Round(time.Microsecond), resident("VmRSS:"))
	return d.Close()
}

// resident is the resident memory of the process in MiB: now (VmRSS:), or at most
// so far (VmHWM:).
func resident(field string) int {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == field {
			n, _ := strconv.Atoi(f[1])
			return n >> 10
		}
	}
	return 0
}
