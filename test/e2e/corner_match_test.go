// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// testPodRelabelled: labels count as they are now, for subjects and for peers,
// and for connections that are open.
func testPodRelabelled(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"})
	client, server := pods[0], pods[1]
	l.policy(`
metadata: { name: members }
spec:
  podSelector: { matchLabels: { closed: "yes" } }
  ingress: [{ from: [{ podSelector: { matchLabels: { member: "yes" } } }] }]
`)
	l.expect(reaches(answered, server, 8080, client))
	l.relabel(server, "closed", "yes")
	l.expect(reaches(dropped, server, 8080, client))
	l.relabel(client, "member", "yes")
	l.expect(reaches(answered, server, 8080, client))
	var streams []*stream
	for _, a := range server.Addresses {
		streams = append(streams, l.open(client, "tcp", netip.AddrPortFrom(a, 8080)))
	}
	l.relabel(client, "member", "no")
	l.expect(reaches(dropped, server, 8080, client))
	for _, c := range streams {
		if got := c.exchange(); got != dropped {
			t.Errorf("connection to %s of a pod that is no member any more: %s", c.RemoteAddr(), got)
		}
	}
	l.relabel(server, "closed", "")
	l.expect(reaches(answered, server, 8080, client))
}

// testNamespaceRelabelled: the same for namespaces.
func testNamespaceRelabelled(t *testing.T, s *suite) {
	l := s.lab(t)
	other := l.newNamespace("", nil)
	pods := l.newPods(podSpec{name: "server", node: "n1"}, podSpec{name: "client", namespace: other, node: "n2"})
	server, client := pods[0], pods[1]
	l.policy(`
metadata: { name: team }
spec:
  podSelector: {}
  ingress: [{ from: [{ namespaceSelector: { matchLabels: { team: red } } }] }]
`)
	l.expect(reaches(dropped, server, 8080, client))
	for _, step := range []struct {
		patch string
		want  outcome
	}{
		{`{"metadata":{"labels":{"team":"red"}}}`, answered},
		{`{"metadata":{"labels":{"team":"blue"}}}`, dropped},
		{`{"metadata":{"labels":{"team":"red"}}}`, answered},
		{`{"metadata":{"labels":{"team":null}}}`, dropped},
	} {
		_, err := l.Client.CoreV1().Namespaces().Patch(t.Context(), other, mergePatch, []byte(step.patch), meta.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
		l.expect(reaches(step.want, server, 8080, client))
	}
}

// testNamespaceMadeAgain: a namespace that has the name of a former one has
// nothing else of it.
func testNamespaceMadeAgain(t *testing.T, s *suite) {
	l := s.lab(t)
	other := l.newNamespace("", map[string]string{"team": "red"})
	server := l.newPod(podSpec{name: "server", node: "n1"})
	client := l.newPod(podSpec{name: "client", namespace: other, node: "n2"})
	l.policy(`
metadata: { name: team }
spec:
  podSelector: {}
  ingress: [{ from: [{ namespaceSelector: { matchLabels: { team: red } } }] }]
`)
	l.policy(fmt.Sprintf(`
metadata: { name: isolated, namespace: %s }
spec: { podSelector: {} }
`, other))
	l.expect(reaches(answered, server, 8080, client), reaches(dropped, client, 8080, server))
	l.deleteNamespace(other)
	l.eventually("deletion of the namespace", func(ctx context.Context) error {
		if _, err := l.Client.CoreV1().Namespaces().Get(ctx, other, meta.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there (%w)", err)
		}
		return nil
	})
	l.newNamespace(other, nil)
	client = l.newPod(podSpec{name: "client", namespace: other, node: "n2"})
	l.expect(reaches(dropped, server, 8080, client), reaches(answered, client, 8080, server))
}

// nextAddress has the next pod of a node get the addresses of a former one, as
// soon as that one's network is gone.
func (l *lab) nextAddress(node string, addresses ...netip.Addr) {
	l.t.Helper()
	for _, n := range l.Nodes {
		if n.Name != node {
			continue
		}
		for i, a := range addresses {
			// host-local goes on after the last one it gave.
			script := fmt.Sprintf("cd /var/lib/cni/networks/e2e && ! test -e %s && printf %s >last_reserved_ip.%d", a, a.Prev(), i)
			l.eventually("release of "+a.String(), func(ctx context.Context) error {
				_, err := n.Exec(ctx, "/bin/sh", "-c", script)
				return err
			})
		}
	}
}

// testAddressReused: a pod that gets a former pod's address gets neither its
// rights nor its open connections.
func testAddressReused(t *testing.T, s *suite) {
	l := s.lab(t)
	server := l.newPod(podSpec{name: "server", node: "n2"})
	l.policy(`
metadata: { name: members }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { member: "yes" } } }] }]
`)
	for round := range 2 {
		former := l.newPod(podSpec{name: fmt.Sprintf("former-%d", round), node: "n1", labels: map[string]string{"member": "yes"}})
		l.expect(reaches(answered, server, 8080, former))
		l.deletePod(former)
		l.nextAddress("n1", former.Addresses...)
		heir := l.newPod(podSpec{name: fmt.Sprintf("heir-%d", round), node: "n1"})
		if fmt.Sprint(heir.Addresses) != fmt.Sprint(former.Addresses) {
			t.Fatalf("the heir has %v, not %v", heir.Addresses, former.Addresses)
		}
		l.expect(reaches(dropped, server, 8080, heir))
		l.deletePod(heir)
		l.nextAddress("n1", former.Addresses...)
		again := l.newPod(podSpec{name: fmt.Sprintf("again-%d", round), node: "n1", labels: map[string]string{"member": "yes"}})
		l.expect(reaches(answered, server, 8080, again))
		l.deletePod(again)
	}
}

// testCompletedPod: a pod that has run to its end is still an object with an
// address, which is somebody else's by now.
func testCompletedPod(t *testing.T, s *suite) {
	l := s.lab(t)
	server := l.newPod(podSpec{name: "server", node: "n2"})
	l.policy(`
metadata: { name: members }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { member: "yes" } } }] }]
`)
	job := l.createPod(podSpec{name: "job", node: "n1", labels: map[string]string{"member": "yes"}, change: func(p *core.Pod) {
		p.Spec.RestartPolicy = core.RestartPolicyNever
		p.Spec.Containers[0].Command = []string{"/bin/true"}
	}})
	var addresses []netip.Addr
	l.eventually("end of the job", func(ctx context.Context) error {
		p, err := l.Client.CoreV1().Pods(l.namespace).Get(ctx, job.Name, meta.GetOptions{})
		if err != nil {
			return err
		}
		if p.Status.Phase != core.PodSucceeded || len(p.Status.PodIPs) == 0 {
			return fmt.Errorf("phase %s, addresses %v", p.Status.Phase, p.Status.PodIPs)
		}
		addresses = nil
		for _, ip := range p.Status.PodIPs {
			addresses = append(addresses, netip.MustParseAddr(ip.IP))
		}
		return nil
	})
	l.nextAddress("n1", addresses...)
	heir := l.newPod(podSpec{name: "heir", node: "n1"})
	if fmt.Sprint(heir.Addresses) != fmt.Sprint(addresses) {
		t.Fatalf("the heir has %v, not %v", heir.Addresses, addresses)
	}
	l.expect(reaches(dropped, server, 8080, heir))
	l.relabel(heir, "member", "yes")
	l.expect(reaches(answered, server, 8080, heir))
}

// testNameWithDots: the name of a pod may have dots.
func testNameWithDots(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "server.v1.example", node: "n1"}, podSpec{name: "server.v1", node: "n1"}, podSpec{name: "client", node: "n2"})
	l.policy(`
metadata: { name: v1.example }
spec: { podSelector: { matchLabels: { pod: server.v1.example } } }
`)
	l.expect(reaches(dropped, pods[0], 8080, pods[2]), reaches(answered, pods[1], 8080, pods[2]))
}

// testPodStart: a pod has its policy from its first packet on, in both
// directions, and one that no policy selects has nothing to wait for.
func testPodStart(t *testing.T, s *suite) {
	l := s.lab(t)
	free := l.newNamespace("", nil)
	pods := l.newPods(podSpec{name: "server", node: "n2", namespace: free}, podSpec{name: "knocker", node: "n1", namespace: free})
	server, knocker := pods[0], pods[1]
	l.policy(`
metadata: { name: allowed-one-port }
spec:
  podSelector: { matchLabels: { kind: allowed } }
  policyTypes: [Egress]
  egress: [{ to: [{ namespaceSelector: {}, podSelector: { matchLabels: { pod: server } } }], ports: [{ port: 8080 }] }]
`)
	l.policy(`
metadata: { name: denied }
spec: { podSelector: { matchLabels: { kind: denied } }, policyTypes: [Ingress, Egress] }
`)
	// Both rules are in force on the node when the pods come.
	first := l.newPods(
		podSpec{name: "first-denied", node: "n1", labels: map[string]string{"kind": "denied"}},
		podSpec{name: "first-allowed", node: "n1", labels: map[string]string{"kind": "allowed"}},
	)
	l.expect(reaches(dropped, server, 8080, first[0]), reaches(dropped, server, 8081, first[1]))

	// The first thing each does is to connect, five times to each family.
	var script strings.Builder
	script.WriteString("exec 2>/dev/null; ")
	for _, a := range server.Addresses {
		fmt.Fprintf(&script, "for i in 1 2 3 4 5; do if timeout 1 bash -c '</dev/tcp/%s/8080';"+
			" then echo open; else echo shut; fi; done; ", a)
	}
	script.WriteString("echo done; exec /agnhost netexec --http-port=8082 --udp-port=8083")
	talker := func(name, namespace, kind string) podSpec {
		return podSpec{name: name, namespace: namespace, node: "n1", labels: map[string]string{"kind": kind}, change: func(p *core.Pod) {
			p.Spec.Containers[0].Command = []string{"/bin/bash", "-c", script.String()}
		}}
	}
	for round := range 3 {
		next := l.predictAddresses("n1")
		stop := knock(knocker, next, 8082)
		denied := l.newPod(talker(fmt.Sprintf("denied-%d", round), "", "denied"))
		if fmt.Sprint(denied.Addresses) != fmt.Sprint(next) {
			t.Errorf("the pod has %v, foreseen was %v: nobody knocked", denied.Addresses, next)
		}
		l.says(denied, strings.Repeat("shut\n", 10)+"done\n")
		time.Sleep(2 * time.Second) // it serves by now
		if n := stop(); n != 0 {
			t.Errorf("%d connections to an isolated pod while it started", n)
		}
		l.says(l.newPod(talker(fmt.Sprintf("allowed-%d", round), "", "allowed")), strings.Repeat("open\n", 10)+"done\n")
		l.says(l.newPod(talker(fmt.Sprintf("free-%d", round), free, "free")), strings.Repeat("open\n", 10)+"done\n")
	}
}

// predictAddresses of the next pod of a node.
func (l *lab) predictAddresses(node string) (addresses []netip.Addr) {
	l.t.Helper()
	for _, n := range l.Nodes {
		if n.Name != node {
			continue
		}
		for i := range families {
			out, err := n.Exec(l.t.Context(), "/bin/cat", fmt.Sprintf("/var/lib/cni/networks/e2e/last_reserved_ip.%d", i))
			if err != nil {
				l.t.Fatal(err)
			}
			addresses = append(addresses, netip.MustParseAddr(strings.TrimSpace(string(out))).Next())
		}
	}
	return addresses
}

// knock connects to addresses again and again until stop is called, which
// returns how often somebody opened.
func knock(from *pod, to []netip.Addr, port uint16) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	opened := make(chan int)
	for _, a := range to {
		go func() {
			n := 0
			for ctx.Err() == nil {
				_ = from.Do(func() error { // not to get in is what is expected
					c, err := (&net.Dialer{Timeout: 100 * time.Millisecond}).Dial("tcp", netip.AddrPortFrom(a, port).String())
					if err == nil {
						n++
						c.Close()
					}
					return err
				})
				time.Sleep(5 * time.Millisecond)
			}
			opened <- n
		}()
	}
	return func() int {
		cancel()
		n := 0
		for range to {
			n += <-opened
		}
		return n
	}
}

// says waits until a pod's log is complete, and compares.
func (l *lab) says(p *pod, want string) {
	l.t.Helper()
	var got string
	l.eventually("log of "+p.Name, func(ctx context.Context) error {
		out, err := l.Client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &core.PodLogOptions{}).DoRaw(ctx)
		got = string(out)
		if err == nil && !strings.Contains(got, "done\n") {
			err = fmt.Errorf("says %q so far", got)
		}
		return err
	})
	if !strings.HasPrefix(got, want) {
		l.t.Errorf("%s says %q, want %q", p.Name, got, want)
	}
}

// testSamePolicyName: policies of one name in two namespaces, and two policies
// of one selector, are two each.
func testSamePolicyName(t *testing.T, s *suite) {
	l := s.lab(t)
	other := l.newNamespace("", nil)
	pods := l.newPods(
		podSpec{name: "server", node: "n1"},
		podSpec{name: "server", namespace: other, node: "n1"},
		podSpec{name: "a", node: "n2"}, podSpec{name: "b", node: "n2"},
	)
	here, there, a, b := pods[0], pods[1], pods[2], pods[3]
	policy := func(name, namespace, client string) string {
		return fmt.Sprintf(`
metadata: { name: %s, namespace: %s }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ namespaceSelector: {}, podSelector: { matchLabels: { pod: %s } } }] }]
`, name, namespace, client)
	}
	l.policy(policy("web", l.namespace, "a"))
	l.policy(policy("web", other, "b"))
	l.expect(
		reaches(answered, here, 8080, a), reaches(dropped, here, 8080, b),
		reaches(dropped, there, 8080, a), reaches(answered, there, 8080, b),
	)
	l.policy(policy("web-too", l.namespace, "b"))
	l.expect(reaches(answered, here, 8080, a, b), reaches(dropped, there, 8080, a))
	l.deletePolicy("web")
	l.expect(reaches(dropped, here, 8080, a), reaches(answered, here, 8080, b), reaches(answered, there, 8080, b))
}

// testPolicyRenamed: a policy under a new name, made before the old one goes,
// interrupts nothing.
func testPolicyRenamed(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "server", node: "n1"}, podSpec{name: "client", node: "n2"}, podSpec{name: "stranger", node: "n2"})
	server, client, stranger := pods[0], pods[1], pods[2]
	policy := func(name string) string {
		return fmt.Sprintf(`
metadata: { name: %s }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { pod: client } } }] }]
`, name)
	}
	l.policy(policy("zero"))
	l.expect(reaches(answered, server, 8080, client), reaches(dropped, server, 8080, stranger))
	c := l.open(client, "tcp", netip.AddrPortFrom(server.address(4), 8080))
	stop := knock(stranger, server.Addresses, 8080)
	old := "zero"
	for _, name := range []string{"one", "two", "three"} {
		l.policy(policy(name))
		l.deletePolicy(old)
		old = name
		if got := c.exchange(); got != answered {
			t.Errorf("the open connection after the policy became %q: %s", name, got)
		}
		l.expect(reaches(answered, server, 8080, client))
	}
	if n := stop(); n != 0 {
		t.Errorf("%d connections of a stranger meanwhile", n)
	}
}

// testManyRules: hundreds of ports and blocks in a policy are all there.
func testManyRules(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "server", node: "n1"}, podSpec{name: "client", node: "n2"}, podSpec{name: "stranger", node: "n2"})
	server, client, stranger := pods[0], pods[1], pods[2]
	var manifest strings.Builder
	manifest.WriteString("metadata: { name: many }\nspec:\n  podSelector: { matchLabels: { pod: server } }\n  ingress:\n  - from:\n")
	for i := range 250 {
		fmt.Fprintf(&manifest, "    - { ipBlock: { cidr: 198.51.%d.0/26 } }\n    - { ipBlock: { cidr: \"2001:db8:%x::/48\" } }\n", i, i)
	}
	for _, a := range client.Addresses {
		fmt.Fprintf(&manifest, "    - { ipBlock: { cidr: \"%s/%d\" } }\n", a, a.BitLen())
	}
	manifest.WriteString("    ports:\n")
	for i := range 250 {
		// Every other port, so that they do not become ranges.
		fmt.Fprintf(&manifest, "    - { port: %d }\n    - { port: %d, protocol: UDP }\n", 8080-2*i, 8080-2*i)
	}
	l.policy(manifest.String())
	l.expect(
		reaches(answered, server, 8080, client),
		reaches(dropped, server, 8081, client),
		reaches(dropped, server, 8080, stranger),
	)
}
