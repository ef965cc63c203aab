package runner

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/device"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/remote"
)

// fakeMachine answers an attester as a test says, over a clock that a bubble has.
type fakeMachine struct {
	*attester
	// answers are what the next tries find; the last one stays.
	answers []string
	// broker is the broker's answer to results.
	broker func() error
	events chan string
	notes  []bundle.Reattestation
	shown  []string
	frozen []bool
	thaw   error
}

func newMachine(rule reattestRule, answers ...string) *fakeMachine {
	m := &fakeMachine{answers: answers, events: make(chan string, 1), broker: func() error { return nil }}
	now := time.Now()
	m.attester = &attester{
		rule: rule, began: now, issued: now.Unix(), grace: 5 * time.Second,
		try: func(context.Context, int) attestedTry { return m.answer() },
		show: func(_ context.Context, token string) error {
			err := m.broker()
			if err == nil {
				m.shown = append(m.shown, token)
			}
			return err
		},
		changed: func(context.Context) string {
			select {
			case e := <-m.events:
				return e
			default:
				return ""
			}
		},
		freeze: func(_ context.Context, on bool) error {
			m.frozen = append(m.frozen, on)
			if !on {
				return m.thaw
			}
			return nil
		},
		note: func(_ context.Context, a bundle.Reattestation) { m.notes = append(m.notes, a) },
	}
	return m
}

func (m *fakeMachine) answer() attestedTry {
	a := m.answers[0]
	if len(m.answers) > 1 {
		m.answers = m.answers[1:]
	}
	r := receipt.Result{ID: a, IssuedAt: time.Now().Unix(), Submods: map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}}}
	switch a {
	case "affirmed":
		return attestedTry{token: "affirmed", evidence: []byte("evidence"), result: r}
	case "refused":
		r.Checks.Fail("snp.tcb", "24", "23", "")
		return attestedTry{token: "refused", evidence: []byte("evidence"), result: r, err: check.Refuse("verify", r.Checks)}
	case "forged":
		var l check.List
		l.Fail("result.signature", "the verifier's", "another", "")
		return attestedTry{token: "forged", err: check.Refuse("verify", l)}
	case "away":
		return attestedTry{err: &remote.Unavailable{Service: "verifier", Err: errors.New("away")}}
	default:
		return attestedTry{err: errors.New(a)}
	}
}

func (m *fakeMachine) verdicts() (out []string) {
	for _, n := range m.notes {
		out = append(out, n.Cause+" "+n.Verdict+" "+n.Then)
	}
	return out
}

const (
	everyTen = 10 * time.Second
	maxAge   = 30 * time.Second
)

func TestAttestingAgain(t *testing.T) {
	rule := reattestRule{every: everyTen, maxAge: maxAge}
	pauses := reattestRule{every: everyTen, maxAge: maxAge, pause: 20 * time.Second}
	refuses := func() error {
		var l check.List
		l.Fail("reattest.chip", "one", "another", "")
		return check.Refuse("reattest", l)
	}
	away := func() error { return &remote.Unavailable{Service: "broker", Err: errors.New("away")} }
	for name, tc := range map[string]struct {
		rule    reattestRule
		answers []string
		broker  func() error
		thaw    error
		// after is when the job has to stop; zero: it goes on for a minute.
		after  time.Duration
		code   string
		grace  time.Duration
		want   []string
		frozen []bool
	}{
		"on a timer": {rule: rule, answers: []string{"affirmed"}, want: slices.Repeat([]string{"timer affirmed goes-on"}, 5)},
		"refused": {rule: rule, answers: []string{"affirmed", "refused"}, after: 2 * everyTen, code: bundle.ReasonReattestRefused,
			want: []string{"timer affirmed goes-on", "timer refused stopped"}},
		"a result that is not the verifier's": {rule: rule, answers: []string{"forged"}, after: everyTen, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer none stopped"}},
		"the verifier is away for a while": {rule: rule, answers: []string{"away", "away", "away", "affirmed"},
			want: slices.Repeat([]string{"timer affirmed goes-on"}, 5)},
		"the verifier stays away":              {rule: rule, answers: []string{"away"}, after: maxAge, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer none stopped"}},
		"no evidence":                          {rule: rule, answers: []string{"no TPM"}, after: maxAge, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer none stopped"}},
		"the broker is away":                   {rule: rule, answers: []string{"affirmed"}, broker: away, after: maxAge, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer affirmed stopped"}},
		"the broker does not take it":          {rule: rule, answers: []string{"affirmed"}, broker: refuses, after: everyTen, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer affirmed stopped"}},
		"refused, and the broker is away":      {rule: rule, answers: []string{"refused"}, broker: away, after: everyTen, code: bundle.ReasonReattestRefused, want: []string{"timer refused stopped"}},
		"paused, and affirmed":                 {rule: pauses, answers: []string{"refused", "refused", "away", "affirmed"}, want: []string{"timer refused paused", "timer refused paused", "timer affirmed resumed", "timer affirmed goes-on", "timer affirmed goes-on", "timer affirmed goes-on", "timer affirmed goes-on"}, frozen: []bool{true, false}},
		"paused for too long":                  {rule: pauses, answers: []string{"refused"}, after: 30 * time.Second, code: bundle.ReasonReattestRefused, frozen: []bool{true}},
		"paused, and the container is no more": {rule: pauses, answers: []string{"refused", "affirmed"}, thaw: errors.New("gone"), after: everyTen + reattestTry, code: bundle.ReasonReattestLate, want: []string{"timer refused paused", "timer affirmed stopped"}, frozen: []bool{true, false}},
		"late, and nothing to pause for":       {rule: pauses, answers: []string{"away"}, after: maxAge, code: bundle.ReasonReattestLate, grace: 5 * time.Second, want: []string{"timer none stopped"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := newMachine(tc.rule, tc.answers...)
				m.thaw = tc.thaw
				if tc.broker != nil {
					m.broker = tc.broker
				}
				ctx, cancel := context.WithTimeout(t.Context(), 59*time.Second)
				defer cancel()
				began := time.Now()
				stop := m.run(ctx)
				switch took := time.Since(began); {
				case (stop != nil) != (tc.after > 0):
					t.Fatalf("%+v after %s: %v", stop, took, m.verdicts())
				case stop != nil && (stop.code != tc.code || stop.grace != tc.grace || took > tc.after || took < tc.after-2*reattestTry):
					t.Errorf("%s with %s after %s, want %s with %s after %s", stop.code, stop.grace, took, tc.code, tc.grace, tc.after)
				}
				if tc.want != nil && !slices.Equal(m.verdicts(), tc.want) {
					t.Errorf("%v, want %v", m.verdicts(), tc.want)
				}
				if !slices.Equal(m.frozen, tc.frozen) {
					t.Errorf("frozen: %v, want %v", m.frozen, tc.frozen)
				}
				if stop != nil && stop.code == bundle.ReasonReattestRefused && stop.reason != "reattest-refused: snp.tcb" {
					t.Errorf("%q", stop.reason)
				}
				for i, n := range m.notes {
					if n.Number != i+1 || n.Tries == 0 || (n.Result != "") != (n.Verdict != bundle.ReattestNone) || (n.ResultDigest != "") != (n.Result != "") {
						t.Errorf("%+v", n)
					}
				}
			})
		})
	}
}

// Who does not answer does not keep a job: no device, no service, and no driver that
// is asked in between. None of them heeds the end of a context.
func TestWhoDoesNotAnswerKeepsNoJob(t *testing.T) {
	for name, tc := range map[string]struct {
		hang func(m *fakeMachine, forever func())
		rule reattestRule
		// after is when the job has to stop at the latest.
		after time.Duration
		code  string
		want  []string
	}{
		"the devices": {hang: func(m *fakeMachine, forever func()) {
			m.try = func(context.Context, int) attestedTry { forever(); return m.answer() }
		}, after: maxAge, code: bundle.ReasonReattestLate, want: []string{"timer none stopped"}},
		"the broker": {hang: func(m *fakeMachine, forever func()) {
			m.answers = []string{"affirmed"}
			m.show = func(context.Context, string) error { forever(); return nil }
		}, after: maxAge, code: bundle.ReasonReattestLate, want: []string{"timer affirmed stopped"}},
		"the broker, to a refusal": {hang: func(m *fakeMachine, forever func()) {
			m.show = func(context.Context, string) error { forever(); return nil }
		}, after: everyTen + reattestTry, code: bundle.ReasonReattestRefused, want: []string{"timer refused stopped"}},
		"the driver, asked in between": {hang: func(m *fakeMachine, forever func()) {
			m.changed = func(context.Context) string { forever(); return "" }
		}, after: everyTen, code: bundle.ReasonReattestRefused, want: []string{"timer refused stopped"}},
		"the devices of a paused job": {hang: func(m *fakeMachine, forever func()) {
			n := 0
			m.try = func(context.Context, int) attestedTry {
				if n++; n > 1 {
					forever()
				}
				return m.answer()
			}
		}, rule: reattestRule{every: everyTen, maxAge: maxAge, pause: 20 * time.Second}, after: everyTen + 20*time.Second, code: bundle.ReasonReattestLate, want: []string{"timer refused paused", "timer none stopped"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if tc.rule.every == 0 {
					tc.rule = reattestRule{every: everyTen, maxAge: maxAge}
				}
				m := newMachine(tc.rule, "refused")
				end := make(chan struct{})
				defer close(end)
				tc.hang(m, func() { <-end })
				began := time.Now()
				stop := m.run(t.Context())
				if took := time.Since(began); stop == nil || stop.code != tc.code || took > tc.after {
					t.Errorf("%+v after %s", stop, took)
				}
				if !slices.Equal(m.verdicts(), tc.want) {
					t.Errorf("%v, want %v", m.verdicts(), tc.want)
				}
			})
		})
	}
}

// Something that happens to the machine has it attest at once, and the timer counts
// from then.
func TestAttestingAtAnEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(reattestRule{every: time.Hour, maxAge: 2 * time.Hour}, "affirmed", "refused")
		go func() {
			time.Sleep(time.Minute)
			m.events <- "gpu: not ready"
			time.Sleep(time.Minute)
			m.events <- "gpu: gone"
		}()
		began := time.Now()
		stop := m.run(t.Context())
		if took := time.Since(began); stop == nil || stop.code != bundle.ReasonReattestRefused || took > 2*time.Minute+2*reattestLook {
			t.Errorf("%+v after %s", stop, took)
		}
		if want := []string{"gpu: not ready affirmed goes-on", "gpu: gone refused stopped"}; !slices.Equal(m.verdicts(), want) {
			t.Errorf("%v", m.verdicts())
		}
	})
}

// The verifier's rules are looked at by their digest: what it does not say is no change.
func TestAnotherPolicyAtTheVerifier(t *testing.T) {
	says := ""
	look := rulesLook(func(_ context.Context, age time.Duration) string {
		if age != rulesAge {
			t.Errorf("may be %s old", age)
		}
		return says
	})
	for i, row := range []struct {
		says    string
		changed bool
	}{{"", false}, {"a", false}, {"a", false}, {"b", true}, {"b", false}, {"", false}, {"b", false}, {"", false}, {"a", true}} {
		says = row.says
		if got := look(t.Context()); (got != "") != row.changed {
			t.Errorf("look %d, %q: %q", i, row.says, got)
		}
	}
}

// gpuStates answers as a driver that changes.
type gpuStates struct {
	GPUs
	state device.State
	err   error
}

func (g *gpuStates) State(context.Context, []string) (device.State, error) { return g.state, g.err }

// What happens to a job's GPUs is told once each, from the driver of which there is
// evidence on.
func TestWhatHappensToGPUs(t *testing.T) {
	began := device.State{Mode: device.On, Ready: true, Driver: "580.65.07", GPUs: []device.GPU{{UUID: "a"}}}
	env, err := plan.Canonical(&evidence.Envelope{Version: evidence.Version, VerifierID: "v", Nonce: "n", JobID: "j", Plan: []byte("{}"), Sandbox: []byte("{}"), GPUs: []evidence.GPU{{UUID: "a", DriverVersion: "580.65.06", Report: []byte("r"), Chain: []byte("c")}}})
	if err != nil {
		t.Fatal(err)
	}
	drv := &gpuStates{state: began}
	a := &Agent{Deps: Deps{GPUs: drv}}
	j := newJob("a", "user/ada")
	j.gpus, j.place = &device.Use{Launch: &began}, &place{got: []string{"a"}}
	j.record.Evidence = env
	look := a.deviceLook(j)
	if got := look(t.Context()); !strings.Contains(got, "580.65.07") {
		t.Errorf("a driver that was loaded between evidence and launch: %q", got)
	}
	drv.state.Driver = "580.65.06"
	for i, row := range []struct {
		gpu  device.GPU
		err  error
		want string
	}{
		{device.GPU{UUID: "a"}, nil, ""},
		{device.GPU{UUID: "a", Faults: 1, LastFault: 79}, nil, "XID) 79"},
		{device.GPU{UUID: "a", Faults: 1, LastFault: 79}, nil, ""},
		{device.GPU{UUID: "a", Faults: 2, LastFault: 79}, nil, "2 so far"},
		{device.GPU{UUID: "a", Faults: 2, LastFault: 79}, errors.New("the GPU is lost"), "the GPU is lost"},
	} {
		drv.state.GPUs, drv.err = []device.GPU{row.gpu}, row.err
		if got := look(t.Context()); (got != "") != (row.want != "") || !strings.Contains(got, row.want) {
			t.Errorf("look %d: %q, want %q", i, got, row.want)
		}
	}
	j.gpus = nil
	if got := a.deviceLook(j)(t.Context()); got != "" {
		t.Errorf("a job without GPUs: %q", got)
	}
}

func TestReattestRule(t *testing.T) {
	for name, tc := range map[string]struct {
		plan          *plan.Reattest
		results, life int64
		want          reattestRule
	}{
		"nobody asks":                    {},
		"the plan":                       {plan: &plan.Reattest{EverySeconds: 600}, want: reattestRule{every: 600 * time.Second, maxAge: 660 * time.Second}},
		"the owner":                      {results: 100, want: reattestRule{every: 50 * time.Second, maxAge: 100 * time.Second}},
		"the owner asks for more":        {plan: &plan.Reattest{EverySeconds: 600}, results: 100, want: reattestRule{every: 50 * time.Second, maxAge: 100 * time.Second}},
		"the plan does":                  {plan: &plan.Reattest{EverySeconds: 10, WithinSeconds: 5}, results: 100, want: reattestRule{every: 10 * time.Second, maxAge: 15 * time.Second}},
		"a pause ends before its lease":  {plan: &plan.Reattest{EverySeconds: 10, OnFailure: plan.ReattestPause}, life: 30, want: reattestRule{every: 10 * time.Second, maxAge: 70 * time.Second, pause: 25 * time.Second}},
		"a pause under a very short one": {plan: &plan.Reattest{EverySeconds: 10, OnFailure: plan.ReattestPause}, life: 6, want: reattestRule{every: 10 * time.Second, maxAge: 70 * time.Second, pause: 3 * time.Second}},
	} {
		j := newJob("a", "engineer/e")
		j.plan.Reattest, j.record.ResultSeconds, j.record.LeaseSeconds = tc.plan, tc.results, tc.life
		if got := j.reattestRule(); got != tc.want {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
}

// The broker's word that a job's attestation was refused ends the job for that, and
// not for a revocation.
func TestTheBrokersStopForAnAttestation(t *testing.T) {
	for reason, want := range map[string]string{
		"reattest-refused: snp.tcb": bundle.ReasonReattestRefused, "reattest-late: since noon": bundle.ReasonReattestLate, "revoked.grant: reattest-late: said somebody": holdapi.LeaseRevoked,
	} {
		if got := stopOf(holdapi.Lease{State: holdapi.LeaseStopping, Code: holdapi.LeaseRevoked, Reason: reason}, time.Minute); got.code != want || got.reason != reason {
			t.Errorf("%q: %+v", reason, got)
		}
	}
}

func TestDriverDiffers(t *testing.T) {
	began := device.State{Mode: device.On, Ready: true, AttackerAdvantage: 58, GPUs: []device.GPU{{UUID: "a", UsedBytes: 1}}}
	busy := began
	busy.GPUs = []device.GPU{{UUID: "a", UsedBytes: 1 << 30, Processes: 1}}
	if d := device.Differs(began, busy); d != "" {
		t.Errorf("a job that uses its GPU: %s", d)
	}
	for name, change := range map[string]func(*device.State){
		"a driver that was loaded": func(s *device.State) { s.Driver = "580.65.06" },
		"a critical error":         func(s *device.State) { s.GPUs = []device.GPU{{UUID: "a", Faults: 1, LastFault: 79}} },
		"reset":                    func(s *device.State) { s.Ready = false },
		"mode":                     func(s *device.State) { s.Mode = device.Off },
		"keys":                     func(s *device.State) { s.AttackerAdvantage = 60 },
		"gone":                     func(s *device.State) { s.GPUs = nil },
		"another card":             func(s *device.State) { s.GPUs = []device.GPU{{UUID: "b"}} },
	} {
		now := began
		if change(&now); device.Differs(began, now) == "" {
			t.Errorf("%s: no difference", name)
		}
	}
}

// What a device or a service says of a failure stands in the record, which is JSON.
func TestFailuresAreClippedAtACharacter(t *testing.T) {
	for _, s := range []string{"", "short", strings.Repeat("x", maxReattestMessage-1) + "é", "\xff"} {
		if got := clipped(s); !utf8.ValidString(got) || len(got) > maxReattestMessage {
			t.Errorf("%d bytes, %q", len(got), got)
		}
	}
}
