// Package monitor shows others how a server is: as metrics in Prometheus' format,
// and as two questions that a supervisor asks.
//
//	GET /metrics       what docs/monitoring.md lists
//	GET /healthz       200: the program answers
//	GET /readyz        200: every export can be read and written; else 503 and, line
//	                   by line, what is wrong
//	GET /debug/pprof/  profiles of the program, where asked for
//
// It reads what the packages count anyway when it is asked, and nothing in
// between. Lock order: the mutex of a Sampler is innermost.
package monitor

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"cnbd/nbd"
)

const (
	// requestTimeout bounds the time in which a client sends its request, idleTimeout
	// that in which it keeps a connection that it does not use: longer than the usual
	// minute between scrapes.
	requestTimeout = 5 * time.Second
	idleTimeout    = 2 * time.Minute
	// answerTimeout bounds the answer; a profile may take minutes.
	answerTimeout = 5 * time.Minute
	headerBytes   = 8 << 10
	// scrapesMax bounds the scrapes at a time.
	scrapesMax = 4
	// closeTimeout is what clients have at Close to take their answers.
	closeTimeout = time.Second
)

// A Source is what is shown. All its functions may be called concurrently.
type Source struct {
	Version string
	// Server is what the NBD server has done.
	Server  func() nbd.Metrics
	Exports []Export
}

// An Export is one export of a Source, which may be open or not.
type Export struct {
	Name string
	// Sample is the newest status of its device, nil if there is none.
	Sample func(context.Context) *Sample
	// Err tells why clients cannot use it: it could not be opened, is not open yet,
	// or its backing has failed. It must not block.
	Err func() error
}

// A Server answers on one listener.
type Server struct {
	http   *http.Server
	served chan struct{} // closed when the accept loop has ended
}

// Serve starts to answer on l, which it owns from now on.
func Serve(l net.Listener, src Source, profiles bool) *Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", Handler(src))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { ready(w, src) })
	if profiles {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	s := &Server{served: make(chan struct{}), http: &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    headerBytes,
		// What a broken client does is no news for operators.
		ErrorLog: log.New(io.Discard, "", 0),
	}}
	go func() {
		defer close(s.served)
		_ = s.http.Serve(l) // ErrServerClosed, or the listener has failed for good
	}()
	return s
}

// Close stops answering and closes the listener. What still runs of a scrape may
// ask for samples once more.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.served
	return err
}

// Handler answers with the metrics of src, and those of the process.
func Handler(src Source) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{src}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: scrapesMax})
}

// ready answers whether all exports can be used.
func ready(w http.ResponseWriter, src Source) {
	var faults []string
	for _, e := range src.Exports {
		if err := e.Err(); err != nil {
			faults = append(faults, fmt.Sprintf("export %q: %s\n", e.Name, strings.ReplaceAll(err.Error(), "\n", "; ")))
		}
	}
	if len(faults) > 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, strings.Join(faults, ""))
		return
	}
	fmt.Fprintln(w, "ok")
}
