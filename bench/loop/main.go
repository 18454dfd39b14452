// Loop is the least that an NBD server can be, as a limit to measure others by: one
// goroutine for each connection, memory for a disk, requests taken one by one from
// a buffer, and answers sent when the buffer is empty. It stores nothing, checks
// little, and must not be used for anything else.
package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
)

// Numbers of the protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
const (
	magic       = 0x4e42444d41474943 // NBDMAGIC
	haveOpt     = 0x49484156454f5054 // IHAVEOPT
	optReply    = 0x3e889045565a9
	request     = 0x25609513
	simpleReply = 0x67446698

	optExportName, optAbort, optInfo, optGo = 1, 2, 6, 7
	ack, info, unsupported                  = 1, 3, 1<<31 | 1

	// Fixed newstyle, and no zeros behind the answer to EXPORT_NAME.
	handshake = 1 | 2
	// Flags, FLUSH, FUA, several connections.
	transmission = 1 | 1<<2 | 1<<3 | 1<<8

	cmdRead, cmdWrite, cmdDisconnect, cmdFlush = 0, 1, 2, 3
	payloadMax                                 = 32 << 20
)

var be = binary.BigEndian

func main() {
	size := flag.Int64("size", 1<<30, "bytes of memory that are served")
	flag.Parse()
	listener, err := net.Listen("unix", flag.Arg(0))
	if err != nil {
		log.Fatal(err)
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		listener.Close() // which removes the socket
	}()
	disk := make([]byte, *size)
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer conn.Close()
			r, w := bufio.NewReaderSize(conn, 256<<10), bufio.NewWriterSize(conn, 256<<10)
			if err := negotiate(r, w, *size); err == nil {
				serve(r, w, disk)
			}
		}()
	}
}

// negotiate answers options until the client asks for the export, by whatever name.
func negotiate(r *bufio.Reader, w *bufio.Writer, size int64) error {
	w.Write(be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magic), haveOpt), handshake))
	w.Flush()
	if _, err := r.Discard(4); err != nil { // the client's flags
		return err
	}
	export := be.AppendUint16(be.AppendUint64(nil, uint64(size)), transmission)
	for {
		var h [16]byte
		if _, err := io.ReadFull(r, h[:]); err != nil {
			return err
		}
		option := be.Uint32(h[8:])
		if _, err := r.Discard(int(be.Uint32(h[12:]))); err != nil {
			return err
		}
		reply := func(kind uint32, data []byte) {
			b := be.AppendUint32(be.AppendUint32(be.AppendUint64(nil, optReply), option), kind)
			w.Write(append(be.AppendUint32(b, uint32(len(data))), data...))
		}
		switch option {
		case optExportName:
			w.Write(export)
			return w.Flush()
		case optAbort:
			return io.EOF
		case optInfo, optGo:
			reply(info, append([]byte{0, 0}, export...))
			reply(ack, nil)
		default:
			reply(unsupported, nil)
		}
		if err := w.Flush(); err != nil || option == optGo {
			return err
		}
	}
}

// serve answers requests until the client goes.
func serve(r *bufio.Reader, w *bufio.Writer, disk []byte) {
	for {
		h, err := r.Peek(28)
		if err != nil || be.Uint32(h) != request {
			return
		}
		command, at, length := be.Uint16(h[6:]), be.Uint64(h[16:]), uint64(be.Uint32(h[24:]))
		if command == cmdDisconnect || length > payloadMax || at > uint64(len(disk)) || length > uint64(len(disk))-at {
			return
		}
		var reply [16]byte // no error
		be.PutUint32(reply[:], simpleReply)
		copy(reply[8:], h[8:16])
		r.Discard(28)
		if command == cmdWrite {
			if _, err := io.ReadFull(r, disk[at:at+length]); err != nil {
				return
			}
		}
		w.Write(reply[:])
		if command == cmdRead {
			w.Write(disk[at : at+length])
		}
		if r.Buffered() < 28 {
			if w.Flush() != nil {
				return
			}
		}
	}
}
