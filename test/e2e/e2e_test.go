// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"errors"
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

// start starts a cluster from what is built, with podgate on it.
func start(t *testing.T, proxy string) *suite {
	t.Helper()
	return startCluster(t, cluster.Options{Proxy: proxy, Bare: os.Getenv(bare) == "1"}, func(ctx context.Context, dir string) error {
		return cluster.Plugins(ctx, dir)
	})
}

// startBare starts a cluster on which nothing of podgate's is.
func startBare(t *testing.T, proxy string) *suite {
	t.Helper()
	return startCluster(t, cluster.Options{Proxy: proxy, Bare: true}, func(ctx context.Context, dir string) error {
		err := cluster.Plugins(ctx, dir)
		for _, name := range []string{"podgate", "podgate-cni", "podgate-ipam"} {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
		return err
	})
}

// startCluster starts a cluster whose plugins are what fill puts into a
// directory.
func startCluster(t *testing.T, o cluster.Options, fill func(ctx context.Context, dir string) error) *suite {
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
	if err := fill(t.Context(), plugins); err != nil {
		t.Fatal(err)
	}
	t.Chdir(here)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	o.Bin, o.Images, o.Plugins, o.Log = cache.Bin(), cache.Images(), plugins, log
	c, err := cluster.Start(ctx, o)
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
	reports := filepath.Join(filepath.Dir(cache.Bin()), "reports", c.Proxy)
	if err := os.MkdirAll(reports, 0o755); err != nil {
		t.Fatal(err)
	}
	return &suite{Cluster: c, reports: reports, cache: cache}
}
