// Package compression turns extents into fewer bytes and back. It knows nothing
// of where they are stored: the store keeps a [Codec] and a [Level] with each
// record, so that they can be changed at any time and mixed.
//
// An [Encoder] belongs to one worker and is reused for every extent; a [Decoder]
// is shared by all. Both are made once: making them for each block costs 3 to 75
// times the work that they do. In the steady state neither allocates.
//
// Memory: an Encoder holds up to 9 MB of tables, made at the first use of a
// level; the level [ZstdBest] has 37 MB, which all Encoders of the process
// share. A Decoder holds about 0.3 MB for each concurrent call that it allows.
//
// Invariants:
//
//  1. What Encode says is worth storing is at least a sixteenth smaller, of Pack a
//     sixty-fourth, and Decode gives it back byte for byte.
//  2. Decode gives exactly the size asked for or an error, whatever its input
//     is, and never takes memory by what the input says.
//  3. No region of a device is remembered as incompressible for ever.
//
// There are no locks: what is shared is immutable or atomic.
package compression

import (
	"errors"
	"fmt"
	"strings"
)

// SizeMax is the most bytes that one Encode or Decode handles: the largest
// extent of the format.
const SizeMax = 128 << 10

// ErrCorrupt says that bytes are not what an Encoder made.
var ErrCorrupt = errors.New("compression: corrupt data")

// A Codec is a way to encode. The values are format: they stand in every record
// and are never given another meaning.
type Codec uint8

const (
	// None stores the bytes as they are.
	None Codec = 0
	// S2 is fast: about half the savings of Zstd for a third of the time.
	S2 Codec = 1
	// Zstd is Zstandard, one frame of RFC 8878 for each extent, with the size
	// of its content and without a checksum, for records have their own.
	Zstd Codec = 2

	// Auto is no codec but the policy to choose one, and is never stored. It is
	// zstd at its fastest level, which the measurements behind the defaults
	// favour, where who encodes knows nothing better: package device takes S2 for
	// small pieces that somebody waits for.
	Auto Codec = 255
)

// A Level is how hard a codec tries, from 1 up; 0 is the codec's default. The
// values are format.
type Level uint8

// The levels of S2 and of Zstd. None and Auto have level 0 only.
const (
	S2Fast   Level = 1
	S2Better Level = 2

	ZstdFastest Level = 1
	ZstdDefault Level = 2
	ZstdBetter  Level = 3
	ZstdBest    Level = 4
)

// codecs has the names and levels of each codec. The level names start at 1.
var codecs = []struct {
	codec    Codec
	name     string
	levels   []string
	standard Level
}{
	{None, "none", nil, 0},
	{S2, "s2", []string{"fast", "better"}, S2Fast},
	{Zstd, "zstd", []string{"fastest", "default", "better", "best"}, ZstdDefault},
	{Auto, "auto", nil, 0},
}

func (c Codec) String() string {
	for _, k := range codecs {
		if k.codec == c {
			return k.name
		}
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// A Setting says how to encode. The zero Setting is None.
type Setting struct {
	Codec Codec
	Level Level
}

// Parse reads a Setting: "auto", "none", "s2" or "zstd", the latter two with an
// optional level by name or number: "zstd:better", "zstd:3". Its result always
// has a level if its codec has levels.
func Parse(s string) (Setting, error) {
	name, level, hasLevel := strings.Cut(strings.ToLower(strings.TrimSpace(s)), ":")
	for _, k := range codecs {
		if k.name != name {
			continue
		}
		if !hasLevel {
			return Setting{k.codec, k.standard}, nil
		}
		for i, l := range k.levels {
			if level == l || level == fmt.Sprint(i+1) {
				return Setting{k.codec, Level(i + 1)}, nil
			}
		}
		if k.levels == nil {
			return Setting{}, fmt.Errorf("compression %q: %s has no levels", s, name)
		}
		return Setting{}, fmt.Errorf("compression %q: the levels of %s are %s", s, name, strings.Join(k.levels, ", "))
	}
	return Setting{}, fmt.Errorf("compression %q: must be auto, zstd, s2 or none", s)
}

// String is the Setting as Parse reads it.
func (s Setting) String() string {
	for _, k := range codecs {
		if k.codec == s.Codec && s.Level > 0 && int(s.Level) <= len(k.levels) {
			return k.name + ":" + k.levels[s.Level-1]
		}
	}
	if s.Level != 0 {
		return fmt.Sprintf("%s:%d", s.Codec, s.Level)
	}
	return s.Codec.String()
}

// MarshalText and UnmarshalText are String and Parse for files and flags.
func (s Setting) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText sets s to what Parse makes of b.
func (s *Setting) UnmarshalText(b []byte) (err error) {
	*s, err = Parse(string(b))
	return err
}

// Valid reports whether s can stand in a record: a codec of the format, at a
// level that it has. Auto and level 0 of a codec with levels cannot.
func (s Setting) Valid() bool {
	return s.Codec != Auto && s == s.Resolve()
}

// Resolve is the codec and level that s stands for: what Encode uses. A codec or
// level that does not exist gives None.
func (s Setting) Resolve() Setting {
	if s.Codec == Auto {
		return Setting{Zstd, ZstdFastest}
	}
	for _, k := range codecs {
		switch {
		case k.codec != s.Codec || int(s.Level) > len(k.levels):
		case s.Level == 0:
			return Setting{s.Codec, k.standard}
		default:
			return s
		}
	}
	return Setting{}
}
