// Testsummary reads the event streams of go test -json.
//
//	testsummary watch FILE < events
//
// copies the events to FILE, and shows a line for each package and what failing
// tests print.
//
//	testsummary add FILE pass|fail|skip NAME [REASON]
//
// appends the result of a check that is no Go test to FILE.
//
//	testsummary total FILE...
//
// lists failed and skipped tests by name and reason, and counts. Each FILE is a
// stage of the run, named by its file name.
//
// The last line of total is "N passed, N failed, N skipped". A test with
// subtests is not counted, only they are; a package that fails without a failed
// test (it does not build, or its process dies) counts as one failed test.
//
// Exit status of total: 0, or 1 if a test failed, if none ran, or if the
// environment has CI=true and a test was skipped for a missing tool, which its
// reason tells by beginning with "MISSING TOOL:".
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// missingTool begins the reason of a skip that an installed tool would cure.
const missingTool = "MISSING TOOL:"

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout, os.Getenv("CI") == "true"); err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer, ci bool) error {
	switch {
	case len(args) == 2 && args[0] == "watch":
		f, err := os.Create(args[1])
		if err != nil {
			return err
		}
		return errors.Join(watch(io.TeeReader(in, f), out), f.Close())
	case len(args) >= 4 && args[0] == "add":
		return add(args[1], args[2], args[3], strings.Join(args[4:], " "))
	case len(args) >= 2 && args[0] == "total":
		return total(args[1:], out, ci)
	}
	return errors.New("usage: testsummary watch FILE | add FILE pass|fail|skip NAME [REASON] | total FILE [FILE...]")
}

// An event is one line of test2json; see go doc test2json.
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// events calls f for each event of r. Lines that are none, such as those that
// the go command itself prints, go to other.
func events(r io.Reader, f func(event), other func(line string)) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 16<<20)
	for s.Scan() {
		var e event
		if json.Unmarshal(s.Bytes(), &e) == nil && e.Action != "" {
			f(e)
		} else {
			other(s.Text())
		}
	}
	return s.Err()
}

// An id names a test in a stage; of a package itself, if test is empty.
type id struct{ pkg, test string }

// watch shows the progress of a run.
func watch(r io.Reader, w io.Writer) error {
	output := map[id]*strings.Builder{}
	return events(r, func(e event) {
		key := id{e.Package, e.Test}
		switch e.Action {
		case "output":
			if output[key] == nil {
				output[key] = &strings.Builder{}
			}
			output[key].WriteString(e.Output)
		case "build-output":
			fmt.Fprint(w, e.Output)
		case "fail":
			if o := output[key]; o != nil {
				fmt.Fprint(w, o)
			}
			fallthrough
		case "pass", "skip":
			delete(output, key)
			if e.Test == "" {
				fmt.Fprintf(w, "%-4s %s %.1fs\n", e.Action, e.Package, e.Elapsed)
			}
		}
	}, func(line string) { fmt.Fprintln(w, line) })
}

// add appends the events of one result to the file path.
func add(path, action, name, reason string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	enc := json.NewEncoder(f)
	return errors.Join(
		enc.Encode(event{Action: "output", Package: "cnbd", Test: name, Output: reason + "\n"}),
		enc.Encode(event{Action: action, Package: "cnbd", Test: name}),
		f.Close())
}

// A result is how one test ended: pass, fail or skip.
type result struct {
	id
	action string
	reason string // of a skip
}

// results are the results of the tests in a stream, and of packages that failed
// without one, in the order of their ends. A test that never ended, because its
// process died, has failed.
func results(r io.Reader) ([]result, error) {
	var all []result
	open := map[id]bool{}        // begun, not ended
	parents := map[id]bool{}     // have subtests
	failed := map[string]bool{}  // packages with a failed test
	reasons := map[id][]string{} // what a test printed
	end := func(key id, action string) {
		delete(open, key)
		failed[key.pkg] = failed[key.pkg] || action == "fail"
		all = append(all, result{key, action, reason(reasons[key])})
		delete(reasons, key)
	}
	err := events(r, func(e event) {
		key := id{e.Package, e.Test}
		switch {
		case e.Test != "" && e.Action == "run":
			open[key] = true
			if i := strings.LastIndexByte(e.Test, '/'); i >= 0 {
				parents[id{e.Package, e.Test[:i]}] = true
			}
		case e.Test != "" && e.Action == "output":
			reasons[key] = append(reasons[key], e.Output)
		case e.Test != "" && (e.Action == "pass" || e.Action == "fail" || e.Action == "skip"):
			end(key, e.Action)
		case e.Test == "" && e.Action == "fail":
			for key := range open {
				if key.pkg == e.Package {
					end(key, "fail")
				}
			}
			if !failed[e.Package] {
				all = append(all, result{key, "fail", ""})
			}
		}
	}, func(string) {})
	all = slices.DeleteFunc(all, func(r result) bool { return parents[r.id] })
	return all, err
}

// atLine is what testing puts before a message.
var atLine = regexp.MustCompile(`^\s*\S+\.go:\d+: `)

// reason is the message of a skipped test among what it printed: that of a
// missing tool, else the last.
func reason(printed []string) string {
	why := ""
	for _, p := range printed {
		p = strings.TrimSpace(atLine.ReplaceAllString(p, ""))
		if p == "" || strings.HasPrefix(p, "===") || strings.HasPrefix(p, "--- ") {
			continue
		}
		why = p
		if strings.HasPrefix(p, missingTool) {
			break
		}
	}
	return why
}

// total prints what failed and what was skipped in all files, and the counts.
func total(files []string, w io.Writer, ci bool) error {
	count := map[string]int{}
	type line struct{ name, reason string }
	stages := map[string]map[line][]string{"fail": {}, "skip": {}}
	missing := 0
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		rs, err := results(f)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		stage := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
		for _, r := range rs {
			count[r.action]++
			if lines := stages[r.action]; lines != nil {
				l := line{strings.TrimSpace(r.pkg + " " + r.test), ""}
				if r.action == "skip" {
					l.reason = ": " + cmp.Or(r.reason, "no reason given")
				}
				lines[l] = append(lines[l], stage)
			}
			if r.action == "skip" && strings.HasPrefix(r.reason, missingTool) {
				missing++
			}
		}
	}
	for _, action := range []string{"skip", "fail"} {
		var lines []string
		for l, in := range stages[action] {
			lines = append(lines, fmt.Sprintf("  %s (%s)%s", l.name, strings.Join(in, ", "), l.reason))
		}
		slices.Sort(lines)
		if len(lines) > 0 {
			fmt.Fprintf(w, "\n%s:\n%s\n", map[string]string{"skip": "Skipped", "fail": "Failed"}[action], strings.Join(lines, "\n"))
		}
	}

	var err error
	switch {
	case count["fail"] > 0:
		err = errors.New("tests failed")
	case count["pass"] == 0:
		err = errors.New("no test ran")
	case missing > 0 && ci:
		err = fmt.Errorf("%d skipped for a missing tool, which CI must have", missing)
	}
	if err != nil {
		fmt.Fprintf(w, "\nFAILED: %v\n", err)
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", count["pass"], count["fail"], count["skip"])
	return err
}
