package config

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// sizeMax is the largest device and the largest backing: file offsets
	// have 63 bits.
	sizeMax Size = math.MaxInt64
	// stringMax is the longest string that NBD allows, in bytes.
	stringMax = 4096
)

// The limits of settings whose valid values are words or few.
var (
	tlsModes   = []string{TLSOff, TLSOn, TLSRequire}
	logLevels  = []string{"trace", "debug", "info", "warn", "error"}
	logFormats = []string{LogAuto, LogJSON, LogConsole}
	codecs     = []string{"auto", "zstd", "s2", "none"}

	recompressions = []string{"auto", "off", "zstd:fastest", "zstd:default", "zstd:better", "zstd:best", "s2:fast", "s2:better"}
	extents        = []Size{32 * KiB, 64 * KiB, 128 * KiB}
)

// levelMax is the highest level of a codec: zstd has four, s2 two.
var levelMax = map[string]int{"": 4, "zstd": 4, "s2": 2}

// Validate reports all that is wrong with c, as joined [Fault] errors; nil if
// nothing is. It looks at c alone, never at the system.
func (c *Config) Validate() error {
	var fs faults
	c.validate(&fs)
	return fs.join()
}

func (c *Config) validate(fs *faults) {
	c.validateExports(fs)
	c.validateListen(fs)
	c.validateMetrics(fs)

	fs.add("cache", within(c.Cache, 16*MiB, sizeMax))
	if c.DirtyMax != 0 && !fs.has("cache") {
		fs.add("dirty-max", within(c.DirtyMax, 4*MiB, c.Cache/4*3))
	}
	if !fs.has("cache") && !fs.has("dirty-max") {
		fs.add("background", within(c.Background, 0, c.DirtyLimit()/4*3))
	}
	fs.add("payload", within(c.Payload, 64*MiB, sizeMax))
	fs.add("map-cache", within(c.MapCache, 1*MiB, sizeMax))
	if c.Extent != 0 {
		fs.add("extent", oneOf(c.Extent, extents))
	}
	fs.add("workers", within(c.Workers, 0, 256))
	fs.add("commit-interval", within(c.CommitInterval, 10*time.Millisecond, time.Hour))
	fs.add("checkpoint-interval", within(c.CheckpointInterval, 16*MiB, 64*GiB))
	fs.add("writeback-period", within(c.WritebackPeriod, 10*time.Millisecond, time.Hour))
	fs.add("writeback-expire", within(c.WritebackExpire, 10*time.Millisecond, 24*time.Hour))
	fs.add("handshake-timeout", within(c.HandshakeTimeout, 100*time.Millisecond, 10*time.Minute))
	fs.add("stall-timeout", within(c.StallTimeout, time.Second, 24*time.Hour))
	fs.add("idle-timeout", within(c.IdleTimeout, 0, 8760*time.Hour))
	fs.add("connections-max", within(c.ConnectionsMax, 1, 65536))
	fs.add("requests-max", within(c.RequestsMax, 1, 4096))
	fs.add("busy-poll", within(c.BusyPoll, 0, time.Millisecond))
	fs.add("oom-score-adjust", within(c.OOMScoreAdjust, -1000, 0))
	fs.add("log-level", oneOf(c.LogLevel, logLevels))
	fs.add("log-format", oneOf(c.LogFormat, logFormats))
}

func (c *Config) validateExports(fs *faults) {
	if len(c.Exports) == 0 {
		fs.add("exports", errors.New("none: name a BACKING, or list exports in a configuration file"))
	}
	names, paths := map[string]int{}, map[string]int{}
	for i, e := range c.Exports {
		if fs.has(exportKey(i, "")) {
			continue // no entry at all
		}
		key := func(k string) string { return exportKey(i, k) }
		fs.add(key("name"), protocolString(e.Name))
		if first, taken := names[e.Name]; taken {
			fs.add(key("name"), fmt.Errorf("%q is the name of %s too", e.Name, exportKey(first, "")))
		} else if !fs.has(key("name")) {
			names[e.Name] = i
		}

		path := filepath.Clean(e.Path)
		if e.Path == "" || strings.ContainsRune(e.Path, 0) {
			fs.add(key("path"), errors.New("needed: the file or block device that holds the store"))
		} else if first, taken := paths[path]; taken {
			fs.add(key("path"), fmt.Errorf("%s is the path of %s too", path, exportKey(first, "")))
		} else {
			paths[path] = i
		}

		fs.add(key("size"), within(e.Size, 0, sizeMax))
		fs.add(key("capacity"), within(e.Capacity, 0, sizeMax))
		if e.Codec != "" {
			fs.add(key("codec"), oneOf(e.Codec, codecs))
		}
		if most := levelMax[e.Codec]; most == 0 && e.Level != 0 && slices.Contains(codecs, e.Codec) {
			fs.add(key("level"), fmt.Errorf("%d with codec %s, which has no levels", e.Level, e.Codec))
		} else {
			fs.add(key("level"), within(e.Level, 0, cmp.Or(most, 4)))
		}
		if e.Recompress != "" {
			fs.add(key("recompress"), oneOf(e.Recompress, recompressions))
		}
		fs.add(key("description"), protocolString(e.Description))
		fs.add(key("connections-max"), within(e.ConnectionsMax, 0, 65536))
		fs.add(key("allow"), c.allow(e.Allow, fs))
	}
	if d := c.DefaultExport; d != "" {
		if _, found := names[d]; !found {
			fs.add("default-export", fmt.Errorf("%q is the name of no export", d))
		} else if first, found := names[""]; found {
			fs.add("default-export", fmt.Errorf("%q, and %s has the empty name, which makes it the default", d, exportKey(first, "")))
		}
	}
}

// allow checks the clients that may use an export.
func (c *Config) allow(names []string, fs *faults) error {
	if len(names) == 0 {
		return nil
	}
	if fs.has("tls") || fs.has("tls-verify-peer") {
		return nil
	}
	if c.TLS == TLSOff || !c.TLSVerifyPeer {
		return errors.New("clients are known by their certificates only: set tls to on or require, and tls-verify-peer")
	}
	for _, n := range names {
		if n == "" {
			return errors.New("an empty name is that of nobody")
		}
		if err := protocolString(n); err != nil {
			return err
		}
	}
	return nil
}

func (c *Config) validateListen(fs *faults) {
	fs.add("tls", oneOf(c.TLS, tlsModes))
	if !fs.has("tls") && c.TLS != TLSOff && c.TLSCertificates == "" {
		fs.add("tls-certificates", fmt.Errorf("needed with tls %s", c.TLS))
	}
	if c.SocketMode&^0o777 != 0 || c.SocketMode&0o600 != 0o600 {
		fs.add("socket-mode", fmt.Errorf("%04o is out of range: give 0600 to 0777, in octal, with read and write for the owner", uint32(c.SocketMode)))
	}
	for key, name := range map[string]string{"socket-owner": c.SocketOwner, "socket-group": c.SocketGroup} {
		if strings.ContainsAny(name, ":/, \t\n") {
			fs.add(key, fmt.Errorf("%q is not a name or a number", name))
		}
	}
	for i, s := range c.Listen {
		a, err := ParseAddress(s)
		switch {
		case err != nil:
			fs.add("listen", err)
		case slices.Contains(c.Listen[:i], s) && !strings.HasSuffix(s, ":0"):
			fs.add("listen", fmt.Errorf("%s is given twice", s))
		case !a.Local() && c.TLS != TLSRequire && !c.AllowPlaintext && !fs.has("tls") && !fs.has("allow-plaintext"):
			fs.add("listen", fmt.Errorf("%s can be reached by other hosts: set tls to require, "+
				"or allow-plaintext if the network is trusted", s))
		}
	}
}

func (c *Config) validateMetrics(fs *faults) {
	if c.Metrics == "" {
		if c.Pprof {
			fs.add("pprof", errors.New("profiles are served beside the metrics, and metrics has no address"))
		}
		return
	}
	a, err := ParseMetricsAddress(c.Metrics)
	switch {
	case err != nil:
		fs.add("metrics", err)
	case slices.Contains(c.Listen, c.Metrics) && !strings.HasSuffix(c.Metrics, ":0"):
		fs.add("metrics", fmt.Errorf("%s is an address of listen too", c.Metrics))
	case c.Pprof && !a.Local():
		fs.add("pprof", fmt.Errorf("profiles are for this host, and %s can be reached by others", c.Metrics))
	}
}

// exportKey is the key of a setting of export i, or of the export itself.
func exportKey(i int, key string) string {
	s := "exports[" + strconv.Itoa(i) + "]"
	if key != "" {
		s += "." + key
	}
	return s
}

func within[T interface {
	cmp.Ordered
	~int | ~int64 | ~uint64
}](v, least, most T) error {
	if v < least || v > most {
		return fmt.Errorf("%v is out of range: give %v to %v", v, least, most)
	}
	return nil
}

func oneOf[T comparable](v T, allowed []T) error {
	if slices.Contains(allowed, v) {
		return nil
	}
	words := make([]string, len(allowed))
	for i, a := range allowed {
		words[i] = fmt.Sprint(a)
	}
	text := fmt.Sprint(v)
	if text == "" {
		text = `""`
	}
	return fmt.Errorf("%s is not allowed: give one of %s", text, strings.Join(words, ", "))
}

// protocolString checks a string that is sent to clients.
func protocolString(s string) error {
	switch {
	case len(s) > stringMax:
		return fmt.Errorf("%d bytes are too many: NBD allows %d", len(s), stringMax)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not valid UTF-8", s)
	case strings.ContainsFunc(s, unicode.IsControl):
		return fmt.Errorf("%q has control characters", s)
	}
	return nil
}
