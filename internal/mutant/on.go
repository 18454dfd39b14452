//go:build mutant

package mutant

import (
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"
)

var active atomic.Uint32

// Is tells whether m is in the program.
func Is(m Mutant) bool { return active.Load() == uint32(m) }

// Caught has try look for m with seeds from seed on, at most tries times, and
// fails t if it finds nothing. Without the mutant try must find nothing.
func Caught(t *testing.T, m Mutant, seed uint64, tries int, try func(seed uint64) error) {
	t.Helper()
	if err := try(seed); err != nil {
		t.Fatalf("without the mutant: %v", err)
	}
	active.Store(uint32(m))
	defer active.Store(uint32(None))
	start := time.Now()
	for i := range tries {
		found := make(chan error, 1)
		go func() {
			defer func() {
				if p := recover(); p != nil {
					found <- fmt.Errorf("panic: %v\n%s", p, debug.Stack())
				}
			}()
			found <- try(seed + uint64(i))
		}()
		select {
		case err := <-found:
			if err != nil {
				t.Logf("caught by try %d, after %v: %.300v", i+1, time.Since(start).Round(time.Millisecond), err)
				return
			}
		case <-time.After(time.Minute):
			t.Fatalf("try %d hangs", i+1)
		}
	}
	t.Errorf("not caught in %d tries, %v", tries, time.Since(start).Round(time.Millisecond))
}
