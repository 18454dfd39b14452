// Command cnbd makes, serves and examines compressed block devices.
//
// It is wiring: flags become a config.Config, stores become devices, devices
// become exports of an NBD server, and errors become exit statuses. What it does
// with data is in the packages that it joins.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/store"
)

// Exit statuses, which the help of every command lists.
const (
	exitDone   = 0
	exitFailed = 1 // it could not be done
	exitUsage  = 2 // it was asked for in a way that cannot be meant
	exitDamage = 3 // the store is damaged
)

const exitHelp = `

Exit status: 0 done, 1 failed, 2 wrong usage or a bad value, 3 damage found.`

func main() {
	root := newRoot(os.Stdout, os.Stderr)
	err := root.Execute()
	report(os.Stderr, err)
	os.Exit(exitStatus(err))
}

// hidden makes commands that only some builds have, and no user calls.
var hidden []func() *cobra.Command

func newRoot(stdout, stderr io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "cnbd",
		Short: "Compressed block devices over NBD",
		Long: "cnbd serves block devices over NBD (Network Block Device) and stores them compressed, in a\n" +
			"sparse file or on a block device. Any filesystem can live on one." + exitHelp,
		Args:          cobra.NoArgs,
		Version:       versionText(),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("a command is needed: create, serve, info, top, check, compact, resize, estimate, import, export, attach, detach, map or version; cnbd --help tells more"))
		},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w; %s --help lists the flags", err, cmd.CommandPath()))
	})
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(newCreate(), newServe(), newInfo(), newTop(), newCheck(), newCompact(), newResize(), newEstimate(), newImport(), newExport(), newAttach(), newDetach(), newMap(), newVersion())
	for _, make := range hidden {
		root.AddCommand(make())
	}
	return root
}

// A usageError is a mistake in how the program was called.
type usageError struct{ err error }

func usage(err error) error         { return &usageError{err} }
func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// A damageError says that damage was found in a store that could be read.
type damageError struct{ text string }

func damage(format string, a ...any) error { return &damageError{fmt.Sprintf(format, a...)} }
func (e *damageError) Error() string       { return e.text }

func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

func exitStatus(err error) int {
	switch {
	case err == nil:
		return exitDone
	case is[*usageError](err), is[*config.Fault](err), strings.HasPrefix(err.Error(), "unknown command "): // cobra has no type for it
		return exitUsage
	case is[*damageError](err), store.IsDamage(err):
		return exitDamage
	}
	return exitFailed
}

// report prints an error, joined ones one to a line.
func report(w io.Writer, err error) {
	if err == nil {
		return
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok && strings.Contains(err.Error(), "\n") {
		for _, err := range many.Unwrap() {
			report(w, err)
		}
		return
	}
	fmt.Fprintf(w, "cnbd: %v\n", err)
}

// oneBacking are the arguments of a command for one store.
func oneBacking(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usage(fmt.Errorf("one BACKING is expected, not %d; %s --help tells more", len(args), cmd.CommandPath()))
	}
	return nil
}
