// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package cases

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// What random clusters are made of: little, so that things meet.
var (
	namespaces = []string{"red", "green", "blue"}
	keys       = []string{"app", "tier", "zone"}
	values     = []string{"", "a", "b"}
	portNames  = []string{"web", "dns", "metrics"}
	ports      = []int32{1, 53, 80, 81, 443, 8080, 8081, 65535}
	cidrs      = []string{
		"0.0.0.0/0", "10.0.0.0/8", "10.244.0.0/16", "10.244.9.9/16", "10.244.0.0/24", "10.244.0.2/31", "10.244.0.3/32",
		"10.244.0.4/30", "128.0.0.0/1", "203.0.113.0/24",
		"::/0", "fd00::/8", "fd00:10:244::/64", "fd00:10:244::3/128", "fd00:10:244::4/126", "2001:db8::/32", "::/64",
	}
)

func podAddress(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 244, byte(n >> 8), byte(n)})
}

// Random makes a random cluster and changes it some times.
func Random(r *rand.Rand) Case {
	g := dice{r}
	c := g.cluster()
	steps := []Cluster{c}
	for range r.IntN(5) {
		for range 1 + r.IntN(4) {
			c = g.change(c)
		}
		steps = append(steps, c)
	}
	return Case{Steps: steps}
}

type dice struct{ *rand.Rand }

func (g dice) chance(percent int) bool { return g.IntN(100) < percent }

func pick[T any](g dice, from []T) T { return from[g.IntN(len(from))] }

func (g dice) cluster() Cluster {
	var c Cluster
	for _, ns := range namespaces {
		c.Namespaces = append(c.Namespaces, g.namespace(ns))
	}
	for i := range 4 + g.IntN(6) {
		c.Pods = append(c.Pods, g.pod(i))
	}
	for range g.IntN(8) {
		c = g.setPolicy(c)
	}
	return c
}

// change makes one edit.
func (g dice) change(c Cluster) Cluster {
	switch n := g.IntN(10); {
	case n < 5:
		return g.setPolicy(c)
	case n == 5 && len(c.Policies) > 0:
		i := g.IntN(len(c.Policies))
		c.Policies = slices.Delete(slices.Clone(c.Policies), i, i+1)
	case n < 7:
		i := g.IntN(len(c.Namespaces))
		c.Namespaces = slices.Clone(c.Namespaces)
		c.Namespaces[i] = g.namespace(c.Namespaces[i].Name)
	case n < 9:
		// Another pod, or another life of the pod that had the address.
		i := g.IntN(len(c.Pods))
		c.Pods = slices.Clone(c.Pods)
		c.Pods[i] = g.pod(i)
	default:
		i := g.IntN(len(c.Pods))
		if pod := c.Pods[i].DeepCopy(); !pod.Spec.HostNetwork {
			pod.Labels = g.labels()
			c.Pods = slices.Clone(c.Pods)
			c.Pods[i] = pod
		}
	}
	return c
}

func (g dice) namespace(name string) *corev1.Namespace {
	labels := g.labels()
	labels[corev1.LabelMetadataName] = name
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
}

func (g dice) labels() map[string]string {
	m := map[string]string{}
	for _, k := range keys {
		if g.chance(60) {
			m[k] = pick(g, values)
		}
	}
	return m
}

// pod number i always has the same addresses.
func (g dice) pod(i int) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, namespaces), Name: fmt.Sprintf("pod.%d", i), Labels: g.labels()},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{
			{IP: podAddress(i + 1).String()},
			{IP: fmt.Sprintf("fd00:10:244::%x", i+1)},
		}},
	}
	switch n := g.IntN(20); {
	case n == 0:
		pod.Spec.HostNetwork = true
	case n < 3:
		pod.Status.PodIPs = pod.Status.PodIPs[:1]
	case n < 5:
		pod.Status.PodIPs = pod.Status.PodIPs[1:]
	}
	// No name, and no number, twice for one protocol.
	used := map[string]bool{}
	for range g.IntN(5) {
		p := corev1.ContainerPort{Name: pick(g, portNames), ContainerPort: pick(g, ports), Protocol: pick(g, Protocols)}
		name, number := fmt.Sprint(p.Protocol, p.Name), fmt.Sprint(p.Protocol, p.ContainerPort)
		if used[name] || used[number] {
			continue
		}
		used[name], used[number] = true, true
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
			Name: fmt.Sprintf("c%d", len(pod.Spec.Containers)), Ports: []corev1.ContainerPort{p},
		})
	}
	return pod
}

// setPolicy adds a policy or replaces the one of the same name.
func (g dice) setPolicy(c Cluster) Cluster {
	p := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, namespaces), Name: fmt.Sprintf("policy-%d", g.IntN(4))},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *g.selector(),
			PolicyTypes: pick(g, [][]networkingv1.PolicyType{
				nil,
				{networkingv1.PolicyTypeIngress},
				{networkingv1.PolicyTypeEgress},
				{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
			}),
		},
	}
	// No rules may be nil or an empty list.
	if g.chance(30) {
		p.Spec.Ingress, p.Spec.Egress = []networkingv1.NetworkPolicyIngressRule{}, []networkingv1.NetworkPolicyEgressRule{}
	}
	for g.chance(60) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: g.peers(), Ports: g.ports()})
	}
	for g.chance(60) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: g.peers(), Ports: g.ports()})
	}
	c = c.deletePolicy(p.Namespace, p.Name)
	c.Policies = append(c.Policies, p)
	return c
}

func (g dice) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for g.chance(30) {
		if s.MatchLabels == nil {
			s.MatchLabels = map[string]string{}
		}
		s.MatchLabels[pick(g, keys)] = pick(g, values)
	}
	for g.chance(35) {
		e := metav1.LabelSelectorRequirement{Key: pick(g, keys), Operator: pick(g, []metav1.LabelSelectorOperator{
			metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist,
		})}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			for ok := true; ok; ok = g.chance(40) {
				e.Values = append(e.Values, pick(g, values))
			}
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

func (g dice) peers() []networkingv1.NetworkPolicyPeer {
	var peers []networkingv1.NetworkPolicyPeer
	for g.chance(65) {
		var p networkingv1.NetworkPolicyPeer
		switch g.IntN(5) {
		case 0:
			p.PodSelector = g.selector()
		case 1:
			p.NamespaceSelector = g.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = g.selector(), g.selector()
		default:
			p.IPBlock = g.block()
		}
		peers = append(peers, p)
	}
	return peers
}

func (g dice) block() *networkingv1.IPBlock {
	b := &networkingv1.IPBlock{CIDR: pick(g, cidrs)}
	outer := netip.MustParsePrefix(b.CIDR).Masked()
	for _, s := range cidrs {
		if inner := netip.MustParsePrefix(s); g.chance(25) && outer.Contains(inner.Addr()) && inner.Bits() > outer.Bits() {
			b.Except = append(b.Except, s)
		}
	}
	return b
}

func (g dice) ports() []networkingv1.NetworkPolicyPort {
	var list []networkingv1.NetworkPolicyPort
	for g.chance(50) {
		var p networkingv1.NetworkPolicyPort
		if g.chance(80) {
			proto := pick(g, Protocols)
			p.Protocol = &proto
		}
		switch g.IntN(4) {
		case 0:
		case 1:
			name := intstr.FromString(pick(g, portNames))
			p.Port = &name
		default:
			number := intstr.FromInt32(pick(g, ports))
			p.Port = &number
			if end := pick(g, ports); g.chance(40) && end >= number.IntVal {
				p.EndPort = &end
			}
		}
		list = append(list, p)
	}
	return list
}
