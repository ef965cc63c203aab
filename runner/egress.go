package runner

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/egress"
	"github.com/coffer-run/coffer/runner/egress/gate"
	"github.com/coffer-run/coffer/runner/rules"
	"github.com/coffer-run/coffer/runner/sandbox"
)

const (
	// egressPace is the least time between two questions to a gateway, and so the
	// least between two events about one destination.
	egressPace = 250 * time.Millisecond
	// egressTimeout bounds a question to a gateway.
	egressTimeout = 10 * time.Second
	// ruleDirect is why a connection failed that did not go to the gateway at all: the
	// trace shows the attempt, and the sandbox has no route.
	ruleDirect = "not-through-the-gateway"
	// gatewayLost is what a gateway says that stands in the place of one that died.
	gatewayLost = "gateway-lost"
	// maxSuspects bounds what is kept of the trace to tell who was refused.
	maxSuspects = 1000
	// suspectTime is how long before a refusal its connection can have begun.
	suspectTime = 20 * time.Second
)

// gatewayRoom is what a gateway may use: it does not count against the job.
var gatewayRoom = plan.Resources{CPUMillis: 1000, MemoryBytes: 256 << 20, Pids: 64}

// jobEgress is what the agent knows of a job's gateway.
type jobEgress struct {
	mu       sync.Mutex // guards what follows
	gateway  *egress.Gateway
	lost     bool
	sequence uint64
	// connections and denials are the gateway's, by number; direct are those that
	// only the trace shows.
	connections []bundle.Connection
	denials     []bundle.Denial
	direct      []bundle.Denial
	// untold counts the gateway's refusals that it does not name, and unnamed those of
	// the trace.
	untold, unnamed int64
	closed          string
	// What the trace shows: who connected to the gateway and when, and which programs
	// there are by the names that their processes have.
	suspects []suspect
	programs map[string]string
}

type suspect struct {
	unixNano int64
	process  string
}

// offersEgress says whether this node can run a job with this plan.
func (a *Agent) offersEgress(p plan.Plan) error {
	if len(p.Egress) > 0 && a.Egress == nil {
		return errors.New("this node offers no network: the job file asks for egress")
	}
	return nil
}

func (a *Agent) gatewayCgroup(j *Job) string { return sandbox.JobCgroup(a.Cgroup, j.id) + "-gateway" }

// openEgress gives a job whose plan allows egress its way to the network, and others
// none.
func (a *Agent) openEgress(ctx context.Context, j *Job) (*sandbox.Network, error) {
	if len(j.plan.Egress) == 0 {
		return nil, nil
	}
	if err := a.offersEgress(j.plan); err != nil {
		return nil, err
	}
	group, err := sandbox.CreateCgroup(a.gatewayCgroup(j), gatewayRoom)
	if err != nil {
		return nil, err
	}
	g, err := a.Egress.Open(ctx, j.runDir, j.plan, group.Add)
	if err != nil {
		return nil, err
	}
	j.egress = &jobEgress{gateway: g, programs: map[string]string{}}
	return &sandbox.Network{Namespace: egress.Namespace(j.runDir), Resolver: egress.Resolver(j.runDir), Proxy: egress.Proxy()}, nil
}

// attachEgress finds the gateway of a job that goes on. One that is gone is replaced
// by one that lets nothing through.
func (a *Agent) attachEgress(ctx context.Context, j *Job) error {
	if len(j.plan.Egress) == 0 {
		return nil
	}
	if err := a.offersEgress(j.plan); err != nil {
		return err
	}
	j.egress = &jobEgress{programs: map[string]string{}}
	g, err := egress.Attach(ctx, j.runDir)
	if err != nil {
		a.log.WarnContext(ctx, "the job's gateway is gone", slog.String("job", j.id), slog.Any("error", err))
		return a.replaceGateway(ctx, j)
	}
	j.egress.gateway = g
	return nil
}

func (a *Agent) replaceGateway(ctx context.Context, j *Job) error {
	e := j.egress
	e.mu.Lock()
	e.lost, e.closed = true, gatewayLost
	e.mu.Unlock()
	// Whatever is left of the one before goes first.
	if err := sandbox.OpenCgroup(a.gatewayCgroup(j)).Remove(); err != nil {
		return err
	}
	group, err := sandbox.CreateCgroup(a.gatewayCgroup(j), gatewayRoom)
	if err != nil {
		return err
	}
	g, err := a.Egress.Replace(ctx, j.runDir, gatewayLost, group.Add)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.gateway = g
	return nil
}

// recheckEgress is part of the start: the gateway's namespace is as it was made.
func (j *Job) recheckEgress() error {
	if j.egress == nil {
		return nil
	}
	return j.egress.gateway.Recheck()
}

// followEgress passes on what the gateway does, until the job is over.
func (a *Agent) followEgress(j *Job) {
	if j.egress == nil {
		return
	}
	ctx, cancel := context.WithCancel(a.ctx)
	go func() {
		defer cancel()
		select {
		case <-j.finished:
		case <-ctx.Done():
		}
	}()
	j.pumps.Go(func() {
		defer cancel()
		for ctx.Err() == nil {
			if err := a.pollEgress(ctx, j, pollWait); err != nil && ctx.Err() == nil {
				a.log.WarnContext(ctx, "the job's gateway is gone", slog.String("job", j.id), slog.Any("error", err))
				if err := a.replaceGateway(ctx, j); err != nil {
					// There is none now, which is as closed as one can be.
					a.log.ErrorContext(ctx, "replace gateway", slog.String("job", j.id), slog.Any("error", err))
					return
				}
			}
			select {
			case <-time.After(egressPace):
			case <-ctx.Done():
			}
		}
	})
}

// pollEgress asks the gateway for news and passes them on.
func (a *Agent) pollEgress(ctx context.Context, j *Job, wait time.Duration) error {
	ask, cancel := context.WithTimeout(ctx, egressTimeout)
	defer cancel()
	e := j.egress
	e.mu.Lock()
	gateway, after, lost := e.gateway, e.sequence, e.lost
	e.mu.Unlock()
	if lost {
		wait = pollWait
		after = 0
	}
	if gateway == nil {
		return errors.New("the job has no gateway")
	}
	r, err := gateway.Report(ask, after, wait)
	if err != nil {
		return err
	}
	for _, event := range e.note(r) {
		a.tellEgress(ctx, j, event)
	}
	a.lookAtSent(ctx, j)
	return nil
}

// tellEgress tells the watchers, and the rules where a budget is used up.
func (a *Agent) tellEgress(ctx context.Context, j *Job, e *agentv1.EgressEvent) {
	a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Egress{Egress: e}})
	if e.GetRule() == gate.RuleBudget {
		a.find(ctx, j, rules.Event{Kind: rules.EgressCut, At: time.Now(), Address: net.JoinHostPort(e.GetHost(), strconv.Itoa(int(e.GetPort())))}, 0)
	}
}

// note takes a report in and returns what watchers are told: connections that
// ended, and refusals, each when it came first and when its count has doubled.
func (e *jobEgress) note(r gate.Report) []*agentv1.EgressEvent {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r.Closed == gatewayLost {
		// An agent that was restarted learns of the death from the one in its place.
		e.lost, e.closed = true, gatewayLost
	}
	if e.lost {
		// The one in its place numbers anew, and its refusals say nothing new.
		return nil
	}
	e.sequence, e.closed, e.untold = r.Sequence, r.Closed, r.Untold
	var out []*agentv1.EgressEvent
	for _, c := range r.Connections {
		if c.Number < 0 || c.Number > len(e.connections) {
			continue // they come in order
		}
		if c.Number == len(e.connections) {
			e.connections = append(e.connections, bundle.Connection{})
		}
		was := e.connections[c.Number].End
		e.connections[c.Number] = bundle.Connection{
			Host: c.Host, Port: c.Port, Address: c.Address, StartUnixNano: c.StartUnixNano, Nanos: c.Nanos, Sent: c.Sent, Received: c.Received, End: c.End,
		}
		if was == "" && c.End != "" {
			out = append(out, &agentv1.EgressEvent{Host: c.Host, Port: int32(c.Port), Sent: c.Sent, Received: c.Received, End: c.End}) //nolint:gosec // a port fits
		}
	}
	for _, d := range r.Denials {
		if d.Number < 0 || d.Number > len(e.denials) {
			continue
		}
		if d.Number == len(e.denials) {
			e.denials = append(e.denials, bundle.Denial{FirstUnixNano: d.FirstUnixNano, Host: d.Host, Port: d.Port, Rule: d.Rule})
		}
		known := &e.denials[d.Number]
		before := known.Count
		known.Count = d.Count
		e.attribute(known)
		if doubled(before, d.Count) {
			out = append(out, denialEvent(*known))
		}
	}
	return out
}

// doubled reports whether a count has passed a power of two.
func doubled(before, after int64) bool {
	for n := int64(1); n <= after && n > 0; n *= 2 {
		if before < n {
			return true
		}
	}
	return false
}

func denialEvent(d bundle.Denial) *agentv1.EgressEvent {
	return &agentv1.EgressEvent{Host: d.Host, Port: int32(d.Port), Rule: d.Rule, Count: d.Count, Process: d.Process, Digest: d.Digest} //nolint:gosec // a port fits
}

// attribute names the program that was refused, if only one connected to the gateway
// in that time. e.mu is held.
func (e *jobEgress) attribute(d *bundle.Denial) {
	if d.Process != "" {
		return
	}
	found := ""
	for _, s := range e.suspects {
		if s.unixNano > d.FirstUnixNano || s.unixNano < d.FirstUnixNano-suspectTime.Nanoseconds() {
			continue
		}
		if found != "" && found != s.process {
			return
		}
		found = s.process
	}
	d.Process, d.Digest = found, e.programs[found]
}

// saw takes in what the trace shows and returns a refusal that only it shows: a
// connection that was not for the gateway.
func (e *jobEgress) saw(ev holdapi.Event, budget int64) *agentv1.EgressEvent {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch ev.Kind {
	case bundle.EventExec:
		// The holder names a process after its program. Two programs of one name are
		// told apart by nothing.
		name := path.Base(ev.Detail)
		if known, ok := e.programs[name]; ok && known != ev.Digest {
			e.programs[name] = ""
		} else if len(e.programs) < maxSuspects {
			e.programs[name] = ev.Digest
		}
	case "connect":
		if egress.Is(ev.Detail) {
			if len(e.suspects) == maxSuspects {
				e.suspects = slices.Delete(e.suspects, 0, maxSuspects/2)
			}
			e.suspects = append(e.suspects, suspect{ev.UnixNano, ev.Process})
			return nil
		}
		at, err := netip.ParseAddrPort(ev.Detail)
		if err != nil {
			return nil // a unix socket
		}
		host := at.Addr().String()
		i := slices.IndexFunc(e.direct, func(d bundle.Denial) bool {
			return d.Host == host && d.Port == int(at.Port()) && d.Process == ev.Process
		})
		if i < 0 {
			if int64(len(e.direct)) >= budget {
				e.unnamed++
				return nil
			}
			i = len(e.direct)
			e.direct = append(e.direct, bundle.Denial{FirstUnixNano: ev.UnixNano, Host: host, Port: int(at.Port()), Rule: ruleDirect, Process: ev.Process, Digest: e.programs[ev.Process]})
		}
		e.direct[i].Count++
		if doubled(e.direct[i].Count-1, e.direct[i].Count) {
			return denialEvent(e.direct[i])
		}
	}
	return nil
}

// sawEgress passes on what the trace shows of a job's connections.
func (a *Agent) sawEgress(ctx context.Context, j *Job, e holdapi.Event) {
	if event := j.egress.saw(e, j.plan.Output.EgressEvents); event != nil {
		a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Egress{Egress: event}})
	}
}

// closeEgress cuts a job's connections and lets none through any more.
func (a *Agent) closeEgress(ctx context.Context, j *Job, why string) {
	if j.egress == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), egressTimeout)
	defer cancel()
	j.egress.mu.Lock()
	gateway := j.egress.gateway
	j.egress.mu.Unlock()
	if gateway == nil {
		return
	}
	if err := gateway.Close(ctx, why); err != nil {
		a.log.WarnContext(ctx, "close gateway", slog.String("job", j.id), slog.Any("error", err))
		// Without its process there are no sockets.
		if err := sandbox.OpenCgroup(a.gatewayCgroup(j)).Remove(); err != nil {
			a.log.ErrorContext(ctx, "end gateway", slog.String("job", j.id), slog.Any("error", err))
		}
	}
}

// stopWord is why a job's connections are cut, in a word.
func stopWord(reason error) string {
	var stop *stopError
	if errors.As(reason, &stop) {
		return stop.code
	}
	return "job-stopped"
}

// report is everything that the agent knows of a job's connections. Between the
// gateway's refusals and those of the trace, the plan's budget of names holds.
func (e *jobEgress) report(events int64, dropped map[string]int64) bundle.Egress {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.denials {
		e.attribute(&e.denials[i])
	}
	out := bundle.Egress{
		Connections: append([]bundle.Connection{}, e.connections...), Denials: append(append([]bundle.Denial{}, e.denials...), e.direct...),
		Untold: e.untold + e.unnamed, Dropped: dropped, Closed: e.closed, Lost: e.lost,
	}
	slices.SortStableFunc(out.Denials, func(a, b bundle.Denial) int { return int(min(1, max(-1, a.FirstUnixNano-b.FirstUnixNano))) })
	for int64(len(out.Denials)) > events {
		last := out.Denials[len(out.Denials)-1]
		out.Untold += last.Count
		out.Denials = out.Denials[:len(out.Denials)-1]
	}
	return out
}

// addEgress puts the record into the bundle. The container is gone and the trace has
// been read to its end.
func (a *Agent) addEgress(ctx context.Context, j *Job, b *bundle.Builder) error {
	if len(j.plan.Egress) == 0 || j.egress == nil && !j.started() {
		return nil
	}
	dropped, err := a.lastEgress(ctx, j)
	if err != nil {
		// Whatever is missing, the record says that something is.
		a.log.WarnContext(ctx, "the record of the job's connections has a gap", slog.String("job", j.id), slog.Any("error", err))
		j.egress.mu.Lock()
		j.egress.lost = true
		j.egress.mu.Unlock()
	}
	return b.AddJSON(bundle.EgressPart, j.egress.report(j.plan.Output.EgressEvents, dropped))
}

// started reports whether the job's container was started.
func (j *Job) started() bool {
	return slices.ContainsFunc(j.timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageStart && s.Outcome == bundle.StepDone })
}

// lastEgress closes the gateway and asks it for the last time. A job that was taken up
// only to be concluded finds its gateway here.
func (a *Agent) lastEgress(ctx context.Context, j *Job) (egress.Dropped, error) {
	if j.egress == nil {
		j.egress = &jobEgress{programs: map[string]string{}}
		g, err := egress.Attach(ctx, j.runDir)
		if err != nil {
			return nil, err
		}
		j.egress.gateway = g
	}
	a.closeEgress(ctx, j, "job-ended")
	if err := a.pollEgress(ctx, j, 0); err != nil {
		return nil, err
	}
	j.egress.mu.Lock()
	gateway := j.egress.gateway
	j.egress.mu.Unlock()
	return gateway.Dropped()
}

// removeEgress lets go of everything that openEgress made.
func (a *Agent) removeEgress(j *Job) error {
	if j.egress != nil && j.egress.gateway != nil {
		j.egress.gateway.Detach()
	}
	return errors.Join(sandbox.OpenCgroup(a.gatewayCgroup(j)).Remove(), egress.Remove(j.runDir))
}
