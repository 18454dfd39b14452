package nbdkernel

import (
	"errors"
	"io/fs"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A Watch hears from the driver of connections that have died.
type Watch struct {
	conn *genetlink.Conn
	dead chan struct{}
}

// WatchDead begins to listen for dead connections of d.
func WatchDead(d Device) (*Watch, error) {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return nil, err
	}
	w := &Watch{conn, make(chan struct{}, 1)}
	if err := w.join(); err != nil {
		conn.Close()
		return nil, err
	}
	go w.receive(d)
	return w, nil
}

// Dead has a value when connections of the device may have died since the last one
// was taken. It is closed when nothing more will be heard.
func (w *Watch) Dead() <-chan struct{} { return w.dead }

// Close ends the watch.
func (w *Watch) Close() error { return w.conn.Close() }

func (w *Watch) join() error {
	f, err := w.conn.GetFamily(family)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNoModule
	}
	if err != nil {
		return err
	}
	for _, g := range f.Groups {
		if g.Name == groupEvents {
			return w.conn.JoinGroup(g.ID)
		}
	}
	return errors.New("the kernel's nbd driver does not tell of dead connections")
}

func (w *Watch) receive(d Device) {
	defer close(w.dead)
	for {
		messages, _, err := w.conn.Receive()
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		told := err != nil // some were lost
		for _, m := range messages {
			told = told || m.Header.Command == cmdLinkDead && concerns(m.Data, d)
		}
		if told {
			select {
			case w.dead <- struct{}{}:
			default: // it is told already
			}
		}
	}
}

// concerns tells whether the attributes of an event are those of d.
func concerns(attributes []byte, d Device) bool {
	a, err := netlink.NewAttributeDecoder(attributes)
	if err != nil {
		return false
	}
	for a.Next() {
		if a.Type() == attrIndex {
			return a.Uint32() == uint32(d)
		}
	}
	return false
}
