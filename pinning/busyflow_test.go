// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/test/netlab"
)

// tcpFrame is a packet of a connection from a peer to port 80 of the pod.
func tcpFrame(host netlink.Link, peer, pod string, flags byte) []byte {
	mac := request(host).MAC
	frame := slices.Concat(mac, make([]byte, 6), []byte{0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, byte(policy.TCP), 0, 0},
		netip.MustParseAddr(peer).AsSlice(), netip.MustParseAddr(pod).AsSlice(), make([]byte, 20))
	tcp := frame[34:]
	binary.BigEndian.PutUint16(tcp, 40000)
	binary.BigEndian.PutUint16(tcp[2:], 80)
	tcp[12], tcp[13] = 5<<4, flags
	return frame
}

// passes puts a frame through the hook towards the pod, as often as asked, and
// tells what became of the last one.
func (l *lab) passes(p *ebpf.Program, host netlink.Link, frame []byte, times uint32) (bool, error) {
	const skbIngressIfindex, skbIfindex, loopback = 9, 10, 1
	skb := make([]uint32, 48)
	skb[skbIfindex], skb[skbIngressIfindex] = uint32(host.Attrs().Index), loopback
	var answer uint32
	err := l.Do(func() (err error) {
		answer, err = p.Run(&ebpf.RunOptions{Data: frame, Context: skb, Repeat: times})
		return err
	})
	return int32(answer) == -1, err // TC_ACT_UNSPEC
}

// A change of policy ends what it denies also where packets come all the time:
// one that meets tables of before the change stamps its flow with the epoch of
// before the last change.
func TestBusyFlowsEnd(t *testing.T) {
	const syn, ack = 2, 16
	if can, err := netlab.KernelAtLeast(5, 16); err != nil || !can {
		t.Skipf("BPF_PROG_TEST_RUN takes ingress_ifindex since Linux 5.16; %v", err)
	}
	l := newLab(t)
	c := town(t)
	client := townPod("client", clientAddr)
	client.Local = false
	setPod(t, c, client)
	apply(t, l.state, c.Compile())
	host := l.veth("web")
	l.add(request(host, webAddr))
	p, err := ebpf.LoadPinnedProgram(l.options.Layout.ProgramPath(bpf.DatapathProgToPod), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	run := func(frame []byte, times uint32) bool {
		t.Helper()
		passed, err := l.passes(p, host, frame, times)
		if err != nil {
			t.Fatal(err)
		}
		return passed
	}
	data := tcpFrame(host, clientAddr, webAddr, ack)
	for round := range 20 {
		client.Labels = map[string]string{"app": "client"}
		setPod(t, c, client)
		apply(t, l.state, c.Compile())
		if !run(tcpFrame(host, clientAddr, webAddr, syn), 1) || !run(data, 1) {
			t.Fatalf("round %d: the connection is not let in", round)
		}
		client.Labels = map[string]string{"app": "another"}
		setPod(t, c, client)
		stop := l.flooding(p, host, data)
		apply(t, l.state, c.Compile())
		stop()
		if run(data, 1) {
			t.Fatalf("round %d: the connection goes on", round)
		}
	}
}

// flooding repeats a frame until the result is called.
func (l *lab) flooding(p *ebpf.Program, host netlink.Link, frame []byte) (stop func()) {
	ctx, cancel := context.WithCancel(l.t.Context())
	done := make(chan error, 1)
	go func() {
		var err error
		for err == nil && ctx.Err() == nil {
			_, err = l.passes(p, host, frame, 1000)
		}
		done <- err
	}()
	return func() {
		l.t.Helper()
		cancel()
		if err := <-done; err != nil {
			l.t.Fatal(err)
		}
	}
}
