package store

import (
	"errors"
	"testing"

	"cnbd/internal/disktest"
)

// TestUnfinished: a store that is not finished is none for others, and one for who
// made it; however its publication is cut, it is one of the two, and whole.
func TestUnfinished(t *testing.T) {
	d := disktest.New(1, disktest.Options{Size: 64 << 20, Device: true})
	u := Unfinished{d}
	must(t, Format(u, testGeometry(1024, 60)))
	c := openCommitted(t, u, Options{})
	for i := range 64 {
		must(t, c.blob(i*8, 8, 0xff))
	}
	must(t, c.Checkpoint())
	must(t, c.Close())
	d = d.Clone()
	if _, err := ReadGeometry(d); !errors.Is(err, ErrNotStore) {
		t.Fatalf("not finished: %v", err)
	}
	d.Record()
	if err := (Unfinished{d}).Publish(); err != nil {
		t.Fatal(err)
	}
	found := 0
	for k := range d.Ops() + 1 {
		cut := d.At(k, disktest.Random(uint64(k)))
		_, err := ReadGeometry(cut)
		if errors.Is(err, ErrNotStore) {
			if k == d.Ops() {
				t.Error("published, and no store")
			}
			if _, err := ReadGeometry(Unfinished{cut}); err != nil {
				t.Errorf("cut at %d: neither one nor the other: %v", k, err)
			}
			continue
		}
		must(t, err)
		found++
		rep, err := Check(cut, CheckOptions{Data: true})
		if err != nil || len(rep.Lost) > 0 || rep.DataBytes != 64*8*4096 {
			t.Errorf("cut at %d: %v, %+v", k, err, rep)
		}
	}
	if found == 0 {
		t.Error("never published")
	}
}
