// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package oracle

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/oracle/cases"
)

// kernelCases is how many random cases the kernel is asked about: each loads
// the programs anew.
const kernelCases = 20

// kernel is programs and maps that nobody else sees, and the compiler that they
// follow.
type kernel struct {
	state    *pinning.State
	compiler *policy.Compiler
	gates    map[policy.PodKey]uint32
	// rules by the number that the kernel knows them by, of the current step.
	rules map[uint32]policy.Digest
}

func newKernel(t *testing.T) *kernel {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading programs needs root")
	}
	state, err := pinning.NewPrivate(t.Context(), pinning.Options{
		Capacity: pinning.Capacity{Endpoints: 256, Flows: 1024, Fragments: 64, EventBytes: 4096},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := state.Close(); err != nil {
			t.Error(err)
		}
	})
	return &kernel{state: state, gates: map[policy.PodKey]uint32{}}
}

// TestKernelCyclonusCases asks the kernel everything of the cases that cyclonus
// generates. The tables stay while the compilers change, as when daemons restart.
func TestKernelCyclonusCases(t *testing.T) {
	ipv4, ipv6, err := cases.Cyclonus()
	if err != nil {
		t.Fatal(err)
	}
	k := newKernel(t)
	for _, c := range append(ipv4, ipv6...) {
		t.Run(c.Name, func(t *testing.T) { k.check(t, c, cases.Cluster.Questions) })
	}
}

// TestKernelRandom asks the kernel some questions of random cases.
func TestKernelRandom(t *testing.T) {
	first := *seed
	if first == 0 {
		first = rand.Uint64()
	}
	t.Logf("to see this again: -args -seed %d", first)
	for i := range uint64(kernelCases) {
		t.Run(fmt.Sprint(first+i), func(t *testing.T) {
			r := rand.New(rand.NewPCG(first+i, 0))
			newKernel(t).check(t, cases.Random(r), func(c cases.Cluster) iter.Seq[cases.Question] {
				return c.Sample(r, questionsPerStep)
			})
		})
	}
}

// check takes the kernel through the steps of a case and compares its answers,
// with the rule that decided, with the compiler's, which the other tests compare
// with the oracles.
func (k *kernel) check(t *testing.T, c cases.Case, questions func(cases.Cluster) iter.Seq[cases.Question]) {
	t.Helper()
	k.compiler = policy.NewCompiler()
	var before cases.Cluster
	for i, cluster := range c.Steps {
		if err := cases.Load(k.compiler, before, cluster); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
		before = cluster
		k.apply(t, k.compiler.Compile())
		if i%2 == 1 {
			k.apply(t, k.compiler.Compact())
		}
		k.rules = map[uint32]policy.Digest{}
		differences := 0
		asked := map[[2]netip.Addr]bool{}
		for q := range questions(cluster) {
			ok := k.agrees(t, i, q, q.Number(), q.Port)
			if pair := [2]netip.Addr{q.Local, q.Peer}; !asked[pair] {
				asked[pair] = true
				ok = k.agreesOnEcho(t, i, q) && ok
			}
			if !ok {
				differences++
			}
			if differences > 10 {
				t.Fatalf("and so on; policies: %+v", cluster.Policies)
			}
		}
	}
}

func (k *kernel) apply(t *testing.T, u policy.Update) {
	t.Helper()
	applied, err := k.state.Apply(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range applied.Problems {
		t.Error(p)
	}
}

// Types of an echo request in the upper byte of what counts as its port.
const (
	echo   = 8 << 8   // RFC 792
	echoV6 = 128 << 8 // RFC 4443
)

func (k *kernel) agreesOnEcho(t *testing.T, step int, q cases.Question) bool {
	t.Helper()
	if q.Peer.Is4() {
		return k.agrees(t, step, q, policy.ICMP, echo)
	}
	return k.agrees(t, step, q, policy.ICMPv6, echoV6)
}

func (k *kernel) agrees(t *testing.T, step int, q cases.Question, proto policy.Protocol, port uint16) bool {
	t.Helper()
	want, err := k.compiler.Judge(q.Direction, cases.Key(q.Subject), q.Peer, proto, port)
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.state.Probe(t.Context(), pinning.ProbeRequest{
		Gate: k.gate(t, q.Subject), Direction: q.Direction, Local: q.Local, Peer: q.Peer, Protocol: proto, Port: port,
	})
	if err != nil {
		t.Fatal(err)
	}
	verdict := bpf.DatapathVerdictVERDICT_DENIED
	if want.Action == policy.Allow {
		verdict = bpf.DatapathVerdictVERDICT_ALLOWED
	}
	rule := k.rule(t, got.Rule)
	if got.Verdict != verdict || rule != want.Rule.ID || (got.Reason == bpf.DatapathReasonREASON_SELF) != want.Self {
		t.Errorf("step %d: %v, protocol %d port %d: kernel says %+v by rule %s; compiler says %v by rule %s",
			step, q, proto, port, got, rule, want, want.Rule.ID)
		return false
	}
	return true
}

// gate of a pod; it follows the pod from update to update.
func (k *kernel) gate(t *testing.T, pod *corev1.Pod) uint32 {
	t.Helper()
	key := cases.Key(pod)
	if _, ok := k.gates[key]; !ok {
		// The addresses are in the tables already: pods here have a status.
		gate, err := k.state.PrivateGate(key, nil)
		if err != nil {
			t.Fatal(err)
		}
		k.gates[key] = gate
	}
	return k.gates[key]
}

func (k *kernel) rule(t *testing.T, id uint32) policy.Digest {
	t.Helper()
	if id == 0 {
		return policy.Digest{}
	}
	if _, ok := k.rules[id]; !ok {
		r, err := k.state.Rule(id)
		if err != nil {
			t.Fatal(err)
		}
		k.rules[id] = r.RuleInfo.ID
	}
	return k.rules[id]
}
