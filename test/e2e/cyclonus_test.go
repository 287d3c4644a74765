// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/podgate/podgate/test/e2e/build"
	"github.com/podgate/podgate/test/e2e/cluster"
)

// testCyclonus has cyclonus generate policies, probe every pair of nine pods
// under each, and compare with what it expects.
func testCyclonus(t *testing.T, s *suite) {
	const limit = 3 * time.Hour
	report := filepath.Join(s.reports, "cyclonus.xml")
	process, err := s.ControlPlane.Start("cyclonus", cluster.Command{
		Path: filepath.Join(s.Bin, "cyclonus"),
		Env:  []string{"KUBECONFIG=" + s.Kubeconfig},
		Args: []string{
			"generate",
			"--image-registry=" + build.Registry,
			"--server-protocol=TCP,UDP", // the kernel may have no SCTP sockets
			"--ignore-loopback",         // a pod always reaches itself
			"--perturbation-wait-seconds=2",
			"--job-timeout-seconds=1",
			"--retries=2",
			"--pod-creation-timeout-seconds=180",
			"--cleanup-namespaces",
			"--junit-results-file=" + report,
		}})
	if err != nil {
		t.Fatal(err)
	}
	failure := s.wait(t, process, limit)
	s.keep(t, process.Log, "cyclonus.log")
	specs, err := readJUnit(report)
	if err != nil {
		t.Fatalf("%v (%v); see %s", err, failure, filepath.Join(s.reports, "cyclonus.log"))
	}
	for _, spec := range specs {
		t.Run(spec.Name, func(t *testing.T) {
			if spec.Failure != nil {
				t.Errorf("not as expected; see %s", filepath.Join(s.reports, "cyclonus.log"))
			}
		})
	}
	if failure != nil {
		t.Error(failure)
	}
}
