package device_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/device"
)

// driver is one whose calls can be made to fail, and which notes their order.
type driver struct {
	mode  device.Mode
	ready bool
	set   device.Settings
	// lies: settings are taken and not made.
	lies  bool
	near  map[string]int
	fail  map[string]error
	calls []string
}

func (d *driver) did(what string) error {
	d.calls = append(d.calls, what)
	return d.fail[what]
}

func (d *driver) State(_ context.Context, uuids []string) (device.State, error) {
	st := device.State{Mode: d.mode, Ready: d.ready, AttackerAdvantage: d.set.AttackerAdvantage}
	for _, u := range uuids {
		st.GPUs = append(st.GPUs, device.GPU{UUID: u, UnprotectedBytes: d.set.UnprotectedBytes, NearNode: d.near[u]})
	}
	return st, d.fail["state"]
}

func (d *driver) Prepare(_ context.Context, uuids []string, s device.Settings) error {
	if d.ready {
		return errors.New("GPUs are ready")
	}
	if !d.lies {
		d.set = s
	}
	return d.did("prepare " + strings.Join(uuids, ","))
}

func (d *driver) SetReady(_ context.Context, ready bool) error {
	d.ready = ready
	return d.did(map[bool]string{true: "ready", false: "not ready"}[ready])
}

func (d *driver) Clear(_ context.Context, uuids []string) error {
	return d.did("clear " + strings.Join(uuids, ","))
}

func on() *driver { return &driver{mode: device.On, fail: map[string]error{}} }

func (d *driver) machine() *device.Machine {
	return device.New(d, []string{"a", "b", "c"}, device.Defaults)
}

// verified is a result with a checked signature.
func verified(t *testing.T) receipt.Verified {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(err)
	session, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	signer, err := receipt.NewSigner("verifier.test", key)
	must(err)
	jwks, err := signer.JWKS()
	must(err)
	keys, err := receipt.ParseKeys("verifier.test", jwks)
	must(err)
	der, err := x509.MarshalPKIXPublicKey(&session.PublicKey)
	must(err)
	jwk, err := receipt.SessionJWK(der)
	must(err)
	var checks check.List
	checks.Pass("snp.signature", "it")
	now, digest := time.Now(), plan.Sum([]byte("x"))
	token, err := signer.Sign(receipt.TypeResult, receipt.Result{
		Profile: receipt.Profile, Issuer: "verifier.test", Audience: "broker.test", ID: "r", Nonce: "n", IssuedAt: now.Unix(), Expires: now.Add(time.Minute).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming, Vector: receipt.TrustVector{InstanceIdentity: 2, Hardware: 2, Executables: 3}, Checks: checks}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: []byte{1}}, JobID: "job", PlanDigest: digest, SandboxDigest: digest, EvidenceDigest: digest,
	})
	must(err)
	v, err := receipt.VerifyResult(keys, token, receipt.Expect{Audience: "broker.test", AnyJob: true}, now)
	must(err)
	return v
}

func TestOneJobAfterTheOther(t *testing.T) {
	d := on()
	m, ctx := d.machine(), t.Context()
	for range 2 {
		u, err := m.Begin(ctx, []string{"a", "b"})
		if err != nil {
			t.Fatal(err)
		}
		if d.ready || u.Launch != nil || u.Path() != device.Staged {
			t.Fatalf("before a result: ready %v, %+v", d.ready, u)
		}
		if err := u.Ready(ctx, verified(t)); err != nil || !d.ready {
			t.Fatalf("%v, ready %v", err, d.ready)
		}
		if err := errors.Join(u.Finish(ctx), u.Finish(ctx)); err != nil {
			t.Fatal(err)
		}
		if d.ready || !u.Cleared || u.Launch == nil || !u.Launch.Ready || u.End == nil || u.End.Ready || len(u.End.GPUs) != 2 {
			t.Errorf("after the job: %+v, %+v", u, d)
		}
		if u.Launch.AttackerAdvantage != device.Defaults.AttackerAdvantage {
			t.Errorf("keys change at 2^%d", u.Launch.AttackerAdvantage)
		}
	}
	want := []string{
		"clear a", "clear b", "not ready", "prepare a,b,c", "ready", "not ready", "clear a,b",
		"not ready", "prepare a,b,c", "ready", "not ready", "clear a,b",
	}
	if !slices.Equal(d.calls, want) {
		t.Errorf("calls %q", d.calls)
	}
}

func TestNothingIsReadyWithoutAVerifiedResult(t *testing.T) {
	d := on()
	u, err := d.machine().Begin(t.Context(), []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if recover() == nil || d.ready || slices.Contains(d.calls, "ready") {
			t.Errorf("calls %q", d.calls)
		}
	}()
	_ = u.Ready(t.Context(), receipt.Verified{})
}

// The driver has one ready state: it stays while any job has its GPUs, and no
// settings are made under that job.
func TestTwoJobsAtOnce(t *testing.T) {
	d := on()
	m, ctx, v := d.machine(), t.Context(), verified(t)
	begin := func(gpus ...string) *device.Use {
		t.Helper()
		u, err := m.Begin(ctx, gpus)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	one := begin("a")
	if err := one.Ready(ctx, v); err != nil {
		t.Fatal(err)
	}
	for name, gpus := range map[string][]string{"in use": {"a"}, "not there": {"x"}, "twice": {"b", "b"}, "none": nil} {
		if _, err := m.Begin(ctx, gpus); err == nil {
			t.Errorf("%s: begun", name)
		}
	}
	two := begin("b", "c")
	if err := errors.Join(two.Ready(ctx, v), one.Finish(ctx)); err != nil || !d.ready {
		t.Errorf("%v, ready %v", err, d.ready)
	}
	if err := two.Finish(ctx); err != nil || d.ready {
		t.Errorf("%v, ready %v", err, d.ready)
	}
}

// A GPU that keeps something of a job goes to no other.
func TestGPUThatIsNotClearedIsNotGiven(t *testing.T) {
	d := on()
	m, ctx := d.machine(), t.Context()
	u, err := m.Begin(ctx, []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	d.fail["clear a"] = errors.New("busy")
	if err := u.Finish(ctx); err == nil || u.Cleared {
		t.Errorf("%v, cleared %v", err, u.Cleared)
	}
	if _, err := m.Begin(ctx, []string{"a"}); err == nil {
		t.Error("given to the next job")
	}
	delete(d.fail, "clear a")
	if _, err := m.Begin(ctx, []string{"a"}); err != nil {
		t.Errorf("cleared at last: %v", err)
	}
}

func TestBeginAndReadyFail(t *testing.T) {
	for name, breakIt := range map[string]func(*driver){
		"DevTools mode":     func(d *driver) { d.mode = "devtools" },
		"no mode":           func(d *driver) { d.mode = "" },
		"not cleared":       func(d *driver) { d.fail["clear a"] = errors.New("no") },
		"settings refused":  func(d *driver) { d.fail["prepare a,b,c"] = errors.New("no") },
		"settings not made": func(d *driver) { d.lies = true },
		"keys that change too seldom": func(d *driver) {
			d.lies = true
			d.set = device.Settings{UnprotectedBytes: 1 << 40, AttackerAdvantage: 59}
		},
		"too little for staged copies": func(d *driver) { d.lies = true; d.set = device.Settings{UnprotectedBytes: 1, AttackerAdvantage: 58} },
		"ready cannot be taken back":   func(d *driver) { d.fail["not ready"] = errors.New("no") },
		"the driver says nothing":      func(d *driver) { d.fail["state"] = errors.New("no") },
		"GPUs do not become ready":     func(d *driver) { d.fail["ready"] = errors.New("no") },
	} {
		t.Run(name, func(t *testing.T) {
			d := on()
			breakIt(d)
			u, err := d.machine().Begin(t.Context(), []string{"a"})
			if err == nil {
				err = u.Ready(t.Context(), verified(t))
			}
			if err == nil {
				t.Error("ready")
			}
		})
	}
}

func TestPathOf(t *testing.T) {
	d := &driver{mode: device.Off, fail: map[string]error{}}
	u, err := d.machine().Begin(t.Context(), []string{"a"})
	if err != nil || u.Path() != device.Registered || slices.Contains(d.calls, "prepare a,b,c") {
		t.Errorf("%v, path %q, calls %q", err, u.Path(), d.calls)
	}
	for _, m := range []device.Mode{"", "devtools", "unknown", "ON"} {
		if p, err := device.PathOf(m); err == nil {
			t.Errorf("%q: %q", m, p)
		}
	}
}

func TestResumedUseIsReadyAndGivenBack(t *testing.T) {
	d := on()
	d.set = device.Defaults
	m, ctx := d.machine(), t.Context()
	u, err := m.Resume([]string{"b"})
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Ready(ctx, verified(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Begin(ctx, []string{"b"}); err == nil {
		t.Error("given twice")
	}
	if err := u.Finish(ctx); err != nil || d.ready {
		t.Errorf("%v, ready %v", err, d.ready)
	}
	if want := []string{"ready", "not ready", "clear b"}; !slices.Equal(d.calls, want) {
		t.Errorf("calls %q", d.calls)
	}
}

func TestNearNodeIsThatOfAllGPUs(t *testing.T) {
	d := on()
	d.near = map[string]int{"a": 2, "b": 2, "c": 1}
	for gpus, want := range map[string]int{"a": 2, "a b": 2, "a c": 0, "c": 1} {
		u, err := d.machine().Begin(t.Context(), strings.Fields(gpus))
		if err != nil || u.NearNode() != want {
			t.Errorf("%s: %v, %v", gpus, u, err)
		}
	}
}
