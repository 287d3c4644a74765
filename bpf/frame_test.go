// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/podgate/podgate/bpf/policy"
)

// host is one end of a packet.
type host struct {
	mac    [6]byte
	v4, v6 netip.Addr
}

// path is the way of a packet.
type path struct{ from, to host }

// between the pod and a peer, seen from the pod.
func between(d policy.Direction, peer host) path {
	if d == policy.Egress {
		return path{pod, peer}
	}
	return path{peer, pod}
}

func (p path) back() path { return path{p.to, p.from} }

// Flags of TCP (RFC 9293 3.1).
const (
	fin = 1 << iota
	syn
	rst
	_
	ack
)

// IP protocols and IPv6 extension headers (RFC 8200 4.1).
const (
	hopByHop    = 0
	icmp4       = 1
	igmp        = 2
	ipip        = 4
	tcp6        = 6
	udp17       = 17
	routing     = 43
	fragmented  = 44
	gre         = 47
	esp         = 50
	authHeader  = 51
	icmp58      = 58
	noNext      = 59
	destination = 60
	sctp132     = 132
	mobility    = 135
	udpLite     = 136
)

func tcp(source, destination uint16, flags byte) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, source)
	binary.BigEndian.PutUint16(b[2:], destination)
	b[12], b[13] = 5<<4, flags
	return b
}

func udp(source, destination uint16) []byte {
	b := make([]byte, 12)
	binary.BigEndian.PutUint16(b, source)
	binary.BigEndian.PutUint16(b[2:], destination)
	b[5] = byte(len(b))
	return b
}

func sctp(source, destination uint16) []byte {
	return append(udp(source, destination)[:4], make([]byte, 12)...)
}

func icmp(kind, code byte, id uint16, payload ...byte) []byte {
	return append([]byte{kind, code, 0, 0, byte(id >> 8), byte(id), 0, 1}, payload...)
}

// Ethertypes.
const (
	etherV4   = 0x0800
	etherARP  = 0x0806
	etherRARP = 0x8035
	etherVLAN = 0x8100
	etherV6   = 0x86dd
	etherMPLS = 0x8847
	etherQinQ = 0x88a8
)

// ether frames a payload.
func (p path) ether(kind uint16, payload []byte) []byte {
	frame := slices.Concat(p.to.mac[:], p.from.mac[:])
	return append(binary.BigEndian.AppendUint16(frame, kind), payload...)
}

// tagged puts VLAN tags into a frame, the outermost first.
func tagged(frame []byte, kinds ...uint16) []byte {
	out := slices.Clone(frame[:12])
	for i, kind := range kinds {
		out = append(binary.BigEndian.AppendUint16(out, kind), 0, byte(i+1))
	}
	return append(out, frame[12:]...)
}

// v4 is a frame with an IPv4 packet; options are padded.
func (p path) v4(protocol byte, payload []byte, options ...byte) []byte {
	return p.ether(etherV4, p.packet4(protocol, payload, options...))
}

func (p path) packet4(protocol byte, payload []byte, options ...byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	header := 20 + len(options)
	b := make([]byte, 20)
	b[0] = 0x40 | byte(header/4)
	binary.BigEndian.PutUint16(b[2:], uint16(header+len(payload)))
	b[8], b[9] = 64, protocol
	copy(b[12:], p.from.v4.AsSlice())
	copy(b[16:], p.to.v4.AsSlice())
	return slices.Concat(b, options, payload)
}

// fragment4 is a fragment; offset is in bytes.
func (p path) fragment4(protocol byte, id, offset uint16, more bool, payload []byte) []byte {
	frame := p.v4(protocol, payload)
	binary.BigEndian.PutUint16(frame[18:], id)
	if offset /= 8; more {
		offset |= 0x2000
	}
	binary.BigEndian.PutUint16(frame[20:], offset)
	return frame
}

// v6 is a frame with an IPv6 packet.
func (p path) v6(next byte, payload []byte) []byte {
	return p.ether(etherV6, p.packet6(next, 64, payload))
}

// hop6 is one with a hop limit of its own.
func (p path) hop6(next, hops byte, payload []byte) []byte {
	return p.ether(etherV6, p.packet6(next, hops, payload))
}

func (p path) packet6(next, hops byte, payload []byte) []byte {
	b := make([]byte, 8, 40+len(payload))
	b[0], b[6], b[7] = 0x60, next, hops
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	return slices.Concat(b, p.from.v6.AsSlice(), p.to.v6.AsSlice(), payload)
}

// extension is an IPv6 extension header of 8 or more bytes before payload.
func extension(next byte, rest []byte, payload []byte) []byte {
	length := byte((2+max(len(rest), 6))/8 - 1)
	header := append([]byte{next, length}, rest...)
	for len(header) < 8*(int(length)+1) {
		header = append(header, 0)
	}
	return append(header, payload...)
}

// auth is an Authentication Header (RFC 4302 2), whose length counts otherwise.
func auth(next byte, payload []byte) []byte {
	return append(append([]byte{next, 4}, make([]byte, 22)...), payload...)
}

// fragment6 is a Fragment header and what follows; offset is in bytes.
func fragment6(next byte, id uint32, offset uint16, more bool, payload []byte) []byte {
	b := []byte{next, 0}
	if more {
		offset |= 1
	}
	b = binary.BigEndian.AppendUint16(b, offset)
	return append(binary.BigEndian.AppendUint32(b, id), payload...)
}

// arp is an ARP packet (RFC 826) of an operation between two hosts.
func arp(operation byte, sender, target host) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, operation}, sender.mac[:], sender.v4.AsSlice(), target.mac[:], target.v4.AsSlice())
}

// Neighbour discovery and multicast listener types (RFC 4861 4, RFC 3810 5).
const (
	mldReport = 131
	rsType    = 133
	raType    = 134
	nsType    = 135
	naType    = 136
	redirect  = 137
	mld2      = 143
)

// nd is a solicitation or advertisement with one link-layer address option.
func nd(kind byte, target netip.Addr, option byte, mac [6]byte) []byte {
	return slices.Concat([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), []byte{option, 1}, mac[:])
}
