package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/store"
)

func newCheck() *cobra.Command {
	var data, asJSON, repairs, yes bool
	rate := 64 * config.MiB
	cmd := &cobra.Command{
		Use:   "check BACKING",
		Short: "Prove that a store is whole",
		Long: "Read the map, the accounting and the log of the store in BACKING, and with --data every stored\n" +
			"byte, and verify all checksums. Nothing is changed. The store must not be served meanwhile,\n" +
			"but with --data: then its server verifies map and data in the background, within --rate, as far as they\n" +
			"are in the newest checkpoint.\n\n" +
			"--repair makes a store that was found damaged one that opens again: it takes the newest commit whose\n" +
			"state is whole, says what it cannot save, and asks. Damaged data stays as it is, and reads as an error." + exitHelp,
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			if repairs {
				if data || asJSON {
					return usage(errors.New("--repair goes with neither --data nor --json: it reads the map and the log, and asks"))
				}
				return repair(cmd, args[0], yes)
			}
			if yes {
				return usage(errors.New("--yes goes with --repair"))
			}
			return check(cmd, args[0], data, asJSON, rate)
		},
	}
	cmd.Flags().BoolVar(&data, "data", false, "verify the data too, which reads all of the store")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the report as JSON")
	cmd.Flags().TextVar(&rate, "rate", rate, "`SIZE` that the server reads in a second at most, with --data and a store that is served; 0 is no limit")
	cmd.Flags().BoolVar(&repairs, "repair", false, "make a damaged store one that opens again, after asking")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask before the repair")
	return cmd
}

// A checkReport is the JSON of check.
type checkReport struct {
	*store.CheckReport
	// Lost replaces the ranges of blocks by bytes of the device.
	Lost []byteRange `json:"lost"`
}

func byteRanges(rs []block.Range) []byteRange {
	out := make([]byteRange, 0, len(rs))
	for _, r := range rs {
		out = append(out, byteRange{r.Start.Bytes(), r.Len().Bytes()})
	}
	return out
}

type byteRange struct {
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
}

func check(cmd *cobra.Command, path string, data, asJSON bool, rate config.Size) error {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if data && errors.Is(err, disk.ErrLocked) {
		return askScrub(cmd, path, asJSON, rate)
	}
	if err != nil {
		return inUse(path, err)
	}
	rep, err := store.Check(f, store.CheckOptions{Data: data, Progress: progress(cmd.ErrOrStderr())})
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	out := checkReport{CheckReport: rep, Lost: byteRanges(rep.Lost)}
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

// repair repairs the store at path, whose lock it holds meanwhile.
func repair(cmd *cobra.Command, path string, yes bool) error {
	f, err := disk.Open(path, disk.OpenOptions{})
	if err != nil {
		return inUse(path, err)
	}
	w := cmd.OutOrStdout()
	rep, err := store.Repair(f, store.RepairOptions{
		Progress: progress(cmd.ErrOrStderr()),
		Confirm: func(rep *store.RepairReport) bool {
			printRepair(w, rep)
			if yes {
				return true
			}
			fmt.Fprintf(w, "Repair %s so? What it cannot save is gone then; a copy of it may serve better tools. [y/N] ", path)
			answer, _ := bufio.NewReader(cmd.InOrStdin()).ReadString('\n')
			answer = strings.ToLower(strings.TrimSpace(answer))
			return answer == "y" || answer == "yes"
		},
	})
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case !rep.Needed && len(rep.Lost) == 0:
		fmt.Fprintln(w, "there is nothing to repair; check --data looks at the data too")
		return nil
	case !rep.Needed:
		return damage("%s: %d ranges of the device cannot be read until they are written, and there is nothing else to repair", path, len(rep.Lost))
	case !rep.Repaired:
		return damage("%s was not repaired, and not changed", path)
	case rep.GivenUp > 0 || len(rep.Lost) > 0:
		return damage("%s is repaired, and something is lost: see above", path)
	}
	fmt.Fprintln(w, "repaired, nothing is lost")
	return nil
}

func printRepair(w io.Writer, r *store.RepairReport) {
	printProblems(w, r.Problems, r.More)
	if r.GivenUp > 0 {
		fmt.Fprintf(w, "The device will have the state of commit %d. The %d commits after it are given up.\n", r.Epoch, r.GivenUp)
		for _, c := range r.Changed {
			fmt.Fprintf(w, "older contents: %d bytes of the device at %d\n", c.Len().Bytes(), c.Start.Bytes())
		}
		if r.Unread > 0 {
			fmt.Fprintf(w, "older contents: unknown places, in %d bytes of log that cannot be read\n", r.Unread)
		}
	}
	printLost(w, byteRanges(r.Lost))
}

func printProblems(w io.Writer, problems []string, more int) {
	for _, p := range problems {
		fmt.Fprintln(w, p)
	}
	if more > 0 {
		fmt.Fprintf(w, "and %d more\n", more)
	}
}

func printLost(w io.Writer, lost []byteRange) {
	for _, l := range lost {
		fmt.Fprintf(w, "lost: %d bytes of the device at %d\n", l.Length, l.Offset)
	}
}

func printCheck(w io.Writer, r *checkReport, data bool) error {
	printProblems(w, r.Problems, r.More)
	printLost(w, r.Lost)
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
