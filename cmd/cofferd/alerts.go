package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coffer-run/coffer/runner/alerts"
	"github.com/coffer-run/coffer/runner/rules"
)

const (
	// defaultAlertBytes is when a new file of alerts is begun.
	defaultAlertBytes = 64 << 20
	// alertsLast is how long an agent that ends waits for its collector.
	alertsLast = 3 * time.Second
)

// Alerts is where alerts go: to a file or to a collector.
type Alerts struct {
	// File is a file of JSON lines; at FileBytes, 64 MiB if absent, a new one is begun
	// and one old one is kept beside it.
	File      string `json:"file,omitempty"`
	FileBytes int64  `json:"fileBytes,omitempty"`
	// URL takes JSON lines by POST, over https. TokenFile has a bearer token for it,
	// and CAFile the certificates that it may have; the system's if absent.
	URL       string `json:"url,omitempty"`
	TokenFile string `json:"tokenFile,omitempty"`
	CAFile    string `json:"caFile,omitempty"`
}

func (a *Alerts) validate() error {
	if a == nil {
		return nil
	}
	u, err := url.Parse(a.URL)
	switch {
	case (a.File == "") == (a.URL == ""):
		return errors.New("configuration: alerts: want a file or a url")
	case a.File != "" && (!filepath.IsAbs(a.File) || a.FileBytes < 0 || a.TokenFile != "" || a.CAFile != ""):
		return errors.New("configuration: alerts.file: want an absolute path, and nothing that goes with a url")
	case a.URL != "" && (err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || a.FileBytes != 0):
		return errors.New("configuration: alerts.url: want https without a name or a password, which go into tokenFile, and nothing that goes with a file")
	}
	return nil
}

// open returns nil if there is nobody to tell.
func (a *Alerts) open(log *slog.Logger) (*alerts.Sink, error) {
	if a == nil {
		return nil, nil
	}
	if a.File != "" {
		return alerts.NewSink(alerts.File{Path: a.File, MaxBytes: cmp.Or(a.FileBytes, defaultAlertBytes)}, log), nil
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS13}, Proxy: nil}
	if a.CAFile != "" {
		pem, err := os.ReadFile(a.CAFile)
		if err != nil {
			return nil, fmt.Errorf("configuration: alerts.caFile: %w", err)
		}
		transport.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, errors.New("configuration: alerts.caFile: no certificate in it")
		}
	}
	token := ""
	if a.TokenFile != "" {
		b, err := os.ReadFile(a.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("configuration: alerts.tokenFile: %w", err)
		}
		token = strings.TrimSpace(string(b))
	}
	return alerts.NewSink(alerts.NewHTTP(a.URL, token, transport), log), nil
}

func closeAlerts(s *alerts.Sink) {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), alertsLast)
	defer cancel()
	s.Close(ctx)
}

// rules reads the configured rules, or those that ship.
func (c Config) rules() (*rules.Set, error) {
	if c.Rules == "" {
		return rules.Parse(rules.Default)
	}
	b, err := os.ReadFile(c.Rules)
	if err != nil {
		return nil, fmt.Errorf("configuration: rules: %w", err)
	}
	return rules.Parse(b)
}
