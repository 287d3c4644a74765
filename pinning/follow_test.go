// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package pinning_test

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

func TestWaitForPolicy(t *testing.T) {
	l := newLab(t)
	r := request(l.veth("web"), webAddr)
	r.Wait = 30 * time.Millisecond
	start := time.Now()
	_, enforced := l.add(r)
	if took := time.Since(start); enforced.State() != "closed" || took < r.Wait {
		t.Errorf("with nobody to publish it is %s after %s", enforced.State(), took)
	}
	r.Wait = time.Minute
	daemon, applied := l.open(), make(chan struct{})
	go func() {
		defer close(applied)
		time.Sleep(50 * time.Millisecond)
		if done, err := daemon.Apply(t.Context(), town(t).Compile()); err != nil || len(done.Problems) != 0 {
			t.Errorf("apply: %+v, %v", done, err)
		}
	}()
	web, enforced := l.add(r)
	if took := time.Since(start); enforced.State() != "enforcing" || took > 30*time.Second {
		t.Errorf("once published it is %s after %s", enforced.State(), took)
	}
	<-applied
	l.wantWeb(web, byPolicy, byDefault)
}

func TestBind(t *testing.T) {
	l := newLab(t)
	apply(t, l.state, town(t).Compile())
	r := request(l.veth("a"), webAddr)
	r.PodUID, r.PodNamespace, r.PodName = "", "", ""
	e, enforced := l.add(r)
	if e.Pod != "c-a" || enforced.State() != "closed" {
		t.Errorf("a container without a pod follows %q and is %s", e.Pod, enforced.State())
	}
	if err := l.state.Bind(t.Context(), r.Key, "uid-web"); err != nil {
		t.Fatal(err)
	}
	if e, enforced, err := l.state.Endpoint(r.Key); err != nil || e.Pod != "uid-web" || enforced.State() != "enforcing" {
		t.Errorf("bound it follows %q and is %s, %v", e.Pod, enforced.State(), err)
	}
	l.wantWeb(e, byPolicy, byDefault)
	never := pinning.AttachmentKey{ContainerID: "never", IfName: "eth0"}
	if err := l.state.Bind(t.Context(), never, "uid-web"); !errors.Is(err, pinning.ErrNotFound) {
		t.Errorf("Bind of what is not there: %v", err)
	}
	// To a pod that nobody has published yet; its policy comes with an update.
	c := town(t)
	c.Compile()
	if err := l.state.Bind(t.Context(), r.Key, "uid-late"); err != nil {
		t.Fatal(err)
	}
	setPod(t, c, townPod("late", ""))
	setPolicy(t, c, allow("late", "late", "stranger", 80))
	apply(t, l.state, c.Compile())
	l.wantWeb(e, byDefault, byPolicy)
}

// A pod's address is known to nobody before ADD; its class is.
func TestAddClassifiesAddresses(t *testing.T) {
	l := newLab(t)
	c := town(t)
	setPod(t, c, townPod("client", ""))
	block := allow("blocks", "web", "nobody", 1)
	block.Rules[policy.Ingress][0] = policy.Rule{
		Action: policy.Allow, Ports: []policy.Port{{Protocol: policy.TCP, First: 443, Last: 443}},
		Peers: []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix("10.9.0.0/16")}}},
	}
	setPolicy(t, c, block)
	apply(t, l.state, c.Compile())
	web, _ := l.add(request(l.veth("web"), webAddr))
	verdicts := func(address string, at80, at443 bpf.DatapathReason) {
		t.Helper()
		for port, want := range map[uint16]bpf.DatapathReason{80: at80, 443: at443} {
			if a := l.probe(web.Gate, policy.Ingress, webAddr, address, port); a.Reason != want {
				t.Errorf("from %s to port %d: %+v, not reason %d", address, port, a, want)
			}
		}
	}
	verdicts("10.0.0.50", byDefault, byDefault)
	verdicts("10.9.0.50", byDefault, byPolicy)
	client, _ := l.add(request(l.veth("client"), "10.0.0.50", "10.9.0.50"))
	verdicts("10.0.0.50", byPolicy, byDefault)
	verdicts("10.9.0.50", byPolicy, byPolicy)
	l.delete(client.Key)
	verdicts("10.0.0.50", byDefault, byDefault)
	verdicts("10.9.0.50", byDefault, byPolicy)
	// The next owner is somebody else.
	l.add(request(l.link("client"), "10.0.0.50"))
	l.add(request(l.veth("stranger"), "10.0.0.50"))
	verdicts("10.0.0.50", byDefault, byDefault)
}

func TestNodeAddresses(t *testing.T) {
	l := newLab(t)
	c := town(t)
	p := allow("egress", "web", "client", 80)
	p.Isolates, p.Rules = [2]bool{policy.Egress: true}, [2][]policy.Rule{policy.Egress: p.Rules[policy.Ingress]}
	setPolicy(t, c, p)
	apply(t, l.state, c.Compile())
	web, _ := l.add(request(l.veth("web"), webAddr))
	want := func(address string, reason bpf.DatapathReason) {
		t.Helper()
		if a := l.probe(web.Gate, policy.Egress, webAddr, address, 9); a.Reason != reason {
			t.Errorf("to %s: %+v, not reason %d", address, a, reason)
		}
	}
	set := func(addresses ...string) {
		t.Helper()
		var list []netip.Addr
		for _, a := range addresses {
			list = append(list, netip.MustParseAddr(a))
		}
		if err := l.state.SetNodeAddresses(t.Context(), list); err != nil {
			t.Fatal(err)
		}
	}
	const first, second = "192.0.2.1", "192.0.2.2"
	want(first, byDefault)
	set(first, second)
	want(first, bpf.DatapathReasonREASON_NODE)
	want(second, bpf.DatapathReasonREASON_NODE)
	apply(t, l.state, c.Compile())
	set(second)
	want(first, byDefault)
	want(second, bpf.DatapathReasonREASON_NODE)
	// A restarted daemon's full update leaves them alone.
	l.state = l.open()
	apply(t, l.state, c.Snapshot())
	want(first, byDefault)
	want(second, bpf.DatapathReasonREASON_NODE)
	set()
	want(second, byDefault)
}

func TestModeHoldsUntilPolicyIsKnown(t *testing.T) {
	l := newLab(t)
	r := request(l.veth("web"), webAddr)
	r.Mode = pinning.ModeOpen
	web, _ := l.add(r)
	l.wantWeb(web, byOpen, byOpen)
	c := town(t)
	done, err := l.state.Apply(t.Context(), c.Compile())
	if err != nil || done.Gates != 1 {
		t.Errorf("applied is %+v, %v", done, err)
	}
	l.wantWeb(web, byPolicy, byDefault)
	// The pod's object goes first; its endpoint stays as it is.
	c.DeletePod("uid-web")
	apply(t, l.state, c.Compile())
	l.wantWeb(web, byPolicy, byDefault)
}

func TestWatch(t *testing.T) {
	l := newLab(t)
	plugin := l.open()
	host, second := l.veth("a"), l.veth("b")
	var fired <-chan struct{}
	l.do(func() (err error) {
		fired, err = l.state.Watch(t.Context())
		return err
	})
	within := func(what string, f func() error) {
		t.Helper()
		for drained := false; !drained; {
			select {
			case <-fired:
			case <-time.After(20 * time.Millisecond):
				drained = true
			}
		}
		l.do(f)
		select {
		case <-fired:
		case <-time.After(10 * time.Second):
			t.Errorf("%s went unnoticed", what)
		}
	}
	add := func(r pinning.AddRequest) func() error {
		return func() error { _, _, err := plugin.Add(t.Context(), r); return err }
	}
	first := request(host, "10.0.0.1")
	within("ADD", add(first))
	within("another ADD", add(request(second, "10.0.0.2")))
	within("DEL", func() error { return plugin.Delete(t.Context(), first.Key) })
	within("a lost hook", func() error { l.loseQdisc(second, pinning.Endpoint{Attach: pinning.AttachClsact}); return nil })
	within("GC", func() error { _, err := plugin.GC(t.Context(), "net", nil); return err })
	within("a lost interface", func() error { l.unplug(second); return nil })
}

func TestPrivate(t *testing.T) {
	l := newLab(t)
	addresses := []netip.Addr{netip.MustParseAddr(webAddr)}
	if _, err := l.state.PrivateGate("uid-web", addresses); !errors.Is(err, pinning.ErrInvalid) {
		t.Errorf("a private gate of a pinned instance: %v", err)
	}
	s, err := pinning.NewPrivate(t.Context(), pinning.Options{Capacity: small})
	if err != nil {
		t.Fatal(err)
	}
	l.closing(s)
	l.state = s
	c := town(t)
	apply(t, s, c.Compile())
	gate, err := s.PrivateGate("uid-web", addresses)
	if err != nil {
		t.Fatal(err)
	}
	web := pinning.Endpoint{Gate: gate}
	l.wantWeb(web, byPolicy, byDefault)
	setPolicy(t, c, allow("policy", "web", "stranger", 80))
	apply(t, s, c.Compile())
	l.wantWeb(web, byDefault, byPolicy)
}
