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
	// of are the slices of each Service.
	of map[name][]*manifest.EndpointSlice
	// served are the ports that each Service has a part in, as Ports has
	// answered them last; nil if frontends may have changed since.
	served map[name][]*port
	// moved are the Services whose backends have changed since.
	moved map[name]struct{}
}

// name of a Service.
type name struct{ namespace, name string }

// port is one of those that Ports answers, and whose ports it stands for.
type port struct {
	keys []portKey
	pinning.Service
}

// NewTable is an empty table.
func NewTable() *Table {
	return &Table{
		services: make(map[manifest.Key]*manifest.Service), slices: make(map[manifest.Key]*manifest.EndpointSlice),
		of: make(map[name][]*manifest.EndpointSlice), moved: make(map[name]struct{}),
	}
}

// Apply takes a batch of a source and tells whether it had any for the table.
func (t *Table) Apply(b source.Batch) (changed bool) {
	for _, k := range b.Gone {
		switch k.Kind {
		case manifest.KindService:
			delete(t.services, k)
			t.served, changed = nil, true
		case manifest.KindEndpointSlice:
			t.setSlice(k, nil)
			changed = true
		}
	}
	for _, o := range b.Set {
		switch {
		case o.Service != nil:
			t.services[o.Key] = o.Service
			t.served, changed = nil, true
		case o.EndpointSlice != nil:
			t.setSlice(o.Key, o.EndpointSlice)
			changed = true
		}
	}
	return changed
}

func (t *Table) setSlice(k manifest.Key, s *manifest.EndpointSlice) {
	if old := t.slices[k]; old != nil {
		of := name{old.Namespace, old.Service}
		if t.of[of] = slices.DeleteFunc(t.of[of], func(s *manifest.EndpointSlice) bool { return s == old }); len(t.of[of]) == 0 {
			delete(t.of, of)
		}
		t.moved[of] = struct{}{}
	}
	if s == nil {
		delete(t.slices, k)
		return
	}
	of := name{s.Namespace, s.Service}
	t.slices[k], t.of[of] = s, append(t.of[of], s)
	t.moved[of] = struct{}{}
}

// Moved answers the ports whose backends have changed since Ports or Moved was
// called last, with all they have now. It is false where their frontends may
// have changed too, and it takes Ports to tell.
func (t *Table) Moved() ([]pinning.Service, bool) {
	if t.served == nil {
		return nil, false
	}
	var out []pinning.Service
	seen := make(map[*port]struct{})
	for of := range t.moved {
		for _, p := range t.served[of] {
			if _, again := seen[p]; again {
				continue
			}
			seen[p] = struct{}{}
			if now := t.backends(p.keys); !slices.Equal(now, p.Backends) {
				p.Backends = now
				out = append(out, p.Service)
			}
		}
	}
	t.moved = make(map[name]struct{})
	return out, true
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
	ports := make(map[string]*port)
	for f, keys := range claims {
		slices.SortFunc(keys, portKey.compare)
		id := identity(keys)
		p := ports[id]
		if p == nil {
			p = &port{keys, pinning.Service{
				Namespace: keys[0].namespace, Name: keys[0].name, PortName: keys[0].port, Protocol: f.protocol,
				Backends: t.backends(keys),
			}}
			ports[id] = p
		}
		p.Frontends = append(p.Frontends, f.address)
	}
	out := make([]pinning.Service, 0, len(ports))
	t.served, t.moved = make(map[name][]*port, len(t.services)), make(map[name]struct{})
	for _, id := range slices.Sorted(maps.Keys(ports)) {
		p := ports[id]
		slices.SortFunc(p.Frontends, netip.AddrPort.Compare)
		out = append(out, p.Service)
		for _, k := range p.keys {
			of := name{k.namespace, k.name}
			t.served[of] = append(t.served[of], p)
		}
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

// backends of some ports together, sorted.
func (t *Table) backends(keys []portKey) (out []netip.AddrPort) {
	for _, k := range keys {
		for _, s := range t.of[name{k.namespace, k.name}] {
			for _, p := range s.Ports {
				if p.Name != k.port || p.Protocol != k.protocol {
					continue
				}
				for _, a := range s.Addresses {
					if a.Is6() == k.ipv6 {
						out = append(out, netip.AddrPortFrom(a, p.Port))
					}
				}
			}
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
