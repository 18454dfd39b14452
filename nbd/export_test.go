package nbd

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The export for clients that ask for none is what the options say, under its own
// name.
func TestDefaultExport(t *testing.T) {
	a, b := newMemDisk(1<<20), newMemDisk(2<<20)
	s := serve(t, Options{DefaultExport: "b", Exports: []Export{{Name: "a", Backend: a}, {Name: "b", Backend: b}}})
	if n := s.dial("").Size(); n != 2<<20 {
		t.Errorf("%d bytes", n)
	}
	rc := s.raw()
	rc.get(18)
	rc.put(appendOption([]byte{0, 0, 0, 3}, optInfo, appendInfoQuery(nil, "", infoName)))
	rc.get(optReplySize + 12) // INFO_EXPORT
	mustEqual(t, "name", rc.get(optReplySize + 3)[optReplySize:], []byte{0, byte(infoName), 'b'})

	none := serve(t, Options{Exports: []Export{{Name: "a", Backend: a}}})
	if _, err := Dial(t.Context(), none.uri("")); !errors.Is(err, errOption(repErrUnknown)) {
		t.Errorf("without a default: %v", err)
	}
	if n := none.Metrics().ExportsUnknown; n != 1 {
		t.Errorf("%d unknown exports counted", n)
	}
	for _, opts := range []Options{
		{DefaultExport: "c", Exports: []Export{{Name: "a", Backend: a}}},
		{DefaultExport: "a", Exports: []Export{{Name: "a", Backend: a}, {Backend: b}}},
	} {
		if _, err := NewServer(opts); err == nil {
			t.Errorf("accepted: %+v", opts)
		}
	}
}

func TestListOff(t *testing.T) {
	s := serve(t, Options{ListOff: true, Exports: []Export{{Name: "a", Backend: newMemDisk(4096)}}})
	if list, err := List(t.Context(), s.uri("")); !errors.Is(err, errOption(repErrPolicy)) || list != nil {
		t.Errorf("%v, %v", list, err)
	}
	s.dial("a")
	if n := s.Metrics().ListsRefused; n != 1 {
		t.Errorf("%d refusals counted", n)
	}
}

// An export has its own number of clients; the full one is no hindrance to others,
// and asking about it is no use of it.
func TestExportConnectionsMax(t *testing.T) {
	s := serve(t, Options{Exports: []Export{
		{Name: "a", Backend: newMemDisk(4096), ConnectionsMax: 2},
		{Name: "b", Backend: newMemDisk(4096)},
	}})
	first, _ := s.dial("a"), s.dial("a")
	if _, err := Dial(t.Context(), s.uri("a")); !errors.Is(err, errOption(repErrPolicy)) {
		t.Errorf("a third client: %v", err)
	}
	rc := s.raw()
	rc.get(18)
	rc.put(appendOption([]byte{0, 0, 0, 3}, optExportName, []byte("a"))) // the old way
	rc.eof()
	for range 5 {
		s.dial("b")
	}
	if n := s.Metrics().ExportsFull; n != 2 {
		t.Errorf("%d refusals counted", n)
	}
	asking := s.raw()
	asking.get(18)
	asking.put(appendOption([]byte{0, 0, 0, 3}, optInfo, appendInfoQuery(nil, "a")))
	asking.get(optReplySize + 12 + optReplySize)
	if err := first.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there is room", func() bool { return s.exports["a"].clients.Load() == 1 })
	s.dial("a")
}

// An export may be opened when it is asked for, and not be there at first; the
// others are served meanwhile.
func TestExportOpen(t *testing.T) {
	var calls atomic.Int64
	d := newMemDisk(1 << 20)
	entered, answer := make(chan struct{}, 100), make(chan error)
	s := serve(t, Options{Exports: []Export{
		{Name: "late", Open: func(context.Context) (Backend, error) {
			calls.Add(1)
			entered <- struct{}{}
			return d, <-answer
		}},
		{Name: "other", Backend: newMemDisk(4096)},
	}})
	if list, err := List(t.Context(), s.uri("")); err != nil || len(list) != 2 || calls.Load() != 0 {
		t.Errorf("list: %v, %v; opened %d times", list, err, calls.Load())
	}
	dialed := make(chan error, 1)
	dial := func() {
		c, err := Dial(t.Context(), s.uri("late"))
		if err == nil {
			err = c.WriteAt(t.Context(), []byte{1}, 0, false)
			c.Close()
		}
		dialed <- err
	}
	go dial()
	<-entered
	if err := s.dial("other").Flush(t.Context()); err != nil {
		t.Errorf("another export: %v", err)
	}
	answer <- errors.New("no such disk today")
	if err := <-dialed; !errors.Is(err, errOption(repErrUnknown)) {
		t.Errorf("a disk that cannot be opened: %v", err)
	}
	if n := s.Metrics().ExportsUnavailable; n != 1 {
		t.Errorf("%d refusals counted", n)
	}
	go dial()
	<-entered
	answer <- nil
	if err := <-dialed; err != nil {
		t.Errorf("opened later: %v", err)
	}
	d.idle(t)
}

// Opening takes none of the client's time, and ends with the server.
func TestExportOpenTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := NewServer(Options{HandshakeTimeout: 10 * time.Second, Exports: []Export{
			{Name: "slow", Open: func(context.Context) (Backend, error) { time.Sleep(time.Hour); return newMemDisk(4096), nil }},
			{Name: "stuck", Open: func(ctx context.Context) (Backend, error) { <-ctx.Done(); return nil, ctx.Err() }},
		}})
		if err != nil {
			t.Fatal(err)
		}
		l := newPipeListener()
		go s.Serve(l)
		slow, stuck := l.dial(), l.dial()
		defer slow.Close()
		defer stuck.Close()
		for _, nc := range []io.Reader{slow, stuck} {
			io.ReadFull(nc, make([]byte, 18))
		}
		stuck.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, []byte("stuck")))
		slow.Write(appendOption([]byte{0, 0, 0, 3}, optExportName, []byte("slow")))
		begin := time.Now()
		if _, err := io.ReadFull(slow, make([]byte, 10)); err != nil || time.Since(begin) != time.Hour {
			t.Errorf("opened after %v: %v", time.Since(begin), err)
		}
		s.Close() // and hangs if that of stuck does not end
	})
}
