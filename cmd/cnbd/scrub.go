package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/internal/control"
	"cnbd/store"
)

// scrubPoll is how often the progress of a server's scrub is asked for.
const scrubPoll = 200 * time.Millisecond

// A scrubReport is the JSON of check --data of a store that is served.
type scrubReport struct {
	*store.ScrubReport
	Clean bool        `json:"clean"`
	Lost  []byteRange `json:"lost"`
}

// askScrub has the server of the store at path verify it, or waits with whoever
// has asked for that already. An interrupt ends the scrub.
func askScrub(cmd *cobra.Command, path string, asJSON bool, rate config.Size) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	socket := controlSocket(path)
	var rep *store.ScrubReport
	err := control.Scrub(ctx, socket, &rep)
	if err == nil && (rep == nil || !rep.Running) {
		rep = nil
		err = control.StartScrub(ctx, socket, uint64(rate), &rep)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("%s is in use by a process that is no server that can be asked", path)
	}
	show := progress(cmd.ErrOrStderr())
	for err == nil && rep != nil && rep.Running {
		if show != nil {
			show(min(rep.Done, max(rep.Total, 1)-1), max(rep.Total, 1))
		}
		select {
		case <-ctx.Done():
			err = control.StopScrub(cmd.Context(), socket, &rep)
		case <-time.After(scrubPoll):
			rep = nil
			err = control.Scrub(ctx, socket, &rep)
			if ctx.Err() != nil {
				err = control.StopScrub(context.WithoutCancel(ctx), socket, &rep)
			}
		}
	}
	if show != nil {
		show(1, 1)
	}
	if err != nil {
		return err
	}
	if rep == nil {
		return fmt.Errorf("the server of %s has no scrub any more", path)
	}
	w := cmd.OutOrStdout()
	lost := byteRanges(rep.Lost)
	if asJSON {
		if err := printJSON(w, scrubReport{rep, rep.Clean(), lost}); err != nil {
			return err
		}
	} else {
		printProblems(w, rep.Problems, rep.More)
		printLost(w, lost)
		fmt.Fprintf(w, "the server has verified %d stored extents and %d map nodes, %s, in %v\n", rep.Blobs, rep.Nodes,
			human(rep.Bytes), rep.Ended.Sub(rep.Began).Round(time.Millisecond))
	}
	switch {
	case !rep.Clean():
		return damage("%s is damaged: %d problems, %d ranges of the device cannot be read", path, len(rep.Problems)+rep.More, len(rep.Lost))
	case rep.Error != "":
		return fmt.Errorf("the scrub of %s has ended: %s", path, rep.Error)
	case rep.Stopped:
		return fmt.Errorf("the scrub of %s was stopped before its end", path)
	}
	return nil
}
