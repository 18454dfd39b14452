package extents

import "sync"

// A cache keeps decoded nodes, the least recently used of them dropped when
// their memory exceeds a limit. Nodes are immutable and places are never reused
// for the same checksum, so nothing in it is ever out of date: what no root
// leads to any more is not asked for, and ages out.
//
// All methods may be called concurrently.
type cache struct {
	bytesMax int64

	mu struct {
		sync.Mutex
		entries map[Place]*cacheEntry
		// oldest and newest are the ends of the list of the entries that are
		// loaded, in order of use.
		oldest, newest *cacheEntry
		bytes          int64
		nodes          int
		hits, misses   uint64
	}
}

// A cacheEntry is a node, or the wait for the one goroutine that reads it.
type cacheEntry struct {
	place Place

	// done is closed when node or err is set. Both are immutable then.
	done chan struct{}
	node *node
	err  error

	older, newer *cacheEntry // guarded by cache.mu
}

func newCache(bytesMax int64) *cache {
	c := &cache{bytesMax: bytesMax}
	c.mu.entries = make(map[Place]*cacheEntry)
	return c
}

// acquire returns the entry of place, and whether the caller has to load it and
// tell the cache by loaded. If not, it is loaded, or will be: the caller waits.
func (c *cache) acquire(place Place) (e *cacheEntry, load bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e = c.mu.entries[place]; e != nil {
		c.mu.hits++
		if e.node != nil && e != c.mu.newest {
			c.unlinkLocked(e)
			c.linkLocked(e)
		}
		return e, false
	}
	c.mu.misses++
	e = &cacheEntry{place: place, done: make(chan struct{})}
	c.mu.entries[place] = e
	return e, true
}

// wait returns what the entry holds once it is loaded.
func (e *cacheEntry) wait() (*node, error) {
	<-e.done
	return e.node, e.err
}

// loaded ends the loading of e with a node or an error. All who wait for it get
// the error; later lookups try again.
func (c *cache) loaded(e *cacheEntry, n *node, err error) {
	c.mu.Lock()
	e.node, e.err = n, err
	if err != nil {
		delete(c.mu.entries, e.place)
	} else {
		c.admitLocked(e)
	}
	c.mu.Unlock()
	close(e.done)
}

// peek returns the node of place if it is there, or nil. It counts as no use.
func (c *cache) peek(place Place) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.mu.entries[place]; e != nil {
		return e.node
	}
	return nil
}

// closedDone is the done of entries that were never waited for.
var closedDone = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// put enters a node that was just written.
func (c *cache) put(place Place, n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.entries[place] != nil {
		return
	}
	e := &cacheEntry{place: place, done: closedDone, node: n}
	c.mu.entries[place] = e
	c.admitLocked(e)
}

// admitLocked makes e the newest, and room for it.
func (c *cache) admitLocked(e *cacheEntry) {
	c.linkLocked(e)
	c.mu.bytes += e.node.memory()
	c.mu.nodes++
	for c.mu.bytes > c.bytesMax {
		old := c.mu.oldest
		c.unlinkLocked(old)
		delete(c.mu.entries, old.place)
		c.mu.bytes -= old.node.memory()
		c.mu.nodes--
	}
}

func (c *cache) linkLocked(e *cacheEntry) {
	e.older, e.newer = c.mu.newest, nil
	if e.older != nil {
		e.older.newer = e
	} else {
		c.mu.oldest = e
	}
	c.mu.newest = e
}

func (c *cache) unlinkLocked(e *cacheEntry) {
	if e.older != nil {
		e.older.newer = e.newer
	} else {
		c.mu.oldest = e.newer
	}
	if e.newer != nil {
		e.newer.older = e.older
	} else {
		c.mu.newest = e.older
	}
	e.older, e.newer = nil, nil
}
