// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/podgate/podgate/bpf/policy"
)

const namespace = "default"

func labelled(app string) *policy.PodSelector {
	return &policy.PodSelector{
		Namespace: namespace,
		Pods:      policy.Selector{{Key: "app", Operator: policy.In, Values: []string{app}}},
	}
}

func pod(name, app string, local bool, addrs ...netip.Addr) policy.Pod {
	return policy.Pod{
		Key: policy.PodKey(name), UID: name, Namespace: namespace, Name: name,
		Labels: map[string]string{"app": app}, Addresses: addrs, Local: local,
	}
}

// between lets app talk with peers, on every port, and with nobody else.
func between(app string, peers ...policy.Peer) policy.Policy {
	rules := []policy.Rule{{Action: policy.Allow, AnyPort: true, Peers: peers}}
	return policy.Policy{
		UID: app, Kind: "NetworkPolicy", Namespace: namespace, Name: app, Tier: policy.TierNamespace,
		Subject: *labelled(app), Isolates: [2]bool{true, true},
		Rules: [2][]policy.Rule{rules, rules},
	}
}

// cluster is a policy of its own for each of n apps: it may talk with the next
// app and with a block. Each app has one pod on another node and, if it is one
// of the first local, one on this node whose address is not known yet.
func cluster(n, local int) (*policy.Compiler, error) {
	c := policy.NewCompiler()
	c.SetNamespace(policy.Namespace{Name: namespace})
	var errs []error
	for i := range n {
		peers := []policy.Peer{
			{Pods: labelled(app((i + 1) % n))},
			{Block: &policy.Block{CIDR: netip.PrefixFrom(block4(i), 24)}},
			{Block: &policy.Block{CIDR: netip.PrefixFrom(block6(i), 64)}},
		}
		errs = append(errs, c.SetPolicy(between(app(i), peers...)),
			c.SetPod(pod(app(i)+"-remote", app(i), false, remote4(i), remote6(i))))
		if i < local {
			errs = append(errs, c.SetPod(pod(localPod(i), app(i), true)))
		}
	}
	return c, errors.Join(errs...)
}

func app(i int) string      { return fmt.Sprintf("app-%d", i) }
func localPod(i int) string { return app(i) + "-local" }

func low(i int) (byte, byte) { return byte(i >> 8), byte(i) }

// remote4 is the address of app i's pod on another node.
func remote4(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom4([4]byte{10, 1, a, b})
}

func remote6(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: 1, 14: a, 15: b})
}

// local4 is the address of app i's pod on this node.
func local4(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom4([4]byte{10, 2, a, b})
}

func local6(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: 2, 14: a, 15: b})
}

// block4 is the start of the block that app i may talk with.
func block4(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom4([4]byte{172, a, b, 0})
}

func block6(i int) netip.Addr {
	a, b := low(i)
	return netip.AddrFrom16([16]byte{0: 0xfd, 3: 3, 6: a, 7: b})
}
