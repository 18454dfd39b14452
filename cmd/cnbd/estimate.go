package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/internal/compression"
	"cnbd/internal/estimate"
)

// estimateSample is how much estimate reads unless it is told otherwise: with all
// codecs some minutes of one processor.
const estimateSample = 1 * config.GiB

// estimateExtents are the extents of which estimate tells.
var estimateExtents = []uint32{32 << 10, 64 << 10, 128 << 10}

func newEstimate() *cobra.Command {
	var asJSON bool
	var codecs []string
	var sample string
	cmd := &cobra.Command{
		Use:   "estimate PATH...",
		Short: "Say what data would take in a store",
		Long: "Encode what files, directories and block devices hold, as a store would, and say what it would take\n" +
			"with each codec and extent size, headers and map included, and holes and blocks of zeros left out.\n" +
			"Nothing is written. Ratios are of the data that is not zeros, by what is stored. Add what a store\n" +
			"keeps free for its work, some 14 segments of 2 to 64 MiB.\n\n" +
			"A file that is named is taken for the image of a disk; those in a directory are laid one behind the\n" +
			"other, as a filesystem does, without that filesystem's own data. Other filesystems mounted in a\n" +
			"directory are left out. With more data than --sample, pieces of a MiB all over it are read, and the\n" +
			"rest is taken to be like them.\n\n" +
			"auto is zstd:fastest. zstd:best, which is slow, is tried only if --codec names it." + exitHelp,
		Example: "  cnbd estimate /var/lib/postgresql\n" +
			"  cnbd estimate --sample all --codec zstd:best --codec s2 disk.img",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(fmt.Errorf("a PATH is expected: a file, directory or block device; %s --help tells more", cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o := estimate.Options{Extents: estimateExtents, Progress: progress(cmd.ErrOrStderr()), Unreadable: func(err error) {
				fmt.Fprintf(cmd.ErrOrStderr(), "cnbd: warning: %v\n", err)
			}}
			if sample != "all" {
				n, err := config.ParseSize(sample)
				if err == nil && n < config.MiB {
					err = fmt.Errorf("%v is too little: at least 1MiB, or all", n)
				}
				if err != nil {
					return &config.Fault{Key: "sample", Where: "--sample", Err: err}
				}
				o.SampleBytes = uint64(n)
			}
			for _, text := range codecs {
				s, err := compression.Parse(text)
				if err != nil {
					return usage(err)
				}
				o.Settings = append(o.Settings, s)
			}
			ctx, end := interruptible(cmd)
			defer end()
			r, err := estimate.Estimate(ctx, args, o)
			if ctx.Err() != nil {
				return errors.New("stopped")
			}
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = printEstimate(cmd.OutOrStdout(), r)
			}
			if err == nil && r.Unreadable > 0 {
				err = fmt.Errorf("%d files or directories could not be read, and are not counted", r.Unreadable)
			}
			return err
		},
	}
	cmd.Flags().StringArrayVar(&codecs, "codec", []string{"none", "s2:fast", "s2:better", "zstd:fastest", "zstd:default", "zstd:better"}, "try this `codec`, such as zstd:best; may be given again")
	cmd.Flags().StringVar(&sample, "sample", estimateSample.String(), "read about this much, a `size` or all")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	return cmd
}

func printEstimate(w io.Writer, r *estimate.Report) error {
	fmt.Fprintf(w, "%s of data in %d files, %s of it zeros", short(r.DataBytes), r.Files, short(r.ZeroBytes))
	if r.SampleBytes < r.DataBytes {
		fmt.Fprintf(w, "; estimated from %s, %.1f %%, of it", short(r.SampleBytes), 100*float64(r.SampleBytes)/float64(r.DataBytes))
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "stored, ratio\t")
	for _, e := range estimateExtents {
		fmt.Fprintf(t, "%v\t\t", config.Size(e))
	}
	for i, x := range r.Results {
		if i%len(estimateExtents) == 0 {
			fmt.Fprintf(t, "\n%v\t", x.Setting)
		}
		fmt.Fprintf(t, "%s\t%.2f\t", short(x.StoredBytes), x.Ratio)
	}
	fmt.Fprintln(t)
	return t.Flush()
}
