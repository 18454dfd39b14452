//go:build !race && !invariants

package main

import (
	"os"
	"strings"
	"testing"
)

// TestAttachRefused: what cannot be attached or detached, and the reason. That which
// can be is tested in a virtual machine (make test-vm).
func TestAttachRefused(t *testing.T) {
	needRoot(t)
	s := serve(t, "--size=64MiB", "--export=disk", t.TempDir()+"/disk")
	odd := serve(t, "--size=67109376", t.TempDir()+"/odd") // a multiple of 512 alone
	device := "/dev/nbd1023"                               // which nobody has
	uri := func(export string) string { return strings.Replace(s.uri, "/disk?", "/"+export+"?", 1) }
	for _, tc := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"attach", device}, exitUsage, "DEVICE and URI are expected"},
		{[]string{"attach", "/dev/sda", s.uri}, exitUsage, "/dev/sda is no device of the kernel's nbd driver"},
		{[]string{"attach", device, s.socket}, exitUsage, "nbd: URI"},
		{[]string{"attach", device, "nbds://localhost"}, exitUsage, "the kernel has no TLS"},
		{[]string{"attach", "--block-size=8K", device, s.uri}, exitUsage, "--block-size: 512, 1KiB, 2KiB or 4KiB is expected"},
		{[]string{"attach", "--block-size=x", device, s.uri}, exitUsage, `"x"`},
		{[]string{"attach", "--request-max=100", device, s.uri}, exitUsage, "--request-max: a multiple of 4KiB"},
		{[]string{"attach", "--timeout=1500ms", device, s.uri}, exitUsage, "--timeout: whole seconds"},
		{[]string{"attach", "--dead-connection-timeout=-1s", device, s.uri}, exitUsage, "--dead-connection-timeout: whole seconds"},
		{[]string{"attach", "--connections=65", device, s.uri}, exitUsage, "--connections: a number from 0 to 64"},
		{[]string{"attach", "--resize", device, s.uri}, exitFailed, device + ": nothing is attached"},
		{[]string{"attach", device, uri("another")}, exitFailed, `export "another"`},
		{[]string{"attach", device, "nbd+unix:///?socket=/nowhere/at/all"}, exitFailed, "no such file"},
		{[]string{"attach", "--block-size=4K", device, odd.uri}, exitFailed, "no multiple of a block size of 4096"},
		{[]string{"detach"}, exitUsage, "one DEVICE is expected"},
		{[]string{"detach", "/dev/nbd"}, exitUsage, "/dev/nbd is no device"},
		{[]string{"detach", device}, exitFailed, device + ": nothing is attached"},
	} {
		r := try(t, binary, tc.args...)
		if r.status != tc.status || !strings.Contains(r.stderr, tc.want) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("cnbd %q: status %d, want %d, and %q in one line:\n%s", tc.args, r.status, tc.status, tc.want, r.stderr)
		}
	}
	if _, err := os.Stat("/sys/module/nbd"); err != nil {
		r := try(t, binary, "attach", device, s.uri)
		if r.status != exitFailed || !strings.Contains(r.stderr, "modprobe nbd") {
			t.Errorf("without the driver: status %d\n%s", r.status, r.stderr)
		}
	}
}
