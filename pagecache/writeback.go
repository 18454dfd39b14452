package pagecache

import (
	"fmt"

	"cnbd/internal/block"
)

// LockDirty takes the page lock of the version of b that is dirty in epoch, be it
// visible or the shadow, and a reference, for UnlockDirty or HandOff to give up.
// False means busy: there is no such version (trimmed, replaced in its epoch,
// handed off), or another flusher has it. It never waits. The lock keeps other
// flushers away, and nobody else.
func (c *Cache) LockDirty(b block.Index, epoch uint64) (Ref, bool) {
	sh, bucket := c.home(b)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	r := c.findDirty(sh, bucket, b, epoch)
	if r == 0 || c.arena.Header(r).state.Load()&locked != 0 {
		sh.events[busyPages]++
		return 0, false
	}
	h := c.arena.Header(r)
	h.refs.Add(1)
	c.setState(sh, r, h.state.Load()|locked)
	sh.events[findLocks]++
	return r, true
}

// StillDirty reports whether r, which the caller has locked, is still the version
// of its block that is dirty in epoch. A write or trim of the same epoch ends
// that, lock or not. Once the caller holds the range lock of the block in the
// state tree of epoch, a true answer lasts.
func (c *Cache) StillDirty(r Ref, epoch uint64) bool {
	h, sh := c.lockVersion(r, locked, "asked for by StillDirty")
	defer sh.mu.Unlock()
	if h.state.Load()&dirty == 0 || h.epoch != epoch {
		sh.events[busyPages]++
		return false
	}
	return true
}

// UnlockDirty gives up the lock and the reference of LockDirty; nothing else
// changes. The caller must not use r any more.
func (c *Cache) UnlockDirty(r Ref) {
	h, sh := c.lockVersion(r, locked, "unlocked")
	c.setState(sh, r, h.state.Load()&^locked)
	sh.mu.Unlock()
	c.unref(r)
}

// HandOff turns the version, which the caller has locked and knows to be
// StillDirty, from dirty into writeback, and drops the lock. The reference of
// LockDirty becomes the item's, for EndWriteback to give up; until then the bytes
// stay as they are. A shadow leaves the index, a visible version stays visible.
// The dirty limit counts the version until EndWriteback.
func (c *Cache) HandOff(r Ref) {
	h, sh := c.lockVersion(r, dirty|locked, "handed off")
	state := h.state.Load()
	if state&shadow != 0 {
		_, bucket := c.home(block.Index(h.block.Load()))
		c.unlink(sh, bucket, r)
		h.refs.Add(-1) // not the last: the item's remains
		state &^= attached | shadow
	}
	c.setState(sh, r, state&^(dirty|locked)|writeback)
	c.dirty.Add(-1)
	sh.events[handOffs]++
	sh.mu.Unlock()
}

// EndWriteback ends the writeback of a version and gives up the item's reference.
// Without an error the extent map has the version already: it becomes clean if it
// is still visible, else it goes with its last reader, and the dirty limit does
// not count it any more. With one, a visible version stays, readable and never
// evicted, and counts on; the error is BalanceDirty's answer from now on.
func (c *Cache) EndWriteback(r Ref, err error) {
	h, sh := c.lockVersion(r, writeback, "ended writeback")
	state := h.state.Load() &^ writeback
	e := writebacksClean
	switch {
	case err != nil:
		e = writebackErrors
		if state&attached != 0 {
			state |= failed
		}
	case state&attached == 0:
		e = writebacksDetached
	}
	c.setState(sh, r, state)
	sh.events[e]++
	sh.mu.Unlock()

	c.unref(r)
	if err != nil {
		c.dirtyGate.fail(fmt.Errorf("pagecache: writeback failed: %w", err))
	}
	if state&failed == 0 {
		c.uncharge(1)
	}
	c.trim()
	// If it is clean now it can be evicted for payload.
	c.payloadGate.serve()
}

// lockVersion takes the mutex of r's shard and returns it with r's header. It
// panics unless r has all of the wanted bits. The caller has a reference to r.
func (c *Cache) lockVersion(r Ref, want uint32, what string) (*header, *shard) {
	h := c.arena.Header(r)
	b := block.Index(h.block.Load()) // does not change while there is a reference
	sh, _ := c.home(b)
	sh.mu.Lock()
	if s := h.state.Load(); s&want != want {
		sh.mu.Unlock()
		panic(fmt.Sprintf("pagecache: version %d of block %d in state %b %s", r, b, s, what))
	}
	return h, sh
}
