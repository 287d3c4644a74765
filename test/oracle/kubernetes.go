// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package oracle

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/client-go/informers"
	"sigs.k8s.io/kube-network-policies/pkg/api"
	"sigs.k8s.io/kube-network-policies/pkg/network"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/oracle/cases"
)

// Kubernetes answers with the engine of kube-network-policies.
type Kubernetes struct {
	cluster cases.Cluster
	engine  *networkpolicy.StandardNetworkPolicy
	pods    map[*corev1.Pod]*api.PodInfo
}

// NewKubernetes takes the policies of a cluster with the defaults that the API
// server sets, and goes around a fault of the engine: a list of rules that is
// empty and not nil allows everything. What cannot be gone around is that a
// named port matches port 0 and that a pod can be denied to reach itself: do not
// ask.
func NewKubernetes(c cases.Cluster) (*Kubernetes, error) {
	var policies []*networkingv1.NetworkPolicy
	for _, p := range c.Policies {
		p = withDefaults(p)
		if len(p.Spec.Ingress) == 0 {
			p.Spec.Ingress = nil
		}
		if len(p.Spec.Egress) == 0 {
			p.Spec.Egress = nil
		}
		policies = append(policies, p)
	}
	return newFaultyKubernetes(c, policies)
}

// newFaultyKubernetes fills the stores that informers would fill from an API
// server.
func newFaultyKubernetes(c cases.Cluster, policies []*networkingv1.NetworkPolicy) (*Kubernetes, error) {
	factory := informers.NewSharedInformerFactory(nil, 0)
	namespaces, pods := factory.Core().V1().Namespaces(), factory.Core().V1().Pods()
	networkPolicies := factory.Networking().V1().NetworkPolicies()
	e := &Kubernetes{
		cluster: c,
		engine:  networkpolicy.NewStandardNetworkPolicy("node", namespaces, pods, networkPolicies),
		pods:    map[*corev1.Pod]*api.PodInfo{},
	}
	var errs error
	for _, ns := range c.Namespaces {
		errs = errors.Join(errs, namespaces.Informer().GetStore().Add(ns))
	}
	for _, pod := range c.Pods {
		errs = errors.Join(errs, pods.Informer().GetStore().Add(pod))
		e.pods[pod] = api.NewPodInfo(pod, c.NamespaceLabels(pod.Namespace), nil, "")
	}
	for _, p := range policies {
		errs = errors.Join(errs, networkPolicies.Informer().GetStore().Add(p))
	}
	return e, errs
}

// Allows answers a question.
func (e *Kubernetes) Allows(q cases.Question) (bool, error) {
	local, remote := q.Local.AsSlice(), q.Peer.AsSlice()
	subject, peer := e.pods[q.Subject], e.pods[e.cluster.PodAt(q.Peer)]
	const ephemeral = 40000
	var verdict api.Verdict
	var err error
	switch q.Direction {
	case policy.Ingress:
		packet := &network.Packet{SrcIP: remote, DstIP: local, Proto: q.Protocol, SrcPort: ephemeral, DstPort: int(q.Port)}
		verdict, err = e.engine.EvaluateIngress(context.Background(), packet, peer, subject)
	case policy.Egress:
		packet := &network.Packet{SrcIP: local, DstIP: remote, Proto: q.Protocol, SrcPort: ephemeral, DstPort: int(q.Port)}
		verdict, err = e.engine.EvaluateEgress(context.Background(), packet, subject, peer)
	}
	if err != nil {
		return false, fmt.Errorf("%v: %w", q, err)
	}
	return verdict != api.VerdictDeny, nil
}
