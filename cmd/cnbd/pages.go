//go:build pages

// The man pages are made from the commands by the program itself, built with the
// tag pages; what users run has no code for it.
//
// cobra's own generator goes through Markdown: it leaves out the names of values, and
// sets options as running text.

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func init() { hidden = append(hidden, newPages) }

func newPages() *cobra.Command {
	var date string
	cmd := &cobra.Command{
		Use:    "pages DIR",
		Short:  "Write the man pages of all commands to DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return writePages(cmd.Root(), args[0], date)
		},
	}
	cmd.Flags().StringVar(&date, "date", "", "`DAY` of the version, as 2006-01-02")
	return cmd
}

// writePages writes the page of cmd and those of the commands below it.
func writePages(cmd *cobra.Command, dir, date string) error {
	if err := os.WriteFile(filepath.Join(dir, pageName(cmd)+".1"), []byte(page(cmd, date)), 0o644); err != nil {
		return err
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			if err := writePages(c, dir, date); err != nil {
				return err
			}
		}
	}
	return nil
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// page is the man page of cmd, in the language of man(7).
func page(cmd *cobra.Command, date string) string {
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	line(`.TH "%s" 1 "%s" "cnbd %s" "cnbd"`, strings.ToUpper(pageName(cmd)), date, roff(versionText()))
	line(".SH NAME\n%s \\- %s", roff(pageName(cmd)), roff(cmd.Short))

	line(".SH SYNOPSIS")
	if cmd.HasAvailableSubCommands() {
		line(".B %s COMMAND [flags]", cmd.Name())
	} else {
		// A command that is used in several ways has them in one line.
		for i, use := range strings.Split(cmd.UseLine(), " | ") {
			if i > 0 {
				use = cmd.Parent().CommandPath() + " " + use
				line(".br")
			}
			line(".B %s", roff(use))
		}
	}

	line(".SH DESCRIPTION")
	text, exit := cmd.Long, strings.HasSuffix(cmd.Long, exitHelp)
	if text == "" {
		text = cmd.Short + "."
	}
	prose(&b, strings.TrimSuffix(text, exitHelp))

	cmd.InitDefaultHelpFlag()
	cmd.InitDefaultVersionFlag()
	if cmd.HasAvailableSubCommands() {
		line(".SH COMMANDS")
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() {
				line(".TP\n.B %s\n%s.", roff(c.Name()), roff(c.Short))
			}
		}
	}
	line(".SH OPTIONS")
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) { line("%s", option(f)) })

	if exit {
		_, text, _ := strings.Cut(exitHelp, ": ")
		line(".SH EXIT STATUS\n%s", roff(text))
	}
	if cmd.Example != "" {
		line(".SH EXAMPLES\n.nf\n%s\n.fi", roff(cmd.Example))
	}

	line(".SH SEE ALSO")
	var others []string
	if p := cmd.Parent(); p != nil {
		others = append(others, `.BR `+roff(pageName(p))+` (1)`)
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			others = append(others, `.BR `+roff(pageName(c))+` (1)`)
		}
	}
	line("%s", strings.Join(others, ",\n"))
	return b.String()
}

// option is the entry of a flag.
func option(f *pflag.Flag) string {
	value, text := pflag.UnquoteUsage(f)
	name := `\fB\-\-` + roff(f.Name) + `\fR`
	if f.Shorthand != "" {
		name = `\fB\-` + f.Shorthand + `\fR, ` + name
	}
	if f.Value.Type() == "bool" {
		if f.DefValue == "true" {
			name += "=false"
			text += " (default true)"
		}
	} else {
		name += ` \fI` + roff(value) + `\fR`
		switch f.DefValue {
		case "", "0", "0s", "[]": // the text says what that means
		default:
			text += fmt.Sprintf(" (default %s)", f.DefValue)
		}
	}
	return ".TP\n" + name + "\n" + roff(text)
}

// prose writes paragraphs; indented lines stand as they are.
func prose(b *strings.Builder, text string) {
	for i, p := range strings.Split(text, "\n\n") {
		if i > 0 {
			b.WriteString(".PP\n")
		}
		for _, l := range strings.Split(p, "\n") {
			if strings.HasPrefix(l, "  ") {
				fmt.Fprintf(b, ".nf\n%s\n.fi\n", roff(l))
			} else {
				b.WriteString(roff(l) + "\n")
			}
		}
	}
}

// roff protects what man(7) would take for its own.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n.", "\n\\&.", "\n'", "\n\\&'").Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
