package main

import (
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/simulate"
)

var screenshots = flag.String("screenshots", "", "write pictures of the top of the report into this folder")

// browser starts Debian's Chromium and returns what its console said so far.
func browser(t *testing.T) (context.Context, func() []string) {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("chromium is missing: run make deps")
		}
		t.Skip("chromium is missing: run make deps")
	}
	var mu sync.Mutex
	var said []string
	hear := func(ev any) {
		mu.Lock()
		defer mu.Unlock()
		switch e := ev.(type) {
		case *cdplog.EventEntryAdded:
			said = append(said, e.Entry.Text)
		case *runtime.EventConsoleAPICalled:
			said = append(said, string(e.Type))
		case *runtime.EventExceptionThrown:
			said = append(said, e.ExceptionDetails.Text)
		}
	}
	// Root, as which some run these tests, has no browser sandbox.
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU)
	ctx, cancel := chromedp.NewExecAllocator(t.Context(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx, chromedp.WithListener(hear))
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx, chromedp.Navigate("about:blank")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(ctx, time.Minute)
	t.Cleanup(cancel)
	return ctx, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return said
	}
}

// pages writes the reports of a job that went well and of one that was refused.
func pages(t *testing.T) map[string]string {
	t.Helper()
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	vendor, err := simulate.New(simulate.Options{Now: now, Fast: true})
	if err != nil {
		t.Fatal(err)
	}
	lab, err := bundletest.On(vendor.Chip(), vendor.GPUs(), vendor.Anchors(), now)
	if err != nil {
		t.Fatal(err)
	}
	verifierKeys, err := lab.Verifier.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	brokerKeys, err := lab.Broker.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	frameworks, err := (options{report: "-"}).frameworks()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for name, o := range map[string]bundletest.Options{"report": {Reattest: &plan.Reattest{EverySeconds: 60, WithinSeconds: 30, OnFailure: plan.ReattestStop}}, "report-refused": {ID: "job-2", FlipGPU: true}} {
		j, err := lab.Job(o)
		if err != nil {
			t.Fatal(err)
		}
		file, err := j.Bundle()
		if err != nil {
			t.Fatal(err)
		}
		r := verify.Verify(file, verify.Trust{Anchors: lab.Anchors, VerifierKeys: verifierKeys, BrokerKeys: brokerKeys})
		if r.Verdict != verify.Verified {
			t.Fatalf("%s: verdict %s", name, r.Verdict)
		}
		out[name] = filepath.Join(t.TempDir(), name+".html")
		if err := writePage(out[name], r, file, frameworks); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// unreadable lists texts whose contrast is below 4.5 to 1 (WCAG 2.1, 1.4.3), with
// every group opened.
const unreadable = `(() => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const parse = c => (c.match(/[\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const bad = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n; n = texts.nextNode();) {
    if (!n.textContent.trim() || n.parentElement.closest("svg")) continue;
    const [a, b] = [light(parse(getComputedStyle(n.parentElement).color)), light(ground(n.parentElement))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(n.textContent.trim().slice(0, 40));
  }
  return bad;
})()`

// unstructured lists what a reader with a screen reader would stumble over.
const unstructured = `(() => {
  const bad = [];
  if (document.documentElement.lang !== "en") bad.push("no language");
  if (!document.title) bad.push("no title");
  for (const name of ["header", "main", "footer"]) if (document.querySelectorAll(name).length !== 1) bad.push("not one " + name);
  let level = 0;
  for (const h of document.querySelectorAll("h1,h2,h3,h4,h5,h6")) {
    const l = Number(h.tagName[1]);
    if (l > level + 1) bad.push("heading " + h.textContent + " skips a level");
    level = l;
  }
  if (document.querySelectorAll("h1").length !== 1) bad.push("not one h1");
  document.querySelectorAll("table").forEach(t => { if (!t.querySelector("thead th[scope=col]") || !t.querySelector("tbody th[scope=row]")) bad.push("a table without headers: " + t.textContent.slice(0, 40)); });
  const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
  if (new Set(ids).size !== ids.length) bad.push("an id twice");
  document.querySelectorAll("[aria-labelledby]").forEach(e => { if (!document.getElementById(e.getAttribute("aria-labelledby"))) bad.push("a label that is not there"); });
  document.querySelectorAll("svg").forEach(s => { if (!s.getAttribute("aria-label")) bad.push("a picture without words"); });
  return bad;
})()`

// seen is one page as a browser shows it.
type seen struct {
	wide, narrow     int64
	cut              int64 // tables with columns out of sight on a phone
	bad, low         []string
	nodes            []*accessibility.Node
	shot, phone, pdf []byte
	// top and topPhone are what one sees before scrolling.
	top, topPhone []byte
}

func look(ctx context.Context, file string) (seen, error) {
	var s seen
	return s, chromedp.Do(
		ctx,
		chromedp.EmulateViewport(1000, 1400),
		chromedp.Navigate("file://"+file),
		into(&s.wide, chromedp.Evaluate[int64](`document.scrollingElement.scrollWidth`)),
		into(&s.top, chromedp.CaptureScreenshot()),
		into(&s.shot, chromedp.FullScreenshot(100)),
		into(&s.bad, chromedp.Evaluate[[]string](unstructured)),
		into(&s.nodes, func(ctx context.Context, t *chromedp.Target) ([]*accessibility.Node, error) {
			r, err := cdp.Call(ctx, t, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
			return r.Nodes, err
		}),
		into(&s.pdf, chromedp.PrintToPDF(chromedp.PDFPaper(chromedp.PaperA4))),
		chromedp.EmulateViewport(360, 740),
		into(&s.topPhone, chromedp.CaptureScreenshot()),
		into(&s.phone, chromedp.FullScreenshot(100)),
		// From here on every group is open.
		into(&s.low, chromedp.Evaluate[[]string](unreadable)),
		into(&s.narrow, chromedp.Evaluate[int64](`document.scrollingElement.scrollWidth`)),
		into(&s.cut, chromedp.Evaluate[int64](`[...document.querySelectorAll(".scroll:has(table.wide)")].filter(e => e.scrollWidth > e.clientWidth || !e.innerHTML.includes("data-label")).length`)),
	)
}

// into stores what an action returns.
func into[T any](to *T, a chromedp.Action[T]) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) (err error) {
		*to, err = a(ctx, t)
		return err
	})
}

func TestReportInBrowser(t *testing.T) {
	ctx, console := browser(t)
	for name, file := range pages(t) {
		s, err := look(ctx, file)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if s.cut > 0 {
			t.Errorf("%s: %d tables are cut on a phone", name, s.cut)
		}
		if s.wide > 1000 || s.narrow > 360 {
			t.Errorf("%s: %d wide of 1000, and %d of a phone's 360", name, s.wide, s.narrow)
		}
		if len(s.bad) > 0 || len(s.low) > 0 {
			t.Errorf("%s: structure %q, contrast %q", name, s.bad, s.low)
		}
		for _, n := range s.nodes {
			if n.Ignored || n.Role == nil {
				continue
			}
			role := strings.Trim(string(n.Role.Value), `"`)
			named := n.Name != nil && strings.Trim(string(n.Name.Value), `"`) != ""
			if !named && slices.Contains([]string{"heading", "image", "region", "RootWebArea"}, role) {
				t.Errorf("%s: a %s without a name", name, role)
			}
		}
		if len(s.nodes) < 100 || !strings.HasPrefix(string(s.pdf), "%PDF-") || len(s.shot) < 10_000 || len(s.phone) < 10_000 {
			t.Errorf("%s: %d nodes, %d bytes of PDF, pictures of %d and %d bytes", name, len(s.nodes), len(s.pdf), len(s.shot), len(s.phone))
		}
		if *screenshots == "" {
			continue
		}
		for suffix, b := range map[string][]byte{".png": s.top, "-phone.png": s.topPhone} {
			if err := os.WriteFile(filepath.Join(*screenshots, name+suffix), b, 0o644); err != nil { //nolint:gosec // a picture for readers
				t.Fatal(err)
			}
		}
	}
	if said := console(); len(said) > 0 {
		t.Errorf("the console says %q", said)
	}
	// What would be heard is heard.
	if err := chromedp.Do(ctx, into(new(bool), chromedp.Evaluate[bool](`console.error("heard"), document.body.innerHTML += "<img src=//other.test/x>", true`))); err != nil {
		t.Fatal(err)
	}
	if said := console(); len(said) < 2 || !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, "Content Security Policy") }) {
		t.Errorf("an error and a picture from elsewhere, and the console says %q", said)
	}
}

// TestPageReplacesWholeFiles writes where a folder is, and where links to another file
// wait: at the page's own name, and at one that it could be written under first.
func TestPageReplacesWholeFiles(t *testing.T) {
	dir := t.TempDir()
	folder := filepath.Join(dir, "folder.html")
	if err := os.MkdirAll(filepath.Join(folder, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writePage(folder, verify.Report{Outcome: bundle.Outcome{}}, nil, nil); err == nil {
		t.Fatal("written over a folder")
	}
	path, other := filepath.Join(dir, "page.html"), filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{path, path + ".part"} {
		if err := os.Symlink(other, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := writePage(path, verify.Report{Outcome: bundle.Outcome{}}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(other); err != nil || string(b) != "before" {
		t.Errorf("another file was written: %q, %v", b, err)
	}
	if i, err := os.Lstat(path); err != nil || !i.Mode().IsRegular() || i.Mode().Perm() != 0o644 {
		t.Errorf("the page is no file of its own: %v, %v", i, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 4 {
		t.Errorf("%d files are left, %v", len(left), err)
	}
}
