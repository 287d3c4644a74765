// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"encoding/binary"
	"net"
	"net/netip"
)

// Flags of TCP (RFC 9293 3.1).
const (
	tcpSYN = 0x02
	tcpACK = 0x10
)

// Protocol numbers (IANA).
const (
	protocolTCP = 6
	protocolUDP = 17
)

// tcpFrame is an Ethernet frame with a TCP segment that carries nothing.
func tcpFrame(to, from net.HardwareAddr, source, destination netip.AddrPort, flags byte) []byte {
	rest := make([]byte, 16)
	rest[8], rest[9] = 5<<4, flags
	return frame(to, from, source, destination, protocolTCP, rest)
}

// udpFrame is an Ethernet frame with an empty UDP datagram.
func udpFrame(to, from net.HardwareAddr, source, destination netip.AddrPort) []byte {
	return frame(to, from, source, destination, protocolUDP, []byte{0, 8, 0, 0})
}

// frame has rest after the ports.
func frame(to, from net.HardwareAddr, source, destination netip.AddrPort, protocol byte, rest []byte) []byte {
	frame := append(append([]byte{}, to...), from...)
	length := uint16(4 + len(rest))
	if source.Addr().Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0)
		frame = binary.BigEndian.AppendUint16(frame, 20+length)
		frame = append(frame, 0, 0, 0, 0, 64, protocol, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, length)
		frame = append(frame, protocol, 64)
	}
	frame = append(frame, source.Addr().AsSlice()...)
	frame = append(frame, destination.Addr().AsSlice()...)
	frame = binary.BigEndian.AppendUint16(frame, source.Port())
	frame = binary.BigEndian.AppendUint16(frame, destination.Port())
	return append(frame, rest...)
}
