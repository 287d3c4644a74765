// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Errors of [Compiler.Judge].
var (
	ErrUnknownPod = errors.New("pod is not known")
	ErrNotLocal   = errors.New("pod is not on this node, which has no rulesets for it")
)

// Verdict is what the compiled tables say about one packet of a new flow, and
// why.
type Verdict struct {
	Action Action
	// Self says that the pod speaks to itself, HostNetwork that it has the
	// node's network: neither is subject to policy.
	Self, HostNetwork bool
	// Default says that no rule matched: Action is the ruleset's default.
	Default bool
	// Audit says that the pod is in audit mode: Deny is reported, not done.
	Audit bool
	// Rule and Policy decided. For a default deny they are the isolation of the
	// first of Isolated; they are zero for a default allow.
	Rule   RuleInfo
	Policy PolicyInfo
	// Isolated is all policies that isolate the direction, sorted, when the
	// verdict is a default deny.
	Isolated []PolicyInfo

	// Ruleset and Class are the keys of the cell that was asked.
	Ruleset, Class Digest
}

// String says the verdict and its reason in one line.
func (v Verdict) String() string {
	switch {
	case v.Self:
		return "allow: a pod always reaches itself"
	case v.HostNetwork:
		return "allow: policy does not select pods on the host network"
	case v.Default && v.Action == Allow:
		return "allow: no policy isolates the pod, no rule matched"
	case v.Default:
		names := make([]string, len(v.Isolated))
		for i, p := range v.Isolated {
			names[i] = p.String()
		}
		return "deny: isolated by " + strings.Join(names, ", ") + ", no rule matched"
	case v.Rule.Text == "":
		return fmt.Sprintf("%s: %s, %s rule %d", v.Action, v.Policy, v.Rule.Direction, v.Rule.Index)
	default:
		return fmt.Sprintf("%s: %s, %s rule %d: %s", v.Action, v.Policy, v.Rule.Direction, v.Rule.Index, v.Rule.Text)
	}
}

// String names the action.
func (a Action) String() string {
	switch a {
	case Allow:
		return "allow"
	case Pass:
		return "pass"
	default:
		return "deny"
	}
}

// Judge answers from the tables of the last update whether a local pod may
// exchange packets with a peer in one direction. The port is the destination's:
// the pod's for ingress, the peer's for egress; for ICMP it is type<<8 | code.
//
// It returns ErrUnknownPod and ErrNotLocal for pods it cannot answer for.
func (c *Compiler) Judge(d Direction, key PodKey, peer netip.Addr, proto Protocol, port uint16) (Verdict, error) {
	x := c.pods[key]
	if x == nil {
		return Verdict{}, fmt.Errorf("%s: %w", key, ErrUnknownPod)
	}
	peer = peer.Unmap().WithZone("")
	if x.profile == nil {
		return Verdict{Action: Allow, HostNetwork: true}, nil
	}
	s := c.tables.subjects[key]
	if s == nil {
		return Verdict{}, fmt.Errorf("%s: %w", key, ErrNotLocal)
	}
	k := c.classOf(peer)
	v := Verdict{Action: Allow, Audit: s.Audit, Ruleset: s.Rulesets[d], Class: k.digest}
	if slices.Contains(x.addresses, peer) {
		v.Self = true
		return v, nil
	}
	r := c.rulesets[v.Ruleset]
	if r == nil {
		v.Default = true
		return v, nil
	}
	if i, ok := find(r.intervals(k.signature), Coordinate(proto, port)); ok {
		v.Action, v.Rule = i.Action, c.tables.rules[i.Rule].info
		v.Policy = c.tables.policies[v.Rule.Policy].info
		return v, nil
	}
	v.Default, v.Action = true, r.Default
	if r.Default == Deny {
		v.Isolated = r.isolating()
		v.Policy, v.Rule = v.Isolated[0], c.tables.rules[r.DefaultRule].info
	}
	return v, nil
}

// classOf is the class that the tables give an address.
func (c *Compiler) classOf(a netip.Addr) *class {
	if at := c.places[a]; at.class != nil {
		return at.class
	}
	return c.prefixes.class(exact(a), c.classes.zero)
}

// isolating is the policies that isolate the ruleset's direction.
func (r *ruleset) isolating() []PolicyInfo {
	var infos []PolicyInfo
	for _, s := range r.sources {
		if s.side.isolates {
			infos = append(infos, s.policy.info)
		}
	}
	return infos
}

// find returns the interval that holds a coordinate.
func find(intervals []Interval, at uint32) (Interval, bool) {
	i, _ := slices.BinarySearchFunc(intervals, at, func(v Interval, at uint32) int { return cmp.Compare(v.Last, at) })
	if i < len(intervals) && intervals[i].First <= at {
		return intervals[i], true
	}
	return Interval{}, false
}
