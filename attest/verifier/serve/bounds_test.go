package serve_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/verifier/serve"
)

func readAll(t *testing.T, r io.Reader) string {
	t.Helper()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// begin sends the head of a call and the first byte of its body.
func begin(t *testing.T, url, role, name string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if role != "" {
		role = "Test-Role: " + role + "\r\n"
	}
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\n%sTest-Name: %s\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{",
		verifierv1connect.VerifierServiceAppraiseProcedure, role, name); err != nil {
		t.Fatal(err)
	}
	return c
}

// answer waits for the answer to a call of which the rest was not sent.
func answer(t *testing.T, c net.Conn) (int, string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode, readAll(t, resp.Body)
}

func TestRoleIsCheckedBeforeTheBodyIsRead(t *testing.T) {
	f := newFixture(t)
	for role, want := range map[string]int{"engineer": http.StatusForbidden, "relying-party": http.StatusForbidden, "": http.StatusUnauthorized} {
		if code, body := answer(t, begin(t, f.url, role, "x")); code != want {
			t.Errorf("%q: %d %s", role, code, body)
		}
	}
}

// One caller with as many unfinished calls as it may have is refused before its
// next one is read, and nobody else is.
func TestOneCallerCannotTakeAll(t *testing.T) {
	f := newFixture(t)
	var conns []net.Conn
	for range serve.MaxCalls {
		conns = append(conns, begin(t, f.url, "agent", "hostile"))
	}
	// The server counts a call when it has read its head, and ours may have taken
	// the place of one of them.
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := client(http.DefaultClient, f.url, "agent", "hostile").Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
		if connect.CodeOf(err) == connect.CodeResourceExhausted {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("one call more than allowed: %v", err)
		}
		conns = append(conns, begin(t, f.url, "agent", "hostile"))
		time.Sleep(5 * time.Millisecond)
	}
	if code, body := answer(t, begin(t, f.url, "agent", "hostile")); code != http.StatusTooManyRequests {
		t.Errorf("one call more than allowed: %d %s", code, body)
	}
	if _, err := client(http.DefaultClient, f.url, "agent", "honest").Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{})); err != nil {
		t.Errorf("another caller: %v", err)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		_, err := client(http.DefaultClient, f.url, "agent", "hostile").Challenge(t.Context(), connect.NewRequest(&verifierv1.ChallengeRequest{}))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after its calls ended: %v", err)
		}
	}
}

// A caller that sends a byte now and then is cut off.
func TestSlowBody(t *testing.T) {
	f := newFixture(t)
	h, err := serve.HandlerWithin(f.serving(f.verifier), 300*time.Millisecond, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	began := time.Now()
	c := begin(t, srv.URL, "agent", "slow")
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
				_, _ = c.Write([]byte(" "))
			}
		}
	}()
	if code, _ := answer(t, c); code == http.StatusOK || time.Since(began) < 200*time.Millisecond {
		t.Errorf("%d after %s", code, time.Since(began))
	}
}

// Documents that nest, and chains without end, are refused as input.
func TestNestingAndCountsAreBounded(t *testing.T) {
	f := newFixture(t)
	agent := f.as("agent")
	deep := func(n int) []byte { return []byte(strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n)) }
	e, err := f.machine.Attest("verifier", "a-nonce-of-no-verifier", "job-1")
	if err != nil {
		t.Fatal(err)
	}
	envelope := func(plan, sandbox []byte) []byte {
		e := e.Envelope
		e.Plan, e.Sandbox = plan, sandbox
		b, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	sandbox := bytes.Replace(e.Sandbox, []byte(`"spec":{}`), append([]byte(`"spec":`), deep(1<<18)...), 1)
	if bytes.Equal(sandbox, e.Sandbox) {
		t.Fatal("the sandbox has no specification to replace")
	}
	for situation, b := range map[string][]byte{
		"an envelope that nests": deep(1 << 18), "a plan that nests": envelope(deep(1<<16), e.Sandbox), "a specification that nests": envelope(e.Plan, sandbox),
	} {
		if _, err := agent.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: b, Audience: "broker"})); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", situation, err)
		}
	}
	// The request itself, as JSON: an unknown member that nests.
	body := append(append([]byte(`{"x":`), deep(1<<18)...), '}')
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, f.url+verifierv1connect.VerifierServiceAppraiseProcedure, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Test-Role", "agent")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a request that nests: %s", resp.Status)
	}
	chain := make([][]byte, 10_000)
	for i := range chain {
		chain[i] = f.tpm.EKChain[0]
	}
	if _, err := agent.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: chain[:1000], AkPublic: f.tpm.AKPublic})); err == nil || connect.CodeOf(err) == connect.CodeInternal {
		t.Errorf("a chain of 1000: %v", err)
	}
	if _, err := agent.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: chain, AkPublic: f.tpm.AKPublic})); err == nil || connect.CodeOf(err) == connect.CodeInternal {
		t.Errorf("a chain of 10000: %v", err)
	}
}
