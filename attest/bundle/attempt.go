package bundle

import "github.com/coffer-run/coffer/attest/plan"

// Attempt says which attempt of a job a record is of, and what the attempts used of
// the plan's budget together. It is the agent's word; with the records of the attempts
// before, it is held against theirs.
type Attempt struct {
	// Number counts from 1.
	Number int `json:"number"`
	// First is the job id of the first attempt; absent for itself.
	First string `json:"first,omitempty"`
	// Before is the digest of the statement of the attempt before; absent for the
	// first, and where no record of it could be made.
	Before plan.Digest `json:"before,omitempty"`
	// SpentNanos is what the attempts before used of the budget, and this one before
	// its agent was restarted and began it again. UsedNanos is what this one used, from
	// when it got room on the node until its container was gone. Both are 0 where the
	// plan has no budget.
	SpentNanos int64 `json:"spentNanos"`
	UsedNanos  int64 `json:"usedNanos"`
}
