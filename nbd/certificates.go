package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The files of a directory of certificates, as nbdkit and qemu name them.
const (
	caCertFile     = "ca-cert.pem"
	caCRLFile      = "ca-crl.pem"
	serverCertFile = "server-cert.pem"
	serverKeyFile  = "server-key.pem"
	clientCertFile = "client-cert.pem"
	clientKeyFile  = "client-key.pem"
)

// Certificates are the TLS credentials of a server, from a directory of PEM files
// named as nbdkit and qemu name them:
//
//	server-cert.pem, server-key.pem   who the server is, with the chain
//	ca-cert.pem                       who signs clients; needed if they must show a certificate
//	ca-crl.pem                        what it has revoked; may be missing
//
// The files are looked at when a client begins with TLS, and read again when they
// have changed; those that cannot be used leave the ones before in force. What is
// in use already is not ended by that.
type Certificates struct {
	dir        string
	verifyPeer bool
	warn       func(error)

	mu struct {
		sync.Mutex
		config *tls.Config
		seen   stamps // of what was read last, good or bad
	}
}

// stamps tell whether files have changed.
type stamps [4]struct {
	info fs.FileInfo // nil: missing
	time time.Time
	size int64
}

func (s *stamps) same(t *stamps) bool {
	for i := range s {
		a, b := &s[i], &t[i]
		if (a.info == nil) != (b.info == nil) {
			return false
		}
		if a.info != nil && (!os.SameFile(a.info, b.info) || !a.time.Equal(b.time) || a.size != b.size) {
			return false
		}
	}
	return true
}

// LoadCertificates reads the certificates in dir. With verifyPeer clients must
// show one that is signed by the authority in ca-cert.pem, and not revoked. warn
// is told when changed files cannot be used; it may be called concurrently.
func LoadCertificates(dir string, verifyPeer bool, warn func(error)) (*Certificates, error) {
	c := &Certificates{dir: dir, verifyPeer: verifyPeer, warn: warn}
	c.mu.seen = c.stat()
	var err error
	if c.mu.config, err = c.load(); err != nil {
		return nil, fmt.Errorf("nbd: certificates: %w", err)
	}
	return c, nil
}

// Config is for [Options.TLS].
func (c *Certificates) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.current(), nil },
	}
}

// current is the configuration by the files as they are.
func (c *Certificates) current() *tls.Config {
	now := c.stat()
	c.mu.Lock()
	config, same := c.mu.config, c.mu.seen.same(&now)
	c.mu.seen = now
	c.mu.Unlock()
	if same {
		return config
	}
	fresh, err := c.load()
	if err != nil {
		c.warn(fmt.Errorf("nbd: certificates have changed and cannot be used, the ones before are: %w", err))
		return config
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.config = fresh
	return fresh
}

func (c *Certificates) stat() (s stamps) {
	for i, name := range []string{caCertFile, caCRLFile, serverCertFile, serverKeyFile} {
		if info, err := os.Stat(filepath.Join(c.dir, name)); err == nil {
			s[i].info, s[i].time, s[i].size = info, info.ModTime(), info.Size()
		}
	}
	return s
}

// load reads the files.
func (c *Certificates) load() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(c.dir, serverCertFile), filepath.Join(c.dir, serverKeyFile))
	if err != nil {
		return nil, fmt.Errorf("%s, %s: %w", serverCertFile, serverKeyFile, err)
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		// Every connection is checked against the files of today, and they
		// live long: there is nothing to resume.
		SessionTicketsDisabled: true,
		// Whole records from the first reply on.
		DynamicRecordSizingDisabled: true,
	}
	if !c.verifyPeer {
		return config, nil
	}
	pool, cas, err := loadCAs(filepath.Join(c.dir, caCertFile))
	if err != nil {
		return nil, err
	}
	config.ClientAuth, config.ClientCAs = tls.RequireAndVerifyClientCert, pool
	revoked, err := loadCRLs(filepath.Join(c.dir, caCRLFile), cas)
	if err != nil {
		return nil, err
	}
	if len(revoked) > 0 {
		config.VerifyConnection = func(st tls.ConnectionState) error { return checkRevoked(st.VerifiedChains, revoked) }
	}
	return config, nil
}

// loadCAs reads the certificates of authorities, at least one, from the file path.
func loadCAs(path string) (*x509.CertPool, []*x509.Certificate, error) {
	pool := x509.NewCertPool()
	var cas []*x509.Certificate
	err := eachPEM(path, "CERTIFICATE", func(der []byte) error {
		ca, err := x509.ParseCertificate(der)
		if err == nil {
			pool.AddCert(ca)
			cas = append(cas, ca)
		}
		return err
	})
	if err == nil && len(cas) == 0 {
		err = fmt.Errorf("%s has no certificate", path)
	}
	return pool, cas, err
}

// A revocation is a certificate that its issuer has revoked.
type revocation struct{ issuer, serial string }

// loadCRLs reads what the authorities cas have revoked from the file path, if
// there is one.
func loadCRLs(path string, cas []*x509.Certificate) (map[revocation]bool, error) {
	revoked := make(map[revocation]bool)
	err := eachPEM(path, "X509 CRL", func(der []byte) error {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			return err
		}
		err = errors.New("no certificate of its issuer is there")
		for _, ca := range cas {
			if string(ca.RawSubject) != string(list.RawIssuer) {
				continue
			}
			if err = list.CheckSignatureFrom(ca); err == nil {
				break
			}
		}
		if err != nil {
			return err
		}
		for _, e := range list.RevokedCertificateEntries {
			revoked[revocation{string(list.RawIssuer), e.SerialNumber.String()}] = true
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return revoked, err
}

// checkRevoked refuses a peer if each of its chains has a revoked certificate.
func checkRevoked(chains [][]*x509.Certificate, revoked map[revocation]bool) error {
chains:
	for _, chain := range chains {
		for _, cert := range chain {
			if revoked[revocation{string(cert.RawIssuer), cert.SerialNumber.String()}] {
				continue chains
			}
		}
		return nil
	}
	return errors.New("the client's certificate is revoked")
}

// eachPEM calls f with the content of each block of the given type in the file path.
func eachPEM(path, typ string, f func(der []byte) error) error {
	rest, err := os.ReadFile(path)
	for err == nil {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			return nil
		}
		if b.Type == typ {
			if err = f(b.Bytes); err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
		}
	}
	return err
}

// clientTLS is the configuration of a client whose certificates are in dir, for
// a server called name. Without a dir it trusts the authorities of the system,
// and shows no certificate; without one of its own in dir, it shows none either.
func clientTLS(dir, name string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: name}
	if dir == "" {
		return config, nil
	}
	var err error
	if config.RootCAs, _, err = loadCAs(filepath.Join(dir, caCertFile)); err != nil {
		return nil, fmt.Errorf("nbd: certificates: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, clientCertFile), filepath.Join(dir, clientKeyFile))
	if err == nil {
		config.Certificates = []tls.Certificate{pair}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("nbd: certificates: %s, %s: %w", clientCertFile, clientKeyFile, err)
	}
	return config, nil
}
