package asyncq

import "time"

// Metrics is a snapshot of a queue at one instant.
type Metrics struct {
	Workers int `json:"workers"`

	Submitted uint64 `json:"submitted"` // tasks since New
	Completed uint64 `json:"completed"` // of them, those whose Complete and Free have returned
	Panicked  uint64 `json:"panicked"`  // of them, those whose Do panicked

	// Submitted - Completed is the sum of these three.
	Waiting   int `json:"waiting"`   // tasks that no worker has begun
	Running   int `json:"running"`   // tasks in Do
	Unordered int `json:"unordered"` // tasks done that are in Complete or wait for their turn

	Bytes    int64 `json:"bytes"`     // tokens in flight
	BytesMax int64 `json:"bytes_max"` // their limit
	BytesLow int64 `json:"bytes_low"` // where those who wait go on after the limit was reached

	Acquiring     int           `json:"acquiring"`         // callers that wait for tokens
	Draining      int           `json:"draining"`          // callers of Drain
	Throttled     uint64        `json:"throttled"`         // calls of Acquire that had to wait, since New
	ThrottledTime time.Duration `json:"throttled_time_ns"` // the sum of the time they have waited, when over
}

// Metrics returns a snapshot.
func (q *Queue) Metrics() Metrics {
	q.mu.Lock()
	defer q.mu.Unlock()
	m := Metrics{
		Workers:       q.opts.Workers,
		Submitted:     uint64(q.mu.issued),
		Completed:     uint64(q.mu.completed),
		Panicked:      q.mu.panics,
		Waiting:       int(q.mu.issued - q.mu.begun),
		Running:       q.mu.running,
		Unordered:     int(q.mu.begun-q.mu.completed) - q.mu.running,
		Bytes:         q.mu.inFlight,
		BytesMax:      q.opts.BytesMax,
		BytesLow:      q.opts.BytesLow,
		Draining:      q.mu.gates,
		Throttled:     q.mu.throttled,
		ThrottledTime: q.mu.throttledTime,
	}
	for w := q.mu.acquirers.first; w != nil; w = w.next {
		m.Acquiring++
	}
	return m
}
