package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/compression"
	"cnbd/internal/disk"
	"cnbd/store"
)

// runDirectory holds the sockets of stores that are on block devices.
const runDirectory = "/run/cnbd"

// isDevice tells whether path is a block device.
func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
}

// besides is the path of a socket that belongs to the store at path: beside a
// file, in the run directory for a block device.
func besides(path, suffix string) string {
	if !isDevice(path) {
		return path + suffix
	}
	name := strings.TrimPrefix(resolved(path), "/dev/")
	return filepath.Join(runDirectory, strings.ReplaceAll(name, "/", "-")+suffix)
}

// controlSocket is where the owner of the store at path can be asked. It is the
// same for every name of the store.
func controlSocket(path string) string { return besides(resolved(path), ".control") }

// resolved is path without symbolic links, or path if it does not exist.
func resolved(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// inUse explains the error of a store that somebody else has.
func inUse(path string, err error) error {
	if errors.Is(err, disk.ErrLocked) {
		return fmt.Errorf("%w: the store is being served; `cnbd info %s` and top, check --data, compact, export, map and resize ask its server, everything else needs it stopped", err, path)
	}
	return err
}

// geometryFor is what a new store for e is made with.
func geometryFor(c *config.Config, e *config.Export, fixed uint64) (store.Geometry, error) {
	setting, err := codecOf(e)
	if err != nil {
		return store.Geometry{}, err
	}
	g := device.CreateOptions{
		Bytes: uint64(e.Size), CapacityBytes: uint64(e.Capacity), Codec: &setting, ExtentBytes: uint32(c.Extent),
		DirtyBytesMax: uint64(c.DirtyLimit()), CheckpointBytes: uint64(c.CheckpointInterval),
	}.Geometry()
	if g.DeviceSize > store.DeviceSizeMax {
		return store.Geometry{}, &config.Fault{Key: "size", Where: "--size", Err: fmt.Errorf("%v is out of range: at most %v", e.Size, config.Size(store.DeviceSizeMax))}
	}
	if fixed != 0 { // a block device: what it has
		most := store.FitCapacity(fixed, g.SegmentSize)
		if e.Capacity == 0 {
			g.Capacity = min(g.Capacity, most)
		}
		if g.Capacity > most {
			return store.Geometry{}, &config.Fault{Key: "capacity", Where: "--capacity", Err: fmt.Errorf("%v do not fit: the block device has room for %v", config.Size(g.Capacity), config.Size(most))}
		}
	}
	if least := store.MinCapacity(g.SegmentSize); g.Capacity < least {
		return store.Geometry{}, &config.Fault{Key: "capacity", Where: "--capacity", Err: fmt.Errorf("%v is too little: at least %v", config.Size(g.Capacity), config.Size(least))}
	}
	if err := g.Validate(); err != nil {
		return store.Geometry{}, usage(err)
	}
	return g, nil
}

// codecOf is the codec that e asks for, auto if for none.
func codecOf(e *config.Export) (compression.Setting, error) {
	text := e.Codec
	if text == "" {
		text = "auto"
	}
	if e.Level != 0 {
		text = fmt.Sprintf("%s:%d", text, e.Level)
	}
	setting, err := compression.Parse(text)
	if err != nil {
		return setting, usage(err)
	}
	return setting, nil
}

// makeStore makes the store of e, which is not there yet unless force is set. A
// regular file appears whole or not at all.
func makeStore(c *config.Config, e *config.Export, force bool) error {
	if !isDevice(e.Path) {
		g, err := geometryFor(c, e, 0)
		if err != nil {
			return err
		}
		return notMade(e.Path, disk.CreateFile(e.Path, force, func(f disk.File) error { return store.Format(f, g) }))
	}
	f, size, err := openDevice(e.Path, force)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := geometryFor(c, e, size)
	if err != nil {
		return err
	}
	if err := store.Format(f, g); err != nil {
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	return f.Close()
}

// notMade is err of the making of a file at path, with what to do about it; nil if
// there is none.
func notMade(path string, err error) error {
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; --force replaces it, with all that it holds", err)
	}
	return inUse(path, err)
}

// openDevice opens the block device at path, of size bytes, for a new store. What
// seems to hold something is refused, but with force.
func openDevice(path string, force bool) (f disk.File, size uint64, err error) {
	if f, err = disk.Open(path, disk.OpenOptions{}); err != nil {
		return nil, 0, inUse(path, err)
	}
	if !force {
		err = nothingOn(f, path)
	}
	var n int64
	if err == nil {
		n, err = f.Size()
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, uint64(n), nil
}

// nothingOn refuses a block device that seems to hold something.
func nothingOn(f disk.File, path string) error {
	if _, err := store.ReadGeometry(f); !errors.Is(err, store.ErrNotStore) {
		return fmt.Errorf("%s holds a cnbd store; --force makes a new one over it, and all that it holds is lost", path)
	}
	found, err := disk.ForeignSignature(f)
	if err != nil {
		return err
	}
	if found != "" {
		return fmt.Errorf("%s seems to hold something: %s; --force makes a store over it, and all that it holds is lost", path, found)
	}
	return nil
}
