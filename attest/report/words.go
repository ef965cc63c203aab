package report

import (
	"encoding/base64"
	"regexp"
	"strings"
)

func decodeSegment(s string) ([]byte, error) { return base64.RawURLEncoding.DecodeString(s) }

// phrases say what a check asks, for a reader who does not know its id. A longer
// beginning wins over a shorter one.
var phrases = map[string]string{
	"bundle.form":           "Is the file whole, and the only encoding of what it says?",
	"statement.form":        "Does the job's signed statement have its form?",
	"statement.signature":   "Did the attested job itself sign this record?",
	"part.":                 "Is this part the one that the job signed?",
	"plan.digest":           "Is this the plan that the job signed for?",
	"plan.bound":            "Does the evidence bind this plan, so that the machine attested for it and no other?",
	"plan.":                 "Is the plan well formed and the same everywhere?",
	"sandbox.evidence":      "Does the evidence bind this sandbox, made before any key was asked for?",
	"sandbox.profile":       "Was the sandbox made by the rules that the plan names?",
	"sandbox.image":         "Does the sandbox hold the image of the plan?",
	"sandbox.image-sbom":    "Is the list of what the image is made from this image's, and by whom?",
	"sandbox.image-content": "Does the image hold what the list says?",
	"sandbox.":              "Does the sandbox fit the plan?",
	"result.signature":      "Did the verifier sign this attestation result?",
	"result.status":         "Does the verifier accept every device?",
	"result.":               "Is the attestation result about this job, in time, and for this broker?",
	"snp.signature":         "Is the CPU report signed by a genuine AMD chip?",
	"snp.chain":             "Does the chip's certificate end in AMD's root?",
	"snp.vcek":              "Does the certificate belong to this chip at this firmware level?",
	"snp.tcb":               "Is the chip's firmware at least what is required?",
	"snp.debug":             "Is debugging of the guest forbidden?",
	"snp.crl":               "Is no certificate of the chip revoked?",
	"snp.report-data":       "Does the CPU report speak of this job?",
	"snp.measurement":       "Was the guest started from a known image?",
	"snp.":                  "Is the confidential guest as required?",
	"tpm.signature":         "Is the TPM's quote signed by its attestation key?",
	"tpm.extra-data":        "Does the quote speak of this job?",
	"tpm.pcr-digest":        "Are the measurements those that the TPM signed?",
	"tpm.event-log":         "Does the log of what was started lead to the measurements?",
	"tpm.ak":                "Is the attestation key known, and how?",
	"tpm.":                  "Is the boot measurement as required?",
	"gpu":                   "Is the GPU genuine and in the mode required?",
	"binding.":              "Do all devices speak of the same job and keys?",
	"evidence.binding":      "Do all devices speak of the same job and keys?",
	"evidence.session-key":  "Is the key that signed this record the one that the machine attested?",
	"evidence.":             "Is the evidence whole?",
	"policy.":               "Does the attestation policy that the plan names hold?",
	"endorsements.":         "What do the makers say of the devices?",
	"release.signature":     "Did the broker sign for releasing the key?",
	"release.recipient-key": "Was the key encrypted to this attested job alone?",
	"release.result":        "Was it released for this attestation result?",
	"release.":              "Was the key released to this job, under its grant, in time?",
	"approvals.complete":    "Are there as many approvals as the owner's rules ask for?",
	"approval.signature":    "Did this person sign the approval?",
	"approval":              "Is the approval for this plan, by somebody who may?",
	"asset.policy":          "Did the owner sign the rules of the asset?",
	"reattest.age":          "Did the machine attest again as often as plan and owners ask?",
	"reattest.then":         "Did the job go on only while its machine was affirmed?",
	"reattest.":             "Was the machine affirmed again while the job ran?",
	"trace.complete":        "Is the record of what ran without a gap?",
	"trace.operator":        "Did nobody put a program into the running job?",
	"trace.":                "Was the job watched from its first process?",
	"metrics.plan":          "Did the job report numbers if and only if its plan allows some?",
	"metrics.form":          "Are they those that the plan names?",
	"metrics.budget":        "Were they no more than the plan allows?",
	"outcome.exit-code":     "Does the record say no more of the exit code than the plan allows?",
	"logs.budget":           "Did the job print no more than the plan allows?",
	"logs.":                 "What did the job print?",
	"egress.":               "Where did the job connect to?",
	"attempt.":              "Is it one of the attempts that the plan allows?",
	"budget.":               "Did the attempts use no more time than the plan allows?",
	"checkpoint.signature":  "Did the attested job sign this checkpoint?",
	"checkpoint.anchor":     "Has the broker countersigned this checkpoint?",
	"checkpoint.":           "Is the chain of checkpoints unbroken and this job's?",
	"resume.":               "Did the job go on from the checkpoint that its plan says?",
	"outcome.":              "Did the job end as the record says?",
	"log.included":          "Is the entry in the public log, by a proof?",
	"log.":                  "Is the record in the evidence log?",
	"holder.":               "What does the holder of the keys say?",
	"agent.":                "What does the node say?",
	"nonce.":                "Was the evidence made for this challenge?",
}

var numbered = regexp.MustCompile(`\[\d+\]|\d+`)

// words is the phrase of a check's id, or "".
func words(id string) string {
	best := ""
	for k := range phrases {
		if (id == k || strings.HasPrefix(id, k) || strings.HasPrefix(numbered.ReplaceAllString(id, ""), k)) && len(k) > len(best) {
			best = k
		}
	}
	return phrases[best]
}
