package nbd

import "context"

// A Backend is the disk behind an export: the verbs that the server serves.
//
// The server calls it concurrently, from many connections, in no order; what
// overlaps in time may take effect in any order. It checks ranges first: a
// backend is only asked for 0 < n and off+n <= Size, and asked to write only if
// it is not ReadOnly. An error becomes an error number by [ErrnoOf].
//
// The context of a call ends when its connection dies or the server is closed.
// A call must then return soon, or the connection cannot be given up; work that
// has begun may complete all the same.
type Backend interface {
	// Size is the size in bytes. While the backend is served it may grow: new
	// connections are told so, and old ones may use what has been added.
	Size() uint64

	// ReadOnly tells that the backend refuses to be written, as it is when a
	// connection is negotiated. A backend that becomes read-only later answers
	// with its own errors.
	ReadOnly() bool

	// Read returns the n bytes at off. It may block.
	Read(ctx context.Context, off uint64, n uint32) (Payload, error)

	// PrepareWrite admits a write of n bytes at off before its payload is
	// received, and reserves what it needs, space included. It blocks while the
	// limit of memory or of dirty data is reached; meanwhile nothing is read
	// from the connection.
	PrepareWrite(ctx context.Context, off uint64, n uint32) (PendingWrite, error)

	// WriteZeroes makes the n bytes at off read as zeroes. With f.FastZero and
	// no way to do it faster than by writing, it changes nothing and returns
	// [ErrNotSupported].
	WriteZeroes(ctx context.Context, off, n uint64, f ZeroFlags) error

	// Trim tells that the n bytes at off are no longer needed; what they then
	// read as is the backend's choice. With fua its effect is durable on return.
	// One that has no room to do so changes nothing and returns ENOSPC, of which
	// the client is not told.
	Trim(ctx context.Context, off, n uint64, fua bool) error

	// BlockStatus tells what of the n bytes at off is allocated: it calls visit
	// for runs, in order from off on and without a gap. It ends when visit
	// returns false; it may end sooner, but after one run at least.
	BlockStatus(ctx context.Context, off, n uint64, visit func(n uint64, s BlockState) bool) error

	// Cache tells that the n bytes at off will be read soon. A backend that
	// knows nothing better returns nil.
	Cache(ctx context.Context, off, n uint64) error

	// Flush makes durable what every call that returned before Flush was
	// called has changed, from whatever connection.
	Flush(ctx context.Context) error
}

// A PromptBackend is a [Backend] that can tell what it can do at once: without
// waiting for a disk, for memory, or for another request. The server then does it as
// it reads the request, without handing it to another goroutine, which for a small
// request costs more than the rest of it.
//
// Where a method reports false nothing has happened, and the server calls the one of
// Backend that may wait.
type PromptBackend interface {
	Backend

	// ReadPromptly is Read.
	ReadPromptly(off uint64, n uint32) (Payload, bool)

	// PrepareWritePromptly is PrepareWrite.
	PrepareWritePromptly(off uint64, n uint32) (PendingWrite, bool)

	// CommitPromptly is the Commit of w, which it ends if it reports true, without
	// fua. An error is a reason to report false.
	CommitPromptly(w PendingWrite) bool
}

// ZeroFlags modify [Backend.WriteZeroes].
type ZeroFlags struct {
	FUA      bool // durable on return
	NoHole   bool // the range stays allocated: a later write to it must find space
	FastZero bool // fail with ErrNotSupported rather than be slow
}

// A Payload is the data of a READ. It is shared: immutable, and borrowed from
// the backend until Release.
type Payload interface {
	// Segments are the bytes in order; their lengths add up to those asked for.
	Segments() [][]byte
	// Zero reports whether segment i is a hole, known to be zeroes, which then
	// need not be sent. A backend may always say false.
	Zero(i int) bool
	// Release gives the memory back. The server calls it once, when the
	// data has been sent or is no longer wanted.
	Release()
}

// A PendingWrite is a WRITE whose payload is being received. The server ends it
// with exactly one call of Commit or Abort.
type PendingWrite interface {
	// Next hands out the memory for the following bytes of the payload, in
	// order: for n of them or somewhat more, but not beyond the payload. The
	// server asks for it as bytes arrive, so that what a header announces takes
	// memory only when it comes. It does not block: the memory was admitted by
	// PrepareWrite. It is the server's until Commit or Abort; nobody else sees
	// what is in it before Commit.
	Next(n int) [][]byte
	// Commit makes the payload the content of the range, wholly or, with an
	// error, as the backend can; with fua it is durable on return. It is called
	// when all of the memory was handed out and filled.
	// It gives the memory back to the backend in either case.
	Commit(ctx context.Context, fua bool) error
	// Abort forgets the write and gives the memory back.
	Abort()
}
