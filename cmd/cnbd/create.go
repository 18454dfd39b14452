package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"cnbd/config"
)

func newCreate() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "create --size SIZE BACKING",
		Short: "Make an empty store",
		Long: "Make an empty store for a device of SIZE, in the new file BACKING or on the block device BACKING.\n" +
			"A file is sparse, readable by its owner alone, and appears whole or not at all." + exitHelp,
		Example: "  cnbd create --size 100GiB disk.cnbd\n" +
			"  cnbd create --size 1TiB --codec zstd --level 3 /dev/vg/store",
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load("", cmd.Flags())
			if err != nil {
				return err
			}
			e := &c.Exports[0]
			if e.Size == 0 {
				return usage(fmt.Errorf("--size is needed: how large is the device to be, such as 100GiB"))
			}
			return makeStore(c, e, force)
		},
	}
	config.AddFlags(cmd.Flags(), "size", "capacity", "codec", "level", "extent")
	cmd.Flags().BoolVar(&force, "force", false, "replace what is there, with all that it holds")
	return cmd
}
