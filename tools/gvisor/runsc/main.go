// Command runsc is gVisor's, with one more way to send a job's trace: package sink.
package main

import (
	"gvisor.dev/gvisor/runsc/cli/maincli"
	"gvisor.dev/gvisor/runsc/version"

	"github.com/coffer-run/coffer/tools/gvisor/sink"
)

// The build sets the version, so it must be linked.
var _ = version.Version()

func main() {
	sink.Register(opened)
	maincli.Main()
}
