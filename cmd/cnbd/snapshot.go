package main

import (
	"context"
	"net"
	"sync"

	"cnbd/device"
	"cnbd/export"
	"cnbd/nbd"
)

const (
	// snapshotRequest is the longest request to a snapshot, and snapshotBytes what is
	// in flight at most: it bounds the memory of a server for it.
	snapshotRequest = 1 << 20
	snapshotBytes   = 16 << 20
)

// serveSnapshot keeps d as it is and serves that on the one connection that take
// gives, until that or ctx ends.
func serveSnapshot(ctx context.Context, d *device.Device, log func(nbd.Event), take func() (net.Conn, error)) error {
	snap, err := d.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer snap.Close()
	ended := make(chan struct{}, 1)
	s, err := nbd.NewServer(nbd.Options{
		Exports: []nbd.Export{{Backend: export.Snapshot(snap)}}, ConnectionsMax: 1,
		PayloadBytesMax: snapshotRequest, BytesMax: snapshotBytes,
		Log: func(e nbd.Event) {
			log(e)
			if e.Kind == nbd.EventClose || e.Kind == nbd.EventRefused {
				select {
				case ended <- struct{}{}:
				default:
				}
			}
		},
	})
	if err != nil {
		return err
	}
	nc, err := take()
	if err != nil {
		return err
	}
	defer nc.Close()
	go s.Serve(&oneConnection{nc: nc, addr: nc.LocalAddr(), closed: make(chan struct{})})
	select {
	case <-ended:
	case <-ctx.Done():
	}
	return s.Close()
}

// oneConnection is a listener for a connection that there is already.
type oneConnection struct {
	mu     sync.Mutex
	nc     net.Conn // guarded by mu; nil once it is accepted
	addr   net.Addr
	once   sync.Once
	closed chan struct{}
}

func (l *oneConnection) Accept() (net.Conn, error) {
	l.mu.Lock()
	nc := l.nc
	l.nc = nil
	l.mu.Unlock()
	if nc != nil {
		return nc, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConnection) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneConnection) Addr() net.Addr { return l.addr }
