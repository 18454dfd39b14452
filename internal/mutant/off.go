//go:build !mutant

package mutant

// Is tells whether m is in the program.
func Is(Mutant) bool { return false }
