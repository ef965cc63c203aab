package hold

import (
	"fmt"
	"path"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"
	pb "gvisor.dev/gvisor/pkg/sentry/seccheck/points/points_go_proto"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// opens picks, of all the files that a job tries to open, those that somebody asked
// to be told of: a job opens thousands, and the trace must not drown in them.
type opens []*regexp.Regexp

func newOpens(globs []string) (opens, error) {
	if len(globs) > holdapi.MaxPatterns {
		return nil, fmt.Errorf("%d patterns of paths, at most %d are allowed", len(globs), holdapi.MaxPatterns)
	}
	var out opens
	for _, g := range globs {
		re, err := holdapi.PathPattern(g)
		if err != nil {
			return nil, fmt.Errorf("watched path %w", err)
		}
		out = append(out, re)
	}
	return out, nil
}

// look returns the path of an attempt to open a file, and whether it is asked for.
// Symbolic links are not resolved: the trace shows what the job asked for.
func (o opens) look(m *pb.Open) (string, bool) {
	p := m.GetPathname()
	if !path.IsAbs(p) {
		base := m.GetFdPath()
		if m.GetFd() == unix.AT_FDCWD || base == "" {
			base = m.GetContextData().GetCwd()
		}
		p = path.Join("/", base, p)
	}
	p = path.Clean(p)
	return p, slices.ContainsFunc(o, func(re *regexp.Regexp) bool { return re.MatchString(p) })
}
