// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/podgate/podgate/bpf/policy"
)

func pod(t *testing.T, text string) *corev1.Pod {
	t.Helper()
	p := &corev1.Pod{}
	if err := yaml.UnmarshalStrict([]byte(text), p); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestPod(t *testing.T) {
	tests := []struct {
		name, manifest string
		want           policy.Pod
	}{
		{
			name:     "bare",
			manifest: `metadata: {name: a}`,
			want:     policy.Pod{Key: "default/a", Namespace: "default", Name: "a"},
		},
		{
			name: "everything",
			manifest: `
metadata: {namespace: shop, name: web.1, uid: u-1, deletionTimestamp: "2026-01-02T03:04:05Z", labels: {app: web}, annotations: {podgate.io/audit: "true"}}
spec:
  nodeName: n1
  containers:
  - ports:
    - {name: http, containerPort: 8080}
    - {containerPort: 9}
  - ports:
    - {name: dns, containerPort: 53, protocol: UDP}
    - {name: dns, containerPort: 5353}
    - {name: http, containerPort: 8081}
  initContainers:
  - ports: [{name: setup, containerPort: 1}]
  - restartPolicy: Always
    ports: [{name: proxy, containerPort: 15001, protocol: SCTP}]
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}, {ip: 10.0.0.1}]`,
			want: policy.Pod{
				Key: "u-1", UID: "u-1", Namespace: "shop", Name: "web.1",
				Labels:    map[string]string{"app": "web"},
				Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")},
				Ports: []policy.NamedPort{
					{Name: "http", Protocol: policy.TCP, Port: 8080},
					{Name: "dns", Protocol: policy.UDP, Port: 53},
					{Name: "dns", Protocol: policy.TCP, Port: 5353},
					{Name: "proxy", Protocol: policy.SCTP, Port: 15001},
				},
				Terminating: true, Audit: true,
			},
		},
		{
			name:     "podIP alone",
			manifest: `{metadata: {name: a}, status: {podIP: "fd00::2"}}`,
			want: policy.Pod{Key: "default/a", Namespace: "default", Name: "a",
				Addresses: []netip.Addr{netip.MustParseAddr("fd00::2")}},
		},
		{
			name:     "succeeded",
			manifest: `{metadata: {name: a}, status: {phase: Succeeded, podIPs: [{ip: 10.0.0.1}]}}`,
			want:     policy.Pod{Key: "default/a", Namespace: "default", Name: "a"},
		},
		{
			name:     "failed",
			manifest: `{metadata: {name: a}, status: {phase: Failed, podIP: 10.0.0.1}}`,
			want:     policy.Pod{Key: "default/a", Namespace: "default", Name: "a"},
		},
		{
			name:     "host network",
			manifest: `{metadata: {name: a}, spec: {hostNetwork: true}, status: {podIP: 192.0.2.1}}`,
			want: policy.Pod{Key: "default/a", Namespace: "default", Name: "a", HostNetwork: true,
				Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}},
		},
		{
			name:     "static pods go by the UID the runtime knows",
			manifest: `metadata: {name: a, uid: api, annotations: {kubernetes.io/config.mirror: kubelet, podgate.io/audit: "false"}}`,
			want:     policy.Pod{Key: "kubelet", UID: "kubelet", Namespace: "default", Name: "a"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Pod(pod(t, tt.manifest))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got\n%+v\nwant\n%+v", got, tt.want)
			}
		})
	}
}

func TestPodFaults(t *testing.T) {
	for name, tt := range map[string]struct{ manifest, want string }{
		"address":  {`{metadata: {name: a}, status: {podIPs: [{ip: 10.0.0.1}, {ip: 10.0.0.300}]}}`, `Pod default/a: status.podIPs[1].ip: Invalid value: "10.0.0.300"`},
		"zone":     {`{metadata: {name: a}, status: {podIP: "fe80::1%eth0"}}`, `status.podIP: Invalid value: "fe80::1%eth0"`},
		"protocol": {`{metadata: {name: a}, spec: {containers: [{ports: [{name: x, containerPort: 1, protocol: QUIC}]}]}}`, `spec.containers[0].ports[0].protocol: Unsupported value: "QUIC"`},
		"port":     {`{metadata: {name: a}, spec: {containers: [{ports: [{name: x, containerPort: 70000}]}]}}`, `spec.containers[0].ports[0].containerPort: Invalid value: 70000`},
		"audit":    {`metadata: {name: a, annotations: {podgate.io/audit: "yes"}}`, `metadata.annotations[podgate.io/audit]: Unsupported value: "yes"`},
		"label":    {`metadata: {name: a, labels: {x: "a b"}}`, `metadata.labels: Invalid value: "a b"`},
		"name":     {`metadata: {name: A}`, `metadata.name: Invalid value: "A"`},
	} {
		if _, err := Pod(pod(t, tt.manifest)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", name, err, tt.want)
		}
	}
}

func TestNamespace(t *testing.T) {
	ns := &corev1.Namespace{}
	ns.Name, ns.Labels = "shop", map[string]string{"team": "a", "kubernetes.io/metadata.name": "forged"}
	got := Namespace(ns)
	want := policy.Namespace{Name: "shop", Labels: map[string]string{"team": "a", "kubernetes.io/metadata.name": "shop"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if ns.Labels["kubernetes.io/metadata.name"] != "forged" {
		t.Error("the object was changed")
	}
}
