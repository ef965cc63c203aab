package remote

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"

	"connectrpc.com/connect"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Countersign shows the broker a job's newest checkpoint, once, and returns its
// countersignature (receipt.CheckpointHead), checked. session is the job's public
// key, PKIX DER.
func (b *Broker) Countersign(ctx context.Context, job string, session, record, signature []byte) (string, error) {
	r, err := once(ctx, "broker", "countersign checkpoint", func(ctx context.Context) (*connect.Response[brokerv1.CountersignCheckpointResponse], error) {
		return b.client.CountersignCheckpoint(ctx, connect.NewRequest(&brokerv1.CountersignCheckpointRequest{JobId: job, Record: record, Signature: signature}))
	})
	if err != nil {
		return "", err
	}
	token := r.Msg.GetReceipt()
	return token, b.Countersigned(token, session, record, signature)
}

// Countersigned checks a countersignature of one record of a job.
func (b *Broker) Countersigned(token string, session, record, signature []byte) error {
	k, err := x509.ParsePKIXPublicKey(session)
	if err != nil {
		return fmt.Errorf("session key: %w", err)
	}
	pub, _ := k.(*ecdsa.PublicKey)
	rec, err := receipt.ParseCheckpointRecord(pub, record, signature)
	if err != nil {
		return err
	}
	_, err = receipt.VerifyCheckpointHead(b.keys, token, record, rec)
	return err
}

// ResumePoint asks from which checkpoint a job goes on that resumes from the
// latest of its plan, and gives it the plan's line of checkpoints. challenge is the
// job's holder's, which checks the answer itself.
func (b *Broker) ResumePoint(ctx context.Context, job string, p plan.Digest, asset string, challenge []byte) (string, receipt.ResumePoint, error) {
	r, err := persist(ctx, "broker", "ask where to resume", func(ctx context.Context) (*connect.Response[brokerv1.ResumeCheckpointResponse], error) {
		return b.client.ResumeCheckpoint(ctx, connect.NewRequest(&brokerv1.ResumeCheckpointRequest{JobId: job, Asset: asset, Challenge: challenge}))
	})
	if err != nil {
		return "", receipt.ResumePoint{}, err
	}
	at, err := receipt.VerifyResumePoint(b.keys, r.Msg.GetReceipt(), job, p, asset, challenge)
	return r.Msg.GetReceipt(), at, err
}
