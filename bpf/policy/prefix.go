// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"net/netip"
	"slices"
)

// prefixTable knows which block sets cover each part of the address space. It
// has a node for every CIDR and every except, the boundaries where coverage
// changes; between boundaries the longest enclosing node tells.
type prefixTable struct{ v4, v6 family }

// family finds the longest node by trying the prefix lengths in use, of which
// there are few.
type family struct {
	nodes  map[netip.Prefix]*node
	counts [129]int // nodes by prefix length
	bits   []int    // lengths in use, longest first
}

// node is a boundary and the class of what no longer node covers.
type node struct {
	prefix netip.Prefix
	// boundaries counts the reasons to be there: CIDRs and excepts of sets in
	// use, and IPv6 nodes around the whole of IPv4.
	boundaries    int
	starts, stops []*coverage
	class         *class // as in the tables; nil when not yet there
}

// coverage is one block of a set.
type coverage struct{ set *trait }

func newPrefixTable() prefixTable {
	return prefixTable{
		v4: family{nodes: map[netip.Prefix]*node{}},
		v6: family{nodes: map[netip.Prefix]*node{}},
	}
}

func (t *prefixTable) family(a netip.Addr) *family {
	if a.Is4() {
		return &t.v4
	}
	return &t.v6
}

func (t *prefixTable) hold(p netip.Prefix) *node {
	f := t.family(p.Addr())
	n := f.nodes[p]
	if n == nil {
		n = &node{prefix: p}
		f.nodes[p] = n
		f.counts[p.Bits()]++
	}
	n.boundaries++
	// The kernel keeps both families in one trie. An IPv6 block around
	// ::ffff:0:0/96 must not reach IPv4, so IPv4 then begins with a node of
	// its own.
	if n.aroundIPv4() {
		t.hold(wholeIPv4)
	}
	return n
}

func (t *prefixTable) release(n *node) {
	n.boundaries--
	if n.aroundIPv4() {
		t.release(t.v4.nodes[wholeIPv4])
	}
}

func (n *node) aroundIPv4() bool { return n.prefix.Addr().Is6() && n.prefix.Contains(mappedIPv4) }

func (t *prefixTable) add(set *trait) {
	for _, b := range set.blocks.blocks {
		c := &coverage{set}
		n := t.hold(b.cidr)
		n.starts = append(n.starts, c)
		for _, x := range b.except {
			n := t.hold(x)
			n.stops = append(n.stops, c)
		}
	}
}

func (t *prefixTable) remove(set *trait) {
	ofSet := func(c *coverage) bool { return c.set == set }
	for _, b := range set.blocks.blocks {
		f := t.family(b.cidr.Addr())
		n := f.nodes[b.cidr]
		n.starts = slices.DeleteFunc(n.starts, ofSet)
		t.release(n)
		for _, x := range b.except {
			n := f.nodes[x]
			n.stops = slices.DeleteFunc(n.stops, ofSet)
			t.release(n)
		}
	}
}

// prune forgets the nodes that are no boundary any more, returns those of them
// that were in the tables, and readies lookups.
func (t *prefixTable) prune() (gone []*node) {
	for _, f := range []*family{&t.v4, &t.v6} {
		for p, n := range f.nodes {
			if n.boundaries > 0 {
				continue
			}
			delete(f.nodes, p)
			f.counts[p.Bits()]--
			if n.class != nil {
				gone = append(gone, n)
			}
		}
		f.bits = f.bits[:0]
		for bits := len(f.counts) - 1; bits >= 0; bits-- {
			if f.counts[bits] > 0 {
				f.bits = append(f.bits, bits)
			}
		}
	}
	return gone
}

// class is the class of an address, or of the part of a prefix that no longer
// node covers, as blocks alone would have it.
func (t *prefixTable) class(p netip.Prefix, zero *class) *class {
	f := t.family(p.Addr())
	for _, bits := range f.bits {
		if bits > p.Bits() {
			continue
		}
		if n := f.at(p.Addr(), bits); n != nil {
			return n.class
		}
	}
	return zero
}

func (f *family) at(a netip.Addr, bits int) *node {
	// The lengths in use are lengths of the address' family: no error.
	p, _ := a.Prefix(bits)
	return f.nodes[p]
}

// covering returns the sets that cover the region of a node, sorted.
func (t *prefixTable) covering(n *node) []*trait {
	f := t.family(n.prefix.Addr())
	var open []*coverage
	for _, bits := range slices.Backward(f.bits) {
		if bits > n.prefix.Bits() {
			break
		}
		if outer := f.at(n.prefix.Addr(), bits); outer != nil {
			open = append(open, outer.starts...)
			open = slices.DeleteFunc(open, func(c *coverage) bool { return slices.Contains(outer.stops, c) })
		}
	}
	sets := make([]*trait, len(open))
	for i, c := range open {
		sets[i] = c.set
	}
	slices.SortFunc(sets, func(a, b *trait) int { return cmp.Compare(a.id, b.id) })
	return slices.Compact(sets)
}

// all visits every node.
func (t *prefixTable) all(visit func(*node)) {
	for _, f := range []*family{&t.v4, &t.v6} {
		for _, n := range f.nodes {
			visit(n)
		}
	}
}
