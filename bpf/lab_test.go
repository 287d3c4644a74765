// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// lab runs packets through the pinned programs as the hooks of one pod's veth
// would, in a node of its own. The veth is down: nothing else comes by.
type lab struct {
	*netlab.Node
	t        *testing.T
	options  pinning.Options
	state    *pinning.State
	compiler *policy.Compiler
	programs [2]*ebpf.Program
	events   *ringbuf.Reader
	drops    *ebpf.Map
	// counted is what drop counters should be by the events so far.
	counted []uint64
	last    int // counter of the last drop
	opened  map[string]*ebpf.Map

	gated, uplink int
	endpoint      pinning.Endpoint
}

// The hosts of a lab. pod is gated; what friend and buddy may do is said by
// [isolation]; foe may do nothing.
var (
	pod    = host{[6]byte{2, 0, 0, 0, 0, 2}, netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	friend = host{[6]byte{2, 0, 0, 0, 0, 3}, netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("fd00::3")}
	buddy  = host{[6]byte{2, 0, 0, 0, 0, 4}, netip.MustParseAddr("10.0.0.4"), netip.MustParseAddr("fd00::4")}
	foe    = host{[6]byte{2, 0, 0, 0, 0, 5}, netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}
	node   = host{[6]byte{2, 0, 0, 0, 0, 1}, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}

	linkLocal = netip.MustParseAddr("fe80::2")
)

const podUID policy.PodKey = "uid-pod"

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and eBPF need root")
	}
	t.Parallel()
	nodeLab, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{Node: nodeLab, t: t, opened: map[string]*ebpf.Map{}, options: pinning.Options{
		Layout: pinning.Layout{BPFFS: nodeLab.BPFFS, Name: "podgate"},
		Capacity: pinning.Capacity{
			Endpoints: 16, Flows: 4096, Peers: 256, Blocks: 64, Cells: 256, Rules: 64, Fragments: 256, EventBytes: 1 << 16,
		},
	}}
	l.cleanup(nodeLab)
	if l.state, err = pinning.Ensure(t.Context(), l.options); err != nil {
		t.Fatal(err)
	}
	l.cleanup(l.state)
	for d, name := range []string{policy.Ingress: bpf.DatapathProgToPod, policy.Egress: bpf.DatapathProgFromPod} {
		if l.programs[d], err = ebpf.LoadPinnedProgram(l.options.Layout.ProgramPath(name), nil); err != nil {
			t.Fatal(err)
		}
	}
	if l.events, err = ringbuf.NewReader(l.pinned(bpf.DatapathMapEvents)); err != nil {
		t.Fatal(err)
	}
	l.cleanup(l.events)
	l.drops = l.pinned(bpf.DatapathMapDropCounters)
	l.counted = l.dropped()
	l.do(func() error {
		for i, name := range []string{"pod", "uplink"} {
			pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}
			if err := netlink.LinkAdd(pair); err != nil {
				return err
			}
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			*[]*int{&l.gated, &l.uplink}[i] = link.Attrs().Index
		}
		return l.state.SetNodeAddresses(t.Context(), []netip.Addr{node.v4, node.v6})
	})
	l.compiler = cluster(t)
	return l
}

func (l *lab) cleanup(c interface{ Close() error }) {
	l.t.Cleanup(func() {
		if err := c.Close(); err != nil {
			l.t.Error(err)
		}
	})
}

func (l *lab) do(f func() error) {
	l.t.Helper()
	if err := l.Do(f); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) pinned(name string) *ebpf.Map {
	l.t.Helper()
	if m, ok := l.opened[name]; ok {
		return m
	}
	m, err := ebpf.LoadPinnedMap(l.options.Layout.MapPath(name), nil)
	if err != nil {
		l.t.Fatal(err)
	}
	l.cleanup(m)
	l.opened[name] = m
	return m
}

// gate does what ADD does for the pod.
func (l *lab) gate(change ...func(*pinning.AddRequest)) {
	l.t.Helper()
	r := pinning.AddRequest{Endpoint: pinning.Endpoint{
		Key:         pinning.AttachmentKey{ContainerID: "pod", IfName: "eth0"},
		HostIfindex: l.gated, MAC: pod.mac[:], Addresses: []netip.Addr{pod.v4, pod.v6, linkLocal},
		PodUID: string(podUID), AntiSpoof: true,
	}}
	for _, f := range change {
		f(&r)
	}
	l.do(func() (err error) {
		l.endpoint, _, err = l.state.Add(l.t.Context(), r)
		return err
	})
}

// isolated gates the pod under [isolation].
func (l *lab) isolated(change ...func(*pinning.AddRequest)) *lab {
	l.t.Helper()
	l.enforce(isolation())
	l.gate(change...)
	return l
}

// enforce replaces the one policy there is.
func (l *lab) enforce(p policy.Policy) {
	l.t.Helper()
	if err := l.compiler.SetPolicy(p); err != nil {
		l.t.Fatal(err)
	}
	l.apply()
}

func (l *lab) apply() {
	l.t.Helper()
	done, err := l.state.Apply(l.t.Context(), l.compiler.Compile())
	if err := errors.Join(append(done.Problems, err)...); err != nil {
		l.t.Fatal(err)
	}
}

// cluster has the lab's pods and no policy.
func cluster(t *testing.T) *policy.Compiler {
	t.Helper()
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: "ns"})
	for name, h := range map[string]host{"pod": pod, "friend": friend, "buddy": buddy, "foe": foe} {
		err := c.SetPod(policy.Pod{
			Key: policy.PodKey("uid-" + name), UID: "uid-" + name, Namespace: "ns", Name: name,
			Labels: map[string]string{"name": name}, Addresses: []netip.Addr{h.v4, h.v6}, Local: name == "pod",
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func named(name string) *policy.PodSelector {
	return &policy.PodSelector{Namespace: "ns", Pods: policy.Selector{{Key: "name", Operator: policy.In, Values: []string{name}}}}
}

func port(p policy.Protocol, n uint16) policy.Port {
	return policy.Port{Protocol: p, First: n, Last: n}
}

// isolation lets the pod talk, both ways, to friend's ports TCP 80, UDP 53 and
// SCTP 9, and to buddy about anything.
func isolation() policy.Policy {
	p := policy.Policy{
		UID: "isolation", Kind: "NetworkPolicy", Namespace: "ns", Name: "isolation", Tier: policy.TierNamespace,
		Subject: *named("pod"), Isolates: [2]bool{true, true},
	}
	for d := range p.Rules {
		p.Rules[d] = []policy.Rule{
			{
				Action: policy.Allow, Peers: []policy.Peer{{Pods: named("friend")}}, Text: "friend",
				Ports: []policy.Port{port(policy.TCP, 80), port(policy.UDP, 53), port(policy.SCTP, 9)},
			},
			{Action: policy.Allow, Peers: []policy.Peer{{Pods: named("buddy")}}, AnyPort: true, Text: "buddy"},
		}
	}
	return p
}

// Words of struct __sk_buff (linux/bpf.h).
const (
	skbIngressIfindex = 9
	skbIfindex        = 10
	skbWords          = 48
)

// arrival says where a packet is seen.
type arrival struct {
	ifindex int
	// from is the interface it came in through; 0: sent by the node itself.
	from int
}

// run puts a frame through the hook of a direction. The outcome is said in
// words: "pass" or "drop", and the reason if one was given in an event or a
// drop counter.
func (l *lab) run(d policy.Direction, frame []byte) string {
	l.t.Helper()
	outcome, _ := l.runAt(d, frame, arrival{l.gated, l.uplink})
	return outcome
}

func (l *lab) runAt(d policy.Direction, frame []byte, at arrival) (string, *flow.Flow) {
	l.t.Helper()
	if at.from != 0 {
		can, err := netlab.KernelAtLeast(5, 16)
		if err != nil {
			l.t.Fatal(err)
		}
		if !can {
			l.t.Skip("BPF_PROG_TEST_RUN takes ingress_ifindex since Linux 5.16")
		}
	}
	skb := make([]uint32, skbWords)
	skb[skbIfindex], skb[skbIngressIfindex] = uint32(at.ifindex), uint32(at.from)
	var answer uint32
	l.do(func() (err error) {
		if answer, err = l.programs[d].Run(&ebpf.RunOptions{Data: frame, Context: skb}); err != nil {
			err = fmt.Errorf("%x: %w", frame, err)
		}
		return err
	})
	event := l.event()
	if event != nil && event.Verdict == flow.Denied {
		l.last = int(event.Reason)*2 + int(d)
		l.counted[l.last]++
	}
	outcome := map[int32]string{-1: "pass", 2: "drop"}[int32(answer)]
	if outcome == "" {
		l.t.Fatalf("the program answers %d", int32(answer))
	}
	switch {
	case event != nil && event.Direction != d:
		l.t.Errorf("the event is one of direction %d, not %d", event.Direction, d)
	case event != nil && event.Verdict == flow.Audited:
		outcome = "audit " + event.Reason.String()
	case event != nil:
		outcome += " " + event.Reason.String()
	case outcome == "drop":
		outcome += l.untold()
	}
	if event != nil && (event.Verdict == flow.Denied) != (int32(answer) == 2) {
		l.t.Errorf("the program answers %d, its event says %s", int32(answer), event.Verdict)
	}
	return outcome, event
}

// untold is the reason of a drop that made no event, by the counters: those
// like the one before it are told once a tick.
func (l *lab) untold() (reasons string) {
	l.t.Helper()
	if l.dropsOf(l.last) == l.counted[l.last]+1 {
		l.counted[l.last]++
		return " " + flow.Reason(l.last/2).String()
	}
	after := l.dropped()
	for i, n := range after {
		if n != l.counted[i] {
			reasons += " " + flow.Reason(i/2).String()
			l.last = i
		}
	}
	l.counted = after
	return reasons
}

// event takes the one record that a packet may have made.
func (l *lab) event() *flow.Flow {
	l.t.Helper()
	var found *flow.Flow
	for {
		l.events.SetDeadline(time.Unix(0, 0))
		record, err := l.events.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return found
		}
		if err != nil {
			l.t.Fatal(err)
		}
		if found != nil {
			l.t.Errorf("more than one event: %+v", *found)
		}
		f, err := flow.Decode(record.RawSample, flow.Clock{})
		if err != nil {
			l.t.Fatal(err)
		}
		found = &f
	}
}

// dropped are the drop counters, by reason * 2 + direction.
func (l *lab) dropped() []uint64 {
	l.t.Helper()
	out := make([]uint64, l.drops.MaxEntries())
	for i := range out {
		out[i] = l.dropsOf(i)
	}
	return out
}

func (l *lab) dropsOf(index int) (n uint64) {
	l.t.Helper()
	var perCPU []bpf.DatapathCounter
	if err := l.drops.Lookup(uint32(index), &perCPU); err != nil {
		l.t.Fatal(err)
	}
	for _, c := range perCPU {
		n += c.Packets
	}
	return n
}

// flows are the tracked ones of the pod in use, as "egress 40000>80 new".
func (l *lab) flows() (out []string) {
	l.t.Helper()
	for f, err := range l.state.Flows() {
		if err != nil {
			l.t.Fatal(err)
		}
		if f.Endpoint == l.endpoint.ID {
			out = append(out, fmt.Sprintf("%s %d-%d %s", [...]string{"ingress", "egress"}[f.Direction], f.Local.Port(), f.Peer.Port(), f.State))
		}
	}
	return out
}
