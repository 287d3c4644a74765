// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"

	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

// neighbours are plugins that do something to the same veth or pod.
func neighbours() map[string]netlab.Plugin {
	return map[string]netlab.Plugin{
		"portmap":   {"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
		"bandwidth": {"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}},
		"firewall":  {"type": "firewall", "backend": "iptables"},
		"tuning":    {"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.IFNAME.arp_filter": "1"}},
	}
}

// permutations of a chain that podgate is part of: before and after each
// neighbour, and with all of them on either side.
func permutations() map[string][]string {
	orders := map[string][]string{}
	add := func(order ...string) { orders[strings.Join(order, "-")] = order }
	all := []string{"portmap", "bandwidth", "firewall", "tuning"}
	for _, n := range all {
		add("podgate", n)
		add(n, "podgate")
	}
	add(append([]string{"podgate"}, all...)...)
	add(append(slices.Clone(all), "podgate")...)
	add("tuning", "bandwidth", "podgate", "firewall", "portmap")
	return orders
}

// neighbourTools are the programs that neighbours run, and that show what they
// have done.
func neighbourTools() map[string][]string {
	return map[string][]string{"bandwidth": {"tc"}, "firewall": {"iptables"}, "portmap": {"iptables"}}
}

// Whatever the order, the chain works through all verbs, the gate is closed or
// open as configured, and the neighbours' work is done.
func TestChainOrder(t *testing.T) {
	for name, order := range permutations() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, n := range order {
				need.Tools(t, neighbourTools()[n]...)
			}
			l := newLab(t)
			capabilities := map[string]any{
				"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
				"bandwidth": map[string]any{
					"ingressRate": 1 << 30, "ingressBurst": 1 << 30, "egressRate": 1 << 30, "egressBurst": 1 << 30,
				},
			}
			list := func(mode string) netlab.Conflist {
				plugins := []netlab.Plugin{l.Bridge("br0", "10.86.0.0/24", "fd86::/64")}
				for _, n := range order {
					if n == "podgate" {
						plugins = append(plugins, l.Podgate().With(netlab.Plugin{"mode": mode}))
					} else {
						plugins = append(plugins, neighbours()[n])
					}
				}
				return chain("1.1.0", plugins...)
			}
			closed, closedResult := l.add(list("closed"), netlab.PodSpec{Name: "closed"})
			open, openResult := l.add(list("open"), netlab.PodSpec{Name: "open", Capabilities: capabilities})
			elsewhere := chain("1.1.0", l.Bridge("br1", "10.96.0.0/24", "fd96::/64"))
			elsewhere.Name = "elsewhere"
			outside, _ := l.add(elsewhere, netlab.PodSpec{Name: "outside"})
			l.wantEndpoints(key(closed), key(open))
			for _, p := range []*netlab.Pod{closed, open} {
				if err := l.Check(t.Context(), list(p.Name), p); err != nil {
					t.Errorf("CHECK of %s: %v", p.Name, err)
				}
			}
			for _, ip := range openResult.IPs {
				server := listen(t, open, ip.Address.IP, 0)
				if err := reach(outside, server); err != nil {
					t.Errorf("open pod: %v", err)
				}
				if !blocked(closed, server) {
					t.Error("closed pod reaches open pod")
				}
			}
			for _, ip := range closedResult.IPs {
				server := listen(t, closed, ip.Address.IP, 80)
				if err := reach(l, server); err != nil {
					t.Errorf("node to closed pod: %v", err)
				}
				if !blocked(outside, server) {
					t.Error("closed pod is reached")
				}
			}
			l.neighboursWork(order, open, outside)
			valid := []types.GCAttachment{{ContainerID: closed.ID, IfName: "eth0"}, {ContainerID: open.ID, IfName: "eth0"}}
			if err := l.GC(t.Context(), list("closed"), &libcni.GCArgs{ValidAttachments: valid}); err != nil {
				t.Errorf("GC: %v", err)
			}
			l.wantEndpoints(key(closed), key(open))
		})
	}
}

// neighboursWork checks that each neighbour has done its part for the pod p.
func (l *lab) neighboursWork(order []string, p, outside *netlab.Pod) {
	l.t.Helper()
	for _, n := range order {
		var out []byte
		var err error
		var want string
		switch n {
		case "portmap":
			listen(l.t, p, net.IPv4zero, 80)
			gateway := &net.TCPAddr{IP: net.IPv4(10, 96, 0, 1), Port: 8080}
			if err := reach(outside, gateway); err != nil {
				l.t.Errorf("mapped port: %v", err)
			}
			continue
		case "bandwidth":
			out, err = l.Exec(l.t.Context(), "tc", "qdisc", "show", "dev", l.hostVeth(p))
			want = "qdisc ingress"
		case "firewall":
			out, err = l.Exec(l.t.Context(), "iptables", "-S", "CNI-FORWARD")
			want = "-j ACCEPT"
		case "tuning":
			out, err = p.Exec(l.t.Context(), "cat", "/proc/sys/net/ipv4/conf/eth0/arp_filter")
			want = "1"
		default:
			continue
		}
		if err != nil || !strings.Contains(string(out), want) {
			l.t.Errorf("%s: %q is not in %s (%v)", n, want, out, err)
		}
	}
}

// hostVeth is the name of the interface that a pod is gated at.
func (l *lab) hostVeth(p *netlab.Pod) (name string) {
	l.t.Helper()
	err := l.Do(func() error {
		link, err := netlink.LinkByIndex(l.endpoints()[key(p)].HostIfindex)
		if err == nil {
			name = link.Attrs().Name
		}
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return name
}

// Neither a flow nor the identity of a pod may pass to the next one at its
// address. Nobody has told the node of the second pod, as when the daemon is
// down: it is a stranger, not its predecessor.
func TestAddressReuse(t *testing.T) {
	for _, ipam := range []string{"host-local", "podgate-ipam"} {
		t.Run(ipam, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			// Two addresses: one for the server, one to be used again.
			bridge := l.Bridge("br0")
			local := l.HostLocal("10.87.0.0/29")
			local["ranges"] = []any{[]any{map[string]string{"subnet": "10.87.0.0/29", "rangeStart": "10.87.0.2", "rangeEnd": "10.87.0.3"}}}
			bridge["ipam"] = local
			if ipam == "podgate-ipam" {
				bridge["ipam"] = netlab.Plugin{"type": "podgate-ipam", "delegate": local, "bpffs": l.BPFFS}
			}
			list := chain("1.1.0", bridge, l.Podgate().With(netlab.Plugin{"mode": "open"}))
			server, r := l.add(list, netlab.PodSpec{Namespace: "default", Name: "server", UID: "server"})
			to := listen(t, server, r.IPs[0].Address.IP, 0)
			friend, r1, err := l.AddPod(t.Context(), list, netlab.PodSpec{Namespace: "default", Name: "friend", UID: "friend"})
			if err != nil {
				t.Fatal(err)
			}
			l.onlyFriends()
			if err := l.connect(friend, to); err != nil {
				t.Fatalf("friend: %v", err)
			}
			before := l.endpoints()[key(friend)]
			if err := l.DelPod(t.Context(), friend); err != nil {
				t.Fatal(err)
			}
			stranger, r2 := l.add(list, netlab.PodSpec{Namespace: "default", Name: "stranger", UID: "stranger"})
			if a, b := r1.IPs[0].Address.String(), r2.IPs[0].Address.String(); a != b {
				t.Fatalf("second pod has %s, first had %s", b, a)
			}
			if after := l.endpoints()[key(stranger)]; after.ID == before.ID {
				t.Errorf("second pod has the first one's endpoint %d", after.ID)
			}
			if l.connect(stranger, to) == nil {
				t.Error("second pod at the address is taken for the first")
			}
		})
	}
}

// connect opens a connection, from a port that the next caller uses too, and
// leaves it open until the test ends: its flow would fit the next caller's.
func (l *lab) connect(from *netlab.Pod, to net.Addr) error {
	return from.Do(func() error {
		d := net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{Port: 40000}}
		c, err := d.Dial("tcp", to.String())
		if err == nil {
			l.t.Cleanup(func() { c.Close() })
		}
		return err
	})
}

// An ADD that fails after us is undone by the DEL that follows.
func TestFailureLaterInTheChain(t *testing.T) {
	l := newLab(t)
	list := chain("1.1.0", l.Bridge("br0", "10.88.0.0/24"), l.Podgate(), netlab.Plugin{"type": "tuning", "sysctl": map[string]string{"net.no": "1"}})
	p := l.pod(netlab.PodSpec{})
	if _, err := l.Add(t.Context(), list, p); err == nil {
		t.Fatal("ADD succeeded")
	}
	l.wantEndpoints(key(p))
	if err := l.Del(t.Context(), list, p); err != nil {
		t.Fatal(err)
	}
	l.wantEndpoints()
}

// A runtime may repeat an ADD whose answer it has lost.
func TestRepeatedAdd(t *testing.T) {
	l := newLab(t)
	p, r := l.add(chain("1.1.0", l.Bridge("br0", "10.89.0.0/24"), l.Podgate()), netlab.PodSpec{})
	config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": r})
	for range 3 {
		if o := l.call("ADD", env(p), config); o.code != 0 {
			t.Fatalf("ADD: %+v", o.err)
		}
	}
	l.wantEndpoints(key(p))
	l.silent(l.call("CHECK", env(p), config))
}

func TestInstancesDoNotMeet(t *testing.T) {
	l := newLab(t)
	list := func(instance string) netlab.Conflist {
		return chain("1.1.0", l.Bridge("br0", "10.90.0.0/24"), l.Podgate().With(netlab.Plugin{"instance": instance}))
	}
	one, _ := l.add(list("podgate"), netlab.PodSpec{})
	l.add(list("other"), netlab.PodSpec{})
	l.wantEndpoints(key(one))
	if _, err := l.Exec(t.Context(), "ls", fmt.Sprintf("%s/other", l.BPFFS)); err != nil {
		t.Error(err)
	}
}
