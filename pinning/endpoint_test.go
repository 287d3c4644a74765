// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

func TestAddRecordsWhatItWasGiven(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	r := request(host, "10.0.0.1", "fd00::1", "fe80::1")
	r.Labels = map[string]string{"app": "web", "tier": ""}
	r.Audit, r.CNIIfName = true, "eth9"
	added, enforced := l.add(r)
	if enforced != (pinning.Enforcement{}) || enforced.State() != "closed" {
		t.Errorf("a new endpoint of unknown policy is %v", enforced)
	}
	want := r.Endpoint
	want.ID, want.Gate, want.Pod, want.Attach = added.ID, added.Gate, "uid-a", pinning.AttachClsact
	got, enforced, err := l.open().Endpoint(r.Key)
	if err != nil {
		t.Fatal(err)
	}
	if age := time.Since(got.Created); age < 0 || age > time.Minute {
		t.Errorf("created %s ago", age)
	}
	got.Created, want.Created = time.Time{}, time.Time{}
	if !reflect.DeepEqual(got, want) || enforced.State() != "closed" {
		t.Errorf("recorded is\n%+v, %s, not\n%+v", got, enforced.State(), want)
	}
	var all []pinning.AttachmentKey
	for e, err := range l.state.Endpoints() {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e.Key)
	}
	if !slices.Equal(all, []pinning.AttachmentKey{r.Key}) {
		t.Errorf("endpoints are %v", all)
	}
	if err := l.check(r.Key, r.Endpoint); err != nil {
		t.Errorf("Check of what was just added: %v", err)
	}
}

func TestModes(t *testing.T) {
	l := newLab(t)
	for mode, want := range map[pinning.Mode]struct {
		state  string
		reason bpf.DatapathReason
	}{
		pinning.ModeClosed: {"closed", bpf.DatapathReasonREASON_CLOSED},
		pinning.ModeOpen:   {"open", bpf.DatapathReasonREASON_OPEN},
	} {
		r := request(l.veth(mode.String()), "10.0.0.1")
		r.Mode = mode
		e, enforced := l.add(r)
		if enforced.State() != want.state {
			t.Errorf("mode %s: the gate is %s", mode, enforced.State())
		}
		for _, d := range []policy.Direction{policy.Ingress, policy.Egress} {
			if a := l.probe(e.Gate, d, "10.0.0.1", "192.0.2.1", 80); a.Reason != want.reason {
				t.Errorf("mode %s: direction %d: %+v", mode, d, a)
			}
		}
		l.delete(e.Key)
	}
}

func TestAddThatCannotBe(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	for name, c := range map[string]struct {
		change func(*pinning.AddRequest)
		want   error
		says   string
	}{
		"no container":     {func(r *pinning.AddRequest) { r.Key.ContainerID = "" }, pinning.ErrInvalid, "container ID"},
		"no interface":     {func(r *pinning.AddRequest) { r.Key.IfName = "" }, pinning.ErrInvalid, "interface"},
		"long container":   {func(r *pinning.AddRequest) { r.Key.ContainerID = strings.Repeat("x", 128) }, pinning.ErrInvalid, "container ID"},
		"long interface":   {func(r *pinning.AddRequest) { r.Key.IfName = strings.Repeat("x", 16) }, pinning.ErrInvalid, "interface name"},
		"long pod name":    {func(r *pinning.AddRequest) { r.PodName = strings.Repeat("x", 256) }, pinning.ErrInvalid, "pod name"},
		"long network":     {func(r *pinning.AddRequest) { r.Network = strings.Repeat("x", 128) }, pinning.ErrInvalid, "network name"},
		"long labels":      {func(r *pinning.AddRequest) { r.Labels = map[string]string{"a": strings.Repeat("x", 1024)} }, pinning.ErrInvalid, "labels"},
		"short MAC":        {func(r *pinning.AddRequest) { r.MAC = r.MAC[:5] }, pinning.ErrInvalid, "MAC"},
		"addresses":        {func(r *pinning.AddRequest) { r.Addresses = slices.Repeat(r.Addresses, 17) }, pinning.ErrInvalid, "17 addresses"},
		"no such link":     {func(r *pinning.AddRequest) { r.HostIfindex = 4242 }, nil, "4242"},
		"tcx, no link":     {func(r *pinning.AddRequest) { r.HostIfindex, r.Attach = 4242, pinning.AttachTCX }, nil, "4242"},
		"clsact, excluded": {func(r *pinning.AddRequest) { r.Attach = pinning.AttachClsact }, pinning.ErrNoHook, "ingress qdisc"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "tcx, no link" {
				needTCX(t)
			}
			r := request(host, "10.0.0.1")
			if errors.Is(c.want, pinning.ErrNoHook) {
				l.ingress(host)
			}
			c.change(&r)
			_, _, err := l.tryAdd(r)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("Add: %v", err)
			}
			l.wantHoldings(map[string]int{})
		})
	}
}

func TestDeleteLeavesNothing(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			hosts := []string{"a", "b", "c"}
			for _, name := range hosts {
				l.veth(name)
			}
			l.add(request(l.veth("stays"), "10.0.0.8"))
			before := l.holdings()
			for range 2 {
				var keys []pinning.AttachmentKey
				for i, name := range hosts {
					host := l.link(name)
					r := request(host, fmt.Sprintf("10.0.0.%d", i+1), fmt.Sprintf("fd00::%d", i+1), "fe80::1")
					r.Attach = kind
					e, _ := l.add(r)
					if e.Attach != kind {
						t.Errorf("attached by %s", e.Attach)
					}
					keys = append(keys, e.Key)
				}
				for _, k := range keys {
					l.delete(k)
					l.delete(k) // DEL may come twice
					if _, _, err := l.state.Endpoint(k); !errors.Is(err, pinning.ErrNotFound) {
						t.Errorf("after Delete: %v", err)
					}
				}
				l.wantHoldings(before)
				for _, name := range hosts {
					for d, f := range l.filters(l.link(name)) {
						if len(f) != 0 {
							t.Errorf("%s has filters in direction %d: %v", name, d, f)
						}
					}
				}
			}
		})
	}
}

func TestDeleteOfWhatWasNeverThere(t *testing.T) {
	l := newLab(t)
	l.delete(pinning.AttachmentKey{ContainerID: "never", IfName: "eth0"})
	l.wantHoldings(map[string]int{})
}

// The interface may be gone, with its namespace, before DEL is called.
func TestDeleteAfterTheInterface(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			l.add(request(l.veth("stays"), "10.0.0.8"))
			host := l.veth("a")
			before := l.holdings()
			r := request(host, "10.0.0.1", "fd00::1")
			r.Attach = kind
			e, _ := l.add(r)
			l.unplug(host)
			l.delete(e.Key)
			l.wantHoldings(before)
		})
	}
}

func TestReplaceSameKey(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			host := l.veth("a")
			r := request(host, "10.0.0.1")
			r.Attach = kind
			first, _ := l.add(r)
			before := l.holdings()
			r.Addresses = []netip.Addr{netip.MustParseAddr("10.0.0.2")}
			second, _ := l.add(r)
			if second.ID == first.ID {
				t.Errorf("the replaced endpoint's ID %d is used again", first.ID)
			}
			l.wantHoldings(before)
			if err := l.check(r.Key, r.Endpoint); err != nil {
				t.Error(err)
			}
			if a := l.probe(second.Gate, policy.Egress, "10.0.0.1", "192.0.2.1", 80); a.Reason != bpf.DatapathReasonREASON_SPOOFED_ADDRESS {
				t.Errorf("the former address: %+v", a)
			}
			// To another interface: the former one is clean.
			moved := request(l.veth("b"), "10.0.0.2")
			moved.Key, moved.Attach = r.Key, kind
			l.add(moved)
			for d, f := range l.filters(host) {
				if len(f) != 0 {
					t.Errorf("direction %d of the former interface: %v", d, f)
				}
			}
		})
	}
}

// An interface number is used again after its interface is gone.
func TestIfindexReuse(t *testing.T) {
	l := newLab(t)
	host := l.vethAt("a", 500)
	former, _ := l.add(request(host, "10.0.0.1"))
	l.unplug(host)
	next, enforced := l.add(request(l.vethAt("b", 500), "10.0.0.2"))
	if _, _, err := l.state.Endpoint(former.Key); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("the former endpoint: %v", err)
	}
	if enforced.State() != "closed" {
		t.Errorf("the new endpoint is %s", enforced.State())
	}
	if err := l.check(next.Key, next); err != nil {
		t.Error(err)
	}
	// DEL of the former one comes late.
	l.delete(former.Key)
	if err := l.check(next.Key, next); err != nil {
		t.Errorf("after the late DEL of the former: %v", err)
	}
}

func TestGatesCollide(t *testing.T) {
	l := newLab(t)
	slots := int(l.pinned("gates").MaxEntries())
	keys := map[uint32]pinning.Endpoint{}
	for i := range 8 {
		e, _ := l.add(request(l.vethAt(fmt.Sprintf("v%d", i), 300+i*slots), fmt.Sprintf("10.0.0.%d", i+1)))
		if other, taken := keys[e.Gate]; taken {
			t.Fatalf("%s and %s share gate %d", e.Key, other.Key, e.Gate)
		}
		keys[e.Gate] = e
		if a := l.probe(e.Gate, policy.Egress, e.Addresses[0].String(), "192.0.2.1", 80); a.Reason != bpf.DatapathReasonREASON_CLOSED {
			t.Errorf("%s: %+v", e.Key, a)
		}
	}
	_, _, err := l.tryAdd(request(l.vethAt("v8", 300+8*slots), "10.0.0.9"))
	if !errors.Is(err, pinning.ErrFull) || !strings.Contains(err.Error(), "capacity endpoints") {
		t.Errorf("a ninth gate at one place: %v", err)
	}
	for _, e := range keys {
		if err := l.check(e.Key, e); err != nil {
			t.Error(err)
		}
		l.delete(e.Key)
	}
}

func TestReadyNeedsPrograms(t *testing.T) {
	l := newLab(t)
	l.removePin(l.options.Layout.ProgramPath(bpf.DatapathProgToPod))
	if err := l.open().Ready(t.Context()); !errors.Is(err, pinning.ErrNotInstalled) || !strings.Contains(err.Error(), "to_pod") {
		t.Errorf("Ready without a program: %v", err)
	}
}

func TestGC(t *testing.T) {
	l := newLab(t)
	var keys []pinning.AttachmentKey
	for i, name := range []string{"a", "b", "c", "d"} {
		r := request(l.veth(name), fmt.Sprintf("10.0.0.%d", i+1))
		if name == "d" {
			r.Network = "another"
		}
		e, _ := l.add(r)
		keys = append(keys, e.Key)
	}
	l.unplug(l.link("b"))
	gc := func(keep ...pinning.AttachmentKey) (removed []pinning.AttachmentKey) {
		t.Helper()
		set := map[pinning.AttachmentKey]struct{}{}
		for _, k := range keep {
			set[k] = struct{}{}
		}
		l.do(func() (err error) {
			removed, err = l.state.GC(t.Context(), "net", set)
			return err
		})
		return removed
	}
	if removed := gc(keys[0]); len(removed) != 2 || slices.Contains(removed, keys[0]) || slices.Contains(removed, keys[3]) {
		t.Errorf("removed are %v of %v", removed, keys)
	}
	if removed := gc(keys[0]); len(removed) != 0 {
		t.Errorf("a second time removed are %v", removed)
	}
	for _, k := range []pinning.AttachmentKey{keys[0], keys[3]} {
		if err := l.check(k, pinning.Endpoint{}); err != nil {
			t.Error(err)
		}
	}
	if removed := gc(); !slices.Equal(removed, keys[:1]) {
		t.Errorf("with nothing to keep removed are %v", removed)
	}
	if err := l.check(keys[3], pinning.Endpoint{}); err != nil {
		t.Errorf("another network's endpoint: %v", err)
	}
}

// A record that cannot be read whole is removed like any, and named as long as
// its attachment is wanted.
func TestGCOfBrokenRecord(t *testing.T) {
	l := newLab(t)
	before := l.holdings()
	e, _ := l.add(request(l.veth("a"), "10.0.0.1"))
	m, key := l.pinned(bpf.DatapathMapEndpoints), wireKey(e.Key)
	var w bpf.DatapathEndpoint
	if err := m.Lookup(&key, &w); err != nil {
		t.Fatal(err)
	}
	w.AddressesCount = 99
	if err := m.Put(&key, &w); err != nil {
		t.Fatal(err)
	}
	err := l.Do(func() error {
		removed, err := l.state.GC(t.Context(), "net", map[pinning.AttachmentKey]struct{}{e.Key: {}})
		if len(removed) != 0 {
			t.Errorf("removed is %v, which was to be kept", removed)
		}
		return err
	})
	if !errors.Is(err, pinning.ErrInvalid) || !strings.Contains(err.Error(), "99 addresses") {
		t.Errorf("GC that keeps it: %v", err)
	}
	l.do(func() error {
		removed, err := l.state.GC(t.Context(), "net", nil)
		if !slices.Equal(removed, []pinning.AttachmentKey{e.Key}) {
			t.Errorf("removed is %v", removed)
		}
		return err
	})
	if after := l.holdings(); !maps.Equal(before, after) {
		t.Errorf("left are %v, before it were %v", after, before)
	}
}

func TestCheckNamesWhatDiffers(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	r := request(host, "10.0.0.1")
	e, _ := l.add(r)
	for name, c := range map[string]struct {
		want pinning.Endpoint
		says string
	}{
		"interface": {pinning.Endpoint{HostIfindex: 99}, "interface"},
		"MAC":       {pinning.Endpoint{MAC: []byte{2, 9, 9, 9, 9, 9}}, "MAC"},
		"address":   {pinning.Endpoint{Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.77")}}, "10.0.0.77"},
	} {
		if err := l.check(e.Key, c.want); !errors.Is(err, pinning.ErrDiffers) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	if err := l.check(pinning.AttachmentKey{ContainerID: "never", IfName: "eth0"}, r.Endpoint); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("Check of what was never there: %v", err)
	}
	// Another attachment takes the address.
	other := request(l.veth("b"), "10.0.0.1")
	l.add(other)
	if err := l.check(e.Key, r.Endpoint); !errors.Is(err, pinning.ErrDiffers) || !strings.Contains(err.Error(), "10.0.0.1") {
		t.Errorf("Check after the address went: %v", err)
	}
}

func TestConcurrentAdds(t *testing.T) {
	l := newLab(t)
	l.add(request(l.veth("stays"), "10.0.0.100"))
	const n = 16
	requests := make([]pinning.AddRequest, n)
	for i := range requests {
		requests[i] = request(l.veth(fmt.Sprintf("v%d", i)), fmt.Sprintf("10.0.0.%d", i+1))
	}
	before := l.holdings()
	endpoints := make([]pinning.Endpoint, n)
	each := func(f func(i int, s *pinning.State) error) {
		var all sync.WaitGroup
		for i := range n {
			s := l.open()
			all.Go(func() {
				if err := l.Do(func() error { return f(i, s) }); err != nil {
					t.Errorf("%d: %v", i, err)
				}
			})
		}
		all.Wait()
	}
	each(func(i int, s *pinning.State) (err error) {
		endpoints[i], _, err = s.Add(t.Context(), requests[i])
		return err
	})
	ids, gates := map[uint32]int{}, map[uint32]int{}
	for i, e := range endpoints {
		ids[e.ID], gates[e.Gate] = i, i
		if err := l.check(e.Key, requests[i].Endpoint); err != nil {
			t.Error(err)
		}
	}
	if len(ids) != n || len(gates) != n {
		t.Errorf("%d endpoints have %d IDs and %d gates", n, len(ids), len(gates))
	}
	each(func(i int, s *pinning.State) error { return s.Delete(t.Context(), requests[i].Key) })
	l.wantHoldings(before)
}

func TestAddressReuse(t *testing.T) {
	l := newLab(t)
	former, _ := l.add(request(l.veth("a"), "10.0.0.1", "fd00::1"))
	next, _ := l.add(request(l.veth("b"), "10.0.0.1"))
	// The former owner's DEL comes after the next one's ADD.
	l.delete(former.Key)
	if err := l.check(next.Key, next); err != nil {
		t.Errorf("after the late DEL: %v", err)
	}
	if a := l.probe(next.Gate, policy.Egress, "10.0.0.1", "192.0.2.1", 80); a.Reason != bpf.DatapathReasonREASON_CLOSED {
		t.Errorf("the new owner sends: %+v", a)
	}
	if n := l.holdings()[bpf.DatapathMapClaims]; n != 1 {
		t.Errorf("%d addresses are claimed, not 1", n)
	}
}

func TestClaimAndRelease(t *testing.T) {
	l := newLab(t)
	a := pinning.AttachmentKey{ContainerID: "a", IfName: "eth0"}
	b := pinning.AttachmentKey{ContainerID: "b", IfName: "eth0"}
	address := func(s ...string) (out []netip.Addr) {
		for _, x := range s {
			out = append(out, netip.MustParseAddr(x))
		}
		return out
	}
	claims := func(want int) {
		t.Helper()
		if n := l.holdings()[bpf.DatapathMapClaims]; n != want {
			t.Errorf("%d claims, not %d", n, want)
		}
	}
	ctx := t.Context()
	if err := errors.Join(
		l.state.Claim(ctx, a, address("10.0.0.1", "10.0.0.2", "fd00::1", "fe80::1")),
		l.state.Claim(ctx, a, address("10.0.0.1")),
		l.state.Claim(ctx, b, address("10.0.0.2")),
	); err != nil {
		t.Fatal(err)
	}
	claims(3) // link-local addresses are nobody's
	if err := l.state.Release(ctx, a, address("10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	claims(2)
	if err := l.state.Release(ctx, a, nil); err != nil {
		t.Fatal(err)
	}
	claims(1)
	if err := l.state.Release(ctx, a, address("10.0.0.2")); err != nil {
		t.Fatal(err)
	}
	claims(1) // it is b's by now
}

// An attachment may come with several interfaces; the runtime knows one.
func TestSeveralInterfaces(t *testing.T) {
	l := newLab(t)
	request3 := func() (keys []pinning.AttachmentKey) {
		for i, name := range []string{"a", "b", "c"} {
			r := request(l.link(name), fmt.Sprintf("10.0.0.%d", i+1))
			r.Key = pinning.AttachmentKey{ContainerID: "c", IfName: []string{"eth0", "eth1", "net1"}[i]}
			r.CNIIfName = []string{"eth0", "eth0", "net1"}[i]
			l.add(r)
			keys = append(keys, r.Key)
		}
		return keys
	}
	there := func(k pinning.AttachmentKey, want bool) {
		t.Helper()
		if _, _, err := l.state.Endpoint(k); errors.Is(err, pinning.ErrNotFound) == want {
			t.Errorf("%s: %v", k, err)
		}
	}
	for _, name := range []string{"a", "b", "c"} {
		l.veth(name)
	}
	keys := request3()
	l.delete(keys[0])
	there(keys[0], false)
	there(keys[1], false)
	there(keys[2], true)
	request3()
	l.do(func() error {
		removed, err := l.state.GC(t.Context(), "net", map[pinning.AttachmentKey]struct{}{keys[0]: {}})
		if !slices.Equal(removed, keys[2:]) {
			t.Errorf("removed are %v", removed)
		}
		return err
	})
	there(keys[0], true)
	there(keys[1], true)
	there(keys[2], false)
}

// The record of an attachment's only interface spares DEL the search for
// others, but not those of an earlier ADD.
func TestOnlyInterface(t *testing.T) {
	l := newLab(t)
	first, second := request(l.veth("a"), "10.0.0.1"), request(l.veth("b"), "10.0.0.2")
	second.Key = pinning.AttachmentKey{ContainerID: first.Key.ContainerID, IfName: "eth1"}
	second.CNIIfName = first.Key.IfName
	for name, before := range map[string]int{"not known": 0, "both": 2} {
		first.Interfaces, second.Interfaces = before, before
		l.add(first)
		l.add(second)
		first.Interfaces = 1
		l.add(first)
		l.delete(first.Key)
		for _, k := range []pinning.AttachmentKey{first.Key, second.Key} {
			if _, _, err := l.state.Endpoint(k); !errors.Is(err, pinning.ErrNotFound) {
				t.Errorf("interfaces were %s: %s: %v", name, k, err)
			}
		}
	}
	if e, _ := l.add(first); e.Interfaces != 1 {
		t.Errorf("endpoint has %d interfaces", e.Interfaces)
	}
	l.delete(first.Key)
	if n := l.holdings()[bpf.DatapathMapEndpoints]; n != 0 {
		t.Errorf("%d endpoints are left", n)
	}
}
