// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bpf_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/podgate/podgate/bpf/policy"
)

// audit switches audit mode of the pod with the next update.
func (l *lab) audit(on bool) {
	l.t.Helper()
	err := l.compiler.SetPod(policy.Pod{
		Key: podUID, UID: string(podUID), Namespace: "ns", Name: "pod", Labels: map[string]string{"name": "pod"},
		Addresses: []netip.Addr{pod.v4, pod.v6}, Local: true, Audit: on,
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

func TestAuditEnds(t *testing.T) {
	l := newLab(t)
	l.audit(true)
	l.enforce(oneWay())
	l.gate()
	l.talk("audited", friend, false, []step{
		{sends, tcp6, tcp(40000, 81, syn), "audit default", nil},
		{receives, tcp6, tcp(81, 40000, syn|ack), "pass", nil},
		{sends, tcp6, tcp(40000, 80, syn), "pass policy", nil},
		{receives, tcp6, tcp(40002, 90, syn), "audit default", nil},
	})
	l.audit(false)
	l.apply()
	l.talk("enforced", friend, false, []step{
		{sends, tcp6, tcp(40000, 81, ack), "drop default", nil},
		{receives, tcp6, tcp(81, 40000, ack), "drop default", nil},
		{sends, tcp6, tcp(40000, 80, ack), "pass", nil},
		{receives, tcp6, tcp(40002, 90, ack), "drop default", nil},
	})
}

// An open flow that policy would end now is told of once, whoever speaks first.
func TestAuditOfOpenFlows(t *testing.T) {
	const p, q = 40000, 80
	denied := oneWay()
	denied.Rules[policy.Egress] = nil
	out, in := tcp(p, q, ack), tcp(q, p, ack)
	for name, first := range map[string]policy.Direction{"the pod": sends, "the peer": receives} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.audit(true)
			l.enforce(oneWay())
			l.gate()
			one, other := step{sends, tcp6, out, "audit default", nil}, step{receives, tcp6, in, "pass", nil}
			if first == receives {
				one, other = step{receives, tcp6, in, "audit default", nil}, step{sends, tcp6, out, "pass", nil}
			}
			again := one
			again.want = "pass"
			for _, v6 := range []bool{false, true} {
				l.talk("open", friend, v6, []step{
					{sends, tcp6, tcp(p, q, syn), "pass policy", nil},
					{receives, tcp6, tcp(q, p, syn|ack), "pass", nil},
				})
			}
			for round := range 2 {
				l.enforce(denied)
				for _, v6 := range []bool{false, true} {
					l.talk(fmt.Sprintf("round %d, denied", round), friend, v6, []step{one, other, again})
				}
				// Still denied, by a policy that is another.
				more := denied
				more.Rules[policy.Ingress] = oneWay().Rules[policy.Egress][:1]
				l.enforce(more)
				l.talk(fmt.Sprintf("round %d, still denied", round), friend, false, []step{again, other})
				l.enforce(oneWay())
				l.talk(fmt.Sprintf("round %d, allowed", round), friend, false, []step{again, other})
				l.talk(fmt.Sprintf("round %d, allowed", round), friend, true, []step{again, other})
			}
		})
	}
}
