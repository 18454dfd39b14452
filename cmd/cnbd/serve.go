package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"cnbd/config"
	"cnbd/device"
	"cnbd/export"
	"cnbd/internal/block"
	"cnbd/internal/compression"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/internal/monitor"
	"cnbd/nbd"
	"cnbd/store"
)

// drainTimeout is what the requests in flight have to be answered when the
// server is told to stop.
const drainTimeout = 10 * time.Second

func newServe() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "serve [--size SIZE] BACKING | serve --config FILE",
		Short: "Serve stores over NBD",
		Long: "Serve the store in BACKING, or those that FILE lists, until SIGTERM, SIGINT or SIGHUP; then everything is\n" +
			"committed, and the program ends. With --size a store that is missing is made.\n\n" +
			"With --config, SIGHUP reads FILE again: a new log-level counts at once, other changes are logged and\n" +
			"wait for a restart. (Certificates are followed without a signal.)\n\n" +
			"The address is printed as an NBD URI when clients can connect. Without --listen it is the unix\n" +
			"socket BACKING.sock (for a block device, in " + runDirectory + "). Every flag can also be set in FILE and as\n" +
			"CNBD_NAME in the environment." + exitHelp,
		Example: "  cnbd serve --size 100GiB disk.cnbd\n" +
			"  nbd-client -unix disk.cnbd.sock /dev/nbd0",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(file, cmd.Flags())
			if err != nil {
				return err
			}
			var flusher error
			if c.IOFlusher {
				flusher = becomeFlusher()
			}
			var parent <-chan struct{}
			if c.ExitWithParent {
				if parent, err = parentExit(); err != nil {
					return err
				}
			}
			// Caught from here on, so that a stop while starting is clean too.
			stop, hup := make(chan os.Signal, 2), make(chan os.Signal, 1)
			signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
			switch {
			case file != "":
				signal.Notify(hup, syscall.SIGHUP)
			case !signal.Ignored(syscall.SIGHUP): // nohup(1) means to go on
				signal.Notify(stop, syscall.SIGHUP)
			}
			defer signal.Stop(stop)
			defer signal.Stop(hup)
			// Whoever reads the log may go away; the disk must not.
			signal.Ignore(syscall.SIGPIPE)
			s := &serving{config: c, log: newLogger(c, cmd.ErrOrStderr()), parent: parent, workers: c.WorkerCount()}
			if os.Getenv("GOMAXPROCS") == "" {
				runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spareProcs)
			}
			if os.Getenv("GOGC") == "" {
				debug.SetGCPercent(collectAt)
			}
			s.load = func() (*config.Config, error) { return config.Load(file, cmd.Flags()) }
			for _, name := range config.UnknownEnv(os.Environ()) {
				s.log.Warn().Str("variable", name).Msg("this variable of the environment is no setting, it is ignored")
			}
			s.unprotected = protect(c, flusher)
			return errors.Join(s.run(cmd.OutOrStdout(), stop, hup), s.end())
		},
	}
	config.AddFlags(cmd.Flags())
	cmd.Flags().StringVar(&file, "config", "", "configuration `FILE` (YAML)")
	return cmd
}

// serving is a running server. What it holds is given back by end, in the
// opposite order.
type serving struct {
	config    *config.Config
	load      func() (*config.Config, error) // reads the configuration again
	log       zerolog.Logger
	parent    <-chan struct{} // closed when the parent process has ended; may be nil
	stores    []*served
	listeners []net.Listener
	server    *nbd.Server
	monitor   *monitor.Server // nil: not asked for

	unprotected []error // what protect could not do
	workers     int     // that compress, for each export
}

// spareProcs is how many goroutines run beside those that compress, on as many processors
// as there are. Go looks for what has arrived on sockets when one of its processors has
// nothing to do, else every 10 ms; and compressors keep busy as many as there are. With
// spare ones it is the kernel that shares the machine out, and it prefers who has
// waited.
const spareProcs = 2

// collectAt is by how many percent of what is alive the heap grows before garbage is collected,
// where Go has 100. What is alive grows by the map's overlays while clients write, and is
// counted in the memory that a server may take; the garbage is not. Little is
// allocated for a request, and most of the heap has no pointers, so this costs next to nothing.
const collectAt = 40

// served is one export.
type served struct {
	export *config.Export
	turn   chan struct{} // capacity 1: holds a token while somebody uses what follows

	file    disk.File    // locked, until device has it; nil if the store is not looked at, or yet to be made
	socket  net.Listener // of control
	control *control.Server
	device  *device.Device // nil: not open

	// run is that of the store; nil: not open yet, or for reading only.
	run atomic.Pointer[run]

	// condition is how the export is, for those who watch; nil: not open yet.
	condition atomic.Pointer[condition]

	// Of the start.
	failed error // of an export that is not lazy
	size   config.Size
}

// run serves until a signal comes from stop or the server fails; one from hup has
// the configuration read again. Nothing is written before everything that can be
// refused has been looked at. A store that cannot be opened is no reason not to
// serve the others.
func (s *serving) run(stdout io.Writer, stop, hup <-chan os.Signal) error {
	c := s.config
	opts := nbd.Options{
		DefaultExport: c.DefaultExport, ListOff: !c.ListExports,
		ConnectionsMax: c.ConnectionsMax, RequestsMax: c.RequestsMax, BytesMax: uint64(c.Payload),
		HandshakeTimeout: c.HandshakeTimeout, StallTimeout: c.StallTimeout, IdleTimeout: c.IdleTimeout, BusyPoll: c.BusyPoll, Log: s.event,
	}
	if c.BusyPoll == 0 {
		opts.BusyPoll = -1 // 0 is the default
	}
	if c.TLS != config.TLSOff {
		certs, err := nbd.LoadCertificates(c.TLSCertificates, c.TLSVerifyPeer, func(err error) { s.log.Error().Err(err).Msg("certificates") })
		if err != nil {
			return err
		}
		opts.TLS, opts.TLSRequired = certs.Config(), c.TLS == config.TLSRequire
	}
	for i := range c.Exports {
		e := &c.Exports[i]
		v := &served{export: e, turn: make(chan struct{}, 1)}
		s.stores = append(s.stores, v)
		opts.Exports = append(opts.Exports, nbd.Export{
			Name: e.Name, Description: e.Description, Allow: e.Allow, ConnectionsMax: e.ConnectionsMax,
			Open:  func(ctx context.Context) (nbd.Backend, error) { return s.backend(ctx, v) },
			About: func() []string { return v.run.Load().about() },
		})
	}
	var err error
	if s.server, err = nbd.NewServer(opts); err != nil {
		return err
	}
	// What cannot be opened at the start is tried again when a client asks for it.
	var failed []error
	try := func(f func(v *served) error) error {
		for _, v := range s.stores {
			if v.export.Lazy || v.failed != nil {
				continue
			}
			if v.failed = f(v); v.failed == nil {
				continue
			}
			v.condition.Store(&condition{err: v.failed})
			failed = append(failed, v.failed)
			if exitStatus(v.failed) == exitUsage || len(failed) == len(s.stores) {
				return errors.Join(failed...)
			}
			s.log.Error().Err(v.failed).Str("export", v.export.Name).Msg("not available, the others are served")
		}
		return nil
	}
	if err := try(func(v *served) error { return v.acquire(c) }); err != nil {
		return err
	}
	if err := s.listen(); err != nil {
		return err
	}
	if err := try(s.open); err != nil {
		return err
	}
	// Not before it is served: where it cannot be, the reason alone is told.
	if len(s.unprotected) > 0 {
		s.log.Warn().Errs("missing", s.unprotected).Msg("a device that is mounted on this same host may hang when memory is short")
	}
	broken := make(chan error, len(s.listeners))
	for _, l := range s.listeners {
		go func() { broken <- s.server.Serve(l) }()
	}
	for _, v := range s.stores {
		if v.failed != nil {
			continue
		}
		for _, l := range s.listeners {
			u := nbd.URIOf(l.Addr(), v.export.Name)
			u.TLS = opts.TLSRequired
			uri := u.String()
			log := s.log.Info().Str("uri", uri).Str("backing", v.export.Path)
			if v.export.Lazy {
				log.Msg("ready, to be opened by the first client")
			} else {
				log.Stringer("size", v.size).Msg("ready")
			}
			fmt.Fprintln(stdout, uri)
		}
	}
	s.notify(daemon.SdNotifyReady)
	watchdog, stopWatchdog := s.watchdog()
	defer stopWatchdog()

	for stopping := false; !stopping; {
		select {
		case <-watchdog:
			s.alive()
			s.notify(daemon.SdNotifyWatchdog)
			continue
		case <-hup:
			s.reload()
			continue
		case sig := <-stop:
			s.log.Info().Stringer("signal", sig).Msg("stopping: everything is committed first; a second signal ends at once")
		case <-s.parent:
			s.log.Info().Msg("stopping: the parent process has ended; everything is committed first")
		case err = <-broken:
			s.log.Error().Err(err).Msg("stopping: a listener has failed")
		}
		stopping = true
	}
	s.notify(daemon.SdNotifyStopping)
	go func() {
		sig := <-stop
		// As after a power cut: what was flushed is there at the next start.
		s.log.Error().Stringer("signal", sig).Msg("ended at once; what was not flushed is lost")
		os.Exit(exitFailed)
	}()
	return err
}

// backend is the device of v for a client; it is opened if it is not yet. It
// waits for whoever else does that.
func (s *serving) backend(ctx context.Context, v *served) (nbd.Backend, error) {
	select {
	case v.turn <- struct{}{}:
		defer func() { <-v.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if v.device != nil {
		return export.Backend(v.device), nil
	}
	err := v.acquire(s.config)
	if err == nil {
		err = s.open(v)
	}
	if err != nil {
		v.condition.Store(&condition{err: err})
		s.log.Error().Err(err).Str("export", v.export.Name).Msg("not available")
		return nil, err
	}
	return export.Backend(v.device), nil
}

// acquire locks the store of v, if there is one, and looks whether it is what
// the export describes. Nothing is written.
func (v *served) acquire(c *config.Config) (err error) {
	e := v.export
	defer func() {
		if err != nil {
			v.close()
		}
	}()
	f, err := disk.Open(e.Path, disk.OpenOptions{ReadOnly: e.ReadOnly})
	switch {
	case errors.Is(err, fs.ErrNotExist) && e.Size != 0 && !e.ReadOnly:
		_, err := geometryFor(c, e, 0)
		return err
	case errors.Is(err, fs.ErrNotExist) && !e.ReadOnly:
		return fmt.Errorf("%w; --size makes a new store", err)
	case err != nil:
		return inUse(e.Path, err)
	}
	v.file = f
	g, err := store.ReadGeometry(f)
	if err != nil {
		if errors.Is(err, store.ErrNotStore) {
			err = fmt.Errorf("%w; `cnbd create` makes one", err)
		}
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	if e.Size != 0 && uint64(e.Size) != g.DeviceSize {
		return usage(fmt.Errorf("%s is a store for %v, and a size of %v is asked for: leave --size out; "+
			"`cnbd resize` changes it", e.Path, config.Size(g.DeviceSize), e.Size))
	}
	if e.Capacity != 0 && uint64(e.Capacity) != g.Capacity {
		return usage(fmt.Errorf("%s is a store with a capacity of %v, and %v is asked for: leave --capacity out; "+
			"`cnbd resize` changes it", e.Path, config.Size(g.Capacity), e.Capacity))
	}
	return nil
}

// listen opens all sockets. Clients that connect wait until the server is ready.
func (s *serving) listen() error {
	c := s.config
	passed, err := activation.Listeners()
	if err != nil {
		return fmt.Errorf("sockets of systemd: %w", err)
	}
	for _, l := range passed {
		if l == nil { // not a stream socket
			continue
		}
		s.listeners = append(s.listeners, l)
		a := config.Address{Network: l.Addr().Network(), Address: l.Addr().String()}
		if !a.Local() && c.TLS != config.TLSRequire && !c.AllowPlaintext {
			return usage(fmt.Errorf("%v, passed by systemd, can be reached by other hosts: set tls to require, "+
				"or allow-plaintext if the network is trusted", a))
		}
	}
	addresses := c.Listen
	if len(s.listeners) > 0 {
		addresses = nil
	} else if len(addresses) == 0 {
		for _, v := range s.stores[:1] { // it serves all exports
			addresses = []string{"unix:" + besides(v.export.Path, ".sock")}
		}
	}
	for _, v := range s.stores {
		if isDevice(v.export.Path) {
			if err := os.MkdirAll(runDirectory, 0o755); err != nil {
				return err
			}
		}
	}
	for _, a := range addresses {
		l, err := listenAt(c, a)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, l)
	}
	return s.watch()
}

// listenAt listens at an address as c wants its sockets.
func listenAt(c *config.Config, address string) (net.Listener, error) {
	l, err := nbd.ListenConfig{Mode: c.SocketMode, Owner: c.SocketOwner, Group: c.SocketGroup}.Listen(address)
	if unknown, ok := errors.AsType[user.UnknownUserError](err); ok {
		return nil, &config.Fault{Key: "socket-owner", Err: unknown}
	}
	if unknown, ok := errors.AsType[user.UnknownGroupError](err); ok {
		return nil, &config.Fault{Key: "socket-group", Err: unknown}
	}
	return l, err
}

// open makes the store of v, which is acquired, if it is missing, recovers it, and
// answers for it.
func (s *serving) open(v *served) (err error) {
	c, e := s.config, v.export
	log := s.log.With().Str("backing", e.Path).Logger()
	defer func() {
		if err != nil {
			v.close()
		}
	}()
	if v.file == nil {
		if err := makeStore(c, e, false); err != nil {
			return err
		}
		log.Info().Stringer("size", e.Size).Msg("made a new store")
		f, err := disk.Open(e.Path, disk.OpenOptions{})
		if err != nil {
			return inUse(e.Path, err)
		}
		v.file = f
	}
	if !e.ReadOnly { // others may read such a store as well
		path, err := filepath.Abs(controlSocket(e.Path))
		if err != nil {
			return err
		}
		// Whoever has the lock of the store owns the socket.
		if v.socket, err = nbd.Listen("unix:"+path, 0o600); err != nil {
			log.Warn().Err(err).Msg("no control socket: `cnbd info` cannot ask this server")
		}
	}
	g, err := store.ReadGeometry(v.file)
	if err != nil {
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	codec, err := codecFor(e, g)
	if err != nil {
		return err
	}
	behind, err := recompressionOf(e)
	if err != nil {
		return err
	}
	// The memory is that of all exports together; each has an equal share.
	share := func(n config.Size) int64 { return int64(n) / int64(len(s.stores)) }
	dirty := share(c.DirtyLimit())
	if most := int64(g.DirtyMax); dirty > most {
		log.Info().Stringer("limit", config.Size(most)).Msg("less may be dirty than configured: the store was made for less")
		dirty = most // it has no room for more (rule R8)
	}
	began := time.Now()
	f := v.file
	v.file = nil // the device's from here on
	v.device, err = device.Open(f, device.Options{
		ReadOnly:   e.ReadOnly,
		CacheBytes: share(c.Cache), MapCacheBytes: share(c.MapCache),
		// The server keeps to the limit of all together. A smaller one here would
		// let a client that stalls in its longest request stop an export's writers.
		PayloadBytes:  int64(c.Payload) + block.Size,
		DirtyBytesMax: dirty, BackgroundBytes: min(share(c.BackgroundLimit()), dirty/4*3),
		Background: behind, NoRecompress: e.Recompress == "off",
		Codec: &codec, ExtentBytes: uint32(c.Extent), Workers: s.workers,
		CommitInterval: c.CommitInterval, WritebackPeriod: c.WritebackPeriod, DirtyExpire: c.WritebackExpire,
		CheckpointBytes: uint64(c.CheckpointInterval),
		Warn:            func(msg string, err error) { log.Warn().Err(err).Msg(msg) },
	})
	if err != nil {
		return fmt.Errorf("%s: %w", e.Path, err)
	}
	v.size = config.Size(v.device.Bytes())
	r := v.device.Recovery()
	log.Info().Uint64("epoch", r.Epoch).Uint64("records", r.Records).Stringer("log", config.Size(r.Bytes)).
		Uint64("dropped", r.Dropped).Uint64("damaged", r.Damaged).Dur("took_ms", time.Since(began)).Msg("recovered")
	if !e.ReadOnly {
		began, err := beginRun(e.Path, g.UUID, r.Epoch)
		if err != nil {
			log.Warn().Err(err).Msg("how the last run has ended cannot be told: a device of the kernel that waits for it will not be connected again")
		}
		v.run.Store(began)
	}
	v.condition.Store(&condition{device: v.device, sampler: monitor.NewSampler(func(context.Context) (device.Status, error) { return v.device.Look() })})
	if v.socket != nil {
		v.control = control.Serve(v.socket, control.Handlers{
			Live: func(ctx context.Context) (any, error) { return s.live(ctx, v), nil },
			Status: func(ctx context.Context) (any, error) {
				st, err := v.device.Status(ctx)
				m := s.server.Metrics()
				return &storeStatus{Status: st, Served: true, Server: &m, Export: e.Name}, err
			},
			Resize: func(ctx context.Context, wish control.ResizeRequest) (any, error) {
				r, err := growDevice(ctx, c, v.device, e.Path, wish)
				if err == nil {
					log.Info().Stringer("size", config.Size(r.Size)).Stringer("capacity", config.Size(r.Capacity)).Msg("resized")
				}
				return r, err
			},
			Compact: func(ctx context.Context, progress func(dead, live uint64)) (any, error) {
				return compactDevice(ctx, v.device, progress)
			},
			StartScrub: v.device.StartScrub,
			StopScrub:  v.device.StopScrub,
			Scrub:      func() any { return v.device.Scrub() },
			Regions:    func(ctx context.Context) (any, error) { return mapDevice(ctx, v.device) },
			Snapshot: func(ctx context.Context, take func() (net.Conn, error)) error {
				log.Info().Msg("a snapshot is being read")
				defer log.Info().Msg("the snapshot is given back")
				return serveSnapshot(ctx, v.device, func(e nbd.Event) {
					if e.Kind == nbd.EventRequestFailed {
						s.event(e)
					}
				}, take)
			},
		})
		v.socket = nil
	}
	return nil
}

// close gives back what was held to open the device.
func (v *served) close() {
	if v.socket != nil {
		_ = v.socket.Close()
		v.socket = nil
	}
	if v.file != nil {
		_ = v.file.Close() // nothing was written
		v.file = nil
	}
}

// recompressionOf is the codec for data that is encoded anew, nil for the default.
func recompressionOf(e *config.Export) (*compression.Setting, error) {
	if e.Recompress == "" || e.Recompress == "auto" || e.Recompress == "off" {
		return nil, nil
	}
	s, err := compression.Parse(e.Recompress)
	return &s, err
}

// codecFor is the codec for new data: what the export asks for, else the store's.
func codecFor(e *config.Export, g store.Geometry) (compression.Setting, error) {
	if e.Codec != "" {
		return codecOf(e)
	}
	own := compression.Setting{Codec: compression.Codec(g.Codec), Level: compression.Level(g.Level)}
	if e.Level == 0 {
		return own, nil
	}
	return codecOf(&config.Export{Codec: own.Codec.String(), Level: e.Level})
}

// end stops in good order: no new request, those in flight answered, everything
// committed. Errors tell what could not be.
func (s *serving) end() error {
	var errs []error
	if s.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		if err := s.server.Shutdown(ctx); err != nil {
			s.log.Warn().Err(err).Msg("clients have kept requests open, they were cut off")
		}
	}
	for _, l := range s.listeners {
		_ = l.Close() // removes its socket; closed already if it served
	}
	if s.monitor != nil {
		if err := s.monitor.Close(); err != nil {
			s.log.Debug().Err(err).Msg("metrics")
		}
	}
	for _, v := range s.stores {
		if v.control != nil {
			if err := v.control.Close(); err != nil {
				s.log.Debug().Err(err).Msg("control socket")
			}
		}
		v.close()
		if v.device == nil {
			continue
		}
		v.condition.Load().sampler.Close()
		if err := v.device.Close(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", v.export.Path, err))
		} else {
			s.log.Info().Str("backing", v.export.Path).Msg("closed, everything is committed")
			if r := v.run.Load(); r != nil {
				if err := r.end(v.export.Path, v.device.Geometry().UUID, v.device.DurableEpoch()); err != nil {
					s.log.Debug().Err(err).Msg("how this run has ended cannot be left for the next")
				}
			}
		}
	}
	return errors.Join(errs...)
}

// notify tells the service manager, if there is one.
func (s *serving) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn().Err(err).Msg("sd_notify")
	}
}

// watchdog ticks as often as the service manager wants to hear that the server is
// alive, never if it does not; the function ends that.
func (s *serving) watchdog() (<-chan time.Time, func()) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn().Err(err).Msg("no watchdog")
	}
	if err != nil || limit == 0 {
		return nil, func() {}
	}
	t := time.NewTicker(limit / 2) // as sd_watchdog_enabled(3) recommends
	return t.C, t.Stop
}

// alive returns if the server and the devices do: it takes locks that requests
// need, under which nobody waits for a disk. So a deadlock is seen, and a slow
// disk is not taken for one: a restart would only add a recovery to its work.
func (s *serving) alive() {
	s.server.Metrics()
	for _, v := range s.stores {
		select {
		case v.turn <- struct{}{}:
			if v.device != nil {
				v.device.Geometry()
			}
			<-v.turn
		default: // it is being opened, which may take as long as it likes
		}
	}
}

// reload reads the configuration again and applies what can change while clients
// are served. A configuration with faults changes nothing.
func (s *serving) reload() {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail for this clock
	s.notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
	defer s.notify(daemon.SdNotifyReady)
	c, err := s.load()
	if err != nil {
		s.log.Error().Err(err).Msg("not reloaded, everything stays as it was")
		return
	}
	restart := []string{}
	for _, key := range config.Changed(s.config, c) {
		switch key {
		case "log-level":
			s.config.LogLevel = c.LogLevel
			setLogLevel(c)
		default:
			restart = append(restart, key)
		}
	}
	if len(restart) > 0 {
		s.log.Warn().Strs("keys", restart).Msg("reloaded; these have changed and need a restart")
	} else {
		s.log.Info().Msg("reloaded")
	}
}

// event logs what the NBD server tells.
func (s *serving) event(e nbd.Event) {
	log := s.log.With().Uint64("connection", e.Conn).Logger()
	switch e.Kind {
	case nbd.EventOpen:
		if e.TLS != "" {
			log = log.With().Str("tls", e.TLS).Str("client", e.Client).Logger()
		}
		log.Info().Str("export", e.Export).Str("remote", e.Remote).Msg("connected")
	case nbd.EventClose:
		log.Info().Err(e.Err).Msg("disconnected")
	case nbd.EventRefused:
		log.Warn().Err(e.Err).Str("export", e.Export).Str("remote", e.Remote).Msg("refused")
	case nbd.EventRequestFailed:
		log.Error().Err(e.Err).Str("export", e.Export).Stringer("command", e.Command).Uint64("offset", e.Offset).Uint64("length", e.Length).Msg("request failed")
	case nbd.EventAcceptFailing:
		log.Error().Err(e.Err).Msg("cannot accept connections, trying again")
	}
}
