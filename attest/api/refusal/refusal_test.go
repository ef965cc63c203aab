package refusal_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"unicode"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/coffer-run/coffer/attest/api/refusal"
	"github.com/coffer-run/coffer/attest/check"
)

// overTheWire sends err through a real Connect handler and client.
func overTheWire(t *testing.T, err error, opts ...connect.ClientOption) error {
	t.Helper()
	srv := httptest.NewServer(connect.NewUnaryHandler("/x/Y", func(context.Context, *connect.Request[emptypb.Empty]) (*connect.Response[emptypb.Empty], error) {
		return nil, err
	}))
	defer srv.Close()
	_, got := connect.NewClient[emptypb.Empty, emptypb.Empty](http.DefaultClient, srv.URL+"/x/Y", opts...).CallUnary(t.Context(), connect.NewRequest(&emptypb.Empty{}))
	if got == nil {
		t.Fatal("no error came back")
	}
	return got
}

func TestRoundTrip(t *testing.T) {
	var l check.List
	l.Fail("grant.plan", "sha384:aa", "sha384:bb", "compare the job")
	l.Fail("grant.expiry", "", "expired", "")
	want := check.Refuse("release", l)
	got, ok := refusal.Decode(fmt.Errorf("ask the broker: %w", overTheWire(t, refusal.Encode(want))))
	if !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, ok, want)
	}
	got, ok = refusal.Decode(refusal.Encode(want))
	if !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, ok, want)
	}
}

func TestDecodeOnlyRefusals(t *testing.T) {
	for name, err := range map[string]error{
		"nil":                   nil,
		"other error":           errors.New("x"),
		"denied without detail": overTheWire(t, connect.NewError(connect.CodePermissionDenied, errors.New("no"))),
		"unavailable":           overTheWire(t, connect.NewError(connect.CodeUnavailable, errors.New("later"))),
		"other detail": func() error {
			e := connect.NewError(connect.CodePermissionDenied, errors.New("no"))
			d, err := connect.NewErrorDetail(&emptypb.Empty{})
			if err != nil {
				t.Fatal(err)
			}
			e.AddDetail(d)
			return e
		}(),
	} {
		if r, ok := refusal.Decode(err); ok || r != nil {
			t.Errorf("%s: decoded %v", name, r)
		}
	}
}

func TestHostileTextIsTamed(t *testing.T) {
	var l check.List
	for range refusal.MaxChecks + 10 {
		l.Fail("id\x1b[31m", "broken \xff utf-8", strings.Repeat("long ", 1000), "line\nbreak\u202e")
	}
	r, ok := refusal.Decode(overTheWire(t, refusal.Encode(check.Refuse("release\x07", l))))
	if !ok || len(r.Checks) != refusal.MaxChecks {
		t.Fatalf("%d checks, %v", len(r.Checks), ok)
	}
	for _, s := range []string{r.Stage, r.Checks[0].ID, r.Checks[0].Expected, r.Checks[0].Found, r.Checks[0].Hint} {
		if len(s) > refusal.MaxText+8 {
			t.Errorf("%d bytes", len(s))
		}
		for _, c := range s {
			if !unicode.IsPrint(c) {
				t.Errorf("%q holds %q", s, c)
			}
		}
	}
}

func TestRefusalWithoutChecksStillRefuses(t *testing.T) {
	r, ok := refusal.Decode(overTheWire(t, refusal.Encode(&check.Refusal{Stage: "release"})))
	if !ok || len(r.Checks) == 0 {
		t.Errorf("%+v, %v", r, ok)
	}
}
