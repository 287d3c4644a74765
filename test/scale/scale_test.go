// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestRun measures a small cluster, which asks of the server that the daemon
// takes it for one, and of the daemon that the kernel follows what it is told.
func TestRun(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces and bpffs need root")
	}
	out := t.TempDir()
	o := options{rate: 200, churn: 3 * time.Second, rest: time.Second, source: "../.."}
	if err := run(t.Context(), o, "300,600", out); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(out, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var results []result
	if err := json.Unmarshal(b, &results); err != nil {
		t.Fatal(err)
	}
	if len(results) != 2 {
		t.Fatalf("results %s", b)
	}
	for _, r := range results {
		if r.Endpoints == 0 || r.RSS == 0 || r.Latency.Count < 6 || r.Rate == 0 || r.StartBytes == 0 {
			t.Errorf("measured %+v", r)
		}
	}
	for _, f := range figures() {
		if _, err := os.Stat(filepath.Join(out, f.file)); err != nil {
			t.Error(err)
		}
	}
}
