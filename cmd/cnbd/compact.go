package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"cnbd/device"
	"cnbd/internal/control"
	"cnbd/internal/disk"
)

func newCompact() *cobra.Command {
	var file string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "compact BACKING | compact --config FILE EXPORT",
		Short: "Give the space of what is dead in a store back to the host",
		Long: "Move what is alive out of the segments of the store in BACKING that are partly dead, until that is\n" +
			"not worth it any more, and give those segments back to the host. The store may be served: its server\n" +
			"does it then, beside its clients, who are a little slower meanwhile. On a terminal the bytes that are\n" +
			"dead and alive are shown.\n\n" +
			"Ctrl-C stops it; what is done stays done. The cleaner of a served store does most of this by itself." + exitHelp,
		Example: "  cnbd compact disk.cnbd\n" +
			"  cnbd compact --config /etc/cnbd.yaml vm1",
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := backingOf(file, args[0])
			if err != nil {
				return err
			}
			r, err := compact(cmd, path)
			if r == nil {
				return err
			}
			if asJSON {
				return errors.Join(err, printJSON(cmd.OutOrStdout(), r))
			}
			return errors.Join(err, printCompact(cmd.OutOrStdout(), path, r))
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "look the store up by the name of its export in `FILE` (YAML)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	return cmd
}

// A compactReport is what compact has done.
type compactReport struct {
	HostBefore uint64 `json:"host_bytes_before"` // that the store took
	HostAfter  uint64 `json:"host_bytes_after"`
	Moved      uint64 `json:"moved_bytes"` // stored bytes that were copied
	Served     bool   `json:"served"`      // the server did it
}

// compact compacts the store at path, or has its server do it. The report is nil
// if nothing was done.
func compact(cmd *cobra.Command, path string) (*compactReport, error) {
	ctx, end := interruptible(cmd)
	defer end()
	progress := func(dead, live uint64) {}
	if line := statusLine(cmd.ErrOrStderr()); line != nil {
		progress = func(dead, live uint64) { line("dead: %s, alive: %s", short(dead), short(live)) }
		defer line("")
	}
	f, err := disk.Open(path, disk.OpenOptions{})
	if errors.Is(err, disk.ErrLocked) {
		r := &compactReport{}
		if ask := control.Compact(ctx, controlSocket(path), progress, r); ask != nil {
			return nil, asked(err, stopped(ctx, ask))
		}
		r.Served = true
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	before, err := f.Allocated()
	if err != nil {
		f.Close()
		return nil, err
	}
	d, err := openOwn(cmd, f, path)
	if err != nil {
		return nil, err
	}
	r, err := compactDevice(ctx, d, progress)
	// The store is closed well whether all is done or not.
	if err = errors.Join(stopped(ctx, err), d.Close()); r == nil {
		return nil, err
	}
	after, size := allocatedOf(path)
	r.HostBefore, r.HostAfter = uint64(before), after
	return r, errors.Join(err, size)
}

// compactDevice compacts d. The report is nil if there was an error.
func compactDevice(ctx context.Context, d *device.Device, progress func(dead, live uint64)) (*compactReport, error) {
	before, err := d.Status(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.Compact(ctx, progress); err != nil {
		return nil, err
	}
	after, err := d.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &compactReport{
		HostBefore: before.Store.HostBytes, HostAfter: after.Store.HostBytes,
		Moved: after.Store.Moved - before.Store.Moved,
	}, nil
}

// stopped explains err where it is that of a signal.
func stopped(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return errors.New("stopped; what is done stays done")
	}
	return err
}

func printCompact(w io.Writer, path string, r *compactReport) error {
	_, err := fmt.Fprintf(w, "%s: %s on the host before, %s now; %s moved\n", path, human(r.HostBefore), human(r.HostAfter), human(r.Moved))
	return err
}
