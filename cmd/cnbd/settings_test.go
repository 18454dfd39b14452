//go:build !race && !invariants

package main

import (
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"cnbd/internal/certtest"
	"cnbd/nbd"
)

// TestSettingsOfClients gives each setting that concerns clients, and looks whether
// the program does what it says, and does not without it.
func TestSettingsOfClients(t *testing.T) {
	certs, nobody := t.TempDir(), t.TempDir()
	ca := certtest.New(t)
	ca.Server(certs)
	ca.Client(nobody, "nobody")
	stranger := t.TempDir() // has a certificate of nobody's authority, and trusts the server
	certtest.New(t).Client(stranger, "stranger")
	edit(t, stranger+"/ca-cert.pem", func([]byte) []byte {
		b, err := os.ReadFile(certs + "/ca-cert.pem")
		if err != nil {
			t.Fatal(err)
		}
		return b
	})

	export := func(uri, name string) string { return strings.Replace(uri, "/disk?", "/"+name+"?", 1) }
	// Each tells whether the client was served.
	dials := func(uri string) bool {
		c, err := nbd.Dial(t.Context(), uri)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	lists := func(s *server) bool { _, err := nbd.List(t.Context(), s.uri); return err == nil }
	another := func(s *server) bool { // beside one that is there
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return dials(s.uri)
	}
	// stays tells whether the connection is there 1.5 s after the client has sent
	// this much of an EXPORT_NAME and a request.
	stays := func(n int) func(s *server) bool {
		return func(s *server) bool {
			nc, err := net.Dial("unix", s.socket)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			talk := "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x01\x00\x00\x00\x04disk" + "\x25\x60\x95\x13\x00\x00"
			if _, err := io.WriteString(nc, talk[:n]); err != nil {
				t.Fatal(err)
			}
			nc.SetReadDeadline(time.Now().Add(1500 * time.Millisecond))
			_, err = io.Copy(io.Discard, nc)
			timeout, ok := err.(net.Error)
			return ok && timeout.Timeout()
		}
	}
	const handshake, idle, stalled = 10, 24, 30
	tlsOn := []string{"--tls=require", "--tls-certificates=" + certs}
	for _, tc := range []struct {
		name          string
		args, without []string // with the setting, and without
		served        func(s *server) bool
		with          bool // what served says with it; without it, the opposite
	}{
		{"list-exports", []string{"--list-exports=false"}, nil, lists, false},
		{"default-export", []string{"--default-export=disk"}, nil, func(s *server) bool { return dials(export(s.uri, "")) }, true},
		{"connections-max", []string{"--connections-max=1"}, nil, another, false},
		{"export-connections-max", []string{"--export-connections-max=1"}, nil, another, false},
		{"handshake-timeout", []string{"--handshake-timeout=100ms"}, nil, stays(handshake), false},
		{"idle-timeout", []string{"--idle-timeout=300ms"}, nil, stays(idle), false},
		{"stall-timeout", []string{"--stall-timeout=1s"}, nil, stays(stalled), false},
		{"tls", tlsOn, nil, func(s *server) bool { return dials(strings.Replace(s.uri, "nbds", "nbd", 1)) }, false},
		{"tls on", []string{"--tls=on", tlsOn[1]}, tlsOn, func(s *server) bool { return dials(strings.Replace(s.uri, "nbds", "nbd", 1)) }, true},
		{"tls-verify-peer", append(tlsOn, "--tls-verify-peer=false"), tlsOn, func(s *server) bool { return dials(s.uri + "&tls-certificates=" + stranger) }, true},
		{"allow", append(tlsOn, "--allow=somebody", "--allow=nobody"), append(tlsOn, "--allow=somebody"),
			func(s *server) bool { return dials(s.uri + "&tls-certificates=" + nobody) }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for i, args := range [][]string{tc.args, tc.without} {
				s := serve(t, append([]string{"--size=64MiB", "--export=disk", dir + "/disk"}, args...)...)
				if got := tc.served(s); got != (tc.with == (i == 0)) {
					t.Errorf("with %q: served is %v", args, got)
				}
				s.stop(t)
			}
		})
	}
}

// TestAllowPlaintext: an address that is not known to be this host's alone is served on
// without TLS only if that is allowed.
func TestAllowPlaintext(t *testing.T) {
	dir := t.TempDir()
	args := []string{"--size=64MiB", "--listen=tcp:LOCALHOST:0", dir + "/disk"} // a name like any other, for all that cnbd knows
	if r := try(t, binary, append([]string{"serve"}, args...)...); r.status != exitUsage || !strings.Contains(r.stderr, "can be reached by other hosts") {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	s := serve(t, append(args, "--allow-plaintext")...)
	c, err := nbd.Dial(t.Context(), s.uri)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	s.stop(t)
}
