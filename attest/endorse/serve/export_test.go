package serve

// Bounds, for tests to reach.
const (
	Burst           = burst
	PerMinute       = perMinute
	CallerBurst     = callerBurst
	CallerPerMinute = callerPerMinute
	MaxCallers      = maxCallers
)

// Charge puts a fetch on a caller's account.
func (c *Client) Charge(caller string) error { return c.charge(caller) }
