package nbd

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/internal/certtest"
	"cnbd/internal/disktest"
)

// certDirs are certificates for tests: of a server, and of a client named alice.
type certDirs struct {
	ca             *certtest.Authority
	server, client string
}

func newCertDirs(t testing.TB) *certDirs {
	d := &certDirs{certtest.New(t), t.TempDir(), t.TempDir()}
	d.ca.Server(d.server)
	d.ca.Client(d.client, "alice", "alice.example.org")
	return d
}

// load is the server's side, on which every warning is an error.
func (d *certDirs) load(t testing.TB) *tls.Config {
	t.Helper()
	c, err := LoadCertificates(d.server, true, func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	return c.Config()
}

// serve starts a server of opts that requires TLS.
func (d *certDirs) serve(t testing.TB, opts Options) *testServer {
	t.Helper()
	opts.TLS, opts.TLSRequired = d.load(t), true
	s := serve(t, opts)
	s.tls = clientConfig(t, d.client)
	return s
}

// clientConfig is the client's side with the certificates in dir.
func clientConfig(t testing.TB, dir string) *tls.Config {
	t.Helper()
	c, err := clientTLS(dir, "localhost")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// tlsURI is the URI of export for clients with the certificates in dir.
func (s *testServer) tlsURI(export, dir string) string {
	return URI{Network: "unix", Address: s.path, Export: export, TLS: true, Certificates: dir}.String()
}

// dialTLS returns a client of export, with the certificates in dir.
func (s *testServer) dialTLS(export, dir string) *Client {
	s.t.Helper()
	c, err := Dial(s.t.Context(), s.tlsURI(export, dir))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// Data of all sizes goes both ways under both versions, from several connections
// at once, and the server knows who is there.
func TestTLS(t *testing.T) {
	dirs := newCertDirs(t)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		name := tls.VersionName(version)
		t.Run(name, func(t *testing.T) {
			d := newMemDisk(8 << 20)
			events := make(chan Event, 100)
			s := dirs.serve(t, Options{Exports: []Export{{Name: "x", Backend: d}}, Log: func(e Event) { events <- e }})
			config := s.tls.Clone()
			config.MaxVersion = version
			nc, err := net.Dial("unix", s.path)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Dialer{}.newClient(t.Context(), nc, "x", config)
			if err != nil {
				t.Fatal(err)
			}
			if e := <-events; e.Kind != EventOpen || e.TLS != name || e.Client != "alice" {
				t.Errorf("opened: %+v", e)
			}
			r := testRand(t)
			model := make([]byte, 8<<20)
			for range 100 {
				n := 1 + r.IntN(1<<(1+r.IntN(22)))
				off := r.IntN(len(model) - n + 1)
				p := pattern(n, byte(r.Uint32()))
				copy(model[off:], p)
				if err := c.WriteAt(t.Context(), p, uint64(off), false); err != nil {
					t.Fatal(err)
				}
				n = 1 + r.IntN(1<<(1+r.IntN(22)))
				off = r.IntN(len(model) - n + 1)
				got := make([]byte, n)
				if err := c.ReadAt(t.Context(), got, uint64(off)); err != nil {
					t.Fatal(err)
				}
				mustEqual(t, "read", got, model[off:][:n])
			}
			if err := c.Disconnect(t.Context()); err != nil {
				t.Errorf("Disconnect: %v", err)
			}
			if e := <-events; e.Kind != EventClose || e.Err != nil {
				t.Errorf("closed: %+v", e)
			}
		})
	}
}

// Small reads that are ready together share records, and in all they take little
// more than their bytes.
func TestTLSGathersReplies(t *testing.T) {
	dirs := newCertDirs(t)
	s := dirs.serve(t, Options{Exports: []Export{{Backend: newMemDisk(1 << 20)}}})
	nc, err := net.Dial("unix", s.path)
	if err != nil {
		t.Fatal(err)
	}
	count := &countConn{Conn: nc}
	c, err := Dialer{}.newClient(t.Context(), count, "", s.tls)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	before := count.got.Load()
	if err := c.ReadAt(t.Context(), make([]byte, 1<<20), 0); err != nil { // 256 segments
		t.Fatal(err)
	}
	// A record has 22 bytes around up to 16 KiB.
	if got := count.got.Load() - before; got > 1<<20+65*22+simpleReplySize {
		t.Errorf("1 MiB came in %d bytes", got)
	}
}

type countConn struct {
	net.Conn
	got atomic.Int64
}

func (c *countConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.got.Add(int64(n))
	return n, err
}

// Where TLS is required nothing is told and nothing is done without it; the
// handshake stays in sync, so that the client may yet begin with it.
func TestTLSRequired(t *testing.T) {
	dirs := newCertDirs(t)
	s := dirs.serve(t, Options{Exports: []Export{{Name: "secret", Backend: newMemDisk(4096)}}})
	for _, finish := range []func(rc rawConn){
		func(rc rawConn) { // the old way can only be refused by hanging up
			rc.put(appendOption(nil, optExportName, []byte("secret")))
			rc.eof()
		},
		func(rc rawConn) {
			rc.put(appendOption(nil, optAbort, nil))
			mustEqual(t, "ABORT", rc.get(optReplySize), appendOptReply(nil, optAbort, repAck, nil))
			rc.eof()
		},
		func(rc rawConn) {
			rc.put(appendOption(nil, optStartTLS, nil))
			mustEqual(t, "STARTTLS", rc.get(optReplySize), appendOptReply(nil, optStartTLS, repAck, nil))
			rc.Conn = tls.Client(rc.Conn, s.tls)
			rc.put(appendOption(nil, optExportName, []byte("secret")))
			if size := binary.BigEndian.Uint64(rc.get(10)); size != 4096 {
				t.Errorf("%d bytes", size)
			}
		},
	} {
		rc := s.raw()
		rc.get(18)
		rc.put([]byte{0, 0, 0, 3})
		refused := uint64(0)
		for _, opt := range []option{optList, optInfo, optGo, 8, 9, 10, 11, 0, 1 << 31} {
			before := s.Metrics().TLSMissing
			rc.put(appendOption(nil, opt, appendInfoQuery(nil, "secret")))
			b := rc.get(optReplySize)
			text := rc.get(int(binary.BigEndian.Uint32(b[16:])))
			mustEqual(t, "refused", append(b, text...), appendOptReply(nil, opt, repErrTLSReqd, []byte("TLS is required")))
			refused += s.Metrics().TLSMissing - before
		}
		if refused != 9 {
			t.Errorf("%d refusals counted, want 9", refused)
		}
		finish(rc)
	}
	if _, err := Dial(t.Context(), s.uri("secret")); !errors.Is(err, errOption(repErrTLSReqd)) {
		t.Errorf("a client without TLS: %v", err)
	}
	if list, err := List(t.Context(), s.tlsURI("", dirs.client)); err != nil || len(list) != 1 {
		t.Errorf("list under TLS: %v, %v", list, err)
	}
	s.dialTLS("secret", dirs.client)
}

// STARTTLS at a wrong moment, or in a wrong way.
func TestTLSOrder(t *testing.T) {
	dirs := newCertDirs(t)
	ended := make(chan error, 1)
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(4096)}}, TLS: dirs.load(t), Log: func(e Event) {
		if e.Kind == EventClose {
			ended <- e.Err
		}
	}})
	s.tls = clientConfig(t, dirs.client)
	hello := []byte{0, 0, 0, 3}
	refused := func(rc rawConn, data []byte, text string) {
		t.Helper()
		rc.put(appendOption(nil, optStartTLS, data))
		mustEqual(t, "refused", rc.get(optReplySize+len(text)), appendOptReply(nil, optStartTLS, repErrInvalid, []byte(text)))
	}

	t.Run("with data", func(t *testing.T) {
		rc := s.raw()
		rc.get(18)
		rc.put(hello)
		refused(rc, []byte("data"), "STARTTLS takes no data")
		rc.Close()
		<-ended
	})
	t.Run("twice", func(t *testing.T) {
		rc := s.rawTLS()
		refused(rc, nil, "TLS has begun already")
		rc.put(appendOption(nil, optExportName, nil))
		rc.get(10)
		rc.Close()
		<-ended
	})
	t.Run("after GO", func(t *testing.T) { // it is no request
		rc := s.rawGo()
		rc.put(appendOption(nil, optStartTLS, make([]byte, requestSize)))
		rc.eof()
		if err := <-ended; err != errBadMagic {
			t.Errorf("ended with %v", err)
		}
	})
	// What somebody between puts behind STARTTLS must not be taken for the
	// client's words under TLS, nor be answered.
	t.Run("pipelined", func(t *testing.T) {
		rc := s.raw()
		rc.get(18)
		rc.put(appendOption(appendOption(hello, optStartTLS, nil), optExportName, nil))
		rc.eof()
		if err := <-ended; err != errTLSPipelined {
			t.Errorf("ended with %v", err)
		}
	})
	// What was agreed on before is forgotten, with the export that was chosen.
	t.Run("after STRUCTURED_REPLY", func(t *testing.T) {
		rc := s.raw()
		rc.get(18)
		rc.put(appendOption(hello, optStructured, nil))
		mustEqual(t, "agreed", rc.get(optReplySize), appendOptReply(nil, optStructured, repAck, nil))
		rc.put(appendOption(nil, optStartTLS, nil))
		mustEqual(t, "STARTTLS", rc.get(optReplySize), appendOptReply(nil, optStartTLS, repAck, nil))
		rc.Conn = tls.Client(rc.Conn, s.tls)
		rc.put(appendOption(nil, optExportName, nil))
		rc.get(10)
		rc.request(CmdRead, 3, 0, 4)
		if e, cookie := rc.reply(); e != 0 || cookie != 3 { // a simple one
			t.Errorf("answer %v to %d", e, cookie)
		}
		rc.get(4)
		rc.Close()
		<-ended
	})
	t.Run("before the greeting is answered", func(t *testing.T) {
		rc := s.raw()
		rc.get(18)
		tls.Client(rc.Conn, s.tls).Handshake()
		if err := <-ended; !errors.Is(err, errUnknownFlags) {
			t.Errorf("ended with %v", err)
		}
	})
	t.Run("of an old client", func(t *testing.T) {
		rc := s.raw()
		rc.get(18)
		rc.put(appendOption([]byte{0, 0, 0, 0}, optStartTLS, nil))
		rc.eof()
		if err := <-ended; err != errNotFixed {
			t.Errorf("ended with %v", err)
		}
	})
	for name, garbage := range map[string]string{"text": "GET / HTTP/1.1\r\n\r\n", "option": string(appendOption(nil, optGo, nil))} {
		t.Run("granted, and then "+name, func(t *testing.T) {
			rc := s.raw()
			rc.get(18)
			rc.put(appendOption(hello, optStartTLS, nil))
			rc.get(optReplySize)
			rc.put([]byte(garbage))
			if err := <-ended; !errors.Is(err, errTLS) {
				t.Errorf("ended with %v", err)
			}
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		plain := serveDisk(t, newMemDisk(4096))
		if _, err := Dial(t.Context(), plain.tlsURI("", dirs.client)); !errors.Is(err, errOption(repErrPolicy)) {
			t.Errorf("a client that insists on TLS: %v", err)
		}
	})
	if n := s.Metrics().TLSFailed; n != 2 {
		t.Errorf("%d failed TLS handshakes counted, want those of the garbage", n)
	}
}

// Each wrong certificate is refused, and costs nobody else anything.
func TestTLSWrongCertificate(t *testing.T) {
	dirs := newCertDirs(t)
	revoked := t.TempDir()
	dirs.ca.Revoke(dirs.server, dirs.ca.Client(revoked, "mallory"))
	s := dirs.serve(t, Options{Exports: []Export{{Backend: newMemDisk(1 << 20)}}})
	other := s.dialTLS("", dirs.client)

	other2 := certtest.New(t)
	foreign, expired, server := t.TempDir(), t.TempDir(), t.TempDir()
	other2.Client(foreign, "alice")
	copyFile(t, dirs.client, caCertFile, foreign, caCertFile) // it trusts the server
	dirs.ca.Expired(expired, "alice")
	copyFile(t, dirs.server, serverCertFile, server, clientCertFile)
	copyFile(t, dirs.server, serverKeyFile, server, clientKeyFile)
	copyFile(t, dirs.server, caCertFile, server, caCertFile)
	none := t.TempDir()
	copyFile(t, dirs.client, caCertFile, none, caCertFile)

	n := uint64(0)
	for _, tc := range []struct {
		name, dir string
		change    func(c *tls.Config)
	}{
		{name: "none", dir: none},
		{name: "of a foreign authority", dir: foreign},
		{name: "expired", dir: expired},
		{name: "of a server", dir: server},
		{name: "revoked", dir: revoked},
		{name: "good, under TLS 1.1", dir: dirs.client, change: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS11, tls.VersionTLS11 }},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tc.name+"/"+tls.VersionName(version), func(t *testing.T) {
				config := clientConfig(t, tc.dir)
				config.MaxVersion = version
				if tc.change != nil {
					tc.change(config)
				}
				nc, err := net.Dial("unix", s.path)
				if err != nil {
					t.Fatal(err)
				}
				if c, err := (Dialer{}).newClient(t.Context(), nc, "", config); err == nil {
					c.Close()
					t.Error("let in")
				}
				n++
				eventually(t, "it is counted", func() bool { return s.Metrics().TLSFailed == n })
			})
		}
	}
	if err := other.WriteAt(t.Context(), pattern(10000, 1), 0, true); err != nil {
		t.Errorf("another client: %v", err)
	}
	s.dialTLS("", dirs.client)

	// And the client is as strict with the server.
	if _, err := Dial(t.Context(), s.tlsURI("", "")); err == nil {
		t.Error("a client that trusts the system's authorities only is content with the server")
	}
}

func copyFile(t testing.TB, from, name, to, as string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(from, name))
	if err == nil {
		err = os.WriteFile(filepath.Join(to, as), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// An export with names is for them alone: others neither get it nor see it.
func TestAllow(t *testing.T) {
	dirs := newCertDirs(t)
	bob := t.TempDir()
	dirs.ca.Client(bob, "bob", "host2.example.org", "backup.example.org")
	s := serve(t, Options{TLS: dirs.load(t), Exports: []Export{
		{Name: "alice", Backend: newMemDisk(1 << 20), Allow: []string{"alice"}},
		{Name: "bob", Backend: newMemDisk(1 << 20), Allow: []string{"somebody", "backup.example.org"}},
		{Name: "both", Backend: newMemDisk(1 << 20), Allow: []string{"alice.example.org", "bob"}},
		{Name: "all", Backend: newMemDisk(1 << 20)},
		{Name: "case", Backend: newMemDisk(1 << 20), Allow: []string{"Alice", "alic", "alice.", "*", "*.example.org"}},
	}})
	const noTLS = "no TLS"
	forbidden := uint64(0)
	for client, may := range map[string][]string{
		dirs.client: {"alice", "both", "all"},
		bob:         {"bob", "both", "all"},
		noTLS:       {"all"},
	} {
		uri := func(export string) string { return s.tlsURI(export, client) }
		refusal := repErrPolicy
		if client == noTLS {
			uri, refusal = s.uri, repErrTLSReqd
		}
		list, err := List(t.Context(), uri(""))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range list {
			names = append(names, e.Name)
		}
		if !slices.Equal(names, may) {
			t.Errorf("%s sees %q, want %q", client, names, may)
		}
		for _, name := range []string{"alice", "bob", "both", "all", "case", "none"} {
			want := refusal
			if slices.Contains(may, name) {
				want = 0
			} else if name == "none" {
				want = repErrUnknown
			} else {
				forbidden++
			}
			c, err := Dial(t.Context(), uri(name))
			switch {
			case err == nil && want == 0:
				if err := c.WriteAt(t.Context(), []byte{1}, 0, false); err != nil {
					t.Error(err)
				}
			case err == nil || !errors.Is(err, errOption(want)):
				t.Errorf("%s asks for %s: %v, want %v", client, name, err, want)
			}
			if err == nil {
				c.Close()
			}
		}
	}
	if got := s.Metrics().ExportsForbidden; got != forbidden {
		t.Errorf("%d refusals counted, want %d", got, forbidden)
	}
	// The old way can only hang up.
	rc := s.raw()
	rc.get(18)
	rc.put(appendOption([]byte{0, 0, 0, 3}, optExportName, []byte("alice")))
	rc.eof()
	// What INFO has told is not chosen: EXPORT_NAME is judged for itself.
	s.tls = clientConfig(t, bob)
	rc = s.rawTLS()
	rc.put(appendOption(nil, optExportName, []byte("alice")))
	rc.eof()

	if _, err := NewServer(Options{Exports: []Export{{Backend: newMemDisk(1), Allow: []string{"x"}}}}); err == nil {
		t.Error("names without TLS are accepted")
	}
	if _, err := NewServer(Options{Exports: []Export{{Backend: newMemDisk(1)}}, TLSRequired: true}); err == nil {
		t.Error("TLS is required without any, and that is accepted")
	}
}

// New files are used from the next client on; what cannot be used changes nothing
// and is told; who is connected stays so.
func TestCertificateReload(t *testing.T) {
	dirs := newCertDirs(t)
	var warnings []string
	certs, err := LoadCertificates(dirs.server, true, func(err error) { warnings = append(warnings, err.Error()) })
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, Options{Exports: []Export{{Backend: newMemDisk(4096)}}, TLS: certs.Config(), TLSRequired: true})
	// serial is that of the server's certificate, as a client of dir sees it.
	serial := func(dir string) string {
		t.Helper()
		s.tls = clientConfig(t, dir)
		rc := s.rawTLS()
		rc.put(appendOption(nil, optExportName, nil))
		rc.get(10)
		return rc.Conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	warned := func(parts ...string) {
		t.Helper()
		if len(warnings) != len(parts) {
			t.Fatalf("warnings: %q", warnings)
		}
		for i, p := range parts {
			if !strings.Contains(warnings[i], p) {
				t.Errorf("warning %q lacks %q", warnings[i], p)
			}
		}
		warnings = nil
	}
	old := s.dialTLS("", dirs.client)
	first := serial(dirs.client)
	if serial(dirs.client) != first {
		t.Error("it changes by itself")
	}
	second := dirs.ca.Server(dirs.server).SerialNumber.String()
	if got := serial(dirs.client); got != second || got == first {
		t.Errorf("serial %s after a change from %s to %s", got, first, second)
	}
	warned()

	// Half of a change, with a client between the two.
	fresh := t.TempDir()
	third := dirs.ca.Server(fresh).SerialNumber.String()
	copyFile(t, fresh, serverCertFile, dirs.server, serverCertFile)
	for range 3 {
		if got := serial(dirs.client); got != second {
			t.Errorf("serial %s, want that of the last good pair, %s", got, second)
		}
	}
	warned("private key does not match") // once
	copyFile(t, fresh, serverKeyFile, dirs.server, serverKeyFile)
	if got := serial(dirs.client); got != third {
		t.Errorf("serial %s, want %s", got, third)
	}
	warned()

	for name, part := range map[string]string{serverKeyFile: serverKeyFile, caCertFile: "has no certificate"} {
		if err := os.WriteFile(filepath.Join(dirs.server, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		serial(dirs.client)
		warned(part)
		copyFile(t, fresh, name, dirs.server, name)
		serial(dirs.client)
		warned()
	}

	// Revocation works at once, and is taken back.
	bob := t.TempDir()
	cert := dirs.ca.Client(bob, "bob")
	serial(bob)
	dirs.ca.Revoke(dirs.server, cert)
	if c, err := Dial(t.Context(), s.tlsURI("", bob)); err == nil {
		c.Close()
		t.Error("a revoked certificate is let in")
	}
	serial(dirs.client)
	foreign := certtest.New(t)
	foreign.Revoke(dirs.server)
	serial(dirs.client)
	warned(caCRLFile)
	if err := os.Remove(filepath.Join(dirs.server, caCRLFile)); err != nil {
		t.Fatal(err)
	}
	serial(bob)

	// Another authority: who has a certificate of the old one is out.
	foreign.Server(dirs.server)
	if c, err := Dial(t.Context(), s.tlsURI("", dirs.client)); err == nil {
		c.Close()
		t.Error("a client of the authority before is let in")
	}
	foreign.Client(bob, "bob")
	serial(bob)
	warned()
	if err := old.Flush(t.Context()); err != nil {
		t.Errorf("the client of before: %v", err)
	}

	empty := t.TempDir()
	if _, err := LoadCertificates(empty, true, nil); err == nil || !strings.Contains(err.Error(), serverCertFile) {
		t.Errorf("an empty directory: %v", err)
	}
	copyFile(t, dirs.server, serverCertFile, empty, serverCertFile)
	copyFile(t, dirs.server, serverKeyFile, empty, serverKeyFile)
	if _, err := LoadCertificates(empty, true, nil); err == nil || !strings.Contains(err.Error(), caCertFile) {
		t.Errorf("without an authority: %v", err)
	}
	if _, err := LoadCertificates(empty, false, nil); err != nil {
		t.Errorf("without an authority, which is not needed: %v", err)
	}
}

// A cutConn dies when it has sent so many bytes.
type cutConn struct {
	net.Conn
	left int
}

func (c *cutConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p[:min(len(p), c.left)])
	if c.left -= n; c.left == 0 {
		c.Conn.Close()
		return n, net.ErrClosed
	}
	return n, err
}

// A client that dies in the middle of any message under TLS, at any byte of it,
// leaves nothing behind, and others notice nothing.
func TestTLSDeathAtEveryByte(t *testing.T) {
	dirs := newCertDirs(t)
	d := newMemDisk(1 << 20)
	s := dirs.serve(t, Options{Exports: []Export{{Backend: d}}})
	other := s.dialTLS("", dirs.client)
	want := pattern(5000, 7)
	if err := other.WriteAt(t.Context(), want, 500_000, false); err != nil {
		t.Fatal(err)
	}
	// talk is a whole conversation, of which limit bytes are sent.
	talk := func(limit int) (left int) {
		nc, err := net.Dial("unix", s.path)
		if err != nil {
			t.Fatal(err)
		}
		cut := &cutConn{nc, limit}
		defer nc.Close()
		c, err := Dialer{}.newClient(t.Context(), cut, "", s.tls)
		if err != nil {
			return cut.left
		}
		ctx := t.Context()
		if c.WriteAt(ctx, make([]byte, 600), 100, false) == nil && c.ReadAt(ctx, make([]byte, 600), 0) == nil && c.Flush(ctx) == nil &&
			c.Trim(ctx, 0, 4096, false) == nil {
			c.Disconnect(ctx)
		}
		c.Close()
		return cut.left
	}
	const plenty = 1 << 20
	all := plenty - talk(plenty)
	if all < 1000 || all > 10_000 {
		t.Fatalf("the conversation has %d bytes", all)
	}
	step := max(1, 11/disktest.Scale(t))
	for limit := 1; limit <= all; limit += step {
		talk(limit)
	}
	eventually(t, "they are gone", func() bool { return s.Metrics().Connections == 1 })
	d.idle(t)
	got := make([]byte, len(want))
	if err := other.ReadAt(t.Context(), got, 500_000); err != nil || !bytes.Equal(got, want) {
		t.Errorf("another client: %v, and the data is the same: %v", err, bytes.Equal(got, want))
	}
}

// The handshake's time is that of TLS too; and a request's is the same as without.
func TestTLSTimeouts(t *testing.T) {
	dirs := newCertDirs(t)
	today := time.Now()
	clock := func() time.Time { return today } // the fake one is in another century
	config := dirs.load(t)
	config.Time = clock
	inner := config.GetConfigForClient
	config.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := inner(h)
		if err == nil {
			c = c.Clone()
			c.Time = clock
		}
		return c, err
	}
	client := clientConfig(t, dirs.client)
	client.Time = clock
	opts := Options{HandshakeTimeout: 10 * time.Second, StallTimeout: time.Minute, TLS: config}
	begin := func(nc net.Conn) *tls.Conn {
		nc.Write(appendOption([]byte{0, 0, 0, 3}, optStartTLS, nil))
		io.ReadFull(nc, make([]byte, optReplySize))
		return tls.Client(nc, client)
	}
	hello := func(nc net.Conn) *tls.Conn {
		tc := begin(nc)
		tc.Write(appendOption(nil, optExportName, nil))
		io.ReadFull(tc, make([]byte, 10))
		return tc
	}
	for _, tc := range []struct {
		name string
		send func(nc net.Conn)
		want time.Duration
	}{
		{"no hello", func(nc net.Conn) { begin(nc) }, 10 * time.Second},
		{"half a hello", func(nc net.Conn) { begin(nc); nc.Write([]byte("\x16\x03\x01\x00\x80\x01")) }, 10 * time.Second},
		{"no option", func(nc net.Conn) { begin(nc).Handshake() }, 10 * time.Second},
		{"half a header", func(nc net.Conn) { hello(nc).Write(header{}.appendTo(nil)[:20]) }, time.Minute},
		{"half a payload", func(nc net.Conn) {
			hello(nc).Write(append(header{cmd: CmdWrite, n: 100000}.appendTo(nil), make([]byte, 99999)...))
		}, time.Minute},
		{"a reply not read", func(nc net.Conn) {
			hello(nc).Write(header{cmd: CmdRead, n: 10}.appendTo(nil))
			time.Sleep(10 * time.Minute)
		}, 10 * time.Minute},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := timedEnd(t, opts, tc.send); got != tc.want {
				t.Errorf("hung up after %v, want %v", got, tc.want)
			}
		})
	}
}

// Shutdown answers what is in flight under TLS as well, and says good-bye.
func TestTLSShutdown(t *testing.T) {
	dirs := newCertDirs(t)
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onFlush = g.wait
	s := dirs.serve(t, Options{Exports: []Export{{Backend: d}}})
	idle, busy, shaking := s.rawGo(), s.rawGo(), s.rawTLS()
	busy.request(CmdFlush, 5, 0, 0)
	<-g.entered
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(t.Context()) }()
	idle.eof()
	shaking.eof()
	g.open(1)
	if e, cookie := busy.reply(); e != 0 || cookie != 5 {
		t.Errorf("answer %v to %d", e, cookie)
	}
	if _, err := busy.Read(make([]byte, 1)); err != io.EOF { // not a truncation
		t.Errorf("the end: %v", err)
	}
	busy.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
