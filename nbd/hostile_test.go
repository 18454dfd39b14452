package nbd

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// A nuisance is a connection with bad manners, which may go on after it returns,
// until stop at the latest.
type nuisance func(s *testServer, stop <-chan struct{})

// stuck are the nuisances that keep what they have got.
var stuck = []nuisance{
	// never reads its replies
	func(s *testServer, _ <-chan struct{}) {
		rc := s.rawGo()
		go func() {
			for c := uint64(0); ; c++ {
				if _, err := rc.Write(header{cmd: CmdRead, cookie: c, n: 64 << 10}.appendTo(nil)); err != nil {
					return
				}
			}
		}()
	},
	// announces what it does not send
	func(s *testServer, _ <-chan struct{}) {
		rc := s.rawGo()
		rc.put(append(header{cmd: CmdWrite, n: 1 << 20}.appendTo(nil), make([]byte, 999)...))
	},
	// stops in an option
	func(s *testServer, _ <-chan struct{}) {
		rc := s.rawTLS()
		rc.put(appendOption(nil, optGo, make([]byte, optionBytesMax))[:2000])
	},
	// is silent
	func(s *testServer, _ <-chan struct{}) { s.raw() },
}

// flood is the nuisance that sends p without end and takes what is answered.
func flood(p []byte) nuisance {
	return func(s *testServer, stop <-chan struct{}) {
		rc := s.rawGo()
		go io.Copy(io.Discard, rc)
		go func() {
			<-stop
			rc.Close()
		}()
		for {
			if _, err := rc.Write(p); err != nil {
				return
			}
		}
	}
}

// floods are small requests without end, and refused ones.
var floods = []nuisance{
	flood(bytes.Repeat(header{cmd: CmdRead, n: 1}.appendTo(nil), 100)),
	flood(bytes.Repeat(header{cmd: 99}.appendTo(nil), 100)),
}

// busy are the nuisances that keep the processor busy, here even twice.
var busy = append([]nuisance{
	// garbage after GO
	func(s *testServer, stop <-chan struct{}) {
		garbage := []byte(strings.Repeat("\xff\x00garbage\x25\x60\x95\x13", 100))
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			rc := s.rawGo()
			rc.Write(garbage[n%len(garbage):])
			io.Copy(io.Discard, rc) // until it is cut off
			rc.Close()
		}
	},
}, floods...)

// However many clients are hostile, in all these ways at once, others get right data
// and their part of the time, and memory stays within its limits.
func TestHostileClients(t *testing.T) {
	const bytesMax, payloadMax = 16 << 20, 2 << 20
	dirs := newCertDirs(t)
	d := newMemDisk(4 << 20)
	s := serve(t, Options{Exports: []Export{{Backend: d}}, TLS: dirs.load(t),
		BytesMax: bytesMax, PayloadBytesMax: payloadMax, ConnectionsMax: 100})
	good := []*Client{s.dial(""), s.dialTLS("", dirs.client)}
	r, model := testRand(t), make([]byte, 1<<20)
	// work is what each client gets done in a while: the best of some, for others
	// use this machine, too.
	work := func() (best [2]int) {
		for range 4 {
			for i, c := range good {
				n := 0
				for begin := time.Now(); time.Since(begin) < 60*time.Millisecond; n++ {
					size := 1 + r.IntN(32<<10)
					off := r.IntN(len(model) - size)
					p := pattern(size, byte(r.Uint32()))
					copy(model[off:], p)
					got := make([]byte, size)
					if err := errors.Join(c.WriteAt(t.Context(), p, uint64(off+3<<20), false), c.ReadAt(t.Context(), got, uint64(off+3<<20))); err != nil {
						t.Fatal(err)
					}
					mustEqual(t, "data", got, model[off:][:size])
				}
				best[i] = max(best[i], n)
			}
		}
		return best
	}
	alone := work()
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)

	stop := make(chan struct{})
	var group sync.WaitGroup
	config := clientConfig(t, dirs.client)
	begin := func(all []nuisance) {
		for _, n := range all {
			for _, c := range []*tls.Config{nil, config} {
				one := *s
				one.tls = c
				for range 6 {
					group.Go(func() { n(&one, stop) })
				}
			}
		}
	}
	begin(stuck)
	eventually(t, "they hold a lot", func() bool { return s.Metrics().BytesInFlight > bytesMax/2 })
	beside, connections := work(), s.Metrics().Connections
	begin(busy)
	crowded := work()
	runtime.ReadMemStats(&after)
	close(stop)
	group.Wait()

	t.Logf("pairs of write and read in 60 ms, without TLS and with it: %v alone, %v beside %d stuck connections, %v beside 36 busy ones as well",
		alone, beside, connections-2, crowded)
	for i := range good {
		if 5*beside[i] < alone[i] {
			t.Errorf("client %d got %d done beside stuck ones, alone %d", i, beside[i], alone[i])
		}
	}
	if got := d.bytesMost.Load(); got > bytesMax+4<<20 {
		t.Errorf("%d bytes of the disk's memory were out at once, limit %d", got, bytesMax)
	}
	// The hostile are in this process as well, and so is what is not collected yet.
	grown := int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)
	t.Logf("memory has grown by %.1f MiB, limit of payload %d MiB", float64(grown)/(1<<20), bytesMax>>20)
	if grown > 4*bytesMax {
		t.Errorf("memory has grown by %d bytes", grown)
	}
	data, _ := d.contents()
	mustEqual(t, "the disk", data[3<<20:], model)
}

// A client with one request at a time has its turn beside many that flood the server:
// for each of its own few rounds of theirs are served. (It waits twice for the network,
// the server and itself, which are one process here. Without turns it is 40 rounds.)
func TestFloods(t *testing.T) {
	dirs := newCertDirs(t)
	s := serve(t, Options{Exports: []Export{{Backend: newNullDisk(1)}}, TLS: dirs.load(t)})
	p := newPipeline(s, SimpleReplies, CmdRead, 1)
	served := func() uint64 {
		m := s.Metrics()
		return m.Read.Requests + m.Unknown.Requests
	}
	stop := make(chan struct{})
	var group sync.WaitGroup
	for _, c := range []*tls.Config{nil, clientConfig(t, dirs.client)} {
		one := *s
		one.tls = c
		for _, n := range floods {
			for range 9 {
				group.Go(func() { n(&one, stop) })
			}
		}
	}
	eventually(t, "all flood it", func() bool { return s.Metrics().Connections == 37 && served() > 37*roundRequests })
	n, from, begin := 0, served(), time.Now()
	for ; n < 200 && time.Since(begin) < 2*time.Second; n++ {
		if err := p.run(1, 1); err != nil {
			t.Fatal(err)
		}
	}
	took, others := time.Since(begin), served()-from-uint64(n)
	close(stop)
	group.Wait()
	per := others / uint64(n)
	t.Logf("%d requests in %v, %d of others served for each", n, took, per)
	if per > 16*roundRequests {
		t.Errorf("%d requests of others were served for each, a round has %d", per, roundRequests)
	}
}
