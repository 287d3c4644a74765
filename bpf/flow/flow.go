// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
	"unsafe"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// ErrTruncated is returned for a record shorter than an event.
var ErrTruncated = errors.New("truncated record")

// Flow is one event: the first packet of a flow, or a packet that was dropped
// or would have been.
type Flow struct {
	Time     time.Time
	Endpoint uint32
	// Ifindex of the host end of the veth.
	Ifindex   uint32
	Direction policy.Direction
	Verdict   Verdict
	Reason    Reason
	// Local is the pod's side. Ports are 0 where the protocol has none.
	Local, Peer netip.AddrPort
	// Frontend of a Service over which Peer was reached, if it is known.
	Frontend netip.AddrPort
	// EtherType of the frame without VLAN tags.
	EtherType uint16
	Protocol  policy.Protocol
	// TCPFlags as in the header (RFC 9293 3.1): FIN 1, SYN 2, RST 4, ACK 16.
	TCPFlags           uint8
	ICMPType, ICMPCode uint8
	// Rule, Class and Ruleset that decided; 0 if none did.
	Rule, Class, Ruleset uint32
	// Length of the packet in bytes, with its Ethernet header.
	Length uint32
}

// Clock turns the kernel's CLOCK_MONOTONIC into wall-clock time.
type Clock struct{ boot time.Time }

// Decode reads a record of the event ring. It returns [ErrTruncated] for one
// that is too short.
func Decode(record []byte, c Clock) (Flow, error) {
	var e bpf.DatapathEvent
	if len(record) < int(unsafe.Sizeof(e)) {
		return Flow{}, fmt.Errorf("event: %w: %d bytes", ErrTruncated, len(record))
	}
	view(record, &e)
	f := Flow{
		Time:     c.boot.Add(time.Duration(e.TimeNs)),
		Endpoint: e.Endpoint, Ifindex: e.Ifindex,
		Direction: policy.Direction(e.Direction), Verdict: Verdict(e.Verdict), Reason: Reason(e.Reason),
		Local:     netip.AddrPortFrom(netip.AddrFrom16(e.Local.Bytes).Unmap(), e.LocalPort),
		Peer:      netip.AddrPortFrom(netip.AddrFrom16(e.Peer.Bytes).Unmap(), e.PeerPort),
		EtherType: e.Ethertype, Protocol: policy.Protocol(e.Protocol), TCPFlags: e.TcpFlags,
		ICMPType: e.IcmpType, ICMPCode: e.IcmpCode,
		Rule: e.Rule, Class: e.Class, Ruleset: e.Ruleset, Length: e.Length,
	}
	var s bpf.DatapathServiceEvent
	if len(record) < int(unsafe.Sizeof(s)) {
		return f, nil
	}
	view(record, &s)
	if s.FrontendPort != 0 {
		f.Frontend = netip.AddrPortFrom(netip.AddrFrom16(s.Frontend.Bytes).Unmap(), s.FrontendPort)
	}
	return f, nil
}

// view copies a record into the struct that it was written as, whose layout is
// generated from the C one. encoding/binary takes many times as long.
func view[T any](record []byte, into *T) {
	copy(unsafe.Slice((*byte)(unsafe.Pointer(into)), unsafe.Sizeof(*into)), record)
}
