// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// requests of one sample.
const requests = 200

// The pods of a services node: client may ask served and not refused; free is
// gated by nobody, and asks bare.
const (
	client = iota
	served
	refused
	free
	bare
	podCount
)

// services is a node whose pods ask each other over UDP, as they are and
// through Services, which nft translates as kube-proxy does.
type services struct {
	*node
	pods     [podCount]*endpoint
	programs []*ebpf.Program
}

const port = 53

// service is the cluster address of a pod's Service.
func service(pod int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(pod + 1)}), port)
}

func (s *services) pod(i int) netip.AddrPort {
	return netip.AddrPortFrom(s.pods[i].addresses[0], port)
}

// BenchmarkService measures all programs that a packet meets on its way, with
// real packets over real veths, by the kernel's own statistics.
func BenchmarkService(b *testing.B) {
	need.Tools(b, "nft")
	if can, err := netlab.KernelAtLeast(6, 4); err != nil || !can {
		b.Skipf("netfilter links came with Linux 6.4; %v", err)
	}
	s := newServices(b)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stats.Close() })
	var all []*series
	for _, c := range []struct {
		what  string
		way   func(from *endpoint, to netip.AddrPort) func() error
		to    int
		times float64
	}{
		{"request and answer", s.talk, served, 1.5},
		{"first request and answer", s.greet, served, 0},
		{"first request, refused", s.knock, refused, 0},
	} {
		pod := &series{name: c.what + ", pod", sample: s.inPrograms(c.way(s.pods[client], s.pod(c.to)))}
		vip := &series{
			name: c.what + ", Service", sample: s.inPrograms(c.way(s.pods[client], service(c.to))),
			target: target{floor: pod, times: c.times},
		}
		all = append(all, pod, vip)
	}
	if err := s.Do(func() error { return measure(100, all) }); err != nil {
		b.Fatal(err)
	}
	report(b, "Services, in programs", time.Nanosecond, all)
	stats.Close()

	all = nil
	for _, c := range []struct {
		what     string
		gated    netip.AddrPort
		notGated netip.AddrPort
	}{{"pod", s.pod(served), s.pod(bare)}, {"Service", service(served), service(bare)}} {
		without := &series{name: c.what + ", no gates", sample: timed(s.talk(s.pods[free], c.notGated))}
		with := &series{name: c.what, sample: timed(s.talk(s.pods[client], c.gated)), target: target{floor: without}}
		all = append(all, without, with)
	}
	if err := s.Do(func() error { return measure(100, all) }); err != nil {
		b.Fatal(err)
	}
	report(b, "Services, round trip", time.Nanosecond, all)
}

func newServices(b *testing.B) *services {
	b.Helper()
	s := &services{node: newNode(b, 0, 0)}
	compiler, err := servicePolicy()
	if err != nil {
		b.Fatal(err)
	}
	if _, err := s.state.Apply(b.Context(), compiler.Compile()); err != nil {
		b.Fatal(err)
	}
	for i := range s.pods {
		s.pods[i] = s.newEndpoint(b, i)
		if err := errors.Join(s.Do(func() error { return s.route(s.pods[i]) }), s.pods[i].Do(func() error { return answer(b) })); err != nil {
			b.Fatal(err)
		}
		if i < free {
			s.gateOpen(b, s.pods[i])
		}
	}
	var all []pinning.Service
	var rules strings.Builder
	for i := range s.pods {
		all = append(all, pinning.Service{
			Namespace: "ns", Name: fmt.Sprint(i), Protocol: policy.UDP,
			Frontends: []netip.AddrPort{service(i)}, Backends: []netip.AddrPort{s.pod(i)},
		})
		fmt.Fprintf(&rules, "ip daddr %s udp dport %d dnat to %s\n", service(i).Addr(), port, s.pod(i))
	}
	nft := exec.Command("nft", "-f", "-")
	nft.Stdin = strings.NewReader("table ip t {\n chain c { type nat hook prerouting priority -100\n" + rules.String() + "}\n}\n")
	if err := s.Do(func() error { return errors.Join(s.state.SetServices(b.Context(), all), nft.Run()) }); err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{bpf.DatapathProgFromPod, bpf.DatapathProgToPod, bpf.ServiceProgAfterNat} {
		p, err := ebpf.LoadPinnedProgram(s.layout.ProgramPath(name), nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { p.Close() })
		s.programs = append(s.programs, p)
	}
	return s
}

// servicePolicy lets the client out to served alone.
func servicePolicy() (*policy.Compiler, error) {
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: namespace})
	named := func(i int) policy.PodSelector {
		return policy.PodSelector{Namespace: namespace, Pods: policy.Selector{{Key: "i", Operator: policy.In, Values: []string{fmt.Sprint(i)}}}}
	}
	var errs []error
	for i := range free {
		errs = append(errs, c.SetPod(policy.Pod{
			Key: policy.PodKey(localPod(i)), UID: localPod(i), Namespace: namespace, Name: localPod(i), Local: true,
			Labels: map[string]string{"i": fmt.Sprint(i)}, Addresses: []netip.Addr{local4(i), local6(i)},
		}))
	}
	p := policy.Policy{
		UID: "p", Kind: "NetworkPolicy", Namespace: namespace, Name: "p", Tier: policy.TierNamespace,
		Subject: named(client), Isolates: [2]bool{policy.Egress: true},
	}
	to := named(served)
	p.Rules[policy.Egress] = []policy.Rule{{Action: policy.Allow, Peers: []policy.Peer{{Pods: &to}}, AnyPort: true, Text: "served"}}
	return c, errors.Join(append(errs, c.SetPolicy(p))...)
}

// gateOpen gates a pod under its policy, whatever that comes to.
func (s *services) gateOpen(b *testing.B, e *endpoint) {
	b.Helper()
	err := s.Do(func() error {
		_, _, err := s.state.Add(b.Context(), pinning.AddRequest{Endpoint: pinning.Endpoint{
			Key:         pinning.AttachmentKey{ContainerID: e.ID, IfName: e.IfName},
			HostIfindex: e.host.Attrs().Index, MAC: e.mac, Addresses: e.addresses, PodUID: localPod(e.app), AntiSpoof: true,
		}})
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
}

// route connects a pod as the ptp plugin does.
func (s *services) route(e *endpoint) error {
	gateway := netip.MustParseAddr("169.254.1.1")
	ip := func(a netip.Addr) *net.IPNet {
		return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)}
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		return err
	}
	err := errors.Join(
		netlink.AddrAdd(e.host, &netlink.Addr{IPNet: ip(gateway)}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: e.host.Attrs().Index, Dst: ip(e.addresses[0]), Scope: netlink.SCOPE_LINK}))
	return errors.Join(err, e.Do(func() error {
		l, err := netlink.LinkByName(e.IfName)
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: ip(gateway), Scope: netlink.SCOPE_LINK}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice()}))
	}))
}

// answer sends back what comes.
func answer(b *testing.B) error {
	u, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
	if err != nil {
		return err
	}
	b.Cleanup(func() { u.Close() })
	go func() {
		packet := make([]byte, 64)
		for {
			n, from, err := u.ReadFromUDPAddrPort(packet)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort(packet[:n], from)
		}
	}()
	return nil
}

func dial(from *endpoint, to netip.AddrPort) (c net.Conn, err error) {
	err = from.Do(func() (err error) {
		if c, err = net.Dial("udp", to.String()); err == nil {
			err = c.SetDeadline(time.Now().Add(time.Minute))
		}
		return err
	})
	return c, err
}

func ask(c net.Conn) error {
	if _, err := c.Write([]byte("?")); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 8))
	return err
}

// talk asks again and again over one connection.
func (s *services) talk(from *endpoint, to netip.AddrPort) func() error {
	return func() error {
		c, err := dial(from, to)
		for i := 0; i < requests && err == nil; i++ {
			err = ask(c)
		}
		return errors.Join(err, c.Close())
	}
}

// greet asks over a connection of its own each time.
func (s *services) greet(from *endpoint, to netip.AddrPort) func() error {
	return s.each(from, to, ask)
}

// knock sends what nobody answers.
func (s *services) knock(from *endpoint, to netip.AddrPort) func() error {
	return s.each(from, to, func(c net.Conn) error {
		_, err := c.Write([]byte("?"))
		return err
	})
}

func (s *services) each(from *endpoint, to netip.AddrPort, do func(net.Conn) error) func() error {
	return func() error {
		for range requests {
			c, err := dial(from, to)
			if err != nil {
				return err
			}
			if err := errors.Join(do(c), c.Close()); err != nil {
				return err
			}
		}
		return nil
	}
}

// inPrograms is the time that all programs take for one of the requests.
func (s *services) inPrograms(do func() error) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		before, err := s.spent()
		if err != nil {
			return 0, err
		}
		if err := do(); err != nil {
			return 0, err
		}
		after, err := s.spent()
		return (after - before) / requests, err
	}
}

func (s *services) spent() (sum time.Duration, err error) {
	for _, p := range s.programs {
		stats, err := p.Stats()
		if err != nil {
			return 0, fmt.Errorf("statistics of %s: %w", p, err)
		}
		sum += stats.Runtime
	}
	return sum, nil
}

// timed is the time of one of the requests as who asks sees it.
func timed(do func() error) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		start := time.Now()
		err := do()
		return time.Since(start) / requests, err
	}
}
