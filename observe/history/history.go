// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package history keeps the latest events in bounded memory. One writer adds to
// it and never waits; readers that are too slow miss what is overwritten, and
// are told how much.
package history

import (
	"sync"
	"time"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/observe/naming"
)

// Record is an event with its names, or the news that events were lost.
type Record struct {
	Event flow.Flow
	naming.Names
	// Lost is how many events the full ring of the kernel did not take between
	// Since and the event's time. There is no event then, and there are no names.
	Lost  uint64
	Since time.Time
}

// Ring of records. Each has a number, the first is 0.
type Ring struct {
	mu      sync.RWMutex
	records []Record
	next    uint64
	grown   chan struct{}
}

// New is an empty ring of so many records.
func New(size int) *Ring { return &Ring{records: make([]Record, size), grown: make(chan struct{})} }

// Append adds records.
func (r *Ring) Append(records ...Record) {
	if len(records) == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range records {
		r.records[r.next%uint64(len(r.records))] = records[i]
		r.next++
	}
	close(r.grown)
	r.grown = make(chan struct{})
}

// Size is how many records there is room for.
func (r *Ring) Size() int { return len(r.records) }

// Bounds are the numbers of the oldest record and of the next one to come, and a
// channel that is closed when it has.
func (r *Ring) Bounds() (oldest, next uint64, grown <-chan struct{}) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.oldest(), r.next, r.grown
}

func (r *Ring) oldest() uint64 { return r.next - min(r.next, uint64(len(r.records))) }

// Read copies records from a number on. It answers how many were there, and how
// many before the first of them have been overwritten.
func (r *Ring) Read(from uint64, into []Record) (n int, missed uint64) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if oldest := r.oldest(); from < oldest {
		from, missed = oldest, oldest-from
	}
	for n < len(into) && from+uint64(n) < r.next {
		into[n] = r.records[(from+uint64(n))%uint64(len(r.records))]
		n++
	}
	return n, missed
}
