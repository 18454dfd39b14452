package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/store"
)

func newResize() *cobra.Command {
	var file string
	var force bool
	cmd := &cobra.Command{
		Use:   "resize --size SIZE [--capacity SIZE] BACKING | resize --size SIZE --config FILE EXPORT",
		Short: "Make a device larger or smaller",
		Long: "Give the device in BACKING another size.\n\n" +
			"It grows also while it is served, at once for clients that connect from then on; NBD has no way to\n" +
			"tell the others. A device of the kernel is told by cnbd attach --resize; who else is connected keeps\n" +
			"the old size until it connects again.\n" +
			"It shrinks only when it is not served, and only if nothing is stored beyond its new end: shrink the\n" +
			"filesystem and trim first. --force drops what is there.\n\n" +
			"--capacity is what the store may take of its backing. By default it grows with the size where it was\n" +
			"enough for data that does not compress, or, on a block device, as far as there is room; else it is kept.\n" +
			"It can be made smaller as far as no segment of the store lies beyond; compact first.\n\n" +
			"A crash leaves the old size or the new one." + exitHelp,
		Example: "  cnbd resize --size 200GiB disk.cnbd\n" +
			"  cnbd resize --size 20GiB --force disk.cnbd    (the last part is lost)\n" +
			"  lvextend -L 1T vg/store && cnbd resize --size 3TiB /dev/vg/store",
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := config.Load("", cmd.Flags())
			if err != nil {
				return err
			}
			path, err := backingOf(file, args[0])
			if err != nil {
				return err
			}
			e := &c.Exports[0]
			if e.Size == 0 && e.Capacity == 0 {
				return usage(errors.New("--size is needed: how large is the device to be, such as 100GiB"))
			}
			r, err := resize(cmd, c, path, uint64(e.Size), uint64(e.Capacity), force)
			if err != nil {
				return err
			}
			return printResize(cmd.OutOrStdout(), path, r)
		},
	}
	config.AddFlags(cmd.Flags(), "size", "capacity")
	cmd.Flags().StringVar(&file, "config", "", "look the store up by the name of its export in `FILE` (YAML)")
	cmd.Flags().BoolVar(&force, "force", false, "drop what is stored beyond the new end")
	return cmd
}

// A resizeReport is what resize has done. It goes over the control socket as JSON.
type resizeReport struct {
	OldSize, Size         uint64
	OldCapacity, Capacity uint64
	Full                  uint64 // capacity that data that does not compress needs
	Dropped               uint64 // bytes of data beyond the new end
	Served                bool
}

// resize resizes the store at path, or has its server do it. 0 is a size or capacity
// that is not asked for.
func resize(cmd *cobra.Command, c *config.Config, path string, size, capacity uint64, force bool) (*resizeReport, error) {
	f, err := disk.Open(path, disk.OpenOptions{})
	if errors.Is(err, disk.ErrLocked) {
		r := &resizeReport{}
		if ask := control.Resize(cmd.Context(), controlSocket(path), control.ResizeRequest{Size: size, Capacity: capacity}, r); ask != nil {
			return nil, asked(err, ask)
		}
		r.Served = true
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	g, err := store.ReadGeometry(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r, err := planResize(c, &g, path, size, capacity)
	if err != nil {
		f.Close()
		return nil, err
	}
	d, err := openOwn(cmd, f, path)
	if err != nil {
		return nil, err
	}
	r.Dropped, err = d.Resize(cmd.Context(), device.ResizeOptions{Bytes: r.Size, CapacityBytes: r.Capacity, Drop: force})
	if tail, ok := errors.AsType[*device.TailError](err); ok {
		err = fmt.Errorf("%s: %s of data lie beyond the new end; --force drops them, and they are lost then", path, human(tail.Bytes))
	}
	return r, errors.Join(err, d.Close())
}

// growDevice makes a device that is served larger.
func growDevice(ctx context.Context, c *config.Config, d *device.Device, path string, wish control.ResizeRequest) (*resizeReport, error) {
	g := d.Geometry()
	if wish.Size != 0 && wish.Size < g.DeviceSize || wish.Capacity != 0 && wish.Capacity < g.Capacity {
		return nil, fmt.Errorf("%w: the store is served, and only grows: it has a size of %v and a capacity of %v; stop its server to make it smaller",
			control.ErrRefused, config.Size(g.DeviceSize), config.Size(g.Capacity))
	}
	r, err := planResize(c, &g, path, wish.Size, wish.Capacity)
	if err != nil {
		if exitStatus(err) == exitUsage {
			err = fmt.Errorf("%w: %w", control.ErrRefused, err)
		}
		return nil, err
	}
	_, err = d.Resize(ctx, device.ResizeOptions{Bytes: r.Size, CapacityBytes: r.Capacity})
	return r, err
}

// planResize is what a store of geometry g, at path, is to become. 0 is a size or
// capacity that is not asked for.
func planResize(c *config.Config, g *store.Geometry, path string, size, capacity uint64) (*resizeReport, error) {
	room, err := roomFor(path, g)
	if err != nil {
		return nil, err
	}
	next := *g
	if size != 0 {
		next.DeviceSize = size
	}
	if next.DeviceSize > store.DeviceSizeMax {
		return nil, &config.Fault{Key: "size", Where: "--size", Err: fmt.Errorf("%v is out of range: at most %v", config.Size(size), config.Size(store.DeviceSizeMax))}
	}
	full := func(size uint64) uint64 {
		return store.DefaultCapacity(size, g.SegmentSize, g.DirtyMax, uint64(c.CheckpointInterval))
	}
	next.Capacity = cmp.Or(capacity, grownCapacity(g, next.DeviceSize, room, full))
	if next.Capacity > room {
		return nil, &config.Fault{Key: "capacity", Where: "--capacity", Err: fmt.Errorf("%v do not fit: the block device has room for %v", config.Size(next.Capacity), config.Size(room))}
	}
	if err := g.ValidateResize(&next); err != nil {
		return nil, usage(fmt.Errorf("%s: %w", path, err))
	}
	return &resizeReport{OldSize: g.DeviceSize, Size: next.DeviceSize, OldCapacity: g.Capacity, Capacity: next.Capacity, Full: full(next.DeviceSize)}, nil
}

// grownCapacity is the capacity that a store of geometry g gets with another size of
// its device, if none is asked for. room is the most that its backing has; full is
// what data that does not compress needs.
func grownCapacity(g *store.Geometry, size, room uint64, full func(size uint64) uint64) uint64 {
	onDevice := room != noLimit // where room that the store does not take is for nobody
	if size > g.DeviceSize && (onDevice || g.Capacity >= full(g.DeviceSize)) {
		return max(g.Capacity, min(full(size), room))
	}
	return g.Capacity
}

// noLimit is the room of a store in a file.
const noLimit = ^uint64(0)

// roomFor is the largest capacity that fits into the backing at path of a store of
// geometry g.
func roomFor(path string, g *store.Geometry) (uint64, error) {
	if !isDevice(path) {
		return noLimit, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	return store.FitCapacity(uint64(size), g.SegmentSize), err
}

func printResize(w io.Writer, path string, r *resizeReport) error {
	if r.Size == r.OldSize && r.Capacity == r.OldCapacity {
		_, err := fmt.Fprintf(w, "%s: is %s, with a capacity of %s, already\n", path, human(r.Size), human(r.Capacity))
		return err
	}
	fmt.Fprintf(w, "%s: size %s, was %s; capacity %s, was %s\n", path, human(r.Size), human(r.OldSize), human(r.Capacity), human(r.OldCapacity))
	if r.Dropped > 0 {
		fmt.Fprintf(w, "%s of data beyond the new end are dropped\n", human(r.Dropped))
	}
	if r.Capacity < r.Full {
		fmt.Fprintf(w, "thinly provisioned: data that does not compress would need a capacity of %s\n", human(r.Full))
	}
	if r.Served && r.Size != r.OldSize {
		fmt.Fprintln(w, "clients that are connected keep the old size until they connect again; tell the kernel by cnbd attach --resize")
	}
	return nil
}
