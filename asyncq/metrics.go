package asyncq

import "time"

// Metrics is a snapshot of a queue at one instant.
type Metrics struct {
	Workers int

	Submitted uint64 // tasks since New
	Completed uint64 // of them, those whose Complete and Free have returned
	Panicked  uint64 // of them, those whose Do panicked

	// Submitted - Completed is the sum of these three.
	Waiting   int // tasks that no worker has begun
	Running   int // tasks in Do
	Unordered int // tasks done that are in Complete or wait for their turn

	Bytes    int64 // tokens in flight
	BytesMax int64 // their limit
	BytesLow int64 // where those who wait go on after the limit was reached

	Acquiring     int           // callers that wait for tokens
	Draining      int           // callers of Drain
	Throttled     uint64        // calls of Acquire that had to wait, since New
	ThrottledTime time.Duration // the sum of the time they have waited, when over
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
