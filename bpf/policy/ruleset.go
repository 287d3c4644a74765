// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"slices"
)

// ruleset is a [Ruleset] in the making and in use.
type ruleset struct {
	Ruleset
	sources []source
	// subjectPorts are the subject's ports that rules name, for ingress.
	subjectPorts []NamedPort
	rules        []boundRule
	names        []*portName // resolved on the peer, for egress
	traits       []*trait
	// verdicts are the intervals by what of a signature the rules can tell.
	verdicts map[string][]Interval
	// profiles counts the profiles of local pods that have the ruleset.
	profiles int
	live     bool // in the tables as of the last update
}

// source is one policy of a ruleset.
type source struct {
	policy *policy
	side   *side
}

// boundRule is a rule with its peers resolved to traits and its numeric ports
// to spans.
type boundRule struct {
	id      Digest
	tier    Tier
	action  Action
	anyPeer bool
	peers   []*trait
	spans   []span
	names   []Port // still to be resolved on the peer
}

// rulesetOf returns the digest and the making of the ruleset of some policies
// for pods with some ports; the digest is [Open] when no policy has a say.
func rulesetOf(d Direction, policies []*policy, ports []NamedPort) (Digest, []source, []NamedPort) {
	var sources []source
	for _, p := range policies {
		if s := &p.sides[d]; s.concerns(p.tier) {
			sources = append(sources, source{p, s})
		}
	}
	if len(sources) == 0 {
		return Open, nil, nil
	}
	contents := make([]Digest, len(sources))
	for i, s := range sources {
		contents[i] = s.side.content
	}
	e := encode("ruleset").number(uint64(d)).set(contents)

	var named []NamedPort
	if d == Ingress {
		for _, p := range ports {
			if slices.ContainsFunc(sources, func(s source) bool { return s.side.names(p.Name) }) {
				named = append(named, p)
				e = e.text(p.Name).number(uint64(p.Protocol)).number(uint64(p.Port))
			}
		}
	}
	return e.sum(), sources, named
}

// names says whether a rule has a port of that name.
func (s *side) names(name string) bool {
	for i := range s.rules {
		for _, p := range s.rules[i].ports {
			if p.Name == name {
				return true
			}
		}
	}
	return false
}

func newRuleset(id Digest, d Direction, sources []source, ports []NamedPort) *ruleset {
	r := &ruleset{sources: sources, subjectPorts: ports, verdicts: map[string][]Interval{}}
	r.ID, r.Direction, r.Default = id, d, Allow
	slices.SortFunc(sources, func(a, b source) int { return comparePolicies(a.policy.info, b.policy.info) })
	for _, s := range sources {
		r.Policies = append(r.Policies, s.policy.info.ID)
		if s.side.isolates && r.Default == Allow {
			r.Default = Deny
			r.DefaultRule = s.side.isolation.ID
		}
	}
	return r
}

func comparePolicies(a, b PolicyInfo) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace),
		cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
}

// bind interns the traits that the rules depend on and puts the rules in
// judging order.
func (r *ruleset) bind(t *traitTable) {
	ordered := slices.Clone(r.sources)
	// Stable: within a priority, and in the namespace tier, the names decide
	// which of several matching rules is the one that is named.
	slices.SortStableFunc(ordered, func(a, b source) int {
		c := cmp.Compare(a.policy.tier, b.policy.tier)
		if c == 0 && a.policy.tier != TierNamespace {
			c = cmp.Compare(a.policy.priority, b.policy.priority)
		}
		return c
	})
	for _, s := range ordered {
		for i := range s.side.rules {
			r.bindRule(t, s.policy.tier, &s.side.rules[i])
		}
	}
	r.AnyPeer = len(r.intervals(nil)) > 0
}

func (r *ruleset) bindRule(t *traitTable, tier Tier, in *rule) {
	position := len(r.rules)
	b := boundRule{id: in.info.ID, tier: tier, action: in.info.Action, anyPeer: in.anyPeer}
	for _, s := range in.selectors {
		b.peers = append(b.peers, t.ofPods(s))
	}
	if in.blocks != nil {
		b.peers = append(b.peers, t.ofBlocks(in.blocks))
	}
	for _, x := range b.peers {
		r.depend(x)
	}
	if in.anyPort {
		b.spans = []span{{0, MaxCoordinate, position}}
	}
	for _, p := range in.ports {
		switch {
		case p.Name == "":
			b.spans = append(b.spans, portSpan(p.Protocol, p.First, p.Last, position))
		case r.Direction == Ingress:
			for _, q := range r.subjectPorts {
				if p.resolves(q) {
					b.spans = append(b.spans, portSpan(q.Protocol, q.Port, q.Port, position))
				}
			}
		default:
			n := t.ofName(p.Name)
			if _, ok := n.rulesets[r]; !ok {
				n.rulesets[r] = struct{}{}
				r.names = append(r.names, n)
			}
			b.names = append(b.names, p)
		}
	}
	r.rules = append(r.rules, b)
}

func (r *ruleset) depend(x *trait) {
	if _, ok := x.rulesets[r]; !ok {
		x.rulesets[r] = struct{}{}
		r.traits = append(r.traits, x)
	}
}

// resolves says whether a named port of a rule means this port of a pod.
func (p Port) resolves(q NamedPort) bool {
	return p.Name == q.Name && (p.Protocol == q.Protocol || p.Protocol == AnyProtocol)
}

// unbind gives up the traits.
func (r *ruleset) unbind() {
	for _, x := range r.traits {
		delete(x.rulesets, r)
	}
	for _, n := range r.names {
		delete(n.rulesets, r)
	}
}

// intervals are the final verdicts for peers of a signature.
func (r *ruleset) intervals(s signature) []Interval {
	seen := make(signature, 0, len(s))
	for _, x := range s {
		if _, ok := x.rulesets[r]; ok {
			seen = append(seen, x)
		}
	}
	var buf [128]byte
	key := seen.key(buf[:0])
	v, ok := r.verdicts[string(key)]
	if !ok {
		v = r.judge(seen)
		r.verdicts[string(key)] = v
	}
	return v
}

func (r *ruleset) judge(s signature) []Interval {
	var spans []span
	for i := range r.rules {
		b := &r.rules[i]
		if !b.anyPeer && !slices.ContainsFunc(b.peers, func(x *trait) bool { return slices.Contains(s, x) }) {
			continue
		}
		spans = append(spans, b.spans...)
		for _, p := range b.names {
			for _, x := range s {
				if x.port != nil && p.resolves(*x.port) {
					spans = append(spans, portSpan(x.port.Protocol, x.port.Port, x.port.Port, i))
				}
			}
		}
	}
	return paint(spans, r.rules, r.Default == Deny)
}

// fallback is what peers get whose class has no cell.
func (r *ruleset) fallback() []Interval {
	if r.AnyPeer {
		return r.intervals(nil)
	}
	return nil
}

// cell returns the cell of a class, false when the fallback serves.
func (r *ruleset) cell(c *class) (Cell, bool) {
	v := r.intervals(c.signature)
	return Cell{Ruleset: r.ID, Class: c.digest, Intervals: v}, !slices.Equal(v, r.fallback())
}

// zeroCell returns the cell of everyone else, if there is one.
func (r *ruleset) zeroCell() (Cell, bool) {
	return Cell{Ruleset: r.ID, Intervals: r.intervals(nil)}, r.AnyPeer
}

// infos visits what attributes verdicts of the ruleset.
func (r *ruleset) infos(policy func(PolicyInfo), rule func(RuleInfo)) {
	for _, s := range r.sources {
		policy(s.policy.info)
		if s.side.isolates {
			rule(s.side.isolation)
		}
		for i := range s.side.rules {
			rule(s.side.rules[i].info)
		}
	}
}
