// Package certtest makes certificates for tests: an authority, and directories in
// the layout that cnbd, nbdkit, qemu and libnbd read.
package certtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An Authority signs certificates. It is not for concurrent use.
type Authority struct {
	t      testing.TB
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

// New makes an authority of its own.
func New(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{t: t, key: newKey(t)}
	a.cert = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "authority of a test"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, a.key)
	return a
}

// Server writes ca-cert.pem, server-cert.pem and server-key.pem of a server on
// this host into dir.
func (a *Authority) Server(dir string) *x509.Certificate {
	return a.write(dir, "server", &x509.Certificate{
		Subject: pkix.Name{CommonName: "server"}, DNSNames: []string{"localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
}

// Client writes ca-cert.pem, client-cert.pem and client-key.pem of a client with
// that common name and those DNS names into dir.
func (a *Authority) Client(dir, name string, dns ...string) *x509.Certificate {
	return a.write(dir, "client", &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: dns,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// Expired is Client, of yesterday.
func (a *Authority) Expired(dir, name string) *x509.Certificate {
	return a.write(dir, "client", &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(-time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// Revoke writes ca-crl.pem with certs into dir.
func (a *Authority) Revoke(dir string, certs ...*x509.Certificate) {
	a.t.Helper()
	a.serial++
	list := &x509.RevocationList{Number: big.NewInt(a.serial), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(24 * time.Hour)}
	for _, c := range certs {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	writePEM(a.t, filepath.Join(dir, "ca-crl.pem"), "X509 CRL", der)
}

// write signs c for a new key and writes both into dir, beside the authority's.
func (a *Authority) write(dir, role string, c *x509.Certificate) *x509.Certificate {
	a.t.Helper()
	key := newKey(a.t)
	c.KeyUsage = x509.KeyUsageDigitalSignature
	cert := a.sign(c, key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	writePEM(a.t, filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", a.cert.Raw)
	writePEM(a.t, filepath.Join(dir, role+"-cert.pem"), "CERTIFICATE", cert.Raw)
	writePEM(a.t, filepath.Join(dir, role+"-key.pem"), "PRIVATE KEY", der)
	return cert
}

// sign returns c, for key, signed by a; the authority itself if there is none yet.
func (a *Authority) sign(c *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	a.t.Helper()
	a.serial++
	c.SerialNumber = big.NewInt(a.serial)
	c.NotBefore = time.Now().Add(-24 * time.Hour)
	if c.NotAfter.IsZero() {
		c.NotAfter = time.Now().Add(24 * time.Hour)
	}
	parent := a.cert
	if parent == nil {
		parent = c
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// writePEM puts a file in place as a whole.
func writePEM(t testing.TB, path, typ string, der []byte) {
	t.Helper()
	text := pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
	err := os.WriteFile(path+".new", text, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}
