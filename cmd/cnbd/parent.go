package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// parentExit returns a channel that is closed when the process that has started
// this one ends. The signal of PR_SET_PDEATHSIG would come when the thread that has
// done it ends, which for many programs is long before.
func parentExit() (<-chan struct{}, error) {
	parent := os.Getppid()
	fd, err := unix.PidfdOpen(parent, 0)
	if err != nil && err != unix.ESRCH {
		return nil, fmt.Errorf("exit-with-parent: process %d: %w", parent, os.NewSyscallError("pidfd_open", err))
	}
	ended := make(chan struct{})
	if err != nil || os.Getppid() != parent {
		close(ended) // just now
		return ended, nil
	}
	go func() {
		defer close(ended)
		for {
			// Readable means that the process has ended.
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				return
			}
		}
	}()
	return ended, nil
}
