//go:build mutant

package device

import (
	"testing"

	"cnbd/internal/disktest"
	"cnbd/internal/mutant"
)

// TestMutants: each mistake that only a whole device shows is found by the power
// cuts, and so are some of the store's.
func TestMutants(t *testing.T) {
	one := func(seed uint64) error { _, err := oneClient(t, seed); return err }
	many := func(seed uint64) error { _, err := manyClients(t, seed); return err }
	for _, m := range []struct {
		name  string
		m     mutant.Mutant
		tries int
		try   func(seed uint64) error
	}{
		{"mixed epochs", mutant.EpochLeak, 200, many},
		{"commit without sync", mutant.CommitWithoutSync, 20, one},
		{"open without sync", mutant.OpenWithoutSync, 20, many},
	} {
		t.Run(m.name, func(t *testing.T) { mutant.Caught(t, m.m, disktest.Seed(t), m.tries, m.try) })
	}
}
