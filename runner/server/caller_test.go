package server

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

func TestCallers(t *testing.T) {
	watch, cancel, submit, bundle := agentv1connect.AgentServiceWatchProcedure, agentv1connect.AgentServiceCancelProcedure, agentv1connect.AgentServiceSubmitProcedure, agentv1connect.AgentServiceBundleProcedure
	for name, row := range map[string]struct {
		caller Caller
		call   string
		may    string
		own    bool
	}{
		"nobody":                     {Caller{}, submit, "", true},
		"roles without a name":       {Caller{Roles: []string{"engineer"}}, submit, "", true},
		"a name without roles":       {Caller{Principal: "user/ada"}, submit, "", true},
		"an engineer":                {Caller{"user/ada", []string{"engineer"}}, submit, "engineer", true},
		"an engineer's own watch":    {Caller{"user/ada", []string{"engineer"}}, watch, "engineer", true},
		"an operator cancels any":    {Caller{"user/ada", []string{"operator"}}, cancel, "operator", false},
		"an operator does not watch": {Caller{"user/ada", []string{"operator"}}, watch, "", true},
		"both cancel any":            {Caller{"user/ada", []string{"engineer", "operator"}}, cancel, "engineer operator", false},
		"both watch their own":       {Caller{"user/ada", []string{"engineer", "operator"}}, watch, "engineer", true},
		"an auditor reads bundles":   {Caller{"auditor/eve", []string{"auditor"}}, bundle, "auditor", false},
		"an agent":                   {Caller{"agent/n", []string{"agent"}}, submit, "", true},
		"no such call":               {Caller{"user/ada", []string{"engineer"}}, "/coffer.agent.v1.AgentService/Nothing", "", true},
	} {
		if got := strings.Join(row.caller.may(row.call), " "); got != row.may {
			t.Errorf("%s: may as %q, want %q", name, got, row.may)
		}
		if got := row.caller.ofOwnOnly(row.call); got != row.own {
			t.Errorf("%s: its own only: %v", name, got)
		}
	}
}

// Every call is in the list, or nobody may make it.
func TestEveryCallIsListed(t *testing.T) {
	for _, call := range []string{"Plan", "Submit", "Get", "List", "Watch", "Logs", "Cancel", "Bundle", "Capacity"} {
		if len(allowed["/"+agentv1connect.AgentServiceName+"/"+call]) == 0 {
			t.Errorf("nobody may call %s", call)
		}
	}
}
