// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// small is enough for a test and quick to set up.
var small = pinning.Capacity{
	Endpoints: 64, Flows: 1024, Peers: 1024, Blocks: 256, Cells: 1024, Rules: 256, Fragments: 64, EventBytes: 1 << 16,
}

// peerNode is PEER_NODE of bpf/include/types.h.
const peerNode = 1 << 31

// lab is a node of its own with an instance of its own.
type lab struct {
	*netlab.Node
	t       *testing.T
	options pinning.Options
	state   *pinning.State
}

// needRoot also lets the test run beside others: labs do not meet.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and eBPF need root")
	}
	t.Parallel()
}

// newNode is a lab whose instance is not made yet.
func newNode(t *testing.T) *lab {
	t.Helper()
	needRoot(t)
	node, err := netlab.New(netlab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	})
	// Neighbours that look for each other would be counted too.
	if err := node.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	return &lab{Node: node, t: t, options: pinning.Options{Layout: pinning.Layout{BPFFS: node.BPFFS, Name: "podgate"}, Capacity: small}}
}

func newLab(t *testing.T) *lab { return newLabWith(t, small) }

func newLabWith(t *testing.T, c pinning.Capacity) *lab {
	t.Helper()
	l := newNode(t)
	l.options.Capacity = c
	l.state = l.ensure()
	return l
}

// ensure is another process's view of the instance.
func (l *lab) ensure() *pinning.State {
	l.t.Helper()
	s, err := pinning.Ensure(l.t.Context(), l.options)
	if err != nil {
		l.t.Fatal(err)
	}
	l.closing(s)
	return s
}

func (l *lab) open() *pinning.State {
	l.t.Helper()
	s, err := pinning.Open(l.t.Context(), l.options)
	if err != nil {
		l.t.Fatal(err)
	}
	l.closing(s)
	return s
}

func (l *lab) closing(s *pinning.State) {
	l.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			l.t.Error(err)
		}
	})
}

// do runs f in the node's network namespace, where it must not fail.
func (l *lab) do(f func() error) {
	l.t.Helper()
	if err := l.Do(f); err != nil {
		l.t.Fatal(err)
	}
}

// veth makes a pair whose ends are both on the node: the host end is up.
func (l *lab) veth(name string) netlink.Link {
	l.t.Helper()
	return l.vethAt(name, 0)
}

func (l *lab) vethAt(name string, ifindex int) (host netlink.Link) {
	l.t.Helper()
	l.do(func() (err error) {
		pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, Index: ifindex}, PeerName: name + "p"}
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		if host, err = netlink.LinkByName(name); err != nil {
			return err
		}
		peer, err := netlink.LinkByName(name + "p")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(host), netlink.LinkSetUp(peer))
	})
	return host
}

func (l *lab) unplug(host netlink.Link) {
	l.t.Helper()
	l.do(func() error { return netlink.LinkDel(host) })
}

// request is what ADD asks for a pod behind a host interface.
func request(host netlink.Link, addrs ...string) pinning.AddRequest {
	name := host.Attrs().Name
	r := pinning.AddRequest{Endpoint: pinning.Endpoint{
		Key:         pinning.AttachmentKey{ContainerID: "c-" + name, IfName: "eth0"},
		HostIfindex: host.Attrs().Index, MAC: []byte{2, 0, 0, 0, 0, byte(host.Attrs().Index)},
		Network: "net", NetNS: "/run/netns/" + name, PodUID: "uid-" + name, PodNamespace: "ns", PodName: name,
		AntiSpoof: true,
	}}
	for _, a := range addrs {
		r.Addresses = append(r.Addresses, netip.MustParseAddr(a))
	}
	return r
}

func (l *lab) add(r pinning.AddRequest) (pinning.Endpoint, pinning.Enforcement) {
	l.t.Helper()
	e, enforced, err := l.tryAdd(r)
	if err != nil {
		l.t.Fatal(err)
	}
	return e, enforced
}

func (l *lab) tryAdd(r pinning.AddRequest) (e pinning.Endpoint, enforced pinning.Enforcement, err error) {
	err = l.Do(func() (err error) {
		e, enforced, err = l.state.Add(l.t.Context(), r)
		return err
	})
	return e, enforced, err
}

func (l *lab) delete(k pinning.AttachmentKey) {
	l.t.Helper()
	l.do(func() error { return l.state.Delete(l.t.Context(), k) })
}

func (l *lab) check(k pinning.AttachmentKey, want pinning.Endpoint) error {
	return l.Do(func() error { return l.state.Check(l.t.Context(), k, want) })
}

func (l *lab) repair() (done []pinning.Repaired) {
	l.t.Helper()
	l.do(func() (err error) {
		done, err = l.state.Repair(l.t.Context())
		return err
	})
	return done
}

// pinned opens a map beside the package.
func (l *lab) pinned(name string) *ebpf.Map {
	l.t.Helper()
	m, err := ebpf.LoadPinnedMap(l.options.Layout.MapPath(name), nil)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = m.Close() })
	return m
}

// holdings are the entries of each map that endpoints and policy fill, and the
// pins of links. Addresses that the node was found to have are left out.
func (l *lab) holdings() map[string]int {
	l.t.Helper()
	usage, err := l.state.Usage()
	if err != nil {
		l.t.Fatal(err)
	}
	out := map[string]int{}
	for _, u := range usage {
		if u.Used > 0 {
			out[u.Name] = u.Used
		}
	}
	var address bpf.DatapathAddress
	var peer bpf.DatapathPeer
	for entries := l.pinned(bpf.DatapathMapPeers).Iterate(); entries.Next(&address, &peer); {
		if peer.Class == peerNode && peer.Owner == 0 {
			if out[bpf.DatapathMapPeers]--; out[bpf.DatapathMapPeers] == 0 {
				delete(out, bpf.DatapathMapPeers)
			}
		}
	}
	links, err := filepath.Glob(filepath.Join(l.options.Layout.LinksDir(), "*", "*"))
	if err != nil {
		l.t.Fatal(err)
	}
	if len(links) > 0 {
		out["links"] = len(links)
	}
	gates := l.pinned("gates")
	for i := range gates.MaxEntries() {
		gate := make([]byte, gates.ValueSize())
		if err := gates.Lookup(i, &gate); err != nil {
			l.t.Fatal(err)
		}
		if string(gate) != string(make([]byte, len(gate))) {
			out["gates"]++
		}
	}
	return out
}

func (l *lab) wantHoldings(want map[string]int) {
	l.t.Helper()
	if got := l.holdings(); !maps.Equal(got, want) {
		l.t.Errorf("the instance holds %v, not %v", got, want)
	}
}

// filters are the tc filters of an interface, by direction.
func (l *lab) filters(host netlink.Link) [2][]*netlink.BpfFilter {
	l.t.Helper()
	var out [2][]*netlink.BpfFilter
	l.do(func() error {
		for d, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
			list, err := netlink.FilterList(host, parent)
			if err != nil {
				return err
			}
			for _, f := range list {
				if b, ok := f.(*netlink.BpfFilter); ok {
					out[d] = append(out[d], b)
				}
			}
		}
		return nil
	})
	return out
}

// other is another tool's program, which gives every packet one verdict.
func other(t *testing.T, verdict int32) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// filterOf attaches another tool's program with tc.
func (l *lab) filterOf(host netlink.Link, parent uint32, priority uint16, handle uint32, p *ebpf.Program) *netlink.BpfFilter {
	l.t.Helper()
	f := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: host.Attrs().Index, Parent: parent, Handle: handle, Priority: priority, Protocol: unix.ETH_P_ALL,
		},
		Fd: p.FD(), Name: "other", DirectAction: true,
	}
	l.do(func() error { return netlink.FilterAdd(f) })
	return f
}

func (l *lab) clsact(host netlink.Link) {
	l.t.Helper()
	l.do(func() error {
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: host.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	})
}

func (l *lab) ingress(host netlink.Link) {
	l.t.Helper()
	l.do(func() error {
		return netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: host.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
		}})
	})
}

// probe asks the kernel for a verdict on the first packet of a TCP connection.
func (l *lab) probe(gate uint32, d policy.Direction, local, peer string, port uint16) pinning.ProbeAnswer {
	l.t.Helper()
	answer, err := l.state.Probe(l.t.Context(), pinning.ProbeRequest{
		Gate: gate, Direction: d, Local: netip.MustParseAddr(local), Peer: netip.MustParseAddr(peer),
		Protocol: policy.TCP, Port: port,
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return answer
}

// pastGrace waits until what an update left is swept by the next one.
func pastGrace() { time.Sleep(1100 * time.Millisecond) }

func (l *lab) link(name string) (found netlink.Link) {
	l.t.Helper()
	l.do(func() (err error) {
		found, err = netlink.LinkByName(name)
		return err
	})
	return found
}

func (l *lab) removePin(path string) {
	l.t.Helper()
	if err := os.RemoveAll(path); err != nil {
		l.t.Fatal(err)
	}
}
