// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/pinning/rtnl"
)

// ipvsInterface holds the addresses of Services, which are not the node.
const ipvsInterface = "kube-ipvs0"

// nodeTime is how long an ADD relies on what is known of the node's addresses,
// but for those of the interfaces it is about. The daemon hears of changes at
// once; where there is none, ADDs look for them.
const nodeTime = time.Minute

// learnNodeAddresses adds those of this node that are not known yet: the main
// plugin may have given its bridge one a moment ago. Link-local ones are known
// to who shares the link: they count at the host end of the endpoint and where
// an interface has other addresses too, as a bridge that is a gateway does, and
// not at the host ends of all other pods. Only the daemon removes addresses,
// and only it knows which are service addresses.
//
// A dump of all addresses takes the longer the more pods there are, each host
// end having a link-local one.
func (s *State) learnNodeAddresses(r *AddRequest) error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	socket, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	if err := socket.Strict(); err != nil {
		return err
	}
	if age := time.Since(sh.nodesKnown()); age < 0 || age > nodeTime {
		return s.learnFrom(socket, 0, r.HostIfindex)
	}
	if r.Bridge != 0 {
		if err := s.learnFrom(socket, r.Bridge, r.HostIfindex); err != nil {
			return err
		}
	}
	if err := s.learnFrom(socket, r.HostIfindex, r.HostIfindex); err != nil {
		return err
	}
	return s.learnGateways(socket, r.Gateways)
}

// learnGateways learns those that are the node's: of a bridge with VLANs the
// interface above it has the address.
func (s *State) learnGateways(socket *rtnl.Socket, gateways []netip.Addr) error {
	for _, a := range gateways {
		p, _, err := s.peerEntry(a)
		if err != nil {
			return err
		}
		if p.Class&peerNode != 0 || a.IsLinkLocalUnicast() {
			continue
		}
		answers, err := socket.Do(rtnl.Route(a))
		if err != nil {
			return err
		}
		// An address without a route is not the node's.
		if route := answers[0]; route.Err != nil || len(route.Messages) != 1 || !rtnl.IsLocal(route.Messages[0]) {
			continue
		}
		if err := s.mark(a, peerNode); err != nil {
			return err
		}
	}
	return nil
}

// learnFrom learns the addresses of an interface, or of all if it is zero.
func (s *State) learnFrom(socket *rtnl.Socket, ifindex, host int) error {
	began := time.Now()
	addrs, err := nodeAddresses(socket, ifindex)
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
			reachable[a.Ifindex] = true
		}
	}
	for _, a := range addrs {
		if a.IsLoopback() || !reachable[a.Ifindex] {
			continue
		}
		w := wire(a.Addr)
		var p bpf.DatapathPeer
		if err := peers.Lookup(&w, &p); err == nil && p.Class&peerNode != 0 {
			continue
		}
		if ifindex == 0 && a.Ifindex != host {
			if service, err := isIPVS(a.Ifindex); err != nil || service {
				if err != nil {
					return err
				}
				continue
			}
		}
		if err := s.mark(a.Addr, peerNode); err != nil {
			return err
		}
	}
	if ifindex == 0 {
		s.shared.knowNodes(began)
	}
	return nil
}

// nodesKnown is when all of the node's addresses were last known.
func (sh *shared) nodesKnown() time.Time {
	return time.Unix(0, int64(atomic.LoadUint64(&sh.state.NodesNs)))
}

func (sh *shared) knowNodes(at time.Time) {
	atomic.StoreUint64(&sh.state.NodesNs, uint64(at.UnixNano()))
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

// dumps is how often a dump is begun anew.
const dumps = 3

// nodeAddresses lists what an interface of this network namespace has, or all
// of them have. When pods come and go the kernel may say each time that
// addresses have changed meanwhile; those of the last dump were there then.
func nodeAddresses(socket *rtnl.Socket, ifindex int) ([]rtnl.Address, error) {
	var answer rtnl.Answer
	for range dumps {
		answers, err := socket.Do(rtnl.Addresses(ifindex))
		if err != nil {
			return nil, err
		}
		if answer = answers[0]; !errors.Is(answer.Err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err := answer.Err; err != nil && !errors.Is(err, nl.ErrDumpInterrupted) && !errors.Is(err, unix.ENODEV) {
		return nil, err
	}
	var addrs []rtnl.Address
	for _, m := range answer.Messages {
		a, err := rtnl.ParseAddress(m)
		if err != nil {
			return nil, err
		}
		if a.IsValid() {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}
