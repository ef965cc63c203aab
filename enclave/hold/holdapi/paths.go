package holdapi

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// MaxPatterns bounds the patterns of one holder.
const MaxPatterns = 256

// PathPattern compiles a pattern of whole absolute paths without dots: * stands for
// anything but '/', a trailing /** for the folder and everything below.
func PathPattern(glob string) (*regexp.Regexp, error) {
	below := strings.HasSuffix(glob, "/**")
	base := strings.TrimSuffix(glob, "/**")
	if !strings.HasPrefix(glob, "/") || strings.Contains(base, "**") || path.Clean("/"+base) != "/"+strings.TrimPrefix(base, "/") {
		return nil, fmt.Errorf("%.100q: want an absolute path, with * for a part of a name and /** at the end only", glob)
	}
	re := strings.ReplaceAll(regexp.QuoteMeta(base), `\*`, `[^/]*`)
	if below {
		re += `(/.*)?`
	}
	return regexp.Compile(`^` + re + `$`)
}
