//go:build !race && !invariants

package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPages: each command has a man page that says what its help says, in good
// order, and shells can complete.
func TestPages(t *testing.T) {
	mandoc := tool(t, "mandoc")
	dir := t.TempDir()
	do(t, "go", "build", "-tags", "pages", "-o", dir+"/cnbd", ".")
	do(t, dir+"/cnbd", "pages", "--date", "2026-11-26", dir)
	if help := do(t, binary, "--help"); strings.Contains(help, "pages") {
		t.Errorf("the program that is shipped has the command pages:\n%s", help)
	}

	names := []string{"cnbd"}
	for _, c := range newRoot(io.Discard, io.Discard).Commands() {
		if c.IsAvailableCommand() {
			names = append(names, "cnbd-"+c.Name())
		}
	}
	var pages []string
	for _, name := range names {
		pages = append(pages, filepath.Join(dir, name+".1"))
	}
	if found, _ := filepath.Glob(dir + "/*.1"); len(found) != len(names) {
		t.Errorf("pages %q, want those of %q", found, names)
	}
	if r := try(t, mandoc, append([]string{"-T", "lint", "-W", "warning"}, pages...)...); r.status != 0 || r.stdout != "" {
		t.Errorf("mandoc says\n%s%s", r.stdout, r.stderr)
	}
	text := do(t, mandoc, "-T", "utf8", "-O", "width=400", dir+"/cnbd-serve.1")
	for strings.Contains(text, "\b") { // bold and underlined, as on a typewriter
		i := strings.Index(text, "\b")
		text = text[:i-1] + text[i+1:]
	}
	for _, want := range []string{
		"cnbd serve [--size SIZE] BACKING\n", "cnbd serve --config FILE [flags]\n",
		"--cache size\n", "of all exports (default 256MiB)\n", "--config FILE\n", "--read-only\n", "--tls-verify-peer=false\n",
		"EXIT STATUS\n", "cnbd serve --size 100GiB disk.cnbd\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page of serve lacks %q:\n%s", want, text)
		}
	}

	script := filepath.Join(dir, "completion")
	if err := os.WriteFile(script, []byte(do(t, binary, "completion", "bash")), 0o600); err != nil {
		t.Fatal(err)
	}
	do(t, "bash", "-n", script)
}

// TestInstall: `make install` puts everything below DESTDIR and PREFIX, with units
// that name the program there, and keeps a configuration that is there.
func TestInstall(t *testing.T) {
	tool(t, "make")
	dest, bin := t.TempDir(), filepath.Join(t.TempDir(), "cnbd")
	install := func() {
		t.Helper()
		do(t, "make", "-s", "-C", "../..", "install", "BIN="+bin, "DESTDIR="+dest, "PREFIX=/opt/cnbd", "SYSCONFDIR=/opt/etc", "VERSION=1.2.3")
	}
	install()
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(dest + name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got := do(t, dest+"/opt/cnbd/bin/cnbd", "version"); !strings.HasPrefix(got, "cnbd 1.2.3 (go") {
		t.Errorf("the version is %q", got)
	}
	if got := do(t, dest+"/opt/cnbd/bin/cnbd", "--version"); got != "cnbd version 1.2.3\n" {
		t.Errorf("the version is %q", got)
	}
	unit := string(read("/opt/cnbd/lib/systemd/system/cnbd@.service"))
	if !strings.Contains(unit, "ExecStart=/opt/cnbd/bin/cnbd serve --config /opt/etc/cnbd/%i.yaml\n") || strings.Contains(unit, "/usr/bin") {
		t.Errorf("the unit is\n%s", unit)
	}
	z, err := gzip.NewReader(bytes.NewReader(read("/opt/cnbd/share/man/man1/cnbd-serve.1.gz")))
	if err != nil {
		t.Fatal(err)
	}
	if page, err := io.ReadAll(z); err != nil || !bytes.Contains(page, []byte(`"cnbd 1.2.3"`)) {
		t.Errorf("the page of version 1.2.3 is %q, %v", page, err)
	}
	for _, name := range []string{"lib/sysusers.d/cnbd.conf", "lib/tmpfiles.d/cnbd.conf", "lib/systemd/system/cnbd.socket",
		"share/bash-completion/completions/cnbd", "share/zsh/site-functions/_cnbd", "share/fish/vendor_completions.d/cnbd.fish",
		"share/doc/cnbd/docs/configuration.md"} {
		read("/opt/cnbd/" + name)
	}
	config := "/opt/etc/cnbd/cnbd.yaml"
	edit(t, dest+config, func(b []byte) []byte { return append(b, "# ours\n"...) })
	install()
	if !bytes.HasSuffix(read(config), []byte("# ours\n")) {
		t.Error("a second install replaces the configuration")
	}
}
