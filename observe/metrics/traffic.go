// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

// Package metrics counts traffic for Prometheus: from events what only they
// tell, and from the kernel's own counters what has to be exact.
package metrics

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/naming"
)

// other stands for the names of what there was no room for.
const other = "other"

// Traffic counts events; a [prometheus.Collector]. Once there are as many series
// as allowed, what would be another one is counted under the name "other".
type Traffic struct {
	limit int

	mu     sync.Mutex
	series map[series]uint64
	lost   uint64
}

// series is what the events counted together have in common.
type series struct {
	verdict, direction, reason string
	local, peer                workload
	policy                     string
}

// workload is an end of flows.
type workload struct{ namespace, kind, name string }

var (
	flowsDesc = prometheus.NewDesc("podgate_flows_total",
		"New flows and refused packets that the datapath told of, by the pod that they were judged at and its peer; equal drops within a tick of the kernel's timer are one.",
		[]string{"verdict", "direction", "reason", "namespace", "workload_kind", "workload", "peer_namespace", "peer_kind", "peer", "policy"}, nil)
	lostDesc = prometheus.NewDesc("podgate_events_lost_total",
		"Events that found no room in the kernel's ring. Verdicts do not depend on it.", nil, nil)
)

// NewTraffic counts in so many series at most.
func NewTraffic(limit int) *Traffic {
	return &Traffic{limit: limit, series: make(map[series]uint64)}
}

// Saw counts records.
func (t *Traffic) Saw(records []history.Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range records {
		r := &records[i]
		if r.Lost > 0 {
			t.lost += r.Lost
			continue
		}
		s := series{
			verdict: r.Event.Verdict.String(), direction: r.Event.Direction.String(), reason: r.Event.Reason.String(),
			local: workloadOf(r.Local), peer: workloadOf(r.Peer),
		}
		if r.Rule != nil {
			s.policy = r.Rule.Policy.Namespace + "/" + r.Rule.Policy.Name
		}
		if _, ok := t.series[s]; !ok && len(t.series) >= t.limit {
			s.local, s.peer, s.policy = workload{name: other}, workload{name: other}, other
		}
		t.series[s]++
	}
}

// workloadOf names what a party belongs to: its workload, itself, or what kind
// of address it is.
func workloadOf(p *naming.Party) workload {
	switch {
	case p.Workload.Name != "":
		return workload{p.Namespace, p.Workload.Kind, p.Workload.Name}
	case p.Pod != "":
		return workload{p.Namespace, "Pod", p.Pod}
	default:
		return workload{name: p.Reserved}
	}
}

// Describe implements [prometheus.Collector].
func (t *Traffic) Describe(ch chan<- *prometheus.Desc) {
	ch <- flowsDesc
	ch <- lostDesc
}

// Collect implements [prometheus.Collector].
func (t *Traffic) Collect(ch chan<- prometheus.Metric) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s, n := range t.series {
		ch <- prometheus.MustNewConstMetric(flowsDesc, prometheus.CounterValue, float64(n),
			s.verdict, s.direction, s.reason, s.local.namespace, s.local.kind, s.local.name,
			s.peer.namespace, s.peer.kind, s.peer.name, s.policy)
	}
	ch <- prometheus.MustNewConstMetric(lostDesc, prometheus.CounterValue, float64(t.lost))
}
