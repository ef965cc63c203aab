package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/runner/rules"
)

func TestDocumentedAlerts(t *testing.T) {
	c := documented(t, "watching")
	if err := c.Alerts.validate(); err != nil || c.Rules == "" {
		t.Errorf("%+v: %v", c.Alerts, err)
	}
	for name, a := range map[string]Alerts{
		"nobody":                       {},
		"two":                          {File: "/x", URL: "https://x"},
		"a relative file":              {File: "x"},
		"a file with a token":          {File: "/x", TokenFile: "/y"},
		"a url without TLS":            {URL: "http://x"},
		"a url without a host":         {URL: "https://"},
		"a url with a size":            {URL: "https://x", FileBytes: 1},
		"a size below nothing":         {File: "/x", FileBytes: -1},
		"a token that is not there":    {URL: "https://x", TokenFile: "/nowhere"},
		"an authority that is not one": {URL: "https://x", CAFile: "../../docs/watching.md"},
	} {
		err := a.validate()
		if err == nil {
			_, err = a.open(slog.New(slog.DiscardHandler))
		}
		if err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	var nobody *Alerts
	if s, err := nobody.open(nil); s != nil || err != nil || nobody.validate() != nil {
		t.Errorf("without a configuration: %v, %v", s, err)
	}
}

func TestConfiguredRules(t *testing.T) {
	shipped, err := Config{}.rules()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(path, append([]byte("# ours\n"), rules.Default...), 0o600); err != nil {
		t.Fatal(err)
	}
	ours, err := Config{Rules: path}.rules()
	if err != nil || ours.Digest() == shipped.Digest() {
		t.Errorf("another file, the same digest: %v", err)
	}
	if _, err := (Config{Rules: path + "x"}).rules(); err == nil {
		t.Error("rules that are not there are taken")
	}
}
