// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

func neighbourShapes() []shape {
	none := host{v4: netip.IPv4Unspecified(), v6: netip.IPv6Unspecified(), mac: pod.mac}
	from := func(p path, v6 netip.Addr) path {
		p.from.v6 = v6
		return p
	}
	// What is for many: its address, and the same to one.
	many := func(address string, build func(path) []byte) func(path) []byte {
		return func(p path) []byte {
			p.to.v6 = netip.MustParseAddr(address)
			return build(p)
		}
	}
	routers := func(p path) []byte { return p.hop6(icmp58, 255, []byte{rsType, 7: 0}) }
	report := func(p path) []byte {
		return p.hop6(hopByHop, 1, extension(icmp58, []byte{5, 2}, icmp(mldReport, 0, 0, make([]byte, 16)...)))
	}
	report2 := func(p path) []byte { return p.hop6(hopByHop, 1, extension(icmp58, []byte{5, 2}, icmp(mld2, 0, 0))) }
	send := func(kind byte, target netip.Addr, option byte, mac [6]byte) func(path) []byte {
		return func(p path) []byte { return p.hop6(icmp58, 255, nd(kind, target, option, mac)) }
	}
	arpOf := func(operation byte, sender host) func(path) []byte {
		return func(p path) []byte { return p.ether(etherARP, arp(operation, sender, p.to)) }
	}
	return []shape{
		{"ARP of the pod", friend, arpOf(1, pod), []string{"pass"}},
		{"ARP reply of the pod", friend, arpOf(2, pod), []string{"pass"}},
		{"ARP probe", friend, arpOf(1, host{mac: pod.mac, v4: none.v4}), []string{"pass"}},
		{"ARP for another address", friend, arpOf(2, host{mac: pod.mac, v4: friend.v4}), []string{"pass", "drop spoofed-neighbour"}},
		{"ARP with another MAC", friend, arpOf(2, host{mac: foe.mac, v4: pod.v4}), []string{"pass", "drop spoofed-neighbour"}},
		{"ARP of other hardware", friend, changed(arpOf(2, pod), 14, 0, 6), []string{"pass", "drop spoofed-neighbour"}},
		{"ARP with long addresses", friend, changed(arpOf(2, pod), 18, 8), []string{"pass", "drop spoofed-neighbour"}},

		{"solicitation", friend, many("ff02::1:ff00:3", send(nsType, friend.v6, 1, pod.mac)), []string{"pass"}},
		{"solicitation of one who is not known", friend, send(nsType, friend.v6, 1, pod.mac), []string{"pass", "drop default"}},
		{"solicitation, another MAC", friend, send(nsType, friend.v6, 1, foe.mac), []string{"pass", "drop spoofed-neighbour"}},
		{"solicitation from nowhere", friend, many("ff02::1:ff00:2", func(p path) []byte {
			return from(p, none.v6).hop6(icmp58, 255, nd(nsType, pod.v6, 14, [6]byte{}))
		}), []string{"pass"}},
		{"solicitation of another", friend, func(p path) []byte {
			return from(p, foe.v6).hop6(icmp58, 255, nd(nsType, friend.v6, 1, pod.mac))
		}, []string{"pass", "drop spoofed-address"}},
		{"advertisement", friend, many("ff02::1", send(naType, pod.v6, 2, pod.mac)), []string{"pass"}},
		{"advertisement to one who did not ask", friend, send(naType, pod.v6, 2, pod.mac), []string{"pass", "drop default"}},
		{"advertisement, link-local", friend, many("fe80::3", func(p path) []byte {
			return from(p, linkLocal).hop6(icmp58, 255, nd(naType, linkLocal, 2, pod.mac))
		}), []string{"pass"}},
		{"advertisement of another", friend, send(naType, friend.v6, 2, pod.mac), []string{"pass", "drop spoofed-neighbour"}},
		{"advertisement, another MAC", friend, send(naType, pod.v6, 2, foe.mac), []string{"pass", "drop spoofed-neighbour"}},
		{"advertisement, second option lies", friend, func(p path) []byte {
			return p.hop6(icmp58, 255, slices.Concat(nd(naType, pod.v6, 2, pod.mac), []byte{2, 1}, foe.mac[:]))
		}, []string{"pass", "drop spoofed-neighbour"}},
		{"option of no length", friend, func(p path) []byte {
			return p.hop6(icmp58, 255, append(nd(nsType, friend.v6, 1, pod.mac), 5, 0, 0, 0, 0, 0, 0, 0))
		}, []string{"pass", "drop malformed"}},
		{"advertisement without a target", friend, func(p path) []byte {
			return p.hop6(icmp58, 255, nd(naType, pod.v6, 2, pod.mac)[:16])
		}, []string{"pass", "drop malformed"}},
		{"routed solicitation", friend, func(p path) []byte { return p.hop6(icmp58, 254, nd(nsType, friend.v6, 1, pod.mac)) }, []string{"drop malformed"}},
		{"fragmented solicitation", friend, func(p path) []byte {
			return p.hop6(fragmented, 255, fragment6(icmp58, 6, 0, true, nd(nsType, friend.v6, 1, pod.mac)))
		}, []string{"drop fragment"}},
		{"router solicitation", friend, many("ff02::2", routers), []string{"pass"}},
		{"router solicitation to one", friend, routers, []string{"pass", "drop default"}},
		{"router advertisement", friend, func(p path) []byte { return p.hop6(icmp58, 255, icmp(raType, 0, 0, make([]byte, 8)...)) },
			[]string{"pass", "drop spoofed-neighbour"}},
		{"redirect", friend, func(p path) []byte { return p.hop6(icmp58, 255, icmp(redirect, 0, 0, make([]byte, 32)...)) },
			[]string{"pass", "drop spoofed-neighbour"}},
		{"listener report", friend, many("ff02::fb", report), []string{"pass"}},
		{"listener report to one", friend, report, []string{"pass", "drop default"}},
		{"listener report, version 2", friend, many("ff02::16", report2), []string{"pass"}},
		{"listener report, version 2, to one", friend, report2, []string{"pass", "drop default"}},
		{"routed listener report", friend, func(p path) []byte {
			return p.hop6(hopByHop, 64, extension(icmp58, []byte{5, 2}, icmp(mld2, 0, 0)))
		}, []string{"drop malformed"}},
	}
}

// asks and answers of a neighbour: what makes it known to the pod.
func asks(p path, target netip.Addr) []byte {
	return p.hop6(icmp58, 255, nd(nsType, target, 1, p.from.mac))
}

func answers(p path, target netip.Addr) []byte {
	return p.hop6(icmp58, 255, nd(naType, target, 2, p.from.mac))
}

func toAll(p path, address string) path {
	p.to.v6 = netip.MustParseAddr(address)
	return p
}

// wants runs a frame and says what should have become of it.
func (l *lab) wants(what string, d policy.Direction, frame []byte, want string) {
	l.t.Helper()
	if got := l.run(d, frame); got != want {
		l.t.Errorf("%s: %s, not %s", what, got, want)
	}
}

// An isolated pod speaks neighbour discovery to one host only when that has
// done so before, which nobody can from beyond a router.
func TestNeighboursAreMet(t *testing.T) {
	l := newLab(t).isolated()
	out, in := between(sends, friend), between(receives, friend)
	l.wants("an answer nobody asked for", sends, answers(out, pod.v6), "drop default")
	l.wants("a probe of a stranger", sends, asks(out, friend.v6), "drop default")
	l.wants("a question that was routed", receives, in.hop6(icmp58, 254, nd(nsType, pod.v6, 1, friend.mac)), "drop malformed")
	l.wants("the answer to it", sends, answers(out, pod.v6), "drop default")

	l.wants("a question", receives, asks(toAll(in, "ff02::1:ff00:2"), pod.v6), "pass")
	l.wants("its answer", sends, answers(out, pod.v6), "pass")
	l.wants("a probe", sends, asks(out, friend.v6), "pass")
	l.wants("a probe for another", sends, asks(out, foe.v6), "drop default")
	l.wants("an answer to another", sends, answers(between(sends, foe), pod.v6), "drop default")

	l.wants("a question of the pod", sends, asks(toAll(between(sends, foe), "ff02::1:ff00:5"), foe.v6), "pass")
	l.wants("one to the wrong group", sends, asks(toAll(between(sends, foe), "ff02::1:ff00:6"), foe.v6), "drop default")
	l.wants("its answer", receives, answers(between(receives, foe), foe.v6), "pass")
	l.wants("a probe since", sends, asks(between(sends, foe), foe.v6), "pass")

	l.wants("who may be spoken to anyway", sends, asks(between(sends, buddy), buddy.v6), "pass")

	// Not those of whoever had the interface before.
	l.do(func() error { return l.state.Delete(t.Context(), l.endpoint.Key) })
	l.gate()
	l.wants("a probe of the next pod", sends, asks(out, friend.v6), "drop default")
}

func TestNeighboursAreForgotten(t *testing.T) {
	l := newLab(t).isolated()
	l.withTimeouts(func(bpf.DatapathFlowKind, bpf.DatapathFlowState) uint64 { return 1 << 20 })
	l.wants("a question", receives, asks(between(receives, friend), pod.v6), "pass")
	time.Sleep(50 * time.Millisecond)
	l.wants("a late answer", sends, answers(between(sends, friend), pod.v6), "drop default")
	if u := l.usage(bpf.DatapathMapNeighbours); u.Used != 0 {
		t.Errorf("the usage is %+v", u)
	}
}

// What neighbours have to say to each other has no room for anything else.
func TestNeighboursSayNoMore(t *testing.T) {
	out := between(sends, friend)
	probe, answer := nd(nsType, friend.v6, 1, pod.mac), nd(naType, pod.v6, 2, pod.mac)
	nonce := []byte{14, 1, 1, 2, 3, 4, 5, 6}
	routers := slices.Concat([]byte{rsType, 7: 0}, []byte{1, 1}, pod.mac[:])
	set := func(message []byte, at int, b byte) []byte {
		message = slices.Clone(message)
		message[at] = b
		return message
	}
	discovery := func(message []byte) []byte { return out.hop6(icmp58, 255, message) }
	claim := out.ether(etherARP, arp(2, pod, friend))
	report := func(to string, options int) []byte {
		alert := append([]byte{5, 2, 0, 0, 1, 0}, make([]byte, options)...)
		return toAll(out, to).hop6(hopByHop, 1, extension(icmp58, alert, icmp(mld2, 0, 0)))
	}
	for name, c := range map[string]struct {
		frame []byte
		want  string
	}{
		"a probe":                    {discovery(probe), "pass"},
		"a probe with a nonce":       {discovery(slices.Concat(probe, nonce)), "pass"},
		"a probe and more":           {discovery(slices.Concat(probe, nonce, nonce)), "drop default"},
		"a probe with a tail":        {append(discovery(slices.Concat(probe, nonce)), 1), "drop default"},
		"a probe of another code":    {discovery(set(probe, 1, 1)), "drop default"},
		"a probe with reserved bits": {discovery(set(probe, 4, 1)), "drop default"},
		"an answer":                  {discovery(set(answer, 4, 0xe0)), "pass"},
		"an answer, reserved bits":   {discovery(set(answer, 4, 0x10)), "drop default"},
		"an answer, more of them":    {discovery(set(answer, 7, 1)), "drop default"},
		"behind a header": {
			out.hop6(destination, 255, extension(icmp58, []byte{30, 4, 1, 2, 3, 4}, probe)), "drop default",
		},
		"a router solicitation with more": {
			toAll(out, "ff02::2").hop6(icmp58, 255, slices.Concat(routers, nonce, nonce)), "drop default",
		},
		"a router solicitation": {toAll(out, "ff02::2").hop6(icmp58, 255, slices.Concat(routers, nonce)), "pass"},
		"a report":              {report("ff02::16", 0), "pass"},
		"a report, more alert":  {report("ff02::16", 8), "drop default"},
		"ARP":                   {claim, "pass"},
		"ARP, padded":           {append(slices.Clone(claim), make([]byte, 18)...), "pass"},
		"ARP with a tail":       {append(slices.Clone(claim), make([]byte, 19)...), "drop malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t).isolated()
			l.wants("a question", receives, asks(between(receives, friend), pod.v6), "pass")
			l.wants(name, sends, c.frame, c.want)
			// Nobody minds where nothing is denied.
			l.compiler.DeletePolicy("isolation")
			l.apply()
			l.wants(name+", not isolated", sends, c.frame, "pass")
		})
	}
}

// TestNeighboursForReal has the kernels of isolated pods find each other, and
// ask later whether they are still there.
func TestNeighboursForReal(t *testing.T) {
	for name, bridged := range map[string]bool{"bridged": true, "routed": false} {
		t.Run(name, func(t *testing.T) {
			s := newStreet(t, bridged)
			s.serve("web", []int{8080}, 8053)
			p := webPolicy(8080)
			p.Isolates[policy.Egress] = true
			s.enforce(p)
			web, client := s.pods["web"], s.pods["client"]
			hop, at := client.v6, "eth0"
			if !bridged {
				hop = node.v6
			}
			s.reach("client's", true, client, "tcp", netip.AddrPortFrom(web.v6, 8080))
			for _, state := range []int{netlink.NUD_PROBE, netlink.NUD_STALE, netlink.NUD_FAILED} {
				s.must(web.Do(func() error { return turn(at, hop, state) }))
				s.reach("client's", true, client, "tcp", netip.AddrPortFrom(web.v6, 8080))
				deadline := time.Now().Add(patience(true))
				for state == netlink.NUD_PROBE {
					var now int
					s.must(web.Do(func() (err error) {
						now, err = neighbourState(at, hop)
						return err
					}))
					if now == netlink.NUD_REACHABLE {
						break
					}
					if time.Now().After(deadline) {
						t.Fatalf("the probe of %s ended in state %#x", hop, now)
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
			if drops, err := s.state.DropCounters(); err != nil || len(drops) != 0 {
				t.Errorf("dropped was %+v, %v", drops, err)
			}
		})
	}
}

// turn gives a neighbour entry another state (linux/neighbour.h).
func turn(link string, a netip.Addr, state int) error {
	n, err := neighbourOf(link, a)
	if err != nil {
		return err
	}
	n.State = state
	return netlink.NeighSet(&n)
}

func neighbourState(link string, a netip.Addr) (int, error) {
	n, err := neighbourOf(link, a)
	return n.State, err
}

func neighbourOf(link string, a netip.Addr) (netlink.Neigh, error) {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return netlink.Neigh{}, err
	}
	all, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V6)
	if err != nil {
		return netlink.Neigh{}, err
	}
	for _, n := range all {
		if n.IP.Equal(net.IP(a.AsSlice())) {
			return n, nil
		}
	}
	return netlink.Neigh{}, &net.AddrError{Err: "no neighbour", Addr: a.String()}
}
