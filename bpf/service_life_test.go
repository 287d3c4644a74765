// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// TestServiceOfManyBackends: some may be reached and some not; which one it is
// decides, each time anew.
func TestServiceOfManyBackends(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		s := service(1, policy.UDP, 8053, friend, foe, buddy)
		p.set(s)
		for _, f := range s.Frontends {
			answers := map[string]int{}
			for range 30 {
				who, err := ask(p.pods["client"], "udp", 0, f, 100*time.Millisecond)
				if err != nil {
					who = ""
				}
				answers[who]++
			}
			if answers["bad"] > 0 || answers["good"] == 0 || answers["good2"] == 0 || answers[""] == 0 {
				p.t.Errorf("%s is answered by %v", f, answers)
			}
		}
		// A TCP client tries again, and kube-proxy chooses again.
		p.set(service(1, policy.TCP, 8080, friend, foe))
		who, err := ask(p.pods["client"], "tcp", 0, netip.AddrPortFrom(vip(1, pod.v4), 80), 30*time.Second)
		if who != "good" {
			p.t.Errorf("after trying again %q answers, %v", who, err)
		}
	})
}

// TestServiceAffinity: a client stays with the backend it got, be it one that it
// may reach or not.
func TestServiceAffinity(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		if p.iptables {
			p.must(p.Do(func() error {
				if err := exec.Command("iptables", "-w", "-A", "INPUT", "-m", "recent", "--set").Run(); err != nil {
					p.t.Skipf("the kernel has no xt_recent: %v", err)
				}
				return nil
			}))
		}
		p.sticky = true
		s := service(1, policy.UDP, 8053, friend, foe)
		for i, f := range s.Frontends {
			met := map[string]int{}
			for round := 0; len(met) < 2 && round < 40; round++ {
				p.translate(nil) // and forget
				p.set(s)
				first, _ := ask(p.pods["client"], "udp", 0, f, 200*time.Millisecond)
				met[first]++
				for range 3 {
					if who, _ := ask(p.pods["client"], "udp", 0, f, 200*time.Millisecond); who != first {
						p.t.Fatalf("%s is answered by %q, and then by %q", f, first, who)
					}
				}
			}
			if met["good"] == 0 || met[""] == 0 {
				p.t.Errorf("family %d: %s is answered by %v", i, f, met)
			}
		}
	})
}

// TestServicesUnderIPVS: where translation cannot be seen all backends have to
// agree.
func TestServicesUnderIPVS(t *testing.T) {
	p := newPlaza(t, true, false)
	p.must(p.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}, PeerName: "ipvs"})
	}))
	for _, c := range []struct {
		backends []host
		who      string
	}{
		{[]host{friend}, "good"},
		{[]host{friend, foe}, ""},
		{[]host{foe}, ""},
		{[]host{node}, "node"},
	} {
		s := service(1, policy.TCP, 8080, c.backends...)
		p.set(s)
		for _, f := range s.Frontends {
			p.from(fmt.Sprintf("%d backends", len(c.backends)), "tcp", f, c.who)
		}
	}
	s := service(1, policy.TCP, 8081, friend)
	p.isolate(8081)
	p.set(s)
	c := p.open("tcp", s.Frontends[0], "good")
	p.isolate(8080)
	p.goesOn("a connection that is denied now", c, false)
	// From here on what is translated is seen.
	p.must(p.Do(func() error {
		l, err := netlink.LinkByName("kube-ipvs0")
		if err != nil {
			return err
		}
		_, repair := p.state.Repair(t.Context())
		return errors.Join(netlink.LinkDel(l), repair)
	}))
	p.set(service(1, policy.TCP, 8080, friend, foe))
	if who, err := ask(p.pods["client"], "tcp", 0, s.Frontends[0], 30*time.Second); who != "good" {
		t.Errorf("without IPVS %q answers, %v", who, err)
	}
}

// TestServiceAtOtherAddresses: node ports, and addresses outside the cluster.
func TestServiceAtOtherAddresses(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		for _, c := range []struct {
			backend host
			who     string
		}{{friend, "good"}, {foe, ""}, {pod, "client"}} {
			s := service(1, policy.TCP, 8080, c.backend)
			s.Frontends = nil
			for _, a := range []netip.Addr{node.v4, node.v6, netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("fd00:7::7")} {
				s.Frontends = append(s.Frontends, netip.AddrPortFrom(a, 30080))
			}
			p.set(s)
			for _, f := range s.Frontends {
				p.from("a Service's other address", "tcp", f, c.who)
			}
			p.from("the node beside its node port", "tcp", netip.AddrPortFrom(node.v4, 8080), "node")
		}
		// A Service without backends is the address it is.
		p.set(service(1, policy.TCP, 8080))
		if who, err := ask(p.pods["client"], "tcp", 0, netip.AddrPortFrom(vip(1, pod.v4), 80), patience(false)); err == nil {
			p.t.Errorf("a Service without backends is answered by %q", who)
		}
	})
}

// TestMappedPorts: what reaches a pod through a port of its node, as portmap
// makes them for hostPort and nobody tells podgate, is judged as that pod.
func TestMappedPorts(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		p.set(service(1, policy.TCP, 8080, friend))
		mapped := map[string]pinning.Service{}
		for name, c := range map[string]struct {
			backend host
			port    uint16
		}{"good": {friend, 30081}, "bad": {foe, 30082}} {
			s := service(2, policy.TCP, 8080, c.backend)
			s.Frontends = []netip.AddrPort{netip.AddrPortFrom(node.v4, c.port), netip.AddrPortFrom(node.v6, c.port)}
			mapped[name] = s
		}
		p.translate([]pinning.Service{mapped["good"], mapped["bad"]})
		for i := range 2 {
			p.from("a mapped port", "tcp", mapped["good"].Frontends[i], "good")
			p.from("a mapped port", "tcp", mapped["bad"].Frontends[i], "")
			to := netip.AddrPortFrom(mapped["good"].Frontends[i].Addr(), 8080)
			p.from("the node", "tcp", to, "node")
			p.from("the node", "udp", netip.AddrPortFrom(to.Addr(), 8053), "node")
			p.ping("the node", true, p.pods["client"], to.Addr())
			// Policy that changes ends neither, nor needs the pod to speak first.
			for _, c := range []connection{p.open("tcp", mapped["good"].Frontends[i], "good"), p.open("tcp", to, "node")} {
				p.isolate(8080, 9999)
				p.goesOn("a connection", c, true)
				p.isolate(8080)
				p.goesOn("a connection", c, true)
			}
			c := p.open("tcp", mapped["good"].Frontends[i], "good")
			p.isolate()
			p.goesOn("a connection that is denied now", c, false)
			p.isolate(8080)
		}
	})
}

// connection is one that the client has open.
type connection struct {
	net.Conn
	to netip.AddrPort
}

func (p *plaza) open(network string, to netip.AddrPort, who string) connection {
	p.t.Helper()
	c, err := dial(p.pods["client"], network, to, patience(true))
	p.must(err)
	p.t.Cleanup(func() { _ = c.Close() })
	if got, err := hear(c, patience(true)); got != who {
		p.t.Fatalf("%s %s is answered by %q, %v, not by %q", network, to, got, err, who)
	}
	return connection{c, to}
}

// echoes sends a new word and waits for it, past the late echoes of others.
func (c connection) echoes(wait time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	word := []byte(rand.Text())
	if _, err := c.Write(word); err != nil {
		return err
	}
	var heard []byte
	for b := make([]byte, 256); !bytes.Contains(heard, word); {
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		heard = append(heard, b[:n]...)
	}
	return nil
}

// goesOn tells whether words still come back.
func (p *plaza) goesOn(what string, c connection, want bool) {
	p.t.Helper()
	if c.RemoteAddr().Network() == "udp" {
		_, err := hear(c, patience(want))
		p.expect(fmt.Sprintf("%s of udp to %s", what, c.to), want, err)
		return
	}
	p.expect(fmt.Sprintf("%s of tcp to %s", what, c.to), want, c.echoes(patience(want)))
}

// TestServicePolicyReachesOpenConnections changes policy under connections to
// Services, and takes the Services away.
func TestServicePolicyReachesOpenConnections(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		tcp, other := service(1, policy.TCP, 8080, friend), service(2, policy.TCP, 8081, friend)
		udp := service(3, policy.UDP, 8053, friend)
		p.isolate(8080, 8081)
		p.set(tcp, other, udp)
		var ends, stays []connection
		for i := range 2 {
			ends = append(ends, p.open("tcp", tcp.Frontends[i], "good"))
			stays = append(stays, p.open("tcp", other.Frontends[i], "good"), p.open("udp", udp.Frontends[i], "good"))
		}
		all := func(what string, list []connection, want bool) {
			p.t.Helper()
			for _, c := range list {
				p.goesOn(what, c, want)
			}
		}
		all("an open connection", append(ends, stays...), true)
		p.isolate(8081)
		all("a connection that is denied now", ends, false)
		all("a connection that is not", stays, true)
		p.isolate(8080, 8081)
		all("a connection that is allowed again", ends, true)

		// With no process that knows of podgate, and with another one.
		p.must(p.state.Close())
		all("a connection on its own", append(ends, stays...), true)
		p.from("a new one", "tcp", tcp.Frontends[0], "good")
		p.reopen()
		all("a connection after a restart", append(ends, stays...), true)

		// Connections outlive their Service, as far as policy lets them.
		p.set()
		all("a connection without a Service", append(ends, stays...), true)
		p.isolate(8081)
		all("a connection without a Service that is denied now", ends, false)
		all("a connection without a Service that is not", stays, true)
	})
}

// reopen is a daemon that finds the instance.
func (p *plaza) reopen() {
	p.t.Helper()
	state, err := pinning.Ensure(p.t.Context(), pinning.Options{Layout: p.layout()})
	p.must(err)
	p.state = state
	done, err := p.state.Apply(p.t.Context(), p.compiler.Snapshot())
	p.must(errors.Join(append(done.Problems, err)...))
	p.must(p.Do(func() error { return p.state.SetServices(p.t.Context(), p.services) }))
}

func (p *plaza) layout() pinning.Layout {
	return pinning.Layout{BPFFS: p.BPFFS, Name: "podgate"}
}

// TestServiceRepliesStop: the server talks and the client only listens.
func TestServiceRepliesStop(t *testing.T) {
	p := newPlaza(t, true, false)
	s := service(1, policy.TCP, 9000, friend)
	p.isolate(9000)
	p.set(s)
	p.must(p.pods["good"].Do(func() error {
		l, err := net.Listen("tcp", ":9000")
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer func() { _ = c.Close() }()
					for err == nil {
						_, err = c.Write([]byte("tick"))
						time.Sleep(20 * time.Millisecond)
					}
				}()
			}
		}()
		return nil
	}))
	for _, f := range s.Frontends {
		p.isolate(9000)
		c, err := dial(p.pods["client"], "tcp", f, patience(true))
		p.must(err)
		t.Cleanup(func() { _ = c.Close() })
		listen := func(want bool) {
			t.Helper()
			// What was on its way may still be heard.
			deadline := time.Now().Add(patience(true))
			b := make([]byte, 1024)
			for {
				p.must(c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)))
				_, err := c.Read(b)
				if (err == nil) == want {
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("from %s it is heard: %t", f, err == nil)
				}
			}
		}
		listen(true)
		p.isolate(1)
		listen(false)
	}
}

// TestServiceOtherBackendForSameTuple: conntrack forgets a connection and
// kube-proxy chooses another backend for the same addresses and ports.
func TestServiceOtherBackendForSameTuple(t *testing.T) {
	everyPlaza(t, func(p *plaza) {
		for i := range 2 {
			p.set(service(1, policy.UDP, 8053, friend))
			c := p.open("udp", p.services[0].Frontends[i], "good")
			p.goesOn("a connection", c, true)
			// Nobody tells podgate: what it knows of the flow is all right.
			p.translate([]pinning.Service{service(1, policy.UDP, 8053, foe)})
			p.must(p.Do(forget))
			p.goesOn("the same with another backend", c, false)
			p.translate([]pinning.Service{service(1, policy.UDP, 8053, buddy)})
			p.must(p.Do(forget))
			if who, err := hear(c, patience(true)); who != "good2" {
				p.t.Errorf("with a third backend it is answered by %q, %v", who, err)
			}
		}
	})
}

// forget empties the conntrack table.
func forget() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }

// TestServiceWithoutTag lets another tool's program clear what from_pod leaves
// on packets, and another one what it tells after_nat beside them, as when that
// runs on another CPU.
func TestServiceWithoutTag(t *testing.T) {
	for name, program := range map[string]func(*plaza) asm.Instructions{
		"tag cleared": func(*plaza) asm.Instructions {
			const tcIndex = 44 // of struct __sk_buff
			return asm.Instructions{
				asm.Mov.Imm(asm.R2, 0), asm.StoreMem(asm.R1, tcIndex, asm.R2, asm.Word),
				asm.Mov.Imm(asm.R0, -1), asm.Return(),
			}
		},
		"another CPU": func(p *plaza) asm.Instructions {
			m, err := ebpf.LoadPinnedMap(p.layout().MapPath(bpf.DatapathMapHandovers), nil)
			p.must(err)
			p.t.Cleanup(func() { _ = m.Close() })
			return asm.Instructions{
				asm.Mov.Imm(asm.R2, 0), asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
				asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -4),
				asm.LoadMapPtr(asm.R1, m.FD()), asm.FnMapLookupElem.Call(),
				asm.JEq.Imm(asm.R0, 0, "out"),
				asm.Mov.Imm(asm.R2, 0), asm.StoreMem(asm.R0, 56, asm.R2, asm.DWord), // tick
				asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), asm.Return(),
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlaza(t, true, false)
			other, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: program(p)})
			p.must(err)
			t.Cleanup(func() { _ = other.Close() })
			p.must(p.Do(func() error {
				for name := range p.pods {
					l, err := netlink.LinkByName(name)
					if err != nil {
						return err
					}
					if err := netlink.FilterAdd(&netlink.BpfFilter{
						FilterAttrs: netlink.FilterAttrs{
							LinkIndex: l.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 2, Protocol: unix.ETH_P_ALL,
						},
						Fd: other.FD(), Name: "other", DirectAction: true,
					}); err != nil {
						return err
					}
				}
				return nil
			}))
			allowed, denied := service(1, policy.TCP, 8080, friend), service(2, policy.TCP, 8080, foe)
			outside := service(3, policy.TCP, 8080, buddy)
			p.set(allowed, denied, outside)
			for i := range 2 {
				p.from("a Service", "tcp", allowed.Frontends[i], "good")
				p.from("a Service", "tcp", denied.Frontends[i], "")
				p.from("a pod", "tcp", allowed.Backends[i], "good")
				p.from("a pod", "tcp", denied.Backends[i], "")
				// Answers of a backend, to who reached it through a Service.
				if who, err := ask(p.far, "tcp", 0, outside.Frontends[i], patience(true)); who != "good2" {
					t.Errorf("from outside %s is answered by %q, %v", outside.Frontends[i], who, err)
				}
				c := p.open("tcp", allowed.Frontends[i], "good")
				p.goesOn("a connection", c, true)
			}
			// Pods that nothing isolates.
			if who, err := ask(p.pods["bad"], "tcp", 0, denied.Frontends[0], patience(true)); who != "bad" {
				t.Errorf("a pod that nothing isolates is answered by %q, %v", who, err)
			}
		})
	}
}

// TestServiceForeignTag has packets come in with the tag of another node, as
// they do where nodes share a kernel: it names no gate of this one.
func TestServiceForeignTag(t *testing.T) {
	p := newPlaza(t, true, false)
	outside := service(1, policy.TCP, 8080, buddy)
	p.set(outside)
	// Neighbours know each other from now on: only what pods send has a tag.
	for _, to := range outside.Frontends {
		if who, err := ask(p.far, "tcp", 0, to, patience(true)); who != "good2" {
			t.Errorf("without a tag %s is answered by %q, %v", to, who, err)
		}
	}
	var uplink netlink.Link
	slots := map[string]int{"no gate": 1}
	p.must(p.Do(func() (err error) {
		for name := range p.pods {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			slots[name] = l.Attrs().Index
		}
		uplink, err = netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		return netlink.QdiscAdd(&netlink.GenericQdisc{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: uplink.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
			QdiscType:  "clsact",
		})
	}))
	for name, slot := range slots {
		const tcIndex = 44 // of struct __sk_buff
		tagged, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, int32(slot+1)), asm.StoreMem(asm.R1, tcIndex, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, -1), asm.Return(),
		}})
		p.must(err)
		p.must(p.Do(func() error {
			return netlink.FilterReplace(&netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{
					LinkIndex: uplink.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL,
				},
				Fd: tagged.FD(), Name: "tagged", DirectAction: true,
			})
		}))
		for _, to := range outside.Frontends {
			if who, err := ask(p.far, "tcp", 0, to, patience(true)); who != "good2" {
				t.Errorf("with the tag of %s, %s is answered by %q, %v", name, to, who, err)
			}
		}
		p.must(tagged.Close())
	}
}

// TestServiceTagged has a pod send to a Service with a VLAN tag, straight to a
// neighbour: bridges do not show netfilter such a packet, so that nobody would
// translate it, or judge it.
func TestServiceTagged(t *testing.T) {
	p := newPlaza(t, true, false)
	denied := service(1, policy.UDP, 8053, foe)
	p.set(denied)
	const mark = "past the gate"
	seen := p.sniff("bad", mark)
	to := host{mac: foe.mac, v4: denied.Frontends[0].Addr(), v6: denied.Frontends[1].Addr()}
	way := path{pod, to}
	for family, frame := range map[string][]byte{
		"v4": sealed4(way.v4(udp17, way.datagram(false, 40000, 53, []byte(mark)))),
		"v6": way.v6(udp17, way.datagram(true, 40000, 53, []byte(mark))),
	} {
		for name, kinds := range map[string][]uint16{"one tag": {etherVLAN}, "two tags": {etherQinQ, etherVLAN}} {
			p.must(p.pods["client"].inject(tagged(frame, kinds...), len(frame)))
			select {
			case <-seen:
				t.Errorf("%s with %s gets to the neighbour", family, name)
			case <-time.After(patience(false)):
			}
		}
	}
	// The neighbour does see what it may get.
	way = path{pod, host{mac: foe.mac, v4: foe.v4, v6: foe.v6}}
	p.must(p.pods["good"].inject(sealed4(path{friend, way.to}.v4(udp17, way.datagram(false, 40000, 53, []byte(mark)))), 42))
	select {
	case <-seen:
	case <-time.After(patience(true)):
		t.Error("the neighbour sees nothing at all")
	}
}

// sniff tells of each frame with a mark that reaches a pod.
func (p *plaza) sniff(name, mark string) <-chan struct{} {
	p.t.Helper()
	seen := make(chan struct{}, 16)
	var f *os.File
	p.must(p.pods[name].Do(func() error {
		all := binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(all))
		f = os.NewFile(uintptr(fd), "sniffer")
		return err
	}))
	done := make(chan struct{})
	p.t.Cleanup(func() {
		p.must(f.Close())
		<-done
	})
	go func() {
		defer close(done)
		for b := make([]byte, 2048); ; {
			n, err := f.Read(b)
			if err != nil {
				return
			}
			if bytes.Contains(b[:n], []byte(mark)) {
				seen <- struct{}{}
			}
		}
	}()
	return seen
}

// links are the netfilter links and what they run.
func (p *plaza) links() map[string][2]uint32 {
	p.t.Helper()
	paths, err := filepath.Glob(filepath.Join(p.layout().LinksDir(), "netfilter", "*"))
	p.must(err)
	out := map[string][2]uint32{}
	for _, path := range paths {
		l, err := link.LoadPinnedLink(path, nil)
		p.must(err)
		info, err := l.Info()
		p.must(errors.Join(err, l.Close()))
		out[filepath.Base(path)] = [2]uint32{uint32(info.ID), uint32(info.Program)}
	}
	return out
}

// TestAfterNATStays restarts, repairs and upgrades under traffic that is
// denied, of which nothing may get through.
func TestAfterNATStays(t *testing.T) {
	p := newPlaza(t, false, false)
	allowed, denied := service(1, policy.UDP, 8053, friend), service(2, policy.UDP, 8053, foe)
	p.set(allowed, denied)
	before := p.links()
	if len(before) != 4 {
		t.Fatalf("links are %v", before)
	}
	through := make(chan string, 1)
	p.flood(denied.Frontends[0], through)

	p.reopen()
	if after := p.links(); !maps.Equal(after, before) {
		t.Errorf("a restart made of the links %v %v", before, after)
	}
	// Another version's program: any other one.
	path := p.layout().ProgramPath(bpf.ServiceProgAfterNat)
	for range 20 {
		old, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Netfilter, AttachType: ebpf.AttachNetfilter, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		p.must(err)
		p.must(errors.Join(os.Remove(path), old.Pin(path), old.Close()))
		p.must(p.state.Close())
		p.state, err = pinning.Ensure(t.Context(), pinning.Options{Layout: p.layout()})
		p.must(err)
		p.must(p.Do(func() error {
			upgraded, err := p.state.Upgrade(t.Context())
			if err == nil && !upgraded {
				err = errors.New("it is not upgraded")
			}
			return err
		}))
	}
	after := p.links()
	for name, l := range after {
		if l == before[name] {
			t.Errorf("%s still runs program %d", name, l[1])
		}
	}
	p.from("an allowed backend", "udp", allowed.Frontends[0], "good")
	select {
	case who := <-through:
		t.Fatalf("%q answers meanwhile", who)
	default:
	}

	// Somebody removes or detaches a link, and the daemon notices.
	path = filepath.Join(p.layout().LinksDir(), "netfilter", "forward_ipv4")
	for what, lose := range map[string]func() error{
		"removed": func() error { return os.Remove(path) },
		"detached": func() error {
			l, err := link.LoadPinnedLink(path, nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Close())
		},
	} {
		p.must(lose())
		p.must(p.Do(func() error {
			if err := p.state.Ready(t.Context()); !errors.Is(err, pinning.ErrDiffers) {
				t.Errorf("with a link %s it is ready: %v", what, err)
			}
			done, err := p.state.Repair(t.Context())
			if len(done) != 1 {
				t.Errorf("with a link %s repaired is %v", what, done)
			}
			return errors.Join(err, p.state.Ready(t.Context()))
		}))
		p.from("another backend with a link "+what, "udp", denied.Frontends[0], "")
	}
}

// flood asks the same all the time, each time from another port.
func (p *plaza) flood(to netip.AddrPort, through chan<- string) {
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-done:
				return
			default:
				if who, err := ask(p.pods["client"], "udp", 0, to, 2*time.Millisecond); err == nil {
					select {
					case through <- who:
					default:
					}
				}
			}
		}
	}()
	p.t.Cleanup(func() {
		close(done)
		<-stopped
	})
}

// TestServiceEvents: an event names the backend and the way to it, once a flow.
func TestServiceEvents(t *testing.T) {
	p := newPlaza(t, true, false)
	allowed, denied := service(1, policy.TCP, 8080, friend), service(2, policy.TCP, 8080, foe)
	p.set(allowed, denied)
	events, err := p.state.Events(t.Context())
	p.must(err)
	t.Cleanup(func() { p.must(events.Close()) })
	c := p.open("tcp", allowed.Frontends[0], "good")
	for range 10 {
		p.goesOn("a connection", c, true)
	}
	p.from("a Service", "tcp", denied.Frontends[1], "")
	told := map[string]int{}
	for {
		f, err := readEvent(events)
		if err != nil {
			break
		}
		if f.Direction == policy.Egress && f.Protocol == policy.TCP && f.Frontend.IsValid() {
			told[fmt.Sprintf("%s %s %s over %s", f.Verdict, f.Reason, f.Peer, f.Frontend)]++
		}
	}
	good := fmt.Sprintf("allowed policy %s over %s", allowed.Backends[0], allowed.Frontends[0])
	bad := fmt.Sprintf("denied default %s over %s", denied.Backends[1], denied.Frontends[1])
	if told[good] != 1 || told[bad] == 0 || len(told) != 2 {
		t.Errorf("told is %v, not %q and %q", told, good, bad)
	}
	found := false
	for f, err := range p.state.Flows() {
		p.must(err)
		if f.Peer == allowed.Frontends[0] && f.Backend == allowed.Backends[0] && f.State.String() == "established" {
			found = true
		}
	}
	if !found {
		t.Error("the flow is not told with its backend")
	}
}

func readEvent(r *flow.Reader) (flow.Flow, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	return r.Read(ctx)
}
