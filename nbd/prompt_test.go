package nbd

import (
	"context"
	"testing"
)

// A client that ends its side without DISC is still told of what was done before the
// server came to see that: the reader keeps no reply back at the end.
func TestAnswersBeforeEnd(t *testing.T) {
	d := newMemDisk(1 << 20)
	g := newGate()
	d.onPrepare = func(ctx context.Context, _ uint64) error { return g.wait(ctx) }
	rc := serveDisk(t, d).rawGo()
	rc.put(append(header{cmd: CmdWrite, cookie: 1, n: 4096}.appendTo(nil), make([]byte, 4096)...))
	<-g.entered // the reader waits in PrepareWrite: the rest comes with the end behind it
	rc.request(CmdRead, 2, 0, 0)
	rc.request(CmdRead, 3, 0, 0)
	rc.closeWrite()
	g.open(1)
	for want := range uint64(3) {
		if e, cookie := rc.reply(); e != 0 || cookie != want+1 {
			t.Fatalf("%v to request %d, want success to %d", e, cookie, want+1)
		}
	}
}
