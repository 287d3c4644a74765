// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// The main plugin may have given the node an address a moment ago.
func TestAddLearnsNodeAddresses(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	l.do(func() error {
		return netlink.AddrAdd(host, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}})
	})
	e, _ := l.add(request(host, "10.0.0.1"))
	for address, want := range map[string]bpf.DatapathReason{
		"192.0.2.1": bpf.DatapathReasonREASON_NODE, "192.0.2.2": bpf.DatapathReasonREASON_CLOSED,
	} {
		if a := l.probe(e.Gate, policy.Egress, "10.0.0.1", address, 80); a.Reason != want {
			t.Errorf("to %s: %+v", address, a)
		}
	}
}

// An ADD looks for all of the node's addresses when nobody has for a while, and
// always at the interfaces that it is about.
func TestAddLearnsNewNodeAddresses(t *testing.T) {
	l := newLab(t)
	gated, _ := l.add(request(l.veth("a"), "10.0.0.1"))
	known := func(address string) bool {
		return l.probe(gated.Gate, policy.Egress, "10.0.0.1", address, 80).Reason == bpf.DatapathReasonREASON_NODE
	}
	address := func(name, address string) (index int) {
		l.do(func() error {
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
			a, err := netlink.ParseAddr(address + "/24")
			if err != nil {
				return err
			}
			if err := netlink.LinkAdd(bridge); err != nil {
				return err
			}
			index = bridge.Index
			return netlink.AddrAdd(bridge, a)
		})
		return index
	}
	const elsewhere, bridge, gateway, far = "192.0.2.1", "198.51.100.1", "203.0.113.1", "203.0.113.2"
	address("up0", elsewhere)
	address("br0.10", gateway)
	r := request(l.veth("b"), "10.0.0.2")
	r.Bridge = address("br0", bridge)
	r.Gateways = []netip.Addr{netip.MustParseAddr(gateway), netip.MustParseAddr(far)}
	l.add(r)
	for a, want := range map[string]bool{bridge: true, gateway: true, far: false} {
		if known(a) != want {
			t.Errorf("after ADD %s is the node's: %t", a, !want)
		}
	}

	var state bpf.DatapathState
	m := l.pinned(bpf.DatapathMapState)
	if err := m.Lookup(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	state.NodesNs = uint64(time.Now().Add(-2 * time.Minute).UnixNano())
	if err := m.Put(uint32(0), &state); err != nil {
		t.Fatal(err)
	}
	l.add(request(l.veth("c"), "10.0.0.3"))
	if !known(elsewhere) {
		t.Error("ADD has not learnt another address of the node")
	}
}
