// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"container/heap"
	"slices"
)

// span is a range of coordinates, both ends included, and the rule that wants
// it, as its position in judging order.
type span struct {
	first, last uint32
	rule        int
}

func portSpan(proto Protocol, first, last uint16, rule int) span {
	return span{Coordinate(proto, first), Coordinate(proto, last), rule}
}

// spanHeap has the span of the earliest rule on top.
type spanHeap []span

func (h spanHeap) Len() int           { return len(h) }
func (h spanHeap) Less(i, j int) bool { return h[i].rule < h[j].rule }
func (h spanHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *spanHeap) Push(x any)        { *h = append(*h, x.(span)) }

func (h *spanHeap) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// first is the earliest rule that wants coordinate at, or nil. It forgets
// spans that ended before.
func (h *spanHeap) first(at uint32, rules []boundRule) *boundRule {
	for len(*h) > 0 && (*h)[0].last < at {
		heap.Pop(h)
	}
	if len(*h) == 0 {
		return nil
	}
	return &rules[(*h)[0].rule]
}

// paint turns the spans of rules in judging order into the final intervals:
// sorted, not overlapping, neighbours of one verdict merged. Where it leaves a
// gap the ruleset's default applies.
func paint(spans []span, rules []boundRule, isolated bool) []Interval {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	// Verdicts change only where a span begins or has ended.
	edges := make([]uint32, 0, 2*len(spans))
	for _, s := range spans {
		edges = append(edges, s.first, s.last+1)
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)

	var active [TierBaseline + 1]spanHeap
	var out []Interval
	for i, at := range edges {
		for len(spans) > 0 && spans[0].first == at {
			heap.Push(&active[rules[spans[0].rule].tier], spans[0])
			spans = spans[1:]
		}
		r := decide(&active, at, rules, isolated)
		if r == nil {
			continue
		}
		// A rule in force has a span that ends at a later edge.
		next := Interval{First: at, Last: edges[i+1] - 1, Action: r.action, Rule: r.id}
		if n := len(out); n > 0 && out[n-1].Last+1 == at && out[n-1].Action == next.Action && out[n-1].Rule == next.Rule {
			out[n-1].Last = next.Last
		} else {
			out = append(out, next)
		}
	}
	return out
}

// decide returns the rule that has the last word on a coordinate, nil for the
// default. Allow and Deny are final, Pass ends the tier; a pod that a policy
// of the namespace tier isolates never gets to the baseline.
func decide(active *[TierBaseline + 1]spanHeap, at uint32, rules []boundRule, isolated bool) *boundRule {
	if r := active[TierAdmin].first(at, rules); r != nil && r.action != Pass {
		return r
	}
	if isolated {
		return active[TierNamespace].first(at, rules)
	}
	if r := active[TierBaseline].first(at, rules); r != nil && r.action != Pass {
		return r
	}
	return nil
}
