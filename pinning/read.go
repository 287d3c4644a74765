// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
)

// EndpointCounters of one endpoint, indexed by direction.
type EndpointCounters struct {
	AllowedPackets [2]uint64 `json:"allowedPackets"`
	AllowedBytes   [2]uint64 `json:"allowedBytes"`
	DroppedPackets [2]uint64 `json:"droppedPackets"`
	DroppedBytes   [2]uint64 `json:"droppedBytes"`
}

// Counters of an endpoint since it was added.
func (s *State) Counters(gate uint32) (EndpointCounters, error) {
	m, err := s.m(bpf.DatapathMapEndpointCounters)
	if err != nil {
		return EndpointCounters{}, err
	}
	var perCPU []bpf.DatapathEndpointCounters
	if err := m.Lookup(gate, &perCPU); err != nil {
		return EndpointCounters{}, fmt.Errorf("counters of gate %d: %w", gate, err)
	}
	var sum EndpointCounters
	for _, c := range perCPU {
		for d := range 2 {
			sum.AllowedPackets[d] += c.AllowedPackets[d]
			sum.AllowedBytes[d] += c.AllowedBytes[d]
			sum.DroppedPackets[d] += c.DroppedPackets[d]
			sum.DroppedBytes[d] += c.DroppedBytes[d]
		}
	}
	return sum, nil
}

// Counter of packets and bytes.
type Counter struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func (s *State) counter(name string, index uint32) (Counter, error) {
	m, err := s.m(name)
	if err != nil {
		return Counter{}, err
	}
	var perCPU []bpf.DatapathCounter
	if err := m.Lookup(index, &perCPU); err != nil {
		return Counter{}, fmt.Errorf("%s %d: %w", name, index, err)
	}
	var sum Counter
	for _, c := range perCPU {
		sum.Packets += c.Packets
		sum.Bytes += c.Bytes
	}
	return sum, nil
}

// DropCounter counts what was dropped for a reason.
type DropCounter struct {
	Reason    flow.Reason      `json:"reason"`
	Direction policy.Direction `json:"direction"`
	Counter
}

// DropCounters of the whole instance; reasons that never came up are left out.
func (s *State) DropCounters() ([]DropCounter, error) {
	var out []DropCounter
	for reason := range uint32(bpf.DatapathReasonREASON_COUNT) {
		for d := range uint32(2) {
			c, err := s.counter(bpf.DatapathMapDropCounters, reason*2+d)
			if err != nil {
				return nil, err
			}
			if c.Packets > 0 {
				out = append(out, DropCounter{flow.Reason(reason), policy.Direction(d), c})
			}
		}
	}
	return out, nil
}

// Rule as it is pinned.
type Rule struct {
	ID uint32 `json:"id"`
	policy.RuleInfo
	Policy  policy.PolicyInfo `json:"policy"`
	Counter Counter           `json:"counter"`
}

// Rule describes a rule by its number. It returns [ErrNotFound] for one that
// is not pinned, or not any more.
func (s *State) Rule(id uint32) (Rule, error) {
	m, err := s.m(bpf.DatapathMapRuleInfo)
	if err != nil {
		return Rule{}, err
	}
	var v bpf.DatapathRuleInfo
	if err := lookup(m, id, &v); err != nil {
		return Rule{}, fmt.Errorf("rule %d: %w", id, err)
	}
	r := Rule{ID: id, RuleInfo: policy.RuleInfo{
		ID: v.Digest.Bytes, Direction: policy.Direction(v.Direction), Action: policy.Action(v.Action),
		Index: int(v.Index), Text: text(v.Text[:]),
	}}
	if r.Policy, err = s.policyInfo(v.Policy); err != nil {
		return r, fmt.Errorf("rule %d: %w", id, err)
	}
	r.RuleInfo.Policy = r.Policy.ID
	r.Counter, err = s.counter(bpf.DatapathMapRuleCounters, id)
	return r, err
}

// Rules yields the pinned rules. The text, policy and counter of each are read
// one by one, and those that go meanwhile are left out.
func (s *State) Rules() iter.Seq2[Rule, error] {
	return func(yield func(Rule, error) bool) {
		m, err := s.m(bpf.DatapathMapRuleInfo)
		if err != nil {
			yield(Rule{}, err)
			return
		}
		ids, err := keysOf[uint32](m)
		if err != nil {
			yield(Rule{}, err)
			return
		}
		for _, id := range ids {
			r, err := s.Rule(id)
			if errors.Is(err, ErrNotFound) {
				continue
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

func (s *State) policyInfo(id uint32) (policy.PolicyInfo, error) {
	m, err := s.m(bpf.DatapathMapPolicyInfo)
	if err != nil {
		return policy.PolicyInfo{}, err
	}
	var v bpf.DatapathPolicyInfo
	if err := lookup(m, id, &v); err != nil {
		return policy.PolicyInfo{}, fmt.Errorf("policy %d: %w", id, err)
	}
	return policy.PolicyInfo{
		ID: v.Digest.Bytes, UID: text(v.Uid[:]), Kind: text(v.Kind[:]),
		Namespace: text(v.Namespace[:]), Name: text(v.Name[:]),
	}, nil
}

func lookup[K, V any](m *ebpf.Map, k K, v *V) error {
	err := m.Lookup(k, v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return ErrNotFound
	}
	return err
}

// Ruleset as it is pinned.
type Ruleset struct {
	ID        uint32           `json:"id"`
	Digest    policy.Digest    `json:"digest"`
	Direction policy.Direction `json:"direction"`
	Default   policy.Action    `json:"default"`
	// DefaultRule attributes the default; nil if it has no rule.
	DefaultRule *Rule               `json:"defaultRule,omitempty"`
	Policies    []policy.PolicyInfo `json:"policies"`
	// AnyPeer: classes without a cell use that of class 0.
	AnyPeer bool `json:"anyPeer"`
	// Cells by class.
	Cells map[uint32][]Interval `json:"cells"`
}

// Interval of a pinned cell; see [policy.Interval].
type Interval struct {
	First, Last uint32
	Action      policy.Action
	Rule        uint32
}

// Ruleset reads a compiled ruleset with its cells. It returns [ErrNotFound]
// for a number that is not in use.
func (s *State) Ruleset(id uint32) (Ruleset, error) {
	m, err := s.m(bpf.DatapathMapRulesets)
	if err != nil {
		return Ruleset{}, err
	}
	var v bpf.DatapathRuleset
	if err := lookup(m, id, &v); err != nil {
		return Ruleset{}, fmt.Errorf("ruleset %d: %w", id, err)
	}
	if v.Flags&uint8(bpf.DatapathRulesetFlagsRULESET_USED) == 0 {
		return Ruleset{}, fmt.Errorf("ruleset %d: %w", id, ErrNotFound)
	}
	r := Ruleset{
		ID: id, Digest: v.Digest.Bytes, Direction: policy.Direction(v.Direction), Default: policy.Action(v.Action),
		AnyPeer: v.Flags&uint8(bpf.DatapathRulesetFlagsRULESET_ANY_PEER) != 0,
	}
	if v.Rule != 0 {
		rule, err := s.Rule(v.Rule)
		if err != nil {
			return r, err
		}
		r.DefaultRule = &rule
	}
	if r.Policies, err = s.rulesetPolicies(id, v.Policies); err != nil {
		return r, err
	}
	r.Cells, err = s.pinnedCells(id)
	return r, err
}

// RulesetPolicies are the policies that a ruleset is made of: where no rule
// matches, it is they that isolate. It returns [ErrNotFound] for a number that
// is not in use.
func (s *State) RulesetPolicies(id uint32) ([]policy.PolicyInfo, error) {
	m, err := s.m(bpf.DatapathMapRulesets)
	if err != nil {
		return nil, err
	}
	var v bpf.DatapathRuleset
	if err := lookup(m, id, &v); err != nil {
		return nil, fmt.Errorf("ruleset %d: %w", id, err)
	}
	if v.Flags&uint8(bpf.DatapathRulesetFlagsRULESET_USED) == 0 {
		return nil, fmt.Errorf("ruleset %d: %w", id, ErrNotFound)
	}
	return s.rulesetPolicies(id, v.Policies)
}

func (s *State) rulesetPolicies(id, count uint32) ([]policy.PolicyInfo, error) {
	members, err := s.m(bpf.DatapathMapRulesetPolicies)
	if err != nil {
		return nil, err
	}
	var out []policy.PolicyInfo
	for i := range count {
		var number uint32
		if err := lookup(members, bpf.DatapathRulesetPolicyKey{Ruleset: id, Index: i}, &number); err != nil {
			return out, fmt.Errorf("ruleset %d: policy %d: %w", id, i, err)
		}
		p, err := s.policyInfo(number)
		if err != nil {
			return out, fmt.Errorf("ruleset %d: %w", id, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func (s *State) pinnedCells(ruleset uint32) (map[uint32][]Interval, error) {
	m, err := s.m(bpf.DatapathMapCells)
	if err != nil {
		return nil, err
	}
	all, err := dump[bpf.DatapathCellKey, bpf.DatapathCell](m)
	if err != nil {
		return nil, err
	}
	out := map[uint32][]Interval{}
	for k, c := range all {
		if k.Ruleset != ruleset {
			continue
		}
		for _, v := range c.Intervals[:min(int(c.Count), len(c.Intervals))] {
			out[k.Class] = append(out[k.Class], Interval{v.First, v.Last, policy.Action(v.Action), v.Rule})
		}
	}
	for _, intervals := range out {
		slices.SortFunc(intervals, func(a, b Interval) int { return cmp.Compare(a.First, b.First) })
	}
	return out, nil
}

// FlowEntry is one tracked flow.
type FlowEntry struct {
	Endpoint    uint32
	Direction   policy.Direction
	Local, Peer netip.AddrPort
	Protocol    policy.Protocol
	State       flow.State
	Verdict     flow.Verdict
	Reason      flow.Reason
	Rule        uint32
	Ruleset     uint32
	// Backend that the Service at Peer was translated to, if that is judged.
	Backend netip.AddrPort
	// Packets and Bytes by direction.
	Packets, Bytes [2]uint64
	// Created is when its first packet came, by CLOCK_MONOTONIC.
	Created time.Duration
	// RTT is the time that a TCP handshake took, as the pod's interface saw it; 0
	// if it was not seen.
	RTT time.Duration
	// Reset says that a TCP connection was ended by a RST.
	Reset bool
}

// Flows yields the tracked flows, those of endpoints that are gone included:
// the kernel drops them when it needs the room.
func (s *State) Flows() iter.Seq2[FlowEntry, error] {
	return func(yield func(FlowEntry, error) bool) {
		m, err := s.m(bpf.DatapathMapFlows)
		if err != nil {
			yield(FlowEntry{}, err)
			return
		}
		all, err := dump[bpf.DatapathFlowKey, bpf.DatapathFlow](m)
		if err != nil {
			yield(FlowEntry{}, err)
			return
		}
		backends, err := s.backends(all)
		if err != nil {
			yield(FlowEntry{}, err)
			return
		}
		for k, f := range all {
			e := flowEntry(&k, &f)
			if b, ok := backends[k]; ok && f.Translated != 0 {
				e.Backend = netip.AddrPortFrom(unwire(b.Address), b.Port)
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// ScanFlows calls took with each tracked flow, without the Backend, in little
// memory however many there are. On a kernel that cannot read many entries at
// once some may come twice.
func (s *State) ScanFlows(took func(FlowEntry)) error {
	m, err := s.m(bpf.DatapathMapFlows)
	if err != nil {
		return err
	}
	keys, values := make([]bpf.DatapathFlowKey, readSize), make([]bpf.DatapathFlow, readSize)
	if readBatches(m, keys, values, func(n int) {
		for i := range n {
			took(flowEntry(&keys[i], &values[i]))
		}
	}) {
		return nil
	}
	for k, f := range each[bpf.DatapathFlowKey, bpf.DatapathFlow](m, &err) {
		took(flowEntry(&k, &f))
	}
	return err
}

func flowEntry(k *bpf.DatapathFlowKey, f *bpf.DatapathFlow) FlowEntry {
	e := FlowEntry{
		Endpoint: k.Endpoint, Direction: policy.Direction(f.Direction),
		Local:    netip.AddrPortFrom(unwire(k.Local), k.LocalPort),
		Peer:     netip.AddrPortFrom(unwire(k.Peer), k.PeerPort),
		Protocol: policy.Protocol(k.Protocol), State: flow.State(f.State),
		Verdict: flow.Verdict(f.Verdict), Reason: flow.Reason(f.Reason),
		Rule: f.Rule, Ruleset: f.Ruleset, Packets: f.Packets, Bytes: f.Bytes,
		Created: time.Duration(f.CreatedNs), Reset: wasReset(f),
	}
	if f.Flags&uint8(bpf.DatapathFlowFlagsFLOW_RTT) != 0 {
		e.RTT = time.Duration(f.RttUs) * time.Microsecond
	}
	return e
}

// wasReset tells whether a flow was closed by anything but a FIN of both sides.
func wasReset(f *bpf.DatapathFlow) bool {
	const fins = uint8(bpf.DatapathFlowFlagsFLOW_FIN_INGRESS | bpf.DatapathFlowFlagsFLOW_FIN_EGRESS)
	return bpf.DatapathFlowKind(f.Kind) == bpf.DatapathFlowKindFLOW_TCP &&
		bpf.DatapathFlowState(f.State) == bpf.DatapathFlowStateFLOW_CLOSED && f.Flags&fins != fins
}

// backends reads what flows of Services were translated to, if there are any.
func (s *State) backends(flows map[bpf.DatapathFlowKey]bpf.DatapathFlow) (map[bpf.DatapathFlowKey]bpf.DatapathBackend, error) {
	for _, f := range flows {
		if f.Translated == 0 {
			continue
		}
		m, err := s.m(bpf.DatapathMapBackends)
		if err != nil {
			return nil, err
		}
		return dump[bpf.DatapathFlowKey, bpf.DatapathBackend](m)
	}
	return nil, nil
}

// Events opens the event ring. It has one consumer: [ErrLocked] says that
// there is one already.
func (s *State) Events(ctx context.Context) (*flow.Reader, error) {
	events, err := s.m(bpf.DatapathMapEvents)
	if err != nil {
		return nil, err
	}
	lost, err := s.m(bpf.DatapathMapLostEvents)
	if err != nil {
		return nil, err
	}
	if s.private {
		return flow.NewReader(events, lost, nil)
	}
	l, err := acquire(ctx, s.layout.eventsDir(), 0)
	if err != nil {
		return nil, fmt.Errorf("event ring: %w", err)
	}
	r, err := flow.NewReader(events, lost, l.release)
	if err != nil {
		return nil, errors.Join(err, l.release())
	}
	return r, nil
}
