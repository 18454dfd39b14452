package nbd

import (
	"context"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestLatency has requests of known length, by a fake clock, on two exports.
func TestLatency(t *testing.T) {
	if !slices.IsSorted(LatencyBounds[:]) {
		t.Errorf("%v are not ascending", LatencyBounds)
	}
	synctest.Test(t, func(t *testing.T) {
		slow, quick := newMemDisk(1<<20), newMemDisk(1<<20)
		slow.onRead = func(_ context.Context, off uint64) error {
			time.Sleep(time.Duration(off) * time.Microsecond)
			return nil
		}
		slow.onPrepare = func(context.Context, uint64) error { time.Sleep(30 * time.Millisecond); return nil }
		slow.onFlush = func(context.Context) error { time.Sleep(time.Minute); return ENOSPC }
		s, err := NewServer(Options{Exports: []Export{{Name: "slow", Backend: slow}, {Name: "quick", Backend: quick}}, DefaultExport: "slow"})
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		defer s.Close()
		open := func(name string) func(h header, payload string, data int) {
			nc := l.dial()
			t.Cleanup(func() { nc.Close() })
			io.ReadFull(nc, make([]byte, 18))
			nc.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, []byte(name)))
			io.ReadFull(nc, make([]byte, 10))
			return func(h header, payload string, data int) {
				nc.Write(append(h.appendTo(nil), payload[:len(payload)/2]...))
				if payload != "" {
					time.Sleep(15 * time.Millisecond) // counts, as the receipt of a payload
					nc.Write([]byte(payload[len(payload)/2:]))
				}
				if _, err := io.ReadFull(nc, make([]byte, simpleReplySize+data)); err != nil {
					t.Error(err)
				}
			}
		}
		ask := open("") // the default export has one name in the metrics
		for _, us := range []uint64{0, 10, 11, 20, 1000, 1001, 700_000} {
			ask(header{cmd: CmdRead, off: us, n: 1}, "", 1)
		}
		ask(header{cmd: CmdWrite, n: 4}, "data", 0)
		ask(header{cmd: CmdFlush}, "", 0)
		open("quick")(header{cmd: CmdFlush}, "", 0)
		synctest.Wait()

		m := s.Metrics()
		if len(m.Exports) != 2 || m.Exports[0].Name != "slow" || m.Exports[1].Name != "quick" || m.Exports[0].Connections != 1 {
			t.Fatalf("exports: %+v", m.Exports)
		}
		e := m.Exports[0]
		// want has the index of the bucket by the bound that belongs to it.
		check := func(name string, c CommandMetrics, sum time.Duration, want map[time.Duration]uint64) {
			t.Helper()
			total := uint64(0)
			for i, n := range c.Latency.Buckets {
				bound := time.Duration(0) // of what is longer than all
				if i < len(LatencyBounds) {
					bound = LatencyBounds[i]
				}
				if n != want[bound] {
					t.Errorf("%s: %d up to %v, want %d", name, n, bound, want[bound])
				}
				total += n
			}
			if c.Latency.Sum != sum || c.Requests != total {
				t.Errorf("%s: %d requests, %v in all, want %d, %v", name, c.Requests, c.Latency.Sum, total, sum)
			}
		}
		check("reads", e.Read, 702_042*time.Microsecond, map[time.Duration]uint64{
			10 * time.Microsecond: 2, 20 * time.Microsecond: 2, time.Millisecond: 1, 2 * time.Millisecond: 1, time.Second: 1})
		check("write", e.Write, 30*time.Millisecond, map[time.Duration]uint64{50 * time.Millisecond: 1}) // both waits at the same time
		check("flush", e.Flush, time.Minute, map[time.Duration]uint64{0: 1})
		check("flushes of all", m.Flush, time.Minute, map[time.Duration]uint64{10 * time.Microsecond: 1, 0: 1})
		if e.Flush.Errors != 1 || e.Errors[ENOSPC] != 1 || len(m.Exports[1].Errors) != 0 || m.Errors[ENOSPC] != 1 || m.Exports[1].Flush.Errors != 0 {
			t.Errorf("errors: %+v", m)
		}
		if e.Read.Bytes != 7 || e.Write.Bytes != 4 || m.Read.Bytes != 7 || m.Exports[1].Read.Bytes != 0 {
			t.Errorf("bytes: %+v", m)
		}
	})
}
