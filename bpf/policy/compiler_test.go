// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// corner returns a compiler with the cluster of the corner cases and a model of
// its tables.
func corner(t testing.TB, policies ...Policy) (*Compiler, *kernel) {
	t.Helper()
	c, k := NewCompiler(), newKernel()
	for _, ns := range cornerNamespaces {
		c.SetNamespace(ns)
	}
	for _, p := range cornerPods {
		mustSetPod(t, c, p)
	}
	for _, p := range policies {
		mustSetPolicy(t, c, p)
	}
	applyAll(t, k, c.Compile())
	return c, k
}

// TestHistories are corner cases 19 to 21: what happens over time. Each step is
// an edit and what then holds.
func TestHistories(t *testing.T) {
	type step struct {
		edit            func(t *testing.T, c *Compiler)
		allowed, denied []string
	}
	reused := Pod{Key: "reused", UID: "reused", Namespace: "bank", Name: "reused.0", Labels: map[string]string{"app": "other"}, Addresses: addresses("10.0.0.2")}
	api := cornerPods[1]
	setPod := func(p Pod, with func(*Pod)) func(*testing.T, *Compiler) {
		return func(t *testing.T, c *Compiler) {
			if with != nil {
				with(&p)
			}
			mustSetPod(t, c, p)
		}
	}
	deletePod := func(k PodKey) func(*testing.T, *Compiler) {
		return func(_ *testing.T, c *Compiler) { c.DeletePod(k) }
	}
	setPolicy := func(p Policy) func(*testing.T, *Compiler) {
		return func(t *testing.T, c *Compiler) { mustSetPolicy(t, c, p) }
	}
	fromAPI := ingress(to(podsIn(nil, is("app", "api"))))
	fromTeamB := ingress(to(podsIn(is("team", "b"), nil)))

	tests := []struct {
		name   string
		policy Policy
		steps  []step
	}{
		{"19: an address goes to a new pod before its old one is gone", fromAPI, []step{
			{nil, []string{"in 10.0.0.2 TCP/1"}, nil},
			{setPod(reused, nil), nil, []string{"in 10.0.0.2 TCP/1"}},
			{deletePod("api"), nil, []string{"in 10.0.0.2 TCP/1", "in fd00::2 TCP/1"}},
		}},
		{"19: a terminating pod comes late", fromAPI, []step{
			{deletePod("api"), nil, []string{"in 10.0.0.2 TCP/1"}},
			{setPod(reused, nil), nil, []string{"in 10.0.0.2 TCP/1"}},
			{setPod(api, func(p *Pod) { p.Terminating = true }), []string{"in fd00::2 TCP/1"}, []string{"in 10.0.0.2 TCP/1"}},
			{setPod(reused, func(p *Pod) { p.Addresses = nil }), []string{"in 10.0.0.2 TCP/1"}, nil},
		}},
		{"19: a pod begins to terminate after its address was given away", fromAPI, []step{
			{setPod(reused, nil), nil, []string{"in 10.0.0.2 TCP/1"}},
			{setPod(reused, func(p *Pod) { p.Terminating = true }), []string{"in 10.0.0.2 TCP/1"}, nil},
			{deletePod("reused"), []string{"in 10.0.0.2 TCP/1"}, nil},
		}},
		{"19: a pod is relabelled", fromAPI, []step{
			{setPod(api, func(p *Pod) { p.Labels = map[string]string{"app": "x"} }), nil, []string{"in 10.0.0.2 TCP/1"}},
			{setPod(api, nil), []string{"in 10.0.0.2 TCP/1", "in fd00::2 TCP/1"}, nil},
		}},
		{"19: a pod moves to the host network", fromAPI, []step{
			{setPod(api, func(p *Pod) { p.HostNetwork = true }), nil, []string{"in 10.0.0.2 TCP/1"}},
		}},
		{"19: a namespace is relabelled, deleted and made again", fromTeamB, []step{
			{nil, []string{"in 10.0.0.3 TCP/1"}, []string{"in 10.0.0.2 TCP/1"}},
			{func(_ *testing.T, c *Compiler) {
				c.SetNamespace(Namespace{Name: "shop", Labels: map[string]string{"team": "b"}})
			}, []string{"in 10.0.0.2 TCP/1"}, nil},
			{func(_ *testing.T, c *Compiler) { c.DeleteNamespace("bank") }, nil, []string{"in 10.0.0.3 TCP/1"}},
			{func(_ *testing.T, c *Compiler) { c.SetNamespace(cornerNamespaces[1]) }, []string{"in 10.0.0.3 TCP/1"}, nil},
		}},
		{"19: a pod is deleted and made again", fromAPI, []step{
			{func(t *testing.T, c *Compiler) {
				c.DeletePod("api")
				mustSetPod(t, c, api)
			}, []string{"in 10.0.0.2 TCP/1"}, nil},
		}},
		{"20: the pod itself is relabelled out of the policy and back", fromAPI, []step{
			{setPod(cornerPods[0], func(p *Pod) { p.Labels = nil }), []string{"in 1.1.1.1 TCP/1"}, nil},
			{setPod(cornerPods[0], nil), nil, []string{"in 1.1.1.1 TCP/1"}},
		}},
		{"21: a policy of the same name in another namespace", fromAPI, []step{
			{setPolicy(Policy{
				UID: "other", Kind: "NetworkPolicy", Namespace: "bank", Name: "in", Tier: TierNamespace, Isolates: [2]bool{true, true},
				Subject: PodSelector{Namespace: "bank"},
			}), []string{"in 10.0.0.2 TCP/1", "eg 10.0.0.3 TCP/1"}, []string{"in 10.0.0.3 TCP/1"}},
			{func(_ *testing.T, c *Compiler) { c.DeletePolicy("other") }, []string{"in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.3 TCP/1"}},
		}},
		{"21: a policy is renamed", fromAPI, []step{
			{func(t *testing.T, c *Compiler) {
				renamed := fromAPI
				renamed.UID, renamed.Name = "in2", "in2"
				mustSetPolicy(t, c, renamed)
				c.DeletePolicy("in")
			}, []string{"in 10.0.0.2 TCP/1"}, []string{"in 10.0.0.3 TCP/1"}},
		}},
		{"21: the last policy goes", fromAPI, []step{
			{func(_ *testing.T, c *Compiler) { c.DeletePolicy("in") }, []string{"in 10.0.0.3 TCP/1"}, nil},
		}},
		{"21: a policy selects other pods", fromAPI, []step{
			{func(t *testing.T, c *Compiler) {
				moved := fromAPI
				moved.Subject.Pods = is("app", "api")
				mustSetPolicy(t, c, moved)
			}, []string{"in 10.0.0.3 TCP/1"}, nil},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, k := corner(t, tt.policy)
			for _, s := range tt.steps {
				if s.edit != nil {
					s.edit(t, c)
				}
				// The last word is that of Compile and of Compact.
				for _, u := range []func() Update{c.Compile, c.Compact} {
					applyAll(t, k, u())
					for _, q := range s.allowed {
						checkVerdict(t, c, k, "web", q, Allow)
					}
					for _, q := range s.denied {
						checkVerdict(t, c, k, "web", q, Deny)
					}
				}
			}
		})
	}
}

// TestHundredsOfPorts is corner case 21: a policy with many ports and blocks.
func TestHundredsOfPorts(t *testing.T) {
	var ports []Port
	var peers []Peer
	for i := range uint16(500) {
		ports = append(ports, port(TCP, 2*i, 2*i), port(UDP, i, i))
		peers = append(peers, cidr(fmt.Sprintf("20.%d.%d.0/24", i/250, i%250)))
	}
	c, k := corner(t, ingress(to(peers...).on(ports...)))
	checkVerdict(t, c, k, "web", "in 20.1.249.9 TCP/998", Allow)
	checkVerdict(t, c, k, "web", "in 20.1.249.9 TCP/997", Deny)
	checkVerdict(t, c, k, "web", "in 20.1.250.9 TCP/998", Deny)

	u := c.Snapshot()
	if len(u.Classes) != 1 || len(u.Cells) != 1 {
		t.Errorf("%d classes and %d cells for blocks nothing tells apart", len(u.Classes), len(u.Cells))
	}
	// 500 ports of TCP, and one merged range of UDP.
	if n := len(u.Cells[0].Intervals); n != 501 {
		t.Errorf("%d intervals, want 501", n)
	}
}

func TestInvalid(t *testing.T) {
	v6 := netip.MustParsePrefix("fd00::/8")
	tests := []struct {
		name string
		with func(*Policy)
		want string
	}{
		{"no UID", func(p *Policy) { p.UID = "" }, "NetworkPolicy shop/in: uid: must not be empty"},
		{"tier", func(p *Policy) { p.Tier = 7 }, "tier: 7 is unknown"},
		{"no namespace", func(p *Policy) { p.Subject.Namespace = "" }, "subject.namespace: must not be empty"},
		{"subject", func(p *Policy) { p.Subject.Pods = Selector{{}} }, "subject.pods: requirement 0: key: must not be empty"},
		{"isolating tier", func(p *Policy) { p.Tier = TierAdmin }, "ingress isolates: only policies of the namespace tier"},
		{"deny", func(p *Policy) { p.Rules[Egress] = []Rule{to(), to().deny()} }, "egress rule 1: action: rules of the namespace tier only allow"},
		{"action", func(p *Policy) {
			p.Tier, p.Isolates = TierAdmin, [2]bool{}
			p.Rules[Ingress] = []Rule{{Action: 9}}
		}, "ingress rule 0: action: 9 is unknown"},
		{"operator", func(p *Policy) {
			p.Rules[Ingress] = []Rule{to(podsIn(Selector{{Key: "a", Operator: 9}}, nil))}
		}, `ingress rule 0: peers[0].pods.namespaces: requirement 0: label "a": operator: 9 is unknown`},
		{"In without values", func(p *Policy) { p.Rules[Ingress] = []Rule{to(pods("x", is("a")))} },
			`ingress rule 0: peers[0].pods.pods: requirement 0: label "a": values: In and NotIn need`},
		{"Exists with values", func(p *Policy) {
			p.Rules[Ingress] = []Rule{to(pods("x", Selector{{Key: "a", Operator: Exists, Values: []string{"b"}}}))}
		}, `values: Exists and DoesNotExist take none`},
		{"no peer", func(p *Policy) { p.Rules[Ingress] = []Rule{to(Peer{})} }, "peers[0]: neither pods nor block is set"},
		{"two peers", func(p *Policy) {
			p.Rules[Ingress] = []Rule{to(Peer{Pods: &PodSelector{}, Block: &Block{}})}
		}, "peers[0]: pods and block are both set"},
		{"CIDR", func(p *Policy) { p.Rules[Ingress] = []Rule{to(Peer{Block: &Block{}})} }, "ingress rule 0: peers[0].block.cidr: not a valid prefix"},
		{"except outside", func(p *Policy) { p.Rules[Egress] = []Rule{to(cidr("10.0.0.0/8", "10.1.0.0/16", "11.0.0.0/16"))} },
			"egress rule 0: peers[0].block.except[1]: 11.0.0.0/16 is not a strict subset of 10.0.0.0/8"},
		{"except as large", func(p *Policy) { p.Rules[Egress] = []Rule{to(cidr("10.0.0.0/8", "10.0.0.0/8"))} }, "except[0]: 10.0.0.0/8 is not a strict subset"},
		{"except of the other family", func(p *Policy) {
			p.Rules[Egress] = []Rule{to(Peer{Block: &Block{CIDR: v6, Except: prefixes("10.0.0.0/8")}})}
		}, "except[0]: 10.0.0.0/8 is not a strict subset of fd00::/8"},
		{"except invalid", func(p *Policy) {
			p.Rules[Egress] = []Rule{to(Peer{Block: &Block{CIDR: v6, Except: make([]netip.Prefix, 1)}})}
		}, "except[0]: not a valid prefix"},
		{"port without protocol", func(p *Policy) { p.Rules[Ingress] = []Rule{to().on(port(AnyProtocol, 1, 1))} },
			"ingress rule 0: ports[0].protocol: a numeric port needs one"},
		{"ports reversed", func(p *Policy) { p.Rules[Ingress] = []Rule{to().on(port(TCP, 2, 3), port(TCP, 9, 8))} },
			"ingress rule 0: ports[1]: first port 9 is above last port 8"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, k := corner(t, ingress(to(pods("shop", nil))))
			bad := ingress(to())
			tt.with(&bad)
			err := c.SetPolicy(bad)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "NetworkPolicy shop/in: ") {
				t.Fatalf("error %q, want %q", err, tt.want)
			}
			// What was there stays in force.
			if u := c.Compile(); !reflect.DeepEqual(u, Update{}) {
				t.Errorf("a refused policy changed %+v", u)
			}
			checkVerdict(t, c, k, "web", "in 1.1.1.1 TCP/1", Deny)
		})
	}
}

func TestInvalidPod(t *testing.T) {
	tests := []struct {
		name string
		with func(*Pod)
		want string
	}{
		{"key", func(p *Pod) { p.Key = "" }, "pod shop/api.0: key: must not be empty"},
		{"address", func(p *Pod) { p.Addresses = append(p.Addresses, netip.Addr{}) }, "pod shop/api.0: addresses[2]: not a valid address"},
		{"unspecified", func(p *Pod) { p.Addresses = addresses("::") }, "pod shop/api.0: addresses[0]: not a valid address"},
		{"port name", func(p *Pod) { p.Ports = []NamedPort{{Protocol: TCP}} }, "pod shop/api.0: ports[0]: name: must not be empty"},
		{"port protocol", func(p *Pod) { p.Ports = []NamedPort{{Name: "a"}} }, `pod shop/api.0: ports[0]: port "a": protocol: must be set`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, k := corner(t, ingress(to(pods("shop", nil))))
			bad := cornerPods[1]
			bad.Addresses = slices.Clone(bad.Addresses)
			tt.with(&bad)
			if err := c.SetPod(bad); err == nil || err.Error() != tt.want {
				t.Fatalf("error %q, want %q", err, tt.want)
			}
			if u := c.Compile(); !reflect.DeepEqual(u, Update{}) {
				t.Errorf("a refused pod changed %+v", u)
			}
			checkVerdict(t, c, k, "web", "in 10.0.0.2 TCP/1", Allow)
		})
	}
}

// TestSmallUpdates checks that an update holds what an edit changes and nothing
// beside it.
func TestSmallUpdates(t *testing.T) {
	twin := cornerPods[0]
	twin.Key, twin.UID, twin.Name, twin.Addresses = "twin", "twin", "web.1", addresses("10.0.0.5")
	base := ingress(to(pods("shop", nil)).on(port(TCP, 80, 80)), to(cidr("10.0.0.0/8")).on(port(TCP, 81, 81)))

	tests := []struct {
		name string
		edit func(t *testing.T, c *Compiler)
		want string
	}{
		{"nothing", func(*testing.T, *Compiler) {}, ""},
		{"the same again", func(t *testing.T, c *Compiler) {
			mustSetPolicy(t, c, base)
			mustSetPod(t, c, cornerPods[0])
			c.SetNamespace(cornerNamespaces[0])
		}, ""},
		{"the same in another order", func(t *testing.T, c *Compiler) {
			p := base
			p.Rules[Ingress] = []Rule{to(pods("shop", nil), pods("shop", nil)).on(port(TCP, 80, 80)), base.Rules[Ingress][1]}
			mustSetPolicy(t, c, p)
		}, ""},
		{"a local pod like another", func(t *testing.T, c *Compiler) { mustSetPod(t, c, twin) }, "1 peers 1 subjects"},
		{"a local pod like another, without address", func(t *testing.T, c *Compiler) {
			p := twin
			p.Addresses = nil
			mustSetPod(t, c, p)
		}, "1 joins 1 subjects"},
		{"a remote pod like another", func(t *testing.T, c *Compiler) {
			p := twin
			p.Local = false
			mustSetPod(t, c, p)
		}, "1 peers"},
		{"a pod that nothing tells from everyone else", func(t *testing.T, c *Compiler) {
			mustSetPod(t, c, Pod{Key: "x", Namespace: "nowhere", Name: "x", Addresses: addresses("12.0.0.1")})
		}, ""},
		{"a local pod that nothing tells from everyone else", func(t *testing.T, c *Compiler) {
			mustSetPod(t, c, Pod{Key: "x", Namespace: "nowhere", Name: "x", Addresses: addresses("12.0.0.1"), Local: true})
		}, "1 subjects"},
		{"audit", func(t *testing.T, c *Compiler) {
			p := cornerPods[0]
			p.Audit = true
			mustSetPod(t, c, p)
		}, "1 subjects"},
		{"a pod goes", func(_ *testing.T, c *Compiler) { c.DeletePod("api") }, "2 gone peers"},
		{"a policy that selects no pod of this node", func(t *testing.T, c *Compiler) {
			p := ingress(to(podsIn(is("team", "b"), nil)))
			p.UID, p.Name, p.Subject.Pods = "other", "other", is("app", "none")
			mustSetPolicy(t, c, p)
		}, ""},
		{"a rule changes its port", func(t *testing.T, c *Compiler) {
			p := base
			p.Rules[Ingress] = []Rule{to(pods("shop", nil)).on(port(TCP, 90, 90)), base.Rules[Ingress][1]}
			mustSetPolicy(t, c, p)
		}, "1 rules 1 rulesets 3 cells 1 subjects 1 gone rulesets 1 gone rules"},
		{"the local pod goes", func(_ *testing.T, c *Compiler) { c.DeletePod("web") },
			"2 gone peers 1 gone subjects 1 gone rulesets 3 gone rules 1 gone policies"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, _ := corner(t, base)
			tt.edit(t, c)
			if got := counts(c.Compile()); got != tt.want {
				t.Errorf("update of %q, want %q", got, tt.want)
			}
		})
	}
}

// counts says how long the lists of an update are.
func counts(u Update) string {
	var parts []string
	count := func(n int, what string) {
		if n > 0 {
			parts = append(parts, fmt.Sprint(n, " ", what))
		}
	}
	count(len(u.Policies), "policies")
	count(len(u.Rules), "rules")
	count(len(u.Rulesets), "rulesets")
	count(len(u.Cells), "cells")
	count(len(u.Classes), "classes")
	count(len(u.Joins), "joins")
	count(len(u.Peers), "peers")
	count(len(u.Subjects), "subjects")
	count(len(u.GonePeers), "gone peers")
	count(len(u.GoneSubjects), "gone subjects")
	count(len(u.GoneJoins), "gone joins")
	count(len(u.GoneRulesets), "gone rulesets")
	count(len(u.GoneClasses), "gone classes")
	count(len(u.GoneRules), "gone rules")
	count(len(u.GonePolicies), "gone policies")
	return strings.Join(parts, " ")
}

// TestRetired follows a selector that goes out of use: its classes stay until
// Compact.
func TestRetired(t *testing.T) {
	c, k := corner(t, ingress(to(pods("shop", is("app", "api")))))
	mustSetPolicy(t, c, ingress(to(pods("shop", nil))))
	u := c.Compile()
	if len(u.GoneClasses) != 1 || len(u.Classes) == 0 || !c.Pending() {
		t.Fatalf("update of %q, pending %v", counts(u), c.Pending())
	}
	applyAll(t, k, u)
	if k.class(netip.MustParseAddr("10.0.0.2")) == k.class(netip.MustParseAddr("10.0.0.1")) {
		t.Error("a retired selector does not tell peers apart any more")
	}
	applyAll(t, k, c.Compact())
	if k.class(netip.MustParseAddr("10.0.0.2")) != k.class(netip.MustParseAddr("10.0.0.1")) || c.Pending() {
		t.Error("Compact did not merge classes")
	}
	if u := c.Compact(); counts(u) != "" {
		t.Errorf("another Compact changes %q", counts(u))
	}
}

func TestSnapshotFirst(t *testing.T) {
	for _, first := range []func(*Compiler) Update{(*Compiler).Snapshot, (*Compiler).Compact, (*Compiler).Compile} {
		c := NewCompiler()
		mustSetPolicy(t, c, ingress())
		mustSetPod(t, c, cornerPods[0])
		if u := first(c); !u.Full || len(u.Subjects) != 1 {
			t.Errorf("first update is full: %v, of %q", u.Full, counts(u))
		}
		if u := c.Compile(); u.Full || counts(u) != "" {
			t.Errorf("second update is full: %v, of %q", u.Full, counts(u))
		}
	}
}

// TestSharing checks that endpoints selected by the same policies share a
// ruleset, and what makes rulesets differ.
func TestSharing(t *testing.T) {
	c, _ := corner(t, ingress(to(pods("shop", nil)).on(named(TCP, "http"))))
	want := c.tables.subjects["web"].Rulesets
	tests := []struct {
		name string
		with func(*Pod)
		same bool
	}{
		{"another label", func(p *Pod) { p.Labels = map[string]string{"app": "web", "x": "y"} }, true},
		{"another port that no rule names", func(p *Pod) { p.Ports = []NamedPort{{"http", TCP, 8080}, {"x", TCP, 1}} }, true},
		{"another number for the name", func(p *Pod) { p.Ports = []NamedPort{{"http", TCP, 8081}} }, false},
		{"not selected", func(p *Pod) { p.Labels = nil }, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := cornerPods[0]
			p.Key = "other"
			tt.with(&p)
			mustSetPod(t, c, p)
			c.Compile()
			if got := c.tables.subjects["other"].Rulesets; (got == want) != tt.same {
				t.Errorf("rulesets %v and %v", got, want)
			}
		})
	}
	if want[Egress] != Open {
		t.Errorf("egress that nothing isolates has ruleset %s", want[Egress])
	}
}

// TestDigests pins digests: they are in pinned maps, where the next version has
// to find them.
func TestDigests(t *testing.T) {
	c, k := corner(t, ingress(to(pods("shop", is("app", "api"))).on(port(TCP, 80, 80)), to(cidr("10.0.0.0/8", "10.9.0.0/16"))))
	u := c.Snapshot()
	got := map[string]Digest{
		"policy":  u.Policies[0].ID,
		"ruleset": u.Rulesets[0].ID,
		"class":   k.class(netip.MustParseAddr("10.0.0.2")),
		"default": u.Rulesets[0].DefaultRule,
	}
	want := map[string]string{
		"policy":  "a6ef5538fb26e6d9e0980e28bfd40775",
		"ruleset": "207ec580fba791b654d9cabd36874095",
		"class":   "1c021fbd8bddc4416f3f5b1ba71a04cc",
		"default": "ed58d4812460da349f4dc81259291946",
	}
	for name, d := range got {
		if d.String() != want[name] {
			t.Errorf("%s is %s, want %s", name, d, want[name])
		}
	}
}

// TestRuleIdentity checks that counters survive: a rule that does not change
// keeps its digest when its policy changes around it.
func TestRuleIdentity(t *testing.T) {
	before, err := newPolicy(ingress(to(pods("shop", nil)), to().on(port(TCP, 1, 1))))
	if err != nil {
		t.Fatal(err)
	}
	after, err := newPolicy(ingress(to(pods("shop", nil)), to().on(port(TCP, 2, 2)), to(cidr("10.0.0.0/8"))))
	if err != nil {
		t.Fatal(err)
	}
	a, b := before.sides[Ingress], after.sides[Ingress]
	if a.content == b.content {
		t.Error("another content has the same digest")
	}
	if a.rules[0].info.ID != b.rules[0].info.ID || a.isolation.ID != b.isolation.ID {
		t.Error("an unchanged rule has another digest")
	}
	if a.rules[1].info.ID == b.rules[1].info.ID {
		t.Error("a changed rule has the same digest")
	}
}

func TestJudge(t *testing.T) {
	second := networkPolicy("again", [2]bool{true, false}, nil, nil)
	first := ingress(to(pods("shop", nil)).on(port(TCP, 80, 80)))
	guard := clusterPolicy("guard", TierAdmin, 5, to(cidr("6.6.6.0/24")).deny())
	guard.Rules[Egress][0].Text = "to 6.6.6.0/24"
	c, k := corner(t, first, second, guard)

	v := checkVerdict(t, c, k, "web", "in 10.0.0.2 TCP/80", Allow)
	if v.Default || v.Policy.Name != "in" || v.Rule.Index != 0 || v.String() != "allow: NetworkPolicy shop/in, ingress rule 0" {
		t.Errorf("allowed by %v", v)
	}
	v = checkVerdict(t, c, k, "web", "in 10.0.0.2 TCP/81", Deny)
	if !v.Default || len(v.Isolated) != 2 || v.Rule.Index != -1 || v.Policy.Name != "again" ||
		v.String() != "deny: isolated by NetworkPolicy shop/again, NetworkPolicy shop/in, no rule matched" {
		t.Errorf("denied by %v", v)
	}
	v = checkVerdict(t, c, k, "web", "eg 6.6.6.6 TCP/81", Deny)
	if v.Default || v.String() != "deny: ClusterNetworkPolicy guard, egress rule 0: to 6.6.6.0/24" {
		t.Errorf("denied by %v", v)
	}
	v = checkVerdict(t, c, k, "web", "eg 7.7.7.7 TCP/81", Allow)
	if !v.Default || v.Isolated != nil || v.String() != "allow: no policy isolates the pod, no rule matched" {
		t.Errorf("allowed by %v", v)
	}
	v = checkVerdict(t, c, k, "web", "in 10.0.0.1 TCP/81", Allow)
	if !v.Self {
		t.Errorf("allowed by %v", v)
	}
	if v, err := c.Judge(Ingress, "node", netip.MustParseAddr("10.0.0.2"), TCP, 1); err != nil || v.Action != Allow || !v.HostNetwork {
		t.Errorf("host network: %v, %v", v, err)
	}
	if v.String() != "allow: a pod always reaches itself" {
		t.Errorf("says %q", v)
	}
	// IPv4 in IPv6 is IPv4.
	if v, err := c.Judge(Egress, "web", netip.MustParseAddr("::ffff:6.6.6.6"), TCP, 1); err != nil || v.Action != Deny {
		t.Errorf("mapped address: %v, %v", v, err)
	}
	if _, err := c.Judge(Ingress, "nobody", netip.MustParseAddr("10.0.0.2"), TCP, 1); !errors.Is(err, ErrUnknownPod) {
		t.Errorf("unknown pod: %v", err)
	}
	if _, err := c.Judge(Ingress, "api", netip.MustParseAddr("10.0.0.2"), TCP, 1); !errors.Is(err, ErrNotLocal) {
		t.Errorf("remote pod: %v", err)
	}
}
