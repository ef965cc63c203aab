package bundle

// EgressPart is an Egress. It is there if the plan allows egress and the job started.
const EgressPart Part = "egress"

// Egress is where the job connected to and where it was kept from, as the node's
// gateway recorded it: names and counts, never content.
type Egress struct {
	// Connections are all that were let through, in the order in which they began.
	Connections []Connection `json:"connections"`
	// Denials are those refusals that the plan lets the job have told by name.
	Denials []Denial `json:"denials"`
	// Untold counts refusals beyond those of Denials.
	Untold int64 `json:"untold"`
	// Dropped counts packets that were not for the gateway, by kind: what did not
	// even ask.
	Dropped map[string]int64 `json:"dropped"`
	// Closed says why nothing more was let through before the job ended, if so.
	Closed string `json:"closed,omitempty"`
	// Lost is true if the gateway died: what it let through after its last report is
	// not known. The one in its place let nothing through.
	Lost bool `json:"lost"`
}

// Connection is one that was let through.
type Connection struct {
	Host string `json:"host"`
	Port int    `json:"port"`
	// Address is where the name led, with the port.
	Address       string `json:"address"`
	StartUnixNano int64  `json:"startUnixNano"`
	Nanos         int64  `json:"nanos"`
	// Sent and Received are bytes, TLS included.
	Sent     int64 `json:"sent"`
	Received int64 `json:"received"`
	// End is "closed", or why the connection was cut.
	End string `json:"end"`
}

// Denial is a destination that the job was kept from, and how often.
type Denial struct {
	FirstUnixNano int64 `json:"firstUnixNano"`
	// Host is what the job asked for, a name or an address; Port is 0 if unknown.
	Host string `json:"host"`
	Port int    `json:"port"`
	// Rule is why.
	Rule  string `json:"rule"`
	Count int64  `json:"count"`
	// Process and Digest are of the program, if the trace shows only one that it can
	// have been.
	Process string `json:"process,omitempty"`
	Digest  string `json:"digest,omitempty"`
}
