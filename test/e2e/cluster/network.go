// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package cluster

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The network between machines is one link; the control plane is the first
// host in it and every node's default router.
const (
	maxNodes = 9

	apiServerURL = "https://172.30.0.1:6443"
	dnsAddress   = "10.96.0.10"

	serviceRanges = "10.96.0.0/16,fd00:10:96::/112"
	podRanges     = "10.244.0.0/16,fd00:10:244::/48"
)

// addresses of node i, or of the control plane for 0, IPv4 and IPv6.
func addresses(i int) []string {
	if i == 0 {
		return []string{"172.30.0.1", "fd00:172:30::1"}
	}
	return []string{fmt.Sprintf("172.30.0.1%d", i), fmt.Sprintf("fd00:172:30::1%d", i)}
}

// podRangesOf node i, IPv4 and IPv6.
func podRangesOf(i int) []string {
	return []string{fmt.Sprintf("10.244.%d.0/24", i), fmt.Sprintf("fd00:10:244:%d::/64", i)}
}

// linkLengths are the prefix lengths of the link between machines.
var linkLengths = []int{24, 64}

// handle speaks rtnetlink in a machine's network namespace.
func (m *Machine) handle() (*netlink.Handle, error) {
	return netlink.NewHandleAt(netns.NsHandle(m.net.Fd()), unix.NETLINK_ROUTE)
}

// connect puts every machine on the link.
func (c *Cluster) connect() (err error) {
	cp, err := c.ControlPlane.handle()
	if err != nil {
		return err
	}
	defer cp.Close()
	if err := c.ControlPlane.forward(); err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := cp.LinkAdd(bridge); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	if err := setUp(cp, "br0", 0); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := c.connectNode(cp, bridge, n); err != nil {
			return fmt.Errorf("connect %s: %w", n.Name, err)
		}
	}
	return nil
}

func (c *Cluster) connectNode(cp *netlink.Handle, bridge *netlink.Bridge, n *Node) error {
	if err := n.forward(); err != nil {
		return err
	}
	attributes := netlink.LinkAttrs{Name: n.Name, MasterIndex: bridge.Attrs().Index, Flags: net.FlagUp}
	veth := &netlink.Veth{LinkAttrs: attributes, PeerName: "eth0", PeerNamespace: netlink.NsPid(n.PID())}
	if err := cp.LinkAdd(veth); err != nil {
		return err
	}
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	if err := setUp(h, "eth0", n.index); err != nil {
		return err
	}
	// Without a default route the node itself cannot reach a Service.
	for _, router := range addresses(0) {
		if err := addRoute(h, "", router); err != nil {
			return err
		}
	}
	for i := range addresses(n.index) {
		if err := addRoute(cp, podRangesOf(n.index)[i], addresses(n.index)[i]); err != nil {
			return err
		}
	}
	for _, other := range c.Nodes {
		if other.index == n.index {
			continue
		}
		for i := range addresses(other.index) {
			if err := addRoute(h, podRangesOf(other.index)[i], addresses(other.index)[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// forward makes a machine a router, without duplicate address detection, which
// would keep addresses unusable for seconds.
func (m *Machine) forward() error {
	return m.Do(func() error {
		var errs []error
		for setting, value := range map[string]string{
			"ipv4/ip_forward":              "1",
			"ipv6/conf/all/forwarding":     "1",
			"ipv6/conf/all/accept_dad":     "0",
			"ipv6/conf/default/accept_dad": "0",
		} {
			errs = append(errs, os.WriteFile("/proc/sys/net/"+setting, []byte(value), 0))
		}
		return errors.Join(errs...)
	})
}

// setUp gives a link the addresses of machine i and turns it on, loopback too.
func setUp(h *netlink.Handle, name string, i int) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	if err := errors.Join(h.LinkSetUp(lo), h.LinkSetUp(link)); err != nil {
		return err
	}
	for family, address := range addresses(i) {
		a, err := netlink.ParseAddr(fmt.Sprintf("%s/%d", address, linkLengths[family]))
		if err != nil {
			return err
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	return nil
}

// addRoute adds a route to a prefix, or the default route, over a router.
func addRoute(h *netlink.Handle, prefix, router string) error {
	route := &netlink.Route{Gw: net.ParseIP(router)}
	if prefix != "" {
		_, dst, err := net.ParseCIDR(prefix)
		if err != nil {
			return err
		}
		route.Dst = dst
	}
	if err := h.RouteAdd(route); err != nil {
		return fmt.Errorf("route to %q over %s: %w", prefix, router, err)
	}
	return nil
}
