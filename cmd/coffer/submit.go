package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// preview is a plan and what can be said of it before the job is submitted. Only the
// plan is approved; the rest may change with every call.
type preview struct {
	Digest string          `json:"planDigest"`
	Plan   json.RawMessage `json:"plan"`
	// Keys says for each asset what stands between the plan and its key.
	Keys []string `json:"preview"`
	// Requests are the commands that ask for the grants which nobody has asked for, one for
	// each owner.
	Requests []string `json:"requests,omitempty"`
	// Lacks is what the node lacks at this moment of what the job file names.
	Lacks []string `json:"lacks,omitempty"`
	// Verdict is what the verifier says of the machine as it is: accepted, refused or
	// unknown. A job is attested anew.
	Verdict *verdict `json:"predictedVerdict,omitempty"`
	// Approvals are the groups whose approval the job file expects. The owners' rules
	// say who must approve.
	Approvals []string `json:"expectedApprovals,omitempty"`
	// Node says what the node has for the job.
	Node string `json:"node,omitempty"`
	// ComparedWith is the last job of the same name that got its keys and ended well,
	// and Changes what is different in this plan: none if it is the same plan.
	ComparedWith string   `json:"comparedWith,omitempty"`
	Changes      []change `json:"changes,omitempty"`
	// NotCompared is why there is no comparison although there may be such a job.
	NotCompared string `json:"notCompared,omitempty"`
}

// verdict is a prediction.
type verdict struct {
	Verdict   string     `json:"verdict"`
	Simulated bool       `json:"simulated"`
	Failed    check.List `json:"failedChecks,omitempty"`
	// Unknown is why nobody could tell.
	Unknown string `json:"unknown,omitempty"`
}

func (v *verdict) lines() []string {
	word := v.Verdict
	if v.Simulated {
		word += ", simulated"
	}
	out := []string{"verdict  predicted: " + strings.TrimSuffix(word+": "+v.Unknown, ": ") + " (the machine as it is; a job is attested anew)"}
	for _, k := range v.Failed {
		out = append(out, fmt.Sprintf("  %s: expected %s, found %s", k.ID, orDash(k.Expected), orDash(k.Found)))
	}
	return out
}

// change is a value of a plan that is not what it was. Was is empty for one that is
// new, and Is for one that is gone.
type change struct {
	Field string `json:"field"`
	Was   string `json:"was,omitempty"`
	Is    string `json:"is,omitempty"`
}

func (g change) String() string {
	switch {
	case g.Was == "":
		return "+ " + g.Field + ": " + g.Is
	case g.Is == "":
		return "- " + g.Field + ": " + g.Was
	}
	return "~ " + g.Field + ": " + g.Was + " -> " + g.Is
}

func (c *cli) previewPlan(ctx context.Context, a agentv1connect.AgentServiceClient, name string, file []byte) (preview, error) {
	var res *agentv1.PlanResponse
	err := c.whileFetching(ctx, a, file, func() (err error) {
		res, err = call(ctx, c, "plan "+name, serverAgent, a.Plan, &agentv1.PlanRequest{JobFile: file, Predict: true})
		return err
	})
	if err != nil {
		return preview{}, err
	}
	p := preview{Digest: res.GetPlanDigest(), Plan: res.GetPlan()}
	if !json.Valid(p.Plan) {
		return preview{}, fmt.Errorf("plan %s: the agent's answer is not JSON", name)
	}
	p.Lacks = res.GetLacks()
	if p.Keys, p.Requests, err = c.previewGrants(ctx, p.Digest, p.Plan); err != nil {
		return preview{}, err
	}
	if v := res.GetPrediction(); v != nil {
		p.Verdict = &verdict{v.GetVerdict(), v.GetSimulated(), checksOf(v.GetFailed()), v.GetUnknown()}
	}
	if p.Verdict != nil && p.Verdict.Simulated {
		for i := range p.Requests {
			p.Requests[i] += " --allow-simulated"
		}
	}
	if spec, err := jobspec.Parse(file); err == nil {
		p.Approvals = spec.Approvals
	}
	if room, err := a.Capacity(ctx, connectRequest(&agentv1.CapacityRequest{})); err == nil {
		m := room.Msg
		p.Node = fmt.Sprintf("%d of %d GPUs and %s of %s memory free, %d jobs run, %d wait",
			m.GetFreeGpus(), m.GetGpus(), size(m.GetFreeMemoryBytes()), size(m.GetMemoryBytes()), m.GetRunning(), m.GetQueued())
	}
	if p.ComparedWith, p.Changes, err = c.comparePlan(ctx, a, p); err != nil {
		// The plan stands by itself.
		p.ComparedWith, p.Changes, p.NotCompared = "", nil, err.Error()
	}
	return p, nil
}

// comparePlan compares a plan with that of the last job of its name that ended well.
func (c *cli) comparePlan(ctx context.Context, a agentv1connect.AgentServiceClient, p preview) (job string, changes []change, err error) {
	var named struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(p.Plan, &named); err != nil || named.Name == "" {
		return "", nil, err
	}
	res, err := call(ctx, c, "list jobs", serverAgent, a.List, &agentv1.ListRequest{PageSize: 500, State: stateSucceeded})
	if err != nil {
		return "", nil, err
	}
	var last *agentv1.Job
	for _, j := range res.GetJobs() {
		if j.GetName() == named.Name && (last == nil || j.GetEndedUnix() > last.GetEndedUnix()) {
			last = j
		}
	}
	switch {
	case last == nil:
		return "", nil, nil
	case last.GetPlanDigest() == p.Digest:
		return last.GetId(), nil, nil
	}
	got, err := call(ctx, c, "get the plan of job "+last.GetId(), serverAgent, a.Bundle, &agentv1.BundleRequest{Id: last.GetId()})
	if err != nil {
		return "", nil, err
	}
	b, err := bundle.Parse(got.GetBundle())
	if err != nil {
		return "", nil, fmt.Errorf("read the bundle of job %s: %w", last.GetId(), err)
	}
	changes, err = diffJSON(b.Parts[bundle.Plan], p.Plan)
	return last.GetId(), changes, err
}

// diffJSON compares two JSON documents value by value.
func diffJSON(was, is []byte) ([]change, error) {
	values := [2]map[string]string{{}, {}}
	for i, b := range [][]byte{was, is} {
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil {
			return nil, fmt.Errorf("compare plans: %w", err)
		}
		flatten("", v, values[i])
	}
	var out []change
	for k, v := range values[0] {
		if now := values[1][k]; now != v {
			out = append(out, change{k, v, now})
		}
	}
	for k, v := range values[1] {
		if _, had := values[0][k]; !had {
			out = append(out, change{k, "", v})
		}
	}
	slices.SortFunc(out, func(a, b change) int { return strings.Compare(a.Field, b.Field) })
	return out, nil
}

func flatten(at string, v any, into map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			flatten(strings.TrimPrefix(at+"."+k, "."), e, into)
		}
	case []any:
		for i, e := range v {
			flatten(fmt.Sprintf("%s[%d]", at, i), e, into)
		}
	case string:
		into[at] = strconv.Quote(v)
	default:
		into[at] = fmt.Sprint(v)
	}
}

// sayPreview writes everything but the plan for people.
func (c *cli) sayPreview(p preview) error {
	var say []string
	for _, k := range p.Keys {
		say = append(say, "key      "+k)
	}
	for _, r := range p.Requests {
		say = append(say, "next     "+r)
	}
	for _, l := range p.Lacks {
		say = append(say, "lacks    "+l)
	}
	if p.Verdict != nil {
		say = append(say, p.Verdict.lines()...)
	}
	if len(p.Approvals) > 0 {
		say = append(say, "expects  approval by "+strings.Join(p.Approvals, ", ")+", as the job file says; the owners' rules decide")
	}
	var shown struct {
		Egress []struct {
			Host     string `json:"host"`
			Port     int    `json:"port"`
			MaxBytes int64  `json:"maxBytes"`
		} `json:"egress"`
	}
	if err := json.Unmarshal(p.Plan, &shown); err == nil {
		for _, e := range shown.Egress {
			say = append(say, fmt.Sprintf("egress   %s, at most %s", destination(e.Host, e.Port), size(e.MaxBytes)))
		}
	}
	if p.Node != "" {
		say = append(say, "node     "+p.Node)
	}
	switch {
	case p.NotCompared != "":
		say = append(say, "changes  cannot be told: "+p.NotCompared)
	case p.ComparedWith != "" && len(p.Changes) == 0:
		say = append(say, "changes  none: job "+p.ComparedWith+" had the same plan and ended well")
	case p.ComparedWith != "":
		say = append(say, "changes  since job "+p.ComparedWith+", the last of this name that ended well:")
		for _, g := range p.Changes {
			say = append(say, "  "+g.String())
		}
	}
	for _, line := range say {
		if _, err := fmt.Fprintln(c.stderr, clean(line)); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) planCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "plan JOB.yaml",
		Short: "Resolve a job file to its plan digest, which grants name, without running it",
		Long: `plan prints the plan digest and the plan: what people approve and what the machine
attests. Beside it, it says how the keys stand, what the verifier says of the
machine as it is, what the node has, and what has changed since the last job of
that name that ended well.`,
		Example: "  coffer plan examples/fashion-mnist/job.yaml\n  coffer plan - < job.yaml\n  coffer plan job.yaml --set env.EPOCHS=3",
		Args:    exactly("a job file"),
	}
	set, out := settingsFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		file, err := c.jobFile(args[0], *set)
		if err != nil {
			return err
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		p, err := c.previewPlan(cmd.Context(), a, args[0], file)
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, p)
		}
		var pretty bytes.Buffer
		if err := json.Indent(&pretty, p.Plan, "", "  "); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c.stdout, "%s\n%s\n", clean(p.Digest), pretty.Bytes()); err != nil {
			return err
		}
		return c.sayPreview(p)
	}
	return cmd
}

// submission is what submit and retry have in common.
type submission struct {
	name  string
	file  []byte
	plan  string
	key   string
	watch bool
	out   format
}

func (c *cli) submitCmd() *cobra.Command {
	var s submission
	var dry bool
	cmd := &cobra.Command{
		Use:   "submit JOB.yaml",
		Short: "Submit a job",
		Long: `submit hands a job to the node agent and prints its id. With --watch it shows
every stage with its time, what the job prints and the checkpoints as they are
sealed, until the job has ended: on a terminal as one picture that moves, elsewhere
as lines. Numbers that the job prints as lines of JSON are plotted. Ctrl-C
detaches; the job goes on.

With --plan nothing is submitted but that plan: the one that was approved.`,
		Example: "  coffer submit job.yaml --watch\n  coffer submit job.yaml --plan sha384:... --idempotency-key nightly-2026-03-01\n  coffer submit job.yaml --set env.EPOCHS=3 --dry-run",
		Args:    exactly("a job file"),
	}
	cmd.Flags().BoolVarP(&s.watch, "watch", "w", false, "follow the job until it has ended")
	cmd.Flags().StringVar(&s.key, "idempotency-key", "", "the same `key` with the same file answers with the same job")
	cmd.Flags().StringVar(&s.plan, "plan", "", "submit only if the job file resolves to this plan `digest`")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "say what would be submitted, and submit nothing")
	set, out := settingsFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if s.plan != "" {
			if _, err := plan.ParseDigest(s.plan); err != nil {
				return usagef(cmd, "--plan: %s", err)
			}
		}
		var err error
		s.name, s.out = args[0], *out
		if s.file, err = c.jobFile(args[0], *set); err != nil {
			return err
		}
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		if !dry {
			return c.submit(cmd.Context(), a, s)
		}
		p, err := c.previewPlan(cmd.Context(), a, args[0], s.file)
		if err != nil {
			return err
		}
		if err := samePlan(s.plan, p.Digest); err != nil {
			return err
		}
		if s.out == formatJSON {
			return writeJSON(c.stdout, p)
		}
		if _, err := fmt.Fprintf(c.stdout, "%s\n", clean(p.Digest)); err != nil {
			return err
		}
		if err := c.sayPreview(p); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.stderr, "dry run: nothing was submitted")
		return err
	}
	return cmd
}

// samePlan refuses a plan other than the one that was asked for, if one was.
func samePlan(want, got string) error {
	if want == "" || want == got {
		return nil
	}
	return &exitError{code: exitRefused, text: fmt.Sprintf("the job file resolves to another plan, %s: nothing was submitted; `coffer plan` shows what changed", got)}
}

// submit submits a job, if it is the plan that was asked for, and follows it.
func (c *cli) submit(ctx context.Context, a agentv1connect.AgentServiceClient, s submission) error {
	if s.key == "" {
		// Makes a repeated delivery of this one call harmless.
		s.key = rand.Text()
	}
	var res *agentv1.SubmitResponse
	err := c.whileFetching(ctx, a, s.file, func() error {
		if s.plan != "" {
			p, err := call(ctx, c, "plan "+s.name, serverAgent, a.Plan, &agentv1.PlanRequest{JobFile: s.file})
			if err != nil {
				return err
			}
			if err := samePlan(s.plan, p.GetPlanDigest()); err != nil {
				return err
			}
		}
		var err error
		res, err = call(ctx, c, "submit "+s.name, serverAgent, a.Submit, &agentv1.SubmitRequest{JobFile: s.file, IdempotencyKey: s.key})
		return err
	})
	if err != nil {
		return err
	}
	job := res.GetJob()
	if err := knownJob(job, job.GetId()); err != nil {
		return err
	}
	for _, l := range res.GetLacks() {
		if _, err := fmt.Fprintf(c.stderr, "the node lacks what the job needs to begin: %s\n", clean(l)); err != nil {
			return err
		}
	}
	if s.plan != "" && job.GetPlanDigest() != s.plan {
		// An image name or a policy came to mean something else between the calls.
		_, err := call(ctx, c, "cancel job "+job.GetId(), serverAgent, a.Cancel, &agentv1.CancelRequest{Id: job.GetId()})
		return errors.Join(&exitError{code: exitRefused, text: "job " + job.GetId() + " has another plan, " + job.GetPlanDigest() + ", and was cancelled"}, err)
	}
	switch {
	case s.watch && s.out == formatJSON:
		return c.watchJSON(ctx, a, job.GetId())
	case s.out == formatJSON:
		return writeJSON(c.stdout, viewJob(job))
	case !s.watch:
		if _, err := fmt.Fprintln(c.stdout, job.GetId()); err != nil {
			return err
		}
		_, err := fmt.Fprintf(c.stderr, "submitted %s; follow it with `coffer watch %s`, or `coffer logs -f %s`\n", clean(job.GetName()), job.GetId(), job.GetId())
		return err
	}
	if _, err := fmt.Fprintf(c.stdout, "job %s  %s\nplan %s\n", job.GetId(), clean(job.GetName()), clean(job.GetPlanDigest())); err != nil {
		return err
	}
	return c.watch(ctx, a, job.GetId(), job.GetName())
}

func (c *cli) watchCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "watch JOB",
		Short:   "Show a job while it goes on, as submit --watch does",
		Example: "  coffer watch 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return c.watchJSON(cmd.Context(), a, args[0])
		}
		j, err := c.getJob(cmd.Context(), a, args[0])
		if err != nil {
			return err
		}
		return c.watch(cmd.Context(), a, j.GetId(), j.GetName())
	}
	return cmd
}

func (c *cli) retryCmd() *cobra.Command {
	var s submission
	var path string
	cmd := &cobra.Command{
		Use:   "retry JOB",
		Short: "Submit the plan of a job that has ended once more",
		Long: `retry submits what a job was submitted as, as a new job with the same plan, so
that the same grants hold. The node keeps no values of variables: a job that has
some needs its job file again, with --file.`,
		Example: "  coffer retry 01JD3V8Q --watch\n  coffer retry 01JD3V8Q --file job.yaml",
		Args:    exactly("a job id"),
	}
	cmd.Flags().StringVar(&path, "file", "", "the job `file` that the job was submitted from")
	cmd.Flags().BoolVarP(&s.watch, "watch", "w", false, "follow the job until it has ended")
	cmd.Flags().StringVar(&s.key, "idempotency-key", "", "the same `key` with the same file answers with the same job")
	set, out := settingsFlag(cmd), outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		j, err := c.getJob(cmd.Context(), a, args[0])
		if err != nil {
			return err
		}
		if !ended(j.GetState()) {
			return &exitError{code: exitFailed, text: fmt.Sprintf("job %s is %s: cancel it first, or wait for its end", j.GetId(), clean(j.GetState()))}
		}
		if path != "" {
			s.file, err = c.jobFile(path, *set)
		} else {
			s.file, err = c.jobFileOf(cmd, a, j)
		}
		if err != nil {
			return err
		}
		s.name, s.plan, s.out = "job "+j.GetId(), j.GetPlanDigest(), *out
		return c.submit(cmd.Context(), a, s)
	}
	return cmd
}

// jobFileOf returns the job file of a job out of its bundle, if it is all that the job
// was submitted as.
func (c *cli) jobFileOf(cmd *cobra.Command, a agentv1connect.AgentServiceClient, j *agentv1.Job) ([]byte, error) {
	res, err := call(cmd.Context(), c, "get the job file of job "+j.GetId(), serverAgent, a.Bundle, &agentv1.BundleRequest{Id: j.GetId()})
	if err != nil {
		return nil, err
	}
	b, err := bundle.Parse(res.GetBundle())
	if err != nil {
		return nil, fmt.Errorf("read the bundle of job %s: %w", j.GetId(), err)
	}
	spec, err := jobspec.Parse(b.Parts[bundle.JobFile])
	if err != nil {
		return nil, fmt.Errorf("read the job file of job %s: %w", j.GetId(), err)
	}
	if len(spec.Env) > 0 {
		return nil, usagef(cmd, "job %s has variables, whose values the node does not keep: name its job file with --file", j.GetId())
	}
	return b.Parts[bundle.JobFile], nil
}
