// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// families that pods have addresses of.
var families = []int{4, 6}

// testOpenConnections: a policy made while connections are open lets the
// answers to the pod's own through, and ends those that it denies.
func testOpenConnections(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"})
	client, server := pods[0], pods[1]
	var streams []*stream
	for _, a := range server.Addresses {
		for _, network := range []string{"tcp", "udp"} {
			streams = append(streams, l.open(client, network, netip.AddrPortFrom(a, 8080)))
		}
	}
	l.policy(`
metadata: { name: client-takes-nothing }
spec: { podSelector: { matchLabels: { pod: client } } }
`)
	l.expect(reaches(dropped, client, 8080, server)) // it is in force
	for range 3 {
		for _, c := range streams {
			if got := c.exchange(); got != answered {
				t.Errorf("connection to %s, opened before the client was isolated: %s", c.RemoteAddr(), got)
			}
		}
	}
	l.policy(`
metadata: { name: server-takes-nothing }
spec: { podSelector: { matchLabels: { pod: server } } }
`)
	l.expect(reaches(dropped, server, 8080, client))
	for _, c := range streams {
		if got := c.exchange(); got != dropped {
			t.Errorf("connection to %s, opened before the server was isolated: %s", c.RemoteAddr(), got)
		}
	}
}

// testRepliesNeedNoRule: who may be asked may answer, isolated for egress or
// not, over TCP, UDP and SCTP.
func testRepliesNeedNoRule(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"})
	client, server := pods[0], pods[1]
	l.policy(`
metadata: { name: server-asks-nobody }
spec:
  podSelector: { matchLabels: { pod: server } }
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{ podSelector: { matchLabels: { pod: client } } }]
    ports: [{ port: 8080 }, { port: 8080, protocol: UDP }, { port: 8080, protocol: SCTP }]
`)
	l.expect(
		reaches(answered, server, 8080, client),
		reaches(dropped, server, 8081, client),
		reaches(dropped, client, 8080, server),
	)
	for _, family := range families {
		atClient, atServer := l.listenRaw(client, family, 132), l.listenRaw(server, family, 132)
		question, answer := sctpInit(40000, 8080), sctpInit(8080, 40000)
		atClient.send(server, question)
		if !atServer.receives(client, question) {
			t.Errorf("IPv%d: no SCTP to a port that is allowed", family)
		}
		atServer.send(client, answer)
		if !atClient.receives(server, answer) {
			t.Errorf("IPv%d: no SCTP answer", family)
		}
		other := sctpInit(40000, 8081)
		atClient.send(server, other)
		if atServer.receives(client, other) {
			t.Errorf("IPv%d: SCTP to a port that is not allowed", family)
		}
		unasked := sctpInit(8080, 40001)
		atServer.send(client, unasked)
		if atClient.receives(server, unasked) {
			t.Errorf("IPv%d: SCTP of a pod that may ask nobody", family)
		}
	}
}

// sctpInit is a packet with an INIT chunk (RFC 9260 3.3.2). That is enough: the
// kernel need not know the protocol.
func sctpInit(from, to uint16) []byte {
	b := make([]byte, 12+20)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	b[12] = 1 // INIT
	binary.BigEndian.PutUint16(b[14:], 20)
	binary.BigEndian.PutUint32(b[16:], 0x70676174) // initiate tag
	binary.BigEndian.PutUint32(b[20:], 1<<16)      // window
	binary.BigEndian.PutUint16(b[24:], 1)          // streams
	binary.BigEndian.PutUint16(b[26:], 1)
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b[8:], sum)
	return b
}

// rawSocket sends and receives packets of one IP protocol in a pod.
type rawSocket struct {
	*net.IPConn
	t      *testing.T
	family int
}

func (l *lab) listenRaw(p *pod, family, protocol int) *rawSocket {
	l.t.Helper()
	var c net.PacketConn
	err := p.Do(func() (err error) {
		c, err = net.ListenPacket(fmt.Sprintf("ip%d:%d", family, protocol), p.address(family).String())
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	return &rawSocket{c.(*net.IPConn), l.t, family}
}

func (r *rawSocket) send(to *pod, packet []byte) {
	r.t.Helper()
	address := &net.IPAddr{IP: to.address(r.family).AsSlice()}
	if _, err := r.WriteTo(packet, address); err != nil {
		r.t.Fatal(err)
	}
}

// receives tells whether a packet arrives from a pod.
func (r *rawSocket) receives(from *pod, packet []byte) bool {
	r.t.Helper()
	if err := r.SetReadDeadline(time.Now().Add(dialTimeout)); err != nil {
		r.t.Fatal(err)
	}
	buffer := make([]byte, 65536)
	for {
		n, address, err := r.ReadFrom(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil {
			r.t.Fatal(err)
		}
		sender, _ := netip.AddrFromSlice(address.(*net.IPAddr).IP)
		if sender.Unmap() == from.address(r.family) && string(buffer[:n]) == string(packet) {
			return true
		}
	}
}

// testSourcePortReuse: a connection from a port that another one had is judged
// by itself.
func testSourcePortReuse(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"})
	client, server := pods[0], pods[1]
	dial := func(to netip.AddrPort) (outcome, error) {
		from := netip.AddrPortFrom(client.address(family(to)), 33333)
		var c net.Conn
		err := client.Do(func() (err error) {
			d := net.Dialer{Timeout: dialTimeout, LocalAddr: net.TCPAddrFromAddrPort(from)}
			c, err = d.Dial("tcp", to.String())
			return err
		})
		if err != nil {
			return classify(err)
		}
		defer c.Close()
		if err := c.(*net.TCPConn).SetLinger(0); err != nil { // a RST, and the port is free
			return "", err
		}
		return exchange(c)
	}
	becomes := func(what string, want outcome) {
		t.Helper()
		for _, a := range server.Addresses {
			to := netip.AddrPortFrom(a, 8080)
			check := func(context.Context) error {
				got, err := dial(to)
				if err == nil && got != want {
					err = fmt.Errorf("%s: %s, must be %s", to, got, want)
				}
				return err
			}
			l.eventually(what, check)
			for range 5 {
				if err := check(t.Context()); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
		}
	}
	becomes("before any policy", answered)
	l.policy(isolated)
	becomes("isolated", dropped)
	l.deletePolicy("isolated")
	becomes("not isolated any more", answered)
}

func family(to netip.AddrPort) int {
	if to.Addr().Is4() {
		return 4
	}
	return 6
}

// testForgedReplies: what looks like an answer, and answers nothing, opens no
// way: not for the pod that sends it, and not back to it.
func testForgedReplies(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(
		podSpec{name: "jailed", node: "n1"}, podSpec{name: "outside", node: "n2"},
	)
	jailed, outside := pods[0], pods[1]
	l.policy(`
metadata: { name: jailed }
spec: { podSelector: { matchLabels: { pod: jailed } }, policyTypes: [Ingress, Egress] }
`)
	l.expect(reaches(dropped, jailed, 8080, outside), reaches(dropped, outside, 8080, jailed))
	const tcp = 6
	for _, family := range families {
		inside, out := l.listenRaw(jailed, family, tcp), l.listenRaw(outside, family, tcp)
		for name, flags := range map[string]byte{"SYN+ACK": 0x12, "ACK": 0x10, "RST": 0x04, "FIN+ACK": 0x11, "none": 0} {
			reply := tcpSegment(8080, 45000, flags, jailed.address(family), outside.address(family))
			inside.send(outside, reply)
			if out.receives(jailed, reply) {
				t.Errorf("IPv%d: a TCP segment with %s gets out", family, name)
			}
			question := tcpSegment(45000, 8080, flags, outside.address(family), jailed.address(family))
			out.send(jailed, question)
			if inside.receives(outside, question) {
				t.Errorf("IPv%d: a TCP segment with %s gets in", family, name)
			}
		}
	}
	// After all that there is still no way through, with those ports.
	l.expect(reaches(dropped, jailed, 8080, outside), reaches(dropped, outside, 8080, jailed))
}

// tcpSegment is a header alone (RFC 9293 3.1).
func tcpSegment(from, to uint16, flags byte, src, dst netip.Addr) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	binary.BigEndian.PutUint32(b[4:], 0x70676174)
	binary.BigEndian.PutUint32(b[8:], 1)
	b[12], b[13] = 5<<4, flags
	binary.BigEndian.PutUint16(b[14:], 1024)
	binary.BigEndian.PutUint16(b[16:], checksum(b, 6, src, dst))
	return b
}

// checksum of a segment with its pseudo-header (RFC 1071, RFC 8200 8.1).
func checksum(segment []byte, protocol byte, src, dst netip.Addr) uint16 {
	data := append(src.AsSlice(), dst.AsSlice()...)
	data = append(data, 0, protocol, 0, byte(len(segment)))
	data = append(data, segment...)
	var sum uint32
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// testOtherProtocols: ping is no more allowed than what has ports; neighbour
// discovery and errors about flows that are allowed pass.
func testOtherProtocols(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"}, podSpec{name: "near", node: "n1"})
	client, server, near := pods[0], pods[1], pods[2]
	for _, f := range families {
		if !ping(t, client, server.address(f)) {
			t.Errorf("IPv%d: no ping before any policy", f)
		}
	}
	l.policy(isolated)
	l.policy(`
metadata: { name: ports-only }
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{ ports: [{ port: 8080 }, { port: 8080, protocol: UDP }] }]
  egress: [{ ports: [{ port: 8080 }, { port: 8080, protocol: UDP }] }]
`)
	l.expect(reaches(dropped, server, 8081, client))
	for _, f := range families {
		for _, to := range []*pod{server, near} {
			if ping(t, client, to.address(f)) {
				t.Errorf("IPv%d: ping from client to %s, which are isolated", f, to.Name)
			}
		}
	}
	// Nobody knows anybody's link address any more.
	for _, p := range pods {
		if err := p.flushNeighbours(); err != nil {
			t.Fatal(err)
		}
	}
	l.expect(reaches(answered, server, 8080, client), reaches(answered, near, 8080, client))

	// The other node is a router whose next link takes less: it says so.
	shrink := func(mtu string) {
		t.Helper()
		for _, route := range []string{
			"10.244.2.0/24 dev cni0 proto kernel scope link src 10.244.2.1",
			"fd00:10:244:2::/64 dev cni0 proto kernel metric 256",
		} {
			args := append([]string{"route", "change"}, strings.Fields(route+mtu)...)
			if _, err := l.Nodes[1].Exec(context.WithoutCancel(t.Context()), "/bin/ip", args...); err != nil {
				t.Error(err)
			}
		}
	}
	shrink(" mtu 1300")
	defer shrink("")
	for _, a := range server.Addresses {
		c, err := client.dial("tcp", netip.AddrPortFrom(a, 8080))
		if err != nil {
			t.Error(err)
			continue
		}
		const size = 256 << 10
		if n, err := transfer(c, size); n != size || err != nil {
			t.Errorf("%s: %d bytes of %d through a smaller link: %v", a, n, size, err)
		}
		c.Close()
	}
}

// ping tells whether an echo request is answered.
func ping(t *testing.T, from *pod, to netip.Addr) bool {
	t.Helper()
	network, protocol := "ip4:icmp", 1
	var request, reply icmp.Type = ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply
	if to.Is6() {
		network, protocol = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	var c *icmp.PacketConn
	err := from.Do(func() (err error) {
		c, err = icmp.ListenPacket(network, from.address(map[bool]int{true: 4, false: 6}[to.Is4()]).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	message := icmp.Message{Type: request, Body: &icmp.Echo{ID: 0x7067, Seq: 1, Data: []byte("podgate")}}
	b, err := message.Marshal(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(dialTimeout)); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		if m, err := icmp.ParseMessage(protocol, buffer[:n]); err == nil && m.Type == reply {
			return true
		}
	}
}

// testFragments: a datagram in fragments is judged as a whole one is, and so is
// its answer.
func testFragments(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"}, podSpec{name: "near", node: "n1"})
	client := pods[0]
	l.policy(isolated)
	l.policy(`
metadata: { name: one-port }
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{ ports: [{ port: 8080, protocol: UDP }] }]
  egress: [{ ports: [{ port: 8080, protocol: UDP }, { port: 8081, protocol: UDP }] }]
`)
	udp := func(want outcome, to *pod, port uint16) (probes []probe) {
		for _, p := range reaches(want, to, port, client) {
			if p.network == "udp" {
				probes = append(probes, p)
			}
		}
		return probes
	}
	for _, server := range pods[1:] {
		l.expect(udp(answered, server, 8080), udp(dropped, server, 8081))
		for _, a := range server.Addresses {
			for port, want := range map[uint16]bool{8080: true, 8081: false} {
				c, err := client.dial("udp", netip.AddrPortFrom(a, port))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				question := make([]byte, 5000)
				if _, err := c.Write(question); err != nil {
					t.Fatal(err)
				}
				if err := c.SetReadDeadline(time.Now().Add(dialTimeout)); err != nil {
					t.Fatal(err)
				}
				n, err := c.Read(make([]byte, 65536))
				if got := err == nil && n == len(question); got != want {
					t.Errorf("%d bytes to %s port %d: answered %t, want %t (%v)", len(question), a, port, got, want, err)
				}
			}
		}
	}
}

// testDropsAreSilent: nobody is told that a packet was denied, whichever side
// denies it and whether or not anybody listens there.
func testDropsAreSilent(t *testing.T, s *suite) {
	l := s.lab(t)
	pods := l.newPods(podSpec{name: "client", node: "n1"}, podSpec{name: "server", node: "n2"}, podSpec{name: "free", node: "n2"})
	client, server, free := pods[0], pods[1], pods[2]
	const nobody = 9999
	l.expect(reaches(refused, server, nobody, client)) // else it shows nothing
	l.policy(`
metadata: { name: server-takes-nothing }
spec: { podSelector: { matchLabels: { pod: server } } }
`)
	l.expect(reaches(dropped, server, 8080, client), reaches(dropped, server, nobody, client))
	l.policy(`
metadata: { name: client-asks-nothing }
spec: { podSelector: { matchLabels: { pod: client } }, policyTypes: [Egress] }
`)
	l.expect(reaches(dropped, free, 8080, client), reaches(dropped, free, nobody, client))
}
