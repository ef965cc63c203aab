// Coffer-verify checks the bundle of one job offline. It reads and writes the files
// that it is told to and nothing else: it asks nobody, and has no state and no keys.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/printable"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/translog"
)

// Exit codes.
const (
	exitFailed  = 1
	exitUsage   = 2
	exitUnknown = 4
)

// exitError carries the exit code of an error whose text, if any, is for people.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

var (
	errFailed  = errors.New("the bundle does not verify")
	errUnknown = errors.New("the bundle has nothing to verify it by")
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	if err == nil {
		return
	}
	code := exitUnknown
	var e *exitError
	if errors.As(err, &e) {
		code = e.code
	}
	if !errors.Is(err, errFailed) && !errors.Is(err, errUnknown) && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "coffer-verify:", printable.Text(err.Error()))
	}
	os.Exit(code)
}

type options struct {
	simulationRoots string
	verifierKeys    string
	brokerKeys      string
	logKey          string
	witnessKeys     string
	witnesses       int
	endorsements    string
	approvers       string
	policies        []string
	references      []string
	attestationKeys []string
	earlier         []string
	paravisors      []string
	at              time.Time
	output          string
	report          string
	controls        []string
	exports         []string
	bundle          string
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	o, err := parse(args, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return &exitError{exitUsage, err}
	}
	trust, err := o.trust()
	if err != nil {
		return &exitError{exitUsage, err}
	}
	frameworks, err := o.frameworks()
	if err != nil {
		return &exitError{exitUsage, err}
	}
	file, err := read(o.bundle, stdin, bundle.MaxSize)
	if err != nil {
		return &exitError{exitUnknown, err}
	}
	if err := ctx.Err(); err != nil {
		return &exitError{exitUnknown, err}
	}
	report := verify.Verify(file, trust) //nolint:contextcheck // a bundle takes milliseconds; ctx was asked just before
	if o.output == "json" {
		err = writeJSON(stdout, report)
	} else {
		err = writeText(stdout, report, o.simulationRoots != "", colored(stdout))
	}
	if err == nil && o.report != "" {
		err = writePage(o.report, report, file, frameworks)
	}
	if err == nil {
		err = o.writeExports(report, file, time.Now())
	}
	if err != nil {
		return &exitError{exitUnknown, err}
	}
	switch report.Verdict {
	case verify.Verified:
		return nil
	case verify.Unknown:
		return &exitError{exitUnknown, errUnknown}
	case verify.Failed:
		return &exitError{exitFailed, errFailed}
	default:
		return &exitError{exitFailed, errFailed}
	}
}

const usage = `Check the evidence bundle of one job, offline.

Usage:
  coffer-verify [flags] BUNDLE

BUNDLE is a file, or - for standard input. Chains of device certificates must
end in the vendors' pinned roots. Keys that you do not pin are taken from the
bundle, and what rests on them is reported as not checked: without the
verifier's, a bundle verifies only if its policy is one of this program's and
everything that it requires can be checked here.

Flags:
  --verifier-keys FILE    JSON Web Key Set of the verifier that you trust
  --broker-keys FILE      JSON Web Key Set of the broker that you trust
  --log-key FILE          key of the broker's evidence log: the bundle must prove
                          that the log has its entries
  --witness-keys FILE     keys of witnesses of that log, one a line: they must have
                          cosigned it
  --witnesses N           how many of them (default all)
  --policy PATH           a policy that you accept besides those of this program: a
                          document, or a folder with policy.json and its rules; may
                          be repeated
  --reference-values FILE signed reference values for the plan's policy, which names
                          who signs them; may be repeated
  --attestation-key CLASS=NAME
                          a TPM's attestation key that you trust by its name (SHA-256,
                          in hex), of this trust class; may be repeated
  --paravisor DIGEST      an id key whose signed guests you trust to keep a TPM, as
                          SEV-SNP reports name it (SHA-384, in hex); may be repeated
  --approvers FILE        whose approvals of grants you count: lines of
                          NAME GROUP[,GROUP...] KEY, an SSH public key
  --earlier FILE          the record of an attempt before this one, to add up what the
                          attempts used of a budget; may be repeated, for all of them
  --at TIME               judge certificates at this time (RFC 3339), not at
                          the time at which the result was issued
  --simulation-roots DIR  believe the roots in DIR, of a simulation, instead of
                          the vendors'; whatever verifies is simulated
  --endorsements DIR      certificates, revocation and reference values to check
                          the devices by, as coffer endorsements export writes
                          them
  --output text|json      how to report (default text)
  --report FILE           write a page for people as well: HTML that needs no network,
                          no server and no script
  --controls FILE         controls of the page, in place of those that come with this
                          program; may be repeated
  --export FORMAT=FILE    write what the bundle shows for other tools: vsa (in-toto
                          verification summary), slsa (SLSA provenance), training (a
                          statement of coffer's own), cyclonedx (an ML-BOM). Unsigned;
                          only a vsa is written of what does not verify. May be repeated

Exit codes:
  0  verified    1  failed    2  usage    4  could not tell

Example:
  coffer-verify --verifier-keys verifier.jwks --broker-keys broker.jwks job.bundle
`

func parse(args []string, stdout, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("coffer-verify", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.simulationRoots, "simulation-roots", "", "")
	f.StringVar(&o.verifierKeys, "verifier-keys", "", "")
	f.StringVar(&o.brokerKeys, "broker-keys", "", "")
	f.StringVar(&o.logKey, "log-key", "", "")
	f.StringVar(&o.witnessKeys, "witness-keys", "", "")
	f.IntVar(&o.witnesses, "witnesses", 0, "")
	f.StringVar(&o.endorsements, "endorsements", "", "")
	f.StringVar(&o.approvers, "approvers", "", "")
	for name, to := range map[string]*[]string{"policy": &o.policies, "reference-values": &o.references, "attestation-key": &o.attestationKeys, "paravisor": &o.paravisors, "earlier": &o.earlier, "controls": &o.controls, "export": &o.exports} {
		f.Func(name, "", func(s string) error {
			*to = append(*to, s)
			return nil
		})
	}
	f.StringVar(&o.output, "output", "text", "")
	f.StringVar(&o.report, "report", "", "")
	f.Func("at", "", func(s string) (err error) {
		o.at, err = time.Parse(time.RFC3339, s)
		return err
	})
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			_, werr := io.WriteString(stdout, usage)
			return o, errors.Join(err, werr)
		}
		return o, fmt.Errorf("%w; see coffer-verify --help", err)
	}
	if f.NArg() != 1 {
		_, err := io.WriteString(stderr, usage)
		return o, errors.Join(fmt.Errorf("want one bundle, got %d arguments", f.NArg()), err)
	}
	if o.output != "text" && o.output != "json" {
		return o, fmt.Errorf("output %q: want text or json", o.output)
	}
	if err := o.exportable(); err != nil {
		return o, err
	}
	if o.logKey == "" && o.witnessKeys != "" {
		return o, errors.New("witnesses of which log? --witness-keys needs --log-key")
	}
	if o.witnessKeys == "" && o.witnesses != 0 {
		return o, errors.New("--witnesses needs --witness-keys")
	}
	o.bundle = f.Arg(0)
	return o, nil
}

// maxLogKeys bounds a file with keys of a log or of witnesses, in bytes.
const maxLogKeys = 64 << 10

// log reads the keys of the log and its witnesses.
func (o options) log() (translog.Trust, error) {
	key, err := read(o.logKey, nil, maxLogKeys)
	if err != nil {
		return translog.Trust{}, err
	}
	if o.witnessKeys == "" {
		return translog.NewTrust(string(key), nil, 0)
	}
	b, err := read(o.witnessKeys, nil, maxLogKeys)
	if err != nil {
		return translog.Trust{}, err
	}
	witnesses := strings.Fields(string(b))
	if o.witnesses == 0 {
		o.witnesses = len(witnesses)
	}
	if len(witnesses) == 0 {
		return translog.Trust{}, fmt.Errorf("%s names no witness", o.witnessKeys)
	}
	return translog.NewTrust(string(key), witnesses, o.witnesses)
}

func (o options) trust() (verify.Trust, error) {
	t := verify.Trust{Anchors: anchor.Vendor(), At: o.at}
	var err error
	if o.simulationRoots != "" {
		if t.Anchors, err = simulate.LoadRoots(simulationDir(o.simulationRoots)); err != nil {
			return verify.Trust{}, err
		}
	}
	if t.Anchors, err = o.anchors(t.Anchors); err != nil {
		return verify.Trust{}, err
	}
	if t.Policies, t.References, err = o.readPolicies(); err != nil {
		return verify.Trust{}, err
	}
	if t.VerifierKeys, err = readKeys(o.verifierKeys); err != nil {
		return verify.Trust{}, fmt.Errorf("verifier keys: %w", err)
	}
	if t.BrokerKeys, err = readKeys(o.brokerKeys); err != nil {
		return verify.Trust{}, fmt.Errorf("broker keys: %w", err)
	}
	if o.logKey != "" {
		if t.Log, err = o.log(); err != nil {
			return verify.Trust{}, err
		}
	}
	if o.approvers != "" {
		b, err := read(o.approvers, nil, verify.MaxApprovers)
		if err != nil {
			return verify.Trust{}, err
		}
		if t.Approvers, err = verify.ParseApprovers(b); err != nil {
			return verify.Trust{}, fmt.Errorf("%s: %w", o.approvers, err)
		}
	}
	for _, name := range o.earlier {
		b, err := read(name, nil, bundle.MaxSize)
		if err != nil {
			return verify.Trust{}, err
		}
		t.Earlier = append(t.Earlier, b)
	}
	if o.endorsements == "" {
		return t, nil
	}
	t.Endorsements = endorse.NewLibrary()
	problems, err := t.Endorsements.Load(os.DirFS(o.endorsements), nil)
	if err != nil {
		return verify.Trust{}, err
	}
	if len(problems) > 0 {
		return verify.Trust{}, fmt.Errorf("endorsements: %s", problems[0])
	}
	return t, nil
}

// simulationDir lets the roots be handed over without the folder that holds the
// devices' keys beside them.
func simulationDir(dir string) string {
	if filepath.Base(dir) == "roots" {
		return filepath.Dir(dir)
	}
	return dir
}

func readKeys(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := read(path, nil, receipt.MaxToken)
	if err != nil {
		return nil, err
	}
	if _, err := receipt.ParseKeys("pinned", b); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// read reads at most limit bytes; a longer file is an error.
func read(path string, stdin io.Reader, limit int64) (_ []byte, err error) {
	r := stdin
	if path != "-" || stdin == nil {
		f, err := os.Open(path) //nolint:gosec // the caller names the file to read
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, limit)
	}
	return b, nil
}

func writeJSON(w io.Writer, r verify.Report) error {
	pass, fail, notChecked := r.Count()
	e := json.NewEncoder(printable.NewWriter(w))
	e.SetIndent("", "  ")
	return e.Encode(struct {
		verify.Report
		Passed     int `json:"passed"`
		Failed     int `json:"failed"`
		NotChecked int `json:"notChecked"`
	}{r, pass, fail, notChecked})
}

// colored follows no-color.org, and leaves files and pipes plain.
func colored(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	i, err := f.Stat()
	return err == nil && i.Mode()&os.ModeCharDevice != 0
}
