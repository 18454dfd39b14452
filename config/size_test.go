package config

import (
	"fmt"
	"math"
	"math/big"
	"regexp"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want Size
	}{
		{"0", 0},
		{"4096", 4096},
		{"4097B", 4097},
		{"1k", 1024},
		{"1K", 1024},
		{"1KiB", 1024},
		{"1kB", 1000},
		{"1KB", 1000},
		{"10G", 10 << 30},
		{"10GiB", 10 << 30},
		{"10gib", 10 << 30},
		{"10 GiB", 10 << 30},
		{"10GB", 10_000_000_000},
		{"512MiB", 512 << 20},
		{"1.5TiB", 3 << 39},
		{"1.500000000000000000000000TiB", 3 << 39},
		{"0.5K", 512},
		{"0.0009765625KiB", 1},
		{"1.001kB", 1001},
		{"007", 7},
		{"15EiB", 15 << 60},
		{"18446744073709551615", math.MaxUint64},
		{"18.446744073709551615EB", math.MaxUint64},
	} {
		if got, err := ParseSize(tc.in); err != nil || got != tc.want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", tc.in, got, err, tc.want)
		}
	}
}

func TestParseSizeRefuses(t *testing.T) {
	const form, whole, digits, large = "is not a size: give", "not a whole number of bytes", "more digits", "too large"
	for in, want := range map[string]string{
		"":                       form,
		"GiB":                    form,
		".5G":                    form,
		"5.G":                    form,
		"1.2.3":                  form,
		"-1":                     form,
		"+1":                     form,
		"1e9":                    form,
		"1_000":                  form,
		" 1":                     form,
		"1 ":                     "", // spaces before a unit that is none
		"10GiBB":                 form,
		"10Gi":                   form,
		"10XB":                   form,
		"10\tG":                  form,
		"0.1KiB":                 whole,
		"1.5":                    whole,
		"0.00000000000000000001": whole,
		"18446744073709551616":   digits,
		"16EiB":                  large,
		"18.446744073709551616E": digits,
		"17EiB":                  large,
		"18447PB":                large,
	} {
		_, err := ParseSize(in)
		if want == "" {
			if err != nil {
				t.Errorf("ParseSize(%q): %v", in, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), fmt.Sprintf("%q", in)) {
			t.Errorf("ParseSize(%q) = %v; want an error with %q that quotes the input", in, err, want)
		}
	}
}

func TestSizeString(t *testing.T) {
	for s, want := range map[Size]string{
		0:                          "0",
		1:                          "1",
		1023:                       "1023",
		1024:                       "1KiB",
		1025:                       "1025",
		4097:                       "4097",
		1536:                       "1536",
		10 * GiB:                   "10GiB",
		1536 * GiB:                 "1536GiB",
		3 * PiB:                    "3PiB",
		15 * EiB:                   "15EiB",
		math.MaxUint64:             "18446744073709551615",
		math.MaxUint64 - 1<<20 + 1: "17592186044415MiB",
	} {
		if got := s.String(); got != want {
			t.Errorf("Size(%d).String() = %s, want %s", uint64(s), got, want)
		}
	}
}

// exactSize is what a size means, in exact arithmetic and by a description of
// the form of its own; nil if s is none.
func exactSize(s string) *big.Int {
	m := regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) *(?:([kmgtpe]?)(i?)(b?))$`).FindStringSubmatch(strings.ToLower(s))
	if m == nil || m[3] != "" && (m[2] == "" || m[4] == "") {
		return nil
	}
	value, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return nil
	}
	base := int64(1024)
	if m[4] != "" && m[3] == "" {
		base = 1000
	}
	power := int64(0)
	if m[2] != "" {
		power = int64(strings.Index("kmgtpe", m[2])) + 1
	}
	value.Mul(value, new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(base), big.NewInt(power), nil)))
	if !value.IsInt() || !value.Num().IsUint64() {
		return nil
	}
	return value.Num()
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "4097", "10GiB", "10G", "10 gb", "1.5TiB", "0.1K", "16EiB", "18.446744073709551615EB", "1i", "K", "ſ1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := ParseSize(in)
		want := exactSize(in)
		if err != nil {
			// Values with more than 64 bits of digits are refused though
			// their value may be small: 0.000…01EiB is nobody's size.
			if want != nil && len(in) < 19 {
				t.Fatalf("ParseSize(%q): %v; it is %v", in, err, want)
			}
			return
		}
		if want == nil || want.Uint64() != uint64(got) {
			t.Fatalf("ParseSize(%q) = %d; it is %v", in, uint64(got), want)
		}
		if again, err := ParseSize(got.String()); err != nil || again != got {
			t.Fatalf("ParseSize(%q) = %d, %v; want %d", got.String(), uint64(again), err, uint64(got))
		}
	})
}

func FuzzSizeString(f *testing.F) {
	for _, n := range []uint64{0, 1, 1023, 1024, 4097, 3 << 39, 1 << 63, math.MaxUint64} {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, n uint64) {
		text, _ := Size(n).MarshalText()
		var got Size
		if err := got.UnmarshalText(text); err != nil || uint64(got) != n {
			t.Fatalf("%d -> %s -> %d, %v", n, text, uint64(got), err)
		}
	})
}
