// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"flag"
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/oracle/cases"
)

var (
	seed = flag.Uint64("seed", 0, "seed of the first random case; 0 takes a new one")
	runs = flag.Int("cases", 300, "random cases")
)

// questionsPerStep is how many questions a step of a random case is asked.
const questionsPerStep = 600

// TestCyclonusCases asks everything of the cases that cyclonus generates.
func TestCyclonusCases(t *testing.T) {
	ipv4, ipv6, err := cases.Cyclonus()
	if err != nil {
		t.Fatal(err)
	}
	if len(ipv4) != 230 || len(ipv6) == 0 {
		t.Errorf("%d cases with IPv4 blocks and %d with IPv6 blocks, want 230 and some", len(ipv4), len(ipv6))
	}
	run := func(t *testing.T, list []cases.Case) {
		for _, c := range list {
			t.Run(c.Name, func(t *testing.T) {
				t.Parallel()
				compare(t, c, cases.Cluster.Questions)
			})
		}
	}
	t.Run("IPv4", func(t *testing.T) { run(t, ipv4) })
	t.Run("IPv6", func(t *testing.T) { run(t, ipv6) })
}

// TestRandom asks some questions of random cases.
func TestRandom(t *testing.T) {
	first := *seed
	if first == 0 {
		first = rand.Uint64()
	}
	t.Logf("to see this again: -args -seed %d -cases %d", first, *runs)
	for i := range *runs {
		r := rand.New(rand.NewPCG(first+uint64(i), 0))
		compare(t, cases.Random(r), func(c cases.Cluster) iter.Seq[cases.Question] { return c.Sample(r, questionsPerStep) })
		if t.Failed() {
			t.Fatalf("case of -args -seed %d -cases 1", first+uint64(i))
		}
	}
}

// compare takes one compiler through the steps of a case and asks it, and both
// oracles, the same.
func compare(t *testing.T, c cases.Case, questions func(cases.Cluster) iter.Seq[cases.Question]) {
	t.Helper()
	compiler := policy.NewCompiler()
	var before cases.Cluster
	for i, cluster := range c.Steps {
		if err := cases.Load(compiler, before, cluster); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		before = cluster
		compiler.Compile()
		if i%2 == 1 {
			compiler.Compact()
		}
		compareStep(t, i, compiler, cluster, questions(cluster))
	}
}

func compareStep(t *testing.T, step int, compiler *policy.Compiler, cluster cases.Cluster, questions iter.Seq[cases.Question]) {
	t.Helper()
	cyclonus := map[string]*Cyclonus{
		"cyclonus":              NewCyclonus(cluster, false),
		"cyclonus (simplified)": NewCyclonus(cluster, true),
	}
	kubernetes, err := NewKubernetes(cluster)
	if err != nil {
		t.Fatal(err)
	}
	differences := 0
	for q := range questions {
		v, err := compiler.Judge(q.Direction, cases.Key(q.Subject), q.Peer, q.Number(), q.Port)
		if err != nil {
			t.Fatal(err)
		}
		got := v.Action == policy.Allow
		check := func(name string, want bool) {
			if got != want {
				differences++
				t.Errorf("step %d: %v: %v; %s: allowed is %v", step, q, v, name, want)
			}
		}
		if q.Self() {
			check("a pod reaches itself", true)
			continue
		}
		for name, c := range cyclonus {
			check(name, c.Allows(q))
		}
		want, err := kubernetes.Allows(q)
		if err != nil {
			t.Fatal(err)
		}
		check("kube-network-policies", want)
		if differences > 10 {
			t.Fatalf("and so on; policies: %+v", cluster.Policies)
		}
	}
}
