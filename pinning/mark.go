// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
)

// Bits beside a class in a peer's entry: PEER_NODE and PEER_SERVICE of
// bpf/include/types.h.
const (
	peerNode    = uint32(1) << 31
	peerService = uint32(1) << 30
	peerBits    = peerNode | peerService
)

// mark sets a bit at an address. It keeps the class a pod gave it, else it
// gets that of its block.
func (s *State) mark(a netip.Addr, bit uint32) error {
	p, _, err := s.peerEntry(a)
	if err != nil {
		return err
	}
	return s.putPeer(a, p, p.Class&peerBits|bit)
}

// unmark clears a bit at an address. An entry that was there for it alone goes.
func (s *State) unmark(a netip.Addr, bit uint32) error {
	p, found, err := s.peerEntry(a)
	if err != nil || !found {
		return err
	}
	bits := p.Class & peerBits &^ bit
	if bits == 0 && p.Owner == 0 && !s.named(a) {
		return s.removeEntry(a)
	}
	return s.putPeer(a, p, bits)
}

// declassify takes an address's class and owner away. What its bits say stays.
func (s *State) declassify(a netip.Addr) error {
	p, found, err := s.peerEntry(a)
	if err != nil || !found {
		return err
	}
	bits := p.Class&peerBits | s.bits(a)
	if bits == 0 {
		return s.removeEntry(a)
	}
	return s.putPeer(a, bpf.DatapathPeer{}, bits)
}

// bits are what this process knows to belong beside the class of an address.
func (s *State) bits(a netip.Addr) (bits uint32) {
	if s.applied != nil {
		if _, node := s.applied.nodes[a]; node {
			bits |= peerNode
		}
	}
	if s.services != nil {
		if _, marked := s.services.marked[a]; marked {
			bits |= peerService
		}
	}
	return bits
}

// named: the policy in force gives the address a class of its own.
func (s *State) named(a netip.Addr) bool {
	if s.applied == nil {
		return false
	}
	_, named := s.applied.peers[exactKey(a)]
	return named
}

// peerClass is what the datapath makes of an address now, with its bits.
func (s *State) peerClass(a netip.Addr) (uint32, error) {
	p, found, err := s.peerEntry(a)
	if err != nil || found {
		return p.Class, err
	}
	return s.blockClass(netip.PrefixFrom(a, a.BitLen()))
}

// peerEntry reads an entry. The value may be another's while its map element is
// being recycled; the tag tells.
func (s *State) peerEntry(a netip.Addr) (p bpf.DatapathPeer, found bool, err error) {
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return p, false, err
	}
	w := wire(a)
	for range 100 {
		if err := peers.Lookup(&w, &p); errors.Is(err, ebpf.ErrKeyNotExist) {
			return bpf.DatapathPeer{}, false, nil
		} else if err != nil {
			return p, false, fmt.Errorf("%s: %w", peers, err)
		}
		if p.Tag == tag(w) {
			return p, true, nil
		}
	}
	return bpf.DatapathPeer{}, false, nil
}

// putPeer writes an entry with other bits. One without owner has the class of
// its block, unless policy names it: ingress from it is judged by that.
func (s *State) putPeer(a netip.Addr, p bpf.DatapathPeer, bits uint32) (err error) {
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	if p.Class &^= peerBits; p.Owner == 0 && !s.named(a) {
		if p.Class, err = s.join(0, a); err != nil {
			return err
		}
	}
	w := wire(a)
	p.Class, p.Tag = p.Class|bits, tag(w)
	return put(peers, &w, &p)
}

func (s *State) removeEntry(a netip.Addr) error {
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	w := wire(a)
	return remove(peers, &w)
}
