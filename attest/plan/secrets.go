package plan

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

const (
	// SecretsMount is the folder in which a job finds its secrets.
	SecretsMount = "/run/secrets"
	// MaxSecretBytes bounds one secret.
	MaxSecretBytes = 64 << 10
)

var secretName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// validateSecret wants a secret at its own place, and no other input there.
func (in Input) validateSecret() error {
	if in.Secret && (in.Mount != path.Join(SecretsMount, in.Name) || !secretName.MatchString(in.Name)) {
		return fmt.Errorf("plan secret %.80q: want the mount %s/%.80s", in.Name, SecretsMount, in.Name)
	}
	if !in.Secret && (in.Mount == SecretsMount || strings.HasPrefix(in.Mount, SecretsMount+"/")) {
		return fmt.Errorf("plan input %.80q lies in %s and is no secret", in.Name, SecretsMount)
	}
	return nil
}
