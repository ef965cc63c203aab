package tsm_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"os"
	"path"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-configfs-tsm/configfs/configfsi"

	"github.com/coffer-run/coffer/enclave/collect/tsm"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/emulate/emulatetest"
	"github.com/coffer-run/coffer/internal/emulate/server"
)

// tampered is the emulated kernel with the answer of one attribute replaced.
type tampered struct {
	configfsi.Client
	attribute string
	answer    func([]byte) ([]byte, error)
}

func (c tampered) ReadFile(name string) ([]byte, error) {
	b, err := c.Client.ReadFile(name)
	if err == nil && path.Base(name) == c.attribute {
		return c.answer(b)
	}
	return b, err
}

func kernel(t *testing.T) *emulate.TSM {
	t.Helper()
	return emulate.NewTSM(emulate.Dial(emulatetest.Devices(t, emulatetest.Vendor(t), server.Config{})))
}

func TestConcurrentReports(t *testing.T) {
	k := kernel(t)
	s := tsm.New(k)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var want [64]byte
			_, _ = rand.Read(want[:])
			report, certificates, err := s.Report(t.Context(), want)
			if err != nil {
				t.Error(err)
				return
			}
			if !bytes.Equal(report[0x50:0x90], want[:]) || len(certificates) == 0 {
				t.Error("another job's report, or no certificates")
			}
		})
	}
	wg.Wait()
	if left, err := k.ReadDir(configfsi.TsmPrefix + "/report"); err != nil || len(left) != 0 {
		t.Errorf("%d entries left, %v", len(left), err)
	}
}

func TestHostWithoutCertificates(t *testing.T) {
	s := tsm.New(tampered{kernel(t), "auxblob", func([]byte) ([]byte, error) { return nil, nil }})
	if _, certificates, err := s.Report(t.Context(), [64]byte{1}); err != nil || len(certificates) != 0 {
		t.Errorf("%d bytes, %v", len(certificates), err)
	}
}

func TestRefusals(t *testing.T) {
	fixed := func(b []byte, err error) func([]byte) ([]byte, error) {
		return func([]byte) ([]byte, error) { return b, err }
	}
	for name, c := range map[string]struct {
		attribute string
		answer    func([]byte) ([]byte, error)
		want      string
	}{
		"another provider":                {"provider", fixed([]byte("tdx_guest\n"), nil), "provider"},
		"a provider with more behind it":  {"provider", fixed([]byte("sev_guest2\n"), nil), "provider"},
		"a report one byte short":         {"outblob", func(b []byte) ([]byte, error) { return b[1:], nil }, "1183 bytes"},
		"a report one byte long":          {"outblob", func(b []byte) ([]byte, error) { return append(b, 0), nil }, "1185 bytes"},
		"a report of no bytes":            {"outblob", fixed(nil, nil), "0 bytes"},
		"the firmware fails":              {"outblob", fixed(nil, os.ErrDeadlineExceeded), "outblob"},
		"a certificate table of 1 MiB":    {"auxblob", fixed(make([]byte, 1<<20), nil), "certificate table"},
		"somebody else wrote between":     {"generation", fixed([]byte("7\n"), nil), "generation"},
		"a generation that is no number":  {"generation", fixed([]byte("many\n"), nil), "many"},
		"the certificates cannot be read": {"auxblob", fixed(nil, os.ErrPermission), "auxblob"},
	} {
		t.Run(name, func(t *testing.T) {
			k := kernel(t)
			report, _, err := tsm.New(tampered{k, c.attribute, c.answer}).Report(t.Context(), [64]byte{1})
			if err == nil || report != nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d bytes, %v", len(report), err)
			}
			if left, _ := k.ReadDir(configfsi.TsmPrefix + "/report"); len(left) != 0 {
				t.Errorf("%d entries left", len(left))
			}
		})
	}
	t.Run("the zero value", func(t *testing.T) {
		var none *tsm.Source
		for _, s := range []*tsm.Source{none, {}} {
			if _, _, err := s.Report(t.Context(), [64]byte{}); err == nil {
				t.Error("answered")
			}
		}
	})
	t.Run("the context ends while the firmware works", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		blocked := make(chan struct{})
		defer close(blocked)
		s := tsm.New(tampered{kernel(t), "outblob", func(b []byte) ([]byte, error) {
			cancel()
			<-blocked
			return b, nil
		}})
		if _, _, err := s.Report(ctx, [64]byte{}); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestOpenWithoutConfigfs(t *testing.T) {
	if _, err := os.Stat(configfsi.TsmPrefix); err == nil {
		t.Skip("this machine has configfs-tsm")
	}
	if _, err := tsm.Open(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
