package verifierd

import (
	"context"
	"log/slog"
	"reflect"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/verifier"
)

// options reads every file that the configuration names. anchors and policies are
// those of the program.
func (c Config) options(anchors anchor.Set, policies []string) (o verifier.Options, err error) {
	o = verifier.Options{ID: c.ID, Clock: time.Now, Build: build(), KBSPolicy: c.KBSPolicy}
	if o.Anchors, err = c.anchors(anchors); err != nil {
		return o, err
	}
	if o.Policies, err = c.policies(policies); err != nil {
		return o, err
	}
	if o.References, err = c.references(); err != nil {
		return o, err
	}
	keys, err := c.KeyFiles.read(c.ID)
	if err != nil {
		return o, err
	}
	o.Signer, o.Published, o.NonceKeys = keys.Signer, keys.Published, keys.NonceKeys
	return o, nil
}

// describe names for the log what a verifier was made from.
func (c Config) describe(o verifier.Options) ([]slog.Attr, error) {
	names := make([]string, len(o.Policies))
	for i, p := range o.Policies {
		d, err := p.Digest()
		if err != nil {
			return nil, err
		}
		names[i] = p.Name + "@" + string(d)
	}
	return []slog.Attr{
		slog.Any("policies", names), slog.String("kbsPolicy", c.KBSPolicy), slog.Int("referenceValues", len(o.References)),
		slog.Int("endorsementKeyRoots", len(o.Anchors.EKRoots())), slog.Int("paravisors", len(c.Paravisors)),
		slog.Int("published", 1+len(o.Published)), slog.Int("nonceKeys", len(o.NonceKeys)),
	}, nil
}

// fixed returns the configuration without what a reload takes: what is left
// counts from the start to the end.
func (c Config) fixed() Config {
	return Config{Listen: c.Listen, TLS: c.TLS, ID: c.ID, Endorsements: c.Endorsements}
}

// reloader takes the configuration anew while the verifier serves.
type reloader struct {
	log      *slog.Logger
	v        *verifier.Verifier
	began    Config
	read     func() (Config, error)
	anchors  anchor.Set
	policies []string

	taken, refused atomic.Uint64
}

func (r *reloader) counts() (taken, refused uint64) { return r.taken.Load(), r.refused.Load() }

// reload reads everything and takes all of it or nothing. What goes wrong is
// logged and counted, and the verifier goes on with what it had.
func (r *reloader) reload(ctx context.Context) {
	c, attrs, err := r.prepare() //nolint:contextcheck // rules are compiled within limits of their own
	if err != nil {
		r.refused.Add(1)
		r.log.LogAttrs(ctx, slog.LevelError, "configuration not changed", slog.String("error", err.Error()))
		return
	}
	r.taken.Add(1)
	r.log.LogAttrs(ctx, slog.LevelInfo, "configuration read", attrs...)
	if !reflect.DeepEqual(c.fixed(), r.began.fixed()) {
		r.log.LogAttrs(ctx, slog.LevelWarn, "the configuration has other changes: they count after a restart")
	}
}

func (r *reloader) prepare() (Config, []slog.Attr, error) {
	c, err := r.read()
	if err != nil {
		return c, nil, err
	}
	// Keys sign under the name that the verifier has, whatever the file says by now.
	named := c
	named.ID = r.began.ID
	o, err := named.options(r.anchors, r.policies)
	if err != nil {
		return c, nil, err
	}
	defer wipe(o)
	attrs, err := c.describe(o)
	if err != nil {
		return c, nil, err
	}
	return c, attrs, r.v.Reload(o)
}
