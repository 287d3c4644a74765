// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd"
	"github.com/podgate/podgate/syncd/apiserver"
	"github.com/podgate/podgate/syncd/inventory"
	"github.com/podgate/podgate/test/controlplane"
)

// Of the cluster that a daemon begins in: pods in all, on each node, and in each
// namespace, and pods that are made afterwards.
const (
	clusterPods   = 10_000
	podsPerNode   = 100
	podsPerSpace  = 100
	startedPods   = 100
	policiesThere = 1_000
)

// applied is a state that says when it was told of a pod.
type applied struct {
	*pinning.State
	pods chan policy.PodKey
	all  chan struct{}
}

// Apply tells of the pods of this node once they are published.
func (a *applied) Apply(ctx context.Context, u policy.Update) (pinning.Applied, error) {
	done, err := a.State.Apply(ctx, u)
	if u.Full {
		close(a.all)
		return done, err
	}
	for _, s := range u.Subjects {
		a.pods <- s.Pod
	}
	return done, err
}

// BenchmarkSync has a daemon begin in a cluster of a real API server: how long
// until the kernel has all of it, and what memory the daemon then has. After
// that pods are made, one at a time: how long until each is published for ADD,
// after another watch, such as the kubelet's, has seen it.
func BenchmarkSync(b *testing.B) {
	n := newNode(b, 0, 0)
	plane := controlplane.Start(b, nil)
	populate(b, plane)
	client := plane.Client()

	var before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	began := time.Now()
	from, err := apiserver.New(apiserver.Options{Config: plane.Config(controlplane.AdminToken), Node: "n1"})
	if err != nil {
		b.Fatal(err)
	}
	state := &applied{State: n.state, pods: make(chan policy.PodKey, startedPods), all: make(chan struct{})}
	daemon := syncd.New(syncd.Options{State: state, Source: from, Inventory: inventory.Options{Node: "n1"}})
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- daemon.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	await(b, state.all)
	b.ReportMetric(time.Since(began).Seconds(), "s-to-first-apply")
	var after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/(1<<20), "MB-heap")

	w, err := client.CoreV1().Pods("").Watch(b.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=n1"})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Stop()
	seen := make(chan time.Time, podsPerNode+startedPods)
	go func() {
		for e := range w.ResultChan() {
			if pod, ok := e.Object.(*corev1.Pod); ok && strings.HasPrefix(pod.Name, "started-") {
				seen <- time.Now()
			}
		}
	}()
	took := make([]time.Duration, startedPods)
	for i := range took {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns-0", Name: fmt.Sprintf("started-%d", i), Labels: map[string]string{"app": "app-0"}},
			Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}
		if pod, err = client.CoreV1().Pods("ns-0").Create(b.Context(), pod, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
		if got := await(b, state.pods); got != policy.PodKey(pod.UID) {
			b.Fatalf("published %s, made %s", got, pod.UID)
		}
		published := time.Now()
		took[i] = published.Sub(await(b, seen))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms-to-publish-p50")
	b.ReportMetric(float64(took[len(took)*9/10].Microseconds())/1000, "ms-to-publish-p90")
	b.ReportMetric(0, "ns/op")
}

func await[T any](b *testing.B, from <-chan T) (v T) {
	b.Helper()
	select {
	case v = <-from:
	case <-time.After(2 * time.Minute):
		b.Fatal("the daemon says nothing")
	}
	return v
}

// populate stores a cluster: pods as large as they are, and policies that name
// each other.
func populate(b *testing.B, plane *controlplane.ControlPlane) {
	b.Helper()
	environment := strings.TrimSuffix(strings.Repeat(`{"name": "SOME_SETTING", "value": "of some length, as there are"},`, 20), ",")
	plane.Store("minions/n1", []byte(`{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "n1", "uid": "n1"}}`))
	for i := range clusterPods / podsPerSpace {
		plane.Store(fmt.Sprintf("namespaces/ns-%d", i),
			fmt.Appendf(nil, `{"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "ns-%d", "uid": "ns-%d"}}`, i, i))
	}
	for i := range clusterPods {
		namespace := fmt.Sprintf("ns-%d", i/podsPerSpace)
		plane.Store(fmt.Sprintf("pods/%s/pod-%d", namespace, i), fmt.Appendf(nil, `{"kind": "Pod", "apiVersion": "v1",
			"metadata": {"namespace": %q, "name": "pod-%d", "uid": "uid-%d", "labels": {"app": "app-%d", "pod-template-hash": "5d4f8c7b9"}},
			"spec": {"nodeName": "n%d", "containers": [{"name": "c", "image": "i", "env": [%s], "ports": [{"name": "http", "containerPort": 8080}]}]},
			"status": {"phase": "Running", "podIPs": [{"ip": "10.%d.%d.%d"}]}}`,
			namespace, i, i, i%10, i/podsPerNode+1, environment, i>>16, i>>8&255, i&255))
	}
	for i := range policiesThere {
		namespace := fmt.Sprintf("ns-%d", i%(clusterPods/podsPerSpace))
		plane.Store(fmt.Sprintf("networkpolicies/%s/policy-%d", namespace, i), fmt.Appendf(nil, `{"kind": "NetworkPolicy",
			"apiVersion": "networking.k8s.io/v1", "metadata": {"namespace": %q, "name": "policy-%d", "uid": "policy-%d"},
			"spec": {"podSelector": {"matchLabels": {"app": "app-%d"}}, "policyTypes": ["Ingress"],
			"ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "app-%d"}}}], "ports": [{"port": 8080, "protocol": "TCP"}]}]}}`,
			namespace, i, i, i%10, (i+1)%10))
	}
}
