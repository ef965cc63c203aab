package docs

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/runner/reasons"
)

var update = flag.Bool("update", false, "write docs/refusals.md")

const refusals = "docs/refusals.md"

// unnamed stands for what is not in the source. A check whose name begins with it is
// passed on through several functions, or is made of another's name.
const unnamed = "<...>"

// groups say of checks whose names begin alike what they look at, and what cures a
// failure for which the check itself has no advice.
var groups = map[string][2]string{
	"reattest":     {"Whether a later attestation result of a running job counts.", "attest again, to the verifier of the release and with the job's own keys"},
	"access":       {"Whether a policy of the broker's maintainers lets a caller make a call.", "ask a maintainer of the access policies (docs/access.md)"},
	"adopt":        {"Whether a job that an agent takes up after a restart is the one that was attested.", "submit the job again: the node's record of it was changed or lost"},
	"alerts":       {"What a bundle says of the rules that watched the job.", "do not rely on this bundle; ask for the job's bundle again"},
	"approval":     {"Whether a signed decision of a person counts for a grant.", "sign the decision again with coffer grant approve, for the grant as it is"},
	"approvals":    {"Whether a bundle shows the approvals that the key was released for.", "do not rely on this bundle; ask for the job's bundle again"},
	"asset":        {"Whether an asset can be made or changed as asked.", "ask the asset's owner"},
	"binding":      {"Whether every device answered the same challenge.", "attest again: evidence cannot be repaired"},
	"bundle":       {"Whether a bundle can be read.", "ask for the job's bundle again"},
	"caller":       {"Who makes a call.", "sign in, or use the certificate of the role that the call needs"},
	"checkpoint":   {"Whether a sealed checkpoint is this job's, in its order.", "go on from an older checkpoint: coffer checkpoints ls names them"},
	"devices":      {"What a bundle says of how devices were prepared and cleared.", "do not rely on this bundle; ask for the job's bundle again"},
	"egress":       {"Whether the job's way to the network is the one in the plan.", "who operates the node looks at its gateway (docs/egress.md)"},
	"ek":           {"Whether a TPM has the endorsement key that it says.", "enrol the machine's TPM again"},
	"endorsements": {"What makers say of their devices: certificates, revocation, reference values.", "import current ones with coffer endorsements import"},
	"enrolment":    {"Whether a TPM proved that it has its keys.", "restart the node agent: it enrols anew"},
	"evidence":     {"Whether evidence is well formed and complete.", "attest again, with an agent of the same version as the verifier"},
	"gpu":          {"What a GPU's report says, and whether it is genuine. In a result the number of the GPU follows: gpu0.", "attest again; if it stays, the GPU's firmware or certificates are not those its maker vouches for"},
	"grant":        {"Whether a grant covers the job that asks for a key.", "ask for a grant of this plan: coffer grant request --job FILE"},
	"hcl":          {"What a cloud's paravisor reports.", "attest again; if it stays, the machine does not run the paravisor that the policy names"},
	"holder":       {"What a bundle says of the process that held the keys.", "do not rely on this bundle; ask for the job's bundle again"},
	"image":        {"Whether the image is the one in the plan, and signed by whom the node's profile names.", "sign the image, or name the signed one in the job file"},
	"job":          {"Whether the job is the one that was attested.", "submit the job again"},
	"kbs":          {"Whether a request by the Confidential Containers protocol is one that can be answered.", "look at the client's configuration (docs/formats/kbs.md)"},
	"lease":        {"Whether a running job may go on.", "submit the job again when the broker answers; keys of a lapsed lease are gone"},
	"log":          {"Whether the evidence log has what a bundle says it has.", "ask for the bundle again with coffer log prove; if it stays, the log was changed"},
	"logs":         {"Whether a bundle's digest of what the job printed is one.", "do not rely on this bundle; ask for the job's bundle again"},
	"metrics":      {"Whether the numbers that a bundle says the job reported are within its plan.", "do not rely on this bundle; ask for the job's bundle again"},
	"nonce":        {"Whether evidence answers a question that the verifier just asked.", "attest again: the challenge was used, or is too old"},
	"attempt":      {"Whether a bundle is of an attempt that its plan allows, and the attempts before are those that it names.", "ask for the bundles of all attempts of the job (coffer ps, coffer evidence get)"},
	"budget":       {"Whether the attempts of a job used no more than the budget of its plan.", "ask who operates the node why the job was not ended in time"},
	"outcome":      {"Whether a bundle's account of how the job ended fits what it contains.", "do not rely on this bundle; ask for the job's bundle again"},
	"part":         {"Whether a bundle has the parts that were signed, unchanged.", "ask for the job's bundle again"},
	"plan":         {"Whether a plan is one, and the same everywhere.", "plan the job file again with coffer plan"},
	"policy":       {"Whether an attestation policy or an access policy set is whole, current and signed.", "pack and sign the policy again, with a higher serial"},
	"queue":        {"Whether the node has the queue that the job file names, for this submitter and for a job so large.", "name another queue in the job file, or ask for less"},
	"gang":         {"Whether the jobs of a gang can begin together: alike in size, queue and priority, with room for all on the node and in the queue.", "write the same into the job files of the gang, make it smaller, or give it another name"},
	"release":      {"Whether a request for a key is the attested job's.", "submit the job again"},
	"reseal":       {"Whether sealed data may go from one asset to another.", "ask the owners of both assets"},
	"result":       {"Whether a verifier's signed result is genuine, current and about this job.", "attest again"},
	"resume":       {"Whether the checkpoint that a job goes on from is genuine and the newest.", "name another checkpoint by its digest: coffer checkpoints ls"},
	"revoked":      {"Whether something that the job needs was taken back.", "ask the owner of the assets"},
	"role":         {"Whether the caller has the role that the call needs.", "use the certificate of that role"},
	"sandbox":      {"Whether the sandbox is the one that was attested, with the settings that the policy wants.", "submit the job again; if it stays, the node's configuration differs from its profile"},
	"snp":          {"What the processor's report says, and whether it is genuine.", "attest again; if it stays, the processor's firmware or certificates are not those its maker vouches for"},
	"start":        {"Whether the job was seen to start as attested.", "submit the job again; if it stays, the node's runtime is not the measured one"},
	"statement":    {"Whether a bundle's statement is signed by the attested session key.", "ask for the job's bundle again"},
	"token":        {"Whether a token shows who somebody is.", "sign in again with coffer login"},
	"tpm":          {"What the TPM's quote says, and whether it is genuine.", "attest again; if it stays, enrol the TPM again"},
	"trace":        {"What a bundle shows that the job did.", "do not rely on this bundle; ask for the job's bundle again"},
}

// source is the non-test code of the trust zones, by folder.
type source map[string][]*ast.File

func parseSource(t *testing.T) source {
	t.Helper()
	out := source{}
	for _, zone := range []string{"attest", "enclave", "runner", "plugins", "internal", "cmd"} {
		err := filepath.WalkDir(filepath.Join(root, zone), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			n := d.Name()
			if d.IsDir() && (n == "testdata" || strings.HasSuffix(n, "test") && n != "attest" || n == "simulate" || n == "bench" || n == "e2e") {
				return filepath.SkipDir
			}
			if d.IsDir() || filepath.Ext(n) != ".go" || strings.HasSuffix(n, "_test.go") || strings.HasSuffix(n, ".pb.go") {
				return nil
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			out[filepath.Dir(path)] = append(out[filepath.Dir(path)], f)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// reader finds what strings an expression can be, as far as that stands in the source
// of a folder.
type reader struct {
	// constants by name, and by package and name.
	constants map[string]string
	files     []*ast.File
}

func (s source) reader(dir string) reader {
	r := reader{map[string]string{}, s[dir]}
	for d, files := range s {
		for _, f := range files {
			for _, decl := range f.Decls {
				g, ok := decl.(*ast.GenDecl)
				if !ok || g.Tok != token.CONST {
					continue
				}
				for _, spec := range g.Specs {
					v := spec.(*ast.ValueSpec)
					for i, n := range v.Names {
						if i >= len(v.Values) {
							continue
						}
						if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.STRING {
							text, _ := strconv.Unquote(lit.Value)
							if d == dir {
								r.constants[n.Name] = text
							}
							r.constants[f.Name.Name+"."+n.Name] = text
						}
					}
				}
			}
		}
	}
	return r
}

var verb = regexp.MustCompile(`%[-+# 0]*\d*(\.\d+)?[a-zA-Z]`)

// strings returns what an expression in a function can be; <...> stands for what is
// not in the source.
func (r reader) strings(e ast.Expr, in *ast.FuncDecl, depth int) []string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil {
			return []string{s}
		}
	case *ast.ParenExpr:
		return r.strings(e.X, in, depth)
	case *ast.BinaryExpr:
		var out []string
		for _, a := range r.strings(e.X, in, depth) {
			for _, b := range r.strings(e.Y, in, depth) {
				out = append(out, a+b)
			}
		}
		return out
	case *ast.SelectorExpr:
		if x, ok := e.X.(*ast.Ident); ok {
			if s, ok := r.constants[x.Name+"."+e.Sel.Name]; ok {
				return []string{s}
			}
		}
	case *ast.CallExpr:
		if sel, ok := e.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Sprintf" && len(e.Args) > 0 {
			var out []string
			for _, s := range r.strings(e.Args[0], in, depth) {
				out = append(out, verb.ReplaceAllString(s, unnamed))
			}
			return out
		}
	case *ast.Ident:
		if s, ok := r.constants[e.Name]; ok {
			return []string{s}
		}
		if in == nil || depth == 0 {
			break
		}
		if out := r.assigned(e.Name, in, depth); len(out) > 0 {
			return out
		}
		if out := r.passed(e.Name, in, depth); len(out) > 0 {
			return out
		}
	}
	return []string{unnamed}
}

// assigned returns what a variable of a function is given.
func (r reader) assigned(name string, in *ast.FuncDecl, depth int) (out []string) {
	ast.Inspect(in, func(n ast.Node) bool {
		if a, ok := n.(*ast.AssignStmt); ok && len(a.Lhs) == len(a.Rhs) {
			for i, l := range a.Lhs {
				if id, ok := l.(*ast.Ident); ok && id.Name == name {
					out = append(out, r.strings(a.Rhs[i], in, depth-1)...)
				}
			}
		}
		// Constants of the function.
		if a, ok := n.(*ast.ValueSpec); ok && len(a.Names) == len(a.Values) {
			for i, id := range a.Names {
				if id.Name == name {
					out = append(out, r.strings(a.Values[i], in, depth-1)...)
				}
			}
		}
		return true
	})
	return out
}

// passed returns what callers in the same folder give for a parameter of a function.
func (r reader) passed(name string, in *ast.FuncDecl, depth int) (out []string) {
	at := parameter(name, in)
	r.calls(in, at, func(c *ast.CallExpr, caller *ast.FuncDecl) {
		out = append(out, r.strings(c.Args[at], caller, depth-1)...)
	})
	return out
}

// pairs calls do for every name of a check with the advice that goes with it: where
// both are passed on, those of the same call.
func (r reader) pairs(id, hint ast.Expr, in *ast.FuncDecl, depth int, do func(id, hint string)) {
	at, adviceAt := -1, -1
	if x, ok := id.(*ast.Ident); ok && depth > 0 {
		at = parameter(x.Name, in)
	}
	if x, ok := hint.(*ast.Ident); ok {
		adviceAt = parameter(x.Name, in)
	}
	found := false
	if at >= 0 && adviceAt >= 0 {
		r.calls(in, max(at, adviceAt), func(c *ast.CallExpr, caller *ast.FuncDecl) {
			found = true
			r.pairs(c.Args[at], c.Args[adviceAt], caller, depth-1, do)
		})
	}
	if found {
		return
	}
	for _, i := range r.strings(id, in, depth) {
		for _, h := range r.strings(hint, in, depth) {
			do(i, h)
		}
	}
}

// parameter is the place of a parameter of a function, or -1.
func parameter(name string, in *ast.FuncDecl) int {
	i := 0
	for _, p := range in.Type.Params.List {
		for _, n := range p.Names {
			if n.Name == name {
				return i
			}
			i++
		}
	}
	return -1
}

// calls calls do for every call of a function in the same folder that has an argument
// at a place.
func (r reader) calls(of *ast.FuncDecl, at int, do func(*ast.CallExpr, *ast.FuncDecl)) {
	if at < 0 {
		return
	}
	for _, f := range r.files {
		for _, d := range f.Decls {
			caller, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(caller, func(n ast.Node) bool {
				c, ok := n.(*ast.CallExpr)
				if !ok || len(c.Args) <= at {
					return true
				}
				called := ""
				switch f := c.Fun.(type) {
				case *ast.Ident:
					called = f.Name
				case *ast.SelectorExpr:
					called = f.Sel.Name
				}
				if called == of.Name.Name {
					do(c, caller)
				}
				return true
			})
		}
	}
}

// checks returns every check that code can find not to hold, with the advice that it
// gives.
func (s source) checks() map[string]map[string]bool {
	out := map[string]map[string]bool{}
	for _, dir := range slices.Sorted(maps.Keys(s)) {
		r := s.reader(dir)
		for _, f := range s[dir] {
			for _, d := range f.Decls {
				in, ok := d.(*ast.FuncDecl)
				if !ok {
					continue
				}
				ast.Inspect(in, func(n ast.Node) bool {
					c, ok := n.(*ast.CallExpr)
					if !ok || len(c.Args) != 4 {
						return true
					}
					if sel, ok := c.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "Fail" && sel.Sel.Name != "Equal" {
						return true
					}
					r.pairs(c.Args[0], c.Args[3], in, 3, func(id, hint string) {
						if out[id] == nil {
							out[id] = map[string]bool{}
						}
						if hint != "" && hint != unnamed {
							out[id][hint] = true
						}
					})
					return true
				})
			}
		}
	}
	return out
}

// page is docs/refusals.md.
func page(t *testing.T, checks map[string]map[string]bool) string {
	var b strings.Builder
	b.WriteString(`# Refusals and what to do

Written by ` + "`go test ./internal/docs -run TestRefusalsPage -update`" + ` from the code: every reason code of jobs
(runner/reasons), and every check that can fail, with the advice that the code gives where it fails.
` + "`coffer why JOB`" + ` names the ones that hold a job. ` + "`<...>`" + ` stands for what a refusal fills in.

## Why a job ended, or waits

| code | what it means | who can do something | next |
|---|---|---|---|
`)
	for _, r := range reasons.All() {
		fmt.Fprintf(&b, "| %s | %s | %s | `%s` |\n", r.Code, r.Meaning, r.Who, strings.Join(r.Next, "`, `"))
	}
	fmt.Fprintf(&b, "\nA code that begins with rule- is a rule of the node (runner/rules) that stopped the job.\n")
	names := slices.Sorted(maps.Keys(checks))
	group := ""
	used := map[string]bool{}
	for _, id := range names {
		name, _, _ := strings.Cut(id, ".")
		if strings.HasPrefix(id, unnamed) {
			continue
		}
		g, ok := groups[name]
		if !ok {
			t.Errorf("check %s: no cure is known for checks of %q", id, name)
			continue
		}
		used[name] = true
		if name != group {
			group = name
			fmt.Fprintf(&b, "\n## %s\n\n%s If the advice does not help: %s.\n\n| check | advice |\n|---|---|\n", name, g[0], g[1])
		}
		cures := slices.Sorted(maps.Keys(checks[id]))
		if len(cures) == 0 {
			cures = []string{g[1]}
		}
		fmt.Fprintf(&b, "| %s | %s |\n", cell(id), cell(strings.Join(cures, "; or: ")))
	}
	for name := range groups {
		if !used[name] {
			t.Errorf("no check is called %s.*: take it from the list", name)
		}
	}
	return b.String()
}

func cell(s string) string {
	return strings.NewReplacer("|", "\\|", "<", "&lt;", ">", "&gt;").Replace(s)
}

func TestRefusalsPage(t *testing.T) {
	checks := parseSource(t).checks()
	if len(checks) < 300 {
		t.Fatalf("only %d checks are found in the source", len(checks))
	}
	for _, id := range []string{"snp.signature", "grant.missing", "token.expired", "nonce.fresh", "evidence.binding"} {
		if checks[id] == nil {
			t.Errorf("%s is not found in the source", id)
		}
	}
	want := page(t, checks)
	bin := os.Getenv("COFFER_BIN")
	if _, err := os.Stat(filepath.Join(bin, "coffer")); bin != "" && err == nil {
		for _, r := range reasons.All() {
			for _, n := range r.Next {
				if err := checkCoffer(bin, strings.Fields(n)[1:]); err != nil {
					t.Errorf("%s: %s: %v", r.Code, n, err)
				}
			}
		}
	}
	path := filepath.Join(root, refusals)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s is not what the code says (%v): go test ./internal/docs -run TestRefusalsPage -update writes it", refusals, err)
	}
}
