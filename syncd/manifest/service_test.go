// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/yaml"
)

func TestServiceOf(t *testing.T) {
	for _, tt := range []struct{ name, manifest, want, fault string }{
		{
			name: "everything",
			manifest: `
metadata: {namespace: shop, name: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd00::1"]
  externalIPs: [198.51.100.1]
  ports:
  - {name: http, port: 80, nodePort: 30080, targetPort: 8080}
  - {name: dns, port: 53, protocol: UDP}
status:
  loadBalancer:
    ingress: [{ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: VIP}, {ip: 203.0.113.3, ipMode: Proxy}, {hostname: lb}]`,
			want: "[10.96.0.1 fd00::1 198.51.100.1 203.0.113.1 203.0.113.2] [{http 6 80 30080} {dns 17 53 0}]",
		},
		{name: "headless", manifest: `{metadata: {name: a}, spec: {clusterIP: None, externalIPs: [198.51.100.1], ports: [{port: 80}]}}`, want: "[] []"},
		{name: "without an address yet", manifest: `{metadata: {name: a}, spec: {ports: [{port: 80}]}}`, want: "[] []"},
		{name: "external name", manifest: `{metadata: {name: a}, spec: {type: ExternalName, externalName: b, clusterIP: 10.96.0.1}}`, want: "[] []"},
		{
			name:     "another proxy's",
			manifest: `{metadata: {name: a, labels: {service.kubernetes.io/service-proxy-name: x}}, spec: {clusterIP: 10.96.0.1}}`,
			want:     "[] []",
		},
		{name: "as kube-proxy reads it", manifest: `{metadata: {name: a}, spec: {clusterIP: 010.096.0.01, ports: [{port: 80}]}}`, want: "[10.96.0.1] [{ 6 80 0}]"},
		{
			name:     "faults",
			manifest: `{metadata: {namespace: b, name: a}, spec: {clusterIP: 10.96.0.1, externalIPs: [x], ports: [{port: 80, protocol: QUIC}, {port: 81}]}}`,
			want:     "[10.96.0.1] [{ 6 81 0}]",
			fault:    `Service b/a: spec.externalIPs[0]: Invalid value: "x": must be an IPv4 or IPv6 address; spec.ports[0].protocol: Unsupported value: "QUIC"`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := &corev1.Service{}
			if err := yaml.UnmarshalStrict([]byte(tt.manifest), svc); err != nil {
				t.Fatal(err)
			}
			got, err := ServiceOf(svc)
			if s := fmt.Sprint(got.Addresses, " ", got.Ports); s != tt.want {
				t.Errorf("got %s, want %s", s, tt.want)
			}
			checkFault(t, err, tt.fault)
		})
	}
}

func TestEndpointSliceOf(t *testing.T) {
	for _, tt := range []struct{ name, manifest, want, fault string }{
		{
			name: "what may be chosen",
			manifest: `
metadata: {namespace: shop, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
- {addresses: [10.0.0.1, 10.0.0.99]}
- {addresses: [10.0.0.2], conditions: {ready: true, serving: true, terminating: false}}
- {addresses: [10.0.0.3], conditions: {ready: false}}
- {addresses: [10.0.0.4], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.0.0.5], conditions: {ready: false, serving: false, terminating: true}}
- {addresses: [10.0.0.6], conditions: {ready: false, serving: true}}
- {addresses: [10.0.0.1]}
- {addresses: []}
ports: [{name: "", port: 8080}, {name: dns, port: 53, protocol: UDP}, {name: any}, {port: 1}]`,
			want: "shop/web [10.0.0.1 10.0.0.2 10.0.0.4] [{ 6 8080} {dns 17 53}]",
		},
		{name: "of no Service", manifest: `{metadata: {name: a}, addressType: IPv4, endpoints: [{addresses: [10.0.0.1]}]}`, want: "default/ [] []"},
		{
			name:     "names",
			manifest: `{metadata: {name: a, labels: {kubernetes.io/service-name: web}}, addressType: FQDN, endpoints: [{addresses: [example.org]}]}`,
			want:     "default/web [] []",
		},
		{
			name:     "headless",
			manifest: `{metadata: {name: a, labels: {kubernetes.io/service-name: web, service.kubernetes.io/headless: ""}}, addressType: IPv4, endpoints: [{addresses: [10.0.0.1]}]}`,
			want:     "default/web [] []",
		},
		{
			name:     "faults",
			manifest: `{metadata: {name: a, labels: {kubernetes.io/service-name: web}}, addressType: IPv6, endpoints: [{addresses: [x]}, {addresses: ["fd00::1"]}], ports: [{name: a, port: 1, protocol: X}]}`,
			want:     "default/web [fd00::1] []",
			fault:    `EndpointSlice default/a: endpoints[0].addresses[0]: Invalid value: "x": must be an IPv4 or IPv6 address; ports[0].protocol: Unsupported value: "X"`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			slice := &discoveryv1.EndpointSlice{}
			if err := yaml.UnmarshalStrict([]byte(tt.manifest), slice); err != nil {
				t.Fatal(err)
			}
			got, err := EndpointSliceOf(slice)
			if s := fmt.Sprintf("%s/%s %v %v", got.Namespace, got.Service, got.Addresses, got.Ports); s != tt.want {
				t.Errorf("got %s, want %s", s, tt.want)
			}
			checkFault(t, err, tt.fault)
		})
	}
}

func checkFault(t *testing.T, err error, want string) {
	t.Helper()
	if (err == nil) != (want == "") || err != nil && !strings.HasPrefix(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}
