// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
)

const (
	// policies of the cluster, and as many peers and blocks of each family.
	policies = 1000
	// local pods, whose policies are in use on the node: the tables hold what
	// these can tell apart.
	local  = 250
	rounds = 300
	// hot is how often a packet of a known flow is repeated for one sample.
	hot = 10000
	// A packet that makes an event is repeated less, so that the events of a
	// batch wake nobody; they are consumed between batches.
	batch, batches = 400, 5
)

// The answers of tc programs (linux/pkt_cls.h).
const (
	passed  = -1
	dropped = 2
)

// packets runs frames through floors and through the pinned datapath.
type packets struct {
	b          *testing.B
	node       *node
	floor      floorObjects
	program    [2]*ebpf.Program
	events     *ringbuf.Reader
	gated, not *endpoint
}

// BenchmarkPacket measures the programs at the hooks of a pod, one packet at a
// time, in the kernel's test loop.
func BenchmarkPacket(b *testing.B) {
	p := newPackets(b)
	var all []*series
	err := p.node.Do(func() (err error) {
		if all, err = p.series(); err != nil {
			return err
		}
		return measure(rounds, all)
	})
	if err != nil {
		b.Fatal(err)
	}
	report(b, "packet", time.Nanosecond, all)
}

func newPackets(b *testing.B) *packets {
	b.Helper()
	p := &packets{b: b, node: newNode(b, policies, local)}
	p.gated, p.not = p.node.newEndpoint(b, 0), p.node.newEndpoint(b, 1)
	p.node.gate(b, p.gated, localPod(0))
	p.node.gate(b, p.not, "")
	if err := loadFloorObjects(&p.floor, nil); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.floor.Close() })
	for direction, name := range map[policy.Direction]string{
		policy.Ingress: bpf.DatapathProgToPod, policy.Egress: bpf.DatapathProgFromPod,
	} {
		program, err := ebpf.LoadPinnedProgram(p.node.layout.ProgramPath(name), nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { program.Close() })
		p.program[direction] = program
	}
	events, err := ebpf.LoadPinnedMap(p.node.layout.MapPath(bpf.DatapathMapEvents), nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { events.Close() })
	if p.events, err = ringbuf.NewReader(events); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { p.events.Close() })
	return p
}

// consume takes what is in the event ring.
func (p *packets) consume() error {
	var record ringbuf.Record
	for {
		p.events.SetDeadline(time.Unix(0, 0))
		if err := p.events.ReadInto(&record); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the event ring: %w", err)
		}
	}
}

// packet is what a program sees and has to answer.
type packet struct {
	program *ebpf.Program
	frame   []byte
	at      arrival
	want    int32

	source, destination netip.AddrPort
}

// floorPacket is for programs that do not care.
func (p *packets) floorPacket(program *ebpf.Program) packet {
	k := p.packet(policy.Egress, p.gated, remote4(1), passed)
	k.program = program
	return k
}

// packet is one between the pod and a port of a peer, of an established
// connection unless nothing has been allowed before.
func (p *packets) packet(d policy.Direction, e *endpoint, peer netip.Addr, want int32) packet {
	local := e.addresses[0]
	if peer.Is6() {
		local = e.addresses[1]
	}
	ours, theirs := netip.AddrPortFrom(local, 40000), netip.AddrPortFrom(peer, 80)
	router := e.host.Attrs().HardwareAddr
	k := packet{program: p.program[d], want: want, source: theirs, destination: ours}
	if d == policy.Egress {
		k.source, k.destination = ours, theirs
		k.frame = tcpFrame(router, e.mac, ours, theirs, tcpACK)
		k.at = arrival{ifindex: e.host.Attrs().Index, from: e.host.Attrs().Index}
	} else {
		k.frame = tcpFrame(e.mac, router, theirs, ours, tcpACK)
		// It came in at any other interface, so not from this node.
		k.at = arrival{ifindex: e.host.Attrs().Index, from: p.not.host.Attrs().Index}
	}
	return k
}

// opening makes it the first packet of a connection.
func (k packet) opening() packet {
	k.frame[len(k.frame)-20+13] = tcpSYN
	return k
}

// datagram makes it one of UDP.
func (k packet) datagram() packet {
	k.frame = udpFrame(k.frame[:6], k.frame[6:12], k.source, k.destination)
	return k
}

func (k packet) run(times int) (time.Duration, error) {
	answer, d, err := testRun(k.program, k.frame, k.at, times)
	if err == nil && answer != k.want {
		err = fmt.Errorf("%s answers %d, not %d", k.program, answer, k.want)
	}
	return d, err
}

// known is a packet that finds its flow.
func (k packet) known() func() (time.Duration, error) {
	return func() (time.Duration, error) {
		// Should the entry have been evicted meanwhile.
		if _, err := k.run(1); err != nil {
			return 0, err
		}
		return k.run(hot)
	}
}

// noted is a packet that makes an event each time.
func (p *packets) noted(k packet) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		// What ran in between has had the caches.
		if _, err := k.run(batch); err != nil {
			return 0, err
		}
		var sum time.Duration
		for range batches {
			d, err := k.run(batch)
			if err := errors.Join(err, p.consume()); err != nil {
				return 0, err
			}
			sum += d
		}
		return sum / batches, nil
	}
}

// What of a packet is another for the next one.
const (
	sourcePort      uint32 = 1
	destinationPort uint32 = 1 << 16
)

// renewed is a packet that is the first of another flow each time.
func (p *packets) renewed(k packet, step uint32) func() (time.Duration, error) {
	next := k.program
	k.program = p.floor.Renew
	sample := p.noted(k)
	return func() (time.Duration, error) {
		if err := errors.Join(p.floor.Next.Put(uint32(0), next), p.floor.Step.Set(step)); err != nil {
			return 0, err
		}
		return sample()
	}
}

// fill makes the table that a packet enters flows into full.
func (p *packets) fill(k packet) error {
	if err := p.floor.Next.Put(uint32(0), k.program); err != nil {
		return err
	}
	k.program = p.floor.Renew
	_, err := k.run(2 * int(p.floor.Entries.MaxEntries()))
	return errors.Join(err, p.consume())
}

func (p *packets) series() ([]*series, error) {
	insert := p.floorPacket(p.floor.Insert)
	first := p.packet(policy.Egress, p.gated, remote4(1), passed).opening()
	if err := errors.Join(p.fill(insert), p.fill(first)); err != nil {
		return nil, err
	}
	if err := p.floor.Entries.Put(floorFlowKey{}, floorFlow{}); err != nil {
		return nil, err
	}

	empty := &series{name: "empty program", sample: p.floorPacket(p.floor.Empty).known()}
	hit := &series{name: "empty + LRU hit", sample: p.floorPacket(p.floor.Hit).known()}
	renew := &series{name: "empty, next flow", sample: p.renewed(p.floorPacket(p.floor.Empty), sourcePort)}
	inserted := &series{name: "LRU insert, evicting", sample: p.renewed(insert, sourcePort), over: renew, bare: empty}
	// A datagram does not say, as a SYN does, that there is no flow yet.
	missed := &series{name: "LRU miss + insert, evicting", sample: p.renewed(p.floorPacket(p.floor.Miss), sourcePort), over: renew, bare: empty}
	all := []*series{empty, hit, renew, inserted, missed}

	directions := []struct {
		name string
		policy.Direction
	}{{"egress", policy.Egress}, {"ingress", policy.Ingress}}
	type peers struct {
		family string
		netip.Addr
	}
	add := func(what string, by []peers, t target, sample func(policy.Direction, netip.Addr) *series) {
		for _, peer := range by {
			for _, d := range directions {
				s := sample(d.Direction, peer.Addr)
				s.name, s.target = fmt.Sprintf("%s %s %s", what, peer.family, d.name), t
				all = append(all, s)
			}
		}
	}
	const other = local / 2
	opens := func(k packet, step uint32) *series {
		return &series{sample: p.renewed(k, step), over: renew, bare: empty}
	}
	add("established", []peers{{"v4", remote4(1)}, {"v6", remote6(1)}}, target{floor: hit, times: 1.6},
		func(d policy.Direction, peer netip.Addr) *series {
			return &series{sample: p.packet(d, p.gated, peer, passed).known()}
		})
	denied := func(d policy.Direction, peer netip.Addr) *series {
		return &series{sample: p.noted(p.packet(d, p.gated, peer, dropped).opening())}
	}
	add("denied, exact", []peers{{"v4", remote4(other)}, {"v6", remote6(other)}}, target{floor: hit, times: 2.6}, denied)
	add("denied, first of a kind", []peers{{"v4", remote4(other)}}, target{floor: hit},
		func(d policy.Direction, peer netip.Addr) *series {
			return opens(p.packet(d, p.gated, peer, dropped).opening(), destinationPort)
		})
	add("denied, LPM", []peers{{"v4", block4(other).Next()}, {"v6", block6(other).Next()}}, target{floor: hit}, denied)
	add("closed gate", []peers{{"v4", remote4(1)}}, target{floor: hit},
		func(d policy.Direction, peer netip.Addr) *series {
			return &series{sample: p.noted(p.packet(d, p.not, peer, dropped).opening())}
		})
	add("new, allowed", []peers{{"v4", remote4(1)}, {"v6", remote6(1)}}, target{floor: inserted, times: 1.3},
		func(d policy.Direction, peer netip.Addr) *series {
			return opens(p.packet(d, p.gated, peer, passed).opening(), sourcePort)
		})
	add("new, allowed UDP", []peers{{"v4", remote4(1)}}, target{floor: missed, times: 1.3},
		func(d policy.Direction, peer netip.Addr) *series {
			return opens(p.packet(d, p.gated, peer, passed).datagram(), sourcePort)
		})
	add("new, allowed, other port", []peers{{"v4", remote4(1)}}, target{floor: inserted},
		func(d policy.Direction, peer netip.Addr) *series {
			return opens(p.packet(d, p.gated, peer, passed).opening(), destinationPort)
		})
	return all, nil
}
