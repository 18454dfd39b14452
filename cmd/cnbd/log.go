package main

import (
	"io"
	"os"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"cnbd/config"
)

// newLogger writes to w as c says.
func newLogger(c *config.Config, w io.Writer) zerolog.Logger {
	if c.LogFormat == config.LogConsole || c.LogFormat == config.LogAuto && isTerminal(w) {
		w = zerolog.ConsoleWriter{Out: w, TimeFormat: time.DateTime, NoColor: !isTerminal(w)}
	}
	setLogLevel(c)
	zerolog.TimeFieldFormat = time.RFC3339Nano
	return zerolog.New(w).With().Timestamp().Logger()
}

// setLogLevel applies c to the loggers there are. The level is one for the
// program, since loggers that were handed on are copies and keep theirs.
func setLogLevel(c *config.Config) {
	level, err := zerolog.ParseLevel(c.LogLevel)
	if err != nil { // the configuration allows no other than zerolog's
		level = zerolog.InfoLevel
	}
	zerolog.SetGlobalLevel(level)
}

// isTerminal tells whether w is a terminal, as isatty(3) does.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
