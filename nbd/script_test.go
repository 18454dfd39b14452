package nbd

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestScripts plays the conversations in testdata/script byte by byte. A line is
//
//	C WORD...   what the client sends
//	S WORD...   what the server must answer, exactly
//	S EOF       the server must close
//	C EOF       the client closes its side
//	hello       the greetings, both flags set by both
//	go NAME     hello, and GO for the export
//	structured NAME, extended NAME   the same with this form of messages and block status
//	# comment
//
// and a word is one of
//
//	16:N 32:N 64:N   a big-endian integer; N is a number or a name of scriptNames
//	"text"           these bytes, without blanks
//	N*B              N bytes of value B
//
// After each script the server must serve another client as if nothing had been.
//
// Each is also played with what the client sends cut into pieces of one byte, but
// for long payloads: what arrives together must not matter.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		test := func(t *testing.T, put func(rc rawConn, b []byte)) {
			ro := newMemDisk(8192)
			ro.readOnly = true
			s := serve(t, Options{
				Exports: []Export{
					{Name: "", Backend: newMemDisk(128 << 10)},
					{Name: "ro", Description: "a read-only disk", Backend: ro},
				},
				PayloadBytesMax:  64 << 10,
				HandshakeTimeout: time.Hour, // what must be closed is not closed by that
			})
			other := s.dial("")
			playScript(t, s.raw(), file, put)
			if err := other.Flush(t.Context()); err != nil {
				t.Errorf("another client: %v", err)
			}
			if err := s.dial("ro").ReadAt(t.Context(), make([]byte, 512), 0); err != nil {
				t.Errorf("a later client: %v", err)
			}
		}
		t.Run(name, func(t *testing.T) { test(t, rawConn.put) })
		t.Run(name+"/in pieces", func(t *testing.T) { test(t, rawConn.putPieces) })
	}
}

// putPieces sends b byte by byte, and its end at once if it is long.
func (rc rawConn) putPieces(b []byte) {
	rc.t.Helper()
	for len(b) > 0 {
		n := 1
		if len(b) > 1000 {
			n = len(b) - 999
		}
		if _, err := rc.Write(b[:n]); err != nil {
			return // what it has read so far was enough for it to hang up
		}
		b = b[n:]
	}
}

var scriptNames = map[string]uint64{
	"NBDMAGIC": magicServer, "IHAVEOPT": magicOption, "OPTREPLY": magicOptReply,
	"REQUEST": magicRequest, "REPLY": magicSimple, "CHUNK": magicChunk, "REQUEST_EXT": magicRequestExt, "CHUNK_EXT": magicChunkExt,
	"EXPORT_NAME": 1, "ABORT": 2, "LIST": 3, "PEEK_EXPORT": 4, "STARTTLS": 5, "INFO": 6, "GO": 7, "STRUCTURED_REPLY": 8,
	"LIST_META_CONTEXT": 9, "SET_META_CONTEXT": 10, "EXTENDED_HEADERS": 11,
	"ACK": 1, "SERVER": 2, "REP_INFO": 3, "META_CONTEXT": 4, "ERR_EXT_HEADER_REQD": 1<<31 + 10,
	"ERR_UNSUP": 1<<31 + 1, "ERR_POLICY": 1<<31 + 2, "ERR_INVALID": 1<<31 + 3, "ERR_UNKNOWN": 1<<31 + 6, "ERR_TOO_BIG": 1<<31 + 9,
	"READ": 0, "WRITE": 1, "DISC": 2, "FLUSH": 3, "TRIM": 4, "CACHE": 5, "WRITE_ZEROES": 6, "BLOCK_STATUS": 7,
	"FUA": 1, "NO_HOLE": 2, "DF": 4, "REQ_ONE": 8, "FAST_ZERO": 16, "PAYLOAD_LEN": 32,
	"DONE": 1, "NONE": 0, "OFFSET_DATA": 1, "OFFSET_HOLE": 2, "STATUS": 5, "STATUS_EXT": 6, "ERROR": 1<<15 + 1,
	"EPERM": 1, "EIO": 5, "EINVAL": 22, "ENOSPC": 28, "EOVERFLOW": 75, "OK": 0,
	"RW": 0xd6d, "RO": 0x50f, "RW_DF": 0xded, "RO_DF": 0x58f, "RW_EXT": 0x1ded, // transmission flags
	"I_EXPORT": 0, "I_NAME": 1, "I_DESCRIPTION": 2, "I_BLOCK_SIZE": 3,
}

func scriptBytes(words []string) (b []byte, err error) {
	number := func(s string) uint64 {
		if n, ok := scriptNames[s]; ok {
			return n
		}
		n, e := strconv.ParseUint(s, 0, 64)
		if e != nil {
			err = e
		}
		return n
	}
	for _, w := range words {
		if text, ok := strings.CutPrefix(w, `"`); ok {
			b = append(b, strings.TrimSuffix(text, `"`)...)
		} else if n, v, ok := strings.Cut(w, "*"); ok {
			b = append(b, bytes.Repeat([]byte{byte(number(v))}, int(number(n)))...)
		} else if bits, v, ok := strings.Cut(w, ":"); ok && bits == "16" {
			b = binary.BigEndian.AppendUint16(b, uint16(number(v)))
		} else if ok && bits == "32" {
			b = binary.BigEndian.AppendUint32(b, uint32(number(v)))
		} else if ok && bits == "64" {
			b = binary.BigEndian.AppendUint64(b, number(v))
		} else {
			return nil, fmt.Errorf("word %q", w)
		}
	}
	return b, err
}

// opening is what a client sends for the verbs hello, go, structured and extended
// of a script.
func opening(verb, export string) []byte {
	b := []byte{0, 0, 0, 3}
	switch verb {
	case "hello":
		return b
	case "structured":
		b = appendOption(b, optStructured, nil)
	case "extended":
		b = appendOption(b, optExtended, nil)
	}
	if verb != "go" {
		b = appendOption(b, optSetMeta, appendMetaQuery(nil, export, contextAllocation))
	}
	return appendOption(b, optGo, appendInfoQuery(nil, export))
}

func playScript(t *testing.T, rc rawConn, file string, put func(rc rawConn, b []byte)) {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		where := fmt.Sprintf("%s:%d", file, n)
		text, _, _ := strings.Cut(lines.Text(), "#")
		words := strings.Fields(text)
		if len(words) == 0 {
			continue
		}
		switch verb, args := words[0], words[1:]; {
		case verb == "hello" || verb == "go" || verb == "structured" || verb == "extended":
			mustEqual(t, where, rc.get(18), []byte("NBDMAGICIHAVEOPT\x00\x03"))
			rc.put([]byte{0, 0, 0, 3})
			name := strings.Join(args, "")
			rc.put(opening(verb, name)[4:])
			if verb == "structured" || verb == "extended" {
				rc.get(3*optReplySize + 4 + len(contextAllocation))
			}
			if verb != "hello" {
				rc.get(2*optReplySize + 12)
			}
		case verb == "S" && args[0] == "EOF":
			rc.eof()
		case verb == "C" && args[0] == "EOF":
			rc.closeWrite()
		case verb == "C" || verb == "S":
			b, err := scriptBytes(args)
			if err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			if verb == "C" {
				put(rc, b)
			} else {
				mustEqual(t, where, rc.get(len(b)), b)
			}
		default:
			t.Fatalf("%s: verb %q", where, verb)
		}
	}
}
