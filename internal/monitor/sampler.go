package monitor

import (
	"context"
	"sync"
	"time"

	"cnbd/device"
)

const (
	// sampleAgeMin is how old a status has to be before a device is asked for another
	// one. That is work: it looks up what is not in a checkpoint yet.
	sampleAgeMin = 10 * time.Second
	// sampleWait is how long a caller waits for a new status; then it gets the old
	// one. A disk that hangs must not keep the rest of the metrics away.
	sampleWait = 4 * time.Second
)

// A Sample is the status of a device at one moment.
type Sample struct {
	Time   time.Time     `json:"time"`
	Status device.Status `json:"status"`
}

// A Sampler asks a device for its status, not too often, for all who want to
// know it. Its methods may be called concurrently.
type Sampler struct {
	ask    func(context.Context) (device.Status, error)
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	newest  *Sample       // nil: none yet; immutable
	err     error         // of the last attempt
	tried   time.Time     // its end
	running chan struct{} // nil: none; closed when the attempt that runs has ended
}

// NewSampler returns a Sampler that calls ask, from one goroutine at a time.
func NewSampler(ask func(context.Context) (device.Status, error)) *Sampler {
	s := &Sampler{ask: ask}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Sample is the newest status, at most about ten seconds old unless the device is
// slow to tell. It is nil if there is none, with the reason. It waits a few
// seconds at most.
func (s *Sampler) Sample(ctx context.Context) (*Sample, error) {
	s.mu.Lock()
	if s.running == nil && time.Since(s.tried) >= sampleAgeMin && s.ctx.Err() == nil {
		s.running = make(chan struct{})
		go s.run(s.running)
	}
	running := s.running
	s.mu.Unlock()
	if running != nil {
		limit := time.NewTimer(sampleWait)
		defer limit.Stop()
		select {
		case <-running:
		case <-limit.C:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest, s.err
}

func (s *Sampler) run(done chan struct{}) {
	st, err := s.ask(s.ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.newest = &Sample{time.Now(), st}
	}
	s.err, s.tried, s.running = err, time.Now(), nil
	close(done)
}

// Close returns when the device is not asked and will not be any more.
func (s *Sampler) Close() {
	s.cancel()
	s.mu.Lock()
	running := s.running
	s.mu.Unlock()
	if running != nil {
		<-running
	}
}
