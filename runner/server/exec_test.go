package server

import (
	"strings"
	"testing"

	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
)

// Nobody runs a program in a job: no call of the agent's does, for no role.
func TestNobodyRunsProgramsInAJob(t *testing.T) {
	services := agentv1.File_runner_api_agent_v1_agent_proto.Services()
	if services.Len() == 0 {
		t.Fatal("the agent has no services")
	}
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for k := range methods.Len() {
			name := strings.ToLower(string(methods.Get(k).Name()))
			for _, word := range []string{"exec", "attach", "shell", "console", "debug"} {
				if strings.Contains(name, word) {
					t.Errorf("the agent has a call %s", methods.Get(k).FullName())
				}
			}
		}
	}
}
