// Package picture draws how a device is stored: for each region of it, in the order of
// its addresses, how much of it is data, how small that has become, and in how many
// pieces it lies. It writes PNG and SVG.
package picture

import (
	"cmp"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"math"
	"strings"
	"text/template"

	"golang.org/x/image/font"
	"golang.org/x/image/font/basicfont"
	"golang.org/x/image/math/fixed"
)

// A Region is a part of a device.
type Region struct {
	Data, Stored uint64 // bytes, and what they take
	Fragments    uint64 // runs in which they lie in the store
	Lost         uint64 // bytes that cannot be read
}

// A Map is a device, in regions of equal size; the last may be shorter.
type Map struct {
	Title       []string // lines
	RegionBytes uint64
	Regions     []Region
}

// Sizes in pixels. Text is of a font with fixed widths.
const (
	columns   = 128
	cell      = 8
	margin    = 16
	line      = 16
	fontWidth = 7
	scaleWide = 256
	white     = 0xffffff
	black     = 0x202020
	empty     = 0xe8e8e8 // of regions without data
	lost      = 0xff00ff
)

type rect struct {
	X, Y, W, H int
	Color      rgb
}

type text struct {
	X, Y int // of the base line
	Text string
}

type rgb uint32

func (c rgb) String() string { return fmt.Sprintf("#%06x", uint32(c)) }

// A Picture is a drawing of a Map.
type Picture struct {
	W, H  int
	Rects []rect
	Texts []text
}

// A panel shows one property of the regions.
type panel struct {
	name   string
	colors []rgb                   // from 0 to 1
	value  func(r *Region) float64 // 0 to 1
	ticks  []tick                  // of the legend
}

type tick struct {
	name string
	at   float64 // 0 to 1
}

// Draw draws m. Sizes are told by size.
func Draw(m *Map, size func(bytes uint64) string) *Picture {
	p := &Picture{W: 2*margin + columns*cell}
	y := margin
	say := func(s string) {
		p.Texts = append(p.Texts, text{margin, y + line - 4, s})
		y += line
	}
	for _, s := range m.Title {
		say(s)
	}
	say(fmt.Sprintf("each square is %s of the device, from left to right and then down", size(m.RegionBytes)))
	lostSome := false
	for _, r := range m.Regions {
		lostSome = lostSome || r.Lost > 0
	}
	for _, n := range panels(m.RegionBytes, size) {
		y += line
		p.legend(n, y, lostSome)
		y += 2*line + 4
		y = p.grid(m, n, y)
	}
	p.H = y + margin
	return p
}

// panels are what is shown.
func panels(regionBytes uint64, size func(uint64) string) []panel {
	log := func(x, from, to float64) float64 { return math.Log(max(x, from)/from) / math.Log(to/from) }
	// Runs from a block to a MiB, or to a region.
	const shortest, longest = 4 << 10, 1 << 20
	long := min(longest, max(regionBytes, 4*shortest))
	var runs []tick
	for n := uint64(shortest); n <= long; n *= 4 {
		runs = append(runs, tick{size(n), log(float64(n), shortest, float64(long))})
	}
	return []panel{
		{"data: how much of it is stored", []rgb{0xdeebf7, 0x9ecae1, 0x3182bd, 0x08306b},
			func(r *Region) float64 { return float64(r.Data) / float64(regionBytes) },
			[]tick{{"0 %", 0}, {"50 %", 0.5}, {"100 %", 1}}},
		{"ratio: how small it has become", []rgb{0x440154, 0x31688e, 0x35b779, 0xfde725},
			func(r *Region) float64 { return log(float64(r.Data)/float64(max(r.Stored, 1)), 1, 16) },
			[]tick{{"1", 0}, {"2", 0.25}, {"4", 0.5}, {"8", 0.75}, {"16", 1}}},
		{"fragments: data in one run of the store", []rgb{0xd73027, 0xfee08b, 0x66bd63, 0x006837},
			func(r *Region) float64 {
				if r.Fragments <= 1 {
					return 1 // however little it is
				}
				return log(float64(r.Data)/float64(r.Fragments), shortest, float64(long))
			}, runs},
	}
}

// shade is the color of v, from 0 to 1. There are few of them, so that neighbours are
// often the same.
func (n *panel) shade(v float64) rgb {
	const steps = 24
	at := math.Round(max(0, min(1, v))*steps) / steps * float64(len(n.colors)-1)
	i := min(int(at), len(n.colors)-2)
	from, to, part := n.colors[i], n.colors[i+1], at-float64(i)
	var c rgb
	for _, shift := range []int{16, 8, 0} {
		a, b := float64(from>>shift&0xff), float64(to>>shift&0xff)
		c |= rgb(math.Round(a+(b-a)*part)) << shift
	}
	return c
}

// legend draws the scale of a panel.
func (p *Picture) legend(n panel, y int, lostSome bool) {
	p.Texts = append(p.Texts, text{margin, y + line - 4, n.name})
	x := margin + 46*fontWidth
	for i := range scaleWide / 4 {
		p.fill(rect{x + 4*i, y, 4, line - 2, n.shade(float64(i) / (scaleWide/4 - 1))})
	}
	for _, t := range n.ticks {
		left := x + int(t.at*scaleWide) - len(t.name)*fontWidth/2
		p.Texts = append(p.Texts, text{left, y + 2*line - 4, t.name})
	}
	x += scaleWide + 8*fontWidth
	keys := []struct {
		c    rgb
		name string
	}{{empty, "no data"}, {lost, "cannot be read"}}
	if !lostSome {
		keys = keys[:1]
	}
	for _, k := range keys {
		p.fill(rect{x, y, 2 * cell, line - 2, k.c})
		p.Texts = append(p.Texts, text{x + 3*cell, y + line - 4, k.name})
		x += 3*cell + (len(k.name)+3)*fontWidth
	}
}

// grid draws the regions, and returns where they end.
func (p *Picture) grid(m *Map, n panel, y int) int {
	for i := range m.Regions {
		r := &m.Regions[i]
		c := rgb(empty)
		switch {
		case r.Lost > 0:
			c = lost
		case r.Data > 0:
			c = n.shade(n.value(r))
		}
		p.fill(rect{margin + i%columns*cell, y + i/columns*cell, cell, cell, c})
	}
	return y + (len(m.Regions)+columns-1)/columns*cell
}

// fill adds r, or makes the last rectangle wider if r goes on with it.
func (p *Picture) fill(r rect) {
	if n := len(p.Rects); n > 0 {
		if l := &p.Rects[n-1]; l.Color == r.Color && l.Y == r.Y && l.H == r.H && l.X+l.W == r.X {
			l.W += r.W
			return
		}
	}
	p.Rects = append(p.Rects, r)
}

// PNG writes p.
func (p *Picture) PNG(w io.Writer) error {
	im := image.NewRGBA(image.Rect(0, 0, p.W, p.H))
	of := func(c rgb) image.Image {
		return image.NewUniform(color.RGBA{uint8(c >> 16), uint8(c >> 8), uint8(c), 0xff})
	}
	draw.Draw(im, im.Bounds(), of(white), image.Point{}, draw.Src)
	for _, r := range p.Rects {
		draw.Draw(im, image.Rect(r.X, r.Y, r.X+r.W, r.Y+r.H), of(r.Color), image.Point{}, draw.Src)
	}
	for _, t := range p.Texts {
		d := font.Drawer{Dst: im, Src: of(black), Face: basicfont.Face7x13, Dot: fixed.P(t.X, t.Y)}
		d.DrawString(t.Text)
	}
	return png.Encode(w, im)
}

var svg = template.Must(template.New("svg").Funcs(template.FuncMap{"escape": escape}).Parse(
	`<svg xmlns="http://www.w3.org/2000/svg" width="{{.W}}" height="{{.H}}" viewBox="0 0 {{.W}} {{.H}}">
<rect width="100%" height="100%" fill="#ffffff"/>
<g shape-rendering="crispEdges">
{{range .Rects}}<rect x="{{.X}}" y="{{.Y}}" width="{{.W}}" height="{{.H}}" fill="{{.Color}}"/>
{{end}}</g>
<g font-family="monospace" font-size="11.6px" fill="#202020" xml:space="preserve">
{{range .Texts}}<text x="{{.X}}" y="{{.Y}}">{{escape .Text}}</text>
{{end}}</g>
</svg>
`))

func escape(s string) string {
	return strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace(s)
}

// SVG writes p.
func (p *Picture) SVG(w io.Writer) error { return svg.Execute(w, p) }

// RegionBytes is how large regions of a device of size bytes are, so that there are at
// most as many as a picture has room for: a power of two, at least least.
func RegionBytes(size, least uint64) uint64 {
	const most = columns * 32
	bytes := cmp.Or(least, 1)
	for (size+bytes-1)/bytes > most {
		bytes *= 2
	}
	return bytes
}
