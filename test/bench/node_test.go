// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// node is a node with an instance that enforces a cluster's policy.
type node struct {
	*netlab.Node
	layout pinning.Layout
	state  *pinning.State
}

// newNode has the policies of [cluster] applied.
func newNode(b *testing.B, policies, local int) *node {
	b.Helper()
	if os.Getuid() != 0 {
		b.Skip("network namespaces and BPF need root")
	}
	lab, err := netlab.New(netlab.Options{})
	if err != nil {
		b.Fatal(err)
	}
	n := &node{Node: lab, layout: pinning.Layout{BPFFS: lab.BPFFS, Name: "podgate"}}
	b.Cleanup(func() {
		if err := n.Close(); err != nil {
			b.Error(err)
		}
	})
	if n.state, err = pinning.Ensure(b.Context(), pinning.Options{Layout: n.layout}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { n.state.Close() })
	c, err := cluster(policies, local)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := n.state.Apply(b.Context(), c.Compile()); err != nil {
		b.Fatal(err)
	}
	return n
}

// endpoint is a local pod of an app, with a real veth to its own network
// namespace.
type endpoint struct {
	*netlab.Pod
	app       int
	host      netlink.Link
	mac       net.HardwareAddr
	addresses []netip.Addr
}

// newEndpoint makes the pod and its veth and does not gate it.
func (n *node) newEndpoint(b *testing.B, i int) *endpoint {
	b.Helper()
	p, err := netlab.NewPod(netlab.PodSpec{Namespace: namespace, Name: localPod(i), UID: localPod(i)})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.Close() })
	e := &endpoint{Pod: p, app: i, addresses: []netip.Addr{local4(i), local6(i)}}
	if err := errors.Join(n.Do(e.plug)); err != nil {
		b.Fatalf("veth of pod %d: %v", i, err)
	}
	return e
}

// replug gives the pod a new veth; it is called on the node.
func (e *endpoint) replug() error {
	if err := netlink.LinkDel(e.host); err != nil {
		return err
	}
	return e.plug()
}

func (e *endpoint) plug() error {
	netns, err := os.Open(e.NetNS())
	if err != nil {
		return err
	}
	defer netns.Close()
	name := fmt.Sprintf("veth%d", e.app)
	err = netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: e.IfName, PeerNamespace: netlink.NsFd(netns.Fd()),
	})
	if err != nil {
		return err
	}
	if e.host, err = netlink.LinkByName(name); err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(e.host), e.Do(e.configure))
}

func (e *endpoint) configure() error {
	l, err := netlink.LinkByName(e.IfName)
	if err != nil {
		return err
	}
	e.mac = l.Attrs().HardwareAddr
	for _, a := range e.addresses {
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ip}); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}

// gate does what ADD does. Without a uid the policy of the pod is unknown.
func (n *node) gate(b *testing.B, e *endpoint, uid string) {
	b.Helper()
	var attached pinning.Enforcement
	err := n.Do(func() (err error) {
		_, attached, err = n.state.Add(b.Context(), pinning.AddRequest{Endpoint: pinning.Endpoint{
			Key:         pinning.AttachmentKey{ContainerID: e.ID, IfName: e.IfName},
			HostIfindex: e.host.Attrs().Index, MAC: e.mac, Addresses: e.addresses,
			PodUID: uid, AntiSpoof: true,
		}})
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	if want := uid != ""; want != (attached.State() == "enforcing") {
		b.Fatalf("pod %q is %s", uid, attached.State())
	}
}
