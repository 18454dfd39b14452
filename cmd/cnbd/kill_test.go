//go:build !race && !invariants

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"cnbd/internal/block"
	"cnbd/internal/disktest"
	"cnbd/nbd"
)

const (
	killBlocks      = 16 << 20 / block.Size // device: small, so that blocks are overwritten again and again
	killConnections = 3
	killInFlight    = 16  // requests on each connection
	killCycles      = 60  // of load, kill, restart and check, times CNBD_TEST_SCALE
	killOpBlocks    = 64  // of a request at most: 256 KiB
	killLoadMax     = 250 // milliseconds of load before the kill
)

// TestKill ends the server with SIGKILL at random moments, under load from many
// connections, and while it starts and recovers. After each restart one cut
// through the history must explain the whole device, at or after the last
// answered FLUSH or FUA (promises P1 and P2).
func TestKill(t *testing.T) {
	seed := disktest.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "disk.cnbd")
	args := []string{"--size", fmt.Sprint(killBlocks * block.Size), "--capacity", "1GiB", "--cache", "16MiB", "--dirty-max", "4MiB",
		"--checkpoint-interval", "16MiB", "--commit-interval", "50ms", "--writeback-period", "20ms", "--writeback-expire", "30ms", path}
	do(t, binary, "create", "--size", fmt.Sprint(killBlocks*block.Size), "--capacity", "1GiB", path)
	args = append([]string{"--capacity", "1GiB"}, args[4:]...)

	history := disktest.NewCutLog(disktest.CutOptions{Seed: seed, Blocks: killBlocks})
	requests, kills, early := 0, 0, 0
	for cycle := range killCycles * disktest.Scale(t) {
		// Now and then it does not even come up.
		for rng.IntN(3) == 0 {
			cmd := exec.Command(binary, append([]string{"serve"}, args...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(rng.IntN(40000)) * time.Microsecond)
			if err := cmd.Process.Kill(); err != nil {
				t.Fatalf("cycle %d: a starting server has ended by itself: %v", cycle, err)
			}
			_ = cmd.Wait()
			early++
		}
		s, err := start(args...)
		if err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
		client, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		device := clientReader{client}
		if err := history.Check(device); err != nil {
			t.Fatalf("cycle %d, after %d kills: %v\nlog of the server:\n%s", cycle, kills+early, err, s.log)
		}
		if err := history.Restart(device); err != nil {
			t.Fatal(err)
		}
		client.Close()
		if err := load(t.Context(), s, history, rng, s.kill); err != nil {
			t.Fatalf("cycle %d: %v\nlog of the server:\n%s", cycle, err, s.log)
		}
		requests += history.Ops()
		kills++
	}
	do(t, binary, "check", "--data", path)
	t.Logf("%d kills under load and %d while starting, %d requests; one cut explains each", kills, early, requests)
}

// TestTerminate ends the server with SIGTERM under the same load. It exits with
// status 0, and nothing that was answered is lost, flushed or not (promise P10).
func TestTerminate(t *testing.T) {
	seed := disktest.Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "disk.cnbd")
	do(t, binary, "create", "--size", fmt.Sprint(killBlocks*block.Size), "--capacity", "1GiB", path)
	history := disktest.NewCutLog(disktest.CutOptions{Seed: seed, Blocks: killBlocks})
	requests, longest := 0, time.Duration(0)
	cycles := 5 * disktest.Scale(t)
	for cycle := range cycles {
		// Nothing is written or committed by itself: all of it is dirty at the end.
		s, err := start("--cache", "128MiB", "--commit-interval", "1h", "--writeback-expire", "1h", path)
		if err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
		client, err := nbd.Dial(t.Context(), s.uri)
		if err != nil {
			t.Fatal(err)
		}
		device := clientReader{client}
		if err := history.Check(device); err != nil {
			t.Fatalf("cycle %d: %v\nlog of the server:\n%s", cycle, err, s.log)
		}
		if err := history.Restart(device); err != nil {
			t.Fatal(err)
		}
		client.Close()
		if err := load(t.Context(), s, history, rng, func() {
			began := time.Now()
			s.stop(t)
			longest = max(longest, time.Since(began))
		}); err != nil {
			t.Fatalf("cycle %d: %v\nlog of the server:\n%s", cycle, err, s.log)
		}
		// The clean stop is a flush of all that was answered.
		history.Answer(history.Send(0, disktest.VerbFlush, block.Range{}, false))
		requests += history.Ops()
	}
	do(t, binary, "check", "--data", path)
	t.Logf("%d stops under load, %d requests, none lost; the longest stop took %v", cycles, requests, longest.Round(time.Millisecond))
}

// clientReader reads the device behind a client as io.ReaderAt.
type clientReader struct{ c *nbd.Client }

func (r clientReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.c.ReadAt(context.Background(), p, uint64(off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// load keeps requests in flight on all connections, and ends the server with end in
// the middle of it.
func load(ctx context.Context, s *server, history *disktest.CutLog, rng *rand.Rand, end func()) error {
	var wg sync.WaitGroup
	var clients []*nbd.Client
	for range killConnections {
		c, err := nbd.Dial(ctx, s.uri)
		if err != nil {
			return err
		}
		defer c.Close()
		clients = append(clients, c)
	}
	stop := make(chan struct{})
	refused := make(chan error, killConnections*killInFlight)
	// Some runs flush often, some hardly ever.
	flushes := []int{2, 20, 200}[rng.IntN(3)]
	for i, c := range clients {
		for j := range killInFlight {
			rng := rand.New(rand.NewPCG(rng.Uint64(), rng.Uint64()))
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					if err := killRequest(ctx, c, history, i*killInFlight+j, rng, flushes); err != nil {
						if errno, ok := err.(nbd.Errno); ok && errno != nbd.ESHUTDOWN { // and not the end of the connection
							refused <- err
						}
						return
					}
				}
			})
		}
	}
	time.Sleep(time.Duration(1000+rng.IntN(killLoadMax*1000)) * time.Microsecond)
	end()
	close(stop)
	wg.Wait()
	select {
	case err := <-refused:
		return fmt.Errorf("a request was answered with %w", err)
	default:
		return nil
	}
}

// killRequest does one random request and enters it in the history.
func killRequest(ctx context.Context, c *nbd.Client, history *disktest.CutLog, client int, rng *rand.Rand, flushes int) error {
	n := 1 + rng.IntN(killOpBlocks)
	if rng.IntN(2) == 0 {
		n = 1 + rng.IntN(3)
	}
	at := rng.IntN(killBlocks - n + 1)
	r := block.Span(block.Index(at), block.Count(n))
	fua := rng.IntN(flushes*4) == 0
	var err error
	var op *disktest.CutOp
	switch k := rng.IntN(20); {
	case rng.IntN(flushes) == 0:
		op = history.Send(client, disktest.VerbFlush, block.Range{}, false)
		err = c.Flush(ctx)
	case k == 0:
		op = history.Send(client, disktest.VerbTrim, r, fua)
		err = c.Trim(ctx, r.Start.Bytes(), r.Len().Bytes(), fua)
	case k == 1:
		op = history.Send(client, disktest.VerbZeroes, r, fua)
		err = c.WriteZeroes(ctx, r.Start.Bytes(), r.Len().Bytes(), nbd.ZeroFlags{FUA: fua})
	default:
		op = history.Send(client, disktest.VerbWrite, r, fua)
		err = c.WriteAt(ctx, op.Payload(nil), r.Start.Bytes(), fua)
	}
	if err == nil {
		history.Answer(op)
	}
	return err
}
