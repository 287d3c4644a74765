// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"fmt"
	"net/netip"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const mergePatch = types.MergePatchType

// testSmoke shows that the cluster itself works where no policy is: pods of one
// node and of two, Services, NodePorts, the API from a pod, DNS.
func testSmoke(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(
		podSpec{name: "a", node: "n1"},
		podSpec{name: "b", node: "n1", labels: map[string]string{"app": "web"}},
		podSpec{name: "c", node: "n2", labels: map[string]string{"app": "web"}},
	)
	b, c := pods[1], pods[2]
	for _, p := range pods {
		if len(p.Addresses) != 2 {
			t.Errorf("pod %s has addresses %v, want two", p.Name, p.Addresses)
		}
	}
	service := l.service("web", map[string]string{"app": "web"}, core.ServiceTypeNodePort)
	var probes []probe
	for _, p := range pods {
		probes = append(probes, reaches(answered, b, 8080, p)...)
		probes = append(probes, reaches(answered, c, 8080, p)...)
	}
	for _, p := range pods {
		probes = append(probes, l.reachesService(answered, service, p)...)
		probes = append(probes, l.reachesNodePort(answered, service, p)...)
	}
	l.expect(probes)
	out, err := l.Kubectl(t.Context(), "--namespace", l.namespace, "exec", "a", "--",
		"dig", "+short", "+search", "web")
	if want := service.Spec.ClusterIP + "\n"; err != nil || string(out) != want {
		t.Errorf("dig: %q, %v, want %q", out, err, want)
	}
	out, err = l.Kubectl(t.Context(), "--namespace", l.namespace, "exec", "a", "--",
		"curl", "-sk", "https://kubernetes.default/healthz")
	if err != nil {
		t.Errorf("API from a pod: %q, %v", out, err)
	}
}

// resolver is the address of the cluster's.
func (s *suite) resolver(t *testing.T) netip.AddrPort {
	t.Helper()
	service, err := s.Client.CoreV1().Services("kube-system").Get(t.Context(), "kube-dns", meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(netip.MustParseAddr(service.Spec.ClusterIP), 53)
}

// service makes a dual-stack Service whose ports are not those of its pods: 80
// is their 8080, 81 their 8081, TCP and UDP.
func (l *lab) service(name string, selector map[string]string, kind core.ServiceType) *core.Service {
	l.t.Helper()
	dual := core.IPFamilyPolicyRequireDualStack
	object := &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec:       core.ServiceSpec{Selector: selector, Type: kind, IPFamilyPolicy: &dual},
	}
	for i, port := range ports {
		for _, protocol := range []core.Protocol{core.ProtocolTCP, core.ProtocolUDP} {
			object.Spec.Ports = append(object.Spec.Ports, core.ServicePort{
				Name: fmt.Sprintf("%c%d", protocol[0]|0x20, 80+i), Protocol: protocol,
				Port: int32(80 + i), TargetPort: intstr.FromInt32(int32(port)),
			})
		}
	}
	created, err := l.Client.CoreV1().Services(l.namespace).Create(l.t.Context(), object, meta.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	return created
}

// reachesService are the probes from pods to port 80 of a Service.
func (l *lab) reachesService(want outcome, service *core.Service, from ...*pod) []probe {
	var probes []probe
	for _, ip := range service.Spec.ClusterIPs {
		probes = append(probes, l.reachesFrontend(want, service.Name, netip.AddrPortFrom(netip.MustParseAddr(ip), 80), from...)...)
	}
	return probes
}

// reachesNodePort are the probes from pods to the NodePort of port 80 on every
// node.
func (l *lab) reachesNodePort(want outcome, service *core.Service, from ...*pod) []probe {
	var probes []probe
	for _, n := range l.Nodes {
		for _, address := range n.Addresses {
			for _, port := range service.Spec.Ports {
				if port.Port != 80 {
					continue
				}
				network := map[core.Protocol]string{core.ProtocolTCP: "tcp", core.ProtocolUDP: "udp"}[port.Protocol]
				to := netip.AddrPortFrom(netip.MustParseAddr(address), uint16(port.NodePort))
				for _, f := range from {
					probes = append(probes, probe{f, network, to, service.Name + " on " + n.Name, want})
				}
			}
		}
	}
	return probes
}

// reachesFrontend are the probes from pods to an address of a Service.
func (l *lab) reachesFrontend(want outcome, name string, to netip.AddrPort, from ...*pod) []probe {
	var probes []probe
	for _, f := range from {
		for _, network := range []string{"tcp", "udp"} {
			probes = append(probes, probe{f, network, to, name, want})
		}
	}
	return probes
}
