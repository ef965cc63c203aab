package remote

import (
	"context"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/receipt"
)

// CommitReseal has the broker set the digest of the asset that a job sealed, and
// returns its word on that (receipt.Resealed), checked. It may be repeated.
func (b *Broker) CommitReseal(ctx context.Context, job string, plan, record, signature []byte) (string, error) {
	rec, err := receipt.ParseResealRecord(record)
	if err != nil {
		return "", err
	}
	r, err := persist(ctx, "broker", "commit re-sealing", func(ctx context.Context) (*connect.Response[brokerv1.CommitResealResponse], error) {
		return b.client.CommitReseal(ctx, connect.NewRequest(&brokerv1.CommitResealRequest{JobId: job, Plan: plan, Record: record, Signature: signature}))
	})
	if err != nil {
		return "", err
	}
	token := r.Msg.GetReceipt()
	_, err = receipt.VerifyResealed(b.keys, token, record, rec)
	return token, err
}
