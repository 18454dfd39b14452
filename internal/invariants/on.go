//go:build invariants || race

package invariants

// Enabled tells whether this build checks invariants.
const Enabled = true
