// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// isFullOf asks for an error that says which map has no room.
func isFullOf(t *testing.T, what, name string, err error) {
	t.Helper()
	if !errors.Is(err, pinning.ErrFull) || !strings.Contains(err.Error(), name) {
		t.Errorf("%s: %v, not that %s has no room", what, err, name)
	}
}

// addresses from the first one on.
func addresses(first string, n int) (out []string) {
	for a := netip.MustParseAddr(first); len(out) < n; a = a.Next() {
		out = append(out, a.String())
	}
	return out
}

// An ADD that finds no room for all of its endpoint leaves nothing behind, and
// its interface closed.
func TestAddWithoutRoom(t *testing.T) {
	two := small
	two.Endpoints = 2 // and so 16 addresses
	few := small
	few.Peers = 8
	for name, c := range map[string]struct {
		capacity pinning.Capacity
		// before is what the first endpoint has, last what the next asks for.
		before, last []string
	}{
		bpf.DatapathMapClaims:  {two, addresses("10.0.1.1", 16), []string{"10.0.0.1"}},
		bpf.DatapathMapSources: {two, append(addresses("fe80::1", 8), addresses("10.0.1.1", 8)...), []string{"10.0.0.1"}},
		bpf.DatapathMapPeers:   {few, addresses("10.0.1.1", 8), []string{"10.0.0.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLabWith(t, c.capacity)
			first, _ := l.add(request(l.veth("a"), c.before...))
			before := l.holdings()
			host := l.veth("b")
			_, _, err := l.tryAdd(request(host, c.last...))
			isFullOf(t, "Add", name, err)
			l.wantHoldings(before)
			if err := l.check(first.Key, first); err != nil {
				t.Errorf("the other endpoint: %v", err)
			}
			// An ADD that died before it said so is cleaned up after as well.
			l.delete(pinning.AttachmentKey{ContainerID: "c-b", IfName: "eth0"})
			l.wantHoldings(before)
			l.delete(first.Key)
			l.add(request(host, c.last...))
		})
	}
}

// Addresses that IPAM hands out while nothing can note whose they are.
func TestClaimWithoutRoom(t *testing.T) {
	c := small
	c.Endpoints = 2
	l := newLabWith(t, c)
	key := pinning.AttachmentKey{ContainerID: "c-a", IfName: "eth0"}
	var all []netip.Addr
	for _, a := range addresses("10.0.0.1", 17) {
		all = append(all, netip.MustParseAddr(a))
	}
	isFullOf(t, "Claim", bpf.DatapathMapClaims, l.state.Claim(t.Context(), key, all))
	if err := l.state.Release(t.Context(), key, nil); err != nil {
		t.Fatal(err)
	}
	l.wantHoldings(map[string]int{})
}

// A pod that could not be published is closed when it comes, until the daemon
// has turned its gate, which needs no room.
func TestFullPodsClose(t *testing.T) {
	c := small
	c.Endpoints = 2 // and so 8 pods
	l := newLabWith(t, c)
	compiler := policy.NewCompiler()
	compiler.SetNamespace(policy.Namespace{Name: "ns"})
	for i := range 8 {
		setPod(t, compiler, townPod(fmt.Sprintf("p%d", i), ""))
	}
	apply(t, l.state, compiler.Compile())
	for name, address := range map[string]string{"web": webAddr, "client": clientAddr} {
		setPod(t, compiler, townPod(name, address))
	}
	setPolicy(t, compiler, allow("policy", "web", "client", 80))
	update := func(u policy.Update) {
		t.Helper()
		done, err := l.state.Apply(t.Context(), u)
		if err != nil {
			t.Fatal(err)
		}
		isFullOf(t, "Apply", bpf.DatapathMapPods, errors.Join(done.Problems...))
	}
	update(compiler.Compile())
	published, enforced := l.add(request(l.veth("p0"), "10.0.1.1"))
	if enforced.State() != "open" {
		t.Errorf("a pod that was published is %s", enforced.State())
	}
	web, enforced := l.add(request(l.veth("web"), webAddr))
	if enforced.State() != "closed" {
		t.Errorf("a pod that was not is %s", enforced.State())
	}
	update(compiler.Snapshot())
	l.wantWeb(web, byPolicy, byDefault)
	if now, err := l.state.Enforcement(published); err != nil || now.State() != "open" {
		t.Errorf("the other pod is %s, %v", now.State(), err)
	}
}

func TestFullEndpoints(t *testing.T) {
	c := small
	c.Endpoints = 2
	l := newLabWith(t, c)
	l.add(request(l.veth("a"), "10.0.0.1"))
	if err := l.state.Ready(t.Context()); err != nil {
		t.Errorf("with room for one: %v", err)
	}
	last, _ := l.add(request(l.veth("b"), "10.0.0.2"))
	if err := l.state.Ready(t.Context()); !errors.Is(err, pinning.ErrFull) {
		t.Errorf("Ready when full: %v", err)
	}
	before := l.holdings()
	if _, _, err := l.tryAdd(request(l.veth("c"), "10.0.0.3")); !errors.Is(err, pinning.ErrFull) || !strings.Contains(err.Error(), "endpoints") {
		t.Errorf("Add when full: %v", err)
	}
	l.wantHoldings(before)
	l.delete(last.Key)
	l.add(request(l.link("c"), "10.0.0.3"))
}

// What does not fit closes the endpoints it concerns, and them only, and is
// said; it opens them again once it fits.
func TestFullMapsClose(t *testing.T) {
	// many policies for one pod need cells, rules and blocks.
	crowd := func(t *testing.T, c *policy.Compiler) {
		for i := range 40 {
			p := allow(fmt.Sprintf("crowd-%d", i), "crowded", "client", uint16(1000+10*i))
			p.Rules[policy.Ingress][0].Peers = append(p.Rules[policy.Ingress][0].Peers,
				policy.Peer{Block: &policy.Block{CIDR: netip.MustParsePrefix(fmt.Sprintf("172.16.%d.0/24", i))}})
			setPolicy(t, c, p)
		}
	}
	for name, c := range map[string]struct {
		shrink func(*pinning.Capacity)
		says   string
	}{
		"cells":  {func(c *pinning.Capacity) { c.Cells = 8 }, "cells"},
		"rules":  {func(c *pinning.Capacity) { c.Rules = 16 }, "rule"},
		"blocks": {func(c *pinning.Capacity) { c.Blocks = 8 }, "blocks"},
	} {
		t.Run(name, func(t *testing.T) {
			capacity := small
			c.shrink(&capacity)
			l := newLabWith(t, capacity)
			compiler := town(t)
			setPod(t, compiler, townPod("crowded", "10.0.0.4"))
			apply(t, l.state, compiler.Compile())
			web, _ := l.add(request(l.veth("web"), webAddr))
			crowded, _ := l.add(request(l.veth("crowded"), "10.0.0.4"))
			crowd(t, compiler)
			done, err := l.state.Apply(t.Context(), compiler.Compile())
			if err != nil {
				t.Fatal(err)
			}
			problem := errors.Join(done.Problems...)
			if !errors.Is(problem, pinning.ErrFull) || !strings.Contains(problem.Error(), c.says) {
				t.Errorf("problems are %v", problem)
			}
			l.wantWeb(web, byPolicy, byDefault)
			for _, peer := range []string{strangerAddr, "192.0.2.1"} {
				for _, port := range []uint16{80, 1000, 1390} {
					if a := l.probe(crowded.Gate, policy.Ingress, "10.0.0.4", peer, port); a.Verdict != bpf.DatapathVerdictVERDICT_DENIED {
						t.Errorf("from %s to port %d: %+v", peer, port, a)
					}
				}
			}
			if name != "blocks" { // blocks that are missing allow nothing
				if a := l.probe(crowded.Gate, policy.Ingress, "10.0.0.4", clientAddr, 1000); a.Reason != byClosed {
					t.Errorf("the crowded endpoint is not closed: %+v", a)
				}
			}
			for i := range 40 {
				compiler.DeletePolicy(fmt.Sprintf("crowd-%d", i))
			}
			setPolicy(t, compiler, allow("crowd-last", "crowded", "client", 80))
			for _, update := range []policy.Update{compiler.Compile(), compiler.Compact()} {
				if _, err := l.state.Apply(t.Context(), update); err != nil {
					t.Fatal(err)
				}
			}
			pastGrace()
			done, err = l.state.Apply(t.Context(), compiler.Snapshot())
			if err := errors.Join(append(done.Problems, err)...); err != nil {
				t.Errorf("with few policies again: %v", err)
			}
			if a := l.probe(crowded.Gate, policy.Ingress, "10.0.0.4", clientAddr, 80); a.Reason != byPolicy {
				t.Errorf("the endpoint stays closed: %+v", a)
			}
			if a := l.probe(crowded.Gate, policy.Ingress, "10.0.0.4", strangerAddr, 80); a.Reason != byDefault {
				t.Errorf("from the stranger: %+v", a)
			}
		})
	}
}

// A peer without room for its class must not become "everyone else" where
// everyone else is allowed and it is denied.
func TestFullPeersClose(t *testing.T) {
	capacity := small
	capacity.Peers = 4
	l := newLabWith(t, capacity)
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: "ns"})
	for i := range 12 {
		setPod(t, c, townPod(fmt.Sprintf("p%d", i), fmt.Sprintf("10.0.0.%d", i+1)))
	}
	evil := app("p11")
	p := policy.Policy{
		UID: "deny", Kind: "ClusterNetworkPolicy", Name: "deny", Tier: policy.TierAdmin, Subject: app("p0"),
		Rules: [2][]policy.Rule{policy.Ingress: {{Action: policy.Deny, Peers: []policy.Peer{{Pods: &evil}}, AnyPort: true}}},
	}
	for i := range 10 {
		good := app(fmt.Sprintf("p%d", i+1))
		p.Rules[policy.Ingress] = append(p.Rules[policy.Ingress], policy.Rule{
			Action: policy.Allow, Peers: []policy.Peer{{Pods: &good}}, Ports: []policy.Port{{Protocol: policy.TCP, First: 80, Last: 80}},
		})
	}
	setPolicy(t, c, p)
	done, err := l.state.Apply(t.Context(), c.Compile())
	if err != nil {
		t.Fatal(err)
	}
	if problem := errors.Join(done.Problems...); !errors.Is(problem, pinning.ErrFull) {
		t.Errorf("problems are %v", problem)
	}
	r := request(l.veth("p0"))
	r.Addresses = nil // no room for its own
	e, _ := l.add(r)
	if a := l.probe(e.Gate, policy.Ingress, "10.0.0.1", "10.0.0.12", 80); a.Verdict != bpf.DatapathVerdictVERDICT_DENIED {
		t.Errorf("who is denied gets in: %+v", a)
	}
}

// A block without room must not become what is around it, where that is
// allowed; nor when what is around it, or who it is allowed to, changes later.
func TestFullBlocksClose(t *testing.T) {
	capacity := small
	capacity.Blocks = 8
	l := newLabWith(t, capacity)
	c := town(t)
	block := func(cidr string, except ...string) policy.Peer {
		b := &policy.Block{CIDR: netip.MustParsePrefix(cidr)}
		for _, e := range except {
			b.Except = append(b.Except, netip.MustParsePrefix(e))
		}
		return policy.Peer{Block: b}
	}
	toBlocks := func(uid, subject string, port uint16, peers ...policy.Peer) policy.Policy {
		p := allow(uid, subject, "client", port)
		p.Rules[policy.Ingress][0].Peers = peers
		return p
	}
	web, _ := l.add(request(l.veth("web"), webAddr))
	update := func(u policy.Update) error {
		t.Helper()
		done, err := l.state.Apply(t.Context(), u)
		if err != nil {
			t.Fatal(err)
		}
		return errors.Join(done.Problems...)
	}
	denied := func(what, peer string, port uint16) {
		t.Helper()
		if a := l.probe(web.Gate, policy.Ingress, webAddr, peer, port); a.Verdict != bpf.DatapathVerdictVERDICT_DENIED {
			t.Errorf("%s: %s gets to port %d: %+v", what, peer, port, a)
		}
	}
	allowed := func(what, peer string, port uint16) {
		t.Helper()
		if a := l.probe(web.Gate, policy.Ingress, webAddr, peer, port); a.Reason != byPolicy {
			t.Errorf("%s: %s to port %d: %+v", what, peer, port, a)
		}
	}
	named := func(err error, want ...string) {
		t.Helper()
		for _, text := range want {
			if !errors.Is(err, pinning.ErrFull) || !strings.Contains(err.Error(), text) {
				t.Errorf("%v does not say %q", err, text)
			}
		}
	}
	fill := []policy.Peer{block("20.0.0.0/8")}
	for i := range 7 {
		fill = append(fill, block(fmt.Sprintf("172.16.%d.0/24", i)))
	}
	setPolicy(t, c, toBlocks("fill", "web", 80, fill...))
	if err := update(c.Compile()); err != nil {
		t.Fatal(err)
	}
	allowed("blocks that fit", "172.16.6.1", 80)

	// What is around the hole is there already, and the hole finds no room.
	setPolicy(t, c, toBlocks("hole", "web", 81, block("20.0.0.0/8", "20.1.0.0/16")))
	named(update(c.Compile()), "ns/fill, ns/hole, ns/policy: its endpoints are closed: ", "no room: it has 8 entries")
	denied("with a hole that found no room", "20.1.0.1", 81)
	// What has room goes on being enforced, and goes on being said.
	setPod(t, c, townPod("late", "10.0.0.9"))
	setPolicy(t, c, allow("late", "late", "client", 80))
	named(update(c.Compile()), "ns/hole")
	late, _ := l.add(request(l.veth("late"), "10.0.0.9"))
	if a := l.probe(late.Gate, policy.Ingress, "10.0.0.9", clientAddr, 80); a.Reason != byPolicy {
		t.Errorf("a policy that came later: %+v", a)
	}
	// Room for both, but no word that it is worth while to write all.
	setPolicy(t, c, toBlocks("fill", "web", 80, fill[4:]...))
	_ = update(c.Compile())
	_ = update(c.Compact())
	denied("with room that came", "20.1.0.1", 81)
	pastGrace()
	if err := update(c.Snapshot()); err != nil {
		t.Errorf("with room for all: %v", err)
	}
	allowed("with room for all", "20.2.0.1", 81)
	denied("with room for all", "20.1.0.1", 81)

	// Of new blocks the holes are first. What is missing allows nothing, and
	// closes nothing.
	c.DeletePolicy("fill")
	_ = update(c.Compile())
	_ = update(c.Compact())
	var many []policy.Peer
	for i := range 12 {
		many = append(many, block(fmt.Sprintf("30.%d.0.0/16", i)))
	}
	setPolicy(t, c, toBlocks("many", "web", 82, append(many, block("30.0.0.0/8", "30.99.0.0/16"))...))
	named(update(c.Compile()), "of its addresses and blocks found no room")
	allowed("beside what is missing", "20.2.0.1", 81)
	denied("a hole", "30.99.0.1", 82)
	setPolicy(t, c, toBlocks("many", "web", 82, many[:3]...))
	_ = update(c.Compile())
	_ = update(c.Compact())
	pastGrace()
	if err := update(c.Snapshot()); err != nil {
		t.Errorf("with few blocks: %v", err)
	}
	allowed("with few blocks", "30.2.0.1", 82)
}
