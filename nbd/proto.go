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
	magicRequestExt = 0x21e41c71 // after EXTENDED_HEADERS
	magicSimple     = 0x67446698
	magicChunk      = 0x668e33ef // after STRUCTURED_REPLY
	magicChunkExt   = 0x6e8a278c // after EXTENDED_HEADERS
	requestSize     = 28
	requestExtSize  = 32
	simpleReplySize = 16
	chunkSize       = 20
	chunkExtSize    = 32
	optionSize      = 16
	optReplySize    = 20
	reservedZeroes  = 124 // after the reply to EXPORT_NAME, unless NO_ZEROES

	// stringBytesMax bounds every string of the protocol.
	stringBytesMax = 4096

	// DefaultPort is the TCP port assigned to NBD.
	DefaultPort = 10809
)

// A ReplyMode is the form of the messages after the handshake, as the client has
// asked for it: the older ones can say less.
type ReplyMode uint8

const (
	SimpleReplies     ReplyMode = iota + 1 // the first form: READ is answered as a whole, and there is no block status
	StructuredReplies                      // replies in chunks, which know holes, and why something failed
	ExtendedHeaders                        // lengths of 64 bits in requests and chunks
)

func (m ReplyMode) String() string {
	switch m {
	case SimpleReplies:
		return "simple replies"
	case StructuredReplies:
		return "structured replies"
	case ExtendedHeaders:
		return "extended headers"
	}
	return fmt.Sprintf("ReplyMode(%d)", uint8(m))
}

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
	FlagSendDF          TransmissionFlags = 1 << 7
	FlagCanMultiConn    TransmissionFlags = 1 << 8
	FlagSendCache       TransmissionFlags = 1 << 10
	FlagSendFastZero    TransmissionFlags = 1 << 11
	FlagStatusPayload   TransmissionFlags = 1 << 12 // BLOCK_STATUS_PAYLOAD
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
	optStructured option = 8
	optListMeta   option = 9
	optSetMeta    option = 10
	optExtended   option = 11
)

// An optReply is the type of a reply to an option. Errors have the top bit set.
type optReply uint32

const (
	repAck        optReply = 1
	repServer     optReply = 2
	repInfo       optReply = 3
	repMeta       optReply = 4
	repErr        optReply = 1 << 31 // the bit that all errors have
	repErrUnsup   optReply = repErr | 1
	repErrPolicy  optReply = repErr | 2
	repErrInvalid optReply = repErr | 3
	repErrTLSReqd optReply = repErr | 5
	repErrUnknown optReply = repErr | 6
	repErrShut    optReply = repErr | 7
	repErrTooBig  optReply = repErr | 9
	repErrExtReqd optReply = repErr | 10
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
	case repErrExtReqd:
		return "extended headers required"
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
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
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
	case CmdCache:
		return "CACHE"
	case CmdWriteZeroes:
		return "WRITE_ZEROES"
	case CmdBlockStatus:
		return "BLOCK_STATUS"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Command flags.
const (
	cmdFlagFUA        uint16 = 1 << 0
	cmdFlagNoHole     uint16 = 1 << 1
	cmdFlagDF         uint16 = 1 << 2
	cmdFlagReqOne     uint16 = 1 << 3
	cmdFlagFastZero   uint16 = 1 << 4
	cmdFlagPayloadLen uint16 = 1 << 5
)

// cmdFlagsOf are the flags that are valid for c. FUA is valid for all commands:
// the document says so, since clients are known to set it on those that write nothing.
func cmdFlagsOf(c Command, m ReplyMode) uint16 {
	flags := cmdFlagFUA
	switch c {
	case CmdRead:
		if m >= StructuredReplies {
			flags |= cmdFlagDF
		}
	case CmdWrite:
		if m >= ExtendedHeaders {
			flags |= cmdFlagPayloadLen
		}
	case CmdWriteZeroes:
		flags |= cmdFlagNoHole | cmdFlagFastZero
	case CmdBlockStatus:
		flags |= cmdFlagReqOne
	}
	return flags
}

// A header is the header of a request. The length of an extended one has 64 bits:
//
//	 0  u32  magic
//	 4  u16  flags
//	 6  u16  command
//	 8  u64  cookie, given back in the reply
//	16  u64  offset, bytes
//	24  u32  length, bytes (extended: u64)
type header struct {
	flags  uint16
	cmd    Command
	cookie uint64
	off    uint64
	n      uint64
}

// appendTo appends the encoded header to dst. h.n fits into 32 bits.
func (h header) appendTo(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicRequest)
	return binary.BigEndian.AppendUint32(h.appendMiddle(dst), uint32(h.n))
}

// appendExtended appends the encoded extended header to dst.
func (h header) appendExtended(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicRequestExt)
	return binary.BigEndian.AppendUint64(h.appendMiddle(dst), h.n)
}

func (h header) appendMiddle(dst []byte) []byte {
	dst = binary.BigEndian.AppendUint16(dst, h.flags)
	dst = binary.BigEndian.AppendUint16(dst, uint16(h.cmd))
	dst = binary.BigEndian.AppendUint64(dst, h.cookie)
	return binary.BigEndian.AppendUint64(dst, h.off)
}

// decodeHeader decodes the requestSize bytes of b; ok is false for a wrong magic.
func decodeHeader(b []byte) (h header, ok bool) {
	_ = b[requestSize-1]
	h.decodeMiddle(b)
	h.n = uint64(binary.BigEndian.Uint32(b[24:]))
	return h, binary.BigEndian.Uint32(b) == magicRequest
}

// decodeExtended decodes the requestExtSize bytes of b; ok is false for a wrong magic.
func decodeExtended(b []byte) (h header, ok bool) {
	_ = b[requestExtSize-1]
	h.decodeMiddle(b)
	h.n = binary.BigEndian.Uint64(b[24:])
	return h, binary.BigEndian.Uint32(b) == magicRequestExt
}

func (h *header) decodeMiddle(b []byte) {
	h.flags = binary.BigEndian.Uint16(b[4:])
	h.cmd = Command(binary.BigEndian.Uint16(b[6:]))
	h.cookie = binary.BigEndian.Uint64(b[8:])
	h.off = binary.BigEndian.Uint64(b[16:])
}

// appendSimpleReply appends the header of a simple reply to dst:
//
//	 0  u32  magic
//	 4  u32  error, 0 for success
//	 8  u64  cookie of the request
//	16       the data, for a READ that succeeded
func appendSimpleReply(dst []byte, e Errno, cookie uint64) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magicSimple)
	dst = binary.BigEndian.AppendUint32(dst, uint32(e))
	return binary.BigEndian.AppendUint64(dst, cookie)
}

// decodeSimpleReply is the inverse of appendSimpleReply.
func decodeSimpleReply(b []byte) (e Errno, cookie uint64, ok bool) {
	_ = b[simpleReplySize-1]
	return Errno(binary.BigEndian.Uint32(b[4:])), binary.BigEndian.Uint64(b[8:]),
		binary.BigEndian.Uint32(b) == magicSimple
}

// A chunkType is the type of a chunk of a reply. Errors have the top bit set.
type chunkType uint16

const (
	chunkNone        chunkType = 0
	chunkData        chunkType = 1 // OFFSET_DATA
	chunkHole        chunkType = 2 // OFFSET_HOLE
	chunkStatus      chunkType = 5 // BLOCK_STATUS
	chunkStatusExt   chunkType = 6 // BLOCK_STATUS_EXT
	chunkErr         chunkType = 1 << 15
	chunkError       chunkType = chunkErr | 1
	chunkErrorOffset chunkType = chunkErr | 2
)

// chunkFlagDone is set in the last chunk of a reply.
const chunkFlagDone uint16 = 1 << 0

// A chunk is the header of a chunk of a reply. Extended headers have the offset
// of the request, and a length of 64 bits:
//
//	structured          extended
//	 0  u32  magic       0  u32  magic
//	 4  u16  flags       4  u16  flags
//	 6  u16  type        6  u16  type
//	 8  u64  cookie      8  u64  cookie
//	                    16  u64  offset
//	16  u32  length     24  u64  length of what follows
type chunk struct {
	flags  uint16
	kind   chunkType
	cookie uint64
	off    uint64 // of extended headers only
	n      uint64
}

// appendTo appends the encoded header to dst.
func (k chunk) appendTo(dst []byte, m ReplyMode) []byte {
	magic := uint32(magicChunk)
	if m >= ExtendedHeaders {
		magic = magicChunkExt
	}
	dst = binary.BigEndian.AppendUint32(dst, magic)
	dst = binary.BigEndian.AppendUint16(dst, k.flags)
	dst = binary.BigEndian.AppendUint16(dst, uint16(k.kind))
	dst = binary.BigEndian.AppendUint64(dst, k.cookie)
	if m < ExtendedHeaders {
		return binary.BigEndian.AppendUint32(dst, uint32(k.n))
	}
	dst = binary.BigEndian.AppendUint64(dst, k.off)
	return binary.BigEndian.AppendUint64(dst, k.n)
}

// decodeChunk is the inverse of appendTo, of chunkSize or chunkExtSize bytes; ok is
// false for a wrong magic.
func decodeChunk(b []byte, m ReplyMode) (k chunk, ok bool) {
	k.flags = binary.BigEndian.Uint16(b[4:])
	k.kind = chunkType(binary.BigEndian.Uint16(b[6:]))
	k.cookie = binary.BigEndian.Uint64(b[8:])
	if m < ExtendedHeaders {
		k.n = uint64(binary.BigEndian.Uint32(b[16:]))
		return k, binary.BigEndian.Uint32(b) == magicChunk
	}
	k.off = binary.BigEndian.Uint64(b[16:])
	k.n = binary.BigEndian.Uint64(b[24:])
	return k, binary.BigEndian.Uint32(b) == magicChunkExt
}

// A BlockState is what the metadata context base:allocation tells of a run of
// bytes. 0 is allocated data, or that nothing is known.
type BlockState uint32

const (
	StateHole BlockState = 1 << 0 // not stored
	StateZero BlockState = 1 << 1 // reads as zeroes
)

// An Extent is a run of bytes of one state.
type Extent struct {
	Length uint64 // bytes
	State  BlockState
}

const (
	// contextAllocation is the only metadata context that can be selected.
	contextAllocation = "base:allocation"
	// contextsAbout is a namespace of our own. Its contexts cannot be selected: their
	// names, told to who lists it, say something of the export (see [Export.About]).
	contextsAbout = "x-cnbd:"
	// contextID is its number in replies, which the server chooses.
	contextID = 1
	// contextQuerySize is what a BLOCK_STATUS with a payload sends to ask for
	// one context: the length of the range and the context's number.
	contextQuerySize = 8 + 4
)

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

// appendMetaQuery appends the data of LIST_META_CONTEXT and SET_META_CONTEXT to
// dst: the export's name with its length, the number of queries, and each query
// with its length.
func appendMetaQuery(dst []byte, export string, queries ...string) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(export)))
	dst = append(dst, export...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(queries)))
	for _, q := range queries {
		dst = binary.BigEndian.AppendUint32(dst, uint32(len(q)))
		dst = append(dst, q...)
	}
	return dst
}

// A metaQuery is the decoded data of LIST_META_CONTEXT and SET_META_CONTEXT: which
// queries there are, of those that mean something here.
type metaQuery struct {
	export     string
	queries    uint32 // in all
	allocation bool   // base:allocation is among them
	base       bool   // and base:, which stands for all of that namespace
	about      bool   // and contextsAbout
}

// decodeMetaQuery is the inverse of appendMetaQuery; ok is false if data is not
// exactly one well-formed query.
func decodeMetaQuery(data []byte) (q metaQuery, ok bool) {
	text := func() (s []byte, ok bool) {
		if len(data) < 4 {
			return nil, false
		}
		n := uint64(binary.BigEndian.Uint32(data))
		if data = data[4:]; n > stringBytesMax || n > uint64(len(data)) {
			return nil, false
		}
		s, data = data[:n], data[n:]
		return s, true
	}
	export, ok := text()
	if !ok || len(data) < 4 {
		return q, false
	}
	q.export = string(export)
	q.queries = binary.BigEndian.Uint32(data)
	data = data[4:]
	for range q.queries {
		s, ok := text()
		if !ok {
			return q, false
		}
		q.allocation = q.allocation || string(s) == contextAllocation
		q.base = q.base || string(s) == "base:"
		q.about = q.about || string(s) == contextsAbout
	}
	return q, len(data) == 0
}
