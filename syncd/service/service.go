// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package service makes of Services and EndpointSlices what kube-proxy
// translates on this node: frontends and the backends behind each.
//
// A frontend that nobody translates would let packets pass to it that only its
// backends may get; so there must be none that kube-proxy does not know. A
// backend that is never chosen makes policy stricter at worst.
package service

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// Table is the Services and EndpointSlices of a cluster. It is not safe for
// concurrent use.
type Table struct {
	services map[manifest.Key]*manifest.Service
	slices   map[manifest.Key]*manifest.EndpointSlice
}

// NewTable is an empty table.
func NewTable() *Table {
	return &Table{make(map[manifest.Key]*manifest.Service), make(map[manifest.Key]*manifest.EndpointSlice)}
}

// Apply takes a batch of a source and tells whether it had any for the table.
func (t *Table) Apply(b source.Batch) (changed bool) {
	for _, k := range b.Gone {
		switch k.Kind {
		case manifest.KindService:
			delete(t.services, k)
			changed = true
		case manifest.KindEndpointSlice:
			delete(t.slices, k)
			changed = true
		}
	}
	for _, o := range b.Set {
		switch {
		case o.Service != nil:
			t.services[o.Key] = o.Service
			changed = true
		case o.EndpointSlice != nil:
			t.slices[o.Key] = o.EndpointSlice
			changed = true
		}
	}
	return changed
}

// portKey is a port of a Service in one address family.
type portKey struct {
	namespace, name, port string
	protocol              policy.Protocol
	ipv6                  bool
}

func (k portKey) compare(o portKey) int {
	family := 0
	if k.ipv6 != o.ipv6 {
		if family = -1; k.ipv6 {
			family = 1
		}
	}
	return cmp.Or(cmp.Compare(k.namespace, o.namespace), cmp.Compare(k.name, o.name), cmp.Compare(k.port, o.port),
		cmp.Compare(k.protocol, o.protocol), family)
}

// frontend is where a port is reached.
type frontend struct {
	address  netip.AddrPort
	protocol policy.Protocol
}

// Ports answers the ports of all Services, one for each address family, sorted.
// Node ports are at the addresses of the node. Where several Services have the
// same frontend, as external addresses allow, one more stands for all of them:
// which one kube-proxy takes is not said anywhere.
func (t *Table) Ports(node []netip.Addr) []pinning.Service {
	backends := t.backends()
	claims := make(map[frontend][]portKey)
	for _, s := range t.services {
		for _, p := range s.Ports {
			claim := func(a netip.Addr, port uint16) {
				if port == 0 {
					return
				}
				f := frontend{netip.AddrPortFrom(a, port), p.Protocol}
				key := portKey{s.Namespace, s.Name, p.Name, p.Protocol, a.Is6()}
				if !slices.Contains(claims[f], key) {
					claims[f] = append(claims[f], key)
				}
			}
			for _, a := range s.Addresses {
				claim(a, p.Port)
			}
			for _, a := range node {
				// Nobody translates a family that the Service has no address of.
				if slices.ContainsFunc(s.Addresses, func(of netip.Addr) bool { return of.Is4() == a.Is4() }) {
					claim(a, p.NodePort)
				}
			}
		}
	}
	ports := make(map[string]*pinning.Service)
	for f, keys := range claims {
		slices.SortFunc(keys, portKey.compare)
		name := identity(keys)
		p := ports[name]
		if p == nil {
			p = &pinning.Service{
				Namespace: keys[0].namespace, Name: keys[0].name, PortName: keys[0].port, Protocol: f.protocol,
			}
			for _, k := range keys {
				p.Backends = append(p.Backends, backends[k]...)
			}
			slices.SortFunc(p.Backends, netip.AddrPort.Compare)
			p.Backends = slices.Compact(p.Backends)
			ports[name] = p
		}
		p.Frontends = append(p.Frontends, f.address)
	}
	out := make([]pinning.Service, 0, len(ports))
	for _, name := range slices.Sorted(maps.Keys(ports)) {
		p := ports[name]
		slices.SortFunc(p.Frontends, netip.AddrPort.Compare)
		out = append(out, *p)
	}
	return out
}

// identity names a set of ports.
func identity(keys []portKey) string {
	var b strings.Builder
	for _, k := range keys {
		fmt.Fprintf(&b, "%s\x00%s\x00%s\x00%d\x00%t\x00", k.namespace, k.name, k.port, k.protocol, k.ipv6)
	}
	return b.String()
}

// backends of each port that has some.
func (t *Table) backends() map[portKey][]netip.AddrPort {
	out := make(map[portKey][]netip.AddrPort)
	for _, s := range t.slices {
		for _, p := range s.Ports {
			for _, a := range s.Addresses {
				key := portKey{s.Namespace, s.Service, p.Name, p.Protocol, a.Is6()}
				out[key] = append(out[key], netip.AddrPortFrom(a, p.Port))
			}
		}
	}
	return out
}
