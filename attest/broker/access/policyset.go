package access

import (
	"embed"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	cedar "github.com/cedar-policy/cedar-go"
	internalast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"
	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

const (
	// Namespace is what maintainers sign a manifest for.
	Namespace = "coffer-policy@coffer.run"
	// Version is the only version of manifests there is.
	Version = "coffer.run/policy-set/v1"

	// ManifestFile lists the files of a set; PeopleFile is one of them.
	ManifestFile = "manifest.json"
	PeopleFile   = "entities.json"
	// SignatureDir holds one SSHSIG signature of the manifest a file.
	SignatureDir = "signatures"

	// MaxFile bounds one file of a set in bytes, MaxFiles how many there are.
	MaxFile  = 1 << 20
	MaxFiles = 128
	// maxPolicies bounds the policies of a set.
	maxPolicies = 1_000
	// maxSerial is what JSON numbers hold exactly (RFC 8785).
	maxSerial = 1 << 53
)

//go:embed schema.cedarschema
var schemaText []byte

//go:embed policies/*.cedar
var defaults embed.FS

// DefaultPolicies returns the policies that coffer comes with, by file name.
func DefaultPolicies() (map[string][]byte, error) {
	sub, err := fs.Sub(defaults, "policies")
	if err != nil {
		return nil, err
	}
	return ReadFiles(sub)
}

// manifest is what maintainers sign.
type manifest struct {
	Version string `json:"version"`
	// Broker is the one broker that the set is for.
	Broker string `json:"broker"`
	// Serial grows with every set; a broker goes back to no lower one.
	Serial uint64                 `json:"serial"`
	Files  map[string]plan.Digest `json:"files"`
}

// Maintainer is someone whose signature on a set counts.
type Maintainer struct {
	Name string
	Key  ssh.PublicKey
}

// Trust says whose sets a broker takes. The zero value takes none.
type Trust struct {
	// Broker is the broker's name.
	Broker      string
	Maintainers []Maintainer
	// Threshold is how many of them must have signed.
	Threshold int
}

func (t Trust) validate() error {
	if t.Broker == "" || t.Threshold < 1 || t.Threshold > len(t.Maintainers) {
		return fmt.Errorf("a policy set needs a broker's name and a threshold of 1 to the %d maintainers", len(t.Maintainers))
	}
	for i, m := range t.Maintainers {
		if err := sshsig.CheckKey(m.Key); err != nil || m.Name == "" {
			return fmt.Errorf("maintainer %q: no name or no usable key", m.Name)
		}
		for _, o := range t.Maintainers[:i] {
			if o.Name == m.Name || sshsig.Same(o.Key, m.Key) {
				return fmt.Errorf("maintainers %s and %s have one name or one key", o.Name, m.Name)
			}
		}
	}
	return nil
}

// Set is a policy set that enough maintainers signed. Open alone makes one; the
// zero value denies everything. It is safe for concurrent use.
type Set struct {
	serial    uint64
	digest    plan.Digest
	signers   []string
	policies  *cedar.PolicySet
	directory directory
	// standing are actions, roles and groups, the same for every request.
	standing  cedar.EntityMap
	schema    *resolved.Schema
	validator *validate.Validator
}

// Serial is the set's place among its broker's.
func (s *Set) Serial() uint64 { return s.serial }

// Digest is the SHA-384 of the set's manifest, which names every file.
func (s *Set) Digest() plan.Digest { return s.digest }

// Signers are the names of the maintainers who signed, sorted.
func (s *Set) Signers() []string { return slices.Clone(s.signers) }

// fileForm is that of the files of a set: no folders but one, nothing hidden.
var (
	fileForm      = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}\.(cedar|json)$`)
	signatureForm = regexp.MustCompile(`^` + SignatureDir + `/[A-Za-z0-9][A-Za-z0-9._-]{0,62}\.sig$`)
)

// ReadFiles reads a folder with a set in it. Anything but regular files with the
// names of a set, and the folder of signatures, is an error.
func ReadFiles(folder fs.FS) (map[string][]byte, error) {
	out := map[string][]byte{}
	err := fs.WalkDir(folder, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == "." || name == SignatureDir):
			return nil
		case !d.Type().IsRegular():
			return fmt.Errorf("policy set: %s is not a file of a set", name)
		case len(out) == MaxFiles:
			return fmt.Errorf("policy set: more than %d files", MaxFiles)
		}
		f, err := folder.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
		if err != nil {
			return err
		}
		if len(b) > MaxFile {
			return fmt.Errorf("policy set: %s has more than %d bytes", name, MaxFile)
		}
		out[name] = b
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Manifest returns the manifest of the given files for a broker: what
// maintainers sign. A manifest and signatures among the files are left out.
func Manifest(broker string, serial uint64, files map[string][]byte) ([]byte, error) {
	m := manifest{Version: Version, Broker: broker, Serial: serial, Files: map[string]plan.Digest{}}
	for name, b := range files {
		if name == ManifestFile || strings.HasPrefix(name, SignatureDir+"/") {
			continue
		}
		m.Files[name] = plan.Sum(b)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("manifest of a policy set: %w", err)
	}
	return plan.Canonical(m)
}

func (m manifest) validate() error {
	switch {
	case m.Version != Version:
		return fmt.Errorf("version %.40q, want %s", m.Version, Version)
	case m.Broker == "":
		return fmt.Errorf("no broker")
	case m.Serial == 0 || m.Serial > maxSerial:
		return fmt.Errorf("serial number %d, want 1 to 2^53", m.Serial)
	case m.Files[PeopleFile] == "":
		return fmt.Errorf("no %s", PeopleFile)
	case len(m.Files) > MaxFiles:
		return fmt.Errorf("more than %d files", MaxFiles)
	}
	for name := range m.Files {
		if !fileForm.MatchString(name) || name == ManifestFile || path.Ext(name) == ".json" && name != PeopleFile {
			return fmt.Errorf("%.80q is not the name of a file of a set", name)
		}
	}
	return nil
}

// Sign returns a signature of a manifest, for a file in SignatureDir.
// `ssh-keygen -Y sign -n coffer-policy@coffer.run` makes the same.
func Sign(signer ssh.Signer, manifest []byte) ([]byte, error) {
	return sshsig.Sign(signer, Namespace, manifest)
}

// Open checks a policy set: signatures before anything else is read of it, then
// its files, and only then what they say. Every failure is a check.Refusal.
func Open(files map[string][]byte, t Trust) (*Set, error) {
	var l check.List
	if err := t.validate(); err != nil {
		l.Fail("policy.trust", "maintainers and a threshold", err.Error(), "name them in the broker's configuration")
		return nil, check.Refuse("policy", l)
	}
	raw := files[ManifestFile]
	signers := signatures(files, t, &l)
	if len(l.Failed()) > 0 {
		return nil, check.Refuse("policy", l)
	}
	var m manifest
	if err := plan.Decode(raw, MaxFile, &m); err != nil {
		l.Fail("policy.manifest", "a manifest of version "+Version, trim(err.Error()), "make it with `coffer access pack`")
	} else if err := m.validate(); err != nil {
		l.Fail("policy.manifest", "a manifest of version "+Version, trim(err.Error()), "make it with `coffer access pack`")
	} else {
		l.Equal("policy.broker", t.Broker, trim(m.Broker), "this set is for another broker")
		contents(files, m, &l)
	}
	if len(l.Failed()) > 0 {
		return nil, check.Refuse("policy", l)
	}
	s := &Set{serial: m.Serial, digest: plan.Sum(raw), signers: signers}
	if err := s.compile(files); err != nil {
		l.Fail("policy.content", "policies and entities that fit the schema", trim(err.Error()), "mend the file, then sign again")
		return nil, check.Refuse("policy", l)
	}
	return s, nil
}

// signatures returns who signed the manifest. Every file among the signatures
// must be one by a maintainer, each maintainer once: a signature that does not
// count is a sign that something is not as its makers left it.
func signatures(files map[string][]byte, t Trust, l *check.List) []string {
	const hint = "sign the manifest with `ssh-keygen -Y sign -n " + Namespace + "`, one file for each maintainer"
	if len(files[ManifestFile]) == 0 {
		l.Fail("policy.manifest", ManifestFile, "none", "make it with `coffer access pack`")
		return nil
	}
	var signers []string
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !strings.HasPrefix(name, SignatureDir+"/") {
			continue
		}
		if !signatureForm.MatchString(name) {
			l.Fail("policy.signature", "signature files named NAME.sig", fmt.Sprintf("%.80q", name), hint)
			continue
		}
		var keys []ssh.PublicKey
		for _, m := range t.Maintainers {
			keys = append(keys, m.Key)
		}
		key, err := sshsig.Verify(files[name], files[ManifestFile], Namespace, keys)
		if err != nil {
			l.Fail("policy.signature", "a maintainer's signature of this manifest in "+name, trim(err.Error()), hint)
			continue
		}
		i := slices.IndexFunc(t.Maintainers, func(m Maintainer) bool { return sshsig.Same(m.Key, key) })
		who := t.Maintainers[i].Name
		if slices.Contains(signers, who) {
			l.Fail("policy.duplicate-signer", "one signature by each maintainer", who+" signed twice", hint)
			continue
		}
		signers = append(signers, who)
	}
	if len(signers) < t.Threshold {
		l.Fail("policy.threshold", fmt.Sprintf("signatures of %d maintainers", t.Threshold), strconv.Itoa(len(signers)), hint)
	}
	slices.Sort(signers)
	return signers
}

// contents holds the files against the manifest.
func contents(files map[string][]byte, m manifest, l *check.List) {
	const hint = "restore the signed files, or make a new manifest and have it signed"
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		b, ok := files[name]
		switch {
		case !ok:
			l.Fail("policy.file-missing", "file "+name, "none", hint)
		case plan.Sum(b) != m.Files[name]:
			l.Fail("policy.file-changed", name+" with "+string(m.Files[name]), string(plan.Sum(b)), hint)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if _, listed := m.Files[name]; !listed && name != ManifestFile && !strings.HasPrefix(name, SignatureDir+"/") {
			l.Fail("policy.file-extra", "files that the manifest lists", fmt.Sprintf("%.80q", name), hint)
		}
	}
}

// compile reads policies and people.
func (s *Set) compile(files map[string][]byte) error {
	var text schema.Schema
	if err := text.UnmarshalCedar(schemaText); err != nil {
		return fmt.Errorf("schema: %w", err)
	}
	var err error
	if s.schema, err = text.Resolve(); err != nil {
		return fmt.Errorf("schema: %w", err)
	}
	s.validator = validate.New(s.schema, validate.WithStrict())
	if s.directory, err = parsePeople(files[PeopleFile]); err != nil {
		return fmt.Errorf("%s: %w", PeopleFile, err)
	}
	s.standing = s.directory.standing()
	// Without them "action in" is false, also in a forbid.
	for id, a := range s.schema.Actions {
		s.standing[id] = a.Entity
	}
	policies := cedar.NewPolicySet()
	count := 0
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if path.Ext(name) != ".cedar" {
			continue
		}
		list, err := cedar.NewPolicyListFromBytes(name, files[name])
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, p := range list {
			id := cedar.PolicyID(p.Annotations()["id"])
			if !fileForm.MatchString(string(id) + ".cedar") {
				return fmt.Errorf("%s, line %d: a policy has an @id of lower-case letters, digits and '-'", name, p.Position().Line)
			}
			if err := s.validator.Policy(string(id), (*internalast.Policy)(p.AST())); err != nil {
				return fmt.Errorf("%s: policy %s: %w", name, id, err)
			}
			if !policies.Add(id, p) {
				return fmt.Errorf("%s: policy %s is there twice", name, id)
			}
			if count++; count > maxPolicies {
				return fmt.Errorf("more than %d policies", maxPolicies)
			}
		}
	}
	if count == 0 {
		return fmt.Errorf("no policy, so that nobody may do anything")
	}
	s.policies = policies
	return nil
}

// fits checks one request and its entities against the schema.
func (s *Set) fits(q cedar.Request, e entities) error {
	if err := s.validator.Request(q); err != nil {
		return err
	}
	if err := s.validator.Entity(e.principal); err != nil {
		return err
	}
	return s.validator.Entity(e.resource)
}
