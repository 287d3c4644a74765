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
package policy
