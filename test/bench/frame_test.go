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

// tcpFrame is an Ethernet frame with a TCP segment that carries nothing.
func tcpFrame(to, from net.HardwareAddr, source, destination netip.AddrPort, flags byte) []byte {
	segment := make([]byte, 20)
	binary.BigEndian.PutUint16(segment, source.Port())
	binary.BigEndian.PutUint16(segment[2:], destination.Port())
	segment[12], segment[13] = 5<<4, flags

	frame := append(append([]byte{}, to...), from...)
	if source.Addr().Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(20+len(segment)))
		frame = append(frame, 0, 0, 0, 0, 64, 6, 0, 0)
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0)
		frame = binary.BigEndian.AppendUint16(frame, uint16(len(segment)))
		frame = append(frame, 6, 64)
	}
	frame = append(frame, source.Addr().AsSlice()...)
	frame = append(frame, destination.Addr().AsSlice()...)
	return append(frame, segment...)
}
