// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/podgate/podgate/test/e2e/build"
	"github.com/podgate/podgate/test/e2e/cluster"
)

// isolated selects every pod and allows nothing.
const isolated = `
metadata: { name: isolated }
spec: { podSelector: {}, policyTypes: [Ingress, Egress] }
`

// testOwnAddress: no policy keeps a pod from its own address.
func testOwnAddress(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "self", node: "n1"}, podSpec{name: "other", node: "n1"})
	l.policy(isolated)
	l.expect(
		reaches(answered, pods[0], 8080, pods[0]),
		reaches(dropped, pods[0], 8080, pods[1]),
	)
}

// testKubeletProbes: probes of the kubelet get through isolation, of both
// families, from the first one on.
func testKubeletProbes(t *testing.T, s *suite) {
	l := s.lab(t)
	l.policy(isolated)
	p := l.newPod(podSpec{name: "probed", change: func(p *core.Pod) {
		c := &p.Spec.Containers[0]
		c.Args = []string{"netexec", "--http-port=9090", "--udp-port=9091"}
		c.ReadinessProbe = &core.Probe{
			PeriodSeconds: 1, FailureThreshold: 1,
			ProbeHandler: core.ProbeHandler{HTTPGet: &core.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(9090)}},
		}
		c.LivenessProbe = &core.Probe{
			PeriodSeconds: 1, FailureThreshold: 3, InitialDelaySeconds: 2,
			ProbeHandler: core.ProbeHandler{TCPSocket: &core.TCPSocketAction{Port: intstr.FromInt32(9090)}},
		}
	}})
	l.eventually("readiness", func(ctx context.Context) error {
		object, err := l.Client.CoreV1().Pods(p.Namespace).Get(ctx, p.Name, meta.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range object.Status.Conditions {
			if c.Type == core.PodReady && c.Status == core.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", object.Status.Conditions)
	})
	// The node has no address family of its own choice: ask from it too.
	for _, n := range l.Nodes {
		if n.Name != p.Spec.NodeName {
			continue
		}
		for _, a := range p.Addresses {
			if err := dialFrom(n.Machine, netip.AddrPortFrom(a, 8080)); err != nil {
				t.Errorf("from its own node: %v", err)
			}
		}
	}
	object, err := l.Client.CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := object.Status.ContainerStatuses[0].RestartCount; n != 0 {
		t.Errorf("%d restarts: the liveness probe did not get through", n)
	}
}

// dialFrom connects from a machine itself.
func dialFrom(m *cluster.Machine, to netip.AddrPort) error {
	return m.Do(func() error {
		c, err := (&net.Dialer{Timeout: dialTimeout}).Dial("tcp", to.String())
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// testOtherNode: other nodes are not exempt.
func testOtherNode(t *testing.T, s *suite) {
	l := s.lab(t)
	p := l.newPod(podSpec{name: "server", node: "n1"})
	for _, a := range p.Addresses {
		if err := dialFrom(l.Nodes[1].Machine, netip.AddrPortFrom(a, 8080)); err != nil {
			t.Errorf("before any policy: %v", err)
		}
	}
	l.policy(isolated)
	for _, a := range p.Addresses {
		l.eventually("isolation from the other node", func(context.Context) error {
			err := dialFrom(l.Nodes[1].Machine, netip.AddrPortFrom(a, 8080))
			if err == nil {
				return fmt.Errorf("n2 reaches %s", a)
			}
			if o, err := classify(err); o != dropped {
				return fmt.Errorf("n2 -> %s: %s %w", a, o, err)
			}
			return nil
		})
	}
}

// testHostNetworkPods: policy does not select them, and their labels give the
// address of their node to nobody.
func testHostNetworkPods(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(
		podSpec{name: "server", node: "n1"},
		podSpec{name: "friend", node: "n2", labels: map[string]string{"friend": "yes"}},
		podSpec{name: "host", node: "n2", labels: map[string]string{"friend": "yes"}, change: func(p *core.Pod) {
			p.Spec.HostNetwork = true
			p.Spec.Containers[0].Args = []string{"netexec", "--http-port=18080", "--udp-port=18081"}
		}},
	)
	server, friend, host := pods[0], pods[1], pods[2]
	l.policy(isolated)
	l.policy(`
metadata: { name: friends }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { friend: "yes" } } }] }]
`)
	l.policy(`
metadata: { name: friends-ask }
spec:
  podSelector: { matchLabels: { friend: "yes" } }
  policyTypes: [Egress]
  egress: [{ to: [{ podSelector: { matchLabels: { pod: server } } }] }]
`)
	l.expect(
		reaches(answered, server, 8080, friend),
		reaches(dropped, server, 8080, host),
	)
	// It is isolated by name only.
	for _, ip := range host.Status.PodIPs {
		to := netip.AddrPortFrom(netip.MustParseAddr(ip.IP), 18080)
		if err := dialFrom(l.ControlPlane.Machine, to); err != nil {
			t.Errorf("the control plane does not reach the host-network pod: %v", err)
		}
	}
}

// testStaticPod: a pod that the kubelet makes from a file has another UID for
// the runtime than the API server has for it, and obeys policy all the same.
func testStaticPod(t *testing.T, s *suite) {
	l := s.lab(t)
	client := l.newPod(podSpec{name: "client", node: "n2"})
	manifest := fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: { name: static, namespace: %s, labels: { pod: static } }
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - { name: main, image: %q, imagePullPolicy: Never, args: [pause] }
`, l.namespace, build.AgnhostImage)
	file := filepath.Join("/etc/kubernetes/manifests", l.namespace+".yaml")
	node := l.Nodes[0]
	write := fmt.Sprintf("cat >%s <<'END'\n%s\nEND\n", file, manifest)
	if _, err := node.Exec(t.Context(), "/bin/sh", "-c", write); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := node.Exec(ctx, "/bin/rm", file); err != nil {
			t.Error(err)
		}
	})
	var object *core.Pod
	l.eventually("mirror pod", func(ctx context.Context) (err error) {
		object, err = l.Client.CoreV1().Pods(l.namespace).Get(ctx, "static-n1", meta.GetOptions{})
		return err
	})
	static := l.running(object)
	l.expect(reaches(answered, static, 8080, client))
	l.policy(isolated)
	l.expect(reaches(dropped, static, 8080, client))
	l.policy(`
metadata: { name: allowed }
spec:
  podSelector: { matchLabels: { pod: static } }
  ingress: [{ from: [{ podSelector: { matchLabels: { pod: client } } }] }]
`)
	l.policy(`
metadata: { name: asks }
spec:
  podSelector: { matchLabels: { pod: client } }
  policyTypes: [Egress]
  egress: [{}]
`)
	l.expect(reaches(answered, static, 8080, client))
}
