// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// at parses addresses with ports.
func at(list ...string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range list {
		out = append(out, netip.MustParseAddrPort(a))
	}
	return out
}

// clusterIP is a Service as most are.
func clusterIP(name, frontend string, backends ...string) pinning.Service {
	return pinning.Service{
		Namespace: "ns", Name: name, PortName: "http", Protocol: policy.TCP,
		Frontends: at(frontend), Backends: at(backends...),
	}
}

// market is a lab with a pod that may reach pods named good at port 8080, the
// block 192.0.2.0/24 less 192.0.2.128/25 at any, and nothing else.
type market struct {
	*lab
	compiler *policy.Compiler
	gate     uint32
}

func newMarket(t *testing.T) *market { return newMarketWith(t, small) }

func newMarketWith(t *testing.T, c pinning.Capacity) *market {
	t.Helper()
	m := &market{lab: newLabWith(t, c), compiler: policy.NewCompiler()}
	m.compiler.SetNamespace(policy.Namespace{Name: "ns"})
	m.pod("client", "10.0.0.2")
	for i, name := range []string{"good", "good", "bad"} {
		m.pod(fmt.Sprintf("%s-%d", name, i), fmt.Sprintf("10.0.0.%d", 10+i))
	}
	policyOf := policy.Policy{
		UID: "p", Kind: "NetworkPolicy", Namespace: "ns", Name: "p", Tier: policy.TierNamespace,
		Subject: policy.PodSelector{Namespace: "ns", Pods: named("client")}, Isolates: [2]bool{policy.Egress: true},
	}
	policyOf.Rules[policy.Egress] = []policy.Rule{{
		Action: policy.Allow, Text: "good", Ports: []policy.Port{{Protocol: policy.TCP, First: 8080, Last: 8080}},
		Peers: []policy.Peer{{Pods: &policy.PodSelector{Namespace: "ns", Pods: named("good")}}},
	}, {
		Action: policy.Allow, Text: "block", AnyPort: true,
		Peers: []policy.Peer{{Block: &policy.Block{
			CIDR: netip.MustParsePrefix("192.0.2.0/24"), Except: []netip.Prefix{netip.MustParsePrefix("192.0.2.128/25")},
		}}},
	}}
	if err := m.compiler.SetPolicy(policyOf); err != nil {
		t.Fatal(err)
	}
	m.update()
	r := request(m.veth("client"), "10.0.0.2")
	r.PodUID = "uid-client"
	e, _ := m.add(r)
	m.gate = e.Gate
	return m
}

func named(name string) policy.Selector {
	return policy.Selector{{Key: "name", Operator: policy.In, Values: []string{name}}}
}

// pod sets a pod whose label is its name up to the dash.
func (m *market) pod(name, addr string) {
	m.t.Helper()
	label, _, _ := strings.Cut(name, "-")
	if err := m.compiler.SetPod(policy.Pod{
		Key: policy.PodKey("uid-" + name), UID: "uid-" + name, Namespace: "ns", Name: name,
		Labels: map[string]string{"name": label}, Addresses: []netip.Addr{netip.MustParseAddr(addr)}, Local: name == "client",
	}); err != nil {
		m.t.Fatal(err)
	}
}

func (m *market) update() {
	m.t.Helper()
	m.apply(m.compiler.Compile())
}

// restart is what a daemon does that finds an instance.
func (m *market) restart() {
	m.t.Helper()
	m.state = m.ensure()
	m.apply(m.compiler.Snapshot())
}

func (m *market) apply(u policy.Update) {
	m.t.Helper()
	done, err := m.state.Apply(m.t.Context(), u)
	if err := errors.Join(append(done.Problems, err)...); err != nil {
		m.t.Fatal(err)
	}
}

func (m *market) set(all ...pinning.Service) {
	m.t.Helper()
	if err := m.trySet(all...); err != nil {
		m.t.Fatal(err)
	}
}

func (m *market) trySet(all ...pinning.Service) error {
	return m.Do(func() error { return m.state.SetServices(m.t.Context(), all) })
}

// want is a verdict on the client's way to an address, in a word for its reason.
func (m *market) want(to string, verdict flow.Verdict, reason string) {
	m.t.Helper()
	a := netip.MustParseAddrPort(to)
	got := m.probe(m.gate, policy.Egress, "10.0.0.2", a.Addr().String(), a.Port())
	if flow.Verdict(got.Verdict) != verdict || flow.Reason(got.Reason).String() != reason {
		m.t.Errorf("%s: %s because of %s, not %s because of %s", to, flow.Verdict(got.Verdict), flow.Reason(got.Reason), verdict, reason)
	}
}

func TestServicesBeforeTranslation(t *testing.T) {
	m := newMarket(t)
	const vip = "10.96.0.1:80"
	m.want(vip, flow.Denied, "default")
	for _, c := range []struct {
		name     string
		backends []string
		verdict  flow.Verdict
		reason   string
	}{
		{"one that is allowed", []string{"10.0.0.10:8080"}, flow.Allowed, "policy"},
		{"all allowed", []string{"10.0.0.10:8080", "10.0.0.11:8080", "192.0.2.1:9"}, flow.Allowed, "policy"},
		{"another target port", []string{"10.0.0.10:8081"}, flow.Denied, "default"},
		{"none allowed", []string{"10.0.0.12:8080", "192.0.2.129:1"}, flow.Denied, "default"},
		{"some allowed", []string{"10.0.0.10:8080", "10.0.0.12:8080"}, flow.Denied, "service-mixed"},
		{"some ports allowed", []string{"10.0.0.10:8080", "10.0.0.11:8081"}, flow.Denied, "service-mixed"},
		{"nothing behind it", nil, flow.Denied, "default"},
		{"the node", []string{"10.0.0.1:6443"}, flow.Allowed, "node"},
		{"the node and a pod", []string{"10.0.0.1:6443", "10.0.0.12:1"}, flow.Denied, "service-mixed"},
		{"many of few kinds", many(40, func(i int) string { return fmt.Sprintf("192.0.2.%d:80", i) }), flow.Allowed, "policy"},
		{"many of many kinds", many(17, func(i int) string { return fmt.Sprintf("192.0.2.1:%d", 80+i) }), flow.Denied, "service-mixed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := m.state.SetNodeAddresses(t.Context(), []netip.Addr{netip.MustParseAddr("10.0.0.1")}); err != nil {
				t.Fatal(err)
			}
			m.set(clusterIP("web", vip, c.backends...))
			m.want(vip, c.verdict, c.reason)
			m.want("10.96.0.1:81", flow.Denied, "default")
			m.want("10.96.0.2:80", flow.Denied, "default")
		})
	}
	m.set()
	m.want(vip, flow.Denied, "default")
}

func many(n int, f func(int) string) (out []string) {
	for i := range n {
		out = append(out, f(i))
	}
	return out
}

// TestServiceFollowsItsBackends changes what backends are while nobody sets
// Services.
func TestServiceFollowsItsBackends(t *testing.T) {
	m := newMarket(t)
	const vip = "10.96.0.1:80"
	m.set(clusterIP("web", vip, "10.0.0.10:8080", "10.0.0.11:8080"))
	m.want(vip, flow.Allowed, "policy")

	m.pod("bad-0", "10.0.0.11") // takes the address over
	if err := m.compiler.SetPod(policy.Pod{Key: "uid-good-1", UID: "uid-good-1", Namespace: "ns", Name: "good-1", Labels: map[string]string{"name": "good"}}); err != nil {
		t.Fatal(err)
	}
	m.update()
	m.want(vip, flow.Denied, "service-mixed")
	m.pod("bad-3", "10.0.0.10")
	if err := m.compiler.SetPod(policy.Pod{Key: "uid-good-0", UID: "uid-good-0", Namespace: "ns", Name: "good-0", Labels: map[string]string{"name": "good"}}); err != nil {
		t.Fatal(err)
	}
	m.update()
	m.want(vip, flow.Denied, "default")

	m.set(clusterIP("web", vip, "10.0.0.1:1"))
	m.want(vip, flow.Denied, "default")
	if err := m.state.SetNodeAddresses(t.Context(), []netip.Addr{netip.MustParseAddr("10.0.0.1")}); err != nil {
		t.Fatal(err)
	}
	m.want(vip, flow.Allowed, "node")
}

// TestServicesAreAdopted restarts the daemon: what was pinned is in force all
// the time, and what is gone meanwhile goes.
func TestServicesAreAdopted(t *testing.T) {
	m := newMarket(t)
	web, gone := clusterIP("web", "10.96.0.1:80", "10.0.0.10:8080"), clusterIP("gone", "10.96.0.2:80", "10.0.0.11:8080")
	m.set(web, gone)
	before := m.holdings()

	m.restart()
	m.want("10.96.0.1:80", flow.Allowed, "policy")
	m.want("10.96.0.2:80", flow.Allowed, "policy")
	pastGrace()
	m.update()
	m.want("10.96.0.1:80", flow.Allowed, "policy")
	m.set(web, gone)
	m.wantHoldings(before)

	m.restart()
	m.set(web)
	m.want("10.96.0.1:80", flow.Allowed, "policy")
	m.want("10.96.0.2:80", flow.Denied, "default")
	m.set()
	pastGrace()
	m.set()
	after := m.holdings()
	for _, name := range []string{bpf.DatapathMapFrontends, bpf.DatapathMapServices} {
		if after[name] != 0 {
			t.Errorf("%d entries are left in %s", after[name], name)
		}
	}
}

// TestServiceAddressesAreOthersToo: a frontend's address may be the node's or
// a pod's, which come and go.
func TestServiceAddressesAreOthersToo(t *testing.T) {
	m := newMarket(t)
	node := netip.MustParseAddr("10.0.0.1")
	if err := m.state.SetNodeAddresses(t.Context(), []netip.Addr{node}); err != nil {
		t.Fatal(err)
	}
	nodePort, pods := clusterIP("web", "10.0.0.1:30080", "10.0.0.12:8080"), clusterIP("odd", "10.0.0.11:80", "10.0.0.12:8080")
	m.set(nodePort, pods)
	m.want("10.0.0.1:30080", flow.Denied, "default")
	m.want("10.0.0.1:22", flow.Allowed, "node")
	m.want("10.0.0.11:8080", flow.Allowed, "policy")
	m.want("10.0.0.11:80", flow.Denied, "default")

	if err := m.state.SetNodeAddresses(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	m.want("10.0.0.1:22", flow.Denied, "default")
	m.want("10.0.0.1:30080", flow.Denied, "default")
	if err := m.state.SetNodeAddresses(t.Context(), []netip.Addr{node}); err != nil {
		t.Fatal(err)
	}

	// A pod gets the address of a frontend, and loses it.
	r := request(m.veth("odd"), "10.0.0.11")
	r.PodUID = "uid-good-1"
	e, _ := m.add(r)
	m.want("10.0.0.11:8080", flow.Allowed, "policy")
	allowed := clusterIP("odd", "10.0.0.11:80", "10.0.0.10:8080")
	m.set(nodePort, allowed)
	// A neighbour reaches the pod itself, past any translation.
	m.want("10.0.0.11:80", flow.Denied, "default")
	m.delete(e.Key)
	m.want("10.0.0.11:80", flow.Allowed, "policy")

	m.set()
	m.want("10.0.0.1:30080", flow.Allowed, "node")
	m.want("10.0.0.1:22", flow.Allowed, "node")
}

func TestServicesThatCannotBeStored(t *testing.T) {
	c := small
	c.Services = 2
	m := newMarketWith(t, c)
	fine := clusterIP("fine", "10.96.0.1:80", "10.0.0.10:8080")
	for name, bad := range map[string]pinning.Service{
		"protocol": {Namespace: "ns", Name: "bad", Protocol: policy.ICMP, Frontends: at("10.96.0.9:1")},
		"port":     {Namespace: "ns", Name: "bad", Protocol: policy.TCP, Frontends: at("10.96.0.9:0")},
		"address":  {Namespace: "ns", Name: "bad", Protocol: policy.TCP, Frontends: at("10.96.0.9:1"), Backends: make([]netip.AddrPort, 1)},
		"name":     {Namespace: "ns", Name: strings.Repeat("bad", 100), Protocol: policy.TCP, Frontends: at("10.96.0.9:1")},
		"twice":    {Namespace: "ns", Name: "bad", Protocol: policy.TCP, Frontends: at("10.96.0.1:80")},
	} {
		t.Run(name, func(t *testing.T) {
			err := m.trySet(fine, bad)
			if !errors.Is(err, pinning.ErrInvalid) || !strings.Contains(err.Error(), "ns/bad") {
				t.Errorf("the error is %v", err)
			}
			m.want("10.96.0.1:80", flow.Allowed, "policy")
		})
	}
	many := fine
	many.Name, many.Frontends = "many", at("10.96.0.2:80", "10.96.0.3:80", "10.96.0.4:80")
	err := m.trySet(many)
	if !errors.Is(err, pinning.ErrFull) || !strings.Contains(err.Error(), "service ns/many:http: frontend 10.96.0.") {
		t.Errorf("the error is %v", err)
	}
	m.set(fine)
	m.want("10.96.0.1:80", flow.Allowed, "policy")
}

// TestServicesMode: where the kernel can have a program behind DNAT it has, but
// not with IPVS, which may come and go.
func TestServicesMode(t *testing.T) {
	m := newMarket(t)
	best := pinning.ServicesAfter
	if can, err := netlab.KernelAtLeast(6, 4); err != nil {
		t.Fatal(err)
	} else if !can {
		best = pinning.ServicesBefore
	}
	want := func(when string, mode pinning.ServicesMode) {
		t.Helper()
		if got, err := m.state.ServicesMode(); err != nil || got != mode {
			t.Errorf("%s Services are judged %s, %v, not %s", when, got, err, mode)
		}
		m.do(func() error {
			if err := m.state.Ready(t.Context()); err != nil {
				t.Errorf("%s it is not ready: %v", when, err)
			}
			return nil
		})
	}
	want("when there never were any", pinning.ServicesNone)
	web := clusterIP("web", "10.96.0.1:80", "10.0.0.10:8080")
	m.set(web)
	want("with one", best)
	ipvs := m.veth("kube-ipvs0")
	m.repair()
	want("with IPVS", pinning.ServicesBefore)
	m.set(web)
	want("with IPVS and told again", pinning.ServicesBefore)
	m.unplug(ipvs)
	m.repair()
	want("without IPVS", best)
	m.set()
	want("when the last one is gone", best)
}

// TestServicesOnUnseenBridges: netfilter has to see what pods on a bridge send
// each other.
func TestServicesOnUnseenBridges(t *testing.T) {
	m := newMarket(t)
	const sysctl = "/proc/sys/net/bridge/bridge-nf-call-"
	m.do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		return errors.Join(netlink.LinkAdd(bridge), netlink.LinkSetMaster(m.link("client"), bridge))
	})
	state := func() (s pinning.ServiceState, err error) {
		problem := m.Do(func() error { s, err = m.state.ServiceState(); return nil })
		return s, errors.Join(err, problem)
	}
	if s, err := state(); err != nil || s.Frontends != 0 {
		t.Errorf("without Services there are %d frontends, %v", s.Frontends, err)
	}
	m.set(clusterIP("web", "10.96.0.1:80", "10.0.0.10:8080"))
	if m.Do(func() error { _, err := os.Stat(sysctl + "iptables"); return err }) == nil {
		for _, family := range []string{"iptables", "ip6tables"} {
			m.do(func() error { return os.WriteFile(sysctl+family, []byte("0"), 0) })
		}
	}
	if s, err := state(); !errors.Is(err, pinning.ErrDiffers) || !strings.Contains(err.Error(), "br0") || s.Frontends != 1 {
		t.Errorf("with %d frontends the error is %v", s.Frontends, err)
	}
	if m.Do(func() error { _, err := os.Stat(sysctl + "iptables"); return err }) != nil {
		t.Skip("the kernel has no br_netfilter")
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		m.do(func() error { return os.WriteFile(sysctl+family, []byte("1"), 0) })
	}
	if _, err := state(); err != nil {
		t.Error(err)
	}
}

// TestMoveBackends gives Services other backends, one after the other, while what
// policy says of backends changes, too.
func TestMoveBackends(t *testing.T) {
	m := newMarket(t)
	good, bad := "10.0.0.10:8080", "10.0.0.12:8080"
	web, dns := clusterIP("web", "10.96.0.1:80", good), clusterIP("dns", "10.96.0.2:80", good)
	if err := m.state.MoveBackends(t.Context(), []pinning.Service{web}); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("a Service nobody told of: %v", err)
	}
	m.set(web, dns)
	allowed := func(to string) { t.Helper(); m.want(to, flow.Allowed, "policy") }
	denied := func(to string) { t.Helper(); m.want(to, flow.Denied, "default") }
	move := func(v pinning.Service, backends ...string) {
		t.Helper()
		v.Backends = at(backends...)
		if err := m.state.MoveBackends(t.Context(), []pinning.Service{v}); err != nil {
			t.Fatal(err)
		}
	}
	allowed("10.96.0.1:80")
	for range 3 {
		move(web, bad)
		denied("10.96.0.1:80")
		allowed("10.96.0.2:80")
		move(web, "10.0.0.11:8080", good)
		allowed("10.96.0.1:80")
	}
	move(web, good, bad)
	m.want("10.96.0.1:80", flow.Denied, "service-mixed")
	// One that moved follows its backends, and not those it had.
	move(web, bad)
	move(dns, good)
	m.pod("bad-2", "10.0.0.99")
	m.pod("good-3", "10.0.0.12")
	m.update()
	allowed("10.96.0.1:80")
	m.pod("good-0", "10.0.0.98")
	m.pod("bad-4", "10.0.0.10")
	m.update()
	denied("10.96.0.2:80")
	allowed("10.96.0.1:80")
	// What nothing leads to any more goes, and nothing else.
	pastGrace()
	move(dns, bad)
	m.apply(m.compiler.Snapshot())
	pastGrace()
	move(web)
	m.apply(m.compiler.Snapshot())
	allowed("10.96.0.2:80")
	denied("10.96.0.1:80")
	if n := m.holdings()["services"]; n > 3 {
		t.Errorf("%d Services are left", n)
	}
	m.restart()
	m.set(web, dns)
	denied("10.96.0.1:80")
}
