// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"math"
	"testing"
)

func TestGrown(t *testing.T) {
	const mb = 1 << 20
	for _, tt := range []struct {
		before, live uint64
		want         bool
	}{{0, 8 * mb, true}, {10 * mb, 12 * mb, false}, {200 * mb, 210 * mb, false}, {200 * mb, 220 * mb, true}, {200 * mb, 100 * mb, false}} {
		if got := (heap{live: tt.live}).grown(tt.before); got != tt.want {
			t.Errorf("%d MB after %d MB: %t", tt.live/mb, tt.before/mb, got)
		}
	}
}

func TestLimits(t *testing.T) {
	const mb = 1 << 20
	for name, tt := range map[string]struct {
		heap
		percent int
		// The limit, if there is one, is between the two.
		least, most int64
	}{
		"nothing known yet": {heap{taken: 8 * mb}, 100, math.MaxInt64, math.MaxInt64},
		"starting":          {heap{live: 100 * mb, steady: steadyTicks - 1, taken: 150 * mb, objects: 120 * mb}, 25, math.MaxInt64, math.MaxInt64},
		"small": {heap{live: 10 * mb, steady: steadyTicks, taken: 40 * mb, objects: 20 * mb, free: 10 * mb},
			100, 36 * mb, 40 * mb},
		"large": {heap{live: 200 * mb, steady: steadyTicks, taken: 400 * mb, objects: 250 * mb, free: 120 * mb},
			12, 254 * mb, 270 * mb},
		"grown a little": {heap{live: 205 * mb, steady: 2 * steadyTicks, taken: 240 * mb, objects: 210 * mb},
			12, 259 * mb, 275 * mb},
		"shrunk": {heap{live: 50 * mb, steady: 3 * steadyTicks, taken: 400 * mb, objects: 60 * mb, free: 330 * mb},
			32, 76 * mb, 82 * mb},
	} {
		percent, most := tt.limits()
		if percent != tt.percent || most < tt.least || most > tt.most {
			t.Errorf("%s: %d %%, %d MB, want %d %%, %d to %d MB", name, percent, most/mb, tt.percent, tt.least/mb, tt.most/mb)
		}
	}
}
