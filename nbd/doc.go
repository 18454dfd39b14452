// Package nbd speaks the Network Block Device protocol: its wire types, a
// [Server] that serves any [Backend], and a small [Client].
//
// What is spoken is fixed newstyle with the options EXPORT_NAME, ABORT, LIST,
// INFO, GO, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS, LIST_META_CONTEXT and
// SET_META_CONTEXT (base:allocation), and the commands READ (DF), WRITE, DISC,
// FLUSH, TRIM, CACHE, WRITE_ZEROES (NO_HOLE, FAST_ZERO) and BLOCK_STATUS
// (REQ_ONE), with FUA. Everything else is refused in a way that keeps the
// connection in sync. docs/nbd.md has a table of it.
//
// # A connection
//
//	         socket
//	           │ read                                     ▲ writev
//	           ▼                                          │
//	reader ── admit ── PrepareWrite, receive ── work ──▶ workers ── ready
//	           ▲            (memory of the backend)       │          │
//	           └────────────── room ◀──────────────── one of them sends
//
// One goroutine reads requests. It admits a request when the connection has
// fewer than RequestsMax requests in flight and the server's budget of payload
// has memory for it, and hands it to a worker: an idle one, else a new one, so
// there is at most one worker more than there were requests in flight. Workers
// call the backend concurrently and in no order. A finished request is queued;
// the worker that finds nobody sending becomes the sender, and sends all that is
// ready, with as few system calls as it can, until nothing is. So there is neither
// a goroutine nor a hand-off between a lone request and its reply, and replies
// that are ready together leave together.
//
// What a [PromptBackend] does at once, such as a read of what is cached, the reader
// does itself, and it keeps the replies until it has to wait for anything, or has a
// few. It sends as much of them as the socket takes, and leaves the rest to a
// goroutine: it never waits for the client to read, which may be writing.
//
// To wake a goroutine takes longer than many a request. So the reader executes all
// requests of a client that has one in flight at a time, and looks for the next one for
// BusyPoll before it sleeps (lone.go). It does not keep the next one waiting for that:
// who executes for longer than a millisecond is relieved, and a worker is the
// reader from then on. There is always one, or the one who relieves it.
//
// The payload of a WRITE is received into memory of the backend: its
// [Backend.PrepareWrite] admits it, and it is the reader that waits there while
// memory or the dirty limit is short; [PendingWrite] then hands memory out as
// bytes arrive, at most 64 KiB or as much again as has come. Nothing better is possible: the bytes behind the header have to be
// put somewhere before the next header can be seen. So a writer over the limit
// is slowed by its own socket, together with the reads that it has pipelined
// behind the write; other connections are not. A payload has to arrive, and a
// reply has to leave, within StallTimeout.
//
// STARTTLS puts a layer between: from then on the reader reads through TLS, a record
// at a time and with a copy more, and the sender gathers replies into whole records.
// Deadlines and the end of the connection are still those of the socket. What was
// agreed on before is forgotten, for it may not have been the client that said it.
//
// # Turns
//
// A reader that finds a request whenever it looks gives way after a turn of some
// requests, until the network has been looked at; the more such readers there are,
// the shorter are their turns. So a client that sends one request at a time waits as
// long as a round of all others takes, however many requests they have ready.
//
// # Places
//
// At most ConnectionsMax connections have a place. One that is still in its
// handshake may lose it to a new one, the eldest first; one whose client has
// shown a certificate, or has its export, is settled.
//
// # Invariants
//
//  1. Every admitted request is finished exactly once, and is in flight until
//     its reply has been given to the kernel or the connection is dead.
//  2. After an answered error the next byte read is the first one of a request
//     header, or of an option: what a refused message carries is consumed.
//  3. Every [Payload] is released, and every [PendingWrite] committed or
//     aborted, exactly once, before the connection is counted as closed.
//  4. What clients make the server hold is bounded: by BytesMax all together, by
//     RequestsMax, the receive buffer, which takes the data of options too, and
//     the state of TLS each. What some of them keep leaves memory for each of the
//     others.
//  5. FLUSH covers what was answered before it was received: a reply is queued
//     only after the backend has returned, so the backend has seen all of it.
//
// # The end of a connection
//
// DISC and [Server.Shutdown] end it in good order: what has been sent by then is read,
// finishes and is answered. NBD has no word for a server that wants to stop, and the Linux
// client waits for answers as long as its timeout is, two minutes. So the server holds answers
// back until the client waits for them and sends nothing, and before it gives them it makes
// an end of sending, as a unix socket can (shutdown(2) of the reading side: what was sent
// stays readable, and what comes later fails at its sender); see receiver.stop. Anything else (end of file, an error
// of the socket, a broken header, a stalled client, [Server.Close]) is its death:
// its context is cancelled, the socket is closed, pending writes that have not
// begun to commit are aborted.
//
// # Locks
//
// Outermost first: Server.mu, receiver.mu. The mutexes of conn, budget and turns
// are leaves. None is held during I/O or a call of the backend.
package nbd
