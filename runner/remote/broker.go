package remote

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// Broker is a client of the broker.
type Broker struct {
	client brokerv1connect.BrokerServiceClient
	keys   receipt.Keys
	id     string
	jwks   []byte
}

// NewBroker returns a client. It calls nothing yet.
func NewBroker(s Service) (*Broker, error) {
	if err := s.validate("broker"); err != nil {
		return nil, err
	}
	keys, err := receipt.ParseKeys(s.ID, s.JWKS)
	if err != nil {
		return nil, err
	}
	return &Broker{client: brokerv1connect.NewBrokerServiceClient(s.HTTP, s.URL), keys: keys, id: s.ID, jwks: s.JWKS}, nil
}

// ID is the broker's name, the audience of results.
func (b *Broker) ID() string { return b.id }

// JWKS are the keys by which the node checks receipts.
func (b *Broker) JWKS() []byte { return b.jwks }

// Asset says what the broker knows of an asset.
func (b *Broker) Asset(ctx context.Context, name string) (*brokerv1.Asset, error) {
	r, err := persist(ctx, "broker", "look up asset "+name, func(ctx context.Context) (*connect.Response[brokerv1.GetAssetResponse], error) {
		return b.client.GetAsset(ctx, connect.NewRequest(&brokerv1.GetAssetRequest{Name: name}))
	})
	if err != nil {
		return nil, err
	}
	return r.Msg.GetAsset(), nil
}

// Grants lists the grants for one plan.
func (b *Broker) Grants(ctx context.Context, p plan.Digest) ([]*brokerv1.Grant, error) {
	r, err := persist(ctx, "broker", "look up grants", func(ctx context.Context) (*connect.Response[brokerv1.ListGrantsResponse], error) {
		return b.client.ListGrants(ctx, connect.NewRequest(&brokerv1.ListGrantsRequest{PlanDigest: string(p)}))
	})
	if err != nil {
		return nil, err
	}
	return r.Msg.GetGrants(), nil
}

// Sign signs a canonical release request with the job's session key.
type Sign func(ctx context.Context, request []byte) (signature []byte, err error)

// Release asks for one asset's key. The same request may be repeated: the broker
// answers it with what it stored and counts it once.
func (b *Broker) Release(ctx context.Context, v receipt.Verified, grant, asset string, attempt int, sign Sign) (receipt.Grant, error) {
	req := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: b.id, Grant: grant, Attempt: attempt, ResultID: v.Result().ID, Asset: asset}
	body, err := req.Canonical()
	if err != nil {
		return receipt.Grant{}, err
	}
	sig, err := sign(ctx, body)
	if err != nil {
		return receipt.Grant{}, fmt.Errorf("sign release request: %w", err)
	}
	r, err := persist(ctx, "broker", "release "+asset, func(ctx context.Context) (*connect.Response[brokerv1.ReleaseResponse], error) {
		return b.client.Release(ctx, connect.NewRequest(&brokerv1.ReleaseRequest{Result: v.Token(), Request: body, Signature: sig}))
	})
	if err != nil {
		return receipt.Grant{}, err
	}
	return receipt.VerifyRelease(b.keys, v, req, r.Msg.GetEnc(), r.Msg.GetCiphertext(), r.Msg.GetReceipt(), time.Now())
}

// LogBundle records a bundle statement's digest in the evidence log and returns
// the signed receipt with the job's entries.
func (b *Broker) LogBundle(ctx context.Context, job string, digest plan.Digest) (string, []translog.Entry, error) {
	logged, err := persist(ctx, "broker", "log bundle", func(ctx context.Context) (*connect.Response[brokerv1.LogBundleResponse], error) {
		return b.client.LogBundle(ctx, connect.NewRequest(&brokerv1.LogBundleRequest{JobId: job, Digest: string(digest)}))
	})
	if err != nil {
		return "", nil, err
	}
	got, err := persist(ctx, "broker", "read log", func(ctx context.Context) (*connect.Response[brokerv1.EntriesResponse], error) {
		return b.client.Entries(ctx, connect.NewRequest(&brokerv1.EntriesRequest{JobId: job}))
	})
	if err != nil {
		return "", nil, err
	}
	entries := make([]translog.Entry, 0, len(got.Msg.GetEntries()))
	for _, e := range got.Msg.GetEntries() {
		entries = append(entries, translog.Entry{Index: e.GetIndex(), Body: e.GetBody(), Hash: e.GetChainHash()})
	}
	return logged.Msg.GetReceipt(), entries, nil
}
