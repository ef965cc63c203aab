package keystore

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	keystorev1 "github.com/coffer-run/coffer/plugins/contract/keystore/v1"
)

// Register serves impl on s.
func Register(s grpc.ServiceRegistrar, impl Store) {
	keystorev1.RegisterKeyStoreServiceServer(s, &server{impl: impl})
}

// New returns the Store served over c.
func New(c grpc.ClientConnInterface) Store {
	return &client{c: keystorev1.NewKeyStoreServiceClient(c)}
}

// The errors of this package as they cross the wire. Unavailable and
// DeadlineExceeded are gRPC's own words for a plugin that is gone or late.
var wireCodes = []struct {
	err  error
	code codes.Code
}{
	{ErrDisabled, codes.FailedPrecondition},
	{ErrMismatch, codes.DataLoss},
	{ErrBackend, codes.Aborted},
	{ErrUnattested, codes.PermissionDenied},
}

func toWire(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	for _, c := range wireCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Internal, err.Error())
}

// fromWire keeps gRPC's status, by which the host tells what a plugin died of.
func fromWire(err error) error {
	for _, c := range wireCodes {
		if status.Code(err) == c.code {
			return fmt.Errorf("%w: %w", c.err, err)
		}
	}
	return err
}

type server struct {
	keystorev1.UnimplementedKeyStoreServiceServer
	impl Store
}

func invalid(err error) error { return status.Error(codes.InvalidArgument, err.Error()) }

func (s *server) Info(ctx context.Context, _ *keystorev1.InfoRequest) (*keystorev1.InfoResponse, error) {
	i, err := s.impl.Info(ctx)
	if err != nil {
		return nil, toWire(ctx, err)
	}
	out := &keystorev1.InfoResponse{
		Name: i.Name, Kind: i.Kind, MaterialCanLeave: i.MaterialCanLeave, RewrapsInside: i.RewrapsInside, AttestationRequired: i.AttestationRequired,
	}
	for _, k := range i.Keys {
		out.Keys = append(out.Keys, &keystorev1.Key{Id: k.ID, Newest: k.Newest, Oldest: k.Oldest, Disabled: k.Disabled})
	}
	return out, nil
}

func (s *server) Wrap(ctx context.Context, req *keystorev1.WrapRequest) (*keystorev1.WrapResponse, error) {
	key, err := NewDataKey(req.GetPlaintext())
	if err := errors.Join(err, CheckName("key's id", req.GetKeyId()), checkAssociated(req.GetAssociated())); err != nil {
		return nil, invalid(err)
	}
	defer key.Destroy()
	w, err := s.impl.Wrap(ctx, req.GetKeyId(), key, req.GetAssociated())
	if err != nil {
		return nil, toWire(ctx, err)
	}
	return &keystorev1.WrapResponse{Wrapped: w.toWire()}, nil
}

func (s *server) Unwrap(ctx context.Context, req *keystorev1.UnwrapRequest) (*keystorev1.UnwrapResponse, error) {
	w := wrapped(req.GetWrapped())
	if err := errors.Join(w.check(), checkAssociated(req.GetAssociated())); err != nil {
		return nil, invalid(err)
	}
	key, err := s.impl.Unwrap(ctx, w, req.GetAssociated())
	if err != nil {
		return nil, toWire(ctx, err)
	}
	// gRPC encodes the answer after this returns, so it is not cleared here: the
	// process is the store's own.
	return &keystorev1.UnwrapResponse{Plaintext: key.Reveal()}, nil
}

func (s *server) Rewrap(ctx context.Context, req *keystorev1.RewrapRequest) (*keystorev1.RewrapResponse, error) {
	w := wrapped(req.GetWrapped())
	if err := errors.Join(w.check(), checkAssociated(req.GetAssociated())); err != nil {
		return nil, invalid(err)
	}
	n, err := s.impl.Rewrap(ctx, w, req.GetAssociated())
	if err != nil {
		return nil, toWire(ctx, err)
	}
	return &keystorev1.RewrapResponse{Wrapped: n.toWire()}, nil
}

func (s *server) Health(ctx context.Context, _ *keystorev1.HealthRequest) (*keystorev1.HealthResponse, error) {
	if err := s.impl.Health(ctx); err != nil {
		return nil, toWire(ctx, err)
	}
	return &keystorev1.HealthResponse{}, nil
}

func (w *Wrapped) toWire() *keystorev1.Wrapped {
	if w == nil {
		return nil
	}
	return &keystorev1.Wrapped{KeyId: w.Key, Version: w.Version, Ciphertext: w.Ciphertext}
}

func wrapped(w *keystorev1.Wrapped) *Wrapped {
	return &Wrapped{Key: w.GetKeyId(), Version: w.GetVersion(), Ciphertext: w.GetCiphertext()}
}

type client struct {
	c keystorev1.KeyStoreServiceClient
}

// limit overrides go-plugin's, which is the largest that fits.
func limit() grpc.CallOption { return grpc.MaxCallRecvMsgSize(MaxMessage) }

func (c *client) Info(ctx context.Context) (*Info, error) {
	resp, err := c.c.Info(ctx, &keystorev1.InfoRequest{}, limit())
	if err != nil {
		return nil, fmt.Errorf("key store info: %w", fromWire(err))
	}
	i := &Info{
		Name: resp.GetName(), Kind: resp.GetKind(), MaterialCanLeave: resp.GetMaterialCanLeave(),
		RewrapsInside: resp.GetRewrapsInside(), AttestationRequired: resp.GetAttestationRequired(),
	}
	for _, k := range resp.GetKeys() {
		i.Keys = append(i.Keys, Key{ID: k.GetId(), Newest: k.GetNewest(), Oldest: k.GetOldest(), Disabled: k.GetDisabled()})
	}
	if err := i.check(); err != nil {
		return nil, fmt.Errorf("key store info: %w", err)
	}
	return i, nil
}

func (c *client) Wrap(ctx context.Context, keyID string, key *DataKey, associated []byte) (*Wrapped, error) {
	if err := errors.Join(key.check(), CheckName("key's id", keyID), checkAssociated(associated)); err != nil {
		return nil, fmt.Errorf("wrap: %w", err)
	}
	resp, err := c.c.Wrap(ctx, &keystorev1.WrapRequest{KeyId: keyID, Plaintext: key.Reveal(), Associated: associated}, limit())
	if err != nil {
		return nil, fmt.Errorf("wrap under %s: %w", keyID, fromWire(err))
	}
	w := wrapped(resp.GetWrapped())
	if err := w.check(); err != nil {
		return nil, fmt.Errorf("wrap under %s: answer: %w", keyID, err)
	}
	if w.Key != keyID {
		return nil, fmt.Errorf("wrap under %s: answer names key %s", keyID, w.Key)
	}
	return w, nil
}

func (c *client) Unwrap(ctx context.Context, w *Wrapped, associated []byte) (*DataKey, error) {
	if err := errors.Join(w.check(), checkAssociated(associated)); err != nil {
		return nil, fmt.Errorf("unwrap: %w", err)
	}
	resp, err := c.c.Unwrap(ctx, &keystorev1.UnwrapRequest{Wrapped: w.toWire(), Associated: associated}, limit())
	if err != nil {
		return nil, fmt.Errorf("unwrap under %s: %w", w.Key, fromWire(err))
	}
	key, err := NewDataKey(resp.GetPlaintext())
	if err != nil {
		clear(resp.GetPlaintext())
		return nil, fmt.Errorf("unwrap under %s: answer: %w", w.Key, err)
	}
	return key, nil
}

func (c *client) Rewrap(ctx context.Context, w *Wrapped, associated []byte) (*Wrapped, error) {
	if err := errors.Join(w.check(), checkAssociated(associated)); err != nil {
		return nil, fmt.Errorf("rewrap: %w", err)
	}
	resp, err := c.c.Rewrap(ctx, &keystorev1.RewrapRequest{Wrapped: w.toWire(), Associated: associated}, limit())
	if err != nil {
		return nil, fmt.Errorf("rewrap under %s: %w", w.Key, fromWire(err))
	}
	n := wrapped(resp.GetWrapped())
	if err := n.check(); err != nil {
		return nil, fmt.Errorf("rewrap under %s: answer: %w", w.Key, err)
	}
	if n.Key != w.Key || n.Version < w.Version {
		return nil, fmt.Errorf("rewrap under %s version %d: answer names %s version %d", w.Key, w.Version, n.Key, n.Version)
	}
	return n, nil
}

func (c *client) Health(ctx context.Context) error {
	if _, err := c.c.Health(ctx, &keystorev1.HealthRequest{}, limit()); err != nil {
		return fmt.Errorf("key store health: %w", fromWire(err))
	}
	return nil
}
