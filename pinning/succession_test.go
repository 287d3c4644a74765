// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"context"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// witness counts what the pod's programs let through to those behind them.
type witness struct{ m *ebpf.Map }

func (l *lab) witness(host netlink.Link) witness {
	l.t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = m.Close() })
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "witness", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.LoadMapValue(asm.R1, m.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
		asm.Mov.Imm(asm.R0, -1), // TC_ACT_UNSPEC
		asm.Return(),
	}})
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = p.Close() })
	l.clsact(host)
	l.filterOf(host, netlink.HANDLE_MIN_INGRESS, 9, 1, p)
	return witness{m}
}

func (w witness) seen(t *testing.T) (n uint64) {
	t.Helper()
	if err := w.m.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// sending has the pod behind a veth send until the result is called, which
// says how much that was.
func (l *lab) sending(host netlink.Link) (stop func() int) {
	l.t.Helper()
	ctx, cancel := context.WithCancel(l.t.Context())
	type outcome struct {
		n   int
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		n := 0
		err := l.Do(func() error {
			pod, err := netlink.LinkByName(host.Attrs().Name + "p")
			if err != nil {
				return err
			}
			s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			frame := udpFrame(host, policy.Egress)
			for ; ctx.Err() == nil; n++ {
				if err := unix.Sendto(s, frame, 0, &unix.SockaddrLinklayer{Ifindex: pod.Attrs().Index}); err != nil {
					return err
				}
			}
			return nil
		})
		done <- outcome{n, err}
	}()
	return func() int {
		l.t.Helper()
		cancel()
		o := <-done
		if o.err != nil {
			l.t.Fatal(o.err)
		}
		return o.n
	}
}

// While ADD is repeated on an interface that lives, each packet meets a hook.
func TestAddAgainUnderTraffic(t *testing.T) {
	other := pinning.AttachmentKey{ContainerID: "c-other", IfName: "eth0"}
	for name, next := range map[string]func(r *pinning.AddRequest, kinds []pinning.AttachKind, n int){
		"same":       func(r *pinning.AddRequest, kinds []pinning.AttachKind, _ int) { r.Attach = kinds[len(kinds)-1] },
		"same, auto": func(r *pinning.AddRequest, _ []pinning.AttachKind, _ int) { r.Attach = pinning.AttachAuto },
		"by turns":   func(r *pinning.AddRequest, kinds []pinning.AttachKind, n int) { r.Attach = kinds[n%len(kinds)] },
		"of another key": func(r *pinning.AddRequest, kinds []pinning.AttachKind, n int) {
			r.Attach = kinds[n/2%len(kinds)]
			if n%2 == 1 {
				r.Key = other
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			kinds := attachKinds(t)
			l := newLab(t)
			host := l.veth("a")
			add := func(n int) (pinning.AddRequest, pinning.Endpoint) {
				t.Helper()
				r := request(host, "10.0.0.1")
				next(&r, kinds, n)
				e, _ := l.add(r)
				return r, e
			}
			w := l.witness(host)
			add(0)
			before := l.holdings()
			stop := l.sending(host)
			for n := range 20 {
				r, e := add(n + 1)
				if err := l.check(r.Key, e); err != nil {
					t.Errorf("after ADD %d: %v", n, err)
				}
			}
			if sent, passed := stop(), w.seen(t); sent == 0 || passed != 0 {
				t.Errorf("of %d packets %d met no hook", sent, passed)
			}
			if strings.HasPrefix(name, "same") {
				l.wantHoldings(before)
			}
			for _, k := range []pinning.AttachmentKey{other, request(host).Key} {
				l.delete(k)
			}
			l.wantHooked(host, "other by clsact")
			l.wantHoldings(map[string]int{})
		})
	}
}

// An ADD that fails in the place of another leaves neither, and no hook.
func TestAddAgainFails(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			c := small
			c.Peers = 8
			l := newLabWith(t, c)
			host := l.veth("a")
			r := request(host, "10.0.0.1")
			r.Attach = kind
			l.add(r)
			for _, key := range []pinning.AttachmentKey{r.Key, {ContainerID: "c-other", IfName: "eth0"}} {
				again := request(host, addresses("10.0.1.1", 12)...)
				again.Key, again.Attach = key, kind
				_, _, err := l.tryAdd(again)
				isFullOf(t, "Add", "peers", err)
				l.wantHooked(host)
				l.wantHoldings(map[string]int{})
				l.add(r)
			}
		})
	}
}
