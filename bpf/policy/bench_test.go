// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
)

// cluster is a cluster as one node sees it.
type cluster struct {
	namespaces, peers, local, policies int
}

var clusters = []cluster{
	{namespaces: 20, peers: 1_000, local: 30, policies: 50},
	{namespaces: 200, peers: 50_000, local: 250, policies: 1_000},
	{namespaces: 500, peers: 150_000, local: 250, policies: 3_000},
}

func (s cluster) String() string { return fmt.Sprintf("peers=%d/policies=%d", s.peers, s.policies) }

func (s cluster) namespace(i int) string { return fmt.Sprintf("team-%d", i%s.namespaces) }

// pod number i: workloads of ten replicas, spread over the namespaces.
func (s cluster) pod(i int) Pod {
	workload := i / 10
	return Pod{
		Key: PodKey(fmt.Sprintf("5a1c3c5e-0000-4000-8000-%012d", i)), UID: fmt.Sprintf("5a1c3c5e-0000-4000-8000-%012d", i),
		Namespace: s.namespace(workload), Name: fmt.Sprintf("workload-%d-6d4cf56db6-%05d", workload, i),
		Labels: map[string]string{
			"app": fmt.Sprintf("app-%d", workload%40), "tier": fmt.Sprintf("tier-%d", workload%3),
			"pod-template-hash": fmt.Sprintf("hash-%d", workload),
		},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})},
		Ports:     []NamedPort{{Name: "http", Protocol: TCP, Port: uint16(8000 + workload%5)}},
		Local:     i%(s.peers/s.local) == 0,
	}
}

// policy number i selects an app of a namespace and lets in an app of its own
// and every pod of a tier of another namespace.
func (s cluster) policy(i int, port uint16) Policy {
	is := func(key, value string) Selector { return Selector{{Key: key, Operator: In, Values: []string{value}}} }
	return Policy{
		UID: fmt.Sprintf("policy-%d", i), Kind: "NetworkPolicy", Namespace: s.namespace(i), Name: fmt.Sprintf("policy-%d", i),
		Tier: TierNamespace, Isolates: [2]bool{true, true},
		Subject: PodSelector{Namespace: s.namespace(i), Pods: is("tier", fmt.Sprintf("tier-%d", i%3))},
		Rules: [2][]Rule{
			{{
				Action: Allow, Ports: []Port{{Protocol: TCP, First: port, Last: port}},
				Peers: []Peer{
					{Pods: &PodSelector{Namespace: s.namespace(i), Pods: is("app", fmt.Sprintf("app-%d", i%40))}},
					{Pods: &PodSelector{Namespaces: is("name", s.namespace(i+1)), Pods: is("tier", "tier-1")}},
				},
			}},
			{{
				Action: Allow, Ports: []Port{{Protocol: TCP, Name: "http"}},
				Peers: []Peer{
					{Pods: &PodSelector{}},
					{Block: &Block{
						CIDR:   netip.MustParsePrefix("0.0.0.0/0"),
						Except: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16")},
					}},
				},
			}},
		},
	}
}

func (s cluster) compiler(b *testing.B) *Compiler {
	b.Helper()
	c := NewCompiler()
	for i := range s.namespaces {
		c.SetNamespace(Namespace{Name: s.namespace(i), Labels: map[string]string{"name": s.namespace(i)}})
	}
	for i := range s.peers {
		if err := c.SetPod(s.pod(i)); err != nil {
			b.Fatal(err)
		}
	}
	for i := range s.policies {
		if err := c.SetPolicy(s.policy(i, 8080)); err != nil {
			b.Fatal(err)
		}
	}
	return c
}

// BenchmarkCompile is what a starting daemon does: everything from nothing.
func BenchmarkCompile(b *testing.B) {
	for _, s := range clusters {
		b.Run(s.String(), func(b *testing.B) {
			var u Update
			var c *Compiler
			for b.Loop() {
				c = s.compiler(b)
				u = c.Compile()
			}
			b.ReportMetric(float64(len(u.Peers)), "entries")
			b.ReportMetric(float64(len(u.Classes)), "classes")
			b.ReportMetric(float64(len(u.Rulesets)), "rulesets")
			b.ReportMetric(float64(len(u.Cells)), "cells")
			u = Update{}
			b.ReportMetric(float64(retained(&c))/1e6, "MB-retained")
		})
	}
}

// retained is the memory that only the compiler holds, in bytes.
func retained(c **Compiler) uint64 {
	var with, without runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&with)
	runtime.KeepAlive(*c)
	*c = nil
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&without)
	return with.HeapAlloc - without.HeapAlloc
}

// BenchmarkPolicyChanged edits one policy of a running node: another port, then
// other peers too.
func BenchmarkPolicyChanged(b *testing.B) {
	for _, s := range clusters {
		b.Run("port/"+s.String(), func(b *testing.B) { s.changePolicy(b, func(*Policy, int) {}) })
		b.Run("selector/"+s.String(), func(b *testing.B) {
			s.changePolicy(b, func(p *Policy, i int) {
				p.Rules[Ingress][0].Peers[0].Pods = &PodSelector{Pods: Selector{{Key: "tier", Operator: NotIn, Values: []string{fmt.Sprint(i)}}}}
			})
		})
		b.Run("block/"+s.String(), func(b *testing.B) {
			s.changePolicy(b, func(p *Policy, i int) {
				p.Rules[Egress][0].Peers[1].Block.CIDR = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i)}), 16)
				p.Rules[Egress][0].Peers[1].Block.Except = nil
			})
		})
	}
}

func (s cluster) changePolicy(b *testing.B, edit func(*Policy, int)) {
	c := s.compiler(b)
	c.Compile()
	// A policy that selects pods of this node.
	n := 0
	for n < s.policies && !selectsLocal(c, fmt.Sprintf("policy-%d", n)) {
		n++
	}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i++
		p := s.policy(n, uint16(i%2))
		edit(&p, i%200)
		if err := c.SetPolicy(p); err != nil {
			b.Fatal(err)
		}
		if u := c.Compile(); len(u.Rulesets) == 0 {
			b.Fatal("the edit changed no ruleset")
		}
		c.Compact()
	}
}

func selectsLocal(c *Compiler, uid string) bool {
	for f := range c.local {
		if c.policies[uid].subject.matches(f) {
			return true
		}
	}
	return false
}

// BenchmarkPodAdded adds a replica of a workload that is there, and removes it.
func BenchmarkPodAdded(b *testing.B) {
	for _, s := range clusters {
		b.Run(s.String(), func(b *testing.B) {
			c := s.compiler(b)
			c.Compile()
			added := s.pod(0)
			added.Key, added.Addresses = "another", []netip.Addr{netip.MustParseAddr("10.255.0.1")}
			b.ReportAllocs()
			for b.Loop() {
				if err := c.SetPod(added); err != nil {
					b.Fatal(err)
				}
				if u := c.Compile(); len(u.Subjects) != 1 || len(u.Cells) != 0 {
					b.Fatalf("%d subjects, %d cells", len(u.Subjects), len(u.Cells))
				}
				c.DeletePod(added.Key)
				c.Compile()
			}
		})
	}
}

// BenchmarkJudge asks for one verdict.
func BenchmarkJudge(b *testing.B) {
	s := clusters[1]
	c := s.compiler(b)
	c.Compile()
	peer := s.pod(4711).Addresses[0]
	for b.Loop() {
		if _, err := c.Judge(Ingress, s.pod(0).Key, peer, TCP, 8080); err != nil {
			b.Fatal(err)
		}
	}
}
