// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/podgate/podgate/test/e2e/build"
	"github.com/podgate/podgate/test/e2e/cluster"
)

// enabled is the environment variable without which no cluster is started: one
// takes the machine for hours.
const enabled = "PODGATE_E2E"

// bare is the environment variable that leaves podgate out, to see what the
// tests themselves get wrong on a machine.
const bare = "PODGATE_E2E_BARE"

// suite is a set of tests on one cluster.
type suite struct {
	*cluster.Cluster
	// reports is the directory for the output of other projects' tests.
	reports string
	// cache is where the cluster's programs are.
	cache *build.Cache
}

func TestNFTables(t *testing.T) { run(t, "nftables") }
func TestIPTables(t *testing.T) { run(t, "iptables") }

// run starts a cluster with kube-proxy in a mode and runs the suites on it.
func run(t *testing.T, proxy string) {
	if os.Getenv(enabled) != "1" {
		t.Skipf("starts a Kubernetes cluster: `make test-e2e` runs it, with %s=1", enabled)
	}
	s := start(t, proxy)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"Smoke", testSmoke},
		{"Corner", testCorner},
		{"Disruption", testDisruption},
		{"Netpol", testNetpol},
		{"Conformance", testConformance},
		{"Cyclonus", testCyclonus},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
}

// start starts a cluster from what is built.
func start(t *testing.T, proxy string) *suite {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	cache, err := build.Open("build", log)
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.Check(); err != nil {
		t.Fatal(err)
	}
	plugins := t.TempDir()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Join(here, "..", "..")) // where podgate is built
	if err := cluster.Plugins(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	t.Chdir(here)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	c, err := cluster.Start(ctx, cluster.Options{
		Bin: cache.Bin(), Images: cache.Images(), Plugins: plugins, Proxy: proxy, Log: log,
		Bare: os.Getenv(bare) == "1",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop := c.Close
		if t.Failed() {
			t.Logf("logs of the cluster: %s", c.Dir)
			stop = c.KeepLogs
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	reports := filepath.Join(filepath.Dir(cache.Bin()), "reports", proxy)
	if err := os.MkdirAll(reports, 0o755); err != nil {
		t.Fatal(err)
	}
	return &suite{Cluster: c, reports: reports, cache: cache}
}
