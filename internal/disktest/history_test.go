package disktest

import (
	"bytes"
	"compress/flate"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"cnbd/internal/block"
)

// The model against a byte slice, through a history.
func TestModel(t *testing.T) {
	seed := Seed(t)
	const size = 256<<10 + 4096*3
	h := NewHistory(seed, HistoryOptions{Size: size, RequestMax: 32 << 10})
	m := NewModel(size)
	want := make([]byte, size)
	states := [][]byte{bytes.Clone(want)}
	for i := range 300 * Scale(t) {
		r := h.Next()
		m.Do(r)
		switch r.Verb {
		case VerbWrite:
			copy(want[r.Off:], r.Payload(nil))
		case VerbZeroes:
			clear(want[r.Off : r.Off+r.Len])
		case VerbTrim:
			lo, hi := (r.Off+block.Size-1)/block.Size*block.Size, (r.Off+r.Len)/block.Size*block.Size
			if lo < hi {
				clear(want[lo:hi])
			}
		case VerbFlush:
			if n := m.Commit(); n != len(states) {
				t.Fatalf("commit point %d, want %d", n, len(states))
			}
			states = append(states, bytes.Clone(want))
		}
		if i%32 == 0 {
			if err := m.Check(bytes.NewReader(want)); err != nil {
				t.Fatalf("after %s: %v", r, err)
			}
		}
	}
	if len(states) < 5 {
		t.Fatalf("only %d commit points", len(states))
	}
	for n, s := range states {
		if err := m.CheckCommit(bytes.NewReader(s), n); err != nil {
			t.Fatal(err)
		}
		got, err := m.Find(bytes.NewReader(s), 0)
		if err != nil || !bytes.Equal(states[got], s) || got < n {
			t.Fatalf("state %d is found as %d, %v", n, got, err)
		}
	}
	// Two states mixed are the state of no commit.
	mixed := bytes.Clone(states[len(states)-1])
	copy(mixed, states[1][:size/2])
	mixed[0]++
	if n, err := m.Find(bytes.NewReader(mixed), 0); err == nil {
		t.Fatalf("a mixed state is found as %d", n)
	}
	if _, err := m.Find(bytes.NewReader(states[0]), len(states)-1); err == nil {
		t.Fatal("a state older than asked for is found")
	}
	m.Revert(2)
	if err := m.Check(bytes.NewReader(states[2])); err != nil {
		t.Fatal(err)
	}
	if n := m.Commit(); n != 3 {
		t.Fatalf("commit point %d after going back to 2", n)
	}
}

func TestModelTellsTheDifference(t *testing.T) {
	m := NewModel(1 << 20)
	r := Request{Seq: 7, Verb: VerbWrite, Off: 8192, Len: 4096}
	m.Do(r)
	dev := make([]byte, 1<<20)
	err := m.Check(bytes.NewReader(dev))
	var d *Difference
	if !errors.As(err, &d) || d.Off != 8192 || !strings.Contains(err.Error(), "written by #7") {
		t.Fatal(err)
	}
	copy(dev[8192:], r.Payload(nil))
	if err := m.Check(bytes.NewReader(dev)); err != nil {
		t.Fatal(err)
	}
	dev[1<<20-1] = 1
	if err := m.Check(bytes.NewReader(dev)); !errors.As(err, &d) {
		t.Fatal(err)
	}
	if err := m.CheckRange(bytes.NewReader(dev), 4096, 8192); err != nil {
		t.Fatal(err)
	}
	if err := m.Check(bytes.NewReader(dev[:1000])); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func TestHistory(t *testing.T) {
	seed := Seed(t)
	large, largest := 0, 0 // requests, of all histories: they are rare
	for _, o := range []HistoryOptions{
		{Size: 1 << 20},
		{Size: 16 << 40, RequestMax: 32 << 20},
		{Size: 10 << 20, Align: 512},
		{Size: 10 << 20, RequestMax: 1 << 20, UsualMax: 16 << 10},
		{Size: 10<<20 + 4096, Align: 4096, RequestMax: 64 << 10},
		{Size: 1000},
		{Size: 4096, Align: 4096},
	} {
		a, b := NewHistory(seed, o), NewHistory(seed, o)
		align, maxLen := max(o.Align, 1), o.RequestMax
		if maxLen == 0 {
			maxLen = 128 << 10
		}
		verbs, kinds, seen := map[Verb]int{}, map[Content]int{}, map[string]int{}
		tail := int64(-1)
		for i := range uint64(3000) {
			r := a.Next()
			if r != b.Next() {
				t.Fatalf("%+v: two histories differ at %s", o, r)
			}
			verbs[r.Verb]++
			if r.Seq != i {
				t.Fatalf("%s is number %d", r, i)
			}
			if r.Verb == VerbFlush {
				continue
			}
			if r.Off < 0 || r.Len <= 0 || r.Off+r.Len > o.Size || r.Off%align != 0 || r.Len%align != 0 {
				t.Fatalf("%+v: %s", o, r)
			}
			if r.Len > maxLen {
				if r.Verb == VerbRead || r.Verb == VerbWrite {
					t.Fatalf("%+v: %s", o, r)
				}
				seen["large"]++
			}
			if o.UsualMax > 0 && r.Len > o.UsualMax {
				seen["unusual"]++
			}
			if r.FUA {
				seen["fua "+r.Verb.String()]++
			}
			if r.Off%block.Size != 0 {
				seen["unaligned"]++
			}
			if r.Verb == VerbWrite {
				kinds[r.Content]++
				if r.Off == tail {
					seen["sequential"]++
				}
				tail = r.Off + r.Len
				if r.Len == maxLen {
					seen["largest"]++
				}
			}
		}
		for v := VerbRead; v <= VerbFlush; v++ {
			if verbs[v] < 100 {
				t.Errorf("%+v: %d times %s", o, verbs[v], v)
			}
		}
		for c := range Content(contents) {
			if kinds[c] < 100 {
				t.Errorf("%+v: %d times content %d", o, kinds[c], c)
			}
		}
		if o.Size >= 1<<20 {
			large += seen["large"]
			largest += seen["largest"]
			for _, s := range []string{"fua write", "fua zeroes", "fua trim", "sequential"} {
				if seen[s] == 0 {
					t.Errorf("%+v: no request that is %s", o, s)
				}
			}
			if o.UsualMax > 0 && (seen["unusual"] < 10 || seen["unusual"] > 200) {
				t.Errorf("%+v: %d longer than usual", o, seen["unusual"])
			}
			if align < block.Size && seen["unaligned"] < 300 {
				t.Errorf("%+v: %d unaligned", o, seen["unaligned"])
			}
		}
	}
	if large == 0 || largest == 0 {
		t.Errorf("%d trims and zeroes beyond the limit, %d writes of it", large, largest)
	}
}

func TestPayloads(t *testing.T) {
	const n = 64 << 10
	packed := func(p []byte) int {
		var b bytes.Buffer
		w, _ := flate.NewWriter(&b, flate.BestSpeed)
		w.Write(p)
		w.Close()
		return b.Len()
	}
	for c, limits := range map[Content][2]int{
		Described: {1, n / 2}, Text: {n / 8, n / 2}, Noise: {n, 2 * n}, Zeros: {1, n / 100}, Constant: {1, n / 100}, Mixed: {n / 50, n - n/20},
	} {
		r := Request{Seq: 42, Verb: VerbWrite, Off: 1<<30 + 12345, Len: n, Content: c, seed: 99}
		p := r.Payload(nil)
		if len(p) != n || !bytes.Equal(p, r.Payload(nil)) {
			t.Fatalf("content %d: %d bytes, or not the same twice", c, len(p))
		}
		if got := r.Payload([]byte("ab")); string(got[:2]) != "ab" || !bytes.Equal(got[2:], p) {
			t.Fatalf("content %d: Payload does not append", c)
		}
		if k := packed(p); k < limits[0] || k > limits[1] {
			t.Errorf("content %d packs %d bytes into %d, want %v", c, n, k, limits)
		}
	}
}

func TestDescribe(t *testing.T) {
	rng := rand.New(rand.NewPCG(Seed(t), 0))
	for range 200 {
		r := Request{Seq: rng.Uint64N(1 << 40), Verb: VerbWrite, Off: rng.Int64N(1 << 40), Len: 4096}
		p := r.Payload(nil)
		at := rng.Int64N(4000)
		if got, want := Describe(p[at:], r.Off+at), "written by #"; !strings.HasPrefix(got, want) || strings.Contains(got, " at ") {
			t.Fatalf("%s: %s", r, got)
		}
		if got := Describe(p[at:], r.Off+at+4096); !strings.Contains(got, " at ") {
			t.Fatalf("misplaced bytes of %s: %s", r, got)
		}
	}
}
