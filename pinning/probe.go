// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// ProbeRequest is the first packet of a connection, as the pod sees it.
type ProbeRequest struct {
	// Gate under which it is judged.
	Gate      uint32
	Direction policy.Direction
	// Local is the pod's address, Peer the other one; both of one family.
	Local, Peer netip.Addr
	Protocol    policy.Protocol
	// Port is the destination port; the source port is made up. ICMP and
	// ICMPv6 ask for an echo.
	Port uint16
}

// ProbeAnswer is the kernel's verdict on a probe.
type ProbeAnswer struct {
	Verdict bpf.DatapathVerdict
	Reason  bpf.DatapathReason
	// Rule, Class and Ruleset that decided; zero if none did.
	Rule, Class, Ruleset uint32
}

// probeMagic is PROBE_MAGIC of bpf/include/types.h.
const probeMagic = 0x70676174

// Words of struct __sk_buff (linux/bpf.h).
const (
	skbCB    = 12
	skbWords = 48
)

// Probe runs a made-up packet through the pinned program that judges the
// direction (BPF_PROG_TEST_RUN), under the endpoint's own gate and maps. No
// flow is looked up or entered, nothing is counted and no event is made.
func (s *State) Probe(_ context.Context, r ProbeRequest) (ProbeAnswer, error) {
	p, err := s.program(programNames()[r.Direction])
	if err != nil {
		return ProbeAnswer{}, err
	}
	sh, err := s.memory()
	if err != nil {
		return ProbeAnswer{}, err
	}
	if r.Gate >= uint32(len(sh.gates)) {
		return ProbeAnswer{}, fmt.Errorf("gate %d: %w", r.Gate, ErrNotFound)
	}
	frame, err := probeFrame(r)
	if err != nil {
		return ProbeAnswer{}, err
	}
	in, out := make([]uint32, skbWords), make([]uint32, skbWords)
	in[skbCB], in[skbCB+1] = probeMagic, r.Gate
	if _, err := p.Run(&ebpf.RunOptions{Data: frame, Context: in, ContextOut: out}); err != nil {
		return ProbeAnswer{}, fmt.Errorf("run %s on a probe: %w", p, err)
	}
	cb := out[skbCB : skbCB+5]
	if cb[0] == probeMagic {
		return ProbeAnswer{}, fmt.Errorf("probe: %w: the program did not take it for one", ErrABI)
	}
	return ProbeAnswer{
		Verdict: bpf.DatapathVerdict(cb[0]), Reason: bpf.DatapathReason(cb[1]),
		Rule: cb[2], Class: cb[3], Ruleset: cb[4],
	}, nil
}

// probePort is the source port of probes: any ephemeral one (RFC 6335 6).
const probePort = 50000

func probeFrame(r ProbeRequest) ([]byte, error) {
	local, peer := r.Local.Unmap(), r.Peer.Unmap()
	if !local.IsValid() || !peer.IsValid() || local.Is4() != peer.Is4() {
		return nil, fmt.Errorf("%w: probe between %s and %s", ErrInvalid, r.Local, r.Peer)
	}
	source, destination := peer, local
	if r.Direction == policy.Egress {
		source, destination = local, peer
	}
	upper := probeUpper(r, local.Is4())
	frame := make([]byte, 12, 128)
	if local.Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(20+len(upper)))
		frame = append(frame, 0, 0, 0, 0, 64, byte(r.Protocol), 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(upper)))
		frame = append(frame, byte(r.Protocol), 64)
	}
	frame = append(frame, source.AsSlice()...)
	frame = append(frame, destination.AsSlice()...)
	return append(frame, upper...), nil
}

func probeUpper(r ProbeRequest, v4 bool) []byte {
	upper := make([]byte, 20)
	switch r.Protocol {
	case policy.TCP, policy.UDP, policy.SCTP:
		binary.BigEndian.PutUint16(upper, probePort)
		binary.BigEndian.PutUint16(upper[2:], r.Port)
		if r.Protocol == policy.TCP {
			upper[12], upper[13] = 5<<4, 0x02 // data offset; SYN
		}
	case policy.ICMP, policy.ICMPv6:
		upper[0] = 128
		if v4 {
			upper[0] = 8
		}
	}
	return upper
}

// PrivateGate makes a gate without an interface in a private state and returns
// its number. It follows the subject when updates are applied.
func (s *State) PrivateGate(pod policy.PodKey, addrs []netip.Addr) (uint32, error) {
	if !s.private {
		return 0, fmt.Errorf("%w: gates of a pinned instance are made by Add", ErrInvalid)
	}
	sh, err := s.memory()
	if err != nil {
		return 0, err
	}
	e := Endpoint{
		Key: AttachmentKey{ContainerID: fmt.Sprintf("private-%d", sh.state.NextEndpoint+1), IfName: "private"},
		ID:  atomic.AddUint32(&sh.state.NextEndpoint, 1),
		Pod: pod, Addresses: addrs, MAC: make([]byte, 6),
	}
	// The first interface that is not the loopback device, on which probes run.
	e.HostIfindex = int(e.ID) + 1
	if e.Gate, _, err = sh.slotFor(uint32(e.HostIfindex)); err != nil {
		return 0, err
	}
	if err := s.record(&e); err != nil {
		return 0, err
	}
	published, found, err := s.published(pod)
	if err != nil {
		return 0, err
	}
	return e.Gate, s.openGate(sh, &e, published, found)
}
