package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	// optionBytesMax bounds the data of an option that is looked at, so that it
	// fits the receive buffer: memory is never made for what is only announced.
	// The largest that means something is a few strings of 4096 bytes.
	optionBytesMax = receiveBufferBytes
	// optionDiscardMax bounds the data of an option that is consumed, to
	// answer that it is too big; the sender of more is hung up on.
	optionDiscardMax = 1 << 20
	// optionsMax bounds the options of one handshake.
	optionsMax = 256

	// blockPreferred is the advertised preferred block size, that of a page.
	blockPreferred = 4096
)

var (
	errAborted        = errors.New("nbd: client aborted the handshake")
	errUnknownFlags   = errors.New("nbd: unknown client flags")
	errBadMagic       = errors.New("nbd: wrong magic number")
	errOptionTooLong  = errors.New("nbd: absurdly long option")
	errTooManyOptions = errors.New("nbd: too many options")
	errNotFixed       = errors.New("nbd: option of fixed newstyle without its flag")
	errNoExport       = errors.New("nbd: no such export")
	errUnavailable    = errors.New("nbd: export is not available")
	errExportFull     = errors.New("nbd: export has too many clients")
	errExtendedName   = errors.New("nbd: EXPORT_NAME after EXTENDED_HEADERS")
)

// An agreement is what options have settled so far. STARTTLS is to forget all of it.
type agreement struct {
	mode ReplyMode
	meta *namedExport // of which base:allocation was selected; nil: none
}

// negotiate runs the handshake on c, until c.export and c.flags are chosen. An
// error ends the connection; errAborted and errStopped are its orderly ends.
func (c *conn) negotiate() error {
	out := binary.BigEndian.AppendUint64(nil, magicServer)
	out = binary.BigEndian.AppendUint64(out, magicOption)
	out = binary.BigEndian.AppendUint16(out, handshakeFlags)
	if _, err := c.nc.Write(out); err != nil {
		return err
	}
	b, err := c.in.next(4)
	if err != nil {
		return err
	}
	clientFlags := binary.BigEndian.Uint32(b)
	if clientFlags&^handshakeFlags != 0 {
		return fmt.Errorf("%w: %#x", errUnknownFlags, clientFlags)
	}
	for range optionsMax {
		done, err := c.option(clientFlags)
		if err != nil || done {
			return err
		}
	}
	return errTooManyOptions
}

// option receives and answers one option; done means that the handshake is over.
func (c *conn) option(clientFlags uint32) (done bool, err error) {
	b, err := c.in.next(optionSize)
	if err != nil {
		return false, err
	}
	if binary.BigEndian.Uint64(b) != magicOption {
		return false, errBadMagic
	}
	opt := option(binary.BigEndian.Uint32(b[8:]))
	n := binary.BigEndian.Uint32(b[12:])
	if opt != optExportName && clientFlags&flagFixedNewstyle == 0 {
		return false, errNotFixed
	}

	if opt == optSetMeta {
		c.agreed.meta = nil // whatever the answer
	}
	if n > optionBytesMax {
		if n > optionDiscardMax || opt == optExportName {
			return false, fmt.Errorf("%w: %d bytes", errOptionTooLong, n)
		}
		if err := c.in.discard(uint64(n)); err != nil {
			return false, err
		}
		return false, c.refuse(opt, repErrTooBig, "option too long")
	}
	data, err := c.in.next(int(n))
	if err != nil {
		return false, err
	}

	if c.s.opts.TLSRequired && c.nc.tls == nil && opt != optStartTLS && opt != optAbort {
		c.s.counters.tlsMissing.Add(1)
		if opt == optExportName {
			return false, errTLSRequired
		}
		return false, c.refuse(opt, repErrTLSReqd, "TLS is required")
	}

	switch opt {
	case optStartTLS:
		return false, c.startTLS(data)
	case optAbort:
		c.nc.Write(appendOptReply(nil, opt, repAck, nil)) // to a client that may be gone already
		return false, errAborted
	case optExportName:
		if c.agreed.mode >= ExtendedHeaders {
			return false, errExtendedName
		}
		return true, c.exportName(string(data), clientFlags&flagNoZeroes != 0)
	case optList:
		return false, c.list(data)
	case optInfo, optGo:
		return c.info(opt, data)
	case optStructured, optExtended:
		return false, c.upgrade(opt, data)
	case optListMeta, optSetMeta:
		return false, c.metaContext(opt, data)
	default:
		return false, c.refuse(opt, repErrUnsup, "")
	}
}

// refuse answers an option with an error and a text for people.
func (c *conn) refuse(opt option, r optReply, text string) error {
	_, err := c.nc.Write(appendOptReply(nil, opt, r, []byte(text)))
	return err
}

// exportName answers EXPORT_NAME, which can only be refused by hanging up.
func (c *conn) exportName(name string, noZeroes bool) error {
	if _, err := c.choose(name, true); err != nil {
		return fmt.Errorf("%w: %.256q", err, name)
	}
	out := binary.BigEndian.AppendUint64(nil, c.size)
	out = binary.BigEndian.AppendUint16(out, uint16(c.flags))
	if !noZeroes {
		out = append(out, make([]byte, reservedZeroes)...)
	}
	_, err := c.nc.Write(out)
	return err
}

// list answers LIST with the exports that the client may use, in the order of
// the options.
func (c *conn) list(data []byte) error {
	if len(data) != 0 {
		return c.refuse(optList, repErrInvalid, "LIST takes no data")
	}
	if c.s.opts.ListOff {
		c.s.counters.listsRefused.Add(1)
		return c.refuse(optList, repErrPolicy, "exports are not listed here")
	}
	var out, b []byte
	for i := range c.s.opts.Exports {
		e := &c.s.opts.Exports[i]
		if !c.admits(e) {
			continue
		}
		b = binary.BigEndian.AppendUint32(b[:0], uint32(len(e.Name)))
		b = append(b, e.Name...)
		b = append(b, e.Description...)
		out = appendOptReply(out, optList, repServer, b)
	}
	_, err := c.nc.Write(appendOptReply(out, optList, repAck, nil))
	return err
}

// info answers INFO and GO; done means a GO that succeeded.
func (c *conn) info(opt option, data []byte) (done bool, err error) {
	q, ok := decodeInfoQuery(data)
	if !ok {
		return false, c.refuse(opt, repErrInvalid, "malformed query")
	}
	if r, err := c.choose(q.export, opt == optGo); err != nil {
		return false, c.refuse(opt, r, strings.TrimPrefix(err.Error(), "nbd: "))
	}
	e := c.export

	b := binary.BigEndian.AppendUint16(nil, infoExport)
	b = binary.BigEndian.AppendUint64(b, c.size)
	b = binary.BigEndian.AppendUint16(b, uint16(c.flags))
	out := appendOptReply(nil, opt, repInfo, b)
	if q.name {
		b = append(binary.BigEndian.AppendUint16(b[:0], infoName), e.Name...)
		out = appendOptReply(out, opt, repInfo, b)
	}
	if q.description && e.Description != "" {
		b = append(binary.BigEndian.AppendUint16(b[:0], infoDescription), e.Description...)
		out = appendOptReply(out, opt, repInfo, b)
	}
	if q.blockSize {
		b = binary.BigEndian.AppendUint16(b[:0], infoBlockSize)
		b = binary.BigEndian.AppendUint32(b, 1)
		b = binary.BigEndian.AppendUint32(b, blockPreferred)
		b = binary.BigEndian.AppendUint32(b, c.s.opts.PayloadBytesMax)
		out = appendOptReply(out, opt, repInfo, b)
	}
	_, err = c.nc.Write(appendOptReply(out, opt, repAck, nil))
	return opt == optGo, err
}

// upgrade answers STRUCTURED_REPLY and EXTENDED_HEADERS.
func (c *conn) upgrade(opt option, data []byte) error {
	mode := StructuredReplies
	if opt == optExtended {
		mode = ExtendedHeaders
	}
	switch {
	case len(data) != 0:
		return c.refuse(opt, repErrInvalid, "this option takes no data")
	case c.agreed.mode == mode:
		return c.refuse(opt, repErrInvalid, "negotiated already")
	case c.agreed.mode > mode:
		return c.refuse(opt, repErrExtReqd, "extended headers were negotiated already")
	}
	c.agreed.mode = mode
	_, err := c.nc.Write(appendOptReply(nil, opt, repAck, nil))
	return err
}

// metaContext answers LIST_META_CONTEXT and SET_META_CONTEXT. There is one context to
// select; queries for others find nothing, which is no error.
func (c *conn) metaContext(opt option, data []byte) error {
	if c.agreed.mode < StructuredReplies {
		return c.refuse(opt, repErrInvalid, "structured replies were not negotiated")
	}
	q, ok := decodeMetaQuery(data)
	if !ok {
		return c.refuse(opt, repErrInvalid, "malformed query")
	}
	e, r, err := c.find(q.export)
	if err != nil {
		return c.refuse(opt, r, strings.TrimPrefix(err.Error(), "nbd: "))
	}
	var out []byte
	var id uint32 // of a list it means nothing
	found := q.allocation
	if opt == optSetMeta {
		id = contextID
	} else {
		found = found || q.base || q.queries == 0
	}
	if found {
		b := binary.BigEndian.AppendUint32(nil, id)
		out = appendOptReply(out, opt, repMeta, append(b, contextAllocation...))
		if opt == optSetMeta {
			c.agreed.meta = e
		}
	}
	if q.about && opt == optListMeta && e.About != nil {
		for _, s := range e.About() {
			out = appendOptReply(out, opt, repMeta, append(make([]byte, 4), contextsAbout+s...))
		}
	}
	_, err = c.nc.Write(appendOptReply(out, opt, repAck, nil))
	return err
}

// find is the export name, if the client may use it; else the error tells why it may
// not, and r tells the client.
func (c *conn) find(name string) (e *namedExport, r optReply, err error) {
	e = c.s.exports[name]
	switch {
	case e == nil:
		return nil, repErrUnknown, errNoExport
	case c.admits(e.Export):
		return e, 0, nil
	case c.nc.tls == nil:
		return nil, repErrTLSReqd, errExportTLS
	}
	return nil, repErrPolicy, errNotAllowed
}

// choose makes the export name that of the connection; after INFO a later option
// may choose another. With enter the client is one of its users from then on, until
// the connection ends. The error tells why it cannot be; r tells the client.
func (c *conn) choose(name string, enter bool) (r optReply, err error) {
	cs := &c.s.counters
	defer func() {
		if err != nil && !c.refused { // once, or a client could fill the log
			c.refused = true
			c.s.log(Event{Kind: EventRefused, Conn: c.id, Remote: remoteOf(c.nc.Conn), Export: name[:min(len(name), 256)], Err: err})
		}
	}()
	e, r, err := c.find(name)
	switch {
	case err == errNoExport:
		cs.exportsUnknown.Add(1)
		return r, err
	case err != nil:
		cs.exportsForbidden.Add(1)
		return r, err
	}
	own := *e.Export
	if own.Backend == nil {
		begin := time.Now()
		if own.Backend, err = own.Open(c.ctx); err != nil {
			cs.exportsUnavailable.Add(1)
			return repErrUnknown, errUnavailable
		}
		c.in.handshake = c.in.handshake.Add(time.Since(begin))
		if err := c.nc.SetWriteDeadline(c.in.handshake); err != nil {
			return repErrUnknown, err
		}
	}
	if enter {
		if n := e.clients.Add(1); e.ConnectionsMax > 0 && n > int64(e.ConnectionsMax) {
			e.clients.Add(-1)
			cs.exportsFull.Add(1)
			return repErrPolicy, errExportFull
		}
		c.using = e
		if !c.s.settle(c) {
			return repErrShut, errDisplaced
		}
	}
	c.export, c.size = &own, own.Backend.Size()
	c.flags = FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagCanMultiConn | FlagSendCache
	if c.agreed.mode >= StructuredReplies {
		c.flags |= FlagSendDF
	}
	c.allocation = c.agreed.meta == e
	if c.agreed.mode >= ExtendedHeaders && c.allocation {
		c.flags |= FlagStatusPayload
	}
	c.readOnly = own.Backend.ReadOnly()
	if c.readOnly {
		c.flags |= FlagReadOnly
	} else {
		c.flags |= FlagSendTrim | FlagSendWriteZeroes | FlagSendFastZero
	}
	return 0, nil
}
