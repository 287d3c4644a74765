// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// Verdicts of linux/pkt_cls.h.
const (
	tcActUnspec = -1
	tcActOK     = 0
)

// attachKinds are those that the kernel has.
func attachKinds(t *testing.T) []pinning.AttachKind {
	if !hasTCX(t) {
		return []pinning.AttachKind{pinning.AttachClsact}
	}
	return []pinning.AttachKind{pinning.AttachClsact, pinning.AttachTCX}
}

func hasTCX(t *testing.T) bool {
	t.Helper()
	has, err := netlab.HasTCX()
	if err != nil {
		t.Fatal(err)
	}
	return has
}

func needTCX(t *testing.T) {
	t.Helper()
	if !hasTCX(t) {
		t.Skip("tcx came with Linux 6.6")
	}
}

func TestAttachKinds(t *testing.T) {
	for name, c := range map[string]struct {
		wanted, got pinning.AttachKind
		before      func(*lab, netlink.Link)
	}{
		"auto":                       {pinning.AttachAuto, pinning.AttachClsact, nil},
		"auto, clsact there":         {pinning.AttachAuto, pinning.AttachClsact, (*lab).clsact},
		"auto, ingress qdisc there":  {pinning.AttachAuto, pinning.AttachTCX, (*lab).ingress},
		"clsact":                     {pinning.AttachClsact, pinning.AttachClsact, nil},
		"tcx":                        {pinning.AttachTCX, pinning.AttachTCX, nil},
		"tcx, clsact there":          {pinning.AttachTCX, pinning.AttachTCX, (*lab).clsact},
		"tcx, with an ingress qdisc": {pinning.AttachTCX, pinning.AttachTCX, (*lab).ingress},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			host := l.veth("a")
			if c.before != nil {
				c.before(l, host)
			}
			r := request(host, "10.0.0.1")
			r.Attach = c.wanted
			if c.got == pinning.AttachTCX && !hasTCX(t) {
				if _, _, err := l.tryAdd(r); !errors.Is(err, pinning.ErrNoHook) {
					t.Errorf("Add on a kernel without tcx: %v", err)
				}
				l.wantHooked(host)
				return
			}
			e, _ := l.add(r)
			if e.Attach != c.got {
				t.Errorf("attached by %s, not %s", e.Attach, c.got)
			}
			if err := l.check(e.Key, r.Endpoint); err != nil {
				t.Error(err)
			}
			l.judges(e, host, 4, nil)
			l.delete(e.Key)
			l.wantHooked(host)
		})
	}
}

// judges sends frames both ways through a veth whose gate is closed: each is
// seen by our programs, exactly once. What the pod sends is dropped; the node
// may send. between is called midway.
func (l *lab) judges(e pinning.Endpoint, host netlink.Link, frames uint64, between func()) {
	l.t.Helper()
	before, err := l.state.Counters(e.Gate)
	if err != nil {
		l.t.Fatal(err)
	}
	l.flood(host, frames, between)
	after, err := l.state.Counters(e.Gate)
	if err != nil {
		l.t.Fatal(err)
	}
	for d, want := range [2][2]uint64{policy.Ingress: {0, frames}, policy.Egress: {frames, 0}} {
		got := [2]uint64{after.DroppedPackets[d] - before.DroppedPackets[d], after.AllowedPackets[d] - before.AllowedPackets[d]}
		if got != want {
			l.t.Errorf("direction %d: of %d packets %d were dropped and %d allowed", d, frames, got[0], got[1])
		}
	}
}

// flood sends frames from both ends of a veth.
func (l *lab) flood(host netlink.Link, frames uint64, between func()) {
	l.t.Helper()
	l.do(func() error {
		pod, err := netlink.LinkByName(host.Attrs().Name + "p")
		if err != nil {
			return err
		}
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		transmit := func(from netlink.Link, d policy.Direction) error {
			return unix.Sendto(s, udpFrame(host, d), 0, &unix.SockaddrLinklayer{Ifindex: from.Attrs().Index})
		}
		for i := range frames {
			if i == frames/2 && between != nil {
				between()
			}
			if err := errors.Join(transmit(pod, policy.Egress), transmit(host, policy.Ingress)); err != nil {
				return err
			}
		}
		return nil
	})
	// A veth hands over in softirq, which is over soon.
	time.Sleep(10 * time.Millisecond)
}

// udpFrame is one of the pod of [request] at 10.0.0.1.
func udpFrame(host netlink.Link, d policy.Direction) []byte {
	pod, router := []byte{2, 0, 0, 0, 0, byte(host.Attrs().Index)}, []byte{2, 0, 0, 0, 9, 9}
	local, peer := []byte{10, 0, 0, 1}, []byte{192, 0, 2, 1}
	if d == policy.Ingress {
		pod, router, local, peer = router, pod, peer, local
	}
	header := []byte{8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0}
	return slices.Concat(router, pod, header, local, peer, []byte{0x80, 0, 0, 53, 0, 8, 0, 0})
}

// hooked are the programs on an interface: "podgate_to_pod by clsact".
func (l *lab) hooked(host netlink.Link) (out []string) {
	l.t.Helper()
	for _, filters := range l.filters(host) {
		for _, f := range filters {
			out = append(out, f.Name+" by clsact")
		}
	}
	if !hasTCX(l.t) {
		return out
	}
	l.do(func() error {
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXEgress, ebpf.AttachTCXIngress} {
			result, err := link.QueryPrograms(link.QueryOptions{Target: host.Attrs().Index, Attach: attach})
			if err != nil {
				return err
			}
			for _, attached := range result.Programs {
				p, err := ebpf.NewProgramFromID(attached.ID)
				if err != nil {
					return err
				}
				info, err := p.Info()
				if err := errors.Join(err, p.Close()); err != nil {
					return err
				}
				out = append(out, info.Name+" by tcx")
			}
		}
		return nil
	})
	return out
}

// wantHooked waits a little: the kernel detaches a link that was unpinned by
// and by. Until then it finds no gate and lets nothing through.
func (l *lab) wantHooked(host netlink.Link, want ...string) {
	l.t.Helper()
	var got []string
	for range 100 {
		if got = l.hooked(host); slices.Equal(got, want) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	l.t.Errorf("attached are %v, not %v", got, want)
}

// tcxOf attaches another tool's program by tcx.
func (l *lab) tcxOf(host netlink.Link, attach ebpf.AttachType, p *ebpf.Program, anchor link.Anchor) {
	l.t.Helper()
	var other link.Link
	l.do(func() (err error) {
		other, err = link.AttachTCX(link.TCXOptions{Interface: host.Attrs().Index, Program: p, Attach: attach, Anchor: anchor})
		return err
	})
	l.t.Cleanup(func() { _ = other.Close() })
}

func TestOthersStay(t *testing.T) {
	t.Run("clsact", func(t *testing.T) {
		l := newLab(t)
		host := l.veth("a")
		l.clsact(host)
		p := other(t, tcActUnspec)
		l.filterOf(host, netlink.HANDLE_MIN_EGRESS, 10, 1, p)
		l.filterOf(host, netlink.HANDLE_MIN_INGRESS, 10, 1, p)
		e, _ := l.add(request(host, "10.0.0.1"))
		l.filterOf(host, netlink.HANDLE_MIN_INGRESS, 20, 1, p)
		l.wantHooked(host, "podgate_to_pod by clsact", "other by clsact",
			"podgate_from_pod by clsact", "other by clsact", "other by clsact")
		l.judges(e, host, 4, nil)
		l.delete(e.Key)
		l.wantHooked(host, "other by clsact", "other by clsact", "other by clsact")
	})
	t.Run("tcx", func(t *testing.T) {
		needTCX(t)
		l := newLab(t)
		host := l.veth("a")
		p, late := other(t, tcActUnspec), other(t, tcActUnspec)
		l.tcxOf(host, ebpf.AttachTCXEgress, p, link.Head())
		l.tcxOf(host, ebpf.AttachTCXIngress, p, link.Head())
		r := request(host, "10.0.0.1")
		r.Attach = pinning.AttachTCX
		e, _ := l.add(r)
		l.tcxOf(host, ebpf.AttachTCXIngress, late, link.Tail())
		l.wantHooked(host, "to_pod by tcx", "other by tcx", "from_pod by tcx", "other by tcx", "other by tcx")
		l.judges(e, host, 4, nil)
		l.delete(e.Key)
		l.wantHooked(host, "other by tcx", "other by tcx", "other by tcx")
	})
	t.Run("qdisc", func(t *testing.T) {
		needTCX(t)
		l := newLab(t)
		host := l.veth("a")
		l.ingress(host)
		e, _ := l.add(request(host, "10.0.0.1"))
		l.delete(e.Key)
		l.do(func() error {
			qdiscs, err := netlink.QdiscList(host)
			if !slices.ContainsFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() == "ingress" }) {
				t.Errorf("after Delete the qdiscs are %v", qdiscs)
			}
			return err
		})
	})
}

func TestRepair(t *testing.T) {
	for _, kind := range attachKinds(t) {
		for name, harm := range map[string]func(*lab, netlink.Link, pinning.Endpoint) bool{
			"hooks":    (*lab).loseHooks,
			"qdisc":    (*lab).loseQdisc,
			"programs": (*lab).swapPrograms,
			"behind":   (*lab).overtake,
		} {
			t.Run(kind.String()+"/"+name, func(t *testing.T) {
				l := newLab(t)
				host := l.veth("a")
				r := request(host, "10.0.0.1")
				r.Attach = kind
				e, _ := l.add(r)
				if done := l.repair(); len(done) != 0 {
					t.Errorf("nothing was wrong, and repaired is %v", done)
				}
				if !harm(l, host, e) {
					t.Skip("cannot happen to this kind")
				}
				if err := l.check(e.Key, r.Endpoint); !errors.Is(err, pinning.ErrDiffers) {
					t.Errorf("Check does not see it: %v", err)
				}
				done := l.repair()
				if len(done) != 1 || done[0].Endpoint != e.Key || !strings.Contains(done[0].What, "attached again") {
					t.Errorf("repaired is %v", done)
				}
				if err := l.check(e.Key, r.Endpoint); err != nil {
					t.Errorf("after Repair: %v", err)
				}
				l.judges(e, host, 4, nil)
				if done := l.repair(); len(done) != 0 {
					t.Errorf("a second time repaired is %v", done)
				}
			})
		}
	}
}

func (l *lab) loseHooks(host netlink.Link, e pinning.Endpoint) bool {
	l.t.Helper()
	if e.Attach == pinning.AttachTCX {
		l.eachLink(e, func(k link.Link) error { return k.Detach() })
		return true
	}
	l.do(func() error {
		for _, filters := range l.filters(host) {
			for _, f := range filters {
				if err := netlink.FilterDel(f); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return true
}

func (l *lab) loseQdisc(host netlink.Link, e pinning.Endpoint) bool {
	l.t.Helper()
	if e.Attach == pinning.AttachTCX {
		// It has none; somebody unpins the links instead.
		l.removePin(filepath.Join(l.options.Layout.LinksDir()))
		if err := os.Mkdir(l.options.Layout.LinksDir(), 0o700); err != nil {
			l.t.Fatal(err)
		}
		return true
	}
	l.do(func() error {
		return netlink.QdiscDel(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: host.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	})
	return true
}

func (l *lab) swapPrograms(host netlink.Link, e pinning.Endpoint) bool {
	l.t.Helper()
	p := other(l.t, tcActOK)
	if e.Attach == pinning.AttachTCX {
		l.eachLink(e, func(k link.Link) error { return k.Update(p) })
		return true
	}
	l.do(func() error {
		f := l.filters(host)[policy.Egress][0]
		f.Fd = p.FD()
		return netlink.FilterReplace(f)
	})
	return true
}

// overtake puts a program in front of ours.
func (l *lab) overtake(host netlink.Link, e pinning.Endpoint) bool {
	l.t.Helper()
	if e.Attach == pinning.AttachTCX {
		return false // Other tools may go first: they asked the kernel for it.
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS} {
		l.filterOf(host, parent, 1, 7, other(l.t, tcActOK))
	}
	return true
}

func (l *lab) eachLink(e pinning.Endpoint, f func(link.Link) error) {
	l.t.Helper()
	for _, name := range []string{bpf.DatapathProgToPod, bpf.DatapathProgFromPod} {
		k, err := link.LoadPinnedLink(l.options.Layout.LinkPath(e.ID, name), nil)
		if err != nil {
			l.t.Fatal(err)
		}
		if err := errors.Join(f(k), k.Close()); err != nil {
			l.t.Fatal(err)
		}
	}
}

// A process that dies while it puts a filter in front leaves the stand-in: who
// repairs that leaves no gap either.
func TestRepairAfterRepairDied(t *testing.T) {
	const ours, standIn = 0x70670001, 0x70670002
	l := newLab(t)
	host := l.veth("a")
	w := l.witness(host)
	r := request(host, "10.0.0.1")
	r.Attach = pinning.AttachClsact
	e, _ := l.add(r)
	p, err := ebpf.LoadPinnedProgram(l.options.Layout.ProgramPath(bpf.DatapathProgFromPod), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	stop := l.sending(host)
	for range 20 {
		left := l.filterOf(host, netlink.HANDLE_MIN_INGRESS, 1, standIn, p)
		l.do(func() error {
			gone := *left
			gone.Handle = ours
			return netlink.FilterDel(&gone)
		})
		if done := l.repair(); len(done) != 1 {
			t.Fatalf("repaired is %v", done)
		}
		if err := l.check(e.Key, r.Endpoint); err != nil {
			t.Fatal(err)
		}
	}
	if sent, passed := stop(), w.seen(t); sent == 0 || passed != 0 {
		t.Errorf("of %d packets %d met no hook", sent, passed)
	}
	l.wantHooked(host, "podgate_to_pod by clsact", "podgate_from_pod by clsact", "other by clsact")
}

func TestRepairSweeps(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			l.add(request(l.veth("stays"), "10.0.0.9"))
			before := l.holdings()
			host := l.veth("a")
			r := request(host, "10.0.0.1", "fd00::1")
			r.Attach = kind
			gone, _ := l.add(r)
			// Its interface goes, without a DEL.
			l.unplug(host)
			done := l.repair()
			if len(done) != 1 || done[0].Endpoint != gone.Key || !strings.Contains(done[0].What, "interface is gone") {
				t.Errorf("repaired is %v", done)
			}
			l.wantHoldings(before)
		})
	}
	t.Run("orphans", func(t *testing.T) {
		needTCX(t)
		l := newLab(t)
		l.add(request(l.veth("stays"), "10.0.0.9"))
		before := l.holdings()
		r := request(l.veth("a"), "10.0.0.1")
		r.Attach = pinning.AttachTCX
		orphan, _ := l.add(r)
		// A record that is lost leaves links, a gate and sources.
		endpoints := l.pinned(bpf.DatapathMapEndpoints)
		key := wireKey(orphan.Key)
		if err := endpoints.Delete(&key); err != nil {
			t.Fatal(err)
		}
		done := l.repair()
		if len(done) != 1 || !strings.Contains(done[0].What, "belong to no endpoint") {
			t.Errorf("repaired is %v", done)
		}
		after := l.holdings()
		for _, name := range []string{"links", "gates", bpf.DatapathMapSources} {
			if after[name] != before[name] {
				t.Errorf("%s: %d before, %d after", name, before[name], after[name])
			}
		}
	})
}

// rewrite changes what a map has for one key.
func rewrite[K, V any](l *lab, name string, k K, change func(*V)) {
	l.t.Helper()
	m := l.pinned(name)
	var v V
	if err := m.Lookup(&k, &v); err != nil {
		l.t.Fatal(err)
	}
	change(&v)
	if err := m.Put(&k, &v); err != nil {
		l.t.Fatal(err)
	}
}

func wireKey(k pinning.AttachmentKey) (w bpf.DatapathAttachment) {
	for i, c := range []byte(k.ContainerID) {
		w.ContainerId[i] = int8(c)
	}
	for i, c := range []byte(k.IfName) {
		w.Ifname[i] = int8(c)
	}
	return w
}

// An ADD that died has its record, and maybe no hooks; one that is at it is
// left alone.
func TestRepairAfterADeadAdd(t *testing.T) {
	l := newLab(t)
	host := l.veth("a")
	r := request(host, "10.0.0.1")
	e, _ := l.add(r)
	l.loseHooks(host, e)
	rewrite(l, bpf.DatapathMapEndpoints, wireKey(e.Key), func(v *bpf.DatapathEndpoint) { v.Attach = uint8(pinning.AttachAuto) })
	if done := l.repair(); len(done) != 0 {
		t.Errorf("of an ADD that is at it, repaired is %v", done)
	}
	rewrite(l, bpf.DatapathMapEndpoints, wireKey(e.Key), func(v *bpf.DatapathEndpoint) {
		v.CreatedNs = uint64(time.Now().Add(-time.Hour).UnixNano())
	})
	if done := l.repair(); len(done) != 1 || done[0].Endpoint != e.Key {
		t.Errorf("repaired is %v", done)
	}
	if err := l.check(e.Key, r.Endpoint); err != nil {
		t.Error(err)
	}
	l.judges(e, host, 4, nil)
}

func TestRepairEndsOldClaims(t *testing.T) {
	l := newLab(t)
	k := pinning.AttachmentKey{ContainerID: "never", IfName: "eth0"}
	old, young := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	if err := l.state.Claim(t.Context(), k, []netip.Addr{old, young}); err != nil {
		t.Fatal(err)
	}
	used, _ := l.add(request(l.veth("a"), "10.0.0.3"))
	for _, a := range []netip.Addr{old, used.Addresses[0]} {
		rewrite(l, bpf.DatapathMapClaims, bpf.DatapathAddress{Bytes: a.As16()}, func(v *bpf.DatapathClaim) {
			v.CreatedNs = uint64(time.Now().Add(-time.Hour).UnixNano())
		})
	}
	l.repair()
	if n := l.holdings()[bpf.DatapathMapClaims]; n != 2 {
		t.Errorf("%d claims are left, not those of an endpoint and a young one", n)
	}
	if err := l.check(used.Key, used); err != nil {
		t.Error(err)
	}
}

func TestUpgrade(t *testing.T) {
	for _, kind := range attachKinds(t) {
		t.Run(kind.String(), func(t *testing.T) {
			l := newLab(t)
			host := l.veth("a")
			r := request(host, "10.0.0.1")
			r.Attach = kind
			e, _ := l.add(r)
			l.unplug(l.addGone())
			upgrade := func() (did bool) {
				t.Helper()
				l.do(func() (err error) {
					did, err = l.state.Upgrade(t.Context())
					return err
				})
				return did
			}
			if upgrade() {
				t.Error("the programs are this binary's, and were upgraded")
			}
			l.formerPrograms()
			l.state = l.open()
			// Every hook runs what is pinned, so that Check sees no difference.
			l.repair()
			before := l.ids()
			l.judges(e, host, 200, func() {
				if !upgrade() {
					t.Error("there was an older program, and no upgrade")
				}
			})
			if after := l.ids(); slices.Equal(before, after) {
				t.Error("the pins are the same after the upgrade")
			}
			if err := l.check(e.Key, r.Endpoint); err != nil {
				t.Errorf("after the upgrade: %v", err)
			}
			if upgrade() {
				t.Error("upgraded twice")
			}
			if kind == pinning.AttachTCX {
				l.wantHooked(host, "to_pod by tcx", "from_pod by tcx")
			} else {
				l.wantHooked(host, "podgate_to_pod by clsact", "podgate_from_pod by clsact")
			}
		})
	}
}

// addGone is an endpoint whose interface will be gone when programs change.
func (l *lab) addGone() netlink.Link {
	l.t.Helper()
	host := l.veth("gone")
	l.add(request(host, "10.0.0.2"))
	return host
}

// formerPrograms pins another version of the programs, with another constant,
// as an older binary would have left them.
func (l *lab) formerPrograms() {
	l.t.Helper()
	spec, err := bpf.LoadDatapath()
	if err != nil {
		l.t.Fatal(err)
	}
	replace := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if _, err := os.Stat(l.options.Layout.MapPath(name)); err == nil {
			replace[name] = l.pinned(name)
			spec.Maps[name].MaxEntries = replace[name].MaxEntries()
		}
	}
	for name, value := range map[string]any{
		bpf.DatapathVarGateMask:        replace[bpf.DatapathMapGates].MaxEntries() - 1,
		bpf.DatapathVarFragmentTimeout: uint64(1),
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			l.t.Fatal(err)
		}
	}
	programs, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replace})
	if err != nil {
		l.t.Fatal(err)
	}
	defer programs.Close()
	for name, p := range programs.Programs {
		path := l.options.Layout.ProgramPath(name)
		l.removePin(path)
		if err := p.Pin(path); err != nil {
			l.t.Fatal(err)
		}
	}
}

// Who is in another network namespace than the node sees none of its
// interfaces, which is no reason to take them for gone.
func TestAnotherNetworkNamespace(t *testing.T) {
	l := newLab(t)
	r := request(l.veth("a"), "10.0.0.1")
	e, _ := l.add(r)
	l.formerPrograms()
	l.state = l.open()
	before := l.holdings()
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"Repair":      func() error { _, err := l.state.Repair(ctx); return err },
		"Upgrade":     func() error { _, err := l.state.Upgrade(ctx); return err },
		"SetServices": func() error { return l.state.SetServices(ctx, nil) },
	} {
		if err := call(); !errors.Is(err, pinning.ErrNetNS) {
			t.Errorf("%s elsewhere: %v", name, err)
		}
		l.wantHoldings(before)
		if err := l.Do(call); err != nil {
			t.Errorf("%s at home: %v", name, err)
		}
	}
	if err := l.check(e.Key, r.Endpoint); err != nil {
		t.Error(err)
	}
}
