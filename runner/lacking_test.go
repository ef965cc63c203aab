package runner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// What is not where the job file says is known before the job begins.
func TestLacking(t *testing.T) {
	base := t.TempDir()
	manifest := []byte(`{"version":"coffer.run/sealed/v1"}`)
	folder := func(name string, make func(path string) error) string {
		t.Helper()
		dir := filepath.Join(base, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if make != nil {
			if err := make(filepath.Join(dir, manifestName)); err != nil {
				t.Fatal(err)
			}
		}
		return "file://" + dir
	}
	write := func(b []byte) func(string) error {
		return func(path string) error { return os.WriteFile(path, b, 0o600) }
	}
	sealed := folder("sealed", write(manifest))
	for name, row := range map[string]struct {
		input, checkpoints string
		want               []string // a part of each
	}{
		"all there":                             {sealed, folder("ckpt", nil), nil},
		"no folder":                             {"file://" + base + "/nowhere", "", []string{"input data: there is no folder " + base + "/nowhere on the node"}},
		"a folder of the system":                {"file:///proc/self", "", []string{"input data: find source", "nothing below /proc"}},
		"a folder that was not sealed":          {folder("plain", nil), "", []string{"input data: ", "coffer seal"}},
		"sealed anew since":                     {folder("anew", write([]byte("{}"))), "", []string{"is another sealed folder"}},
		"a pipe for a manifest":                 {folder("pipe", func(p string) error { return unix.Mkfifo(p, 0o600) }), "", []string{"is no manifest"}},
		"a link for a manifest":                 {folder("link", func(p string) error { return os.Symlink(filepath.Join(base, "sealed", manifestName), p) }), "", []string{"input data: open"}},
		"a manifest that is huge":               {folder("huge", func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, maxManifest+1)) }), "", []string{"is no manifest"}},
		"object stores that are not configured": {"s3://data/x", "s3://ckpt/x", []string{"fetches nothing from object stores", "checkpoints: "}},
		"no place for checkpoints":              {sealed, "file://" + base + "/none", []string{"checkpoints: there is no folder " + base + "/none on the node"}},
	} {
		t.Run(name, func(t *testing.T) {
			file := fmt.Sprintf("apiVersion: coffer.run/v1\nname: demo\nimage: demo\ncommand: [/x]\nattestationPolicy: simulation\nresources: {cpu: 1, memory: 1Gi}\ninputs: [{name: data, asset: data, uri: %q, mount: /data}]\n", row.input)
			if row.checkpoints != "" {
				file += fmt.Sprintf("checkpoints: {asset: ckpt, uri: %q, mount: /ckpt}\n", row.checkpoints)
			}
			spec, err := jobspec.Parse([]byte(file))
			if err != nil {
				t.Fatal(err)
			}
			got := (&Agent{}).lacking(spec, []plan.Input{{Name: "data", Asset: "data", Digest: plan.Sum(manifest)}})
			all := strings.Join(got, "\n")
			if len(row.want) == 0 && len(got) > 0 {
				t.Errorf("lacks %q", got)
			}
			for _, want := range row.want {
				if !strings.Contains(all, want) {
					t.Errorf("lacks %q, want %q", got, want)
				}
			}
		})
	}
	if got := (&Agent{}).Lacking([]byte("name: x"), []byte("{}")); got != nil || AssetsOf([]byte("{}")) != nil {
		t.Errorf("of what is no job file: %q", got)
	}
}
