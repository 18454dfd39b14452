//go:build !race && !invariants

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cnbd/nbd"
)

// TestRuns: a server tells which run it is, and which it succeeds: only one that has
// ended in good order, and only if nobody has written to the store since.
func TestRuns(t *testing.T) {
	path := t.TempDir() + "/s"
	var s *server
	start := func() *run {
		t.Helper()
		s = serve(t, "--size=64MiB", path)
		about, err := nbd.About(t.Context(), s.uri)
		r := runOf(about)
		if err != nil || r == nil {
			t.Fatalf("the server tells %q, %v", about, err)
		}
		return r
	}
	write := func(flush bool) {
		t.Helper()
		c, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.WriteAt(t.Context(), make([]byte, 4097), 5, flush); err != nil {
			t.Fatal(err)
		}
	}
	first := start()
	if first.After != "" {
		t.Errorf("the first run succeeds %s", first.After)
	}
	write(false)
	s.stop(t)
	second := start()
	if second.After != first.ID || second.ID == first.ID {
		t.Errorf("behind a clean end of %s: %s after %s", first.ID, second.ID, second.After)
	}
	s.stop(t) // with nothing written
	third := start()
	if third.After != second.ID {
		t.Errorf("behind a clean end of %s with nothing written: after %s", second.ID, third.After)
	}
	write(false)
	s.kill()
	fourth := start()
	if fourth.After != "" {
		t.Errorf("behind a kill: after %s", fourth.After)
	}
	write(true)
	s.stop(t)
	left, err := os.ReadFile(endingPath(path))
	if err != nil {
		t.Fatal(err)
	}
	fifth := start()
	write(true)
	s.kill()
	// As if what the fourth has left had never been taken away.
	if err := os.WriteFile(endingPath(path), left, 0o600); err != nil {
		t.Fatal(err)
	}
	if sixth := start(); sixth.After != "" || sixth.goesOn(fifth.ID) {
		t.Errorf("with an older ending: after %s", sixth.After)
	}
	s.stop(t)
	do(t, binary, "compact", path) // it writes
	if seventh := start(); seventh.After != "" {
		t.Errorf("behind another program: after %s", seventh.After)
	}
	s.stop(t)
	if err := os.WriteFile(endingPath(path), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if eighth := start(); eighth.After != "" {
		t.Errorf("with a broken ending: after %s", eighth.After)
	}
	if _, err := os.Stat(endingPath(path)); err == nil {
		t.Error("the ending of the run before is still there")
	}
	s.stop(t)
	s = serve(t, path)
	s.stop(t)
	if _, err := os.Stat(endingPath(path)); err == nil {
		t.Error("an ending that nobody asked for was left")
	}
}

// TestKeeper: which servers a device is connected to again.
func TestKeeper(t *testing.T) {
	type answer struct {
		run *run
		err error
	}
	down := answer{err: errors.New("connection refused")}
	for _, tc := range []struct {
		name    string
		answers []answer // of the server, one after the other; the last for ever
		hand    error
		detach  bool // meanwhile
		want    string
	}{
		{name: "the same run", answers: []answer{{run: &run{ID: "a"}}}},
		{name: "its successor, after a while", answers: []answer{down, down, {run: &run{ID: "b", After: "a"}}}},
		{name: "behind a crash", answers: []answer{down, {run: &run{ID: "b"}}}, want: "may have answered writes that are lost"},
		{name: "two runs later", answers: []answer{{run: &run{ID: "c", After: "b"}}}, want: "may have answered writes that are lost"},
		{name: "never again", answers: []answer{down}, want: "connection refused"},
		{name: "the kernel refuses", answers: []answer{{run: &run{ID: "a"}}}, hand: errors.New("no"), want: "no;"},
		{name: "detached meanwhile", answers: []answer{down}, detach: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var tries, handed, given atomic.Int64
			var gone atomic.Bool
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			k := &keeper{
				log: io.Discard, run: "a", timeout: 500 * time.Millisecond,
				attached: func() bool { return !gone.Load() },
				connect: func(context.Context) (*run, []*os.File, error) {
					n := tries.Add(1)
					gone.Store(tc.detach)
					a := tc.answers[min(int(n), len(tc.answers))-1]
					return a.run, nil, a.err
				},
				hand:   func([]*os.File) error { handed.Add(1); return tc.hand },
				giveUp: func() error { given.Add(1); return nil },
			}
			dead := make(chan struct{}, 1)
			dead <- struct{}{}
			end := make(chan error, 1)
			go func() { end <- k.keep(ctx, dead) }()
			if tc.want == "" && !tc.detach {
				for handed.Load() == 0 { // polling
					time.Sleep(time.Millisecond)
				}
				cancel()
			}
			err := <-end
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if given.Load() != 0 != (tc.want != "") {
				t.Errorf("given up %d times", given.Load())
			}
			if last := tc.answers[len(tc.answers)-1].run; tc.want == "" && last != nil && k.run != last.ID {
				t.Errorf("the run to go on from is %s", k.run)
			}
		})
	}
}
