package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"cnbd/device"
	"cnbd/internal/block"
	"cnbd/internal/control"
	"cnbd/internal/disk"
	"cnbd/internal/picture"
	"cnbd/store"
)

func newMap() *cobra.Command {
	var output string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "map BACKING -o FILE.png|FILE.svg",
		Short: "Draw where a device has data, how it compresses, and how it is scattered",
		Long: "Draw the device in BACKING, region by region in the order of its addresses: how much of each is data,\n" +
			"how small that has become, and in how many runs it lies in the store. The store may be served: its\n" +
			"server is asked then, and the picture is of one moment.\n\n" +
			"Little data in one run means that reading the region in order reads the store all over: it was written\n" +
			"in small pieces. Recompression, when the device is idle, makes it one again." + exitHelp,
		Example: "  cnbd map disk.cnbd -o disk.png\n" +
			"  cnbd map --json disk.cnbd",
		Args: oneBacking,
		RunE: func(cmd *cobra.Command, args []string) error {
			var write func(*picture.Picture, io.Writer) error
			switch ext := strings.ToLower(filepath.Ext(output)); {
			case output == "" && !asJSON:
				return usage(errors.New("-o is needed: the picture to make, a name that ends in .png or .svg"))
			case ext == ".png":
				write = (*picture.Picture).PNG
			case ext == ".svg":
				write = (*picture.Picture).SVG
			case output != "":
				return usage(fmt.Errorf("-o %s: a name that ends in .png or .svg is expected", output))
			}
			m, err := mapOf(cmd, args[0])
			if err != nil {
				return err
			}
			if write != nil {
				var b bytes.Buffer
				if err := write(picture.Draw(m.picture(args[0]), short), &b); err != nil {
					return err
				}
				if err := os.WriteFile(output, b.Bytes(), 0o644); err != nil {
					return err
				}
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), m)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "`FILE` to draw, .png or .svg; one that is there is replaced")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the numbers as JSON")
	return cmd
}

// A deviceMap is how a device is stored. It goes over the control socket as JSON.
type deviceMap struct {
	DeviceSize  uint64          `json:"device_size"`
	RegionBytes uint64          `json:"region_bytes"` // the last may be shorter
	Regions     []device.Region `json:"regions"`
}

// mapOf is the map of the store at path, its own, or what its server tells.
func mapOf(cmd *cobra.Command, path string) (*deviceMap, error) {
	f, err := disk.Open(path, disk.OpenOptions{ReadOnly: true})
	if errors.Is(err, disk.ErrLocked) {
		m := &deviceMap{}
		if ask := control.Regions(cmd.Context(), controlSocket(path), m); ask != nil {
			return nil, asked(err, ask)
		}
		return m, nil
	}
	if err != nil {
		return nil, err
	}
	if _, err := store.ReadGeometry(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d, err := device.Open(f, device.Options{ReadOnly: true, CacheBytes: 16 << 20, PayloadBytes: 4 << 20, Warn: warner(cmd, path)})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer d.Close()
	return mapDevice(cmd.Context(), d)
}

// mapDevice maps d as it is.
func mapDevice(ctx context.Context, d *device.Device) (*deviceMap, error) {
	snap, err := d.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	defer snap.Close()
	m := &deviceMap{DeviceSize: snap.Bytes(), RegionBytes: picture.RegionBytes(snap.Bytes(), block.Size)}
	m.Regions, err = snap.Regions(ctx, m.RegionBytes)
	return m, err
}

// picture is m, of the store at path, as it is drawn.
func (m *deviceMap) picture(path string) *picture.Map {
	p := &picture.Map{RegionBytes: m.RegionBytes}
	var sum device.Region
	for _, r := range m.Regions {
		p.Regions = append(p.Regions, picture.Region{Data: r.Data, Stored: r.Stored, Fragments: r.Fragments, Lost: r.Lost})
		sum.Data += r.Data
		sum.Stored += r.Stored
		sum.Fragments += r.Fragments
		sum.Lost += r.Lost
	}
	text := fmt.Sprintf("device of %s: %s of data", short(m.DeviceSize), short(sum.Data))
	if sum.Stored > 0 {
		text += fmt.Sprintf(", stored in %s, ratio %.2f, %s in a run on average", short(sum.Stored),
			float64(sum.Data)/float64(sum.Stored), short(sum.Data/max(sum.Fragments, 1)))
	}
	if sum.Lost > 0 {
		text += fmt.Sprintf("; %s cannot be read", short(sum.Lost))
	}
	p.Title = []string{filepath.Base(path), text}
	return p
}
