// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// OpenFlow is a TCP connection that was open before its endpoint was gated.
type OpenFlow struct {
	// Opened says who opened it: [policy.Egress] if the pod did.
	Opened policy.Direction
	// Local is the pod's end, Peer the other one, as the pod sees it.
	Local, Peer netip.AddrPort
}

// Adopt tells the datapath of connections that were open before the endpoint
// was gated. A packet from the middle of a connection does not show who opened
// it, and so under which direction's policy it stands: taken for the first one,
// an answer to an isolated pod would end the pod's own connection. Adopted ones
// are judged at their next packet, as their first one would be today. It
// returns [ErrNotFound] if there is no such endpoint.
func (s *State) Adopt(k AttachmentKey, open []OpenFlow) error {
	e, _, err := s.Endpoint(k)
	if err != nil {
		return err
	}
	flows, err := s.m(bpf.DatapathMapFlows)
	if err != nil {
		return err
	}
	now, err := jiffies()
	if err != nil {
		return err
	}
	hz, err := timerFrequency()
	if err != nil {
		return err
	}
	const kind, state = bpf.DatapathFlowKindFLOW_TCP, bpf.DatapathFlowStateFLOW_ESTABLISHED
	life := flowTimeouts(hz)[uint32(kind)*uint32(bpf.DatapathFlowStateFLOW_STATES)+uint32(state)]
	var monotonic unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &monotonic); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	var errs []error
	for _, o := range open {
		key := bpf.DatapathFlowKey{
			Endpoint: e.ID, LocalPort: o.Local.Port(), PeerPort: o.Peer.Port(),
			Local: wire(o.Local.Addr()), Peer: wire(o.Peer.Addr()), Protocol: uint8(policy.TCP),
		}
		identity, err := flowIdentity(&key)
		if err != nil {
			return err
		}
		// Valid stays zero: it is judged before it is trusted.
		f := bpf.DatapathFlow{
			Identity: identity, Expires: now + life, CreatedNs: uint64(monotonic.Nano()),
			Direction: uint8(o.Opened), Kind: uint8(kind), State: uint8(state),
			Verdict: uint8(bpf.DatapathVerdictVERDICT_ALLOWED), Flags: uint8(bpf.DatapathFlowFlagsFLOW_VERIFIED),
		}
		ofNode, err := s.isNode(o.Peer.Addr())
		if err != nil {
			return err
		}
		if ofNode && o.Opened == policy.Ingress {
			f.Flags |= uint8(bpf.DatapathFlowFlagsFLOW_NODE)
		}
		if err := flows.Put(&key, &f); err != nil {
			errs = append(errs, fmt.Errorf("adopt the connection of %s and %s: %w", o.Local, o.Peer, err))
		}
	}
	return errors.Join(errs...)
}

// isNode tells whether an address is known as this node's.
func (s *State) isNode(a netip.Addr) (bool, error) {
	p, _, err := s.peerEntry(a)
	return p.Class&peerNode != 0, err
}

// flowIdentity is flow_identity of bpf/include/conntrack.h.
func flowIdentity(key *bpf.DatapathFlowKey) (uint64, error) {
	b, err := binary.Append(nil, binary.NativeEndian, key)
	if err != nil {
		return 0, fmt.Errorf("flow key: %w", err)
	}
	var sum uint64
	for i, factor := range [...]uint64{
		0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb,
		0xd6e8feb86659fd93, 0xa0761d6478bd642f, 0xe7037ed1a0b428db,
	} {
		sum += binary.NativeEndian.Uint64(b[8*i:]) * factor
	}
	return sum, nil
}
