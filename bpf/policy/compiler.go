// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"
)

// Compiler turns policies, pods and namespaces into the tables of the kernel.
// Set and Delete take note; [Compiler.Compile] says what changes. It is not
// safe for concurrent use.
type Compiler struct {
	namespaces map[string]*namespace
	profiles   map[Digest]*profile
	local      map[*profile]struct{} // profiles with pods of this node
	pods       map[PodKey]*pod
	holders    map[netip.Addr]*pod   // pods by each address that they have
	places     map[netip.Addr]place  // addresses in the tables
	rivals     map[netip.Addr][]*pod // addresses that several pods claim

	policies map[string]*policy // by UID
	// Policies by the namespace of their subjects, "" for those that select
	// namespaces by label.
	byNamespace map[string]map[string]*policy

	traits   traitTable
	classes  classTable
	prefixes prefixTable
	rulesets map[Digest]*ruleset

	tables   tables
	edits    edits
	compiled bool
}

// edits is what was touched since the last update.
type edits struct {
	profiles  map[*profile]struct{} // match all selectors again
	selection map[*profile]struct{} // match all policies again
	addresses map[netip.Addr]struct{}
	subjects  map[PodKey]struct{}
}

func newEdits() edits {
	return edits{
		profiles:  map[*profile]struct{}{},
		selection: map[*profile]struct{}{},
		addresses: map[netip.Addr]struct{}{},
		subjects:  map[PodKey]struct{}{},
	}
}

// NewCompiler returns a compiler that knows nothing; its first update is Full.
func NewCompiler() *Compiler {
	return &Compiler{
		namespaces:  map[string]*namespace{},
		profiles:    map[Digest]*profile{},
		local:       map[*profile]struct{}{},
		pods:        map[PodKey]*pod{},
		holders:     map[netip.Addr]*pod{},
		places:      map[netip.Addr]place{},
		rivals:      map[netip.Addr][]*pod{},
		policies:    map[string]*policy{},
		byNamespace: map[string]map[string]*policy{},
		traits:      newTraitTable(),
		classes:     newClassTable(),
		prefixes:    newPrefixTable(),
		rulesets:    map[Digest]*ruleset{},
		tables:      newTables(),
		edits:       newEdits(),
	}
}

// SetPolicy adds a policy or replaces the one with the same UID. An error
// names the policy, the direction, the rule and the field; what was there
// before then stays in force.
func (c *Compiler) SetPolicy(in Policy) error {
	p, err := newPolicy(in)
	if err != nil {
		return err
	}
	old := c.policies[in.UID]
	if old != nil && old.equal(p) {
		return nil
	}
	if old != nil {
		c.forget(old)
	}
	c.policies[in.UID] = p
	ns := p.subject.namespace
	if c.byNamespace[ns] == nil {
		c.byNamespace[ns] = map[string]*policy{}
	}
	c.byNamespace[ns][in.UID] = p
	c.reselect(p)
	return nil
}

func (p *policy) equal(q *policy) bool {
	return p.info == q.info && p.subject.digest == q.subject.digest &&
		p.sides[Ingress].content == q.sides[Ingress].content &&
		p.sides[Egress].content == q.sides[Egress].content
}

// DeletePolicy removes a policy, if there is one with that UID.
func (c *Compiler) DeletePolicy(uid string) {
	if p := c.policies[uid]; p != nil {
		delete(c.policies, uid)
		c.forget(p)
	}
}

func (c *Compiler) forget(p *policy) {
	ns := p.subject.namespace
	delete(c.byNamespace[ns], p.info.UID)
	if len(c.byNamespace[ns]) == 0 {
		delete(c.byNamespace, ns)
	}
	c.reselect(p)
}

// reselect marks the pods of this node that a policy could select.
func (c *Compiler) reselect(p *policy) {
	for f := range c.local {
		if p.subject.covers(f.namespace) {
			c.edits.selection[f] = struct{}{}
		}
	}
}

// SetNamespace adds a namespace or replaces its labels.
func (c *Compiler) SetNamespace(in Namespace) {
	ns := c.namespaceOf(in.Name)
	ns.described = true
	c.relabel(ns, makeLabels(in.Labels))
}

// DeleteNamespace forgets a namespace's labels. Its pods, if any are left,
// stay in a namespace that has nothing but its name.
func (c *Compiler) DeleteNamespace(name string) {
	ns := c.namespaces[name]
	if ns == nil {
		return
	}
	ns.described = false
	c.relabel(ns, undescribed(name))
	c.reapNamespace(ns)
}

func (c *Compiler) relabel(ns *namespace, labels labelSet) {
	if slices.Equal(ns.labels, labels) {
		return
	}
	ns.labels = labels
	for f := range ns.profiles {
		c.edits.profiles[f] = struct{}{}
		if f.local > 0 {
			c.edits.selection[f] = struct{}{}
		}
	}
}

func (c *Compiler) reapNamespace(ns *namespace) {
	if !ns.described && len(ns.profiles) == 0 {
		delete(c.namespaces, ns.name)
	}
}

// SetPod adds a pod or replaces the one with the same key. An error names the
// pod and the field; what was there before then stays in force. The pod's
// addresses are kept and must not be changed.
func (c *Compiler) SetPod(in Pod) error {
	addresses, ports, err := checkPod(in)
	if err != nil {
		return err
	}
	x := c.pods[in.Key]
	if x == nil {
		x = &pod{key: in.Key, owner: in.Key.Owner()}
		c.pods[in.Key] = x
	}
	if in.HostNetwork {
		c.leave(x)
		x.local = nil
		c.setAddresses(x, nil)
		return nil
	}
	var local *localPod
	if in.Local {
		local = &localPod{uid: in.UID, name: in.Name, audit: in.Audit}
	}
	c.setProfile(x, c.profileOf(in, ports), local)
	if x.terminating != in.Terminating {
		x.terminating = in.Terminating
		for _, a := range x.addresses {
			c.elect(a)
		}
	}
	c.setAddresses(x, addresses)
	return nil
}

// setProfile makes a pod one of a profile, here or elsewhere.
func (c *Compiler) setProfile(x *pod, f *profile, local *localPod) {
	if x.profile == f && (x.local == nil) == (local == nil) {
		if local != nil && *x.local != *local {
			c.edits.subjects[x.key] = struct{}{}
			x.local = local
		}
		return
	}
	c.leave(x)
	x.local = local
	f.add(x)
	c.touch(x, f)
}

// leave takes a pod out of its profile, if it has one.
func (c *Compiler) leave(x *pod) {
	if f := x.profile; f != nil {
		f.remove(x)
		c.touch(x, f)
	}
}

// touch marks what depends on a pod being one of a profile.
func (c *Compiler) touch(x *pod, f *profile) {
	for _, a := range x.addresses {
		c.edits.addresses[a] = struct{}{}
	}
	if len(f.pods) == 0 {
		c.edits.profiles[f] = struct{}{}
	}
	if x.local == nil {
		return
	}
	c.edits.subjects[x.key] = struct{}{}
	_, had := c.local[f]
	if has := f.local > 0; has != had {
		c.edits.selection[f] = struct{}{}
		if has {
			c.local[f] = struct{}{}
		} else {
			delete(c.local, f)
		}
	}
}

func (c *Compiler) setAddresses(x *pod, addresses []netip.Addr) {
	if slices.Equal(x.addresses, addresses) {
		return
	}
	old := x.addresses
	x.addresses = addresses
	for _, a := range old {
		if !slices.Contains(addresses, a) {
			c.disclaim(a, x)
		}
	}
	for _, a := range addresses {
		if !slices.Contains(old, a) {
			c.claim(a, x)
		}
	}
	if x.local != nil {
		c.edits.subjects[x.key] = struct{}{}
	}
}

// DeletePod removes a pod, if there is one with that key.
func (c *Compiler) DeletePod(k PodKey) {
	x := c.pods[k]
	if x == nil {
		return
	}
	c.leave(x)
	c.setAddresses(x, nil)
	delete(c.pods, k)
}

// Compile returns what changed since the last update. The first one is Full.
func (c *Compiler) Compile() Update {
	if !c.compiled {
		return c.Snapshot()
	}
	return c.update(false)
}

// Compact is Compile and the second phase of make before break: it also drops
// what older policies told peers apart by, so that their classes merge again.
// The update before it must have been applied.
func (c *Compiler) Compact() Update {
	if !c.compiled {
		return c.Snapshot()
	}
	return c.update(true)
}

// Pending says whether Compact would drop anything.
func (c *Compiler) Pending() bool { return c.traits.retired > 0 }

// Snapshot returns the whole state. Like Compile it takes in all edits.
func (c *Compiler) Snapshot() Update {
	c.update(false)
	c.compiled = true
	return c.dump()
}
