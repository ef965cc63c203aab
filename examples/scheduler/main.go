// Command scheduler gives a node a job by the agent's API, as a cluster's scheduler
// would: it looks for room, submits with a key that makes a second try harmless,
// follows the job across broken streams and attempts, and fetches its evidence.
//
//	scheduler --agent https://node:7443 --cert scheduler.pem --key scheduler.key --ca ca.pem job.yaml
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	"github.com/coffer-run/coffer/runner/client"
)

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "scheduler:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	agent := flag.String("agent", "", "the agent's URL")
	cert := flag.String("cert", "", "certificate, in PEM")
	key := flag.String("key", "", "its key, in PEM")
	token := flag.String("token", "", "file with a token, in place of a certificate; it is read before each call")
	ca := flag.String("ca", "", "authority of the agent's certificate, in PEM")
	out := flag.String("o", "bundle.json", "file for the evidence")
	flag.Parse()
	if flag.NArg() != 1 {
		return errors.New("want one job file")
	}
	file, err := os.ReadFile(flag.Arg(0))
	if err != nil {
		return err
	}
	o := client.Options{URL: *agent, CA: *ca, Cert: *cert, Key: *key}
	if *token != "" {
		o.Token = func(context.Context) (string, error) {
			b, err := os.ReadFile(*token)
			return strings.TrimSpace(string(b)), err
		}
	}
	c, err := client.New(o)
	if err != nil {
		return err
	}
	defer c.Close()
	return schedule(ctx, c, file, *out)
}

func schedule(ctx context.Context, c *client.Client, file []byte, out string) error {
	room, err := c.Capacity(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("room: %d of %d GPUs (driver %s, confidential computing %s), %d MiB, %d jobs run\n",
		room.GetFreeGpus(), room.GetGpus(), room.GetGpuDriver(), room.GetGpuCcMode(), room.GetFreeMemoryBytes()>>20, room.GetRunning())
	// The same file from the same scheduler is the same job, however often it is sent.
	sum := sha256.Sum256(file)
	job, err := c.Submit(ctx, file, "scheduler-"+hex.EncodeToString(sum[:16]))
	if err != nil {
		return err
	}
	fmt.Println("job", job.GetId())
	for e, err := range c.Watch(ctx, job.GetId(), 0) {
		if err != nil {
			return err
		}
		if st := e.GetStage(); st != nil {
			fmt.Println(" ", st.GetStage(), st.GetPhase())
		}
	}
	// What follows is the last attempt, where the job file asks for more than one.
	if job, err = c.Wait(ctx, job.GetId()); err != nil {
		return err
	}
	fmt.Println(job.GetState(), job.GetReason())
	b, err := c.Bundle(ctx, job.GetId())
	if err != nil {
		return err
	}
	return os.WriteFile(out, b, 0o600) //nolint:gosec // a file that its user names
}
