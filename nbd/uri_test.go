package nbd

import (
	"net"
	"testing"
)

func TestURI(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want URI
		out  string // "": as in
	}{
		{"nbd://example.org", URI{Network: "tcp", Address: "example.org:10809", Export: ""}, "nbd://example.org/"},
		{"nbd://example.org:10809/", URI{Network: "tcp", Address: "example.org:10809", Export: ""}, "nbd://example.org/"},
		{"nbd://example.org:1/disk", URI{Network: "tcp", Address: "example.org:1", Export: "disk"}, ""},
		{"nbd://[::1]:1/disk", URI{Network: "tcp", Address: "[::1]:1", Export: "disk"}, ""},
		{"nbd://[fe80::1%25eth0]/", URI{Network: "tcp", Address: "[fe80::1%eth0]:10809", Export: ""}, ""},
		{"nbd://h//abs/path", URI{Network: "tcp", Address: "h:10809", Export: "/abs/path"}, "nbd://h/%2Fabs%2Fpath"},
		{"nbd+unix:///?socket=/run/a.sock", URI{Network: "unix", Address: "/run/a.sock", Export: ""}, ""},
		{"nbd+unix:///disk?socket=/run/a.sock&tls-hostname=x", URI{Network: "unix", Address: "/run/a.sock", Export: "disk"}, "nbd+unix:///disk?socket=/run/a.sock"},
		{"nbd+unix:///a%3Fb%23c%20d?socket=/x%20y%26z%2Bw", URI{Network: "unix", Address: "/x y&z+w", Export: "a?b#c d"}, ""},
		{"nbds://h/", URI{Network: "tcp", Address: "h:10809", TLS: true}, ""},
		{"nbds://h/x?tls-certificates=/etc/pki/a%26b", URI{Network: "tcp", Address: "h:10809", Export: "x", TLS: true, Certificates: "/etc/pki/a&b"}, ""},
		{"nbds+unix:///x?socket=/s&tls-certificates=/c", URI{Network: "unix", Address: "/s", Export: "x", TLS: true, Certificates: "/c"}, ""},
		{"nbd://h/?tls-certificates=/c", URI{Network: "tcp", Address: "h:10809"}, "nbd://h/"},
		{"nbd+unix:///%C3%BC?socket=rel", URI{Network: "unix", Address: "rel", Export: "ü"}, ""},
	} {
		u, err := ParseURI(tc.in)
		if err != nil || u != tc.want {
			t.Errorf("ParseURI(%q) = %+v, %v; want %+v", tc.in, u, err, tc.want)
			continue
		}
		if tc.out == "" {
			tc.out = tc.in
		}
		if got := u.String(); got != tc.out {
			t.Errorf("%+v prints as %s, want %s", u, got, tc.out)
		}
	}
	for _, in := range []string{
		"", "example.org", "http://example.org/", "nbdx://example.org/", "nbd+vsock://1/", "nbds+tcp://h/", "+unix:///?socket=/s", "nbd:///", "nbd://h:0/", "nbd://h:65536/", "nbd://h:x/",
		"nbd+unix:///", "nbd+unix:///disk?socket=", "nbd+unix://host/?socket=/s", "nbd+unix:///?socket=%00", "nbd+unix:///?socket=%zz",
		"nbd://h/%ff", "nbd://h/a%00b", "nbd://]", "nbd://a[b/", "nbd://::1/", "nbd://a]:1/",
	} {
		if u, err := ParseURI(in); err == nil {
			t.Errorf("ParseURI(%q) = %+v", in, u)
		}
	}
}

func TestURIOf(t *testing.T) {
	for want, a := range map[string]net.Addr{
		"nbd://127.0.0.1/x":            &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809},
		"nbd://localhost:1/x":          &net.TCPAddr{IP: net.IPv6zero, Port: 1},
		"nbd://[::1]:1/x":              &net.TCPAddr{IP: net.IPv6loopback, Port: 1},
		"nbd+unix:///x?socket=/run/nb": &net.UnixAddr{Net: "unix", Name: "/run/nb"},
	} {
		if got := URIOf(a, "x").String(); got != want {
			t.Errorf("%v: %s, want %s", a, got, want)
		}
	}
}
