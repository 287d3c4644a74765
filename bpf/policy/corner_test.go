// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

// The cluster of the corner cases: a local pod and peers it may meet.
var (
	cornerNamespaces = []Namespace{
		{Name: "shop", Labels: map[string]string{"kubernetes.io/metadata.name": "shop", "team": "a"}},
		{Name: "bank", Labels: map[string]string{"kubernetes.io/metadata.name": "bank", "team": "b"}},
	}
	cornerPods = []Pod{
		{
			Key: "web", UID: "web", Namespace: "shop", Name: "web.0", Labels: map[string]string{"app": "web", "empty": ""},
			Addresses: addresses("10.0.0.1", "fd00::1"), Local: true,
			Ports: []NamedPort{{"http", TCP, 8080}, {"dns", UDP, 5353}, {"dns", TCP, 5354}},
		},
		{
			Key: "api", UID: "api", Namespace: "shop", Name: "api.0", Labels: map[string]string{"app": "api"},
			Addresses: addresses("10.0.0.2", "fd00::2"), Ports: []NamedPort{{"http", TCP, 80}},
		},
		{
			Key: "till", UID: "till", Namespace: "bank", Name: "till.0", Labels: map[string]string{"app": "web"},
			Addresses: addresses("10.0.0.3", "fd00::3"), Ports: []NamedPort{{"http", UDP, 80}},
		},
		{
			Key: "stray", UID: "stray", Namespace: "unknown", Name: "stray.0",
			Addresses: addresses("10.0.0.4", "fd00::4"),
		},
		{
			Key: "node", UID: "node", Namespace: "shop", Name: "agent", Labels: map[string]string{"app": "web"},
			Addresses: addresses("192.168.0.1", "fd01::1"), HostNetwork: true, Local: true,
		},
	}
)

// rules that the corner cases are made of.
func to(peers ...Peer) Rule {
	return Rule{Action: Allow, AnyPort: true, AnyPeer: peers == nil, Peers: peers}
}

func (r Rule) on(ports ...Port) Rule {
	r.AnyPort, r.Ports = false, ports
	return r
}

func (r Rule) deny() Rule { r.Action = Deny; return r }
func (r Rule) pass() Rule { r.Action = Pass; return r }

func is(key string, values ...string) Selector {
	return Selector{{Key: key, Operator: In, Values: values}}
}

func pods(namespace string, s Selector) Peer {
	return Peer{Pods: &PodSelector{Namespace: namespace, Pods: s}}
}

func podsIn(namespaces, s Selector) Peer {
	return Peer{Pods: &PodSelector{Namespaces: namespaces, Pods: s}}
}

func cidr(s string, except ...string) Peer {
	return Peer{Block: &Block{CIDR: netip.MustParsePrefix(s), Except: prefixes(except...)}}
}

func port(proto Protocol, first, last uint16) Port {
	return Port{Protocol: proto, First: first, Last: last}
}

func named(proto Protocol, name string) Port { return Port{Protocol: proto, Name: name} }

// networkPolicy selects the web pod of the shop.
func networkPolicy(name string, isolates [2]bool, ingress, egress []Rule) Policy {
	return Policy{
		UID: name, Kind: "NetworkPolicy", Namespace: "shop", Name: name, Tier: TierNamespace,
		Subject: PodSelector{Namespace: "shop", Pods: is("app", "web")}, Isolates: isolates,
		Rules: [2][]Rule{ingress, egress},
	}
}

func ingress(rules ...Rule) Policy { return networkPolicy("in", [2]bool{true, false}, rules, nil) }
func egress(rules ...Rule) Policy  { return networkPolicy("eg", [2]bool{false, true}, nil, rules) }

func clusterPolicy(name string, tier Tier, priority int32, rules ...Rule) Policy {
	return Policy{UID: name, Kind: "ClusterNetworkPolicy", Name: name, Tier: tier, Priority: priority, Rules: [2][]Rule{rules, rules}}
}

func TestCornerCases(t *testing.T) {
	tests := []struct {
		name     string
		policies []Policy
		// allowed and denied are questions to the web pod:
		// "in|eg address proto/port".
		allowed, denied []string
	}{
		{
			"4: a pod always reaches itself", []Policy{ingress(), egress()},
			[]string{"in 10.0.0.1 TCP/1", "eg 10.0.0.1 TCP/1", "eg fd00::1 UDP/1"}, []string{"in 10.0.0.2 TCP/1"},
		},
		{
			"6: a host network pod is no pod peer", []Policy{ingress(to(pods("shop", nil)), to(podsIn(nil, nil)))},
			[]string{"in 10.0.0.2 TCP/1"}, []string{"in 192.168.0.1 TCP/1", "in fd01::1 TCP/1"},
		},
		{
			"6: a host network pod has its node's blocks", []Policy{ingress(to(cidr("192.168.0.0/16")))},
			[]string{"in 192.168.0.1 TCP/1"}, []string{"in fd01::1 TCP/1"},
		},
		{
			"12: NotIn and DoesNotExist match an absent key", []Policy{ingress(
				to(pods("shop", Selector{{Key: "zone", Operator: NotIn, Values: []string{"x"}}})),
				to(podsIn(is("team", "b"), Selector{{Key: "zone", Operator: DoesNotExist}})),
			)},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.3 TCP/1"}, []string{"in 10.0.0.4 TCP/1"},
		},
		{
			"12: an empty value is present", []Policy{{
				UID: "e", Kind: "NetworkPolicy", Namespace: "shop", Name: "e", Tier: TierNamespace, Isolates: [2]bool{true, true},
				Subject: PodSelector{Namespace: "shop", Pods: Selector{{Key: "empty", Operator: Exists}, {Key: "empty", Operator: In, Values: []string{""}}}},
				Rules:   [2][]Rule{{to(pods("shop", is("zone", "")))}, {to(pods("shop", Selector{{Key: "zone", Operator: NotIn, Values: []string{""}}}))}},
			}},
			[]string{"eg 10.0.0.2 TCP/1"}, []string{"in 10.0.0.2 TCP/1"},
		},
		{
			"13: a named port is the destination's: ingress", []Policy{ingress(to().on(named(TCP, "http")))},
			[]string{"in 10.0.0.2 TCP/8080", "in 1.1.1.1 TCP/8080"}, []string{"in 10.0.0.2 TCP/80", "in 10.0.0.2 UDP/8080"},
		},
		{
			"13: a named port is the destination's: egress", []Policy{egress(to().on(named(TCP, "http")))},
			[]string{"eg 10.0.0.2 TCP/80", "eg fd00::2 TCP/80"},
			[]string{"eg 10.0.0.2 TCP/8080", "eg 10.0.0.3 TCP/80", "eg 10.0.0.3 UDP/80", "eg 10.0.0.4 TCP/80", "eg 1.1.1.1 TCP/80"},
		},
		{
			"13: a name has a number for each protocol", []Policy{ingress(to().on(named(UDP, "dns")))},
			[]string{"in 10.0.0.2 UDP/5353"}, []string{"in 10.0.0.2 TCP/5354", "in 10.0.0.2 UDP/5354", "in 10.0.0.2 TCP/5353"},
		},
		{
			"13: a name without protocol means all of them", []Policy{ingress(to().on(named(AnyProtocol, "dns")))},
			[]string{"in 10.0.0.2 UDP/5353", "in 10.0.0.2 TCP/5354"}, []string{"in 10.0.0.2 UDP/5354"},
		},
		{
			"13: an absent name allows nothing", []Policy{ingress(to().on(named(TCP, "none"))), egress(to().on(named(TCP, "none")))},
			nil, []string{"in 10.0.0.2 TCP/8080", "in 10.0.0.2 TCP/0", "eg 10.0.0.2 TCP/80", "eg 10.0.0.2 TCP/0"},
		},
		{
			"13: a named port with a selected peer", []Policy{egress(to(pods("shop", nil)).on(named(TCP, "http"), named(UDP, "http")))},
			[]string{"eg 10.0.0.2 TCP/80"}, []string{"eg 10.0.0.3 UDP/80", "eg 10.0.0.2 UDP/80"},
		},
		{
			"14: an egress policy does not isolate ingress", []Policy{egress()},
			[]string{"in 10.0.0.2 TCP/1", "in 1.1.1.1 ICMP/2048"}, []string{"eg 10.0.0.2 TCP/1"},
		},
		{
			"14: rules of a direction that is not isolated say nothing", []Policy{networkPolicy("x", [2]bool{true, false}, nil, []Rule{to()})},
			[]string{"eg 10.0.0.2 TCP/1"}, []string{"in 10.0.0.2 TCP/1"},
		},
		{
			"15: all ports of a protocol", []Policy{ingress(to().on(port(SCTP, 0, 65535)))},
			[]string{"in 10.0.0.2 SCTP/0", "in 10.0.0.2 SCTP/65535"}, []string{"in 10.0.0.2 TCP/1", "in 10.0.0.2 UDP/1", "in 10.0.0.2 ICMP/0"},
		},
		{
			"15: endPort is inclusive, on every protocol", []Policy{ingress(to().on(port(TCP, 80, 81), port(UDP, 1, 1), port(SCTP, 65535, 65535)))},
			[]string{"in 10.0.0.2 TCP/80", "in 10.0.0.2 TCP/81", "in 10.0.0.2 UDP/1", "in 10.0.0.2 SCTP/65535"},
			[]string{"in 10.0.0.2 TCP/79", "in 10.0.0.2 TCP/82", "in 10.0.0.2 UDP/0", "in 10.0.0.2 UDP/2", "in 10.0.0.2 SCTP/65534"},
		},
		{
			"15: no ports is every protocol", []Policy{ingress(to())},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.2 ICMP/2048", "in fd00::2 ICMPv6/32768"}, nil,
		},
		{
			"16: a block matches pods", []Policy{ingress(to(cidr("10.0.0.2/32")))},
			[]string{"in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.3 TCP/1", "in fd00::2 TCP/1"},
		},
		{
			"16: except is of its own block", []Policy{ingress(to(cidr("10.0.0.0/8", "10.0.0.0/24")), to(cidr("10.0.0.2/31", "10.0.0.3/32")))},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.1.0 TCP/1"}, []string{"in 10.0.0.3 TCP/1", "in 10.0.0.9 TCP/1"},
		},
		{
			"16: two blocks of one rule", []Policy{ingress(to(cidr("10.0.0.0/8", "10.0.0.0/24"), cidr("10.0.0.0/24", "10.0.0.0/25")))},
			[]string{"in 10.1.0.0 TCP/1", "in 10.0.0.128 TCP/1"}, []string{"in 10.0.0.127 TCP/1", "in 11.0.0.0 TCP/1"},
		},
		{
			"16: except of one policy, allowed by another", []Policy{
				ingress(to(cidr("0.0.0.0/0", "10.0.0.0/8"))),
				networkPolicy("more", [2]bool{true, false}, []Rule{to(cidr("10.0.0.2/32")).on(port(TCP, 80, 80))}, nil),
			},
			[]string{"in 1.1.1.1 UDP/9", "in 10.0.0.2 TCP/80"}, []string{"in 10.0.0.2 TCP/81", "in 10.0.0.3 TCP/80"},
		},
		{
			"16: overlapping blocks with different ports", []Policy{ingress(
				to(cidr("10.0.0.0/8")).on(port(TCP, 1, 1)), to(cidr("10.0.0.0/16")).on(port(TCP, 2, 2)), to(cidr("10.0.0.0/30")).on(port(TCP, 3, 3)),
			)},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.2 TCP/2", "in 10.0.0.2 TCP/3", "in 10.0.9.9 TCP/2", "in 10.9.9.9 TCP/1"},
			[]string{"in 10.0.9.9 TCP/3", "in 10.9.9.9 TCP/2", "in 11.0.0.0 TCP/1"},
		},
		{
			"16: non-canonical CIDRs that collide", []Policy{ingress(to(cidr("10.0.0.1/24")).on(port(TCP, 1, 1)), to(cidr("10.0.0.2/24", "10.0.0.131/25")).on(port(TCP, 2, 2)))},
			[]string{"in 10.0.0.9 TCP/1", "in 10.0.0.9 TCP/2", "in 10.0.0.200 TCP/1"}, []string{"in 10.0.0.200 TCP/2"},
		},
		{
			"16: all of IPv4 is no IPv6", []Policy{ingress(to(cidr("0.0.0.0/0")))},
			[]string{"in 1.1.1.1 TCP/1", "in 10.0.0.2 TCP/1"}, []string{"in 2600::1 TCP/1", "in fd00::2 TCP/1"},
		},
		{
			"16: all of IPv6 is no IPv4", []Policy{ingress(to(cidr("::/0")))},
			[]string{"in 2600::1 TCP/1", "in fd00::2 TCP/1"}, []string{"in 1.1.1.1 TCP/1", "in 10.0.0.2 TCP/1"},
		},
		{
			"16: IPv4 written as IPv6 is IPv4", []Policy{ingress(to(cidr("::ffff:10.0.0.0/104", "::ffff:10.0.0.3/128")))},
			[]string{"in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.3 TCP/1", "in 11.0.0.0 TCP/1", "in fd00::2 TCP/1"},
		},
		{
			"16: an IPv6 block around all of IPv4", []Policy{ingress(to(cidr("::/64")), to(cidr("10.0.0.0/30")))},
			[]string{"in ::1:2:3:4 TCP/1", "in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.4 TCP/1", "in 1.1.1.1 TCP/1"},
		},
		{
			"16: /31 and /128", []Policy{ingress(to(cidr("10.0.0.2/31"), cidr("fd00::2/128")))},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.3 TCP/1", "in fd00::2 TCP/1"}, []string{"in 10.0.0.4 TCP/1", "in fd00::3 TCP/1"},
		},
		{
			"17: pod and namespace selector in one peer", []Policy{ingress(to(podsIn(is("team", "b"), is("app", "api"))))},
			nil, []string{"in 10.0.0.2 TCP/1", "in 10.0.0.3 TCP/1"},
		},
		{
			"17: pod and namespace selector in two peers", []Policy{ingress(to(podsIn(is("team", "b"), nil), pods("shop", is("app", "api"))))},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.3 TCP/1"}, []string{"in 10.0.0.4 TCP/1"},
		},
		{
			"17: an empty pod selector is the own namespace", []Policy{ingress(to(pods("shop", nil)))},
			[]string{"in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.3 TCP/1", "in 1.1.1.1 TCP/1"},
		},
		{
			"17: empty selectors match no address outside", []Policy{ingress(to(podsIn(nil, nil)))},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.3 TCP/1", "in 10.0.0.4 TCP/1"}, []string{"in 1.1.1.1 TCP/1", "in 10.0.0.9 TCP/1"},
		},
		{
			"17: a namespace nobody described has its name", []Policy{ingress(to(podsIn(is(nameLabel, "unknown"), nil)))},
			[]string{"in 10.0.0.4 TCP/1"}, []string{"in 10.0.0.2 TCP/1"},
		},
		{
			"18: policies and rules are ORed", []Policy{
				ingress(to(pods("shop", nil)).on(port(TCP, 1, 1)), to().on(port(TCP, 2, 2))),
				networkPolicy("more", [2]bool{true, false}, []Rule{to(pods("shop", nil)).on(port(TCP, 3, 3))}, nil),
			},
			[]string{"in 10.0.0.2 TCP/1", "in 10.0.0.2 TCP/2", "in 10.0.0.2 TCP/3", "in 1.1.1.1 TCP/2"},
			[]string{"in 1.1.1.1 TCP/1", "in 1.1.1.1 TCP/3", "in 10.0.0.2 TCP/4"},
		},
		{
			"18: a rule with no peer matches nothing", []Policy{ingress(Rule{Action: Allow, AnyPort: true}, Rule{Action: Allow, AnyPeer: true})},
			nil, []string{"in 10.0.0.2 TCP/1"},
		},
		{
			"22: both families alike", []Policy{ingress(to(pods("shop", is("app", "api"))))},
			[]string{"in 10.0.0.2 TCP/1", "in fd00::2 TCP/1"}, []string{"in 10.0.0.3 TCP/1", "in fd00::3 TCP/1"},
		},
		{
			"23: isolation ends before the baseline, by direction", []Policy{ingress(to(pods("shop", nil))), clusterPolicy("base", TierBaseline, 0, to().deny())},
			[]string{"in 10.0.0.2 TCP/1"}, []string{"in 1.1.1.1 TCP/1", "eg 10.0.0.2 TCP/1"},
		},
		{
			"24: the admin tier comes first", []Policy{
				ingress(to(pods("shop", nil))),
				clusterPolicy("second", TierAdmin, 2, to().deny()),
				clusterPolicy("first", TierAdmin, 1, to(podsIn(nil, is("app", "api"))).on(port(TCP, 1, 9)).pass(), to().on(port(TCP, 8, 8))),
			},
			[]string{"in 10.0.0.2 TCP/1", "in 1.1.1.1 TCP/8", "eg 10.0.0.2 TCP/9"},
			[]string{"in 10.0.0.2 TCP/10", "in 10.0.0.3 TCP/1", "eg 10.0.0.3 TCP/1"},
		},
		{
			"24: pass leads to isolation, to the baseline, to allow", []Policy{
				ingress(),
				clusterPolicy("admin", TierAdmin, 1, to().pass(), to().deny()),
				clusterPolicy("base", TierBaseline, 0, to().on(port(TCP, 5, 5)).pass(), to().on(port(TCP, 0, 9)).deny()),
			},
			[]string{"eg 10.0.0.2 TCP/5", "eg 10.0.0.2 TCP/10"}, []string{"in 10.0.0.2 TCP/5", "eg 10.0.0.2 TCP/6"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, k := NewCompiler(), newKernel()
			for _, ns := range cornerNamespaces {
				c.SetNamespace(ns)
			}
			for _, p := range cornerPods {
				mustSetPod(t, c, p)
			}
			for _, p := range tt.policies {
				mustSetPolicy(t, c, p)
			}
			applyAll(t, k, c.Compile())
			for _, s := range tt.allowed {
				checkVerdict(t, c, k, "web", s, Allow)
			}
			for _, s := range tt.denied {
				checkVerdict(t, c, k, "web", s, Deny)
			}
		})
	}
}

func mustSetPod(t testing.TB, c *Compiler, p Pod) {
	t.Helper()
	if err := c.SetPod(p); err != nil {
		t.Fatal(err)
	}
}

func mustSetPolicy(t testing.TB, c *Compiler, p Policy) {
	t.Helper()
	if err := c.SetPolicy(p); err != nil {
		t.Fatal(err)
	}
}

// parseQuestion reads "in|eg address proto/port".
func parseQuestion(t testing.TB, s string) question {
	t.Helper()
	protocols := map[string]Protocol{"TCP": TCP, "UDP": UDP, "SCTP": SCTP, "ICMP": ICMP, "ICMPv6": ICMPv6}
	fields := strings.Fields(s)
	proto, number, _ := strings.Cut(fields[2], "/")
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || protocols[proto] == 0 {
		t.Fatalf("question %q: %v", s, err)
	}
	q := question{Ingress, netip.MustParseAddr(fields[1]), protocols[proto], uint16(n)}
	if fields[0] == "eg" {
		q.direction = Egress
	}
	return q
}

// checkVerdict asks Judge and the tables.
func checkVerdict(t testing.TB, c *Compiler, k *kernel, pod PodKey, s string, want Action) Verdict {
	t.Helper()
	q := parseQuestion(t, s)
	v, err := c.Judge(q.direction, pod, q.peer, q.proto, q.port)
	if err != nil || v.Action != want {
		t.Errorf("%s: %v, %v, want %v", s, v, err, want)
	}
	if got := k.judge(pod, q); !v.Self && got.action != want {
		t.Errorf("%s: tables say %v, want %v", s, got, want)
	}
	return v
}
