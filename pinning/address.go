// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// Claim notes that addresses belong to an attachment from now on. It is for
// the moment of allocation, before the interface exists. What is known of a
// former owner ends: no class, and no flow is trusted until judged again.
func (s *State) Claim(ctx context.Context, k AttachmentKey, addrs []netip.Addr) error {
	return s.locked(ctx, func() error {
		if err := s.claim(k, 0, 0, addrs); err != nil {
			return err
		}
		return s.addressesMoved()
	})
}

// Release ends an attachment's claims on addresses; on all of its addresses
// if none are named. Claims that have passed to another attachment stay.
func (s *State) Release(ctx context.Context, k AttachmentKey, addrs []netip.Addr) error {
	return s.locked(ctx, func() error {
		if err := s.release(k, addrs); err != nil {
			return err
		}
		return s.addressesMoved()
	})
}

func (s *State) addressesMoved() error {
	sh, err := s.memory()
	if err != nil {
		return err
	}
	sh.bumpEpoch()
	return nil
}

// claim writes the claims of an endpoint. The peers entry of an address goes
// if it was another's: until somebody classifies it anew the address is what
// its block says.
func (s *State) claim(k AttachmentKey, endpoint, gate uint32, addrs []netip.Addr) error {
	key, err := k.wire()
	if err != nil {
		return err
	}
	claims, err := s.m(bpf.DatapathMapClaims)
	if err != nil {
		return err
	}
	value := bpf.DatapathClaim{Attachment: key, Endpoint: endpoint, Gate: gate, CreatedNs: uint64(time.Now().UnixNano())}
	for _, a := range addrs {
		if a.IsLinkLocalUnicast() {
			continue
		}
		w := wire(a)
		var old bpf.DatapathClaim
		if err := claims.Lookup(&w, &old); err == nil && old.Attachment != key {
			s.log.Info("address has a new owner", "address", a, "was", attachmentKey(&old.Attachment), "is", k)
		}
		if err := put(claims, &w, &value); err != nil {
			return fmt.Errorf("claim %s: %w", a, err)
		}
		if former := (old.Attachment != bpf.DatapathAttachment{}); former && old.Attachment != key {
			if err := s.declassify(a); err != nil {
				return fmt.Errorf("claim %s: %w", a, err)
			}
		}
	}
	return nil
}

func (s *State) release(k AttachmentKey, addrs []netip.Addr) error {
	key, err := k.wire()
	if err != nil {
		return err
	}
	claims, err := s.m(bpf.DatapathMapClaims)
	if err != nil {
		return err
	}
	if len(addrs) == 0 {
		if addrs, err = s.claimed(claims, key); err != nil {
			return err
		}
	}
	var errs []error
	for _, a := range addrs {
		w := wire(a)
		var c bpf.DatapathClaim
		if err := claims.Lookup(&w, &c); err != nil || c.Attachment != key {
			continue
		}
		errs = append(errs, s.declassify(a), remove(claims, &w))
	}
	return errors.Join(errs...)
}

func (s *State) claimed(claims *ebpf.Map, key bpf.DatapathAttachment) ([]netip.Addr, error) {
	var addrs []netip.Addr
	var err error
	for a, c := range each[bpf.DatapathAddress, bpf.DatapathClaim](claims, &err) {
		if c.Attachment == key {
			addrs = append(addrs, unwire(a))
		}
	}
	return addrs, err
}

// classify gives a new endpoint's addresses their class, less those that the
// daemon knew to be the pod's before ADD did.
func (s *State) classify(pod policy.PodKey, class uint32, addrs []netip.Addr) error {
	for _, a := range addrs {
		if a.IsLinkLocalUnicast() {
			continue
		}
		known, found, err := s.peerEntry(a)
		if err != nil {
			return fmt.Errorf("classify %s: %w", a, err)
		}
		if found && known.Owner == pod.Owner() {
			continue
		}
		if err := s.setClass(pod, class, a); err != nil {
			return err
		}
	}
	return nil
}

// setClass gives an address the class its pod is published with, joined with
// that of the block it is in.
func (s *State) setClass(pod policy.PodKey, class uint32, a netip.Addr) error {
	peers, err := s.m(bpf.DatapathMapPeers)
	if err != nil {
		return err
	}
	joined, err := s.join(class, a)
	if err != nil {
		return err
	}
	known, _, err := s.peerEntry(a)
	if err != nil {
		return fmt.Errorf("classify %s: %w", a, err)
	}
	w := wire(a)
	joined |= known.Class & peerBits
	if err := put(peers, &w, &bpf.DatapathPeer{Class: joined, Owner: pod.Owner(), Tag: tag(w)}); err != nil {
		return fmt.Errorf("classify %s: %w", a, err)
	}
	return nil
}

// join is the class of a pod's address inside a block. Where nobody has
// worked it out the block's own class is the answer that allows less.
func (s *State) join(class uint32, a netip.Addr) (uint32, error) {
	block, err := s.blockClass(netip.PrefixFrom(a, a.BitLen()))
	if err != nil || block == 0 {
		return class, err
	}
	if class == 0 {
		return block, nil
	}
	joins, err := s.m(bpf.DatapathMapJoins)
	if err != nil {
		return 0, err
	}
	var joined uint32
	if err := joins.Lookup(&bpf.DatapathJoinKey{Pod: class, Block: block}, &joined); err != nil {
		return block, nil //nolint:nilerr // an unknown join is no failure: see above
	}
	return joined, nil
}

func (s *State) setSources(endpoint uint32, addrs []netip.Addr, present bool) error {
	m, err := s.m(bpf.DatapathMapSources)
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range addrs {
		key := bpf.DatapathSource{Address: wire(a), Endpoint: endpoint}
		one := uint32(1)
		if present {
			errs = append(errs, put(m, &key, &one))
		} else {
			errs = append(errs, remove(m, &key))
		}
	}
	return errors.Join(errs...)
}

// ownAddresses picks the addresses that an endpoint sends from most, one of each family;
// the datapath looks for others in sources.
func ownAddresses(addrs []netip.Addr) [2]bpf.DatapathAddress {
	var picked [2]bpf.DatapathAddress
	for _, a := range addrs {
		family := 0
		if a.Is6() && !a.Is4In6() {
			family = 1
		}
		if picked[family] == (bpf.DatapathAddress{}) && !a.IsLinkLocalUnicast() {
			picked[family] = wire(a)
		}
	}
	return picked
}

// put writes an entry and says so when the map has no room.
func put[K, V any](m *ebpf.Map, k *K, v *V) error {
	err := m.Put(k, v)
	if err == nil {
		return nil
	}
	if isFull(err) {
		return fmt.Errorf("%s: %w: it has %d entries", m, ErrFull, m.MaxEntries())
	}
	return fmt.Errorf("%s: %w", m, err)
}

// remove deletes an entry, if it is there.
func remove[K any](m *ebpf.Map, k *K) error {
	if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("%s: %w", m, err)
	}
	return nil
}
