// Package control is the socket through which the owner of a store is asked:
// while a server has a store locked nobody else reads it (rule R12), so info and
// its like ask here. The language is HTTP with JSON on a unix socket:
//
//	GET /v1/status    200 and what the server's status function gives,
//	                  else an error status and {"error": "in words"}
//
// Who may connect is decided by the permissions of the socket, which is the
// caller's to make. Everything has a time limit, so a client that stalls ends
// by itself; one request is answered at a time, the others wait for their turn.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
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

	statusPath = "/v1/status"
)

// A Server answers on one listener.
type Server struct {
	http   *http.Server
	status func(context.Context) (any, error)
	turn   chan struct{} // of capacity 1: held while status runs
	ctx    context.Context
	cancel context.CancelFunc
	served chan struct{} // closed when the accept loop has ended
}

// Serve starts to answer on l, which it owns from now on. What status returns is
// sent as JSON; it is called by one goroutine at a time, must return soon when
// its context ends, and is not called any more once Close has returned.
func Serve(l net.Listener, status func(context.Context) (any, error)) *Server {
	s := &Server{status: status, turn: make(chan struct{}, 1), served: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statusPath, s.answerStatus)
	s.http = &http.Server{
		Handler:           http.TimeoutHandler(mux, answerTimeout, `{"error": "the server did not answer in time"}`),
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
	select {
	case s.turn <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	v, err := s.status(r.Context())
	<-s.turn
	code := http.StatusOK
	if err != nil {
		v, code = failure{err.Error()}, http.StatusServiceUnavailable
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // fails with the client
}

// failure is the answer when there is none.
type failure struct {
	Error string `json:"error"`
}

// Close stops answering; a status function that is running has its context ended.
// It closes the listener, and returns when the status function is not running
// and will not be called.
func (s *Server) Close() error {
	s.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.served
	s.turn <- struct{}{} // never given back: its holder was the last
	return err
}

// Status asks the server at the unix socket for its status, and decodes it into
// the value that v points to. It blocks until there is an answer, ctx ends, or
// about a minute has passed. That nobody listens at socket is an error that
// wraps syscall.ECONNREFUSED or fs.ErrNotExist.
func Status(ctx context.Context, socket string, v any) error {
	client := &http.Client{
		Timeout: answerTimeout + 2*requestTimeout,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{Timeout: requestTimeout}).DialContext(ctx, "unix", socket)
			},
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://cnbd"+statusPath, nil)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("control: ask %s: %w", socket, errors.Unwrap(err)) // without the made-up URL
	}
	defer resp.Body.Close()
	body := json.NewDecoder(io.LimitReader(resp.Body, answerBytesMax))
	if resp.StatusCode != http.StatusOK {
		var f failure
		if body.Decode(&f) != nil || f.Error == "" {
			f.Error = resp.Status
		}
		return fmt.Errorf("control: %s answers: %s", socket, f.Error)
	}
	if err := body.Decode(v); err != nil {
		return fmt.Errorf("control: answer of %s: %w", socket, err)
	}
	return nil
}
