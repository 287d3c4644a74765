// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"net/netip"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/oracle/cases"
)

// Cyclonus answers with the simulator of cyclonus.
type Cyclonus struct {
	cluster cases.Cluster
	policy  *matcher.Policy
}

// NewCyclonus takes the policies of a cluster rewritten so that they mean the
// same and go around the simulator's known faults:
//
//   - NotIn does not match where the key is absent;
//   - a label that has to be "" may be absent;
//   - policyTypes that are left to their defaults panic.
//
// A fault that cannot be gone around is that a pod can be denied to reach
// itself: do not ask. Simplify asks for the simulator's own merging of rules.
func NewCyclonus(c cases.Cluster, simplify bool) *Cyclonus {
	var rewritten []*networkingv1.NetworkPolicy
	for _, p := range c.Policies {
		rewritten = append(rewritten, rewrite(p)...)
	}
	return newFaultyCyclonus(c, rewritten, simplify)
}

func newFaultyCyclonus(c cases.Cluster, policies []*networkingv1.NetworkPolicy, simplify bool) *Cyclonus {
	return &Cyclonus{c, matcher.BuildNetworkPolicies(simplify, policies)}
}

// Allows answers a question.
func (e *Cyclonus) Allows(q cases.Question) bool {
	subject, peer := e.trafficPeer(q.Local, q.Subject), e.trafficPeer(q.Peer, e.cluster.PodAt(q.Peer))
	traffic := &matcher.Traffic{Source: peer, Destination: subject, ResolvedPort: int(q.Port), Protocol: q.Protocol}
	destination := q.Subject
	if q.Direction == policy.Egress {
		traffic.Source, traffic.Destination = subject, peer
		destination = e.cluster.PodAt(q.Peer)
	}
	if destination != nil {
		traffic.ResolvedPortName = portName(destination, q)
	}
	return e.policy.IsIngressOrEgressAllowed(traffic, q.Direction == policy.Ingress).IsAllowed()
}

func (e *Cyclonus) trafficPeer(a netip.Addr, pod *corev1.Pod) *matcher.TrafficPeer {
	p := &matcher.TrafficPeer{IP: a.String()}
	if pod != nil {
		p.Internal = &matcher.InternalPeer{
			PodLabels: pod.Labels, Namespace: pod.Namespace, NamespaceLabels: e.cluster.NamespaceLabels(pod.Namespace),
		}
	}
	return p
}

func portName(pod *corev1.Pod, q cases.Question) string {
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Protocol == q.Protocol && p.ContainerPort == int32(q.Port) {
				return p.Name
			}
		}
	}
	return ""
}

// rewrite returns policies that together mean what one does.
func rewrite(p *networkingv1.NetworkPolicy) []*networkingv1.NetworkPolicy {
	p = withDefaults(p)
	for i := range p.Spec.Ingress {
		p.Spec.Ingress[i].From = rewritePeers(p.Spec.Ingress[i].From)
	}
	for i := range p.Spec.Egress {
		p.Spec.Egress[i].To = rewritePeers(p.Spec.Egress[i].To)
	}
	var out []*networkingv1.NetworkPolicy
	for _, s := range rewriteSelector(p.Spec.PodSelector) {
		variant := p.DeepCopy()
		variant.Spec.PodSelector = s
		out = append(out, variant)
	}
	return out
}

func rewritePeers(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	for _, p := range peers {
		for _, pods := range rewriteOptional(p.PodSelector) {
			for _, namespaces := range rewriteOptional(p.NamespaceSelector) {
				out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: pods, NamespaceSelector: namespaces, IPBlock: p.IPBlock})
			}
		}
	}
	return out
}

func rewriteOptional(s *metav1.LabelSelector) []*metav1.LabelSelector {
	if s == nil {
		return []*metav1.LabelSelector{nil}
	}
	var out []*metav1.LabelSelector
	for _, v := range rewriteSelector(*s) {
		out = append(out, &v)
	}
	return out
}

// rewriteSelector returns selectors of which one matches where the given one
// does: each NotIn becomes "absent" or "present and not in", each label that has
// to be "" has to be present too.
func rewriteSelector(s metav1.LabelSelector) []metav1.LabelSelector {
	variants := []metav1.LabelSelector{{MatchLabels: s.MatchLabels}}
	for key, value := range s.MatchLabels {
		if value == "" {
			variants = require(variants, metav1.LabelSelectorRequirement{Key: key, Operator: metav1.LabelSelectorOpExists})
		}
	}
	for _, e := range s.MatchExpressions {
		alternatives := []metav1.LabelSelectorRequirement{e}
		if e.Operator == metav1.LabelSelectorOpNotIn {
			alternatives = append(alternatives, metav1.LabelSelectorRequirement{Key: e.Key, Operator: metav1.LabelSelectorOpDoesNotExist})
		}
		variants = require(variants, alternatives...)
	}
	return variants
}

// require adds one of the alternatives to each variant.
func require(variants []metav1.LabelSelector, alternatives ...metav1.LabelSelectorRequirement) []metav1.LabelSelector {
	var out []metav1.LabelSelector
	for _, v := range variants {
		for _, a := range alternatives {
			w := *v.DeepCopy()
			w.MatchExpressions = append(w.MatchExpressions, a)
			out = append(out, w)
		}
	}
	return out
}
