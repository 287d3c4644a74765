// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package policy compiles network policy into the tables the kernel reads.
//
// It knows nothing of Kubernetes types, of BPF or of the node: policies,
// pods and namespaces come in as the small intermediate representation of
// this package ([Policy], [Pod], [Namespace]) and an [Update] goes out.
//
// Two ideas carry it. Peers that no selector in use can tell apart share one
// class, so the kernel resolves an address to a class and never sees a label.
// Endpoints selected by the same policies share one [Ruleset], so nothing is
// compiled per pod. A [Cell] holds the final verdicts of a ruleset for a
// class; tiers, priorities, Pass, except, named ports and ranges are gone by
// then.
//
// # How packets are judged
//
// The rules of the Admin tier are asked by priority, then in their order. Allow
// and Deny are final, Pass ends the tier. Then, if any policy of the Namespace
// tier isolates the direction, the packet is allowed if one of their rules
// matches and denied if none does. Only if none isolates that direction is the
// Baseline tier asked, like the Admin tier. What nobody denied is allowed. A
// pod always reaches itself.
//
// # Classes
//
// What rulesets in use can tell about a peer are traits: a pod selector matches
// it, the blocks of a rule cover it, a port name means a number on it. The
// traits of a peer are its signature, and peers of one signature are a class.
// Pods get traits through their profile, which is namespace, labels and named
// ports: the replicas of a workload are matched once. Addresses that are no
// pods get theirs from the longest prefix: every CIDR and every except is an
// entry of its own with the blocks that cover it, all of them and no other. A
// pod's address has the traits of both. A peer without any is not stored; it is
// of class zero, everyone else.
//
// Digests of classes and rulesets are hashes of what they mean. A ruleset's is
// made of the contents of the policies (their identity included, for
// attribution) and of the subject's ports that rules name; it does not depend
// on who is selected.
//
// # Make before break
//
// Applying an [Update] is many writes, and packets pass between any two of
// them. Let old be the rulesets before the update and new the ones after. The
// order of the writes is: add, set peers and joins, flip subjects, remove.
//
// Classes are made of the traits that old and new rulesets know: a trait that
// only old ones need is kept, as retired, until [Compiler.Compact]. So every
// class that an update gives a peer decides every old and every new ruleset,
// and the update brings the cells for all of them: new classes get cells in old
// rulesets, those about to go included, and new rulesets get cells for all
// classes that stay.
//
//   - While peers are set, subjects have old rulesets. A peer has either its old
//     class, for which the cells are still there, or its new one, for which they
//     already are. As far as old rulesets can tell, a change of policy alone
//     makes no difference between the two, because the new class says of the old
//     traits what the old class said. New prefixes are no exception: within the
//     prefix that covered it before, a new one has the same old traits.
//   - While subjects flip, each to both rulesets at once, peers have their new
//     classes, for which new rulesets have cells. So a packet meets the old
//     verdict before the flip and the new one after.
//   - What is removed then is not used any more, but for peers that leave: their
//     old class has no cells in new rulesets. Where there may be a difference,
//     that is when the update flips a subject, such a peer is first set to the
//     class it falls to when it is gone ([Update.Peers] and [Update.GonePeers]
//     both name it). So removing it makes no difference either.
//
// Compact forgets the traits that were retired before: old rulesets, gone with
// the earlier update, were the last that could tell. Classes merge, and no
// verdict changes.
//
// Edits of pods and namespaces that share an update with edits of policy or of
// other pods take effect in the same order. A packet then meets the old policy
// on the old labels, the old policy on the peer's new labels, or the new policy
// on the new labels: as if the edits had come in that order, one by one, which
// is all that watching objects of different kinds can promise.
//
// # Joins
//
// A local pod's class is published before it has an address. At an address that
// blocks cover it is another class, and a [Join] says which: there is one for
// each pair of a class of local pods that wait for their address and a class of
// prefixes. Both are bounded by what can be told apart, not by the number of
// pods or CIDRs: pods of one profile share a class, and all blocks of a rule are
// one trait. With s the pod classes that wait and b the classes of prefixes
// there are at most s x b joins, and none once the pods have their addresses.
package policy
