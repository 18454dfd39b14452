package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cnbd/config"
)

// A server may serve the host that it runs on. When memory is short there, the
// kernel writes dirty pages of the mounted device to get some, and waits for the
// server: which must not wait, in turn, for memory that only that writing can give.
// What is here keeps it from that.

// becomeFlusher makes all threads of the process IO flushers, PR_SET_IO_FLUSHER: the
// kernel does not start I/O to find memory for them, and does not slow their writes
// down for what others have dirtied. That is set for one thread at a time, which its
// children and what it executes inherit; the runtime has several threads already, so
// the program is executed again from one for which it is set. becomeFlusher returns nil if
// that has happened, and an error if it is not possible.
//
// REQUIRES: nothing is open yet but what the process has inherited.
func becomeFlusher() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	set, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	if err == nil && set == 1 {
		// By what it was executed as, ps and pgrep would call it "exe". It is a name only.
		_ = os.WriteFile("/proc/self/comm", []byte(filepath.Base(os.Args[0])), 0)
		return nil
	}
	if err == nil {
		err = unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	}
	switch {
	case errors.Is(err, unix.EPERM):
		return errors.New("it takes CAP_SYS_RESOURCE")
	case errors.Is(err, unix.EINVAL):
		return errors.New("it takes Linux 5.6")
	case err != nil:
		return os.NewSyscallError("prctl", err)
	}
	err = os.NewSyscallError("execve", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
	// One thread alone is no use, and other goroutines will run on it.
	return errors.Join(err, unix.Prctl(unix.PR_SET_IO_FLUSHER, 0, 0, 0, 0))
}

// lockMemory keeps the memory of the process from being swapped out, to the very
// device that it serves perhaps. Only what is in use is locked, from when it is first
// touched: an idle server keeps a small part of what it has mapped.
func lockMemory() error {
	// A limit would not be met now but by a later mapping, and end the program.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	if limit.Cur != unix.RLIM_INFINITY && !capable(unix.CAP_IPC_LOCK) {
		return errors.New("it takes CAP_IPC_LOCK, or no limit on locked memory")
	}
	return os.NewSyscallError("mlockall", unix.Mlockall(unix.MCL_CURRENT|unix.MCL_FUTURE|unix.MCL_ONFAULT))
}

// capable tells whether the process has a capability, in effect.
func capable(capability uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[capability/32].Effective>>(capability%32)&1 == 1
}

// lowerOOMScore makes the process a later choice of the OOM killer, unless it is
// one already.
func lowerOOMScore(adjust int) error {
	const path = "/proc/self/oom_score_adj"
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(b))); err != nil || now <= adjust {
		return err
	}
	err = os.WriteFile(path, []byte(strconv.Itoa(adjust)), 0)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return errors.New("it takes CAP_SYS_RESOURCE")
	}
	return err
}

// protect does what c asks for to be safe on the host of a mounted device, but for
// becoming an IO flusher, which has ended with flusher. It returns what is not
// possible.
func protect(c *config.Config, flusher error) (errs []error) {
	try := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	try("io-flusher", flusher)
	if c.LockMemory {
		try("lock-memory", lockMemory())
	}
	if c.OOMScoreAdjust < 0 {
		try("oom-score-adjust", lowerOOMScore(c.OOMScoreAdjust))
	}
	return errs
}
