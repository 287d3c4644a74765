// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/oracle/cases"
)

// TestFaults asks the oracles, without what goes around their faults, and wants
// the wrong answer: a fault that is gone needs no way around any more. The
// compiler has to give the right one.
func TestFaults(t *testing.T) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: "a", Labels: map[string]string{"pod": "a"}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 80, Protocol: corev1.ProtocolTCP}},
		}}},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}},
	}
	peer := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: "b"},
		Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.2"}}},
	}
	local, remote := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	from := func(s metav1.LabelSelector) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &s}}}},
		}
	}
	onPort := func(p networkingv1.NetworkPolicyPort) networkingv1.NetworkPolicySpec {
		return networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{Ports: []networkingv1.NetworkPolicyPort{p}}},
		}
	}
	tcp, web, number := corev1.ProtocolTCP, intstr.FromString("web"), intstr.FromInt32(80)
	cyclonus := func(_ *testing.T, c cases.Cluster, q cases.Question) bool {
		return newFaultyCyclonus(c, c.Policies, true).Allows(q)
	}
	kubernetes := func(t *testing.T, c cases.Cluster, q cases.Question) bool {
		e, err := newFaultyKubernetes(c, c.Policies)
		if err != nil {
			t.Fatal(err)
		}
		allowed, err := e.Allows(q)
		if err != nil {
			t.Fatal(err)
		}
		return allowed
	}

	tests := []struct {
		name   string
		oracle func(*testing.T, cases.Cluster, cases.Question) bool
		spec   networkingv1.NetworkPolicySpec
		peer   netip.Addr
		port   uint16
		// right is the answer the oracle does not give; it panics instead of
		// giving the other if panics is set.
		right, panics bool
	}{
		{
			name: "cyclonus: NotIn does not match an absent key", oracle: cyclonus,
			spec: from(metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
				{Key: "pod", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"a"}},
			}}),
			peer: remote, port: 80, right: true,
		},
		{
			name: "cyclonus: an absent label is empty", oracle: cyclonus,
			spec: from(metav1.LabelSelector{MatchLabels: map[string]string{"pod": ""}}),
			peer: remote, port: 80, right: false,
		},
		{
			name: "cyclonus: policyTypes that are left out", oracle: cyclonus,
			spec: networkingv1.NetworkPolicySpec{}, peer: remote, port: 80, right: false, panics: true,
		},
		{
			name: "cyclonus: a pod does not reach itself", oracle: cyclonus,
			spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
			peer: local, port: 80, right: true,
		},
		{
			name: "kube-network-policies: an empty list of rules allows", oracle: kubernetes,
			spec: networkingv1.NetworkPolicySpec{
				PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
				Ingress:     []networkingv1.NetworkPolicyIngressRule{},
			},
			peer: remote, port: 80, right: false,
		},
		{
			name: "kube-network-policies: policyTypes that are left out", oracle: kubernetes,
			spec: networkingv1.NetworkPolicySpec{}, peer: remote, port: 80, right: false,
		},
		{
			name: "kube-network-policies: a protocol that is left out", oracle: kubernetes,
			spec: onPort(networkingv1.NetworkPolicyPort{Port: &number}),
			peer: remote, port: 80, right: true, panics: true,
		},
		{
			name: "kube-network-policies: a name is port 0", oracle: kubernetes,
			spec: onPort(networkingv1.NetworkPolicyPort{Protocol: &tcp, Port: &web}),
			peer: remote, port: 0, right: false,
		},
		{
			name: "kube-network-policies: a pod does not reach itself", oracle: kubernetes,
			spec: networkingv1.NetworkPolicySpec{PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}},
			peer: local, port: 80, right: true,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := cases.Cluster{
				Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "x"}}},
				Pods:       []*corev1.Pod{pod, peer},
				Policies:   []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: "p"}, Spec: tt.spec}},
			}
			c.Policies[0].Spec.PodSelector.MatchLabels = map[string]string{"pod": "a"}
			q := cases.Question{
				Direction: policy.Ingress, Subject: pod, Local: local, Peer: tt.peer, Protocol: corev1.ProtocolTCP, Port: tt.port,
			}
			compiler := policy.NewCompiler()
			if err := cases.Load(compiler, cases.Cluster{}, c); err != nil {
				t.Fatal(err)
			}
			compiler.Compile()
			v, err := compiler.Judge(q.Direction, cases.Key(pod), q.Peer, q.Number(), q.Port)
			if err != nil || (v.Action == policy.Allow) != tt.right {
				t.Errorf("compiler: %v, %v; want %v", v, err, tt.right)
			}
			answer, panicked := ask(t, tt.oracle, c, q)
			if panicked != tt.panics || !panicked && answer == tt.right {
				t.Errorf("the fault is gone: allowed is %v, panic %v", answer, panicked)
			}
		})
	}
}

func ask(t *testing.T, oracle func(*testing.T, cases.Cluster, cases.Question) bool, c cases.Cluster, q cases.Question) (answer, panicked bool) {
	defer func() {
		if recover() != nil {
			panicked = true
		}
	}()
	return oracle(t, c, q), false
}
