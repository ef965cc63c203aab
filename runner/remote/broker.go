package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/api/broker/v1/brokerv1connect"
	"github.com/coffer-run/coffer/attest/bundle"
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
	http   *http.Client
	url    string
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
	return &Broker{client: brokerv1connect.NewBrokerServiceClient(s.HTTP, s.URL, connect.WithReadMaxBytes(maxAnswer)), keys: keys, id: s.ID, jwks: s.JWKS, http: s.HTTP, url: s.URL}, nil
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

// Approved is what a grant allows and which of its approvals counted, by the
// digests that a release receipt names, with the rules that asked for them and the
// policies, again by the digests in receipts, that their owner signed.
func (b *Broker) Approved(ctx context.Context, grant string, counted, policies []plan.Digest) (bundle.Approved, error) {
	r, err := persist(ctx, "broker", "look up grant "+grant, func(ctx context.Context) (*connect.Response[brokerv1.GetGrantResponse], error) {
		return b.client.GetGrant(ctx, connect.NewRequest(&brokerv1.GetGrantRequest{Id: grant}))
	})
	if err != nil {
		return bundle.Approved{}, err
	}
	out := bundle.Approved{Terms: r.Msg.GetGrant().GetTerms()}
	if len(counted) == 0 && len(policies) == 0 {
		return out, nil
	}
	for _, s := range r.Msg.GetApprovals() {
		if slices.Contains(counted, plan.Sum(s.GetDocument())) {
			out.Approvals = append(out.Approvals, bundle.SignedApproval{Document: s.GetDocument(), Signature: s.GetSignature()})
		}
	}
	for _, name := range r.Msg.GetGrant().GetAssets() {
		a, err := b.Asset(ctx, name)
		if err != nil {
			return bundle.Approved{}, err
		}
		for _, rule := range a.GetPolicy().GetApprovals() {
			out.Rules = append(out.Rules, bundle.ApprovalRule{Asset: name, Group: rule.GetGroup(), Count: int(rule.GetCount())})
		}
		if slices.Contains(policies, plan.Sum(a.GetStatement())) {
			out.Policies = append(out.Policies, bundle.SignedApproval{Document: a.GetStatement(), Signature: a.GetStatementSignature()})
		}
	}
	return out, nil
}

// Sign signs a canonical release request with the job's session key.
type Sign func(ctx context.Context, request []byte) (signature []byte, err error)

// Ask is what a release is asked with.
type Ask struct {
	Grant, Asset string
	Attempt      int
	// Submitter is who submitted the job, "ROLE/NAME".
	Submitter string
	// Plan is the canonical plan, of which the broker reads the image.
	Plan []byte
}

// Release asks for one asset's key. The same request may be repeated: the broker
// answers it with what it stored and counts it once.
func (b *Broker) Release(ctx context.Context, v receipt.Verified, a Ask, sign Sign) (receipt.Grant, error) {
	req := receipt.ReleaseRequest{
		Version: receipt.RequestVersion, Broker: b.id, Grant: a.Grant, Attempt: a.Attempt, ResultID: v.Result().ID, Asset: a.Asset, Submitter: a.Submitter,
	}
	body, err := req.Canonical()
	if err != nil {
		return receipt.Grant{}, err
	}
	sig, err := sign(ctx, body)
	if err != nil {
		return receipt.Grant{}, fmt.Errorf("sign release request: %w", err)
	}
	r, err := persist(ctx, "broker", "release "+a.Asset, func(ctx context.Context) (*connect.Response[brokerv1.ReleaseResponse], error) {
		return b.client.Release(ctx, connect.NewRequest(&brokerv1.ReleaseRequest{Result: v.Token(), Request: body, Signature: sig, Plan: a.Plan}))
	})
	if err != nil {
		return receipt.Grant{}, err
	}
	return receipt.VerifyRelease(b.keys, v, req, r.Msg.GetEnc(), r.Msg.GetCiphertext(), r.Msg.GetReceipt(), time.Now())
}

const (
	// renewTimeout bounds one call for leases. It is shorter than others: a call
	// that hangs must leave time for the next.
	renewTimeout = 3 * time.Second
	// reportTimeout bounds how long a job's end is reported to a broker that is
	// away.
	reportTimeout = 10 * time.Second
)

// Renewal asks for a lease of one job.
type Renewal struct {
	JobID string
	// Challenge is the job's holder's.
	Challenge []byte
}

// Lease is a broker's signed word on one job, for the job's holder to check, or
// why there is none.
type Lease struct {
	Token string
	Err   error
}

// Renew asks for the leases of several jobs, once. It has an answer for each.
func (b *Broker) Renew(ctx context.Context, l []Renewal) (map[string]Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	req := &brokerv1.RenewRequest{}
	for _, r := range l {
		req.Renewals = append(req.Renewals, &brokerv1.Renewal{JobId: r.JobID, Challenge: r.Challenge})
	}
	r, err := once(ctx, "broker", "renew leases", func(ctx context.Context) (*connect.Response[brokerv1.RenewResponse], error) {
		return b.client.Renew(ctx, connect.NewRequest(req))
	})
	if err != nil {
		return nil, err
	}
	out := make(map[string]Lease, len(l))
	for _, r := range l {
		out[r.JobID] = Lease{Err: errors.New("the broker does not answer for this job")}
	}
	for _, got := range r.Msg.GetRenewed() {
		if _, asked := out[got.GetJobId()]; !asked {
			continue
		}
		switch {
		case got.GetRefused() != "":
			out[got.GetJobId()] = Lease{Err: fmt.Errorf("the broker gives no lease: %.200s", got.GetRefused())}
		case got.GetLease() != "":
			out[got.GetJobId()] = Lease{Token: got.GetLease()}
		}
	}
	return out, nil
}

// Reattest shows the broker a later result of a running job, once.
func (b *Broker) Reattest(ctx context.Context, job, token string) error {
	_, err := once(ctx, "broker", "show a later result", func(ctx context.Context) (*connect.Response[brokerv1.ReattestResponse], error) {
		return b.client.Reattest(ctx, connect.NewRequest(&brokerv1.ReattestRequest{JobId: job, Result: token}))
	})
	return err
}

// Stopped says how a job ended, in nanoseconds since 1970; 0 for what did not
// happen.
type Stopped struct {
	JobID                string
	Told, Gone, Scrubbed int64
	Reason               string
}

// ReportStopped tells the broker that a job is gone.
func (b *Broker) ReportStopped(ctx context.Context, s Stopped) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	millis := func(n int64) int64 { return n / time.Millisecond.Nanoseconds() }
	_, err := persist(ctx, "broker", "report end of job", func(ctx context.Context) (*connect.Response[brokerv1.ReportStoppedResponse], error) {
		return b.client.ReportStopped(ctx, connect.NewRequest(&brokerv1.ReportStoppedRequest{
			JobId: s.JobID, ToldUnixMillis: millis(s.Told), GoneUnixMillis: millis(s.Gone), ScrubbedUnixMillis: millis(s.Scrubbed), Reason: s.Reason,
		}))
	})
	return err
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

const (
	// proofTimeout bounds one request for proofs: the broker waits a few seconds
	// for a checkpoint.
	proofTimeout = 10 * time.Second
	// maxProofs bounds its answer, in bytes: translog.MaxProofs proofs in base64.
	maxProofs = 8 << 20
)

// Proofs returns a checkpoint of the log's Merkle tree and inclusion proofs for
// entries. It is asked once: a bundle can be had without, and completed later.
func (b *Broker) Proofs(ctx context.Context, entries []translog.Entry) (p translog.Proofs, err error) {
	defer func() {
		if err != nil {
			p, err = translog.Proofs{}, fmt.Errorf("prove that the log has the entries: %w", err)
		}
	}()
	var req translog.ProofRequest
	for _, e := range entries {
		req.Indices = append(req.Indices, e.Index)
	}
	body, err := json.Marshal(req)
	if err != nil {
		return p, err
	}
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url+"/log/proofs", bytes.NewReader(body))
	if err != nil {
		return p, err
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := b.http.Do(r)
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxProofs+1))
	switch {
	case err != nil:
		return p, err
	case resp.StatusCode != http.StatusOK:
		return p, fmt.Errorf("%s: %.200q", resp.Status, answer)
	case len(answer) > maxProofs:
		return p, fmt.Errorf("more than %d bytes", maxProofs)
	}
	if err := json.Unmarshal(answer, &p); err != nil {
		return p, err
	}
	if len(p.Hashes) != len(entries) {
		return p, fmt.Errorf("%d proofs for %d entries", len(p.Hashes), len(entries))
	}
	return p, nil
}
