// Package invariants has the checks that exist only in builds that look for our
// own mistakes: those with the tag "invariants" and those of the race detector.
// A failed check is a bug of ours and panics; it is never used for what a
// client, a file or a disk can cause.
package invariants

import "fmt"

// Assertf panics with the formatted message if ok is false and the build has
// invariants. Callers guard costly conditions with [Enabled].
func Assertf(ok bool, format string, args ...any) {
	if Enabled && !ok {
		panic("cnbd: broken invariant: " + fmt.Sprintf(format, args...))
	}
}
