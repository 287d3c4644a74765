// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package pinning

import (
	"fmt"
	"math/bits"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
)

// Capacity is how much an instance can hold. It is fixed when the instance is
// made; who adopts one gets its capacity. Zero fields mean the defaults.
type Capacity struct {
	// Endpoints gated at once; 1024, and 4096 at most. Four slots are set aside for each.
	Endpoints uint32 `json:"endpoints,omitempty"`
	// Flows tracked; 262144. The least recently used make room.
	Flows uint32 `json:"flows,omitempty"`
	// Peers is the number of pod addresses that policy can tell apart; 262144.
	Peers uint32 `json:"peers,omitempty"`
	// Blocks is the number of CIDR prefixes; 65536.
	Blocks uint32 `json:"blocks,omitempty"`
	// Cells is the number of (ruleset, class) pairs with rules; 262144.
	Cells uint32 `json:"cells,omitempty"`
	// Rules of all policies together; 16384. Each costs 16 bytes a CPU.
	Rules uint32 `json:"rules,omitempty"`
	// Services is the number of their frontends: addresses with a port; 65536.
	Services uint32 `json:"services,omitempty"`
	// Fragments is the number of fragmented datagrams under way; 8192.
	Fragments uint32 `json:"fragments,omitempty"`
	// EventBytes is the size of the event ring, a power of two; 1 MiB.
	EventBytes uint32 `json:"eventBytes,omitempty"`
}

// DefaultCapacity is what zero fields mean.
func DefaultCapacity() Capacity {
	return Capacity{
		Endpoints: 1024, Flows: 1 << 18, Peers: 1 << 18, Blocks: 1 << 16,
		Cells: 1 << 18, Rules: 1 << 14, Services: 1 << 16, Fragments: 1 << 13, EventBytes: 1 << 20,
	}
}

func (c Capacity) withDefaults() Capacity {
	d := DefaultCapacity()
	for _, f := range []struct{ got, def *uint32 }{
		{&c.Endpoints, &d.Endpoints}, {&c.Flows, &d.Flows}, {&c.Peers, &d.Peers},
		{&c.Blocks, &d.Blocks}, {&c.Cells, &d.Cells}, {&c.Rules, &d.Rules},
		{&c.Services, &d.Services}, {&c.Fragments, &d.Fragments}, {&c.EventBytes, &d.EventBytes},
	} {
		if *f.got == 0 {
			*f.got = *f.def
		}
	}
	return c
}

func (c Capacity) validate() error {
	if c.EventBytes < 4096 || bits.OnesCount32(c.EventBytes) != 1 {
		return fmt.Errorf("%w: capacity eventBytes %d is not a power of two of at least 4096", ErrInvalid, c.EventBytes)
	}
	if c.Endpoints > maxEndpoints {
		return fmt.Errorf("%w: capacity endpoints %d is over %d", ErrInvalid, c.Endpoints, maxEndpoints)
	}
	return nil
}

// maxEndpoints keeps the slot of every gate within the 15 bits that a packet
// carries it in (TAG_SLOT of bpf/include/types.h). Without it what a pod whose
// sources are not checked sends to a Service would be nobody's after
// translation, and so let through.
const maxEndpoints = 4096

// gateSlots is a power of two with at most a quarter of it in use, so that a
// gate is nearly always in its first slot.
func (c Capacity) gateSlots() uint32 {
	return uint32(1) << bits.Len32(c.Endpoints*4-1)
}

// addressesPerEndpoint bounds addresses of endpoints on average.
const addressesPerEndpoint = 8

// neighboursPerEndpoint bounds who endpoints have met on their links on
// average; the least recently met make room.
const neighboursPerEndpoint = 32

func (c Capacity) apply(spec *ebpf.CollectionSpec) {
	for name, n := range map[string]uint32{
		bpf.DatapathMapGates:            c.gateSlots(),
		bpf.DatapathMapEndpointCounters: c.gateSlots(),
		bpf.DatapathMapEndpoints:        c.Endpoints,
		bpf.DatapathMapClaims:           c.Endpoints * addressesPerEndpoint,
		bpf.DatapathMapSources:          c.Endpoints * addressesPerEndpoint,
		bpf.DatapathMapPods:             c.Endpoints * 4,
		bpf.DatapathMapPeers:            c.Peers,
		bpf.DatapathMapBlocks:           c.Blocks,
		bpf.DatapathMapJoins:            c.Blocks,
		bpf.DatapathMapClasses:          c.Peers,
		bpf.DatapathMapCells:            c.Cells,
		bpf.DatapathMapRuleInfo:         c.Rules,
		bpf.DatapathMapPolicyInfo:       c.Rules,
		bpf.DatapathMapRuleCounters:     c.Rules,
		bpf.DatapathMapFlows:            c.Flows,
		bpf.DatapathMapBackends:         (c.Flows + 3) / 4,
		bpf.DatapathMapFrontends:        c.Services,
		bpf.DatapathMapServices:         c.Services * 2, // the next one of each is there before the last one goes
		bpf.DatapathMapFragments:        c.Fragments,
		bpf.DatapathMapNeighbours:       c.Endpoints * neighboursPerEndpoint,
		bpf.DatapathMapEvents:           c.EventBytes,
	} {
		spec.Maps[name].MaxEntries = n
	}
}
