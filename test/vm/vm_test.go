// Package vm tests cnbd under a kernel with the nbd driver and systemd as init, in a
// virtual machine of qemu in software emulation (make test-vm). scripts/vm-image.sh
// makes what it boots, and guest/ has what runs in it.
package vm

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

// needless are units of Debian's that are masked: emulation makes each of them
// seconds.
var needless = []string{"systemd-binfmt.service", "systemd-logind.service", "systemd-user-sessions.service", "systemd-sysusers.service",
	"systemd-journal-catalog-update.service", "systemd-update-done.service", "systemd-firstboot.service", "systemd-pcrphase.service",
	"systemd-pcrphase-sysinit.service", "systemd-pcrmachine.service", "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
	"sys-kernel-tracing.mount", "sys-kernel-config.mount", "sys-fs-fuse-connections.mount", "modprobe@configfs.service", "modprobe@fuse.service",
	"modprobe@efi_pstore.service", "modprobe@drm.service", "modprobe@dm_mod.service", "modprobe@loop.service", "networking.service"}

// filesystems are those of guest/run.
var filesystems = []string{"ext4", "xfs", "btrfs"}

// A machine is a disk that boots. It keeps what was written to it.
type machine struct {
	t       *testing.T
	image   string // directory of what scripts/vm-image.sh has made
	dir     string
	console string        // file that has what all boots have printed
	bootMax time.Duration // longest time of one boot with its test
	boots   int
}

// newMachine makes a machine in the first state. The test is skipped where there
// is no image.
func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, image: os.Getenv("CNBD_VM"), dir: t.TempDir(), bootMax: 15 * time.Minute}
	if m.image == "" {
		t.Skip("CNBD_VM names no image: make test-vm")
	}
	m.console = filepath.Join(m.image, "log", t.Name()) // kept, to be read while it runs and afterwards
	if err := os.MkdirAll(filepath.Dir(m.console), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.console, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	command(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Join(m.image, "root.img"), "-F", "raw", m.path("disk.qcow2"))
	payload := m.path("payload")
	command(t, "cp", "-r", "guest", payload)
	command(t, "cp", os.Getenv("CNBD_DEB"), filepath.Join(payload, "cnbd.deb"))
	command(t, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", payload, m.path("payload.img"), "96M")
	return m
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// A boot is one life of a machine.
type boot struct {
	m     *machine
	cmd   *exec.Cmd
	lines chan string // that the guest tells; closed when the emulator has ended
	timer *time.Timer
}

// boot starts the machine to run the test of that name, with settings that the
// guest has as vm_KEY.
func (m *machine) boot(test string, settings map[string]string) *boot {
	m.t.Helper()
	m.boots++
	words := []string{"console=ttyS0", "panic=-1", "quiet", "mitigations=off", "no_timer_check", "systemd.journald.max_level_console=info", "vm.run=" + test}
	for _, unit := range needless {
		words = append(words, "systemd.mask="+unit)
	}
	for _, k := range slices.Sorted(maps.Keys(settings)) {
		words = append(words, "vm."+k+"="+settings[k])
	}
	cmd := exec.Command("nice", "-n", "5", "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem,+rdrand", "-smp", "2", "-m", "1024",
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", filepath.Join(m.image, "vmlinuz"), "-initrd", filepath.Join(m.image, "initrd"), "-append", strings.Join(words, " "),
		"-drive", "if=virtio,format=qcow2,cache=writeback,discard=unmap,file="+m.path("disk.qcow2"),
		"-drive", "if=virtio,format=raw,readonly=on,file="+m.path("payload.img"),
		"-chardev", "file,id=console,append=on,path="+m.console, "-serial", "chardev:console", "-serial", "stdio")
	out, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	stderr := &strings.Builder{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	b := &boot{m: m, cmd: cmd, lines: make(chan string, 1024)}
	b.timer = time.AfterFunc(m.bootMax, func() { _ = cmd.Process.Kill() })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(b.lines)
		r := bufio.NewReader(out)
		for {
			line, err := r.ReadString('\n')
			if err != nil { // a line that is cut off was not told
				break
			}
			b.lines <- strings.TrimSpace(line)
		}
		_, _ = io.Copy(io.Discard, r)
		_ = cmd.Wait()
	}()
	boots := m.boots
	m.t.Cleanup(func() {
		b.timer.Stop()
		_ = cmd.Process.Kill()
		for range b.lines {
		}
		<-ended
		if m.t.Failed() {
			if stderr.Len() > 0 {
				m.t.Logf("qemu: %s", stderr)
			}
			if text, err := os.ReadFile(m.console); err == nil && boots == m.boots {
				m.t.Logf("the last of the console:\n%s", text[max(0, len(text)-4000):])
			}
		}
	})
	return b
}

// each calls f for the lines that the guest tells, until f returns false or the
// emulator ends, which each returns as true. What has failed in the guest fails the
// test.
func (b *boot) each(f func(word, rest string) bool) (ended bool) {
	t := b.m.t
	t.Helper()
	for line := range b.lines {
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case "ok", "note":
			t.Log(line)
		case "fail":
			t.Error(line)
			for line := range b.lines {
				t.Log(line)
			}
			t.FailNow()
		}
		if !f(word, rest) {
			return false
		}
	}
	return true
}

// wait waits until the test in the guest has passed and the machine is off.
func (b *boot) wait() {
	t := b.m.t
	t.Helper()
	passed := false
	var end time.Time
	b.each(func(word, _ string) bool {
		if word == "end" {
			passed, end = true, time.Now()
		}
		return true
	})
	if !passed {
		t.Fatalf("the machine has ended before its test, or has taken longer than %v", b.m.bootMax)
	}
	if !b.timer.Stop() {
		t.Fatalf("the test has passed, but the machine has not gone off in %v", b.m.bootMax)
	}
	t.Logf("off %.0f s after the test", time.Since(end).Seconds())
}

// quiet looks for what the console must not show of the boots so far.
func (m *machine) quiet() {
	m.t.Helper()
	text, err := os.ReadFile(m.console)
	if err != nil {
		m.t.Fatal(err)
	}
	// A device that was attached again, because a connection of it did not answer, has
	// failed the reads of udev. It was of no use to anybody yet.
	retried := strings.Contains(string(text), "attaching again")
	for _, bad := range []string{"I/O error", "Connection timed out", "blocked for more than", "Failed unmounting", "Failed to start", "Failed with result", "WARNING: CPU", "BUG:", "Oops"} {
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, bad) && !(retried && (strings.Contains(line, "op 0x0:(READ)") || strings.Contains(line, "async page read"))) {
				m.t.Errorf("console: %s", strings.TrimSpace(line))
			}
		}
	}
}

func TestFilesystems(t *testing.T) {
	m := newMachine(t)
	m.bootMax *= 3
	m.boot("filesystems", map[string]string{"seed": strconv.FormatUint(disktest.Seed(t)%(1<<31), 10)}).wait()
	m.quiet()
}

// TestReboot restarts a machine that has filesystems of cnbd in its fstab.
func TestReboot(t *testing.T) {
	m := newMachine(t)
	for n := 1; n <= 3; n++ {
		m.boot("reboot", map[string]string{"boot": strconv.Itoa(n), "end": "reboot"}).wait()
		m.quiet()
	}
}

// TestAttach attaches and detaches two devices at once.
func TestAttach(t *testing.T) {
	m := newMachine(t)
	m.boot("attach", map[string]string{"count": strconv.Itoa(20 * disktest.Scale(t))}).wait()
	m.quiet()
}

// TestServerKilled kills the server of a mounted filesystem.
func TestServerKilled(t *testing.T) {
	newMachine(t).boot("killed", nil).wait()
}

// TestRestart restarts the server of a mounted filesystem in good order, and has its
// device grow.
func TestRestart(t *testing.T) {
	m := newMachine(t)
	m.boot("restart", nil).wait()
	m.quiet()
}

// TestPowerCut ends the emulator while three filesystems are written to.
func TestPowerCut(t *testing.T) {
	m := newMachine(t)
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	synced := map[string]string{}
	cuts := 2 * disktest.Scale(t)
	for n := 1; n <= cuts; n++ {
		settings := maps.Clone(synced)
		settings["boot"], settings["last"] = strconv.Itoa(n), "no"
		b := m.boot("cut", settings)
		clear(synced)
		least := 5 + rng.IntN(20)
		ended := b.each(func(word, rest string) bool {
			if word == "synced" {
				fs, number, _ := strings.Cut(rest, " ")
				synced[fs] = number
			}
			for _, fs := range filesystems {
				if n, _ := strconv.Atoi(synced[fs]); n < least {
					return true
				}
			}
			return false
		})
		if ended {
			t.Fatalf("boot %d: the machine has ended by itself", n)
		}
		time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
		if err := b.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		b.each(func(word, rest string) bool { // what was told before the cut
			if word == "synced" {
				fs, number, _ := strings.Cut(rest, " ")
				synced[fs] = number
			}
			return true
		})
		t.Logf("cut %d after %v", n, synced)
	}
	synced["boot"], synced["last"] = fmt.Sprint(cuts+1), "yes"
	m.boot("cut", synced).wait()
}

// TestMemory writes 1 GiB, or 4 with a larger count, to a filesystem on a device whose
// server has 256 MiB together with the writer and the page cache.
func TestMemory(t *testing.T) {
	m := newMachine(t)
	gib := min(4, disktest.Scale(t))
	m.bootMax *= time.Duration(gib)
	m.boot("memory", map[string]string{
		"seed": strconv.FormatUint(disktest.Seed(t)%(1<<31), 10), "mib": strconv.Itoa(gib << 10),
	}).wait()
	m.quiet()
}
