package store

import (
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"cnbd/extents"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/disktest"
)

// TestRecoveryTime measures what a start takes after a kill, behind many random
// writes of 4 KiB (50 GiB of them at a CNBD_TEST_SCALE of 100) and as much log as
// there can be: two checkpoint intervals. What is read is that log, whatever the
// size of the map (promise P10). The payloads of the first writes are a byte each,
// which changes nothing in the map.
func TestRecoveryTime(t *testing.T) {
	scale := disktest.Scale(t)
	blocks := 128 << 10 * min(scale, 100)
	logBytes := uint64(5<<20) * uint64(min(scale, 100)) // 500 MiB
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	path := filepath.Join(t.TempDir(), "s")
	g := Geometry{DeviceSize: uint64(blocks) * block.Size, SegmentSize: 8 << 20, ExtentBlocks: 16}
	g.Capacity = DefaultCapacity(g.DeviceSize, g.SegmentSize, 0, 256<<20)
	must(t, disk.CreateFile(path, false, func(f disk.File) error { return Format(f, g) }))
	f, err := disk.Open(path, disk.OpenOptions{})
	must(t, err)
	s, err := Open(f, Options{CheckpointBytes: 1 << 40, CheckpointRecords: 1 << 40})
	must(t, err)
	page := make([]byte, block.Size)
	write := func(b int, payload []byte) {
		codec := uint8(1)
		if len(payload) == block.Size {
			codec = 0
		}
		must(t, s.AppendData(extents.Blob{Start: block.Index(b), Count: 1, Present: 1, Codec: codec, Parts: [][]byte{payload}}))
	}
	order := rng.Perm(blocks)
	for i, b := range order {
		write(b, []byte{byte(b)})
		if i%(1<<20) == 1<<20-1 {
			must(t, s.checkpointAlone())
		}
	}
	must(t, s.checkpointAlone())
	commit := func() {
		c, ok, err := s.AppendCommit()
		must(t, err)
		if ok {
			must(t, s.Sync(c))
		}
	}
	records := 0
	for n := uint64(0); n < logBytes; n += blockWorst {
		write(rng.IntN(blocks), page)
		if records++; records%1024 == 0 {
			commit()
		}
	}
	commit()
	nodes, entries := s.mu.root.Nodes, s.mu.root.Entries
	must(t, s.Close())

	f, err = disk.Open(path, disk.OpenOptions{})
	must(t, err)
	began := time.Now()
	s, err = Open(f, Options{})
	must(t, err)
	took := time.Since(began)
	defer s.Close()
	r := s.Recovery()
	t.Logf("a map of %d extents in %d nodes: opened in %v, with %d records and %d MiB of log", entries, nodes, took.Round(time.Millisecond), r.Records, r.Bytes>>20)
	if r.Records < uint64(records) || r.Records > uint64(records)+2*nodes+64 {
		t.Errorf("%d records were replayed, %d have been written since the checkpoint began, and at most its nodes", r.Records, records)
	}
	if reads := s.tree.Metrics().NodesRead; reads > 64 {
		t.Errorf("%d of %d nodes of the map were read", reads, nodes)
	}
}
