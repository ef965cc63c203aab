package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/coffer-run/coffer/internal/stack"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// Bounds of the live view. A job may print as it likes; the view stays one screen.
const (
	liveLines   = 8   // of the job's output
	liveSaid    = 4   // of what coffer says of the job
	liveMetrics = 4   // plotted
	maxMetrics  = 16  // remembered
	plotWidth   = 40  // values in a plot, a character each
	maxSamples  = 400 // of one metric
)

// live is what a terminal shows of a job while it goes on. It is built from events
// alone, so that what it shows can be tested without a terminal.
type live struct {
	job, name string
	stages    []liveStage
	queue     string
	going     transfers
	// metrics in the order in which the job printed them first.
	metrics []metric
	out     [2]lines
	// tail is what the job printed last. said is what coffer said of it last, beside its
	// stages, and told how much that was: the job can neither write it nor push it out.
	tail   []string
	said   []string
	told   int
	sealed int
	bytes  int64
	last   string
	notice string
	// now is the time of the last tick.
	now      time.Time
	width    int
	height   int
	detached bool
	done     bool
	err      error
}

type liveStage struct {
	name, phase, detail string
	began               time.Time
	took                time.Duration
}

type metric struct {
	name   string
	values []float64
}

// Messages to the view.
type (
	eventMsg  struct{ event *agentv1.WatchResponse }
	noticeMsg string
	overMsg   struct{ err error }
	tickMsg   time.Time
)

const tickEvery = 200 * time.Millisecond

func tick() tea.Cmd { return tea.Tick(tickEvery, func(t time.Time) tea.Msg { return tickMsg(t) }) }

// Init starts the clock.
func (l *live) Init() tea.Cmd { return tick() }

// Update takes one message.
func (l *live) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch m := msg.(type) {
	case tea.KeyPressMsg:
		if s := m.String(); s == "ctrl+c" || s == "q" {
			l.detached = true
			return l, tea.Quit
		}
	case tea.WindowSizeMsg:
		l.width, l.height = m.Width, m.Height
	case tickMsg:
		l.now = time.Time(m)
		return l, tick()
	case noticeMsg:
		l.notice = clean(strings.TrimSpace(string(m)))
	case eventMsg:
		l.notice = ""
		l.event(m.event)
	case overMsg:
		l.done, l.err = true, m.err
		return l, tea.Quit
	}
	return l, nil
}

// event takes one event of the job.
func (l *live) event(e *agentv1.WatchResponse) {
	switch {
	case e.GetStage() != nil:
		s := e.GetStage()
		at := time.Unix(0, e.GetTimeUnixNano())
		i := slices.IndexFunc(l.stages, func(t liveStage) bool { return t.name == s.GetStage() })
		if i < 0 {
			l.stages = append(l.stages, liveStage{name: s.GetStage(), began: at})
			i = len(l.stages) - 1
		}
		t := &l.stages[i]
		if s.GetPhase() == phaseStarted {
			t.began = at
		}
		t.phase, t.took, t.detail = s.GetPhase(), time.Duration(s.GetDurationNanos()), s.GetDetail()
		l.queue = ""
	case e.GetProgress() != nil:
		l.going.take(e.GetProgress().GetGoing(), time.Unix(0, e.GetTimeUnixNano()))
	case e.GetQueue() != nil:
		l.queue = queueLine(e.GetQueue())
	case e.GetLog() != nil:
		i := 0
		if e.GetLog().GetStream() == "stderr" {
			i = 1
		}
		l.out[i].each = l.line
		_ = l.out[i].write(e.GetLog().GetData()) // it writes nowhere
	case e.GetCheckpoint() != nil:
		k := e.GetCheckpoint()
		if k.GetAnchored() {
			return
		}
		l.sealed++
		l.bytes += k.GetBytes()
		l.last = fmt.Sprintf("#%d %s", k.GetSequence(), k.GetName())
	case e.GetLogCut() != nil:
		l.notice = logCutLine(e.GetLogCut())
	case e.GetAlert() != nil:
		l.say("rule " + clean(e.GetAlert().GetRule()+": "+e.GetAlert().GetSays()))
	default:
		if line := eventLine(e); line != "" {
			l.say(line)
		}
	}
}

// say keeps a line of coffer's own.
func (l *live) say(s string) {
	l.said, l.told = append(l.said, s), l.told+1
	if n := len(l.said) - liveSaid; n > 0 {
		l.said = l.said[n:]
	}
}

// line takes a line that the job printed.
func (l *live) line(s string) {
	l.tail = append(l.tail, s)
	if n := len(l.tail) - liveLines; n > 0 {
		l.tail = l.tail[n:]
	}
	for _, m := range readMetrics(s) {
		i := slices.IndexFunc(l.metrics, func(have metric) bool { return have.name == m.name })
		switch {
		case i < 0 && len(l.metrics) < maxMetrics:
			l.metrics = append(l.metrics, m)
		case i >= 0:
			v := append(l.metrics[i].values, m.values...)
			l.metrics[i].values = v[max(len(v)-maxSamples, 0):]
		}
	}
}

// readMetrics returns the numbers of a line that is a JSON object, by name. Counters
// of the loop are no metrics.
func readMetrics(s string) []metric {
	if !strings.HasPrefix(s, "{") || len(s) > maxLine {
		return nil
	}
	var object map[string]any
	if json.Unmarshal([]byte(s), &object) != nil {
		return nil
	}
	var out []metric
	for k, v := range object {
		if f, ok := v.(float64); ok && k != "step" && k != "epoch" && k != "time" && len(k) <= 32 {
			out = append(out, metric{clean(k), []float64{f}})
		}
	}
	slices.SortFunc(out, func(a, b metric) int { return strings.Compare(a.name, b.name) })
	return out
}

var bars = []rune("▁▂▃▄▅▆▇█")

// plot draws values as a row of bars, the smallest as the lowest. Where there are
// more than fit, each bar is the mean of as many as it stands for.
func plot(values []float64, width int) string {
	if len(values) == 0 || width < 1 {
		return ""
	}
	n := min(width, len(values))
	means := make([]float64, n)
	for i := range n {
		from, to := i*len(values)/n, (i+1)*len(values)/n
		for _, v := range values[from:to] {
			means[i] += v / float64(to-from)
		}
	}
	low, high := slices.Min(means), slices.Max(means)
	var b strings.Builder
	for _, v := range means {
		at := len(bars) / 2
		if high > low {
			at = int((v - low) / (high - low) * float64(len(bars)-1))
		}
		b.WriteRune(bars[min(max(at, 0), len(bars)-1)])
	}
	return b.String()
}

// Styles, in colours that every terminal has. The program takes them away where
// NO_COLOR says so.
const (
	green, red, yellow, dim, bold, plain = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
)

// View draws the state.
func (l *live) View() tea.View { return tea.NewView(l.text()) }

func (l *live) text() string {
	var b strings.Builder
	say := func(style, format string, args ...any) {
		s := fmt.Sprintf(format, args...)
		if r := []rune(s); l.width > 0 && len(r) > l.width {
			s = string(r[:l.width])
		}
		fmt.Fprintf(&b, "%s%s%s\n", style, s, plain)
	}
	say(bold, "job %s  %s", l.job, clean(l.name))
	for _, s := range l.stages {
		name, detail := clean(s.name), clean(s.detail)
		switch s.phase {
		case phaseDone:
			say(green, "  ✓ %-10s %8s  %s", name, took(s.took), detail)
		case phaseFailed:
			say(red, "  ✗ %-10s %8s", name, took(s.took)) // why comes at the end, in full
		case phaseWaiting:
			say(yellow, "  … %-10s %8s  waits: %s", name, l.since(s.began), detail)
		default:
			say("", "  … %-10s %8s", name, l.since(s.began))
		}
	}
	if !l.done {
		for _, g := range l.going {
			say("", "    %s", g.line())
		}
	}
	if l.queue != "" {
		say(yellow, "  … %s", l.queue)
	}
	if l.sealed > 0 {
		say("", "  checkpoints %d sealed, %s, last %s", l.sealed, stack.Bytes(l.bytes), clean(l.last))
	}
	for _, m := range l.metrics[:min(len(l.metrics), liveMetrics)] {
		say("", "  %-12s %10.4g  %s", m.name, m.values[len(m.values)-1], plot(m.values, min(plotWidth, max(l.width-27, 8))))
	}
	if n := l.told - len(l.said); n > 0 {
		say(yellow, "%s%d before these: `coffer events %s`", saidMark, n, l.job)
	}
	for _, s := range l.said {
		say(yellow, "%s%s", saidMark, s)
	}
	tail := l.tail
	if room := l.height - strings.Count(b.String(), "\n") - 3; l.height > 0 && len(tail) > max(room, 1) {
		tail = tail[len(tail)-max(room, 1):]
	}
	for _, t := range tail {
		say(dim, "%s%s", jobMark, t)
	}
	switch {
	case l.notice != "":
		say(yellow, "%s", l.notice)
	case !l.done && !l.detached:
		say(dim, "Ctrl-C detaches; the job goes on")
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func (l *live) since(t time.Time) string {
	if t.IsZero() || l.now.Before(t) {
		return "-"
	}
	return l.now.Sub(t).Round(time.Second).String()
}

// notices passes on what the command says beside the events.
type notices struct{ send func(tea.Msg) }

func (n notices) Write(b []byte) (int, error) {
	n.send(noticeMsg(b))
	return len(b), nil
}

// watchLive shows a job on a terminal until it has ended or the user detaches.
func (c *cli) watchLive(ctx context.Context, a agentv1connect.AgentServiceClient, id, name string) (detached bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l := &live{job: id, name: name, now: time.Now()}
	p := tea.NewProgram(l, tea.WithContext(ctx), tea.WithInput(c.stdin), tea.WithOutput(raw(c.stdout)), tea.WithoutSignalHandler(), tea.WithEnvironment(os.Environ()))
	follower := *c
	follower.stderr = notices{p.Send}
	over := make(chan struct{})
	go func() {
		defer close(over)
		err := follower.events(ctx, a, id, true, func(e *agentv1.WatchResponse) error {
			p.Send(eventMsg{e})
			return nil
		})
		p.Send(overMsg{err})
	}()
	_, err = p.Run()
	stopped := ctx.Err() != nil
	cancel()
	<-over
	switch {
	case l.detached || stopped:
		return true, nil
	case err != nil && !errors.Is(err, tea.ErrProgramKilled):
		return false, err
	}
	return false, l.err
}

// canLive reports whether the live view can be shown: on a terminal that can move
// its cursor.
func (c *cli) canLive() bool {
	t := os.Getenv("TERM")
	return terminal(c.stdout) && t != "" && t != "dumb"
}
