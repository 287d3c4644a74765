// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// flood has the pod send packets of n flows to a port of friend, each from
// another port, and calls between now and then.
func (l *lab) flood(n, packets int, to uint16, between func()) {
	l.t.Helper()
	const breath = 100
	skb := make([]uint32, skbWords)
	skb[skbIfindex] = uint32(l.gated)
	way := path{pod, friend}
	for first := 0; first < n; first += breath {
		l.do(func() error {
			for i := range breath * packets {
				frame := way.v4(udp17, udp(uint16(1024+(first+i%breath)%60000), to))
				if _, err := l.programs[policy.Egress].Run(&ebpf.RunOptions{Data: frame, Context: skb}); err != nil {
					return err
				}
			}
			return nil
		})
		l.drain()
		between()
	}
}

// drain empties the ring and takes note of what was counted.
func (l *lab) drain() {
	l.t.Helper()
	for {
		l.events.SetDeadline(time.Unix(0, 0))
		if _, err := l.events.Read(); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			l.t.Fatal(err)
		}
	}
	l.counted = l.dropped()
}

// tracked tells whether the pod has a flow, as [lab.flows] says it.
func (l *lab) tracked(flow string) bool { return slices.Contains(l.flows(), flow) }

func (l *lab) usage(name string) pinning.MapUsage {
	l.t.Helper()
	all, err := l.state.Usage()
	if err != nil {
		l.t.Fatal(err)
	}
	return all[slices.IndexFunc(all, func(u pinning.MapUsage) bool { return u.Name == name })]
}

// overflow is the flows of a lab several times over: the kernel forgets in
// batches and by CPU.
const overflow = 4 * 4096

// A flow in use is not forgotten, whatever comes and goes beside it.
func TestFullTableKeepsWhatIsUsed(t *testing.T) {
	l := newLab(t)
	l.enforce(oneWay())
	l.gate()
	l.talk("open", friend, false, []step{
		{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
		{receives, tcp6, tcp(80, 40000, syn|ack), "pass", nil},
	})
	l.flood(overflow, 2, 53, func() {
		l.talk("in use", friend, false, []step{{receives, tcp6, tcp(80, 40000, ack), "pass", nil}})
	})
	if u := l.usage(bpf.DatapathMapFlows); u.Full() < pinning.FillWarning || !u.Evicts {
		t.Errorf("the usage of a full table is %+v", u)
	}
}

// A forgotten flow is judged again. What the pod sends opens it once more; of
// an isolated pod, answers that come before that are dropped, since nothing
// tells them from those that nobody asked for.
func TestForgottenFlows(t *testing.T) {
	const p, q = 40000, 80
	denied := oneWay()
	denied.Rules[policy.Egress] = nil
	for name, c := range map[string]struct {
		policy policy.Policy
		steps  []step
	}{
		"the pod speaks first": {oneWay(), []step{
			{sends, tcp6, tcp(p, q, ack), "pass policy", nil},
			{receives, tcp6, tcp(q, p, ack), "pass", nil},
		}},
		"the peer speaks first": {oneWay(), []step{
			{receives, tcp6, tcp(q, p, ack), "drop default", nil},
			{sends, tcp6, tcp(p, q, ack), "pass policy", nil},
			{receives, tcp6, tcp(q, p, ack), "pass", nil},
		}},
		"the peer speaks first, and may": {isolation(), []step{
			{receives, tcp6, tcp(q, p, ack), "drop default", nil}, // may speak to port 80, not to 40000
			{sends, tcp6, tcp(p, q, fin|ack), "pass policy", nil},
			{receives, tcp6, tcp(q, p, fin|ack), "pass", nil},
		}},
		"denied meanwhile": {denied, []step{
			{sends, tcp6, tcp(p, q, ack), "drop default", nil},
			{receives, tcp6, tcp(q, p, ack), "drop default", nil},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.enforce(oneWay())
			l.gate()
			l.talk("open", friend, false, []step{
				{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
				{receives, tcp6, tcp(q, p, syn|ack), "pass", nil},
				{sends, tcp6, tcp(p, q, ack), "pass", nil},
			})
			l.flood(overflow, 2, 53, func() {})
			if l.tracked("egress 40000-80 established") {
				t.Fatal("the idle flow is still there")
			}
			l.enforce(c.policy)
			l.talk("forgotten", friend, false, c.steps)
		})
	}
}

// The kernel gives flows of one packet the least time: scans and floods drive
// each other out before they do connections, idle as those may be.
func TestScansDriveOutThemselves(t *testing.T) {
	l := newLab(t)
	l.enforce(oneWay())
	l.gate()
	l.talk("open", friend, false, []step{
		{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
		{receives, tcp6, tcp(80, 40000, syn|ack), "pass", nil},
	})
	l.flood(overflow, 1, 53, func() {})
	l.talk("idle", friend, false, []step{{receives, tcp6, tcp(80, 40000, ack), "pass", nil}})
}

// What is denied takes no room: nobody drives out flows with what policy drops.
func TestDeniedTakeNoRoom(t *testing.T) {
	l := newLab(t)
	l.enforce(oneWay())
	l.gate()
	l.talk("open", friend, false, []step{
		{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
		{receives, tcp6, tcp(80, 40000, syn|ack), "pass", nil},
	})
	l.flood(overflow, 2, 54, func() {})
	if u := l.usage(bpf.DatapathMapFlows); u.Used != 1 {
		t.Errorf("the usage is %+v", u)
	}
	l.talk("idle", friend, false, []step{{receives, tcp6, tcp(80, 40000, ack), "pass", nil}})
}

// What has expired does not count as used.
func TestExpiredAreNotUsed(t *testing.T) {
	l := newLab(t).isolated()
	l.withTimeouts(func(kind bpf.DatapathFlowKind, _ bpf.DatapathFlowState) uint64 {
		if kind == bpf.DatapathFlowKindFLOW_UDP {
			return 2
		}
		return 1 << 20
	})
	way := between(sends, friend)
	l.run(sends, way.v4(tcp6, web))
	l.run(sends, way.fragment4(udp17, 1, 0, true, append(udp(40000, 53), make([]byte, 20)...)))
	deadline := time.Now().Add(10 * time.Second)
	for l.usage(bpf.DatapathMapFlows).Used != 1 || l.usage(bpf.DatapathMapFragments).Used != 0 {
		if time.Now().After(deadline) {
			t.Fatalf("used are %+v and %+v", l.usage(bpf.DatapathMapFlows), l.usage(bpf.DatapathMapFragments))
		}
		time.Sleep(time.Millisecond)
	}
	if n := len(l.flows()); n != 2 {
		t.Errorf("%d flows are kept", n)
	}
}
