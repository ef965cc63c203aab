package stack

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// keyStoreStarter has a stack's folder and a folder of programs with the stack's
// key store, played.
func keyStoreStarter(t *testing.T, bin string) *starter {
	t.Helper()
	l, err := NewLayout(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s := &starter{Layout: l, tools: tools{binDir: filepath.Join(t.TempDir(), bin)}}
	s.env = s.environment()
	self, err := os.Executable()
	if err := errors.Join(err,
		os.MkdirAll(s.tools.binDir, 0o700), os.Symlink(self, s.tools.our(keyStoreProgram)),
		os.MkdirAll(l.path("config"), 0o700), os.MkdirAll(l.path("broker"), 0o700), os.MkdirAll(l.givenKeyStores(), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOwnKeyStore(t *testing.T) {
	s := keyStoreStarter(t, "bin")
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(s.keyStore(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if _, err := s.ownStore(t.Context()); err != nil {
		t.Fatal(err)
	}
	keys, passphrase := read("keys.json"), read("passphrase")
	if len(passphrase) < 26 {
		t.Errorf("passphrase of %d bytes", len(passphrase))
	}
	if fi, err := os.Stat(s.keyStore("passphrase")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("passphrase: %v, %v", fi, err)
	}
	if _, err := s.ownStore(t.Context()); err != nil || !slices.Equal(read("keys.json"), keys) || !slices.Equal(read("passphrase"), passphrase) {
		t.Errorf("another one was made: %v", err)
	}
	// Under keys that are gone something may be sealed.
	if err := errors.Join(os.Rename(s.keyStore("keys.json"), s.keyStore("away")), os.WriteFile(s.database(), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ownStore(t.Context()); err == nil || !strings.Contains(err.Error(), "keys.json is gone") {
		t.Errorf("a used stack without its keys: %v", err)
	}
	if err := errors.Join(os.Remove(s.database()), os.Rename(s.keyStore("away"), s.keyStore("keys.json"))); err != nil {
		t.Fatal(err)
	}
	// Interrupted between the passphrase and the file: the passphrase stays.
	if err := os.Remove(s.keyStore("keys.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ownStore(t.Context()); err != nil || !slices.Equal(read("passphrase"), passphrase) {
		t.Errorf("another passphrase was made: %v", err)
	}
	keys = read("keys.json")
	if err := os.Remove(s.keyStore("passphrase")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.ownStore(t.Context()); err == nil || !strings.Contains(err.Error(), "passphrase is gone") || !slices.Equal(read("keys.json"), keys) {
		t.Errorf("without the passphrase: %v", err)
	}
	if _, err := os.Stat(s.keyStore("passphrase")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a passphrase was made that opens nothing: %v", err)
	}
}

func TestOwnKeyStoreIsNotMade(t *testing.T) {
	t.Run("the program fails", func(t *testing.T) {
		s := keyStoreStarter(t, "broken-"+keyStoreProgram)
		if _, err := s.ownStore(t.Context()); err == nil || !strings.Contains(err.Error(), "broken on purpose") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the program is not there", func(t *testing.T) {
		s := keyStoreStarter(t, "bin")
		if err := os.Remove(s.tools.our(keyStoreProgram)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ownStore(t.Context()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
		if f := s.tools.check()[0]; f.Outcome != Fail || !strings.Contains(f.Found, keyStoreProgram) {
			t.Errorf("finding: %+v", f)
		}
	})
	t.Run("the stack has a key-encryption key", func(t *testing.T) {
		s := keyStoreStarter(t, "bin")
		if err := createSecret(s.kekFile()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.ownStore(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(s.keyStore("keys.json")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("made one beside it: %v", err)
		}
		var c brokerConfig
		if err := s.setKeyStores(s.tools, &c); err != nil || c.KEKFile != s.kekFile() || c.DefaultKeyStore != "" || len(c.KeyStores) != 0 {
			t.Errorf("got %+v, %v", c, err)
		}
	})
}

func TestGivenKeyStores(t *testing.T) {
	plugin := filepath.Join(t.TempDir(), "plugin")
	if err := os.WriteFile(plugin, []byte("plugin"), 0o700); err != nil {
		t.Fatal(err)
	}
	sum, err := fileSHA256(plugin)
	if err != nil {
		t.Fatal(err)
	}
	hsm := fmt.Sprintf(`{"name":"hsm","plugin":{"path":%q,"sha256":%q,"args":["--config","/c"]},"env":["A=b"]}`, plugin, sum)
	for name, tc := range map[string]struct {
		files map[string]string
		mode  os.FileMode
		want  []string
		bad   string
	}{
		"none":                        {mode: 0o600, want: []string{"local"}},
		"one":                         {files: map[string]string{"hsm.json": hsm}, mode: 0o600, want: []string{"local", "hsm"}},
		"something else beside it":    {files: map[string]string{"hsm.json": hsm, "pin": "1234", "hsm.json~": "{"}, mode: 0o600, want: []string{"local", "hsm"}},
		"an unknown field":            {files: map[string]string{"hsm.json": `{"name":"hsm","checksum":"none"}`}, mode: 0o600, bad: "checksum"},
		"another checksum":            {files: map[string]string{"hsm.json": strings.Replace(hsm, sum[:4], "0000", 1)}, mode: 0o600, bad: "the checksum of"},
		"no checksum":                 {files: map[string]string{"hsm.json": strings.Replace(hsm, sum, "", 1)}, mode: 0o600, bad: "the checksum of"},
		"a name that is taken":        {files: many(hsm, 2), mode: 0o600, bad: `the name "hsm" is taken`},
		"the stack's own name":        {files: map[string]string{"a.json": strings.Replace(hsm, `"hsm"`, `"local"`, 1)}, mode: 0o600, bad: `the name "local" is taken`},
		"no such program":             {files: map[string]string{"hsm.json": strings.Replace(hsm, plugin, plugin+"-2", 1)}, mode: 0o600, bad: "no such file"},
		"not JSON":                    {files: map[string]string{"hsm.json": `hsm`}, mode: 0o600, bad: "hsm.json"},
		"others may write it":         {files: map[string]string{"hsm.json": hsm}, mode: 0o666, bad: "could make the broker run anything"},
		"its group may write it":      {files: map[string]string{"hsm.json": hsm}, mode: 0o660, bad: "could make the broker run anything"},
		"more than a broker is given": {files: many(hsm, maxKeyStores+1), mode: 0o600, bad: "want at most 32"},
	} {
		t.Run(name, func(t *testing.T) {
			s := keyStoreStarter(t, "bin")
			for f, text := range tc.files {
				path := filepath.Join(s.givenKeyStores(), f)
				if err := errors.Join(os.WriteFile(path, []byte(text), tc.mode), os.Chmod(path, tc.mode)); err != nil {
					t.Fatal(err)
				}
			}
			if err := writeJSON(s.config(brokerName), brokerConfig{ID: BrokerID, KEKFile: "gone", Simulation: true}); err != nil {
				t.Fatal(err)
			}
			if f := s.checkKeyStores(); (f.Outcome == OK) != (tc.bad == "") || !strings.Contains(f.Found, cmp.Or(tc.bad, strings.Join(tc.want, ", "))) {
				t.Errorf("finding: %+v", f)
			}
			err := s.takeKeyStores(s.tools)
			var c brokerConfig
			if rerr := readJSON(s.config(brokerName), &c); rerr != nil {
				t.Fatal(rerr)
			}
			if tc.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tc.bad) {
					t.Errorf("got %v, want %q", err, tc.bad)
				}
				if c.KEKFile != "gone" || c.KeyStores != nil {
					t.Errorf("a refused key store changed the configuration: %+v", c)
				}
				return
			}
			var names []string
			for _, k := range c.KeyStores {
				names = append(names, k.Name)
				if !slices.Contains(k.Env, stackVariable+"="+s.ID) {
					t.Errorf("%s does not carry the stack's mark: %q", k.Name, k.Env)
				}
			}
			if err != nil || !slices.Equal(names, tc.want) || c.DefaultKeyStore != "local" || c.KEKFile != "" || c.ID != BrokerID || !c.Simulation {
				t.Errorf("got %+v, %v", c, err)
			}
			if i := slices.Index(names, "hsm"); i >= 0 && (c.KeyStores[i].Env[0] != "A=b" || c.KeyStores[i].Plugin.SHA256 != sum) {
				t.Errorf("got %+v", c.KeyStores[i])
			}
		})
	}
}

func many(text string, n int) map[string]string {
	out := map[string]string{}
	for i := range n {
		out[fmt.Sprintf("%d.json", i)] = text
	}
	return out
}
