// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"

	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
	"github.com/podgate/podgate/test/controlplane"
)

// mirror is what a source has delivered so far.
type mirror struct {
	t      *testing.T
	source *Source

	mu       sync.Mutex
	objects  map[manifest.Key]manifest.Object
	pending  []string
	problems []source.Problem
	batches  int
}

// run follows a server until the test ends.
func run(t *testing.T, config *rest.Config) *mirror {
	t.Helper()
	s, err := New(Options{Config: config, Node: "n1", Patience: 2 * time.Second, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	m := &mirror{t: t, source: s, objects: make(map[manifest.Key]manifest.Object)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, m.take) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return m
}

// notify has events written about the problems there are.
func (m *mirror) notify() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.problems {
		m.source.Notify(p)
	}
}

func (m *mirror) take(b source.Batch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range b.Gone {
		delete(m.objects, k)
	}
	for _, o := range b.Set {
		m.objects[o.Key] = o
	}
	m.pending, m.problems = b.Pending, b.Problems
	m.batches++
}

// until waits for a condition.
func (m *mirror) until(what string, ok func() bool) {
	m.t.Helper()
	m.untilWithin(time.Minute, what, ok)
}

func (m *mirror) untilWithin(limit time.Duration, what string, ok func() bool) {
	m.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		m.mu.Lock()
		done, objects, problems := ok(), slices.Sorted(maps.Values(describeAll(m.objects))), m.problems
		m.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("not %s:\n%s\nproblems %v", what, strings.Join(objects, "\n"), problems)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// says waits until an object is described so; empty means that it is not there.
func (m *mirror) says(key manifest.Key, want string) {
	m.t.Helper()
	m.until(fmt.Sprintf("%v: %q", key, want), func() bool {
		o, ok := m.objects[key]
		return ok && describe(o) == want || !ok && want == ""
	})
}

func describeAll(objects map[manifest.Key]manifest.Object) map[manifest.Key]string {
	out := make(map[manifest.Key]string, len(objects))
	for k, o := range objects {
		out[k] = k.String() + ": " + describe(o)
	}
	return out
}

// describe is what counts of an object, in one line.
func describe(o manifest.Object) string {
	switch {
	case o.Pod != nil:
		s := fmt.Sprintf("%s %v on %q", o.Pod.Labels["l"], o.Pod.Addresses, o.Node)
		for word, on := range map[string]bool{" host": o.Pod.HostNetwork, " going": o.Pod.Terminating} {
			if on {
				s += word
			}
		}
		if o.Mirror {
			s += " mirror of " + o.Pod.UID
		}
		return s
	case o.Policy != nil:
		return fmt.Sprintf("isolates %v, %d in, %d out", o.Policy.Isolates, len(o.Policy.Rules[0]), len(o.Policy.Rules[1]))
	case o.Namespace != nil:
		return o.Namespace.Labels["l"]
	case o.Service != nil:
		return fmt.Sprint(o.Service.Addresses, " ", o.Service.Ports)
	case o.EndpointSlice != nil:
		return fmt.Sprint("of ", o.EndpointSlice.Service, " ", o.EndpointSlice.Addresses, " ", o.EndpointSlice.Ports)
	}
	return "node"
}

// cluster makes objects.
type cluster struct {
	t *testing.T
	kubernetes.Interface
}

func (c cluster) namespace(name, label string) {
	c.t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"l": label}}}
	if _, err := c.CoreV1().Namespaces().Create(c.t.Context(), ns, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// pod makes a pod on a node; with addresses it is running.
func (c cluster) pod(namespace, name, node string, change func(*corev1.Pod), addresses ...string) *corev1.Pod {
	c.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"l": "1"}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	if change != nil {
		change(pod)
	}
	pod, err := c.CoreV1().Pods(namespace).Create(c.t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	if len(addresses) == 0 {
		return pod
	}
	return c.status(pod, corev1.PodRunning, addresses...)
}

func (c cluster) status(pod *corev1.Pod, phase corev1.PodPhase, addresses ...string) *corev1.Pod {
	c.t.Helper()
	pod.Status.Phase, pod.Status.PodIP, pod.Status.PodIPs = phase, addresses[0], nil
	for _, a := range addresses {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a})
	}
	pod, err := c.CoreV1().Pods(pod.Namespace).UpdateStatus(c.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// relabel changes the label of a pod.
func (c cluster) relabel(namespace, name, label string) {
	c.t.Helper()
	patch := fmt.Appendf(nil, `{"metadata": {"labels": {"l": %q}}}`, label)
	if _, err := c.CoreV1().Pods(namespace).Patch(c.t.Context(), name, "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// delete deletes a pod at once, as a node does that has ended it.
func (c cluster) delete(namespace, name string) {
	c.t.Helper()
	if err := c.CoreV1().Pods(namespace).Delete(c.t.Context(), name, *metav1.NewDeleteOptions(0)); err != nil {
		c.t.Fatal(err)
	}
}

func (c cluster) policy(namespace, name string, spec networkingv1.NetworkPolicySpec) {
	c.t.Helper()
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: spec}
	if _, err := c.NetworkingV1().NetworkPolicies(namespace).Create(c.t.Context(), p, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c cluster) node(name string) {
	c.t.Helper()
	if _, err := c.CoreV1().Nodes().Create(c.t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func podKey(namespace, name string) manifest.Key {
	return manifest.Key{Kind: manifest.KindPod, Namespace: namespace, Name: name}
}

// requests are the ways in which a server was asked.
type requests struct {
	http.RoundTripper
	mu  sync.Mutex
	all map[string]struct{}
}

func (r *requests) wrap(inner http.RoundTripper) http.RoundTripper {
	r.RoundTripper = inner
	return r
}

// RoundTrip notes what is asked for: a stream begins with all objects.
func (r *requests) RoundTrip(request *http.Request) (*http.Response, error) {
	query := request.URL.Query()
	how := "list"
	switch {
	case query.Get("sendInitialEvents") == "true":
		how = "stream"
	case query.Get("watch") != "":
		how = "watch"
	}
	first, _, _ := strings.Cut(request.Header.Get("Accept"), ",")
	encoding, _, _ := strings.Cut(first, ";")
	encoding = strings.TrimPrefix(strings.TrimPrefix(encoding, "application/"), "vnd.kubernetes.")
	text := path.Base(request.URL.Path) + ": " + how + " of " + encoding
	if fields := query.Get("fieldSelector"); fields != "" {
		text += " where " + fields
	}
	r.mu.Lock()
	r.all[text] = struct{}{}
	r.mu.Unlock()
	return r.RoundTripper.RoundTrip(request)
}

func (r *requests) want(t *testing.T, want ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if got := slices.Sorted(maps.Keys(r.all)); !slices.Equal(got, want) {
		t.Errorf("asked for\n%q, want\n%q", got, want)
	}
}

// TestSource follows a real API server through what a cluster goes through. It
// asks for streams, in the encoding that costs least.
func TestSource(t *testing.T) {
	t.Parallel()
	plane := controlplane.Start(t, nil)
	c := cluster{t, plane.Client()}

	c.namespace("a", "1")
	c.pod("a", "here.with.dots", "n1", nil)
	c.pod("a", "running", "n1", nil, "10.0.0.1", "fd00::1")
	c.pod("a", "elsewhere", "n2", nil, "10.0.1.1", "fd00::1:1")
	c.pod("a", "elsewhere-soon", "n2", nil)
	c.pod("a", "unscheduled", "", nil)
	c.status(c.pod("a", "done", "n1", nil), corev1.PodSucceeded, "10.0.0.2")
	c.status(c.pod("a", "done-elsewhere", "n2", nil), corev1.PodFailed, "10.0.1.2")
	c.pod("a", "host", "n1", func(p *corev1.Pod) { p.Spec.HostNetwork = true }, "192.0.2.1")
	c.pod("a", "static", "n1", func(p *corev1.Pod) {
		p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "0123"}
	})
	c.policy("a", "deny", networkingv1.NetworkPolicySpec{})

	config, err := Config(plane.Kubeconfig(plane.TokenFile("token", controlplane.AdminToken)), "podgate/test")
	if err != nil {
		t.Fatal(err)
	}
	asked := &requests{all: make(map[string]struct{})}
	config.Wrap(asked.wrap)
	m := run(t, config)
	m.until("all known", func() bool { return m.batches > 0 && len(m.pending) == 0 })
	asked.want(t,
		"endpointslices: stream of protobuf", "namespaces: stream of protobuf", "networkpolicies: stream of json",
		"nodes: stream of protobuf where metadata.name=n1", "pods: stream of protobuf", "services: stream of protobuf")
	for key, want := range map[manifest.Key]string{
		podKey("a", "here.with.dots"):                          `1 [] on "n1"`,
		podKey("a", "running"):                                 `1 [10.0.0.1 fd00::1] on "n1"`,
		podKey("a", "elsewhere"):                               `1 [10.0.1.1 fd00::1:1] on "n2"`,
		podKey("a", "elsewhere-soon"):                          "",
		podKey("a", "unscheduled"):                             "",
		podKey("a", "done"):                                    `1 [] on "n1"`,
		podKey("a", "done-elsewhere"):                          "",
		podKey("a", "host"):                                    `1 [192.0.2.1] on "n1" host`,
		podKey("a", "static"):                                  `1 [] on "n1" mirror of 0123`,
		{Kind: manifest.KindNamespace, Name: "a"}:              "1",
		{Kind: "NetworkPolicy", Namespace: "a", Name: "deny"}:  "isolates [true false], 0 in, 0 out",
		{Kind: manifest.KindNamespace, Name: "kube-system"}:    "",
		{Kind: manifest.KindNamespace, Name: "not-made-by-us"}: "",
	} {
		if want != "" || key.Kind == manifest.KindPod {
			m.says(key, want)
		}
	}

	t.Run("the node has to exist", func(*testing.T) {
		m.until("a problem", func() bool { return hasProblem(m.problems, "there is no Node n1") })
		c.node("n1")
		m.until("none", func() bool { return len(m.problems) == 0 })
	})
	t.Run("scheduled, and started", func(t *testing.T) {
		binding := &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "unscheduled"},
			Target:     corev1.ObjectReference{Kind: "Node", Name: "n1"},
		}
		if err := c.CoreV1().Pods("a").Bind(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.says(podKey("a", "unscheduled"), `1 [] on "n1"`)
		pod, err := c.CoreV1().Pods("a").Get(t.Context(), "elsewhere-soon", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c.status(pod, corev1.PodRunning, "10.0.1.3")
		m.says(podKey("a", "elsewhere-soon"), `1 [10.0.1.3] on "n2"`)
	})
	t.Run("relabelled", func(t *testing.T) {
		c.relabel("a", "running", "2")
		m.says(podKey("a", "running"), `2 [10.0.0.1 fd00::1] on "n1"`)
		patch := []byte(`{"metadata": {"labels": {"l": "2"}}}`)
		if _, err := c.CoreV1().Namespaces().Patch(t.Context(), "a", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		m.says(manifest.Key{Kind: manifest.KindNamespace, Name: "a"}, "2")
	})
	t.Run("what policy does not need changes nothing", func(t *testing.T) {
		m.mu.Lock()
		before := m.batches
		m.mu.Unlock()
		pod, err := c.CoreV1().Pods("a").Get(t.Context(), "running", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		pod.Status.Message = "well"
		c.status(pod, corev1.PodRunning, "10.0.0.1", "fd00::1")
		c.relabel("a", "elsewhere", "2") // comes later on the same watch
		m.says(podKey("a", "elsewhere"), `2 [10.0.1.1 fd00::1:1] on "n2"`)
		if m.mu.Lock(); m.batches != before+1 {
			t.Errorf("%d batches, want 1", m.batches-before)
		}
		m.mu.Unlock()
	})
	t.Run("made again under the same name", func(*testing.T) {
		c.delete("a", "elsewhere")
		c.pod("a", "elsewhere", "n1", func(p *corev1.Pod) { p.Labels["l"] = "3" })
		m.says(podKey("a", "elsewhere"), `3 [] on "n1"`)
	})
	t.Run("ended", func(t *testing.T) {
		pod, err := c.CoreV1().Pods("a").Get(t.Context(), "running", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c.status(pod, corev1.PodFailed, "10.0.0.1", "fd00::1")
		m.says(podKey("a", "running"), `2 [] on "n1"`)
		if err := c.CoreV1().Pods("a").Delete(t.Context(), "elsewhere-soon", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		m.says(podKey("a", "elsewhere-soon"), `1 [10.0.1.3] on "n2" going`)
	})
	t.Run("services", func(t *testing.T) {
		svc := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "web"},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeNodePort, ClusterIP: "10.96.1.1",
				Ports: []corev1.ServicePort{{Port: 80, NodePort: 30080}},
			},
		}
		if _, err := c.CoreV1().Services("a").Create(t.Context(), svc, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: "a", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			AddressType: discoveryv1.AddressTypeIPv6,
			Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"fd00::1"}}},
			Ports:       []discoveryv1.EndpointPort{{Name: ptr.To(""), Port: ptr.To[int32](8080)}},
		}
		slices := c.DiscoveryV1().EndpointSlices("a")
		slice, err := slices.Create(t.Context(), slice, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		key := manifest.Key{Kind: manifest.KindEndpointSlice, Namespace: "a", Name: "web-1"}
		m.says(manifest.Key{Kind: manifest.KindService, Namespace: "a", Name: "web"}, "[10.96.1.1] [{ 6 80 30080}]")
		m.says(key, "of web [fd00::1] [{ 6 8080}]")
		slice.Endpoints = nil
		if _, err := slices.Update(t.Context(), slice, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		m.says(key, "")
	})
	t.Run("Load", func(t *testing.T) {
		s, err := New(Options{Config: plane.Config(controlplane.AdminToken), Node: "n1"})
		if err != nil {
			t.Fatal(err)
		}
		batch, err := s.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[manifest.Key]manifest.Object)
		for _, o := range batch.Set {
			if o.Kind != manifest.KindNode {
				got[o.Key] = o
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		want := maps.Clone(m.objects)
		delete(want, manifest.Key{Kind: manifest.KindNode, Name: "n1"})
		if !maps.Equal(describeAll(got), describeAll(want)) {
			t.Errorf("got %q, want %q", describeAll(got), describeAll(want))
		}
	})
}

func hasProblem(problems []source.Problem, text string) bool {
	return slices.ContainsFunc(problems, func(p source.Problem) bool { return strings.Contains(p.Subject+": "+p.Reason, text) })
}
