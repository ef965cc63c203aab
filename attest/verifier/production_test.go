package verifier_test

import (
	"encoding/hex"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/endorse/endorsetest"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// site is a deployment under a policy that ships, word for word but for its
// source of reference values and for accepting the virtual vendor's anchors.
type site struct {
	*world
	source   *receipt.Signer
	values   policy.Values
	services *endorsetest.Services
	firmware []byte
	class    anchor.Class
	// offer are the kinds of endorsement that the verifier looks for.
	offer []endorse.Kind
}

func newSite(t *testing.T, name string) *site {
	t.Helper()
	s := &site{world: newWorld(t), source: newSigner(t, "values.test"), class: anchor.Discrete, offer: endorse.Kinds()}
	s.boot(vtpmtest.BootEvents()...)
	p, err := policy.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := s.source.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	p.AllowSimulated, p.Sources = true, []policy.Source{{Issuer: s.source.Issuer(), Keys: keys}}
	s.policy = p
	s.list()
	s.services = endorsetest.New(t, s.vendor, s.now)
	return s
}

// boot starts a machine with a TPM that firmware, boot loader and then the agent
// measure into.
func (s *site) boot(events ...vtpmtest.FirmwareEvent) {
	s.t.Helper()
	var err error
	if s.tpm, err = vtpmtest.New(s.now); err != nil {
		s.t.Fatal(err)
	}
	s.firmware = vtpmtest.FirmwareLog(events...)
	for _, e := range events {
		s.tpm.ExtendDigest(int(e.PCR), e.Digest())
	}
	s.tpm.Extend(vtpm.Event{PCR: vtpm.AgentPCR, Name: "agent", Digest: vtpm.Digest{1}, MeasuredBy: vtpm.MeasuredBySelf})
}

// list has the site's source list what its machine is.
func (s *site) list() {
	measurement := simulate.DefaultMeasurement()
	s.values = policy.Values{
		SNP: &policy.SNPValues{Measurements: []string{hex.EncodeToString(measurement[:])}},
		TPM: &policy.TPMValues{PCRs: map[string][]string{}},
		GPU: &policy.GPUValues{DriverVersions: []string{simulate.DefaultDriver}, VBIOSVersions: []string{simulate.DefaultVBIOS}},
	}
	for index, i := range map[string]int{"4": 4, "8": 8, "9": 9, "11": 11, "12": 12, "13": 13} {
		s.values.TPM.PCRs[index] = []string{hex.EncodeToString(s.tpm.PCRs(i)[i])}
	}
}

// quoted are the PCRs that a firmware's log explains, and the agent's.
func quoted() []int { return []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, vtpm.AgentPCR} }

// open makes the site's verifier, and a machine that attests to it.
func (s *site) open() *attester {
	s.t.Helper()
	var err error
	if s.anchors, err = s.vendor.Anchors().WithEKRoots(s.class, s.tpm.Root); err != nil {
		s.t.Fatal(err)
	}
	cache, err := endorse.New(endorse.Options{Store: endorse.NewLibrary(), Anchors: s.anchors, Clock: func() time.Time { return s.now }, Fetch: s.services, Offer: s.offer})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(cache.Close)
	var references []string
	if s.values.Expires == 0 {
		s.values.IssuedAt, s.values.Expires = s.now.Add(-time.Hour).Unix(), s.now.Add(time.Hour).Unix()
	}
	if s.values.SNP != nil || s.values.TPM != nil || s.values.GPU != nil {
		token, err := policy.SignValues(s.source, s.values)
		if err != nil {
			s.t.Fatal(err)
		}
		references = []string{token}
	}
	s.v = s.verifier(func(o *verifier.Options) { o.Endorsements, o.References = cache, references })
	s.akCred = s.enrol(s.v)
	a := s.attester()
	if s.policy.GPU == nil {
		a.gpus = nil
		a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources.GPUs = 0 })
	}
	return a
}

// attest collects evidence in the order in which the parts sign for each other.
func (s *site) attest(a *attester) *attester {
	s.t.Helper()
	if !a.noTPM {
		a.e.TPM = &evidence.TPM{AKPublic: a.tpm.AKPublic, AKCredential: a.akCred, TCGLog: s.firmware}
	}
	a.collectGPUs()
	if a.e.TPM != nil {
		extra := a.bound().TPMExtraData(a.e.Devices())
		var err error
		if a.e.TPM.Quote, a.e.TPM.Signature, err = a.tpm.Quote(extra[:], nil, quoted()...); err != nil {
			s.t.Fatal(err)
		}
		a.e.TPM.PCRs = a.tpm.PCRs(quoted()...)
		if a.e.TPM.EventLog, err = vtpm.EncodeLog(a.tpm.Events); err != nil {
			s.t.Fatal(err)
		}
	}
	return a.collectSNP()
}

// TestShippedPoliciesAffirm is a job under production, and one under cpu-only, to
// its end: what these policies demand can be had. Under the very documents that
// ship, the virtual vendor's anchors are all that stands in the way.
func TestShippedPoliciesAffirm(t *testing.T) {
	for name, devices := range map[string]int{"production": 3, "cpu-only": 2} {
		s := newSite(t, name)
		a := s.attest(s.open())
		token, r := a.appraise()
		if f := r.AllChecks().Failed(); len(f) > 0 {
			t.Fatalf("%s: %+v", name, f)
		}
		v, err := s.relyingParty(token)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		subs := v.Result().Submods
		for sub, d := range subs {
			if d.Status != receipt.Affirming {
				t.Errorf("%s: %s is %s", name, sub, d.Status)
			}
		}
		tpm := subs["tpm0"].Claims
		if len(subs) != devices || tpm["tpm.secure-boot"] != true || tpm["tpm.kernel-command-line"] != "/vmlinuz root=/dev/sda1" {
			t.Errorf("%s: %d devices, %v", name, len(subs), tpm)
		}

		s.policy.AllowSimulated = false
		_, r = s.attest(s.open()).appraise()
		for _, c := range r.AllChecks().Failed() {
			if !strings.HasSuffix(c.ID, ".simulated") {
				t.Errorf("%s as it ships: failed %s", name, c.ID)
			}
		}
	}
}

// Each row takes one thing away that a policy demands, and that alone refuses.
func TestShippedPoliciesRefuse(t *testing.T) {
	type row struct {
		site    func(s *site)
		machine func(a *attester)
		by      string
		also    []string
	}
	unboot := func(pcr uint32, data string) func(s *site) {
		return func(s *site) {
			events := vtpmtest.BootEvents()
			s.boot(append(events, vtpmtest.FirmwareEvent{PCR: pcr, Type: vtpmtest.IPL, Data: []byte(data)})...)
		}
	}
	// Without its listed boot, whatever an agent measures is its own word.
	const self = "policy.tpm.self-measured"
	both := map[string]row{
		"no SEV-SNP report":            {machine: func(a *attester) { a.noSNP = true }, by: "policy.snp.required"},
		"another launch measurement":   {machine: func(a *attester) { a.snpOpts.Measurement = &[48]byte{1} }, by: "policy.snp.measurement"},
		"no measurement listed":        {site: func(s *site) { s.values.SNP = nil }, by: "policy.snp.measurement"},
		"a debugged guest":             {machine: func(a *attester) { a.snpOpts.Debug = true }, by: "policy.snp.debug"},
		"a guest that may migrate":     {machine: func(a *attester) { a.snpOpts.MigrationAgent = true }, by: "policy.snp.migration"},
		"a report of VMPL 1":           {machine: func(a *attester) { a.snpOpts.VMPL = 1 }, by: "policy.snp.vmpl"},
		"a product that is not listed": {site: func(s *site) { s.policy.SNP.Products = []anchor.Product{anchor.Milan} }, by: "policy.snp.product"},
		"no revocation list": {site: func(s *site) { s.services.Set(endorse.CRLKey(s.vendor.Chip().Product(), snp.VCEK), nil) },
			by: snp.CheckCRL, also: []string{"policy.snp.require"}},
		"nobody asked for revocation lists": {site: func(s *site) { s.offer = []endorse.Kind{endorse.VEK, endorse.Chain, endorse.OCSP, endorse.RIM} }, by: "policy.snp.require"},
		"another vendor's processor":        {machine: func(a *attester) { a.chip = a.other.Chip() }, by: snp.CheckChain, also: []string{"policy.snp.require", "policy.snp.product"}},
		"no TPM":                            {machine: func(a *attester) { a.noTPM = true }, by: "policy.tpm.required"},
		"a TPM of the hypervisor's":         {site: func(s *site) { s.class = anchor.Hypervisor }, by: "policy.tpm.trust-class"},
		"a TPM that nobody enrolled":        {machine: func(a *attester) { a.akCred = "" }, by: "tpm.ak-credential", also: []string{"policy.tpm.require", "policy.tpm.trust-class"}},
		"no log of the firmware's": {site: func(s *site) {
			s.boot()
			s.firmware = nil
			s.list()
		}, by: "policy.tpm.require", also: []string{self}},
		"another boot loader":                {site: unboot(4, "loader"), by: "policy.tpm.pcr4", also: []string{self}},
		"another command of the boot loader": {site: unboot(8, "command"), by: "policy.tpm.pcr8", also: []string{self}},
		"another kernel or initrd":           {site: unboot(9, "initrd"), by: "policy.tpm.pcr9", also: []string{self}},
		"another unified kernel":             {site: unboot(11, "section"), by: "policy.tpm.pcr11", also: []string{self}},
		"another command line of that":       {site: unboot(12, "init=/bin/sh"), by: "policy.tpm.pcr12", also: []string{self}},
		"an extension of its initrd":         {site: unboot(13, "agent.raw"), by: "policy.tpm.pcr13", also: []string{self}},
		"a boot loader that nobody lists":    {site: func(s *site) { delete(s.values.TPM.PCRs, "4") }, by: "policy.tpm.pcr4", also: []string{self}},
		"no boot that must be listed": {site: func(s *site) {
			tpm := *s.policy.TPM
			tpm.RequirePCRs = nil
			s.policy.TPM = &tpm
		}, by: self},
		"images on a plain disk": {machine: func(a *attester) {
			a.alter = func(p *plan.Profile) { p.ImageStore = plan.ImageStoreDisk }
			a.rebuild(nil)
		}, by: "policy.sandbox.image-store"},
		"images somewhere": {machine: func(a *attester) {
			a.alter = func(p *plan.Profile) { p.ImageStore = "" }
			a.rebuild(nil)
		}, by: "policy.sandbox.image-store"},
		"images that nobody signed": {site: func(s *site) {
			s.policy.Sandbox = &policy.Sandbox{ImageStores: []string{plan.ImageStoreTmpfs}, RequireImageSignature: true}
		}, by: "policy.sandbox.image-signature"},
		"images signed by others": {site: func(s *site) {
			s.policy.Sandbox = &policy.Sandbox{ImageStores: []string{plan.ImageStoreTmpfs}, ImageSigners: []plan.Digest{plan.Sum([]byte("ours"))}}
		}, machine: func(a *attester) {
			a.alter = func(p *plan.Profile) {
				p.ImageSigners = &plan.ImageSigners{Keys: []plan.ImageKey{{Name: "theirs", Key: []byte{1}}}}
			}
			signed := func(s *plan.Sandbox) { s.ImageSignature = plan.Sum([]byte("signature")) }
			a.rebuild(signed)
		}, by: "policy.sandbox.image-signature"},
		"an agent that measured nothing": {site: func(s *site) {
			events := vtpmtest.BootEvents()
			var err error
			if s.tpm, err = vtpmtest.New(s.now); err != nil {
				s.t.Fatal(err)
			}
			for _, e := range events {
				s.tpm.ExtendDigest(int(e.PCR), e.Digest())
			}
		}, by: self},
		"no reference values": {site: func(s *site) { s.values = policy.Values{} }, by: "policy.references",
			also: []string{"policy.snp.measurement", "policy.tpm.pcr4", "policy.tpm.pcr8", "policy.tpm.pcr9", "policy.tpm.pcr11", "policy.tpm.pcr12", "policy.tpm.pcr13", self}},
	}
	// Each of them is needed for the agent's word to be that of a system.
	for _, index := range []string{"4", "8", "9", "11", "12", "13"} {
		both["a boot of which PCR "+index+" need not be listed"] = row{site: func(s *site) {
			tpm := *s.policy.TPM
			tpm.RequirePCRs = slices.DeleteFunc(slices.Clone(tpm.RequirePCRs), func(i string) bool { return i == index })
			s.policy.TPM = &tpm
		}, by: self}
	}
	gpu := map[string]row{
		"no GPU":                      {machine: func(a *attester) { a.gpus = nil }, by: "policy.gpu.count"},
		"a GPU of several":            {machine: func(a *attester) { a.gpuOpts.FeatureFlag = 1 }, by: "policy.gpu.feature-flag"},
		"a driver that is not listed": {site: func(s *site) { s.values.GPU.DriverVersions = []string{"1.2.3"} }, by: "policy.gpu.driver-version"},
		"a VBIOS that is not listed":  {site: func(s *site) { s.values.GPU.VBIOSVersions = []string{"00.00.00.00.00"} }, by: "policy.gpu.vbios-version"},
		"other firmware":              {machine: func(a *attester) { a.gpuOpts.Measurements = map[int][48]byte{21: {1}} }, by: nvgpu.CheckMeasurements, also: []string{"policy.gpu.require"}},
		"another vendor's GPU":        {machine: func(a *attester) { a.gpus = a.other.GPUs()[:1] }, by: "gpu.chain", also: []string{"policy.gpu.require", "gpu.ocsp", nvgpu.CheckOCSP}},
		"nobody asked for statuses":   {site: func(s *site) { s.offer = []endorse.Kind{endorse.VEK, endorse.Chain, endorse.CRL, endorse.RIM} }, by: "policy.gpu.require"},
		"nobody asked for manifests":  {site: func(s *site) { s.offer = []endorse.Kind{endorse.VEK, endorse.Chain, endorse.CRL, endorse.OCSP} }, by: "policy.gpu.require"},
		"no manifest of the driver": {site: func(s *site) {
			k, err := endorse.RIMKey("NV_GPU_DRIVER_GH100_" + simulate.DefaultDriver)
			if err != nil {
				s.t.Fatal(err)
			}
			s.services.Set(k, nil)
		}, by: nvgpu.CheckDriverRIM, also: []string{"policy.gpu.require"}},
		"a manifest's signer revoked": {site: func(s *site) {
			p := s.services.Signer()
			s.services.Status(p.Cert, p.Issuer, simulate.OCSPOptions{ThisUpdate: s.now.Add(-time.Minute), Status: 1})
		}, by: nvgpu.CheckDriverRIM + "-ocsp", also: []string{"policy.gpu.require"}},
	}
	for _, name := range []string{"production", "cpu-only"} {
		if testing.Short() && name == "cpu-only" {
			continue // production has all of its rows
		}
		rows := map[string]row{}
		for k, r := range both {
			rows[k] = r
		}
		if name == "production" {
			for k, r := range gpu {
				rows[k] = r
			}
		}
		for situation, r := range rows {
			t.Run(name+"/"+situation, func(t *testing.T) {
				s := newSite(t, name)
				if r.site != nil {
					snpPart := *s.policy.SNP
					s.policy.SNP = &snpPart
					r.site(s)
				}
				a := s.open()
				if r.machine != nil {
					r.machine(a)
				}
				s.attest(a).wantRefused(r.by, r.also...)
			})
		}
	}
}
