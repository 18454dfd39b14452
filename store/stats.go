package store

import (
	"fmt"

	"cnbd/extents"
	"cnbd/internal/block"
)

// Stats are the sizes of a store at one moment, and what has happened to it
// since it was opened.
type Stats struct {
	// DataBytes is what the map holds: blocks that are neither holes nor lost.
	DataBytes uint64 `json:"data_bytes"`
	// StoredBytes is the stored form of that: compressed, or raw.
	StoredBytes uint64 `json:"stored_bytes"`
	// MapBytes is what the nodes of the map take.
	MapBytes uint64 `json:"map_bytes"`
	// UsedBytes is the size of the segments in use: live data, garbage that was
	// overwritten since, and the log behind the checkpoints.
	UsedBytes uint64 `json:"used_bytes"`
	// GarbageBytes is the dead part of the segments that the newest checkpoint
	// covers: what cleaning can win.
	GarbageBytes uint64 `json:"garbage_bytes"`
	// FreeBytes is the size of the segments that can be used.
	FreeBytes uint64 `json:"free_bytes"`
	// ReservedBytes is promised to writes that have not been stored yet.
	ReservedBytes uint64 `json:"reserved_bytes"`
	// HostBytes is what the backing file takes on its host.
	HostBytes uint64 `json:"host_bytes"`
	// Extents is the number of extents in the map, without those of the log
	// behind the newest checkpoint; Nodes the number of its nodes.
	Extents uint64 `json:"extents"`
	Nodes   uint64 `json:"nodes"`
	// NodesRead is how many nodes were read since opening; MapCacheBytes what the
	// cache of nodes holds.
	NodesRead     uint64 `json:"nodes_read"`
	MapCacheBytes int64  `json:"map_cache_bytes"`

	DurableEpoch uint64 `json:"durable_epoch"`
	Checkpoint   uint64 `json:"checkpoint"`
	PendingTrims uint64 `json:"pending_trim_bytes"`

	// Counters since opening.
	Reads       uint64 `json:"reads"`            // of blobs
	ReadBytes   uint64 `json:"read_bytes"`       // stored bytes of them
	Corrupt     uint64 `json:"corrupt"`          // checksums that did not verify
	Commits     uint64 `json:"commits"`          // commit records
	Syncs       uint64 `json:"syncs"`            // fdatasync calls
	Checkpoints uint64 `json:"checkpoints"`      // completed
	Blobs       uint64 `json:"blobs"`            // appended
	RawBlobs    uint64 `json:"raw_blobs"`        // of them, those that did not compress
	BlobData    uint64 `json:"blob_data"`        // bytes of data appended
	BlobStored  uint64 `json:"blob_stored"`      // bytes that it took
	LogWritten  uint64 `json:"log_written"`      // bytes written to segments
	Cleaned     uint64 `json:"cleaned_segments"` // emptied by the cleaner
	Moved       uint64 `json:"moved_bytes"`      // stored bytes that the cleaner has copied
	// Recompressed is the data that was encoded anew while the device was idle.
	Recompressed uint64 `json:"recompressed_bytes"`
	Shortages    uint64 `json:"shortages"`         // times that writes had to wait for space
	Failure      string `json:"failure,omitempty"` // what made the store read-only
}

// Ratio is data by stored bytes, 0 if nothing is stored.
func (st *Stats) Ratio() float64 {
	if st.StoredBytes == 0 {
		return 0
	}
	return float64(st.DataBytes) / float64(st.StoredBytes)
}

// Appended is how many bytes of data have been appended since the store was opened,
// and what they have taken. It does not block.
func (s *Store) Appended() (data, stored uint64) {
	return s.metrics.dataBytes.Load(), s.metrics.storedBytes.Load()
}

// Stats gathers the sizes. What the newest checkpoint does not have yet is looked
// up, which may read a node of the map for each extent of it: call Checkpoint before,
// on a store in use. Appends go on meanwhile, and nothing is kept from being free for
// longer than one look-up takes.
func (s *Store) Stats() (Stats, error) {
	var st Stats
	durable := s.Durable() // whose mutex is not taken under s.mu
	var refs, bytes uint64
	var used uint64
	var nodes nodeTotals
	var root extents.Root
	var blocks, stored int64
	for ok := false; !ok; {
		var open *extents.Overlay
		refs, bytes, used = 0, 0, 0
		s.mu.Lock() // not for reading alone: see Overlay.Clone
		s.segments.visit(func(_ uint32, g segment) {
			refs += g.refs
			bytes += g.bytes
			used++
		})
		// Where a merge is running, the accounting is already that of its result.
		if s.mu.merging == nil {
			open = s.mu.open.Clone()
		}
		root, nodes = s.mu.root, s.mu.nodes
		st.GarbageBytes, _ = s.segments.garbage(s.mu.replay)
		st.DurableEpoch, st.Checkpoint = durable, s.mu.sequence
		st.PendingTrims = s.mu.trims.Blocks().Bytes()
		s.mu.Unlock()
		// A checkpoint that ends meanwhile leaves less to look up for the next time.
		var err error
		if blocks, stored, ok, err = s.overlayEffect(open, root, st.Checkpoint); err != nil {
			return st, err
		}
	}
	tree := s.tree.Metrics()
	st.NodesRead, st.MapCacheBytes = tree.NodesRead, tree.CacheBytes
	st.Nodes, st.Extents = root.Nodes, root.Entries
	st.DataBytes = uint64(int64(refs-nodes.copies)+blocks) * block.Size
	st.StoredBytes = uint64(int64(bytes-nodes.bytes) + stored)
	st.MapBytes = nodes.bytes
	free, _ := s.segments.room()
	st.UsedBytes = used * uint64(s.segments.size)
	st.FreeBytes = uint64(free) * uint64(s.segments.size)
	st.ReservedBytes = uint64(s.reserved.Load()) * block.Size
	if n, err := s.file.Allocated(); err == nil {
		st.HostBytes = uint64(n)
	}
	m := &s.metrics
	st.Reads, st.ReadBytes, st.Corrupt = m.reads.Load(), m.readBytes.Load(), m.corrupt.Load()
	st.Commits, st.Syncs, st.Checkpoints = m.commits.Load(), m.syncs.Load(), m.checkpoints.Load()
	st.Blobs, st.RawBlobs, st.BlobData, st.BlobStored = m.dataRecords.Load(), m.rawRecords.Load(), m.dataBytes.Load(), m.storedBytes.Load()
	st.Cleaned, st.Moved, st.Shortages = m.cleaned.Load(), m.movedBytes.Load(), m.shortages.Load()
	st.Recompressed = m.recompressedBytes.Load()
	if s.log != nil {
		s.log.written.Lock()
		st.LogWritten = s.log.written.bytes
		s.log.written.Unlock()
	}
	if err := s.Err(); err != nil {
		st.Failure = err.Error()
	}
	return st, nil
}

// overlayEffect is how much data and stored bytes open, which may be nil, adds to
// what the tree of that root, of the checkpoint sequence, has. ok is false if there
// is a newer checkpoint. Each look-up has a View of its own, for writes that are
// short of space wait for the oldest.
func (s *Store) overlayEffect(open *extents.Overlay, root extents.Root, sequence uint64) (blocks, stored int64, ok bool, err error) {
	if open == nil {
		return 0, 0, true, nil
	}
	ok = true
	open.Ascend(0, func(e extents.Extent) bool {
		if e.Kind == extents.Data {
			blocks += int64(e.Count)
			stored += int64(e.LiveBytes())
		}
		view := s.View()
		defer s.Unview(view)
		if ok = view.version == sequence; !ok {
			return false
		}
		err = s.tree.Lookup(root, e.Range(), func(old extents.Extent) error {
			if old.Kind == extents.Data {
				blocks -= int64(old.Count)
				stored -= int64(old.LiveBytes())
			}
			return nil
		})
		return err == nil
	})
	if err != nil {
		err = fmt.Errorf("store: stats: %w", err)
	}
	return blocks, stored, ok, err
}
