// Package nbdkernel attaches NBD exports to the block devices of the kernel's nbd
// driver, by its generic netlink interface, and detaches them.
//
// The kernel takes sockets that are past the negotiation and sends the requests
// itself, so no process has to stay. What it tells of a device beside netlink is in
// sysfs: /sys/block/nbdN/pid is there while the device is attached, and queue/ has
// its limits. The numbers of commands and attributes are those of
// include/uapi/linux/nbd-netlink.h.
package nbdkernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Of the generic netlink family "nbd".
const (
	family  = "nbd"
	version = 1

	cmdConnect     = 1
	cmdDisconnect  = 2
	cmdReconfigure = 3
	cmdLinkDead    = 4

	groupEvents = "nbd_mc_group"

	attrIndex           = 1
	attrSize            = 2 // bytes
	attrBlockSize       = 3 // bytes
	attrTimeout         = 4 // seconds
	attrServerFlags     = 5
	attrSockets         = 7
	attrDeadConnTimeout = 8  // seconds
	attrBackend         = 10 // Linux 5.14; older ones ignore it

	sockItem = 1 // in attrSockets
	sockFD   = 1 // in sockItem
)

var (
	// ErrNoModule is that the kernel has no nbd driver at the moment.
	ErrNoModule = errors.New("the kernel's nbd driver is not loaded: modprobe nbd")
	// ErrBusy is that the device is attached already, or still open since it was.
	ErrBusy = errors.New("device is attached already, or is still in use from before")
	// ErrPermission is that the process may not do this: it takes CAP_SYS_ADMIN.
	ErrPermission = errors.New("not permitted, it takes root (CAP_SYS_ADMIN)")
	// ErrNotAttached is that nothing is attached to the device.
	ErrNotAttached = errors.New("nothing is attached")
	// ErrSilent is that a connection has been handed to the kernel and nothing comes
	// back over it. That is the server's doing, or the kernel's: it receives by a thread
	// for each connection that it starts then, and where starting threads is slow (10
	// ms) gives all connections to a single one, which never gets to the second (Linux
	// 6.1; the rescuer of a work queue). The threads stay for some minutes, so that
	// attaching again helps.
	ErrSilent = errors.New("a connection does not answer")
)

// A Device is a device of the driver, by its number.
type Device uint32

// ParseDevice takes the path of a device, /dev/nbdN, which need not exist, or
// a link to one.
func ParseDevice(path string) (Device, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		real = filepath.Clean(path)
	}
	digits, ok := strings.CutPrefix(real, "/dev/nbd")
	n, err := strconv.ParseUint(digits, 10, 20) // what a minor number has
	if !ok || err != nil || strconv.FormatUint(n, 10) != digits {
		return 0, fmt.Errorf("%s is no device of the kernel's nbd driver, /dev/nbd0 is one", path)
	}
	return Device(n), nil
}

func (d Device) String() string { return fmt.Sprintf("/dev/nbd%d", uint32(d)) }

// sysfs is the path of name in the device's directory.
func (d Device) sysfs(name string) string {
	return filepath.Join(fmt.Sprintf("/sys/block/nbd%d", uint32(d)), name)
}

// Attached tells whether something is attached.
func (d Device) Attached() bool {
	_, err := os.Stat(d.sysfs("pid"))
	return err == nil
}

// Backend is what the device was attached to, as [Config.Backend] had it; empty
// if it is not known.
func (d Device) Backend() string {
	b, _ := os.ReadFile(d.sysfs("backend"))
	return strings.TrimSpace(string(b))
}

// A Config is what Connect tells the kernel.
type Config struct {
	Sockets   []*os.File // past the negotiation; borrowed, the kernel keeps its own references
	Size      uint64     // of the device in bytes, a multiple of BlockSize
	BlockSize uint32     // in bytes, a power of two from 512 to 4096: what requests are multiples of
	Flags     uint16     // transmission flags of the export
	Backend   string     // told by [Device.Backend]

	// Timeout, in whole seconds, is how long a request may take before its
	// connection is given up. Zero: for ever.
	Timeout time.Duration
	// DeadConnTimeout, in whole seconds, is how long requests wait for another
	// connection when all are dead, before they fail. Zero: not at all.
	DeadConnTimeout time.Duration
}

// Connect attaches d. The device is there when it returns; [Device.WaitReady]
// waits until it is of use.
func Connect(d Device, c Config) error {
	if err := execute(cmdConnect, c.attributes(d)); err != nil {
		return fmt.Errorf("attach %v: %w", d, err)
	}
	return nil
}

// attributes are those of the message that attaches d.
func (c *Config) attributes(d Device) *netlink.AttributeEncoder {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(d))
	e.Uint64(attrSize, c.Size)
	e.Uint64(attrBlockSize, uint64(c.BlockSize))
	e.Uint64(attrTimeout, uint64(c.Timeout/time.Second))
	e.Uint64(attrDeadConnTimeout, uint64(c.DeadConnTimeout/time.Second))
	e.Uint64(attrServerFlags, uint64(c.Flags))
	putSockets(e, c.Sockets)
	e.String(attrBackend, c.Backend)
	return e
}

// putSockets adds the attribute for sockets.
func putSockets(e *netlink.AttributeEncoder, sockets []*os.File) {
	e.Nested(attrSockets, func(e *netlink.AttributeEncoder) error {
		for _, f := range sockets {
			e.Nested(sockItem, func(e *netlink.AttributeEncoder) error {
				e.Uint32(sockFD, uint32(f.Fd()))
				return nil
			})
		}
		return nil
	})
}

// Resize tells the kernel that the export of d has another size by now, in bytes, a
// multiple of its block size. What the device was attached to is [Device.Backend].
// Requests go on meanwhile. It takes a device that was attached by netlink.
func Resize(d Device, size uint64) error {
	e := reconfigureAttributes(d, d.Backend())
	e.Uint64(attrSize, size)
	if err := execute(cmdReconfigure, e); err != nil {
		return fmt.Errorf("resize %v: %w", d, err)
	}
	return nil
}

// reconfigureAttributes begin the message that changes something of d. The kernel
// compares backend with what it was given, if it was.
func reconfigureAttributes(d Device, backend string) *netlink.AttributeEncoder {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(d))
	if backend != "" {
		e.String(attrBackend, backend)
	}
	return e
}

// Reconnect gives d new connections in the place of dead ones, which must be past the
// negotiation of the same export; those that there is no dead one for are not used. The
// sockets are borrowed. What was sent on a dead one and not answered is sent again.
func Reconnect(d Device, sockets []*os.File) error {
	e := reconfigureAttributes(d, d.Backend())
	putSockets(e, sockets)
	if err := execute(cmdReconfigure, e); err != nil {
		return fmt.Errorf("connect %v again: %w", d, err)
	}
	return nil
}

// GiveUp disconnects d, whatever uses it: every request fails from now on.
func GiveUp(d Device) error {
	if err := disconnect(d); err != nil {
		return fmt.Errorf("disconnect %v: %w", d, err)
	}
	return nil
}

// disconnect tells the server good-bye and fails what is waiting.
func disconnect(d Device) error {
	e := netlink.NewAttributeEncoder()
	e.Uint32(attrIndex, uint32(d))
	return execute(cmdDisconnect, e)
}

// execute has the driver do one command.
func execute(cmd uint8, e *netlink.AttributeEncoder) error {
	data, err := e.Encode()
	if err != nil {
		return err
	}
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	f, err := conn.GetFamily(family)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoModule
	}
	if err != nil {
		return err
	}
	_, err = conn.Execute(genetlink.Message{Header: genetlink.Header{Command: cmd, Version: version}, Data: data},
		f.ID, netlink.Request|netlink.Acknowledge)
	switch {
	case errors.Is(err, unix.EPERM):
		return ErrPermission
	case errors.Is(err, unix.EBUSY):
		return ErrBusy
	}
	return err
}

// Size is the size of the device in bytes, 0 if nothing is attached.
func (d Device) Size() (uint64, error) {
	b, err := os.ReadFile(d.sysfs("size"))
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64) // sectors of 512 bytes
	return n * 512, err
}

// WaitReady waits until the attached device shows its size and the first block
// has been read over each of its connections. It is [ErrSilent] if one has not
// answered when ctx ends: reads still wait for it then, until d is disconnected.
func (d Device) WaitReady(ctx context.Context, size uint64) error {
	for {
		n, err := d.Size()
		if err == nil && n == size {
			break
		}
		if err == nil {
			err = fmt.Errorf("it has %d bytes, not %d", n, size)
		}
		select { // nothing tells of it but udev, which need not be there
		case <-ctx.Done():
			return fmt.Errorf("%v does not get ready: %w", d, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
	cpus, err := processors(d.sysfs("mq"))
	if err != nil {
		return err
	}
	answers := make(chan error, len(cpus))
	for _, cpu := range cpus {
		go func() { answers <- d.readOn(cpu) }()
	}
	for range cpus {
		select {
		case err := <-answers:
			if err != nil {
				return fmt.Errorf("%v does not get ready: %w", d, err)
			}
		case <-ctx.Done():
			return fmt.Errorf("%v: %w", d, ErrSilent)
		}
	}
	return nil
}

// processors is one processor for each hardware queue of a device, whose directory
// of queues is mq. A queue is a connection, and takes the requests of its processors.
func processors(mq string) ([]int, error) {
	lists, err := filepath.Glob(filepath.Join(mq, "*", "cpu_list"))
	if err != nil {
		return nil, err
	}
	var cpus []int
	for _, path := range lists {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		first, _, _ := strings.Cut(strings.TrimSpace(string(b)), ",")
		if first == "" {
			continue // never used
		}
		cpu, err := strconv.Atoi(first)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		cpus = append(cpus, cpu)
	}
	return cpus, nil
}

// readOn reads the first block over the connection that serves a processor.
func (d Device) readOn(cpu int) error {
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not for us to use
		return os.NewSyscallError("sched_setaffinity", err)
	}
	f, err := os.OpenFile(d.String(), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return readFirst(f)
}

// readFirst reads the first block of a device that is open for direct I/O.
func readFirst(f *os.File) error {
	block, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(block)
	if _, err := f.ReadAt(block, 0); err != io.EOF { // of a device that is smaller
		return err
	}
	return nil
}

// SetRequestMax sets how large a request the kernel makes, in bytes, as far as the
// driver allows.
func (d Device) SetRequestMax(n int64) error {
	most, err := os.ReadFile(d.sysfs("queue/max_hw_sectors_kb"))
	if err != nil {
		return err
	}
	hw, err := strconv.ParseInt(strings.TrimSpace(string(most)), 10, 64)
	if err != nil {
		return err
	}
	return os.WriteFile(d.sysfs("queue/max_sectors_kb"), []byte(strconv.FormatInt(min(n>>10, hw), 10)), 0)
}
