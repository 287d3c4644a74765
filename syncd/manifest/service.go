// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	netutils "k8s.io/utils/net"

	"github.com/podgate/podgate/bpf/policy"
)

// labelProxy names a proxy other than kube-proxy, which leaves Services and
// EndpointSlices that bear it alone.
const labelProxy = "service.kubernetes.io/service-proxy-name"

// Service is what kube-proxy takes of a Service.
type Service struct {
	Namespace, Name string
	// Addresses are the cluster's for it, external ones, and those of load
	// balancers whose packets arrive here with it.
	Addresses []netip.Addr
	Ports     []ServicePort
}

// ServicePort is a port of a Service.
type ServicePort struct {
	Name     string
	Protocol policy.Protocol
	// Port at the Service's addresses, and NodePort at those of each node; 0 if
	// there is none.
	Port, NodePort uint16
}

// EndpointSlice is what kube-proxy takes of an EndpointSlice.
type EndpointSlice struct {
	// Namespace and Service it belongs to.
	Namespace, Service string
	// Addresses a packet may be translated to: those of endpoints that are
	// ready, or serve while they terminate.
	Addresses []netip.Addr
	Ports     []EndpointPort
}

// EndpointPort is where the endpoints of a slice serve a port of the Service.
type EndpointPort struct {
	// Name of the Service's port.
	Name     string
	Protocol policy.Protocol
	Port     uint16
}

// ServiceOf translates a Service. It has no addresses if kube-proxy has nothing
// to do with it: headless, an external name, or another proxy's. The error is
// an [*InvalidError]; the Service that comes with it lacks what is faulty.
func ServiceOf(svc *corev1.Service) (Service, error) {
	out := Service{Namespace: cmp.Or(svc.Namespace, metav1.NamespaceDefault), Name: svc.Name}
	if _, other := svc.Labels[labelProxy]; other || svc.Spec.Type == corev1.ServiceTypeExternalName ||
		svc.Spec.ClusterIP == "" || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return out, nil
	}
	var errs field.ErrorList
	add := func(s string, path *field.Path) {
		a, err := parseIP(s, path)
		if err != nil {
			errs = append(errs, err)
		} else if !slices.Contains(out.Addresses, a) {
			out.Addresses = append(out.Addresses, a)
		}
	}
	spec, status := field.NewPath("spec"), field.NewPath("status", "loadBalancer", "ingress")
	add(svc.Spec.ClusterIP, spec.Child("clusterIP"))
	for i, s := range svc.Spec.ClusterIPs {
		add(s, spec.Child("clusterIPs").Index(i))
	}
	for i, s := range svc.Spec.ExternalIPs {
		add(s, spec.Child("externalIPs").Index(i))
	}
	for i, in := range svc.Status.LoadBalancer.Ingress {
		if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
			add(in.IP, status.Index(i).Child("ip"))
		}
	}
	for i, p := range svc.Spec.Ports {
		proto, err := protocol(cmp.Or(p.Protocol, corev1.ProtocolTCP), spec.Child("ports").Index(i).Child("protocol"))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out.Ports = append(out.Ports, ServicePort{p.Name, proto, uint16(p.Port), uint16(p.NodePort)})
	}
	if len(errs) > 0 {
		return out, &InvalidError{KindService, out.Namespace, svc.Name, errs}
	}
	return out, nil
}

// EndpointSliceOf translates an EndpointSlice. It has no addresses if
// kube-proxy has nothing to do with it. The error is an [*InvalidError]; the
// slice that comes with it lacks what is faulty.
func EndpointSliceOf(slice *discoveryv1.EndpointSlice) (EndpointSlice, error) {
	out := EndpointSlice{
		Namespace: cmp.Or(slice.Namespace, metav1.NamespaceDefault),
		Service:   slice.Labels[discoveryv1.LabelServiceName],
	}
	_, other := slice.Labels[labelProxy]
	_, headless := slice.Labels[corev1.IsHeadlessService]
	if other || headless || out.Service == "" || slice.AddressType == discoveryv1.AddressTypeFQDN {
		return out, nil
	}
	var errs field.ErrorList
	for i := range slice.Endpoints {
		e := &slice.Endpoints[i]
		if len(e.Addresses) == 0 || !chosen(&e.Conditions) {
			continue
		}
		// kube-proxy reads the first alone.
		a, err := parseIP(e.Addresses[0], field.NewPath("endpoints").Index(i).Child("addresses").Index(0))
		if err != nil {
			errs = append(errs, err)
		} else if !slices.Contains(out.Addresses, a) {
			out.Addresses = append(out.Addresses, a)
		}
	}
	for i, p := range slice.Ports {
		if p.Name == nil || p.Port == nil || *p.Port == 0 {
			continue
		}
		proto := policy.TCP
		if p.Protocol != nil {
			var err *field.Error
			if proto, err = protocol(*p.Protocol, field.NewPath("ports").Index(i).Child("protocol")); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		out.Ports = append(out.Ports, EndpointPort{*p.Name, proto, uint16(*p.Port)})
	}
	if len(errs) > 0 {
		return out, &InvalidError{KindEndpointSlice, out.Namespace, slice.Name, errs}
	}
	return out, nil
}

// chosen tells whether kube-proxy may choose an endpoint: ready ones, and when
// there are none, those that still serve while they terminate. Which of the two
// it is depends on the node, and changes before either side hears of it.
func chosen(c *discoveryv1.EndpointConditions) bool {
	is := func(condition *bool, missing bool) bool {
		if condition == nil {
			return missing
		}
		return *condition
	}
	return is(c.Ready, true) || is(c.Serving, true) && is(c.Terminating, false)
}

// parseIP reads addresses as kube-proxy does, leading zeros and all.
func parseIP(s string, path *field.Path) (netip.Addr, *field.Error) {
	a, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(s))
	if !ok {
		return netip.Addr{}, field.Invalid(path, s, "must be an IPv4 or IPv6 address")
	}
	return a.Unmap(), nil
}
