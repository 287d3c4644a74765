// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import "net/netip"

// Digest names compiled things by what they mean: two compilers given the same
// policy, in this process or the next, give the same digests. It is how a
// restarted daemon finds its own work among what is pinned.
type Digest [16]byte

// Open is the digest of no ruleset: nothing isolates the direction, every
// packet is allowed. The zero digest as a class is "everyone else".
var Open = Digest{}

// PolicyInfo describes a policy for output.
type PolicyInfo struct {
	ID              Digest
	UID             string
	Kind            string
	Namespace, Name string
}

// RuleInfo describes a rule for attribution and counters.
type RuleInfo struct {
	ID        Digest
	Policy    Digest
	Direction Direction
	Action    Action
	// Index of the rule in its policy and direction; -1 stands for the
	// isolation itself ("isolated by X, no rule matched").
	Index int
	Text  string
}

// Ruleset is the compiled policy of one direction for every endpoint that the
// same policies select.
type Ruleset struct {
	ID        Digest
	Direction Direction
	// Default applies where no interval matches: Deny when a policy isolates
	// the direction, else Allow.
	Default Action
	// DefaultRule attributes the default: the isolation rule (Index -1) of the
	// first policy that isolates.
	DefaultRule Digest
	// Policies that make up the ruleset, sorted by kind, namespace, name.
	Policies []Digest
	// AnyPeer says that the zero class has a cell, which then applies to every
	// class that has no cell of its own.
	AnyPeer bool
}

// Cell holds the final verdicts of one ruleset for one peer class. An absent
// cell falls back to the ruleset's zero-class cell if AnyPeer, else to its
// default; cells that say the same as their fallback are left out. Cells are
// never changed, only added; a cell goes with its ruleset or class. Cells may
// share Intervals, which must not be written to.
type Cell struct {
	Ruleset, Class Digest
	// Intervals are sorted and do not overlap. What they leave out gets the
	// ruleset's default. An empty list is a cell of its own: all default.
	Intervals []Interval
}

// Interval gives one verdict to a range of protocol<<16 | port, both ends
// included. For ICMP and ICMPv6 the port is type<<8 | code, for other
// protocols without ports 0.
type Interval struct {
	First, Last uint32
	Action      Action
	Rule        Digest
}

// MaxCoordinate is the largest value of protocol<<16 | port.
const MaxCoordinate uint32 = 255<<16 | 65535

// Coordinate is the position of a packet in an [Interval].
func Coordinate(proto Protocol, port uint16) uint32 { return uint32(proto)<<16 | uint32(port) }

// PeerEntry gives an address, or the part of a block that no longer prefix
// covers, its class.
type PeerEntry struct {
	// Prefix is canonical (masked). Exact marks a pod's address (/32 or /128),
	// which goes into the hash; the rest goes into the LPM trie.
	Prefix netip.Prefix
	Exact  bool
	Class  Digest
	// Owner is a non-zero digest of the owning pod's key for exact entries, so
	// that flows of an address's former owner end with it; 0 for blocks.
	Owner uint16
}

// PeerKey names a [PeerEntry].
type PeerKey struct {
	Prefix netip.Prefix
	Exact  bool
}

// Subject is a local pod and what is enforced on it. It is published before
// the pod's endpoint exists, so that ADD needs nobody.
type Subject struct {
	Pod             PodKey
	UID             string
	Namespace, Name string
	// Rulesets are indexed by [Direction].
	Rulesets [2]Digest
	// Class of the pod as a peer at an address that no block covers.
	Class Digest
	Owner uint16
	Audit bool
}

// Join is the class of a pod of class Pod at an address whose longest prefix
// has class Block. Joins let ADD classify an address nobody knew before.
type Join struct {
	Pod, Block, Class Digest
}

// Update carries the enforced state from one policy to the next. Applied in
// this order no packet meets a verdict that neither the old nor the new policy
// gives: infos, rulesets and cells are added; joins and peers are set;
// subjects flip to their new rulesets; then what is gone is removed. Lists are
// in no particular order.
//
// An address that a pod was given before Peers names it has the class that its
// Subject and Joins say. It has to follow their changes when peers are set, not
// when subjects flip.
type Update struct {
	// Full marks a complete state: whatever is pinned and not named is swept.
	// Of rulesets and classes that another process pinned it knows nothing:
	// rulesets about to be swept have no cells here for the classes that are
	// new, and classes about to be swept none in the rulesets that are.
	Full bool

	Policies []PolicyInfo
	Rules    []RuleInfo
	Rulesets []Ruleset
	Cells    []Cell
	// Classes that are new; never the zero class. Their cells for all rulesets,
	// those about to go included, are in Cells.
	Classes []Digest
	Joins   []Join
	// Peers that are new or have another class or owner. A peer that GonePeers
	// names too gets the class it falls to when it is removed.
	Peers    []PeerEntry
	Subjects []Subject

	GonePeers    []PeerKey
	GoneSubjects []PodKey
	GoneJoins    []Join
	GoneRulesets []Digest
	GoneClasses  []Digest
	GoneRules    []Digest
	GonePolicies []Digest
}
