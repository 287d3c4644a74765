// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// world is the input of a compiler, kept plainly.
type world struct {
	policies   map[string]Policy
	namespaces map[string]Namespace
	pods       map[PodKey]Pod
	// claims lists the pods that have an address, latest last.
	claims map[netip.Addr][]PodKey
}

func newWorld() *world {
	return &world{
		policies:   map[string]Policy{},
		namespaces: map[string]Namespace{},
		pods:       map[PodKey]Pod{},
		claims:     map[netip.Addr][]PodKey{},
	}
}

func (w *world) clone() *world {
	c := &world{maps.Clone(w.policies), maps.Clone(w.namespaces), maps.Clone(w.pods), map[netip.Addr][]PodKey{}}
	for a, keys := range w.claims {
		c.claims[a] = slices.Clone(keys)
	}
	return c
}

func (w *world) setPod(p Pod) {
	old := w.pods[p.Key]
	w.pods[p.Key] = p
	w.reclaim(p.Key, w.claimed(old), w.claimed(p))
}

func (w *world) deletePod(k PodKey) {
	old := w.pods[k]
	delete(w.pods, k)
	w.reclaim(k, w.claimed(old), nil)
}

func (*world) claimed(p Pod) []netip.Addr {
	if p.HostNetwork {
		return nil
	}
	return p.Addresses
}

func (w *world) reclaim(k PodKey, old, now []netip.Addr) {
	for _, a := range old {
		if !slices.Contains(now, a) {
			w.claims[a] = slices.DeleteFunc(w.claims[a], func(other PodKey) bool { return other == k })
		}
	}
	for _, a := range now {
		if !slices.Contains(old, a) {
			w.claims[a] = append(w.claims[a], k)
		}
	}
}

// podAt is the pod that has an address.
func (w *world) podAt(a netip.Addr) (Pod, bool) {
	keys := w.claims[a]
	for _, k := range slices.Backward(keys) {
		if !w.pods[k].Terminating {
			return w.pods[k], true
		}
	}
	if len(keys) == 0 {
		return Pod{}, false
	}
	return w.pods[keys[len(keys)-1]], true
}

func (w *world) namespaceLabels(name string) map[string]string {
	if ns, ok := w.namespaces[name]; ok {
		return ns.Labels
	}
	return map[string]string{nameLabel: name}
}

func (s Selector) accepts(labels map[string]string) bool {
	for _, r := range s {
		value, ok := labels[r.Key]
		switch r.Operator {
		case In:
			ok = ok && slices.Contains(r.Values, value)
		case NotIn:
			ok = !ok || !slices.Contains(r.Values, value)
		case Exists:
		case DoesNotExist:
			ok = !ok
		}
		if !ok {
			return false
		}
	}
	return true
}

func (w *world) selects(s PodSelector, p Pod) bool {
	if p.HostNetwork {
		return false
	}
	if s.Namespace != "" && s.Namespace != p.Namespace {
		return false
	}
	if s.Namespace == "" && !s.Namespaces.accepts(w.namespaceLabels(p.Namespace)) {
		return false
	}
	return s.Pods.accepts(p.Labels)
}

// question is a packet as policy sees it.
type question struct {
	direction Direction
	peer      netip.Addr
	proto     Protocol
	port      uint16
}

// answer is a verdict with the policy and rule that decided; rule -1 is the
// default.
type answer struct {
	action Action
	policy string
	rule   int
}

// judge is the reference: policy as it is written, with nothing compiled. The
// subject and its policies are taken from w, the peer from peers.
func (w *world) judge(subject Pod, q question, peers *world) answer {
	var tiers [3][]Policy
	for _, p := range w.policies {
		if w.selects(p.Subject, subject) {
			tiers[p.Tier] = append(tiers[p.Tier], p)
		}
	}
	for t := range tiers {
		slices.SortFunc(tiers[t], func(a, b Policy) int {
			if Tier(t) != TierNamespace && a.Priority != b.Priority {
				return cmp.Compare(a.Priority, b.Priority)
			}
			return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
		})
	}
	ordered := func(t Tier) (answer, bool) {
		for _, p := range tiers[t] {
			for i, r := range p.Rules[q.direction] {
				if !r.fits(subject, q, peers) {
					continue
				}
				return answer{r.Action, p.UID, i}, r.Action != Pass
			}
		}
		return answer{}, false
	}
	if a, ok := ordered(TierAdmin); ok {
		return a
	}
	isolating := ""
	for _, p := range tiers[TierNamespace] {
		if !p.Isolates[q.direction] {
			continue
		}
		if isolating == "" {
			isolating = p.UID
		}
		for i, r := range p.Rules[q.direction] {
			if r.fits(subject, q, peers) {
				return answer{Allow, p.UID, i}
			}
		}
	}
	if isolating != "" {
		return answer{Deny, isolating, -1}
	}
	if a, ok := ordered(TierBaseline); ok {
		return a
	}
	return answer{Allow, "", -1}
}

func (r Rule) fits(subject Pod, q question, peers *world) bool {
	pod, isPod := peers.podAt(q.peer)
	peer := r.AnyPeer || slices.ContainsFunc(r.Peers, func(p Peer) bool {
		if p.Pods != nil {
			return isPod && peers.selects(*p.Pods, pod)
		}
		return p.Block.CIDR.Masked().Contains(q.peer) &&
			!slices.ContainsFunc(p.Block.Except, func(x netip.Prefix) bool { return x.Masked().Contains(q.peer) })
	})
	if !peer {
		return false
	}
	target := subject.Ports
	if q.direction == Egress {
		target = nil
		if isPod {
			target = pod.Ports
		}
	}
	return r.AnyPort || slices.ContainsFunc(r.Ports, func(p Port) bool {
		if p.Name == "" {
			return p.Protocol == q.proto && p.First <= q.port && q.port <= p.Last
		}
		return (p.Protocol == AnyProtocol || p.Protocol == q.proto) &&
			slices.Contains(target, NamedPort{Name: p.Name, Protocol: q.proto, Port: q.port})
	})
}
