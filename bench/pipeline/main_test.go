package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A received request, without what a WRITE has behind it.
type received struct {
	command uint16
	cookie  uint64
	place   uint64
	length  uint32
}

// receive takes a request; the data of a write must be of fill alone.
func receive(r io.Reader, fill byte) (received, error) {
	var h [28]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return received{}, err
	}
	q := received{be.Uint16(h[6:]), be.Uint64(h[8:]), be.Uint64(h[16:]), be.Uint32(h[24:])}
	if q.command == cmdWrite {
		data := make([]byte, q.length)
		if _, err := io.ReadFull(r, data); err != nil {
			return received{}, err
		} else if !bytes.Equal(data, bytes.Repeat([]byte{fill}, block)) {
			return received{}, errors.New("other data than those of the file")
		}
	}
	return q, nil
}

// reply is the answer to q.
func reply(q received, status uint32) []byte {
	b := be.AppendUint64(be.AppendUint32(be.AppendUint32(nil, simpleReply), status), q.cookie)
	if q.command == cmdRead {
		b = append(b, make([]byte, q.length)...)
	}
	return b
}

// serve answers the handshake of one client for a device of size bytes, and then hands
// over to transmit.
func serve(t *testing.T, size uint64, transmit func(net.Conn) error) (socket string, served chan error) {
	socket, served = filepath.Join(t.TempDir(), "s"), make(chan error, 1)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		served <- func() error {
			defer l.Close()
			conn, err := l.Accept()
			if err != nil {
				return err
			}
			defer conn.Close()
			conn.Write(be.AppendUint16(be.AppendUint64(be.AppendUint64(nil, magic), haveOpt), handshake))
			if _, err := io.ReadFull(conn, make([]byte, 20)); err != nil {
				return err
			}
			conn.Write(be.AppendUint16(be.AppendUint64(nil, size), 1))
			return transmit(conn)
		}()
	}()
	return socket, served
}

// TestPipeline counts what a server gets that answers what it has in the reverse order.
func TestPipeline(t *testing.T) {
	data := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(data, append(bytes.Repeat([]byte{7}, block), make([]byte, block)...), 0o600); err != nil {
		t.Fatal(err)
	}
	const size, depth = 64 * block, 8
	for _, tc := range []struct{ reads, flush int }{{100, 0}, {0, 0}, {0, 3}, {70, 3}} {
		t.Run(fmt.Sprintf("%d %% reads, FLUSH every %d", tc.reads, tc.flush), func(t *testing.T) {
			counts := map[uint16]int{}
			socket, served := serve(t, size, func(conn net.Conn) error {
				r := bufio.NewReader(conn)
				for writes := 0; ; {
					var batch []received
					for len(batch) == 0 || r.Buffered() > 0 {
						q, err := receive(r, 7)
						if err != nil {
							return err
						}
						if q.command == cmdDisconnect {
							if len(batch) > 0 {
								return fmt.Errorf("%d requests before the end are not waited for", len(batch))
							}
							return nil
						}
						if len(batch) == depth {
							return errors.New("too many in flight")
						}
						if q.command == cmdWrite {
							writes++
						} else if q.command == cmdFlush {
							if writes != tc.flush {
								return fmt.Errorf("a FLUSH after %d writes", writes)
							}
							writes = 0
						}
						if q.command != cmdFlush && (q.length != block || q.place%block != 0 || q.place >= size) {
							return fmt.Errorf("%+v", q)
						}
						counts[q.command]++
						batch = append(batch, q)
					}
					var out []byte
					for _, q := range batch {
						out = append(reply(q, 0), out...)
					}
					// In pieces: the client takes what has come, wherever that ends.
					for half := len(out) / 2; len(out) > 0; out = out[min(half, len(out)):] {
						if _, err := conn.Write(out[:min(half, len(out))]); err != nil {
							return err
						}
					}
				}
			})
			r, err := workload{data: data, depth: depth, time: 20 * time.Millisecond, reads: tc.reads, flush: tc.flush, seed: 1}.run(socket)
			if err != nil {
				t.Fatal(err)
			}
			if err := <-served; err != nil {
				t.Fatal(err)
			}
			if r.Requests == 0 || r.Requests != counts[cmdRead]+counts[cmdWrite] {
				t.Errorf("%d requests; the server has %v", r.Requests, counts)
			}
			if (counts[cmdRead] > 0) != (tc.reads > 0) || (counts[cmdWrite] > 0) != (tc.reads < 100) || (counts[cmdFlush] > 0) != (tc.flush > 0) {
				t.Errorf("commands: %v", counts)
			}
		})
	}
}

// TestMistakes has servers whose replies are wrong.
func TestMistakes(t *testing.T) {
	for name, tc := range map[string]struct {
		reply func(received) []byte
		want  string
	}{
		"error":  {func(q received) []byte { return reply(q, 5) }, "error 5 is the reply to command 0"},
		"cookie": {func(q received) []byte { q.cookie += 1 << 8; return reply(q, 0) }, "not a reply to a request in flight"},
		"slot":   {func(q received) []byte { q.cookie |= 0xff; return reply(q, 0) }, "not a reply to a request in flight"},
		"magic":  {func(q received) []byte { b := reply(q, 0); b[0]++; return b }, "not a reply to a request in flight"},
		"twice":  {func(q received) []byte { return append(reply(q, 0), reply(q, 0)...) }, "not a reply to a request in flight"},
		"end":    {func(q received) []byte { return nil }, "with 1 requests in flight: EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			socket, served := serve(t, 1<<20, func(conn net.Conn) error {
				q, err := receive(conn, 0)
				if err != nil {
					return err
				}
				if b := tc.reply(q); b != nil {
					conn.Write(b)
					_, err = io.Copy(io.Discard, conn) // until the client has enough of it
				}
				return err
			})
			_, err := workload{depth: 1, time: time.Minute, reads: 100, seed: 1}.run(socket)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, not %q", err, tc.want)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}
