// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// serviceLab is a client on n1, a server that its egress policy allows and one
// that it does not, on both nodes, each behind a Service.
type serviceLab struct {
	*lab
	client                *pod
	allowed, denied       []*pod
	allowedSvc, deniedSvc *core.Service
}

// newServiceLab makes them, as change wants them if it is not nil.
func newServiceLab(t *testing.T, s *suite, change func(*core.Pod)) *serviceLab {
	l := &serviceLab{lab: s.lab(t)}
	web := func(name, node string) podSpec {
		return podSpec{name: name + "-" + node, node: node, labels: map[string]string{"app": name, "tier": "web"}, change: change}
	}
	pods := l.newPods(
		podSpec{name: "client", node: "n1", change: change},
		web("good", "n1"), web("good", "n2"), web("bad", "n1"), web("bad", "n2"),
	)
	l.client, l.allowed, l.denied = pods[0], pods[1:3], pods[3:5]
	l.allowedSvc = l.service("good", map[string]string{"app": "good"}, core.ServiceTypeNodePort)
	l.deniedSvc = l.service("bad", map[string]string{"app": "bad"}, core.ServiceTypeNodePort)
	return l
}

// testEgressThroughService: egress is judged on the backend that kube-proxy
// chose and on its port, by selector and by block.
func testEgressThroughService(t *testing.T, s *suite) {
	l := newServiceLab(t, s, nil)
	l.expect(l.reachesService(answered, l.allowedSvc, l.client), l.reachesService(answered, l.deniedSvc, l.client))

	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to: [{ podSelector: { matchLabels: { app: good } } }]
    ports: [{ port: 8080 }, { port: 8080, protocol: UDP }]
`)
	verdicts := [][]probe{
		l.reachesService(answered, l.allowedSvc, l.client),
		l.reachesService(dropped, l.deniedSvc, l.client),
		reaches(answered, l.allowed[0], 8080, l.client),
		reaches(dropped, l.allowed[0], 8081, l.client), // targetPort of port 81
		reaches(dropped, l.denied[1], 8080, l.client),
	}
	for _, ip := range l.allowedSvc.Spec.ClusterIPs {
		to := netip.AddrPortFrom(netip.MustParseAddr(ip), 81)
		verdicts = append(verdicts, l.reachesFrontend(dropped, "port 81 of good", to, l.client))
	}
	l.expect(verdicts...)

	// The same by blocks of a single address, and by what a block leaves out.
	var only, except string
	for _, p := range l.allowed {
		for _, a := range p.Addresses {
			only += fmt.Sprintf("\n    - { ipBlock: { cidr: %s/%d } }", a, a.BitLen())
		}
	}
	l.policy(fmt.Sprintf(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to:%s
`, only))
	l.expect(
		l.reachesService(answered, l.allowedSvc, l.client),
		l.reachesService(dropped, l.deniedSvc, l.client),
	)
	for _, family := range []int{4, 6} {
		block := map[int]string{4: "0.0.0.0/0", 6: "::/0"}[family]
		except += fmt.Sprintf("\n    - { ipBlock: { cidr: %q, except: [", block)
		for i, p := range l.denied {
			if i > 0 {
				except += ", "
			}
			a := p.address(family)
			except += fmt.Sprintf("%q", fmt.Sprintf("%s/%d", a, a.BitLen()))
		}
		except += "] } }"
	}
	l.policy(fmt.Sprintf(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to:%s
`, except))
	l.expect(
		l.reachesService(answered, l.allowedSvc, l.client),
		l.reachesService(dropped, l.deniedSvc, l.client),
	)
}

// testEgressThroughNodePort: the same through the address of a node.
func testEgressThroughNodePort(t *testing.T, s *suite) {
	l := newServiceLab(t, s, nil)
	l.expect(l.reachesNodePort(answered, l.allowedSvc, l.client), l.reachesNodePort(answered, l.deniedSvc, l.client))
	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to: [{ podSelector: { matchLabels: { app: good } } }]
`)
	// A NodePort of another node is translated there: here it is an address
	// outside, which no rule names.
	own := func(probes []probe) []probe {
		var kept []probe
		for _, p := range probes {
			for _, a := range l.Nodes[0].Addresses {
				if p.to.Addr() == netip.MustParseAddr(a) {
					kept = append(kept, p)
				}
			}
		}
		return kept
	}
	l.expect(
		own(l.reachesNodePort(answered, l.allowedSvc, l.client)),
		own(l.reachesNodePort(dropped, l.deniedSvc, l.client)),
	)
}

// testEgressThroughExternalAddress: the same through externalIPs, and through the
// address of a load balancer.
func testEgressThroughExternalAddress(t *testing.T, s *suite) {
	l := newServiceLab(t, s, nil)
	client := l.Client.CoreV1().Services(l.namespace)
	frontends := map[*core.Service][]netip.Addr{}
	for i, service := range []*core.Service{l.allowedSvc, l.deniedSvc} {
		// Of the documentation's ranges (RFC 5737, RFC 3849): nobody else has them.
		external := []string{fmt.Sprintf("192.0.2.1%d", i), fmt.Sprintf("2001:db8::1%d", i)}
		balancer := []string{fmt.Sprintf("192.0.2.2%d", i), fmt.Sprintf("2001:db8::2%d", i)}
		l.eventually("external addresses of "+service.Name, func(ctx context.Context) error {
			object, err := client.Get(ctx, service.Name, meta.GetOptions{})
			if err != nil {
				return err
			}
			object.Spec.Type, object.Spec.ExternalIPs = core.ServiceTypeLoadBalancer, external
			if object, err = client.Update(ctx, object, meta.UpdateOptions{}); err != nil {
				return err
			}
			object.Status.LoadBalancer.Ingress = nil
			for _, a := range balancer {
				object.Status.LoadBalancer.Ingress = append(object.Status.LoadBalancer.Ingress, core.LoadBalancerIngress{IP: a})
			}
			_, err = client.UpdateStatus(ctx, object, meta.UpdateOptions{})
			return err
		})
		for _, a := range append(external, balancer...) {
			frontends[service] = append(frontends[service], netip.MustParseAddr(a))
		}
	}
	reach := func(want outcome, service *core.Service) []probe {
		var probes []probe
		for _, a := range frontends[service] {
			probes = append(probes, l.reachesFrontend(want, service.Name, netip.AddrPortFrom(a, 80), l.client)...)
		}
		return probes
	}
	l.expect(reach(answered, l.allowedSvc), reach(answered, l.deniedSvc))
	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { app: good } } }] }]
`)
	l.expect(reach(answered, l.allowedSvc), reach(dropped, l.deniedSvc))
}

// testHostNetworkBackends: backends on the host network are addresses of their
// nodes. No selector means them; the own node is always reached.
func testHostNetworkBackends(t *testing.T, s *suite) {
	l := s.lab(t)
	const port = 18180
	client := l.newPod(podSpec{name: "client", node: "n1"})
	services := map[string]*core.Service{}
	nodes := map[string]*pod{}
	for _, node := range []string{"n1", "n2"} {
		nodes[node] = l.newPod(podSpec{
			name: "host-" + node, node: node, labels: map[string]string{"app": "host", "on": node},
			change: func(p *core.Pod) {
				p.Spec.HostNetwork = true
				p.Spec.Containers[0].Args = []string{"netexec", fmt.Sprintf("--http-port=%d", port), "--udp-port=-1"}
			},
		})
		svc, err := l.Client.CoreV1().Services(l.namespace).Create(t.Context(), &core.Service{
			ObjectMeta: meta.ObjectMeta{Name: "host-" + node},
			Spec: core.ServiceSpec{
				Selector: map[string]string{"on": node}, IPFamilyPolicy: new(core.IPFamilyPolicyRequireDualStack),
				Ports: []core.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(port)}},
			},
		}, meta.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		services[node] = svc
	}
	connects := func(node string, want bool) {
		t.Helper()
		l.eventually(fmt.Sprintf("connection to host-%s: %v", node, want), func(context.Context) error {
			for _, ip := range services[node].Spec.ClusterIPs {
				to := netip.AddrPortFrom(netip.MustParseAddr(ip), 80)
				c, err := client.dial("tcp", to)
				if err == nil {
					c.Close()
				}
				if (err == nil) != want {
					return fmt.Errorf("%s: %w", to, err)
				}
			}
			return nil
		})
	}
	connects("n1", true)
	connects("n2", true)
	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { app: host } } }] }]
`)
	connects("n2", false)
	connects("n1", true)
	var blocks string
	for _, a := range nodes["n2"].Addresses {
		blocks += fmt.Sprintf("\n    - { ipBlock: { cidr: %s/%d } }", a, a.BitLen())
	}
	l.policy(fmt.Sprintf(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to:%s
    ports: [{ port: %d }]
`, blocks, port))
	connects("n2", true)
}

// testRepliesThroughService: answers of a Service's backends belong to the
// pod's question, in any amount, with both ends isolated.
func testRepliesThroughService(t *testing.T, s *suite) {
	l := newServiceLab(t, s, nil)
	l.policy(`
metadata: { name: all-isolated }
spec: { podSelector: {}, policyTypes: [Ingress, Egress] }
`)
	l.policy(`
metadata: { name: client-asks }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { app: good } } }] }]
`)
	l.policy(`
metadata: { name: web-answers }
spec:
  podSelector: { matchLabels: { app: good } }
  ingress: [{ from: [{ podSelector: { matchLabels: { pod: client } } }] }]
`)
	l.expect(
		l.reachesService(answered, l.allowedSvc, l.client),
		l.reachesService(dropped, l.deniedSvc, l.client),
		reaches(dropped, l.client, 8080, l.allowed[0]),
	)
	for _, ip := range l.allowedSvc.Spec.ClusterIPs {
		to := netip.AddrPortFrom(netip.MustParseAddr(ip), 80)
		for range 4 { // some of each backend
			c, err := l.client.dial("tcp", to)
			if err != nil {
				t.Errorf("%s: %v", to, err)
				continue
			}
			const size = 4 << 20
			if n, err := transfer(c, size); n != size || err != nil {
				t.Errorf("%s: %d bytes of %d, %v", to, n, size, err)
			}
			c.Close()
		}
	}
}

// testHairpin: a pod reaches itself through its Service, whatever policy says.
func testHairpin(t *testing.T, s *suite) {
	l := s.lab(t)
	self := l.newPod(podSpec{name: "self", node: "n1", labels: map[string]string{"app": "self"}})
	service := l.service("self", map[string]string{"app": "self"}, core.ServiceTypeClusterIP)
	l.expect(l.reachesService(answered, service, self))
	l.policy(`
metadata: { name: all-isolated }
spec: { podSelector: {}, policyTypes: [Ingress, Egress] }
`)
	other := l.newPod(podSpec{name: "other", node: "n1"})
	l.expect(
		l.reachesService(answered, service, self),
		l.reachesService(dropped, service, other),
	)
}
