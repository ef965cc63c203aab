package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

func (c *cli) egressCmd() *cobra.Command {
	return group("egress", "Show where a job connected to, and propose what it may", c.egressReportCmd(), c.egressProposeCmd())
}

// egressView is what is known of a job's connections.
type egressView struct {
	bundle.Egress
	// Running is true if the job goes on: connections that are open are missing.
	Running bool `json:"running"`
	plan    plan.Plan
}

func (c *cli) egressReportCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "report JOB",
		Short: "Show where a job connected to and what it was refused",
		Long: `report shows the connections of a job and the ones that it was refused, by the
program that tried, where the trace shows it. Of a job that runs it shows what
has ended so far.`,
		Example: "  coffer egress report 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		v, err := c.egressOf(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, v)
		}
		return c.printEgress(v)
	}
	return cmd
}

func (c *cli) egressProposeCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "propose JOB",
		Short: "Write the egress list with which a job would not have been refused",
		Long: `propose writes the egress part of a job file, for people to review: what the
plan allows, and below it the names that the job asked for in vain, with who asked.
Every change makes another plan, so that grants have to be approved for it.`,
		Example: "  coffer egress propose 01JD3V8Q",
		Args:    exactly("the id of a job that has ended"),
		RunE: func(cmd *cobra.Command, args []string) error {
			v, err := c.egressOf(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if v.Running {
				return &exitError{code: exitUnknown, text: fmt.Sprintf("job %s runs: propose when it has ended; `coffer egress report %s` shows what there is", args[0], args[0])}
			}
			_, err = fmt.Fprint(c.stdout, proposal(args[0], v))
			return err
		},
	}
}

// egressOf reads the record in the bundle of a job that has ended, or what the
// events of a running one say.
func (c *cli) egressOf(ctx context.Context, id string) (egressView, error) {
	a, err := c.agent(daemon.RoleEngineer)
	if err != nil {
		return egressView{}, err
	}
	j, err := c.getJob(ctx, a, id)
	if err != nil {
		return egressView{}, err
	}
	if !ended(j.GetState()) {
		return c.egressSoFar(ctx, a, id)
	}
	res, err := call(ctx, c, "get the evidence of job "+id, serverAgent, a.Bundle, &agentv1.BundleRequest{Id: id})
	if err != nil {
		return egressView{}, err
	}
	b, err := bundle.Parse(res.GetBundle())
	if err != nil {
		return egressView{}, fmt.Errorf("evidence of job %s: %w", id, err)
	}
	v := egressView{}
	if v.plan, err = plan.Parse(b.Parts[bundle.Plan]); err != nil {
		return egressView{}, fmt.Errorf("evidence of job %s: %w", id, err)
	}
	part, ok := b.Parts[bundle.EgressPart]
	if !ok && len(v.plan.Egress) == 0 {
		return egressView{}, &exitError{code: exitFailed, text: fmt.Sprintf("job %s had no network: its plan allows none", id)}
	}
	if !ok {
		return egressView{}, &exitError{code: exitFailed, text: fmt.Sprintf("job %s did not start: there is nothing to report", id)}
	}
	if v.Egress, err = bundle.Decode[bundle.Egress](part); err != nil {
		return egressView{}, fmt.Errorf("evidence of job %s: %w", id, err)
	}
	return v, nil
}

func (c *cli) egressSoFar(ctx context.Context, a agentv1connect.AgentServiceClient, id string) (egressView, error) {
	v := egressView{Running: true}
	v.Connections, v.Denials = []bundle.Connection{}, []bundle.Denial{}
	err := c.events(ctx, a, id, false, func(e *agentv1.WatchResponse) error {
		g := e.GetEgress()
		switch {
		case g == nil:
		case g.GetRule() == "":
			v.Connections = append(v.Connections, bundle.Connection{Host: g.GetHost(), Port: int(g.GetPort()), Sent: g.GetSent(), Received: g.GetReceived(), End: g.GetEnd()})
		default:
			i := slices.IndexFunc(v.Denials, func(d bundle.Denial) bool {
				return d.Host == g.GetHost() && d.Port == int(g.GetPort()) && d.Rule == g.GetRule()
			})
			if i < 0 {
				i = len(v.Denials)
				v.Denials = append(v.Denials, bundle.Denial{FirstUnixNano: e.GetTimeUnixNano(), Host: g.GetHost(), Port: int(g.GetPort()), Rule: g.GetRule()})
			}
			v.Denials[i].Count, v.Denials[i].Process, v.Denials[i].Digest = g.GetCount(), g.GetProcess(), g.GetDigest()
		}
		return nil
	})
	return v, err
}

// usedOf sums up the connections to one destination.
type usedOf struct {
	connections    int
	sent, received int64
}

func (v egressView) used() map[string]usedOf {
	out := map[string]usedOf{}
	for _, k := range v.Connections {
		at := destination(k.Host, k.Port)
		u := out[at]
		out[at] = usedOf{u.connections + 1, u.sent + k.Sent, u.received + k.Received}
	}
	return out
}

func destination(host string, port int) string {
	if port == 0 {
		return host
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

func (c *cli) printEgress(v egressView) error {
	used := v.used()
	budget := map[string]string{}
	for _, e := range v.plan.Egress {
		at := destination(e.Host, e.Port)
		budget[at] = strconv.FormatInt(e.MaxBytes, 10)
		if _, ok := used[at]; !ok {
			used[at] = usedOf{} // a destination that nobody asked for has its line too
		}
	}
	rows := [][]string{{"DESTINATION", "CONNECTIONS", "SENT", "OF", "RECEIVED"}}
	for _, at := range slices.Sorted(maps.Keys(used)) {
		u := used[at]
		rows = append(rows, []string{clean(at), strconv.Itoa(u.connections), strconv.FormatInt(u.sent, 10), orDash(budget[at]), strconv.FormatInt(u.received, 10)})
	}
	if err := table(c.stdout, rows...); err != nil {
		return err
	}
	if len(v.Denials) > 0 {
		rows = [][]string{{"REFUSED", "RULE", "TIMES", "PROCESS", "DIGEST"}}
		for _, d := range v.Denials {
			rows = append(rows, []string{orDash(clean(destination(d.Host, d.Port))), clean(d.Rule), strconv.FormatInt(d.Count, 10), orDash(clean(d.Process)), orDash(clean(d.Digest))})
		}
		if _, err := fmt.Fprintln(c.stdout); err != nil {
			return err
		}
		if err := table(c.stdout, rows...); err != nil {
			return err
		}
	}
	var errs []error
	say := func(on bool, format string, args ...any) {
		if on {
			_, err := fmt.Fprintf(c.stdout, format+"\n", args...)
			errs = append(errs, err)
		}
	}
	packets := int64(0)
	for _, n := range v.Dropped {
		packets += n
	}
	say(v.Untold > 0, "%d more refusals, beyond those that the plan has told by name", v.Untold)
	say(packets > 0, "%d packets that were not for the gateway were dropped", packets)
	say(v.Lost, "the gateway died: what it let through after its last report is not known")
	say(v.Running, "the job runs: connections that are open are not in this list")
	return errors.Join(errs...)
}

// proposedBytes is what a proposal allows a new destination.
const proposedBytes = 64 << 10

// proposal is the egress part of a job file in YAML. Names in it are names: whatever
// else the job asked for is in comments, quoted.
func proposal(id string, v egressView) string {
	var b, rest strings.Builder
	fmt.Fprintf(&b, "# From job %s. Look at every name that is new, then put this in the place of egress\n# in the job file. It makes another plan: grants have to be approved for it.\negress:\n", id)
	used := v.used()
	spent, more := map[string]bool{}, map[string][]bundle.Denial{}
	for _, d := range v.Denials {
		host, err := plan.ParseHost(d.Host)
		port := d.Port
		if d.Rule == "dns-not-listed" {
			port = 443 // asked for by name alone
		}
		switch {
		case d.Rule == "budget":
			spent[destination(d.Host, d.Port)] = true
		case (d.Rule == "not-listed" || d.Rule == "dns-not-listed") && err == nil && port > 0 && !v.plan.Allows(host, port):
			at := destination(host, port)
			more[at] = append(more[at], d)
		default:
			fmt.Fprintf(&rest, "#   %s: %s%s\n", strconv.QuoteToASCII(destination(d.Host, d.Port)), clean(d.Rule), by(d))
		}
	}
	entry := func(host string, port int, bytes, perSecond int64) {
		fmt.Fprintf(&b, "  - host: %s\n    port: %d\n    maxBytes: %d\n", host, port, bytes)
		if perSecond > 0 {
			fmt.Fprintf(&b, "    bytesPerSecond: %d\n", perSecond)
		}
	}
	for _, e := range v.plan.Egress {
		at, bytes := destination(e.Host, e.Port), e.MaxBytes
		switch {
		case spent[at]:
			bytes *= 2
			fmt.Fprintf(&b, "  # twice as much as before: the job was cut after %d bytes\n", used[at].sent)
		case used[at].connections == 0:
			fmt.Fprintf(&b, "  # not used by this job\n")
		}
		entry(e.Host, e.Port, bytes, e.BytesPerSecond)
	}
	for _, at := range slices.SortedFunc(maps.Keys(more), cmp.Compare) {
		count := int64(0)
		for _, d := range more[at] {
			count += d.Count
		}
		fmt.Fprintf(&b, "  # new: asked for %d times%s\n", count, by(more[at][0]))
		host, port, _ := net.SplitHostPort(at) //nolint:errcheck // joined above
		n, _ := strconv.Atoi(port)             //nolint:errcheck // as well
		entry(host, n, proposedBytes, 0)
	}
	if rest.Len() > 0 {
		b.WriteString("# Refused, and not to be allowed by a list:\n" + rest.String())
	}
	return b.String()
}

func by(d bundle.Denial) string {
	if d.Process == "" {
		return ""
	}
	s := " by " + strconv.QuoteToASCII(d.Process)
	if d.Digest != "" {
		s += " (" + clean(d.Digest) + ")"
	}
	return s
}
