package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/store"
)

// Commands that change a store do so themselves, or have its server do it.

// backingOf is the path of the store that arg means: the BACKING itself or, with a
// configuration file, the name of one of its exports.
func backingOf(file, arg string) (string, error) {
	if file == "" {
		return arg, nil
	}
	c, err := config.Load(file, nil)
	if err != nil {
		return "", err
	}
	for _, e := range c.Exports {
		if e.Name == arg {
			return e.Path, nil
		}
	}
	return "", usage(fmt.Errorf("%s has no export named %q", file, arg))
}

// asked explains the error of asking the server of a store that is locked.
func asked(locked, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w, which is no server that can be asked (it may be starting, stopping, or checking the store)", locked)
	case errors.Is(err, control.ErrRefused):
		return usage(err)
	}
	return err
}

// openOwn opens the device of the store in f, at path, for a command of its own.
func openOwn(cmd *cobra.Command, f disk.File, path string) (*device.Device, error) {
	if _, err := store.ReadGeometry(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d, err := device.Open(f, device.Options{CacheBytes: 64 << 20, PayloadBytes: 4 << 20, Warn: warner(cmd, path)})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// warner prints what an administrator should know of the store at path.
func warner(cmd *cobra.Command, path string) func(msg string, err error) {
	return func(msg string, err error) {
		fmt.Fprintf(cmd.ErrOrStderr(), "cnbd: warning: %s: %s: %v\n", path, msg, err)
	}
}

// interruptible ends with the first signal to stop.
func interruptible(cmd *cobra.Command) (ctx context.Context, end func()) {
	return signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}

// allocatedOf is what the store at path takes on its host.
func allocatedOf(path string) (uint64, error) {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := f.Allocated()
	return uint64(n), err
}

// status line of long work, on a terminal; nil if w is none.
func statusLine(w io.Writer) func(format string, args ...any) {
	if !isTerminal(w) {
		return nil
	}
	return func(format string, args ...any) { fmt.Fprintf(w, "\r\x1b[K"+format, args...) }
}
