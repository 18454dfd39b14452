package nbd

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// qemuTLS are the arguments that make a tool of qemu's a client with the
// certificates in dir, and the image that it finds then on the socket of s.
func qemuTLS(s *testServer, dir string) (object, image string) {
	return "tls-creds-x509,id=tls0,endpoint=client,dir=" + dir,
		"driver=nbd,server.type=unix,server.path=" + s.path + ",tls-creds=tls0,tls-hostname=localhost"
}

// Other people's clients under TLS, with client certificates: libnbd, qemu,
// nbd-client and nbdkit's plugin.
func TestTLSInterop(t *testing.T) {
	dirs := newCertDirs(t)
	d := newMemDisk(strangersSize)
	s := dirs.serve(t, Options{Exports: []Export{{Backend: d, Allow: []string{"alice"}}}})
	image := holey(strangersSize)
	file := tempFile(t, image)
	reset := func() {
		t.Helper()
		if err := s.dialTLS("", dirs.client).WriteZeroes(t.Context(), 0, strangersSize, ZeroFlags{}); err != nil {
			t.Fatal(err)
		}
	}
	holdsImage := func(t *testing.T) {
		t.Helper()
		data, _ := d.contents()
		mustEqual(t, "the disk", data, image)
	}

	t.Run("nbdinfo", func(t *testing.T) {
		var info struct {
			TLS     bool
			Exports []struct {
				Size uint64 `json:"export-size"`
			}
		}
		if err := json.Unmarshal(tool(t, "nbdinfo", "--json", "--no-content", s.tlsURI("", dirs.client)), &info); err != nil {
			t.Fatal(err)
		}
		if !info.TLS || info.Exports[0].Size != strangersSize {
			t.Errorf("%+v", info)
		}
		if out, err := exec.CommandContext(t.Context(), "nbdinfo", s.uri("")).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("TLS")) {
			t.Errorf("without TLS: %v: %s", err, out)
		}
	})
	t.Run("nbdcopy", func(t *testing.T) {
		reset()
		uri := s.tlsURI("", dirs.client)
		tool(t, "nbdcopy", "--connections=4", "--flush", file, uri)
		holdsImage(t)
		back := filepath.Join(t.TempDir(), "back")
		tool(t, "nbdcopy", "--connections=4", uri, back)
		got, err := os.ReadFile(back)
		if err != nil {
			t.Fatal(err)
		}
		mustEqual(t, "the copy", got, image)
	})
	t.Run("qemu", func(t *testing.T) {
		reset()
		object, target := qemuTLS(s, dirs.client)
		tool(t, "qemu-img", "convert", "-n", "-f", "raw", "--object", object, "--target-image-opts", file, target)
		holdsImage(t)
		tool(t, "qemu-img", "compare", "--object", object, "--image-opts", target, "driver=raw,file.driver=file,file.filename="+file)
		tool(t, "qemu-io", "--object", object, "--image-opts", target, "-c", "write -f -P 7 5000 70000", "-c", "read -P 7 5000 70000", "-c", "write -z 0 1M", "-c", "flush")
		if data, _ := d.contents(); data[5000] != 0 {
			t.Error("zeroes were not written")
		}
	})
	t.Run("nbd-client", func(t *testing.T) {
		l, err := Listen("tcp:127.0.0.1:0", 0)
		if err != nil {
			t.Fatal(err)
		}
		go s.Serve(l)
		port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
		path, err := exec.LookPath("nbd-client")
		if err != nil {
			t.Skipf("MISSING TOOL: nbd-client")
		}
		before := s.Metrics()
		pem := func(name string) string { return filepath.Join(dirs.client, name) }
		out, err := exec.CommandContext(t.Context(), path, "-L", "-n", "localhost", port, "/dev/null", "-enable-tls", "-tlshostname", "localhost",
			"-certfile", pem(clientCertFile), "-keyfile", pem(clientKeyFile), "-cacertfile", pem(caCertFile)).CombinedOutput()
		if err == nil {
			t.Fatalf("it took /dev/null for its device: %s", out)
		}
		if !bytes.Contains(out, []byte(fmt.Sprintf("size = %dMB", strangersSize>>20))) {
			t.Fatalf("it did not negotiate: %s", out)
		}
		if m := s.Metrics(); m.TLSFailed != before.TLSFailed || m.TLSMissing != before.TLSMissing {
			t.Errorf("%+v", m)
		}
	})
	t.Run("nbdkit in front", func(t *testing.T) {
		reset()
		socket := filepath.Join(socketDir(t), "s")
		background(t, "nbdkit", "-f", "-U", socket, "nbd", "socket="+s.path, "tls=require", "tls-certificates="+dirs.client)
		listens(t, socket)
		uri := URI{Network: "unix", Address: socket}.String()
		tool(t, "nbdcopy", "--flush", file, uri)
		holdsImage(t)
	})
	// With a certificate of somebody else's.
	t.Run("not allowed", func(t *testing.T) {
		bob := t.TempDir()
		dirs.ca.Client(bob, "bob")
		for _, args := range [][]string{{"nbdinfo", s.tlsURI("", bob)}, {"nbdinfo", s.tlsURI("", t.TempDir())}} {
			if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err == nil {
				t.Errorf("%q: let in: %s", args, out)
			}
		}
	})
}

// Other people's servers judge the client's TLS.
func TestTLSClientOfStrangers(t *testing.T) {
	const size = 4 << 20
	dirs := newCertDirs(t)
	for name, args := range map[string]func(socket string) []string{
		"nbdkit": func(socket string) []string {
			return []string{"-f", "-U", socket, "--tls=require", "--tls-verify-peer", "--tls-certificates=" + dirs.server, "memory", fmt.Sprint(size)}
		},
		"qemu-nbd": func(socket string) []string {
			return []string{"-k", socket, "-f", "raw", "--persistent", "-x", "", "--object", "tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir=" + dirs.server,
				"--tls-creds", "tls0", tempFile(t, make([]byte, size))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(socketDir(t), "s")
			background(t, name, args(socket)...)
			uri := URI{Network: "unix", Address: socket, TLS: true, Certificates: dirs.client}.String()
			var c *Client
			var err error
			eventually(t, "it listens", func() bool {
				c, err = Dial(t.Context(), uri)
				return err == nil || !strings.Contains(err.Error(), "connect")
			})
			if err != nil {
				t.Fatal(err)
			}
			want, got := pattern(300_000, 3), make([]byte, 300_000)
			if err := c.WriteAt(t.Context(), want, 12345, true); err != nil {
				t.Fatal(err)
			}
			if err := c.ReadAt(t.Context(), got, 12345); err != nil {
				t.Fatal(err)
			}
			mustEqual(t, "read", got, want)
			if err := c.Disconnect(t.Context()); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
			if _, err := Dial(t.Context(), URI{Network: "unix", Address: socket}.String()); err == nil {
				t.Error("it goes without TLS")
			}
		})
	}
}
