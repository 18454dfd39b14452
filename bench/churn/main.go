// Command churn overwrites a device at random with real data, for as long as asked
// for, and tells what that costs: bytes written to the store for each byte stored,
// what the store takes, and what is left of the ratio, at once and after idle time.
// Every block is compared in the end.
//
//	go run ./bench/churn --data FILE --dir DIR [--size 4GiB] [--factor 1.35] [--write 40GiB] [--skew] [--idle 60s]
//
// FILE is any file of real data, such as a tar of /usr; the store is made in DIR and
// removed. Its capacity is factor times what a fresh copy stores, and the documented
// overhead of that.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/store"
)

const dirtyMax = 128 << 20 // of a device with the default cache

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "churn:", err)
		os.Exit(1)
	}
}

type churn struct {
	rng    *rand.Rand
	data   []byte   // mapped
	truth  []uint32 // of each block of the device: the block of data that it holds
	d      *device.Device
	refuse int // writes that were answered with ENOSPC
}

func run() error {
	dataPath := flag.String("data", "", "`file` of real data")
	dir := flag.String("dir", ".", "`directory` for the store")
	sizeFlag := flag.String("size", "4GiB", "`size` of the device")
	writeFlag := flag.String("write", "40GiB", "`bytes` to overwrite")
	factor := flag.Float64("factor", 1.35, "capacity as a multiple of what a fresh copy stores; 0: the default capacity")
	codec := flag.String("codec", "zstd:fastest", "codec for new data")
	skew := flag.Bool("skew", false, "nine in ten writes go to a tenth of the device")
	fixed := flag.Int("block", 0, "size of each write in `bytes`; 0: 4 KiB to 256 KiB")
	idle := flag.Duration("idle", time.Minute, "idle time after the writes")
	seed := flag.Uint64("seed", 1, "of the random numbers")
	flag.Parse()
	sizes := [2]int64{}
	for i, text := range []string{*sizeFlag, *writeFlag} {
		n, err := config.ParseSize(text)
		if err != nil {
			return err
		}
		sizes[i] = int64(n)
	}
	size, total := sizes[0], sizes[1]
	setting, err := compression.Parse(*codec)
	if err != nil {
		return err
	}
	c := &churn{rng: rand.New(rand.NewPCG(*seed, 0)), truth: make([]uint32, size/block.Size)}
	f, err := os.Open(*dataPath)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if c.data, err = unix.Mmap(int(f.Fd()), 0, int(st.Size()/block.Size*block.Size), unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map %s: %w", *dataPath, err)
	}
	path := filepath.Join(*dir, "churn.cnbd")
	defer os.Remove(path)

	// What a fresh copy stores.
	fresh, err := c.fill(path, size, store.DefaultCapacity(uint64(size), store.DefaultSegmentSize(uint64(size)), dirtyMax, 256<<20), setting)
	if err != nil {
		return err
	}
	if err := c.d.Close(); err != nil {
		return err
	}
	fmt.Printf("fresh copy: %s\n", describe(fresh))
	capacity := store.DefaultCapacity(uint64(size), store.DefaultSegmentSize(uint64(size)), dirtyMax, 256<<20)
	if *factor > 0 {
		stored := uint64(float64(fresh.Store.StoredBytes+fresh.Store.MapBytes) * *factor)
		capacity = store.DefaultCapacity(stored, store.DefaultSegmentSize(uint64(size)), dirtyMax, 256<<20)
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	if _, err := c.fill(path, size, capacity, setting); err != nil {
		return err
	}
	fmt.Printf("capacity %d MiB\n", capacity>>20)
	before, err := c.status()
	if err != nil {
		return err
	}
	start, written := time.Now(), int64(0)
	for step := int64(0); written < total; {
		n, err := c.overwrite(*fixed, *skew)
		if err != nil {
			return err
		}
		written += n
		if written-step > total/10 {
			step = written
			s, err := c.status()
			if err != nil {
				return err
			}
			fmt.Printf("%5.1f GiB after %v: %s\n", float64(written)/(1<<30), time.Since(start).Round(time.Second), describe(s))
		}
	}
	if err := c.d.Sync(); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := c.status()
	if err != nil {
		return err
	}
	stored := after.Store.BlobStored - before.Store.BlobStored
	log := after.Store.LogWritten - before.Store.LogWritten
	fmt.Printf("written: %s\n", describe(after))
	fmt.Printf("%d MiB overwritten in %v (%.0f MiB/s), stored as %d MiB, log %d MiB: write amplification %.2f; %d segments cleaned, %d MiB moved; ENOSPC %d times\n",
		written>>20, took.Round(time.Second), float64(written)/(1<<20)/took.Seconds(), stored>>20, log>>20, float64(log)/float64(stored),
		after.Store.Cleaned-before.Store.Cleaned, (after.Store.Moved-before.Store.Moved)>>20, c.refuse)
	time.Sleep(*idle)
	rested, err := c.status()
	if err != nil {
		return err
	}
	fmt.Printf("after %v idle: %s\n", *idle, describe(rested))
	if err := c.compare(); err != nil {
		return err
	}
	if err := c.d.Close(); err != nil {
		return err
	}
	// The same data, written afresh.
	if err := os.Remove(path); err != nil {
		return err
	}
	if err := c.create(path, size, store.DefaultCapacity(uint64(size), store.DefaultSegmentSize(uint64(size)), dirtyMax, 256<<20), setting); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(buf)) {
		for i := 0; i < len(buf) && at+int64(i) < size; i += block.Size {
			copy(buf[i:i+block.Size], c.block(c.truth[(at+int64(i))/block.Size]))
		}
		if _, err := c.d.WriteAt(buf[:min(int64(len(buf)), size-at)], at); err != nil {
			return err
		}
	}
	again, err := c.status()
	if err != nil {
		return err
	}
	fmt.Printf("fresh copy of the same data: %s\nratio after idle / of the fresh copy: %.3f\n", describe(again), rested.Ratio/again.Ratio)
	return c.d.Close()
}

func describe(s device.Status) string {
	return fmt.Sprintf("data %d MiB, stored %d, ratio %.3f, map %d, garbage %d, host %d MiB", s.Store.DataBytes>>20, s.Store.StoredBytes>>20, s.Ratio,
		s.Store.MapBytes>>20, s.Store.GarbageBytes>>20, s.Store.HostBytes>>20)
}

func (c *churn) block(n uint32) []byte { return c.data[int(n)*block.Size:][:block.Size] }

// status is that of a checkpoint made now.
func (c *churn) status() (device.Status, error) {
	if err := c.d.Sync(); err != nil {
		return device.Status{}, err
	}
	return c.d.Status(context.Background())
}

func (c *churn) create(path string, size int64, capacity uint64, s compression.Setting) error {
	g := store.Geometry{DeviceSize: uint64(size), Capacity: capacity, SegmentSize: store.DefaultSegmentSize(uint64(size)),
		ExtentBlocks: 16, Codec: uint8(s.Codec), Level: uint8(s.Level), DirtyMax: dirtyMax}
	if err := disk.CreateFile(path, false, func(f disk.File) error { return store.Format(f, g) }); err != nil {
		return err
	}
	f, err := disk.Open(path, disk.OpenOptions{})
	if err != nil {
		return err
	}
	c.d, err = device.Open(f, device.Options{Warn: func(msg string, err error) { fmt.Println("warning:", msg, err) }})
	return err
}

// fill makes a store of that capacity and fills it with data, in sequence.
func (c *churn) fill(path string, size int64, capacity uint64, s compression.Setting) (device.Status, error) {
	if err := c.create(path, size, capacity, s); err != nil {
		return device.Status{}, err
	}
	blocks := len(c.data) / block.Size
	for at := int64(0); at < size; {
		n := at / block.Size % int64(blocks)
		p := c.data[n*block.Size:][:min(1<<20, int64(len(c.data))-n*block.Size, size-at)]
		if _, err := c.d.WriteAt(p, at); err != nil {
			return device.Status{}, err
		}
		for i := range len(p) / block.Size {
			c.truth[at/block.Size+int64(i)] = uint32(n) + uint32(i)
		}
		at += int64(len(p))
	}
	return c.status()
}

// overwrite writes one piece of data somewhere, and now and then flushes.
func (c *churn) overwrite(fixed int, skew bool) (int64, error) {
	n := fixed / block.Size
	if n == 0 {
		n = 1 + c.rng.IntN(1<<c.rng.IntN(7))
	}
	places := len(c.truth) - n
	if skew && c.rng.IntN(10) > 0 {
		places /= 10
	}
	at, from := c.rng.IntN(places+1), c.rng.IntN(len(c.data)/block.Size-n+1)
	p := c.data[from*block.Size:][:n*block.Size]
	if _, err := c.d.WriteAt(p, int64(at)*block.Size); err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			c.refuse++
		}
		return 0, err
	}
	for i := range n {
		c.truth[at+i] = uint32(from + i)
	}
	if c.rng.IntN(256) == 0 {
		return int64(len(p)), c.d.Sync()
	}
	return int64(len(p)), nil
}

func (c *churn) compare() error {
	got := make([]byte, 1<<20)
	for at := 0; at < len(c.truth)*block.Size; at += len(got) {
		n, err := c.d.ReadAt(got[:min(len(got), len(c.truth)*block.Size-at)], int64(at))
		if err != nil {
			return err
		}
		for i := 0; i < n; i += block.Size {
			if !bytes.Equal(got[i:i+block.Size], c.block(c.truth[(at+i)/block.Size])) {
				return fmt.Errorf("block %d is wrong", (at+i)/block.Size)
			}
		}
	}
	fmt.Println("every block is right")
	return nil
}
