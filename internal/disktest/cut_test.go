package disktest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cnbd/internal/block"
)

// A cutDevice is the bytes of a device of which a CutLog is the history.
type cutDevice struct {
	log   *CutLog
	bytes []byte
}

func newCutDevice(o CutOptions) *cutDevice {
	return &cutDevice{NewCutLog(o), make([]byte, o.Blocks*block.Size)}
}

// put puts what o writes to its block b, zeros if o is nil or zeroes it.
func (d *cutDevice) put(b int, o *CutOp) {
	p := d.bytes[b*block.Size:][:block.Size]
	if o == nil || o.Verb != VerbWrite {
		clear(p)
		return
	}
	o.fill(p, block.Index(b))
}

func (d *cutDevice) check() error { return d.log.Check(bytes.NewReader(d.bytes)) }

// parseCut reads what Dump has written, for a device of blocks blocks. A line
// "holds 3 0" may also be "holds 3 zeros".
func parseCut(t *testing.T, text string, o CutOptions) *cutDevice {
	t.Helper()
	d := newCutDevice(o)
	ops := map[string]*CutOp{}
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "#" {
			continue
		}
		switch f[0] {
		case "send":
			var client int
			var r block.Range
			verb := slices.IndexFunc([]Verb{VerbRead, VerbWrite, VerbZeroes, VerbTrim, VerbFlush}, func(v Verb) bool { return v.String() == f[3] })
			fmt.Sscan(f[2], &client)
			if len(f) > 4 {
				if _, err := fmt.Sscanf(f[4], "[%d,%d)", &r.Start, &r.End); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
			}
			ops[f[1]] = d.log.Send(client, Verb(verb), r, len(f) > 5)
		case "answer":
			d.log.Answer(ops[f[1]])
		case "refuse":
			d.log.Refuse(ops[f[1]])
		case "holds":
			var b int
			if _, err := fmt.Sscan(f[1], &b); err != nil || ops[f[2]] == nil && f[2] != "zeros" {
				t.Fatalf("%q: %v", line, err)
			}
			d.put(b, ops[f[2]])
		default:
			t.Fatalf("unknown line %q", line)
		}
	}
	return d
}

// TestCutStates judges the recorded states of testdata/cut. The first line of each
// file is "# legal", or "# mixed: " and a part of the error.
func TestCutStates(t *testing.T) {
	files, err := filepath.Glob("testdata/cut/*.txt")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			head, _, _ := strings.Cut(text, "\n")
			want, mixed := strings.CutPrefix(head, "# mixed: ")
			if !mixed && head != "# legal" {
				t.Fatalf("first line %q", head)
			}
			d := parseCut(t, text, CutOptions{Seed: 1, Blocks: 64})
			switch err := d.check(); {
			case !mixed && err != nil:
				t.Errorf("a legal state is refused: %v", err)
			case mixed && err == nil:
				t.Error("a mixed state is accepted")
			case mixed && !strings.Contains(err.Error(), want):
				t.Errorf("got %q, want it to contain %q", err, want)
			}
			// What Dump writes is the same history.
			again := parseCut(t, d.log.Dump(bytes.NewReader(d.bytes), never), CutOptions{Seed: 1, Blocks: 64})
			if !bytes.Equal(again.bytes, d.bytes) || again.log.Dump(bytes.NewReader(again.bytes), never) != d.log.Dump(bytes.NewReader(d.bytes), never) {
				t.Error("Dump loses something")
			}
		})
	}
}

// TestCutBlocks: blocks that nobody has written there are refused, whatever the
// history.
func TestCutBlocks(t *testing.T) {
	const blocks = 4
	type state struct {
		d    *cutDevice
		op   *CutOp
		page []byte // block 1
	}
	for _, c := range []struct {
		name, want string
		damage     func(s state)
	}{
		{"as written", "", func(state) {}},
		{"torn", "block 1 is torn: it says #1 of client 7", func(s state) {
			other := s.d.log.Send(7, VerbWrite, block.Span(1, 1), false)
			copy(s.page[512:], other.Payload(nil)[512:])
		}},
		{"torn in the head", "torn", func(s state) { clear(s.page[32:36]) }},
		{"torn at the end", "torn", func(s state) { s.page[block.Size-1]++ }},
		{"one sector of zeros", "torn", func(s state) { clear(s.page[512:1024]) }},
		{"junk", "from nowhere", func(s state) { copy(s.page, "junk") }},
		{"head of zeros", "from nowhere", func(s state) { clear(s.page[:512]); s.page[600]++ }},
		{"of another run", "from nowhere", func(s state) {
			o := NewCutLog(CutOptions{Seed: 99, Blocks: blocks}).Send(7, VerbWrite, block.Span(1, 1), false)
			o.fill(s.page, 1)
		}},
		{"of another place", "wrote to block 2", func(s state) { s.op.fill(s.page, 2) }},
		{"never sent", "from nowhere", func(s state) {
			o := *s.op
			o.Number = 2
			o.fill(s.page, 1)
		}},
		{"of another request", "from nowhere", func(s state) {
			o := *s.op
			o.Number = 0 // wrote block 0
			o.fill(s.page, 1)
		}},
		{"of another client", "from nowhere", func(s state) {
			o := *s.op
			o.Client++
			o.fill(s.page, 1)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newCutDevice(CutOptions{Seed: 5, Blocks: blocks})
			first := d.log.Send(3, VerbWrite, block.Span(0, 1), false)
			op := d.log.Send(7, VerbWrite, block.Span(1, 2), false)
			d.put(0, first)
			d.put(1, op)
			d.put(2, op)
			c.damage(state{d, op, d.bytes[block.Size:][:block.Size]})
			err := d.check()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	d := newCutDevice(CutOptions{Blocks: blocks})
	if err := d.log.Check(bytes.NewReader(d.bytes[:blocks*block.Size-1])); err == nil {
		t.Error("a device that is too short is accepted")
	}
}

// TestCutRestart: after a crash the history begins anew with what is there. What
// was there before cannot come back.
func TestCutRestart(t *testing.T) {
	d := newCutDevice(CutOptions{Seed: 5, Blocks: 3})
	old := d.log.Send(1, VerbWrite, block.Span(0, 2), false)
	lost := d.log.Send(1, VerbWrite, block.Span(2, 1), false)
	d.log.Answer(lost)
	d.put(0, old)
	d.put(1, old)
	if err := d.check(); err != nil {
		t.Fatal(err)
	}
	if err := d.log.Restart(bytes.NewReader(d.bytes)); err != nil {
		t.Fatal(err)
	}
	if err := d.check(); err != nil {
		t.Fatalf("nothing has happened, but %v", err)
	}
	d.put(2, lost)
	if err := d.check(); err == nil {
		t.Error("data lost in the crash before is accepted")
	}
	d.put(2, nil)
	d.put(0, nil)
	if err := d.check(); err == nil {
		t.Error("data that was there in the beginning may be missing")
	}
	next := d.log.Send(2, VerbWrite, block.Span(0, 1), false)
	if next.Number != 2 {
		t.Errorf("number %d was given twice", next.Number)
	}
	d.put(0, next)
	if err := d.check(); err != nil {
		t.Fatal(err)
	}
	d.log.Answer(next)
	flush := d.log.Send(1, VerbFlush, block.Range{}, false)
	d.log.Answer(flush)
	d.put(0, old)
	if err := d.check(); err == nil {
		t.Error("resurrected data is accepted")
	}
}

// TestCutAt: as of a place of the disk's history, what came later has not been.
func TestCutAt(t *testing.T) {
	place := int64(0)
	d := newCutDevice(CutOptions{Blocks: 2, Now: func() int64 { return place }})
	at := func(p int64) { place = p }
	at(10)
	a := d.log.Send(1, VerbWrite, block.Span(0, 1), false)
	at(20)
	d.log.Answer(a)
	f := d.log.Send(1, VerbFlush, block.Range{}, false)
	at(30)
	d.log.Answer(f)
	check := func(at int64, ok bool) {
		t.Helper()
		if err := d.log.CheckAt(bytes.NewReader(d.bytes), at); (err == nil) != ok {
			t.Errorf("at %d: %v", at, err)
		}
	}
	check(29, true) // not flushed yet
	check(30, false)
	d.put(0, a)
	check(30, true)
	check(10, true)
	check(9, false) // not sent yet
}

// TestCutAgainstAllCuts compares the check with a search through all sets of
// requests and all of their orders, in small histories.
func TestCutAgainstAllCuts(t *testing.T) {
	seed := Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	var legal, mixed, unsure int
	for range 3000 * Scale(t) {
		split := rng.IntN(4) == 0
		blocks := 1 + rng.IntN(3)
		d := newCutDevice(CutOptions{Seed: seed, Blocks: blocks, Split: split})
		var open, all []*CutOp
		verbs := []Verb{VerbWrite, VerbWrite, VerbWrite, VerbZeroes, VerbTrim, VerbFlush}
		if rng.IntN(2) == 0 {
			verbs = verbs[:4]
		}
		for range 3 + rng.IntN(4) {
			v := verbs[rng.IntN(len(verbs))]
			start := rng.IntN(blocks)
			o := d.log.Send(rng.IntN(3), v, block.Span(block.Index(start), block.Count(1+rng.IntN(blocks-start))), v != VerbFlush && rng.IntN(8) == 0)
			all, open = append(all, o), append(open, o)
			for len(open) > 0 && rng.IntN(2) == 0 {
				i := rng.IntN(len(open))
				d.log.Answer(open[i])
				open = slices.Delete(open, i, i+1)
			}
		}
		if split {
			all = splitOps(all)
		}
		states := allCuts(all, blocks)
		if len(states) == 0 {
			t.Fatalf("seed %d: no state is legal", seed)
		}
		for range 8 {
			holds := make([]*CutOp, blocks)
			key := ""
			for b := range holds {
				for {
					o := all[rng.IntN(len(all))]
					if rng.IntN(4) == 0 {
						o = nil
					}
					if o == nil || o.Range.Contains(block.Index(b)) {
						holds[b] = o
						break
					}
				}
				key += cutKey(holds[b])
				d.put(b, holds[b])
			}
			err := d.check()
			switch {
			case states[key] && err != nil:
				t.Fatalf("seed %d: a legal state is refused: %v\n%s", seed, err, d.log.Dump(bytes.NewReader(d.bytes), never))
			case states[key]:
				legal++
			case err != nil:
				mixed++
			case slices.ContainsFunc(holds, func(o *CutOp) bool { return o == nil || o.Verb != VerbWrite }):
				unsure++
			default:
				t.Fatalf("seed %d: a mixed state is accepted\n%s", seed, d.log.Dump(bytes.NewReader(d.bytes), never))
			}
		}
	}
	t.Logf("%d legal and %d mixed states; %d accepted since several requests could have zeroed a block", legal, mixed, unsure)
	if legal < mixed/20 || mixed < legal/20 || unsure > mixed/100 {
		t.Error("too few of one kind")
	}
}

func cutKey(o *CutOp) string {
	if o == nil || o.Verb != VerbWrite {
		return "- "
	}
	return fmt.Sprint(o.Number, " ")
}

// splitOps makes a request of each block.
func splitOps(ops []*CutOp) (all []*CutOp) {
	for _, o := range ops {
		if o.Verb == VerbFlush {
			all = append(all, o)
		}
		for b := o.Range.Start; b < o.Range.End; b++ {
			one := *o
			one.Range = block.Span(b, 1)
			all = append(all, &one)
		}
	}
	return all
}

// allCuts are the states that the rules of CutLog allow: it walks all orders of
// all sets, one request at a time.
func allCuts(ops []*CutOp, blocks int) map[string]bool {
	states := map[string]bool{}
	seen := map[string]bool{}
	flushed := int64(0)
	for _, o := range ops {
		if o.Verb == VerbFlush && o.answered != never {
			flushed = max(flushed, o.sent)
		}
	}
	holds := make([]*CutOp, blocks)
	var walk func(done uint)
	walk = func(done uint) {
		key := ""
		for _, o := range holds {
			key += cutKey(o)
		}
		if at := fmt.Sprint(done, key); seen[at] {
			return
		} else {
			seen[at] = true
		}
		complete := true
		for i, o := range ops {
			if done>>i&1 == 0 && o.Verb != VerbFlush && (o.answered < flushed || o.FUA && o.answered != never) {
				complete = false
			}
		}
		if complete {
			states[key] = true
		}
	next:
		for i, o := range ops {
			if done>>i&1 != 0 || o.Verb == VerbFlush {
				continue
			}
			for j, p := range ops {
				if done>>j&1 == 0 && p.Verb != VerbFlush && p.answered < o.sent {
					continue next // p must come first
				}
			}
			was := slices.Clone(holds)
			for b := o.Range.Start; b < o.Range.End; b++ {
				holds[b] = o
			}
			walk(done | 1<<i)
			copy(holds, was)
		}
	}
	walk(0)
	return states
}

// TestCutOfLargeHistory: 100,000 requests of 16 clients on 64 MiB. The state at a
// moment is accepted; with one block of an older time, or of a later one, it is not.
func TestCutOfLargeHistory(t *testing.T) {
	seed := Seed(t)
	rng := rand.New(rand.NewPCG(seed, 0))
	const blocks, ops, clients = 16384, 100_000, 16
	d := newCutDevice(CutOptions{Seed: seed, Blocks: blocks})
	type version struct{ now, before *CutOp }
	state := make([]version, blocks)
	var left []version // the state at the moment of the cut
	var running [clients]struct {
		op   *CutOp
		done bool // it has taken effect
	}
	cut := ops - 200
	for sent := 0; sent < ops; {
		c := rng.IntN(clients)
		k := &running[c]
		switch {
		case k.op == nil:
			v := []Verb{VerbWrite, VerbWrite, VerbWrite, VerbWrite, VerbWrite, VerbWrite, VerbTrim, VerbZeroes, VerbFlush}[rng.IntN(9)]
			n := 1 + rng.IntN(1+rng.IntN(64))
			if v == VerbTrim && rng.IntN(100) == 0 {
				n = 1 + rng.IntN(blocks)
			}
			start := rng.IntN(blocks - n + 1)
			if rng.IntN(2) == 0 {
				start %= min(256, blocks-n+1)
			}
			if v == VerbFlush && sent > cut-50 {
				continue
			}
			k.op, k.done = d.log.Send(c, v, block.Span(block.Index(start), block.Count(n)), false), false
			if sent++; sent == cut {
				left = slices.Clone(state)
			}
		case !k.done:
			for b := k.op.Range.Start; b < k.op.Range.End; b++ {
				state[b] = version{k.op, state[b].now}
			}
			k.done = true
		default:
			if rng.IntN(8) > 0 || k.op.Verb != VerbFlush {
				d.log.Answer(k.op)
			}
			k.op = nil
		}
	}
	for b, v := range left {
		d.put(b, v.now)
	}
	check := func(what string, ok bool) {
		t.Helper()
		start := time.Now()
		err := d.check()
		t.Logf("%s: %v, %.200v", what, time.Since(start), err)
		if (err == nil) != ok {
			t.Errorf("seed %d, %s: %v", seed, what, err)
		}
	}
	check("as it was", true)
	newest := int64(0)
	for _, v := range left {
		if v.now != nil && v.now.Verb == VerbWrite {
			newest = max(newest, v.now.sent)
		}
	}
	older, later := 0, 0
	for b, v := range left {
		before, after := v.before, state[b].now
		write := func(o *CutOp) bool { return o != nil && o.Verb == VerbWrite }
		if older == 0 && write(v.now) && write(before) && before.answered < v.now.sent && v.now.answered < newest {
			older++
			d.put(b, before)
			check("one block older", false)
			d.put(b, v.now)
		}
		// Something that came after an answered request which is not there.
		if later == 0 && after != v.now && write(after) {
			missing := false
			for b, w := range left {
				missing = missing || state[b].now != w.now && state[b].now.answered < after.sent
			}
			if missing {
				later++
				d.put(b, after)
				check("one block later", false)
				d.put(b, v.now)
			}
		}
	}
	if older+later < 2 {
		t.Error("nothing to mix in was found")
	}
}
