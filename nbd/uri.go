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
type URI struct {
	Network string // "tcp" or "unix", as for net.Dial
	Address string // "host:port", or the path of the socket
	Export  string // name of the export
}

// ParseURI parses s. Parameters other than socket are ignored, as the URI
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
	switch u.Scheme {
	case "nbd":
		if u.Hostname() == "" {
			return fault(errors.New("no host"))
		}
		port := u.Port()
		if port == "" {
			port = strconv.Itoa(DefaultPort)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fault(fmt.Errorf("port %q is not from 1 to 65535", port))
		}
		return URI{Network: "tcp", Address: net.JoinHostPort(u.Hostname(), port), Export: export}, nil
	case "nbd+unix":
		q, err := url.ParseQuery(u.RawQuery)
		if err != nil {
			return fault(err)
		}
		path := q.Get("socket")
		if path == "" || u.Host != "" {
			return fault(errors.New("want nbd+unix:///export?socket=PATH"))
		}
		if strings.ContainsRune(path, 0) {
			return fault(errors.New("socket path with NUL"))
		}
		return URI{Network: "unix", Address: path, Export: export}, nil
	}
	return fault(fmt.Errorf("scheme %q is neither nbd nor nbd+unix", u.Scheme))
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
	if u.Network == "unix" {
		path := strings.ReplaceAll(url.QueryEscape(u.Address), "%2F", "/") // need no escape, and are read by people
		path = strings.ReplaceAll(path, "+", "%20")                        // some parsers take + literally
		return "nbd+unix:///" + url.PathEscape(u.Export) + "?socket=" + path
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
	return "nbd://" + host + "/" + url.PathEscape(u.Export)
}
