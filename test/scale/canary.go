// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// canaryEvery is how often a change is made whose effect is waited for.
const canaryEvery = 50 * time.Millisecond

// canaryPatience is how long.
const canaryPatience = 2 * time.Minute

// canaryPort is what canaries may be reached at.
const canaryPort = 7777

// canaries are changes that show at a pod of node 0: the kernel is asked for its
// verdict until it is another one.
type canaries struct {
	w    *world
	n    *node
	at   *pod
	gate gate
	home *app
	// peer may reach the pod where an edited policy says so.
	peer *pod
	took map[string][]time.Duration
}

// newCanaries prepares a pod of node 0 that lets canaries in.
func newCanaries(w *world, n *node) (*canaries, error) {
	local := w.local()
	slices.SortFunc(local, func(a, b *pod) int { return a.number - b.number })
	c := &canaries{w: w, n: n, at: local[0], took: make(map[string][]time.Duration)}
	c.gate = n.gates[c.at]
	space := &namespace{number: len(w.namespaces), name: "canary", team: "canaries"}
	c.home = &app{namespace: space, name: "canary", pods: make(map[*pod]struct{})}
	c.peer = w.newPod(c.home)
	c.peer.label, c.peer.node = "peer", 1
	w.start(c.peer)
	for path, o := range map[string]func() error{
		"namespace": func() error { return w.server.put(namespacesPath, namespaceOf(space)) },
		"peer":      func() error { return w.server.put(podsPath, podOf(c.peer)) },
		"policy":    func() error { return w.server.put(policiesPath, c.policy("canaries", "yes", canaryPort)) },
	} {
		if err := o(); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return c, nil
}

// policy lets canaries with a label in at a port.
func (c *canaries) policy(name, label string, port int32) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: c.at.app.namespace.name, Name: name, UID: types.UID("policy-" + name)},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": c.at.app.name}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				From: []networkingv1.NetworkPolicyPeer{{
					NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "canary"}},
					PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"canary": label}},
				}},
				Ports: []networkingv1.NetworkPolicyPort{{Protocol: ptr.To(corev1.ProtocolTCP), Port: ptr.To(intstr.FromInt32(port))}},
			}},
		},
	}
}

// allowed is the kernel's verdict.
func (c *canaries) allowed(ctx context.Context, peer netip.Addr, port uint16) (bool, error) {
	a, err := c.n.state.Probe(ctx, pinning.ProbeRequest{
		Gate: c.gate.number, Direction: policy.Ingress, Local: c.gate.address, Peer: peer, Protocol: policy.TCP, Port: port,
	})
	return a.Verdict == bpf.DatapathVerdictVERDICT_ALLOWED, err
}

// watch makes a change and waits for its effect.
func (c *canaries) watch(ctx context.Context, what string, peer netip.Addr, port uint16, want bool, change func() error) error {
	if is, err := c.allowed(ctx, peer, port); err != nil || is == want {
		return fmt.Errorf("%s: allowed is %t before: %w", what, is, err)
	}
	if err := change(); err != nil {
		return err
	}
	began := time.Now()
	for {
		is, err := c.allowed(ctx, peer, port)
		took := time.Since(began)
		switch {
		case err != nil:
			return err
		case is == want:
			c.took[what] = append(c.took[what], took)
			return nil
		case took > canaryPatience:
			return fmt.Errorf("%s: no effect within %v", what, canaryPatience)
		case ctx.Err() != nil:
			return ctx.Err()
		}
		time.Sleep(100 * time.Microsecond)
	}
}

// settle waits until the daemon has caught up with what was before.
func (c *canaries) settle(ctx context.Context) error {
	name, port := "settled", uint16(9999)
	err := c.watch(ctx, name, c.peer.address, port, true, func() error {
		return c.w.server.put(policiesPath, c.policy(name, "peer", int32(port)))
	})
	clear(c.took)
	return err
}

// run makes changes until ctx is done.
func (c *canaries) run(ctx context.Context) error {
	tick := time.NewTicker(canaryEvery)
	defer tick.Stop()
	next := func() bool {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
			return true
		}
	}
	for round := 0; ctx.Err() == nil; round++ {
		var p *pod
		put := func() error { return c.w.server.put(podsPath, podOf(p)) }
		port := uint16(10_000 + round%1000)
		name := fmt.Sprintf("edited-%d", round)
		p = &pod{app: c.home, number: 1<<24 + round, node: 1, label: "yes", ready: true}
		p.address = netip.AddrFrom4([4]byte{10, 255, byte(round >> 8), byte(round)})
		for _, one := range []struct {
			what   string
			peer   netip.Addr
			port   uint16
			want   bool
			change func() error
		}{
			{"pod started", p.address, canaryPort, true, put},
			{"pod relabelled", p.address, canaryPort, false, func() error { p.label = "no"; return put() }},
			{"policy added", c.peer.address, port, true, func() error {
				return c.w.server.put(policiesPath, c.policy(name, "peer", int32(port)))
			}},
			{"pod relabelled", p.address, canaryPort, true, func() error { p.label = "yes"; return put() }},
			{"policy deleted", c.peer.address, port, false, func() error {
				return c.w.server.remove(policiesPath, c.policy(name, "peer", int32(port)))
			}},
			{"pod deleted", p.address, canaryPort, false, func() error { return c.w.server.remove(podsPath, podOf(p)) }},
		} {
			if !next() {
				return nil
			}
			if err := c.watch(context.WithoutCancel(ctx), one.what, one.peer, one.port, one.want, one.change); err != nil {
				return err
			}
		}
	}
	return nil
}
