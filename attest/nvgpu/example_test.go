package nvgpu_test

import (
	"context"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/simulate"
)

// A simulation's report is genuine under the simulation's anchors, and says so.
// Under the vendors' it is refused.
func ExampleAppraiseWith() {
	vendor, err := simulate.New(simulate.Options{Fast: true})
	if err != nil {
		fmt.Println(err)
		return
	}
	gpu, challenge := vendor.GPUs()[0], [32]byte{1, 2, 3}
	report, err := gpu.Report(challenge, simulate.GPUOptions{})
	if err != nil {
		fmt.Println(err)
		return
	}
	evidence := nvgpu.Evidence{Report: report, Chain: gpu.ChainPEM(), DriverVersion: gpu.DriverVersion(), VBIOSVersion: gpu.VBIOSVersion()}
	endorsements := nvgpu.Endorsements{Source: vendor, Memory: nvgpu.NewMemory()}
	for _, anchors := range []anchor.Set{vendor.Anchors(), anchor.Vendor()} {
		result := nvgpu.AppraiseWith(context.Background(), evidence, nvgpu.Want{Nonce: challenge}, anchors, endorsements, time.Now())
		fmt.Println(result.Genuine(), result.Simulated, result.Claims["measres"])
		for _, c := range result.Checks.Failed() {
			fmt.Println(c.ID)
		}
	}
	// Output:
	// true true success
	// false false <nil>
	// gpu.chain
}
