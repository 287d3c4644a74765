// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// street is a node with pods whose kernels talk over real veths.
type street struct {
	*netlab.Node
	t        *testing.T
	state    *pinning.State
	compiler *policy.Compiler
	pods     map[string]*resident
}

// resident is a pod with a network namespace of its own.
type resident struct {
	*netlab.Pod
	host
}

var residents = map[string]host{"web": pod, "client": friend, "stranger": foe}

// patience is how long to wait for what is expected to come, or not to.
func patience(allowed bool) time.Duration {
	if allowed {
		return 10 * time.Second
	}
	return 400 * time.Millisecond
}

func newStreet(t *testing.T, bridged bool) *street { return newStreetOf(t, bridged, residents) }

func newStreetOf(t *testing.T, bridged bool, residents map[string]host) *street {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and eBPF need root")
	}
	t.Parallel()
	n, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s := &street{Node: n, t: t, compiler: policy.NewCompiler(), pods: map[string]*resident{}}
	t.Cleanup(func() { s.must(n.Close()) })
	s.state, err = pinning.Ensure(t.Context(), pinning.Options{
		Layout:   pinning.Layout{BPFFS: n.BPFFS, Name: "podgate"},
		Capacity: pinning.Capacity{Endpoints: 16, Flows: 4096, Peers: 256, Blocks: 64, Cells: 256, Rules: 64, Fragments: 256, EventBytes: 1 << 16},
	})
	s.must(err)
	s.compiler.SetNamespace(policy.Namespace{Name: "ns"})
	s.must(n.Do(func() error { return prepareNode(bridged) }))
	for name, h := range residents {
		s.must(s.compiler.SetPod(policy.Pod{
			Key: policy.PodKey("uid-" + name), UID: "uid-" + name, Namespace: "ns", Name: name,
			Labels: map[string]string{"name": name}, Addresses: []netip.Addr{h.v4, h.v6}, Local: true,
		}))
		s.settle(name, h, bridged)
	}
	s.apply()
	for name, p := range s.pods {
		s.gate(name, p)
	}
	return s
}

func (s *street) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *street) apply() {
	s.t.Helper()
	done, err := s.state.Apply(s.t.Context(), s.compiler.Compile())
	s.must(errors.Join(append(done.Problems, err)...))
}

// prepareNode makes the node forward, and the bridge if there is to be one.
func prepareNode(bridged bool) error {
	for _, key := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+key, []byte("1"), 0); err != nil {
			return err
		}
	}
	if !bridged {
		return nil
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := netlink.LinkAdd(br); err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(br), address(br, node, 24, 64))
}

func address(l netlink.Link, h host, bits4, bits6 int) error {
	for _, a := range []struct {
		netip.Addr
		bits int
	}{{h.v4, bits4}, {h.v6, bits6}} {
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.bits, a.BitLen())}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	return nil
}

func route(l netlink.Link, to, via netip.Addr, bits int) error {
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(bits, to.BitLen())}}
	if via.IsValid() {
		r.Gw = via.AsSlice()
	} else {
		r.Scope = netlink.SCOPE_LINK
	}
	return netlink.RouteAdd(r)
}

// settle gives a pod its veth, as the bridge and ptp plugins do.
func (s *street) settle(name string, h host, bridged bool) {
	s.t.Helper()
	p, err := netlab.NewPod(netlab.PodSpec{Namespace: "ns", Name: name})
	s.must(err)
	s.t.Cleanup(func() { s.must(p.Close()) })
	s.pods[name] = &resident{p, h}
	ns, err := os.Open(p.NetNS())
	s.must(err)
	defer ns.Close()
	var none netip.Addr
	s.must(s.Do(func() error {
		pair := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0",
			PeerNamespace: netlink.NsFd(ns.Fd()), PeerHardwareAddr: h.mac[:],
		}
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if bridged {
			br, err := netlink.LinkByName("br0")
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetMaster(l, br), netlink.LinkSetUp(l))
		}
		return errors.Join(netlink.LinkSetUp(l), address(l, node, 32, 128), route(l, h.v4, none, 32), route(l, h.v6, none, 128))
	}))
	s.must(p.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		if bridged {
			err = address(l, h, 24, 64)
		} else {
			err = errors.Join(address(l, h, 32, 128), route(l, node.v4, none, 32), route(l, node.v6, none, 128))
		}
		return errors.Join(err, route(l, netip.IPv4Unspecified(), node.v4, 0), route(l, netip.IPv6Unspecified(), node.v6, 0))
	}))
}

func (s *street) gate(name string, p *resident) {
	s.t.Helper()
	r := pinning.AddRequest{Endpoint: pinning.Endpoint{
		Key: pinning.AttachmentKey{ContainerID: name, IfName: "eth0"}, MAC: p.mac[:], PodUID: "uid-" + name,
		AntiSpoof: true,
	}}
	s.must(p.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		for _, a := range addrs {
			addr, _ := netip.AddrFromSlice(a.IP)
			r.Addresses = append(r.Addresses, addr.Unmap())
		}
		return err
	}))
	s.must(s.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		r.HostIfindex = l.Attrs().Index
		_, _, err = s.state.Add(s.t.Context(), r)
		return err
	}))
}

// serve echoes TCP and UDP at every address of a pod.
func (s *street) serve(name string, tcpPorts []int, udpPort int) {
	s.t.Helper()
	s.must(s.pods[name].Do(func() error {
		for _, port := range tcpPorts {
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			s.t.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer func() { _ = c.Close() }()
						_, _ = io.Copy(c, c)
					}()
				}
			}()
		}
		u, err := net.ListenUDP("udp", &net.UDPAddr{Port: udpPort})
		if err != nil {
			return err
		}
		s.t.Cleanup(func() { _ = u.Close() })
		go func() {
			b := make([]byte, 64)
			for {
				n, from, err := u.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = u.WriteToUDPAddrPort(b[:n], from)
			}
		}()
		return nil
	}))
}

// doer is a network namespace to do things in.
type doer interface{ Do(func() error) error }

// dial connects from a namespace; the caller closes.
func dial(from doer, network string, to netip.AddrPort, wait time.Duration) (c net.Conn, err error) {
	err = from.Do(func() (err error) {
		c, err = net.DialTimeout(network, to.String(), wait)
		return err
	})
	return c, err
}

// echoes tells whether a word comes back.
func echoes(c net.Conn, wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("word")); err != nil {
		return err
	}
	b := make([]byte, 4)
	_, err := io.ReadFull(c, b)
	return err
}

// reaches opens a connection of its own and has a word echoed.
func reaches(from doer, network string, to netip.AddrPort, wait time.Duration) error {
	c, err := dial(from, network, to, wait)
	if err != nil {
		return err
	}
	return errors.Join(echoes(c, wait), c.Close())
}

// pings asks for an echo over a raw socket.
func pings(from doer, to netip.Addr, wait time.Duration) error {
	network, kind, answer := "ip4:icmp", byte(8), byte(0)
	if to.Is6() {
		network, kind, answer = "ip6:ipv6-icmp", 128, 129
	}
	var c *net.IPConn
	if err := from.Do(func() (err error) {
		c, err = net.DialIP(network, nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	}); err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ask := icmp(kind, 0, 0x7067)
	sum := uint32(0)
	for i := 0; i < len(ask); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ask[i:]))
	}
	binary.BigEndian.PutUint16(ask[2:], ^uint16(sum+sum>>16)) // the kernel's own for v6
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write(ask); err != nil {
		return err
	}
	for b := make([]byte, 128); ; {
		n, _, err := c.ReadFromIP(b) // less the header
		if err != nil {
			return err
		}
		if n >= 6 && b[0] == answer && b[4] == 0x70 && b[5] == 0x67 {
			return nil
		}
	}
}

// webPolicy lets client in at TCP 8080 and more, and UDP 8053.
func webPolicy(tcpPorts ...uint16) policy.Policy {
	p := policy.Policy{
		UID: "web", Kind: "NetworkPolicy", Namespace: "ns", Name: "web", Tier: policy.TierNamespace,
		Subject: *named("web"), Isolates: [2]bool{policy.Ingress: true},
	}
	rule := policy.Rule{Action: policy.Allow, Peers: []policy.Peer{{Pods: named("client")}}, Ports: []policy.Port{port(policy.UDP, 8053)}}
	for _, n := range tcpPorts {
		rule.Ports = append(rule.Ports, port(policy.TCP, n))
	}
	p.Rules[policy.Ingress] = []policy.Rule{rule}
	return p
}

func (s *street) enforce(p policy.Policy) {
	s.t.Helper()
	s.must(s.compiler.SetPolicy(p))
	s.apply()
}

// expect says what becomes of traffic; nil or timed out, never refused.
func (s *street) expect(what string, allowed bool, err error) {
	s.t.Helper()
	var silence net.Error
	switch {
	case allowed && err != nil:
		s.t.Errorf("%s does not get through: %v", what, err)
	case !allowed && err == nil:
		s.t.Errorf("%s gets through", what)
	case !allowed && (!errors.As(err, &silence) || !silence.Timeout()):
		s.t.Errorf("%s is not dropped in silence: %v", what, err)
	}
}

func (s *street) reach(what string, allowed bool, from doer, network string, to netip.AddrPort) {
	s.t.Helper()
	s.expect(fmt.Sprintf("%s %s to %s", what, network, to), allowed, reaches(from, network, to, patience(allowed)))
}

func (s *street) ping(what string, allowed bool, from doer, to netip.Addr) {
	s.t.Helper()
	s.expect(fmt.Sprintf("%s echo to %s", what, to), allowed, pings(from, to, patience(allowed)))
}

func TestSockets(t *testing.T) {
	for name, bridged := range map[string]bool{"bridged": true, "routed": false} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, bridged)
			s.serve("web", []int{8080, 8081, 8082}, 8053)
			s.serve("stranger", []int{8080}, 8053)
			web, client, stranger := s.pods["web"], s.pods["client"], s.pods["stranger"]
			both := func(h host) []netip.Addr { return []netip.Addr{h.v4, h.v6} }
			at := netip.AddrPortFrom

			for _, a := range both(web.host) {
				s.reach("without a policy stranger's", true, stranger, "tcp", at(a, 8080))
				s.ping("without a policy client's", true, client, a)
			}
			s.enforce(webPolicy(8080, 8082))
			rules := func() {
				t.Helper()
				for _, a := range both(web.host) {
					s.reach("client's", true, client, "tcp", at(a, 8080))
					s.reach("client's", false, client, "tcp", at(a, 8081))
					s.reach("client's", true, client, "udp", at(a, 8053))
					s.ping("client's", false, client, a)
					s.reach("stranger's", false, stranger, "tcp", at(a, 8080))
					s.reach("stranger's", false, stranger, "udp", at(a, 8053))
					s.reach("the node's", true, s, "tcp", at(a, 8081))
					s.ping("the node's", true, s, a)
					s.reach("its own", true, web, "tcp", at(a, 8081))
				}
				for _, a := range both(stranger.host) {
					s.reach("web's", true, web, "tcp", at(a, 8080))
					s.reach("web's", true, web, "udp", at(a, 8053))
					s.ping("web's", true, web, a)
				}
				for _, a := range both(node) {
					s.ping("web's", true, web, a)
				}
			}
			rules()

			// Open connections, before and after a policy of theirs goes.
			type open struct {
				what string
				net.Conn
				stays bool
			}
			var conns []open
			connect := func(what string, from doer, to netip.AddrPort, stays bool) {
				t.Helper()
				c, err := dial(from, "tcp", to, patience(true))
				s.must(err)
				t.Cleanup(func() { _ = c.Close() })
				conns = append(conns, open{what + " " + to.String(), c, stays})
				s.expect("an open connection", true, echoes(c, patience(true)))
			}
			for i := range 2 {
				connect("client's", client, at(both(web.host)[i], 8080), false)
				connect("client's", client, at(both(web.host)[i], 8082), true)
				connect("web's own", web, at(both(stranger.host)[i], 8080), true)
				connect("the node's", s, at(both(web.host)[i], 8081), true)
			}
			s.enforce(webPolicy(8082))
			for _, c := range conns {
				s.expect(c.what+" connection after the change", c.stays, echoes(c, patience(c.stays)))
			}
			s.enforce(webPolicy(8080, 8082))

			// With no process that knows of podgate.
			s.must(s.state.Close())
			rules()
			for _, c := range conns {
				if c.stays {
					s.expect(c.what+" connection on its own", true, echoes(c, patience(true)))
				}
			}
		})
	}
}
