// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package reach answers who can reach whom.
//
// Every question is answered twice: by the compiler, from policy, and by the
// kernel, which runs a made-up packet through the program and the tables that
// judge real ones. The two must agree; an [Answer] says so when they do not.
package reach

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/syncd/source"
)

// Errors that callers branch on.
var (
	// ErrUnknown: a party is neither a known pod nor an address.
	ErrUnknown = errors.New("no such pod")
	// ErrFamilies: one party has IPv4 addresses only, the other IPv6.
	ErrFamilies = errors.New("they share no address family")
)

// Evaluator answers questions about one state of policy. It is not safe for
// concurrent use.
type Evaluator struct {
	// Problems are those of the source: the answers leave out what they name.
	Problems []source.Problem
	// KernelErr is why the kernel answers no question at all, or nil.
	KernelErr error
	// PolicyErr is why the compiler answers no question at all, or nil.
	PolicyErr error

	inventory *inventory.Inventory
	compiler  *policy.Compiler
	compiled  bool // when the first question comes
	state     *pinning.State
	owned     bool // state is closed with the evaluator
	gates     map[policy.PodKey][]gate
	assumed   map[netip.Addr]struct{}
	node      map[netip.Addr]struct{}
	services  map[frontend]pinning.Service
	// pods by address, those on the host network left out.
	pods map[netip.Addr]policy.Pod
}

// gate of a pod, for some of its addresses.
type gate struct {
	number    uint32
	addresses []netip.Addr
}

// Close releases what the evaluator made.
func (e *Evaluator) Close() error {
	if !e.owned {
		return nil
	}
	return e.state.Close()
}

// Word is a verdict in a word.
type Word string

// The words. Audit lets through what policy denies.
const (
	Allow Word = "allow"
	Deny  Word = "deny"
	Audit Word = "audit"
)

// Opinion is what the compiler or the kernel thinks of one direction.
type Opinion struct {
	Verdict Word   `json:"verdict"`
	Reason  string `json:"reason"`
	// Policy and Rule decided; empty if none did.
	Policy string `json:"policy,omitempty"`
	Rule   string `json:"rule,omitempty"`
}

// Side is one end of a path: the pod that is judged there and the direction.
type Side struct {
	Pod       string `json:"pod"`
	Direction string `json:"direction"`
	// Verdict is the kernel's if it has one, else the compiler's.
	Verdict  Word     `json:"verdict"`
	Compiler *Opinion `json:"compiler,omitempty"`
	Kernel   *Opinion `json:"kernel,omitempty"`
	// Unasked is why one of the two has no opinion.
	Unasked string `json:"unasked,omitempty"`
	// Disagree says that the two opinions differ.
	Disagree bool `json:"disagree,omitempty"`
}

// Path is the way between two addresses.
type Path struct {
	From netip.Addr `json:"from"`
	To   netip.Addr `json:"to"`
	// Service that To is an address of, and the one of its backends that this
	// path leads to.
	Service string         `json:"service,omitempty"`
	Backend netip.AddrPort `json:"backend,omitzero"`
	Verdict Word           `json:"verdict"`
	// Sides are those that are judged: egress of a pod at From, ingress of a
	// pod at To or Backend.
	Sides []Side `json:"sides"`
}

// Answer is about all address families that two parties share, and all backends
// of a Service.
type Answer struct {
	From     string `json:"from"`
	To       string `json:"to"`
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port,omitempty"`
	Paths    []Path `json:"paths"`
}

// Verdict is that of all paths, or empty if they differ.
func (a *Answer) Verdict() Word {
	for _, p := range a.Paths[1:] {
		if p.Verdict != a.Paths[0].Verdict {
			return ""
		}
	}
	return a.Paths[0].Verdict
}

// Disagree says that compiler and kernel differ somewhere.
func (a *Answer) Disagree() bool {
	for _, p := range a.Paths {
		for _, s := range p.Sides {
			if s.Disagree {
				return true
			}
		}
	}
	return false
}

// Ask answers whether one party may open a connection to another. It fails with
// [ErrFamilies] when that is impossible anyway, and when neither is a pod.
func (e *Evaluator) Ask(ctx context.Context, from, to Party, port Port) (Answer, error) {
	if from.Pod == nil && to.Pod == nil {
		return Answer{}, fmt.Errorf("neither %s nor %s is a pod that policy applies to", from.Name, to.Name)
	}
	a := Answer{From: from.Name, To: to.Name, Protocol: port.protocolName(), Port: port.Port}
	for _, v4 := range []bool{true, false} {
		source, ok := from.address(v4)
		destination, also := to.address(v4)
		if !ok || !also {
			continue
		}
		paths, err := e.paths(ctx, from, to, source, destination, port)
		if err != nil {
			return Answer{}, err
		}
		a.Paths = append(a.Paths, paths...)
	}
	if len(a.Paths) == 0 {
		return Answer{}, fmt.Errorf("%s has %s, %s has %s: %w",
			from.Name, from.addresses(), to.Name, to.addresses(), ErrFamilies)
	}
	return a, nil
}

// paths are those of one family.
func (e *Evaluator) paths(ctx context.Context, from, to Party, source, destination netip.Addr, port Port) ([]Path, error) {
	if to.Pod == nil {
		if paths, err := e.throughService(ctx, from, source, destination, port); err != nil || len(paths) > 0 {
			return paths, err
		}
	}
	p, err := e.path(ctx, from, to, source, destination, port)
	return []Path{p}, err
}

func (e *Evaluator) path(ctx context.Context, from, to Party, source, destination netip.Addr, port Port) (Path, error) {
	p := Path{From: source, To: destination, Sides: []Side{}}
	if from.Pod != nil {
		s, err := e.side(ctx, policy.Egress, from, source, destination, port)
		if err != nil {
			return Path{}, err
		}
		p.Sides = append(p.Sides, s)
	}
	if to.Pod != nil {
		s, err := e.side(ctx, policy.Ingress, to, destination, source, port)
		if err != nil {
			return Path{}, err
		}
		p.Sides = append(p.Sides, s)
	}
	p.conclude()
	return p, nil
}

// conclude makes the verdict of the path of those of its sides.
func (p *Path) conclude() {
	p.Verdict = Allow
	for _, s := range p.Sides {
		switch {
		case s.Verdict == Deny:
			p.Verdict = Deny
		case s.Verdict == Audit && p.Verdict == Allow:
			p.Verdict = Audit
		}
	}
}

// side asks the compiler and the kernel about one end.
func (e *Evaluator) side(ctx context.Context, d policy.Direction, party Party, local, peer netip.Addr, port Port) (Side, error) {
	s := Side{Pod: party.Name, Direction: d.String()}
	if _, node := e.node[peer]; node && e.hasGate(party.Pod.Key) {
		// The kernel knows the node's own packets by where they come from,
		// which a made-up one cannot show.
		s.Verdict, s.Compiler = Allow, &Opinion{Verdict: Allow, Reason: "traffic with the pod's own node"}
		s.Unasked = "the kernel is not asked about traffic of the pod's own node"
		return s, nil
	}
	var err error
	if e.PolicyErr == nil {
		if s.Compiler, err = e.askCompiler(d, party.Pod, peer, port); err != nil {
			return Side{}, err
		}
		s.Verdict = s.Compiler.Verdict
	} else {
		s.Unasked = "the compiler is not asked: " + e.PolicyErr.Error()
	}
	number, has := e.gate(party.Pod.Key, local)
	switch {
	case party.Pod.HostNetwork:
		s.Unasked = "pods on the host network have no gate"
	case e.KernelErr != nil:
		s.Unasked = "the kernel is not asked: " + e.KernelErr.Error()
	case !has:
		s.Unasked = "the kernel is not asked: the pod is not attached to this node"
	default:
		if s.Kernel, err = e.askKernel(ctx, d, number, local, peer, port); err != nil {
			return Side{}, err
		}
		s.Disagree = s.Compiler != nil && s.Kernel.Verdict != s.Compiler.Verdict
		s.Verdict = s.Kernel.Verdict
	}
	if s.Verdict == "" {
		return Side{}, fmt.Errorf("%s of %s: nobody can answer: %s", s.Direction, s.Pod, s.Unasked)
	}
	return s, nil
}

func (e *Evaluator) askCompiler(d policy.Direction, pod *policy.Pod, peer netip.Addr, port Port) (*Opinion, error) {
	if !e.compiled {
		e.compile()
	}
	v, err := e.compiler.Judge(d, pod.Key, peer, port.protocol(peer), port.coordinate(peer))
	if err != nil {
		return nil, err
	}
	_, reason, _ := strings.Cut(v.String(), ": ")
	o := &Opinion{Verdict: Allow, Reason: reason, Rule: v.Rule.Text}
	if v.Policy != (policy.PolicyInfo{}) {
		o.Policy = v.Policy.String()
	}
	switch {
	case v.Action == policy.Deny && v.Audit:
		o.Verdict = Audit
	case v.Action == policy.Deny:
		o.Verdict = Deny
	}
	return o, nil
}

func (e *Evaluator) askKernel(ctx context.Context, d policy.Direction, number uint32, local, peer netip.Addr, port Port) (*Opinion, error) {
	answer, err := e.state.Probe(ctx, pinning.ProbeRequest{
		Gate: number, Direction: d, Local: local, Peer: peer, Protocol: port.protocol(peer), Port: port.Port,
	})
	if err != nil {
		return nil, err
	}
	o := &Opinion{Verdict: Deny, Reason: flow.Reason(answer.Reason).Explain()}
	switch flow.Verdict(answer.Verdict) {
	case flow.Allowed:
		o.Verdict = Allow
	case flow.Audited:
		o.Verdict = Audit
	default:
	}
	if answer.Rule == 0 {
		return o, nil
	}
	rule, err := e.state.Rule(answer.Rule)
	if err != nil {
		return nil, err
	}
	o.Policy, o.Rule = rule.Policy.String(), rule.Text
	return o, nil
}

func (e *Evaluator) hasGate(pod policy.PodKey) bool { return len(e.gates[pod]) > 0 }

// gate is the gate that a packet of a pod's address passes.
func (e *Evaluator) gate(pod policy.PodKey, local netip.Addr) (uint32, bool) {
	for _, g := range e.gates[pod] {
		if slices.Contains(g.addresses, local) {
			return g.number, true
		}
	}
	return 0, false
}
