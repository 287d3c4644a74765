// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/need"
	"github.com/podgate/podgate/test/netlab"
)

func TestTwoAttachmentsOfOnePod(t *testing.T) {
	l := newLab(t)
	first := chain("1.1.0", l.Bridge("br0", "10.78.0.0/24"), l.Podgate())
	second := chain("1.1.0", l.Bridge("br1", "10.79.0.0/24"), l.Podgate())
	second.Name = "second"
	p, _ := l.add(first, netlab.PodSpec{})
	net1 := p.Interface("net1")
	if _, err := l.Add(t.Context(), second, net1); err != nil {
		t.Fatal(err)
	}
	got := l.wantEndpoints(key(p), key(net1))
	if a, b := got[key(p)], got[key(net1)]; a.HostIfindex == b.HostIfindex || a.Network != "lab" || b.Network != "second" {
		t.Errorf("endpoints are %+v and %+v", a, b)
	}
	if err := l.Del(t.Context(), second, net1); err != nil {
		t.Fatal(err)
	}
	l.wantEndpoints(key(p))
}

// vethPair puts one end of a veth pair into a pod and leaves the other, not
// where any list or name would tell.
func (l *lab) vethPair(p *netlab.Pod, name string, address string) netlink.Link {
	l.t.Helper()
	pod, err := netns.GetFromPath(p.NetNS())
	if err != nil {
		l.t.Fatal(err)
	}
	defer pod.Close()
	var host netlink.Link
	err = l.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: "x" + name},
			PeerName:      name,
			PeerNamespace: netlink.NsFd(pod),
		})
		if err != nil {
			return err
		}
		if host, err = netlink.LinkByName("x" + name); err != nil {
			return err
		}
		return netlink.LinkSetUp(host)
	})
	if err == nil {
		err = p.Do(func() error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			a, err := netlink.ParseAddr(address)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(link, a); err != nil {
				return err
			}
			return netlink.LinkSetUp(link)
		})
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return host
}

// One attachment may make several interfaces. All are gated, DEL and GC of the
// attachment end all, and other attachments of the container are left alone.
func TestFurtherInterfacesOfAnAttachment(t *testing.T) {
	l := newLab(t)
	p := l.pod(netlab.PodSpec{})
	hosts := map[string]int{}
	for name, address := range map[string]string{"eth0": "10.80.0.2/24", "eth1": "10.81.0.2/24", "net1": "10.82.0.2/24"} {
		hosts[name] = l.vethPair(p, name, address).Attrs().Index
	}
	prev := func(address string, names ...string) netlab.Plugin {
		interfaces := []any{netlab.Plugin{"name": "dummy", "sandbox": "7", "mac": "0"}}
		for _, n := range names {
			interfaces = append(interfaces, netlab.Plugin{"name": n, "sandbox": p.NetNS()})
		}
		return l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": netlab.Plugin{
			"cniVersion": "1.1.0", "interfaces": interfaces, "ips": []any{netlab.Plugin{"address": address}},
		}})
	}
	both, alone := prev("10.80.0.2/24", "eth1", "eth0"), prev("10.82.0.2/24")
	net1 := p.Interface("net1")
	add := func(p *netlab.Pod, config netlab.Plugin) {
		t.Helper()
		if o := l.call("ADD", env(p), config); o.code != 0 {
			t.Fatalf("ADD: %+v", o.err)
		}
	}
	add(p, both)
	add(net1, alone)
	all := l.wantEndpoints(key(p), key(p.Interface("eth1")), key(net1))
	for k, e := range all {
		if e.HostIfindex != hosts[k.IfName] {
			t.Errorf("%s is gated at interface %d, want %d", k.IfName, e.HostIfindex, hosts[k.IfName])
		}
	}
	if e := all[key(p.Interface("eth1"))]; !slices.Contains(e.Addresses, netip.MustParseAddr("10.81.0.2")) {
		t.Errorf("eth1 has %v, want the address on the interface", e.Addresses)
	}
	l.silent(l.call("CHECK", env(p), both))

	gc := func(pods ...*netlab.Pod) netlab.Plugin {
		valid := []any{}
		for _, p := range pods {
			valid = append(valid, netlab.Plugin{"containerID": p.ID, "ifname": p.IfName})
		}
		return l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "cni.dev/valid-attachments": valid})
	}
	l.silent(l.call("GC", nil, gc(p, net1)))
	l.wantEndpoints(key(p), key(p.Interface("eth1")), key(net1))
	l.silent(l.call("DEL", env(p), both))
	l.wantEndpoints(key(net1))
	add(p, both)
	l.silent(l.call("GC", nil, gc()))
	l.wantEndpoints()
}

func TestInterfaceWithoutHostVeth(t *testing.T) {
	newPod := func(l *lab) *netlab.Pod { return l.pod(netlab.PodSpec{}) }
	for name, make := range map[string]func(*lab) *netlab.Pod{
		"macvlan": func(l *lab) *netlab.Pod {
			p := newPod(l)
			need.Tools(l.t, "ip")
			l.exec("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
			list := chain("1.1.0", netlab.Plugin{"type": "macvlan", "master": "up0", "ipam": l.HostLocal("10.83.0.0/24")})
			if _, err := l.Add(l.t.Context(), list, p); err != nil {
				l.t.Fatal(err)
			}
			return p
		},
		"veth whose peer is in another namespace": func(l *lab) *netlab.Pod {
			p, other := newPod(l), newPod(l)
			l.vethPair(p, "eth0", "10.84.0.2/24")
			need.Tools(l.t, "ip")
			l.exec("ip", "link", "set", "xeth0", "netns", other.NetNS())
			return p
		},
		"veth whose peer is in the pod": func(l *lab) *netlab.Pod {
			p := newPod(l)
			need.Tools(l.t, "ip")
			if _, err := p.Exec(l.t.Context(), "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0p"); err != nil {
				l.t.Fatal(err)
			}
			return p
		},
		// A name and an index of the host that would both fit.
		"veth in the pod with a decoy on the host": func(l *lab) *netlab.Pod {
			p := newPod(l)
			for _, ns := range []interface {
				Do(func() error) error
			}{p, l} {
				err := ns.Do(func() error {
					return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 501}, PeerName: "peer"})
				})
				if err != nil {
					l.t.Fatal(err)
				}
			}
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			p := make(l)
			prev := netlab.Plugin{
				"cniVersion": "1.1.0",
				"interfaces": []any{netlab.Plugin{"name": "eth0", "sandbox": p.NetNS()}},
				"ips":        []any{netlab.Plugin{"address": "10.83.0.2/24", "interface": 0}},
			}
			config := l.Podgate().With(netlab.Plugin{"cniVersion": "1.1.0", "name": "lab", "prevResult": prev})
			o := l.call("ADD", env(p), config)
			if o.code == 0 || o.err.Code != codeNotVeth || !strings.Contains(o.err.Msg, "eth0") {
				t.Errorf("exit %d, error %+v; want code %d", o.code, o.err, codeNotVeth)
			}
			l.wantEndpoints()
			l.silent(l.call("DEL", env(p), config))

			skip := config.With(netlab.Plugin{"nonVeth": "skip"})
			if o := l.call("ADD", env(p), skip); o.code != 0 || len(o.stdout) == 0 {
				t.Errorf("skipped: exit %d, error %+v, stdout %s", o.code, o.err, o.stdout)
			}
			l.silent(l.call("CHECK", env(p), skip))
			l.silent(l.call("DEL", env(p), skip))
			l.wantEndpoints()
		})
	}
}

func (l *lab) exec(name string, args ...string) {
	l.t.Helper()
	if _, err := l.Exec(l.t.Context(), name, args...); err != nil {
		l.t.Fatal(err)
	}
}

func TestOwnAddresses(t *testing.T) {
	mac := func(s string) net.HardwareAddr {
		m, err := net.ParseMAC(s)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	now, later := mac("02:00:5e:10:00:01"), mac("0a:00:5e:10:00:02")
	const llNow, llLater, llOther = "fe80::5eff:fe10:1", "fe80::800:5eff:fe10:2", "fe80::1234"
	for name, test := range map[string]struct {
		result, link []string
		mac          net.HardwareAddr
		want         []string
	}{
		"nothing yet: the link-local to come": {nil, nil, now, []string{llNow}},
		"result and link say the same":        {[]string{"10.0.0.2"}, []string{"10.0.0.2", llNow}, now, []string{"10.0.0.2", llNow}},
		"result before the link has it":       {[]string{"10.0.0.2", "fd00::2"}, nil, now, []string{"10.0.0.2", "fd00::2", llNow}},
		"link-local that is no EUI-64":        {nil, []string{llOther}, now, []string{llOther, llNow}},
		"MAC to come, link-local kept or not": {[]string{"10.0.0.2"}, []string{"10.0.0.2", llNow}, later, []string{"10.0.0.2", llNow, llLater}},
	} {
		t.Run(name, func(t *testing.T) {
			v := &veth{pod: &netlink.Veth{LinkAttrs: netlink.LinkAttrs{HardwareAddr: now}}, addresses: parse(test.link)}
			got, want := v.own(parse(test.result), test.mac), parse(test.want)
			slices.SortFunc(want, netip.Addr.Compare)
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func parse(list []string) (addresses []netip.Addr) {
	for _, s := range list {
		addresses = append(addresses, netip.MustParseAddr(s))
	}
	return addresses
}

// A runtime that asks for a MAC gets it from tuning, possibly after us.
func TestMACToCome(t *testing.T) {
	const mac = "02:11:22:33:44:55"
	tuning := netlab.Plugin{"type": "tuning", "capabilities": map[string]bool{"mac": true}}
	for name, plugins := range map[string]func(*lab) []netlab.Plugin{
		"tuning before": func(l *lab) []netlab.Plugin {
			return []netlab.Plugin{l.Bridge("br0", "10.85.0.0/24"), tuning, l.Podgate()}
		},
		"tuning after": func(l *lab) []netlab.Plugin {
			return []netlab.Plugin{l.Bridge("br0", "10.85.0.0/24"), l.Podgate(), tuning}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			list := chain("1.1.0", plugins(l)...)
			p, _ := l.add(list, netlab.PodSpec{Capabilities: map[string]any{"mac": mac}})
			e := l.wantEndpoints(pinning.AttachmentKey{ContainerID: p.ID, IfName: "eth0"})[key(p)]
			if e.MAC.String() != mac || !slices.Contains(e.Addresses, netip.MustParseAddr("fe80::11:22ff:fe33:4455")) {
				t.Errorf("endpoint has MAC %s, addresses %v", e.MAC, e.Addresses)
			}
			if err := l.Check(t.Context(), list, p); err != nil {
				t.Errorf("CHECK: %v", err)
			}
		})
	}
}
