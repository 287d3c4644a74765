// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/podgate/podgate/test/e2e/cluster"
)

// skippedSpecs matches the names of specs that need SCTP sockets, which a kernel
// without CONFIG_IP_SCTP does not have. What else is about SCTP is not skipped.
const skippedSpecs = `\[Feature:SCTPConnectivity\]`

// testNetpol runs all specs of network policy but those.
func testNetpol(t *testing.T, s *suite) {
	s.upstream(t, "netpol", `\[sig-network\] Netpol`, 2*time.Hour)
}

// testConformance runs what sig-network wants of a conformant cluster, to show
// that podgate breaks nothing else.
func testConformance(t *testing.T, s *suite) {
	s.upstream(t, "conformance", `\[sig-network\].*\[Conformance\]`, time.Hour)
}

// upstream runs specs of the Kubernetes project whose full name matches focus.
// Each becomes a test.
func (s *suite) upstream(t *testing.T, name, focus string, limit time.Duration) {
	registries, err := s.cache.Registries()
	if err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(s.reports, name+".xml")
	if err := os.RemoveAll(report); err != nil {
		t.Fatal(err)
	}
	process, err := s.ControlPlane.Start(name, cluster.Command{
		Path: filepath.Join(s.Bin, "e2e.test"),
		Env:  []string{"KUBE_TEST_REPO_LIST=" + registries},
		Args: []string{
			"--kubeconfig=" + s.Kubeconfig,
			"--kubectl-path=" + filepath.Join(s.Bin, "kubectl"),
			"--provider=skeleton",
			"--num-nodes=" + strconv.Itoa(len(s.Nodes)),
			"--disable-log-dump",
			"--ginkgo.focus=" + focus,
			"--ginkgo.skip=" + skippedSpecs,
			"--ginkgo.no-color",
			"--ginkgo.timeout=" + limit.String(),
			"--ginkgo.junit-report=" + report,
		}})
	if err != nil {
		t.Fatal(err)
	}
	failure := s.wait(t, process, limit+time.Minute)
	s.keep(t, process.Log, name+".log")
	specs, err := readJUnit(report)
	if err != nil {
		t.Fatalf("%v (%v); see %s", err, failure, filepath.Join(s.reports, name+".log"))
	}
	counts := map[string]int{}
	for _, spec := range specs {
		// Ginkgo reports the suite's own set-up too.
		if name, ok := strings.CutPrefix(spec.Name, "[It] "); ok {
			spec.Name = name
		} else if spec.Status == "passed" {
			continue
		}
		counts[spec.Status]++
		if spec.Status == "skipped" {
			continue
		}
		t.Run(spec.Name, func(t *testing.T) {
			if spec.Status != "passed" {
				t.Errorf("%s after %ss: %s", spec.Status, spec.Time, spec.message())
			}
		})
	}
	t.Logf("%s: %v", name, counts)
	if counts["passed"] == 0 {
		t.Errorf("no spec passed (%v); see %s", failure, filepath.Join(s.reports, name+".log"))
	}
	if failure != nil && !t.Failed() {
		t.Errorf("the specs passed, the run did not: %v", failure)
	}
}

// spec is one test of a JUnit report.
type spec struct {
	Name    string `xml:"name,attr"`
	Status  string `xml:"status,attr"`
	Time    string `xml:"time,attr"`
	Failure *struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	} `xml:"failure"`
}

func (s spec) message() string {
	if s.Failure == nil {
		return ""
	}
	return s.Failure.Message + "\n" + s.Failure.Text
}

// readJUnit returns the tests of a report: of one suite, or of several.
func readJUnit(file string) ([]spec, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var report struct {
		Nested []spec `xml:"testsuite>testcase"`
		Specs  []spec `xml:"testcase"`
	}
	if err := xml.Unmarshal(b, &report); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return append(report.Nested, report.Specs...), nil
}

// wait waits until a process ends, and ends it after limit.
func (s *suite) wait(t *testing.T, p *cluster.Process, limit time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	err := p.Wait(ctx)
	if ctx.Err() != nil {
		err = errors.Join(err, p.Kill())
	}
	return err
}

// keep copies a log to the reports.
func (s *suite) keep(t *testing.T, log, name string) {
	t.Helper()
	b, err := os.ReadFile(log)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.reports, name), b, 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}
