package deptest

// clients is what a program links to speak to others over a network, crypto/tls
// left out: goxmldsig, which reads signed reference values, has key types from it.
var clients = []string{"net/http/...", "google.golang.org/grpc/...", "connectrpc.com/...", "net/rpc/...", "net/smtp"}

// network is clients, and what they are made of.
var network = append([]string{"crypto/tls"}, clients...)

// Rules returns the rules of this repository.
func Rules() []Rule {
	return []Rule{
		{
			About: []string{"./attest/..."},
			Ours:  []string{"./attest/..."},
			Why:   "attest judges, and stands alone: anyone can build a verifier from it, and no code that is judged is part of the judge",
		},
		{
			About:  []string{"./attest/..."},
			Except: []string{"./attest/*/serve/...", "./attest/simulate/...", "./attest/api/..."},
			Direct: true,
			Forbid: []string{"os", "os/...", "net", "net/http/...", "database/sql/...", "modernc.org/...", "zombiezen.com/...", "syscall", "golang.org/x/sys/...", "plugin", "crypto/tls"},
			Why:    "a judge is pure: time, files and network are handed to it, so that the same evidence gets the same answer anywhere; only attest/*/serve opens sockets, files and databases, and attest/simulate keeps its devices in a folder",
		},
		{
			About:  []string{"./attest/..."},
			Except: []string{"./attest/*/serve/..."},
			Direct: true,
			Forbid: []string{"./attest/*/serve/..."},
			Why:    "what opens sockets and databases is imported by programs only",
		},
		{
			About:  []string{"./attest/..."},
			Except: []string{"./attest/simulate/...", "./attest/api/...", "./attest/*/serve/...", "./attest/*/*test"},
			Forbid: []string{"./attest/simulate/...", "./attest/api/..."},
			Why:    "judging needs neither the virtual vendor nor a wire protocol",
		},
		{
			About:  []string{"./attest/..."},
			Except: []string{"./attest/anchor", "./attest/simulate"},
			Direct: true,
			Forbid: []string{"./attest/internal/anchorset"},
			Why:    "only the virtual vendor makes the anchors of a simulation, so that a program without it cannot have them",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./attest/*/*test"},
			Direct: true,
			Forbid: []string{"./attest/*/*test"},
			Why:    "what forges evidence for tests is imported by tests only",
		},
		{
			About: []string{"./enclave/..."},
			Ours:  []string{"./enclave/...", "./attest/..."},
			Why:   "the enclave holds the keys: it takes orders over a socket and links neither those who give them nor anything that extends them",
		},
		{
			About:  []string{"./enclave/..."},
			Forbid: network,
			Why:    "what holds keys or touches devices speaks to no network; it has unix sockets only",
		},
		{
			About: []string{"./runner/..."},
			Ours:  []string{"./runner/...", "./enclave/...", "./attest/...", "./plugins/...", "./internal/..."},
			Why:   "imports run cmd -> runner -> enclave -> attest",
		},
		{
			About:  []string{"./runner/..."},
			Forbid: []string{"./attest/verifier/...", "./attest/broker/...", "./attest/bundle/verify/...", "./internal/stack/...", "./internal/emulate/..."},
			Why:    "the judged does not link the judge, nor the machine that is played for it",
		},
		{
			About: []string{"./plugins/..."},
			Ours:  []string{"./plugins/..."},
			Why:   "a plugin knows contracts and nothing of who uses it",
		},
		{
			About:  []string{"./cmd/cofferd"},
			Forbid: []string{"./enclave/keys/...", "./enclave/seal/...", "./attest/verifier/...", "./attest/broker/...", "./attest/snp/...", "./attest/nvgpu/...", "./attest/simulate/...", "./attest/bundle/verify/..."},
			Why:    "the agent orders the stages; it can open no sealed file, and it appraises nothing",
		},
		{
			About: []string{"./cmd/coffer-holder"},
			Ours:  []string{"./cmd/coffer-holder", "./enclave/...", "./attest/..."},
			Why:   "the holder is measured and has the keys: it is built from enclave and attest alone",
		},
		{
			About:  []string{"./cmd/coffer-holder"},
			Forbid: network,
			Why:    "the holder has no network",
		},
		{
			About: []string{"./cmd/coffer-gateway"},
			Ours:  []string{"./cmd/coffer-gateway", "./runner/egress/gate", "./attest/plan"},
			Why:   "the gateway stands on the network and reads what jobs and strangers send: it links nothing that holds, orders or judges",
		},
		{
			About:  []string{"./cmd/coffer-broker"},
			Forbid: []string{"./attest/snp/...", "./attest/vtpm/...", "./attest/nvgpu/...", "./attest/evidence/...", "./attest/verifier/...", "./attest/policy/...", "./attest/simulate/...", "./enclave/...", "./runner/..."},
			Why:    "the broker has the wrapped keys: it reads signed results only and parses no evidence",
		},
		{
			About:  []string{"./cmd/coffer-attest"},
			Forbid: []string{"./attest/broker/...", "./attest/verifier/...", "./enclave/keys/...", "./enclave/seal/...", "./internal/keystore"},
			Why:    "what attests for the broker collects evidence in a process of its own, and has none of the broker's keys",
		},
		{
			About:  []string{"./cmd/coffer-verifier", "./cmd/coffer-verifier-simulated"},
			Forbid: []string{"./attest/broker/...", "./enclave/...", "./runner/..."},
			Why:    "the verifier parses hostile bytes: it has no data keys and no device",
		},
		{
			About:  []string{"./cmd/coffer-verifier"},
			Forbid: []string{"./attest/simulate/..."},
			Why:    "a production verifier cannot load simulation roots: the code for it is not there",
		},
		{
			About: []string{"./cmd/coffer-verify"},
			Ours:  []string{"./cmd/coffer-verify", "./attest/..."},
			Why:   "whoever checks a bundle needs to trust no code of those who made it",
		},
		{
			About:  []string{"./cmd/coffer-verify"},
			Forbid: append([]string{"./attest/*/serve/...", "./attest/api/...", "./attest/broker", "database/sql/...", "os/exec"}, clients...),
			Past:   []string{"github.com/open-policy-agent/opa/..."},
			Why:    "a bundle is checked offline: the program has no way to ask anyone; OPA has an HTTP client in it, which the rules that attest/policy/rego compiles cannot name",
		},
		{
			About: []string{"./..."},
			Except: []string{
				"./attest/policy/rego", "./attest/verifier/...", "./attest/bundle/verify", "./attest/report", "./attest/statement", "./attest/*/*test",
				"./internal/verifierd", "./cmd/coffer-verifier", "./cmd/coffer-verifier-simulated", "./cmd/coffer-verify", "./cmd/coffer",
			},
			Forbid: []string{"github.com/open-policy-agent/..."},
			Why:    "only who appraises evidence runs a policy's rules, and the command line compiles what it is to show or pack; all others name a policy by its digest",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./attest/policy/rego"},
			Direct: true,
			Forbid: []string{"github.com/open-policy-agent/..."},
			Why:    "rules run with the limits of attest/policy/rego or not at all",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./plugins/gpu/nvidia/...", "./cmd/coffer-gpu-nvidia", "./internal/emulate/..."},
			Forbid: []string{"github.com/NVIDIA/..."},
			Why:    "NVIDIA's library is C code: it runs in a process of its own, whose death is a named failure",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./plugins/keystore/pkcs11", "./cmd/coffer-keystore-pkcs11"},
			Forbid: []string{"github.com/miekg/pkcs11/..."},
			Why:    "a token's library is C code: it runs in a process of its own, whose death is a named failure",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./plugins/keystore/vault", "./cmd/coffer-keystore-vault"},
			Forbid: []string{"github.com/hashicorp/vault/..."},
			Why:    "a key store's client runs in a process of its own: the broker speaks the contract to all of them alike",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./runner/source/object", "./cmd/cofferd"},
			Forbid: []string{"gocloud.dev/blob/..."},
			Why:    "the agent alone fetches from object stores: their libraries are large, and nothing that holds, judges or releases needs them",
		},
		{
			About:  []string{"./..."},
			Except: []string{"./plugins/kubernetes/...", "./attest/translog/serve"},
			Forbid: []string{"k8s.io/..."},
			Past:   []string{"github.com/transparency-dev/tessera/...", "./attest/translog/serve", "github.com/sigstore/..."},
			Why:    "Kubernetes is one way to use coffer, out of process; Tessera logs through k8s.io/klog, which attest/translog/serve turns to the daemon's own log, and Sigstore's library links it",
		},
	}
}
