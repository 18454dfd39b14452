//go:build !race && !invariants

package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cnbd/internal/disktest"
)

const (
	fioJobs = 2         // connections, each with a range of its own
	fioSize = 128 << 20 // bytes of each range
)

// TestFio has fio write at random through two connections, flush now and then,
// and verify what it reads, while it writes and after restarts. The cache is
// much smaller than the ranges, so that most reads are of the store.
func TestFio(t *testing.T) {
	fio := tool(t, "fio")
	rng := rand.New(rand.NewPCG(disktest.Seed(t), 0))
	path := filepath.Join(t.TempDir(), "store")
	s := serve(t, "--size", fmt.Sprint(fioJobs*fioSize), "--cache", "32MiB",
		// What is overwritten at random is freed by whole segments, and no cleaner
		// empties them: there must be room for all that is written. It takes no
		// space by itself.
		"--capacity", "64GiB", path)

	// run is one run of fio, and what it did.
	run := func(args ...string) (r fioResult) {
		t.Helper()
		args = append([]string{
			"--name=t", "--ioengine=nbd", "--uri=" + s.uri, "--iodepth=32",
			fmt.Sprintf("--numjobs=%d", fioJobs), fmt.Sprintf("--size=%d", fioSize), fmt.Sprintf("--offset_increment=%d", fioSize),
			"--verify_fatal=1", "--verify_state_save=0", "--buffer_compress_percentage=50", "--buffer_compress_chunk=4k",
			fmt.Sprintf("--randseed=%d", rng.Uint64()>>1), "--group_reporting",
		}, args...)
		r = fioReport(t, 2*time.Minute, fio, args...)
		if len(r.Jobs) != 1 {
			t.Fatalf("fio reports %d jobs", len(r.Jobs))
		}
		return r
	}
	const all = fioJobs * fioSize
	// Each block is written once or read once, in sizes up to 1 MiB, and what was
	// written is read again when all is done.
	mixed := func(least string) {
		t.Helper()
		j := run("--rw=randrw", "--bsrange="+least+"-1m", "--verify=crc32c", "--verify_interval="+least, "--fsync=32").Jobs[0]
		if j.Write.Bytes < all/4 || j.Read.Bytes < all*9/10 || j.Sync.Count == 0 {
			t.Errorf("fio wrote %d bytes of %d, with %d flushes, and read %d: it has not verified what it wrote", j.Write.Bytes, all, j.Sync.Count, j.Read.Bytes)
		}
	}
	// A block of an earlier round has a header of the other kind.
	fill := func(verify, sync string) {
		t.Helper()
		if j := run("--rw=randwrite", "--bsrange=512-1m", "--verify="+verify, "--verify_interval=512", "--do_verify=0", sync).Jobs[0]; j.Write.Bytes != all {
			t.Errorf("fio wrote %d bytes of %d", j.Write.Bytes, all)
		}
	}
	verify := func(kind string) {
		t.Helper()
		if j := run("--rw=read", "--bs=256k", "--verify="+kind, "--verify_interval=512").Jobs[0]; j.Read.Bytes != all {
			t.Errorf("fio read %d bytes of %d", j.Read.Bytes, all)
		}
	}
	for range 2 * disktest.Scale(t) {
		mixed("4k")
		mixed("512")
		if r := infoOf(t, path).Reads; r.ReadModifyWrites == 0 || r.Decodes == 0 {
			t.Errorf("no block was written in part, or none read from the store: %+v", r)
		}
		fill("crc64", "--fsync=32")
		s.stop(t)
		s = serve(t, "--cache", "32MiB", path)
		verify("crc64")
		// With fsync as well, fio may have no flush behind its last writes.
		fill("crc32c", "--end_fsync=1")
		s.kill()
		s = serve(t, "--cache", "32MiB", path)
		verify("crc32c")
	}
	s.stop(t)
	do(t, binary, "check", "--data", path)
}

// fioResult is what is looked at of the report of fio.
type fioResult struct {
	Jobs []struct {
		Error int     `json:"error"`
		Read  fioSide `json:"read"`
		Write fioSide `json:"write"`
		Sync  struct {
			Count int64 `json:"total_ios"`
		} `json:"sync"`
	} `json:"jobs"`
}

// A fioSide is the reads of a job, or its writes.
type fioSide struct {
	Bytes   int64 `json:"io_bytes"`
	Count   int64 `json:"total_ios"`
	Latency struct {
		Percentile map[string]int64 `json:"percentile"`
	} `json:"clat_ns"` // from submission to completion
}

// p99 is the time that all but a hundredth of the requests took at most.
func (s *fioSide) p99() time.Duration { return time.Duration(s.Latency.Percentile["99.000000"]) }

// fioReport is the report of fio with args, which must succeed within limit.
func fioReport(t *testing.T, limit time.Duration, fio string, args ...string) (r fioResult) {
	t.Helper()
	out := doFor(t, limit, fio, append(args, "--output-format=json")...)
	// Notes of fio may precede the report.
	if i := strings.Index(out, "{"); i < 0 {
		t.Fatalf("fio reports nothing: %q", out)
	} else if err := json.Unmarshal([]byte(out[i:]), &r); err != nil {
		t.Fatalf("%v in the report of fio: %s", err, out)
	}
	for _, j := range r.Jobs {
		if j.Error != 0 {
			t.Fatalf("report of fio: %s", out)
		}
	}
	return r
}
