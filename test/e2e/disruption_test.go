// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/test/e2e/cluster"
)

// outage is how long the API server is gone.
const outage = 3 * time.Minute

// testDisruption ends parts of the cluster while pods talk and policy changes.
func testDisruption(t *testing.T, s *suite) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"Daemon", testDaemonKilled},
		{"APIServer", testAPIServerStopped},
		{"Containerd", testContainerdRestarted},
		{"Kubelet", testKubeletRestarted},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
}

// disruptionLab is a server that a client may ask and a stranger may not, while
// policies about others come and go.
type disruptionLab struct {
	*lab
	server, client, stranger *pod
}

func newDisruptionLab(t *testing.T, s *suite) *disruptionLab {
	l := &disruptionLab{lab: s.lab(t)}
	pods := l.newPods(podSpec{name: "server", node: "n1"}, podSpec{name: "client", node: "n2"}, podSpec{name: "stranger", node: "n2"})
	l.server, l.client, l.stranger = pods[0], pods[1], pods[2]
	l.policy(`
metadata: { name: server }
spec:
  podSelector: { matchLabels: { pod: server } }
  ingress: [{ from: [{ podSelector: { matchLabels: { pod: client } } }] }]
`)
	l.expect(l.verdicts()...)
	return l
}

// verdicts that hold all the time.
func (l *disruptionLab) verdicts() [][]probe {
	return [][]probe{
		reaches(answered, l.server, 8080, l.client),
		reaches(dropped, l.server, 8080, l.stranger),
	}
}

// hold checks, until stop is called, that an open connection goes on and that
// the stranger never gets in. stop reports what was wrong.
func (l *disruptionLab) hold() (stop func()) {
	l.t.Helper()
	var streams []*stream
	for _, a := range l.server.Addresses {
		for _, network := range []string{"tcp", "udp"} {
			streams = append(streams, l.open(l.client, network, netip.AddrPortFrom(a, 8080)))
		}
	}
	opened := knock(l.stranger, l.server.Addresses, 8080)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan map[string]int)
	go func() {
		counts := map[string]int{}
		for ctx.Err() == nil {
			for _, c := range streams {
				got := c.exchange()
				counts[string(got)]++
				if got != answered {
					counts[fmt.Sprintf("%s to %s", got, c.RemoteAddr())]++
				}
			}
			for _, p := range reaches(answered, l.server, 8080, l.client) {
				got, err := l.client.talk(p.network, p.to)
				if err != nil || got != answered {
					counts[fmt.Sprintf("new %s: %s %v", p, got, err)]++
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		done <- counts
	}()
	return func() {
		l.t.Helper()
		cancel()
		counts := <-done
		l.t.Logf("while it held: %v", counts)
		if len(counts) != 1 || counts[string(answered)] == 0 {
			l.t.Errorf("the client was interrupted: %v", counts)
		}
		if n := opened(); n != 0 {
			l.t.Errorf("the stranger got in %d times", n)
		}
	}
}

// churn makes and deletes policies and relabels a pod until ctx is done. An API
// server that is gone is no error.
func (l *disruptionLab) churn(ctx context.Context) (done chan int) {
	done = make(chan int)
	policies := l.Client.NetworkingV1().NetworkPolicies(l.namespace)
	go func() {
		n := 0
		for ctx.Err() == nil {
			name := fmt.Sprintf("churn-%d", rand.IntN(10))
			manifest := fmt.Sprintf(`{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":%q},
				"spec":{"podSelector":{"matchLabels":{"churn":"%d"}},"ingress":[{"from":[{"podSelector":{"matchLabels":{"churn":"%d"}}}]}]}}`,
				name, rand.IntN(4), rand.IntN(4))
			_, err := policies.Patch(ctx, name, "application/apply-patch+yaml", []byte(manifest),
				meta.PatchOptions{FieldManager: "e2e"})
			if err == nil {
				n++
			}
			patch := fmt.Sprintf(`{"metadata":{"labels":{"churn":"%d"}}}`, rand.IntN(4))
			for _, p := range []*pod{l.stranger, l.client} {
				_, err := l.Client.CoreV1().Pods(l.namespace).Patch(ctx, p.Name, mergePatch, []byte(patch), meta.PatchOptions{})
				if err == nil {
					n++
				}
			}
			if rand.IntN(2) == 0 && policies.Delete(ctx, name, meta.DeleteOptions{}) == nil {
				n++
			}
			time.Sleep(50 * time.Millisecond)
		}
		done <- n
	}()
	return done
}

// settled checks that podgate follows again: a policy that comes now counts, if
// not at once. The longer the API server was gone, the longer are the pauses
// after which clients look for it, up to a minute.
func (l *disruptionLab) settled() {
	l.t.Helper()
	l.policy(`
metadata: { name: client-asks-nobody }
spec: { podSelector: { matchLabels: { pod: client } }, policyTypes: [Egress] }
`)
	l.expectWithin(patience, reaches(dropped, l.server, 8080, l.client))
	l.deletePolicy("client-asks-nobody")
	l.expect(l.verdicts()...)
	late := l.newPod(podSpec{name: "late", node: "n2"})
	l.expect(reaches(dropped, l.server, 8080, late), reaches(answered, late, 8080, l.stranger))
}

// testDaemonKilled: the daemon of both nodes is killed again and again.
func testDaemonKilled(t *testing.T, s *suite) {
	l := newDisruptionLab(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	changes := l.churn(ctx)
	stop := l.hold()
	for range 8 {
		for _, n := range l.Nodes {
			if err := n.Podgate.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Duration(rand.IntN(2000)) * time.Millisecond)
		for _, n := range l.Nodes {
			if err := n.Podgate.Start(); err != nil {
				t.Fatal(err)
			}
		}
		// Some die while they start.
		time.Sleep(time.Duration(rand.IntN(4000)) * time.Millisecond)
	}
	cancel()
	t.Logf("%d changes meanwhile", <-changes)
	stop()
	for _, n := range l.Nodes {
		if ended, err := n.Podgate.Ended(); ended {
			t.Fatalf("podgate on %s: %v", n.Name, err)
		}
	}
	l.settled()
}

// testAPIServerStopped: the API server is gone for minutes, and the daemon of
// a node starts meanwhile.
func testAPIServerStopped(t *testing.T, s *suite) {
	l := newDisruptionLab(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	changes := l.churn(ctx)
	time.Sleep(5 * time.Second)
	stop := l.hold()
	if err := l.ControlPlane.APIServer.Kill(); err != nil {
		t.Fatal(err)
	}
	restart := func() {
		if ended, _ := l.ControlPlane.APIServer.Ended(); !ended {
			return
		}
		if err := l.ControlPlane.APIServer.Start(); err != nil {
			t.Fatal(err)
		}
		if err := l.WaitAPIServer(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	defer restart()
	time.Sleep(outage / 3)
	if err := l.Nodes[0].Podgate.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := l.Nodes[0].Podgate.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * outage / 3)
	for _, n := range l.Nodes {
		if ended, err := n.Podgate.Ended(); ended {
			t.Errorf("podgate on %s gave up: %v", n.Name, err)
		}
	}
	restart()
	time.Sleep(10 * time.Second)
	cancel()
	t.Logf("%d changes before and after", <-changes)
	stop()
	l.settled()
}

// testContainerdRestarted: pods live on, and new ones come.
func testContainerdRestarted(t *testing.T, s *suite) {
	l := newDisruptionLab(t, s)
	stop := l.hold()
	for _, n := range l.Nodes {
		restart(t, n.Containerd)
		if err := n.WaitContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for i, n := range l.Nodes {
		late := l.newPod(podSpec{name: fmt.Sprintf("after-%d", i), node: n.Name})
		l.expect(reaches(dropped, l.server, 8080, late))
		l.deletePod(late)
	}
	stop()
	l.settled()
}

// testKubeletRestarted: the same for the kubelet, which goes through all pods
// when it starts.
func testKubeletRestarted(t *testing.T, s *suite) {
	l := newDisruptionLab(t, s)
	stop := l.hold()
	for _, n := range l.Nodes {
		restart(t, n.Kubelet)
	}
	for i, n := range l.Nodes {
		late := l.newPod(podSpec{name: fmt.Sprintf("after-%d", i), node: n.Name})
		l.expect(reaches(dropped, l.server, 8080, late))
	}
	for _, p := range []*pod{l.server, l.client, l.stranger} {
		object, err := l.Client.CoreV1().Pods(p.Namespace).Get(t.Context(), p.Name, meta.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if object.Status.Phase != core.PodRunning || object.UID != p.UID {
			t.Errorf("pod %s did not live on: %s", p.Name, object.Status.Phase)
		}
	}
	stop()
	l.settled()
}

// restart kills a program and starts it again.
func restart(t *testing.T, p *cluster.Process) {
	t.Helper()
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
}
