// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

const (
	webAddr, clientAddr, strangerAddr = "10.0.0.1", "10.0.0.2", "10.0.0.3"
)

// town has three pods; web is isolated for ingress and lets client in at
// TCP 80.
func town(t *testing.T) *policy.Compiler {
	t.Helper()
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: "ns"})
	for name, address := range map[string]string{"web": webAddr, "client": clientAddr, "stranger": strangerAddr} {
		setPod(t, c, townPod(name, address))
	}
	setPolicy(t, c, allow("policy", "web", "client", 80))
	return c
}

func townPod(name, address string) policy.Pod {
	p := policy.Pod{
		Key: policy.PodKey("uid-" + name), UID: "uid-" + name, Namespace: "ns", Name: name,
		Labels: map[string]string{"app": name}, Local: true,
	}
	if address != "" {
		p.Addresses = []netip.Addr{netip.MustParseAddr(address)}
	}
	return p
}

func app(name string) policy.PodSelector {
	return policy.PodSelector{Namespace: "ns", Pods: policy.Selector{{Key: "app", Operator: policy.In, Values: []string{name}}}}
}

// allow isolates a pod for ingress but for another's TCP ports.
func allow(name, subject, peer string, ports ...uint16) policy.Policy {
	from := app(peer)
	rule := policy.Rule{Action: policy.Allow, Peers: []policy.Peer{{Pods: &from}}, Text: "from " + peer}
	for _, p := range ports {
		rule.Ports = append(rule.Ports, policy.Port{Protocol: policy.TCP, First: p, Last: p})
	}
	return policy.Policy{
		UID: name, Kind: "NetworkPolicy", Namespace: "ns", Name: name, Tier: policy.TierNamespace,
		Subject: app(subject), Isolates: [2]bool{policy.Ingress: true}, Rules: [2][]policy.Rule{policy.Ingress: {rule}},
	}
}

func setPod(t *testing.T, c *policy.Compiler, p policy.Pod) {
	t.Helper()
	if err := c.SetPod(p); err != nil {
		t.Fatal(err)
	}
}

func setPolicy(t *testing.T, c *policy.Compiler, p policy.Policy) {
	t.Helper()
	if err := c.SetPolicy(p); err != nil {
		t.Fatal(err)
	}
}

// wantWeb asks what web lets in: from client and from the stranger, at port 80.
func (l *lab) wantWeb(e pinning.Endpoint, client, stranger bpf.DatapathReason) {
	l.t.Helper()
	for peer, want := range map[string]bpf.DatapathReason{clientAddr: client, strangerAddr: stranger} {
		if a := l.probe(e.Gate, policy.Ingress, webAddr, peer, 80); a.Reason != want {
			l.t.Errorf("from %s: %+v, not reason %d", peer, a, want)
		}
	}
}

const (
	byPolicy  = bpf.DatapathReasonREASON_POLICY
	byDefault = bpf.DatapathReasonREASON_DEFAULT
	byClosed  = bpf.DatapathReasonREASON_CLOSED
	byOpen    = bpf.DatapathReasonREASON_OPEN
)

// contents of what Apply writes, by map and key.
func (l *lab) contents() map[string]map[string]string {
	l.t.Helper()
	out := map[string]map[string]string{}
	for _, name := range []string{
		bpf.DatapathMapPods, bpf.DatapathMapPeers, bpf.DatapathMapBlocks, bpf.DatapathMapJoins, bpf.DatapathMapClasses,
		bpf.DatapathMapRulesets, bpf.DatapathMapCells, bpf.DatapathMapRuleInfo, bpf.DatapathMapPolicyInfo,
		bpf.DatapathMapRulesetPolicies, bpf.DatapathMapGates,
	} {
		m := l.pinned(name)
		out[name] = map[string]string{}
		var key, value []byte
		entries := m.Iterate()
		for entries.Next(&key, &value) {
			if strings.Trim(string(value), "\x00") != "" {
				out[name][string(key)] = string(value)
			}
		}
		if err := entries.Err(); err != nil {
			l.t.Fatal(err)
		}
	}
	return out
}

func TestFirstUpdateIsFull(t *testing.T) {
	l := newLab(t)
	c := town(t)
	c.Compile()
	setPolicy(t, c, allow("second", "web", "stranger", 81))
	if _, err := l.state.Apply(t.Context(), c.Compile()); !errors.Is(err, pinning.ErrInvalid) {
		t.Errorf("an incremental update of nothing: %v", err)
	}
	l.wantHoldings(map[string]int{})
}

// The daemon publishes before ADD, so ADD needs nobody.
func TestPublishedBeforeAdd(t *testing.T) {
	l := newLab(t)
	apply(t, l.state, town(t).Compile())
	l.state = l.open() // another process: the plugin
	web, enforced := l.add(request(l.veth("web"), webAddr))
	if enforced.State() != "enforcing" || enforced.Egress != pinning.RulesetOpen {
		t.Errorf("web is %s: %+v", enforced.State(), enforced)
	}
	l.wantWeb(web, byPolicy, byDefault)
	_, free := l.add(request(l.veth("client"), clientAddr))
	if free.State() != "open" {
		t.Errorf("client, which nothing selects, is %s", free.State())
	}
	_, unknown := l.add(request(l.veth("unheard"), "10.0.0.77"))
	if unknown.State() != "closed" {
		t.Errorf("a pod nobody published is %s", unknown.State())
	}
}

func TestReadingBack(t *testing.T) {
	l := newLab(t)
	apply(t, l.state, town(t).Compile())
	web, enforced := l.add(request(l.veth("web"), webAddr))
	answer := l.probe(web.Gate, policy.Ingress, webAddr, clientAddr, 80)
	if answer.Ruleset != enforced.Ingress {
		t.Errorf("ruleset %d decided, not %d", answer.Ruleset, enforced.Ingress)
	}
	rule, err := l.state.Rule(answer.Rule)
	if err != nil || rule.Text != "from client" || rule.Policy.Name != "policy" || rule.Index != 0 || rule.Action != policy.Allow {
		t.Errorf("rule %d is %+v, %v", answer.Rule, rule, err)
	}
	ruleset, err := l.state.Ruleset(enforced.Ingress)
	if err != nil || ruleset.Direction != policy.Ingress || ruleset.Default != policy.Deny || ruleset.DefaultRule == nil ||
		ruleset.DefaultRule.Index != -1 || len(ruleset.Policies) != 1 || ruleset.Policies[0].UID != "policy" {
		t.Errorf("ruleset %d is %+v, %v", enforced.Ingress, ruleset, err)
	}
	at := policy.Coordinate(policy.TCP, 80)
	if cell := ruleset.Cells[answer.Class]; len(cell) != 1 || cell[0] != (pinning.Interval{First: at, Last: at, Action: policy.Allow, Rule: answer.Rule}) {
		t.Errorf("its cell of class %d is %+v", answer.Class, cell)
	}
	for _, id := range []uint32{pinning.RulesetClosed, pinning.RulesetOpen, 99, 1 << 20} {
		if _, err := l.state.Ruleset(id); !errors.Is(err, pinning.ErrNotFound) {
			t.Errorf("ruleset %d: %v", id, err)
		}
	}
	if _, err := l.state.Rule(99); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("rule 99: %v", err)
	}
}

// A restarted daemon finds its own work and changes nothing.
func TestRestartAdopts(t *testing.T) {
	l := newLab(t)
	apply(t, l.state, town(t).Compile())
	web, _ := l.add(request(l.veth("web"), webAddr))
	before := l.contents()
	for range 2 {
		l.state = l.open()
		done, err := l.state.Apply(t.Context(), town(t).Compile())
		if err != nil || len(done.Problems) != 0 || done.Gates != 0 {
			t.Errorf("adopting: %+v, %v", done, err)
		}
		for name, entries := range l.contents() {
			if !reflect.DeepEqual(entries, before[name]) {
				t.Errorf("adopting changed %s:\n%q\n%q", name, before[name], entries)
			}
		}
	}
	l.wantWeb(web, byPolicy, byDefault)
	// It knows what it adopted: it goes on incrementally.
	c := town(t)
	c.Compile()
	setPolicy(t, c, allow("policy", "web", "stranger", 80))
	apply(t, l.state, c.Compile())
	l.wantWeb(web, byDefault, byPolicy)
}

// Policy that went while no daemon ran is swept.
func TestRestartSweeps(t *testing.T) {
	fresh := newLab(t)
	next := func() *policy.Compiler {
		c := town(t)
		setPolicy(t, c, allow("policy", "web", "stranger", 443))
		return c
	}
	apply(t, fresh.state, next().Compile())
	want := fresh.holdings()
	t.Run("after a change", func(t *testing.T) {
		l := newLab(t)
		c := town(t)
		for i := range 5 {
			setPod(t, c, townPod(fmt.Sprintf("p%d", i), fmt.Sprintf("10.0.1.%d", i)))
			setPolicy(t, c, allow(fmt.Sprintf("policy-%d", i), fmt.Sprintf("p%d", i), "client", 80, 90, 100, 110, 120))
		}
		apply(t, l.state, c.Compile())
		l.state = l.open()
		apply(t, l.state, next().Compile())
		pastGrace()
		if err := l.state.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.wantHoldings(want)
	})
}

// What policy came and went leaves nothing.
func TestUpdatesLeaveNothing(t *testing.T) {
	l := newLab(t)
	c := town(t)
	apply(t, l.state, c.Compile())
	web, _ := l.add(request(l.veth("web"), webAddr))
	before := l.holdings()
	for round := range 2 {
		for i := range 5 {
			setPod(t, c, townPod(fmt.Sprintf("p%d", i), fmt.Sprintf("10.0.1.%d", i+1)))
			p := allow(fmt.Sprintf("policy-%d", i), "web", fmt.Sprintf("p%d", i), 81, 83, 85, 87, 89, 91)
			p.Rules[policy.Ingress][0].Peers = append(p.Rules[policy.Ingress][0].Peers,
				policy.Peer{Block: &policy.Block{CIDR: netip.MustParsePrefix(fmt.Sprintf("172.16.%d.0/24", i))}})
			setPolicy(t, c, p)
			apply(t, l.state, c.Compile())
		}
		l.wantWeb(web, byPolicy, byDefault)
		if a := l.probe(web.Gate, policy.Ingress, webAddr, "172.16.3.9", 85); a.Verdict != bpf.DatapathVerdictVERDICT_ALLOWED {
			t.Errorf("from a block: %+v", a)
		}
		for i := range 5 {
			c.DeletePod(policy.PodKey(fmt.Sprintf("uid-p%d", i)))
			c.DeletePolicy(fmt.Sprintf("policy-%d", i))
		}
		apply(t, l.state, c.Compile())
		apply(t, l.state, c.Compact())
		pastGrace()
		if err := l.state.Sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.wantWeb(web, byPolicy, byDefault)
		if got := l.holdings(); !reflect.DeepEqual(got, before) {
			t.Errorf("round %d: the instance holds %v, not %v", round, got, before)
		}
	}
}

// Cells that are not what their ruleset's digest promises are written anew.
func TestRestartMendsCells(t *testing.T) {
	for name, harm := range map[string]func(*lab, *ebpf.Map, bpf.DatapathCellKey, bpf.DatapathCell) error{
		"another action": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, c bpf.DatapathCell) error {
			c.Intervals[0].Action ^= 1
			return m.Put(&k, &c)
		},
		"another range": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, c bpf.DatapathCell) error {
			c.Intervals[0].First = 0
			return m.Put(&k, &c)
		},
		"gone": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, _ bpf.DatapathCell) error { return m.Delete(&k) },
		"a class too many": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, c bpf.DatapathCell) error {
			k.Class, c.Class = 0, 0
			return m.Put(&k, &c)
		},
		"chunks too many": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, c bpf.DatapathCell) error {
			k.Chunk, c.Chunk = 7, 7
			return m.Put(&k, &c)
		},
		"no such ruleset": func(_ *lab, m *ebpf.Map, k bpf.DatapathCellKey, c bpf.DatapathCell) error {
			k.Ruleset, c.Ruleset = 999, 999
			return m.Put(&k, &c)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			apply(t, l.state, town(t).Compile())
			web, _ := l.add(request(l.veth("web"), webAddr))
			want := l.holdings()
			m := l.pinned(bpf.DatapathMapCells)
			var k bpf.DatapathCellKey
			var c bpf.DatapathCell
			if !m.Iterate().Next(&k, &c) {
				t.Fatal("no cell is pinned")
			}
			if err := harm(l, m, k, c); err != nil {
				t.Fatal(err)
			}
			l.state = l.open()
			apply(t, l.state, town(t).Compile())
			l.wantWeb(web, byPolicy, byDefault)
			pastGrace()
			if err := l.state.Sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			l.wantWeb(web, byPolicy, byDefault)
			l.wantHoldings(want)
		})
	}
}
