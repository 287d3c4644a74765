// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// question is one client's question to one frontend.
type question struct {
	from    *pod
	network string
	to      netip.AddrPort
}

func (q question) String() string {
	return fmt.Sprintf("%s -> %s over %s", q.from.Name, q.to, q.network)
}

// testSessionAffinity: each client sticks to one backend of a Service, and the
// verdict is always that of this backend, whatever else is behind the Service.
func testSessionAffinity(t *testing.T, s *suite) {
	l := s.lab(t)
	var specs []podSpec
	for _, name := range []string{"good", "bad"} {
		for _, node := range []string{"n1", "n2"} {
			specs = append(specs, podSpec{name: name + "-" + node, node: node, labels: map[string]string{"app": "web", "kind": name}})
		}
	}
	for i := range 4 {
		specs = append(specs, podSpec{name: fmt.Sprintf("client-%d", i), node: l.Nodes[i%2].Name, labels: map[string]string{"app": "client"}})
	}
	pods := l.newPods(specs...)
	backends, clients := pods[:4], pods[4:]
	for _, p := range backends {
		if err := p.tellName(); err != nil {
			t.Fatal(err)
		}
	}
	service := &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: "web"},
		Spec: core.ServiceSpec{
			Selector: map[string]string{"app": "web"}, SessionAffinity: core.ServiceAffinityClientIP,
			IPFamilyPolicy: new(core.IPFamilyPolicyRequireDualStack),
			Ports: []core.ServicePort{
				{Name: "tcp", Protocol: core.ProtocolTCP, Port: namePort},
				{Name: "udp", Protocol: core.ProtocolUDP, Port: namePort},
			},
		},
	}
	service, err := l.Client.CoreV1().Services(l.namespace).Create(t.Context(), service, meta.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.eventually("endpoints of the Service", func(ctx context.Context) error {
		return l.endpoints(ctx, "web", 2*len(backends), nil)
	})

	// Before any policy, to see who sticks to whom.
	var questions []question
	for _, from := range clients {
		for _, ip := range service.Spec.ClusterIPs {
			for _, network := range []string{"tcp", "udp"} {
				questions = append(questions, question{from, network, netip.AddrPortFrom(netip.MustParseAddr(ip), namePort)})
			}
		}
	}
	stuck := map[question]string{}
	l.eventually("clients that stick to a backend", func(context.Context) error {
		for _, q := range questions {
			name, got, err := q.from.askName(q.network, q.to)
			if err != nil {
				return fmt.Errorf("%s: %w", q, err)
			}
			// kube-proxy may learn of some backends later than of others.
			if before := stuck[q]; got != answered || before != name {
				stuck[q] = name
				return fmt.Errorf("%s: %s by %q, before it was %q", q, got, name, before)
			}
		}
		return nil
	})
	kinds := map[string]string{} // of backends by name
	for _, p := range backends {
		kinds[p.Name] = p.Labels["kind"]
	}
	counts := map[string]int{}
	for _, name := range stuck {
		counts[kinds[name]]++
	}
	if counts["good"] == 0 || counts["bad"] == 0 || len(counts) != 2 {
		t.Fatalf("clients stick to %v: want some of each kind", stuck)
	}

	for _, allowed := range []string{"good", "bad"} {
		l.policy(fmt.Sprintf(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { app: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { kind: %s } } }] }]
`, allowed))
		verdicts := func(context.Context) error {
			return concurrently(len(questions), func(i int) error {
				q := questions[i]
				want, wantName := dropped, ""
				if kinds[stuck[q]] == allowed {
					want, wantName = answered, stuck[q]
				}
				name, got, err := q.from.askName(q.network, q.to)
				if err != nil {
					return fmt.Errorf("%s: %w", q, err)
				}
				if got != want || name != wantName {
					return fmt.Errorf("%s, which sticks to %s: %s %q", q, stuck[q], got, name)
				}
				return nil
			})
		}
		if err := within(t.Context(), patience, verdicts); err != nil {
			t.Fatalf("%s allowed: %v", allowed, err)
		}
		for range 3 {
			if err := verdicts(t.Context()); err != nil {
				t.Errorf("%s allowed, and then: %v", allowed, err)
			}
		}
	}
}

// endpoints returns nil when the slices of a Service have count endpoints of
// which ok, if there is one, holds.
func (l *lab) endpoints(ctx context.Context, service string, count int, ok func(discovery.EndpointConditions) bool) error {
	slices, err := l.Client.DiscoveryV1().EndpointSlices(l.namespace).List(ctx, meta.ListOptions{
		LabelSelector: discovery.LabelServiceName + "=" + service,
	})
	if err != nil {
		return err
	}
	n := 0
	for _, slice := range slices.Items {
		for _, e := range slice.Endpoints {
			if len(e.Addresses) == 1 && (ok == nil || ok(e.Conditions)) {
				n++
			}
		}
	}
	if n != count {
		return fmt.Errorf("%d of %d endpoints of %s: %+v", n, count, service, slices.Items)
	}
	return nil
}

// testHeadlessService: the resolver, which is a Service itself, gives the
// addresses of the pods, and each is judged as what it is.
func testHeadlessService(t *testing.T, s *suite) {
	l := newServiceLab(t, s, nil)
	_, err := l.Client.CoreV1().Services(l.namespace).Create(t.Context(), &core.Service{
		ObjectMeta: meta.ObjectMeta{Name: "web"},
		Spec: core.ServiceSpec{
			ClusterIP: core.ClusterIPNone, Selector: map[string]string{"tier": "web"},
			IPFamilyPolicy: new(core.IPFamilyPolicyRequireDualStack),
			Ports:          []core.ServicePort{{Name: "tcp", Port: 8080}},
		},
	}, meta.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress:
  - to: [{ podSelector: { matchLabels: { app: good } } }]
  - to: [{ namespaceSelector: { matchLabels: { kubernetes.io/metadata.name: kube-system } } }]
    ports: [{ port: 53, protocol: UDP }, { port: 53 }]
`)
	var want []netip.Addr
	for _, p := range slices.Concat(l.allowed, l.denied) {
		want = append(want, p.Addresses...)
	}
	slices.SortFunc(want, netip.Addr.Compare)
	resolver, name := s.resolver(t), "web."+l.namespace+".svc.cluster.local"
	l.eventually("names of the pods", func(context.Context) error {
		var found []netip.Addr
		for _, family := range []string{"ip4", "ip6"} {
			addresses, err := l.client.lookup(resolver, family, name)
			if err != nil {
				return err
			}
			found = append(found, addresses...)
		}
		slices.SortFunc(found, netip.Addr.Compare)
		if !slices.Equal(found, want) {
			return fmt.Errorf("%s is %v, must be %v", name, found, want)
		}
		return nil
	})
	var verdicts [][]probe
	for _, p := range l.allowed {
		verdicts = append(verdicts, reaches(answered, p, 8080, l.client))
	}
	for _, p := range l.denied {
		verdicts = append(verdicts, reaches(dropped, p, 8080, l.client))
	}
	l.expect(verdicts...)

	// No rule names the resolver now.
	l.policy(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { app: good } } }] }]
`)
	l.eventually("the resolver that may not be asked", func(context.Context) error {
		if addresses, err := l.client.lookup(resolver, "ip4", name); err == nil {
			return fmt.Errorf("%s is %v", name, addresses)
		}
		return nil
	})
	l.expect(reaches(answered, l.allowed[1], 8080, l.client))
}

// testTerminatingEndpoints: pods that end, and serve until they have, are what a
// Service without others has. Policy goes on for them and for their connections,
// and follows changes.
func testTerminatingEndpoints(t *testing.T, s *suite) {
	l := newServiceLab(t, s, func(p *core.Pod) {
		p.Spec.TerminationGracePeriodSeconds = new(int64(300))
		p.Spec.Containers[0].Args = []string{"netexec", "--http-port=9090", "--udp-port=9091", "--delay-shutdown=300"}
	})
	allow := func(app string) {
		t.Helper()
		l.policy(fmt.Sprintf(`
metadata: { name: egress }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { app: %s } } }] }]
`, app))
	}
	verdicts := func(good, bad outcome) {
		t.Helper()
		probes := slices.Concat(l.reachesService(good, l.allowedSvc, l.client), l.reachesService(bad, l.deniedSvc, l.client))
		for i := range l.allowed {
			probes = slices.Concat(probes, reaches(good, l.allowed[i], 8080, l.client), reaches(bad, l.denied[i], 8080, l.client))
		}
		l.expect(probes)
	}
	allow("good")
	verdicts(answered, dropped)
	var streams []*stream
	for _, ip := range l.allowedSvc.Spec.ClusterIPs {
		streams = append(streams, l.open(l.client, "tcp", netip.AddrPortFrom(netip.MustParseAddr(ip), 80)))
	}
	hold := func(want outcome) {
		t.Helper()
		for _, c := range streams {
			if got := c.exchange(); got != want {
				t.Errorf("open connection to %s: %s, must be %s", c.RemoteAddr(), got, want)
			}
		}
	}

	pods := slices.Concat(l.allowed, l.denied, []*pod{l.client})
	for _, p := range pods {
		if err := l.Client.CoreV1().Pods(p.Namespace).Delete(t.Context(), p.Name, meta.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for service, n := range map[string]int{"good": 2 * len(l.allowed), "bad": 2 * len(l.denied)} {
		l.eventually("endpoints that end", func(ctx context.Context) error {
			return l.endpoints(ctx, service, n, func(c discovery.EndpointConditions) bool {
				return c.Terminating != nil && *c.Terminating && c.Serving != nil && *c.Serving && !*c.Ready
			})
		})
	}
	verdicts(answered, dropped)
	hold(answered)
	allow("bad")
	verdicts(dropped, answered)
	hold(dropped)
	for _, p := range pods {
		l.deletePod(p) // at once
	}
}
