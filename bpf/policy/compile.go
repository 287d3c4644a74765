// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"
)

// pass makes one update out of the edits since the last one.
type pass struct {
	*Compiler
	u Update

	made, gone []*ruleset
	// moved profiles have another class than before.
	moved map[*profile]struct{}
	// regrouped says that block sets came or went.
	regrouped bool
	// flipped says that a subject gets rulesets it did not have.
	flipped bool
}

func (c *Compiler) update(compact bool) Update {
	p := &pass{Compiler: c, moved: map[*profile]struct{}{}}
	p.selectRulesets()
	for _, r := range p.made {
		r.bind(&p.traits)
	}
	var dropped map[*trait]struct{}
	if compact {
		dropped = p.traits.drop()
	}
	p.classifyProfiles(dropped)
	p.classifyPrefixes(dropped)
	p.classifyPlaces()
	p.setSubjects()
	p.setJoins()
	p.bridge()
	p.addCells()
	p.settle()
	return p.u
}

// selectRulesets finds the rulesets of the profiles whose policies may have
// changed.
func (p *pass) selectRulesets() {
	touched := map[*ruleset]struct{}{}
	for f := range p.edits.selection {
		var want [2]*ruleset
		if f.local > 0 {
			want = p.rulesetsOf(f)
		}
		if want == f.rulesets {
			continue
		}
		for d := range want {
			if r := f.rulesets[d]; r != nil {
				r.profiles--
				touched[r] = struct{}{}
			}
			if r := want[d]; r != nil {
				r.profiles++
				touched[r] = struct{}{}
			}
		}
		f.rulesets = want
		p.touchSubjects(f)
	}
	for r := range touched {
		switch needed := r.profiles > 0; {
		case needed && !r.live:
			p.made = append(p.made, r)
		case !needed && r.live:
			p.gone = append(p.gone, r)
		case !needed:
			delete(p.rulesets, r.ID)
		}
	}
}

func (p *pass) touchSubjects(f *profile) {
	if f.local == 0 {
		return
	}
	for _, x := range f.pods {
		if x.local != nil {
			p.edits.subjects[x.key] = struct{}{}
		}
	}
}

// rulesetsOf interns the rulesets of a profile.
func (c *Compiler) rulesetsOf(f *profile) [2]*ruleset {
	var selecting []*policy
	for _, ns := range []string{f.namespace.name, ""} {
		for _, p := range c.byNamespace[ns] {
			if p.subject.matches(f) {
				selecting = append(selecting, p)
			}
		}
	}
	var rulesets [2]*ruleset
	for d := range rulesets {
		id, sources, ports := rulesetOf(Direction(d), selecting, f.ports)
		if id == Open {
			continue
		}
		if c.rulesets[id] == nil {
			c.rulesets[id] = newRuleset(id, Direction(d), sources, ports)
		}
		rulesets[d] = c.rulesets[id]
	}
	return rulesets
}

// classifyProfiles gives profiles the traits that are new to them and takes
// those that are dropped.
func (p *pass) classifyProfiles(dropped map[*trait]struct{}) {
	for _, x := range p.traits.freshPods {
		p.spread(x)
	}
	for _, n := range p.traits.freshNames {
		for _, f := range p.profiles {
			p.resolve(n, f)
		}
	}
	if len(dropped) > 0 {
		stripped := map[*class]*class{}
		for _, f := range p.profiles {
			if stripped[f.class] == nil {
				stripped[f.class] = p.classes.without(f.class, dropped)
			}
			p.setClass(f, stripped[f.class])
		}
	}

	covering := map[*namespace][]*trait{}
	for f := range p.edits.profiles {
		ns := f.namespace
		if _, ok := covering[ns]; !ok {
			covering[ns] = p.traits.covering(ns)
		}
		p.setClass(f, p.classes.intern(p.signatureOf(f, covering[ns])))
	}
}

// spread gives a new selector's trait to the profiles that it matches.
func (p *pass) spread(x *trait) {
	in := p.namespaces
	if name := x.pods.namespace; name != "" {
		in = map[string]*namespace{}
		if ns := p.namespaces[name]; ns != nil {
			in[name] = ns
		}
	}
	alone := p.classes.intern(signature{x})
	for _, ns := range in {
		if !x.pods.covers(ns) {
			continue
		}
		for f := range ns.profiles {
			if x.pods.pods.matches(f.labels) {
				p.setClass(f, p.classes.union(f.class, alone))
			}
		}
	}
}

// resolve gives a profile the ports behind a name that is new.
func (p *pass) resolve(n *portName, f *profile) {
	for _, q := range f.ports {
		if q.Name == n.name {
			p.setClass(f, p.classes.union(f.class, p.classes.intern(signature{p.traits.ofPort(n, q)})))
		}
	}
}

// signatureOf matches a profile with everything in use. The traits are those
// of selectors that cover its namespace.
func (p *pass) signatureOf(f *profile, traits []*trait) signature {
	var s signature
	for _, x := range traits {
		if x.pods.pods.matches(f.labels) {
			s = append(s, x)
		}
	}
	for _, q := range f.ports {
		if n := p.traits.names[q.Name]; n != nil {
			s = append(s, p.traits.ofPort(n, q))
		}
	}
	return s.sorted()
}

func (p *pass) setClass(f *profile, k *class) {
	if f.class == k {
		return
	}
	f.class.profiles--
	k.profiles++
	p.classes.touched[f.class] = struct{}{}
	f.class = k
	p.moved[f] = struct{}{}
}

// classifyPrefixes adds the new block sets to the prefix table, removes those
// that are dropped, and gives every node its class.
func (p *pass) classifyPrefixes(dropped map[*trait]struct{}) {
	for _, x := range p.traits.freshBlocks {
		p.prefixes.add(x)
		p.regrouped = true
	}
	for x := range dropped {
		if x.blocks != nil {
			p.prefixes.remove(x)
			p.regrouped = true
		}
	}
	if !p.regrouped {
		return
	}
	for _, n := range p.prefixes.prune() {
		p.classes.replace(n.class, nil)
		p.u.GonePeers = append(p.u.GonePeers, PeerKey{Prefix: n.prefix})
	}
	p.prefixes.all(func(n *node) {
		k := p.classes.intern(p.prefixes.covering(n))
		if k == n.class {
			return
		}
		p.classes.replace(n.class, k)
		n.class = k
		p.u.Peers = append(p.u.Peers, n.entry())
	})
}

func (n *node) entry() PeerEntry { return PeerEntry{Prefix: n.prefix, Class: n.class.digest} }

// classifyPlaces gives every address concerned its class.
func (p *pass) classifyPlaces() {
	for a := range p.edits.addresses {
		p.classifyPlace(a)
	}
	for f := range p.moved {
		p.touchSubjects(f)
		for _, x := range f.pods {
			for _, a := range x.addresses {
				p.classifyPlace(a)
			}
		}
	}
	if p.regrouped {
		// Others have no entry, whatever covers them.
		for a := range p.places {
			p.classifyPlace(a)
		}
	}
}

func (p *pass) classifyPlace(a netip.Addr) {
	x, was := p.holders[a], p.places[a]
	var at place
	// A pod that nothing matches needs no entry: the prefixes tell all.
	if x != nil && x.profile.class != p.classes.zero {
		at = place{p.classes.union(x.profile.class, p.prefixes.class(exact(a), p.classes.zero)), x.owner}
	}
	if at == was {
		return
	}
	p.classes.replace(was.class, at.class)
	if at.class == nil {
		delete(p.places, a)
		p.u.GonePeers = append(p.u.GonePeers, PeerKey{Prefix: exact(a), Exact: true})
		return
	}
	p.places[a] = at
	p.u.Peers = append(p.u.Peers, at.entry(a))
}

func exact(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func (at place) entry(a netip.Addr) PeerEntry {
	return PeerEntry{Prefix: exact(a), Exact: true, Class: at.class.digest, Owner: at.owner}
}

// setSubjects publishes the pods of this node that changed.
func (p *pass) setSubjects() {
	for key := range p.edits.subjects {
		x, old := p.pods[key], p.tables.subjects[key]
		if x == nil || x.local == nil {
			if old != nil {
				p.classes.replace(old.class, nil)
				delete(p.tables.subjects, key)
				p.u.GoneSubjects = append(p.u.GoneSubjects, key)
			}
			continue
		}
		s := x.subject()
		if old != nil && old.Subject == s.Subject {
			continue
		}
		if old == nil {
			p.classes.replace(nil, s.class)
		} else {
			p.classes.replace(old.class, s.class)
		}
		p.flipped = p.flipped || old == nil || old.Rulesets != s.Rulesets
		p.tables.subjects[key] = s
		p.u.Subjects = append(p.u.Subjects, s.Subject)
	}
}

// subject of a pod of this node.
func (x *pod) subject() *subject {
	f := x.profile
	s := &subject{class: f.class, Subject: Subject{
		Pod: x.key, UID: x.local.uid, Namespace: f.namespace.name, Name: x.local.name,
		Class: f.class.digest, Owner: x.owner, Audit: x.local.audit,
	}}
	for d, r := range f.rulesets {
		if r != nil {
			s.Rulesets[d] = r.ID
		}
	}
	return s
}

// setJoins publishes the classes that this node's pods without addresses would
// have at the addresses that blocks cover.
func (p *pass) setJoins() {
	if !p.regrouped && len(p.edits.subjects) == 0 {
		return
	}
	want := map[[2]*class]*class{}
	if waiting := p.waiting(); len(waiting) > 0 {
		p.prefixes.all(func(n *node) {
			if n.class == p.classes.zero {
				return
			}
			for k := range waiting {
				want[[2]*class{k, n.class}] = p.classes.union(k, n.class)
			}
		})
	}
	for k, joined := range p.tables.joins {
		if want[k] == nil {
			p.countJoin(k, joined, -1)
			delete(p.tables.joins, k)
			p.u.GoneJoins = append(p.u.GoneJoins, join(k, joined))
		}
	}
	for k, joined := range want {
		if p.tables.joins[k] == nil {
			p.countJoin(k, joined, 1)
			p.tables.joins[k] = joined
			p.u.Joins = append(p.u.Joins, join(k, joined))
		}
	}
}

// waiting is the classes of this node's pods that have no address yet.
func (p *pass) waiting() map[*class]struct{} {
	classes := map[*class]struct{}{}
	for f := range p.local {
		if f.class != p.classes.zero && slices.ContainsFunc(f.pods, func(x *pod) bool {
			return x.local != nil && len(x.addresses) == 0
		}) {
			classes[f.class] = struct{}{}
		}
	}
	return classes
}

func (p *pass) countJoin(k [2]*class, joined *class, n int) {
	for _, x := range []*class{k[0], k[1], joined} {
		p.classes.count(x, n)
	}
}

// bridge gives peers that leave in an update that flips a subject the class
// they fall to before they leave: a new ruleset has no cells for the classes
// of old.
func (p *pass) bridge() {
	if !p.flipped {
		return
	}
	for _, k := range p.u.GonePeers {
		falls := p.prefixes.class(k.Prefix, p.classes.zero)
		p.u.Peers = append(p.u.Peers, PeerEntry{Prefix: k.Prefix, Exact: k.Exact, Class: falls.digest})
	}
}

// addCells gives the new classes cells in all rulesets, those about to go
// included, and the new rulesets cells for all classes.
func (p *pass) addCells() {
	added, gone := p.classes.settle()
	for _, k := range added {
		p.u.Classes = append(p.u.Classes, k.digest)
		seen := map[*ruleset]struct{}{}
		for _, x := range k.signature {
			for r := range x.rulesets {
				if _, ok := seen[r]; ok || !r.live {
					continue
				}
				seen[r] = struct{}{}
				if cell, ok := r.cell(k); ok {
					p.u.Cells = append(p.u.Cells, cell)
				}
			}
		}
	}
	for _, k := range gone {
		p.u.GoneClasses = append(p.u.GoneClasses, k.digest)
	}
	for _, r := range p.made {
		p.u.Rulesets = append(p.u.Rulesets, r.Ruleset)
		p.u.Cells = p.appendCells(p.u.Cells, r)
	}
}

// settle makes the made rulesets live, the gone ones forgotten and the edits
// done.
func (p *pass) settle() {
	for _, r := range p.made {
		r.live = true
		r.infos(func(i PolicyInfo) { p.tables.policies.hold(i.ID, i) }, func(i RuleInfo) { p.tables.rules.hold(i.ID, i) })
	}
	for _, r := range p.gone {
		p.u.GoneRulesets = append(p.u.GoneRulesets, r.ID)
		r.infos(func(i PolicyInfo) { p.tables.policies[i.ID].rulesets-- }, func(i RuleInfo) { p.tables.rules[i.ID].rulesets-- })
		r.unbind()
		delete(p.rulesets, r.ID)
	}
	if len(p.made)+len(p.gone) > 0 {
		p.u.Policies, p.u.GonePolicies = p.tables.policies.settle()
		p.u.Rules, p.u.GoneRules = p.tables.rules.settle()
	}
	p.traits.settle()
	for f := range p.edits.profiles {
		if len(f.pods) == 0 {
			p.reap(f)
		}
	}
	p.edits = newEdits()
}

// reap forgets a profile without pods.
func (c *Compiler) reap(f *profile) {
	f.class.profiles--
	c.classes.touched[f.class] = struct{}{}
	delete(c.profiles, f.id)
	delete(f.namespace.profiles, f)
	c.reapNamespace(f.namespace)
}
