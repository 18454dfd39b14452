package device_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"cnbd/device"
)

// A compressed disk in a file, used by the program itself.
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
	d, err := device.OpenFile(path, device.Options{CacheBytes: 32 << 20})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("on the disk"), 512<<20); err != nil {
		log.Fatal(err)
	}
	if err := d.Sync(); err != nil { // durable from here on
		log.Fatal(err)
	}
	p := make([]byte, 11)
	if _, err := d.ReadAt(p, 512<<20); err != nil {
		log.Fatal(err)
	}
	if err := d.Close(); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: on the disk
}
