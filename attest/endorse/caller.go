package endorse

import "context"

type callerKey struct{}

// WithCaller notes on whose account endorsements are looked for: the peer that
// handed in the evidence. Evidence names what is to be fetched before anything
// of it is believed, so a Fetcher can give each caller a share of its requests.
func WithCaller(ctx context.Context, caller string) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// CallerOf returns what WithCaller noted, or "".
func CallerOf(ctx context.Context) string {
	caller, _ := ctx.Value(callerKey{}).(string)
	return caller
}
