// Package alerts tells people and their tools what rules found in a job's trace: as
// events of the Open Cybersecurity Schema Framework, one JSON object a line, to a
// file or to an HTTP collector.
//
// Trusted: nothing. Checked: nothing; findings are data. An event holds names,
// paths, digests and addresses that the job chose, cut to a bounded size, and never
// the content of a file or of a variable.
package alerts

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/coffer-run/coffer/attest/printable"
	"github.com/coffer-run/coffer/runner/rules"
)

// schemaVersion is the version of OCSF that events are written in.
const schemaVersion = "1.3.0"

// The class of every event is Detection Finding (OCSF 1.3, class 2004).
const (
	categoryFindings = 2
	classDetection   = 2004
	activityCreate   = 1
)

// maxText bounds what a job chose, in bytes.
const maxText = 1024

// Alert is a finding with the job it is about.
type Alert struct {
	Finding rules.Finding
	// Node, Job and Plan say where; Image is the image's digest.
	Node, Job, Plan, Image string
	// Sequence numbers the alerts of a job from 1: a gap shows that some were dropped.
	Sequence int64
	// Stopped says that the job was ended for it.
	Stopped bool
}

// event is the part of OCSF's Detection Finding that is used here.
type event struct {
	ActivityID  int         `json:"activity_id"`
	CategoryUID int         `json:"category_uid"`
	ClassUID    int         `json:"class_uid"`
	TypeUID     int         `json:"type_uid"`
	Time        int64       `json:"time"`
	SeverityID  int         `json:"severity_id"`
	Severity    string      `json:"severity"`
	StatusID    int         `json:"status_id"`
	Message     string      `json:"message"`
	Count       int64       `json:"count,omitempty"`
	Metadata    metadata    `json:"metadata"`
	FindingInfo findingInfo `json:"finding_info"`
	IsAlert     bool        `json:"is_alert"`
	ActionID    int         `json:"action_id"`
	Disposition int         `json:"disposition_id"`
	Evidences   []evidence  `json:"evidences,omitempty"`
	Resources   []resource  `json:"resources"`
}

type metadata struct {
	Version  string  `json:"version"`
	Product  product `json:"product"`
	UID      string  `json:"uid"`
	Sequence int64   `json:"sequence"`
}

type product struct {
	Name   string `json:"name"`
	Vendor string `json:"vendor_name"`
}

type findingInfo struct {
	UID       string   `json:"uid"`
	Title     string   `json:"title"`
	Types     []string `json:"types"`
	Analytic  analytic `json:"analytic"`
	FirstSeen int64    `json:"first_seen_time"`
	Created   int64    `json:"created_time"`
	Sources   []string `json:"data_sources"`
}

// analytic is the rule; type 1 is "Rule".
type analytic struct {
	UID    string `json:"uid"`
	Name   string `json:"name"`
	TypeID int    `json:"type_id"`
}

type evidence struct {
	Process  *process       `json:"process,omitempty"`
	File     *file          `json:"file,omitempty"`
	Endpoint *endpoint      `json:"dst_endpoint,omitempty"`
	Data     map[string]any `json:"data,omitempty"`
}

type process struct {
	Name string `json:"name"`
}

type file struct {
	Name   string        `json:"name"`
	Path   string        `json:"path"`
	TypeID int           `json:"type_id"`
	Hashes []fingerprint `json:"hashes,omitempty"`
}

// fingerprint of a file; algorithm 3 is SHA-256.
type fingerprint struct {
	AlgorithmID int    `json:"algorithm_id"`
	Value       string `json:"value"`
}

type endpoint struct {
	Name string `json:"name"`
}

type resource struct {
	UID  string `json:"uid"`
	Type string `json:"type"`
	Name string `json:"name,omitempty"`
}

// OCSF returns the alert as one line of JSON, without a newline.
func (a Alert) OCSF() ([]byte, error) {
	f := a.Finding
	at := f.Event.At.UnixMilli()
	uid := fmt.Sprintf("%s/alert/%d", a.Job, a.Sequence)
	e := event{
		ActivityID: activityCreate, CategoryUID: categoryFindings, ClassUID: classDetection, TypeUID: classDetection*100 + activityCreate,
		Time: at, SeverityID: severityID(f.Rule.Severity), Severity: string(f.Rule.Severity), StatusID: 1, Message: f.Rule.Says, Count: f.Count,
		Metadata: metadata{Version: schemaVersion, Product: product{Name: "coffer", Vendor: "coffer"}, UID: uid, Sequence: a.Sequence},
		FindingInfo: findingInfo{
			UID: uid, Title: f.Rule.ID, Types: []string{string(f.Event.Kind)}, FirstSeen: at, Created: at, Sources: []string{"gVisor trace"},
			Analytic: analytic{UID: f.Rule.ID, Name: f.Rule.Says, TypeID: 1},
		},
		IsAlert: f.Rule.Action != rules.Record,
		// Action 1 is "Allowed", 2 "Denied"; disposition 17 is "Logged", 2 "Blocked":
		// what was seen had happened already, so stopping comes after it.
		ActionID: 1, Disposition: 17,
		Resources: []resource{
			{UID: a.Job, Type: "job"}, {UID: a.Plan, Type: "plan"}, {UID: a.Image, Type: "container image"}, {UID: a.Node, Type: "node", Name: a.Node},
		},
	}
	if a.Stopped {
		e.ActionID, e.Disposition = 2, 2
	}
	e.Evidences = evidences(f.Event)
	b, err := json.Marshal(e)
	// People read the lines with programs that show what they get.
	return []byte(printable.Text(string(b))), err
}

func evidences(e rules.Event) []evidence {
	var ev evidence
	if e.Process != "" {
		ev.Process = &process{Name: cut(e.Process)}
	}
	if e.Path != "" {
		p := cut(e.Path)
		ev.File = &file{Name: p[strings.LastIndexByte(p, '/')+1:], Path: p, TypeID: 1}
		if h, ok := strings.CutPrefix(e.Digest, "sha256:"); ok {
			ev.File.Hashes = []fingerprint{{AlgorithmID: 3, Value: cut(h)}}
		}
	}
	if e.Address != "" {
		ev.Endpoint = &endpoint{Name: cut(e.Address)}
	}
	if e.Bytes != 0 {
		ev.Data = map[string]any{"bytes": e.Bytes}
	}
	if ev.Process == nil && ev.File == nil && ev.Endpoint == nil && ev.Data == nil {
		return nil
	}
	return []evidence{ev}
}

// cut bounds a text, at a whole character.
func cut(s string) string {
	if len(s) <= maxText {
		return s
	}
	s = s[:maxText]
	for !utf8.ValidString(s) && len(s) > maxText-utf8.UTFMax {
		s = s[:len(s)-1]
	}
	return s + "…"
}

// severityID is OCSF's number: 1 informational to 5 critical, 0 unknown.
func severityID(s rules.Severity) int {
	return slices.Index([]rules.Severity{"informational", "low", "medium", "high", "critical"}, s) + 1
}
