package jobspec

import (
	"fmt"
	"strings"
)

// Example is a job file with every field in it. Fields that are not required stand in
// comments that begin with # and no blank: without that sign they are YAML. Comments
// for people begin with # and a blank.
func Example() string {
	var b strings.Builder
	b.WriteString("# A job for coffer. `coffer explain FIELD` says more, `coffer validate FILE` finds what is wrong.\n")
	fields := Fields()
	for i, f := range fields {
		if strings.HasSuffix(f.Path, "[]") || f.Path == "env.*" {
			continue
		}
		if f.Path == "reseal" || strings.HasPrefix(f.Path, "reseal.") || f.Path == "gang" || strings.HasPrefix(f.Path, "gang.") {
			continue // they exclude others
		}
		depth := strings.Count(f.Path, ".") + strings.Count(f.Path, "[]")
		name := f.Path[strings.LastIndexByte(f.Path, '.')+1:]
		indent := strings.Repeat("  ", depth)
		group := i+1 < len(fields) && strings.HasPrefix(fields[i+1].Path, f.Path) && strings.ContainsAny(fields[i+1].Path[len(f.Path):], ".[") && !strings.HasSuffix(fields[i+1].Path, "[]")
		value := " " + f.Example
		if f.Path == "env" {
			group, value = false, " "+f.Example
		}
		if group {
			value = ""
		}
		// The first field of an element has its dash.
		if strings.Contains(f.Path, "[]") && i > 0 && !strings.Contains(fields[i-1].Path, "[]") {
			indent, name = indent[:len(indent)-2], "- "+name
		}
		mark := "#"
		if f.Required && required(f.Path) {
			mark = ""
		}
		if depth == 0 {
			fmt.Fprintf(&b, "\n# %s\n", f.Doc)
		}
		note := ""
		if depth > 0 {
			note = " # " + f.Want
		}
		if f.Default != "" && !group && mark != "" {
			if note == "" {
				note = " # "
			} else {
				note += "; "
			}
			note += "without it: " + f.Default
		}
		if f.Path == "output.logKey" {
			continue // an example would be somebody's key
		}
		fmt.Fprintf(&b, "%s%s%s:%s%s\n", indent, mark, name, value, note)
	}
	return b.String()
}

// required reports whether a field is there in every job file: all that it is a part
// of are required too.
func required(path string) bool {
	for _, f := range Fields() {
		if strings.HasPrefix(path, f.Path+".") || strings.HasPrefix(path, f.Path+"[]") || path == f.Path {
			if !f.Required {
				return false
			}
		}
	}
	return true
}
