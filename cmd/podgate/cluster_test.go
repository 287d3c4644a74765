// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/test/controlplane"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// cluster is a lab with an API server, which runs in the node's namespace.
type cluster struct {
	*lab
	plane      *controlplane.ControlPlane
	client     kubernetes.Interface
	kubeconfig string
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	return newLab(t).cluster()
}

// cluster gives the lab an API server.
func (l *lab) cluster() *cluster {
	l.t.Helper()
	t := l.t
	plane := controlplane.Start(t, l.node.Do)
	c := &cluster{
		lab: l, plane: plane, client: plane.Client(),
		kubeconfig: plane.Kubeconfig(plane.TokenFile("token", controlplane.AdminToken)),
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	if _, err := c.client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	if _, err := c.client.CoreV1().Namespaces().Create(t.Context(), namespace, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return c
}

// schedule makes a pod of this node.
func (c *cluster) schedule(name, app string) *corev1.Pod {
	c.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: map[string]string{"app": app}},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	pod, err := c.client.CoreV1().Pods("shop").Create(c.t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// attach adds a pod to the network, as the kubelet's runtime does.
func (c *cluster) attach(pod *corev1.Pod) {
	c.t.Helper()
	c.add(pod.Name, netlab.PodSpec{Namespace: pod.Namespace, Name: pod.Name, UID: string(pod.UID)})
}

func (c *cluster) relabel(name, app string) {
	c.t.Helper()
	patch := []byte(`{"metadata": {"labels": {"app": "` + app + `"}}}`)
	_, err := c.client.CoreV1().Pods("shop").Patch(c.t.Context(), name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) createPolicy(text string) {
	c.t.Helper()
	p := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(text), p); err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.client.NetworkingV1().NetworkPolicies(p.Namespace).Create(c.t.Context(), p, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) deletePolicy(name string) {
	c.t.Helper()
	if err := c.client.NetworkingV1().NetworkPolicies("shop").Delete(c.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// synced waits until the daemon has everything, and well.
func (c *cluster) synced(pods int) {
	c.t.Helper()
	c.until("synced", func() bool {
		r := c.status()
		return r.Daemon != nil && r.Daemon.Running && !r.Daemon.Synced.IsZero() && r.Daemon.Pods == pods && len(r.Problems) == 0
	})
}

// enforced tells whether client and nobody else reaches web.
func (c *cluster) enforced(when string) {
	c.t.Helper()
	if !c.reaches("client", "web") || c.reaches("other", "web") {
		c.t.Errorf("%s policy is not what is enforced", when)
	}
}

// TestCluster enforces the policy of a real API server on real pods, while the
// server comes and goes.
func TestCluster(t *testing.T) {
	c := newCluster(t)
	c.createPolicy(allowClient)
	pods := []*corev1.Pod{c.schedule("client", "client"), c.schedule("web", "web"), c.schedule("other", "other")}
	d := c.start("--kubeconfig", c.kubeconfig)
	c.synced(3)

	// What is known before ADD is enforced when ADD returns.
	for _, p := range pods {
		c.attach(p)
	}
	s := states(c.status())
	if s["shop/client"] != "open" || s["shop/web"] != "enforcing" || s["shop/other"] != "open" {
		t.Errorf("after ADD: %v", s)
	}
	c.listen("web")
	c.enforced("at first")
	var x explanation
	c.json(0, &x, "explain", "--from", "shop/other", "--to", "shop/web", "--port", "80/TCP")
	if x.Verdict != "deny" || x.Disagree {
		t.Errorf("explanation %+v", x)
	}
	if out := c.ok(0, "status"); !strings.Contains(out, "policy from https://127.0.0.1:") {
		t.Errorf("status:\n%s", out)
	}

	t.Run("service", func(t *testing.T) { testService(t, c) })

	c.relabel("other", "client")
	c.until("allowed by its new label", func() bool { return c.answers("other", "web") == 2 })
	c.relabel("other", "other")
	c.until("denied again", func() bool { return c.answers("other", "web") == 0 })

	// A server that is gone changes nothing.
	c.plane.StopAPIServer()
	c.until("said", func() bool { return hasProblem(c.status(), "what it said before stays in force") })
	c.enforced("without a server")

	// Nor does a restart of the daemon meanwhile. A pod it has not heard of waits.
	d.end(t, unix.SIGKILL)
	c.enforced("with server and daemon gone")
	d = c.start("--kubeconfig", c.kubeconfig)
	c.until("said", func() bool {
		r := c.status()
		return r.Daemon.Running && hasProblem(r, "what was enforced before stays so")
	})
	c.add("late", netlab.PodSpec{Namespace: "shop", Name: "late", UID: "not-known-yet"})
	c.enforced("after a restart without a server")
	if s := states(c.status()); s["shop/late"] != "closed" || c.reaches("late", "web") {
		t.Errorf("a pod nobody knows: %v", s)
	}

	c.plane.StartAPIServer()
	c.until("followed again", func() bool { return !hasProblem(c.status(), "API server") })
	c.enforced("with the server back")
	c.deletePolicy("web")
	c.until("open", func() bool { return states(c.status())["shop/web"] == "open" })
	if !c.reaches("other", "web") {
		t.Error("the deleted policy is still enforced")
	}
	d.end(t, unix.SIGTERM)
}

// testService asks that a pod behind a Service is reached by who may reach the
// pod, at the Service's port and with kube-proxy's kind of translation.
func testService(t *testing.T, c *cluster) {
	need.Tools(t, "nft")
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 8080, TargetPort: intstr.FromInt32(80)}}},
	}
	service, err := c.client.CoreV1().Services("shop").Create(t.Context(), service, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	backend := c.addrs["web"][0]
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{backend}}},
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To(""), Port: ptr.To[int32](80)}},
	}
	slice, err = c.client.DiscoveryV1().EndpointSlices("shop").Create(t.Context(), slice, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.createPolicy(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: egress}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 80}]
`)
	c.until("isolated", func() bool { return states(c.status())["shop/client"] == "enforcing" })
	rules := `table ip kube { chain p { type nat hook prerouting priority dstnat; ip daddr ` +
		service.Spec.ClusterIP + ` tcp dport 8080 dnat to ` + backend + `:80; }; }`
	if _, err := c.node.Exec(t.Context(), "nft", rules); err != nil {
		t.Fatal(err)
	}
	dial := func(port string) bool {
		return c.pods["client"].Do(func() error {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(service.Spec.ClusterIP, port), 300*time.Millisecond)
			if err != nil {
				return err
			}
			return conn.Close()
		}) == nil
	}
	c.until("reached through the Service", func() bool { return dial("8080") })
	testExplainService(t, c, service.Spec.ClusterIP, slice)
	if _, err := c.node.Exec(t.Context(), "nft", "delete table ip kube"); err != nil {
		t.Fatal(err)
	}
	c.deletePolicy("egress")
	c.until("open", func() bool { return states(c.status())["shop/client"] == "open" })
}

// testExplainService asks that questions about a Service are answered for each
// backend, by compiler and kernel alike, also where the kernel judges before one
// is chosen.
func testExplainService(t *testing.T, c *cluster, vip string, slice *discoveryv1.EndpointSlice) {
	need.Tools(t, "ip")
	explain := func() (x explanation) {
		t.Helper()
		c.json(0, &x, "explain", "--from", "shop/client", "--to", vip, "--port", "8080/TCP")
		for _, p := range x.Paths {
			if p.To.String() != vip || p.Service != "shop/web" || len(p.Sides) != 2 || p.Sides[0].Compiler == nil || p.Sides[0].Kernel == nil {
				t.Errorf("path %+v", p)
			}
		}
		return x
	}
	if x := explain(); x.Verdict != "allow" || len(x.Paths) != 1 || x.Paths[0].Backend.String() != c.addrs["web"][0]+":80" {
		t.Errorf("explanation %+v", x)
	}
	slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{c.addrs["other"][0]}})
	if _, err := c.client.DiscoveryV1().EndpointSlices("shop").Update(t.Context(), slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("mixed", func() bool { return explain().Verdict == mixed })
	var m matrixReport
	c.json(0, &m, "matrix", "--ports", "8080", "--pods", "shop/client", "--address", vip)
	if m.Cells[1].To != vip || m.Cells[1].Verdict != mixed {
		t.Errorf("matrix %+v", m)
	}

	if _, err := c.node.Exec(t.Context(), "ip", "link", "add", "kube-ipvs0", "type", "veth", "peer", "name", "ipvs1"); err != nil {
		t.Fatal(err)
	}
	c.ok(0, "repair")
	c.until("denied as a whole", func() bool { return explain().Verdict == "deny" })
	out := c.ok(0, "explain", "--from", "shop/client", "--to", vip, "--port", "8080/TCP")
	if !strings.Contains(out, "some backends of the Service are allowed and others not") || strings.Contains(out, "DISAGREE") {
		t.Errorf("explanation:\n%s", out)
	}
	if _, err := c.node.Exec(t.Context(), "ip", "link", "del", "kube-ipvs0"); err != nil {
		t.Fatal(err)
	}
	c.ok(0, "repair")
}

// TestPolicyTooLarge has a policy find no room: it is closed and said, once and
// by name, the rest goes on, and all is well when it is gone.
func TestPolicyTooLarge(t *testing.T) {
	c := newCluster(t)
	c.start("--kubeconfig", c.kubeconfig, "--capacity-blocks", "1024")
	c.synced(0)
	for _, name := range []string{"client", "web"} {
		c.attach(c.schedule(name, name))
	}
	c.listen("web")
	c.synced(2)
	large := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "large"}}
	large.Spec.PodSelector.MatchLabels = map[string]string{"app": "web"}
	var peers []networkingv1.NetworkPolicyPeer
	for i := range 10_000 {
		cidr := netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)}).String() + "/32"
		peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: cidr}})
	}
	large.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: peers}}
	if _, err := c.client.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), large, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.until("closed and said", func() bool {
		return c.answers("client", "web") == 0 &&
			hasProblem(c.status(), "NetworkPolicy shop/large: 8976 of its addresses and blocks found no room")
	})
	if r := c.status(); len(r.Problems) > 2 { // and that the map is full
		t.Errorf("problems %v", r.Problems)
	}
	c.until("an event about it", func() bool {
		events, err := c.client.CoreV1().Events("shop").List(t.Context(), metav1.ListOptions{})
		return err == nil && slices.ContainsFunc(events.Items, func(e corev1.Event) bool {
			return e.InvolvedObject.Name == "large" && strings.Contains(e.Message, "found no room")
		})
	})
	c.attach(c.schedule("late", "late"))
	c.until("a pod that came meanwhile open", func() bool { return states(c.status())["shop/late"] == "open" })
	c.createPolicy(strings.ReplaceAll(startPolicy, "NAME", "client"))
	c.until("another policy enforced", func() bool { return states(c.status())["shop/client"] == "enforcing" })
	c.deletePolicy("large")
	c.deletePolicy("client")
	c.until("open again", func() bool { return c.answers("client", "web") == len(c.addrs["web"]) && len(c.status().Problems) == 0 })
}
