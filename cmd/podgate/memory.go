// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"math"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The daemon runs on every node and keeps something of every pod of the cluster:
// what it has no use for any more may be an eighth of what it keeps, but a quarter
// while that grows, since the collector then runs all the more, and so much that it
// has not to run all the time where that is little.
const (
	garbagePercent  = 12
	garbageStarting = 25
	garbageLeast    = 16 << 20
)

// tuneInterval is how often the limits follow what is kept, steadyTicks how many
// times it has not grown before it is taken for all there is to keep.
const (
	tuneInterval = time.Second
	steadyTicks  = 4
)

// heap is what the process has in memory, in bytes.
type heap struct {
	// live is what the collector found in use when it last looked, and steady how
	// many times that was not more than before.
	live   uint64
	steady int
	// taken is all that the runtime has from the system, of which objects are the
	// heap's, garbage included, and free is what it could give back.
	taken, objects, free uint64
}

// grown tells whether notably more is in use than before.
func (h heap) grown(before uint64) bool { return h.live > before+before/16+garbageLeast/4 }

// limits are how much garbage there may be, in percent of what is in use, and what
// the runtime may take from the system. To start takes twice what there is to keep,
// and so does to list everything anew: without the second limit the runtime would
// hold on to most of that. There is none while more and more is in use.
func (h heap) limits() (percent int, most int64) {
	percent = min(100, int(garbageLeast*100/max(1, h.live)))
	if h.steady < steadyTicks {
		return max(garbageStarting, percent), math.MaxInt64
	}
	percent = max(garbagePercent, percent)
	garbage := max(garbageLeast, h.live*uint64(percent)/100)
	// The runtime gives back what is above 95 % of the limit.
	return percent, int64((h.taken - h.objects - h.free + h.live + garbage) * 20 / 19)
}

// limitMemory keeps memory as small as that until ctx is done.
func limitMemory(ctx context.Context) {
	samples := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/free:bytes"},
	}
	tick := time.NewTicker(tuneInterval)
	defer tick.Stop()
	var (
		h       heap
		percent int
		most    int64 = math.MaxInt64
	)
	read := func() {
		metrics.Read(samples)
		of := func(i int) uint64 { return samples[i].Value.Uint64() }
		h.live, h.taken, h.objects, h.free = of(0), of(1)-of(2), of(3), of(4)
	}
	for {
		before := h.live
		read()
		if h.steady++; h.grown(before) {
			h.steady = 0
		}
		if h.steady == steadyTicks {
			// What it grew by may have been garbage since, which nothing collects
			// where nothing happens.
			debug.FreeOSMemory()
			read()
		}
		p, m := h.limits()
		if p != percent {
			debug.SetGCPercent(p)
			percent = p
		}
		// To set it stops everything for a moment.
		if m > most+most/50 || m < most-most/50 {
			debug.SetMemoryLimit(m)
			most = m
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
