package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"cnbd/nbd"
)

// An exportStatus is what info shows of an NBD export.
type exportStatus struct {
	URI              string   `json:"uri"`
	Description      string   `json:"description"`
	Size             uint64   `json:"size"`
	ReadOnly         bool     `json:"read_only"`
	Messages         string   `json:"messages"`
	Can              []string `json:"can"`
	MinimumBlock     uint32   `json:"block_size_minimum"` // 0: the server does not tell
	PreferredBlock   uint32   `json:"block_size_preferred"`
	MaximumBlock     uint32   `json:"block_size_maximum"`
	AllocationIsTold bool     `json:"allocation_is_told"`
	DataBytes        uint64   `json:"data_bytes"`
	HoleBytes        uint64   `json:"hole_bytes"`
	Extents          uint64   `json:"extents"`
}

// exportAbilities are what transmission flags tell, in the protocol's words.
var exportAbilities = []struct {
	flag nbd.TransmissionFlags
	name string
}{
	{nbd.FlagSendFlush, "flush"}, {nbd.FlagSendFUA, "fua"}, {nbd.FlagSendTrim, "trim"}, {nbd.FlagSendWriteZeroes, "write_zeroes"},
	{nbd.FlagSendFastZero, "fast_zero"}, {nbd.FlagSendCache, "cache"}, {nbd.FlagSendDF, "df"}, {nbd.FlagCanMultiConn, "multi_conn"},
}

// exportInfo asks the server of uri, which may be anybody's, and prints what it says.
func exportInfo(ctx context.Context, w io.Writer, uri string, asJSON bool) error {
	c, err := nbd.Dial(ctx, uri)
	if err != nil {
		return err
	}
	defer c.Close()
	sizes := c.BlockSizes()
	st := &exportStatus{
		URI: uri, Description: c.Description(), Size: c.Size(), ReadOnly: c.Flags()&nbd.FlagReadOnly != 0,
		Messages:     c.Replies().String(),
		MinimumBlock: sizes.Minimum, PreferredBlock: sizes.Preferred, MaximumBlock: sizes.Maximum,
		AllocationIsTold: c.CanBlockStatus(),
	}
	for _, a := range exportAbilities {
		if c.Flags()&a.flag != 0 {
			st.Can = append(st.Can, a.name)
		}
	}
	if st.AllocationIsTold {
		if err := st.count(ctx, c); err != nil {
			return fmt.Errorf("%s: %w", uri, err)
		}
	}
	if err := c.Disconnect(ctx); err != nil {
		return err
	}
	if asJSON {
		return printJSON(w, st)
	}
	return printExport(w, st)
}

// count sums up what is allocated.
func (st *exportStatus) count(ctx context.Context, c *nbd.Client) error {
	for off, last := uint64(0), nbd.BlockState(0); off < st.Size; {
		extents, err := c.BlockStatus(ctx, off, st.Size-off, false)
		if err != nil {
			return err
		}
		for _, x := range extents {
			n := min(x.Length, st.Size-off)
			if x.State&nbd.StateHole != 0 {
				st.HoleBytes += n
			} else {
				st.DataBytes += n
			}
			if n > 0 && (off == 0 || x.State != last) { // answers may end in the midst of one
				st.Extents++
			}
			off, last = off+n, x.State
		}
	}
	return nil
}

func printExport(w io.Writer, st *exportStatus) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...)) }
	row("export", "%s", st.URI)
	if st.Description != "" {
		row("description", "%q", st.Description)
	}
	row("size", "%s", human(st.Size))
	access := "read and write"
	if st.ReadOnly {
		access = "read only"
	}
	row("access", "%s", access)
	row("messages", "%s", st.Messages)
	row("can", "%s", strings.Join(st.Can, ", "))
	if st.MinimumBlock > 0 {
		row("block sizes", "%d at least, %d preferred, %d at most", st.MinimumBlock, st.PreferredBlock, st.MaximumBlock)
	}
	if st.AllocationIsTold {
		row("data", "%s", human(st.DataBytes))
		row("holes", "%s", human(st.HoleBytes))
		row("extents", "%d", st.Extents)
	}
	return t.Flush()
}
