// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// namespace is a namespace somebody described or that has pods.
type namespace struct {
	name      string
	labels    labelSet
	described bool
	profiles  map[*profile]struct{}
}

// profile is all pods of a namespace with equal labels and named ports: no
// policy can tell them apart. The replicas of a workload share one, so
// selectors are matched once for all of them.
type profile struct {
	id        Digest
	namespace *namespace
	labels    labelSet
	ports     []NamedPort // sorted
	pods      []*pod
	// class of the pods at addresses that no block covers.
	class *class
	// local counts the pods of this node; only then there are rulesets.
	local    int
	rulesets [2]*ruleset // nil is open
}

// pod keeps of a [Pod] what is needed later.
type pod struct {
	key         PodKey
	profile     *profile // nil on the host network
	addresses   []netip.Addr
	local       *localPod // nil on other nodes
	slot        uint32    // in profile.pods
	owner       uint16
	terminating bool
}

type localPod struct {
	uid, name string
	audit     bool
}

// place is what the tables say of an address; without a class it is not there.
type place struct {
	class *class
	owner uint16
}

func (p *profile) add(x *pod) {
	x.profile, x.slot = p, uint32(len(p.pods))
	p.pods = append(p.pods, x)
	if x.local != nil {
		p.local++
	}
}

func (p *profile) remove(x *pod) {
	last := p.pods[len(p.pods)-1]
	p.pods[x.slot] = last
	last.slot = x.slot
	p.pods[len(p.pods)-1] = nil
	p.pods = p.pods[:len(p.pods)-1]
	x.profile = nil
	if x.local != nil {
		p.local--
	}
}

// checkPod returns the addresses and ports of a pod in canonical form, its own
// where they are.
func checkPod(p Pod) ([]netip.Addr, []NamedPort, error) {
	if p.Key == "" {
		return nil, nil, fmt.Errorf("pod %s/%s: key: must not be empty", p.Namespace, p.Name)
	}
	fail := func(field string, i int, err error) ([]netip.Addr, []NamedPort, error) {
		return nil, nil, fmt.Errorf("pod %s/%s: %s[%d]: %w", p.Namespace, p.Name, field, i, err)
	}
	addresses := p.Addresses
	for i, a := range p.Addresses {
		canonical := a.Unmap().WithZone("")
		if !canonical.IsValid() || canonical.IsUnspecified() {
			return fail("addresses", i, errors.New("not a valid address"))
		}
		if canonical != a || slices.Contains(p.Addresses[:i], a) {
			addresses = nil
		}
	}
	if addresses == nil {
		for _, a := range p.Addresses {
			if a = a.Unmap().WithZone(""); !slices.Contains(addresses, a) {
				addresses = append(addresses, a)
			}
		}
	}
	var ports []NamedPort
	for i, q := range p.Ports {
		if q.Name == "" {
			return fail("ports", i, errors.New("name: must not be empty"))
		}
		if q.Protocol == AnyProtocol {
			return fail("ports", i, fmt.Errorf("port %q: protocol: must be set", q.Name))
		}
		ports = append(ports, q)
	}
	slices.SortFunc(ports, func(a, b NamedPort) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
	return addresses, slices.Compact(ports), nil
}

// profileOf finds or makes the profile of a pod.
func (c *Compiler) profileOf(p Pod, ports []NamedPort) *profile {
	labels := makeLabels(p.Labels)
	e := labels.encode(encode("profile").text(p.Namespace)).number(uint64(len(ports)))
	for _, q := range ports {
		e = e.text(q.Name).number(uint64(q.Protocol)).number(uint64(q.Port))
	}
	id := e.sum()
	f := c.profiles[id]
	if f == nil {
		ns := c.namespaceOf(p.Namespace)
		f = &profile{id: id, namespace: ns, labels: labels, ports: ports, class: c.classes.zero}
		c.profiles[id] = f
		ns.profiles[f] = struct{}{}
		c.edits.profiles[f] = struct{}{}
	}
	return f
}

func (c *Compiler) namespaceOf(name string) *namespace {
	ns := c.namespaces[name]
	if ns == nil {
		ns = &namespace{name: name, labels: undescribed(name), profiles: map[*profile]struct{}{}}
		c.namespaces[name] = ns
	}
	return ns
}

func undescribed(name string) labelSet { return makeLabels(map[string]string{nameLabel: name}) }

// Holder answers the pod whose an address is, as of the last change; of several
// that have it, the one that is taken to.
func (c *Compiler) Holder(a netip.Addr) (PodKey, bool) {
	x := c.holders[a]
	if x == nil {
		return "", false
	}
	return x.key, true
}

// claim records that a pod has an address. Two pods may for a while: an
// address is given out again while its former pod is still being deleted.
func (c *Compiler) claim(a netip.Addr, x *pod) {
	holder := c.holders[a]
	switch rivals := c.rivals[a]; {
	case rivals != nil:
		c.rivals[a] = append(rivals, x)
	case holder != nil:
		c.rivals[a] = []*pod{holder, x}
	default:
		c.holders[a] = x
	}
	c.elect(a)
}

// disclaim undoes claim.
func (c *Compiler) disclaim(a netip.Addr, x *pod) {
	if rivals := c.rivals[a]; rivals != nil {
		c.rivals[a] = slices.DeleteFunc(rivals, func(y *pod) bool { return y == x })
	} else {
		delete(c.holders, a)
	}
	c.elect(a)
}

// elect settles whose an address is: of the latest to claim it among the pods
// that are not terminating, else of the latest.
func (c *Compiler) elect(a netip.Addr) {
	c.edits.addresses[a] = struct{}{}
	rivals := c.rivals[a]
	if len(rivals) == 0 {
		return
	}
	holder := rivals[len(rivals)-1]
	for _, x := range slices.Backward(rivals) {
		if !x.terminating {
			holder = x
			break
		}
	}
	c.holders[a] = holder
	if len(rivals) == 1 {
		delete(c.rivals, a)
	}
}
