// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package inventory

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// record is what there is to know of a Pod, and a candidate: a pod with all the
// addresses it says it has. A Pod that has nothing to do with this node is its own
// candidate, since there may be hundreds of thousands. What is known of its
// endpoints is in a copy.
type record struct {
	*policy.Pod
	// given is the pod as the compiler has it; nil before it has.
	given *policy.Pod
	// created in ns since 1970; 0 if not said.
	created int64
	// latest is the number of its endpoint attached last; 0 without any.
	latest        uint32
	where         where
	mirror, ended bool
	// ignored says that the pod asks for audit mode in vain.
	ignored bool
}

// where a Pod runs.
type where uint8

const (
	nowhere where = iota // not yet, or not said
	here
	elsewhere
)

func (a *record) equal(b *record) bool {
	return a == b || samePod(a.Pod, b.Pod) && a.created == b.created && a.latest == b.latest && a.ignored == b.ignored
}

// contest is an address that several pods claim. Losers do not get it.
type contest struct {
	rivals, losers []policy.PodKey
	problems       []source.Problem
}

// candidates are all pods there may be.
type candidates struct {
	pods        map[policy.PodKey]*record
	inNamespace map[string]int
	// rivals are who claim an address together. Who does alone is known to the
	// compiler.
	rivals   map[netip.Addr][]policy.PodKey
	contests map[netip.Addr]*contest
	ignored  map[policy.PodKey]struct{}
	// audited namespaces.
	audited map[string]bool
}

func newCandidates() candidates {
	return candidates{
		pods:        make(map[policy.PodKey]*record),
		inNamespace: make(map[string]int),
		rivals:      make(map[netip.Addr][]policy.PodKey),
		contests:    make(map[netip.Addr]*contest),
		ignored:     make(map[policy.PodKey]struct{}),
		audited:     make(map[string]bool),
	}
}

// namespacesChanged answers the namespaces whose object changed, and adds their
// pods to the dirty ones if audit mode did.
func (i *Inventory) namespacesChanged(dirty map[policy.PodKey]struct{}) map[string]struct{} {
	out := make(map[string]struct{})
	for key := range i.changed {
		if key.Kind != manifest.KindNamespace {
			continue
		}
		out[key.Name] = struct{}{}
		o := i.objects[key]
		audit := o != nil && o.audit
		if audit == i.candidates.audited[key.Name] {
			continue
		}
		if delete(i.candidates.audited, key.Name); audit {
			i.candidates.audited[key.Name] = true
		}
		for pod, c := range i.candidates.pods {
			if c.Namespace == key.Name {
				dirty[pod] = struct{}{}
			}
		}
	}
	return out
}

// namespace is the one of a name, if it has an object or pods.
func (i *Inventory) namespace(name string) (policy.Namespace, bool) {
	if o, ok := i.objects[manifest.Key{Kind: manifest.KindNamespace, Name: name}]; ok {
		return *o.namespace, true
	}
	return manifest.NamespaceOf(name, nil), i.candidates.inNamespace[name] > 0
}

// proposal is what has become of candidates: the pods that may differ, who claims
// the addresses that they claim or claimed, and what the compiler has of those that
// are gone.
type proposal struct {
	candidates *candidates
	compiler   *policy.Compiler
	pods       map[policy.PodKey]struct{}
	claims     map[netip.Addr][]policy.PodKey
	gone       map[policy.PodKey]*policy.Pod
}

// propose brings the candidates of some keys up to date, and adds the namespaces
// that got their first pod or lost their last.
func (i *Inventory) propose(c *policy.Compiler, keys map[policy.PodKey]struct{}, namespaces map[string]struct{}) *proposal {
	out := &proposal{
		candidates: &i.candidates, compiler: c, pods: make(map[policy.PodKey]struct{}),
		claims: make(map[netip.Addr][]policy.PodKey), gone: make(map[policy.PodKey]*policy.Pod),
	}
	for key := range keys {
		before, now := i.candidates.pods[key], i.candidate(key)
		if before == nil && now == nil || before != nil && now != nil && before.equal(now) {
			continue
		}
		out.pods[key] = struct{}{}
		var given *policy.Pod
		if before != nil {
			given = before.given
			out.remove(before, namespaces)
		}
		if now != nil {
			now.given = given
			out.add(now, namespaces)
		} else if given != nil {
			out.gone[key] = given
		}
	}
	return out
}

func (p *proposal) add(r *record, namespaces map[string]struct{}) {
	c := p.candidates
	c.pods[r.Key] = r
	if c.inNamespace[r.Namespace]++; c.inNamespace[r.Namespace] == 1 {
		namespaces[r.Namespace] = struct{}{}
	}
	if r.ignored {
		c.ignored[r.Key] = struct{}{}
	}
	if !r.HostNetwork {
		for _, a := range r.Addresses {
			p.claims[a] = append(p.claimants(a), r.Key)
		}
	}
}

func (p *proposal) remove(r *record, namespaces map[string]struct{}) {
	c := p.candidates
	delete(c.pods, r.Key)
	delete(c.ignored, r.Key)
	if c.inNamespace[r.Namespace]--; c.inNamespace[r.Namespace] == 0 {
		delete(c.inNamespace, r.Namespace)
		namespaces[r.Namespace] = struct{}{}
	}
	if !r.HostNetwork {
		for _, a := range r.Addresses {
			p.claims[a] = slices.DeleteFunc(p.claimants(a), func(k policy.PodKey) bool { return k == r.Key })
		}
	}
}

// claimants are who claims an address.
func (p *proposal) claimants(a netip.Addr) []policy.PodKey {
	if claims, touched := p.claims[a]; touched {
		return claims
	}
	if rivals := p.candidates.rivals[a]; rivals != nil {
		return rivals
	}
	// The compiler may have refused to let go of it, or of its pod.
	key, held := p.compiler.Holder(a)
	if r := p.candidates.pods[key]; held && r != nil && !r.HostNetwork && slices.Contains(r.Addresses, a) {
		return []policy.PodKey{key}
	}
	return nil
}

// candidate is what object and endpoints of a key amount to; nil without any.
func (i *Inventory) candidate(key policy.PodKey) *record {
	mine := i.attached[key]
	o := i.object(key)
	local := true
	switch {
	case o != nil:
		local = len(mine) > 0 || i.opts.AllLocal || i.expected(o)
	case len(mine) > 0:
		o = &record{Pod: unlisted(key, mine)}
	default:
		return nil
	}
	audited := i.candidates.audited[o.Namespace]
	audit := o.Audit && i.opts.AuditPods || audited
	ignored := local && o.Audit && !i.opts.AuditPods && !audited
	if local == o.Local && audit == o.Audit && len(mine) == 0 && !ignored {
		return o
	}
	pod, out := *o.Pod, *o
	pod.Local, pod.Audit, out.ignored = local, audit, ignored
	if len(mine) > 0 {
		// The node knows better than a status that may be old.
		pod.Addresses = routable(mine)
		out.latest = mine[len(mine)-1].ID
	}
	out.Pod = &pod
	return &out
}

// expected says that a pod without an endpoint may get one here, so that its
// rulesets must be there before. One that has ended gets none any more: a node
// may be left with thousands of those.
func (i *Inventory) expected(o *record) bool {
	if o.ended {
		return false
	}
	if o.where != nowhere || !i.opts.Unlisted {
		return o.where == here
	}
	return len(o.Addresses) == 0
}

// unlisted is the pod that endpoints belong to and no object describes.
func unlisted(key policy.PodKey, endpoints []pinning.Endpoint) *policy.Pod {
	first := &endpoints[0]
	return &policy.Pod{
		Key:       key,
		UID:       first.PodUID,
		Namespace: namespaceOf(first),
		Name:      nameOf(first),
		Labels:    maps.Clone(first.Labels),
		Addresses: routable(endpoints),
		Local:     true,
	}
}

// settle decides the contests about addresses, and adds to the pods that may
// differ those that win or lose one.
func (p *proposal) settle() {
	c := p.candidates
	for a, claims := range p.claims {
		if delete(c.rivals, a); len(claims) > 1 {
			c.rivals[a] = claims
		}
		before := c.contests[a]
		delete(c.contests, a)
		now := c.contest(a)
		if now != nil {
			c.contests[a] = now
		}
		for _, one := range []*contest{before, now} {
			if one == nil {
				continue
			}
			for _, key := range one.rivals {
				p.pods[key] = struct{}{}
			}
		}
	}
}

// contest leaves an address to one pod where it can tell whose it is; nil if at
// most one claims it. Of local pods the one attached last has it, and a status
// elsewhere that still names it is only old. Of pods elsewhere the youngest has
// it, of those that are not terminating; where it is not said when they were
// made, the compiler chooses.
func (c *candidates) contest(a netip.Addr) *contest {
	if len(c.rivals[a]) < 2 {
		return nil
	}
	out := &contest{rivals: slices.SortedFunc(slices.Values(c.rivals[a]), func(x, y policy.PodKey) int {
		p, q := c.pods[x], c.pods[y]
		return cmp.Or(cmp.Compare(q.latest, p.latest), compareBool(p.Terminating, q.Terminating), cmp.Compare(q.created, p.created),
			cmp.Compare(p.Namespace, q.Namespace), cmp.Compare(p.Name, q.Name), cmp.Compare(x, y))
	})}
	first := c.pods[out.rivals[0]]
	local := first.latest > 0
	for _, key := range out.rivals[1:] {
		pod := c.pods[key]
		if local == (pod.latest > 0) && !pod.Terminating && !first.Terminating {
			out.problems = append(out.problems, source.Problem{
				Subject: objectKey(pod.Pod).String(), Object: objectKey(pod.Pod),
				Reason: fmt.Sprintf("its address %v is also that of %v", a, objectKey(first.Pod)),
			})
		}
		if local || pod.created != 0 {
			out.losers = append(out.losers, key)
		}
	}
	return out
}

// settled is a candidate's pod with the addresses that are left to it.
func (c *candidates) settled(p *record) *policy.Pod {
	lost := func(a netip.Addr) bool {
		one := c.contests[a]
		return one != nil && slices.Contains(one.losers, p.Key)
	}
	if p.HostNetwork || !slices.ContainsFunc(p.Addresses, lost) {
		return p.Pod
	}
	pod := *p.Pod
	pod.Addresses = slices.DeleteFunc(slices.Clone(pod.Addresses), lost)
	return &pod
}

// problems are those of all candidates, in a stable order.
func (c *candidates) problems() (out []source.Problem) {
	for _, key := range slices.Sorted(maps.Keys(c.ignored)) {
		object := objectKey(c.pods[key].Pod)
		out = append(out, source.Problem{
			Subject: object.String(), Object: object,
			Reason: "annotation " + manifest.AnnotationAudit + " has no effect on a Pod without --audit-pods, only on its Namespace",
		})
	}
	for _, a := range slices.SortedFunc(maps.Keys(c.contests), netip.Addr.Compare) {
		out = append(out, c.contests[a].problems...)
	}
	return out
}

// compareBool orders false before true.
func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
