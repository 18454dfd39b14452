package config

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// An Address is a place to listen on, in the terms of [net.Listen].
type Address struct {
	Network string // unix or tcp
	Address string // path of the socket, or host:port
}

// unixPathMax is the longest path of a unix socket: sun_path of unix(7), 108
// bytes, with the zero byte that ends it.
const unixPathMax = 107

// defaultPort is NBD's port, assigned by IANA.
const defaultPort = "10809"

// ParseAddress reads unix:PATH, unix:@NAME (an abstract socket) or tcp:[HOST][:PORT]. HOST is 127.0.0.1 and PORT
// 10809 if left out; an IPv6 host stands in brackets, and port 0 is one that
// the system chooses.
func ParseAddress(s string) (Address, error) { return parseAddress(s, defaultPort) }

// ParseMetricsAddress reads unix:PATH or tcp:[HOST]:PORT. HOST is 127.0.0.1 if left
// out; the port has no default, and 0 is one that the system chooses. Abstract
// sockets are refused: everybody on the host could use them.
func ParseMetricsAddress(s string) (Address, error) {
	a, err := parseAddress(s, "")
	switch {
	case err == nil && strings.HasPrefix(a.Address, "@"):
		err = fmt.Errorf("%q would be open to every user of the host: give unix:PATH", s)
	case err == nil && a.Network == "tcp" && strings.HasSuffix(a.Address, ":"):
		err = fmt.Errorf("%q has no port", s)
	}
	return a, err
}

// parseAddress reads an address whose port, if left out, is the given one.
func parseAddress(s, otherwise string) (Address, error) {
	network, address, _ := strings.Cut(s, ":")
	switch network {
	case "unix":
		switch {
		case address == "" || strings.ContainsRune(address, 0):
			return Address{}, fmt.Errorf("%q has no path for the socket", s)
		case address == "@":
			return Address{}, fmt.Errorf("%q has no name behind the @, which stands for an abstract socket", s)
		case len(address) > unixPathMax:
			return Address{}, fmt.Errorf("%q is too long: the path of a unix socket has at most %d bytes", s, unixPathMax)
		}
		return Address{network, address}, nil
	case "tcp":
		if i := strings.LastIndexByte(address, ':'); i < 0 || address[len(address)-1] == ']' {
			address += ":" + otherwise
		}
		host, port, err := net.SplitHostPort(address)
		host, port = cmp.Or(host, "127.0.0.1"), cmp.Or(port, otherwise)
		if err == nil && port != "" {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err == nil {
			return Address{network, net.JoinHostPort(host, port)}, nil
		}
	}
	return Address{}, fmt.Errorf("%q is not an address: give unix:PATH or tcp:HOST:PORT, such as tcp:127.0.0.1:10809", s)
}

// String is a in the form that [ParseAddress] reads, with nothing left out.
func (a Address) String() string { return a.Network + ":" + a.Address }

// Local reports whether only this host can reach a: a unix socket or a
// loopback address.
func (a Address) Local() bool {
	if a.Network == "unix" {
		return true
	}
	host, _, err := net.SplitHostPort(a.Address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}
