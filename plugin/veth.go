// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Reasons why an interface cannot be gated.
var (
	errNetNS       = errors.New("bad network namespace")
	errNoInterface = errors.New("no such interface in the pod")
	errNotVeth     = errors.New("interface has no veth peer on this host")
)

// podNetNS looks into a pod's network namespace from outside.
type podNetNS struct {
	path   string
	handle *netlink.Handle
	host   netns.NsHandle
}

// openNetNS fails with [errNetNS] when path is no network namespace or, unless
// override is set, our own.
func openNetNS(path string, override bool) (*podNetNS, error) {
	pod, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("%w: CNI_NETNS: %w", errNetNS, &os.PathError{Op: "open", Path: path, Err: err})
	}
	defer pod.Close()
	host, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("%w: our own: %w", errNetNS, err)
	}
	if host.Equal(pod) && !override {
		host.Close()
		return nil, fmt.Errorf("%w: CNI_NETNS=%s is the network namespace of the host", errNetNS, path)
	}
	handle, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		host.Close()
		return nil, fmt.Errorf("%w: CNI_NETNS=%s: %w", errNetNS, path, err)
	}
	return &podNetNS{path: path, handle: handle, host: host}, nil
}

func (n *podNetNS) close() {
	n.handle.Close()
	n.host.Close()
}

// veth is a pod's interface and its peer on the host.
type veth struct {
	pod, peer netlink.Link
	// addresses on the pod's interface, IPv6 link-local ones included.
	addresses []netip.Addr
}

// veth finds an interface of the pod and its peer. It fails with
// [errNoInterface] or [errNotVeth].
//
// Names prove nothing: the kernel says what the other end is (IFLA_LINK) and in
// which namespace (IFLA_LINK_NETNSID, an id that the pod's namespace gives), and
// that end must in turn point here.
func (n *podNetNS) veth(name string) (*veth, error) {
	link, err := n.handle.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, fmt.Errorf("%w: %s in %s", errNoInterface, name, n.path)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s in %s: %w", name, n.path, err)
	}
	attrs := link.Attrs()
	if link.Type() != "veth" {
		return nil, fmt.Errorf("%w: %s is of type %s", errNotVeth, name, link.Type())
	}
	hostID, err := n.handle.GetNetNsIdByFd(int(n.host))
	if err != nil {
		return nil, fmt.Errorf("id of the host's network namespace in %s: %w", n.path, err)
	}
	if attrs.NetNsID < 0 || attrs.NetNsID != hostID {
		return nil, fmt.Errorf("%w: the peer of %s is in another network namespace", errNotVeth, name)
	}
	peer, err := netlink.LinkByIndex(attrs.ParentIndex)
	if err != nil {
		return nil, fmt.Errorf("peer of %s, interface %d of the host: %w", name, attrs.ParentIndex, err)
	}
	if peer.Type() != "veth" || peer.Attrs().ParentIndex != attrs.Index {
		return nil, fmt.Errorf("%w: %s of the host is not the peer of %s", errNotVeth, peer.Attrs().Name, name)
	}
	addresses, err := n.addresses(link)
	if err != nil {
		return nil, err
	}
	return &veth{pod: link, peer: peer, addresses: addresses}, nil
}

func (n *podNetNS) addresses(link netlink.Link) ([]netip.Addr, error) {
	var list []netlink.Addr
	// The kernel interrupts a dump when addresses change under it.
	for range 5 {
		var err error
		list, err = n.handle.AddrList(link, netlink.FAMILY_ALL)
		if err == nil {
			break
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return nil, fmt.Errorf("addresses of %s in %s: %w", link.Attrs().Name, n.path, err)
		}
	}
	var addresses []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			addresses = append(addresses, ip.Unmap())
		}
	}
	return addresses, nil
}

// own returns the addresses that the pod sends from through v: those of the
// result, those on the interface, and the link-local one of mac. The kernel
// forms that when the link comes up (RFC 4291, appendix A), which may be after
// us; it keeps the one it has when only the MAC changes.
func (v *veth) own(result []netip.Addr, mac net.HardwareAddr) []netip.Addr {
	all := slices.Concat(result, v.addresses, []netip.Addr{linkLocal(mac)})
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// linkLocal is the modified EUI-64 link-local address of a MAC.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{
		0xfe, 0x80, 0, 0, 0, 0, 0, 0,
		mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5],
	})
}
