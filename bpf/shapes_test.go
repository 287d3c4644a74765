// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// shape is a frame between the pod and a peer, and what becomes of it on an
// endpoint isolated by [isolation]: want[direction], or want[0] for both.
type shape struct {
	name  string
	peer  host
	frame func(path) []byte
	want  []string
}

// changed is a frame with some bytes set after it was built.
func changed(build func(path) []byte, at int, b ...byte) func(path) []byte {
	return func(p path) []byte {
		frame := build(p)
		copy(frame[at:], b)
		return frame
	}
}

func with4(protocol byte, payload []byte, options ...byte) func(path) []byte {
	return func(p path) []byte { return p.v4(protocol, payload, options...) }
}

func with6(next byte, payload []byte) func(path) []byte {
	return func(p path) []byte { return p.v6(next, payload) }
}

// web is the first packet of a connection that friend is allowed.
var web = tcp(40000, 80, syn)

func commonShapes() (out []shape) {
	add := func(name string, peer host, protocol byte, payload []byte, want ...string) {
		out = append(out,
			shape{name + " v4", peer, with4(protocol, payload), want},
			shape{name + " v6", peer, with6(protocol, payload), want})
	}
	add("TCP SYN", friend, tcp6, web, "pass policy")
	add("TCP ACK", friend, tcp6, tcp(40000, 80, ack), "pass policy")
	add("TCP without flags", friend, tcp6, tcp(40000, 80, 0), "pass policy")
	add("TCP, another port", friend, tcp6, tcp(40000, 81, syn), "drop default")
	add("TCP, ports swapped", friend, tcp6, tcp(80, 40000, syn), "drop default")
	add("TCP, nobody's peer", foe, tcp6, web, "drop default")
	add("TCP SYN-ACK unasked", friend, tcp6, tcp(40000, 80, syn|ack), "pass")
	add("TCP RST unasked, denied", foe, tcp6, tcp(40000, 80, rst), "drop default")
	add("UDP", friend, udp17, udp(40000, 53), "pass policy")
	add("UDP to a TCP port", friend, udp17, udp(40000, 80), "drop default")
	add("SCTP", friend, sctp132, sctp(40000, 9), "pass policy")
	add("SCTP to a TCP port", friend, sctp132, sctp(40000, 80), "drop default")
	add("UDP-Lite has no rule", friend, udpLite, udp(40000, 53), "drop default")
	for _, protocol := range []byte{igmp, ipip, gre, esp, noNext, mobility, udpLite, 255} {
		add(fmt.Sprintf("protocol %d", protocol), friend, protocol, udp(40000, 53), "drop default")
		add(fmt.Sprintf("protocol %d", protocol), buddy, protocol, udp(40000, 53), "pass policy")
	}
	add("tiny protocol", buddy, gre, nil, "pass policy")
	return out
}

func icmpShapes() []shape {
	quoted4 := icmp(3, 3, 0, between(policy.Ingress, friend).packet4(udp17, udp(1, 2))...)
	quoted6 := icmp(1, 4, 0, between(policy.Ingress, friend).packet6(udp17, 64, udp(1, 2))...)
	return []shape{
		{"echo", friend, with4(icmp4, icmp(8, 0, 7)), []string{"drop default"}},
		{"echo", buddy, with4(icmp4, icmp(8, 0, 7)), []string{"pass policy"}},
		{"echo v6", friend, with6(icmp58, icmp(128, 0, 7)), []string{"drop default"}},
		{"echo v6", buddy, with6(icmp58, icmp(128, 0, 7)), []string{"pass policy"}},
		{"echo reply unasked", friend, with4(icmp4, icmp(0, 0, 7)), []string{"drop default"}},
		{"echo reply unasked v6", friend, with6(icmp58, icmp(129, 0, 7)), []string{"drop default"}},
		{"echo reply unasked", buddy, with4(icmp4, icmp(0, 0, 7)), []string{"pass"}},
		{"timestamp", friend, with4(icmp4, icmp(13, 0, 7)), []string{"drop default"}},
		{"timestamp", buddy, with4(icmp4, icmp(13, 0, 7)), []string{"pass"}},
		{"router advertisement v4", friend, with4(icmp4, icmp(9, 0, 7)), []string{"drop default"}},
		{"redirect v4", friend, with4(icmp4, icmp(5, 0, 7)), []string{"drop default"}},
		{"unrelated error", friend, with4(icmp4, quoted4), []string{"drop default"}},
		{"unrelated error v6", friend, with6(icmp58, quoted6), []string{"drop default"}},
		{"error about nothing", friend, with4(icmp4, icmp(3, 4, 0)), []string{"drop default"}},
		{"error about nothing v6", friend, with6(icmp58, icmp(2, 0, 0)), []string{"drop default"}},
		{"ICMPv6 over v4", friend, with4(icmp58, icmp(128, 0, 7)), []string{"drop default"}},
		{"ND over v4", friend, with4(icmp58, icmp(nsType, 0, 7)), []string{"drop default"}},
		{"ICMP over v6", friend, with6(icmp4, icmp(8, 0, 7)), []string{"drop default"}},
		{"ICMP of 4 bytes", buddy, with4(icmp4, icmp(8, 0, 7)[:4]), []string{"drop malformed"}},
		{"ICMPv6 of 4 bytes", buddy, with6(icmp58, icmp(128, 0, 7)[:4]), []string{"drop malformed"}},
	}
}

func headerShapes() []shape {
	const v4, v6 = 14, 14 // offsets of the IP headers
	plain4, plain6 := with4(tcp6, web), with6(tcp6, web)
	out := []shape{
		{"no-operation", friend, with4(tcp6, web, 1, 1, 1, 1), []string{"pass policy"}},
		{"record route", friend, with4(tcp6, web, 7, 7, 4, 0, 0, 0, 0), []string{"pass policy"}},
		{"40 bytes of options", friend, with4(tcp6, web, bytes.Repeat([]byte{1}, 40)...), []string{"pass policy"}},
		{"options, another port", friend, with4(tcp6, tcp(40000, 81, syn), 1, 1, 1, 1), []string{"drop default"}},
		{"loose source route", buddy, with4(tcp6, web, 131, 7, 4, 10, 0, 0, 9), []string{"drop source-route"}},
		{"strict source route", buddy, with4(tcp6, web, 137, 7, 4, 10, 0, 0, 9), []string{"drop source-route"}},
		{"source route behind others", buddy, with4(tcp6, web, 1, 7, 3, 4, 1, 131, 3, 4), []string{"drop source-route"}},
		{"source route of an echo", buddy, with4(icmp4, icmp(8, 0, 7), 131, 7, 4, 10, 0, 0, 9), []string{"drop source-route"}},
		{"source route after the end", friend, with4(tcp6, web, 0, 131, 7, 4), []string{"pass policy"}},
		{"option of no length", buddy, with4(tcp6, web, 7, 0, 0, 0), []string{"drop malformed"}},
		{"option of length 1", buddy, with4(tcp6, web, 7, 1, 0, 0), []string{"drop malformed"}},
		{"option without a length", buddy, with4(tcp6, web, 1, 1, 1, 7), []string{"drop malformed"}},

		{"IHL of 4", buddy, changed(plain4, v4, 0x44), []string{"drop malformed"}},
		{"IHL of 0", buddy, changed(plain4, v4, 0x40), []string{"drop malformed"}},
		{"IHL past the end", buddy, changed(with4(udp17, udp(1, 2)), v4, 0x4f), []string{"drop malformed"}},
		{"IHL that eats ports", friend, changed(plain4, v4, 0x46), []string{"drop malformed"}},
		{"version 6 as v4", buddy, changed(plain4, v4, 0x65), []string{"drop malformed"}},
		{"version 4 as v6", buddy, changed(plain6, v6, 0x40), []string{"drop malformed"}},
		{"total length of 0", buddy, changed(plain4, v4+2, 0, 0), []string{"drop malformed"}},
		{"total length less than the header", buddy, changed(plain4, v4+2, 0, 19), []string{"drop malformed"}},
		{"total length less than TCP's", buddy, changed(plain4, v4+2, 0, 39), []string{"drop malformed"}},
		{"total length past the end", buddy, changed(plain4, v4+2, 0, 41), []string{"drop malformed"}},
		{"payload length less than TCP's", buddy, changed(plain6, v6+4, 0, 19), []string{"drop malformed"}},
		{"payload length past the end", buddy, changed(plain6, v6+4, 0, 21), []string{"drop malformed"}},
		{"no payload", buddy, changed(plain6, v6+4, 0, 0), []string{"drop malformed"}},
		{"padding", friend, func(p path) []byte { return append(plain4(p), make([]byte, 6)...) }, []string{"pass policy"}},
		{"padding v6", friend, func(p path) []byte { return append(plain6(p), make([]byte, 6)...) }, []string{"pass policy"}},

		{"hop-by-hop", friend, with6(hopByHop, extension(tcp6, []byte{1, 4}, web)), []string{"pass policy"}},
		{"destination options", friend, with6(destination, extension(tcp6, make([]byte, 22), web)), []string{"pass policy"}},
		{"authentication", friend, with6(authHeader, auth(tcp6, web)), []string{"pass policy"}},
		{"authentication, another port", friend, with6(authHeader, auth(tcp6, tcp(40000, 81, syn))), []string{"drop default"}},
		{"authentication v4 has no ports", friend, with4(authHeader, auth(tcp6, web)), []string{"drop default"}},
		{"all headers", friend, with6(hopByHop, extension(destination, nil,
			extension(routing, nil, extension(authHeader, nil, auth(destination, extension(udp17, nil, udp(40000, 53))))))), []string{"pass policy"}},
		{"routing, at its end", friend, with6(routing, extension(tcp6, []byte{0, 0}, web)), []string{"pass policy"}},
		{"routing, one segment left", buddy, with6(routing, extension(tcp6, []byte{0, 1}, web)), []string{"drop source-route"}},
		{"segment routing", buddy, with6(hopByHop, extension(routing, nil, extension(tcp6, []byte{4, 255}, web))), []string{"drop source-route"}},
		{"extension past the end", buddy, changed(with6(hopByHop, extension(tcp6, nil, web)), v6+41, 9), []string{"drop malformed"}},
		{"extension without an end", buddy, with6(hopByHop, []byte{tcp6, 0}), []string{"drop malformed"}},
		{"jumbogram", buddy, changed(with6(hopByHop, extension(tcp6, []byte{0xc2, 4, 0, 1, 0, 0}, web)), v6+4, 0, 0), []string{"drop malformed"}},

		{"LLDP", buddy, func(p path) []byte { return p.ether(0x88cc, make([]byte, 46)) }, []string{"drop ethertype"}},
		{"MPLS", buddy, func(p path) []byte { return p.ether(etherMPLS, append(make([]byte, 4), p.packet4(tcp6, web)...)) }, []string{"drop ethertype"}},
		{"LLC", buddy, func(p path) []byte { return p.ether(46, make([]byte, 46)) }, []string{"drop ethertype"}},
		{"RARP", buddy, func(p path) []byte { return p.ether(etherRARP, arp(3, p.from, p.from)) }, []string{"drop ethertype"}},
		{"three tags", buddy, func(p path) []byte { return tagged(plain4(p), etherQinQ, etherVLAN, etherVLAN) }, []string{"drop ethertype"}},
		{"tag without a frame", buddy, func(p path) []byte { return p.ether(etherVLAN, nil) }, []string{"drop malformed"}},

		{"v4-mapped peer", buddy, func(p path) []byte { return mapped(p, true).v6(tcp6, web) }, []string{"drop martian"}},
		{"v4-mapped pod", buddy, func(p path) []byte { return mapped(p, false).v6(tcp6, web) }, []string{"drop martian"}},
	}
	for n, want := range map[int]string{8: "pass policy", 9: "drop extension-headers", 20: "drop extension-headers"} {
		chain := extension(tcp6, nil, web)
		for range n - 1 {
			chain = extension(destination, nil, chain)
		}
		out = append(out, shape{fmt.Sprintf("%d extension headers", n), friend, with6(destination, chain), []string{want}})
	}
	return out
}

// mapped has the IPv4 addresses of one end in the clothes of IPv6.
func mapped(p path, peer bool) path {
	for _, h := range []*host{&p.from, &p.to} {
		if (h.v4 != pod.v4) == peer {
			h.v6 = netip.AddrFrom16(h.v4.As16())
		}
	}
	return p
}

func fragmentShapes() []shape {
	long := append(slices.Clone(web), make([]byte, 12)...)
	return []shape{
		{"atomic v6", friend, with6(fragmented, fragment6(tcp6, 1, 0, false, web)), []string{"pass policy"}},
		{"atomic v6, another port", friend, with6(fragmented, fragment6(tcp6, 1, 0, false, tcp(40000, 81, syn))), []string{"drop default"}},
		{"first v4", friend, func(p path) []byte { return p.fragment4(tcp6, 2, 0, true, long) }, []string{"pass policy"}},
		{"first v6", friend, with6(fragmented, fragment6(tcp6, 2, 0, true, long)), []string{"pass policy"}},
		{"first v4, denied", foe, func(p path) []byte { return p.fragment4(tcp6, 3, 0, true, long) }, []string{"drop default"}},
		{"first v6, denied", foe, with6(fragmented, fragment6(tcp6, 3, 0, true, long)), []string{"drop default"}},
		{"tiny first v4", buddy, func(p path) []byte { return p.fragment4(tcp6, 4, 0, true, web[:8]) }, []string{"drop fragment"}},
		{"tiny first v4 UDP", buddy, func(p path) []byte { return p.fragment4(udp17, 4, 0, true, udp(1, 2)[:4]) }, []string{"drop fragment"}},
		{"tiny first v6", buddy, with6(fragmented, fragment6(tcp6, 4, 0, true, web[:16])), []string{"drop fragment"}},
		{"first v6 that ends in extensions", buddy, with6(fragmented, fragment6(destination, 4, 0, true, extension(tcp6, nil, nil))), []string{"drop fragment"}},
		{"later v4, no first", buddy, func(p path) []byte { return p.fragment4(tcp6, 5, 24, false, web) }, []string{"drop fragment"}},
		{"later v6, no first", buddy, with6(fragmented, fragment6(tcp6, 5, 24, false, web)), []string{"drop fragment"}},
		{"later v4 at 8", buddy, func(p path) []byte { return p.fragment4(tcp6, 5, 8, true, web) }, []string{"drop fragment"}},
		{"fragment header past the end", buddy, with6(fragmented, fragment6(tcp6, 1, 0, true, nil)[:6]), []string{"drop malformed"}},
	}
}

func addressShapes() []shape {
	as := func(change func(*path), build func(path) []byte) func(path) []byte {
		return func(p path) []byte {
			change(&p)
			return build(p)
		}
	}
	// the pod's end of the path, whichever way it goes
	local := func(p *path) *host {
		if p.from == pod {
			return &p.from
		}
		return &p.to
	}
	peer := func(p *path) *host {
		if p.from == pod {
			return &p.to
		}
		return &p.from
	}
	return []shape{
		{"another MAC", buddy, as(func(p *path) { local(p).mac = foe.mac }, with4(tcp6, web)), []string{"drop other-host", "drop spoofed-mac"}},
		{"another MAC v6", buddy, as(func(p *path) { local(p).mac = foe.mac }, with6(tcp6, web)), []string{"drop other-host", "drop spoofed-mac"}},
		{"broadcast MAC", buddy, as(func(p *path) { local(p).mac = [6]byte{255, 255, 255, 255, 255, 255} }, with4(tcp6, web)),
			[]string{"pass policy", "drop spoofed-mac"}},
		{"another address", buddy, as(func(p *path) { local(p).v4 = foe.v4 }, with4(tcp6, web)), []string{"pass policy", "drop spoofed-address"}},
		{"another address v6", buddy, as(func(p *path) { local(p).v6 = foe.v6 }, with6(tcp6, web)), []string{"pass policy", "drop spoofed-address"}},
		{"no address", buddy, as(func(p *path) { local(p).v4 = netip.IPv4Unspecified() }, with4(tcp6, web)), []string{"pass policy", "drop spoofed-address"}},
		{"another address, odd protocol", buddy, as(func(p *path) { local(p).v4 = foe.v4 }, with4(gre, web)), []string{"pass policy", "drop spoofed-address"}},
		{"another address, fragment", buddy, as(func(p *path) { local(p).v4 = foe.v4 }, func(p path) []byte { return p.fragment4(tcp6, 7, 24, false, web) }),
			[]string{"drop fragment", "drop spoofed-address"}},
		{"another address, error", buddy, as(func(p *path) { local(p).v4 = foe.v4 }, with4(icmp4, icmp(3, 3, 0))), []string{"pass", "drop spoofed-address"}},
		{"link-local", friend, as(func(p *path) { local(p).v6 = linkLocal }, with6(tcp6, web)), []string{"pass policy"}},
		{"link-local peer", friend, as(func(p *path) { peer(p).v6 = netip.MustParseAddr("fe80::3") }, with6(tcp6, web)), []string{"drop default"}},
		{"multicast", friend, as(func(p *path) { p.to.v4 = netip.MustParseAddr("224.0.0.251") }, with4(udp17, udp(5353, 5353))), []string{"drop default"}},
		{"multicast v6", friend, as(func(p *path) { p.to.v6 = netip.MustParseAddr("ff02::fb") }, with6(udp17, udp(5353, 5353))), []string{"drop default"}},
		{"DHCP", friend, as(func(p *path) {
			p.from.v4, p.to.v4 = netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255")
		}, with4(udp17, udp(68, 67))), []string{"drop default"}},
		{"DHCP from another", friend, as(func(p *path) { p.from.v4, p.to.v4 = foe.v4, netip.MustParseAddr("255.255.255.255") },
			with4(udp17, udp(68, 67))), []string{"drop default", "drop spoofed-address"}},
		{"outside", friend, as(func(p *path) { peer(p).v4 = netip.MustParseAddr("192.0.2.1") }, with4(tcp6, web)), []string{"drop default"}},
		{"node", node, with4(tcp6, tcp(40000, 81, syn)), []string{"drop default", "pass node"}},
		{"node v6", node, with6(tcp6, tcp(40000, 81, syn)), []string{"drop default", "pass node"}},
		{"itself", pod, with4(tcp6, tcp(40000, 81, syn)), []string{"drop spoofed-address", "pass self"}},
		{"itself v6", pod, with6(tcp6, tcp(40000, 81, syn)), []string{"drop spoofed-address", "pass self"}},
		{"itself, fragment", pod, with6(fragmented, fragment6(tcp6, 7, 24, false, web)), []string{"drop spoofed-address", "drop fragment"}},
		{"itself, error", pod, with6(icmp58, icmp(1, 4, 0)), []string{"drop spoofed-address", "pass"}},
	}
}

func allShapes() []shape {
	return slices.Concat(commonShapes(), icmpShapes(), headerShapes(), fragmentShapes(), neighbourShapes(), addressShapes())
}

func (s shape) wanted(d policy.Direction) string { return s.want[min(int(d), len(s.want)-1)] }

var directions = map[string]policy.Direction{"ingress": policy.Ingress, "egress": policy.Egress}

// clear forgets what earlier packets left, so that each is a first one.
func (l *lab) clear() {
	l.t.Helper()
	l.empty(bpf.DatapathMapFlows)
	l.empty(bpf.DatapathMapFragments)
	l.empty(bpf.DatapathMapNeighbours)
}

func (l *lab) empty(name string) {
	l.t.Helper()
	m := l.pinned(name)
	for {
		key, err := m.NextKeyBytes(nil)
		if err != nil {
			l.t.Fatal(err)
		}
		if key == nil {
			return
		}
		if err := m.Delete(key); err != nil {
			l.t.Fatal(err)
		}
	}
}

// Every shape is what it is behind VLAN tags too, where it takes another way
// through the parser.
func TestShapes(t *testing.T) {
	l := newLab(t).isolated()
	for name, d := range directions {
		for _, s := range allShapes() {
			for tags, kinds := range map[string][]uint16{"": nil, ", tagged": {etherVLAN}, ", QinQ": {etherQinQ, etherVLAN}} {
				if kinds != nil && s.name == "three tags" {
					continue
				}
				l.clear()
				frame := s.frame(between(d, s.peer))
				if kinds != nil {
					frame = tagged(frame, kinds...)
				}
				if s.name == "tag without a frame" && len(kinds) == 2 {
					continue // makes three
				}
				if got, want := l.run(d, frame), s.wanted(d); got != want {
					t.Errorf("%s %s%s: %s, not %s", name, s.name, tags, got, want)
				}
			}
		}
	}
}

// A frame cut at any byte is dropped, unless nothing but padding is missing.
func TestTruncated(t *testing.T) {
	l := newLab(t).isolated()
	for name, d := range directions {
		for _, s := range allShapes() {
			whole := s.frame(between(d, s.peer))
			if binary.BigEndian.Uint16(whole[12:]) == etherARP && d == policy.Ingress {
				continue // passes as it is: what is no use to the pod does no harm
			}
			for _, kinds := range [][]uint16{nil, {etherVLAN}} {
				frame := whole
				if kinds != nil {
					frame = tagged(whole, kinds...)
				}
				for n := shortest(frame); n < len(frame); n++ {
					got := l.run(d, frame[:n])
					passed, complete := strings.HasPrefix(got, "pass"), strings.HasPrefix(s.name, "padding") && n >= len(frame)-6
					if passed != complete {
						t.Errorf("%s %s, the first %d of %d bytes: %s", name, s.name, n, len(frame), got)
					}
					if passed {
						l.clear()
					}
				}
			}
		}
	}
}

// shortest is the least of a frame that the kernel's test run takes: all of an
// IP header that is right behind the Ethernet header.
func shortest(frame []byte) int {
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherV4:
		return 14 + 20
	case etherV6:
		return 14 + 40
	}
	return 15
}

// A header that says the packet ends before its upper layer's header does is
// not believed, however many bytes follow.
func TestLengthsLie(t *testing.T) {
	l := newLab(t).isolated()
	for _, c := range []struct {
		protocol byte
		payload  []byte
		needs    int
	}{
		{tcp6, web, 20}, {udp17, udp(40000, 53), 8}, {sctp132, sctp(40000, 9), 12}, {icmp4, icmp(8, 0, 1), 8}, {icmp58, icmp(128, 0, 1), 8},
	} {
		for n := range len(c.payload) + 1 {
			p := between(policy.Egress, buddy)
			v4, v6 := p.v4(c.protocol, c.payload), p.v6(c.protocol, c.payload)
			binary.BigEndian.PutUint16(v4[16:], uint16(20+n))
			binary.BigEndian.PutUint16(v6[18:], uint16(n))
			want := "drop malformed"
			if n >= c.needs {
				want = "pass policy"
			}
			for family, frame := range map[string][]byte{"v4": v4, "v6": v6} {
				if c.protocol == icmp4 && family == "v6" || c.protocol == icmp58 && family == "v4" {
					continue
				}
				l.clear()
				if got := l.run(policy.Egress, frame); got != want {
					t.Errorf("protocol %d %s with %d bytes of %d: %s, not %s", c.protocol, family, n, c.needs, got, want)
				}
			}
		}
	}
}

func TestLaterFragments(t *testing.T) {
	l := newLab(t).isolated()
	long := func(payload []byte) []byte { return append(slices.Clone(payload), make([]byte, 32-len(payload))...) }
	for name, d := range directions {
		other := 1 - d
		for _, c := range []struct {
			what  string
			peer  host
			first []byte
			p     byte
			later string
		}{
			{"allowed UDP", friend, udp(40000, 53), udp17, "pass"},
			{"denied UDP", friend, udp(40000, 54), udp17, "drop fragment"},
			{"allowed TCP", friend, web, tcp6, "pass"},
			{"allowed SCTP", friend, sctp(40000, 9), sctp132, "pass"},
			{"allowed protocol", buddy, udp(1, 2), gre, "pass"},
			{"denied protocol", friend, udp(1, 2), gre, "drop fragment"},
		} {
			p := between(d, c.peer)
			for family, fragment := range map[string]func(way path, id, offset uint16, more bool, payload []byte) []byte{
				"v4": func(way path, id, offset uint16, more bool, payload []byte) []byte {
					return way.fragment4(c.p, id, offset, more, payload)
				},
				"v6": func(way path, id, offset uint16, more bool, payload []byte) []byte {
					return way.v6(fragmented, fragment6(c.p, uint32(id), offset, more, payload))
				},
			} {
				l.clear()
				l.run(d, fragment(p, 9, 0, true, long(c.first)))
				for what, later := range map[string]struct {
					d     policy.Direction
					frame []byte
					want  string
				}{
					"its rest":             {d, fragment(p, 9, 32, true, make([]byte, 32)), c.later},
					"its last":             {d, fragment(p, 9, 64, false, make([]byte, 8)), c.later},
					"another datagram's":   {d, fragment(p, 10, 32, false, make([]byte, 8)), "drop fragment"},
					"one of the other way": {other, fragment(p.back(), 9, 32, false, make([]byte, 8)), "drop fragment"},
					"one of another peer":  {d, fragment(between(d, foe), 9, 32, false, make([]byte, 8)), "drop fragment"},
					"one, tagged":          {d, tagged(fragment(p, 9, 32, true, make([]byte, 32)), etherVLAN), c.later},
				} {
					if got := l.run(later.d, later.frame); got != later.want {
						t.Errorf("%s %s %s, %s: %s, not %s", name, c.what, family, what, got, later.want)
					}
				}
			}
		}
	}
}

func TestFragmentsOfAPing(t *testing.T) {
	l := newLab(t).isolated()
	big := make([]byte, 24)
	ask, answer := between(policy.Egress, buddy), between(policy.Ingress, buddy)
	for i, step := range []struct {
		d     policy.Direction
		frame []byte
		want  string
	}{
		{policy.Egress, ask.fragment4(icmp4, 1, 0, true, icmp(8, 0, 7, big...)), "pass policy"},
		{policy.Egress, ask.fragment4(icmp4, 1, 32, false, big), "pass"},
		{policy.Ingress, answer.fragment4(icmp4, 2, 0, true, icmp(0, 0, 7, big...)), "pass"},
		{policy.Ingress, answer.fragment4(icmp4, 2, 32, false, big), "pass"},
		{policy.Ingress, answer.fragment4(icmp4, 3, 32, false, big), "drop fragment"},
	} {
		if got := l.run(step.d, step.frame); got != step.want {
			t.Errorf("step %d: %s, not %s", i, got, step.want)
		}
	}
}

// What the gate itself decides comes before any policy.
func TestGates(t *testing.T) {
	syn4 := func(p path) []byte { return p.v4(tcp6, web) }
	type step struct {
		name  string
		peer  host
		frame func(path) []byte
		from  int // interface; -1: the uplink
		want  []string
	}
	probes := []step{
		{"TCP", friend, syn4, -1, nil},
		{"ARP", friend, func(p path) []byte { return p.ether(etherARP, arp(1, pod, friend)) }, -1, nil},
		{"node", node, syn4, 0, nil},
		{"LLDP", friend, func(p path) []byte { return p.ether(0x88cc, make([]byte, 46)) }, -1, nil},
		{"later fragment", friend, func(p path) []byte { return p.fragment4(tcp6, 5, 24, false, web) }, -1, nil},
		{"source route", friend, with4(tcp6, web, 131, 7, 4, 10, 0, 0, 9), -1, nil},
		{"unrelated error", friend, with4(icmp4, icmp(3, 3, 0)), -1, nil},
		{"another MAC", friend, func(p path) []byte {
			if p.from == pod {
				p.from.mac = foe.mac
			} else {
				p.to.mac = foe.mac
			}
			return p.v4(tcp6, web)
		}, -1, nil},
	}
	for name, c := range map[string]struct {
		gate func(*lab)
		want [][]string
	}{
		"closed": {func(l *lab) { l.gate() }, [][]string{
			{"drop closed"}, {"pass"}, {"pass node"}, {"drop ethertype"}, {"drop fragment"}, {"drop source-route"}, {"drop closed"},
			{"drop other-host", "drop spoofed-mac"},
		}},
		"open": {func(l *lab) { l.gate(func(r *pinning.AddRequest) { r.Mode = pinning.ModeOpen }) }, [][]string{
			{"pass open"}, {"pass"}, {"pass node", "pass open"}, {"pass"}, {"pass"}, {"drop source-route"}, {"pass"},
			{"drop other-host", "drop spoofed-mac"},
		}},
		"open, may spoof": {func(l *lab) {
			l.gate(func(r *pinning.AddRequest) { r.Mode, r.AntiSpoof = pinning.ModeOpen, false })
		}, [][]string{
			{"pass open"}, {"pass"}, {"pass node", "pass open"}, {"pass"}, {"pass"}, {"drop source-route"}, {"pass"}, {"pass open"},
		}},
		"audited": {func(l *lab) {
			l.gate(func(r *pinning.AddRequest) { r.Audit = true })
		}, [][]string{
			{"audit closed"}, {"pass"}, {"pass node"}, {"audit ethertype"}, {"audit fragment"}, {"audit source-route"}, {"audit closed"},
			{"pass", "drop spoofed-mac"},
		}},
		"none": {func(*lab) {}, [][]string{
			{"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"}, {"drop no-gate"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			c.gate(l)
			for direction, d := range directions {
				for i, s := range probes {
					l.clear()
					at := arrival{l.gated, l.uplink}
					if s.from == 0 {
						at.from = 0
					}
					want := c.want[i][min(int(d), len(c.want[i])-1)]
					if got, _ := l.runAt(d, s.frame(between(d, s.peer)), at); got != want {
						t.Errorf("%s %s: %s, not %s", direction, s.name, got, want)
					}
				}
			}
		})
	}
}

// What a pod sends to itself may come back through its own port, as hairpins
// do, and nowhere else.
func TestHairpin(t *testing.T) {
	for name, change := range map[string]func(*pinning.AddRequest){
		"may not spoof": func(*pinning.AddRequest) {},
		"may spoof":     func(r *pinning.AddRequest) { r.AntiSpoof = false },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t).isolated(change)
			for family, frame := range map[string][]byte{
				"v4": path{pod, pod}.v4(tcp6, tcp(40000, 81, syn)), "v6": path{pod, pod}.v6(tcp6, tcp(40000, 81, syn)),
			} {
				if got, _ := l.runAt(policy.Ingress, frame, arrival{l.gated, l.gated}); got != "pass self" {
					t.Errorf("%s through its own port: %s", family, got)
				}
				l.clear()
				if got, _ := l.runAt(policy.Ingress, frame, arrival{l.gated, l.uplink}); got != "drop spoofed-address" {
					t.Errorf("%s through another: %s", family, got)
				}
			}
		})
	}
}

func TestOtherInterfacesAreNotGated(t *testing.T) {
	l := newLab(t).isolated()
	for _, d := range directions {
		frame := between(d, friend).v4(tcp6, web)
		if got, _ := l.runAt(d, frame, arrival{l.uplink, l.gated}); got != "drop no-gate" {
			t.Errorf("direction %d on another interface: %s", d, got)
		}
	}
}
