// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/netlab"
)

// ruler is another tool's program behind podgate's on a veth: it measures the
// big packets that podgate lets through.
type ruler struct{ m *ebpf.Map }

// big is from which length on the ruler measures.
const big = 3000

func newRuler(s *street, name string, parent uint32) ruler {
	s.t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	s.must(err)
	s.t.Cleanup(func() { _ = m.Close() })
	// Offsets are those of struct __sk_buff (linux/bpf.h).
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "ruler", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 76, asm.Word), // data
		asm.LoadMem(asm.R3, asm.R1, 80, asm.Word), // data_end
		asm.LoadMem(asm.R4, asm.R1, 0, asm.Word),  // len
		asm.JLT.Imm(asm.R4, big, "out"),
		asm.Sub.Reg(asm.R3, asm.R2),
		asm.LoadMapValue(asm.R5, m.FD(), 0),
		asm.StoreMem(asm.R5, 0, asm.R3, asm.Word),
		asm.LoadMem(asm.R2, asm.R5, 4, asm.Word),
		asm.JLT.Reg(asm.R4, asm.R2, "out"),
		asm.StoreMem(asm.R5, 4, asm.R4, asm.Word),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), // TC_ACT_UNSPEC
		asm.Return(),
	}})
	s.must(err)
	s.t.Cleanup(func() { _ = p.Close() })
	s.must(s.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: l.Attrs().Index, Parent: parent, Handle: 1, Priority: math.MaxUint16, Protocol: unix.ETH_P_ALL,
			},
			Fd: p.FD(), Name: "ruler", DirectAction: true,
		})
	}))
	return ruler{m}
}

// read gives the bytes at hand of the last big packet, and the length of the
// biggest one; it starts anew.
func (r ruler) read(s *street) (linear, longest uint32) {
	s.t.Helper()
	var v [2]uint32
	s.must(r.m.Lookup(uint32(0), &v))
	s.must(r.m.Put(uint32(0), [2]uint32{}))
	return v[0], v[1]
}

// everywhere changes every interface of a street.
func (s *street) everywhere(change func(netlink.Link) error) {
	s.t.Helper()
	namespaces := []doer{s}
	for _, p := range s.pods {
		namespaces = append(namespaces, p)
	}
	for _, in := range namespaces {
		s.must(in.Do(func() error {
			links, err := netlink.LinkList()
			for _, l := range links {
				if l.Type() == "veth" || l.Type() == "bridge" {
					err = errors.Join(err, change(l))
				}
			}
			return err
		}))
	}
}

// inject has a pod send a frame of which only the first bytes are at hand in
// the kernel, the rest in pages: the header of PACKET_VNET_HDR says how many.
func (p *resident) inject(frame []byte, linear int) error {
	return p.Do(func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		header := make([]byte, 10) // struct virtio_net_hdr
		binary.NativeEndian.PutUint16(header[2:], uint16(linear))
		return unix.Sendto(fd, append(header, frame...), 0, &unix.SockaddrLinklayer{Ifindex: l.Index})
	})
}

// checksum of RFC 1071 over several parts, each of even length but the last.
func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, b := range parts {
		if len(b)%2 != 0 {
			b = append(slices.Clone(b), 0)
		}
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum > math.MaxUint16 {
		sum = sum&math.MaxUint16 + sum>>16
	}
	return ^uint16(sum)
}

// sealed4 is a frame with the header checksum that hosts ask for.
func sealed4(frame []byte) []byte {
	header := frame[14 : 14+int(frame[14]&0xf)*4]
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	return frame
}

// datagram to a UDP port, with the checksum that IPv6 wants (RFC 8200 8.1).
func (p path) datagram(v6 bool, source, destination uint16, payload []byte) []byte {
	b := append(udp(source, destination)[:8], payload...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
	b[6], b[7] = 0, 0
	if v6 {
		pseudo := []byte{0, 0, byte(len(b) >> 8), byte(len(b)), 0, udp17}
		binary.BigEndian.PutUint16(b[6:], checksum(p.from.v6.AsSlice(), p.to.v6.AsSlice(), pseudo, b))
	}
	return b
}

// Headers that are not at hand are judged as if they were.
func TestHeadersInPages(t *testing.T) {
	for name, bridged := range map[string]bool{"bridged": true, "routed": false} {
		t.Run(name, func(t *testing.T) { testHeadersInPages(t, bridged) })
	}
}

func testHeadersInPages(t *testing.T, bridged bool) {
	s := newStreet(t, bridged)
	s.everywhere(func(l netlink.Link) error { return netlink.LinkSetMTU(l, 9000) })
	s.enforce(webPolicy(8080))
	s.serve("web", nil, 8053)
	client := s.pods["client"]
	out, in := newRuler(s, "client", netlink.HANDLE_MIN_INGRESS), newRuler(s, "web", netlink.HANDLE_MIN_EGRESS)

	// Where frames go: to the pod, or to the router on the way.
	gateway := pod
	if !bridged {
		s.must(s.Do(func() error {
			l, err := netlink.LinkByName("client")
			if err != nil {
				return err
			}
			gateway.mac = [6]byte(l.Attrs().HardwareAddr)
			return nil
		}))
	}
	way := path{friend, gateway}
	listen := func(local netip.Addr) *net.UDPConn {
		t.Helper()
		var c *net.UDPConn
		s.must(client.Do(func() (err error) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0)))
			return err
		}))
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	answers := map[bool]*net.UDPConn{false: listen(friend.v4), true: listen(friend.v6)}
	payload := make([]byte, 5000)
	count := func() map[string]uint64 {
		t.Helper()
		drops, err := s.state.DropCounters()
		s.must(err)
		out := map[string]uint64{}
		for _, d := range drops {
			out[d.Direction.String()+" "+d.Reason.String()] = d.Packets
		}
		return out
	}

	for _, c := range []struct {
		name string
		v6   bool
		// frame from a port, or a drop of it.
		frame func(p path, from uint16) []byte
		drop  string
	}{
		{"UDP v4", false, func(p path, from uint16) []byte { return sealed4(p.v4(udp17, p.datagram(false, from, 8053, payload))) }, ""},
		{"UDP v6", true, func(p path, from uint16) []byte { return p.v6(udp17, p.datagram(true, from, 8053, payload)) }, ""},
		{"options", false, func(p path, from uint16) []byte {
			return sealed4(p.v4(udp17, p.datagram(false, from, 8053, payload), 1, 1, 1, 1))
		}, ""},
		{"extension headers", true, func(p path, from uint16) []byte {
			return p.v6(destination, extension(destination, nil, extension(udp17, nil, p.datagram(true, from, 8053, payload))))
		}, ""},
		{"another port v4", false, func(p path, from uint16) []byte { return sealed4(p.v4(udp17, p.datagram(false, from, 8054, payload))) }, "ingress default"},
		{"another port v6", true, func(p path, from uint16) []byte { return p.v6(udp17, p.datagram(true, from, 8054, payload)) }, "ingress default"},
		{"TCP to another port", false, func(p path, from uint16) []byte {
			return sealed4(p.v4(tcp6, append(tcp(from, 8081, syn), payload...)))
		}, "ingress default"},
		{"another's address v4", false, func(p path, from uint16) []byte {
			p.from.v4 = foe.v4
			return sealed4(p.v4(udp17, p.datagram(false, from, 8053, payload)))
		}, "egress spoofed-address"},
		{"another's address v6", true, func(p path, from uint16) []byte {
			p.from.v6 = foe.v6
			return p.v6(udp17, p.datagram(true, from, 8053, payload))
		}, "egress spoofed-address"},
		{"another's MAC", false, func(p path, from uint16) []byte {
			p.from.mac = foe.mac
			return sealed4(p.v4(udp17, p.datagram(false, from, 8053, payload)))
		}, "egress spoofed-mac"},
		{"source route", false, func(p path, from uint16) []byte {
			return sealed4(p.v4(udp17, p.datagram(false, from, 8053, payload), 131, 7, 4, 10, 0, 0, 9))
		}, "egress source-route"},
		{"routing header", true, func(p path, from uint16) []byte {
			return p.v6(routing, extension(udp17, []byte{0, 1}, p.datagram(true, from, 8053, payload)))
		}, "egress source-route"},
		{"advertisement for another", true, func(p path, _ uint16) []byte {
			return p.hop6(icmp58, 255, append(nd(naType, foe.v6, 2, p.from.mac), payload...))
		}, "egress spoofed-neighbour"},
		{"ARP for another", false, func(p path, _ uint16) []byte {
			return append(p.ether(etherARP, arp(2, host{p.from.mac, foe.v4, foe.v6}, p.to)), payload...)
		}, "egress spoofed-neighbour"},
	} {
		socket := answers[c.v6]
		from := uint16(socket.LocalAddr().(*net.UDPAddr).Port)
		frame := c.frame(way, from)
		// Cut at each of the edges of headers, and next to them.
		for _, linear := range []int{14, 15, 30, 33, 34, 37, 41, 42, 43, 53, 54, 55, 62, 70, 86} {
			before := count()
			s.must(client.inject(frame, linear))
			what := fmt.Sprintf("%s, %d bytes at hand", c.name, linear)
			if c.drop != "" {
				deadline := time.Now().Add(patience(true))
				for count()[c.drop] != before[c.drop]+1 {
					if time.Now().After(deadline) {
						t.Fatalf("%s: drops were %v, are %v", what, before, count())
					}
					time.Sleep(time.Millisecond)
				}
				continue
			}
			s.must(socket.SetReadDeadline(time.Now().Add(patience(true))))
			if n, err := socket.Read(make([]byte, 100)); err != nil || n == 0 {
				t.Fatalf("%s: no answer: %v; drops were %v, are %v", what, err, before, count())
			}
			if got, _ := out.read(s); got != uint32(linear) {
				t.Errorf("%s: from_pod had %d", what, got)
			}
			// Bridge and router have looked at the IP headers since.
			if got, _ := in.read(s); got < 14 || got > max(uint32(linear), 62) {
				t.Errorf("%s: to_pod had %d", what, got)
			}
		}
	}
	for f, err := range s.state.Flows() {
		s.must(err)
		if f.Local.Port() == 8053 && (f.Verdict != flow.Allowed || f.Direction != policy.Ingress) {
			t.Errorf("flow %+v", f)
		}
	}
}

// A lot of data comes in pages, and in packets far above the MTU, some longer
// than their headers can say ("BIG TCP").
func TestBulk(t *testing.T) {
	const (
		size    = 16 << 20
		bigSize = 180000
	)
	file := filepath.Join(t.TempDir(), "bulk")
	content := make([]byte, size)
	for i := 0; i < size; i += 8 {
		binary.NativeEndian.PutUint64(content[i:], uint64(i)*0x9e3779b97f4a7c15)
	}
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(content)
	for name, bridged := range map[string]bool{"bridged": true, "routed": false} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, bridged)
			canV6, err := netlab.KernelAtLeast(5, 19)
			s.must(err)
			// Linux takes the header that says the length for part of each
			// segment, and so for too big to forward.
			canV6 = canV6 && bridged
			canV4, err := netlab.KernelAtLeast(6, 3)
			s.must(err)
			s.everywhere(func(l netlink.Link) (err error) {
				if canV6 {
					err = errors.Join(netlink.LinkSetGSOMaxSize(l, bigSize), netlink.LinkSetGROMaxSize(l, bigSize))
				}
				if canV4 {
					err = errors.Join(err, netlink.LinkSetGSOIPv4MaxSize(l, bigSize), netlink.LinkSetGROIPv4MaxSize(l, bigSize))
				}
				return err
			})
			s.enforce(webPolicy(8080))
			r := newRuler(s, "web", netlink.HANDLE_MIN_EGRESS)
			web, client := s.pods["web"], s.pods["client"]
			var l net.Listener
			s.must(web.Do(func() (err error) {
				l, err = net.Listen("tcp", ":8080")
				return err
			}))
			t.Cleanup(func() { _ = l.Close() })
			for _, a := range []netip.Addr{web.v4, web.v6} {
				can := a.Is4() && canV4 || a.Is6() && canV6
				// How long packets get is the sender's choice, from one
				// moment to the next.
				longest, deadline := uint32(0), time.Now().Add(patience(true))
				for {
					for how, send := range map[string]func(io.Writer, *os.File) (int64, error){
						"sendfile": func(c io.Writer, f *os.File) (int64, error) { return io.Copy(c, f) },
						"write":    func(c io.Writer, f *os.File) (int64, error) { return io.Copy(c, struct{ io.Reader }{f}) },
					} {
						sum := sha256.New()
						received := make(chan error, 1)
						go func() { received <- receive(l, sum) }()
						c, err := dial(client, "tcp", netip.AddrPortFrom(a, 8080), patience(true))
						s.must(err)
						s.must(transfer(c, file, send))
						s.must(<-received)
						if [sha256.Size]byte(sum.Sum(nil)) != want {
							t.Errorf("%s to %s: something else arrived", how, a)
						}
						linear, length := r.read(s)
						if linear >= length {
							t.Errorf("%s to %s: all %d bytes were at hand", how, a, length)
						}
						longest = max(longest, length)
					}
					if (longest > 65600) == can {
						break
					}
					if !can || time.Now().After(deadline) {
						t.Fatalf("to %s: the longest packet had %d bytes", a, longest)
					}
				}
			}
		})
	}
}

func receive(l net.Listener, sum hash.Hash) error {
	c, err := l.Accept()
	if err != nil {
		return err
	}
	_, err = io.Copy(sum, c)
	return errors.Join(err, c.Close())
}

func transfer(c net.Conn, path string, send func(io.Writer, *os.File) (int64, error)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	_, err = send(c, f)
	return errors.Join(err, c.Close(), f.Close())
}
