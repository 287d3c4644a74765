// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

// TestIncremental compares what random edits left with what a new compiler
// makes of the result.
func TestIncremental(t *testing.T) {
	for _, seed := range seeds(t) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			d := roll(seed)
			w, c := newWorld(), NewCompiler()
			k := newKernel()
			for range 30 {
				for range d.IntN(10) {
					d.edit(t, w, c)
				}
				applyAll(t, k, c.Compile())
				if d.chance(50) {
					// Retired traits make no difference once they are dropped.
					applyAll(t, k, c.Compact())
					applyAll(t, k, c.Compact())
					same(t, c.Snapshot(), scratch(t, w).Compile())
				}
				replayed := newKernel()
				applyAll(t, replayed, c.Snapshot())
				if !reflect.DeepEqual(k, replayed) {
					t.Fatalf("updates add up to\n%+v\nbut the snapshot is\n%+v", k, replayed)
				}
			}
		})
	}
}

func applyAll(t testing.TB, k *kernel, u Update) {
	t.Helper()
	for step, err := range k.apply(u) {
		if err != nil {
			t.Fatalf("%s: %v", step, err)
		}
	}
}

// scratch compiles a world anew.
func scratch(t testing.TB, w *world) *Compiler {
	t.Helper()
	c := NewCompiler()
	for _, p := range w.pods {
		if err := c.SetPod(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range w.policies {
		if err := c.SetPolicy(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, ns := range w.namespaces {
		c.SetNamespace(ns)
	}
	return c
}

func same(t testing.TB, got, want Update) {
	t.Helper()
	tidy(&got)
	tidy(&want)
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("got\n%+v\nwant\n%+v", got, want)
	}
}

// tidy sorts the lists of an update.
func tidy(u *Update) {
	slices.SortFunc(u.Policies, func(a, b PolicyInfo) int { return compareDigests(a.ID, b.ID) })
	slices.SortFunc(u.Rules, func(a, b RuleInfo) int { return compareDigests(a.ID, b.ID) })
	slices.SortFunc(u.Rulesets, func(a, b Ruleset) int { return compareDigests(a.ID, b.ID) })
	slices.SortFunc(u.Cells, func(a, b Cell) int {
		return cmp.Or(compareDigests(a.Ruleset, b.Ruleset), compareDigests(a.Class, b.Class))
	})
	for i := range u.Cells {
		u.Cells[i].Intervals = slices.Clip(u.Cells[i].Intervals)
	}
	slices.SortFunc(u.Classes, compareDigests)
	slices.SortFunc(u.Joins, func(a, b Join) int {
		return cmp.Or(compareDigests(a.Pod, b.Pod), compareDigests(a.Block, b.Block))
	})
	slices.SortFunc(u.Peers, func(a, b PeerEntry) int {
		if a.Exact != b.Exact {
			return cmp.Compare(b.Owner, a.Owner)
		}
		return netip.Prefix.Compare(a.Prefix, b.Prefix)
	})
	slices.SortFunc(u.Subjects, func(a, b Subject) int { return cmp.Compare(a.Pod, b.Pod) })
}
