package rules

import (
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Event is one thing that a job did.
type Event struct {
	Kind Kind
	At   time.Time
	// Process is the name the process gives itself: a word of the job, no proof.
	Process string
	// Path is the program or file; Digest is the program's, "sha256:<hex>", or "".
	Path, Digest string
	// Address is "IP:port", "name:port", or "unix:...".
	Address string
	Bytes   int64
}

// Finding is a rule that an event matched.
type Finding struct {
	Rule  Rule
	Event Event
	// Count is how many events of the rule there were so far in the job, this one included.
	Count int64
}

// Job is what rules know of a job besides its events.
type Job struct {
	// InImage says whether a file of the job's image has a digest. Nil: none has.
	InImage func(digest string) bool
	// Gateway is the job's way out; the zero value if it has none.
	Gateway netip.Addr
	// Granted are the files of the job's secrets: opening them is no finding.
	Granted []string
}

// Watch applies a set to one job's events. Its methods are not for concurrent use.
type Watch struct {
	set     *Set
	job     Job
	counts  []int64
	windows []window
}

// window sums bytes over a time, in steps of a sixteenth of it.
type window struct {
	steps [windowSteps]int64
	at    int64
	sum   int64
}

const windowSteps = 16

// Watch begins with a job's first event.
func (s *Set) Watch(j Job) *Watch {
	return &Watch{set: s, job: j, counts: make([]int64, len(s.rules)), windows: make([]window, len(s.rules))}
}

// Look returns the findings of one event, in the order of the rules.
func (w *Watch) Look(e Event) []Finding {
	if e.Kind == Open && slices.Contains(w.job.Granted, path.Clean(e.Path)) {
		return nil
	}
	var out []Finding
	for i, r := range w.set.rules {
		if r.When != e.Kind || !w.matches(i, r, e) {
			continue
		}
		w.counts[i]++
		out = append(out, Finding{Rule: r.Rule, Event: e, Count: w.counts[i]})
	}
	return out
}

func (w *Watch) matches(i int, r rule, e Event) bool {
	m := r.Match
	if m.NotInImage && e.Digest != "" && w.job.InImage != nil && w.job.InImage(e.Digest) {
		return false
	}
	if len(r.paths) > 0 && (!matchAny(r.paths, e.Path) || matchAny(r.notPaths, e.Path)) {
		return false
	}
	if m.NotAllowed && w.allowed(e.Address) {
		return false
	}
	if m.BytesOver > 0 && !w.windows[i].over(e, time.Duration(m.Window), m.BytesOver) {
		return false
	}
	return true
}

// matchAny looks at the path as the kernel would resolve its dots.
func matchAny(patterns []*regexp.Regexp, p string) bool {
	clean := path.Clean(p)
	return slices.ContainsFunc(patterns, func(re *regexp.Regexp) bool { return re.MatchString(clean) })
}

// allowed says whether an address leads nowhere but to this container or to its
// way out. What cannot be read is not allowed.
func (w *Watch) allowed(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return false
	}
	ip := at.Addr().Unmap()
	return ip.IsLoopback() || w.job.Gateway.IsValid() && ip == w.job.Gateway
}

// over adds an event and says whether the window holds more than limit. It empties
// the window when it does, so that one burst is one finding.
func (w *window) over(e Event, length time.Duration, limit int64) bool {
	step := max(length/windowSteps, 1)
	at := e.At.UnixNano() / int64(step)
	// Events may come a little out of order: older ones count as of the newest step.
	for ; w.at < at; w.at++ {
		if at-w.at > windowSteps {
			w.steps, w.sum, w.at = [windowSteps]int64{}, 0, at
			break
		}
		next := &w.steps[(w.at+1)%windowSteps]
		w.sum -= *next
		*next = 0
	}
	w.steps[w.at%windowSteps] += max(e.Bytes, 0)
	w.sum += max(e.Bytes, 0)
	if w.sum <= limit {
		return false
	}
	*w = window{at: w.at}
	return true
}
