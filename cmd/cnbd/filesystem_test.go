//go:build !race && !invariants

package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cnbd/internal/disktest"
)

// filesystems are those of the kernel that are put on a device. Each has the
// server under other settings, and another way to give space back.
var filesystems = []struct {
	name   string
	mkfs   []string
	fsck   []string // changes nothing, fails if anything is wrong
	sector string   // of the block device, in bytes
	serve  []string
	// mount is the option that chooses when space is given back: discard, at
	// each commit of the filesystem, or nodiscard, by fstrim alone.
	mount string
}{
	{
		name: "ext4", mkfs: []string{"mkfs.ext4", "-q"}, fsck: []string{"e2fsck", "-fn"}, sector: "4096",
		mount: "discard",
	},
	{
		// Sectors smaller than a block of the device: its log writes parts of blocks.
		name: "xfs", mkfs: []string{"mkfs.xfs", "-q"}, fsck: []string{"xfs_repair", "-n"}, sector: "512",
		mount: "nodiscard", serve: []string{"--cache", "32MiB", "--extent", "32KiB"},
	},
	{
		name: "btrfs", mkfs: []string{"mkfs.btrfs", "-q"}, fsck: []string{"btrfs", "check", "--readonly"}, sector: "4096",
		mount: "nodiscard", serve: []string{"--codec", "s2", "--extent", "128KiB"},
	},
}

const (
	// fillBytes is the least that the files of a filesystem hold.
	fillBytes = 500 << 20
	// hangLimit is three times what one filesystem takes on two busy processors,
	// and less than the time limit of the tests of a package.
	hangLimit = 2 * time.Minute
)

// TestFilesystems has a filesystem of the kernel on a device of the shipped
// program: FUSE (nbdfuse of libnbd) makes the export a file, and the loop driver
// a block device of that. Real files are written, changed and deleted, the server
// is stopped, and killed in the middle of writing; what the filesystem has synced
// must be there, byte by byte, and its own checker must agree.
func TestFilesystems(t *testing.T) {
	needRoot(t)
	needBlockDevice(t)
	tool(t, "fstrim")
	seed := disktest.Seed(t)
	sources := readSources(t)
	for i, f := range filesystems {
		t.Run(f.name, func(t *testing.T) {
			tool(t, f.mkfs[0])
			tool(t, f.fsck[0])
			needFilesystem(t, f.name)
			isolateMounts(t)

			rng := rand.New(rand.NewPCG(seed, uint64(i)))
			m := &machine{t: t, backing: filepath.Join(t.TempDir(), "disk"), sector: f.sector}
			serveArgs := append([]string{m.backing}, f.serve...)
			began, rounds := time.Now(), disktest.Scale(t)
			watch := time.AfterFunc(hangLimit*time.Duration(rounds), m.abort)
			t.Cleanup(func() { watch.Stop() })

			m.start(append(serveArgs, "--size", "3GiB")...)
			m.attach()
			do(t, f.mkfs[0], append(slices.Clone(f.mkfs[1:]), m.loop)...)
			tree := &fileTree{want: map[string]content{}, maybe: map[string]content{}}
			tree.root = m.mount(f.name, f.mount)
			tree.fill(t, sources, fillBytes)
			tree.sync(t)
			full := m.info()
			m.log(began, "filled: %d files of %d bytes", len(tree.want), tree.bytes())

			freed := tree.thin(t, rng)
			tree.sync(t)
			if f.mount != "discard" {
				do(t, "fstrim", m.mnt)
			}
			m.wantFreed(full, freed)
			m.log(began, "thinned: %d files of %d bytes, %d bytes freed", len(tree.want), tree.bytes(), freed)

			tree.change(t, rng, sources)
			tree.sync(t)
			do(t, "fstrim", m.mnt)
			m.log(began, "changed: %d files of %d bytes", len(tree.want), tree.bytes())
			m.unmount()
			m.detach()
			m.server.stop(t)
			m.check()

			m.start(serveArgs...)
			m.attach()
			do(t, f.fsck[0], append(slices.Clone(f.fsck[1:]), m.loop)...)
			tree.root = m.mount(f.name, "ro")
			tree.verify(t)
			m.unmount()
			m.log(began, "verified")

			for range rounds {
				tree.root = m.mount(f.name, f.mount)
				tree.settle(t)
				tree.writeUntilKilled(t, rng, sources, m.server)
				m.unmount()
				m.detach()
				m.check()

				m.start(serveArgs...)
				m.attach()
				m.mount(f.name, f.mount) // replays the journal
				m.unmount()
				do(t, f.fsck[0], append(slices.Clone(f.fsck[1:]), m.loop)...)
				tree.root = m.mount(f.name, "ro")
				tree.verify(t)
				m.unmount()
			}
			m.log(began, "killed and verified: %d files of %d bytes", len(tree.want), tree.bytes())
			m.detach()
			m.server.stop(t)
			m.check()
		})
	}
}

// needBlockDevice skips a test where attach and mount cannot work.
func needBlockDevice(t *testing.T) {
	t.Helper()
	for _, name := range []string{"nbdfuse", "losetup", "mount", "umount"} {
		tool(t, name)
	}
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skipf("MISSING: FUSE: %v", err)
	} else {
		f.Close()
	}
	if r := try(t, "losetup", "-f"); r.status != 0 {
		t.Skipf("MISSING: loop devices: %s", r.stderr)
	} else if _, err := os.Stat(strings.TrimSpace(r.stdout)); err != nil {
		t.Skipf("MISSING: a free loop device: %v", err) // as in a container
	}
}

// needFilesystem skips a test of a filesystem that the kernel does not have.
func needFilesystem(t *testing.T, name string) {
	t.Helper()
	if modprobe, err := exec.LookPath("modprobe"); err == nil {
		try(t, modprobe, "-q", name)
	}
	list, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(strings.Fields(string(list)), name) {
		t.Skipf("MISSING: %s in the kernel", name)
	}
}

// isolateMounts gives the goroutine of t, and what it executes, a mount namespace
// of its own, so that nobody else sees what is mounted, and nothing stays mounted
// when the test dies.
func isolateMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // for good: the thread ends with the goroutine
	if err := unix.Unshare(unix.CLONE_NEWNS); errors.Is(err, unix.EPERM) {
		t.Skip("needs CAP_SYS_ADMIN")
	} else if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
}

// A machine is a server and what stands on it: nbdfuse, a loop device, a mounted
// filesystem. All but abort is for the goroutine of t.
type machine struct {
	t       *testing.T
	backing string
	sector  string
	server  *server

	dir     string // where nbdfuse has its file
	nbdfuse *exec.Cmd
	ended   chan struct{} // closed when nbdfuse has ended
	fuseLog *lockedBuffer

	loop   string   // path of the loop device
	loopFD *os.File // the kernel detaches the device when this was its last user

	mnt  string // where the filesystem is mounted, "" if it is not
	root *os.Root

	mu      sync.Mutex
	current *server // what abort ends
}

// abort is called when the test hangs. Without its server every request fails, so
// the kernel lets go of whoever waits for one.
func (m *machine) abort() {
	m.mu.Lock()
	s := m.current
	m.mu.Unlock()
	_ = s.cmd.Process.Signal(syscall.SIGQUIT) // its goroutines are in its log then
	select {
	case <-s.exited:
	case <-time.After(10 * time.Second):
		_ = s.cmd.Process.Kill()
	}
	m.t.Errorf("hangs; the server was ended, its log is\n%s", s.log)
}

func (m *machine) start(args ...string) {
	m.t.Helper()
	s := serve(m.t, args...)
	m.server = s
	m.mu.Lock()
	m.current = s
	m.mu.Unlock()
}

// check has the store proven whole. The server has ended, and must never have had
// to report an error.
func (m *machine) check() {
	m.t.Helper()
	if log := m.server.log.String(); strings.Contains(log, `"level":"error"`) {
		m.t.Errorf("errors in the log of the server:\n%s", tail(log, 4000))
	}
	m.t.Logf("check: %s", strings.TrimSpace(do(m.t, binary, "check", "--data", m.backing)))
}

func (m *machine) info() *storeStatus {
	m.t.Helper()
	st := &storeStatus{}
	if err := json.Unmarshal([]byte(do(m.t, binary, "info", "--json", m.backing)), st); err != nil {
		m.t.Fatal(err)
	}
	if !st.Healthy {
		m.t.Fatalf("the store is damaged: %+v", st)
	}
	return st
}

// log tells what has been done since began, and what the store takes for it.
func (m *machine) log(began time.Time, format string, args ...any) {
	m.t.Helper()
	st := &m.info().Store
	peak := "?"
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.server.cmd.Process.Pid)); err == nil {
		_, after, _ := strings.Cut(string(status), "VmHWM:")
		line, _, _ := strings.Cut(after, "\n")
		peak = strings.TrimSpace(line)
	}
	m.t.Logf("%s; data_bytes %d, stored_bytes %d, ratio %.2f, host_bytes %d; peak memory %s; %.1f s",
		fmt.Sprintf(format, args...), st.DataBytes, st.StoredBytes, st.Ratio(), st.HostBytes, peak, time.Since(began).Seconds())
}

// wantFreed waits until the store holds less data than when it was full, by nearly
// all that was freed, and its host has space back. Filesystems discard in the
// background.
func (m *machine) wantFreed(full *storeStatus, freed int64) {
	m.t.Helper()
	var data, stored, host int64
	for range 100 {
		st := m.info() // takes a checkpoint; two of them free a segment
		data = int64(full.Store.DataBytes) - int64(st.Store.DataBytes)
		stored = int64(full.Store.StoredBytes) - int64(st.Store.StoredBytes)
		host = int64(full.Store.HostBytes) - int64(st.Store.HostBytes)
		if data >= freed*9/10 && host >= stored/2 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	m.t.Errorf("files of %d bytes were deleted; the store has %d bytes less of data, %d less of stored bytes, %d less of its host",
		freed, data, stored, host)
}

// attach makes the export of the server a block device.
func (m *machine) attach() {
	t := m.t
	t.Helper()
	m.dir = t.TempDir()
	file := filepath.Join(m.dir, "nbd")
	cmd, ended := exec.Command("nbdfuse", m.dir, m.server.uri), make(chan struct{})
	m.fuseLog = &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = m.fuseLog, m.fuseLog
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.nbdfuse, m.ended = cmd, ended
	go func() {
		_ = cmd.Wait() // cmd.ProcessState tells
		close(ended)
	}()
	t.Cleanup(m.drop)
	m.until("nbdfuse shows its file", func() bool { _, err := os.Stat(file); return err == nil })

	m.loop = strings.TrimSpace(do(t, "losetup", "-f", "--show", "--sector-size", m.sector, file))
	var err error
	if m.loopFD, err = os.Open(m.loop); err != nil {
		try(t, "losetup", "-d", m.loop)
		t.Fatal(err)
	}
	// While it is in use that has it detached as soon as it is not.
	do(t, "losetup", "-d", m.loop)
	// Without, everything is in the host's page cache twice; that works as well.
	if r := try(t, "losetup", "--direct-io=on", m.loop); r.status != 0 {
		t.Logf("no direct I/O: %s", r.stderr)
	}
}

// until waits until ok, which comes soon.
func (m *machine) until(what string, ok func() bool) {
	m.t.Helper()
	for began := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			m.t.Fatalf("not after 20 s: %s\n%s", what, m.fuseLog)
		}
	}
}

// mount mounts the block device and returns the root of the filesystem, which is
// valid until unmount.
func (m *machine) mount(filesystem, options string) *os.Root {
	t := m.t
	t.Helper()
	dir := t.TempDir()
	do(t, "mount", "-t", filesystem, "-o", options, m.loop, dir)
	m.mnt = dir
	var err error
	if m.root, err = os.OpenRoot(dir); err != nil {
		t.Fatal(err)
	}
	return m.root
}

func (m *machine) unmount() {
	m.t.Helper()
	m.root.Close()
	do(m.t, "umount", m.mnt)
	m.mnt = ""
}

// detach undoes attach. It is an error if the loop device or its file is still
// in use, or if nbdfuse fails while its server is there.
func (m *machine) detach() {
	t := m.t
	t.Helper()
	m.loopFD.Close()
	m.loopFD = nil
	// Whatever watches block devices may still be looking at it.
	m.until("the file of the loop device is free", func() bool { return try(t, "umount", m.dir).status == 0 })
	m.until("nbdfuse has ended", func() bool { return hasEnded(m.ended) })
	if !m.nbdfuse.ProcessState.Success() && !hasEnded(m.server.exited) {
		t.Errorf("nbdfuse: %v\n%s", m.nbdfuse.ProcessState, m.fuseLog)
	}
	m.nbdfuse = nil
}

// drop undoes mount and attach as far as they were done, whatever state things
// are in: it waits for nothing long, and does not fail.
func (m *machine) drop() {
	// A child that waits for a device which does not answer cannot be killed.
	run := func(name string, args ...string) bool {
		cmd, done := exec.Command(name, args...), make(chan error, 1)
		if cmd.Start() != nil {
			return false
		}
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			return err == nil
		case <-time.After(20 * time.Second):
			m.t.Errorf("%s %q hangs", name, args)
			return false
		}
	}
	if m.nbdfuse == nil {
		return
	}
	if m.mnt != "" {
		m.root.Close()
		if !run("umount", m.mnt) {
			_ = m.nbdfuse.Process.Kill() // fails all requests
			run("umount", "-l", m.mnt)
		}
		m.mnt = ""
	}
	if m.loopFD != nil {
		m.loopFD.Close()
		m.loopFD = nil
	}
	run("umount", "-l", m.dir)
	select {
	case <-m.ended:
	case <-time.After(5 * time.Second):
		_ = m.nbdfuse.Process.Kill()
		<-m.ended
	}
	m.nbdfuse = nil
}

func hasEnded(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// A content is what a file must hold.
type content [sha256.Size]byte

func contentOf(p []byte) content { return sha256.Sum256(p) }

// A sourceFile is a file of the Go toolchain.
type sourceFile struct {
	path string // below GOROOT
	data []byte
}

// readSources reads the programs, tools and sources of the Go toolchain.
func readSources(t *testing.T) []sourceFile {
	t.Helper()
	goroot := strings.TrimSpace(do(t, "go", "env", "GOROOT"))
	var all []sourceFile
	for _, top := range []string{"src", "pkg/tool", "bin"} {
		dir, err := filepath.EvalSymlinks(filepath.Join(goroot, top)) // distributions link them
		if err != nil {
			t.Fatal(err)
		}
		err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(name)
			rel, _ := filepath.Rel(dir, name)
			all = append(all, sourceFile{path.Join(top, filepath.ToSlash(rel)), data})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(all) < 1000 {
		t.Fatalf("%d files in %s", len(all), goroot)
	}
	return all
}

// A fileTree is the files of a filesystem, and what they must be. Paths are below
// its root.
type fileTree struct {
	root *os.Root
	want map[string]content
	// maybe are the files that were deleted since the last sync, and so may be
	// there, with what they then must hold, or were made since, with the zero
	// content: these may hold anything after a crash.
	maybe map[string]content
	size  map[string]int64 // of the files of want
	from  map[string]int   // and which source they are a copy of
}

// bytes is how much the files hold.
func (f *fileTree) bytes() (n int64) {
	for _, size := range f.size {
		n += size
	}
	return n
}

// names are the paths of all files, in order.
func (f *fileTree) names() []string { return slices.Sorted(maps.Keys(f.want)) }

// fill writes copies of all sources until they hold so many bytes.
func (f *fileTree) fill(t *testing.T, sources []sourceFile, bytes int64) {
	t.Helper()
	sums := make([]content, len(sources))
	for i, s := range sources {
		sums[i] = contentOf(s.data)
	}
	type job struct {
		name string
		data []byte
	}
	jobs := make(chan job, 64)
	written := inParallel(func() error {
		for j := range jobs {
			if err := f.write(j.name, j.data); err != nil {
				for range jobs { // lets the sender go on
				}
				return err
			}
		}
		return nil
	})
	f.size, f.from = map[string]int64{}, map[string]int{}
	for n, total := 0, int64(0); total < bytes; n++ {
		i, copied := n%len(sources), n/len(sources)+1
		s := sources[i]
		name := fmt.Sprintf("copy%d/%s.%d", copied, s.path, copied)
		jobs <- job{name, s.data}
		f.want[name], f.size[name], f.from[name] = sums[i], int64(len(s.data)), i
		total += int64(len(s.data))
	}
	close(jobs)
	if err := written(); err != nil {
		t.Fatal(err)
	}
}

// inParallel runs work in a few goroutines. What it returns waits for them.
func inParallel(work func() error) (wait func() error) {
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = work() })
	}
	return func() error { wg.Wait(); return errors.Join(errs...) }
}

// write makes a file and its directories. It may be called concurrently.
func (f *fileTree) write(name string, data []byte) error {
	if err := f.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	return f.root.WriteFile(name, data, 0o644)
}

// thin deletes the copy that was written first, and so whole segments, and one in
// eight of the other files. It returns how much that was in whole blocks, which no
// filesystem keeps elsewhere than in blocks of their own.
func (f *fileTree) thin(t *testing.T, rng *rand.Rand) (freed int64) {
	t.Helper()
	for _, name := range f.names() {
		if !strings.HasPrefix(name, "copy1/") && rng.IntN(8) != 0 {
			continue
		}
		freed += f.size[name] &^ 4095
		f.remove(name)
		if err := f.root.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	return freed
}

// change overwrites, lengthens, truncates and renames half of the files.
func (f *fileTree) change(t *testing.T, rng *rand.Rand, sources []sourceFile) {
	t.Helper()
	for i, name := range f.names() {
		data := sources[f.from[name]].data
		other := sources[rng.IntN(len(sources))].data
		if len(other) > 1<<20 {
			other = other[rng.IntN(len(other)-1<<20):][:1<<20]
		}
		if len(other) == 0 {
			continue
		}
		var err error
		switch rng.IntN(12) {
		case 0: // in place; behind the end it grows
			at := rng.IntN(len(data) + 1)
			data = overlay(data, other, at)
			err = f.writeAt(name, 0, other, int64(at))
		case 1: // behind a hole
			at := len(data) + rng.IntN(256<<10)
			data = overlay(data, other, at)
			err = f.writeAt(name, 0, other, int64(at))
		case 2:
			data = overlay(data, other, len(data))
			err = f.writeAt(name, os.O_APPEND, other, 0)
		case 3:
			data = data[:rng.IntN(len(data)+1)]
			err = f.truncate(name, int64(len(data)))
		case 4: // from the beginning
			data = other
			err = f.root.WriteFile(name, data, 0o644)
		case 5:
			to := fmt.Sprintf("renamed/%d/%d", i%50, i)
			err = errors.Join(f.root.MkdirAll(path.Dir(to), 0o755), f.root.Rename(name, to))
			f.from[to] = f.from[name]
			f.remove(name)
			name = to
		default:
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		f.want[name], f.size[name] = contentOf(data), int64(len(data))
	}
}

// overlay is a file of data after a write of p at an offset.
func overlay(data, p []byte, at int) []byte {
	out := make([]byte, max(len(data), at+len(p)))
	copy(out, data)
	copy(out[at:], p)
	return out
}

// remove takes a file out of the books.
func (f *fileTree) remove(name string) {
	delete(f.want, name)
	delete(f.size, name)
	delete(f.from, name)
}

// writeAt writes to a file at an offset, or with os.O_APPEND at its end.
func (f *fileTree) writeAt(name string, flag int, p []byte, off int64) error {
	file, err := f.root.OpenFile(name, os.O_WRONLY|flag, 0)
	if err != nil {
		return err
	}
	if flag&os.O_APPEND != 0 {
		_, err = file.Write(p)
	} else {
		_, err = file.WriteAt(p, off)
	}
	return errors.Join(err, file.Close())
}

func (f *fileTree) truncate(name string, size int64) error {
	file, err := f.root.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(file.Truncate(size), file.Close())
}

// sync has the filesystem write everything, of which it then is sure.
func (f *fileTree) sync(t *testing.T) {
	t.Helper()
	if err := f.syncfs(); err != nil {
		t.Fatal(err)
	}
	clear(f.maybe)
}

func (f *fileTree) syncfs() error {
	dir, err := f.root.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(dir.Fd())))
}

// writeUntilKilled makes and deletes files, with a sync now and then, until the
// server, which is killed in the middle of it, does not take them any more.
func (f *fileTree) writeUntilKilled(t *testing.T, rng *rand.Rand, sources []sourceFile, s *server) {
	t.Helper()
	var killed atomic.Bool
	after := 300*time.Millisecond + time.Duration(rng.IntN(1500))*time.Millisecond
	time.AfterFunc(after, func() { killed.Store(true); s.kill() })
	defer func() { <-s.exited }()

	names := f.names()
	rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	syncs := 0
	for n := 0; ; n++ {
		source := rng.IntN(len(sources))
		data := sources[source].data
		name := fmt.Sprintf("killed/%d/%x", n%20, rng.Uint64())
		f.maybe[name] = content{}
		err := f.write(name, data)
		if err == nil {
			f.want[name], f.size[name], f.from[name] = contentOf(data), int64(len(data)), source
			if n < len(names) {
				f.maybe[names[n]] = f.want[names[n]]
				f.remove(names[n])
				err = f.root.Remove(names[n])
			}
		}
		if err == nil && n%40 == 39 {
			// What was answered after the kill may be an error that the
			// filesystem has kept to itself.
			if err = f.syncfs(); err == nil && !killed.Load() {
				clear(f.maybe)
				syncs++
			}
		}
		if killed.Load() {
			t.Logf("killed after %v, %d files and %d syncs: %d files are uncertain; last error: %v", after, n, syncs, len(f.maybe), err)
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name := range f.maybe {
		f.remove(name)
	}
}

// settle deletes what verify could not be sure of.
func (f *fileTree) settle(t *testing.T) {
	t.Helper()
	for name := range f.maybe {
		if err := f.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	f.sync(t)
}

// verify reads all files: each must hold what it should, none may be missing, and
// none may be there that should not.
func (f *fileTree) verify(t *testing.T) {
	t.Helper()
	names, faults, found := make(chan string, 64), atomic.Int64{}, atomic.Int64{}
	fault := func(format string, args ...any) {
		if faults.Add(1) <= 20 {
			t.Errorf(format, args...)
		}
	}
	read := inParallel(func() error {
		h, sum := sha256.New(), content{}
		for name := range names {
			must, sure := f.want[name]
			may, known := f.maybe[name]
			if !sure && !known {
				fault("%s: unexpected file", name)
				continue
			}
			if sure {
				found.Add(1)
			} else if must = may; must == (content{}) {
				continue
			}
			file, err := f.root.Open(name)
			if err != nil {
				fault("%v", err)
				continue
			}
			h.Reset()
			n, err := io.Copy(h, file)
			file.Close()
			if err != nil {
				fault("%s: %v", name, err)
			} else if h.Sum(sum[:0]); sum != must {
				fault("%s: wrong content in %d bytes, which should be %d", name, n, f.size[name])
			}
		}
		return nil
	})
	err := fs.WalkDir(f.root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			names <- name
		}
		return err
	})
	close(names)
	if err := errors.Join(err, read()); err != nil {
		t.Fatal(err)
	}
	if n := int(found.Load()); n != len(f.want) {
		fault("%d of %d files are there", n, len(f.want))
	}
	if faults.Load() > 0 {
		t.FailNow()
	}
}
