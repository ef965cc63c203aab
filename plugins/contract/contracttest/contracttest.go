// Package contracttest is what every GPU plugin must pass, in memory and out of
// process alike.
package contracttest

import (
	"context"
	"crypto/rand"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/coffer-run/coffer/plugins/contract"
)

// Served returns impl as a host sees it: through the contract's wire form, in
// memory.
func Served(t *testing.T, impl contract.GPU) contract.GPU {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	s := grpc.NewServer()
	contract.RegisterGPU(s, impl)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("passthrough:///bufconn",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return contract.NewGPU(conn)
}

// Run holds a GPU on a machine with at least one GPU that can attest against
// the contract.
func Run(t *testing.T, gpu contract.GPU) {
	inv, err := gpu.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(inv.Devices) == 0 {
		t.Fatal("no GPU to hold against the contract")
	}
	var uuids []string
	for _, d := range inv.Devices {
		uuids = append(uuids, d.UUID)
	}
	nonce := func() (n [contract.NonceSize]byte) {
		_, _ = rand.Read(n[:])
		return n
	}

	t.Run("settings are made before GPUs are ready, and GPUs are cleared", func(t *testing.T) { prepared(t, gpu, uuids) })
	t.Run("inventory is complete", func(t *testing.T) {
		for _, d := range inv.Devices {
			if d.UUID == "" || d.Name == "" || d.VBIOSVersion == "" || d.MemoryBytes <= 0 {
				t.Errorf("incomplete device %+v", d)
			}
		}
		if inv.DriverVersion == "" || inv.CCMode != contract.CCOn {
			t.Errorf("driver %q, confidential computing %q", inv.DriverVersion, inv.CCMode)
		}
	})
	t.Run("every GPU answers to the same nonce in the order asked", func(t *testing.T) {
		n := nonce()
		evs, err := gpu.Collect(t.Context(), n, uuids)
		if err != nil {
			t.Fatal(err)
		}
		if len(evs) != len(uuids) {
			t.Fatalf("%d answers of %d", len(evs), len(uuids))
		}
		for i, e := range evs {
			if e.UUID != uuids[i] || len(e.Chain) == 0 || e.DriverVersion != inv.DriverVersion || e.VBIOSVersion != inv.Devices[i].VBIOSVersion {
				t.Errorf("answer %d: %q %q %q", i, e.UUID, e.DriverVersion, e.VBIOSVersion)
			}
			// SPDM 1.1 GET_MEASUREMENTS: the requester's nonce follows four bytes of header.
			if len(e.Report) < 36 || [contract.NonceSize]byte(e.Report[4:36]) != n {
				t.Errorf("answer %d does not speak of the nonce", i)
			}
		}
	})
	t.Run("a GPU that is not there fails the whole", func(t *testing.T) {
		if evs, err := gpu.Collect(t.Context(), nonce(), append([]string{"GPU-none"}, uuids...)); err == nil {
			t.Errorf("got %d answers", len(evs))
		}
	})
	t.Run("a GPU asked for twice is refused", func(t *testing.T) {
		if _, err := gpu.Collect(t.Context(), nonce(), []string{uuids[0], uuids[0]}); err == nil {
			t.Error("answered")
		}
	})
	t.Run("no GPU asked for is refused", func(t *testing.T) {
		if _, err := gpu.Collect(t.Context(), nonce(), nil); err == nil {
			t.Error("answered")
		}
	})
	t.Run("a context that ended", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := gpu.Collect(ctx, nonce(), uuids); err == nil {
			t.Error("answered")
		}
	})
	t.Run("concurrent collections keep their nonces apart", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				n := nonce()
				evs, err := gpu.Collect(t.Context(), n, uuids[:1])
				if err != nil {
					t.Error(err)
					return
				}
				if [contract.NonceSize]byte(evs[0].Report[4:36]) != n {
					t.Error("another collection's nonce")
				}
			})
		}
		wg.Wait()
	})
	t.Run("ready state is kept", func(t *testing.T) {
		for _, want := range []bool{true, false} {
			if err := gpu.SetReady(t.Context(), want); err != nil {
				t.Fatal(err)
			}
			inv, err := gpu.Inventory(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if inv.Ready != want {
				t.Errorf("ready is %v, want %v", inv.Ready, want)
			}
		}
	})
}

func prepared(t *testing.T, gpu contract.GPU, uuids []string) {
	ctx := t.Context()
	set := contract.Settings{UnprotectedBytes: 512 << 20, MaxAttackerAdvantage: 55}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(gpu.SetReady(ctx, false))
	must(gpu.Prepare(ctx, uuids, set))
	must(gpu.SetReady(ctx, true))
	st, err := gpu.State(ctx, uuids)
	must(err)
	if st.CCMode != contract.CCOn || !st.Ready || st.AttackerAdvantage != 55 || len(st.Devices) != len(uuids) {
		t.Errorf("state %+v", st)
	}
	for i, d := range st.Devices {
		if d.UUID != uuids[i] || d.UnprotectedBytes != 512<<20 || d.ProtectedBytes <= 0 {
			t.Errorf("device %+v", d)
		}
	}
	if gpu.Prepare(ctx, uuids, set) == nil {
		t.Error("settings changed under a job")
	}
	must(gpu.SetReady(ctx, false))
	must(gpu.Clear(ctx, uuids))
	st, err = gpu.State(ctx, uuids)
	must(err)
	for _, d := range st.Devices {
		if st.Ready || d.UsedBytes != 0 || d.Processes != 0 {
			t.Errorf("after it was cleared: ready %v, %+v", st.Ready, d)
		}
	}
	for name, bad := range map[string]contract.Settings{
		"nothing":                       {},
		"no memory for copies":          {MaxAttackerAdvantage: 60},
		"memory that is not in KiB":     {UnprotectedBytes: 1000, MaxAttackerAdvantage: 60},
		"keys that change too seldom":   {UnprotectedBytes: 1 << 20, MaxAttackerAdvantage: 66},
		"keys that change all the time": {UnprotectedBytes: 1 << 20, MaxAttackerAdvantage: 49},
	} {
		if gpu.Prepare(ctx, uuids, bad) == nil {
			t.Errorf("%s: prepared", name)
		}
	}
	if _, err := gpu.State(ctx, []string{"GPU-unknown"}); err == nil {
		t.Error("state of a GPU that is not there")
	}
	if gpu.Clear(ctx, []string{"GPU-unknown"}) == nil || gpu.Clear(ctx, nil) == nil {
		t.Error("cleared a GPU that is not there")
	}
}
