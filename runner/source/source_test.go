package source

import (
	"os"
	"path/filepath"
	"testing"
)

func TestFolderLeadsWhereItSays(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sealed"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "sealed"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sealed", "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, ok := range []string{"sealed", "sealed/below"} {
		if got, err := Folder("file://" + dir + "/" + ok); err != nil || got != filepath.Join(dir, ok) {
			t.Errorf("%s: %q, %v", ok, got, err)
		}
	}
	for name, uri := range map[string]string{
		"a symbolic link":               "file://" + dir + "/link",
		"a symbolic link on the way":    "file://" + dir + "/link/below",
		"a file":                        "file://" + dir + "/file",
		"nothing":                       "file://" + dir + "/none",
		"another scheme":                "http://host/x",
		"a host":                        "file://host" + dir,
		"dots":                          "file://" + dir + "/sealed/../sealed",
		"escaped dots":                  "file://" + dir + "/%2e%2e/x",
		"a process":                     "file:///proc/self",
		"a cgroup":                      "file:///sys/fs/cgroup",
		"another job's run directory":   "file:///run",
		"below another's run directory": "file:///run/coffer",
		"a device tree":                 "file:///dev/shm",
	} {
		if got, err := Folder(uri); err == nil {
			t.Errorf("%s is taken as %q", name, got)
		}
	}
}

func TestSinkIsNew(t *testing.T) {
	uri := "file://" + t.TempDir()
	if _, err := Sink(uri, "job"); err != nil {
		t.Fatal(err)
	}
	for name, sub := range map[string]string{"one that exists": "job", "a path": "a/b", "a parent": "..", "nothing": ""} {
		if got, err := Sink(uri, sub); err == nil {
			t.Errorf("%s is made as %q", name, got)
		}
	}
}
