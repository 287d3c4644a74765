// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package suggest makes NetworkPolicies of flows that were seen: policies that
// allow those flows and nothing else. It is how one gets from open to closed:
// put a namespace under audit, look on for long enough, apply what is suggested.
package suggest

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/observe/filter"
	"github.com/podgate/podgate/observe/hubble"
	"github.com/podgate/podgate/observe/naming"
)

// Options of a [Collector].
type Options struct {
	// Namespaces to suggest policies for; all if there is none.
	Namespaces []string
	// Denied says to allow what was denied for want of a rule, too.
	Denied bool
}

// Collector gathers flows.
type Collector struct {
	opts     Options
	subjects map[string]*subject
	left     map[string]int
}

// subject is a set of pods that have all labels in common, but for those that
// name one of them.
type subject struct {
	namespace string
	labels    map[string]string
	// name is that of the workload; the first by name if there are several.
	name string
	seen map[networkingv1.PolicyType]map[string]*peer
}

// peer is who a subject talks to.
type peer struct {
	what  networkingv1.NetworkPolicyPeer
	ports map[port]struct{}
}

type port struct {
	protocol corev1.Protocol
	number   uint32
}

// New is a collector that has seen nothing.
func New(o Options) *Collector {
	return &Collector{opts: o, subjects: make(map[string]*subject), left: make(map[string]int)}
}

// Add takes a flow of podgate's. Flows of other namespaces, and those that need
// no rule, do not matter.
func (c *Collector) Add(f *flowpb.Flow) {
	local, other, address := f.GetDestination(), f.GetSource(), f.GetIP().GetSource()
	direction := networkingv1.PolicyTypeIngress
	if f.GetTrafficDirection() == flowpb.TrafficDirection_EGRESS {
		local, other, address = other, local, f.GetIP().GetDestination()
		direction = networkingv1.PolicyTypeEgress
	}
	if local.GetPodName() == "" || local.GetNamespace() == "" || len(c.opts.Namespaces) > 0 && !slices.Contains(c.opts.Namespaces, local.GetNamespace()) {
		return
	}
	d := hubble.DetailsOf(f)
	if !c.matters(f.GetVerdict(), d) || f.GetIsReply().GetValue() {
		return
	}
	at, why := portOf(f)
	if why != "" {
		c.left[why]++
		return
	}
	labels := naming.PodLabels(local.GetLabels())
	if strip(labels); len(labels) == 0 {
		c.left[fmt.Sprintf("%s/%s has no labels to be selected by", local.GetNamespace(), local.GetPodName())]++
		return
	}
	who, why := peerOf(f, local, other, address)
	if why != "" {
		c.left[why]++
		return
	}
	s := c.subject(local, labels)
	key := text(&who)
	p := s.seen[direction][key]
	if p == nil {
		p = &peer{what: who, ports: make(map[port]struct{})}
		s.seen[direction][key] = p
	}
	p.ports[at] = struct{}{}
}

// matters says whether a flow would need a rule.
func (c *Collector) matters(v flowpb.Verdict, d hubble.Details) bool {
	if !slices.ContainsFunc([]bpf.DatapathReason{
		bpf.DatapathReasonREASON_POLICY, bpf.DatapathReasonREASON_DEFAULT, bpf.DatapathReasonREASON_OPEN, bpf.DatapathReasonREASON_CLOSED,
	}, func(r bpf.DatapathReason) bool { return flow.Reason(r).String() == d.Reason }) {
		return false // it always passes, never passes, or is judged once more
	}
	switch v {
	case flowpb.Verdict_FORWARDED, flowpb.Verdict_AUDIT:
		return true
	case flowpb.Verdict_DROPPED:
		return c.opts.Denied && d.Isolated
	default:
		return false
	}
}

// portOf is what the flow was to, or why no rule can say that.
func portOf(f *flowpb.Flow) (p port, why string) {
	_, number, ok := filter.Ports(f)
	if ok && (number == 0 || number > math.MaxUint16) {
		return port{}, "no port"
	}
	switch l4 := f.GetL4().GetProtocol().(type) {
	case *flowpb.Layer4_TCP:
		// What is picked up in its middle does not tell who began.
		if !l4.TCP.GetFlags().GetSYN() {
			return port{}, "the middle of a TCP connection, which does not tell who began it"
		}
		return port{corev1.ProtocolTCP, number}, ""
	case *flowpb.Layer4_UDP:
		return port{corev1.ProtocolUDP, number}, ""
	case *flowpb.Layer4_SCTP:
		return port{corev1.ProtocolSCTP, number}, ""
	case *flowpb.Layer4_ICMPv4, *flowpb.Layer4_ICMPv6:
		return port{}, "ICMP, which a NetworkPolicy cannot allow alone"
	default:
		return port{}, "a protocol that a NetworkPolicy does not know"
	}
}

// peerOf selects the other end of a flow, or says why nothing can.
func peerOf(f *flowpb.Flow, local, other *flowpb.Endpoint, address string) (p networkingv1.NetworkPolicyPeer, why string) {
	if other.GetPodName() == "" {
		if s := f.GetDestinationService(); s != nil && f.GetTrafficDirection() == flowpb.TrafficDirection_EGRESS {
			return p, fmt.Sprintf("Service %s/%s, as its backend is not known", s.GetNamespace(), s.GetName())
		}
		a, err := netip.ParseAddr(address)
		if err != nil {
			return p, "a peer without an address"
		}
		p.IPBlock = &networkingv1.IPBlock{CIDR: netip.PrefixFrom(a, a.BitLen()).String()}
		return p, ""
	}
	labels := naming.PodLabels(other.GetLabels())
	if strip(labels); len(labels) == 0 {
		return p, fmt.Sprintf("the peer %s/%s has no labels to be selected by", other.GetNamespace(), other.GetPodName())
	}
	p.PodSelector = &metav1.LabelSelector{MatchLabels: labels}
	if other.GetNamespace() != local.GetNamespace() {
		p.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: other.GetNamespace()}}
	}
	return p, ""
}

// text is another one for each peer; pods come before addresses.
func text(p *networkingv1.NetworkPolicyPeer) string {
	if p.IPBlock != nil {
		return "~" + p.IPBlock.CIDR
	}
	return metav1.FormatLabelSelector(p.NamespaceSelector) + " " + metav1.FormatLabelSelector(p.PodSelector)
}

// strip removes labels that tell pods of one workload apart, or one rollout of
// it from the next.
func strip(labels map[string]string) {
	for _, name := range []string{
		"pod-template-hash", "controller-revision-hash", "pod-template-generation", // Deployments, DaemonSets, StatefulSets
		"statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
		"batch.kubernetes.io/controller-uid", "controller-uid", "batch.kubernetes.io/job-completion-index",
		"batch.kubernetes.io/job-name", "job-name", // those of a CronJob have the time in them
	} {
		delete(labels, name)
	}
}

func (c *Collector) subject(e *flowpb.Endpoint, labels map[string]string) *subject {
	key := e.GetNamespace() + "\x00" + metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: labels})
	name := e.GetPodName()
	if w := e.GetWorkloads(); len(w) > 0 {
		name = w[0].GetName()
	}
	s := c.subjects[key]
	if s == nil {
		s = &subject{
			namespace: e.GetNamespace(), labels: labels, name: name, seen: make(map[networkingv1.PolicyType]map[string]*peer),
		}
		for _, d := range directions() {
			s.seen[d] = make(map[string]*peer)
		}
		c.subjects[key] = s
	}
	s.name = min(s.name, name)
	return s
}

func directions() []networkingv1.PolicyType {
	return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
}

// LeftOut says what of the flows no policy allows, and how many there were of
// each.
func (c *Collector) LeftOut() map[string]int { return maps.Clone(c.left) }

// Policies allow what was seen of each workload that was, and isolate it in both
// directions. The same flows, in whatever order, make the same policies in the
// same order.
func (c *Collector) Policies() []networkingv1.NetworkPolicy {
	var out []networkingv1.NetworkPolicy
	taken := make(map[string]int)
	for _, key := range slices.Sorted(maps.Keys(c.subjects)) {
		s := c.subjects[key]
		p := networkingv1.NetworkPolicy{
			TypeMeta:   metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: "NetworkPolicy"},
			ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: policyName(s, taken)},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: s.labels}, PolicyTypes: directions(),
			},
		}
		for _, r := range rules(s.seen[networkingv1.PolicyTypeIngress]) {
			p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.peers, Ports: r.ports})
		}
		for _, r := range rules(s.seen[networkingv1.PolicyTypeEgress]) {
			p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.peers, Ports: r.ports})
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b networkingv1.NetworkPolicy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// policyName is one that no other suggested policy of the namespace has.
func policyName(s *subject, taken map[string]int) string {
	const prefix, longest = "seen-", 240 // a name has 253 characters (RFC 1123), some are for the number
	name := prefix + s.name[:min(len(s.name), longest)]
	key := s.namespace + "/" + name
	if taken[key]++; taken[key] > 1 {
		name = fmt.Sprintf("%s-%d", name, taken[key])
	}
	return name
}

// rule is peers that have the same ports.
type rule struct {
	peers []networkingv1.NetworkPolicyPeer
	ports []networkingv1.NetworkPolicyPort
}

func rules(peers map[string]*peer) []rule {
	byPorts := make(map[string]*rule)
	for _, key := range slices.Sorted(maps.Keys(peers)) {
		p := peers[key]
		ports := slices.SortedFunc(maps.Keys(p.ports), func(a, b port) int {
			return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.number, b.number))
		})
		var text strings.Builder
		for _, at := range ports {
			fmt.Fprintf(&text, "%s %05d ", at.protocol, at.number)
		}
		r := byPorts[text.String()]
		if r == nil {
			r = &rule{}
			for _, at := range ports {
				r.ports = append(r.ports, networkingv1.NetworkPolicyPort{
					Protocol: ptr.To(at.protocol), Port: ptr.To(intstr.FromInt32(int32(at.number))),
				})
			}
			byPorts[text.String()] = r
		}
		r.peers = append(r.peers, p.what)
	}
	var out []rule
	for _, ports := range slices.Sorted(maps.Keys(byPorts)) {
		out = append(out, *byPorts[ports])
	}
	return out
}
