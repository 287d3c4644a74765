// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

// A CPU remembers more verdicts than it has room for: each is still the one of
// its peer, port, protocol and direction.
func TestVerdictsOfMany(t *testing.T) {
	l := newLab(t).isolated()
	const seed = 1
	random := rand.New(rand.NewPCG(seed, seed))
	peers := []host{friend, buddy, foe}
	for i := range 4000 {
		peer, d, v6 := peers[random.IntN(len(peers))], policy.Direction(random.IntN(2)), random.IntN(2) == 0
		to := uint16(40 + random.IntN(60))
		protocol, number, payload := policy.TCP, byte(tcp6), tcp(uint16(10000+i), to, syn)
		if random.IntN(2) == 0 {
			protocol, number, payload = policy.UDP, udp17, udp(uint16(10000+i), to)
		}
		p, address := between(d, peer), peer.v4
		frame := p.v4(number, payload)
		if v6 {
			frame, address = p.v6(number, payload), peer.v6
		}
		verdict, err := l.compiler.Judge(d, podUID, address, protocol, to)
		if err != nil {
			t.Fatal(err)
		}
		want := "drop default"
		if verdict.Action == policy.Allow {
			want = "pass policy"
		}
		if got := l.run(d, frame); got != want {
			t.Fatalf("seed %d, packet %d, %s of %v port %d from %s: %s, not %s", seed, i, d, protocol, to, address, got, want)
		}
	}
}

// What a CPU remembers stands until the epoch moves, and no longer.
func TestVerdictsEnd(t *testing.T) {
	l := newLab(t).isolated()
	peers := l.pinned(bpf.DatapathMapPeers)
	class := func(h host) (key bpf.DatapathAddress, p bpf.DatapathPeer) {
		a := h.v4.As16()
		copy(key.Bytes[:], a[:])
		if err := peers.Lookup(&key, &p); err != nil {
			t.Fatal(err)
		}
		return key, p
	}
	key, friends := class(friend)
	_, buddies := class(buddy)
	const passed, dropped = -1, 2
	ask := func(what string, want int32) error {
		answer, err := l.programs[policy.Egress].Run(&ebpf.RunOptions{
			Data:    between(policy.Egress, friend).v4(tcp6, tcp(40000, 81, syn)),
			Context: append(make([]uint32, skbIfindex), append([]uint32{uint32(l.gated)}, make([]uint32, skbWords-skbIfindex-1)...)...),
		})
		if err == nil && int32(answer) != want {
			err = fmt.Errorf("%s: the program answers %d, not %d", what, int32(answer), want)
		}
		return err
	}
	// All on one CPU: another one remembers nothing.
	l.do(func() error {
		var all, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &all); err != nil {
			return err
		}
		cpu := 0
		for !all.IsSet(cpu) {
			cpu++
		}
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		err := ask("a friend", dropped)
		friends.Class = buddies.Class
		err = errors.Join(err, peers.Put(&key, &friends), ask("a friend in the class of buddies, which no epoch told of", dropped))
		err = errors.Join(err, l.state.SetNodeAddresses(t.Context(), []netip.Addr{netip.MustParseAddr("192.0.2.1")}),
			ask("a buddy by now", passed))
		return errors.Join(err, unix.SchedSetaffinity(0, &all))
	})
}
