package emulate_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/report"

	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/server"
)

const root = configfsi.TsmPrefix + "/report"

func newTSM(t *testing.T) *emulate.TSM {
	t.Helper()
	return emulate.NewTSM(emulate.Dial(emulatetest.Devices(t, emulatetest.Vendor(t), server.Config{})))
}

func newEntry(t *testing.T, c *emulate.TSM) string {
	t.Helper()
	p, err := c.MkdirTemp(root, "entry")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestGenerationCountsWrites(t *testing.T) {
	c := newTSM(t)
	p := newEntry(t, c)
	want := []string{"0\n", "1\n", "2\n"}
	writes := []func() error{
		func() error { return c.WriteFile(p+"/inblob", make([]byte, 64)) },
		func() error { return c.WriteFile(p+"/privlevel", []byte("1")) },
		func() error { return nil },
	}
	for i, w := range want {
		b, err := c.ReadFile(p + "/generation")
		if err != nil || string(b) != w {
			t.Errorf("generation %q, %v: want %q", b, err, w)
		}
		if err := writes[i](); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReportIsMadeOncePerWrite(t *testing.T) {
	c := newTSM(t)
	p := newEntry(t, c)
	read := func() []byte {
		b, err := c.ReadFile(p + "/outblob")
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if err := c.WriteFile(p+"/inblob", bytes.Repeat([]byte{1}, 64)); err != nil {
		t.Fatal(err)
	}
	first := read()
	if !bytes.Equal(first, read()) {
		t.Error("a second read made another report")
	}
	if err := c.WriteFile(p+"/inblob", bytes.Repeat([]byte{2}, 64)); err != nil {
		t.Fatal(err)
	}
	if second := read(); bytes.Equal(first, second) || second[0x50] != 2 {
		t.Error("an old report after a write")
	}
	aux, err := c.ReadFile(p + "/auxblob")
	if err != nil || len(aux) == 0 {
		t.Errorf("certificate table of %d bytes, %v", len(aux), err)
	}
}

// TestInterference is somebody else writing to the entry between a report's
// question and its answer: report.Get must notice.
func TestInterference(t *testing.T) {
	c := newTSM(t)
	r, err := report.Create(c, &report.Request{InBlob: make([]byte, 64)})
	if err != nil {
		t.Fatal(err)
	}
	entries, err := c.ReadDir(root)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	if err := c.WriteFile(root+"/"+entries[0].Name()+"/inblob", bytes.Repeat([]byte{9}, 64)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Get(); report.GetGenerationErr(errors.Unwrap(err)) == nil {
		t.Fatalf("got %v", err)
	}
}

func TestRefusals(t *testing.T) {
	c := newTSM(t)
	p := newEntry(t, c)
	for name, c := range map[string]struct {
		do   func() error
		want error
	}{
		"outblob before inblob":          {func() error { _, err := c.ReadFile(p + "/outblob"); return err }, syscall.EINVAL},
		"inblob of no bytes":             {func() error { return c.WriteFile(p+"/inblob", nil) }, syscall.EINVAL},
		"inblob of 65 bytes":             {func() error { return c.WriteFile(p+"/inblob", make([]byte, 65)) }, syscall.EINVAL},
		"privilege level 4":              {func() error { return c.WriteFile(p+"/privlevel", []byte("4")) }, syscall.EINVAL},
		"privilege level of words":       {func() error { return c.WriteFile(p+"/privlevel", []byte("low")) }, syscall.EINVAL},
		"writing what is read":           {func() error { return c.WriteFile(p+"/outblob", []byte("forged")) }, syscall.EACCES},
		"reading what is written":        {func() error { _, err := c.ReadFile(p + "/inblob"); return err }, syscall.EACCES},
		"an attribute of newer kernels":  {func() error { _, err := c.ReadFile(p + "/manifestblob"); return err }, syscall.ENOENT},
		"writing one of newer kernels":   {func() error { return c.WriteFile(p+"/service_guid", []byte("x")) }, syscall.ENOENT},
		"an entry that is not there":     {func() error { _, err := c.ReadFile(root + "/none/outblob"); return err }, syscall.ENOENT},
		"removing what is not there":     {func() error { return c.RemoveAll(root + "/none") }, syscall.ENOENT},
		"removing the root":              {func() error { return c.RemoveAll(root) }, syscall.EPERM},
		"an entry in another subsystem":  {func() error { _, err := c.MkdirTemp(configfsi.TsmPrefix+"/rtmr", "x"); return err }, syscall.EPERM},
		"listing an entry not there":     {func() error { _, err := c.ReadDir(root + "/none"); return err }, syscall.ENOENT},
		"a path outside of configfs-tsm": {func() error { _, err := c.ReadFile("/etc/passwd"); return err }, syscall.ENOENT},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.do(); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("inblob shorter than the firmware wants", func(t *testing.T) {
		p := newEntry(t, c)
		if err := c.WriteFile(p+"/inblob", make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadFile(p + "/outblob"); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the emulator is gone", func(t *testing.T) {
		c := emulate.NewTSM(emulate.Dial(t.TempDir() + "/none"))
		p := newEntry(t, c)
		if err := c.WriteFile(p+"/inblob", make([]byte, 64)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadFile(p + "/outblob"); !errors.Is(err, syscall.EIO) {
			t.Errorf("got %v", err)
		}
	})
}

func TestConcurrentEntries(t *testing.T) {
	c := newTSM(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			want := make([]byte, 64)
			_, _ = rand.Read(want)
			resp, err := report.Get(c, &report.Request{InBlob: want, Privilege: &report.Privilege{Level: 1}, GetAuxBlob: true})
			if err != nil {
				t.Error(err)
				return
			}
			if !bytes.Equal(resp.OutBlob[0x50:0x90], want) || resp.OutBlob[0x30] != 1 {
				t.Error("another entry's report")
			}
		})
	}
	wg.Wait()
	if left, err := c.ReadDir(root); err != nil || len(left) != 0 {
		t.Errorf("%d entries left, %v", len(left), err)
	}
}

func TestEntryListsItsAttributes(t *testing.T) {
	c := newTSM(t)
	p := newEntry(t, c)
	got, err := c.ReadDir(p)
	if err != nil || len(got) != 7 {
		t.Fatalf("%v, %v", got, err)
	}
	for _, e := range got {
		if info, err := e.Info(); err != nil || info.Name() != e.Name() || e.IsDir() {
			t.Errorf("%v", e)
		}
	}
}
