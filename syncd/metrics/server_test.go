// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package metrics

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/syncd/status"
)

func TestServer(t *testing.T) {
	now := time.Now()
	well := status.Status{Updated: now, Applied: now, Synced: now}
	problem := []source.Problem{{Subject: "kernel state", Reason: "no room"}}
	for name, tt := range map[string]struct {
		reports        []status.Status
		alive, ready   int
		reason, metric string
	}{
		"begins":           {nil, 200, 503, "nothing applied yet", ""},
		"cannot sync":      {[]status.Status{{Updated: now, Problems: problem}}, 200, 503, "kernel state: no room", `podgate_sync_problems{subject="kernel state"} 1`},
		"lacks room":       {[]status.Status{{Updated: now, Applied: now, Problems: problem}}, 200, 200, "ok", `podgate_sync_problems{subject="kernel state"} 1`},
		"well":             {[]status.Status{well}, 200, 200, "ok", "podgate_sync_last_success_timestamp_seconds"},
		"has had problems": {[]status.Status{{Updated: now, Applied: now, Synced: now, Problems: problem}, well}, 200, 200, "ok", `podgate_endpoints{state="closed"} 0`},
		"has problems":     {[]status.Status{well, {Updated: now, Applied: now, Synced: now, Problems: problem}}, 200, 200, "ok", "podgate_sync_problems"},
		"hangs":            {[]status.Status{{Updated: now.Add(-4 * status.Interval), Applied: now, Synced: now}}, 503, 200, "ok", "process_open_fds"},
	} {
		t.Run(name, func(t *testing.T) {
			figures, health := NewDaemon(), NewHealth()
			for _, s := range tt.reports {
				figures.Report(s, nil, nil)
				health.Report(s)
			}
			server := httptest.NewServer(Server{Gatherer: NewRegistry(figures), Health: health}.Handler())
			defer server.Close()
			get := func(path string) (int, string) {
				resp, err := http.Get(server.URL + path)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatal(err)
				}
				return resp.StatusCode, string(body)
			}
			if code, body := get("/healthz"); code != tt.alive {
				t.Errorf("/healthz: %d %s", code, body)
			}
			if code, body := get("/readyz"); code != tt.ready || !strings.Contains(body, tt.reason) {
				t.Errorf("/readyz: %d %s", code, body)
			}
			if code, body := get("/metrics"); code != 200 || !strings.Contains(body, tt.metric) {
				t.Errorf("/metrics: %d %s", code, body)
			}
		})
	}
}

func TestServe(t *testing.T) {
	server := Server{Gatherer: NewRegistry(), Health: NewHealth()}
	if err := server.Serve(t.Context(), "127.0.0.1:nope"); err == nil || !strings.Contains(err.Error(), "nope") {
		t.Errorf("serve at a port that is none: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(ctx, "127.0.0.1:0") }()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("serve until the end: %v", err)
	}
}
