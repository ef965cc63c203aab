package rego

import (
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
)

// echo are rules that say all that they see, so that no part of it can be missed.
const echo = `package coffer.appraisal

decision := {
	"checks": array.concat(
		[{"id": "policy.wanted", "outcome": "pass", "found": $"{input.wantGPUs}"}],
		[{"id": "policy.failure", "outcome": "pass", "found": $"{k}: {v}"} | some k, v in input.failures],
	),
	"submods": {name: {"tier": "affirming", "checks": said(device)} | some name, device in input.submods},
}

said(device) := array.flatten([
	{"id": "policy.device", "outcome": "pass", "found": $"{device.kind} {device.simulated}"},
	[{"id": "policy.claim", "outcome": "pass", "found": concat(" ", [k, type_name(v), $"{v}"])} | some k, v in device.claims],
	[{"id": "policy.check", "outcome": "pass", "found": $"{k}: {v}"} | some k, v in device.checks],
])
`

func echoing(t *testing.T) *Policy {
	t.Helper()
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	p.Rules = map[string]string{"own.rego": echo}
	c, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// afresh decides without a memory.
func afresh(p *Policy, ev policy.Evidence) policy.Decision {
	without := *p
	without.clocked = true
	return without.Decide(ev)
}

func remembered(p *Policy) int {
	p.answers.mu.Lock()
	defer p.answers.mu.Unlock()
	return len(p.answers.by)
}

func machine() policy.Evidence {
	var snp, tpm, gpu check.List
	snp.Pass("snp.signature", "by the VCEK")
	snp.Pass("snp.report-data", "1")
	snp.Skip("snp.crl", "no list")
	tpm.Pass("tpm.extra-data", "1")
	gpu.Pass("gpu.nonce", "1")
	return policy.Evidence{
		SNP: &policy.Device{Checks: snp, Claims: map[string]any{
			"snp.vmpl": 0, "snp.policy.debug": false, "snp.product": "Genoa", "snp.reported-tcb": map[string]any{"snp": 23, "tee": 0}, "ab": "c", "a": "bc",
		}},
		TPM: &policy.Device{Checks: tpm, Claims: map[string]any{
			"tpm.clock": uint64(1), "tpm.reset-count": uint32(1), "tpm.measured-by": []string{"a", "bc"}, "tpm.pcrs": map[string]string{"1": "23", "12": "3"},
			"tpm.events": []any{map[string]any{"name": "agent"}},
		}},
		GPUs:     []policy.Device{{Checks: gpu, Claims: map[string]any{"eat_nonce": "1", "gpu.feature-flag": "SPT"}}},
		WantGPUs: 1, Failures: map[string]string{"gpu": "lost"}, Now: time.Unix(1000, 0),
	}
}

// A change of anything that rules see is another decision.
func TestAnswersAreOfTheirInput(t *testing.T) {
	p := echoing(t)
	first := machine()
	was := p.Decide(first)
	if !reflect.DeepEqual(was, afresh(p, first)) || remembered(p) != 1 {
		t.Fatalf("the first decision is %v", was)
	}
	claim := func(of func(policy.Evidence) *policy.Device, name string, v any) func(*policy.Evidence) {
		return func(ev *policy.Evidence) { of(*ev).Claims[name] = v }
	}
	cpu := func(ev policy.Evidence) *policy.Device { return ev.SNP }
	tpm := func(ev policy.Evidence) *policy.Device { return ev.TPM }
	gpu := func(ev policy.Evidence) *policy.Device { return &ev.GPUs[0] }
	rows := map[string]func(*policy.Evidence){
		"a number":                         claim(cpu, "snp.vmpl", 1),
		"a number as text":                 claim(cpu, "snp.vmpl", "0"),
		"false as text":                    claim(cpu, "snp.policy.debug", "false"),
		"false as null":                    claim(cpu, "snp.policy.debug", nil),
		"a boolean":                        claim(cpu, "snp.policy.debug", true),
		"a text":                           claim(cpu, "snp.product", "Turin"),
		"no text":                          claim(cpu, "snp.product", ""),
		"a text that is none":              claim(cpu, "snp.product", "\xff"),
		"a number in an object":            claim(cpu, "snp.reported-tcb", map[string]any{"snp": 22, "tee": 0}),
		"a name in an object":              claim(cpu, "snp.reported-tcb", map[string]any{"snp": 23, "tea": 0}),
		"an object with more":              claim(cpu, "snp.reported-tcb", map[string]any{"snp": 23, "tee": 0, "fmc": 0}),
		"an object that is null":           claim(cpu, "snp.reported-tcb", map[string]any(nil)),
		"a claim more":                     claim(cpu, "snp.csp", ""),
		"a claim less":                     func(ev *policy.Evidence) { delete(ev.SNP.Claims, "a") },
		"a letter from a name to its text": func(ev *policy.Evidence) { delete(ev.SNP.Claims, "ab"); ev.SNP.Claims["abc"] = "" },
		"claims that change places":        func(ev *policy.Evidence) { ev.SNP.Claims["a"], ev.SNP.Claims["ab"] = "c", "bc" },
		"a counter":                        claim(tpm, "tpm.reset-count", uint32(2)),
		"a list cut elsewhere":             claim(tpm, "tpm.measured-by", []string{"ab", "c"}),
		"a list in another order":          claim(tpm, "tpm.measured-by", []string{"bc", "a"}),
		"an empty list":                    claim(tpm, "tpm.measured-by", []string{}),
		"a list that is null":              claim(tpm, "tpm.measured-by", []string(nil)),
		"a PCR":                            claim(tpm, "tpm.pcrs", map[string]string{"1": "2", "12": "3"}),
		"an index of a PCR":                claim(tpm, "tpm.pcrs", map[string]string{"1": "23", "13": "3"}),
		"an event":                         claim(tpm, "tpm.events", []any{map[string]any{"name": "other"}}),
		"an event more":                    claim(tpm, "tpm.events", []any{map[string]any{"name": "agent"}, map[string]any{}}),
		"the clock where it is no TPM's":   claim(cpu, "tpm.clock", 1),
		"a GPU's claim":                    claim(gpu, "gpu.feature-flag", "PPCIE"),
		"an outcome":                       func(ev *policy.Evidence) { ev.SNP.Checks[0].Outcome = check.NotChecked },
		"an outcome that is none":          func(ev *policy.Evidence) { ev.SNP.Checks[0].Outcome = "odd" },
		"why a check was not made":         func(ev *policy.Evidence) { ev.SNP.Checks[2].Found = "another reason" },
		"a check of another name":          func(ev *policy.Evidence) { ev.SNP.Checks[0].ID = "snp.signatures" },
		"a check less":                     func(ev *policy.Evidence) { ev.TPM.Checks = nil },
		"a check again that failed":        func(ev *policy.Evidence) { ev.TPM.Checks.Fail("tpm.extra-data", "", "2", "") },
		"a chain to a simulation's anchor": func(ev *policy.Evidence) { ev.TPM.Simulated = true },
		"no TPM":                           func(ev *policy.Evidence) { ev.TPM = nil },
		"no GPU":                           func(ev *policy.Evidence) { ev.GPUs = nil },
		"two GPUs":                         func(ev *policy.Evidence) { ev.GPUs = append(ev.GPUs, ev.GPUs[0]) },
		"another number wanted":            func(ev *policy.Evidence) { ev.WantGPUs = 2 },
		"a negative number wanted":         func(ev *policy.Evidence) { ev.WantGPUs = -1 },
		"a failure of another source":      func(ev *policy.Evidence) { ev.Failures = map[string]string{"tpm": "lost"} },
		"a failure's text":                 func(ev *policy.Evidence) { ev.Failures["gpu"] = "found" },
		"no failure":                       func(ev *policy.Evidence) { ev.Failures = nil },
	}
	for situation, change := range rows {
		ev := machine()
		change(&ev)
		want := afresh(p, ev)
		if reflect.DeepEqual(want, was) {
			t.Errorf("%s: the rules do not see it", situation)
		}
		for range 2 {
			if got := p.Decide(ev); !reflect.DeepEqual(got, want) {
				t.Errorf("%s: decides\n%v, want\n%v", situation, got, want)
			}
		}
	}
	if !reflect.DeepEqual(p.Decide(first), was) {
		t.Error("the first decision changed")
	}
}

// What differs between two reports of one machine in one state is no part of any
// decision, and costs none.
func TestMomentsAreNotSeen(t *testing.T) {
	p := echoing(t)
	was := p.Decide(machine())
	later := machine()
	later.Now = later.Now.Add(time.Hour)
	later.TPM.Claims["tpm.clock"] = uint64(2)
	later.GPUs[0].Claims["eat_nonce"] = "2"
	later.SNP.Checks[1].Found, later.TPM.Checks[0].Found, later.GPUs[0].Checks[0].Found = "2", "2", "2"
	if got := p.Decide(later); !reflect.DeepEqual(got, was) || !reflect.DeepEqual(got, afresh(p, later)) || remembered(p) != 1 {
		t.Errorf("decides %v, and remembers %d", got, remembered(p))
	}
	if later.TPM.Claims["tpm.clock"] == nil || later.GPUs[0].Claims["eat_nonce"] == nil {
		t.Error("the claims of the result have changed")
	}
}

func TestWhoReadsTheClock(t *testing.T) {
	const head = "package coffer.appraisal\n\n"
	for text, want := range map[string]bool{
		`decision := {"checks": [], "submods": {}}`:                                                               false,
		`decision := {"checks": [], "submods": {k: v | some k, v in input.submods; v.now}}`:                       false,
		`decision := {"checks": [], "submods": {"now": object.get(input.submods, "now", 1)}}`:                     false,
		`decision := {"checks": [], "submods": {}} if input.now > 5`:                                              true,
		`decision := {"checks": [], "submods": {}} if input["now"] > 5`:                                           true,
		"import input.now as t\n\ndecision := {\"checks\": [], \"submods\": {}} if t > 5":                         true,
		"import input as i\n\ndecision := {\"checks\": [], \"submods\": {}} if i.now > 5":                         true,
		`decision := {"checks": [], "submods": {}} if object.get(input, "now", 0) > 5`:                            true,
		`decision := {"checks": [], "submods": {}} if count(input) > 5`:                                           true,
		`decision := {"checks": [], "submods": {}} if { some k in ["now"]; input[k] > 5 }`:                        true,
		`decision := {"checks": [], "submods": {}} if { some k; input[k] == 5 }`:                                  true,
		`decision := {"checks": [], "submods": {}} if { every k, v in input { k != v } }`:                         true,
		`decision := {"checks": [], "submods": {k: 1 | some k, _ in input}}`:                                      true,
		`decision := {"checks": [], "submods": {}} if input.submods[input.now]`:                                   true,
		"decision := {\"checks\": [], \"submods\": {}} if f(1)\n\nf(x) if input.now == x":                         true,
		"decision := {\"checks\": [], \"submods\": {}}\n\nnobody_asks := input.now":                               true,
		"decision := {\"checks\": [], \"submods\": {}} if x with input.wantGPUs as 3\n\nx if input.wantGPUs == 3": false,
		"decision := {\"checks\": [], \"submods\": {}} if x with input.failures as input\n\nx if input.failures":  true,
	} {
		p, err := policy.Named("simulation")
		if err != nil {
			t.Fatal(err)
		}
		p.Rules = map[string]string{"own.rego": head + text}
		c, err := Compile(p)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if c.clocked != want {
			t.Errorf("%s: reads the clock: %v, want %v", text, c.clocked, want)
		}
	}
	for _, name := range policy.Names() {
		p, err := policy.Named(name)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Compile(p)
		if err != nil {
			t.Fatal(err)
		}
		if c.clocked {
			t.Errorf("%s is not remembered", name)
		}
	}
}

// Rules that read the clock are asked each time.
func TestClockIsAskedEachTime(t *testing.T) {
	p, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	p.Rules = map[string]string{"own.rego": echo + "\ndecision := {} if input.now >= 2000\n"}
	c, err := Compile(p)
	if err != nil {
		t.Fatal(err)
	}
	ev := machine()
	before := c.Decide(ev)
	ev.Now = time.Unix(2000, 0)
	if after := c.Decide(ev); len(before.Platform.Failed()) == len(after.Platform.Failed()) || remembered(c) != 0 {
		t.Errorf("decides %v, then %v", before.Platform, after.Platform)
	}
}

// An error is no answer: it is not remembered.
func TestErrorsAreNotRemembered(t *testing.T) {
	p := echoing(t)
	for situation, ev := range map[string]policy.Evidence{
		"claims that are too large": {SNP: &policy.Device{Claims: map[string]any{"a": strings.Repeat("x", MaxInput)}}},
		"claims that are not JSON":  {SNP: &policy.Device{Claims: map[string]any{"a": func() {}}}},
		"a name that is no text":    {SNP: &policy.Device{Claims: map[string]any{"\xff": "a"}}},
		"too many checks":           {SNP: &policy.Device{Claims: many(MaxChecks + 1)}},
	} {
		for range 2 {
			if got := p.Decide(ev); len(got.All().Failed()) == 0 || remembered(p) != 0 {
				t.Errorf("%s: %v, and %d remembered", situation, got.All().Failed(), remembered(p))
			}
		}
	}
}

func many(n int) map[string]any {
	m := map[string]any{}
	for i := range n {
		m[strconv.Itoa(i)] = i
	}
	return m
}

// What a caller does with a decision is no change of the next one.
func TestAnswersAreTheMemorysOwn(t *testing.T) {
	p := echoing(t)
	want := afresh(p, machine())
	for range 3 {
		d := p.Decide(machine())
		if !reflect.DeepEqual(d, want) {
			t.Fatalf("decides %v, want %v", d, want)
		}
		for _, l := range append([]check.List{d.Platform, d.SNP, d.TPM}, d.GPUs...) {
			for i := range l {
				l[i] = check.Check{}
			}
		}
		clear(d.Tiers)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	var m answers
	for i := range MaxAnswers + 10 {
		m.put(inputID{byte(i), byte(i >> 8)}, &answered{size: 1})
	}
	if len(m.by) > MaxAnswers || m.get(inputID{(MaxAnswers + 9) & 0xff, (MaxAnswers + 9) >> 8}) == nil {
		t.Errorf("%d answers", len(m.by))
	}
	for i := range 40 {
		m.put(inputID{byte(i)}, &answered{size: MaxOutput})
		m.put(inputID{byte(i)}, &answered{size: MaxOutput})
	}
	if m.size > MaxAnswered || m.size != MaxOutput*len(slices.Collect(maps.Keys(m.by))) {
		t.Errorf("%d bytes in %d answers", m.size, len(m.by))
	}
}

// What shipped rules decide with a memory is what they decide without, of claims of
// all kinds, asked again and again in any order.
func TestMemoryChangesNothing(t *testing.T) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 2)) //nolint:gosec // Which claims are made up is no secret.
		p, err := Compile(madeUpDocument(t, r))
		if err != nil {
			t.Fatal(err)
		}
		var all []policy.Evidence
		for range 12 {
			all = append(all, madeUpEvidence(r))
		}
		for range 60 {
			ev := one(r, all)
			if got, want := p.Decide(ev), afresh(p, ev); !reflect.DeepEqual(got, want) {
				t.Fatalf("seed %d: decides\n%v, want\n%v", seed, got, want)
			}
		}
		if n := remembered(p); n == 0 || n > len(all) {
			t.Errorf("seed %d: %d remembered", seed, n)
		}
	}
}
