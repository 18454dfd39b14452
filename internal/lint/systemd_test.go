package lint

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// exposureMax are the highest exposure levels, in tenths, that systemd-analyze may
// find for a unit. Each unit says why it has what it has.
var exposureMax = map[string]string{
	"cnbd.service":         "25",
	"cnbd@.service":        "25",
	"cnbd-attach@.service": "30", // root, for the nbd driver
}

// systemdTool is the path of a tool; the test is skipped where it is missing.
func systemdTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("MISSING TOOL: %s", name)
	}
	return path
}

// unitFiles copies the units to a directory, with a program in them that is
// there, since systemd-analyze looks for it.
func unitFiles(t *testing.T) (dir string, units []string) {
	t.Helper()
	dir = t.TempDir()
	paths, err := filepath.Glob(filepath.Join(root(t), "systemd", "cnbd*.*"))
	if err != nil || len(paths) < 5 {
		t.Fatalf("units %q, %v", paths, err)
	}
	for _, p := range paths {
		text := readFile(t, p)
		if !strings.HasPrefix(text, "# ") {
			t.Errorf("%s does not open with its reason", p)
		}
		text = strings.ReplaceAll(text, "/usr/bin/cnbd ", "/bin/true ")
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(p)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		units = append(units, filepath.Base(p))
	}
	return dir, units
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// run runs a program in dir to its end.
func run(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "SYSTEMD_COLORS=0", "SYSTEMD_PAGER=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// TestUnitsVerify has systemd read the units: it finds nothing to complain of.
func TestUnitsVerify(t *testing.T) {
	analyze := systemdTool(t, "systemd-analyze")
	dir, units := unitFiles(t)
	for i, u := range units {
		if template, ok := strings.CutSuffix(u, "@.service"); ok {
			units[i] = template + "@nbd0.service"
			if err := os.Symlink(u, filepath.Join(dir, units[i])); err != nil {
				t.Fatal(err)
			}
		}
	}
	verify := func() (string, error) {
		var files []string
		for _, u := range units {
			files = append(files, filepath.Join(dir, u))
		}
		return run(dir, analyze, append([]string{"verify", "--man=no"}, files...)...)
	}
	if out, err := verify(); err != nil || out != "" {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	// And it does find something where there is.
	broken := readFile(t, filepath.Join(dir, "cnbd.service")) + "\n[Service]\nProtectSystm=strict\n"
	if err := os.WriteFile(filepath.Join(dir, "cnbd.service"), []byte(broken), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, _ := verify(); !strings.Contains(out, "ProtectSystm") {
		t.Errorf("systemd-analyze verify does not see an unknown setting:\n%s", out)
	}
}

// TestUnitsSecurity holds the units to their levels of exposure.
func TestUnitsSecurity(t *testing.T) {
	analyze := systemdTool(t, "systemd-analyze")
	dir, units := unitFiles(t)
	security := func(unit, most string) (string, error) {
		return run(dir, analyze, "security", "--offline=yes", "--threshold="+most, filepath.Join(dir, unit))
	}
	for _, u := range units {
		if filepath.Ext(u) != ".service" {
			continue
		}
		most, ok := exposureMax[u]
		if !ok {
			t.Errorf("%s has no level here", u)
		}
		out, err := security(u, most)
		if err != nil {
			t.Errorf("%s, at most %s: %v\n%s", u, most, err, out)
		}
		lines := strings.Split(strings.TrimSpace(out), "\n")
		t.Log(lines[len(lines)-1])
	}
	// A unit without protection is above them.
	bare := "[Service]\nExecStart=/bin/true\n"
	if err := os.WriteFile(filepath.Join(dir, "bare.service"), []byte(bare), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := security("bare.service", "30"); err == nil {
		t.Errorf("systemd-analyze accepts a unit without protection:\n%s", out)
	}
}

// TestUnitsOfServersAgree: the two units of servers differ in what they serve, and
// in nothing else.
func TestUnitsOfServersAgree(t *testing.T) {
	sections := func(name string) string {
		text := readFile(t, filepath.Join(root(t), "systemd", name))
		_, text, _ = strings.Cut(text, "\n[Unit]\n")
		return text
	}
	one := strings.NewReplacer("over NBD: %i", "over NBD", "/etc/cnbd/%i.yaml", "/etc/cnbd/cnbd.yaml").Replace(sections("cnbd@.service"))
	if all := sections("cnbd.service"); one != all || all == "" {
		t.Errorf("cnbd@.service has\n%s\nand cnbd.service\n%s", one, all)
	}
}

// TestSystemdFiles has the user and the directories made below a root of their own.
func TestSystemdFiles(t *testing.T) {
	sysusers, tmpfiles := systemdTool(t, "systemd-sysusers"), systemdTool(t, "systemd-tmpfiles")
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	at := filepath.Join(root(t), "systemd")
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil { // for the lock of passwd
		t.Fatal(err)
	}
	for range 2 { // an upgrade does it again
		if out, err := run(at, sysusers, "--root="+dir, filepath.Join(at, "sysusers.d/cnbd.conf")); err != nil {
			t.Fatalf("systemd-sysusers: %v\n%s", err, out)
		}
		if out, err := run(at, tmpfiles, "--root="+dir, "--create", filepath.Join(at, "tmpfiles.d/cnbd.conf")); err != nil {
			t.Fatalf("systemd-tmpfiles: %v\n%s", err, out)
		}
	}
	if passwd := readFile(t, filepath.Join(dir, "etc/passwd")); !strings.Contains(passwd, "cnbd:x:") || !strings.Contains(passwd, ":/var/lib/cnbd:/usr/sbin/nologin") {
		t.Errorf("users are\n%s", passwd)
	}
	for name, mode := range map[string]os.FileMode{"run/cnbd": 0o755, "var/lib/cnbd": 0o700} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v", name, info.Mode().Perm(), mode)
		}
	}
}
