package stack

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/broker/access"
	"github.com/coffer-run/coffer/internal/daemon"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/issuer"
)

// maintainer signs the stack's policy set, alone.
const maintainer = "maintainer"

// Groups of the stack's people, and the roles that they give.
func groups() []access.Group {
	return []access.Group{
		{Name: "engineers", Roles: []string{access.RoleEngineer}},
		{Name: "owners", Roles: []string{access.RoleOwner}},
		{Name: "weights-approvers", Roles: []string{access.RoleApprover}},
		{Name: "auditors", Roles: []string{access.RoleAuditor}},
		{Name: "operators", Roles: []string{access.RoleOperator}},
	}
}

// person is one of the stack's people. Approvers and owners have an SSH key too.
type person struct{ name, group string }

func people() []person {
	return []person{
		{"engineer", "engineers"}, {"owner", "owners"}, {"alice", "weights-approvers"}, {"bob", "weights-approvers"}, {"carol", "weights-approvers"},
		{"auditor", "auditors"}, {"operator", "operators"},
	}
}

// peopleFile has names, groups and password hashes for the issuer.
func (l Layout) peopleFile() string { return l.path("people", "people.json") }

// passwordFile has a person's password, and sshKey the key that signs approvals,
// consents and policies of assets: the stack plays those whose secrets these are.
func (l Layout) passwordFile(name string) string { return l.path("people", name+".password") }
func (l Layout) sshKey(name string) string       { return l.path("people", name+".ssh") }

// SSHKeyFile returns the file with the private SSH key of one of the stack's
// approvers or owners, or of "maintainer", who signs its policy set.
func (e Endpoint) SSHKeyFile(name string) string { return e.layout.sshKey(name) }

// people makes the stack's people, their passwords and keys, and the policy set
// that says what they may do. What is there stays.
func (s *starter) people(context.Context) (string, error) {
	if err := once(s.path("people"), s.makePeople); err != nil {
		return "", err
	}
	if err := once(s.path("policies"), s.makePolicies); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d people, passwords in %s", len(people()), s.path("people")), nil
}

func (s *starter) makePeople() error {
	var list []issuer.Person
	for _, p := range people() {
		password := rand.Text()
		hash, err := issuer.HashPassword(password)
		if err != nil {
			return err
		}
		list = append(list, issuer.Person{Name: p.name, Groups: []string{p.group}, Hash: hash})
		if err := keyfile.Write(s.passwordFile(p.name), []byte(password+"\n")); err != nil {
			return err
		}
	}
	for _, name := range append(signers(), maintainer) {
		if err := createSSHKey(s.sshKey(name), name); err != nil {
			return err
		}
	}
	b, err := issuer.EncodePeople(list)
	if err != nil {
		return err
	}
	return keyfile.Write(s.peopleFile(), b)
}

// signers are the people who sign what they decide: approvers, and owners.
func signers() []string {
	var out []string
	for _, p := range people() {
		i := slices.IndexFunc(groups(), func(g access.Group) bool { return g.Name == p.group })
		if i >= 0 && (slices.Contains(groups()[i].Roles, access.RoleApprover) || slices.Contains(groups()[i].Roles, access.RoleOwner)) {
			out = append(out, p.name)
		}
	}
	return out
}

func createSSHKey(path, comment string) error {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(key, comment)
	if err != nil {
		return err
	}
	return keyfile.Write(path, pem.EncodeToMemory(block))
}

func readSSHKey(path string) (ssh.Signer, error) {
	b, err := keyfile.Read(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	key, err := ssh.ParsePrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("ssh key %s: %w", path, err)
	}
	return key, nil
}

// publicSSHKey returns a key's line of an authorized_keys file.
func publicSSHKey(path string) (string, error) {
	key, err := readSSHKey(path)
	if err != nil {
		return "", err
	}
	return string(ssh.MarshalAuthorizedKey(key.PublicKey())), nil
}

// makePolicies signs the policies that coffer comes with, for the stack's people.
func (s *starter) makePolicies() error {
	files, err := access.DefaultPolicies()
	if err != nil {
		return err
	}
	entities := access.People{Groups: groups()}
	for _, p := range people() {
		u := access.User{Name: p.name, Groups: []string{p.group}, Keys: []string{}}
		if slices.Contains(signers(), p.name) {
			line, err := publicSSHKey(s.sshKey(p.name))
			if err != nil {
				return err
			}
			u.Keys = append(u.Keys, line)
		}
		entities.Users = append(entities.Users, u)
	}
	if files[access.PeopleFile], err = json.MarshalIndent(entities, "", "  "); err != nil {
		return err
	}
	if files[access.ManifestFile], err = access.Manifest(BrokerID, 1, files); err != nil {
		return err
	}
	key, err := readSSHKey(s.sshKey(maintainer))
	if err != nil {
		return err
	}
	if files[access.SignatureDir+"/"+maintainer+".sig"], err = access.Sign(key, files[access.ManifestFile]); err != nil {
		return err
	}
	for name, b := range files {
		path := filepath.Join(s.policies(), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := keyfile.Write(path, b); err != nil {
			return err
		}
	}
	return nil
}

// policies is the folder of the policy set. Above it stands the mark of a
// complete one, which is no part of a set.
func (l Layout) policies() string { return l.path("policies", "set") }

// issuerConfig and brokerAccess are parts of configuration files.
type issuerConfig struct {
	Listen     string     `json:"listen"`
	URL        string     `json:"url"`
	TLS        daemon.TLS `json:"tls"`
	KeyFile    string     `json:"keyFile"`
	PeopleFile string     `json:"peopleFile"`
}

type brokerAccess struct {
	Policies    string             `json:"policies"`
	Maintainers []brokerMaintainer `json:"maintainers"`
	Threshold   int                `json:"threshold"`
	Issuers     []brokerIssuer     `json:"issuers"`
}

type brokerMaintainer struct {
	Name string `json:"name"`
	Key  string `json:"key"`
}

type brokerIssuer struct {
	URL        string   `json:"url"`
	Audience   string   `json:"audience"`
	Algorithms []string `json:"algorithms"`
	Embedded   bool     `json:"embedded"`
}

// agentAccess lets the stack's people call the node agent with tokens of their own.
type agentAccess struct {
	Issuers []brokerIssuer    `json:"issuers"`
	Roles   map[string]string `json:"roles"`
}

func (s *starter) agentAccess() *agentAccess {
	return &agentAccess{
		Issuers: []brokerIssuer{{URL: baseURL(s.o.Ports.Issuer), Audience: issuer.NodeClientID, Algorithms: []string{issuer.Algorithm}, Embedded: true}},
		Roles: map[string]string{
			"engineers": daemon.RoleEngineer, "owners": daemon.RoleOwner, "auditors": daemon.RoleAuditor, "operators": daemon.RoleOperator,
		},
	}
}

func (s *starter) access() (brokerAccess, error) {
	key, err := publicSSHKey(s.sshKey(maintainer))
	if errors.Is(err, fs.ErrNotExist) {
		return brokerAccess{}, fmt.Errorf("%s is gone, and with it who signs this stack's policies: %w", s.sshKey(maintainer), err)
	}
	if err != nil {
		return brokerAccess{}, err
	}
	return brokerAccess{
		Policies: s.policies(), Maintainers: []brokerMaintainer{{maintainer, key}}, Threshold: 1,
		Issuers: []brokerIssuer{{URL: baseURL(s.o.Ports.Issuer), Audience: issuer.ClientID, Algorithms: []string{issuer.Algorithm}, Embedded: true}},
	}, nil
}
