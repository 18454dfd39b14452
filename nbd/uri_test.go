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
		{"nbd://example.org", URI{"tcp", "example.org:10809", ""}, "nbd://example.org/"},
		{"nbd://example.org:10809/", URI{"tcp", "example.org:10809", ""}, "nbd://example.org/"},
		{"nbd://example.org:1/disk", URI{"tcp", "example.org:1", "disk"}, ""},
		{"nbd://[::1]:1/disk", URI{"tcp", "[::1]:1", "disk"}, ""},
		{"nbd://[fe80::1%25eth0]/", URI{"tcp", "[fe80::1%eth0]:10809", ""}, ""},
		{"nbd://h//abs/path", URI{"tcp", "h:10809", "/abs/path"}, "nbd://h/%2Fabs%2Fpath"},
		{"nbd+unix:///?socket=/run/a.sock", URI{"unix", "/run/a.sock", ""}, ""},
		{"nbd+unix:///disk?socket=/run/a.sock&tls-hostname=x", URI{"unix", "/run/a.sock", "disk"}, "nbd+unix:///disk?socket=/run/a.sock"},
		{"nbd+unix:///a%3Fb%23c%20d?socket=/x%20y%26z%2Bw", URI{"unix", "/x y&z+w", "a?b#c d"}, ""},
		{"nbd+unix:///%C3%BC?socket=rel", URI{"unix", "rel", "ü"}, ""},
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
		"", "example.org", "http://example.org/", "nbds://example.org/", "nbd:///", "nbd://h:0/", "nbd://h:65536/", "nbd://h:x/",
		"nbd+unix:///", "nbd+unix:///disk?socket=", "nbd+unix://host/?socket=/s", "nbd+unix:///?socket=%00", "nbd+unix:///?socket=%zz",
		"nbd://h/%ff", "nbd://h/a%00b",
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
