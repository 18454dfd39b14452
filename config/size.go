package config

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// A Size is a number of bytes. As text it is a number and a unit, see
// [ParseSize].
type Size uint64

// The IEC units.
const (
	KiB Size = 1 << (10 * (iota + 1))
	MiB
	GiB
	TiB
	PiB
	EiB
)

// sizeUnits are the units that [ParseSize] knows, in lower case. A single
// letter is an IEC unit, because that is what disks are divided by; the SI
// units of disk vendors are written with their B.
var sizeUnits = map[string]Size{
	"": 1, "b": 1,
	"k": KiB, "kib": KiB, "kb": 1e3,
	"m": MiB, "mib": MiB, "mb": 1e6,
	"g": GiB, "gib": GiB, "gb": 1e9,
	"t": TiB, "tib": TiB, "tb": 1e12,
	"p": PiB, "pib": PiB, "pb": 1e15,
	"e": EiB, "eib": EiB, "eb": 1e18,
}

// ParseSize reads a number of bytes: decimal digits, which may have a fraction
// after a point, and a unit, which may stand behind spaces and in any case.
// K, M, G, T, P, E and KiB … EiB are powers of 1024, kB … EB powers of 1000, and
// no unit or B is bytes. The result is exact: what is not a whole number of
// bytes, or does not fit into 64 bits, is an error.
func ParseSize(s string) (Size, error) {
	number := strings.TrimLeft(s, "0123456789.")
	number, unit := s[:len(s)-len(number)], strings.TrimLeft(number, " ")
	whole, fraction, point := strings.Cut(number, ".")
	unitBytes, known := sizeUnits[strings.ToLower(unit)]
	if whole == "" || !known || point && (fraction == "" || strings.Contains(fraction, ".")) {
		return 0, fmt.Errorf("%q is not a size: give a number and a unit, such as 4096, 512MiB, "+
			"10GiB or 1.5TiB (K, M, G, T, P, E are 1024-based, kB, MB, GB, TB, PB, EB 1000-based)", s)
	}

	// The value is digits * unit / 10^places, in 128 bits.
	fraction = strings.TrimRight(fraction, "0")
	const placesMax = 19 // 10^19 still fits into 64 bits
	if len(fraction) > placesMax {
		return 0, fmt.Errorf("%q is not a whole number of bytes", s)
	}
	scale := uint64(1)
	for range fraction {
		scale *= 10
	}
	digits, err := strconv.ParseUint(whole+fraction, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q has more digits than a size of at most 16EiB needs", s)
	}
	hi, lo := bits.Mul64(digits, uint64(unitBytes))
	if hi >= scale {
		return 0, fmt.Errorf("%q is too large: sizes are below 16EiB", s)
	}
	size, rest := bits.Div64(hi, lo, scale)
	if rest != 0 {
		return 0, fmt.Errorf("%q is not a whole number of bytes", s)
	}
	return Size(size), nil
}

// String is s in the largest IEC unit that divides it, such as 10GiB or 4097.
// ParseSize(s.String()) is s.
func (s Size) String() string {
	if s == 0 {
		return "0"
	}
	unit := min(bits.TrailingZeros64(uint64(s))/10, 6)
	text := strconv.FormatUint(uint64(s>>(10*unit)), 10)
	if unit > 0 {
		text += "KMGTPE"[unit-1:unit] + "iB"
	}
	return text
}

// MarshalText is [Size.String].
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText is [ParseSize].
func (s *Size) UnmarshalText(text []byte) error {
	v, err := ParseSize(string(text))
	if err == nil {
		*s = v
	}
	return err
}
