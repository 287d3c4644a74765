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
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/pinning/rtnl"
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
	socket *rtnl.Socket
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
	socket, err := rtnl.OpenAt(pod, host)
	if err != nil {
		host.Close()
		return nil, fmt.Errorf("%w: CNI_NETNS=%s: %w", errNetNS, path, err)
	}
	return &podNetNS{path: path, socket: socket, host: host}, nil
}

func (n *podNetNS) close() {
	n.socket.Close()
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
	link, hostID, addresses, err := n.look(name)
	if err != nil {
		return nil, err
	}
	attrs := link.Attrs()
	if link.Type() != "veth" {
		return nil, fmt.Errorf("%w: %s is of type %s", errNotVeth, name, link.Type())
	}
	if attrs.NetNsID < 0 || attrs.NetNsID != hostID {
		return nil, fmt.Errorf("%w: the peer of %s is in another network namespace", errNotVeth, name)
	}
	peer, err := hostLink(attrs.ParentIndex)
	if err != nil {
		return nil, fmt.Errorf("peer of %s, interface %d of the host: %w", name, attrs.ParentIndex, err)
	}
	if peer.Type() != "veth" || peer.Attrs().ParentIndex != attrs.Index {
		return nil, fmt.Errorf("%w: %s of the host is not the peer of %s", errNotVeth, peer.Attrs().Name, name)
	}
	return &veth{pod: link, peer: peer, addresses: addresses}, nil
}

// look asks for an interface of the pod, the number that the pod's namespace
// gives the host's, and the addresses of the interface. The interface comes
// first: asking for it makes the kernel give that number.
func (n *podNetNS) look(name string) (link netlink.Link, hostID int, addresses []netip.Addr, err error) {
	var answers []rtnl.Answer
	// The kernel interrupts a dump when addresses change under it.
	for range 5 {
		answers, err = n.socket.Do(rtnl.Link(0, name), rtnl.NetNSID(n.host), rtnl.Addresses(0))
		if err != nil || !errors.Is(answers[2].Err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, 0, nil, fmt.Errorf("interface %s in %s: %w", name, n.path, err)
	}
	if errors.Is(answers[0].Err, unix.ENODEV) || len(name) >= unix.IFNAMSIZ {
		return nil, 0, nil, fmt.Errorf("%w: %s in %s", errNoInterface, name, n.path)
	}
	if link, err = onlyLink(answers[0]); err != nil {
		return nil, 0, nil, fmt.Errorf("interface %s in %s: %w", name, n.path, err)
	}
	if err = answers[1].Err; err == nil && len(answers[1].Messages) == 1 {
		hostID, err = rtnl.ParseNetNSID(answers[1].Messages[0])
	}
	if err != nil {
		return nil, 0, nil, fmt.Errorf("id of the host's network namespace in %s: %w", n.path, err)
	}
	if err = answers[2].Err; err != nil {
		return nil, 0, nil, fmt.Errorf("addresses in %s: %w", n.path, err)
	}
	for _, m := range answers[2].Messages {
		a, err := rtnl.ParseAddress(m)
		if err != nil {
			return nil, 0, nil, fmt.Errorf("addresses in %s: %w", n.path, err)
		}
		if a.Ifindex == link.Attrs().Index && a.IsValid() {
			addresses = append(addresses, a.Addr)
		}
	}
	return link, hostID, addresses, nil
}

// hostLink is an interface of our own network namespace.
func hostLink(index int) (netlink.Link, error) {
	socket, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	answers, err := socket.Do(rtnl.Link(index, ""))
	if err != nil {
		return nil, err
	}
	return onlyLink(answers[0])
}

func onlyLink(a rtnl.Answer) (netlink.Link, error) {
	if a.Err != nil {
		return nil, a.Err
	}
	if len(a.Messages) != 1 {
		return nil, fmt.Errorf("%w: %d answers", rtnl.ErrMalformed, len(a.Messages))
	}
	return netlink.LinkDeserialize(nil, a.Messages[0])
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
