package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"cnbd/config"
	"cnbd/internal/nbdkernel"
	"cnbd/nbd"
)

// connectionsDefault is how many connections are made if the server takes several:
// each has a thread of the kernel's to receive answers, and more than two bring
// little over a unix socket.
const connectionsDefault = 2

// An attachment is how an export becomes a device of the kernel.
type attachment struct {
	device      nbdkernel.Device
	uri         string
	connections int // 0: connectionsDefault, or one if the server does not take several
	blockSize   config.Size
	requestMax  config.Size
	timeout     time.Duration
	deadTimeout time.Duration
	wait        time.Duration // for the server to take the connections, and for the device to be ready
	resize      bool          // of a device that is attached
	reconnect   bool          // stay, and connect again
}

func newAttach() *cobra.Command {
	a := attachment{blockSize: 512, requestMax: config.MiB, timeout: 2 * time.Minute, wait: 30 * time.Second}
	cmd := &cobra.Command{
		Use:   "attach DEVICE URI",
		Short: "Attach an export to a device of the kernel",
		Long: "Attach the export that URI names to DEVICE, /dev/nbdN, so that it can be formatted and mounted, and wait\n" +
			"until it is ready. No process stays: the kernel speaks to the server. It takes root, and the kernel's nbd\n" +
			"driver (modprobe nbd). TLS is not for the kernel.\n\n" +
			"A filesystem or partition table is bound to the block size that it was made with: what was made with 4096\n" +
			"can be used with 512 if it is not partitioned, but not the other way round.\n\n" +
			"When the server goes away the device answers every request with an error, at once or after\n" +
			"--dead-connection-timeout: unmount, detach, attach again. With --reconnect the command stays until the\n" +
			"device is detached: when the server has ended in good order and is there again within that time (1m by\n" +
			"default), requests have only waited. When it was killed, and may have lost what it had answered, the device\n" +
			"gets its errors.\n\n" +
			"When the device has become larger (cnbd resize), --resize tells the kernel, while it is in use." + exitHelp,
		Example: "  modprobe nbd\n" +
			"  cnbd attach /dev/nbd0 'nbd+unix:///?socket=disk.cnbd.sock'\n" +
			"  mkfs.ext4 /dev/nbd0 && mount -o discard /dev/nbd0 /mnt\n" +
			"  cnbd resize --size 200GiB disk.cnbd && cnbd attach --resize /dev/nbd0 'nbd+unix:///?socket=disk.cnbd.sock'\n" +
			"  umount /mnt && cnbd detach /dev/nbd0",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usage(fmt.Errorf("DEVICE and URI are expected; %s --help tells more", cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if a.device, err = nbdkernel.ParseDevice(args[0]); err != nil {
				return usage(err)
			}
			a.uri = args[1]
			u, err := nbd.ParseURI(a.uri)
			if err != nil {
				return usage(err)
			}
			if u.TLS {
				return usage(errors.New("the kernel has no TLS for NBD: serve it on a unix socket, or through a tunnel"))
			}
			if a.reconnect && a.deadTimeout == 0 {
				a.deadTimeout = deadTimeoutDefault
			}
			if err := a.validate(); err != nil {
				return usage(err)
			}
			if a.resize {
				return a.grow(cmd.Context(), cmd.OutOrStdout())
			}
			if a.reconnect {
				return a.keep(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			_, _, err = a.attach(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			return err
		},
	}
	f := cmd.Flags()
	f.IntVar(&a.connections, "connections", 0, "connections to the server, up to 64 (0: 2 if the server takes several)")
	f.TextVar(&a.blockSize, "block-size", a.blockSize, "`SIZE` that the device's requests are multiples of: 512 to 4KiB")
	f.TextVar(&a.requestMax, "request-max", a.requestMax, "largest `SIZE` of a request")
	f.DurationVar(&a.timeout, "timeout", a.timeout, "whole seconds until a connection is given up that does not answer a request (0: never if it is one, 30s if there are several)")
	f.DurationVar(&a.deadTimeout, "dead-connection-timeout", 0, "whole seconds that requests wait for another connection when all are dead")
	f.BoolVar(&a.reconnect, "reconnect", false, "stay, and connect again when the server was restarted in good order")
	f.BoolVar(&a.resize, "resize", false, "DEVICE is attached, and the export has become larger: tell the kernel its size")
	f.DurationVar(&a.wait, "wait", a.wait, "how long the server, and then the device, may take to be ready")
	return cmd
}

// validate reports what cannot be meant.
func (a *attachment) validate() error {
	var errs []error
	check := func(ok bool, flag, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("--%s: %s is expected", flag, want))
		}
	}
	seconds := func(d time.Duration) bool { return d >= 0 && d%time.Second == 0 && d <= 24*time.Hour }
	b := a.blockSize
	check(a.connections >= 0 && a.connections <= 64, "connections", "a number from 0 to 64")
	check(b >= 512 && b <= 4096 && b&(b-1) == 0, "block-size", "512, 1KiB, 2KiB or 4KiB")
	check(a.requestMax >= 4096 && a.requestMax <= 32*config.MiB && a.requestMax%4096 == 0, "request-max", "a multiple of 4KiB from 4KiB to 32MiB")
	check(seconds(a.timeout), "timeout", "whole seconds, at most 24h,")
	check(seconds(a.deadTimeout), "dead-connection-timeout", "whole seconds, at most 24h,")
	check(a.wait > 0, "wait", "a time")
	check(!a.reconnect || a.deadTimeout > giveUpMargin, "dead-connection-timeout", "more than 1s, for --reconnect,")
	check(!a.resize || !a.reconnect, "resize", "a command without --reconnect, which goes on,")
	return errors.Join(errs...)
}

// attach attaches, and returns the number of connections and, if it is needed, the run
// of the server. It is done again where a connection does not answer, with more patience.
func (a *attachment) attach(ctx context.Context, stdout, stderr io.Writer) (connections int, r *run, err error) {
	for patience := min(a.wait, 3*time.Second); ; patience = min(a.wait, 4*patience) {
		connections, r, err = a.attachOnce(ctx, stdout, patience)
		if !errors.Is(err, nbdkernel.ErrSilent) || patience >= a.wait || ctx.Err() != nil {
			return connections, r, err
		}
		fmt.Fprintf(stderr, "cnbd: %v, attaching again\n", err)
	}
}

// attachOnce is attach, once; the device may take as long as patience to be ready.
func (a *attachment) attachOnce(ctx context.Context, stdout io.Writer, patience time.Duration) (connections int, r *run, err error) {
	if a.device.Attached() {
		err := fmt.Errorf("attach %v: %w", a.device, nbdkernel.ErrBusy)
		if to := a.device.Backend(); to != "" {
			err = fmt.Errorf("%w; it is attached to %s", err, to)
		}
		return 0, nil, err
	}
	c := nbdkernel.Config{
		BlockSize: uint32(a.blockSize), Backend: a.uri,
		Timeout: a.timeout, DeadConnTimeout: a.deadTimeout,
	}
	defer func() { closeAll(c.Sockets) }()
	most, requestMax := 1, a.requestMax
	for i := 0; i < most; i++ {
		n, f, err := negotiate(ctx, a.uri, a.wait)
		if err != nil {
			return 0, nil, err
		}
		c.Sockets = append(c.Sockets, f)
		if i > 0 {
			if n.Size != c.Size || uint16(n.Flags) != c.Flags {
				return 0, nil, errors.New("the server told different things of the export on two connections; try again")
			}
			continue
		}
		c.Size, c.Flags = n.Size, uint16(n.Flags)
		if s := n.Sizes; s.Minimum > c.BlockSize {
			return 0, nil, fmt.Errorf("the server takes no requests for less than %d bytes: --block-size %[1]d is needed", s.Minimum)
		} else if s.Maximum != 0 {
			requestMax = min(requestMax, config.Size(s.Maximum))
		}
		switch {
		case a.connections > 1 && n.Flags&nbd.FlagCanMultiConn == 0:
			return 0, nil, fmt.Errorf("--connections %d: the server allows one connection at a time for a device", a.connections)
		case a.connections > 0:
			most = a.connections
		case n.Flags&nbd.FlagCanMultiConn != 0:
			most = connectionsDefault
		}
	}
	if c.Size == 0 || c.Size%uint64(c.BlockSize) != 0 {
		return 0, nil, fmt.Errorf("the export has %d bytes, which is no multiple of a block size of %d", c.Size, c.BlockSize)
	}
	if a.reconnect {
		// Behind the negotiation: that of an older run cannot be taken for this one's.
		if r, err = a.ask(ctx); err != nil {
			return 0, nil, err
		}
	}
	if err := a.connect(ctx, c); err != nil {
		return 0, nil, err
	}
	ready, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = a.device.WaitReady(ready, c.Size)
	if err == nil {
		err = a.device.SetRequestMax(int64(requestMax))
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.wait)
		defer cancel()
		return 0, nil, errors.Join(err, nbdkernel.Abandon(ctx, a.device))
	}
	fmt.Fprintf(stdout, "%v: %v, %d connections\n", a.device, config.Size(c.Size), len(c.Sockets))
	return len(c.Sockets), r, nil
}

// busyWait is how long a device that is not attached may be in use: udev opens it when it
// has been detached, and as long as anybody has it open the kernel attaches nothing.
const busyWait = 5 * time.Second

// connect hands the connections of c to the kernel.
func (a *attachment) connect(ctx context.Context, c nbdkernel.Config) error {
	for deadline := time.Now().Add(min(a.wait, busyWait)); ; {
		err := nbdkernel.Connect(a.device, c)
		if !errors.Is(err, nbdkernel.ErrBusy) || a.device.Attached() || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// grow gives the device, which is attached, the size that the export has by now.
func (a *attachment) grow(ctx context.Context, stdout io.Writer) error {
	if !a.device.Attached() {
		return fmt.Errorf("%v: %w", a.device, nbdkernel.ErrNotAttached)
	}
	if to := a.device.Backend(); to != "" && to != a.uri {
		return fmt.Errorf("%v is attached to %s", a.device, to)
	}
	n, f, err := negotiate(ctx, a.uri, a.wait)
	if err != nil {
		return err
	}
	f.Close()
	was, err := a.device.Size()
	switch {
	case err != nil:
		return err
	case n.Size < was:
		return fmt.Errorf("%v has %d bytes and the export has %d: a device in use only grows", a.device, was, n.Size)
	case n.Size > was:
		if err := nbdkernel.Resize(a.device, n.Size); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, a.wait)
		defer cancel()
		if err := a.device.WaitReady(ctx, n.Size); err != nil {
			return err
		}
	}
	fmt.Fprintf(stdout, "%v: %v, was %v\n", a.device, config.Size(n.Size), config.Size(was))
	return nil
}

// negotiate connects to the export of uri, and returns the socket as a file, the
// caller's, which is all that there is to close.
func negotiate(ctx context.Context, uri string, timeout time.Duration) (*nbd.Negotiated, *os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	n, err := nbd.Negotiate(ctx, uri)
	if err != nil {
		return nil, nil, err
	}
	defer n.Conn.Close()
	f, err := n.Conn.(interface{ File() (*os.File, error) }).File()
	return n, f, err
}

func newDetach() *cobra.Command {
	var force bool
	wait := 30 * time.Second
	cmd := &cobra.Command{
		Use:   "detach DEVICE",
		Short: "Detach a device of the kernel from its export",
		Long: "Flush what was written to DEVICE, /dev/nbdN, end its connections, and wait until the kernel has let go of\n" +
			"it. A device that is mounted, swapped to, or held by LVM, RAID or the like is not detached: unmount first.\n\n" +
			"One whose server is gone is detached. One that cannot be flushed while its server is there, since the store is\n" +
			"full, say, is not, without --force: what was written since the last flush is then lost." + exitHelp,
		Example: "  umount /mnt && cnbd detach /dev/nbd0",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(fmt.Errorf("one DEVICE is expected, not %d; %s --help tells more", len(args), cmd.CommandPath()))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := nbdkernel.ParseDevice(args[0])
			if err != nil {
				return usage(err)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), wait)
			defer cancel()
			dead, err := nbdkernel.Detach(ctx, d, force)
			if dead {
				fmt.Fprintf(cmd.ErrOrStderr(), "cnbd: %v had lost its server: what had not been flushed before is lost\n", d)
			}
			if is[*nbdkernel.FlushError](err) {
				err = fmt.Errorf("%w; --force detaches it all the same, and that is lost", err)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "detach also what cannot be flushed: what was written since the last flush is lost")
	cmd.Flags().DurationVar(&wait, "wait", wait, "how long the kernel may take to let go of the device")
	return cmd
}
