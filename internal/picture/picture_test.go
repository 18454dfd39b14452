package picture

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"image/color"
	"image/png"
	"io"
	"strings"
	"testing"
)

func sample() *Picture {
	m := &Map{Title: []string{"<disk> & more"}, RegionBytes: 64 << 10, Regions: make([]Region, 300)}
	m.Regions[0] = Region{Data: 64 << 10, Stored: 64 << 10, Fragments: 16}
	m.Regions[1] = Region{Data: 64 << 10, Stored: 4 << 10, Fragments: 1}
	m.Regions[128] = Region{Lost: 4096, Data: 60 << 10, Stored: 1, Fragments: 1}
	return Draw(m, func(n uint64) string { return fmt.Sprint(n) })
}

// TestPNG: each panel has its regions in their places, with the ends of its scale.
func TestPNG(t *testing.T) {
	p := sample()
	var b bytes.Buffer
	if err := p.PNG(&b); err != nil {
		t.Fatal(err)
	}
	im, err := png.Decode(&b)
	if err != nil || im.Bounds().Dx() != p.W || im.Bounds().Dy() != p.H {
		t.Fatalf("%v, %v", im.Bounds(), err)
	}
	at := func(x, y int) rgb {
		c := color.RGBAModel.Convert(im.At(x, y)).(color.RGBA)
		return rgb(c.R)<<16 | rgb(c.G)<<8 | rgb(c.B)
	}
	// Panels begin where the first region, the second and the one below are.
	var found [][2]rgb
	for y := range p.H - cell {
		if x := margin + cell/2; at(x, y+cell) == lost && at(x, y+cell-1) != lost {
			found = append(found, [2]rgb{at(x, y), at(x+cell, y)})
			if c := at(x+2*cell, y); c != empty {
				t.Errorf("a region without data is %v", c)
			}
		}
	}
	want := [][2]rgb{{0x08306b, 0x08306b}, {0x440154, 0xfde725}, {0xd73027, 0x006837}}
	if fmt.Sprint(found) != fmt.Sprint(want) {
		t.Errorf("the regions are drawn as %v, want %v", found, want)
	}
}

// TestSVG: it is XML, with all texts, and the same each time.
func TestSVG(t *testing.T) {
	var b, again bytes.Buffer
	if err := errors.Join(sample().SVG(&b), sample().SVG(&again)); err != nil {
		t.Fatal(err)
	}
	if b.String() != again.String() {
		t.Error("it differs from time to time")
	}
	var texts strings.Builder
	rects := 0
	for d := xml.NewDecoder(&b); ; {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch x := token.(type) {
		case xml.StartElement:
			if x.Name.Local == "rect" {
				rects++
			}
		case xml.CharData:
			texts.Write(x)
		}
	}
	for _, want := range []string{"<disk> & more", "65536", "cannot be read", "no data", "16"} {
		if !strings.Contains(texts.String(), want) {
			t.Errorf("%q is not in it", want)
		}
	}
	if rects > 300 { // neighbours are one
		t.Errorf("%d rectangles", rects)
	}
}

func TestRegionBytes(t *testing.T) {
	for _, c := range []struct{ size, want uint64 }{{512, 4096}, {16 << 20, 4096}, {16<<20 + 1, 8192}, {1 << 60, 1 << 48}} {
		if got := RegionBytes(c.size, 4096); got != c.want {
			t.Errorf("of %d bytes: %d, want %d", c.size, got, c.want)
		}
	}
}
