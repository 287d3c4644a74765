// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// trait is one thing that policy in use can tell about a peer: a selector
// matches it, a block set covers it, or a port name stands for a number on it.
// Exactly one of pods, blocks and port is set.
type trait struct {
	id     uint32
	digest Digest
	pods   *podSelector
	blocks *blockSet
	port   *NamedPort
	// rulesets depend on the trait; a port shares the map of its name. Without
	// any the trait is retired.
	rulesets map[*ruleset]struct{}
	// classes in the tables have the trait.
	classes map[*class]struct{}
}

// portName is a port name that rules in use resolve on the peer.
type portName struct {
	name     string
	rulesets map[*ruleset]struct{}
	ports    map[NamedPort]*trait
}

// traitTable interns traits.
type traitTable struct {
	next   uint32
	pods   map[Digest]*trait
	blocks map[Digest]*trait
	names  map[string]*portName

	// What was interned since the last update.
	freshPods, freshBlocks []*trait
	freshNames             []*portName
	// retired counts what drop would forget.
	retired int
}

func newTraitTable() traitTable {
	return traitTable{pods: map[Digest]*trait{}, blocks: map[Digest]*trait{}, names: map[string]*portName{}}
}

func (t *traitTable) make(digest Digest) *trait {
	t.next++
	return &trait{id: t.next, digest: digest, rulesets: map[*ruleset]struct{}{}, classes: map[*class]struct{}{}}
}

func (t *traitTable) ofPods(s *podSelector) *trait {
	x := t.pods[s.digest]
	if x == nil {
		x = t.make(s.digest)
		x.pods = s
		t.pods[s.digest] = x
		t.freshPods = append(t.freshPods, x)
	}
	return x
}

func (t *traitTable) ofBlocks(s *blockSet) *trait {
	x := t.blocks[s.digest]
	if x == nil {
		x = t.make(s.digest)
		x.blocks = s
		t.blocks[s.digest] = x
		t.freshBlocks = append(t.freshBlocks, x)
	}
	return x
}

func (t *traitTable) ofName(name string) *portName {
	x := t.names[name]
	if x == nil {
		x = &portName{name: name, rulesets: map[*ruleset]struct{}{}, ports: map[NamedPort]*trait{}}
		t.names[name] = x
		t.freshNames = append(t.freshNames, x)
	}
	return x
}

// ofPort returns the trait of a port number behind a name in use.
func (t *traitTable) ofPort(n *portName, p NamedPort) *trait {
	x := n.ports[p]
	if x == nil {
		x = t.make(encode("port").text(p.Name).number(uint64(p.Protocol)).number(uint64(p.Port)).sum())
		x.port = &p
		x.rulesets = n.rulesets
		n.ports[p] = x
	}
	return x
}

// settle ends an update.
func (t *traitTable) settle() {
	t.freshPods, t.freshBlocks, t.freshNames = nil, nil, nil
	t.retired = 0
	for _, table := range []map[Digest]*trait{t.pods, t.blocks} {
		for _, x := range table {
			if len(x.rulesets) == 0 {
				t.retired++
			}
		}
	}
	for _, n := range t.names {
		if len(n.rulesets) == 0 {
			t.retired++
		}
	}
}

// drop forgets the retired traits and returns them. Rulesets that go with the
// update being made still count: their traits retire with it.
func (t *traitTable) drop() map[*trait]struct{} {
	gone := map[*trait]struct{}{}
	for _, table := range []map[Digest]*trait{t.pods, t.blocks} {
		for d, x := range table {
			if len(x.rulesets) == 0 {
				delete(table, d)
				gone[x] = struct{}{}
			}
		}
	}
	for name, n := range t.names {
		if len(n.rulesets) == 0 {
			delete(t.names, name)
			for _, x := range n.ports {
				gone[x] = struct{}{}
			}
		}
	}
	return gone
}

// signature is the traits of a peer, sorted by id.
type signature []*trait

func (s signature) sorted() signature {
	slices.SortFunc(s, func(a, b *trait) int { return cmp.Compare(a.id, b.id) })
	return slices.Compact(s)
}

// key appends what identifies the signature in this process.
func (s signature) key(b []byte) []byte {
	for _, x := range s {
		b = binary.LittleEndian.AppendUint32(b, x.id)
	}
	return b
}

// digest is the same for the same traits in every process.
func (s signature) digest() Digest {
	if len(s) == 0 {
		return Digest{}
	}
	digests := make([]Digest, len(s))
	for i, x := range s {
		digests[i] = x.digest
	}
	return encode("class").set(digests).sum()
}

// covering returns the traits of selectors that match pods of a namespace.
func (t *traitTable) covering(ns *namespace) []*trait {
	var traits []*trait
	for _, x := range t.pods {
		if x.pods.covers(ns) {
			traits = append(traits, x)
		}
	}
	return traits
}
