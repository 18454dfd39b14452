package export_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"cnbd/device"
	"cnbd/export"
	"cnbd/nbd"
)

// A program that serves a store, and is a client of it too.
func Example() {
	dir, err := os.MkdirTemp("", "cnbd")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.cnbd")
	if err := device.Create(path, device.CreateOptions{Bytes: 1 << 30}); err != nil {
		log.Fatal(err)
	}

	// To serve it:
	d, err := device.OpenFile(path, device.Options{CacheBytes: 32 << 20})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	s, err := nbd.NewServer(nbd.Options{Exports: []nbd.Export{{Name: "disk", Backend: export.Backend(d)}}})
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close() // before the device
	l, err := nbd.Listen("unix:"+filepath.Join(dir, "socket"), 0o600)
	if err != nil {
		log.Fatal(err)
	}
	go s.Serve(l)

	// To use what is served:
	ctx := context.Background()
	c, err := nbd.Dial(ctx, nbd.URIOf(l.Addr(), "disk").String())
	if err != nil {
		log.Fatal(err)
	}
	if err := c.WriteAt(ctx, []byte("over the wire"), 4096, true); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 13)
	if _, err := d.ReadAt(p, 4096); err != nil {
		log.Fatal(err)
	}
	if err := c.Disconnect(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", p, c.Size())
	// Output: over the wire, 1073741824 bytes
}
