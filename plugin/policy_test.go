// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/test/netlab"
)

// onlyFriends publishes a policy as the daemon would: the server takes
// connections from the friend and from nobody else.
func (l *lab) onlyFriends() {
	l.t.Helper()
	compiler := policy.NewCompiler()
	compiler.SetNamespace(policy.Namespace{Name: "default"})
	labelled := func(v string) policy.Selector {
		return policy.Selector{{Key: "app", Operator: policy.In, Values: []string{v}}}
	}
	var errs []error
	for _, e := range l.endpoints() {
		errs = append(errs, compiler.SetPod(policy.Pod{
			Key: policy.PodKey(e.PodUID), UID: e.PodUID, Namespace: e.PodNamespace, Name: e.PodName,
			Labels: map[string]string{"app": e.PodName}, Addresses: e.Addresses, Local: true,
		}))
	}
	errs = append(errs, compiler.SetPolicy(policy.Policy{
		UID: "p", Kind: "NetworkPolicy", Namespace: "default", Name: "only-friends", Tier: policy.TierNamespace,
		Subject:  policy.PodSelector{Namespace: "default", Pods: labelled("server")},
		Isolates: [2]bool{policy.Ingress: true},
		Rules: [2][]policy.Rule{policy.Ingress: {{
			Action: policy.Allow, AnyPort: true,
			Peers: []policy.Peer{{Pods: &policy.PodSelector{Namespace: "default", Pods: labelled("friend")}}},
		}}},
	}))
	_, err := l.state().Apply(l.t.Context(), compiler.Compile())
	if err := errors.Join(append(errs, err)...); err != nil {
		l.t.Fatal(err)
	}
}

// isolate publishes, for a pod that does not exist yet, a policy that isolates
// it.
func (l *lab) isolate(uid string) {
	l.t.Helper()
	compiler := policy.NewCompiler()
	compiler.SetNamespace(policy.Namespace{Name: "default"})
	err := errors.Join(
		compiler.SetPod(policy.Pod{Key: policy.PodKey(uid), UID: uid, Namespace: "default", Name: "web", Local: true}),
		compiler.SetPolicy(policy.Policy{
			UID: "p", Kind: "NetworkPolicy", Namespace: "default", Name: "isolate", Tier: policy.TierNamespace,
			Subject:  policy.PodSelector{Namespace: "default"},
			Isolates: [2]bool{policy.Ingress: true},
		}))
	if err != nil {
		l.t.Fatal(err)
	}
	if _, err := l.state().Apply(l.t.Context(), compiler.Compile()); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) enforcement(p *netlab.Pod) string {
	l.t.Helper()
	_, e, err := l.state().Endpoint(key(p))
	if err != nil {
		l.t.Fatal(err)
	}
	return e.State()
}

// The pod's first packet meets its policy when that was published before ADD.
func TestPolicyKnownBeforeAdd(t *testing.T) {
	l := newLab(t)
	list := chain("1.1.0", l.Bridge("br0", "10.94.0.0/24"), l.Podgate().With(netlab.Plugin{"mode": "open"}))
	stranger, _ := l.add(list, netlab.PodSpec{Namespace: "default", Name: "stranger", UID: "u-0"})
	l.isolate("u-1")
	p, _ := l.add(list, netlab.PodSpec{Namespace: "default", Name: "web", UID: "u-1"})
	if s := l.enforcement(p); s != "enforcing" {
		t.Errorf("gate of the pod with a policy is %s", s)
	}
	if s := l.enforcement(stranger); s != "open" {
		t.Errorf("gate of the pod without a policy is %s", s)
	}
}

func TestWaitForPolicy(t *testing.T) {
	l := newLab(t)
	list := chain("1.1.0", l.Bridge("br0", "10.95.0.0/24"), l.Podgate().With(netlab.Plugin{"waitForPolicy": "1m"}))
	p := l.pod(netlab.PodSpec{Namespace: "default", Name: "web", UID: "u-1"})
	added := make(chan error, 1)
	go func() {
		_, err := l.Add(t.Context(), list, p)
		added <- err
	}()
	for len(l.endpoints()) == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	state := l.state()
	for {
		// The record is there before the gate is.
		_, e, err := state.Endpoint(key(p))
		if err == nil {
			if e.State() != "closed" {
				t.Errorf("gate is %s while ADD waits", e.State())
			}
			break
		}
		if !errors.Is(err, pinning.ErrDiffers) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	select {
	case err := <-added:
		t.Fatalf("ADD did not wait: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	l.isolate("u-1")
	if err := <-added; err != nil {
		t.Fatal(err)
	}
	if s := l.enforcement(p); s != "enforcing" {
		t.Errorf("gate is %s", s)
	}
	if err := l.Del(t.Context(), list, p); err != nil {
		t.Error(err)
	}
}
