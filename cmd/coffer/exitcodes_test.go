package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
)

// asking are the arguments of every verb that asks the node agent or the broker, with a
// word for each file that it needs.
var asking = map[string]string{
	"plan": "JOB", "submit": "JOB", "watch": "job-1", "retry": "job-1", "ps": "", "status": "job-1", "why": "job-1", "events": "job-1", "logs": "job-1", "cancel": "job-1",
	"checkpoints ls": "job-1", "egress report": "job-1", "egress propose": "job-1", "logkey read": "job-1 --key LOGKEY",
	"evidence get": "job-1 --file NEW", "evidence show": "job-1", "evidence diff": "job-1 job-2", "evidence export": "job-1 --format slsa -o NEW", "evidence report": "job-1 -o NEW", "evidence verify": "job-1",
	"grant create": "--job JOB --asset a", "grant request": "--job JOB --asset a", "grant show": "g-1", "grant approve": "g-1 --reason why", "grant deny": "g-1 --reason why", "grants ls": "", "revoke": "g-1 --reason why",
	"assets create": "a --kind checkpoints", "assets ls": "", "assets show": "a", "assets policy": "a", "assets rewrap": "", "assets reseal": "a b --uri file:///srv/a --to file:///srv/b",
	"seal": "TREE --asset a --kind dataset --out NEW",
}

// alone are the verbs that ask neither of them, or have scripts of their own.
var alone = strings.Fields("access_check access_init access_pack access_sign checkpoints_export checkpoints_resume-from checkpoints_verify completion doctor down endorsements_export endorsements_import endorsements_ls " +
	"explain fault_gpu-report image_import image_ls image_rm init log_keygen log_prove log_show log_verify log_witness login logkey_create logout policy_pack policy_show policy_sign policy_source restart up validate version whoami")

// TestExitCodeOfEveryVerb has every verb meet every class of failure.
func TestExitCodeOfEveryVerb(t *testing.T) {
	s := newFakeStack(t)
	files := map[string]string{"JOB": jobFile(t, smallJob), "TREE": t.TempDir(), "NEW": filepath.Join(t.TempDir(), "new"), "LOGKEY": filepath.Join(t.TempDir(), "log.key")}
	if err := os.WriteFile(filepath.Join(files["TREE"], "x"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.coffer(t.Context(), "logkey", "create", files["LOGKEY"]).want(t, 0)
	args := func(verb string) []string {
		out := strings.Fields(verb)
		for _, a := range strings.Fields(asking[verb]) {
			if f := files[a]; f != "" {
				a = f
			}
			out = append(out, a)
		}
		return out
	}
	known := map[string]bool{}
	for _, v := range alone {
		known[strings.ReplaceAll(v, "_", " ")] = true
	}
	for verb := range asking {
		known[verb] = true
	}
	for _, cmd := range leaves((&cli{stdout: io.Discard, stderr: io.Discard}).root()) {
		verb := strings.TrimPrefix(cmd.CommandPath(), "coffer ")
		if !known[verb] {
			t.Errorf("coffer %s is in no list here", verb)
		}
		delete(known, verb)
		if r := s.coffer(t.Context(), append(strings.Fields(verb), "--no-such-flag")...); r.code != exitUsage {
			t.Errorf("%s with a flag that is none: exit code %d", verb, r.code)
		}
	}
	for verb := range known {
		t.Errorf("there is no coffer %s", verb)
	}
	var l check.List
	l.Fail("role", "an owner", "an engineer", "")
	refused := new(connect.Error)
	if !errors.As(refusal.Encode(check.Refuse("authorize", l)), &refused) {
		t.Fatal("a refusal is no answer")
	}
	answer := func(c connect.Code) *connect.Error { return connect.NewError(c, errors.New("said so")) }
	all := func(class string, want int) {
		t.Helper()
		for verb := range asking {
			if verb == "logs" && want == exitUnknown {
				continue // it waits for the agent to come back
			}
			r := s.coffer(t.Context(), args(verb)...)
			if r.code != want {
				t.Errorf("%s, %s: exit code %d, want %d\n%s%s%v", class, verb, r.code, want, r.stdout, r.stderr, r.err)
			}
			if _, err := os.Lstat(files["NEW"]); err == nil {
				t.Errorf("%s, %s: left a file", class, verb)
				_ = os.RemoveAll(files["NEW"])
			}
		}
	}
	for class, tt := range map[string]struct {
		answer *connect.Error
		want   int
	}{
		"not there":          {answer(connect.CodeNotFound), exitFailed},
		"not in this state":  {answer(connect.CodeFailedPrecondition), exitFailed},
		"wrong":              {answer(connect.CodeInvalidArgument), exitUsage},
		"not allowed":        {answer(connect.CodePermissionDenied), exitRefused},
		"nobody known":       {answer(connect.CodeUnauthenticated), exitRefused},
		"refused":            {refused, exitRefused},
		"away for a moment":  {answer(connect.CodeUnavailable), exitUnknown},
		"too late":           {answer(connect.CodeDeadlineExceeded), exitUnknown},
		"a fault over there": {answer(connect.CodeInternal), exitUnknown},
	} {
		s.answer.Store(tt.answer)
		all(class, tt.want)
	}
	s.stopAgent()
	s.stopBroker()
	all("nobody listens", exitUnknown)
	s.dir = t.TempDir()
	for verb := range asking {
		if r := s.coffer(t.Context(), args(verb)...); r.code != exitFailed || !strings.Contains(r.err.Error(), "no stack in") {
			t.Errorf("no stack, %s: exit code %d, %v", verb, r.code, r.err)
		}
	}
}
