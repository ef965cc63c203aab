package endorse_test

import (
	"fmt"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/endorse"
)

// A verifier without a network appraises by what is in a folder. Its AppraiseSNP
// and AppraiseGPU take the place of snp.Appraise and nvgpu.Appraise.
func Example() {
	library := endorse.NewLibrary()
	problems, err := library.Load(os.DirFS("testdata"), nil)
	if err != nil {
		fmt.Println("the folder cannot be read")
		return
	}
	for _, p := range problems {
		fmt.Println("not used:", p)
	}
	cache, err := endorse.New(endorse.Options{Store: library, Anchors: anchor.Vendor(), Clock: time.Now})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer cache.Close()
	// Output: the folder cannot be read
}
