// Package facts says in words what a bundle records, and what differs between two.
//
// Trusted: nothing. Checked: only the form of what is read. A fact is the
// record's word; whether the record is true is for attest/bundle/verify.
package facts

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Fact is one thing that a record says. Its name is unique in its section.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	// Own is true for what differs from every job to the next, such as its id: Diff
	// leaves it out.
	Own bool `json:"own,omitempty"`
}

// Section is what a record says of one matter.
type Section struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	Facts []Fact `json:"facts"`
}

func (s *Section) add(name, format string, args ...any) {
	s.Facts = append(s.Facts, Fact{Name: name, Value: fmt.Sprintf(format, args...)})
}

func (s *Section) own(name, format string, args ...any) {
	s.Facts = append(s.Facts, Fact{Name: name, Value: fmt.Sprintf(format, args...), Own: true})
}

// Of reads a bundle's facts. Every section is there, without facts where the job
// did not come so far. A part that does not parse is an error, so that nothing is
// left out unseen.
func Of(b *bundle.Bundle) ([]Section, error) {
	r := reader{b: b}
	if r.st, r.err = bundle.ParseStatement(b.Statement); r.err != nil {
		return nil, r.err
	}
	out := []Section{
		r.outcome(), r.plan(), r.machine(), r.materials(), r.result(), r.approvals(), r.releases(), r.egress(), r.alerts(), r.outputs(), r.timeline(), r.reattestations(), r.parts(),
	}
	return out, r.err
}

// reader keeps the first error.
type reader struct {
	b   *bundle.Bundle
	st  bundle.Statement
	err error
}

// part decodes one part, and reports whether it is there.
func part[T any](r *reader, name bundle.Part, v *T) bool {
	body, ok := r.b.Parts[name]
	if !ok || r.err != nil {
		return false
	}
	var err error
	if *v, err = bundle.Decode[T](body); err != nil {
		r.err = fmt.Errorf("part %s: %w", name, err)
		return false
	}
	return true
}

// token reads the claims of a token without checking its signature.
func token[T any](r *reader, what, t string, v *T) bool {
	if r.err != nil {
		return false
	}
	parts := strings.Split(strings.TrimSpace(t), ".")
	if len(parts) != 3 {
		r.err = fmt.Errorf("%s is no signed token", what)
		return false
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(claims, v)
	}
	if err != nil {
		r.err = fmt.Errorf("%s: %w", what, err)
	}
	return err == nil
}

func (r *reader) outcome() Section {
	s := Section{Name: "outcome", Title: "How it ended"}
	o := r.st.Outcome
	s.own("job", "%s", r.st.JobID)
	s.add("state", "%s", o.State)
	s.add("stage", "%s", o.Stage)
	s.add("exit code", "%d", o.ExitCode)
	if o.Reason != "" {
		s.add("reason", "%s", o.Reason)
	}
	for i, c := range o.Checks {
		s.add(fmt.Sprintf("failed check %d", i+1), "%s: expected %s, found %s", c.ID, c.Expected, c.Found)
	}
	if o.Stop != nil {
		s.add("stopped by", "%s", o.Stop.By)
	}
	return s
}

func (r *reader) plan() Section {
	s := Section{Name: "plan", Title: "What was asked for"}
	s.add("plan digest", "%s", r.st.PlanDigest)
	body, ok := r.b.Parts[bundle.Plan]
	if !ok || r.err != nil {
		return s
	}
	// The plan's own fields, whichever there are, so that no new one goes unseen.
	var fields map[string]any
	if err := plan.Decode(body, bundle.MaxPart, &fields); err != nil {
		r.err = fmt.Errorf("part %s: %w", bundle.Plan, err)
		return s
	}
	flat(&s, "", fields)
	return s
}

// flat adds the leaves of a JSON value, by path.
func flat(s *Section, at string, v any) {
	join := func(k string) string {
		if at == "" {
			return k
		}
		return at + "." + k
	}
	switch v := v.(type) {
	case map[string]any:
		for _, k := range slices.Sorted(maps.Keys(v)) {
			flat(s, join(k), v[k])
		}
	case []any:
		if words, ok := strung(v); ok {
			s.add(at, "%s", words)
			return
		}
		for i, e := range v {
			// Lists of named things are compared by name and not by place.
			k := fmt.Sprint(i + 1)
			if m, ok := e.(map[string]any); ok {
				for _, id := range []string{"name", "host"} {
					if n, ok := m[id].(string); ok {
						k = n
					}
				}
			}
			flat(s, join(k), e)
		}
	case float64:
		s.add(at, "%s", number(v))
	default:
		s.add(at, "%v", v)
	}
}

// number writes whole numbers without an exponent.
func number(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }

// plainWord is a string that cannot be taken for several, for none, or for a number.
var plainWord = regexp.MustCompile(`^[^\s"\\0-9][^\s"\\]*$`)

// strung joins a list of strings and numbers, so that two that differ are two texts.
func strung(l []any) (string, bool) {
	var words []string
	for _, e := range l {
		switch e := e.(type) {
		case string:
			if !plainWord.MatchString(e) {
				e = strconv.Quote(e)
			}
			words = append(words, e)
		case float64:
			words = append(words, number(e))
		default:
			return "", false
		}
	}
	return strings.Join(words, " "), true
}

func (r *reader) machine() Section {
	s := Section{Name: "machine", Title: "What ran it, by the node's word"}
	var signed bundle.ImageSignature
	if part(r, bundle.ImageSignaturePart, &signed) {
		s.add("image signed by", "%s", signed.Signer)
	}
	var a bundle.Agent
	if part(r, bundle.AgentPart, &a) {
		s.add("node", "%s", a.Node)
		s.add("agent", "%s", a.Agent)
		s.add("containerd", "%s", a.Containerd)
		s.add("runtime", "%s", a.Runtime)
		s.add("shim", "%s", a.Shim)
		s.add("submitter", "%s", a.Submitter)
		if w := a.Attempt; w != nil {
			s.add("attempt", "%d", w.Number)
		}
		if d := a.Devices; d != nil {
			s.add("GPUs cleared", "%t", d.Cleared)
		}
	}
	return s
}

// materials has one fact for each component. Its version is the value, so that another
// version is one difference and not two.
func (r *reader) materials() Section {
	s := Section{Name: "materials", Title: "What its image is made from, as declared"}
	var list bundle.ImageSBOM
	if !part(r, bundle.ImageSBOMPart, &list) {
		return s
	}
	read, err := list.SBOM()
	if err != nil {
		r.err = fmt.Errorf("part %s: %w", bundle.ImageSBOMPart, err)
		return s
	}
	s.add("bill of materials", "%d components, signed by %s", len(read.Components), or(list.Signer, "nobody"))
	for _, c := range read.Components {
		kind, _, _ := strings.Cut(strings.TrimPrefix(c.PURL, "pkg:"), "/")
		s.add(strings.TrimSpace(or(kind, c.Type)+" "+c.Name), "%s", or(c.Version, "no version"))
	}
	return s
}

// perBoot are claims that differ from boot to boot or from one report to the next.
var perBoot = []string{"snp.report-id", "tpm.clock", "tpm.reset-count", "tpm.restart-count", "eat_nonce"}

func (r *reader) result() Section {
	s := Section{Name: "devices", Title: "What the verifier found of each device"}
	body, ok := r.b.Parts[bundle.Result]
	var res receipt.Result
	if !ok || !token(r, "the attestation result", string(body), &res) {
		return s
	}
	s.own("result", "%s", res.ID)
	s.add("verifier", "%s", res.Issuer)
	s.add("simulated", "%t", res.Simulated)
	for _, name := range slices.Sorted(maps.Keys(res.Submods)) {
		d := res.Submods[name]
		s.add(name+" verdict", "%s", d.Status)
		var claims Section
		flat(&claims, name, map[string]any(d.Claims))
		for _, f := range claims.Facts {
			f.Own = slices.Contains(perBoot, strings.TrimPrefix(f.Name, name+"."))
			s.Facts = append(s.Facts, f)
		}
	}
	return s
}

func (r *reader) approvals() Section {
	s := Section{Name: "approvals", Title: "Who allowed it"}
	var list []bundle.Approved
	if !part(r, bundle.Approvals, &list) {
		return s
	}
	for _, g := range list {
		var terms receipt.GrantTerms
		if err := plan.Decode(g.Terms, bundle.MaxPart, &terms); err != nil && r.err == nil {
			r.err = fmt.Errorf("part %s: terms: %w", bundle.Approvals, err)
			return s
		}
		s.own("grant "+terms.Grant, "for %s, asked for by %s, from %s to %s", strings.Join(terms.Assets, ", "), terms.Requester, stamp(terms.NotBefore), stamp(terms.NotAfter))
		for _, rule := range g.Rules {
			s.add("rule of "+rule.Asset, "%d of %s", rule.Count, rule.Group)
		}
		for _, a := range g.Approvals {
			var d receipt.Approval
			if err := plan.Decode(a.Document, bundle.MaxPart, &d); err != nil && r.err == nil {
				r.err = fmt.Errorf("part %s: %w", bundle.Approvals, err)
				return s
			}
			s.add(d.Approver+" "+d.Decision, "%s: %s", strings.Join(d.Assets, ", "), d.Reason+paren(d.Ticket))
		}
	}
	return s
}

func paren(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func (r *reader) releases() Section {
	s := Section{Name: "releases", Title: "Keys that were released"}
	var list []string
	if !part(r, bundle.Releases, &list) {
		return s
	}
	for _, t := range list {
		var rel receipt.Release
		if !token(r, "a release receipt", t, &rel) {
			return s
		}
		held := "its key store is not said"
		if h := rel.Held; h != nil {
			held = fmt.Sprintf("key store %s, version %v", h.Store, h.Version)
		}
		s.add(rel.Asset, "%s, %s", or(string(rel.AssetDigest), "no sealed files"), held)
		s.own(rel.Asset+" receipt", "grant %s, attempt %d, entry %d of the log, usable until %s", rel.Grant, rel.Attempt, rel.LogIndex, stamp(rel.NotAfter))
	}
	return s
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func (r *reader) egress() Section {
	s := Section{Name: "egress", Title: "Where it connected to"}
	var e bundle.Egress
	if !part(r, bundle.EgressPart, &e) {
		return s
	}
	type sum struct{ n, sent, received int64 }
	to := map[string]sum{}
	for _, c := range e.Connections {
		at := fmt.Sprintf("%s:%d", c.Host, c.Port)
		x := to[at]
		to[at] = sum{x.n + 1, x.sent + c.Sent, x.received + c.Received}
	}
	for _, at := range slices.Sorted(maps.Keys(to)) {
		s.add(at, "%d connections, %d bytes sent, %d received", to[at].n, to[at].sent, to[at].received)
	}
	refused := map[string]int64{}
	for _, d := range e.Denials {
		refused[fmt.Sprintf("refused %s:%d, %s", d.Host, d.Port, d.Rule)] += d.Count
	}
	for _, at := range slices.Sorted(maps.Keys(refused)) {
		s.add(at, "%d times", refused[at])
	}
	if e.Untold > 0 {
		s.add("refused without a name", "%d times", e.Untold)
	}
	if e.Lost {
		s.add("gateway", "died: not every connection is known")
	}
	return s
}

func (r *reader) alerts() Section {
	s := Section{Name: "findings", Title: "What the node's rules found"}
	var a bundle.Alerts
	if !part(r, bundle.AlertsPart, &a) {
		return s
	}
	s.add("rules", "%s", a.Rules)
	for _, f := range a.Findings {
		s.add(f.Rule, "%s, %s: %s, %d times", f.Severity, f.Action, strings.TrimSpace(strings.Join([]string{f.Kind, f.Process, f.Path, f.Address}, " ")), f.Count)
	}
	if a.Untold > 0 {
		s.add("more", "%d findings", a.Untold)
	}
	return s
}

func (r *reader) outputs() Section {
	s := Section{Name: "outputs", Title: "What came out"}
	var res bundle.Resume
	if part(r, bundle.ResumePart, &res) {
		if rec, err := receipt.DecodeCheckpointRecord(res.Record); err == nil {
			s.add("went on from", "checkpoint %d of job %s, %s", rec.Sequence, rec.JobID, rec.Digest)
		} else {
			s.add("went on from", "no checkpoint: there was none")
		}
	}
	var again bundle.Reseal
	if part(r, bundle.ResealPart, &again) {
		s.add("sealed anew", "%s", again.Record)
	}
	var list []bundle.Checkpoint
	part(r, bundle.Checkpoints, &list)
	for _, c := range list {
		s.add(fmt.Sprintf("checkpoint %d", c.Sequence), "%s, %d bytes, %s", c.Name, c.Bytes, c.Digest)
	}
	var l bundle.Logs
	if part(r, bundle.LogsDigest, &l) {
		s.add("standard output", "%d bytes, %s", l.Stdout.Bytes, l.Stdout.Digest)
		s.add("standard error", "%d bytes, %s", l.Stderr.Bytes, l.Stderr.Digest)
		s.add("cut", "%d bytes beyond the budget", l.Cut)
	}
	var st bundle.Status
	if part(r, bundle.HolderStatus, &st) {
		if m := st.Metrics; m != nil {
			for _, one := range m.Values {
				s.add("metric "+one.Name, "%g at last, %g to %g, %d values", one.Last, one.Min, one.Max, one.Count)
			}
			s.add("metrics cut", "%d values beyond the budget", m.Cut)
		}
		s.add("programs started", "%d", st.Execs)
		s.add("memory scrubbed", "%t", st.Scrubbed)
	}
	return s
}

func (r *reader) timeline() Section {
	s := Section{Name: "timeline", Title: "When"}
	for _, t := range r.st.Timeline {
		s.own(string(t.Stage), "%s, %s, from %s", t.Outcome, time.Duration(t.Nanos).Round(time.Millisecond), time.Unix(0, t.StartUnixNano).UTC().Format("2006-01-02 15:04:05.000Z"))
	}
	return s
}

func (r *reader) reattestations() Section {
	s := Section{Name: "reattestations", Title: "How it attested while it ran"}
	var l bundle.Reattestations
	if !part(r, bundle.ReattestPart, &l) {
		return s
	}
	refused := 0
	for _, a := range l.List {
		text := fmt.Sprintf("%s, %s, at %s; the job %s", a.Cause, a.Verdict, time.Unix(0, a.StartUnixNano).UTC().Format("2006-01-02 15:04:05.000Z"), a.Then)
		if len(a.Failed) > 0 {
			text += "; for " + strings.Join(a.Failed, ", ")
		}
		if a.Verdict != bundle.ReattestAffirmed {
			refused++
		}
		s.own("attestation "+strconv.Itoa(a.Number), "%s", text)
	}
	s.own("affirmed", "%d times", len(l.List)-refused+l.Omitted)
	s.add("not affirmed", "%d times", refused)
	return s
}

func (r *reader) parts() Section {
	s := Section{Name: "parts", Title: "Its parts"}
	for _, n := range slices.Sorted(maps.Keys(r.st.Parts)) {
		s.own(string(n), "%d bytes, %s", len(r.b.Parts[n]), r.st.Parts[n])
	}
	return s
}

func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format("2006-01-02 15:04:05Z") }
