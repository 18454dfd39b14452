// Package estimate says what files, directories and block devices would take in a
// store, before anyone moves them there. It encodes their data as the writeback
// does: in extents of aligned addresses, with blocks of zeros left out, each raw when
// compressing it is not worth it, and less effort where that has kept failing. To
// the encoded bytes it adds the headers of the records and the entries of the map.
//
// The data is taken to lie as it would on a device. A block device and a file that
// is named itself keep their own addresses, as the image of a disk. The files of a
// directory are laid one behind the other, each from a block on, as a filesystem
// does; its own metadata is not counted.
//
// All of it is cut into windows of a MiB. With more data than the sample takes, one
// window of each so many is read, at a random place among these, and the rest is
// taken to be like them. Memory does not depend on the amount of data, nor on the
// number of files.
package estimate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/store"
)

const (
	windowSize = 1 << 20 // a region of the compressor's memory of failures
	// linksMax is how many files with several names are remembered, so that they
	// are counted once: a few MiB. What comes after that is counted by name.
	linksMax = 64 << 10
)

// Options are the settings of an Estimate.
type Options struct {
	Settings []compression.Setting
	Extents  []uint32 // bytes: powers of two from 4 KiB to 128 KiB
	// SampleBytes is how much data is read at most, about. 0: all of it.
	SampleBytes uint64
	// Progress is told now and then how much has been passed, of all. It may be nil.
	Progress func(done, total uint64)
	// Unreadable is told of what could not be read; the rest is counted without it.
	Unreadable func(err error)
}

// A Report is what an Estimate has found. Sizes are in bytes, those of blocks in part
// rounded up to blocks.
type Report struct {
	Files       uint64   `json:"files"`
	Unreadable  uint64   `json:"unreadable"`   // that could not be read, in whole or in part
	DataBytes   uint64   `json:"data_bytes"`   // all but holes
	SampleBytes uint64   `json:"sample_bytes"` // of that, read
	ZeroBytes   uint64   `json:"zero_bytes"`   // blocks of zeros among the data, as far as the sample tells
	Results     []Result `json:"results"`      // by setting, then by extent
}

// A Result is what the data would take, as far as the sample tells.
type Result struct {
	Setting      compression.Setting `json:"codec"`
	Extent       uint32              `json:"extent"`
	StoredBytes  uint64              `json:"stored_bytes"` // all of the following
	PayloadBytes uint64              `json:"payload_bytes"`
	HeaderBytes  uint64              `json:"header_bytes"` // of records
	MapBytes     uint64              `json:"map_bytes"`
	Ratio        float64             `json:"ratio"` // data but for zeros, by StoredBytes; 0 if nothing is stored
}

// Estimate reads paths and reports what they would take. It blocks until that is
// done or ctx ends. An error says that a path is not there, or nothing to be stored.
func Estimate(ctx context.Context, paths []string, o Options) (*Report, error) {
	e := &estimator{ctx: ctx, opts: o, rep: &Report{}, rng: rand.New(rand.NewPCG(1, 2))}
	// How much there is.
	if err := e.walk(paths); err != nil {
		return nil, err
	}
	total := e.at
	every := uint64(1)
	if o.SampleBytes > 0 {
		every = max(1, (total+o.SampleBytes-1)/o.SampleBytes)
	}
	*e.rep = Report{}
	if err := e.sample(paths, every, total); err != nil {
		return nil, err
	}
	return e.rep, nil
}

// An estimator goes through the paths twice: to count, and to read.
type estimator struct {
	ctx  context.Context
	opts Options
	rep  *Report
	rng  *rand.Rand

	links map[[2]uint64]struct{} // device and inode of files with several names
	at    uint64                 // address behind what has been passed
	data  uint64                 // bytes of data passed

	// Of the second time.
	total  uint64
	every  uint64
	chosen uint64 // number of the window to be read among every so many
	window *window
	work   chan *window
	free   chan *window
}

// A window is data on its way to a worker.
type window struct {
	at     uint64 // address, a multiple of windowSize
	data   []byte // windowSize bytes, zeros where there is no data
	filled uint64 // bytes of data
	end    uint64 // in the window, behind the last of them
}

// A counter sums up what one worker has encoded with one setting and extent.
type counter struct{ payload, records, table uint64 }

// sample goes through the paths and has the chosen windows encoded.
func (e *estimator) sample(paths []string, every, total uint64) error {
	o := &e.opts
	workers := runtime.GOMAXPROCS(0)
	kinds := len(o.Settings) * len(o.Extents)
	e.at, e.data, e.every, e.total = 0, 0, every, total
	e.work, e.free = make(chan *window), make(chan *window, workers+1)
	for range cap(e.free) {
		e.free <- &window{data: make([]byte, windowSize)}
	}
	memories := make([]*compression.RegionMemory, kinds)
	for i := range memories {
		memories[i] = compression.NewRegionMemory()
	}
	sums := make([]counter, kinds)
	var zeros uint64
	var mu sync.Mutex // guards sums and zeros
	var done sync.WaitGroup
	for range workers {
		done.Go(func() {
			own := encoder{encoder: compression.NewEncoder()}
			counts, zero := make([]counter, kinds), uint64(0)
			for w := range e.work {
				zero += w.zeros()
				for i := range counts {
					own.encode(&counts[i], w, memories[i], o.Settings[i/len(o.Extents)], o.Extents[i%len(o.Extents)])
				}
				clear(w.data)
				e.free <- w
			}
			mu.Lock()
			defer mu.Unlock()
			zeros += zero
			for i := range counts {
				sums[i].payload += counts[i].payload
				sums[i].records += counts[i].records
				sums[i].table += counts[i].table
			}
		})
	}
	e.chosen = e.rng.Uint64N(every)
	err := e.walk(paths)
	e.handOver()
	close(e.work)
	done.Wait()
	if err != nil {
		return err
	}
	// The rest is like the sample.
	r := e.rep
	r.DataBytes = e.data
	scale := func(n uint64) uint64 {
		if r.SampleBytes == 0 {
			return 0
		}
		return uint64(float64(n) * (float64(r.DataBytes) / float64(r.SampleBytes)))
	}
	r.ZeroBytes = scale(zeros)
	for i, c := range sums {
		x := Result{Setting: o.Settings[i/len(o.Extents)], Extent: o.Extents[i%len(o.Extents)],
			PayloadBytes: scale(c.payload), HeaderBytes: scale(c.records * store.RecordOverhead), MapBytes: scale(c.table)}
		x.StoredBytes = x.PayloadBytes + x.HeaderBytes + x.MapBytes
		if x.StoredBytes > 0 {
			x.Ratio = float64(r.DataBytes-min(r.ZeroBytes, r.DataBytes)) / float64(x.StoredBytes)
		}
		r.Results = append(r.Results, x)
	}
	return nil
}

// zeros is the number of bytes in blocks of zeros among the data of w.
func (w *window) zeros() uint64 {
	stored := uint64(0)
	for at := uint64(0); at < w.end; at += block.Size {
		if !compression.IsZero(w.data[at : at+block.Size]) {
			stored += block.Size
		}
	}
	return w.filled - min(stored, w.filled)
}

// An encoder encodes as a worker of the writeback does.
type encoder struct {
	encoder  *compression.Encoder
	src, dst []byte
}

// encode adds what w takes to c.
func (x *encoder) encode(c *counter, w *window, memory *compression.RegionMemory, s compression.Setting, extent uint32) {
	region := compression.RegionOf(w.at)
	gap := true // before the entry in the map; of the first in a window that is not known
	for at := uint64(0); at < w.end; at += uint64(extent) {
		x.src = x.src[:0]
		runs := uint64(0) // of blocks that are not zeros: each is an entry of the map
		for b := at; b < min(w.end, at+uint64(extent)); b += block.Size {
			page := w.data[b : b+block.Size]
			if compression.IsZero(page) {
				gap = true
				continue
			}
			if gap || runs == 0 {
				runs++
			}
			if gap {
				c.table += gapBytes
			}
			gap = false
			x.src = append(x.src, page...)
		}
		if len(x.src) == 0 {
			continue
		}
		effort := memory.Effort(region, s)
		out, _, ok := x.encoder.Encode(x.dst[:0], x.src, effort)
		memory.Record(region, len(x.src), ok)
		x.dst = out[:0]
		n := len(x.src)
		if ok {
			n = len(out)
		}
		c.payload += uint64(n)
		c.records++
		c.table += runs * entryBytes
		if runs > 1 {
			c.table += runs * partBytes
		}
	}
}

// What an entry of the map takes (package extents), with its share of the nodes'
// headers and of the inner nodes: flags, length, place, stored bytes and checksum;
// a gap before it, and which part of a blob it is.
const (
	entryBytes = 11
	gapBytes   = 1
	partBytes  = 2
)

// walk goes through the paths.
func (e *estimator) walk(paths []string) error {
	e.links = make(map[[2]uint64]struct{})
	for _, path := range paths {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		switch mode := info.Mode(); {
		case mode.IsRegular(), mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
			e.pad()
			e.file(path, info, true)
			e.pad()
		case mode.IsDir():
			if err := e.directory(path, info); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s is not a file, directory or block device", path)
		}
		if err := e.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// directory goes through the files below path that are on its filesystem.
func (e *estimator) directory(path string, root fs.FileInfo) error {
	dev := root.Sys().(*syscall.Stat_t).Dev
	return filepath.WalkDir(path, func(at string, d fs.DirEntry, err error) error {
		if e.ctx.Err() != nil {
			return e.ctx.Err()
		}
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) { // it has gone meanwhile
				e.unreadable(err)
			}
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		switch {
		case d.IsDir() && st.Dev != dev:
			return fs.SkipDir
		case !info.Mode().IsRegular():
			return nil
		case st.Nlink > 1 && len(e.links) < linksMax:
			key := [2]uint64{st.Dev, st.Ino}
			if _, known := e.links[key]; known {
				return nil
			}
			e.links[key] = struct{}{}
		}
		e.file(at, info, false)
		return nil
	})
}

// file passes the data of one file or block device. With own it keeps its addresses.
func (e *estimator) file(path string, info fs.FileInfo, own bool) {
	e.rep.Files++
	size := info.Size()
	st := info.Sys().(*syscall.Stat_t)
	regular := info.Mode().IsRegular()
	if regular && e.every == 0 && st.Blocks*512 >= size && !own {
		_ = e.pass(nil, 0, size) // counting needs no look into it
		return
	}
	if regular && size == 0 {
		return
	}
	f, err := os.Open(path)
	if err != nil {
		e.unreadable(err)
		if regular {
			e.rep.Files--
		}
		return
	}
	defer f.Close()
	if !regular {
		if size, err = f.Seek(0, io.SeekEnd); err != nil {
			e.unreadable(err)
			return
		}
	}
	last := int64(-1) // behind the data before
	for off := int64(0); off < size && e.ctx.Err() == nil; {
		from, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return // no more data
		}
		to := size
		if err != nil {
			from = off // it knows nothing of holes
		} else if to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil {
			to = size
		}
		from, to = from&^(block.Size-1), min(to, size)
		if own && last >= 0 && from/windowSize == last/windowSize {
			e.advance(uint64(from - last))
		} else if own {
			e.pad() // windows without any data are left out
			e.advance(uint64(from % windowSize))
		}
		if err := e.pass(f, from, to-from); err != nil {
			e.unreadable(err)
		}
		off, last = to, (to+block.Size-1)&^(block.Size-1)
	}
}

// pad goes on at the next window.
func (e *estimator) pad() { e.advance(-e.at % windowSize) }

// advance passes n bytes without data, of one window.
func (e *estimator) advance(n uint64) {
	for n > 0 {
		step := min(n, windowSize-e.at%windowSize)
		e.at += step
		n -= step
		e.crossed()
	}
}

// crossed hands the window over if its end is reached.
func (e *estimator) crossed() {
	if e.at%windowSize != 0 || e.every == 0 {
		return
	}
	e.handOver()
	if e.at/windowSize%e.every == 0 {
		e.chosen = e.rng.Uint64N(e.every)
	}
	if e.opts.Progress != nil {
		e.opts.Progress(e.at, e.total)
	}
}

func (e *estimator) handOver() {
	if e.window != nil {
		e.work <- e.window
		e.window = nil
	}
}

// pass passes n bytes of data at off of f, and reads those in chosen windows. The
// error is of what could not be read.
func (e *estimator) pass(f *os.File, off, n int64) (err error) {
	for n > 0 && e.ctx.Err() == nil {
		in := e.at % windowSize
		step := min(uint64(n), windowSize-in)
		whole := min((step+block.Size-1)&^(block.Size-1), windowSize-in)
		if e.every > 0 && e.at/windowSize%e.every == e.chosen {
			if e.window == nil {
				e.window = <-e.free
				e.window.at, e.window.filled, e.window.end = e.at-in, 0, 0
			}
			// What a file has lost meanwhile is zeros.
			if _, rerr := f.ReadAt(e.window.data[in:in+step], off); rerr != nil && rerr != io.EOF && err == nil {
				err = rerr
			}
			e.window.filled += whole
			e.window.end = in + whole
			e.rep.SampleBytes += whole
		}
		e.at += whole
		e.data += whole
		off += int64(step)
		n -= int64(step)
		e.crossed()
	}
	return err
}

func (e *estimator) unreadable(err error) {
	e.rep.Unreadable++
	if e.every > 0 && e.opts.Unreadable != nil { // once
		e.opts.Unreadable(err)
	}
}
