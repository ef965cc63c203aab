package plan

import "testing"

func TestSandboxNamesItsBillOfMaterials(t *testing.T) {
	described := func(d Digest) Sandbox {
		return Sandbox{Version: SandboxVersion, JobID: "job-1", Image: "sha256:00", ImageSBOM: d, Profile: Profile{Version: SandboxVersion, Shim: "shim"}, Wrapper: []string{"runsc"}, Trace: []byte("{}"), Spec: []byte("{}")}
	}
	without := NoSandbox("job-1")
	without.ImageSBOM = Sum([]byte("list"))
	for name, row := range map[string]struct {
		sandbox Sandbox
		taken   bool
	}{
		"none":                {described(""), true},
		"a digest":            {described(Sum([]byte("list"))), true},
		"no digest":           {described("list"), false},
		"without a container": {without, false},
	} {
		b, err := row.sandbox.Canonical()
		if err != nil {
			t.Fatal(err)
		}
		if s, err := ParseSandbox(b); (err == nil) != row.taken || row.taken && s.ImageSBOM != row.sandbox.ImageSBOM {
			t.Errorf("%s: %q, %v", name, s.ImageSBOM, err)
		}
	}
}
