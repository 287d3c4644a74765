// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// A flow in a state lives as long as the timeout of its kind and state.
func TestTimeouts(t *testing.T) {
	type flowOf struct {
		kind     bpf.DatapathFlowKind
		protocol byte
		open     []step // the last one brings it into the state
		answer   []byte
	}
	const p, q = 40000, 80
	synSent := []step{{sends, tcp6, tcp(p, q, syn), "pass policy", nil}}
	connected := append(slices.Clone(synSent), step{receives, tcp6, tcp(q, p, syn|ack), "pass", nil})
	both := func(protocol byte, ask, answer []byte) []step {
		return []step{{sends, protocol, ask, "pass policy", nil}, {receives, protocol, answer, "pass", nil}}
	}
	cases := map[bpf.DatapathFlowState][]flowOf{
		bpf.DatapathFlowStateFLOW_NEW: {
			{bpf.DatapathFlowKindFLOW_TCP, tcp6, synSent, tcp(q, p, syn|ack)},
			{bpf.DatapathFlowKindFLOW_UDP, udp17, []step{{sends, udp17, udp(p, 53), "pass policy", nil}}, udp(53, p)},
			{bpf.DatapathFlowKindFLOW_SCTP, sctp132, []step{{sends, sctp132, sctp(p, 9), "pass policy", nil}}, sctp(9, p)},
			{bpf.DatapathFlowKindFLOW_ICMP, icmp4, []step{{sends, icmp4, icmp(8, 0, 7), "pass policy", nil}}, icmp(0, 0, 7)},
			{bpf.DatapathFlowKindFLOW_OTHER, gre, []step{{sends, gre, nil, "pass policy", nil}}, nil},
		},
		bpf.DatapathFlowStateFLOW_ESTABLISHED: {
			{bpf.DatapathFlowKindFLOW_TCP, tcp6, connected, tcp(q, p, ack)},
			{bpf.DatapathFlowKindFLOW_UDP, udp17, both(udp17, udp(p, 53), udp(53, p)), udp(53, p)},
			{bpf.DatapathFlowKindFLOW_SCTP, sctp132, both(sctp132, sctp(p, 9), sctp(9, p)), sctp(9, p)},
			{bpf.DatapathFlowKindFLOW_ICMP, icmp4, both(icmp4, icmp(8, 0, 7), icmp(0, 0, 7)), icmp(0, 0, 7)},
			{bpf.DatapathFlowKindFLOW_OTHER, gre, both(gre, nil, nil), nil},
		},
		bpf.DatapathFlowStateFLOW_CLOSING: {
			{bpf.DatapathFlowKindFLOW_TCP, tcp6, append(slices.Clone(connected), step{sends, tcp6, tcp(p, q, fin|ack), "pass", nil}), tcp(q, p, ack)},
		},
		bpf.DatapathFlowStateFLOW_CLOSED: {
			{bpf.DatapathFlowKindFLOW_TCP, tcp6, append(slices.Clone(connected), step{receives, tcp6, tcp(q, p, rst), "pass", nil}), tcp(q, p, ack)},
		},
	}
	for short := range bpf.DatapathFlowState(4) {
		t.Run(fmt.Sprintf("state %d", short), func(t *testing.T) {
			l := newLab(t)
			p := oneWay()
			p.Rules[policy.Egress] = append(p.Rules[policy.Egress], policy.Rule{
				Action: policy.Allow, Peers: []policy.Peer{{Pods: named("friend")}}, AnyPort: true, Text: "all of friend",
			})
			l.enforce(p)
			l.gate()
			l.withTimeouts(func(_ bpf.DatapathFlowKind, state bpf.DatapathFlowState) uint64 {
				if state == short {
					return 2
				}
				return 1 << 20
			})
			for state, flows := range cases {
				if state > short {
					continue // The way there leads through the short one.
				}
				for _, f := range flows {
					// Each on its own: flows of one kind share their ports.
					l.clear()
					l.talk(fmt.Sprintf("kind %d", f.kind), friend, false, f.open)
					want := "pass"
					if time.Sleep(50 * time.Millisecond); state == short {
						want = "drop default"
					}
					l.talk(fmt.Sprintf("kind %d in state %d, answer", f.kind, state), friend, false,
						[]step{{receives, f.protocol, f.answer, want, nil}})
				}
			}
		})
	}
}

// withTimeouts runs the same programs with other timeouts of flows, in jiffies.
func (l *lab) withTimeouts(of func(bpf.DatapathFlowKind, bpf.DatapathFlowState) uint64) {
	l.t.Helper()
	spec, err := bpf.LoadDatapath()
	if err != nil {
		l.t.Fatal(err)
	}
	replace := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if _, err := os.Stat(l.options.Layout.MapPath(name)); err == nil {
			replace[name] = l.pinned(name)
			spec.Maps[name].MaxEntries = replace[name].MaxEntries()
		}
	}
	timeouts := [32]uint64{}
	for kind := range bpf.DatapathFlowKindFLOW_KINDS {
		for state := range bpf.DatapathFlowStateFLOW_STATES {
			timeouts[kind*bpf.DatapathFlowKind(bpf.DatapathFlowStateFLOW_STATES)+bpf.DatapathFlowKind(state)] = of(kind, state)
		}
	}
	for name, value := range map[string]any{
		bpf.DatapathVarGateMask:         replace[bpf.DatapathMapGates].MaxEntries() - 1,
		bpf.DatapathVarFlowTimeouts:     timeouts,
		bpf.DatapathVarFragmentTimeout:  uint64(2),
		bpf.DatapathVarNeighbourTimeout: uint64(2),
		bpf.DatapathVarJiffiesPerSecond: uint64(100),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			l.t.Fatal(err)
		}
	}
	programs, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(programs.Close)
	l.programs = [2]*ebpf.Program{programs.Programs[bpf.DatapathProgToPod], programs.Programs[bpf.DatapathProgFromPod]}
}

func TestFragmentsExpire(t *testing.T) {
	l := newLab(t).isolated()
	l.withTimeouts(func(bpf.DatapathFlowKind, bpf.DatapathFlowState) uint64 { return 1 << 20 })
	p := between(sends, friend)
	long := append(udp(40000, 53), make([]byte, 20)...)
	if got := l.run(sends, p.fragment4(udp17, 1, 0, true, long)); got != "pass policy" {
		t.Errorf("first: %s", got)
	}
	time.Sleep(50 * time.Millisecond)
	if got := l.run(sends, p.fragment4(udp17, 1, 32, false, long)); got != "drop fragment" {
		t.Errorf("its rest, late: %s", got)
	}
}
