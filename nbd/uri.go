package nbd

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// A URI names an export of a server, in the form that all NBD tools take:
//
//	nbd://host[:port]/export
//	nbd+unix:///export?socket=PATH
//
// and with nbds for nbd, and tls-certificates=DIR as a parameter, for TLS.
type URI struct {
	Network string // "tcp" or "unix", as for net.Dial
	Address string // "host:port", or the path of the socket
	Export  string // name of the export

	TLS          bool
	Certificates string // directory with ca-cert.pem, client-cert.pem, client-key.pem; may be empty
}

// ParseURI parses s. Parameters other than those are ignored, as the URI
// specification asks.
func ParseURI(s string) (URI, error) {
	fault := func(err error) (URI, error) { return URI{}, fmt.Errorf("nbd: URI %q: %w", s, err) }
	u, err := url.Parse(s)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok {
			err = e.Err
		}
		return fault(err)
	}
	export := strings.TrimPrefix(u.Path, "/")
	if err := checkString(export); err != nil {
		return fault(fmt.Errorf("export: %w", err))
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return fault(err)
	}
	of := URI{Export: export}
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	if of.TLS = scheme == "nbds"; of.TLS {
		of.Certificates = q.Get("tls-certificates")
	} else if scheme != "nbd" {
		transport = "?"
	}
	switch transport {
	case "":
		if u.Hostname() == "" {
			return fault(errors.New("no host"))
		}
		if u.Host[0] != '[' && strings.ContainsAny(u.Hostname(), "[]:") {
			return fault(fmt.Errorf("host %q: an IPv6 address stands in brackets", u.Hostname()))
		}
		port := u.Port()
		if port == "" {
			port = strconv.Itoa(DefaultPort)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fault(fmt.Errorf("port %q is not from 1 to 65535", port))
		}
		of.Network, of.Address = "tcp", net.JoinHostPort(u.Hostname(), port)
		return of, nil
	case "unix":
		path := q.Get("socket")
		if path == "" || u.Host != "" {
			return fault(fmt.Errorf("want %s:///export?socket=PATH", u.Scheme))
		}
		if strings.ContainsRune(path, 0) {
			return fault(errors.New("socket path with NUL"))
		}
		of.Network, of.Address = "unix", path
		return of, nil
	}
	return fault(fmt.Errorf("scheme %q is none of nbd, nbds, nbd+unix, nbds+unix", u.Scheme))
}

// URIOf is the URI of export on a server that listens on a. A wildcard address
// becomes localhost.
func URIOf(a net.Addr, export string) URI {
	u := URI{Network: a.Network(), Address: a.String(), Export: export}
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsUnspecified() {
		u.Address = net.JoinHostPort("localhost", strconv.Itoa(t.Port))
	}
	return u
}

// String is the URI as text; [ParseURI] gives u back.
func (u URI) String() string {
	scheme, certificates := "nbd", ""
	if u.TLS {
		if scheme = "nbds"; u.Certificates != "" {
			certificates = "tls-certificates=" + escapePath(u.Certificates)
		}
	}
	if u.Network == "unix" {
		if certificates != "" {
			certificates = "&" + certificates
		}
		return scheme + "+unix:///" + url.PathEscape(u.Export) + "?socket=" + escapePath(u.Address) + certificates
	}
	if certificates != "" {
		certificates = "?" + certificates
	}
	host, port, err := net.SplitHostPort(u.Address)
	if err != nil {
		host, port = u.Address, ""
	}
	if strings.Contains(host, ":") {
		host = "[" + strings.ReplaceAll(host, "%", "%25") + "]"
	}
	if port != "" && port != strconv.Itoa(DefaultPort) {
		host += ":" + port
	}
	return scheme + "://" + host + "/" + url.PathEscape(u.Export) + certificates
}

// escapePath is a path as the value of a parameter.
func escapePath(path string) string {
	path = strings.ReplaceAll(url.QueryEscape(path), "%2F", "/") // need no escape, and are read by people
	return strings.ReplaceAll(path, "+", "%20")                  // some parsers take + literally
}
