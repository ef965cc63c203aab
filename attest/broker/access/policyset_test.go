package access_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// ids are those of the failed checks.
func ids(t *testing.T, err error) []string {
	t.Helper()
	var r *check.Refusal
	if !errors.As(err, &r) || r.Stage != "policy" {
		t.Fatalf("want a refusal at policy, got %v", err)
	}
	var out []string
	for _, c := range r.Checks {
		out = append(out, c.ID)
	}
	return out
}

// Each row breaks one thing of a good set; everything else of it holds.
func TestOpenRefuses(t *testing.T) {
	m := newMaintainers(t, 2, "ada", "bea", "cyd")
	stranger := newMaintainers(t, 1, "eve")
	good := m.files(t, 7, people(), nil, "ada", "cyd")
	resigned := func(change func(files map[string][]byte)) map[string][]byte {
		files := map[string][]byte{}
		for n, b := range good {
			if n != access.ManifestFile && !strings.HasPrefix(n, access.SignatureDir) {
				files[n] = b
			}
		}
		change(files)
		m.sign(t, files, brokerID, 7, "ada", "cyd")
		return files
	}
	signManifest := func(raw []byte) map[string][]byte {
		files := clone(good)
		files[access.ManifestFile] = raw
		for _, n := range []string{"ada", "cyd"} {
			sig, err := access.Sign(m.keys[n], raw)
			if err != nil {
				t.Fatal(err)
			}
			files[access.SignatureDir+"/"+n+".sig"] = sig
		}
		return files
	}
	changed := func(f func(map[string][]byte)) func() (map[string][]byte, access.Trust) {
		return func() (map[string][]byte, access.Trust) { files := clone(good); f(files); return files, m.trust }
	}
	trusting := func(f func(*access.Trust)) func() (map[string][]byte, access.Trust) {
		return func() (map[string][]byte, access.Trust) {
			tr := m.trust
			tr.Maintainers = slices.Clone(tr.Maintainers)
			f(&tr)
			return good, tr
		}
	}
	remade := func(f func(map[string][]byte)) func() (map[string][]byte, access.Trust) {
		return func() (map[string][]byte, access.Trust) { return resigned(f), m.trust }
	}
	policy := func(text string) func() (map[string][]byte, access.Trust) {
		return remade(func(f map[string][]byte) { f["site.cedar"] = []byte(text) })
	}
	for _, tc := range []struct {
		name string
		make func() (map[string][]byte, access.Trust)
		want string
	}{
		{"control", changed(func(map[string][]byte) {}), ""},
		{"control, remade", remade(func(map[string][]byte) {}), ""},
		{"unsigned", changed(func(f map[string][]byte) {
			delete(f, "signatures/ada.sig")
			delete(f, "signatures/cyd.sig")
		}), "policy.threshold"},
		{"signed by one of two", changed(func(f map[string][]byte) { delete(f, "signatures/ada.sig") }), "policy.threshold"},
		{"one maintainer twice", changed(func(f map[string][]byte) {
			f["signatures/bea.sig"] = f["signatures/ada.sig"]
		}), "policy.duplicate-signer"},
		{"a stranger's signature besides", changed(func(f map[string][]byte) {
			f["signatures/eve.sig"], _ = access.Sign(stranger.keys["eve"], f[access.ManifestFile])
		}), "policy.signature"},
		{"a broken signature besides", changed(func(f map[string][]byte) { f["signatures/bea.sig"] = []byte("x") }), "policy.signature"},
		{"a file that is no signature", changed(func(f map[string][]byte) { f["signatures/README"] = []byte("x") }), "policy.signature"},
		{"no manifest", changed(func(f map[string][]byte) { delete(f, access.ManifestFile) }), "policy.manifest"},
		{"a manifest with another byte", changed(func(f map[string][]byte) {
			f[access.ManifestFile] = append(bytes.Clone(f[access.ManifestFile]), ' ')
		}), "policy.signature"},
		{"a changed policy", changed(func(f map[string][]byte) {
			f["guards.cedar"] = append(bytes.Clone(f["guards.cedar"]), '\n')
		}), "policy.file-changed"},
		{"changed people", changed(func(f map[string][]byte) { f[access.PeopleFile] = []byte(`{"groups":[],"users":[]}`) }), "policy.file-changed"},
		{"a policy more", changed(func(f map[string][]byte) { f["more.cedar"] = []byte("permit (principal, action, resource);") }), "policy.file-extra"},
		{"a hidden file more", changed(func(f map[string][]byte) { f[".x"] = nil }), "policy.file-extra"},
		{"a policy less", changed(func(f map[string][]byte) { delete(f, "guards.cedar") }), "policy.file-missing"},
		{"for another broker", func() (map[string][]byte, access.Trust) {
			f := clone(good)
			m.sign(t, f, "broker.other", 7, "ada", "cyd")
			return f, m.trust
		}, "policy.broker"},
		{"another version", func() (map[string][]byte, access.Trust) {
			return signManifest(bytes.Replace(good[access.ManifestFile], []byte("/v1"), []byte("/v2"), 1)), m.trust
		}, "policy.manifest"},
		{"a serial number of 0", func() (map[string][]byte, access.Trust) {
			return signManifest(bytes.Replace(good[access.ManifestFile], []byte(`"serial":7`), []byte(`"serial":0`), 1)), m.trust
		}, "policy.manifest"},
		{"a field that nobody knows", func() (map[string][]byte, access.Trust) {
			return signManifest(bytes.Replace(good[access.ManifestFile], []byte(`{`), []byte(`{"x":1,`), 1)), m.trust
		}, "policy.manifest"},
		{"no trust", func() (map[string][]byte, access.Trust) { return good, access.Trust{} }, "policy.trust"},
		{"a threshold of 0", trusting(func(tr *access.Trust) { tr.Threshold = 0 }), "policy.trust"},
		{"a threshold beyond the maintainers", trusting(func(tr *access.Trust) { tr.Threshold = 4 }), "policy.trust"},
		{"no broker's name", trusting(func(tr *access.Trust) { tr.Broker = "" }), "policy.trust"},
		{"a maintainer without a key", trusting(func(tr *access.Trust) { tr.Maintainers[1].Key = nil }), "policy.trust"},
		{"two maintainers of one key", trusting(func(tr *access.Trust) { tr.Maintainers[1].Key = tr.Maintainers[0].Key }), "policy.trust"},
		{"two maintainers of one name", trusting(func(tr *access.Trust) { tr.Maintainers[1].Name = "ada" }), "policy.trust"},
		{"a policy that does not parse", policy("permit (principal"), "policy.content"},
		{"a policy without an id", policy("permit (principal, action, resource);"), "policy.content"},
		{"a policy's id twice", policy(`@id("region") permit (principal, action == Coffer::Action::"Info", resource);`), "policy.content"},
		{"a call that is none", policy(`@id("x") permit (principal, action == Coffer::Action::"Relese", resource);`), "policy.content"},
		{"an attribute that is none", policy(`@id("x") permit (principal, action == Coffer::Action::"ReadAsset", resource) when { resource.sensivity.contains("x") };`), "policy.content"},
		{"an attribute that may be missing", policy(`@id("x") permit (principal, action == Coffer::Action::"ReadAsset", resource) when { context.address.isLoopback() };`), "policy.content"},
		{"a label that is no set", policy(`@id("x") permit (principal, action == Coffer::Action::"ReadAsset", resource) when { resource.region == "eu" };`), "policy.content"},
		{"an approval of a grant, which is asked for each asset", policy(`@id("x") forbid (principal, action == Coffer::Action::"ApproveGrant", resource is Coffer::Grant);`), "policy.content"},
		{"people that are none", remade(func(f map[string][]byte) { f[access.PeopleFile] = []byte(`{"grops":[]}`) }), "policy.content"},
		{"no policies", remade(func(f map[string][]byte) {
			for n := range f {
				if strings.HasSuffix(n, ".cedar") {
					delete(f, n)
				}
			}
		}), "policy.content"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := access.Open(tc.make())
			if tc.want == "" {
				if err != nil || s.Serial() != 7 || !slices.Equal(s.Signers(), []string{"ada", "cyd"}) {
					t.Error(s, err)
				}
				return
			}
			if got := ids(t, err); s != nil || !slices.Contains(got, tc.want) {
				t.Errorf("failed %v, want %s", got, tc.want)
			}
		})
	}
}

func TestReadFiles(t *testing.T) {
	file := func(size int) *fstest.MapFile { return &fstest.MapFile{Data: make([]byte, size)} }
	for _, tc := range []struct {
		name   string
		folder fstest.MapFS
		ok     bool
	}{
		{"a set", fstest.MapFS{"manifest.json": file(1), "a.cedar": file(access.MaxFile), "signatures/a.sig": file(1)}, true},
		{"a file that is too large", fstest.MapFS{"a.cedar": file(access.MaxFile + 1)}, false},
		{"another folder", fstest.MapFS{"more/a.cedar": file(1)}, false},
		{"a link", fstest.MapFS{"a.cedar": &fstest.MapFile{Data: []byte("b.cedar"), Mode: 0o777 | 1<<27}, "b.cedar": file(1)}, false},
	} {
		got, err := access.ReadFiles(tc.folder)
		if (err == nil) != tc.ok || (tc.ok && len(got) != len(tc.folder)) {
			t.Errorf("%s: %d files, %v", tc.name, len(got), err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	m := newMaintainers(f, 1, "ada")
	good := m.files(f, 1, people(), nil, "ada")
	f.Add([]byte(`{"groups":[{"name":"g","roles":["owner"]}],"users":[]}`), []byte(`@id("x") permit (principal, action == Coffer::Action::"Info", resource);`))
	f.Add(good[access.PeopleFile], good["people.cedar"])
	f.Fuzz(func(t *testing.T, people, policies []byte) {
		files := map[string][]byte{access.PeopleFile: people, "site.cedar": policies}
		raw, err := access.Manifest(brokerID, 1, files)
		if err != nil {
			t.Skip()
		}
		files[access.ManifestFile] = raw
		if files["signatures/ada.sig"], err = access.Sign(m.keys["ada"], raw); err != nil {
			t.Fatal(err)
		}
		s, err := access.Open(files, m.trust)
		if err != nil {
			return
		}
		// Whatever maintainers sign, a call that the schema does not have is denied.
		if s.Authorize(access.Request{Principal: user("x", "g"), Action: "Export", Resource: thing("Broker")}, noon) == nil {
			t.Error("permitted")
		}
		if !json.Valid(people) || s.Digest() != plan.Sum(raw) {
			t.Error("opened what is not there")
		}
	})
}
