package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/crypto/ssh"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/pki"
	"github.com/coffer-run/coffer/internal/docs/pages"
	"github.com/coffer-run/coffer/internal/stack"
)

// people runs the CLI for people who signed in.
type people struct {
	n        *node
	sessions string
}

func (n *node) people(t *testing.T, names ...string) people {
	t.Helper()
	p := people{n, t.TempDir()}
	for _, name := range names {
		p.must(t, name, "login", "--password-file", filepath.Join(n.dir, "people", name+".password"))
	}
	return p
}

// command is the CLI for a person.
func (p people) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.n.bin, "coffer"), args...)
	cmd.Env = append(os.Environ(), "COFFER_DIR="+p.n.dir, "NO_COLOR=1", "COFFER_SESSIONS="+p.sessions, "COFFER_USER="+name)
	return cmd
}

func (p people) run(name string, args ...string) (string, error) {
	cmd := p.command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (p people) must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := p.run(name, args...)
	if err != nil {
		t.Fatalf("%s: coffer %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// refused wants exit code 3 and the text.
func (p people) refused(t *testing.T, text, name string, args ...string) {
	t.Helper()
	if out, err := p.run(name, args...); exitCode(err) != 3 || !strings.Contains(out, text) {
		t.Errorf("%s: coffer %s: exit code %d, want 3 with %q\n%s", name, strings.Join(args, " "), exitCode(err), text, out)
	}
}

func (p people) approve(t *testing.T, name, grant string) string {
	t.Helper()
	return p.must(t, name, "grant", "approve", grant, "--key", filepath.Join(p.n.dir, "people", name+".ssh"), "--reason", "reviewed", "--ticket", "SEC-7")
}

// statement returns what the bundle of an ended job states.
func (n *node) statement(t *testing.T, id string) bundle.Statement {
	t.Helper()
	b, err := os.ReadFile(n.evidence(t, id))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := bundle.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	st, err := bundle.ParseStatement(parsed.Statement)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// TestTwoOfThree runs the main job under a grant that two of three people
// approve: it waits, runs, is revoked in the middle, and is gone in time.
func TestTwoOfThree(t *testing.T) {
	n := need(t)
	p := n.people(t, "engineer", "alice", "bob", "owner")
	const gated = "gated-ckpt"
	p.must(t, "owner", "assets", "create", gated, "--kind", "checkpoints", "--approvals", "2 of weights-approvers", "--grace", "1s")
	job := n.jobFile(t, "two-of-three", func(s string) string {
		return strings.NewReplacer("asset: ckpt\n", "asset: "+gated+"\n", `EPOCHS: "1"`, `EPOCHS: "500"`, "maxDuration: 30m", "maxDuration: 10m").Replace(s)
	})
	plan := n.planDigest(t, job)
	grant := regexp.MustCompile(`grant-[a-z0-9]+`).FindString(p.must(t, "engineer", "grant", "request", "--plan", plan, "--asset", "data", "--asset", "model",
		"--asset", gated, "--allow-simulated", "--for", "1h", "--purpose", "two of three"))

	id := n.submit(t, job)
	if s := n.wait(t, id, "waiting", func(s status) bool { return s.Stage == "approval" || ended(s) }); s.Stage != "approval" {
		t.Fatalf("%+v", s)
	}
	p.refused(t, "2 of 2 approvals of group weights-approvers", "engineer", "why", id)
	p.refused(t, "coffer grant approve "+grant, "engineer", "why", id)

	p.refused(t, "", "engineer", "grant", "approve", grant, "--key", filepath.Join(n.dir, "people", "alice.ssh"), "--reason", "mine")
	// Another's key under one's own name.
	p.refused(t, "approval.", "bob", "grant", "approve", grant, "--key", filepath.Join(n.dir, "people", "alice.ssh"), "--reason", "hers")
	p.refused(t, "not approved", "alice", "grant", "approve", grant, "--reason", "read", "--job", n.jobFile(t, "another", nil))
	// Data and model ask for no approvals, and so for their owner's word.
	p.must(t, "owner", "grant", "approve", grant, "--consent")
	p.approve(t, "alice", grant)
	if out, err := p.run("alice", "grant", "approve", grant, "--key", filepath.Join(n.dir, "people", "alice.ssh"), "--reason", "once more"); err == nil && !strings.Contains(out, "it lacks 1 of 2") {
		t.Errorf("one person counts twice: %s", out)
	}
	p.refused(t, "1 of 2 approvals of group weights-approvers (approved: alice)", "engineer", "why", id)
	if out := p.approve(t, "bob", grant); !strings.Contains(out, "is active") {
		t.Errorf("after two approvals: %s", out)
	}
	if s := n.wait(t, id, "running", running); s.Stage != "run" {
		t.Fatalf("%+v", s)
	}
	p.must(t, "engineer", "why", id)

	began := time.Now()
	if out := p.must(t, "owner", "revoke", grant, "--reason", "a doubt about the data"); !strings.Contains(out, id) {
		t.Errorf("revoke does not name the job: %s", out)
	}
	gone := n.gone(t, id, time.Minute)
	s := n.wait(t, id, "ended", ended)
	o, _ := n.stopOf(t, id)
	grace := min(gone.Sub(time.Unix(0, o.Stop.ToldUnixNano)), time.Second)
	t.Logf("approved by two of three, revoked while it ran: gone %s after the command, of which %s grace", gone.Sub(began).Round(time.Millisecond), grace.Round(time.Millisecond))
	if s.Reason != "revoked" || !strings.Contains(s.Message, "a doubt about the data") || gone.Sub(began)-grace > reaction {
		t.Errorf("%+v after %s", s, gone.Sub(began))
	}
	if steps := n.statement(t, id).Timeline; !slices.ContainsFunc(steps, func(s bundle.Step) bool { return s.Stage == bundle.StageApproval && s.Outcome == bundle.StepDone }) {
		t.Errorf("the evidence does not show that the job waited: %+v", steps)
	}
	p.must(t, "owner", "log", "verify")

	// A reader who knows the approvers sees who they were.
	file, err := os.ReadFile(n.evidence(t, id))
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.verify(t, file, true, "--approvers", n.approvers(t))
	if err != nil || !strings.Contains(out, "2 of weights-approvers for "+gated+": alice, bob") {
		t.Errorf("%v\n%s", err, out)
	}
}

// approvers writes the list of the stack's approvers for coffer-verify.
func (n *node) approvers(t *testing.T) string {
	t.Helper()
	var list []byte
	for name, group := range map[string]string{"alice": "weights-approvers", "bob": "weights-approvers", "carol": "weights-approvers", "owner": "owners"} {
		b, err := os.ReadFile(filepath.Join(n.dir, "people", name+".ssh"))
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.ParsePrivateKey(b)
		if err != nil {
			t.Fatal(err)
		}
		list = fmt.Appendf(list, "%s %s %s", name, group, ssh.MarshalAuthorizedKey(key.PublicKey()))
	}
	path := filepath.Join(t.TempDir(), "approvers")
	if err := os.WriteFile(path, list, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// evidence writes a job's bundle to a file.
func (n *node) evidence(t *testing.T, id string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.json")
	n.must(t, "evidence", "get", id, "-o", path)
	return path
}

// TestAccessExample runs the example of docs/access.md, line by line, and holds
// what it shows against what is printed.
func TestAccessExample(t *testing.T) {
	n := need(t)
	page, err := os.ReadFile("../../docs/access.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(page), "\n## An example: two of three\n")
	text, _, _ = strings.Cut(text, "\n## ")
	blocks := regexp.MustCompile("(?ms)^```(sh|text)\n(.*?)^```$").FindAllStringSubmatch(text, -1)
	if !found || len(blocks) == 0 {
		t.Fatal("docs/access.md has no example")
	}
	job := n.jobFile(t, "two-of-three-by-hand", func(s string) string {
		return strings.NewReplacer("asset: ckpt\n", "asset: guarded-checkpoints\n", `EPOCHS: "1"`, `EPOCHS: "500"`, "maxDuration: 30m", "maxDuration: 10m").Replace(s)
	})
	own := strings.NewReplacer("/var/lib/coffer", n.dir, "job.yaml", job, "fashion-mnist-model", "model", "fashion-mnist", "data", "approvers bundle", n.approvers(t)+" bundle")
	typed := pages.For(t, "internal/e2e TestAccessExample")
	dir, sessions := t.TempDir(), t.TempDir()
	known := map[string]string{}
	learn := map[string]*regexp.Regexp{"PLAN": regexp.MustCompile(`sha384:[0-9a-f]{96}`), "GRANT": regexp.MustCompile(`grant-[a-z0-9]+`), "JOB": jobID}
	last := ""
	for _, block := range blocks {
		if block[1] == "text" {
			shown := block[2]
			for name, value := range known {
				shown = strings.ReplaceAll(shown, "$"+name, value)
			}
			if shown = own.Replace(shown); shown != last {
				t.Errorf("docs/access.md shows\n%s\nand it says\n%s", shown, last)
			}
			continue
		}
		for line := range strings.Lines(strings.ReplaceAll(block[2], "\\\n", " ")) {
			switch {
			case strings.Contains(line, "coffer revoke"):
				if s := n.wait(t, known["JOB"], "running", running); s.Stage != "run" {
					t.Fatalf("%+v", s)
				}
			case known["JOB"] != "" && len(known) == len(learn) && strings.Contains(line, "coffer why"):
				n.wait(t, known["JOB"], "held or ended", func(s status) bool { return s.Stage == "approval" || ended(s) })
			}
			if strings.TrimSpace(line) == "" {
				continue
			}
			typed.TypedFence("docs/access.md", line)
			cmd := exec.Command("bash", "-euc", own.Replace(line))
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+n.bin+":"+os.Getenv("PATH"), "COFFER_DIR="+n.dir, "COFFER_SESSIONS="+sessions, "NO_COLOR=1")
			for name, value := range known {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			out, err := cmd.Output()
			last = string(out)
			if gate := strings.Contains(line, "coffer why"); err != nil && (!gate || exitCode(err) != 3) {
				t.Fatalf("%s: %v\n%s", line, err, out)
			}
			for name, form := range learn {
				if found := form.FindString(last); found != "" && known[name] == "" {
					known[name] = found
				}
			}
		}
	}
	if !strings.Contains(last, "guarded-checkpoints: alice, bob") {
		t.Errorf("the bundle does not show who approved:\n%s", last)
	}
	for _, signed := range []string{"those of guarded-checkpoints are signed by owner", "approvals.consent"} {
		if !strings.Contains(last, signed) {
			t.Errorf("the bundle does not show what the owner signed, %q:\n%s", signed, last)
		}
	}
}

// as is a client of the broker with a certificate of its own.
func (n *node) as(t *testing.T, role, name string) brokerv1connect.BrokerServiceClient {
	t.Helper()
	dir := t.TempDir()
	for _, file := range []string{pki.CAFile, pki.CAKeyFile} {
		b, err := os.ReadFile(filepath.Join(n.dir, "pki", file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := pki.Issue(dir, role, name); err != nil {
		t.Fatal(err)
	}
	id := filepath.Join(dir, role+"-"+name)
	client, err := daemon.TLS{CA: filepath.Join(dir, pki.CAFile), Cert: id + ".pem", Key: id + ".key"}.HTTPClient(daemon.RoleBroker)
	if err != nil {
		t.Fatal(err)
	}
	ep, err := stack.OpenEndpoint(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	return brokerv1connect.NewBrokerServiceClient(client, ep.Broker())
}

// refusedBy is the refusal in an error, if there is one.
func refusedBy(err error) error {
	if ref, ok := refusal.Decode(err); ok {
		return ref
	}
	return err
}

// ask asks for a grant on an asset of its own that the approvers guard, and on
// more, for the attacker's plan.
func (a *attacker) ask(t *testing.T, who brokerv1connect.BrokerServiceClient, more ...string) (*brokerv1.Grant, string) {
	t.Helper()
	asset := fmt.Sprintf("guarded-%d", time.Now().UnixNano())
	a.node.must(t, "assets", "create", asset, "--kind", "checkpoints", "--approvals", "2 of weights-approvers")
	r, err := who.RequestGrant(t.Context(), connect.NewRequest(&brokerv1.RequestGrantRequest{
		Assets: append(more, asset), PlanDigest: string(a.digest), NotAfterUnix: time.Now().Add(time.Hour).Unix(), AllowSimulated: true, Purpose: "the attack table",
	}))
	if err != nil {
		t.Fatal(err)
	}
	return r.Msg.GetGrant(), asset
}

// approveAs hands in an approval of g that name signed, changed before.
func (a *attacker) approveAs(t *testing.T, g *brokerv1.Grant, name string, change func(*receipt.Approval)) (*brokerv1.Grant, error) {
	t.Helper()
	now := time.Now()
	doc := receipt.Approval{
		Version: receipt.ApprovalVersion, Broker: a.brokerID, Grant: g.GetId(), Plan: plan.Digest(g.GetPlanDigest()), Assets: g.GetAssets(), Terms: plan.Sum(g.GetTerms()),
		Approver: name, Decision: receipt.DecisionApprove, Reason: "the attack table", Time: now.Unix(), Expires: now.Add(time.Hour).Unix(),
	}
	if change != nil {
		change(&doc)
	}
	body, err := doc.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(a.node.dir, "people", name+".ssh"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := sshsig.Sign(key, receipt.ApprovalNamespace, body)
	if err != nil {
		t.Fatal(err)
	}
	r, err := a.node.as(t, daemon.RoleApprover, name).ApproveGrant(t.Context(), connect.NewRequest(&brokerv1.ApproveGrantRequest{
		Id: g.GetId(), Approval: &brokerv1.Approval{Document: body, Signature: sig},
	}))
	if err != nil {
		return nil, refusedBy(err)
	}
	return r.Msg.GetGrant(), nil
}

// repack changes who the stack's people are: a new set of policies, signed by the
// maintainer, that the broker takes on SIGHUP.
func (n *node) repack(t *testing.T, broker string, edit func(*access.People)) {
	t.Helper()
	set := filepath.Join(n.dir, "policies", "set")
	file := filepath.Join(set, access.PeopleFile)
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var p access.People
	if err := json.Unmarshal(old, &p); err != nil {
		t.Fatal(err)
	}
	edit(&p)
	changed, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	n.force(t, broker, file, changed)
	t.Cleanup(func() { n.force(t, broker, file, old) })
}

// force writes one file of the policy set and has the broker take the set.
func (n *node) force(t *testing.T, broker, file string, content []byte) {
	t.Helper()
	set := filepath.Join(n.dir, "policies", "set")
	taken := func() int {
		b, err := os.ReadFile(n.layout.Log("coffer-broker"))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(b, []byte("policy set in force"))
	}
	var manifest struct {
		Serial uint64 `json:"serial"`
	}
	b, err := os.ReadFile(filepath.Join(set, access.ManifestFile))
	if err == nil {
		err = json.Unmarshal(b, &manifest)
	}
	if err == nil {
		err = os.WriteFile(file, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	before := taken()
	n.must(t, "access", "pack", set, "--broker", broker, "--serial", fmt.Sprint(manifest.Serial+1))
	n.must(t, "access", "sign", set, "--key", filepath.Join(n.dir, "people", "maintainer.ssh"), "--name", "maintainer")
	if err := syscall.Kill(n.pid(t, "coffer-broker"), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); taken() == before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the broker does not take the new policies")
		}
	}
}

// swappedCiphertext runs an approved job whose sealed model is not the one of
// its manifest.
func swappedCiphertext(t *testing.T, a *attacker) error {
	n := a.node
	secret, err := os.MkdirTemp("/dev/shm", "coffer-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(secret)
	file := filepath.Join(secret, "model.safetensors")
	if err := os.WriteFile(file, n.weights, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, asset := range []string{"swapped-a", "swapped-b"} {
		n.must(t, "seal", file, "--asset", asset, "--kind", "weights", "--out", filepath.Join(dir, asset))
	}
	job := n.jobFile(t, "swapped-ciphertext", func(s string) string {
		return strings.NewReplacer("asset: model\n", "asset: swapped-a\n", "file://"+n.model+"\n", "file://"+filepath.Join(dir, "swapped-a")+"\n").Replace(s)
	})
	n.must(t, "grant", "create", "--plan", n.planDigest(t, job), "--asset", "data", "--asset", "swapped-a", "--asset", "ckpt", "--allow-simulated")
	const sealed = "000000.sealed"
	b, err := os.ReadFile(filepath.Join(dir, "swapped-b", sealed))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "swapped-a", sealed), b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := n.wait(t, n.submit(t, job), "ended", ended)
	if s.State != "failed" || s.Stage != "decrypt" || !strings.Contains(s.Message, "not sealed under this key, or changed") {
		return fmt.Errorf("the job is %s at %s: %s", s.State, s.Stage, s.Message)
	}
	var l check.List
	l.Fail("seal.commitment", "", "", "")
	return check.Refuse("decrypt", l)
}

// grantAttacks are the rows of the attack table on grants and approvals.
func grantAttacks() []attack {
	return []attack{
		{
			name: "result replayed by a third party", does: "sends an honest agent's signed request again, as another node", stage: "release", only: "job.agent",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				if _, err := a.release(t, k.token, k.resultID, k.grant, k.asset, k.session); err != nil {
					t.Fatalf("the honest agent is refused: %v", err)
				}
				honest := a.broker
				a.broker = a.node.as(t, daemon.RoleAgent, "node-2")
				t.Cleanup(func() { a.broker = honest })
			}),
		},
		{
			name: "ciphertext swapped between assets", does: "puts the sealed files of one asset in the place of another's, with the same content, under the approved manifest", stage: "decrypt", only: "seal.commitment",
			refused: swappedCiphertext,
		},
		{
			name: "single-use grant raced", does: "has two attested jobs use a single-use grant in the same moment; one of them wins", stage: "release", only: "grant.exhausted",
			refused: func(t *testing.T, a *attacker) error {
				grant := a.node.grant(t, string(a.digest), 1)
				var errs [2]error
				var ready, done sync.WaitGroup
				ready.Add(len(errs))
				for i := range errs {
					second := *a
					var err error
					if second.recipient, err = keys.GenerateRecipient(); err != nil {
						t.Fatal(err)
					}
					v, token := second.attest(t)
					done.Go(func() {
						ready.Done()
						ready.Wait()
						_, errs[i] = second.release(t, token, v.Result().ID, grant, "model", second.session)
					})
				}
				done.Wait()
				if (errs[0] == nil) == (errs[1] == nil) {
					return fmt.Errorf("of two releases under a single-use grant, not exactly one wins: %w", errors.Join(errs[:]...))
				}
				return errors.Join(errs[:]...)
			},
		},
		{
			name: "approval for another plan", does: "hands in an approval that alice signed for another plan, with all else as in the grant", stage: "approve", only: "approval.plan",
			refused: func(t *testing.T, a *attacker) error {
				g, _ := a.ask(t, a.node.as(t, daemon.RoleEngineer, "engineer"))
				_, err := a.approveAs(t, g, "alice", func(d *receipt.Approval) { d.Plan = plan.Sum([]byte("another plan")) })
				return err
			},
		},
		{
			name: "own approval", does: "asks for a grant as an engineer, and approves it as an approver", stage: "approve", only: "approval.own",
			refused: func(t *testing.T, a *attacker) error {
				g, _ := a.ask(t, a.node.as(t, daemon.RoleEngineer, "alice"))
				_, err := a.approveAs(t, g, "alice", nil)
				return err
			},
		},
		{
			name: "too few approvals", does: "uses a grant that one of two approvers has approved", stage: "release", only: "grant.approvals",
			refused: func(t *testing.T, a *attacker) error {
				g, asset := a.ask(t, a.node.as(t, daemon.RoleEngineer, "engineer"))
				if _, err := a.approveAs(t, g, "alice", nil); err != nil {
					t.Fatal(err)
				}
				v, token := a.attest(t)
				_, err := a.release(t, token, v.Result().ID, g.GetId(), asset, a.session)
				return err
			},
		},
		{
			name: "asset slipped into another's approvals", stage: "release", only: "grant.approvals",
			does: "has two approvers approve a grant that names the model besides the asset that they guard, and asks for the model without its owner's consent",
			refused: func(t *testing.T, a *attacker) error {
				g, guarded := a.ask(t, a.node.as(t, daemon.RoleEngineer, "engineer"), "model")
				for _, name := range []string{"alice", "bob"} {
					if _, err := a.approveAs(t, g, name, nil); err != nil {
						t.Fatal(err)
					}
				}
				v, token := a.attest(t)
				_, err := a.release(t, token, v.Result().ID, g.GetId(), "model", a.session)
				if err == nil {
					return fmt.Errorf("the model is released under approvals for %s", guarded)
				}
				return err
			},
		},
		{
			name: "approver who left the group", does: "uses a grant with two approvals, one by somebody who is out of the group since", stage: "release", only: "grant.approvals",
			refused: func(t *testing.T, a *attacker) error {
				g, asset := a.ask(t, a.node.as(t, daemon.RoleEngineer, "engineer"))
				for _, name := range []string{"alice", "bob"} {
					var err error
					if g, err = a.approveAs(t, g, name, nil); err != nil {
						t.Fatal(err)
					}
				}
				if g.GetState() != "active" {
					t.Fatalf("with two approvals the grant is %s", g.GetState())
				}
				a.node.repack(t, a.brokerID, func(p *access.People) {
					for i := range p.Users {
						if p.Users[i].Name == "bob" {
							p.Users[i].Groups = []string{}
						}
					}
				})
				v, token := a.attest(t)
				_, err := a.release(t, token, v.Result().ID, g.GetId(), asset, a.session)
				return err
			},
		},
		{
			name: "asset of another protocol", does: "asks for an asset that only clients of the KBS protocol may have", stage: "release", only: "asset.protocol",
			refused: func(t *testing.T, a *attacker) error {
				asset := fmt.Sprintf("kbs-only-%d", time.Now().UnixNano())
				a.node.must(t, "assets", "create", asset, "--kind", "checkpoints", "--protocol", "kbs")
				grant := strings.TrimSpace(a.node.must(t, "grant", "create", "--plan", string(a.digest), "--asset", asset, "--allow-simulated"))
				v, token := a.attest(t)
				_, err := a.release(t, token, v.Result().ID, grant, asset, a.session)
				return err
			},
		},
	}
}
