// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

var (
	seedFlag = flag.Uint64("seed", 0, "seed of the random tests; 0 takes a new one")
	runsFlag = flag.Int("runs", 12, "random histories to replay")
)

// dice makes small worlds: few names, labels and addresses, so that things
// meet.
type dice struct {
	*rand.Rand
	// rivals lets pods take addresses of other pods.
	rivals bool
}

var (
	someNamespaces = []string{"red", "green", "blue"}
	someKeys       = []string{"app", "tier"}
	someValues     = []string{"", "a", "b"}
	somePortNames  = []string{"web", "dns"}
	somePorts      = []uint16{0, 53, 80, 81, 8080, 65535}
	someProtocols  = []Protocol{TCP, UDP, SCTP, ICMP}
	somePrefixes   = prefixes("0.0.0.0/0", "10.0.0.0/8", "10.1.2.3/8", "10.1.0.0/16", "10.1.1.0/24", "10.1.1.1/32",
		"10.1.1.0/31", "10.2.0.0/16", "::/0", "::/1", "fd00::/8", "fd00::/64", "fd00::1/128")
	someAddresses = addresses("10.1.1.1", "10.1.1.2", "10.1.2.1", "10.2.0.1", "11.0.0.1", "fd00::1", "fd00::2", "fd01::1", "2001:db8::1")
	outside       = addresses("10.1.1.7", "10.9.9.9", "1.1.1.1", "fd00::9", "2600::1")
)

func prefixes(in ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range in {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func addresses(in ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range in {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func pick[T any](d *dice, from []T) T { return from[d.IntN(len(from))] }

func (d *dice) chance(percent int) bool { return d.IntN(100) < percent }

func (d *dice) labels() map[string]string {
	m := map[string]string{}
	for _, k := range someKeys {
		if d.chance(60) {
			m[k] = pick(d, someValues)
		}
	}
	return m
}

func (d *dice) selector() Selector {
	var s Selector
	for d.chance(45) {
		r := Requirement{Key: pick(d, someKeys), Operator: Operator(d.IntN(4))}
		if r.Operator == In || r.Operator == NotIn {
			r.Values = []string{pick(d, someValues), pick(d, someValues)}
		}
		s = append(s, r)
	}
	return s
}

func (d *dice) podSelector() PodSelector {
	s := PodSelector{Pods: d.selector()}
	if d.chance(50) {
		s.Namespace = pick(d, someNamespaces)
	} else {
		s.Namespaces = d.selector()
	}
	return s
}

func (d *dice) peer() Peer {
	if d.chance(60) {
		s := d.podSelector()
		return Peer{Pods: &s}
	}
	b := &Block{CIDR: pick(d, somePrefixes)}
	cidr, _ := canonicalPrefix(b.CIDR)
	for _, x := range somePrefixes {
		if x, _ := canonicalPrefix(x); d.chance(25) && cidr.Contains(x.Addr()) && x.Bits() > cidr.Bits() {
			b.Except = append(b.Except, x)
		}
	}
	return Peer{Block: b}
}

func (d *dice) port() Port {
	if d.chance(30) {
		return Port{Protocol: pick(d, []Protocol{TCP, UDP, AnyProtocol}), Name: pick(d, somePortNames)}
	}
	p := Port{Protocol: pick(d, someProtocols), First: pick(d, somePorts), Last: pick(d, somePorts)}
	p.First, p.Last = min(p.First, p.Last), max(p.First, p.Last)
	return p
}

func (d *dice) rule(tier Tier) Rule {
	r := Rule{Action: Allow, AnyPeer: d.chance(20), AnyPort: d.chance(25)}
	if tier != TierNamespace {
		r.Action = Action(d.IntN(3))
	}
	for !r.AnyPeer && d.chance(70) {
		r.Peers = append(r.Peers, d.peer())
	}
	for !r.AnyPort && d.chance(65) {
		r.Ports = append(r.Ports, d.port())
	}
	return r
}

func (d *dice) policy() Policy {
	name := fmt.Sprintf("p%d", d.IntN(7))
	p := Policy{Kind: "Policy", Namespace: pick(d, someNamespaces), Name: name, Subject: d.podSelector()}
	p.Tier = pick(d, []Tier{TierNamespace, TierNamespace, TierNamespace, TierAdmin, TierBaseline})
	p.UID = name
	p.Priority = int32(d.IntN(3))
	if p.Tier == TierNamespace {
		p.Subject.Namespace = p.Namespace
		p.Isolates = [2]bool{d.chance(70), d.chance(70)}
	}
	for side := range p.Rules {
		for d.chance(65) {
			p.Rules[side] = append(p.Rules[side], d.rule(p.Tier))
		}
	}
	return p
}

func (d *dice) pod(w *world) Pod {
	i := d.IntN(9)
	p := Pod{
		Key: PodKey(fmt.Sprintf("k%d", i)), UID: fmt.Sprintf("u%d", i), Name: fmt.Sprintf("pod.%d", i),
		Namespace: pick(d, someNamespaces), Labels: d.labels(),
		HostNetwork: d.chance(5), Terminating: d.chance(10), Local: i < 4 && d.chance(90), Audit: d.chance(10),
	}
	if old, ok := w.pods[p.Key]; ok {
		p.Namespace = old.Namespace
	}
	for _, a := range someAddresses {
		_, taken := w.podAt(a)
		if owned := slices.Contains(w.claims[a], p.Key); d.chance(20) && (owned || !taken || d.rivals) {
			p.Addresses = append(p.Addresses, a)
		}
	}
	for _, name := range somePortNames {
		for d.chance(40) {
			p.Ports = append(p.Ports, NamedPort{Name: name, Protocol: pick(d, []Protocol{TCP, UDP}), Port: pick(d, somePorts)})
		}
	}
	return p
}

// edit makes one random change to both.
func (d *dice) edit(t testing.TB, w *world, c *Compiler) {
	t.Helper()
	switch n := d.IntN(100); {
	case n < 40:
		p := d.policy()
		w.policies[p.UID] = p
		if err := c.SetPolicy(p); err != nil {
			t.Fatalf("SetPolicy: %v", err)
		}
	case n < 50:
		uid := d.policy().UID
		delete(w.policies, uid)
		c.DeletePolicy(uid)
	case n < 80:
		p := d.pod(w)
		w.setPod(p)
		if err := c.SetPod(p); err != nil {
			t.Fatalf("SetPod: %v", err)
		}
	case n < 87:
		k := d.pod(w).Key
		w.deletePod(k)
		c.DeletePod(k)
	case n < 95:
		ns := Namespace{Name: pick(d, someNamespaces), Labels: d.labels()}
		w.namespaces[ns.Name] = ns
		c.SetNamespace(ns)
	default:
		ns := pick(d, someNamespaces)
		delete(w.namespaces, ns)
		c.DeleteNamespace(ns)
	}
}

// questions are what a pod can be asked about.
func (d *dice) questions(n int) []question {
	all := slices.Concat(someAddresses, outside)
	qs := make([]question, n)
	for i := range qs {
		qs[i] = question{Direction(d.IntN(2)), pick(d, all), pick(d, someProtocols), pick(d, somePorts) + uint16(d.IntN(2))}
	}
	return qs
}

// seeds of the random tests of this run.
func seeds(t *testing.T) []uint64 {
	first := *seedFlag
	if first == 0 {
		first = rand.Uint64()
	}
	t.Logf("to see this again: -seed %d -runs %d", first, *runsFlag)
	list := make([]uint64, *runsFlag)
	for i := range list {
		list[i] = first + uint64(i)
	}
	return list
}

func roll(seed uint64) *dice { return &dice{Rand: rand.New(rand.NewPCG(seed, 0))} }

// TestReplay replays random histories into a model of the kernel's tables. In
// each step of each update each verdict must be one that the policy before or
// after gives, and after it the one that the policy after gives.
func TestReplay(t *testing.T) {
	for _, seed := range seeds(t) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			d := roll(seed)
			d.rivals = true
			replay(t, d, 60)
		})
	}
}

func replay(t testing.TB, d *dice, updates int) {
	w, c, k := newWorld(), NewCompiler(), newKernel()
	for i := range updates {
		before := w.clone()
		for range d.IntN(1 + d.IntN(12)) {
			d.edit(t, w, c)
		}
		var u Update
		if d.chance(30) {
			u = c.Compact()
			if c.Pending() && len(u.GoneRulesets) == 0 {
				t.Fatalf("update %d: pending after Compact although nothing left", i)
			}
		} else {
			u = c.Compile()
		}
		if u.Full != (i == 0) {
			t.Fatalf("update %d: Full is %v", i, u.Full)
		}
		checkSteps(t, d, k, u, before, w)
		checkTables(t, d, k, c, w)
	}
}

// asked is a question to a pod and the answers that may be given while an
// update is applied.
type asked struct {
	question
	pod     PodKey
	answers []answer
}

// ask prepares questions to the pods that are local before and after. Before
// the subjects flip a peer may be new already.
func ask(d *dice, before, after *world) []asked {
	var list []asked
	for key, now := range after.pods {
		was, ok := before.pods[key]
		if !ok || !was.Local || !now.Local || was.HostNetwork || now.HostNetwork {
			continue
		}
		for _, q := range d.questions(25) {
			if slices.Contains(was.Addresses, q.peer) || slices.Contains(now.Addresses, q.peer) {
				continue
			}
			list = append(list, asked{q, key, []answer{
				before.judge(was, q, before), before.judge(was, q, after), after.judge(now, q, after),
			}})
		}
	}
	return list
}

func checkSteps(t testing.TB, d *dice, k *kernel, u Update, before, after *world) {
	t.Helper()
	list := ask(d, before, after)
	for step, err := range k.apply(u) {
		if err != nil {
			t.Fatalf("%s: %v", step, err)
		}
		for _, a := range list {
			got := k.judge(a.pod, a.question)
			if !slices.ContainsFunc(a.answers, func(want answer) bool { return got.action == want.action }) {
				t.Fatalf("after %s: %s %+v: %v, want one of %v", step, a.pod, a.question, got, a.answers)
			}
		}
	}
	if err := k.dangling(); err != nil {
		t.Fatal(err)
	}
}

// checkTables compares the tables and Judge with the reference.
func checkTables(t testing.TB, d *dice, k *kernel, c *Compiler, w *world) {
	t.Helper()
	for key, p := range w.pods {
		if !p.Local {
			continue
		}
		for _, q := range d.questions(20) {
			v, err := c.Judge(q.direction, key, q.peer, q.proto, q.port)
			if err != nil {
				t.Fatal(err)
			}
			if p.HostNetwork || slices.Contains(p.Addresses, q.peer) {
				if v.Action != Allow || v.HostNetwork != p.HostNetwork || v.Self == p.HostNetwork {
					t.Fatalf("%s %+v: %v", key, q, v)
				}
				continue
			}
			want := w.judge(p, q, w)
			if got := k.judge(key, q); got != want {
				t.Fatalf("%s %+v: tables say %v, want %v", key, q, got, want)
			}
			got := answer{v.Action, v.Policy.UID, v.Rule.Index}
			if v.Default {
				got.rule = -1
			}
			if got != want || v.Class != k.class(q.peer) {
				t.Fatalf("%s %+v: Judge says %v of class %s, want %v of class %s", key, q, v, v.Class, want, k.class(q.peer))
			}
		}
		if !p.HostNetwork && len(p.Addresses) == 0 {
			checkJoins(t, d, k, w, p)
		}
	}
}

// checkJoins asks what a local pod without an address would be as a peer once
// it is given one.
func checkJoins(t testing.TB, d *dice, k *kernel, w *world, waiting Pod) {
	t.Helper()
	a := pick(d, outside)
	placed := w.clone()
	waiting.Addresses = []netip.Addr{a}
	placed.setPod(waiting)
	class, err := k.joined(k.subjects[waiting.Key].Class, a)
	if err != nil {
		t.Fatal(err)
	}
	for key, p := range placed.pods {
		if !p.Local || p.HostNetwork || key == waiting.Key {
			continue
		}
		for _, q := range d.questions(10) {
			q.peer = a
			if got, want := k.judgeClass(key, q, class), placed.judge(p, q, placed); got != want {
				t.Fatalf("%s %+v to the waiting %s: %v, want %v", key, q, waiting.Key, got, want)
			}
		}
	}
}
