package device

import (
	"context"
	"fmt"
)

// Compact cleans until nothing is left that is worth it, and gives the space to the
// host. It blocks for as long as that takes, while requests go on. progress is told
// now and then how many stored bytes are dead, and how many alive; it may be nil.
// When ctx ends, what is done stays done, and the error is that of ctx.
func (d *Device) Compact(ctx context.Context, progress func(dead, live uint64)) error {
	if d.opts.ReadOnly {
		return ErrReadOnly
	}
	// What is still in the cache may be dead already.
	if err := d.Flush(ctx); err != nil {
		return err
	}
	if err := d.store.Compact(ctx, progress); err != nil {
		return fmt.Errorf("device: %w", err)
	}
	return nil
}
