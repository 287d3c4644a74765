// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// oneWay is [isolation] without a rule for ingress: what comes in belongs to a
// flow of the pod or is dropped.
func oneWay() policy.Policy {
	p := isolation()
	p.Rules[policy.Ingress] = nil
	return p
}

// step of a conversation: one side sends a packet, want becomes of it, and
// then the flows of the pod are these, if it says so.
type step struct {
	by       policy.Direction // egress: the pod sends
	protocol byte
	payload  []byte
	want     string
	flows    []string
}

const (
	sends    = policy.Egress
	receives = policy.Ingress
)

// talk goes through the steps in one family.
func (l *lab) talk(what string, peer host, v6 bool, steps []step) {
	l.t.Helper()
	for i, s := range steps {
		p := between(s.by, peer)
		frame := p.v4(s.protocol, s.payload)
		if v6 {
			protocol := s.protocol
			if protocol == icmp4 {
				protocol = icmp58
			}
			frame = p.v6(protocol, s.payload)
		}
		if got := l.run(s.by, frame); got != s.want {
			l.t.Errorf("%s, step %d: %s, not %s", what, i, got, s.want)
		}
		if s.flows != nil {
			if got := l.flows(); !slices.Equal(got, s.flows) {
				l.t.Errorf("%s, step %d: flows are %q, not %q", what, i, got, s.flows)
			}
		}
	}
}

func TestConversations(t *testing.T) {
	const p, q = 40000, 80
	none := []string{}
	for name, c := range map[string]struct {
		peer  host
		steps []step
	}{
		"TCP": {friend, []step{
			{sends, tcp6, tcp(p, q, syn), "pass policy", []string{"egress 40000-80 new"}},
			{receives, tcp6, tcp(q, p, syn|ack), "pass", []string{"egress 40000-80 established"}},
			{sends, tcp6, tcp(p, q, ack), "pass", nil},
			{receives, tcp6, tcp(q, p, ack), "pass", nil},
			{receives, tcp6, tcp(q, p, fin|ack), "pass", []string{"egress 40000-80 closing"}},
			{sends, tcp6, tcp(p, q, ack), "pass", nil},
			{sends, tcp6, tcp(p, q, fin|ack), "pass", []string{"egress 40000-80 closed"}},
			{receives, tcp6, tcp(q, p, ack), "pass", []string{"egress 40000-80 closed"}},
		}},
		"TCP, port used again": {friend, []step{
			{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
			{receives, tcp6, tcp(q, p, rst|ack), "pass", []string{"egress 40000-80 closed"}},
			{receives, tcp6, tcp(q, p, syn), "drop default", nil},
			{sends, tcp6, tcp(p, q, syn), "pass", []string{"egress 40000-80 new"}},
			{receives, tcp6, tcp(q, p, syn|ack), "pass", []string{"egress 40000-80 established"}},
		}},
		"TCP, a RST that was not for real": {friend, []step{
			{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
			{receives, tcp6, tcp(q, p, syn|ack), "pass", nil},
			{receives, tcp6, tcp(q, p, rst), "pass", []string{"egress 40000-80 closed"}},
			{receives, tcp6, tcp(q, p, ack), "pass", []string{"egress 40000-80 established"}},
		}},
		"TCP, a SYN the other way": {friend, []step{
			{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
			{receives, tcp6, tcp(q, p, syn), "drop default", []string{"egress 40000-80 new"}},
			{receives, tcp6, tcp(q, p, syn|ack), "pass", nil},
			{receives, tcp6, tcp(q, p, syn), "drop default", []string{"egress 40000-80 established"}},
			{sends, tcp6, tcp(p, q, ack), "pass", nil},
		}},
		"TCP, open since before": {friend, []step{
			{sends, tcp6, tcp(p, q, ack), "pass policy", []string{"egress 40000-80 established"}},
			{receives, tcp6, tcp(q, p, ack), "pass", nil},
		}},
		"TCP, other ports": {friend, []step{
			{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
			{receives, tcp6, tcp(q, p+1, syn|ack), "drop default", nil},
			{receives, tcp6, tcp(q+1, p, syn|ack), "drop default", nil},
			{receives, udp17, udp(q, p), "drop default", []string{"egress 40000-80 new"}},
		}},
		"answers nobody asked for": {friend, []step{
			{receives, tcp6, tcp(q, p, syn|ack), "drop default", none},
			{receives, tcp6, tcp(q, p, rst), "drop default", none},
			{receives, tcp6, tcp(q, p, ack), "drop default", none},
			{receives, udp17, udp(53, p), "drop default", none},
			{receives, icmp4, icmp(0, 0, 7), "drop default", none},
		}},
		"answers the pod forges": {friend, []step{
			{sends, tcp6, tcp(p, q, syn|ack), "pass", none},
			{receives, tcp6, tcp(q, p, syn), "drop default", none},
			{receives, tcp6, tcp(q, p, ack), "drop default", none},
			{sends, tcp6, tcp(p, q, rst|ack), "pass", none},
			{receives, tcp6, tcp(q, p, syn), "drop default", none},
		}},
		"echo replies the pod forges": {buddy, []step{
			{sends, icmp4, icmp(0, 0, 7), "pass", none},
			{receives, icmp4, icmp(8, 0, 7), "drop default", none},
		}},
		"UDP": {friend, []step{
			{sends, udp17, udp(p, 53), "pass policy", []string{"egress 40000-53 new"}},
			{sends, udp17, udp(p, 53), "pass", []string{"egress 40000-53 new"}},
			{receives, udp17, udp(53, p), "pass", []string{"egress 40000-53 established"}},
			{receives, udp17, udp(54, p), "drop default", nil},
		}},
		"SCTP": {friend, []step{
			{sends, sctp132, sctp(p, 9), "pass policy", []string{"egress 40000-9 new"}},
			{receives, sctp132, sctp(9, p), "pass", []string{"egress 40000-9 established"}},
			{receives, sctp132, sctp(9, p+1), "drop default", nil},
		}},
		"echo": {buddy, []step{
			{sends, icmp4, icmp(8, 0, 7), "pass policy", []string{"egress 7-0 new"}},
			{receives, icmp4, icmp(0, 0, 7), "pass", []string{"egress 7-0 established"}},
			{receives, icmp4, icmp(0, 0, 8), "drop default", nil},
			{receives, icmp4, icmp(8, 0, 7), "drop default", nil},
		}},
		"GRE": {buddy, []step{
			{sends, gre, udp(1, 2), "pass policy", []string{"egress 0-0 new"}},
			{receives, gre, udp(3, 4), "pass", []string{"egress 0-0 established"}},
			{receives, ipip, udp(1, 2), "drop default", nil},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.enforce(oneWay())
			l.gate()
			for _, v6 := range []bool{false, true} {
				l.clear()
				steps := c.steps
				if v6 {
					steps = echo6(steps)
				}
				l.talk(fmt.Sprintf("v6 %v", v6), c.peer, v6, steps)
			}
		})
	}
}

// echo6 has the types of ICMPv6 where there are those of ICMP.
func echo6(steps []step) []step {
	out := slices.Clone(steps)
	for i := range out {
		if out[i].protocol == icmp4 {
			out[i].payload = append([]byte{map[byte]byte{8: 128, 0: 129}[out[i].payload[0]]}, out[i].payload[1:]...)
		}
	}
	return out
}

// A connection the other way that is allowed needs no flow of its own: the one
// that is there goes on.
func TestBothWaysAtOnce(t *testing.T) {
	l := newLab(t).isolated()
	l.talk("simultaneous open", friend, false, []step{
		{sends, tcp6, tcp(80, 80, syn), "pass policy", []string{"egress 80-80 new"}},
		{receives, tcp6, tcp(80, 80, syn), "pass", []string{"egress 80-80 new"}},
		{receives, tcp6, tcp(80, 80, syn|ack), "pass", []string{"egress 80-80 established"}},
	})
}

func TestRevocation(t *testing.T) {
	without := func(text string) policy.Policy {
		p := oneWay()
		p.Rules[policy.Egress] = slices.DeleteFunc(p.Rules[policy.Egress], func(r policy.Rule) bool { return r.Text == text })
		return p
	}
	setPod := func(l *lab, name string, h host, change func(*policy.Pod)) {
		p := policy.Pod{
			Key: policy.PodKey("uid-" + name), UID: "uid-" + name, Namespace: "ns", Name: name,
			Labels: map[string]string{"name": name}, Addresses: []netip.Addr{h.v4, h.v6}, Local: name == "pod",
		}
		change(&p)
		if err := l.compiler.SetPod(p); err != nil {
			l.t.Fatal(err)
		}
	}
	// Before: an open TCP connection to friend's port 80, and UDP to buddy.
	for name, c := range map[string]struct {
		change                 func(*lab)
		pod, friend, podToMate string
	}{
		"nothing":           {func(l *lab) { l.apply() }, "pass", "pass", "pass"},
		"a rule gone":       {func(l *lab) { l.enforce(without("friend")) }, "drop default", "drop default", "pass"},
		"another rule gone": {func(l *lab) { l.enforce(without("buddy")) }, "pass", "pass", "drop default"},
		"another port": {func(l *lab) {
			p := oneWay()
			p.Rules[policy.Egress][0].Ports = []policy.Port{port(policy.TCP, 81)}
			l.enforce(p)
		}, "drop default", "drop default", "pass"},
		"a rule of other words": {func(l *lab) {
			p := oneWay()
			p.Rules[policy.Egress][0].Ports = []policy.Port{{Protocol: policy.TCP, First: 1, Last: 1000}}
			l.enforce(p)
		}, "pass", "pass", "pass"},
		"no policy": {func(l *lab) {
			l.compiler.DeletePolicy("isolation")
			l.apply()
		}, "pass", "pass", "pass"},
		"the peer relabelled": {func(l *lab) {
			setPod(l, "friend", friend, func(p *policy.Pod) { p.Labels = map[string]string{"name": "stranger"} })
			l.apply()
		}, "drop default", "drop default", "pass"},
		"the address another's": {func(l *lab) {
			setPod(l, "friend", friend, func(p *policy.Pod) { p.Addresses = nil })
			setPod(l, "twin", friend, func(p *policy.Pod) { p.Labels = map[string]string{"name": "friend"} })
			l.apply()
			// What the twin sends is no answer to what its predecessor was asked.
			l.talk("twin", friend, false, []step{{receives, tcp6, tcp(80, 40000, ack), "drop default", nil}})
		}, "pass policy", "pass", "pass"},
		"the peer gone": {func(l *lab) {
			l.compiler.DeletePod("uid-friend")
			l.apply()
		}, "drop default", "drop default", "pass"},
		"the pod audited": {func(l *lab) {
			setPod(l, "pod", pod, func(p *policy.Pod) { p.Audit = true })
			l.enforce(without("friend"))
		}, "audit default", "pass", "pass"},
		"another attachment": {func(l *lab) {
			l.do(func() error { return l.state.Delete(l.t.Context(), l.endpoint.Key) })
			l.gate()
			l.talk("the next owner", friend, false, []step{{receives, tcp6, tcp(80, 40000, ack), "drop default", nil}})
		}, "pass policy", "pass", "pass policy"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.enforce(oneWay())
			l.gate()
			open := []step{
				{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
				{receives, tcp6, tcp(80, 40000, syn|ack), "pass", nil},
			}
			for _, v6 := range []bool{false, true} {
				l.talk("before", friend, v6, open)
				l.talk("before", buddy, v6, []step{{sends, udp17, udp(1, 2), "pass policy", nil}})
			}
			c.change(l)
			for _, v6 := range []bool{false, true} {
				l.talk(fmt.Sprintf("v6 %v, the pod", v6), friend, v6, []step{
					{sends, tcp6, tcp(40000, 80, ack), c.pod, nil},
					{receives, tcp6, tcp(80, 40000, ack), c.friend, nil},
				})
				l.talk(fmt.Sprintf("v6 %v, the other flow", v6), buddy, v6, []step{{sends, udp17, udp(1, 2), c.podToMate, nil}})
			}
		})
	}
}

// Flows are known from a pod's first packet on, so that a policy that comes
// later cuts what it denies and nothing else.
func TestPolicyComesLater(t *testing.T) {
	l := newLab(t)
	l.apply()
	l.gate()
	l.talk("open", friend, false, []step{
		{sends, tcp6, tcp(40000, 80, syn), "pass open", nil},
		{receives, tcp6, tcp(80, 40000, syn|ack), "pass", nil},
		{sends, tcp6, tcp(40001, 81, syn), "pass open", nil},
		{receives, tcp6, tcp(81, 40001, syn|ack), "pass", nil},
		{receives, tcp6, tcp(40002, 90, syn), "pass open", nil},
	})
	l.enforce(oneWay())
	l.talk("isolated", friend, false, []step{
		{receives, tcp6, tcp(80, 40000, ack), "pass", nil},
		{sends, tcp6, tcp(40000, 80, ack), "pass", nil},
		{receives, tcp6, tcp(81, 40001, ack), "drop default", nil},
		{sends, tcp6, tcp(40001, 81, ack), "drop default", nil},
		{sends, tcp6, tcp(90, 40002, syn|ack), "drop default", nil},
	})
}

func TestNodeTraffic(t *testing.T) {
	l := newLab(t)
	l.enforce(oneWay())
	l.gate()
	outside := node
	outside.v4 = netip.MustParseAddr("192.0.2.9") // an address nobody named
	own, uplink := arrival{l.gated, 0}, arrival{l.gated, l.uplink}
	at := func(d policy.Direction, at arrival, frame []byte, want string) {
		t.Helper()
		if got, _ := l.runAt(d, frame, at); got != want {
			t.Errorf("direction %d: %s, not %s", d, got, want)
		}
	}
	ask, answer := between(receives, outside).v4(tcp6, tcp(50000, 8080, syn)), between(sends, outside).v4(tcp6, tcp(8080, 50000, syn|ack))
	at(receives, uplink, ask, "drop default")
	at(receives, own, ask, "pass node")
	at(sends, own, answer, "pass")
	at(sends, own, between(sends, outside).v4(tcp6, tcp(8081, 50000, syn)), "drop default")
	// Somebody else with the node's address.
	at(receives, uplink, between(receives, node).v4(tcp6, tcp(50000, 8080, syn)), "drop default")
	// The probes of the kubelet go on when policy changes.
	l.enforce(isolation())
	at(sends, own, between(sends, outside).v4(tcp6, tcp(8080, 50000, ack)), "pass")
	for _, frame := range [][]byte{between(receives, node).v4(icmp4, icmp(8, 0, 7)), between(receives, node).v6(icmp58, icmp(128, 0, 7)),
		between(receives, node).v4(udp17, udp(50000, 9000)), between(receives, node).v4(gre, nil)} {
		l.clear()
		at(receives, own, frame, "pass node")
	}
}

func TestRelatedErrors(t *testing.T) {
	l := newLab(t)
	l.enforce(oneWay())
	l.gate()
	router := foe // any host on the way
	for _, open := range []step{
		{sends, udp17, udp(40000, 53), "pass policy", nil},
		{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
	} {
		l.talk("open", friend, false, []step{open})
		l.talk("open", friend, true, []step{open})
	}
	l.talk("open", buddy, false, []step{{sends, icmp4, icmp(8, 0, 7), "pass policy", nil}, {sends, gre, udp(1, 2), "pass policy", nil}})
	sent, toBuddy := between(sends, friend), between(sends, buddy)
	in := between(receives, router)
	not := func(p path, change func(*path)) path {
		change(&p)
		return p
	}
	error4 := func(kind, code byte, quoted []byte) []byte { return in.v4(icmp4, icmp(kind, code, 0, quoted...)) }
	error6 := func(kind, code byte, quoted []byte) []byte { return in.v6(icmp58, icmp(kind, code, 0, quoted...)) }
	for name, c := range map[string]struct {
		frame []byte
		want  string
	}{
		"port unreachable":        {error4(3, 3, sent.packet4(udp17, udp(40000, 53))), "pass"},
		"fragmentation needed":    {error4(3, 4, sent.packet4(tcp6, tcp(40000, 80, ack))), "pass"},
		"time exceeded":           {error4(11, 0, sent.packet4(udp17, udp(40000, 53))), "pass"},
		"parameter problem":       {error4(12, 0, sent.packet4(udp17, udp(40000, 53))), "pass"},
		"of an echo":              {error4(11, 0, toBuddy.packet4(icmp4, icmp(8, 0, 7))), "pass"},
		"of GRE":                  {error4(3, 2, toBuddy.packet4(gre, udp(1, 2))), "pass"},
		"with options quoted":     {error4(3, 3, sent.packet4(udp17, udp(40000, 53), 1, 1, 1, 1)), "pass"},
		"unreachable v6":          {error6(1, 4, sent.packet6(udp17, 64, udp(40000, 53))), "pass"},
		"packet too big":          {error6(2, 0, sent.packet6(tcp6, 64, tcp(40000, 80, ack))), "pass"},
		"too big, fragment":       {error6(2, 0, sent.packet6(fragmented, 64, fragment6(tcp6, 1, 0, true, tcp(40000, 80, ack)))), "pass"},
		"another port":            {error4(3, 3, sent.packet4(udp17, udp(40001, 53))), "drop default"},
		"another protocol":        {error4(3, 3, sent.packet4(udp17, udp(40000, 80))), "drop default"},
		"another peer":            {error4(3, 3, between(sends, foe).packet4(udp17, udp(40000, 53))), "drop default"},
		"of an echo not sent":     {error4(11, 0, toBuddy.packet4(icmp4, icmp(8, 0, 8))), "drop default"},
		"of an echo reply":        {error4(11, 0, toBuddy.packet4(icmp4, icmp(0, 0, 7))), "drop default"},
		"of an error":             {error4(3, 3, toBuddy.packet4(icmp4, icmp(3, 3, 7))), "drop default"},
		"of a later fragment":     {error4(11, 1, sent.fragment4(udp17, 1, 64, false, udp(40000, 53))[14:]), "drop default"},
		"the other way round":     {error4(3, 3, sent.back().packet4(udp17, udp(53, 40000))), "drop default"},
		"to another than quoted":  {not(in, func(p *path) { p.to.v4 = netip.MustParseAddr("224.0.0.1") }).v4(icmp4, icmp(3, 3, 0, sent.packet4(udp17, udp(40000, 53))...)), "drop default"},
		"v6 quoted in v4":         {error4(3, 3, sent.packet6(udp17, 64, udp(40000, 53))), "drop default"},
		"v4 quoted in v6":         {error6(1, 4, sent.packet4(udp17, udp(40000, 53))), "drop default"},
		"a redirect":              {error4(5, 1, sent.packet4(udp17, udp(40000, 53))), "drop default"},
		"an unknown error":        {error4(44, 1, sent.packet4(udp17, udp(40000, 53))), "drop default"},
		"quoted header too small": {error4(3, 3, append([]byte{0x44}, sent.packet4(udp17, udp(40000, 53))[1:]...)), "drop default"},
	} {
		if got := l.run(receives, c.frame); got != c.want {
			t.Errorf("%s: %s, not %s", name, got, c.want)
		}
	}
	// At least the ports have to be there: 8 bytes (RFC 792).
	whole4, whole6 := sent.packet4(udp17, udp(40000, 53)), sent.packet6(udp17, 64, udp(40000, 53))
	for n := range len(whole4) {
		if got, want := l.run(receives, error4(3, 3, whole4[:n])), map[bool]string{true: "pass", false: "drop default"}[n >= 28]; got != want {
			t.Errorf("with %d bytes quoted: %s, not %s", n, got, want)
		}
	}
	for n := range len(whole6) {
		if got, want := l.run(receives, error6(1, 4, whole6[:n])), map[bool]string{true: "pass", false: "drop default"}[n >= 48]; got != want {
			t.Errorf("v6, with %d bytes quoted: %s, not %s", n, got, want)
		}
	}
	// Nothing of this made a flow or kept one alive that policy denies.
	p := oneWay()
	p.Rules[policy.Egress] = nil
	l.enforce(p)
	if got := l.run(receives, error4(3, 3, whole4)); got != "drop default" {
		t.Errorf("about a flow denied since: %s", got)
	}
}

// A pod's own errors about what it was allowed to get.
func TestRelatedErrorsOfThePod(t *testing.T) {
	l := newLab(t).isolated()
	got, out := between(receives, friend), between(sends, friend)
	for _, v6 := range []bool{false, true} {
		l.talk("open", friend, v6, []step{{receives, udp17, udp(40000, 53), "pass policy", nil}})
	}
	for name, c := range map[string]struct {
		frame []byte
		want  string
	}{
		"port unreachable": {out.v4(icmp4, icmp(3, 3, 0, got.packet4(udp17, udp(40000, 53))...)), "pass"},
		"another port":     {out.v4(icmp4, icmp(3, 3, 0, got.packet4(udp17, udp(40000, 54))...)), "drop default"},
		"to another":       {between(sends, foe).v4(icmp4, icmp(3, 3, 0, got.packet4(udp17, udp(40000, 53))...)), "drop default"},
		"to another, v6":   {between(sends, foe).v6(icmp58, icmp(1, 4, 0, got.packet6(udp17, 64, udp(40000, 53))...)), "drop default"},
		"unreachable v6":   {out.v6(icmp58, icmp(1, 4, 0, got.packet6(udp17, 64, udp(40000, 53))...)), "pass"},
		"from another": {path{host{pod.mac, foe.v4, foe.v6}, friend}.v4(icmp4, icmp(3, 3, 0, got.packet4(udp17, udp(40000, 53))...)),
			"drop spoofed-address"},
	} {
		if answer := l.run(sends, c.frame); answer != c.want {
			t.Errorf("%s: %s, not %s", name, answer, c.want)
		}
	}
}

// What an event and the counters say of a packet.
func TestAttribution(t *testing.T) {
	l := newLab(t).isolated()
	frame := between(sends, friend).v4(tcp6, web)
	_, event := l.runAt(sends, frame, arrival{l.gated, l.uplink})
	if event == nil {
		t.Fatal("no event")
	}
	rule, err := l.state.Rule(event.Rule)
	if err != nil || rule.Text != "friend" || rule.Direction != policy.Egress || rule.Policy.Name != "isolation" || rule.Counter.Packets != 1 {
		t.Errorf("allowed by %+v, %v", rule, err)
	}
	local, peer := netip.AddrPortFrom(pod.v4, 40000), netip.AddrPortFrom(friend.v4, 80)
	if event.Local != local || event.Peer != peer || event.Protocol != policy.TCP || event.TCPFlags != syn ||
		event.Endpoint != l.endpoint.ID || event.Ifindex != uint32(l.gated) || event.Length != uint32(len(frame)) || event.EtherType != etherV4 {
		t.Errorf("the event is %+v", *event)
	}
	l.run(sends, frame)
	l.run(sends, between(sends, foe).v6(icmp58, icmp(128, 0, 9)))
	_, event = l.runAt(receives, between(receives, foe).v6(icmp58, icmp(128, 0, 9)), arrival{l.gated, l.uplink})
	if event == nil {
		t.Fatal("no event of the drop")
	}
	rule, err = l.state.Rule(event.Rule)
	if err != nil || rule.Index != -1 || rule.Policy.Name != "isolation" {
		t.Errorf("dropped by %+v, %v", rule, err)
	}
	if event.ICMPType != 128 || event.Peer != netip.AddrPortFrom(foe.v6, 9) || event.Local != netip.AddrPortFrom(pod.v6, 0) {
		t.Errorf("the event is %+v", *event)
	}
	n := uint64(len(frame))
	counters, err := l.state.Counters(l.endpoint.Gate)
	if want := (pinning.EndpointCounters{
		AllowedPackets: [2]uint64{0, 2}, AllowedBytes: [2]uint64{0, 2 * n},
		DroppedPackets: [2]uint64{1, 1}, DroppedBytes: [2]uint64{62, 62},
	}); err != nil || counters != want {
		t.Errorf("counters are %+v, not %+v, %v", counters, want, err)
	}
	drops, err := l.state.DropCounters()
	if err != nil || len(drops) != 2 || drops[0].Packets != 1 || drops[0].Reason.String() != "default" {
		t.Errorf("drop counters are %+v, %v", drops, err)
	}
}
