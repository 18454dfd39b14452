// Package config is what a user can set, as plain data: [Config] with its
// defaults, read by [Load] from a YAML file, the environment and the flags of
// the command line, in rising priority, and checked by [Config.Validate].
//
// Every setting has one name, its key: cache is "cache:" in the file, CNBD_CACHE
// in the environment and --cache on the command line. An export is described by
// a list entry in the file, or, when it is the only one, by a BACKING argument
// and flags; both end in [Config.Exports].
//
// All faults are reported at once, each a [Fault] with its key and the place
// that it comes from.
package config

import (
	"errors"
	"os"
	"runtime"
	"slices"
	"time"
)

// Config is the configuration of a server. The comments give meaning, unit,
// default and limits; the struct tags the key and the help of the flag.
//
// A Config is plain data: it may be copied and compared field by field, and
// holds nothing that has to be closed.
type Config struct {
	// Exports are the devices to serve, at least one.
	Exports []Export `key:"exports"`

	// Listen are the addresses to serve on: unix:PATH, unix:@NAME (an abstract
	// socket) or tcp:HOST:PORT, with an IPv6 address in brackets. Default empty:
	// the sockets that systemd passes, or else a unix socket beside the first
	// backing file. See [ParseAddress].
	Listen []string `key:"listen" type:"address" help:"address to serve on, unix:PATH or tcp:HOST:PORT; may be given again"`

	// SocketMode are the permissions of unix sockets. Default 0600; at most
	// 0777, and the owner can always read and write.
	SocketMode os.FileMode `key:"socket-mode" type:"mode" help:"permissions of unix sockets, octal"`

	// SocketOwner is the user, by name or number, that unix sockets are given
	// to. Default empty: that of the process.
	SocketOwner string `key:"socket-owner" type:"user" help:"user that unix sockets are given to"`

	// SocketGroup is the group, by name or number, that unix sockets are given
	// to. Default empty: that of the process.
	SocketGroup string `key:"socket-group" type:"group" help:"group that unix sockets are given to"`

	// ExitWithParent stops the server, in good order, when the process that has
	// started it ends. Default false.
	ExitWithParent bool `key:"exit-with-parent" help:"stop when the process that has started this one ends"`

	// AllowPlaintext accepts TCP addresses beyond loopback without enforced
	// TLS: whoever reaches the port reads and writes the device. Default false.
	AllowPlaintext bool `key:"allow-plaintext" help:"serve other hosts without enforcing TLS"`

	// TLS is [TLSOff], [TLSOn] (offered, clients may go without) or
	// [TLSRequire]. Default off.
	TLS string `key:"tls" type:"off|on|require" help:"off, on (offered) or require"`

	// TLSCertificates is the directory with ca-cert.pem, server-cert.pem and
	// server-key.pem, and perhaps ca-crl.pem; it is followed when they change.
	// Needed unless TLS is off. Default empty.
	TLSCertificates string `key:"tls-certificates" type:"dir" help:"directory of ca-cert.pem, server-cert.pem and server-key.pem"`

	// TLSVerifyPeer asks clients under TLS for a certificate that is signed by
	// the authority in ca-cert.pem. Default true.
	TLSVerifyPeer bool `key:"tls-verify-peer" help:"ask clients for a certificate signed by ca-cert.pem"`

	// DefaultExport is the name of the export for clients that ask for none. Default
	// empty: the one with the empty name, if there is one.
	DefaultExport string `key:"default-export" type:"name" help:"export for clients that name none (default: the one with the empty name)"`

	// ListExports tells clients what exports there are. Default true.
	ListExports bool `key:"list-exports" help:"tell clients what exports there are"`

	// Cache is the memory for cached pages of all exports together, clean and
	// dirty and their copies, in bytes. Default 256MiB, at least 16MiB.
	Cache Size `key:"cache" type:"size" help:"memory for pages, clean and dirty, of all exports"`

	// DirtyMax is how much of Cache may be dirty before writers wait, in bytes.
	// Default 0: half of Cache. At least 4MiB and at most three quarters of
	// Cache, so that reads always find room. See [Config.DirtyLimit].
	DirtyMax Size `key:"dirty-max" type:"size" help:"dirty pages from which on writers wait (0: half of the cache)"`

	// Background is how much of Cache may be dirty before writeback begins, in
	// bytes. Default 0: an eighth of Cache. At most three quarters of DirtyLimit. See
	// [Config.BackgroundLimit].
	Background Size `key:"background" type:"size" help:"dirty pages from which on writeback runs (0: an eighth of the cache)"`

	// Payload is the memory for payloads of requests in flight, of all clients
	// together, in bytes; a request takes its share before it is received.
	// Default and least 64MiB, twice the largest request.
	Payload Size `key:"payload" type:"size" help:"memory for payloads of requests in flight, of all clients"`

	// MapCache is the memory for cached nodes of the extent maps, of all
	// exports together, in bytes. Default 32MiB, at least 1MiB.
	MapCache Size `key:"map-cache" type:"size" help:"memory for the extent maps of all exports"`

	// Extent is how much data is compressed as one, in bytes: 32KiB, 64KiB or
	// 128KiB. Default 0: the store's own, and 64KiB for a new one. It applies to
	// data written from now on.
	Extent Size `key:"extent" type:"32KiB|64KiB|128KiB" help:"data compressed as one: larger packs better, smaller reads faster (0: the store's own, 64KiB for a new one)"`

	// Workers is the number of goroutines that compress. Default 0: one for each
	// processor, at most 8. At most 256. See [Config.WorkerCount].
	Workers int `key:"workers" type:"number" help:"goroutines that compress (0: by the number of processors)"`

	// CommitInterval is the longest time that an answered write stays
	// uncommitted without a flush. Default 5s; 10ms to 1h.
	CommitInterval time.Duration `key:"commit-interval" type:"duration" help:"commit at least this often"`

	// CheckpointInterval is the length of the log between checkpoints, in
	// bytes; recovery reads at most twice as much. Default 256MiB; 16MiB to 64GiB.
	CheckpointInterval Size `key:"checkpoint-interval" type:"size" help:"log between checkpoints; a start after a crash reads at most twice this"`

	// WritebackPeriod is the time between two searches for expired pages.
	// Default 5s; 10ms to 1h.
	WritebackPeriod time.Duration `key:"writeback-period" type:"duration" help:"look this often for pages to write back"`

	// WritebackExpire is the age from which on a dirty page is written back.
	// Default 30s; 10ms to 24h.
	WritebackExpire time.Duration `key:"writeback-expire" type:"duration" help:"write pages back that are dirty for this long"`

	// HandshakeTimeout is the longest time that a client may take from the
	// connection to its first request. Default 10s; 100ms to 10m.
	HandshakeTimeout time.Duration `key:"handshake-timeout" type:"duration" help:"longest time from connection to first request"`

	// StallTimeout is the longest time that a client may take over what it has
	// begun: to send the rest of a request, or to take its answer. Default 5m; 1s
	// to 24h.
	StallTimeout time.Duration `key:"stall-timeout" type:"duration" help:"longest time for a client to send the rest of a request, or to take its answer"`

	// IdleTimeout is how long a client may want nothing before it is cut off.
	// Default 0: for ever. At most 8760h.
	IdleTimeout time.Duration `key:"idle-timeout" type:"duration" help:"cut off clients that want nothing for this long (0: never)"`

	// ConnectionsMax is the number of clients served at a time; more are
	// closed at once. Default 128; 1 to 65536.
	ConnectionsMax int `key:"connections-max" type:"number" help:"connections served at a time"`

	// RequestsMax is the number of requests in flight for one connection; more
	// wait in the socket. Default 128, the queue depth of the Linux client; 1
	// to 4096.
	RequestsMax int `key:"requests-max" type:"number" help:"requests in flight for one connection"`

	// BusyPoll is how long the server looks for the next request of a client that has
	// one in flight at a time before it sleeps, while such requests come as soon as that. It saves the time to
	// wake up, which for small requests is a good part of all, and uses a processor
	// meanwhile; it is for one client at a time, while no other wants anything, and not with a single processor. Where all are busy with other things it gains nothing. 0: never. Default 50µs; at most 1ms.
	BusyPoll time.Duration `key:"busy-poll" type:"duration" help:"look this long for a quick client's next request before sleeping (0: never)"`

	// IOFlusher makes the threads of the server IO flushers, for which the kernel
	// does no I/O to find memory: it could be I/O to the device that they serve. It takes
	// CAP_SYS_RESOURCE; without, the server warns and runs. Default true.
	IOFlusher bool `key:"io-flusher" help:"tell the kernel that it may need this server to free memory, for devices mounted on this host"`

	// LockMemory keeps the memory that the server uses from being swapped out. It
	// takes CAP_IPC_LOCK; without, the server warns and runs. Default true.
	LockMemory bool `key:"lock-memory" help:"keep the memory in use from being swapped out"`

	// OOMScoreAdjust is how far the OOM killer is kept from the server: from 0, not
	// at all, to -1000, never. A process that is kept farther already is left so.
	// Lowering it takes CAP_SYS_RESOURCE; without, the server warns and runs. Default
	// -999: it is the last to be killed, but one that has used up the memory of its own
	// control group does not hang there.
	OOMScoreAdjust int `key:"oom-score-adjust" type:"number" help:"keep the OOM killer away: 0 (not at all) to -1000 (never)"`

	// LogLevel is the least severe level that is logged: trace, debug, info,
	// warn or error. Default info.
	LogLevel string `key:"log-level" type:"level" help:"trace, debug, info, warn or error"`

	// LogFormat is [LogAuto] (console on a terminal, json elsewhere), [LogJSON]
	// or [LogConsole]. Default auto.
	LogFormat string `key:"log-format" type:"auto|json|console" help:"auto (console on a terminal, else json), json or console"`

	// Metrics is the address of an HTTP server with the metrics in Prometheus' format,
	// health and readiness: unix:PATH, with the permissions of the other sockets, or
	// tcp:HOST:PORT, with 127.0.0.1 if HOST is left out. There is no password, so an
	// address that other hosts reach has to be written out. Default empty: none.
	Metrics string `key:"metrics" type:"address" help:"serve metrics and health over HTTP at unix:PATH or tcp:HOST:PORT (default: nowhere)"`

	// Pprof serves profiles of the program there too, below /debug/pprof. Metrics must
	// then be an address that only this host reaches. Default false.
	Pprof bool `key:"pprof" help:"serve profiles of the program beside the metrics"`
}

// An Export is one device. In the file it is an entry of the list "exports",
// with the tag key; on the command line it is BACKING and the flags of the tag
// single.
type Export struct {
	// Name is what clients ask for: UTF-8 without control characters, at most
	// 4096 bytes, different for each export. Default empty, NBD's default export.
	Name string `key:"name" single:"export" type:"name" help:"name of the export that clients ask for"`

	// Path is the file or block device that holds the store, relative to the
	// working directory. Needed, different for each export.
	Path string `key:"path" single:"backing"`

	// Size is the size of the device in bytes. Default 0: that of the store,
	// which must exist. At most 8EiB-1, the largest that NBD has offsets for.
	Size Size `key:"size" single:"size" type:"size" help:"size of the device; makes the store if there is none"`

	// Capacity is the space that the store may take in its backing, in bytes.
	// Default 0: Size and the overhead, so that any data fits. Limits as Size.
	Capacity Size `key:"capacity" single:"capacity" type:"size" help:"space that the store may take (0: size and overhead)"`

	// Codec is the codec for data written from now on: auto, zstd, s2 or none.
	// Default empty: the store's own, and auto for a new one.
	Codec string `key:"codec" single:"codec" type:"auto|zstd|s2|none" help:"codec for new data (default: the store's own, auto for a new one)"`

	// Level is the effort of Codec, a higher one packs better and is slower.
	// Default 0: the store's own, or the codec's default. 1 to 4; codecs auto
	// and none have no levels.
	Level int `key:"level" single:"level" type:"number" help:"effort of the codec, 1 to 4 (0: its default)"`

	// Recompress says how an idle device encodes its data anew, to be smaller: auto
	// (harder than new data, by the same codec, and where that is zstd, after 30 s without
	// a request, as hard as can be in extents of 128 KiB, but for what is read at
	// random), off, or a codec with its level, such as zstd:best. Default auto.
	Recompress string `key:"recompress" single:"recompress" type:"auto|off|codec:level" help:"how an idle device encodes its data anew: auto is harder than new data (default auto)"`

	// Lazy opens the store when the first client asks for it, and not at the
	// start; nothing about it is looked at before. Default false.
	Lazy bool `key:"lazy" single:"lazy" help:"open the store when the first client asks for it"`

	// Allow are the clients that may use the export, by a name (common name or
	// alternative name) in the certificate that they show under TLS. Default
	// empty: all.
	Allow []string `key:"allow" single:"allow" type:"name" help:"client that may use the export, by a name in its certificate; may be given again (default: all)"`

	// ConnectionsMax is the number of clients that use the export at a time.
	// Default 0: no limit but that of the server. At most 65536.
	ConnectionsMax int `key:"connections-max" single:"export-connections-max" type:"number" help:"connections to the export at a time (0: no limit of its own)"`

	// ReadOnly serves the export without ever writing to its backing. Default false.
	ReadOnly bool `key:"read-only" single:"read-only" help:"serve without ever writing"`

	// Description is told to clients that list exports: UTF-8 without control
	// characters, at most 4096 bytes. Default empty.
	Description string `key:"description" single:"description" type:"text" help:"told to clients that list exports"`
}

// Values of [Config.TLS].
const (
	TLSOff     = "off"
	TLSOn      = "on"
	TLSRequire = "require"
)

// Values of [Config.LogFormat].
const (
	LogAuto    = "auto"
	LogJSON    = "json"
	LogConsole = "console"
)

// Default is the configuration of a user who has set nothing. It has no
// exports.
func Default() *Config {
	return &Config{
		SocketMode:         0o600,
		TLS:                TLSOff,
		TLSVerifyPeer:      true,
		ListExports:        true,
		Cache:              256 * MiB,
		Payload:            64 * MiB,
		MapCache:           32 * MiB,
		CommitInterval:     5 * time.Second,
		CheckpointInterval: 256 * MiB,
		WritebackPeriod:    5 * time.Second,
		WritebackExpire:    30 * time.Second,
		HandshakeTimeout:   10 * time.Second,
		StallTimeout:       5 * time.Minute,
		ConnectionsMax:     128,
		RequestsMax:        128,
		BusyPoll:           50 * time.Microsecond,
		IOFlusher:          true,
		LockMemory:         true,
		OOMScoreAdjust:     -999,
		LogLevel:           "info",
		LogFormat:          LogAuto,
	}
}

// DirtyLimit is the number of dirty bytes from which on writers wait.
func (c *Config) DirtyLimit() Size {
	if c.DirtyMax != 0 {
		return c.DirtyMax
	}
	return c.Cache / 2
}

// BackgroundLimit is the number of dirty bytes from which on writeback runs.
// It stays well below a DirtyMax that was set lower than the default.
func (c *Config) BackgroundLimit() Size {
	if c.Background != 0 {
		return c.Background
	}
	return min(c.Cache/8, c.DirtyLimit()/4)
}

// WorkerCount is the number of goroutines that compress.
func (c *Config) WorkerCount() int {
	if c.Workers != 0 {
		return c.Workers
	}
	return min(runtime.GOMAXPROCS(0), 8)
}

// A Fault is one thing wrong with the configuration, a mistake of the user's.
// The errors of [Load] and [Config.Validate] are joined Faults; other errors
// (a file that cannot be read) are none.
type Fault struct {
	Key   string // of the setting, such as cache or exports[0].size
	Where string // the source as its user knows it: --cache, CNBD_CACHE, FILE: cache; or empty
	Err   error
}

func (f *Fault) Error() string {
	if f.Where != "" {
		return f.Where + ": " + f.Err.Error()
	}
	return f.Key + ": " + f.Err.Error()
}

func (f *Fault) Unwrap() error { return f.Err }

// faults collects what is wrong, one Fault for each key: what else is wrong
// with a setting of which nothing is known would be a guess.
type faults []*Fault

func (fs *faults) add(key string, err error) {
	if err != nil && !fs.has(key) {
		*fs = append(*fs, &Fault{Key: key, Err: err})
	}
}

// has reports whether key is known to be wrong. What depends on it is then not
// judged.
func (fs *faults) has(key string) bool {
	return slices.ContainsFunc(*fs, func(f *Fault) bool { return f.Key == key })
}

func (fs faults) join() error {
	errs := make([]error, len(fs))
	for i, f := range fs {
		errs[i] = f
	}
	return errors.Join(errs...)
}
