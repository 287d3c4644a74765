// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
)

// ipvsInterface holds the addresses of Services, which are not the node.
const ipvsInterface = "kube-ipvs0"

// learnNodeAddresses adds those of this node that are not known yet: the main
// plugin may have given its bridge one a moment ago. Link-local ones are known
// to who shares the link: they count at the host end of the endpoint and where
// an interface has other addresses too, as a bridge that is a gateway does, and
// not at the host ends of all other pods. Only the daemon removes addresses,
// and only it knows which are service addresses.
func (s *State) learnNodeAddresses(host int) error {
	addrs, err := nodeAddresses()
	if err != nil {
		return fmt.Errorf("list the node's addresses: %w", err)
	}
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	reachable := map[int]bool{host: true}
	for _, a := range addrs {
		if !a.IsLinkLocalUnicast() {
			reachable[a.ifindex] = true
		}
	}
	for _, a := range addrs {
		if a.IsLoopback() || !reachable[a.ifindex] {
			continue
		}
		w := wire(a.Addr)
		var p bpf.DatapathPeer
		if err := peers.Lookup(&w, &p); err == nil && p.Class&peerNode != 0 {
			continue
		}
		if service, err := isIPVS(a.ifindex); err != nil || service {
			if err != nil {
				return err
			}
			continue
		}
		if err := s.mark(a.Addr, peerNode); err != nil {
			return err
		}
	}
	return nil
}

func isIPVS(ifindex int) (bool, error) {
	l, err := netlink.LinkByIndex(ifindex)
	if isNoLink(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for %s: %w", ipvsInterface, err)
	}
	return l.Attrs().Name == ipvsInterface, nil
}

type nodeAddress struct {
	netip.Addr
	ifindex int
}

// dumps is how often a dump is begun anew.
const dumps = 3

// nodeAddresses lists what the interfaces of this network namespace have. When
// pods come and go the kernel may say each time that addresses have changed
// meanwhile; those of the last dump were there then.
func nodeAddresses() (addrs []nodeAddress, err error) {
	for range dumps {
		addrs = nil
		var broken error
		request := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
		request.AddData(nl.NewIfAddrmsg(unix.AF_UNSPEC))
		err = request.ExecuteIter(unix.NETLINK_ROUTE, unix.RTM_NEWADDR, func(m []byte) bool {
			var a nodeAddress
			if a, broken = parseAddress(m); a.IsValid() {
				addrs = append(addrs, a)
			}
			return broken == nil
		})
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return addrs, errors.Join(err, broken)
		}
	}
	return addrs, nil
}

// parseAddress reads a struct ifaddrmsg (linux/if_addr.h) and its attributes.
func parseAddress(m []byte) (nodeAddress, error) {
	if len(m) < unix.SizeofIfAddrmsg {
		return nodeAddress{}, fmt.Errorf("%w: address message of %d bytes", ErrInvalid, len(m))
	}
	a := nodeAddress{ifindex: int(binary.NativeEndian.Uint32(m[4:]))}
	attrs, err := nl.ParseRouteAttr(m[unix.SizeofIfAddrmsg:])
	if err != nil {
		return nodeAddress{}, fmt.Errorf("address message: %w", err)
	}
	for _, attr := range attrs {
		ip, ok := netip.AddrFromSlice(attr.Value)
		switch attr.Attr.Type {
		case unix.IFA_LOCAL:
			// Wins over IFA_ADDRESS, which is the peer's where they differ.
			if ok {
				a.Addr = ip.Unmap()
			}
		case unix.IFA_ADDRESS:
			if ok && !a.IsValid() {
				a.Addr = ip.Unmap()
			}
		}
	}
	return a, nil
}
