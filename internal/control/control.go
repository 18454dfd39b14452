// Package control is the socket through which the owner of a store is asked:
// while a server has a store locked nobody else reads it (rule R12), so info and
// its like ask here. The language is HTTP with JSON on a unix socket:
//
//	GET  /v1/status    200 and what the server's status function gives
//	GET  /v1/live      the same of its live function, which is quicker
//	POST /v1/resize?size=BYTES&capacity=BYTES
//	                   200 and what has become of it
//	POST /v1/compact   200 and lines {"dead": bytes, "live": bytes}, and at the end
//	                   {"done": …} or {"error": "in words"}; the client ends it by
//	                   closing the connection
//	POST /v1/scrub?rate=BYTES
//	                   a scrub is begun that reads so much in a second at most (0: no
//	                   limit); GET tells of the newest, DELETE ends it: 200 and how
//	                   it is with it, null if there was none
//	GET  /v1/regions   200 and how each part of the device is stored
//	GET  /v1/snapshot  with "Upgrade: nbd": 101, and from then on NBD is spoken on the
//	                   connection, whose only export is the device as it is now
//
// Else the answer is an error status and {"error": "in words"}; 400 says that what
// was asked for cannot be meant.
//
// Who may connect is decided by the permissions of the socket, which is the
// caller's to make. A status and a resize have a time limit, and each line of a
// compaction, so a client that stalls ends by itself. Requests of one kind are
// answered one at a time, the others wait for their turn; but a second snapshot is
// refused.
package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	// requestTimeout bounds the time in which a client has to send its request.
	requestTimeout = 5 * time.Second
	// answerTimeout bounds the answer, waiting for a turn included. A status
	// takes a checkpoint, which on a busy disk may take seconds.
	answerTimeout = 60 * time.Second
	// closeTimeout is what the clients have at Close to take their answers.
	closeTimeout = 5 * time.Second
	// headerBytesMax bounds a request, none of which has a body.
	headerBytesMax = 8 << 10
	// answerBytesMax bounds what a client takes for an answer.
	answerBytesMax = 4 << 20

	// progressEvery is how often a compaction tells how far it is.
	progressEvery = 500 * time.Millisecond

	statusPath  = "/v1/status"
	livePath    = "/v1/live"
	resizePath  = "/v1/resize"
	compactPath = "/v1/compact"
	scrubPath   = "/v1/scrub"
	regionsPath = "/v1/regions"
	snapPath    = "/v1/snapshot"

	// snapProtocol is the name of NBD in an upgrade.
	snapProtocol = "nbd"
)

// ErrRefused is wrapped by errors that say that what was asked for cannot be
// meant, and not that it could not be done.
var ErrRefused = errors.New("refused")

// Handlers are what a server is asked for. Each is called by one goroutine at a
// time, must return soon when its context ends, and is not called any more once
// Close has returned. What they return is sent as JSON.
type Handlers struct {
	Status func(context.Context) (any, error)
	// Live is what may be asked for every second.
	Live func(context.Context) (any, error)
	// Resize changes the size of the device. An error that wraps ErrRefused
	// arrives as one.
	Resize func(context.Context, ResizeRequest) (any, error)
	// Compact cleans until nothing is left to clean, and reports how far it is,
	// from any goroutine, as often as it likes.
	Compact func(ctx context.Context, progress func(dead, live uint64)) (any, error)
	// StartScrub begins a scrub that reads rate bytes in a second at most, StopScrub
	// ends it, and Scrub tells how it is with the newest.
	StartScrub func(rate uint64) error
	StopScrub  func()
	Scrub      func() any
	// Regions tells how each part of the device is stored.
	Regions func(context.Context) (any, error)
	// Snapshot keeps the device as it is, then takes the client's connection, once, by
	// take, and serves that on it until it ends or the context does. An error
	// before that is what the client gets.
	Snapshot func(ctx context.Context, take func() (net.Conn, error)) error
}

// A ResizeRequest is a wish for another size.
type ResizeRequest struct {
	Size     uint64 // of the device, in bytes
	Capacity uint64 // of the store, in bytes; 0: as the server sees fit
}

// A Server answers on one listener.
type Server struct {
	http     *http.Server
	handlers Handlers
	ctx      context.Context
	cancel   context.CancelFunc
	served   chan struct{} // closed when the accept loop has ended

	// Of capacity 1: held while the function of that name runs.
	status, live, resize, compact, scrub, regions, snapshot chan struct{}
}

// Serve starts to answer on l, which it owns from now on.
func Serve(l net.Listener, h Handlers) *Server {
	turn := func() chan struct{} { return make(chan struct{}, 1) }
	s := &Server{handlers: h, served: make(chan struct{}), status: turn(), live: turn(), resize: turn(), compact: turn(), scrub: turn(), regions: turn(), snapshot: turn()}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	limited := func(f http.HandlerFunc) http.Handler {
		return http.TimeoutHandler(f, answerTimeout, `{"error": "the server did not answer in time"}`)
	}
	mux.Handle("GET "+statusPath, limited(s.answerStatus))
	mux.Handle("GET "+livePath, limited(s.answerLive))
	mux.Handle("POST "+resizePath, limited(s.answerResize))
	mux.HandleFunc("POST "+compactPath, s.answerCompact)
	mux.Handle(scrubPath, limited(s.answerScrub))
	mux.Handle("GET "+regionsPath, limited(s.answerRegions))
	mux.HandleFunc("GET "+snapPath, s.answerSnapshot)
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout + answerTimeout + requestTimeout,
		MaxHeaderBytes:    headerBytesMax,
		BaseContext:       func(net.Listener) context.Context { return s.ctx },
		// What a broken client does is no news for operators.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	s.http.SetKeepAlivesEnabled(false)
	go func() {
		defer close(s.served)
		_ = s.http.Serve(l) // ErrServerClosed, or the listener has failed for good
	}()
	return s
}

func (s *Server) answerStatus(w http.ResponseWriter, r *http.Request) {
	answer(w, r, s.status, s.handlers.Status)
}

func (s *Server) answerLive(w http.ResponseWriter, r *http.Request) {
	answer(w, r, s.live, s.handlers.Live)
}

func (s *Server) answerResize(w http.ResponseWriter, r *http.Request) {
	answer(w, r, s.resize, func(ctx context.Context) (any, error) {
		number := func(key string) (n uint64, err error) {
			if text := r.FormValue(key); text != "" {
				if n, err = strconv.ParseUint(text, 10, 64); err != nil {
					err = fmt.Errorf("%w: %s: %w", ErrRefused, key, err)
				}
			}
			return n, err
		}
		size, err := number("size")
		if err != nil {
			return nil, err
		}
		capacity, err := number("capacity")
		if err != nil {
			return nil, err
		}
		return s.handlers.Resize(ctx, ResizeRequest{size, capacity})
	})
}

func (s *Server) answerScrub(w http.ResponseWriter, r *http.Request) {
	answer(w, r, s.scrub, func(context.Context) (any, error) {
		switch r.Method {
		case http.MethodGet:
		case http.MethodPost:
			rate, err := strconv.ParseUint(r.FormValue("rate"), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%w: rate: %w", ErrRefused, err)
			}
			if err := s.handlers.StartScrub(rate); err != nil {
				return nil, err
			}
		case http.MethodDelete:
			s.handlers.StopScrub()
		default:
			return nil, fmt.Errorf("%w: method %s", ErrRefused, r.Method)
		}
		return s.handlers.Scrub(), nil
	})
}

func (s *Server) answerRegions(w http.ResponseWriter, r *http.Request) {
	answer(w, r, s.regions, s.handlers.Regions)
}

// answerSnapshot hands the connection over. It holds its turn until that has ended,
// so Close waits for it.
func (s *Server) answerSnapshot(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, err error) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(failure{err.Error()}) // fails with the client
	}
	if r.Header.Get("Upgrade") != snapProtocol {
		refuse(http.StatusBadRequest, errors.New("a snapshot is read by NBD: ask for the upgrade"))
		return
	}
	select {
	case s.snapshot <- struct{}{}:
		defer func() { <-s.snapshot }()
	default:
		refuse(http.StatusServiceUnavailable, errors.New("a snapshot of the store is being read by somebody else"))
		return
	}
	taken := false
	// The request's context ends when the connection is taken.
	err := s.handlers.Snapshot(s.ctx, func() (net.Conn, error) {
		taken = true
		nc, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return nil, err
		}
		// In NBD the server speaks first: nothing of the client is buffered.
		_ = nc.SetDeadline(time.Now().Add(requestTimeout))
		_, err = io.WriteString(nc, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+snapProtocol+"\r\n\r\n")
		if err = errors.Join(err, nc.SetDeadline(time.Time{})); err != nil {
			_ = nc.Close()
			return nil, err
		}
		return nc, nil
	})
	if err != nil && !taken {
		refuse(http.StatusServiceUnavailable, err)
	}
}

// answer gives what f returns, when it is its turn.
func answer(w http.ResponseWriter, r *http.Request, turn chan struct{}, f func(context.Context) (any, error)) {
	select {
	case turn <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	v, err := f(r.Context())
	<-turn
	code := http.StatusOK
	if err != nil {
		v, code = failure{err.Error()}, http.StatusServiceUnavailable
		if errors.Is(err, ErrRefused) {
			code = http.StatusBadRequest
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // fails with the client
}

// failure is the answer when there is none.
type failure struct {
	Error string `json:"error"`
}

// A line is one of the answer to a compaction.
type line struct {
	Dead  uint64          `json:"dead"`
	Live  uint64          `json:"live"`
	Done  json.RawMessage `json:"done,omitempty"`
	Error string          `json:"error,omitempty"`
}

func (s *Server) answerCompact(w http.ResponseWriter, r *http.Request) {
	// The context ends with the connection.
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	select {
	case s.compact <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-s.compact }()
	control := http.NewResponseController(w)
	send := func(l line) {
		_ = control.SetWriteDeadline(time.Now().Add(requestTimeout))
		if json.NewEncoder(w).Encode(l) != nil || control.Flush() != nil {
			cancel()
		}
	}
	w.Header().Set("Content-Type", "application/json")
	var newest line
	var mu sync.Mutex // guards newest
	quit, ticked := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ticked)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				mu.Lock()
				l := newest
				mu.Unlock()
				send(l)
			}
		}
	}()
	v, err := s.handlers.Compact(ctx, func(dead, live uint64) {
		mu.Lock()
		newest = line{Dead: dead, Live: live}
		mu.Unlock()
	})
	close(quit)
	<-ticked
	last := newest
	if err == nil {
		last.Done, err = json.Marshal(v)
	}
	if err != nil {
		last.Error = err.Error()
	}
	send(last)
}

// Close stops answering; a function that is running has its context ended. It
// closes the listener, and returns when no function is running or will be called.
func (s *Server) Close() error {
	s.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.served
	for _, turn := range []chan struct{}{s.status, s.live, s.resize, s.compact, s.scrub, s.regions, s.snapshot} {
		turn <- struct{}{} // never given back: its holder was the last
	}
	return err
}

// Status asks the server at the unix socket for its status, and decodes it into
// the value that v points to. It blocks until there is an answer, ctx ends, or
// about a minute has passed. That nobody listens at socket is an error that
// wraps syscall.ECONNREFUSED or fs.ErrNotExist.
func Status(ctx context.Context, socket string, v any) error {
	return ask(ctx, socket, http.MethodGet, statusPath, answerTimeout, func(body *json.Decoder) error { return body.Decode(v) })
}

// Live asks it for what its live function gives; else it is as Status.
func Live(ctx context.Context, socket string, v any) error {
	return ask(ctx, socket, http.MethodGet, livePath, answerTimeout, func(body *json.Decoder) error { return body.Decode(v) })
}

// Resize asks the server at the unix socket for another size, and decodes what has
// become of it into the value that v points to. It blocks, and fails, as Status
// does; an error that wraps ErrRefused says that the wish cannot be meant.
func Resize(ctx context.Context, socket string, wish ResizeRequest, v any) error {
	path := fmt.Sprintf("%s?size=%d&capacity=%d", resizePath, wish.Size, wish.Capacity)
	return ask(ctx, socket, http.MethodPost, path, answerTimeout, func(body *json.Decoder) error { return body.Decode(v) })
}

// Compact has the server at the unix socket clean until nothing is left to clean,
// and decodes what it gives in the end into the value that v points to. progress is
// told now and then how many bytes are dead and how many alive. It blocks for as
// long as that takes; when ctx ends the server stops. It fails as Status does.
func Compact(ctx context.Context, socket string, progress func(dead, live uint64), v any) error {
	return ask(ctx, socket, http.MethodPost, compactPath, 0, func(body *json.Decoder) error {
		for {
			var l line
			if err := body.Decode(&l); err != nil {
				return err
			}
			switch {
			case l.Error != "":
				return errors.New(l.Error)
			case l.Done != nil:
				return json.Unmarshal(l.Done, v)
			}
			progress(l.Dead, l.Live)
		}
	})
}

// StartScrub has the server at the unix socket begin a scrub, and decodes how it is
// with it into the value that v points to. It blocks, and fails, as Status does.
func StartScrub(ctx context.Context, socket string, rate uint64, v any) error {
	return askScrub(ctx, socket, http.MethodPost, fmt.Sprintf("%s?rate=%d", scrubPath, rate), v)
}

// Scrub asks how it is with the newest scrub; else it is as StartScrub.
func Scrub(ctx context.Context, socket string, v any) error {
	return askScrub(ctx, socket, http.MethodGet, scrubPath, v)
}

// StopScrub has the scrub ended that is running; else it is as StartScrub.
func StopScrub(ctx context.Context, socket string, v any) error {
	return askScrub(ctx, socket, http.MethodDelete, scrubPath, v)
}

func askScrub(ctx context.Context, socket, method, path string, v any) error {
	return ask(ctx, socket, method, path, answerTimeout, func(body *json.Decoder) error { return body.Decode(v) })
}

// Regions asks how each part of the device is stored, and decodes that into the value
// that v points to. It blocks, and fails, as Status does.
func Regions(ctx context.Context, socket string, v any) error {
	return ask(ctx, socket, http.MethodGet, regionsPath, answerTimeout, func(body *json.Decoder) error { return body.Decode(v) })
}

// Snapshot asks the server at the unix socket to keep the device as it is now. NBD is
// to be spoken on the connection, whose export has the empty name; the snapshot ends
// with it. It blocks, and fails, as Status does.
func Snapshot(ctx context.Context, socket string) (net.Conn, error) {
	fault := func(err error) (net.Conn, error) { return nil, fmt.Errorf("control: ask %s: %w", socket, err) }
	nc, err := (&net.Dialer{Timeout: requestTimeout}).DialContext(ctx, "unix", socket)
	if err != nil {
		return fault(err)
	}
	_ = nc.SetDeadline(time.Now().Add(answerTimeout))
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	_, err = io.WriteString(nc, "GET "+snapPath+" HTTP/1.1\r\nHost: cnbd\r\nConnection: Upgrade\r\nUpgrade: "+snapProtocol+"\r\n\r\n")
	in := bufio.NewReader(nc)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(in, nil)
	}
	if !stop() {
		err = context.Cause(ctx)
	}
	switch {
	case err != nil:
		_ = nc.Close()
		return fault(err)
	case resp.StatusCode != http.StatusSwitchingProtocols:
		err := answered(socket, resp, json.NewDecoder(io.LimitReader(resp.Body, answerBytesMax)))
		_ = nc.Close()
		return nil, err
	}
	_ = nc.SetDeadline(time.Time{})
	return &upgraded{nc, in}, nil
}

// An upgraded connection may have bytes that came right behind the answer.
type upgraded struct {
	net.Conn
	in *bufio.Reader
}

func (u *upgraded) Read(p []byte) (int, error) { return u.in.Read(p) }

// answered is the error of an answer that tells of one.
func answered(socket string, resp *http.Response, body *json.Decoder) error {
	var f failure
	if body.Decode(&f) != nil || f.Error == "" {
		f.Error = resp.Status
	}
	if resp.StatusCode == http.StatusBadRequest {
		return fmt.Errorf("control: %s: %w: %s", socket, ErrRefused, f.Error)
	}
	return fmt.Errorf("control: %s answers: %s", socket, f.Error)
}

// ask sends one request and has take read the body of a good answer. A limit of 0
// is none.
func ask(ctx context.Context, socket, method, path string, limit time.Duration, take func(*json.Decoder) error) error {
	client := &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{Timeout: requestTimeout}).DialContext(ctx, "unix", socket)
			},
		},
	}
	if limit > 0 {
		client.Timeout = limit + 2*requestTimeout
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://cnbd"+path, nil)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("control: ask %s: %w", socket, errors.Unwrap(err)) // without the made-up URL
	}
	defer resp.Body.Close()
	in := io.Reader(resp.Body)
	if limit > 0 {
		in = io.LimitReader(in, answerBytesMax)
	}
	body := json.NewDecoder(in)
	if resp.StatusCode != http.StatusOK {
		return answered(socket, resp, body)
	}
	if err := take(body); err != nil {
		return fmt.Errorf("control: answer of %s: %w", socket, err)
	}
	return nil
}
