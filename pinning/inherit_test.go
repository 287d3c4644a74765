// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// otherVersion makes what is pinned that of another version, and sets up this
// one beside it.
func (l *lab) otherVersion() (dir string) {
	l.t.Helper()
	dir = filepath.Join(l.options.Layout.Dir(), "v0")
	if err := os.Rename(l.options.Layout.VersionDir(), dir); err != nil {
		l.t.Fatal(err)
	}
	l.state = l.ensure()
	return dir
}

func (l *lab) inherit() (there bool) {
	l.t.Helper()
	l.do(func() (err error) {
		there, err = l.state.Inherit(l.t.Context())
		return err
	})
	return there
}

func (l *lab) takeOver() (there bool) {
	l.t.Helper()
	l.do(func() (err error) {
		there, err = l.state.TakeOver(l.t.Context())
		return err
	})
	return there
}

// isolated is the policy of a pod that nobody may speak to.
func isolated(t *testing.T, pods ...string) policy.Update {
	t.Helper()
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: "ns"})
	for _, name := range pods {
		p := policy.Pod{Key: policy.PodKey("uid-" + name), Namespace: "ns", Name: name, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Local: true}
		if err := c.SetPod(p); err != nil {
			t.Fatal(err)
		}
	}
	err := c.SetPolicy(policy.Policy{
		UID: "p", Kind: "NetworkPolicy", Namespace: "ns", Name: "p", Tier: policy.TierNamespace,
		Subject:  policy.PodSelector{Namespace: "ns"},
		Isolates: [2]bool{policy.Ingress: true, policy.Egress: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c.Compile()
}

// dropped is how many packets hooks of the gate have dropped, both ways.
func (l *lab) dropped(s *pinning.State, gate uint32) uint64 {
	l.t.Helper()
	c, err := s.Counters(gate)
	if err != nil {
		l.t.Fatal(err)
	}
	return c.DroppedPackets[policy.Ingress] + c.DroppedPackets[policy.Egress]
}

// Hooks are taken over once policy is known, without a packet between the old
// program and the new one, and nothing is left of the other version.
func TestTakeOver(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			host := l.veth("a")
			r := request(host, "10.0.0.1")
			r.Attach = kind
			before, _ := l.add(r)
			l.unplug(l.addGone())
			theirs := l.state
			dir := l.otherVersion()
			for range 2 {
				if !l.inherit() {
					t.Error("the other version was not found")
				}
			}
			e, _, err := l.state.Endpoint(r.Key)
			if err != nil {
				t.Fatal(err)
			}
			if e.ID != before.ID || e.Attach != pinning.AttachFormer || !slices.Equal(e.Addresses, before.Addresses) || e.PodUID != before.PodUID || !e.Created.Equal(before.Created) {
				t.Errorf("inherited was %+v, not %+v", e, before)
			}
			if !l.takeOver() {
				t.Error("it was taken over before its policy was known")
			}
			// Repair and Check leave alone what is another version's.
			if done := l.repair(); len(done) != 0 {
				t.Errorf("repaired was %v", done)
			}
			if err := l.check(r.Key, r.Endpoint); err != nil {
				t.Error(err)
			}
			apply(t, l.state, isolated(t, "a"))

			const frames = 200
			first := l.dropped(theirs, before.Gate)
			l.flood(host, frames, func() {
				if l.takeOver() {
					t.Error("it was not taken over")
				}
			})
			// The node may send to the pod; what the pod sends is dropped by both.
			if n := l.dropped(theirs, before.Gate) - first + l.dropped(l.state, e.Gate); n != frames {
				t.Errorf("%d of %d packets were dropped", n, frames)
			}
			if n := l.dropped(l.state, e.Gate); n != frames/2 {
				t.Errorf("%d of %d packets were dropped by the new version", n, frames/2)
			}
			if kind == pinning.AttachTCX {
				l.wantHooked(host, "to_pod by tcx", "from_pod by tcx")
			} else {
				l.wantHooked(host, "podgate_to_pod by clsact", "podgate_from_pod by clsact")
			}
			if err := l.check(r.Key, r.Endpoint); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the other version is still there: %v", err)
			}
			if l.inherit() || l.takeOver() {
				t.Error("something is left to take over")
			}
			// Numbers of endpoints are not used again.
			if next, _ := l.add(request(l.veth("b"), "10.0.0.3")); next.ID <= e.ID {
				t.Errorf("endpoint %d came after %d", next.ID, e.ID)
			}
			l.delete(r.Key)
			l.wantHooked(host)
		})
	}
}

// What packets have taught stays.
func TestFlowsOutliveTheVersion(t *testing.T) {
	l := newLab(t)
	info := func() ebpf.MapID {
		t.Helper()
		i, err := l.pinned(bpf.DatapathMapFlows).Info()
		if err != nil {
			t.Fatal(err)
		}
		id, _ := i.ID()
		return id
	}
	before := info()
	l.otherVersion()
	if after := info(); after != before {
		t.Errorf("flows are in map %d, and were in %d", after, before)
	}
}

// A map of another layout is made anew.
func TestFlowsOfAnotherLayout(t *testing.T) {
	l := newLab(t)
	spec, err := bpf.LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	flows := spec.Maps[bpf.DatapathMapFlows].Copy()
	flows.MaxEntries = 16
	flows.ValueSize += 8
	flows.Value = nil
	l.repin(flows, bpf.DatapathMapFlows)
	l.otherVersion()
	if n := l.pinned(bpf.DatapathMapFlows).ValueSize(); n != spec.Maps[bpf.DatapathMapFlows].ValueSize {
		t.Errorf("values have %d bytes", n)
	}
}

// Records of another layout are read by the names of fields.
func TestInheritOtherLayout(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	e, _ := l.add(request(host, "10.0.0.1"))
	theirs := l.pinned(bpf.DatapathMapEndpoints)
	var key bpf.DatapathAttachment
	var value bpf.DatapathEndpoint
	for i := theirs.Iterate(); i.Next(&key, &value); {
	}
	old := append([]byte{1, 2, 3, 4, 5, 6, 7, 8}, mustLookup(t, theirs, &key)...)

	spec, err := bpf.LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	other := spec.Maps[bpf.DatapathMapEndpoints].Copy()
	other.MaxEntries = 16
	value8, ok := btf.As[*btf.Struct](other.Value)
	if !ok {
		t.Fatalf("%v is no struct", other.Value)
	}
	grown := btf.Copy(value8).(*btf.Struct)
	grown.Size += 8
	for i := range grown.Members {
		grown.Members[i].Offset += 64
	}
	grown.Members = append([]btf.Member{{Name: "of_then", Type: &btf.Int{Name: "unsigned long", Size: 8}}}, grown.Members...)
	other.Value, other.ValueSize = grown, grown.Size
	l.repin(other, bpf.DatapathMapEndpoints)
	if err := l.pinned(bpf.DatapathMapEndpoints).Put(&key, old); err != nil {
		t.Fatal(err)
	}
	l.otherVersion()
	l.inherit()
	got, _, err := l.state.Endpoint(e.Key)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != e.ID || got.HostIfindex != e.HostIfindex || got.PodName != e.PodName || !slices.Equal(got.Addresses, e.Addresses) {
		t.Errorf("inherited was %+v, not %+v", got, e)
	}
}

func mustLookup(t *testing.T, m *ebpf.Map, key any) []byte {
	t.Helper()
	b, err := m.LookupBytes(key)
	if err != nil || b == nil {
		t.Fatalf("lookup: %v", err)
	}
	return b
}

// An interface that was gated anew meanwhile is not the other version's.
func TestInheritLeavesNewGates(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	l.add(request(host, "10.0.0.1"))
	dir := l.otherVersion()
	r := request(host, "10.0.0.1")
	r.Key.ContainerID = "another"
	l.add(r)
	l.inherit()
	if _, _, err := l.state.Endpoint(request(host).Key); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("the former endpoint was inherited: %v", err)
	}
	if l.takeOver() {
		t.Error("the other version is still there")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := l.check(r.Key, r.Endpoint); err != nil {
		t.Error(err)
	}
}

// Who is elsewhere sees no interface, and takes none for gone.
func TestTakeOverElsewhere(t *testing.T) {
	l := newLab(t)
	r := request(l.veth("a"), "10.0.0.1")
	e, _ := l.add(r)
	l.otherVersion()
	for name, call := range map[string]func(context.Context) (bool, error){"Inherit": l.state.Inherit, "TakeOver": l.state.TakeOver} {
		if there, err := call(t.Context()); !there || !errors.Is(err, pinning.ErrNetNS) {
			t.Errorf("%s: %t, %v", name, there, err)
		}
	}
	l.inherit()
	if got, _, err := l.state.Endpoint(r.Key); err != nil || got.ID != e.ID {
		t.Errorf("at home it inherited %+v, %v", got, err)
	}
}

// A process that died while it removed the other version is done for.
func TestTakeOverAfterACrash(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	l.add(request(host, "10.0.0.1"))
	dir := l.otherVersion()
	l.removePin(filepath.Join(dir, "maps", bpf.DatapathMapEndpoints))
	l.inherit()
	if l.takeOver() {
		t.Error("the other version is still there")
	}
	l.wantHooked(host)
}
