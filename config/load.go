package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

// backingKey is the one key of the single form that is an argument and no flag.
const backingKey = "backing"

// EnvName is the environment variable of a setting: CNBD_CACHE for cache.
func EnvName(key string) string {
	return "CNBD_" + strings.ToUpper(strings.ReplaceAll(key, "-", "_"))
}

// Load reads the configuration: the defaults, over them the YAML file (none if
// its name is empty), over that the environment, over that the flags that were
// given, which are those of [AddFlags]; flags may be nil. The one argument of
// flags is the BACKING of the single form.
//
// The result is valid. All faults are reported together as joined [Fault]
// errors; a file that cannot be read is reported alone.
func Load(file string, flags *pflag.FlagSet) (*Config, error) {
	l := loader{file: file, flags: flags, v: viper.New(), c: Default()}
	if err := l.read(); err != nil {
		return nil, err
	}
	for key, field := range settings(l.c, "key") {
		if key == "exports" {
			continue
		}
		l.bind(key)
		if l.v.IsSet(key) {
			l.faults.add(key, decode(field, l.value(key)))
		}
	}
	if single := l.singleForm(); !single {
		l.exportList()
	}
	l.c.validate(&l.faults)
	for _, f := range l.faults {
		if f.Where == "" {
			f.Where = l.place(f.Key)
		}
	}
	if len(l.faults) > 0 {
		return nil, l.faults.join()
	}
	return l.c, nil
}

// UnknownEnv are those of environ, which is in the form of [os.Environ], that
// look like settings and are none, sorted. They are no faults, since a
// variable may be meant for another program of the same name; a server warns
// of them.
func UnknownEnv(environ []string) []string {
	known := map[string]bool{}
	for key := range allFlags() {
		known[EnvName(key)] = true
	}
	known[EnvName(backingKey)] = true
	var unknown []string
	for _, e := range environ {
		name, _, _ := strings.Cut(e, "=")
		if strings.HasPrefix(name, "CNBD_") && !known[name] {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// AddFlags adds the flags of the settings to fs: of those whose keys are
// given (for an export's, the flag's name), or of all. A value that cannot be
// read is reported by [Load], together with all other faults. It panics on a
// key that is none.
func AddFlags(fs *pflag.FlagSet, keys ...string) {
	all := allFlags()
	if len(keys) == 0 {
		keys = slices.Collect(maps.Keys(all))
	}
	for _, key := range keys {
		f, ok := all[key]
		if !ok {
			panic("config: no setting " + key)
		}
		help := f.tag.Get("help")
		switch v := f.ptr.(type) {
		case *bool:
			fs.Bool(key, *v, help)
		case *[]string:
			// pflag shows the quoted word as the kind of value.
			typ := f.tag.Get("type")
			fs.StringArray(key, *v, strings.Replace(help, typ, "`"+typ+"`", 1))
		default:
			fs.Var(&text{encode(v), f.tag.Get("type")}, key, help)
		}
	}
}

// text is the value of a flag, kept as it was given.
type text struct{ value, typ string }

func (t *text) Set(s string) error { t.value = s; return nil }
func (t *text) String() string     { return t.value }
func (t *text) Type() string       { return t.typ }

// A field is a setting inside a Config or Export.
type field struct {
	ptr any
	tag reflect.StructTag
}

// settings yields the fields of the struct that p points to, in order, with
// the key that the tag gives.
func settings(p any, tag string) func(yield func(string, field) bool) {
	return func(yield func(string, field) bool) {
		v := reflect.ValueOf(p).Elem()
		for i := range v.NumField() {
			t := v.Type().Field(i).Tag
			if !yield(t.Get(tag), field{v.Field(i).Addr().Interface(), t}) {
				return
			}
		}
	}
}

// Changed are the keys of the settings in which a and b differ, in the order of
// [Config]. Whatever differs in an export is a change of exports.
func Changed(a, b *Config) []string {
	before := maps.Collect(settings(a, "key"))
	var keys []string
	for key, now := range settings(b, "key") {
		if !reflect.DeepEqual(before[key].ptr, now.ptr) {
			keys = append(keys, key)
		}
	}
	return keys
}

// allFlags are the settings that have a flag, with their defaults.
func allFlags() map[string]field {
	flags := maps.Collect(settings(Default(), "key"))
	maps.Insert(flags, settings(&Export{}, "single"))
	delete(flags, "exports")
	delete(flags, backingKey)
	return flags
}

// loader is one run of Load.
type loader struct {
	file   string
	flags  *pflag.FlagSet
	v      *viper.Viper
	c      *Config
	single bool // the export is that of the command line
	list   any  // value of "exports" in the file, nil if there is none
	faults faults
}

// read reads the file into v and reports the keys that are none. It takes
// viper's decoder and not its ReadInConfig, because what viper has merged no
// longer shows keys without a value, or in the wrong case.
func (l *loader) read() error {
	if l.file == "" {
		return nil
	}
	data, err := os.ReadFile(l.file)
	if err != nil {
		return fmt.Errorf("config: read file: %w", err)
	}
	yaml, err := viper.NewCodecRegistry().Decoder("yaml")
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	values := map[string]any{}
	if err := yaml.Decode(data, values); err != nil {
		return &Fault{Key: "file", Where: l.file, Err: err}
	}
	l.unknown("", values, l.c, "key")
	l.list = values["exports"]
	delete(values, "exports") // viper would fold the case of the keys in it
	return l.v.MergeConfigMap(values)
}

// unknown reports the keys of values that are no settings of the struct that p
// points to.
func (l *loader) unknown(prefix string, values map[string]any, p any, tag string) {
	known := maps.Collect(settings(p, tag))
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if _, ok := known[key]; ok {
			continue
		}
		err := errors.New("unknown key")
		if folded := strings.ReplaceAll(strings.ToLower(key), "_", "-"); known[folded].ptr != nil {
			err = fmt.Errorf("unknown key, the name is %s", folded)
		}
		l.faults = append(l.faults, &Fault{Key: prefix + key, Where: l.file + ": " + prefix + key, Err: err})
	}
}

// bind lets viper find key in the environment and the flags.
func (l *loader) bind(key string) {
	// Neither can fail: the key and the flag are there.
	_ = l.v.BindEnv(key, EnvName(key))
	if f := l.flag(key); f != nil {
		_ = l.v.BindPFlag(key, f)
	}
}

// value is what viper has for key, but for lists given as flags: those it takes
// apart at commas, and empty strings it drops.
func (l *loader) value(key string) any {
	if f := l.flag(key); f != nil && f.Changed {
		if list, ok := f.Value.(pflag.SliceValue); ok {
			return list.GetSlice()
		}
	}
	return l.v.Get(key)
}

// flag is the flag of key, nil if the command line has none.
func (l *loader) flag(key string) *pflag.Flag {
	if l.flags == nil {
		return nil
	}
	return l.flags.Lookup(key)
}

// singleForm reads the export of the command line and the environment, if
// there is one. Afterwards nothing but the list can make exports.
func (l *loader) singleForm() bool {
	var e Export
	var given []string
	for key, field := range settings(&e, "single") {
		l.bind(key)
		if l.v.IsSet(key) {
			given = append(given, key)
			l.faults.add(key, decode(field, l.value(key)))
		}
	}
	if l.flags != nil && l.flags.NArg() > 0 {
		e.Path = l.flags.Arg(0)
		given = append(given, backingKey)
		if n := l.flags.NArg(); n > 1 {
			l.faults.add(backingKey, fmt.Errorf("one expected, not %d: %q", n, l.flags.Args()))
		}
	}
	if !slices.Contains(given, backingKey) {
		for _, key := range given {
			l.faults.add(key, errors.New("describes the export of a BACKING, and none is given"))
		}
		return false
	}
	if l.list != nil {
		l.faults.add("exports", fmt.Errorf("listed in the file, and BACKING %s is given too", e.Path))
	}
	l.single = true
	l.c.Exports = []Export{e}
	return true
}

// exportList reads the exports of the file.
func (l *loader) exportList() {
	if l.list == nil {
		return
	}
	list, ok := l.list.([]any)
	if !ok {
		l.faults.add("exports", errors.New("a list is expected, each entry with a path and what else is set"))
		return
	}
	l.c.Exports = make([]Export, len(list))
	for i, entry := range list {
		values, ok := entry.(map[string]any)
		if !ok {
			l.faults.add(exportKey(i, ""), errors.New("an entry with a path is expected, such as \"- path: disk.cnbd\""))
			continue
		}
		l.unknown(exportKey(i, "")+".", values, &Export{}, "key")
		for key, field := range settings(&l.c.Exports[i], "key") {
			if raw := values[key]; raw != nil {
				l.faults.add(exportKey(i, key), decode(field, raw))
			}
		}
	}
}

// place tells where the setting of key comes from, empty if it is a default.
func (l *loader) place(key string) string {
	if rest, ok := strings.CutPrefix(key, exportKey(0, "")+"."); ok && l.single {
		for single, field := range settings(&Export{}, "single") {
			if field.tag.Get("key") == rest {
				key = single
			}
		}
	}
	switch flag := l.flag(key); {
	case flag != nil && flag.Changed:
		return "--" + key
	case key == backingKey && l.flags != nil && l.flags.NArg() > 0:
		return "BACKING"
	case os.Getenv(EnvName(key)) != "":
		return EnvName(key)
	case l.v.InConfig(key) || l.list != nil && strings.HasPrefix(key, "exports"):
		return l.file + ": " + key
	}
	return ""
}

// decode sets f to a value of the file (any type that YAML has), the
// environment (a string) or a flag.
func decode(f field, raw any) error {
	switch p := f.ptr.(type) {
	case *string:
		s, ok := raw.(string)
		if !ok {
			return fmt.Errorf("%v is not text: put it in quotes", raw)
		}
		*p = s
	case *[]string:
		switch list := raw.(type) {
		case string:
			*p = nil
			for _, e := range strings.Split(list, ",") {
				*p = append(*p, strings.TrimSpace(e))
			}
		case []string:
			*p = list
		case []any:
			*p = make([]string, len(list))
			for i, e := range list {
				s, ok := e.(string)
				if !ok {
					return fmt.Errorf("%v is not text: put it in quotes", e)
				}
				(*p)[i] = s
			}
		default:
			return fmt.Errorf("%v is not a list", raw)
		}
	case *bool:
		switch fmt.Sprint(raw) {
		case "true", "1":
			*p = true
		case "false", "0":
			*p = false
		default:
			return fmt.Errorf("%v is neither true nor false", raw)
		}
	case *int:
		n, err := strconv.Atoi(fmt.Sprint(raw))
		if err != nil {
			return fmt.Errorf("%v is not a whole number", raw)
		}
		*p = n
	case *Size:
		if n, ok := raw.(float64); ok {
			return fmt.Errorf("%v has no unit: write bytes as a whole number, or with a unit, such as 1.5GiB", n)
		}
		n, err := ParseSize(fmt.Sprint(raw))
		if err != nil {
			return err
		}
		*p = n
	case *time.Duration:
		d, err := time.ParseDuration(fmt.Sprint(raw))
		if err != nil {
			return fmt.Errorf("%v is not a duration: give a number and a unit, such as 500ms, 5s or 1m30s", raw)
		}
		*p = d
	case *os.FileMode:
		// YAML reads 0600 as the octal number that is meant.
		if n, ok := raw.(int); ok {
			raw = strconv.FormatInt(int64(n), 8)
		}
		n, err := strconv.ParseUint(strings.TrimPrefix(fmt.Sprint(raw), "0o"), 8, 32)
		if err != nil {
			return fmt.Errorf("%v is not an octal number, such as 0660", raw)
		}
		*p = os.FileMode(n)
	default:
		panic(fmt.Sprintf("config: setting of type %T", p))
	}
	return nil
}

// encode is the text of a default, which decode reads.
func encode(p any) string {
	if mode, ok := p.(*os.FileMode); ok {
		return fmt.Sprintf("%04o", uint32(*mode))
	}
	return fmt.Sprint(reflect.ValueOf(p).Elem().Interface())
}
