// Package mutant has the mistakes that tests put into the program to show that
// they would find them: a test that passes proves little until it has failed. A
// mutant stands beside the code that it breaks, as
//
//	if mutant.Is(mutant.CommitWithoutSync) { … }
//
// Is is false, and the compiler drops what depends on it, in every build without
// the tag "mutant". With the tag, tests choose one mutant at a time (Caught).
package mutant

// A Mutant is one mistake.
type Mutant uint32

const (
	// None is the program as it is.
	None Mutant = iota
	// CommitWithoutSync answers a commit that was not synced.
	CommitWithoutSync
	// EpochLeak freezes nothing: what is written while a commit collects its epoch
	// may get into it, without what was written before that.
	EpochLeak
	// ReuseBeforeCheckpoint frees segments when a checkpoint does not refer to them
	// any more, before it is durable (rule R4).
	ReuseBeforeCheckpoint
	// ReuseBehindOne frees segments that the older of the two newest checkpoints
	// still needs (rule R4).
	ReuseBehindOne
	// DropReservation accepts writes that no space was promised to (rule R8).
	DropReservation
	// BlobUnverified returns stored bytes whatever their checksum is.
	BlobUnverified
	// LogUnverified accepts epochs whose payloads do not verify (rule R1).
	LogUnverified
	// StaleLife takes segments and records of an earlier life for those of this one
	// (rule R2).
	StaleLife
	// OpenWithoutSync serves what was found without making it durable (promise P1).
	OpenWithoutSync
	// OpenFromCache recovers from the host's page cache (rule R5).
	OpenFromCache
	// CopyOverNewer has the cleaner append copies of what is not the newest (rule R7).
	CopyOverNewer
	// MapOverNewer has the map lead to the cleaner's copies where something newer
	// was appended since (rule R7).
	MapOverNewer
	// ResizeOneSlot makes use of a new size that only one superblock has.
	ResizeOneSlot
)
