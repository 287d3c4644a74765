// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"slices"
	"testing"
)

func TestPaint(t *testing.T) {
	rules := []boundRule{
		{id: Digest{1}, tier: TierAdmin, action: Deny},
		{id: Digest{2}, tier: TierAdmin, action: Pass},
		{id: Digest{3}, tier: TierAdmin, action: Allow},
		{id: Digest{4}, tier: TierNamespace, action: Allow},
		{id: Digest{5}, tier: TierNamespace, action: Allow},
		{id: Digest{6}, tier: TierBaseline, action: Deny},
	}
	want := func(first, last uint32, rule int) Interval {
		return Interval{first, last, rules[rule-1].action, rules[rule-1].id}
	}
	tests := []struct {
		name     string
		spans    []span // rules count from 0
		isolated bool
		want     []Interval
	}{
		{"nothing", nil, true, nil},
		{"everything", []span{{0, MaxCoordinate, 3}}, true, []Interval{want(0, MaxCoordinate, 4)}},
		{"neighbours of one rule", []span{{5, 9, 3}, {1, 4, 3}, {10, 10, 3}}, true, []Interval{want(1, 10, 4)}},
		{"neighbours of two rules", []span{{5, 9, 3}, {1, 4, 4}}, true, []Interval{want(1, 4, 5), want(5, 9, 4)}},
		{"a gap", []span{{6, 9, 3}, {1, 4, 3}}, true, []Interval{want(1, 4, 4), want(6, 9, 4)}},
		{"the earlier rule cuts the later", []span{{1, 9, 4}, {4, 5, 3}}, true, []Interval{want(1, 3, 5), want(4, 5, 4), want(6, 9, 5)}},
		{"a later rule inside the earlier", []span{{1, 9, 3}, {4, 5, 4}}, true, []Interval{want(1, 9, 4)}},
		{"one after the other", []span{{1, 5, 3}, {4, 9, 4}}, true, []Interval{want(1, 5, 4), want(6, 9, 5)}},
		{"the last coordinate", []span{{MaxCoordinate, MaxCoordinate, 3}}, true, []Interval{want(MaxCoordinate, MaxCoordinate, 4)}},
		{"pass ends the tier", []span{{1, 9, 2}, {2, 3, 1}, {1, 9, 3}}, true, []Interval{want(1, 1, 3), want(2, 3, 4), want(4, 9, 3)}},
		{"no baseline where isolated", []span{{1, 9, 5}, {2, 3, 3}}, true, []Interval{want(2, 3, 4)}},
		{"the baseline where not", []span{{1, 9, 5}, {2, 3, 1}, {4, 4, 0}}, false, []Interval{want(1, 3, 6), want(4, 4, 1), want(5, 9, 6)}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := paint(tt.spans, rules, tt.isolated); !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}
