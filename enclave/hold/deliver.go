package hold

import (
	"bytes"
	"errors"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/enclave/keys"
)

type heldKey struct {
	key *keys.DataKey
	// plan is the one under which the broker released the key.
	plan plan.Digest
}

func (h *Holder) signRelease(request []byte) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		return nil, err
	}
	var r receipt.ReleaseRequest
	if err := plan.Decode(request, receipt.MaxRequest, &r); err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	if err := h.lease.ask(r); err != nil {
		return nil, err
	}
	sig, err := h.session.SignRelease(request)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// sign signs a bundle statement of this job once the job is over: what it says of
// the end is then known.
func (h *Holder) sign(statement []byte) ([]byte, error) {
	st, err := bundle.ParseStatement(statement)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	if st.JobID != h.cfg.JobID {
		return nil, fail(holdapi.CodeRefused, "the statement speaks of another job")
	}
	h.mu.Lock()
	over := h.finished != nil && isClosed(h.finished)
	h.mu.Unlock()
	if !over {
		return nil, fail(holdapi.CodeState, "the job is not finished")
	}
	sig, err := h.session.SignStatement(statement)
	if err != nil {
		return nil, &apiError{holdapi.CodeRefused, err}
	}
	return sig, nil
}

// wrapInfo is what receipt.WrapInfo encodes.
type wrapInfo struct {
	Label    string             `json:"label"`
	Grant    string             `json:"grant"`
	Plan     plan.Digest        `json:"plan"`
	Asset    string             `json:"asset"`
	ResultID string             `json:"resultId"`
	Lease    receipt.LeaseTerms `json:"lease"`
}

const maxWrapInfo = 8 << 10

// deliver takes a data key. The same key for the same asset may come twice: an
// agent that was restarted does not know what its predecessor did.
func (h *Holder) deliver(d holdapi.Deliver) error {
	var info wrapInfo
	if err := plan.Decode(d.Info, maxWrapInfo, &info); err != nil {
		return fail(holdapi.CodeInvalid, "wrap info: %w", err)
	}
	want, err := receipt.WrapInfo(info.Grant, info.Plan, info.Asset, info.ResultID, info.Lease)
	if err != nil || !bytes.Equal(want, d.Info) {
		return fail(holdapi.CodeInvalid, "wrap info is not that of a release")
	}
	if d.Asset == "" || info.Asset != d.Asset || info.Plan.Bytes() == nil {
		return fail(holdapi.CodeRefused, "wrap info speaks of another asset, or of no plan")
	}
	leaseKeys, err := info.Lease.Keys(d.LeaseKeys)
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	if err := h.lease.use(); err != nil && !errors.Is(err, errNoLease) {
		return err
	}
	key, err := h.recipient.Open(d.Enc, d.Ciphertext, d.Info, []byte(d.Asset))
	if err != nil {
		return &apiError{holdapi.CodeRefused, err}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.running(); err != nil {
		key.Destroy()
		return err
	}
	if old, ok := h.keys[d.Asset]; ok {
		same := old.key.Equal(key) && old.plan == info.Plan
		key.Destroy()
		if !same {
			return fail(holdapi.CodeRefused, "asset %.80q has another key already", d.Asset)
		}
		return nil
	}
	if len(h.keys) == maxKeys {
		key.Destroy()
		return fail(holdapi.CodeFull, "more than %d keys", maxKeys)
	}
	for _, k := range h.keys {
		if k.plan != info.Plan {
			key.Destroy()
			return fail(holdapi.CodeRefused, "key was released for another plan than the keys before it")
		}
	}
	if err := h.lease.grant(info, leaseKeys); err != nil {
		key.Destroy()
		return err
	}
	h.keys[d.Asset] = heldKey{key: key, plan: info.Plan}
	return nil
}
