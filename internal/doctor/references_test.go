package doctor

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/stack"
)

// The driver's reference values must be those of its very version, and valid.
func TestReferenceValues(t *testing.T) {
	v := emulatetest.Vendor(t)
	driver := v.GPUs()[0].DriverVersion()
	id := nvgpu.DriverRIM(&nvgpu.Report{DriverVersion: driver})
	xml, err := v.DriverRIM(simulate.RIMOptions{})
	if err != nil {
		t.Fatal(err)
	}
	item, err := endorse.Parse(endorse.RIM, id, xml)
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	file := filepath.Join(folder, endorse.Path(item))
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, xml, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		folder, driver string
		at             time.Time
		want           stack.Outcome
	}{
		"there":               {folder, driver, time.Now(), stack.OK},
		"of another version":  {folder, driver + "1", time.Now(), stack.Warn},
		"no longer valid":     {folder, driver, item.Until.Add(time.Hour), stack.Warn},
		"an empty folder":     {t.TempDir(), driver, time.Now(), stack.Warn},
		"no folder":           {filepath.Join(folder, "none"), driver, time.Now(), stack.Warn},
		"a driver of no name": {folder, "", time.Now(), stack.Warn},
	} {
		m := Machine{Now: func() time.Time { return row.at }}
		if f := m.references(row.folder, row.driver); f.Outcome != row.want {
			t.Errorf("%s: %+v", name, f)
		}
	}
}
