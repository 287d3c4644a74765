// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
)

// String names the direction as policy does.
func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// policy is a checked [Policy]. It is never changed: an edit makes a new one,
// and rulesets keep the one they were compiled from.
type policy struct {
	info     PolicyInfo
	tier     Tier
	priority int32
	subject  *podSelector
	sides    [2]side
}

// side is what a policy says about one direction.
type side struct {
	// content identifies everything of the side that a verdict or its
	// attribution depends on; the subject is no part of it.
	content  Digest
	isolates bool
	// isolation attributes a default deny.
	isolation RuleInfo
	rules     []rule
}

// concerns says whether the side says anything at all.
func (s *side) concerns(tier Tier) bool {
	return s.isolates || tier != TierNamespace && len(s.rules) > 0
}

// rule is a checked [Rule].
type rule struct {
	info      RuleInfo
	anyPeer   bool
	selectors []*podSelector
	blocks    *blockSet
	anyPort   bool
	ports     []Port
}

// newPolicy checks a policy. Errors name the policy, the direction, the rule
// and the field.
func newPolicy(in Policy) (*policy, error) {
	p := &policy{
		info: PolicyInfo{
			ID:        encode("policy").text(in.UID).text(in.Kind).text(in.Namespace).text(in.Name).sum(),
			UID:       in.UID,
			Kind:      in.Kind,
			Namespace: in.Namespace,
			Name:      in.Name,
		},
		tier:     in.Tier,
		priority: in.Priority,
	}
	if err := p.build(in); err != nil {
		return nil, fmt.Errorf("%s: %w", p.info, err)
	}
	return p, nil
}

// String is kind namespace/name.
func (p PolicyInfo) String() string {
	name := p.Name
	if p.Namespace != "" {
		name = p.Namespace + "/" + p.Name
	}
	if p.Kind == "" {
		return "policy " + name
	}
	return p.Kind + " " + name
}

func (p *policy) build(in Policy) error {
	if in.UID == "" {
		return errors.New("uid: must not be empty")
	}
	if in.Tier > TierBaseline {
		return fmt.Errorf("tier: %d is unknown", in.Tier)
	}
	// An empty name would widen the policy to every namespace.
	if in.Tier == TierNamespace && in.Subject.Namespace == "" {
		return errors.New("subject.namespace: must not be empty in the namespace tier")
	}
	var err error
	if p.subject, err = makePodSelector(in.Subject); err != nil {
		return fmt.Errorf("subject.%w", err)
	}
	for d := range p.sides {
		if err := p.buildSide(Direction(d), in.Isolates[d], in.Rules[d]); err != nil {
			return fmt.Errorf("%s %w", Direction(d), err)
		}
	}
	return nil
}

func (p *policy) buildSide(d Direction, isolates bool, rules []Rule) error {
	if isolates && p.tier != TierNamespace {
		return errors.New("isolates: only policies of the namespace tier isolate")
	}
	s := &p.sides[d]
	s.isolates = isolates
	digests := make([]Digest, len(rules))
	for i, in := range rules {
		if p.tier == TierNamespace && in.Action != Allow {
			return fmt.Errorf("rule %d: action: rules of the namespace tier only allow", i)
		}
		r, content, err := makeRule(in)
		if err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
		r.info = RuleInfo{
			ID:        encode("rule").digest(p.info.ID).number(uint64(d)).number(uint64(i)).digest(content).sum(),
			Policy:    p.info.ID,
			Direction: d,
			Action:    in.Action,
			Index:     i,
			Text:      in.Text,
		}
		s.rules = append(s.rules, r)
		digests[i] = r.info.ID
	}
	s.isolation = RuleInfo{
		ID:        encode("isolation").digest(p.info.ID).number(uint64(d)).sum(),
		Policy:    p.info.ID,
		Direction: d,
		Action:    Deny,
		Index:     -1,
	}
	e := encode("side").digest(p.info.ID).number(uint64(d)).number(uint64(p.tier)).flag(isolates)
	if p.tier != TierNamespace {
		e = e.number(uint64(uint32(p.priority)))
	}
	s.content = e.list(digests).sum()
	return nil
}

// makeRule checks a rule and returns it with the digest of what it says.
func makeRule(in Rule) (rule, Digest, error) {
	if in.Action > Pass {
		return rule{}, Digest{}, fmt.Errorf("action: %d is unknown", in.Action)
	}
	r := rule{anyPeer: in.AnyPeer, anyPort: in.AnyPort}
	e := encode("rule").number(uint64(in.Action)).text(in.Text).flag(in.AnyPeer).flag(in.AnyPort)
	if !in.AnyPeer {
		digests, err := r.setPeers(in.Peers)
		if err != nil {
			return rule{}, Digest{}, err
		}
		e = e.set(digests)
	}
	if !in.AnyPort {
		if err := r.setPorts(in.Ports); err != nil {
			return rule{}, Digest{}, err
		}
		e = e.number(uint64(len(r.ports)))
		for _, q := range r.ports {
			e = e.number(uint64(q.Protocol)).number(uint64(q.First)).number(uint64(q.Last)).text(q.Name)
		}
	}
	return r, e.sum(), nil
}

func (r *rule) setPeers(peers []Peer) ([]Digest, error) {
	var digests []Digest
	blocks := map[Digest]block{}
	for i, p := range peers {
		switch {
		case p.Pods != nil && p.Block != nil:
			return nil, fmt.Errorf("peers[%d]: pods and block are both set", i)
		case p.Pods != nil:
			s, err := makePodSelector(*p.Pods)
			if err != nil {
				return nil, fmt.Errorf("peers[%d].pods.%w", i, err)
			}
			digests = append(digests, s.digest)
			r.selectors = append(r.selectors, s)
		case p.Block != nil:
			b, digest, err := makeBlock(*p.Block)
			if err != nil {
				return nil, fmt.Errorf("peers[%d].block.%w", i, err)
			}
			blocks[digest] = b
		default:
			return nil, fmt.Errorf("peers[%d]: neither pods nor block is set", i)
		}
	}
	if r.blocks = makeBlockSet(blocks); r.blocks != nil {
		digests = append(digests, r.blocks.digest)
	}
	return digests, nil
}

func (r *rule) setPorts(ports []Port) error {
	for i, p := range ports {
		switch {
		case p.Name != "":
			p.First, p.Last = 0, 0
		case p.Protocol == AnyProtocol:
			return fmt.Errorf("ports[%d].protocol: a numeric port needs one", i)
		case p.First > p.Last:
			return fmt.Errorf("ports[%d]: first port %d is above last port %d", i, p.First, p.Last)
		}
		r.ports = append(r.ports, p)
	}
	slices.SortFunc(r.ports, func(a, b Port) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.First, b.First),
			cmp.Compare(a.Last, b.Last), cmp.Compare(a.Name, b.Name))
	})
	r.ports = slices.Compact(r.ports)
	return nil
}
