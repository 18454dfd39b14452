package store

import (
	"bytes"
	"fmt"

	"cnbd/internal/disk"
)

// Unfinished is a file whose store is not to be taken for one before Publish, such as
// that of an import: where files are given their names only when they are whole,
// block devices have theirs from the start. On the medium the magic of its superblocks
// is inverted, so everybody else finds no store. It can be closed and opened as such
// again, to go on.
type Unfinished struct{ disk.File }

// invertMagic inverts what p, which lies at off, has of the magic of superblocks.
func invertMagic(p []byte, off int64) {
	for slot := range int64(2) {
		from, to := slot*superblockStride-off, slot*superblockStride-off+int64(len(superMagic))
		for i := max(from, 0); i < min(to, int64(len(p))); i++ {
			p[i] ^= 0xff
		}
	}
}

// ReadAt implements disk.File.
func (u Unfinished) ReadAt(p []byte, off int64) (int, error) {
	n, err := u.File.ReadAt(p, off)
	invertMagic(p[:n], off)
	return n, err
}

// WriteAt implements disk.File.
func (u Unfinished) WriteAt(p []byte, off int64) (int, error) {
	if off < segmentsOffset {
		p = bytes.Clone(p) // which is borrowed
		invertMagic(p, off)
	}
	return u.File.WriteAt(p, off)
}

// Medium implements disk.File.
func (u Unfinished) Medium() (disk.MediumReader, error) {
	m, err := u.File.Medium()
	if err != nil {
		return nil, err
	}
	return unfinishedMedium{m}, nil
}

type unfinishedMedium struct{ disk.MediumReader }

func (m unfinishedMedium) ReadAt(p []byte, off int64) (int, error) {
	n, err := m.MediumReader.ReadAt(p, off)
	invertMagic(p[:n], off)
	return n, err
}

// Publish makes the store, which nobody has open, one for everybody, durably. The
// superblocks become so one after the other: either leads to the store as it is.
func (u Unfinished) Publish() error {
	if err := u.File.Sync(); err != nil {
		return fmt.Errorf("store: sync: %w", err)
	}
	for slot := range int64(2) {
		b := make([]byte, superblockSize)
		if _, err := u.ReadAt(b, slot*superblockStride); err != nil {
			return fmt.Errorf("store: read superblock: %w", err)
		}
		if _, err := u.File.WriteAt(b, slot*superblockStride); err != nil {
			return fmt.Errorf("store: write superblock: %w", err)
		}
		if err := u.File.Sync(); err != nil {
			return fmt.Errorf("store: sync: %w", err)
		}
	}
	return nil
}
