package vtpm_test

import (
	"crypto/sha256"
	"fmt"

	"github.com/coffer-run/coffer/attest/vtpm"
)

// The agent extends PCR 14 with each event's extension and keeps the log.
func ExampleReplay() {
	events := []vtpm.Event{
		{PCR: vtpm.AgentPCR, Name: "agent", Digest: sha256.Sum256([]byte("agent")), MeasuredBy: vtpm.MeasuredBySelf},
		{PCR: vtpm.AgentPCR, Name: "runsc", Digest: sha256.Sum256([]byte("runsc")), MeasuredBy: vtpm.MeasuredBySelf},
	}
	log, err := vtpm.EncodeLog(events)
	if err != nil {
		fmt.Println(err)
		return
	}
	read, err := vtpm.ParseLog(log)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%d events\nPCR 14 is %x\n", len(read), vtpm.Replay([sha256.Size]byte{}, read))
	// Output:
	// 2 events
	// PCR 14 is 0bf5a754ca562ae5dc896cc54b622ce9a401f1f62077b47248f5e594f4b360c1
}
