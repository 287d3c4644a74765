// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metavalidation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/podgate/podgate/bpf/policy"
)

// Policy translates a NetworkPolicy. Fields the API server would default
// (policyTypes, protocol, namespace) may be missing; policyTypes that leave out
// a direction leave its rules out too.
//
// The error is an [*InvalidError] with every fault found. The policy that comes
// with it allows nothing that was not meant: a rule with a fault matches
// nothing, a podSelector that cannot be understood selects every pod of the
// namespace, and unknown policyTypes isolate both directions.
func Policy(np *networkingv1.NetworkPolicy) (policy.Policy, error) {
	namespace := cmp.Or(np.Namespace, metav1.NamespaceDefault)
	spec := field.NewPath("spec")
	errs := validateMeta(&np.ObjectMeta, validation.IsDNS1123Subdomain)

	subject, e := selector(&np.Spec.PodSelector, spec.Child("podSelector"))
	errs = append(errs, e...)
	isolates, e := directions(&np.Spec, spec.Child("policyTypes"))
	errs = append(errs, e...)

	out := policy.Policy{
		UID:       cmp.Or(string(np.UID), KindNetworkPolicy+"/"+namespace+"/"+np.Name),
		Kind:      KindNetworkPolicy,
		Namespace: namespace,
		Name:      np.Name,
		Tier:      policy.TierNamespace,
		Subject:   policy.PodSelector{Namespace: namespace, Pods: subject},
		Isolates:  isolates,
	}
	// Rules of a direction that is not isolated have no effect, but a fault in
	// them is still a fault of the object.
	for i, r := range np.Spec.Ingress {
		rule, e := translateRule(namespace, "from", r.From, r.Ports, spec.Child("ingress").Index(i))
		errs = append(errs, e...)
		if isolates[policy.Ingress] {
			out.Rules[policy.Ingress] = append(out.Rules[policy.Ingress], rule)
		}
	}
	for i, r := range np.Spec.Egress {
		rule, e := translateRule(namespace, "to", r.To, r.Ports, spec.Child("egress").Index(i))
		errs = append(errs, e...)
		if isolates[policy.Egress] {
			out.Rules[policy.Egress] = append(out.Rules[policy.Egress], rule)
		}
	}
	if len(errs) > 0 {
		return out, &InvalidError{KindNetworkPolicy, namespace, np.Name, errs}
	}
	return out, nil
}

// directions answers which directions a policy isolates. Missing policyTypes
// mean ingress, and egress as well when there are egress rules.
func directions(spec *networkingv1.NetworkPolicySpec, path *field.Path) (isolates [2]bool, errs field.ErrorList) {
	if len(spec.PolicyTypes) == 0 {
		isolates[policy.Ingress] = true
		isolates[policy.Egress] = len(spec.Egress) > 0
		return isolates, nil
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			isolates[policy.Ingress] = true
		case networkingv1.PolicyTypeEgress:
			isolates[policy.Egress] = true
		default:
			isolates = [2]bool{true, true}
			errs = append(errs, field.NotSupported(path.Index(i), t,
				[]networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}))
		}
	}
	return isolates, errs
}

// translateRule translates one rule; verb is "from" or "to". Missing and empty
// peers (and ports) both match everything. With an error the rule matches
// nothing.
func translateRule(namespace, verb string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, path *field.Path) (policy.Rule, field.ErrorList) {
	rule := policy.Rule{
		Action:  policy.Allow,
		AnyPeer: len(peers) == 0,
		AnyPort: len(ports) == 0,
		Text:    ruleText(namespace, verb, peers, ports),
	}
	var errs field.ErrorList
	for i := range peers {
		p, e := translatePeer(namespace, &peers[i], path.Child(verb).Index(i))
		rule.Peers = append(rule.Peers, p)
		errs = append(errs, e...)
	}
	for i := range ports {
		p, e := translatePort(&ports[i], path.Child("ports").Index(i))
		rule.Ports = append(rule.Ports, p)
		errs = append(errs, e...)
	}
	if len(errs) > 0 {
		rule = nothing(rule)
	}
	return rule, errs
}

func translatePeer(namespace string, p *networkingv1.NetworkPolicyPeer, path *field.Path) (policy.Peer, field.ErrorList) {
	if p.IPBlock != nil {
		if p.PodSelector != nil || p.NamespaceSelector != nil {
			return policy.Peer{}, field.ErrorList{field.Forbidden(path, "a peer with an ipBlock must not have selectors; make it two peers")}
		}
		block, errs := translateBlock(p.IPBlock, path.Child("ipBlock"))
		return policy.Peer{Block: block}, errs
	}
	if p.PodSelector == nil && p.NamespaceSelector == nil {
		return policy.Peer{}, field.ErrorList{field.Required(path, "a peer needs a podSelector, a namespaceSelector or an ipBlock")}
	}
	var (
		pods policy.PodSelector
		errs field.ErrorList
	)
	if p.PodSelector != nil {
		s, e := selector(p.PodSelector, path.Child("podSelector"))
		pods.Pods, errs = s, append(errs, e...)
	}
	if p.NamespaceSelector != nil {
		s, e := selector(p.NamespaceSelector, path.Child("namespaceSelector"))
		pods.Namespaces, errs = s, append(errs, e...)
	} else {
		pods.Namespace = namespace
	}
	return policy.Peer{Pods: &pods}, errs
}

func translateBlock(b *networkingv1.IPBlock, path *field.Path) (*policy.Block, field.ErrorList) {
	cidr, err := parseCIDR(b.CIDR)
	if err != nil {
		return nil, field.ErrorList{field.Invalid(path.Child("cidr"), b.CIDR, err.Error())}
	}
	block := &policy.Block{CIDR: cidr}
	var errs field.ErrorList
	for i, s := range b.Except {
		path := path.Child("except").Index(i)
		except, err := parseCIDR(s)
		switch {
		case err != nil:
			errs = append(errs, field.Invalid(path, s, err.Error()))
		case !cidr.Contains(except.Addr()) || except.Bits() <= cidr.Bits():
			errs = append(errs, field.Invalid(path, s, "must be a strict subset of cidr "+b.CIDR))
		default:
			block.Except = append(block.Except, except)
		}
	}
	return block, errs
}

// parseCIDR parses a prefix and clears its host bits, as the API server lets
// them stand. Forms that other parsers read differently (leading zeros, IPv4
// inside IPv6) are refused.
func parseCIDR(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, errors.New("must be a CIDR such as 10.9.8.0/24 or 2001:db8::/64")
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, errors.New("must not be an IPv4-mapped IPv6 CIDR; write it as IPv4")
	}
	return p.Masked(), nil
}

func translatePort(p *networkingv1.NetworkPolicyPort, path *field.Path) (policy.Port, field.ErrorList) {
	var errs field.ErrorList
	proto := policy.TCP
	if p.Protocol != nil {
		var e *field.Error
		if proto, e = protocol(*p.Protocol, path.Child("protocol")); e != nil {
			errs = append(errs, e)
		}
	}
	out := policy.Port{Protocol: proto, Last: 65535}
	if p.Port == nil {
		if p.EndPort != nil {
			errs = append(errs, field.Required(path.Child("port"), "endPort needs a port to start from"))
		}
		return out, errs
	}
	portPath, endPath := path.Child("port"), path.Child("endPort")
	switch p.Port.Type {
	case intstr.String:
		for _, msg := range validation.IsValidPortName(p.Port.StrVal) {
			errs = append(errs, field.Invalid(portPath, p.Port.StrVal, msg))
		}
		if p.EndPort != nil {
			errs = append(errs, field.Invalid(endPath, *p.EndPort, "must not be set when port is a name"))
		}
		return policy.Port{Protocol: proto, Name: p.Port.StrVal}, errs
	case intstr.Int:
		first := p.Port.IntVal
		last := first
		for _, msg := range validation.IsValidPortNum(int(first)) {
			errs = append(errs, field.Invalid(portPath, first, msg))
		}
		if p.EndPort != nil {
			last = *p.EndPort
			for _, msg := range validation.IsValidPortNum(int(last)) {
				errs = append(errs, field.Invalid(endPath, last, msg))
			}
			if last < first {
				errs = append(errs, field.Invalid(endPath, last, fmt.Sprintf("must not be below port %d", first)))
			}
		}
		if len(errs) > 0 {
			return policy.Port{}, errs
		}
		out.First, out.Last = uint16(first), uint16(last)
		return out, nil
	default:
		return policy.Port{}, append(errs, field.Invalid(portPath, p.Port.Type, "must be a number or a name"))
	}
}

// selector translates a label selector. Its requirements are in an order of
// their own (labels by key, then the expressions), so that equal manifests give
// equal results. With an error it is the empty one, which selects everything,
// unless only values are no label values: API servers have stored such.
func selector(s *metav1.LabelSelector, path *field.Path) (policy.Selector, field.ErrorList) {
	errs := metavalidation.ValidateLabelSelector(s, metavalidation.LabelSelectorValidationOptions{}, path)
	if len(errs) > 0 {
		lenient := metavalidation.LabelSelectorValidationOptions{AllowInvalidLabelValueInSelector: true}
		if len(metavalidation.ValidateLabelSelector(s, lenient, path)) > 0 {
			return nil, errs
		}
	}
	var out policy.Selector
	for _, key := range slices.Sorted(maps.Keys(s.MatchLabels)) {
		out = append(out, policy.Requirement{Key: key, Operator: policy.In, Values: []string{s.MatchLabels[key]}})
	}
	for _, e := range s.MatchExpressions {
		out = append(out, policy.Requirement{Key: e.Key, Operator: operator(e.Operator), Values: slices.Clone(e.Values)})
	}
	return out, errs
}

// operator of a valid label selector.
func operator(o metav1.LabelSelectorOperator) policy.Operator {
	switch o {
	case metav1.LabelSelectorOpNotIn:
		return policy.NotIn
	case metav1.LabelSelectorOpExists:
		return policy.Exists
	case metav1.LabelSelectorOpDoesNotExist:
		return policy.DoesNotExist
	default:
		return policy.In
	}
}
