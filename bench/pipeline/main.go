// Pipeline is the least that an NBD client can be, as a client to measure servers by:
// one goroutine and one connection, all requests that there is room for sent with one
// system call, and all replies that have come taken with another. It checks that each
// reply is one to a request in flight and no error, not what was read.
//
//	pipeline -data FILE [-depth 16] [-size BYTES] [-seconds 5] [-reads 100] [-flush 0] [-seed 1] SOCKET
//
// It reads and writes blocks of 4 KiB at random places, and prints how many and in how
// many seconds. Writes are of blocks of FILE, so that they compress as those do.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Numbers of the protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const (
	magic       = 0x4e42444d41474943 // NBDMAGIC
	haveOpt     = 0x49484156454f5054 // IHAVEOPT
	request     = 0x25609513
	simpleReply = 0x67446698

	optExportName = 1
	// Fixed newstyle, and no zeros behind the answer to EXPORT_NAME.
	handshake = 1 | 2

	cmdRead, cmdWrite, cmdDisconnect, cmdFlush = 0, 1, 2, 3
	replySize                                  = 16
)

const (
	block = 4096
	// So many different blocks are written: more than the processors' caches hold.
	samples = 4096
	// What is in flight must fit into the buffers of a unix socket, 208 KiB, both ways:
	// who sends all of it does not receive meanwhile.
	depthMax = 32
)

var be = binary.BigEndian

// A workload is what is to be done.
type workload struct {
	data  string // the file whose blocks are written; not needed where nothing is
	depth int    // requests in flight
	size  int64  // bytes of the device that are used; 0 is all of it
	time  time.Duration
	reads int // percent of the requests
	flush int // a FLUSH is sent after so many writes; 0 is never
	seed  uint64
}

// A result is what was done: the reads and writes that were answered, and how long it took.
type result struct {
	Requests int     `json:"requests"`
	Seconds  float64 `json:"seconds"`
	Seed     uint64  `json:"seed"`
}

func main() {
	var w workload
	flag.StringVar(&w.data, "data", "", "`file` whose blocks are written")
	flag.IntVar(&w.depth, "depth", 16, "requests in flight")
	flag.Int64Var(&w.size, "size", 0, "`bytes` of the device that are used (default all)")
	seconds := flag.Float64("seconds", 5, "how long")
	flag.IntVar(&w.reads, "reads", 100, "`percent` of the requests that are reads; the others are writes")
	flag.IntVar(&w.flush, "flush", 0, "writes after which a FLUSH is sent (default never)")
	flag.Uint64Var(&w.seed, "seed", 1, "of the places and of what is written")
	flag.Parse()
	w.time = time.Duration(*seconds * float64(time.Second))
	r, err := w.run(flag.Arg(0))
	if err != nil {
		log.Fatal("pipeline: ", err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		log.Fatal("pipeline: ", err)
	}
}

// run does it to the server of a unix socket.
func (w workload) run(socket string) (result, error) {
	if w.depth < 1 || w.depth > depthMax {
		return result{}, fmt.Errorf("depth %d: 1 to %d are possible", w.depth, depthMax)
	}
	rng := rand.New(rand.NewPCG(w.seed, 0))
	var data []byte
	if w.reads < 100 {
		var err error
		if data, err = sample(w.data, rng); err != nil {
			return result{}, err
		}
	}
	// A socket that blocks: to wait for a reply is the system call that takes it.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return result{}, fmt.Errorf("socket: %w", err)
	}
	conn := os.NewFile(uintptr(fd), socket)
	defer conn.Close()
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		return result{}, fmt.Errorf("%s: %w", socket, err)
	}
	size, err := negotiate(conn)
	if err != nil {
		return result{}, fmt.Errorf("handshake: %w", err)
	}
	if w.size == 0 {
		w.size = size
	}
	if w.size > size || w.size < block {
		return result{}, fmt.Errorf("%d bytes of a device of %d", w.size, size)
	}
	return w.drive(conn, rng, data)
}

// sample returns blocks of a file, at random places, that are not zero.
func sample(name string, rng *rand.Rand) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	blocks := info.Size() / block
	if blocks == 0 {
		return nil, fmt.Errorf("%s: less than a block", name)
	}
	data, zero := make([]byte, samples*block), make([]byte, block)
	for n, looked := 0, 0; n < samples; looked++ {
		if looked == 64*samples {
			return nil, fmt.Errorf("%s: next to nothing but zeros", name)
		}
		b := data[n*block:][:block]
		if _, err := f.ReadAt(b, rng.Int64N(blocks)*block); err != nil {
			return nil, err
		}
		if !bytes.Equal(b, zero) {
			n++
		}
	}
	return data, nil
}

// negotiate asks for the export without a name, and returns its size in bytes.
func negotiate(conn io.ReadWriter) (int64, error) {
	var h [18]byte // two magics, and the server's flags
	if _, err := io.ReadFull(conn, h[:]); err != nil {
		return 0, err
	}
	if be.Uint64(h[:]) != magic || be.Uint64(h[8:]) != haveOpt || be.Uint16(h[16:])&handshake != handshake {
		return 0, errors.New("not a server of the fixed newstyle")
	}
	option := be.AppendUint64(be.AppendUint32(nil, handshake), haveOpt)
	option = be.AppendUint32(be.AppendUint32(option, optExportName), 0)
	if _, err := conn.Write(option); err != nil {
		return 0, err
	}
	var export [10]byte // its size and flags
	if _, err := io.ReadFull(conn, export[:]); err != nil {
		return 0, err
	}
	return int64(be.Uint64(export[:])), nil
}

// drive keeps depth requests in flight until the time is over, waits for the last
// replies, and takes leave.
func (w workload) drive(conn io.ReadWriter, rng *rand.Rand, data []byte) (result, error) {
	type slot struct {
		cookie  uint64
		command uint16
		busy    bool
	}
	slots := make([]slot, w.depth)
	out := make([]byte, 0, w.depth*(28+block))
	in := make([]byte, w.depth*(replySize+block))
	sent, busy, unflushed := uint64(0), 0, 0

	send := func(i int) {
		// The slot is in the low bits; the rest is never the same again.
		s := slot{cookie: sent<<8 | uint64(i), command: cmdRead, busy: true}
		place, length := uint64(rng.Int64N(w.size/block))*block, uint32(block)
		if w.flush > 0 && unflushed == w.flush {
			s.command, place, length, unflushed = cmdFlush, 0, 0, 0
		} else if rng.IntN(100) >= w.reads {
			s.command = cmdWrite
			unflushed++
		}
		out = be.AppendUint32(out, request)
		out = be.AppendUint16(be.AppendUint16(out, 0), s.command)
		out = be.AppendUint32(be.AppendUint64(be.AppendUint64(out, s.cookie), place), length)
		if s.command == cmdWrite {
			out = append(out, data[rng.IntN(samples)*block:][:block]...)
		}
		slots[i] = s
		sent++
		busy++
	}

	r := result{Seed: w.seed}
	began := time.Now()
	for i := range slots {
		send(i)
	}
	for have := 0; busy > 0; {
		if len(out) > 0 {
			if _, err := conn.Write(out); err != nil {
				return r, err
			}
			out = out[:0]
		}
		n, err := conn.Read(in[have:])
		if err != nil {
			return r, fmt.Errorf("with %d requests in flight: %w", busy, err)
		}
		have += n
		over := time.Since(began) >= w.time
		rest := in[:have]
		for len(rest) >= replySize {
			kind, status, cookie := be.Uint32(rest), be.Uint32(rest[4:]), be.Uint64(rest[8:])
			i := int(cookie & 0xff)
			if kind != simpleReply || i >= w.depth || !slots[i].busy || slots[i].cookie != cookie {
				return r, fmt.Errorf("%x is not a reply to a request in flight", rest[:replySize])
			}
			s := &slots[i]
			if status != 0 {
				return r, fmt.Errorf("error %d is the reply to command %d", status, s.command)
			}
			length := replySize
			if s.command == cmdRead {
				length += block
			}
			if len(rest) < length {
				break
			}
			rest = rest[length:]
			if s.command != cmdFlush {
				r.Requests++
			}
			s.busy = false
			busy--
			if !over {
				send(i)
			}
		}
		have = copy(in, rest)
	}
	r.Seconds = time.Since(began).Seconds()
	out = be.AppendUint32(out, request)
	out = be.AppendUint16(be.AppendUint16(out, 0), cmdDisconnect)
	_, err := conn.Write(append(out, make([]byte, 20)...))
	return r, err
}
