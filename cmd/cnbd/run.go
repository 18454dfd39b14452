package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/google/uuid"

	"cnbd/internal/disk"
)

// A run is one time that a store is served, from the opening to the end. It is told
// to clients that ask (see [nbd.Export.About]), so that one that was cut off can tell
// whether the server that is there again has all that it was answered (promise P7).
type run struct {
	ID string // random
	// After is the run that this one succeeds: it has ended in good order, so all
	// that it had answered is there, and nobody has written since. Empty: none, or
	// not known.
	After string

	asked atomic.Bool // by a client, which may want to know its successor
}

const (
	aboutRun   = "run="
	aboutAfter = "after="
)

// about is what clients are told of r, when they ask.
func (r *run) about() []string {
	if r == nil {
		return nil
	}
	r.asked.Store(true)
	about := []string{aboutRun + r.ID}
	if r.After != "" {
		about = append(about, aboutAfter+r.After)
	}
	return about
}

// runOf is the run that a server has told about; nil if it tells of none.
func runOf(about []string) *run {
	var r run
	for _, s := range about {
		if id, ok := strings.CutPrefix(s, aboutRun); ok {
			r.ID = id
		} else if id, ok := strings.CutPrefix(s, aboutAfter); ok {
			r.After = id
		}
	}
	if r.ID == "" {
		return nil
	}
	return &r
}

// goesOn tells whether r, which may be nil, has all that a client was answered in the
// run of that identity.
func (r *run) goesOn(id string) bool { return r != nil && (r.ID == id || r.After == id) }

// An ending is what a run that has ended in good order leaves beside its store.
type ending struct {
	UUID  uuid.UUID `json:"uuid"`  // of the store
	Run   string    `json:"run"`   // that has ended
	Epoch uint64    `json:"epoch"` // of its last commit
}

// endingPath is where the ending of a run of the store at path is left. It needs not
// outlive a restart of the host: neither do the kernel's devices.
func endingPath(path string) string { return besides(resolved(path), ".ended") }

// beginRun begins a run of the store at path, which was opened and recovered to that
// epoch. The ending of the run before is taken away, whatever it says: it is true
// only once. With an error the run is a good one too, but succeeds none.
func beginRun(path string, store uuid.UUID, epoch uint64) (*run, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	r := &run{ID: hex.EncodeToString(id[:])}
	path = endingPath(path)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return r, err
	}
	if err := os.Remove(path); err != nil {
		return r, err
	}
	if err := disk.SyncDir(filepath.Dir(path)); err != nil {
		return r, err
	}
	var e ending
	if err := json.Unmarshal(b, &e); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	if e.UUID == store && e.Epoch == epoch {
		r.After = e.Run
	}
	return r, nil
}

// end leaves the ending of r, whose store at path is closed, beside it, if there may
// be somebody who wants to know.
func (r *run) end(path string, store uuid.UUID, epoch uint64) error {
	if !r.asked.Load() {
		return nil
	}
	b, err := json.Marshal(ending{UUID: store, Run: r.ID, Epoch: epoch})
	if err != nil {
		return err
	}
	path = endingPath(path)
	if err := os.WriteFile(path+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
