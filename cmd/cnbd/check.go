package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/internal/disk"
	"cnbd/store"
)

func newCheck() *cobra.Command {
	var data, asJSON bool
	cmd := &cobra.Command{
		Use:   "check BACKING",
		Short: "Prove that a store is whole",
		Long: "Read the map, the accounting and the log of the store in BACKING, and with --data every stored\n" +
			"byte, and verify all checksums. Nothing is changed. The store must not be served meanwhile." + exitHelp,
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			return check(cmd, args[0], data, asJSON)
		},
	}
	cmd.Flags().BoolVar(&data, "data", false, "verify the data too, which reads all of the store")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	return cmd
}

// A checkReport is the JSON of check.
type checkReport struct {
	*store.CheckReport
	// Lost replaces the ranges of blocks by bytes of the device.
	Lost []byteRange `json:"lost"`
}

type byteRange struct {
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
}

func check(cmd *cobra.Command, path string, data, asJSON bool) error {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if err != nil {
		return inUse(path, err)
	}
	rep, err := store.Check(f, store.CheckOptions{Data: data, Progress: progress(cmd.ErrOrStderr())})
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	out := checkReport{CheckReport: rep, Lost: []byteRange{}}
	for _, r := range rep.Lost {
		out.Lost = append(out.Lost, byteRange{r.Start.Bytes(), r.Len().Bytes()})
	}
	w := cmd.OutOrStdout()
	if asJSON {
		if err := printJSON(w, out); err != nil {
			return err
		}
	} else if err := printCheck(w, &out, data); err != nil {
		return err
	}
	if !rep.Clean {
		return damage("%s is damaged: %d problems, %d ranges of the device cannot be read", path, len(rep.Problems)+rep.More, len(rep.Lost))
	}
	return nil
}

func printCheck(w io.Writer, r *checkReport, data bool) error {
	for _, p := range r.Problems {
		fmt.Fprintln(w, p)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "and %d more\n", r.More)
	}
	for _, l := range r.Lost {
		fmt.Fprintf(w, "lost: %d bytes of the device at %d\n", l.Length, l.Offset)
	}
	what := "clean"
	if !r.Clean {
		what = "damaged"
	}
	verified := "data not read (--data does)"
	if data {
		verified = fmt.Sprintf("%d stored extents verified", r.Blobs)
	}
	_, err := fmt.Fprintf(w, "%s: %s of data in %s, %d extents, %d map nodes, %d segments, %d records of log; %s\n", what,
		config.Size(r.DataBytes), config.Size(r.StoredBytes), r.Extents, r.Nodes, r.Segments, r.Records, verified)
	return err
}

// progress shows how far a long work is, on a terminal.
func progress(w io.Writer) func(done, total uint64) {
	if !isTerminal(w) {
		return nil
	}
	var shown time.Time
	return func(done, total uint64) {
		if done < total && time.Since(shown) < 200*time.Millisecond {
			return
		}
		shown = time.Now()
		fmt.Fprintf(w, "\r\x1b[K%3d %%", 100*done/max(total, 1))
		if done >= total {
			fmt.Fprint(w, "\r\x1b[K")
		}
	}
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
