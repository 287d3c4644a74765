// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
)

// kernel is the tables as the kernel has them: plain maps, one trie for both
// families, and no idea what a digest means.
type kernel struct {
	policies map[Digest]PolicyInfo
	rules    map[Digest]RuleInfo
	rulesets map[Digest]Ruleset
	classes  map[Digest]struct{}
	cells    map[[2]Digest][]Interval
	joins    map[Join]struct{}
	exact    map[netip.Addr]PeerEntry
	trie     map[netip.Prefix]Digest
	subjects map[PodKey]Subject
}

func newKernel() *kernel {
	return &kernel{
		policies: map[Digest]PolicyInfo{},
		rules:    map[Digest]RuleInfo{},
		rulesets: map[Digest]Ruleset{},
		classes:  map[Digest]struct{}{{}: {}},
		cells:    map[[2]Digest][]Interval{},
		joins:    map[Join]struct{}{},
		exact:    map[netip.Addr]PeerEntry{},
		trie:     map[netip.Prefix]Digest{},
		subjects: map[PodKey]Subject{},
	}
}

// add, set and remove are the three kinds of writes; they fail where the update
// contradicts the tables.
func add[K comparable, V any](m map[K]V, k K, v V) error {
	if _, ok := m[k]; ok {
		return fmt.Errorf("%v is there already", k)
	}
	m[k] = v
	return nil
}

func remove[K comparable, V any](m map[K]V, k K) error {
	if _, ok := m[k]; !ok {
		return fmt.Errorf("%v is not there", k)
	}
	delete(m, k)
	return nil
}

func need[K comparable, V any](m map[K]V, keys ...K) error {
	for _, k := range keys {
		if _, ok := m[k]; !ok {
			return fmt.Errorf("%v is referred to and not there", k)
		}
	}
	return nil
}

// apply makes the writes of an update one by one, in the order documented, and
// yields the error of each.
func (k *kernel) apply(u Update) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		_ = each(yield, "policy", u.Policies, func(p PolicyInfo) error { return add(k.policies, p.ID, p) }) &&
			each(yield, "rule", u.Rules, func(r RuleInfo) error {
				return errors.Join(add(k.rules, r.ID, r), need(k.policies, r.Policy))
			}) &&
			each(yield, "ruleset", u.Rulesets, func(r Ruleset) error {
				if r.Default == Deny {
					return errors.Join(add(k.rulesets, r.ID, r), need(k.rules, r.DefaultRule), need(k.policies, r.Policies...))
				}
				return errors.Join(add(k.rulesets, r.ID, r), need(k.policies, r.Policies...))
			}) &&
			each(yield, "class", u.Classes, func(d Digest) error { return add(k.classes, d, struct{}{}) }) &&
			each(yield, "cell", u.Cells, k.addCell) &&
			each(yield, "join", u.Joins, func(j Join) error {
				return errors.Join(add(k.joins, j, struct{}{}), need(k.classes, j.Pod, j.Block, j.Class))
			}) &&
			each(yield, "peer", u.Peers, k.setPeer) &&
			each(yield, "subject", u.Subjects, func(s Subject) error {
				k.subjects[s.Pod] = s
				return errors.Join(need(k.classes, s.Class), k.needRulesets(s))
			}) &&
			each(yield, "gone peer", u.GonePeers, k.removePeer) &&
			each(yield, "gone subject", u.GoneSubjects, func(p PodKey) error { return remove(k.subjects, p) }) &&
			each(yield, "gone join", u.GoneJoins, func(j Join) error { return remove(k.joins, j) }) &&
			each(yield, "gone ruleset", u.GoneRulesets, func(d Digest) error {
				maps.DeleteFunc(k.cells, func(c [2]Digest, _ []Interval) bool { return c[0] == d })
				return remove(k.rulesets, d)
			}) &&
			each(yield, "gone class", u.GoneClasses, func(d Digest) error {
				maps.DeleteFunc(k.cells, func(c [2]Digest, _ []Interval) bool { return c[1] == d })
				return remove(k.classes, d)
			}) &&
			each(yield, "gone rule", u.GoneRules, func(d Digest) error { return remove(k.rules, d) }) &&
			each(yield, "gone policy", u.GonePolicies, func(d Digest) error { return remove(k.policies, d) })
	}
}

func each[T any](yield func(string, error) bool, what string, list []T, write func(T) error) bool {
	for _, x := range list {
		if !yield(fmt.Sprintf("%s %v", what, x), write(x)) {
			return false
		}
	}
	return true
}

func (k *kernel) addCell(c Cell) error {
	err := errors.Join(add(k.cells, [2]Digest{c.Ruleset, c.Class}, c.Intervals),
		need(k.rulesets, c.Ruleset), need(k.classes, c.Class))
	for i, v := range c.Intervals {
		if v.First > v.Last || v.Last > MaxCoordinate || v.Action == Pass {
			err = errors.Join(err, fmt.Errorf("interval %v", v))
		}
		if i > 0 && v.First <= c.Intervals[i-1].Last {
			err = errors.Join(err, fmt.Errorf("interval %v overlaps or is out of order", v))
		}
		if i > 0 && v.First == c.Intervals[i-1].Last+1 && v.Rule == c.Intervals[i-1].Rule {
			err = errors.Join(err, fmt.Errorf("interval %v is not merged", v))
		}
		err = errors.Join(err, need(k.rules, v.Rule))
	}
	return err
}

func (k *kernel) setPeer(p PeerEntry) error {
	if p.Prefix != p.Prefix.Masked() || p.Prefix.Addr().Is4In6() {
		return fmt.Errorf("%s is not canonical", p.Prefix)
	}
	if !p.Exact {
		k.trie[inTrie(p.Prefix)] = p.Class
		return need(k.classes, p.Class)
	}
	if !p.Prefix.IsSingleIP() {
		return fmt.Errorf("%s is not one address", p.Prefix)
	}
	k.exact[p.Prefix.Addr()] = p
	return need(k.classes, p.Class)
}

func (k *kernel) removePeer(p PeerKey) error {
	if p.Exact {
		return remove(k.exact, p.Prefix.Addr())
	}
	return remove(k.trie, inTrie(p.Prefix))
}

// inTrie is the 128-bit key of a prefix.
func inTrie(p netip.Prefix) netip.Prefix {
	if p.Addr().Is6() {
		return p
	}
	return netip.PrefixFrom(netip.AddrFrom16(p.Addr().As16()), mappedBits+p.Bits())
}

func (k *kernel) needRulesets(s Subject) error {
	var err error
	for _, d := range s.Rulesets {
		if d != Open {
			err = errors.Join(err, need(k.rulesets, d))
		}
	}
	return err
}

// dangling reports what is left that nothing may refer to any more.
func (k *kernel) dangling() error {
	var err error
	for _, d := range k.trie {
		err = errors.Join(err, need(k.classes, d))
	}
	for _, p := range k.exact {
		err = errors.Join(err, need(k.classes, p.Class))
	}
	for j := range k.joins {
		err = errors.Join(err, need(k.classes, j.Pod, j.Block, j.Class))
	}
	for _, s := range k.subjects {
		err = errors.Join(err, need(k.classes, s.Class), k.needRulesets(s))
	}
	for c, intervals := range k.cells {
		err = errors.Join(err, need(k.rulesets, c[0]), need(k.classes, c[1]))
		for _, v := range intervals {
			err = errors.Join(err, need(k.rules, v.Rule))
		}
	}
	for _, r := range k.rulesets {
		err = errors.Join(err, need(k.policies, r.Policies...))
	}
	return err
}

func (k *kernel) blockClass(a netip.Addr) Digest {
	for bits := 128; bits >= 0; bits-- {
		p, _ := netip.AddrFrom16(a.As16()).Prefix(bits)
		if d, ok := k.trie[p]; ok {
			return d
		}
	}
	return Digest{}
}

func (k *kernel) class(a netip.Addr) Digest {
	if p, ok := k.exact[a]; ok {
		return p.Class
	}
	return k.blockClass(a)
}

// joined is the class of a local pod at an address that Peers does not name.
func (k *kernel) joined(pod Digest, a netip.Addr) (Digest, error) {
	block := k.blockClass(a)
	switch {
	case pod == Digest{}:
		return block, nil
	case block == Digest{}:
		return pod, nil
	}
	for j := range k.joins {
		if j.Pod == pod && j.Block == block {
			return j.Class, nil
		}
	}
	return Digest{}, fmt.Errorf("no join of %s and %s", pod, block)
}

// judge looks a verdict up as the kernel does.
func (k *kernel) judge(subject PodKey, q question) answer {
	return k.judgeClass(subject, q, k.class(q.peer))
}

func (k *kernel) judgeClass(subject PodKey, q question, class Digest) answer {
	id := k.subjects[subject].Rulesets[q.direction]
	if id == Open {
		return answer{Allow, "", -1}
	}
	r := k.rulesets[id]
	cell, ok := k.cells[[2]Digest{id, class}]
	if !ok && r.AnyPeer {
		cell = k.cells[[2]Digest{id, {}}]
	}
	at := Coordinate(q.proto, q.port)
	if i := slices.IndexFunc(cell, func(v Interval) bool { return v.First <= at && at <= v.Last }); i >= 0 {
		rule := k.rules[cell[i].Rule]
		return answer{cell[i].Action, k.policies[rule.Policy].UID, rule.Index}
	}
	return answer{r.Default, k.policies[k.rules[r.DefaultRule].Policy].UID, -1}
}
