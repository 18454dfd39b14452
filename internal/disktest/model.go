package disktest

import (
	"bytes"
	"fmt"
	"io"
	"slices"

	"cnbd/internal/block"
)

// A Model is what a device must hold: its bytes now, and its bytes at each
// commit point. It is not safe for concurrent use.
type Model struct {
	now     *image
	commits []*image
}

// NewModel is a model of a device of size bytes, all zeros. Its first commit
// point, number 0, is that state.
func NewModel(size int64) *Model {
	m := &Model{now: newImage(size)}
	m.Commit()
	return m
}

// Size is the size of the device in bytes.
func (m *Model) Size() int64 { return m.now.size }

// Write puts p, which is borrowed, at off.
func (m *Model) Write(p []byte, off int64) { m.now.write(bytes.Clone(p), off) }

// Zero makes [off, off+n) zeros.
func (m *Model) Zero(off, n int64) { m.now.punch(off, n, false) }

// Trim makes the whole blocks in [off, off+n) zeros and leaves its edges alone.
func (m *Model) Trim(off, n int64) {
	r := block.Within(uint64(off), uint64(n))
	m.now.punch(int64(r.Start.Bytes()), int64(r.Len().Bytes()), false)
}

// Do carries out a request that changes the device; others do nothing.
func (m *Model) Do(r Request) {
	switch r.Verb {
	case VerbWrite:
		m.now.write(r.Payload(nil), r.Off)
	case VerbZeroes:
		m.Zero(r.Off, r.Len)
	case VerbTrim:
		m.Trim(r.Off, r.Len)
	}
}

// Read fills p with the bytes at off.
func (m *Model) Read(p []byte, off int64) { m.now.read(p, off) }

// Commit makes the state of now a commit point and returns its number.
func (m *Model) Commit() int {
	m.commits = append(m.commits, m.now.clone())
	return len(m.commits) - 1
}

// Revert makes the state of commit point n the state of now, and the last commit
// point: what a device does that crashed and came back as n.
func (m *Model) Revert(n int) {
	m.commits = m.commits[:n+1]
	m.now = m.commits[n].clone()
}

// Check compares r with the state of now. The error tells the first difference,
// or the error of r.
func (m *Model) Check(r io.ReaderAt) error { return m.now.check(r, 0, m.now.size) }

// CheckRange is Check for [off, off+n).
func (m *Model) CheckRange(r io.ReaderAt, off, n int64) error { return m.now.check(r, off, n) }

// CheckCommit compares r with commit point n.
func (m *Model) CheckCommit(r io.ReaderAt, n int) error {
	return m.commits[n].check(r, 0, m.commits[n].size)
}

// Find is the number of the newest commit point, not older than oldest, whose
// state r has exactly. The error tells how r differs from the oldest and from
// the newest.
func (m *Model) Find(r io.ReaderAt, oldest int) (int, error) {
	newest := len(m.commits) - 1
	var alive []int
	for n := newest; n >= oldest; n-- {
		alive = append(alive, n)
	}
	const step = 64 << 10
	got := make([]byte, min(m.now.size, step))
	for off := int64(0); off < m.now.size && len(alive) > 0; off += int64(len(got)) {
		got = got[:min(m.now.size-off, step)]
		if err := readFull(r, got, off); err != nil {
			return 0, err
		}
		p := got
		pieces(off, int64(len(got)), func(i int64, lo, hi int) {
			// Commit points share the pages that did not change between them.
			last, same := (*page)(nil), isZero(p[:hi-lo])
			alive = slices.DeleteFunc(alive, func(n int) bool {
				if pg := m.commits[n].page(i); pg != last {
					last, same = pg, m.commits[n].equal(p[:hi-lo], i*pageSize+int64(lo))
				}
				return !same
			})
			p = p[hi-lo:]
		})
	}
	if len(alive) > 0 {
		return alive[0], nil
	}
	return 0, fmt.Errorf("the state of no commit point in [%d,%d]: %d: %w; %d: %w", oldest, newest,
		oldest, m.CheckCommit(r, oldest), newest, m.CheckCommit(r, newest))
}

// readFull fills p with what r has at off.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	if k, err := r.ReadAt(p, off); k < len(p) {
		return fmt.Errorf("read %d bytes at %d, got %d: %w", len(p), off, k, err)
	}
	return nil
}

// A Difference is the first place where a device is not what a Model says.
type Difference struct {
	Off       int64
	Got, Want []byte // up to 16 bytes from Off on
}

func (d *Difference) Error() string {
	return fmt.Sprintf("at %d (block %d): got %x (%s), want %x (%s)", d.Off, d.Off/block.Size,
		d.Got, Describe(d.Got, d.Off), d.Want, Describe(d.Want, d.Off))
}

// check compares [off, off+n) of r with m.
func (m *image) check(r io.ReaderAt, off, n int64) error {
	const step = 256 << 10
	got := make([]byte, min(n, step))
	for end := off + n; off < end; off += int64(len(got)) {
		got = got[:min(end-off, step)]
		if err := readFull(r, got, off); err != nil {
			return err
		}
		if m.equal(got, off) {
			continue
		}
		want := make([]byte, len(got))
		m.read(want, off)
		i := 0
		for got[i] == want[i] {
			i++
		}
		// From the begin of a cell, that its writer can be told.
		i -= int((off + int64(i)) % cellSize)
		i = max(i, 0)
		return &Difference{off + int64(i), got[i:min(i+16, len(got))], want[i:min(i+16, len(want))]}
	}
	return nil
}
