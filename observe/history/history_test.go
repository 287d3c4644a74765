// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package history_test

import (
	"testing"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/observe/history"
)

func TestRing(t *testing.T) {
	r := history.New(4)
	add := func(from, to int) {
		var records []history.Record
		for i := from; i < to; i++ {
			records = append(records, history.Record{Event: flow.Flow{Length: uint32(i)}})
		}
		r.Append(records...)
	}
	_, _, grown := r.Bounds()
	add(0, 3)
	select {
	case <-grown:
	default:
		t.Error("nobody was told that the ring has grown")
	}
	add(3, 10)
	if oldest, next, _ := r.Bounds(); oldest != 6 || next != 10 {
		t.Errorf("bounds are %d and %d", oldest, next)
	}
	var got [8]history.Record
	for _, test := range []struct {
		from, missed uint64
		size         int
		first        uint32
		n            int
	}{
		{from: 0, missed: 6, size: 8, first: 6, n: 4},
		{from: 5, missed: 1, size: 2, first: 6, n: 2},
		{from: 8, size: 8, first: 8, n: 2},
		{from: 10, size: 8},
	} {
		n, missed := r.Read(test.from, got[:test.size])
		if n != test.n || missed != test.missed {
			t.Errorf("from %d: %d read, %d missed", test.from, n, missed)
		}
		for i := range n {
			if got[i].Event.Length != test.first+uint32(i) {
				t.Errorf("from %d: record %d is %d", test.from, i, got[i].Event.Length)
			}
		}
	}
}
