package jobspec

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
)

// Field is one field of a job file: what documents, the schema and refusals say of
// it. Its place and its type come from Spec.
type Field struct {
	// Path is its place: "inputs[].mount" is that of each input, "env.*" each
	// variable.
	Path string
	// Doc says what it is for, in one or two sentences.
	Doc string
	// Want says what a value must be; it follows the word "want".
	Want string
	// Default is what holds where the job file is silent; "" where nothing does.
	Default string
	// Example is a value as YAML on one line.
	Example string
	// Required fields must be there if what they are part of is.
	Required bool
	// Planned fields change the plan digest: people approve them.
	Planned bool

	// What the schema checks besides the type.
	pattern    string
	enum       []string
	min, max   *int64
	minItems   int
	maxItems   int
	firstMatch string
}

func between(low, high int64) (a, b *int64) { return &low, &high }

const (
	namePattern  = `^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`
	envPattern   = `^[A-Za-z_][A-Za-z0-9_]{0,127}$`
	imagePattern = `^[a-z0-9][a-z0-9./:_-]{0,200}(@sha256:[0-9a-f]{64})?$`

	wantName  = "lower-case letters, digits, '-' and '.', at most 63, starting and ending with a letter or digit"
	wantSize  = "a size, such as 512Mi or 4Gi"
	wantTime  = "a duration of at least a second, such as 30m or 12h"
	wantPath  = "an absolute path outside of what belongs to the sandbox"
	wantAsset = "the name of an asset at the broker: " + wantName
)

// Fields lists every field of a job file, in the order in which people write them.
func Fields() []Field {
	gpuLow, gpuHigh := between(0, 16)
	pidLow, pidHigh := between(1, 32768)
	prioLow, prioHigh := between(-MaxPriority, MaxPriority)
	gangLow, gangHigh := between(2, plan.MaxGang)
	retryLow, retryHigh := between(1, plan.MaxRetries)
	exitLow, exitHigh := between(1, 255)
	keepLow, keepHigh := between(1, maxKeep)
	portLow, portHigh := between(1, 65535)
	valueLow, valueHigh := between(1, plan.MaxMetricValues)
	iopsLow, iopsHigh := between(1, 10_000_000)
	eventLow, eventHigh := between(1, MaxEgressEvents)
	nodesLow, nodesHigh := between(1, 1)
	return []Field{
		{Path: "apiVersion", Doc: "The version of the job file.", Want: APIVersion, Example: APIVersion, Required: true, enum: []string{APIVersion}},
		{Path: "name", Doc: "What people call the job.", Want: wantName, Example: "fashion-mnist", Required: true, Planned: true, pattern: namePattern},
		{Path: "image", Doc: "The container image. The node resolves a name to a digest, and the digest is in the plan.",
			Want: "a name, or name@sha256:<digest>", Example: "coffer.local/torch:latest", Required: true, Planned: true, pattern: imagePattern},
		{Path: "command", Doc: "The program, as an absolute path in the image, and its arguments. No shell reads them.",
			Want: "the program and its arguments as a list, the program as an absolute path such as /usr/bin/python3", Example: "[/usr/bin/python3, /app/train.py]",
			Required: true, Planned: true, minItems: 1, firstMatch: "^/"},
		{Path: "env", Doc: "Environment variables. The plan has the names and the digest of each value, never the values.", Want: "names with values", Example: `{EPOCHS: "2"}`, Planned: true},
		{Path: "env.*", Doc: "One variable. A name without a value is one that every submission must set.",
			Want: "a value: write it, or submit with --set env.NAME=VALUE", Example: `"2"`, Planned: true},
		{Path: "inputs", Doc: "Sealed data and weights that the job reads.", Want: fmt.Sprintf("a list of at most %d inputs", MaxInputs), Example: "[]", Default: "none", Planned: true, maxItems: MaxInputs},
		{Path: "inputs[].name", Doc: "What the input is called in the plan.", Want: wantName, Example: "data", Required: true, Planned: true, pattern: namePattern},
		{Path: "inputs[].asset", Doc: "The asset whose key opens it. The plan has the digest of what was sealed.", Want: wantAsset, Example: "fashion-mnist", Required: true, Planned: true, pattern: namePattern},
		{Path: "inputs[].uri", Doc: "Where the sealed folder lies: a folder of the node, or a bucket that the node's configuration lists.",
			Want: "file:///absolute/path, s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix", Example: "file:///var/lib/coffer/demo/fashion-mnist", Required: true},
		{Path: "inputs[].mount", Doc: "Where the job sees it opened, read-only.", Want: wantPath, Example: "/inputs/data", Required: true, Planned: true},
		{Path: "secrets", Doc: "Sealed passwords, tokens and keys. Each is a file for the job alone, in memory: /run/secrets/NAME.", Want: fmt.Sprintf("a list of at most %d secrets", MaxSecrets), Example: "[]", Default: "none", Planned: true, maxItems: MaxSecrets},
		{Path: "secrets[].name", Doc: "The file's name under /run/secrets.", Want: wantName, Example: "api-token", Required: true, Planned: true, pattern: namePattern},
		{Path: "secrets[].asset", Doc: "The asset whose key opens it: one sealed file of at most 64Ki.", Want: wantAsset, Example: "api-token", Required: true, Planned: true, pattern: namePattern},
		{Path: "secrets[].uri", Doc: "Where the sealed folder lies, as for an input.",
			Want: "file:///absolute/path, s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix", Example: "file:///var/lib/coffer/demo/api-token", Required: true},
		{Path: "checkpoints", Doc: "Where the job writes checkpoints, which are sealed as they are written.", Want: "asset, uri and mount", Default: "the job writes none", Planned: true},
		{Path: "checkpoints.asset", Doc: "The asset whose key seals them.", Want: wantAsset, Example: "fashion-mnist-checkpoints", Required: true, Planned: true, pattern: namePattern},
		{Path: "checkpoints.uri", Doc: "The folder of the node, or the prefix in a bucket, into which sealed checkpoints go, each job's into a folder of its own.",
			Want: "file:///absolute/path, s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix", Example: "file:///var/lib/coffer/demo/fashion-mnist-checkpoints", Required: true},
		{Path: "checkpoints.mount", Doc: "Where the job writes them.", Want: wantPath, Example: "/checkpoints", Required: true, Planned: true},
		{Path: "checkpoints.resume", Doc: "Which checkpoint the job goes on from: it sees that one under resume/ below the mount. latest is the newest that the broker countersigned for a job of the same plan.",
			Want: "none, latest, or the digest of a checkpoint as coffer checkpoints ls shows it", Default: resumeNone, Example: "latest", Planned: true},
		{Path: "checkpoints.keep", Doc: "Which sealed checkpoints stay once a newer one is countersigned. The newest always stays.", Want: "last, best or every", Default: "all of them stay"},
		{Path: "checkpoints.keep.last", Doc: "How many of the newest stay.", Want: fmt.Sprintf("1 to %d", maxKeep), Default: "1", Example: "3", min: keepLow, max: keepHigh},
		{Path: "checkpoints.keep.best", Doc: `Those with the best values of a metric stay. The job prints a value as a line of JSON with the checkpoint's name: {"checkpoint": "epoch-3", "accuracy": 0.87}.`,
			Want: "metric and want", Example: "{metric: loss, want: min}"},
		{Path: "checkpoints.keep.best.metric", Doc: "The metric's name in those lines.", Want: "the name of a number that the job reports", Example: "loss", Required: true, pattern: metricForm.String()},
		{Path: "checkpoints.keep.best.want", Doc: "Whether large or small values are good.", Want: "max or min", Example: "min", Required: true, enum: []string{"max", "min"}},
		{Path: "checkpoints.keep.best.count", Doc: "How many of the best stay.", Want: fmt.Sprintf("1 to %d", maxKeep), Default: "1", Example: "2", min: keepLow, max: keepHigh},
		{Path: "checkpoints.keep.every", Doc: "The first of each so long time stays.", Want: wantTime, Example: "6h"},
		{Path: "reseal", Doc: "What a job without a container does: it opens a sealed asset and seals it under another key. It has no image, command, env, inputs, checkpoints, egress or GPUs.",
			Want: "asset, uri, to and out", Default: "the job runs a container", Planned: true},
		{Path: "reseal.asset", Doc: "The asset whose key opens the source. The plan has the digest of what was sealed.", Want: wantAsset, Example: "fashion-mnist", Required: true, Planned: true, pattern: namePattern},
		{Path: "reseal.uri", Doc: "Where the source's sealed folder lies, as for an input.",
			Want: "file:///absolute/path, s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix", Example: "file:///var/lib/coffer/demo/fashion-mnist", Required: true},
		{Path: "reseal.checkpoint", Doc: "Where the asset is that of checkpoints: which one of them is the source.",
			Want: "the digest of a checkpoint", Default: "the asset has a digest", Example: "sha384:" + strings.Repeat("ab", 48), Planned: true},
		{Path: "reseal.to", Doc: "The asset whose key seals it anew. Its digest is open until the job has set it.", Want: wantAsset, Example: "fashion-mnist-2", Required: true, Planned: true, pattern: namePattern},
		{Path: "reseal.out", Doc: "The folder of the node that is made. A job that is submitted again with the same one keeps the files that hold.",
			Want: "file:///absolute/path", Example: "file:///var/lib/coffer/demo/fashion-mnist-2", Required: true},
		{Path: "egress", Doc: "The destinations that the job may reach, over TLS and through the node's gateway. Without any it has no network.",
			Want: fmt.Sprintf("a list of at most %d destinations", plan.MaxEgress), Default: "none", Example: "[{host: metrics.example.com, maxBytes: 16Ki}]", Planned: true, maxItems: plan.MaxEgress},
		{Path: "egress[].host", Doc: "The destination's name. It is what the TLS handshake names.", Want: "a host name: no address, no wildcard, no URL", Example: "metrics.example.com", Required: true, Planned: true},
		{Path: "egress[].port", Doc: "The destination's port.", Want: "1 to 65535", Default: fmt.Sprint(DefaultEgressPort), Example: "443", Planned: true, min: portLow, max: portHigh},
		{Path: "egress[].maxBytes", Doc: "How much the job may send there. It has no default: who approves the plan approves the number.", Want: wantSize, Example: "16Ki", Required: true, Planned: true},
		{Path: "egress[].bytesPerSecond", Doc: "How fast it may send there.", Want: wantSize, Default: "1Mi", Example: "64Ki", Planned: true},
		{Path: "resources", Doc: "What the job may use.", Want: "cpu and memory", Required: true, Planned: true},
		{Path: "resources.cpu", Doc: "Cores, or thousandths of a core.", Want: "a number of cores, such as 2 or 1500m", Example: "2", Required: true, Planned: true},
		{Path: "resources.memory", Doc: "Memory, including the opened inputs. It is at least 64Mi.", Want: wantSize, Example: "4Gi", Required: true, Planned: true},
		{Path: "resources.gpus", Doc: "Whole GPUs, each attested.", Want: "0 to 16", Default: "0", Example: "1", Planned: true, min: gpuLow, max: gpuHigh},
		{Path: "resources.cc", Doc: "What the job asks of confidential computing on its GPUs. off: nothing besides what the attestation policy asks for. on: the node's driver must say that it is on, when the job is taken and when it gets its GPUs. required: the same, and the record of a job that succeeded is false without the driver's word.",
			Want: "off, on or required", Default: "off", Example: "required", Planned: true, enum: []string{ccOff, plan.CCOn, plan.CCRequired}},
		{Path: "resources.nodes", Doc: "Reserved: a job runs on one node.", Want: "1: a job of several nodes is not supported", Default: "1", Example: "1", min: nodesLow, max: nodesHigh},
		{Path: "resources.pids", Doc: "Processes and threads at once.", Want: "1 to 32768", Default: fmt.Sprint(DefaultPids), Example: "512", Planned: true, min: pidLow, max: pidHigh},
		{Path: "resources.shm", Doc: "The size of /dev/shm, which counts as memory.", Want: wantSize, Default: "a quarter of the memory, at most 1Gi", Example: "512Mi", Planned: true},
		{Path: "resources.io", Doc: "How fast the job may use each of the node's disks. Its image, its sealed inputs and its sealed checkpoints are there.", Want: "bounds", Default: "nothing bounds it", Planned: true},
		{Path: "resources.io.readBytesPerSecond", Doc: "How many bytes it may read in a second.", Want: wantSize, Default: "no bound", Example: "200Mi", Planned: true},
		{Path: "resources.io.writeBytesPerSecond", Doc: "How many bytes it may write in a second.", Want: wantSize, Default: "no bound", Example: "100Mi", Planned: true},
		{Path: "resources.io.readsPerSecond", Doc: "How many reads it may make in a second.", Want: "1 to 10000000", Default: "no bound", Example: "5000", Planned: true, min: iopsLow, max: iopsHigh},
		{Path: "resources.io.writesPerSecond", Doc: "How many writes it may make in a second.", Want: "1 to 10000000", Default: "no bound", Example: "5000", Planned: true, min: iopsLow, max: iopsHigh},
		{Path: "maxDuration", Doc: "The job is stopped when it has run so long.", Want: wantTime, Default: "24h", Example: "30m", Planned: true},
		{Path: "budget", Doc: "What all attempts of the job may use together. An attempt uses time from when it gets room on the node. When the budget is spent the job is told to end, with stopGrace for a last checkpoint, and is not tried again.", Want: "time, gpuTime or both", Default: "maxDuration bounds each attempt", Planned: true},
		{Path: "budget.time", Doc: "Time of all attempts together.", Want: wantTime, Example: "2h", Planned: true},
		{Path: "budget.gpuTime", Doc: "Time on GPUs, each counted: two GPUs use an hour of it in half an hour.", Want: wantTime, Example: "2h", Planned: true},
		{Path: "output", Doc: "What may leave the job besides checkpoints.", Want: "bounds", Planned: true},
		{Path: "output.logBytes", Doc: "What the job may print altogether, at most 256Mi.", Want: wantSize, Default: "16Mi", Example: "1Mi", Planned: true},
		{Path: "output.logBytesPerSecond", Doc: "How fast it may print, at most 16Mi.", Want: wantSize, Default: "64Ki", Example: "64Ki", Planned: true},
		{Path: "output.logKey", Doc: "A public key to which the kept log is sealed, so that the node cannot read it later.", Want: "x25519: or mlkem768x25519: and a public key in base64"},
		{Path: "output.logReaders", Doc: "Who may read the log besides the submitter. owners: the owners of the assets that the job names. engineers: everybody with the role of an engineer at the node.",
			Want: "submitter, owners or engineers", Default: "submitter", Example: "owners", Planned: true, enum: []string{readersNobody, plan.ReadersOwners, plan.ReadersEngineers}},
		{Path: "output.egressBytes", Doc: "What the job may send to all destinations of egress together.", Want: wantSize, Default: "the sum of egress[].maxBytes", Example: "16Ki", Planned: true},
		{Path: "output.egressBytesPerSecond", Doc: "How fast it may send altogether.", Want: wantSize, Default: "the fastest of egress[].bytesPerSecond", Example: "64Ki", Planned: true},
		{Path: "output.egressEvents", Doc: "How many different refused destinations are told by name.", Want: fmt.Sprintf("1 to %d", MaxEgressEvents), Default: fmt.Sprint(DefaultEgressEvents), Example: "10", Planned: true, min: eventLow, max: eventHigh},
		{Path: "output.metrics", Doc: `Numbers that people see beside the log, with bounds of their own. The job prints them on standard output, a line of JSON each time: {"step": 10, "loss": 0.42}.`, Want: "names and maxValues", Default: "none", Planned: true},
		{Path: "output.metrics.names", Doc: "The fields of such lines that are metrics. Nothing else in them is.", Want: fmt.Sprintf("a list of at most %d names", plan.MaxMetricNames), Example: "[loss, step]", Required: true, Planned: true, minItems: 1, maxItems: plan.MaxMetricNames},
		{Path: "output.metrics.names[]", Doc: "A metric's name.", Want: "a-z, 0-9 and _, at most 32", Example: "loss", Planned: true, pattern: "^[a-z0-9_]{1,32}$"},
		{Path: "output.metrics.maxValues", Doc: "How many numbers may leave altogether. Each is a double, of 8 bytes.", Want: fmt.Sprintf("1 to %d", plan.MaxMetricValues), Example: "100000", Required: true, Planned: true, min: valueLow, max: valueHigh},
		{Path: "output.metrics.valuesPerSecond", Doc: "How many may leave in a second.", Want: fmt.Sprintf("1 to %d", plan.MaxMetricValues), Default: fmt.Sprintf("%d, or maxValues if that is less", DefaultMetricValuesPerSecond), Example: "50", Planned: true, min: valueLow, max: valueHigh},
		{Path: "output.exitCodes", Doc: "What of the job's exit code people see: all 8 bits, or whether it is 0.", Want: "any or pass-fail", Default: "any", Example: "any", Planned: true, enum: []string{"any", plan.ExitPassFail}},
		{Path: "priority", Doc: "Orders the jobs that wait for room on the node: higher ones first.", Want: fmt.Sprintf("%d to %d", -MaxPriority, MaxPriority), Default: "0", Example: "10", min: prioLow, max: prioHigh},
		{Path: "queue", Doc: "The queue of the node in which the job waits for room. The node's configuration has them, and says who may use which.", Want: wantName, Default: DefaultQueue, Example: "nightly", pattern: namePattern},
		{Path: "retry", Doc: "When a job that failed is tried again. Each attempt is a job of its own, with its own keys and evidence. Refused, revoked and cancelled jobs are never tried again.", Want: "limit", Default: "the job is tried once", Planned: true},
		{Path: "retry.limit", Doc: "How many attempts may follow the first.", Want: fmt.Sprintf("1 to %d attempts after the first", plan.MaxRetries), Example: "2", Required: true, Planned: true, min: retryLow, max: retryHigh},
		{Path: "retry.onExitCodes", Doc: "Exit codes of the job after which it is tried again.", Want: "a list of exit codes", Example: "[75]"},
		{Path: "retry.onExitCodes[]", Doc: "An exit code.", Want: "1 to 255", Example: "75", min: exitLow, max: exitHigh},
		{Path: "retry.onEvents", Doc: "Failures of the machine after which the job is tried again.", Want: "a list of reason codes", Default: "all but deadline, if onExitCodes is absent too", Example: "[lease-lapsed, holder-lost]"},
		{Path: "retry.onEvents[]", Doc: "A reason code.", Want: "some of " + strings.Join(RetryEvents(), ", "), Example: "holder-lost", enum: RetryEvents()},
		{Path: "retry.backoff", Doc: "The pause before the second attempt. Each later pause is twice the one before, up to 1h.", Want: wantTime + ", at most 1h", Default: "10s", Example: "1m"},
		{Path: "reattest", Doc: "How often the running job attests again, with the same keys. An owner of an asset may ask for it more often.", Want: "every", Default: "the job attests once, unless an owner asks for more", Planned: true},
		{Path: "reattest.every", Doc: "The time from one attestation to the next, in whole seconds.", Want: wantTime + ", 2s to 168h", Example: "10m", Required: true, Planned: true},
		{Path: "reattest.within", Doc: "How long a late attestation may take before the job is stopped, and how long a paused job waits: whole seconds, at most 1h.", Want: wantTime, Default: "1m", Example: "2m", Planned: true},
		{Path: "reattest.onFailure", Doc: "What becomes of the job when the verifier refuses it. pause freezes it until an attestation is affirmed, for within and its lease at most; then it is stopped.",
			Want: "stop or pause", Default: plan.ReattestStop, Example: "pause", Planned: true, enum: []string{plan.ReattestStop, plan.ReattestPause}},
		{Path: "gang", Doc: "Has the job begin together with others of its submitter that name the same gang: none gets room before all wait with their approvals and there is room for all. When one fails, the others are stopped. They are jobs of their own, with their own keys and evidence, and have no network between them.", Want: "name and size", Default: "the job begins alone", Planned: true},
		{Path: "gang.name", Doc: "The name that the jobs of the gang share.", Want: wantName, Example: "night-1", Required: true, Planned: true, pattern: namePattern},
		{Path: "gang.size", Doc: "How many jobs the gang has, this one among them.", Want: fmt.Sprintf("2 to %d", plan.MaxGang), Example: "2", Required: true, Planned: true, min: gangLow, max: gangHigh},
		{Path: "stopGrace", Doc: "How long the job may take to end when it is told to, for a last checkpoint: whole seconds, at most 1h.", Want: wantTime, Default: "5s", Example: "30s", Planned: true},
		{Path: "maxWait", Doc: "How long the job may wait for approvals and for room.", Want: wantTime, Default: "168h", Example: "24h"},
		{Path: "evidence", Doc: "How the job's record is kept.", Want: "retain", Default: "the node keeps it", Planned: true},
		{Path: "evidence.retain", Doc: "So long after the job's end the node removes its bundle and its log. A bundle that the evidence log has no entry of stays.", Want: "a duration of at least 24h, such as 720h", Example: "8760h", Required: true, Planned: true},
		{Path: "approvals", Doc: "The groups whose approval the submitter expects. coffer plan and coffer why show them; who must approve is what the owner's policy says.",
			Want: fmt.Sprintf("a list of at most %d names of groups", MaxApprovals), Default: "none is named", Example: "[model-owners]", maxItems: MaxApprovals},
		{Path: "approvals[]", Doc: "The name of a group.", Want: wantName, Example: "model-owners", pattern: namePattern},
		{Path: "attestationPolicy", Doc: "The attestation policy by which the verifier judges the machine. The plan has its digest.", Want: "the name of an attestation policy, such as production",
			Example: "simulation", Required: true, Planned: true, pattern: "^."},
	}
}

var element = regexp.MustCompile(`\[\d+\]`)

// fieldOf returns the field at a place of a job file, or what that is a part of.
func fieldOf(place string) Field {
	place = element.ReplaceAllString(place, "[]")
	if strings.HasPrefix(place, "env.") {
		place = "env.*"
	}
	for ; place != ""; place = place[:max(strings.LastIndexAny(place, ".["), 0)] {
		for _, f := range Fields() {
			if f.Path == place {
				return f
			}
		}
	}
	return Field{Want: "the fields of a job file"}
}
