package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cnbd/config"
	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/internal/disk"
	"cnbd/internal/transfer"
	"cnbd/nbd"
	"cnbd/store"
)

func newImport() *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use:   "import SOURCE BACKING",
		Short: "Make a store of a disk, an image or a stream",
		Long: "Make a new store in BACKING that holds what SOURCE holds: a file, a block device, - for standard\n" +
			"input, or the URI of an NBD export, such as nbd://host/name. A file whose name ends in .qcow2, .vmdk,\n" +
			".vdi, .vhdx or .vhd is an image of that kind, and read by qemu-nbd; any other is raw, unless --format\n" +
			"says otherwise. SOURCE must not change meanwhile: do not import what is mounted for writing.\n\n" +
			"Holes and zeros take nothing. The SHA-256 of the contents is printed; of a raw file it is that of\n" +
			"sha256sum. --verify reads the new store back, from its medium, and compares.\n\n" +
			"BACKING appears when all of it is durable, or not at all. What an import has done that was stopped,\n" +
			"or killed, is kept beside it, as .NAME.new: --resume goes through SOURCE again, and writes what is\n" +
			"not there yet. Without it the next import begins anew. A block device is no store to anybody before\n" +
			"the end." + exitHelp,
		Example: "  cnbd import vm.qcow2 vm.cnbd\n" +
			"  cnbd import --verify --codec zstd --level 3 /dev/vg/old disk.cnbd\n" +
			"  ssh host cat /dev/sdb | cnbd import --size 100GiB - disk.cnbd",
		Args: twoArgs("a SOURCE and a BACKING are"),
		RunE: func(cmd *cobra.Command, args []string) error {
			flags, err := withBacking(cmd.Flags(), args[1])
			if err != nil {
				return err
			}
			c, err := config.Load("", flags)
			if err != nil {
				return err
			}
			if err := o.check(); err != nil {
				return err
			}
			r, err := importStore(cmd, c, args[0], &o)
			if err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), r)
		},
	}
	config.AddFlags(cmd.Flags(), "size", "capacity", "codec", "level", "extent", "cache", "workers")
	o.addFlags(cmd.Flags(), "of SOURCE")
	cmd.Flags().Lookup("size").Usage = "size of the device: for a stream, exactly what comes; else at least that of SOURCE, which is the default"
	cmd.Flags().BoolVar(&o.resume, "resume", false, "go on with an import that was stopped")
	cmd.Flags().BoolVar(&o.force, "force", false, "replace what is at BACKING, with all that it holds")
	return cmd
}

// transferOptions are the flags that import and export share.
type transferOptions struct {
	format, digest string
	verify, asJSON bool
	force          bool
}

type importOptions struct {
	transferOptions
	resume bool
}

func (o *transferOptions) addFlags(fs *pflag.FlagSet, of string) {
	fs.StringVar(&o.format, "format", "", "format "+of+", raw or one that qemu-img knows (default: by its name)")
	fs.StringVar(&o.digest, "digest", "sha256", "sum the contents up, sha256 or none")
	fs.BoolVar(&o.verify, "verify", false, "read back what was written, and compare the digests")
	fs.BoolVar(&o.asJSON, "json", false, "print the report as JSON")
}

func (o *transferOptions) check() error {
	if o.digest != "sha256" && o.digest != "none" {
		return &config.Fault{Key: "digest", Where: "--digest", Err: fmt.Errorf("%q is neither sha256 nor none", o.digest)}
	}
	if o.verify && o.digest == "none" {
		return usage(errors.New("--verify compares digests: it does not go with --digest none"))
	}
	return nil
}

// A transferReport is what an import or export has done.
type transferReport struct {
	From string `json:"from"`
	To   string `json:"to"`
	transfer.Report
	Seconds  float64 `json:"seconds"`
	Verified bool    `json:"verified"`
	// Of an import.
	DeviceSize  uint64  `json:"device_size,omitempty"`
	StoredBytes uint64  `json:"stored_bytes,omitempty"`
	Ratio       float64 `json:"ratio,omitempty"` // of what is stored, blocks of zeros left out
}

func (o *transferOptions) print(w io.Writer, r *transferReport) error {
	if o.asJSON {
		return printJSON(w, r)
	}
	rate := short(uint64(float64(r.Bytes) / max(r.Seconds, 1e-3)))
	fmt.Fprintf(w, "%s: %s from %s, %s of it in holes, in %v, %s/s", r.To, human(r.Bytes), r.From, short(r.Bytes-r.Data),
		time.Duration(r.Seconds*float64(time.Second)).Round(100*time.Millisecond), rate)
	if r.StoredBytes > 0 {
		fmt.Fprintf(w, "; stored in %s, ratio %.2f", short(r.StoredBytes), r.Ratio)
	}
	fmt.Fprintln(w)
	if r.SHA256 != "" {
		fmt.Fprintf(w, "sha256 %s\n", r.SHA256)
	}
	if r.Verified {
		fmt.Fprintln(w, "verified: what was read back is the same")
	}
	return nil
}

// twoArgs are the arguments of a command for two things, named in the plural.
func twoArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 2 {
			return usage(fmt.Errorf("%s expected, not %d; %s --help tells more", what, len(args), cmd.CommandPath()))
		}
		return nil
	}
}

// withBacking are the flags with that as their only argument.
func withBacking(flags *pflag.FlagSet, backing string) (*pflag.FlagSet, error) {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	fs.AddFlagSet(flags)
	return fs, fs.Parse([]string{"--", backing})
}

// openSource opens what is to be imported. The stream is as long as size says.
func openSource(ctx context.Context, stdin io.Reader, name, format string, size uint64) (src transfer.Source, end func() error, err error) {
	nothing := func() error { return nil }
	if strings.Contains(name, "://") {
		c, err := nbd.Dial(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		return transfer.NewExport(c), func() error { return c.Disconnect(ctx) }, nil
	}
	if name == "-" {
		if format != "" && format != transfer.Raw {
			return nil, nil, usage(fmt.Errorf("--format %s: a stream is raw; an image has to be a file", format))
		}
		if f, ok := stdin.(*os.File); ok {
			if file, err := transfer.NewFile(f); err == nil {
				return file, nothing, nil
			}
		}
		if size == 0 {
			return nil, nil, usage(errors.New("--size is needed: how many bytes come from standard input"))
		}
		return transfer.NewStream(stdin, size), nothing, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, err
	}
	file, err := transfer.NewFile(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	if format == "" {
		if format = transfer.FormatOf(name); format == transfer.Raw {
			head := make([]byte, 16)
			n, _ := f.ReadAt(head, 0)
			if like := transfer.LooksLike(head[:n]); like != "" {
				f.Close()
				return nil, nil, usage(fmt.Errorf("%s looks like an image of format %s: --format %s reads the disk in it, --format raw takes it as it is", name, like, like))
			}
		}
	}
	if format == transfer.Raw {
		return file, f.Close, nil
	}
	f.Close()
	im, err := transfer.OpenImage(ctx, name, format, true)
	if err != nil {
		return nil, nil, err
	}
	return im, func() error { return im.Close(ctx) }, nil
}

// importStore makes a store of what is at from.
func importStore(cmd *cobra.Command, c *config.Config, from string, o *importOptions) (_ *transferReport, err error) {
	ctx, end := interruptible(cmd)
	defer end()
	context.AfterFunc(ctx, end) // a second signal ends at once
	e := &c.Exports[0]
	src, closeSource, err := openSource(ctx, cmd.InOrStdin(), from, o.format, uint64(e.Size))
	if err != nil {
		return nil, err
	}
	defer func() { err = cmp.Or(err, closeSource()) }()
	// Devices end with a whole sector.
	const sector = 512
	least := (src.Size() + sector - 1) / sector * sector
	if least == 0 {
		return nil, usage(fmt.Errorf("%s is empty", from))
	}
	if e.Size == 0 {
		e.Size = config.Size(least)
	}
	if uint64(e.Size) < least {
		return nil, &config.Fault{Key: "size", Where: "--size", Err: fmt.Errorf("%v is less than %s has: %s", e.Size, from, human(src.Size()))}
	}
	r := &transferReport{From: from, To: e.Path, DeviceSize: uint64(e.Size)}
	began := time.Now()
	imported := false
	keep := func(err error) bool { return imported && !errors.Is(err, syscall.ENOSPC) }
	err = fillStore(c, e, o, keep, func(f disk.File, old bool) error {
		d, err := device.Open(borrowed{f}, device.Options{
			CacheBytes: int64(c.Cache), ExtentBytes: uint32(c.Extent), Workers: c.WorkerCount(), NoRecompress: true, Warn: warner(cmd, e.Path),
		})
		if err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		imported = true
		rep, err := transfer.Copy(ctx, &importTarget{d: d, compare: old}, src, transfer.Options{
			Digest: o.digest == "sha256", Progress: transferProgress(cmd.ErrOrStderr(), "imported", d.Appended),
		})
		if err == nil && old {
			// The source may have been longer when the import was stopped.
			err = d.WriteZeroes(ctx, rep.Bytes, d.Bytes()-rep.Bytes, false)
		}
		if err != nil {
			if errors.Is(err, syscall.ENOSPC) {
				return cmp.Or(fmt.Errorf("%s: %w", e.Path, err), d.Abort())
			}
			return cmp.Or(err, d.Close()) // what is done stays done
		}
		r.Report = *rep
		st, err := d.Status(ctx)
		if err = cmp.Or(err, d.Close()); err != nil {
			return err
		}
		r.StoredBytes, r.Ratio = st.Store.StoredBytes, st.Ratio
		r.Seconds = time.Since(began).Seconds()
		if o.verify {
			if err := verifyStore(ctx, cmd, f, rep); err != nil {
				return fmt.Errorf("%s: %w", e.Path, err)
			}
			r.Verified = true
		}
		return nil
	})
	if ctx.Err() != nil {
		err = errors.New("stopped")
	}
	if err != nil && keep(err) {
		where := disk.TemporaryName(e.Path)
		if isDevice(e.Path) {
			where = e.Path
		}
		err = fmt.Errorf("%w; what has been imported is kept in %s, and --resume goes on with it", err, where)
	}
	return r, err
}

// borrowed is a file that a device does not close.
type borrowed struct{ disk.File }

func (borrowed) Close() error { return nil }

// fillStore makes the store of e with what fill, which borrows it, puts into it. It
// is there for others when fill has succeeded, and not before. old tells fill that
// there is something in it already: that of an import that was stopped.
func fillStore(c *config.Config, e *config.Export, o *importOptions, keep func(error) bool, fill func(f disk.File, old bool) error) error {
	begin := func(f disk.File, fixed uint64) error {
		if o.resume {
			g, err := store.ReadGeometry(f)
			if err == nil && g.DeviceSize != uint64(e.Size) {
				return usage(fmt.Errorf("the import that was stopped was to a device of %v, and this one is to %v", config.Size(g.DeviceSize), e.Size))
			}
			if err == nil {
				return fill(f, true)
			}
			if !errors.Is(err, store.ErrNotStore) && !errors.Is(err, io.EOF) {
				return fmt.Errorf("what is left of the import that was stopped: %w; without --resume it begins anew", err)
			}
		}
		g, err := geometryFor(c, e, fixed)
		if err != nil {
			return err
		}
		if err := store.Format(f, g); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		return fill(f, false)
	}
	if !isDevice(e.Path) {
		return notMade(e.Path, disk.Create(e.Path, disk.CreateOptions{Force: o.force, Resume: o.resume, Keep: keep}, func(f disk.File, _ string) error { return begin(f, 0) }))
	}
	f, size, err := openDevice(e.Path, o.force)
	if err != nil {
		return err
	}
	defer f.Close()
	u := store.Unfinished{File: f}
	if err := begin(u, size); err != nil {
		return err
	}
	return cmp.Or(u.Publish(), f.Close())
}

// importTarget is a device that is filled.
type importTarget struct {
	d       *device.Device
	compare bool // it may have some of it already
	old     []byte
}

// WriteAt implements transfer.Target. Of what is there already nothing is written.
func (t *importTarget) WriteAt(_ context.Context, p []byte, off uint64) error {
	if !t.compare {
		_, err := t.d.WriteAt(p, int64(off))
		return err
	}
	t.old = append(t.old[:0], p...)[:len(p)]
	if _, err := t.d.ReadAt(t.old, int64(off)); err != nil {
		clear(t.old) // damaged
		_, err := t.d.WriteAt(p, int64(off))
		return err
	}
	const step = store.ExtentBlocksMax * block.Size
	for from := 0; from < len(p); {
		// One write for a run that differs.
		to := from
		for to < len(p) && !bytes.Equal(p[to:min(to+step, len(p))], t.old[to:min(to+step, len(p))]) {
			to = min(to+step, len(p))
		}
		if to == from {
			from += step
			continue
		}
		if _, err := t.d.WriteAt(p[from:to], int64(off)+int64(from)); err != nil {
			return err
		}
		from = to
	}
	return nil
}

// Zero implements transfer.Target.
func (t *importTarget) Zero(ctx context.Context, off, n uint64) error {
	if !t.compare {
		return nil // a new device is zeros
	}
	return t.d.WriteZeroes(ctx, off, n, false)
}

// verifyStore reads the store in f, of which r tells what it should hold.
func verifyStore(ctx context.Context, cmd *cobra.Command, f disk.File, r *transfer.Report) error {
	d, err := device.Open(borrowed{f}, device.Options{ReadOnly: true, CacheBytes: 16 << 20, PayloadBytes: 4 << 20})
	if err != nil {
		return err
	}
	defer d.Close()
	snap, err := d.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer snap.Close()
	return r.Verify(ctx, &snapshotSource{snap: snap}, transferProgress(cmd.ErrOrStderr(), "verified", nil))
}

// snapshotSource is a snapshot as what is copied.
type snapshotSource struct {
	snap *device.Snapshot
	// What Next has asked for: a run from at to end.
	at, end uint64
	hole    bool
}

func (s *snapshotSource) Size() uint64 { return s.snap.Bytes() }
func (s *snapshotSource) Serial() bool { return false }

func (s *snapshotSource) ReadAt(ctx context.Context, p []byte, off uint64) error {
	return s.snap.ReadAt(ctx, p, off)
}

func (s *snapshotSource) Next(ctx context.Context, off uint64) (n uint64, hole bool, err error) {
	const most = 1 << 30 // of which the map is looked at for one run
	if off < s.at || off >= s.end {
		s.at, s.end = off, off
		err = s.snap.Allocation(ctx, off, min(most, s.Size()-off), func(n uint64, hole bool) bool {
			s.end, s.hole = off+n, hole
			return false
		})
	}
	return s.end - off, s.hole, err
}

// transferProgress shows how far a transfer is, on a terminal. appended tells how much
// has been stored, in what; it may be nil.
func transferProgress(w io.Writer, done string, appended func() (data, stored uint64)) func(at, total uint64) {
	line := statusLine(w)
	if line == nil {
		return nil
	}
	began, shown := time.Now(), time.Time{}
	return func(at, total uint64) {
		if at >= total {
			line("")
			return
		}
		if time.Since(shown) < 200*time.Millisecond {
			return
		}
		shown = time.Now()
		rate := float64(at) / time.Since(began).Seconds()
		ratio := ""
		if appended != nil {
			if data, stored := appended(); stored > 0 {
				ratio = fmt.Sprintf(", ratio %.2f", float64(data)/float64(stored))
			}
		}
		left := time.Duration(float64(total-at) / rate * float64(time.Second)).Round(time.Second)
		line("%s %3d %%: %s of %s, %s/s%s, %v left", done, 100*at/total, short(at), short(total), short(uint64(rate)), ratio, left)
	}
}
