// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"net/netip"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/pinning"
)

// A connection that was open before the gate is judged by who opened it, not by
// whose packet comes first.
func TestAdoptedConnections(t *testing.T) {
	const p, q = 40000, 80
	for name, test := range map[string]struct {
		peer   host
		policy policy.Policy
		opened policy.Direction
		// ports of the pod and of the peer
		local, remote uint16
		want          string
	}{
		"the pod's own, no rule for ingress":   {friend, oneWay(), policy.Egress, p, q, "pass"},
		"the pod's own, denied by now":         {foe, oneWay(), policy.Egress, p, q, "drop default"},
		"the peer's":                           {friend, isolation(), policy.Ingress, q, p, "pass"},
		"the peer's, no rule for ingress":      {friend, oneWay(), policy.Ingress, q, p, "drop default"},
		"the peer's, to a port without a rule": {friend, isolation(), policy.Ingress, q + 1, p, "drop default"},
		"the pod's own, to one without a rule": {friend, isolation(), policy.Egress, p, q + 1, "drop default"},
	} {
		for _, v6 := range []bool{false, true} {
			for by, who := range map[policy.Direction]string{sends: "the pod sends", receives: "the peer sends"} {
				t.Run(name+", "+who+map[bool]string{true: " over IPv6"}[v6], func(t *testing.T) {
					l := newLab(t)
					l.enforce(test.policy)
					l.gate()
					local, peer := pod.v4, test.peer.v4
					if v6 {
						local, peer = pod.v6, test.peer.v6
					}
					if err := l.state.Adopt(l.endpoint.Key, []pinning.OpenFlow{{
						Opened: test.opened, Local: netip.AddrPortFrom(local, test.local), Peer: netip.AddrPortFrom(peer, test.remote),
					}}); err != nil {
						t.Fatal(err)
					}
					segment := tcp(test.local, test.remote, ack)
					if by == receives {
						segment = tcp(test.remote, test.local, ack)
					}
					l.talk(name, test.peer, v6, []step{{by: by, protocol: tcp6, payload: segment, want: test.want}})
				})
			}
		}
	}
}
