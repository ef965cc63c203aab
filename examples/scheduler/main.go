// Command scheduler gives a node a job by the agent's API, as a cluster's scheduler
// would: it looks for room, submits with a key that makes a second try harmless,
// follows the job across broken streams, and fetches its evidence.
//
//	scheduler --agent https://node:17443 --cert scheduler.crt --key scheduler.key --ca ca.crt job.yaml
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"time"

	"connectrpc.com/connect"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
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
	client, err := newClient(*cert, *key, *ca)
	if err != nil {
		return err
	}
	return schedule(ctx, agentv1connect.NewAgentServiceClient(client, *agent), file, *out)
}

// newClient speaks TLS 1.3 with certificates on both sides.
func newClient(cert, key, ca string) (*http.Client, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate", ca)
	}
	t := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, Certificates: []tls.Certificate{pair}}, ForceAttemptHTTP2: true}
	return &http.Client{Transport: t}, nil
}

func schedule(ctx context.Context, agent agentv1connect.AgentServiceClient, file []byte, out string) error {
	room, err := agent.Capacity(ctx, connect.NewRequest(&agentv1.CapacityRequest{}))
	if err != nil {
		return fmt.Errorf("ask for capacity: %w", err)
	}
	c := room.Msg
	fmt.Printf("room: %d of %d GPUs (driver %s, confidential computing %s), %d MiB, %d jobs run\n",
		c.GetFreeGpus(), c.GetGpus(), c.GetGpuDriver(), c.GetGpuCcMode(), c.GetFreeMemoryBytes()>>20, c.GetRunning())
	// The same file from the same scheduler is the same job, however often it is sent.
	sum := sha256.Sum256(file)
	res, err := agent.Submit(ctx, connect.NewRequest(&agentv1.SubmitRequest{JobFile: file, IdempotencyKey: "scheduler-" + hex.EncodeToString(sum[:16])}))
	if err != nil {
		return fmt.Errorf("submit: %w", err)
	}
	id := res.Msg.GetJob().GetId()
	fmt.Println("job", id)
	if err := follow(ctx, agent, id); err != nil {
		return err
	}
	got, err := agent.Get(ctx, connect.NewRequest(&agentv1.GetRequest{Id: id}))
	if err != nil {
		return fmt.Errorf("ask for the job: %w", err)
	}
	fmt.Println(got.Msg.GetJob().GetState(), got.Msg.GetJob().GetReason())
	b, err := agent.Bundle(ctx, connect.NewRequest(&agentv1.BundleRequest{Id: id}))
	if err != nil {
		return fmt.Errorf("fetch evidence: %w", err)
	}
	return os.WriteFile(out, b.Msg.GetBundle(), 0o600)
}

// pause is the time between two tries to watch.
const pause = time.Second

// follow prints the job's stages until it has ended. A stream that breaks goes on
// after the last event that came.
func follow(ctx context.Context, agent agentv1connect.AgentServiceClient, id string) error {
	for last := uint64(0); ; {
		s, err := agent.Watch(ctx, connect.NewRequest(&agentv1.WatchRequest{Id: id, AfterSequence: last}))
		for err == nil && s.Receive() {
			e := s.Msg()
			last = e.GetSequence()
			if st := e.GetStage(); st != nil {
				fmt.Println(" ", st.GetStage(), st.GetPhase())
			}
		}
		if err == nil {
			err = errors.Join(s.Err(), s.Close())
		}
		switch {
		case err == nil:
			return nil
		case connect.CodeOf(err) != connect.CodeUnavailable:
			return fmt.Errorf("watch: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}
