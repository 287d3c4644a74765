// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package service

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func service(name string, addresses []netip.Addr, ports ...manifest.ServicePort) manifest.Object {
	return manifest.Object{
		Key:     manifest.Key{Kind: manifest.KindService, Namespace: "a", Name: name},
		Service: &manifest.Service{Namespace: "a", Name: name, Addresses: addresses, Ports: ports},
	}
}

func slice(name, of string, addresses []netip.Addr, ports ...manifest.EndpointPort) manifest.Object {
	return manifest.Object{
		Key:           manifest.Key{Kind: manifest.KindEndpointSlice, Namespace: "a", Name: name},
		EndpointSlice: &manifest.EndpointSlice{Namespace: "a", Service: of, Addresses: addresses, Ports: ports},
	}
}

func TestPorts(t *testing.T) {
	http := manifest.ServicePort{Name: "http", Protocol: policy.TCP, Port: 80}
	to8080 := manifest.EndpointPort{Name: "http", Protocol: policy.TCP, Port: 8080}
	tests := []struct {
		name    string
		objects []manifest.Object
		want    []string
	}{
		{name: "nothing"},
		{
			name:    "no endpoints",
			objects: []manifest.Object{service("web", addrs("10.96.0.1"), http)},
			want:    []string{"a/web http 6 [10.96.0.1:80] -> []"},
		},
		{
			name: "families apart",
			objects: []manifest.Object{
				service("web", addrs("10.96.0.1", "fd00:96::1"), http),
				slice("web-4", "web", addrs("10.0.0.1", "10.0.0.2"), to8080),
				slice("web-6", "web", addrs("fd00::1"), to8080),
			},
			want: []string{
				"a/web http 6 [10.96.0.1:80] -> [10.0.0.1:8080 10.0.0.2:8080]",
				"a/web http 6 [[fd00:96::1]:80] -> [[fd00::1]:8080]",
			},
		},
		{
			name: "several slices, a named target port that differs, an endpoint in two of them",
			objects: []manifest.Object{
				service("web", addrs("10.96.0.1"), http),
				slice("web-1", "web", addrs("10.0.0.2", "10.0.0.1"), to8080),
				slice("web-2", "web", addrs("10.0.0.3"), manifest.EndpointPort{Name: "http", Protocol: policy.TCP, Port: 9090}),
				slice("web-3", "web", addrs("10.0.0.1"), to8080),
			},
			want: []string{"a/web http 6 [10.96.0.1:80] -> [10.0.0.1:8080 10.0.0.2:8080 10.0.0.3:9090]"},
		},
		{
			name: "several ports, one number for two protocols",
			objects: []manifest.Object{
				service("dns", addrs("10.96.0.10"),
					manifest.ServicePort{Name: "dns", Protocol: policy.UDP, Port: 53}, manifest.ServicePort{Name: "dns-tcp", Protocol: policy.TCP, Port: 53}),
				slice("dns-1", "dns", addrs("10.0.0.1"),
					manifest.EndpointPort{Name: "dns", Protocol: policy.UDP, Port: 5353}, manifest.EndpointPort{Name: "dns-tcp", Protocol: policy.TCP, Port: 53}),
			},
			want: []string{"a/dns dns 17 [10.96.0.10:53] -> [10.0.0.1:5353]", "a/dns dns-tcp 6 [10.96.0.10:53] -> [10.0.0.1:53]"},
		},
		{
			name: "node ports at the node's addresses",
			objects: []manifest.Object{
				service("web", addrs("10.96.0.1"), manifest.ServicePort{Protocol: policy.TCP, Port: 80, NodePort: 30080}),
				slice("web-1", "web", addrs("10.0.0.1"), manifest.EndpointPort{Protocol: policy.TCP, Port: 8080}),
			},
			want: []string{"a/web  6 [10.96.0.1:80 192.0.2.1:30080] -> [10.0.0.1:8080]"},
		},
		{
			name: "node ports in both families",
			objects: []manifest.Object{
				service("web", addrs("10.96.0.1", "fd00:96::1"), manifest.ServicePort{Protocol: policy.TCP, Port: 80, NodePort: 30080}),
				slice("web-6", "web", addrs("fd00::1"), manifest.EndpointPort{Protocol: policy.TCP, Port: 8080}),
			},
			want: []string{
				"a/web  6 [10.96.0.1:80 192.0.2.1:30080] -> []",
				"a/web  6 [[fd00:96::1]:80 [fe80::1]:30080] -> [[fd00::1]:8080]",
			},
		},
		{
			name: "one external address for two Services",
			objects: []manifest.Object{
				service("x", addrs("10.96.0.1", "198.51.100.1"), http),
				service("y", addrs("10.96.0.2", "198.51.100.1"), http),
				slice("x-1", "x", addrs("10.0.0.1"), to8080),
				slice("y-1", "y", addrs("10.0.0.2"), to8080),
			},
			want: []string{
				"a/x http 6 [10.96.0.1:80] -> [10.0.0.1:8080]",
				"a/x http 6 [198.51.100.1:80] -> [10.0.0.1:8080 10.0.0.2:8080]",
				"a/y http 6 [10.96.0.2:80] -> [10.0.0.2:8080]",
			},
		},
		{
			name:    "a slice of no Service",
			objects: []manifest.Object{slice("web-1", "web", addrs("10.0.0.1"), to8080)},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			table := NewTable()
			if table.Apply(source.Batch{Set: tt.objects}) != (len(tt.objects) > 0) {
				t.Error("Apply tells the wrong thing")
			}
			var got []string
			for _, p := range table.Ports(addrs("192.0.2.1", "fe80::1")) {
				got = append(got, fmt.Sprintf("%s/%s %s %d %v -> %v", p.Namespace, p.Name, p.PortName, p.Protocol, p.Frontends, p.Backends))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got\n%q, want\n%q", got, tt.want)
			}
			var gone source.Batch
			for _, o := range tt.objects {
				gone.Gone = append(gone.Gone, o.Key)
			}
			if table.Apply(gone); len(table.Ports(nil)) > 0 {
				t.Error("what is gone is still there")
			}
		})
	}
}

func TestApplyIgnores(t *testing.T) {
	pod := manifest.Key{Kind: manifest.KindPod, Name: "x"}
	if NewTable().Apply(source.Batch{Set: []manifest.Object{{Key: pod}}, Gone: []manifest.Key{pod}}) {
		t.Error("a Pod changes the table of Services")
	}
}

// TestMoved goes through random histories and asks at each step that the table
// answers what one would that never saw another state.
func TestMoved(t *testing.T) {
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(seed, 1))
		table, node := NewTable(), addrs("192.0.2.1")
		objects := make(map[manifest.Key]manifest.Object)
		have := make(map[netip.AddrPort]pinning.Service)
		followed := 0
		for step := range 60 {
			var b source.Batch
			if o := randomObject(r); r.IntN(4) == 0 {
				delete(objects, o.Key)
				b.Gone = append(b.Gone, o.Key)
			} else {
				objects[o.Key] = o
				b.Set = append(b.Set, o)
			}
			table.Apply(b)
			if moved, ok := table.Moved(); ok {
				followed++
				for _, s := range moved {
					have[s.Frontends[0]] = s
				}
			} else {
				clear(have)
				for _, s := range table.Ports(node) {
					have[s.Frontends[0]] = s
				}
			}
			fresh := NewTable()
			fresh.Apply(source.Batch{Set: slices.Collect(maps.Values(objects))})
			want := make(map[netip.AddrPort]pinning.Service)
			for _, s := range fresh.Ports(node) {
				want[s.Frontends[0]] = s
			}
			if fmt.Sprint(have) != fmt.Sprint(want) {
				t.Fatalf("seed %d, step %d: have\n%v, want\n%v", seed, step, have, want)
			}
		}
		if followed < 10 {
			t.Errorf("seed %d: only %d changes were followed", seed, followed)
		}
	}
}

// randomObject is mostly a slice of one of a few Services.
func randomObject(r *rand.Rand) manifest.Object {
	of := fmt.Sprintf("s%d", r.IntN(3))
	if r.IntN(8) == 0 {
		ports := []manifest.ServicePort{{Name: "http", Protocol: policy.TCP, Port: 80, NodePort: uint16(30000 + r.IntN(2))}}
		addresses := addrs("10.96.0."+of[1:], "fd00:96::"+of[1:])
		if r.IntN(2) == 0 { // one that others may have too
			addresses = append(addresses, netip.MustParseAddr("198.51.100.1"))
		}
		return service(of, addresses, ports...)
	}
	var addresses []netip.Addr
	for range r.IntN(3) {
		addresses = append(addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + r.IntN(5))}))
	}
	return slice(fmt.Sprintf("slice-%d", r.IntN(5)), of, addresses, manifest.EndpointPort{Name: "http", Protocol: policy.TCP, Port: uint16(8080 + r.IntN(2))})
}
