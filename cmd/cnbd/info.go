package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/nbd"
	"cnbd/store"
)

func newInfo() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info BACKING|URI",
		Short: "Show sizes, ratio and health of a store, or what an NBD export offers",
		Long: "Show what the store in BACKING holds, what that takes, and how it is. The store may be served:\n" +
			"its server is asked then.\n\n" +
			"Of an NBD URI, such as nbd://host/name or nbd+unix:///name?socket=PATH, show what the export\n" +
			"offers, whoever serves it, and how much of it is data." + exitHelp,
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			if strings.Contains(args[0], "://") {
				return exportInfo(cmd.Context(), cmd.OutOrStdout(), args[0], asJSON)
			}
			st, err := status(cmd.Context(), args[0], warner(cmd, args[0]))
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), st)
			} else {
				err = printInfo(cmd.OutOrStdout(), args[0], st)
			}
			if err == nil && st.Recovery.Damaged > 0 {
				err = damage("%s is damaged: `cnbd check` lists what is lost", args[0])
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print everything as JSON")
	return cmd
}

// A storeStatus is what info shows.
type storeStatus struct {
	device.Status
	// Served tells that a server has the store and was asked.
	Served bool `json:"served"`
	// Server is what that server does, for all of its exports, of which the store's is
	// Export.
	Server *nbd.Metrics `json:"server,omitempty"`
	Export string       `json:"export,omitempty"`
}

// status reads the store at path, or asks its server. warn is told what an
// administrator should know.
func status(ctx context.Context, path string, warn func(string, error)) (*storeStatus, error) {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if errors.Is(err, disk.ErrLocked) {
		st := &storeStatus{Served: true}
		if ask := control.Status(ctx, controlSocket(path), st); ask != nil {
			return nil, asked(err, ask)
		}
		return st, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := store.ReadGeometry(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d, err := device.Open(f, device.Options{ReadOnly: true, CacheBytes: 16 << 20, PayloadBytes: 4 << 20, Warn: warn})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer d.Close()
	st := &storeStatus{}
	st.Status, err = d.Status(ctx)
	return st, err
}

func printInfo(w io.Writer, path string, st *storeStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	size := func(n uint64) string { return human(n) }
	s := &st.Store
	state := "not served"
	if st.Served {
		state = "served"
	}
	row("store", "%s (%s)", path, state)
	row("uuid", "%s", st.UUID)
	row("device size", "%s", size(st.DeviceSize))
	row("data", "%s", size(s.DataBytes))
	row("stored", "%s", size(s.StoredBytes))
	if s.StoredBytes > 0 {
		row("ratio", "%.2f", st.Ratio)
	} else {
		row("ratio", "- (no data)")
	}
	row("map", "%s in %d nodes, %d extents", size(s.MapBytes), s.Nodes, s.Extents)
	row("overhead", "%s of the backing are not stored data", size(st.Overhead))
	row("on the host", "%s", size(s.HostBytes))
	row("capacity", "%s: %s in use, %s free", size(st.Capacity), size(s.UsedBytes), size(s.FreeBytes))
	row("garbage", "%s in segments that are partly alive, for the cleaner", size(s.GarbageBytes))
	if st.Served && (s.Moved > 0 || s.Recompressed > 0 || s.Shortages > 0) {
		row("cleaner", "%d segments cleaned, %s moved, %s recompressed since the start; writes waited %d times for space",
			s.Cleaned, size(s.Moved), size(s.Recompressed), s.Shortages)
	}
	row("codec", "%s, extents of %s", st.Codec, config.Size(st.ExtentSize))
	if m := st.Server; m != nil {
		row("clients", "%d of at most %d, for all exports of the server; %d refusals since it started", m.Connections, m.ConnectionsMax, m.Refusals())
	}
	if st.Served {
		printServed(row, st)
	}
	if c := st.Scrub; c != nil {
		state := "since " + c.Began.Format(time.DateTime)
		if !c.Running {
			state = c.Ended.Format(time.DateTime)
		}
		row("scrub", "%s: %d stored extents verified, %d problems", state, c.Blobs, len(c.Problems)+c.More)
	}
	row("last start", "epoch %d, replayed %d records, %s of log", st.Recovery.Epoch, st.Recovery.Records, size(st.Recovery.Bytes))
	switch {
	case s.Failure != "":
		row("health", "FAILED, refuses writes: %s", s.Failure)
	case st.Recovery.Damaged > 0:
		row("health", "DAMAGED: %d records of the log could not be read", st.Recovery.Damaged)
	case !st.Healthy:
		row("health", "DAMAGED: %d checksums did not match", s.Corrupt)
	default:
		row("health", "good")
	}
	return t.Flush()
}

// printServed adds what a served store has done since its server has opened it.
func printServed(row func(name, format string, args ...any), st *storeStatus) {
	s, c := &st.Store, &st.Cache
	if m := st.Server; m != nil {
		e := exportOf(m, st.Export)
		errors := uint64(0)
		for _, n := range e.Errors {
			errors += n
		}
		row("requests", "%d reads of %s, %d writes of %s, %d flushes, %d trims; %d errors",
			e.Read.Requests, short(e.Read.Bytes), e.Write.Requests, short(e.Write.Bytes), e.Flush.Requests, e.Trim.Requests, errors)
		var times []string
		for _, command := range topCommands {
			if l := &command.of(&e.Requests).Latency; l.Sum > 0 {
				times = append(times, fmt.Sprintf("%s %s (99 %%: %s)", command.name, latency(quantile(l, 0.5)), latency(quantile(l, 0.99))))
			}
		}
		if len(times) > 0 {
			row("latency", "%s", strings.Join(times, ", "))
		}
		amplification := ""
		if e.Write.Bytes > 0 {
			amplification = fmt.Sprintf(", %.2f for each byte that clients wrote", float64(s.LogWritten)/float64(e.Write.Bytes))
		}
		row("backing", "%s written%s; %s read; %d commits, %d syncs", short(s.LogWritten), amplification, short(s.ReadBytes), s.Commits, s.Syncs)
	}
	row("cache", "%s of %s%s", short(uint64(max(0, c.Cached))*block.Size), short(c.CacheMax.Bytes()), hits(c.Hits+c.HoleHits+c.FillWaits, c.Misses))
	if w := &st.Writeback; w.Encoded+w.Raw+w.Zero > 0 {
		row("encoded", "%d pieces compressed, %d raw, %d of zeros left out", w.Encoded, w.Raw, w.Zero)
	}
	row("not yet stored", "%s", human(st.DirtyBytes))
}

// human is n bytes for people, and the exact number where that is not all of it.
func human(n uint64) string {
	if n < 1<<10 {
		return short(n)
	}
	return fmt.Sprintf("%s (%d bytes)", short(n), n)
}

// short is n bytes for people: a number and an IEC unit.
func short(n uint64) string {
	units := []string{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, u := float64(n), 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	if v == float64(uint64(v)) {
		return fmt.Sprintf("%.0f %s", v, units[u])
	}
	return fmt.Sprintf("%.1f %s", v, units[u])
}
