// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package metrics_test

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/metrics"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/syncd/manifest"
)

func denied(pod string) history.Record {
	return history.Record{
		Event: flow.Flow{Verdict: flow.Denied, Reason: 2, Direction: policy.Ingress},
		Names: naming.Names{
			Local: &naming.Party{Namespace: "shop", Pod: pod, Workload: manifest.Workload{Kind: "Deployment", Name: pod}},
			Peer:  naming.World(),
			Rule:  &naming.Rule{Policy: policy.PolicyInfo{Kind: "NetworkPolicy", Namespace: "shop", Name: "p"}},
		},
	}
}

func TestTraffic(t *testing.T) {
	m := metrics.NewTraffic(2)
	m.Saw([]history.Record{denied("a"), denied("a"), {Lost: 5}, denied("b"), denied("c"), denied("d"), denied("a")})
	const want = `
# HELP podgate_events_lost_total Events that found no room in the kernel's ring. Verdicts do not depend on it.
# TYPE podgate_events_lost_total counter
podgate_events_lost_total 5
# HELP podgate_flows_total New flows and refused packets that the datapath told of, by the pod that they were judged at and its peer; equal drops within a tick of the kernel's timer are one.
# TYPE podgate_flows_total counter
podgate_flows_total{direction="ingress",namespace="shop",peer="world",peer_kind="",peer_namespace="",policy="shop/p",reason="default",verdict="denied",workload="a",workload_kind="Deployment"} 3
podgate_flows_total{direction="ingress",namespace="shop",peer="world",peer_kind="",peer_namespace="",policy="shop/p",reason="default",verdict="denied",workload="b",workload_kind="Deployment"} 1
podgate_flows_total{direction="ingress",namespace="",peer="other",peer_kind="",peer_namespace="",policy="other",reason="default",verdict="denied",workload="other",workload_kind=""} 2
`
	if err := testutil.CollectAndCompare(m, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	problems, err := testutil.CollectAndLint(m)
	if err != nil || len(problems) > 0 {
		t.Errorf("promtool would say %v, %v", problems, err)
	}
}
