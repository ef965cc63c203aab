package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/tools/step"
)

// debianPackages names every package that a build, the demo or the tests run. libc6-dev is named because gcc only recommends it.
var debianPackages = []string{
	"age",
	"ca-certificates",
	"chromium",
	"curl",
	"dataset-fashion-mnist",
	"debian-archive-keyring",
	"fuse3",
	"gcc",
	"gocryptfs",
	"iproute2",
	"jq",
	"libc6-dev",
	"mmdebstrap",
	"nftables",
	"openssh-client",
	"openssl",
	"python3",
	"softhsm2",
	"swtpm",
	"swtpm-tools",
}

func installPackages(ctx context.Context, p *step.Progress) (string, error) {
	if _, err := exec.LookPath("dpkg-query"); err != nil {
		return "", errors.New("this machine has no dpkg: coffer's builds need Debian 12")
	}
	missing := missingPackages(ctx)
	if len(missing) == 0 {
		return "all installed", nil
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("these Debian packages are missing: run as root: apt-get install --no-install-recommends %s", strings.Join(missing, " "))
	}
	install := append([]string{"install", "--yes", "--no-install-recommends"}, missing...)
	for _, args := range [][]string{{"update"}, install} {
		cmd := step.Command(ctx, p, "apt-get", args...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if err := cmd.Run(); err != nil {
			return "", fmt.Errorf("apt-get %s: %w", strings.Join(args, " "), err)
		}
	}
	if still := missingPackages(ctx); len(still) > 0 {
		return "", fmt.Errorf("apt-get left these packages out: %s", strings.Join(still, " "))
	}
	return "installed " + strings.Join(missing, " "), nil
}

func missingPackages(ctx context.Context) []string {
	// dpkg-query exits non-zero when it does not know one of the names; what it prints about the others still holds.
	out, _ := exec.CommandContext(ctx, "dpkg-query", append([]string{"-W", "-f", "${db:Status-Abbrev} ${binary:Package}\n"}, debianPackages...)...).Output()
	return notInstalled(debianPackages, string(out))
}

func notInstalled(wanted []string, dpkg string) []string {
	var installed []string
	for line := range strings.Lines(dpkg) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "ii" {
			name, _, _ := strings.Cut(fields[1], ":")
			installed = append(installed, name)
		}
	}
	return slices.DeleteFunc(slices.Clone(wanted), func(name string) bool { return slices.Contains(installed, name) })
}
