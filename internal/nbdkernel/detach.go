package nbdkernel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An InUseError is that a device is not detached since somebody uses it.
type InUseError struct {
	Device Device
	Users  []string // "mounted on /srv", "swap", "held by dm-0"; empty: not known
}

func (e *InUseError) Error() string {
	users := strings.Join(e.Users, ", ")
	if users == "" {
		users = "opened for somebody alone" // mounted in another mount namespace, say
	}
	return fmt.Sprintf("%v is in use: %s", e.Device, users)
}

// A FlushError is that what was written to a device cannot be brought to the server.
type FlushError struct {
	Device Device
	Err    error
}

func (e *FlushError) Error() string {
	return fmt.Sprintf("%v: what was written to it cannot be flushed: %v", e.Device, e.Err)
}

func (e *FlushError) Unwrap() error { return e.Err }

// Detach ends what is attached to d, after everything written to the device has
// been flushed, and waits until the kernel has let go of it. A device that is
// mounted, swapped to or held by another is left alone with an [*InUseError]. One that
// cannot be flushed is left alone with a [*FlushError], unless force is set or it is
// dead: its connections have failed, so waiting saves nothing.
func Detach(ctx context.Context, d Device, force bool) (dead bool, err error) {
	if !d.Attached() {
		return false, fmt.Errorf("%v: %w", d, ErrNotAttached)
	}
	// While it is held like this, nobody can mount it. Not to be written: udev looks at
	// a device that a writer closes, and would do so while it goes away.
	f, err := os.OpenFile(d.String(), os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		users, err := d.users("/proc", "/sys")
		return false, errors.Join(&InUseError{d, users}, err)
	}
	if err != nil {
		return false, fmt.Errorf("detach: %w", err)
	}
	if err := lock(ctx, f); err != nil {
		f.Close()
		return false, errors.Join(&InUseError{d, []string{"locked by another program"}}, err)
	}
	if err := f.Sync(); err != nil {
		if dead = d.dead(); !dead && !force {
			f.Close()
			return false, &FlushError{d, err}
		}
	}
	err = disconnect(d)
	f.Close() // the last to hold it, so the kernel lets go
	if err != nil {
		return dead, fmt.Errorf("detach %v: %w", d, err)
	}
	return dead, d.waitDetached(ctx)
}

// Abandon detaches d, which nobody has used yet: nothing is flushed.
func Abandon(ctx context.Context, d Device) error {
	if err := GiveUp(d); err != nil {
		return err
	}
	return d.waitDetached(ctx)
}

// waitDetached waits until the kernel has let go of d, which is disconnected.
func (d Device) waitDetached(ctx context.Context) error {
	for d.Attached() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%v is detached, but somebody still has it open: %w", d, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// lock takes the lock by which udev and partitioning programs keep away from a block
// device (flock(2)), so that udev does not read a device that is on its way out, which
// is an I/O error in the kernel's log.
func lock(ctx context.Context, f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("flock", err)
		}
		select { // udev lets go when it has looked
		case <-ctx.Done():
			return fmt.Errorf("flock: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// dead tells whether the device answers nothing any more: not even its first block
// can be read, from the server and not from the page cache.
func (d Device) dead() bool {
	f, err := os.OpenFile(d.String(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(readFirst(f), unix.EIO)
}

// users tells who holds d or a partition of it, by the files of proc and sys,
// directories.
func (d Device) users(proc, sys string) ([]string, error) {
	name := filepath.Base(d.String())
	var users []string
	parts := []string{name}
	block := filepath.Join(sys, "block", name)
	more, err := filepath.Glob(filepath.Join(block, name+"p*"))
	for _, p := range more {
		parts = append(parts, filepath.Base(p))
	}
	errs := []error{err}
	for _, p := range parts {
		dir := block
		if p != name {
			dir = filepath.Join(block, p)
		}
		holders, err := os.ReadDir(filepath.Join(dir, "holders"))
		errs = append(errs, err)
		for _, h := range holders {
			users = append(users, p+" is held by "+h.Name())
		}
		number, err := os.ReadFile(filepath.Join(dir, "dev"))
		errs = append(errs, err)
		errs = append(errs, lines(filepath.Join(proc, "self/mountinfo"), func(fields []string) {
			// ID, parent, major:minor, root, mount point, options, other fields, "-", type,
			// source, options. The numbers are not the device's with Btrfs.
			for i, f := range fields {
				if f == "-" && i+2 < len(fields) && i > 4 &&
					(fields[2] == strings.TrimSpace(string(number)) || fields[i+2] == "/dev/"+p) {
					users = append(users, p+" is mounted on "+unescape(fields[4]))
				}
			}
		}))
		errs = append(errs, lines(filepath.Join(proc, "swaps"), func(fields []string) {
			if len(fields) > 0 && fields[0] == "/dev/"+p {
				users = append(users, p+" is swapped to")
			}
		}))
	}
	return users, errors.Join(errs...)
}

// lines calls each for the fields of every line of a file.
func lines(path string, each func(fields []string)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			each(strings.Fields(line))
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// unescape undoes the octal escapes of mountinfo.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
