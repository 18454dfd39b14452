package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// stream writes events, one a line, to a file NAME.json.
func stream(t *testing.T, name, lines string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".json")
	if err := os.WriteFile(path, []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const passing = `{"Action":"start","Package":"m/a"}
{"Action":"run","Package":"m/a","Test":"TestOne"}
{"Action":"output","Package":"m/a","Test":"TestOne","Output":"=== RUN   TestOne\n"}
{"Action":"output","Package":"m/a","Test":"TestOne","Output":"--- PASS: TestOne (0.00s)\n"}
{"Action":"pass","Package":"m/a","Test":"TestOne","Elapsed":0}
{"Action":"run","Package":"m/a","Test":"TestTwo"}
{"Action":"run","Package":"m/a","Test":"TestTwo/x"}
{"Action":"run","Package":"m/a","Test":"TestTwo/y"}
{"Action":"pass","Package":"m/a","Test":"TestTwo/x"}
{"Action":"pass","Package":"m/a","Test":"TestTwo/y"}
{"Action":"pass","Package":"m/a","Test":"TestTwo"}
{"Action":"pass","Package":"m/a","Elapsed":1.25}
{"Action":"skip","Package":"m/none"}
`

const skipping = `{"Action":"run","Package":"m/a","Test":"TestTool"}
{"Action":"output","Package":"m/a","Test":"TestTool","Output":"=== RUN   TestTool\n"}
{"Action":"output","Package":"m/a","Test":"TestTool","Output":"seed 7\n"}
{"Action":"output","Package":"m/a","Test":"TestTool","Output":"    a_test.go:12: MISSING TOOL: nbdinfo\n"}
{"Action":"output","Package":"m/a","Test":"TestTool","Output":"--- SKIP: TestTool (0.00s)\n"}
{"Action":"skip","Package":"m/a","Test":"TestTool"}
`

const skippingOther = `{"Action":"run","Package":"m/a","Test":"TestKernel"}
{"Action":"output","Package":"m/a","Test":"TestKernel","Output":"    a_test.go:13: no /dev/nbd0\n"}
{"Action":"skip","Package":"m/a","Test":"TestKernel"}
{"Action":"run","Package":"m/a","Test":"TestSilent"}
{"Action":"skip","Package":"m/a","Test":"TestSilent"}
`

const failing = `{"Action":"run","Package":"m/b","Test":"TestBad"}
{"Action":"run","Package":"m/b","Test":"TestBad/x"}
{"Action":"output","Package":"m/b","Test":"TestBad/x","Output":"    b_test.go:3: wrong\n"}
{"Action":"fail","Package":"m/b","Test":"TestBad/x"}
{"Action":"fail","Package":"m/b","Test":"TestBad"}
{"Action":"fail","Package":"m/b","Elapsed":0.5}
`

const dying = `{"Action":"run","Package":"m/c","Test":"TestDies"}
{"Action":"output","Package":"m/c","Output":"panic: oops\n"}
{"Action":"fail","Package":"m/c","Elapsed":0.5}
`

const unbuildable = `{"ImportPath":"m/d","Action":"build-output","Output":"d.go:1: oops\n"}
{"ImportPath":"m/d","Action":"build-fail"}
{"Action":"start","Package":"m/d"}
{"Action":"fail","Package":"m/d","Elapsed":0,"FailedBuild":"m/d"}
`

func TestTotal(t *testing.T) {
	for name, tc := range map[string]struct {
		streams string
		ci      bool
		fails   bool
		want    []string // parts of the output
		last    string
	}{
		"pass":       {passing, true, false, nil, "3 passed, 0 failed, 0 skipped"},
		"tool":       {passing + skipping, false, false, []string{"Skipped:\n  m/a TestTool (plain): MISSING TOOL: nbdinfo\n"}, "3 passed, 0 failed, 1 skipped"},
		"tool in CI": {passing + skipping, true, true, []string{"FAILED: 1 skipped for a missing tool"}, "3 passed, 0 failed, 1 skipped"},
		"other skips in CI": {passing + skippingOther, true, false, []string{"  m/a TestKernel (plain): no /dev/nbd0\n",
			"  m/a TestSilent (plain): no reason given\n"}, "3 passed, 0 failed, 2 skipped"},
		"fail":     {passing + failing, false, true, []string{"Failed:\n  m/b TestBad/x (plain)\n", "FAILED: tests failed"}, "3 passed, 1 failed, 0 skipped"},
		"death":    {passing + dying, false, true, []string{"  m/c TestDies (plain)\n"}, "3 passed, 1 failed, 0 skipped"},
		"no build": {passing + unbuildable, false, true, []string{"  m/d (plain)\n"}, "3 passed, 1 failed, 0 skipped"},
		"nothing":  {"", false, true, []string{"FAILED: no test ran"}, "0 passed, 0 failed, 0 skipped"},
		"noise":    {"go: downloading x\n" + passing, false, false, nil, "3 passed, 0 failed, 0 skipped"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			err := run([]string{"total", stream(t, "plain", tc.streams)}, nil, &out, tc.ci)
			if (err != nil) != tc.fails {
				t.Errorf("error %v, want one: %v", err, tc.fails)
			}
			for _, w := range tc.want {
				if !strings.Contains(out.String(), w) {
					t.Errorf("no %q in\n%s", w, out.String())
				}
			}
			lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			if last := lines[len(lines)-1]; last != tc.last {
				t.Errorf("last line %q, want %q", last, tc.last)
			}
		})
	}
}

func TestTotalOfStages(t *testing.T) {
	var out strings.Builder
	plain, race := stream(t, "plain", passing+skipping), stream(t, "race", passing+skipping+failing)
	if err := run([]string{"total", plain, race}, nil, &out, false); err == nil {
		t.Error("no error")
	}
	for _, want := range []string{"  m/a TestTool (plain, race): MISSING TOOL: nbdinfo\n", "  m/b TestBad/x (race)\n", "\n6 passed, 1 failed, 2 skipped\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if err := run([]string{"total", filepath.Join(t.TempDir(), "none.json")}, nil, &out, false); err == nil {
		t.Error("a missing file is no error")
	}
}

func TestAdd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "checks.json")
	for _, args := range [][]string{{"pass", "vet"}, {"fail", "gofmt"}, {"skip", "race", "MISSING TOOL: gcc"}} {
		if err := run(append([]string{"add", path}, args...), nil, nil, true); err != nil {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	err := run([]string{"total", path}, nil, &out, false)
	const want = "\nSkipped:\n  cnbd race (checks): MISSING TOOL: gcc\n\nFailed:\n  cnbd gofmt (checks)\n\n" +
		"FAILED: tests failed\n\n1 passed, 1 failed, 1 skipped\n"
	if err == nil || out.String() != want {
		t.Errorf("error %v, output\n%swant\n%s", err, out.String(), want)
	}
}

func TestWatch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plain.json")
	in := "go: noise\n" + passing + failing + unbuildable
	var out strings.Builder
	if err := run([]string{"watch", path}, strings.NewReader(in), &out, false); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != in {
		t.Errorf("the copy differs: %v", err)
	}
	const want = "go: noise\npass m/a 1.2s\nskip m/none 0.0s\n    b_test.go:3: wrong\nfail m/b 0.5s\nd.go:1: oops\nfail m/d 0.0s\n"
	if out.String() != want {
		t.Errorf("shows\n%swant\n%s", out.String(), want)
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"watch"}, {"total"}, {"add", "f", "pass"}, {"other", "f"}} {
		if err := run(args, nil, nil, false); err == nil || !strings.Contains(err.Error(), "usage") {
			t.Errorf("%q: %v", args, err)
		}
	}
}
