package nbd

import (
	"encoding/binary"
	"fmt"
)

// All numbers of this file are the protocol's; all integers on the wire are
// big-endian. The names are those of the protocol document, doc/proto.md of the
// NBD project, without the prefix NBD_.

const (
	magicServer     = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle   = 0x00420281861253
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	requestSize     = 28
	simpleReplySize = 16
	optionSize      = 16
	optReplySize    = 20
	reservedZeroes  = 124 // after the reply to EXPORT_NAME, unless NO_ZEROES

	// stringBytesMax bounds every string of the protocol.
	stringBytesMax = 4096

	// DefaultPort is the TCP port assigned to NBD.
	DefaultPort = 10809
)

// Handshake flags of the server, and of the client; the bits are the same.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
	handshakeFlags    = flagFixedNewstyle | flagNoZeroes
)

// TransmissionFlags tell a client what an export can do.
type TransmissionFlags uint16

const (
	FlagHasFlags        TransmissionFlags = 1 << 0
	FlagReadOnly        TransmissionFlags = 1 << 1
	FlagSendFlush       TransmissionFlags = 1 << 2
	FlagSendFUA         TransmissionFlags = 1 << 3
	FlagSendTrim        TransmissionFlags = 1 << 5
	FlagSendWriteZeroes TransmissionFlags = 1 << 6
	FlagCanMultiConn    TransmissionFlags = 1 << 8
	FlagSendFastZero    TransmissionFlags = 1 << 11
)

// An option is what a client asks for during the handshake.
type option uint32

const (
	optExportName option = 1
	optAbort      option = 2
	optList       option = 3
	optStartTLS   option = 5
	optInfo       option = 6
	optGo         option = 7
)

// An optReply is the type of a reply to an option. Errors have the top bit set.
type optReply uint32

const (
	repAck        optReply = 1
	repServer     optReply = 2
	repInfo       optReply = 3
	repErr        optReply = 1 << 31 // the bit that all errors have
	repErrUnsup   optReply = repErr | 1
	repErrPolicy  optReply = repErr | 2
	repErrInvalid optReply = repErr | 3
	repErrTLSReqd optReply = repErr | 5
	repErrUnknown optReply = repErr | 6
	repErrShut    optReply = repErr | 7
	repErrTooBig  optReply = repErr | 9
)

func (r optReply) String() string {
	switch r {
	case repErrUnsup:
		return "not supported"
	case repErrPolicy:
		return "forbidden by policy"
	case repErrInvalid:
		return "invalid request"
	case repErrTLSReqd:
		return "TLS required"
	case repErrUnknown:
		return "no such export"
	case repErrShut:
		return "server is shutting down"
	case repErrTooBig:
		return "request too big"
	}
	return fmt.Sprintf("reply %#x", uint32(r))
}

// Types of information about an export.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// A Command is the type of a request.
type Command uint16

const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdWriteZeroes Command = 6
)

func (c Command) String() string {
	switch c {
	case CmdRead:
		return "READ"
	case CmdWrite:
		return "WRITE"
	case CmdDisc:
		return "DISC"
	case CmdFlush:
		return "FLUSH"
	case CmdTrim:
		return "TRIM"
	case CmdWriteZeroes:
		return "WRITE_ZEROES"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Command flags.
const (
	cmdFlagFUA      uint16 = 1 << 0
	cmdFlagNoHole   uint16 = 1 << 1
	cmdFlagFastZero uint16 = 1 << 4
)

// cmdFlagsOf are the flags that are valid for c. FUA is valid for all commands:
// the document says so, since clients are known to set it on those that write nothing.
func cmdFlagsOf(c Command) uint16 {
	if c == CmdWriteZeroes {
		return cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero
	}
	return cmdFlagFUA
}

// A header is the header of a request:
//
//	 0  u32  magic
//	 4  u16  flags
//	 6  u16  command
//	 8  u64  cookie, given back in the reply
//	16  u64  offset, bytes
//	24  u32  length, bytes
type header struct {
	flags  uint16
	cmd    Command
	cookie uint64
	off    uint64
	n      uint32
}

// appendTo appends the encoded header to dst.
func (h header) appendTo(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicRequest)
	dst = binary.BigEndian.AppendUint16(dst, h.flags)
	dst = binary.BigEndian.AppendUint16(dst, uint16(h.cmd))
	dst = binary.BigEndian.AppendUint64(dst, h.cookie)
	dst = binary.BigEndian.AppendUint64(dst, h.off)
	return binary.BigEndian.AppendUint32(dst, h.n)
}

// decodeHeader decodes the requestSize bytes of b; ok is false for a wrong magic.
func decodeHeader(b []byte) (h header, ok bool) {
	_ = b[requestSize-1]
	return header{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    Command(binary.BigEndian.Uint16(b[6:])),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		n:      binary.BigEndian.Uint32(b[24:]),
	}, binary.BigEndian.Uint32(b) == magicRequest
}

// putSimpleReply encodes the header of a simple reply:
//
//	 0  u32  magic
//	 4  u32  error, 0 for success
//	 8  u64  cookie of the request
//	16       the data, for a READ that succeeded
func putSimpleReply(b *[simpleReplySize]byte, e Errno, cookie uint64) {
	binary.BigEndian.PutUint32(b[0:], magicSimple)
	binary.BigEndian.PutUint32(b[4:], uint32(e))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// decodeSimpleReply is the inverse of putSimpleReply.
func decodeSimpleReply(b []byte) (e Errno, cookie uint64, ok bool) {
	_ = b[simpleReplySize-1]
	return Errno(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:]),
		binary.BigEndian.Uint32(b) == magicSimple
}

// appendOption appends an option with its data to dst.
func appendOption(dst []byte, o option, data []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, magicOption)
	dst = binary.BigEndian.AppendUint32(dst, uint32(o))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// appendOptReply appends the reply of type r to option o, with its data, to dst.
func appendOptReply(dst []byte, o option, r optReply, data []byte) []byte {
	dst = binary.BigEndian.AppendUint64(dst, magicOptReply)
	dst = binary.BigEndian.AppendUint32(dst, uint32(o))
	dst = binary.BigEndian.AppendUint32(dst, uint32(r))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(data)))
	return append(dst, data...)
}

// appendInfoQuery appends the data of INFO and GO to dst: the export's name with
// its length, then the number of kinds of information and the kinds wanted.
func appendInfoQuery(dst []byte, export string, kinds ...uint16) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(export)))
	dst = append(dst, export...)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(kinds)))
	for _, k := range kinds {
		dst = binary.BigEndian.AppendUint16(dst, k)
	}
	return dst
}

// An infoQuery is the decoded data of INFO and GO. Kinds of information that
// are unknown are not kept: the document lets a server ignore them.
type infoQuery struct {
	export                       string
	name, description, blockSize bool
}

// decodeInfoQuery is the inverse of appendInfoQuery; ok is false if data is not
// exactly one well-formed query.
func decodeInfoQuery(data []byte) (q infoQuery, ok bool) {
	if len(data) < 6 {
		return q, false
	}
	n := uint64(binary.BigEndian.Uint32(data))
	data = data[4:]
	if n > stringBytesMax || n+2 > uint64(len(data)) {
		return q, false
	}
	q.export = string(data[:n])
	kinds := data[n+2:]
	if len(kinds) != 2*int(binary.BigEndian.Uint16(data[n:])) {
		return q, false
	}
	for ; len(kinds) > 0; kinds = kinds[2:] {
		switch binary.BigEndian.Uint16(kinds) {
		case infoName:
			q.name = true
		case infoDescription:
			q.description = true
		case infoBlockSize:
			q.blockSize = true
		}
	}
	return q, true
}
