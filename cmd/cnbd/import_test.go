//go:build !race && !invariants

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/disk"
	"cnbd/internal/disktest"
	"cnbd/nbd"
)

// testDisk makes a sparse file of size bytes at path that has noise, text, blocks of
// zeros that are no holes, and holes, and returns its SHA-256.
func testDisk(t *testing.T, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	rng := rand.NewChaCha8([32]byte{7})
	noise := make([]byte, 100<<10)
	for off := int64(0); off < size; off += 1 << 20 {
		var p []byte
		switch rng.Uint64() % 4 {
		case 0:
			rng.Read(noise)
			p = noise
		case 1:
			p = bytes.Repeat([]byte(fmt.Sprintf("line %d\n", rng.Uint64()%1000)), 50<<10)
		case 2:
			p = make([]byte, 200<<10)
		case 3:
			continue
		}
		p = p[:min(int64(len(p)), size-off)]
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	return sumOf(t, path)
}

func sumOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// transferred runs an import or export that must succeed.
func transferred(t *testing.T, args ...string) (r transferReport) {
	t.Helper()
	if err := json.Unmarshal([]byte(do(t, binary, append(args, "--json")...)), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// namesIn are the files in dir.
func namesIn(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// TestImportExport: raw, qcow2 and other images go in and out again, and are equal.
func TestImportExport(t *testing.T) {
	qemuImg := tool(t, "qemu-img")
	tool(t, "qemu-nbd")
	dir := t.TempDir()
	raw := filepath.Join(dir, "disk")
	const size = 40<<20 + 512*3
	sum := testDisk(t, raw, size)
	for _, format := range []string{"raw", "qcow2", "vmdk", "vdi"} {
		in, store, out := raw, filepath.Join(dir, format+".cnbd"), filepath.Join(dir, "out."+format)
		if format != "raw" {
			in = filepath.Join(dir, "in."+format)
			do(t, qemuImg, "convert", "-f", "raw", "-O", format, raw, in)
		}
		r := transferred(t, "import", "--verify", in, store)
		// vmdk's disks are of whole clusters.
		if r.Bytes < size || r.Bytes == size && r.SHA256 != sum || !r.Verified || r.Data == r.Bytes || r.Ratio < 2 {
			t.Errorf("import of %s: %+v, the source has SHA-256 %s", format, r, sum)
		}
		do(t, binary, "check", "--data", store)
		again := transferred(t, "export", "--verify", store, out)
		if again.SHA256 != r.SHA256 || again.Bytes != r.Bytes || !again.Verified {
			t.Errorf("export to %s: %+v, it was imported as %+v", format, again, r)
		}
		do(t, qemuImg, "compare", "-f", "raw", "-F", format, raw, out)
		if format == "raw" && hostBytes(t, out) > hostBytes(t, raw) {
			t.Errorf("the raw image takes %d bytes, its source %d", hostBytes(t, out), hostBytes(t, raw))
		}
		st := infoOf(t, store)
		if st.Store.DataBytes == 0 || r.StoredBytes != st.Store.StoredBytes {
			t.Errorf("told of %d stored bytes, there are %d", r.StoredBytes, st.Store.StoredBytes)
		}
	}
	// Of a size that no device has.
	odd := filepath.Join(dir, "odd")
	testDisk(t, odd, 3<<20+100)
	transferred(t, "import", "--verify", odd, odd+".cnbd")
	transferred(t, "export", odd+".cnbd", odd+".out")
	do(t, qemuImg, "compare", "-f", "raw", "-F", "raw", odd, odd+".out")
	if st, err := os.Stat(odd + ".out"); err != nil || st.Size() != 3<<20+512 {
		t.Errorf("%v, %v", st, err)
	}
	if strings.Contains(namesIn(t, dir), ".new") {
		t.Errorf("left: %s", namesIn(t, dir))
	}
}

// TestImportStreams: standard input and output, and NBD exports.
func TestImportStreams(t *testing.T) {
	dir := t.TempDir()
	raw, store := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	const size = 20 << 20
	sum := testDisk(t, raw, size)
	pipe := func(script string, args ...string) result {
		t.Helper()
		return try(t, "/bin/sh", append([]string{"-c", script, "sh", binary, raw, store}, args...)...)
	}
	for _, script := range []string{
		`cat "$2" | "$1" import --size 20MiB --verify - "$3"`,
		`"$1" import - "$3" <"$2"`, // a file: its size is known, and its holes
		`"$1" import --size 30MiB "$2" "$3"`,
		`nbdkit -U - file "$2" --run "'$1' import \"\$uri\" '$3'"`,
	} {
		if strings.HasPrefix(script, "nbdkit") {
			tool(t, "nbdkit")
		}
		r := pipe(script)
		if r.status != 0 || !strings.Contains(r.stdout, "sha256 "+sum) {
			t.Errorf("%s: status %d\n%s%s", script, r.status, r.stdout, r.stderr)
		}
		r = pipe(`"$1" export "$3" - | head -c 20971520 | sha256sum`)
		if !strings.HasPrefix(r.stdout, sum) || strings.Contains(script, "30MiB") != !strings.Contains(r.stderr, "sha256 "+sum) {
			t.Errorf("%s: out again: %s%s", script, r.stdout, r.stderr)
		}
		if err := os.Remove(store); err != nil {
			t.Fatal(err)
		}
	}
	// A stream that breaks off, or goes on, is no disk.
	for script, want := range map[string]string{
		`head -c 19999999 "$2" | "$1" import --size 20MiB - "$3"`: "has ended after 19999999 bytes, of 20971520",
		`cat "$2" "$2" | "$1" import --size 20MiB - "$3"`:         "goes on after the 20971520 bytes",
		`cat "$2" | "$1" import - "$3"`:                           "--size is needed",
	} {
		if r := pipe(script); r.status == 0 || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: status %d, %s", script, r.status, r.stderr)
		}
		if _, err := os.Stat(store); err == nil {
			t.Fatalf("%s: there is a store", script)
		}
	}
	// It goes on where it broke off.
	if r := pipe(`cat "$2" | "$1" import --resume --size 20MiB --verify - "$3"`); r.status != 0 || !strings.Contains(r.stdout, "sha256 "+sum) {
		t.Errorf("resume: status %d\n%s%s", r.status, r.stdout, r.stderr)
	}
	// Also when the source is shorter by then: of what was imported behind its new end
	// nothing is left.
	if err := os.Remove(store); err != nil {
		t.Fatal(err)
	}
	r := pipe(`head -c 9999999 "$2" | "$1" import --size 20MiB - "$3"; truncate -s 1MiB "$4" && "$1" import --resume --size 20MiB "$4" "$3" &&
		"$1" export "$3" - | sha256sum; head -c 20971520 /dev/zero | sha256sum`, filepath.Join(dir, "short"))
	if lines := strings.Split(strings.TrimSpace(r.stdout), "\n"); len(lines) < 2 || lines[len(lines)-1] != lines[len(lines)-2] {
		t.Errorf("a shorter source: status %d\n%s%s", r.status, r.stdout, r.stderr)
	}
}

// TestImportStopped: an import that is stopped or killed at any moment leaves no store,
// and one that goes on, with the source as it is then, makes a right one.
func TestImportStopped(t *testing.T) {
	dir := t.TempDir()
	raw, store := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	const size = 64 << 20
	testDisk(t, raw, size)
	kept := 0
	signals := slices.Repeat([]syscall.Signal{syscall.SIGINT, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL}, disktest.Scale(t))
	for round, signal := range signals {
		// A pipe that stops in the midst.
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		args := []string{"import", "--resume", "--size", fmt.Sprint(size), "-", store}
		cmd := exec.Command(binary, args...)
		out := &lockedBuffer{}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = r, out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		f, err := os.Open(raw)
		if err != nil {
			t.Fatal(err)
		}
		// All that is behind the chunk at work is on its way to the store; what a
		// kill finds there is up to chance.
		if _, err := io.CopyN(w, f, int64(round%4+1)*12<<20); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		w.Close() // so that it is not waited for
		_ = cmd.Wait()
		if _, err := os.Stat(store); err == nil {
			t.Fatalf("%v: there is a store\n%s", signal, out)
		}
		left := disk.TemporaryName(store)
		if _, err := os.Stat(left); err != nil {
			t.Fatalf("%v: nothing is kept: %v\n%s", signal, err, out)
		}
		if signal != syscall.SIGKILL {
			if code := cmd.ProcessState.ExitCode(); code != exitFailed || !strings.Contains(out.String(), "--resume goes on with it") {
				t.Errorf("%v: status %d\n%s", signal, code, out)
			}
		}
		if rep := try(t, binary, "check", "--data", left); rep.status == 0 {
			kept++
		} else {
			t.Errorf("%v: what is kept is no whole store\n%s%s", signal, rep.stdout, rep.stderr)
		}
		// The source changes, and has a hole where there was data.
		if round == 1 {
			if err := syscall.Fallocate(int(open(t, raw).Fd()), 3, 5<<20, 7<<20); err != nil { // FALLOC_FL_PUNCH_HOLE|FALLOC_FL_KEEP_SIZE
				t.Fatal(err)
			}
			if _, err := open(t, raw).WriteAt([]byte("changed"), 20<<20); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum := sumOf(t, raw)
	if r := try(t, binary, "import", "--resume", "--size", "65MiB", raw, store); r.status != exitUsage || !strings.Contains(r.stderr, "was to a device of 64MiB") {
		t.Errorf("another size: status %d, %s", r.status, r.stderr)
	}
	r := transferred(t, "import", "--resume", "--verify", raw, store)
	if r.SHA256 != sum || !r.Verified {
		t.Errorf("%+v, want %s", r, sum)
	}
	do(t, binary, "check", "--data", store)
	if namesIn(t, dir) != "disk s" {
		t.Errorf("left: %s", namesIn(t, dir))
	}
	t.Logf("%d times something was kept", kept)
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestExportServed: an export of a store that is served has what was answered before
// it began, and nothing later, while clients write.
func TestExportServed(t *testing.T) {
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	const size = 48 << 20
	testDisk(t, raw, size)
	transferred(t, "import", raw, path)
	s := serve(t, "--cache", "16MiB", path)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	page := make([]byte, 4096)
	var generation atomic.Uint64 // that is being written
	// Every block has the number of a generation, and generations come one after the
	// other: so an export has two of them at most, the newer in front.
	write := func(ctx context.Context) error {
		g := generation.Add(1)
		for off := uint64(0); off < size && ctx.Err() == nil; off += 4096 {
			if off%(1<<20) != 0 {
				continue
			}
			copy(page, fmt.Sprintf("%08d%08d", g, off>>20))
			if err := c.WriteAt(context.Background(), page, off, false); err != nil {
				return err
			}
		}
		return nil
	}
	if err := write(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := write(ctx); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for round := range 3 {
		out := filepath.Join(dir, fmt.Sprint("out", round))
		least := generation.Load() - 1 // surely answered, all of it
		r := transferred(t, "export", "--verify", path, out)
		f := open(t, out)
		var gens []uint64
		for off := int64(0); off < size; off += 1 << 20 {
			var g, n uint64
			head := make([]byte, 16)
			if _, err := f.ReadAt(head, off); err != nil {
				t.Fatal(err)
			}
			if _, err := fmt.Sscanf(string(head), "%08d%08d", &g, &n); err != nil || n != uint64(off>>20) {
				t.Fatalf("at %d: %q", off, head)
			}
			gens = append(gens, g)
		}
		first, last := gens[0], gens[len(gens)-1]
		mixed := first-last > 1 || last < least
		for i := 1; i < len(gens); i++ {
			mixed = mixed || gens[i] > gens[i-1]
		}
		if mixed {
			t.Errorf("round %d: at least %d: %v", round, least, gens)
		}
		t.Logf("round %d: generations %d and %d, at least %d; %d bytes of data", round, first, last, least, r.Data)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// One that is broken off gives the snapshot back.
	p := exec.Command(binary, "export", path, "-")
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if r := try(t, binary, "export", path, filepath.Join(dir, "second")); r.status != exitFailed || !strings.Contains(r.stderr, "somebody else") {
		t.Errorf("a second one: status %d, %s", r.status, r.stderr)
	}
	_ = p.Process.Kill()
	_ = p.Wait()
	for deadline := time.Now().Add(20 * time.Second); ; { // the server has to learn of it
		if r := try(t, binary, "export", "--force", path, filepath.Join(dir, "out0")); r.status == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the snapshot is held: %s", r.stderr)
		}
	}
	// A server that stops does not wait for one.
	p = exec.Command(binary, "export", path, "-")
	out := &lockedBuffer{}
	p.Stderr = out
	if stdout, err = p.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	_, _ = io.Copy(io.Discard, stdout)
	_ = p.Wait()
	if p.ProcessState.ExitCode() != exitFailed || strings.Count(out.String(), "\n") != 1 || !strings.Contains(out.String(), "closed the connection") {
		t.Errorf("of a server that stops: %v\n%s", p.ProcessState, out)
	}
	do(t, binary, "check", "--data", path)
}

// TestExportGivesWay: an export that writes overtake fails and says why; the writes do
// not.
func TestExportGivesWay(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	s := serve(t, "--size", "32MiB", "--cache", "16MiB", "--checkpoint-interval", "16MiB", path)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rng := rand.NewChaCha8([32]byte{3})
	p := make([]byte, 1<<20)
	write := func(n int) {
		t.Helper()
		for i := range n {
			rng.Read(p)
			if err := c.WriteAt(t.Context(), p, uint64(i%32)<<20, false); err != nil {
				t.Fatalf("write %d: %v", i, err)
			}
		}
	}
	write(32)
	cmd := exec.Command(binary, "export", path, "-")
	out := &lockedBuffer{}
	cmd.Stderr = out
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	// Its reader has stopped.
	write(int(infoOf(t, path).Capacity>>20) + 64)
	_, _ = io.Copy(io.Discard, stdout)
	_ = cmd.Wait()
	if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(out.String(), "writes needed the space") {
		t.Errorf("%v\n%s", cmd.ProcessState, out)
	}
	s.stop(t)
	do(t, binary, "check", "--data", path)
}

// TestImportErrors: one clear line, a status, and nothing at the destination.
func TestImportErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	raw, empty := file("raw", strings.Repeat("data", 1000)), file("empty", "")
	disguised, broken := file("disguised", "QFI\xfb\x00\x00\x00\x03"+strings.Repeat("x", 1000)), file("broken.qcow2", "no image")
	there := file("there", "something")
	store := filepath.Join(dir, "store")
	do(t, binary, "import", raw, store)
	x := filepath.Join(dir, "x")
	before := namesIn(t, dir)
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"import", raw}, exitUsage, "a SOURCE and a BACKING are expected, not 1"},
		{[]string{"import", raw, x, x}, exitUsage, "are expected, not 3"},
		{[]string{"import", filepath.Join(dir, "none"), x}, exitFailed, "no such file"},
		{[]string{"import", dir, x}, exitFailed, "neither a regular file nor a block device"},
		{[]string{"import", empty, x}, exitUsage, "is empty"},
		{[]string{"import", disguised, x}, exitUsage, "--format qcow2"},
		{[]string{"import", broken, x}, exitFailed, "qemu-nbd: "},
		{[]string{"import", "--format", "nosuch", raw, x}, exitFailed, "nosuch"},
		{[]string{"import", raw, there}, exitFailed, "--force replaces it"},
		{[]string{"import", "--size", "512", raw, x}, exitUsage, "is less than"},
		{[]string{"import", "--codec", "nosuch", raw, x}, exitUsage, "codec"},
		{[]string{"import", "--digest", "md5", raw, x}, exitUsage, "neither sha256 nor none"},
		{[]string{"import", "--digest", "none", "--verify", raw, x}, exitUsage, "--verify"},
		{[]string{"import", "nbd+unix:///?socket=" + x, x}, exitFailed, "no such file"},
		{[]string{"export", store}, exitUsage, "a BACKING and a DEST are expected"},
		{[]string{"export", x, x + "y"}, exitFailed, "no such file"},
		{[]string{"export", raw, x}, exitFailed, "not a cnbd store"},
		{[]string{"export", store, there}, exitFailed, "--force replaces it"},
		{[]string{"export", store, "--force", store}, exitFailed, "in use"},
		{[]string{"export", store, filepath.Join(x, "y")}, exitFailed, "no such file"},
		{[]string{"export", "--format", "nosuch", store, x}, exitFailed, "nosuch"},
		{[]string{"export", "--verify", store, "-"}, exitUsage, "cannot be read back"},
		{[]string{"export", "--format", "qcow2", store, "-"}, exitUsage, "only a file"},
	} {
		if strings.Contains(c.want, "nosuch") || strings.Contains(c.want, "qemu") {
			tool(t, "qemu-nbd")
			tool(t, "qemu-img")
		}
		r := try(t, binary, c.args...)
		if r.status != c.status || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%q: status %d, want %d and %q\n%s", c.args, r.status, c.status, c.want, r.stderr)
		}
		if got := namesIn(t, dir); got != before {
			t.Fatalf("%q: now there are %s", c.args, got)
		}
	}
	do(t, binary, "import", "--format", "raw", disguised, x)
	// Without qemu's tools.
	for _, args := range [][]string{{"import", broken, x + "y"}, {"export", store, x + ".qcow2"}} {
		cmd := exec.Command(binary, args...)
		cmd.Env = append(os.Environ(), "PATH=/nonexistent")
		out, _ := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(string(out), "qemu-utils") {
			t.Errorf("%q without qemu: %v\n%s", args, cmd.ProcessState, out)
		}
	}
	if got := namesIn(t, dir); got != before+" x" {
		t.Errorf("now there are %s", got)
	}
}

// TestImportNoSpace: neither a store nor what it would have been is left when there is
// no room for it, in the store or on the host.
func TestImportNoSpace(t *testing.T) {
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	noise := make([]byte, 48<<20)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	if err := os.WriteFile(raw, noise, 0o600); err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(dir, "s")
	expect := func(store string) {
		t.Helper()
		r := try(t, binary, "import", "--capacity", "40MiB", raw, store)
		if r.status != exitFailed || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "no space left") {
			t.Errorf("status %d\n%s", r.status, r.stderr)
		}
	}
	expect(store)
	if namesIn(t, dir) != "raw" {
		t.Errorf("left: %s", namesIn(t, dir))
	}
	needRoot(t)
	small := filepath.Join(dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=36m"); err != nil {
		t.Skip("no tmpfs: ", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(small, 0) })
	expect(filepath.Join(small, "s"))
	do(t, binary, "import", raw, store)
	if r := try(t, binary, "export", store, filepath.Join(small, "out")); r.status != exitFailed || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "no space left") {
		t.Errorf("export: status %d\n%s", r.status, r.stderr)
	}
	if namesIn(t, small) != "" {
		t.Errorf("left: %s", namesIn(t, small))
	}
}

// TestImportDevices: from and to block devices. A device is no store before the import
// is done.
func TestImportDevices(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	const size = 24 << 20
	sum := testDisk(t, raw, size)
	from, to, back := loopDevice(t, raw), loopDevice(t, backing(t, dir, 128<<20)), loopDevice(t, backing(t, dir, size))
	// Broken off.
	pipe := func(script string) result {
		t.Helper()
		return try(t, "/bin/sh", "-c", script, "sh", binary, raw, to)
	}
	if r := pipe(`head -c 9999999 "$2" | "$1" import --size 24MiB - "$3"`); r.status != exitFailed || !strings.Contains(r.stderr, "--resume goes on") {
		t.Errorf("status %d, %s", r.status, r.stderr)
	}
	if r := try(t, binary, "check", to); r.status != exitFailed || !strings.Contains(r.stderr, "not a cnbd store") {
		t.Errorf("an unfinished one: status %d, %s", r.status, r.stderr)
	}
	if r := transferred(t, "import", "--resume", "--verify", from, to); r.SHA256 != sum || !r.Verified {
		t.Errorf("%+v, want %s", r, sum)
	}
	do(t, binary, "check", "--data", to)
	if r := try(t, binary, "import", from, to); r.status != exitFailed || !strings.Contains(r.stderr, "holds a cnbd store") {
		t.Errorf("a second one: status %d, %s", r.status, r.stderr)
	}
	// Over something: what was there must not shine through the holes.
	do(t, "mkfs.ext4", "-q", back)
	if r := try(t, binary, "export", to, back); r.status != exitFailed || !strings.Contains(r.stderr, "ext4") && !strings.Contains(r.stderr, "ext") {
		t.Errorf("over a filesystem: status %d, %s", r.status, r.stderr)
	}
	if r := transferred(t, "export", "--force", "--verify", to, back); r.SHA256 != sum || sumOf(t, back) != sum {
		t.Errorf("%+v, want %s", r, sum)
	}
	transferred(t, "import", "--force", from, to)
	do(t, binary, "check", "--data", to)
}

// backing makes a sparse file.
func backing(t *testing.T, dir string, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(dir, "backing")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// loopDevice makes a block device of the file at path.
func loopDevice(t *testing.T, path string) string {
	t.Helper()
	losetup := tool(t, "losetup")
	r := try(t, losetup, "--find", "--show", path)
	if r.status != 0 {
		t.Skip("no loop device: ", r.stderr)
	}
	dev := strings.TrimSpace(r.stdout)
	t.Cleanup(func() { try(t, losetup, "-d", dev) })
	return dev
}
