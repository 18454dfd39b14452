package transfer

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"cnbd/nbd"
)

// Raw is the format of images that are as their disks are.
const Raw = "raw"

// formats are the names that qemu has for what files of these names usually are.
var formats = map[string]string{
	".qcow2": "qcow2", ".qcow": "qcow", ".vmdk": "vmdk", ".vdi": "vdi", ".vhdx": "vhdx", ".vhd": "vpc", ".vpc": "vpc", ".qed": "qed",
}

// magics begin images of those formats.
var magics = map[string]string{"QFI\xfb\x00\x00\x00\x01": "qcow", "QFI\xfb": "qcow2", "KDMV": "vmdk", "vhdxfile": "vhdx", "conectix": "vpc", "QED\x00": "qed"}

// FormatOf is the format of the image at path by its name. What is inside decides
// nothing, for whoever writes a raw disk could make it look like an image that refers
// to other files.
func FormatOf(path string) string {
	if f, ok := formats[strings.ToLower(filepath.Ext(path))]; ok {
		return f
	}
	return Raw
}

// LooksLike tells what image that is not raw begins with head, "" if none that it
// knows.
func LooksLike(head []byte) string {
	found, longest := "", 0
	for magic, format := range magics {
		if len(magic) > longest && bytes.HasPrefix(head, []byte(magic)) {
			found, longest = format, len(magic)
		}
	}
	return found
}

// ErrNoQemu says that qemu's tools, which images need that are not raw, are not
// installed.
var ErrNoQemu = errors.New("not installed: images that are not raw need qemu's tools (in Debian the package qemu-utils, elsewhere qemu-img)")

func qemuTool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is %w", name, ErrNoQemu)
	}
	return path, nil
}

// CreateImage makes an image of that format for a disk of size bytes at path.
func CreateImage(ctx context.Context, path, format string, size uint64) error {
	tool, err := qemuTool("qemu-img")
	if err != nil {
		return err
	}
	if path, err = filepath.Abs(path); err != nil { // which qemu takes for no URI
		return err
	}
	out, err := exec.CommandContext(ctx, tool, "create", "-q", "-f", format, path, fmt.Sprint(size)).CombinedOutput()
	if err != nil {
		return toolError(tool, err, out)
	}
	return nil
}

// An Image is a disk image that qemu-nbd has open.
type Image struct {
	*Export
	client *nbd.Client
	tool   string
	cmd    *exec.Cmd
	stderr bytes.Buffer
}

// OpenImage opens the image at path, which is of a format that qemu knows.
func OpenImage(ctx context.Context, path, format string, readOnly bool) (_ *Image, err error) {
	tool, err := qemuTool("qemu-nbd")
	if err != nil {
		return nil, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	// The socket is passed as systemd does it. So there is nothing to wait for, and
	// qemu-nbd ends with the connection, also if this process dies.
	dir, err := os.MkdirTemp("", "cnbd-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	args := []string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh", tool, "--format=" + format}
	if readOnly {
		args = append(args, "--read-only")
	}
	im := &Image{tool: tool, cmd: exec.Command("/bin/sh", append(args, "--", path)...)}
	im.cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
	im.cmd.ExtraFiles = []*os.File{f}
	im.cmd.Stderr = &im.stderr
	im.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	nc, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, err
	}
	if err := im.cmd.Start(); err != nil {
		nc.Close()
		return nil, err
	}
	// No one but qemu-nbd has the socket now: if it ends, so does the connection.
	l.Close()
	f.Close()
	if im.client, err = nbd.NewClient(ctx, nc, ""); err != nil {
		im.kill() // if it has not ended by itself, and said why
		if exit := im.cmd.Wait(); im.stderr.Len() > 0 {
			err = toolError(tool, exit, im.stderr.Bytes())
		}
		return nil, err
	}
	im.Export = NewExport(im.client)
	return im, nil
}

func (im *Image) kill() { _ = im.cmd.Process.Kill() }

// Close closes the image; what was written is on its medium if the error is nil. It
// blocks until qemu-nbd has ended.
func (im *Image) Close(ctx context.Context) error {
	var err error
	if im.client.Flags()&nbd.FlagReadOnly == 0 {
		err = im.client.Flush(ctx)
	}
	if err = cmp.Or(err, im.client.Disconnect(ctx)); err != nil {
		im.kill()
	}
	if exit := im.cmd.Wait(); exit != nil && err == nil {
		err = toolError(im.tool, exit, im.stderr.Bytes())
	}
	return err
}

// toolError is the error of a tool, with what it has said.
func toolError(tool string, err error, said []byte) error {
	text := strings.TrimSpace(string(said))
	if text == "" && err != nil {
		text = err.Error()
	}
	return fmt.Errorf("%s: %s", filepath.Base(tool), strings.ReplaceAll(text, "\n", "; "))
}
