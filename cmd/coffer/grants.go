package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/daemon"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
	"github.com/coffer-run/coffer/runner/reasons"
)

// grantView is a grant in JSON output.
type grantView struct {
	ID             string     `json:"id"`
	Assets         []string   `json:"assets"`
	PlanDigest     string     `json:"planDigest"`
	NotBefore      *time.Time `json:"notBefore,omitempty"`
	NotAfter       *time.Time `json:"notAfter,omitempty"`
	MaxReleases    int32      `json:"maxReleases"`
	Used           int32      `json:"used"`
	State          string     `json:"state"`
	Owner          string     `json:"owner"`
	AllowSimulated bool       `json:"allowSimulated"`
	Requester      string     `json:"requester,omitempty"`
	Principals     []string   `json:"principals,omitempty"`
	Purpose        string     `json:"purpose,omitempty"`
	Missing        []string   `json:"missing,omitempty"`
	EndedBy        string     `json:"endedBy,omitempty"`
	EndedReason    string     `json:"endedReason,omitempty"`
	Ended          *time.Time `json:"ended,omitempty"`
	Approvals      []approval `json:"approvals,omitempty"`
}

// approval is one signed decision in JSON output.
type approval struct {
	Approver string     `json:"approver"`
	Decision string     `json:"decision"`
	Reason   string     `json:"reason"`
	Ticket   string     `json:"ticket,omitempty"`
	Time     *time.Time `json:"time,omitempty"`
}

func viewGrant(g *brokerv1.Grant) grantView {
	return grantView{
		ID: g.GetId(), Assets: g.GetAssets(), PlanDigest: g.GetPlanDigest(), NotBefore: stamp(g.GetNotBeforeUnix()), NotAfter: stamp(g.GetNotAfterUnix()),
		MaxReleases: g.GetMaxReleases(), Used: g.GetUsed(), State: g.GetState(), Owner: g.GetOwner(), AllowSimulated: g.GetAllowSimulated(),
		Requester: g.GetRequester(), Principals: g.GetPrincipals(), Purpose: g.GetPurpose(), Missing: g.GetMissing(),
		EndedBy: g.GetEndedBy(), EndedReason: g.GetEndedReason(), Ended: stamp(g.GetEndedUnix()),
	}
}

func (c *cli) grantCmd() *cobra.Command {
	return group("grant", "Ask for, approve and give the use of assets", c.grantCreateCmd(), c.grantRequestCmd(), c.grantShowCmd(), c.grantApproveCmd(), c.grantDenyCmd())
}

// maxGrant bounds how long a grant may last.
const maxGrant = 366 * 24 * time.Hour

// grantFlags are what a grant and a request for one have in common.
type grantFlags struct {
	digest     string
	assets     []string
	releases   int32
	lasts      time.Duration
	simulated  bool
	principals []string
	purpose    string
	key        string
	job        string
}

func (f *grantFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.digest, "plan", "", "plan `digest`, as coffer plan prints it")
	cmd.Flags().StringArrayVar(&f.assets, "asset", nil, "`name` of an asset; may be repeated (default: with --job all that the job names)")
	cmd.Flags().StringVar(&f.job, "job", "", "job `file` whose plan it is, in place of --plan")
	cmd.Flags().Int32Var(&f.releases, "releases", 0, "`number` of attempts that may use the grant (default: 1, and with --job the retries of the job)")
	cmd.Flags().DurationVar(&f.lasts, "for", 24*time.Hour, "how `long` the grant lasts, from now")
	cmd.Flags().BoolVar(&f.simulated, "allow-simulated", false, "accept evidence that is simulated")
	cmd.Flags().StringArrayVar(&f.principals, "principal", nil, "who may use it, as `ROLE/NAME`: agents and submitters; may be repeated (default: any)")
	cmd.Flags().StringVar(&f.purpose, "purpose", "", "what it is for: one line of `text` that approvers read")
}

// check returns the plan's digest, and the plan itself where a job file names it.
func (f *grantFlags) check(cmd *cobra.Command, c *cli) (plan.Digest, []byte, error) {
	var canonical []byte
	if f.job != "" {
		if f.digest != "" {
			return "", nil, usagef(cmd, "--plan or --job, not both")
		}
		p, err := c.plan(cmd.Context(), f.job)
		if err != nil {
			return "", nil, err
		}
		f.digest, canonical = p.GetPlanDigest(), p.GetPlan()
		if len(f.assets) == 0 {
			if f.assets, err = assetsOf(canonical); err != nil {
				return "", nil, err
			}
			if len(f.assets) == 0 {
				return "", nil, usagef(cmd, "%s names no asset: its jobs need no grant", f.job)
			}
		}
	}
	d, err := f.valid(cmd)
	return d, canonical, err
}

func (f *grantFlags) valid(cmd *cobra.Command) (plan.Digest, error) {
	d, err := plan.ParseDigest(f.digest)
	switch {
	case f.digest == "":
		return "", usagef(cmd, "name the plan with --plan or --job")
	case err != nil:
		return "", usagef(cmd, "--plan: %s", err)
	case len(f.assets) == 0:
		return "", usagef(cmd, "name at least one asset with --asset")
	case cmd.Flags().Changed("releases") && f.releases < 1:
		return "", usagef(cmd, "--releases %d: want at least 1", f.releases)
	case f.lasts < time.Second || f.lasts > maxGrant:
		return "", usagef(cmd, "--for %s: want between 1s and %s", f.lasts, maxGrant)
	case clean(f.purpose) != f.purpose:
		return "", usagef(cmd, "--purpose: want one line")
	}
	for _, a := range f.assets {
		if err := checkAssetName(cmd, a); err != nil {
			return "", err
		}
	}
	return d, nil
}

func (c *cli) grantCreateCmd() *cobra.Command {
	var f grantFlags
	cmd := &cobra.Command{
		Use:   "create (--job FILE | --plan DIGEST --asset NAME...)",
		Short: "Grant one plan the use of your assets",
		Long: `create lets jobs of one plan, and of no other, obtain the keys of the named
assets once a verifier has accepted their evidence. coffer plan prints the
digest of a job file. Where the policy of an asset asks for approvals, the grant
waits for them. Evidence of an emulated machine counts only with
--allow-simulated. An owner whose key is in the broker's policy set signs the
consent.`,
		Example: "  coffer grant create --plan sha384:4f2c... --asset fashion-mnist --asset fashion-weights --releases 3 --for 24h",
		Args:    exactly(),
	}
	f.add(cmd)
	keyFlag(cmd, &f.key)
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, canonical, err := f.check(cmd, c)
		if err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		now := time.Now()
		res, err := call(cmd.Context(), c, "create grant", serverBroker, b.CreateGrant, &brokerv1.CreateGrantRequest{
			Assets: f.assets, PlanDigest: string(d), NotBeforeUnix: now.Unix(), NotAfterUnix: now.Add(f.lasts).Unix(), MaxReleases: f.releases, Plan: canonical,
			AllowSimulated: f.simulated, Principals: f.principals, Purpose: f.purpose,
		})
		if r := (*check.Refusal)(nil); errors.As(err, &r) && r.Stage == "authorize" {
			_, werr := fmt.Fprintln(c.stderr, "who does not own the assets asks for a grant: `coffer grant request` takes the same flags")
			return errors.Join(err, werr)
		}
		if err != nil {
			return err
		}
		g, err := c.consented(cmd.Context(), b, res.GetGrant(), f.key)
		if err != nil {
			return err
		}
		return c.printNewGrant(g, *out)
	}
	return cmd
}

func (c *cli) grantRequestCmd() *cobra.Command {
	var f grantFlags
	var key string
	cmd := &cobra.Command{
		Use:   "request (--job FILE | --plan DIGEST --asset NAME...)",
		Short: "Ask for a grant on assets of another",
		Long: `request asks that one plan may use assets. The grant begins to count when those
whom the policies of the assets name have approved it, or the owner has where
they name nobody. A job of the plan may be submitted at once: it waits. A grant is
for assets of one owner: of others ask for one each, with --asset.`,
		Example: "  coffer grant request --job job.yaml --for 8h --purpose 'fine-tune for the safety evals'\n  coffer grant request --plan sha384:4f2c... --asset frontier-weights --for 8h --purpose 'fine-tune for the safety evals'",
		Args:    exactly(),
	}
	f.add(cmd)
	cmd.Flags().StringVar(&key, "idempotency-key", "", "the same `key` answers with the same grant")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		d, canonical, err := f.check(cmd, c)
		if err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		now := time.Now()
		res, err := call(cmd.Context(), c, "request grant", serverBroker, b.RequestGrant, &brokerv1.RequestGrantRequest{
			Assets: f.assets, PlanDigest: string(d), NotBeforeUnix: now.Unix(), NotAfterUnix: now.Add(f.lasts).Unix(), MaxReleases: f.releases, Plan: canonical,
			AllowSimulated: f.simulated, Principals: f.principals, Purpose: f.purpose, IdempotencyKey: key,
		})
		if err != nil {
			return err
		}
		return c.printNewGrant(res.GetGrant(), *out)
	}
	return cmd
}

// printNewGrant prints the id alone on standard output, for scripts.
func (c *cli) printNewGrant(g *brokerv1.Grant, out format) error {
	if out == formatJSON {
		return writeJSON(c.stdout, viewGrant(g))
	}
	if _, err := fmt.Fprintln(c.stdout, clean(g.GetId())); err != nil {
		return err
	}
	for _, m := range g.GetMissing() {
		if _, err := fmt.Fprintf(c.stderr, "it lacks %s: `%s`\n", clean(m), clean(approveCommand(g.GetId(), m))); err != nil {
			return err
		}
	}
	return nil
}

// readGrant returns a grant with its approvals and the terms that they are over.
func (c *cli) readGrant(ctx context.Context, b brokerClient, id string) (grantView, receipt.GrantTerms, error) {
	var terms receipt.GrantTerms
	res, err := call(ctx, c, "look up grant "+id, serverBroker, b.GetGrant, &brokerv1.GetGrantRequest{Id: id})
	if err != nil {
		return grantView{}, terms, err
	}
	v := viewGrant(res.GetGrant())
	for _, a := range res.GetApprovals() {
		d, err := receipt.ParseApproval(a.GetDocument())
		if err != nil {
			return grantView{}, terms, fmt.Errorf("grant %s: %w", id, err)
		}
		v.Approvals = append(v.Approvals, approval{d.Approver, d.Decision, d.Reason, d.Ticket, stamp(d.Time)})
	}
	if err := plan.Decode(res.GetGrant().GetTerms(), receipt.MaxApproval, &terms); err != nil {
		return grantView{}, terms, fmt.Errorf("grant %s: its terms: %w", id, err)
	}
	return v, terms, nil
}

// termRows are the terms of a grant for people. What is signed is what is shown.
func termRows(t receipt.GrantTerms) [][]string {
	simulated := "refused"
	if t.AllowSimulated {
		simulated = "allowed"
	}
	who := "any agent and submitter"
	if len(t.Principals) > 0 {
		who = strings.Join(t.Principals, ", ")
	}
	return [][]string{
		{"grant", t.Grant}, {"plan", string(t.Plan)}, {"assets", strings.Join(t.Assets, ", ")}, {"owner", t.Owner}, {"requested by", t.Requester},
		{"purpose", orDash(t.Purpose)}, {"used by", who}, {"releases", fmt.Sprint(t.MaxReleases)}, {"from", clock(t.NotBefore)}, {"until", clock(t.NotAfter)},
		{"simulated evidence", simulated},
	}
}

func decisions() map[string]string {
	return map[string]string{receipt.DecisionApprove: "approved by", receipt.DecisionConsent: "consent of", receipt.DecisionDeny: "denied by"}
}

func (c *cli) grantShowCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show GRANT",
		Short:   "Show a grant, its approvals and what it lacks",
		Example: "  coffer grant show grant-7f31",
		Args:    exactly("a grant id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		v, terms, err := c.readGrant(cmd.Context(), b, args[0])
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, v)
		}
		rows := append(termRows(terms), []string{"state", v.State}, []string{"used", fmt.Sprintf("%d of %d", v.Used, v.MaxReleases)})
		for _, a := range v.Approvals {
			rows = append(rows, []string{decisions()[a.Decision], fmt.Sprintf("%s, %s: %s %s", a.Approver, clock(a.Time.Unix()), a.Reason, a.Ticket)})
		}
		for _, m := range v.Missing {
			rows = append(rows, []string{"lacks", m})
		}
		if v.EndedBy != "" {
			rows = append(rows, []string{"ended by", fmt.Sprintf("%s, %s: %s", v.EndedBy, clock(v.Ended.Unix()), v.EndedReason)})
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

func (c *cli) grantApproveCmd() *cobra.Command {
	var key, reason, ticket, job string
	var consent bool
	cmd := &cobra.Command{
		Use:   "approve GRANT --reason TEXT [--key FILE]",
		Short: "Approve a grant with a signature of your own key",
		Long: `approve shows the terms of a grant and signs them with an SSH key that the
broker's policy set has for you: the private key in FILE, or, without --key or
with FILE naming a public key, one that your ssh-agent holds, which may live in a
hardware token. With --job the plan of that job file must be the grant's.

The owner of the assets consents with --consent to a request on assets whose
policy asks for no approvals. That is signed too if the broker's policy set has a
key for the owner.`,
		Example: "  coffer grant approve grant-7f31 --key ~/.ssh/id_ed25519 --reason 'reviewed the training code' --ticket SEC-142\n  coffer grant approve grant-7f31 --consent",
		Args:    exactly("a grant id"),
	}
	cmd.Flags().StringVar(&key, "key", "", "SSH key `file`")
	cmd.Flags().StringVar(&reason, "reason", "", "why: one line of `text` that is signed")
	cmd.Flags().StringVar(&ticket, "ticket", "", "`reference` of the review, signed too")
	cmd.Flags().StringVar(&job, "job", "", "job `file` whose plan the grant must name")
	cmd.Flags().BoolVar(&consent, "consent", false, "consent as the owner of the assets")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx := cmd.Context()
		switch {
		case consent && ticket != "":
			return usagef(cmd, "--consent takes no ticket")
		case !consent && strings.TrimSpace(reason) == "":
			return usagef(cmd, "say why with --reason")
		case clean(reason+ticket) != reason+ticket || len(reason) > receipt.MaxApprovalText || len(ticket) > receipt.MaxApprovalText:
			return usagef(cmd, "--reason, --ticket: want one line of at most %d bytes each", receipt.MaxApprovalText)
		}
		b, err := c.broker(ctx)
		if err != nil {
			return err
		}
		_, terms, err := c.readGrant(ctx, b, args[0])
		if err != nil {
			return err
		}
		if job != "" {
			if err := c.samePlan(ctx, job, terms.Plan); err != nil {
				return err
			}
		}
		if err := table(c.stderr, termRows(terms)...); err != nil {
			return err
		}
		req := &brokerv1.ApproveGrantRequest{Id: terms.Grant}
		if consent {
			req.Approval, err = c.decideAs(ctx, key, terms, receipt.DecisionConsent, cmp.Or(reason, "consent of the owner"))
		} else {
			req.Approval, err = c.sign(ctx, terms, key, reason, ticket)
		}
		if err != nil {
			return err
		}
		res, err := call(ctx, c, "approve grant "+args[0], serverBroker, b.ApproveGrant, req)
		if err != nil {
			return err
		}
		g := res.GetGrant()
		if len(g.GetMissing()) == 0 {
			_, err = fmt.Fprintf(c.stdout, "grant %s is %s\n", clean(g.GetId()), clean(g.GetState()))
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "grant %s is %s: it lacks %s\n", clean(g.GetId()), clean(g.GetState()), clean(strings.Join(g.GetMissing(), "; ")))
		return err
	}
	return cmd
}

// samePlan refuses unless the job file resolves to the plan.
func (c *cli) samePlan(ctx context.Context, path string, want plan.Digest) error {
	res, err := c.plan(ctx, path)
	if err != nil {
		return err
	}
	if got := res.GetPlanDigest(); got != string(want) {
		return &exitError{code: exitRefused, text: fmt.Sprintf("not approved: %s has plan %s and the grant names %s: ask who requested it for the job file", path, got, want)}
	}
	return nil
}

// plan has the agent resolve a job file.
func (c *cli) plan(ctx context.Context, path string) (*agentv1.PlanResponse, error) {
	file, err := c.readJobFile(path)
	if err != nil {
		return nil, err
	}
	a, err := c.agent(daemon.RoleEngineer)
	if err != nil {
		return nil, err
	}
	var out *agentv1.PlanResponse
	err = c.whileFetching(ctx, a, file, func() (err error) {
		out, err = call(ctx, c, "plan "+path, serverAgent, a.Plan, &agentv1.PlanRequest{JobFile: file})
		return err
	})
	return out, err
}

// sign makes the approval of the signed-in person.
func (c *cli) sign(ctx context.Context, terms receipt.GrantTerms, key, reason, ticket string) (*brokerv1.Approval, error) {
	name, err := c.me(ctx)
	if err != nil {
		return nil, err
	}
	signer, closeAgent, err := sshSigner(ctx, key)
	if err != nil {
		return nil, err
	}
	defer closeAgent()
	return hand{name: name, signer: signer}.decide(terms, receipt.DecisionApprove, reason, ticket)
}

// sshSigner returns the private key in path, or what ssh-agent has for the
// public key in path, or the one key that ssh-agent has.
func sshSigner(ctx context.Context, path string) (ssh.Signer, func(), error) {
	none := func() {}
	var public ssh.PublicKey
	if path != "" {
		b, err := os.ReadFile(path) // #nosec G304 -- the user names the file
		if err != nil {
			return nil, none, &exitError{code: exitUsage, text: "--key: " + err.Error(), err: err}
		}
		defer clear(b)
		if public, _, _, _, err = ssh.ParseAuthorizedKey(b); err != nil {
			s, err := ssh.ParsePrivateKey(b)
			if err != nil {
				return nil, none, &exitError{code: exitUsage, text: fmt.Sprintf("--key %s: %s: for a key with a passphrase, add it to ssh-agent and name its .pub file", path, err), err: err}
			}
			return s, none, nil
		}
	}
	socket := os.Getenv("SSH_AUTH_SOCK")
	if socket == "" {
		return nil, none, &exitError{code: exitUsage, text: "no key to sign with: name one with --key, or start ssh-agent"}
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, none, &exitError{code: exitFailed, text: "ask ssh-agent: " + err.Error(), err: err}
	}
	done := func() { _ = conn.Close() }
	signers, err := agent.NewClient(conn).Signers()
	if err != nil {
		done()
		return nil, none, &exitError{code: exitFailed, text: "ask ssh-agent: " + err.Error(), err: err}
	}
	if public == nil && len(signers) == 1 {
		return signers[0], done, nil
	}
	for _, s := range signers {
		if public != nil && string(s.PublicKey().Marshal()) == string(public.Marshal()) {
			return s, done, nil
		}
	}
	done()
	if public != nil {
		return nil, none, &exitError{code: exitFailed, text: fmt.Sprintf("ssh-agent does not hold the key of %s: add it with ssh-add", path)}
	}
	return nil, none, &exitError{code: exitUsage, text: fmt.Sprintf("ssh-agent holds %d keys: name the one to sign with by --key FILE.pub", len(signers))}
}

func (c *cli) grantDenyCmd() *cobra.Command {
	var reason, key string
	cmd := &cobra.Command{
		Use:     "deny GRANT --reason TEXT",
		Short:   "End a request for a grant",
		Example: "  coffer grant deny grant-7f31 --reason 'the egress list is too wide'",
		Args:    exactly("a grant id"),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the requester and the log: one line of `text`")
	keyFlag(cmd, &key)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkReason(cmd, reason); err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		_, terms, err := c.readGrant(cmd.Context(), b, args[0])
		if err != nil {
			return err
		}
		req := &brokerv1.DenyGrantRequest{Id: args[0], Reason: reason}
		if req.Approval, err = c.decideAs(cmd.Context(), key, terms, receipt.DecisionDeny, reason); err != nil {
			return err
		}
		res, err := call(cmd.Context(), c, "deny grant "+args[0], serverBroker, b.DenyGrant, req)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(c.stdout, "grant %s is %s\n", clean(res.GetGrant().GetId()), clean(res.GetGrant().GetState()))
		return err
	}
	return cmd
}

func checkReason(cmd *cobra.Command, reason string) error {
	if strings.TrimSpace(reason) == "" {
		return usagef(cmd, "say why with --reason")
	}
	if clean(reason) != reason || len(reason) > 256 {
		return usagef(cmd, "--reason: want one line of at most 256 bytes, %d given", len(reason))
	}
	return nil
}

func (c *cli) grantsCmd() *cobra.Command {
	return group("grants", "List grants", c.grantsListCmd())
}

func (c *cli) grantsListCmd() *cobra.Command {
	var digest, state string
	var mine bool
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List grants",
		Long: `ls lists the grants of everybody, for owners, approvers, auditors and operators. For
others it lists those that they asked for, and with --plan all of one plan.`,
		Example: "  coffer grants ls --state requested\n  coffer grants ls --mine\n  coffer grants ls --plan sha384:4f2c... --output json",
		Args:    exactly(),
	}
	cmd.Flags().BoolVar(&mine, "mine", false, "only grants that you asked for")
	cmd.Flags().StringVar(&digest, "plan", "", "only grants of this plan `digest`")
	cmd.Flags().StringVar(&state, "state", "", "only grants in this `state`: requested, approved, active, expired, revoked, exhausted or denied")
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if digest != "" {
			if _, err := plan.ParseDigest(digest); err != nil {
				return usagef(cmd, "--plan: %s", err)
			}
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		list := []grantView{}
		rows := [][]string{{"GRANT", "STATE", "USED", "UNTIL", "SIMULATED", "ASSETS", "PLAN", "LACKS"}}
		for token := ""; ; {
			req := &brokerv1.ListGrantsRequest{PlanDigest: digest, State: state, PageSize: 500, PageToken: token, Mine: mine}
			res, err := b.ListGrants(cmd.Context(), connectRequest(req))
			if r, ok := refusal.Decode(err); ok && r.Stage == "authorize" && digest == "" && !mine {
				// Who may not list everybody's has their own.
				req.Mine, mine = true, true
				if res, err = b.ListGrants(cmd.Context(), connectRequest(req)); err == nil {
					if _, err := fmt.Fprintln(c.stderr, "these are the grants that you asked for; --plan lists all of one plan"); err != nil {
						return err
					}
				}
			}
			if err != nil {
				return c.explain("list grants", serverBroker, err)
			}
			for _, g := range res.Msg.GetGrants() {
				v := viewGrant(g)
				list = append(list, v)
				allowed := "refused"
				if v.AllowSimulated {
					allowed = "allowed"
				}
				rows = append(rows, []string{v.ID, v.State, fmt.Sprintf("%d of %d", v.Used, v.MaxReleases), clock(g.GetNotAfterUnix()), allowed, strings.Join(v.Assets, ","), short(v.PlanDigest), orDash(strings.Join(v.Missing, "; "))})
			}
			if token = res.Msg.GetNextPageToken(); token == "" {
				break
			}
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, list)
		}
		return table(c.stdout, rows...)
	}
	return cmd
}

// short abbreviates a digest for people.
func short(digest string) string {
	const keep = len("sha384:") + 12
	if len(digest) <= keep {
		return digest
	}
	return digest[:keep] + "..."
}

// revocationKinds are the flags of revoke besides a grant's id.
func revocationKinds() []struct {
	flag, help string
	kind       brokerv1.RevocationKind
} {
	return []struct {
		flag, help string
		kind       brokerv1.RevocationKind
	}{
		{"asset", "`name` of an asset", brokerv1.RevocationKind_REVOCATION_KIND_ASSET},
		{"principal", "`ROLE/NAME` of a submitter, requester or agent", brokerv1.RevocationKind_REVOCATION_KIND_PRINCIPAL},
		{"node", "`name` of an agent", brokerv1.RevocationKind_REVOCATION_KIND_NODE},
		{"chip-id", "chip id of an SEV-SNP report, `hex`", brokerv1.RevocationKind_REVOCATION_KIND_CHIP_ID},
		{"image", "`digest` of an image manifest", brokerv1.RevocationKind_REVOCATION_KIND_IMAGE},
		{"measurement", "launch measurement of an SEV-SNP report, `hex`", brokerv1.RevocationKind_REVOCATION_KIND_MEASUREMENT},
	}
}

func (c *cli) revokeCmd() *cobra.Command {
	var reason string
	var lift bool
	cmd := &cobra.Command{
		Use:   "revoke [GRANT] --reason TEXT",
		Short: "Take back a grant, or everything of an asset, principal, node, chip, image or measurement",
		Long: `revoke ends what it names: no key is released under it from then on, and jobs
that run under it are told to stop, have the grace that the policies of their
assets allow, and are killed. It prints the jobs.

An operator takes the revocation of a node or a chip back with --lift: for new
jobs. Everything else stays revoked.`,
		Example: "  coffer revoke grant-7f31 --reason 'licence ended'\n  coffer revoke --node node-4 --reason 'found open at the data centre'\n  coffer revoke --lift --node node-4 --reason 'inspected, seals replaced'",
		Args:    cobra.MaximumNArgs(1),
	}
	cmd.Flags().StringVar(&reason, "reason", "", "why, for the log: one line of `text`")
	cmd.Flags().BoolVar(&lift, "lift", false, "take the revocation of a node or a chip back")
	values := map[string]*string{}
	for _, k := range revocationKinds() {
		values[k.flag] = cmd.Flags().String(k.flag, "", k.help)
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req := &brokerv1.RevokeRequest{Reason: reason}
		named := 0
		for _, k := range revocationKinds() {
			if v := *values[k.flag]; v != "" {
				req.Kind, req.Value = k.kind, v
				named++
			}
		}
		if len(args) == 1 {
			req.Kind, req.Value = brokerv1.RevocationKind_REVOCATION_KIND_GRANT, args[0]
			named++
		}
		if named != 1 {
			return usagef(cmd, "name one thing to revoke: a grant, or one of the flags")
		}
		if err := checkReason(cmd, reason); err != nil {
			return err
		}
		b, err := c.broker(cmd.Context())
		if err != nil {
			return err
		}
		if lift {
			return c.lift(cmd.Context(), b, req, *out)
		}
		res, err := call(cmd.Context(), c, "revoke "+req.GetValue(), serverBroker, b.Revoke, req)
		if err != nil {
			return err
		}
		if *out == formatJSON {
			return writeJSON(c.stdout, struct {
				Value  string   `json:"value"`
				Reason string   `json:"reason"`
				Jobs   []string `json:"jobs"`
			}{req.GetValue(), reason, append([]string{}, res.GetJobs()...)})
		}
		if _, err := fmt.Fprintf(c.stdout, "revoked %s\n", clean(req.GetValue())); err != nil {
			return err
		}
		for _, j := range res.GetJobs() {
			if _, err := fmt.Fprintf(c.stdout, "job %s is told to stop\n", clean(j)); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

// lift takes a revocation back.
func (c *cli) lift(ctx context.Context, b brokerClient, r *brokerv1.RevokeRequest, out format) error {
	if _, err := call(ctx, c, "lift the revocation of "+r.GetValue(), serverBroker, b.LiftRevocation, &brokerv1.LiftRevocationRequest{Kind: r.GetKind(), Value: r.GetValue(), Reason: r.GetReason()}); err != nil {
		return err
	}
	if out == formatJSON {
		return writeJSON(c.stdout, struct {
			Value  string `json:"value"`
			Reason string `json:"reason"`
			Lifted bool   `json:"lifted"`
		}{r.GetValue(), r.GetReason(), true})
	}
	_, err := fmt.Fprintf(c.stdout, "lifted the revocation of %s\n", clean(r.GetValue()))
	return err
}

// whyView is the answer of why in JSON output.
type whyView struct {
	Job   string `json:"job"`
	State string `json:"state"`
	// Gate is what holds or ended the job, empty if nothing does.
	Gate string `json:"gate,omitempty"`
	Why  string `json:"why"`
	// Checks are those that refused it.
	Checks []string `json:"checks,omitempty"`
	// Hints are what the checks advise, Who opens the gate, and Next are the commands to
	// run.
	Hints []string `json:"hints,omitempty"`
	Who   []string `json:"who,omitempty"`
	Next  []string `json:"next,omitempty"`
}

func (c *cli) whyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "why JOB",
		Short: "Say what holds a job, who opens that gate, and what to run next",
		Long: `why names the one gate that holds a job, or that ended it: who or what opens it,
and the command to run next. It exits with 3 while the job waits or if it was
refused.`,
		Example: "  coffer why 01JD3V8Q",
		Args:    exactly("a job id"),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		a, err := c.agent(daemon.RoleEngineer)
		if err != nil {
			return err
		}
		j, err := c.getJob(cmd.Context(), a, args[0])
		if err != nil {
			return err
		}
		v, err := c.why(cmd.Context(), a, j)
		if err != nil {
			return err
		}
		if *out == formatJSON {
			err = writeJSON(c.stdout, v)
		} else {
			rows := [][]string{{"job", v.Job}, {"state", v.State}}
			if v.Gate != "" {
				rows = append(rows, []string{"gate", v.Gate})
			}
			rows = append(rows, []string{"why", v.Why})
			for _, k := range v.Checks {
				rows = append(rows, []string{"check", k})
			}
			for _, h := range v.Hints {
				rows = append(rows, []string{"hint", h})
			}
			for _, w := range v.Who {
				rows = append(rows, []string{"who", w})
			}
			for _, n := range v.Next {
				rows = append(rows, []string{"next", n})
			}
			err = table(c.stdout, rows...)
		}
		switch {
		case err != nil:
			return err
		case v.State == stateRefused || v.Gate == gateApproval || v.Gate == gateQueue || v.Gate == gateRetry:
			return &exitError{code: exitRefused}
		}
		return nil
	}
	return cmd
}

// Gates that hold a job that has not ended.
const (
	gateApproval = "approval"
	gateQueue    = "queue"
	gateRetry    = "retry"
)

// stageAdmit is where a job is that was taken and has not looked at its grants.
const stageAdmit = "admit"

func (c *cli) why(ctx context.Context, a agentv1connect.AgentServiceClient, j *agentv1.Job) (whyView, error) {
	v := whyView{Job: j.GetId(), State: j.GetState()}
	switch {
	case j.GetState() == stateSucceeded:
		v.Why = "it has ended well"
		v.Next = []string{"coffer evidence get " + v.Job + " -o " + v.Job + ".json"}
	case ended(j.GetState()):
		whyEnded(j, &v)
		if lacksGrants(j) {
			return v, c.whyMissing(ctx, a, j, &v)
		}
	case j.GetStopping() != "":
		code, said, _ := strings.Cut(j.GetStopping(), ": ")
		v.Gate, v.Why = "stopping", j.GetStopping()
		if r, ok := reasons.Find(code); ok {
			v.Why = strings.TrimSuffix(r.Meaning+": "+said, ": ")
			v.Who, v.Next = []string{r.Who}, []string{"coffer watch " + v.Job}
		}
	case j.GetStage() == gateApproval:
		return v, c.whyApproval(ctx, a, j, &v)
	case j.GetState() == stateQueued && j.GetStage() == stageAdmit && j.GetNotBeforeUnix() == 0:
		// It was taken a moment ago. If a grant waits for people, so will it.
		if err := c.whyApproval(ctx, a, j, &v); err != nil || len(v.Next) > 0 {
			return v, err
		}
		v = whyView{Job: j.GetId(), State: j.GetState(), Why: "nothing holds it: it was taken a moment ago", Next: []string{"coffer watch " + j.GetId()}}
	case j.GetNotBeforeUnix() > time.Now().Unix():
		v.Gate, v.Why = gateRetry, fmt.Sprintf("attempt %d begins after the pause that its job file asks for, at %s", j.GetAttempt(), clock(j.GetNotBeforeUnix()))
		v.Who, v.Next = []string{"nobody: it begins by itself"}, []string{"coffer watch " + v.Job}
	case j.GetState() == stateQueued:
		v.Gate, v.Why = gateQueue, "other jobs have the places, the memory or the GPUs that it needs"
		if j.GetQueuePosition() > 0 {
			v.Why = fmt.Sprintf("it is number %d of those that wait for room on the node in the queue %s: %s", j.GetQueuePosition(), orDash(j.GetQueue()), j.GetWaitsFor())
		}
		v.Who, v.Next = []string{"nobody: it begins when jobs before it end"}, []string{"coffer ps --state running", "coffer watch " + v.Job}
		if j.GetGang() != "" {
			v.Who = []string{"who submits the other jobs of its gang; nobody once they wait too"}
		}
	default:
		v.Why = "nothing holds it: it is at stage " + j.GetStage()
		v.Next = []string{"coffer watch " + v.Job}
	}
	return v, nil
}

// whyEnded says why a job has not ended well. What a check hints at comes before what
// can be said of its code.
func whyEnded(j *agentv1.Job, v *whyView) {
	v.Gate, v.Why = j.GetReason(), j.GetMessage()
	known, ok := reasons.Find(j.GetReason())
	failed := failedChecks(j)
	if ok {
		v.Why = strings.TrimSuffix(known.Meaning+": "+j.GetMessage(), ": ")
		if len(failed) > 0 {
			v.Why = known.Meaning // the message has nothing but the checks
		}
		v.Who = []string{known.Who}
	}
	for _, f := range failed {
		v.Checks = append(v.Checks, fmt.Sprintf("%s: expected %s, found %s", f.ID, orDash(f.Expected), orDash(f.Found)))
		if f.Hint != "" && !slices.Contains(v.Hints, f.Hint) {
			v.Hints = append(v.Hints, f.Hint)
		}
	}
	if j.GetRetriedAs() != "" {
		v.Next = append(v.Next, "coffer watch "+j.GetRetriedAs())
		return
	}
	for _, n := range known.Next {
		v.Next = append(v.Next, strings.ReplaceAll(n, "JOB", v.Job))
	}
	if len(v.Next) == 0 {
		v.Next = []string{"coffer events " + v.Job}
	}
}
