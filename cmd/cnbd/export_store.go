package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"cnbd/device"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/internal/transfer"
	"cnbd/nbd"
	"cnbd/store"
)

func newExport() *cobra.Command {
	var o transferOptions
	cmd := &cobra.Command{
		Use:   "export BACKING DEST",
		Short: "Write what a store holds to a file, a device or a stream, also while it is served",
		Long: "Write what the device in BACKING holds to DEST: a new file, a block device, or - for standard output. A\n" +
			"file whose name ends in .qcow2, .vmdk, .vdi, .vhdx or .vhd becomes an image of that kind, made by qemu's\n" +
			"tools; any other is raw and sparse, unless --format says otherwise.\n\n" +
			"The store may be served: what is written is the device as it is when the export begins, with all that\n" +
			"was answered before, as after a power cut at that moment. A filesystem that is mounted on it is best\n" +
			"frozen for that moment (fsfreeze). Until the end the store keeps what is overwritten, so it grows; when\n" +
			"writes need that space, the export fails and they go on.\n\n" +
			"A file appears when all of it is durable, or not at all. The SHA-256 of the contents is printed (to\n" +
			"standard error if they go to standard output); --verify reads the copy back, and compares." + exitHelp,
		Example: "  cnbd export vm.cnbd vm.qcow2\n" +
			"  cnbd export --verify disk.cnbd disk.img\n" +
			"  cnbd export disk.cnbd - | ssh host 'cat > /dev/sdb'",
		Args: twoArgs("a BACKING and a DEST are"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.check(); err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if args[1] == "-" {
				out = cmd.ErrOrStderr()
			}
			r, err := exportStore(cmd, args[0], args[1], &o)
			if err != nil {
				return err
			}
			return o.print(out, r)
		},
	}
	o.addFlags(cmd.Flags(), "of DEST")
	cmd.Flags().BoolVar(&o.force, "force", false, "replace what is at DEST, with all that it holds")
	return cmd
}

// openStore opens the device of the store at path for reading, as it is now: its own, or
// its server's.
func openStore(ctx context.Context, cmd *cobra.Command, path string) (src transfer.Source, end func() error, err error) {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if errors.Is(err, disk.ErrLocked) {
		nc, ask := control.Snapshot(ctx, controlSocket(path))
		if ask != nil {
			return nil, nil, asked(err, ask)
		}
		c, err := nbd.NewClient(ctx, nc, "")
		if err != nil {
			return nil, nil, err
		}
		return servedSource{transfer.NewExport(c)}, func() error { return c.Disconnect(ctx) }, nil
	}
	if err != nil {
		return nil, nil, err
	}
	if _, err := store.ReadGeometry(f); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	d, err := device.Open(f, device.Options{ReadOnly: true, CacheBytes: 16 << 20, PayloadBytes: 4 << 20, Warn: warner(cmd, path)})
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	snap, err := d.Snapshot(ctx)
	if err != nil {
		d.Close()
		return nil, nil, err
	}
	return &snapshotSource{snap: snap}, func() error { snap.Close(); return d.Close() }, nil
}

// servedSource is a store that is served, as it was when the source was opened.
type servedSource struct{ *transfer.Export }

func (s servedSource) Next(ctx context.Context, off uint64) (n uint64, hole bool, err error) {
	n, hole, err = s.Export.Next(ctx, off)
	return n, hole, lost(err)
}

func (s servedSource) ReadAt(ctx context.Context, p []byte, off uint64) error {
	return lost(s.Export.ReadAt(ctx, p, off))
}

// lost tells what the server means that has no space for a reader.
func lost(err error) error {
	if errors.Is(err, nbd.ENOSPC) {
		return store.ErrPinLost
	}
	return err
}

// exportStore writes what is in the store at path to dest.
func exportStore(cmd *cobra.Command, path, dest string, o *transferOptions) (_ *transferReport, err error) {
	ctx, end := interruptible(cmd)
	defer end()
	context.AfterFunc(ctx, end) // a second signal ends at once
	defer func() {
		if ctx.Err() != nil && err != nil {
			err = errors.New("stopped")
		}
	}()
	format := o.format
	if format == "" {
		format = transfer.FormatOf(dest)
	}
	switch {
	case dest == "-" && o.verify:
		return nil, usage(errors.New("--verify: what goes to standard output cannot be read back"))
	case dest == "-" && format != transfer.Raw, isDevice(dest) && format != transfer.Raw:
		return nil, usage(fmt.Errorf("--format %s: only a file can be an image that is not raw", format))
	case dest == "-" && isTerminal(cmd.OutOrStdout()):
		return nil, usage(errors.New("standard output is a terminal, and this is the contents of a disk"))
	}
	src, closeSource, err := openStore(ctx, cmd, path)
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, closeSource()) }()
	x := &exporting{ctx: ctx, cmd: cmd, o: o, src: src, r: &transferReport{From: path, To: dest}, began: time.Now()}
	switch {
	case dest == "-":
		err = x.copy(transfer.NewOutput(cmd.OutOrStdout()))
	case isDevice(dest):
		err = x.toDevice(dest)
	default:
		err = disk.Create(dest, disk.CreateOptions{Force: o.force}, func(f disk.File, temp string) error {
			if format == transfer.Raw {
				return x.toFile(f, temp)
			}
			return x.toImage(temp, format)
		})
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w; --force replaces it, with all that it holds", err)
		}
	}
	if err != nil && !errors.Is(err, disk.ErrLocked) {
		err = fmt.Errorf("export to %s: %w", dest, err)
	}
	return x.r, err
}

// exporting is an export at work.
type exporting struct {
	ctx   context.Context
	cmd   *cobra.Command
	o     *transferOptions
	src   transfer.Source
	r     *transferReport
	began time.Time
}

func (x *exporting) copy(to transfer.Target) error {
	rep, err := transfer.Copy(x.ctx, to, x.src, transfer.Options{
		Digest: x.o.digest == "sha256", Progress: transferProgress(x.cmd.ErrOrStderr(), "exported", nil),
	})
	x.r.Report, x.r.Seconds = *rep, time.Since(x.began).Seconds()
	return err
}

// verify reads back what is in copied, if that is asked for.
func (x *exporting) verify(copied func() (transfer.Source, func() error, error)) error {
	if !x.o.verify {
		return nil
	}
	src, end, err := copied()
	if err != nil {
		return err
	}
	err = x.r.Verify(x.ctx, src, transferProgress(x.cmd.ErrOrStderr(), "verified", nil))
	x.r.Verified = err == nil
	return cmp.Or(err, end())
}

// toFile makes f, which is at temp, a raw image.
func (x *exporting) toFile(f disk.File, temp string) error {
	if err := f.Truncate(int64(x.src.Size())); err != nil {
		return err
	}
	if err := x.copy(transfer.NewRawFile(f)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return x.verify(func() (transfer.Source, func() error, error) { return openCopy(temp) })
}

// openCopy opens a file or a block device that was written and synced, to read it from
// its medium.
func openCopy(path string) (transfer.Source, func() error, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	// What the host keeps in memory is let go, if it does that.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	src, err := transfer.NewFile(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return src, f.Close, nil
}

// toImage makes the file at temp an image of that format.
func (x *exporting) toImage(temp, format string) error {
	if err := transfer.CreateImage(x.ctx, temp, format, x.src.Size()); err != nil {
		return err
	}
	im, err := transfer.OpenImage(x.ctx, temp, format, false)
	if err != nil {
		return err
	}
	if im.Size() < x.src.Size() {
		err = fmt.Errorf("the image has %s", human(im.Size()))
	} else {
		err = x.copy(im)
	}
	if err = cmp.Or(err, im.Close(x.ctx)); err != nil {
		return err
	}
	return x.verify(func() (transfer.Source, func() error, error) {
		im, err := transfer.OpenImage(x.ctx, temp, format, true)
		if err != nil {
			return nil, nil, err
		}
		return im, func() error { return im.Close(x.ctx) }, nil
	})
}

// toDevice writes to the block device at dest.
func (x *exporting) toDevice(dest string) error {
	own, err := disk.Open(dest, disk.OpenOptions{})
	if err != nil {
		return err
	}
	if !x.o.force {
		err = nothingOn(own, dest)
	}
	if err = cmp.Or(err, own.Close()); err != nil {
		return err
	}
	f, err := os.OpenFile(dest, os.O_RDWR|unix.O_EXCL, 0) // nobody has mounted it
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if uint64(size) < x.src.Size() {
		return fmt.Errorf("it has %s, and %s are needed", human(uint64(size)), human(x.src.Size()))
	}
	if err := x.copy(transfer.NewBlockDevice(f)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return x.verify(func() (transfer.Source, func() error, error) { return openCopy(dest) })
}
