// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/podgate/podgate/test/netlab"
)

const startPolicy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: NAME}
spec:
  podSelector: {matchLabels: {app: NAME}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
`

// TestPodStart attaches pods the moment the API server has them, under a policy
// that exists, one made just before and none, and asks at the pod itself that
// the first connection it makes or gets already meets its verdict.
func TestPodStart(t *testing.T) {
	c := newCluster(t)
	c.start("--kubeconfig", c.kubeconfig)
	c.synced(0)
	for _, name := range []string{"client", "other"} {
		c.attach(c.schedule(name, name))
		c.listen(name)
	}
	c.synced(2)
	c.createPolicy(strings.ReplaceAll(startPolicy, "NAME", "existing"))

	for round := range 4 {
		for _, tt := range []struct {
			kind            string
			isolated, fresh bool
		}{{"existing", true, false}, {"new", true, true}, {"free", false, false}} {
			name := fmt.Sprintf("%s-%d", tt.kind, round)
			app := tt.kind
			if tt.fresh {
				app = name
				c.createPolicy(strings.ReplaceAll(startPolicy, "NAME", app))
			}
			began := time.Now()
			c.attach(c.schedule(name, app))
			c.listen(name)
			for _, pair := range []struct {
				from, to string
				want     bool
			}{
				{"other", name, !tt.isolated}, {name, "other", !tt.isolated},
				{"client", name, true}, {name, "client", true},
			} {
				if got := c.answers(pair.from, pair.to); got != len(c.addrs[pair.to]) && got != 0 || (got > 0) != pair.want {
					t.Errorf("%s, %v after it was made: %s gets %d answers from %s", name, time.Since(began), pair.from, got, pair.to)
				}
			}
			c.probed(name)
		}
	}
}

// TestPodStartModes attaches pods that the daemon has not heard of, as it is
// stopped, and asks that the gate is as the plugin's mode says until it has.
func TestPodStartModes(t *testing.T) {
	c := newCluster(t)
	d := c.start("--kubeconfig", c.kubeconfig)
	c.synced(0)
	c.createPolicy(strings.ReplaceAll(startPolicy, "NAME", "web"))
	for _, name := range []string{"client", "other"} {
		c.attach(c.schedule(name, name))
		c.listen(name)
	}
	c.synced(2)
	last := len(c.list.Plugins) - 1
	plugin := c.list.Plugins[last]
	all := func(to string) int { return len(c.addrs[to]) }
	for _, mode := range []string{"closed", "open"} {
		c.list.Plugins[last] = plugin.With(netlab.Plugin{"mode": mode, "waitForPolicy": "0s"})
		if err := d.cmd.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		selected, free := "web-"+mode, "free-"+mode
		c.createPolicy(strings.ReplaceAll(strings.Replace(startPolicy, "NAME", "new-"+mode, 1), "NAME", selected))
		for name, app := range map[string]string{selected: selected, free: "free"} {
			c.attach(c.schedule(name, app))
			c.listen(name)
			if s := states(c.status())["shop/"+name]; s != mode {
				t.Errorf("%s is %s after ADD", name, s)
			}
			for _, peer := range []string{"client", "other"} {
				in, out := 0, 0
				if mode == "open" {
					in, out = all(name), all(peer)
				}
				if n := c.answers(peer, name); n != in {
					t.Errorf("%s: %s gets %d answers, not %d", name, peer, n, in)
				}
				if n := c.answers(name, peer); n != out {
					t.Errorf("%s gets %d answers of %s, not %d", name, n, peer, out)
				}
			}
			c.probed(name)
		}
		if err := d.cmd.Process.Signal(unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		c.until("known", func() bool {
			s := states(c.status())
			return s["shop/"+selected] == "enforcing" && s["shop/"+free] == "open"
		})
		for _, name := range []string{selected, free} {
			want := map[string]int{"client": all(name), "other": 0}
			if name == free {
				want["other"] = all(name)
			}
			for peer, n := range want {
				if got := c.answers(peer, name); got != n {
					t.Errorf("%s is known: %s gets %d answers, not %d", name, peer, got, n)
				}
			}
			c.probed(name)
		}
	}
	// A pod that nothing selects and the daemon has heard of is open at once,
	// whatever the mode, and ADD waits for nothing.
	c.list.Plugins[last] = plugin.With(netlab.Plugin{"mode": "closed", "waitForPolicy": "0s"})
	pod := c.schedule("free", "free")
	c.synced(7)
	if err := d.cmd.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c.attach(pod)
	c.listen("free")
	if c.answers("other", "free") != all("free") || c.answers("free", "other") != all("other") {
		t.Error("a pod that nothing selects does not talk after ADD")
	}
	if err := d.cmd.Process.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

// probed connects from the node, as the kubelet does.
func (c *cluster) probed(name string) {
	c.t.Helper()
	for _, addr := range c.addrs[name] {
		err := c.node.Do(func() error {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "80"), time.Second)
			if err != nil {
				return err
			}
			return conn.Close()
		})
		if err != nil {
			c.t.Errorf("%s: probe: %v", name, err)
		}
	}
}

// TestStaticPod asks that a static pod is known by the UID that the runtime
// has, which is not that of its copy at the API server.
func TestStaticPod(t *testing.T) {
	c := newCluster(t)
	c.start("--kubeconfig", c.kubeconfig)
	c.synced(0)
	c.createPolicy(strings.ReplaceAll(startPolicy, "NAME", "static"))
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "static-n1", Labels: map[string]string{"app": "static"},
			Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "0123456789abcdef"},
		},
		Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	pod, err := c.client.CoreV1().Pods("shop").Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.synced(1)
	c.add("static", netlab.PodSpec{Namespace: "shop", Name: pod.Name, UID: "0123456789abcdef"})
	if s := states(c.status()); s["shop/static-n1"] != "enforcing" {
		t.Errorf("after ADD: %v", s)
	}
	// Another pod that claims that UID neither gets its policy nor takes it.
	forged := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "forged", Labels: map[string]string{"app": "client"},
			Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "0123456789abcdef"},
		},
		Spec: pod.Spec,
	}
	if forged, err = c.client.CoreV1().Pods("shop").Create(t.Context(), forged, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.synced(2)
	c.add("forged", netlab.PodSpec{Namespace: "shop", Name: forged.Name, UID: string(forged.UID)})
	c.until("apart", func() bool {
		s := states(c.status())
		return s["shop/static-n1"] == "enforcing" && s["shop/forged"] == "open"
	})
	var subjects []types.UID
	for _, e := range c.status().Endpoints {
		subjects = append(subjects, types.UID(e.Subject))
	}
	if len(subjects) != 2 || subjects[0] == subjects[1] {
		t.Errorf("subjects %v", subjects)
	}
}
