package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"cnbd/internal/nbdkernel"
	"cnbd/nbd"
)

const (
	// deadTimeoutDefault is how long requests wait for the server if nothing is
	// asked for: an upgrade, and the recovery of the store.
	deadTimeoutDefault = time.Minute
	// giveUpMargin is how much earlier than the kernel, which then fails what waits,
	// a server is given up: so that it is never one request alone that has failed.
	giveUpMargin = time.Second
	// retryPause is between two tries to connect.
	retryPause = 100 * time.Millisecond
)

// A keeper connects a device of the kernel again when its server has been started
// anew in good order, so that whoever uses it sees a pause. It never does so when
// writes may be lost that the server had answered: a filesystem would then live on
// with holes in its past (promise P7).
type keeper struct {
	log io.Writer

	run     string        // of the server, which has answered what the kernel was answered
	timeout time.Duration // for the server to be there again

	attached func() bool
	connect  func(ctx context.Context) (*run, []*os.File, error) // to the server, which is asked for its run afterwards
	hand     func(sockets []*os.File) error                      // to the kernel
	giveUp   func() error                                        // fails all requests from then on
}

// keep stays until the device is detached, or is given up, which is an error, or ctx
// ends. dead tells that connections may have died.
func (k *keeper) keep(ctx context.Context, dead <-chan struct{}) error {
	ticker := time.NewTicker(time.Second) // nothing tells of a device that is detached
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if !k.attached() {
				return nil
			}
		case _, ok := <-dead:
			if !k.attached() {
				return nil
			}
			if !ok {
				return errors.New("the kernel does not tell of dead connections any more; the device stays, and will not be connected again")
			}
			if err := k.again(ctx); err != nil {
				return err
			}
		}
	}
}

// again connects the device again, or gives it up.
func (k *keeper) again(ctx context.Context) error {
	began := time.Now()
	within, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	for last := error(nil); ; {
		r, sockets, err := k.connect(within)
		switch {
		case err != nil:
			last = err
		case r.goesOn(k.run):
			err := k.hand(sockets)
			closeAll(sockets)
			if err != nil && !k.attached() {
				return nil // it was detached meanwhile
			} else if err != nil {
				return k.gone(err)
			}
			k.run = r.ID
			fmt.Fprintf(k.log, "connected again after %v\n", time.Since(began).Round(time.Millisecond))
			return nil
		default:
			closeAll(sockets)
			return k.gone(errors.New("the server that is there now does not go on where the one before has ended, which may have answered writes that are lost"))
		}
		select {
		case <-within.Done():
			if ctx.Err() != nil {
				return nil
			}
			return k.gone(fmt.Errorf("the server was not there again within %v: %w", k.timeout, last))
		case <-time.After(retryPause):
		}
		if !k.attached() {
			return nil
		}
	}
}

// gone gives the device up for that reason.
func (k *keeper) gone(reason error) error {
	return errors.Join(fmt.Errorf("%w; the device answers with errors from now on, like a disk that has failed: unmount, detach, attach, mount", reason), k.giveUp())
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// keep attaches as a says and stays: see keeper.
func (a *attachment) keep(ctx context.Context, stdout, stderr io.Writer) error {
	watch, err := nbdkernel.WatchDead(a.device)
	if err != nil {
		return err
	}
	defer watch.Close()
	n, r, err := a.attach(ctx, stdout, stderr)
	if err != nil {
		return err
	}
	k := &keeper{
		log: stderr, run: r.ID, timeout: a.deadTimeout - giveUpMargin,
		attached: a.device.Attached,
		connect: func(ctx context.Context) (*run, []*os.File, error) {
			var sockets []*os.File
			for range n {
				n, f, err := negotiate(ctx, a.uri, a.wait)
				if err == nil {
					sockets = append(sockets, f)
					if size, serr := a.device.Size(); serr == nil && n.Size < size {
						err = fmt.Errorf("the export has %d bytes, less than the device", n.Size)
					}
				}
				if err != nil {
					closeAll(sockets)
					return nil, nil, err
				}
			}
			r, err := a.ask(ctx)
			if err != nil {
				closeAll(sockets)
			}
			return r, sockets, err
		},
		hand:   func(sockets []*os.File) error { return nbdkernel.Reconnect(a.device, sockets) },
		giveUp: func() error { return nbdkernel.GiveUp(a.device) },
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		return err
	}
	return k.keep(ctx, watch.Dead())
}

// ask asks the server for its run. That a server tells none is an error: there is
// nothing to know it again by.
func (a *attachment) ask(ctx context.Context) (*run, error) {
	ctx, cancel := context.WithTimeout(ctx, a.wait)
	defer cancel()
	about, err := nbd.About(ctx, a.uri)
	if err != nil {
		return nil, err
	}
	if r := runOf(about); r != nil {
		return r, nil
	}
	return nil, errors.New("the server does not tell which run of it this is, so it cannot be known again: it is no cnbd, or an older one")
}
