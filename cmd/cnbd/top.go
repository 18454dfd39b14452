package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"cnbd/config"
	"cnbd/internal/control"
)

// topWait is how long top waits for an answer, then it says so and goes on.
const topWait = 5 * time.Second

func newTop() *cobra.Command {
	var file string
	var once bool
	interval := time.Second
	cmd := &cobra.Command{
		Use:   "top BACKING... | top --config FILE [EXPORT]...",
		Short: "Watch stores that are served",
		Long: "Show what the clients of served stores do and how long it takes, what is cached and dirty, ratio, space\n" +
			"and cleaner, anew every second; q or Ctrl-C ends it. With a configuration file all exports in it are\n" +
			"shown, or those named. Where they do not fit on the screen each has one line.\n\n" +
			"Throughput and latency are those of the last interval. What concerns the store is up to 10 seconds old,\n" +
			"and its rates are those between the last two times that the server has looked.\n\n" +
			"With --once, or if the output is not a terminal, one interval is shown as text." + exitHelp,
		Example: "  cnbd top disk.cnbd\n" +
			"  cnbd top --config /etc/cnbd.yaml",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if interval < 100*time.Millisecond || interval > time.Hour {
				return usage(fmt.Errorf("--interval: %v is out of range: give 100ms to 1h", interval))
			}
			paths, err := topPaths(file, args)
			if err != nil {
				return err
			}
			t := &topper{interval: interval, out: cmd.OutOrStdout()}
			for _, path := range paths {
				t.stores = append(t.stores, &topStore{path: path})
			}
			ctx, end := interruptible(cmd)
			defer end()
			if once || !isTerminal(t.out) {
				return t.once(ctx)
			}
			return t.live(ctx)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "show the exports in `FILE` (YAML)")
	cmd.Flags().BoolVar(&once, "once", false, "print one interval as text, and end")
	cmd.Flags().DurationVar(&interval, "interval", interval, "time between two looks")
	return cmd
}

// topPaths are the stores that args mean.
func topPaths(file string, args []string) ([]string, error) {
	if file == "" {
		if len(args) == 0 {
			return nil, usage(errors.New("a BACKING is expected, or a configuration file; cnbd top --help tells more"))
		}
		return args, nil
	}
	var paths []string
	if len(args) > 0 {
		for _, name := range args {
			path, err := backingOf(file, name)
			if err != nil {
				return nil, err
			}
			paths = append(paths, path)
		}
		return paths, nil
	}
	c, err := config.Load(file, nil)
	if err != nil {
		return nil, err
	}
	for _, e := range c.Exports {
		paths = append(paths, e.Path)
	}
	return paths, nil
}

// A topper is one run of top.
type topper struct {
	interval time.Duration
	out      io.Writer
	stores   []*topStore
}

// ask asks the servers of all stores. The error is that of the first store if
// none has an answer.
func (t *topper) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, topWait)
	defer cancel()
	var all sync.WaitGroup
	for _, s := range t.stores {
		all.Go(func() {
			st := &liveStatus{}
			err := control.Live(ctx, controlSocket(s.path), st)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
				err = fmt.Errorf("%s is not served", s.path)
				if _, stat := os.Stat(s.path); stat != nil {
					err = stat
				}
			}
			s.add(st, err)
		})
	}
	all.Wait()
	if slices.ContainsFunc(t.stores, func(s *topStore) bool { return s.err == nil }) {
		return nil
	}
	return t.stores[0].err
}

// once prints what happens in one interval.
func (t *topper) once(ctx context.Context) error {
	if err := t.ask(ctx); err != nil {
		return err
	}
	select {
	case <-time.After(t.interval):
	case <-ctx.Done():
		return nil
	}
	if err := t.ask(ctx); err != nil {
		return err
	}
	var errs []error
	for _, s := range t.stores {
		if s.err != nil {
			errs = append(errs, s.err)
		}
	}
	_, err := io.WriteString(t.out, t.screen(0, 0))
	return errors.Join(append(errs, err)...)
}

// live shows a screen every interval, until ctx ends or a key is pressed that
// ends it.
func (t *topper) live(ctx context.Context) error {
	if err := t.ask(ctx); err != nil { // before the screen is taken
		return err
	}
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	defer keys(quit)()
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	// The alternate screen, and no cursor.
	fmt.Fprint(t.out, "\x1b[?1049h\x1b[?25l")
	defer fmt.Fprint(t.out, "\x1b[?25h\x1b[?1049l")
	tick := time.NewTicker(t.interval)
	defer tick.Stop()
	for {
		rows, columns := 24, 80
		if f, ok := t.out.(*os.File); ok {
			if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Row > 0 && ws.Col > 0 {
				rows, columns = int(ws.Row), int(ws.Col)
			}
		}
		if _, err := io.WriteString(t.out, t.screen(rows, columns)); err != nil {
			return err // nobody looks any more
		}
		select {
		case <-resized:
		case <-tick.C:
			if _ = t.ask(ctx); ctx.Err() != nil {
				return nil
			} // else the screen says what is wrong
		case <-ctx.Done():
			return nil
		}
	}
}

// keys has q, and what else usually ends a program, call quit, if standard input is a
// terminal. Undo gives the terminal back as it was.
func keys(quit func()) (undo func()) {
	in := int(os.Stdin.Fd())
	before, err := unix.IoctlGetTermios(in, unix.TCGETS)
	if err != nil {
		return func() {}
	}
	now := *before
	// Every key at once and unseen. Signals are keys too: a stop would leave the
	// screen to the shell.
	now.Lflag &^= unix.ICANON | unix.ECHO | unix.ISIG
	now.Cc[unix.VMIN], now.Cc[unix.VTIME] = 1, 0
	if unix.IoctlSetTermios(in, unix.TCSETS, &now) != nil {
		return func() {}
	}
	go func() { // until the program ends
		b := make([]byte, 1)
		for {
			n, err := os.Stdin.Read(b)
			if err != nil || n == 1 && (b[0] == 'q' || b[0] == 'Q' || b[0] == 0x03 || b[0] == 0x1c) { // Ctrl-C, Ctrl-\
				quit()
				return
			}
		}
	}()
	return func() { _ = unix.IoctlSetTermios(in, unix.TCSETS, before) }
}
