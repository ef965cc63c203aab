package e2e

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// protocolHead and protocolRows are what one program of the system tries against
// another, or a store against the agent, where no stack is needed to show it. Each
// names the test that tries it.
const protocolHead = `
## One part against another

Unit tests try these: the attacker is the peer itself, with its keys and its place in the protocol.

| attacker | what it does | what comes of it | tried in |
|---|---|---|---|
`

var protocolRows = [][4]string{
	{"agent", "reports a job gone, or logs its record, while the holder lives; then has another key released to the job, for the broker to renew the holder's lease after the first grant was taken back", "no key (`job.ended`), and no lease", "`TestEndThatDidNotHappen`"},
	{"agent", "has a second holder of the same job attest and get a key, and carries its leases to the first", "a lease names one holder's session key (`lease.session`)", "`TestLeasesAreForTheLastHolder`, `TestLeasesThatAreNotTheJobs`"},
	{"object store", "lists without end, or refuses with a text without end", "8 MiB are read of each answer", "`TestAnswersWithoutEnd`"},
	{"object store", "answers an upload before it has read it, so that Azure's library unmaps what the transport still reads", "the body is taken back first; the agent lives", "`TestAnsweredBeforeAllIsTaken`, `TestBodyIsTakenBack`"},
	{"object store", "sends the node's signed requests to another address, such as that of a cloud's metadata", "it is not asked", "`TestNoRedirectIsFollowed`"},
	{"object store", "answers each range with the whole object, or with its beginning", "the folder is refused", "`TestRefusedSources`"},
	{"object store", "calls an object compressed", "it is read as it came, and held against its digest", "`TestNothingIsDecompressed`"},
	{"broker, verifier", "answers with more than an answer may be large", "64 MiB are kept; the service counts as away", "`TestAnswersThatAreTooLarge`"},
	{"broker", "renews leases of jobs that nobody asked for, or says nothing of one that was asked for", "nothing is renewed", "`TestRenewalsOfOthers`"},
	{"agent, job", "sends the holder packets that are empty, malformed, too large or out of order, with up to 253 descriptors each", "nothing is answered but an error, and no descriptor stays open", "`TestPacketsOfAStranger`"},
	{"broker", "signs a lease of so many seconds that they overflow", "refused (`lease.form`)", "`TestLeasesThatAreNotTheJobs`"},
}

// TestAttacksPageNamesItsTests: whatever docs/attacks.md says was tried is a test.
func TestAttacksPageNamesItsTests(t *testing.T) {
	page, err := os.ReadFile("../../docs/attacks.md")
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	if err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (path == "../../build" || path == "../../.git"):
			return fs.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		source, err := os.ReadFile(path)
		for _, m := range declared.FindAllSubmatch(source, -1) {
			there[string(m[1])] = true
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`Test\w+`).FindAllString(string(page), -1)
	if len(named) < len(extraRows)+len(insideRows)+len(protocolRows) {
		t.Errorf("the page names %d tests", len(named))
	}
	for _, name := range named {
		if !there[name] {
			t.Errorf("there is no test %s", name)
		}
	}
}
