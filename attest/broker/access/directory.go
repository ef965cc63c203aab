package access

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	cedar "github.com/cedar-policy/cedar-go"
	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
)

const (
	maxGroups    = 1_000
	maxUsers     = 10_000
	maxWorkloads = 10_000
	maxUserKeys  = 16
)

// nameForm is that of people, groups and services.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._@+-]{0,126}[A-Za-z0-9])?$`)

// People is entities.json: which groups there are and what they may be, who
// approves with which key, and where services stand.
type People struct {
	Groups    []Group    `json:"groups"`
	Users     []User     `json:"users"`
	Workloads []Workload `json:"workloads,omitempty"`
}

// Group is a group of people, as sign-in and Users name it.
type Group struct {
	Name string `json:"name"`
	// Roles are those of its members; a service's role is not among them.
	Roles []string `json:"roles"`
}

// User is a person whose approvals count. People who only sign in need not be
// listed: their groups come with the sign-in.
type User struct {
	Name   string   `json:"name"`
	Groups []string `json:"groups"`
	// Keys are SSH public keys, each a line of an authorized_keys file.
	Keys []string `json:"keys"`
}

// Workload is a service with a SPIFFE name.
type Workload struct {
	// Name is "ROLE/NAME".
	Name string `json:"name"`
	// Region is what policies compare with the region label of assets.
	Region string `json:"region,omitempty"`
}

// directory is entities.json, checked.
type directory struct {
	groups    []Group
	people    map[string]person
	workloads map[string]Workload
}

type person struct {
	keys   []ssh.PublicKey
	groups []string
}

func parsePeople(b []byte) (directory, error) {
	var p People
	if err := plan.Decode(b, MaxFile, &p); err != nil {
		return directory{}, err
	}
	d := directory{people: map[string]person{}, workloads: map[string]Workload{}}
	if len(p.Groups) > maxGroups || len(p.Users) > maxUsers || len(p.Workloads) > maxWorkloads {
		return directory{}, fmt.Errorf("more than %d groups, %d users or %d workloads", maxGroups, maxUsers, maxWorkloads)
	}
	for _, g := range p.Groups {
		if !nameForm.MatchString(g.Name) || slices.ContainsFunc(d.groups, func(o Group) bool { return o.Name == g.Name }) {
			return directory{}, fmt.Errorf("group %.140q: no name, or there twice", g.Name)
		}
		for _, r := range g.Roles {
			if !slices.Contains(Roles(), r) || workload(r) {
				return directory{}, fmt.Errorf("group %s: role %.40q is not one that people have", g.Name, r)
			}
		}
		d.groups = append(d.groups, g)
	}
	owners := map[string]string{}
	for _, u := range p.Users {
		if _, twice := d.people[u.Name]; twice || !nameForm.MatchString(u.Name) {
			return directory{}, fmt.Errorf("user %.140q: no name, or there twice", u.Name)
		}
		for i, g := range u.Groups {
			if !slices.ContainsFunc(d.groups, func(o Group) bool { return o.Name == g }) || slices.Contains(u.Groups[:i], g) {
				return directory{}, fmt.Errorf("user %s: group %.140q is not declared, or there twice", u.Name, g)
			}
		}
		entry := person{groups: slices.Clone(u.Groups)}
		if len(u.Keys) > maxUserKeys {
			return directory{}, fmt.Errorf("user %s: more than %d keys", u.Name, maxUserKeys)
		}
		for _, line := range u.Keys {
			keys, err := sshsig.ParseKeys([]byte(line))
			if err != nil || len(keys) != 1 {
				return directory{}, errors.Join(fmt.Errorf("user %s: want one key a string", u.Name), err)
			}
			// One key of two people would let one of them count as both.
			f := ssh.FingerprintSHA256(keys[0])
			if other, twice := owners[f]; twice {
				return directory{}, fmt.Errorf("user %s: key %s is that of %s too", u.Name, f, other)
			}
			owners[f] = u.Name
			entry.keys = append(entry.keys, keys[0])
		}
		d.people[u.Name] = entry
	}
	for _, w := range p.Workloads {
		role, name, _ := strings.Cut(w.Name, "/")
		if _, twice := d.workloads[w.Name]; twice || !workload(role) || !nameForm.MatchString(name) {
			return directory{}, fmt.Errorf("workload %.140q: want agent/NAME or scheduler/NAME, once", w.Name)
		}
		d.workloads[w.Name] = w
	}
	return d, nil
}

// standing returns the roles, and the groups with theirs.
func (d directory) standing() cedar.EntityMap {
	m := cedar.EntityMap{}
	for _, role := range Roles() {
		m[uid("Role", role)] = entity(uid("Role", role), nil)
	}
	for _, g := range d.groups {
		var roles []cedar.EntityUID
		for _, role := range g.Roles {
			roles = append(roles, uid("Role", role))
		}
		m[uid("Group", g.Name)] = entity(uid("Group", g.Name), nil, roles...)
	}
	return m
}

// Approver returns the keys by which a person signs approvals and the groups for
// which they count, as of this set. ok is false for whom the set does not list.
func (s *Set) Approver(name string) (keys []ssh.PublicKey, groups []string, ok bool) {
	if s == nil {
		return nil, nil, false
	}
	p, ok := s.directory.people[name]
	return slices.Clone(p.keys), slices.Clone(p.groups), ok
}
