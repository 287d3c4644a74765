// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// The hosts of a plaza. client may reach good, and far but for its second
// address; far is on another node.
var (
	far    = host{[6]byte{2, 0, 0, 0, 0, 9}, netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("fd02::10")}
	farOut = host{far.mac, netip.MustParseAddr("192.0.2.130"), netip.MustParseAddr("fd02:0:0:1::10")}
	uplink = host{[6]byte{2, 0, 0, 0, 0, 8}, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("fd02::1")}
)

// plaza is a street whose node translates Services as kube-proxy does.
type plaza struct {
	*street
	far      *netlab.Pod
	iptables bool
	// sticky gives Services sessionAffinity: ClientIP.
	sticky   bool
	services []pinning.Service
}

func newPlaza(t *testing.T, bridged, iptables bool) *plaza {
	t.Helper()
	if iptables {
		need.Tools(t, "iptables-restore", "ip6tables-restore")
	} else {
		need.Tools(t, "nft")
	}
	p := &plaza{iptables: iptables}
	p.street = newStreetOf(t, bridged, map[string]host{"client": pod, "good": friend, "bad": foe, "good2": buddy})
	if can, err := netlab.KernelAtLeast(6, 4); err != nil || !can {
		t.Skipf("netfilter links came with Linux 6.4; %v", err)
	}
	var err error
	p.far, err = netlab.NewPod(netlab.PodSpec{Name: "far"})
	p.must(err)
	t.Cleanup(func() { p.must(p.far.Close()) })
	p.must(p.Do(func() error { return p.connect(bridged) }))
	p.must(p.far.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(l), address(l, far, 24, 64), address(l, farOut, 32, 128),
			route(l, netip.IPv4Unspecified(), uplink.v4, 0), route(l, netip.IPv6Unspecified(), uplink.v6, 0))
	}))
	p.must(p.state.SetNodeAddresses(t.Context(), []netip.Addr{node.v4, node.v6, uplink.v4, uplink.v6}))
	for name, r := range p.pods {
		p.answer(name, r)
	}
	p.answer("far", p.far)
	p.answer("node", p)
	p.isolate(8080)
	return p
}

// connect gives the node its uplink.
func (p *plaza) connect(bridged bool) error {
	if bridged {
		if err := callIPTables(); err != nil {
			return err
		}
		// The bridge plugin's hairpinMode.
		for name := range p.pods {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetHairpin(l, true); err != nil {
				return err
			}
		}
	}
	ns, err := os.Open(p.far.NetNS())
	if err != nil {
		return err
	}
	defer ns.Close()
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "eth0",
		PeerNamespace: netlink.NsFd(ns.Fd()), PeerHardwareAddr: far.mac[:],
	}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	l, err := netlink.LinkByName("uplink")
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(l), address(l, uplink, 24, 64), route(l, farOut.v4, far.v4, 32), route(l, farOut.v6, far.v6, 128))
}

// callIPTables has netfilter see what is bridged.
func callIPTables() error {
	for _, family := range []string{"iptables", "ip6tables"} {
		if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+family, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}

// isolate lets the client out to good's TCP ports and UDP 8053, and to far;
// nothing lets anybody in to it.
func (p *plaza) isolate(ports ...uint16) {
	p.t.Helper()
	rule := policy.Policy{
		UID: "p", Kind: "NetworkPolicy", Namespace: "ns", Name: "p", Tier: policy.TierNamespace,
		Subject: *named("client"), Isolates: [2]bool{true, true},
	}
	block := func(prefix, except string) policy.Peer {
		return policy.Peer{Block: &policy.Block{CIDR: netip.MustParsePrefix(prefix), Except: []netip.Prefix{netip.MustParsePrefix(except)}}}
	}
	pods := policy.Rule{
		Action: policy.Allow, Text: "good", Ports: []policy.Port{port(policy.UDP, 8053)},
		Peers: []policy.Peer{{Pods: named("good")}, {Pods: named("good2")}},
	}
	for _, n := range ports {
		pods.Ports = append(pods.Ports, port(policy.TCP, n))
	}
	rule.Rules[policy.Egress] = []policy.Rule{pods, {
		Action: policy.Allow, Text: "far", AnyPort: true,
		Peers: []policy.Peer{block("192.0.2.0/24", "192.0.2.128/25"), block("fd02::/48", "fd02:0:0:1::/64")},
	}}
	p.enforce(rule)
}

// answer serves TCP 8080 and 8081 and UDP 8053 in a namespace: who asks is told
// the name and gets its words back.
func (p *plaza) answer(name string, in doer) {
	p.t.Helper()
	p.must(in.Do(func() error {
		for _, port := range []int{8080, 8081} {
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			p.t.Cleanup(func() { _ = l.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer func() { _ = c.Close() }()
						if _, err := fmt.Fprintln(c, name); err == nil {
							_, _ = io.Copy(c, c)
						}
					}()
				}
			}()
		}
		u, err := net.ListenUDP("udp", &net.UDPAddr{Port: 8053})
		if err != nil {
			return err
		}
		p.t.Cleanup(func() { _ = u.Close() })
		go func() {
			b := make([]byte, 64)
			for {
				_, from, err := u.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = u.WriteToUDPAddrPort([]byte(name+"\n"), from)
			}
		}()
		return nil
	}))
}

// ask opens a connection, from a port if that is not 0, and returns who answers.
func ask(from doer, network string, source uint16, to netip.AddrPort, wait time.Duration) (who string, err error) {
	var c net.Conn
	err = from.Do(func() (err error) {
		d := net.Dialer{Timeout: wait}
		switch {
		case source == 0:
		case network == "udp":
			d.LocalAddr = &net.UDPAddr{Port: int(source)}
		default:
			d.LocalAddr = &net.TCPAddr{Port: int(source)}
		}
		c, err = d.Dial(network, to.String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	return hear(c, wait)
}

// hear reads a line, for UDP after asking for it.
func hear(c net.Conn, wait time.Duration) (string, error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	if c.RemoteAddr().Network() == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", err
		}
	}
	b := make([]byte, 64)
	n, err := c.Read(b)
	return strings.TrimSpace(string(b[:n])), err
}

// from asks the client's way; who is "" when nobody is to answer.
func (p *plaza) from(what, network string, to netip.AddrPort, who string) {
	p.t.Helper()
	got, err := ask(p.pods["client"], network, 0, to, patience(who != ""))
	if who == "" {
		p.expect(fmt.Sprintf("%s %s to %s (answered by %q)", what, network, to, got), false, err)
	} else if err != nil || got != who {
		p.t.Errorf("%s %s to %s is answered by %q, %v, not by %q", what, network, to, got, err, who)
	}
}

// vip is the cluster address of a number, of the family of an address.
func vip(n int, family netip.Addr) netip.Addr {
	if family.Is4() {
		return netip.AddrFrom4([4]byte{10, 96, 0, byte(n)})
	}
	a := netip.MustParseAddr("fd00:96::").As16()
	a[15] = byte(n)
	return netip.AddrFrom16(a)
}

// set makes Services known to podgate, and to the node.
func (p *plaza) set(all ...pinning.Service) {
	p.t.Helper()
	p.services = all
	p.must(p.Do(func() error { return p.state.SetServices(p.t.Context(), all) }))
	p.translate(all)
}

// translate writes the rules that kube-proxy writes, of the shape they have
// there.
func (p *plaza) translate(all []pinning.Service) {
	p.t.Helper()
	for _, family := range []string{"4", "6"} {
		command, rules := exec.Command("nft", "-f", "-"), nftRules(family, all, p.sticky)
		if p.iptables {
			command, rules = exec.Command("iptables-restore", "-w"), iptablesRules(family, all, p.sticky)
			if family == "6" {
				command = exec.Command("ip6tables-restore", "-w")
			}
		}
		command.Stdin = strings.NewReader(rules)
		p.must(p.Do(func() error {
			out, err := command.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s%s", err, out, rules)
			}
			return err
		}))
	}
}

func protocolWord(p policy.Protocol) string {
	return map[policy.Protocol]string{policy.TCP: "tcp", policy.UDP: "udp"}[p]
}

func ofFamily(family string, list []netip.AddrPort) (out []netip.AddrPort) {
	for _, a := range list {
		if a.Addr().Is4() == (family == "4") {
			out = append(out, a)
		}
	}
	return out
}

// nftRules are like those of kube-proxy --proxy-mode=nftables.
func nftRules(family string, all []pinning.Service, sticky bool) string {
	ip := map[string]string{"4": "ip", "6": "ip6"}[family]
	var b, chains strings.Builder
	for i, s := range all {
		backends := ofFamily(family, s.Backends)
		var verdicts []string
		var before string
		for j, to := range backends {
			remember := ""
			if sticky {
				fmt.Fprintf(&chains, " set affinity-%d-%d { type ipv%s_addr; flags dynamic,timeout; timeout 10800s; }\n", i, j, family)
				remember = fmt.Sprintf("update @affinity-%d-%d { %s saddr };", i, j, ip)
				before += fmt.Sprintf("%[1]s saddr @affinity-%[2]d-%[3]d goto endpoint-%[2]d-%[3]d; ", ip, i, j)
			}
			fmt.Fprintf(&chains, " chain endpoint-%d-%d { %s saddr %s meta mark set mark or 0x4000; %s meta l4proto %s dnat to %s; }\n",
				i, j, ip, to.Addr(), remember, protocolWord(s.Protocol), to)
			verdicts = append(verdicts, fmt.Sprintf("%d : goto endpoint-%d-%d", j, i, j))
		}
		if len(backends) == 0 {
			continue
		}
		fmt.Fprintf(&chains, " chain service-%d { %snumgen random mod %d vmap { %s }; }\n", i, before, len(backends), strings.Join(verdicts, ", "))
		for _, f := range ofFamily(family, s.Frontends) {
			fmt.Fprintf(&b, "  %s daddr %s %s dport %d goto service-%d\n", ip, f.Addr(), protocolWord(s.Protocol), f.Port(), i)
		}
	}
	return fmt.Sprintf(`add table %[1]s kube-proxy
delete table %[1]s kube-proxy
table %[1]s kube-proxy {
%[3]s
 chain services {
%[2]s }
 chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
 chain nat-postrouting { type nat hook postrouting priority 100; meta mark and 0x4000 != 0 meta mark set mark xor 0x4000 masquerade fully-random; }
}
`, ip, b.String(), chains.String())
}

// iptablesRules are like those of kube-proxy --proxy-mode=iptables.
func iptablesRules(family string, all []pinning.Service, sticky bool) string {
	var chains, before, rules strings.Builder
	for i, s := range all {
		backends := ofFamily(family, s.Backends)
		fmt.Fprintf(&chains, ":KUBE-SVC-%d - [0:0]\n", i)
		for j, to := range backends {
			fmt.Fprintf(&chains, ":KUBE-SEP-%d-%d - [0:0]\n", i, j)
			fmt.Fprintf(&rules, "-A KUBE-SEP-%d-%d -s %s -j KUBE-MARK-MASQ\n", i, j, to.Addr())
			remember := ""
			if sticky {
				remember = fmt.Sprintf("-m recent --name KUBE-SEP-%d-%d --set", i, j)
			}
			fmt.Fprintf(&rules, "-A KUBE-SEP-%d-%d -p %s -m %[3]s %[5]s -j DNAT --to-destination %[4]s\n", i, j, protocolWord(s.Protocol), to, remember)
			chance := ""
			if left := len(backends) - j; left > 1 {
				chance = fmt.Sprintf("-m statistic --mode random --probability %f", 1/float64(left))
			}
			fmt.Fprintf(&rules, "-A KUBE-SVC-%d %s -j KUBE-SEP-%d-%d\n", i, chance, i, j)
		}
		for j := range backends {
			if sticky {
				fmt.Fprintf(&before, "-A KUBE-SVC-%[1]d -m recent --name KUBE-SEP-%[1]d-%[2]d --rcheck --seconds 10800 --reap -j KUBE-SEP-%[1]d-%[2]d\n", i, j)
			}
		}
		for _, f := range ofFamily(family, s.Frontends) {
			fmt.Fprintf(&rules, "-A KUBE-SERVICES -d %s -p %s -m %[2]s --dport %[3]d -j KUBE-SVC-%[4]d\n",
				f.Addr(), protocolWord(s.Protocol), f.Port(), i)
		}
	}
	return "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n" + chains.String() +
		"-A PREROUTING -j KUBE-SERVICES\n-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n" + before.String() + rules.String() +
		"-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully\nCOMMIT\n"
}

// service is a Service of TCP at port 80, or of UDP at 53, with a cluster
// address of each family.
func service(n int, protocol policy.Protocol, port uint16, backends ...host) pinning.Service {
	s := pinning.Service{Namespace: "ns", Name: fmt.Sprintf("service-%d", n), Protocol: protocol}
	for _, family := range []netip.Addr{pod.v4, pod.v6} {
		front := uint16(80)
		if protocol == policy.UDP {
			front = 53
		}
		s.Frontends = append(s.Frontends, netip.AddrPortFrom(vip(n, family), front))
		for _, b := range backends {
			a := b.v4
			if family.Is6() {
				a = b.v6
			}
			s.Backends = append(s.Backends, netip.AddrPortFrom(a, port))
		}
	}
	return s
}

// everyPlaza runs a test on bridged and on routed pods, behind both kinds of
// rules that kube-proxy makes.
func everyPlaza(t *testing.T, test func(*plaza)) {
	for _, bridged := range []bool{true, false} {
		for _, iptables := range []bool{false, true} {
			name := map[bool]string{true: "bridged", false: "routed"}[bridged] + map[bool]string{true: " iptables", false: " nftables"}[iptables]
			t.Run(name, func(t *testing.T) { test(newPlaza(t, bridged, iptables)) })
		}
	}
}

// TestServices reaches every kind of backend through a Service, and is told the
// same as without one.
func TestServices(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		for _, c := range []struct {
			what     string
			protocol policy.Protocol
			port     uint16
			backend  host
			who      string
		}{
			{"a pod that may be reached", policy.TCP, 8080, friend, "good"},
			{"its other port", policy.TCP, 8081, friend, ""},
			{"its UDP port", policy.UDP, 8053, friend, "good"},
			{"another pod", policy.TCP, 8080, foe, ""},
			{"another pod's UDP port", policy.UDP, 8053, foe, ""},
			{"an address of a block", policy.TCP, 8081, far, "far"},
			{"an address the block leaves out", policy.TCP, 8080, farOut, ""},
			{"the node", policy.TCP, 8081, node, "node"},
			{"the pod itself", policy.TCP, 8081, pod, "client"},
		} {
			s := service(1, c.protocol, c.port, c.backend)
			p.set(s)
			for i, f := range s.Frontends {
				if c.backend != pod { // an address of its own is no way out of the pod
					p.from(c.what+", as it is:", protocolWord(c.protocol), s.Backends[i], c.who)
				}
				p.from(c.what, protocolWord(c.protocol), f, c.who)
			}
		}
	})
}
