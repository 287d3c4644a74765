// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ruleText says a rule the way a person would: "from pods app=web in namespace
// shop on 80/TCP". It is for output only and never parsed.
func ruleText(namespace, verb string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) string {
	who := []string{"anywhere"}
	if len(peers) > 0 {
		who = who[:0]
		for i := range peers {
			who = append(who, peerText(namespace, &peers[i]))
		}
	}
	what := []string{"any port"}
	if len(ports) > 0 {
		what = what[:0]
		for i := range ports {
			what = append(what, portText(&ports[i]))
		}
	}
	return verb + " " + strings.Join(who, " or ") + " on " + strings.Join(what, ", ")
}

func peerText(namespace string, p *networkingv1.NetworkPolicyPeer) string {
	if p.IPBlock != nil {
		if len(p.IPBlock.Except) == 0 {
			return p.IPBlock.CIDR
		}
		return p.IPBlock.CIDR + " except " + strings.Join(p.IPBlock.Except, ", ")
	}
	pods := "all pods"
	if p.PodSelector != nil && !isEmpty(p.PodSelector) {
		pods = "pods " + metav1.FormatLabelSelector(p.PodSelector)
	}
	switch {
	case p.NamespaceSelector == nil:
		return pods + " in namespace " + namespace
	case isEmpty(p.NamespaceSelector):
		return pods + " in all namespaces"
	default:
		return pods + " in namespaces " + metav1.FormatLabelSelector(p.NamespaceSelector)
	}
}

func isEmpty(s *metav1.LabelSelector) bool {
	return len(s.MatchLabels)+len(s.MatchExpressions) == 0
}

func portText(p *networkingv1.NetworkPolicyPort) string {
	proto := corev1.ProtocolTCP
	if p.Protocol != nil {
		proto = cmp.Or(*p.Protocol, proto)
	}
	switch {
	case p.Port == nil:
		return fmt.Sprintf("any %s port", proto)
	case p.EndPort != nil && *p.EndPort != p.Port.IntVal:
		return fmt.Sprintf("%s-%d/%s", p.Port, *p.EndPort, proto)
	default:
		return fmt.Sprintf("%s/%s", p.Port, proto)
	}
}
