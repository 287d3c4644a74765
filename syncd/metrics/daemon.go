// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podgate/podgate/pinning"
	"github.com/podgate/podgate/syncd/status"
)

// Daemon is what the sync daemon tells of itself; a [prometheus.Collector].
type Daemon struct {
	mu        sync.Mutex // a scrape sees all of a report or none
	applies   *prometheus.CounterVec
	duration  prometheus.Histogram
	repairs   prometheus.Counter
	revisions *prometheus.CounterVec
	synced    prometheus.Gauge
	problems  *prometheus.GaugeVec
	inventory *prometheus.GaugeVec
	endpoints *prometheus.GaugeVec
	used      *prometheus.GaugeVec
	capacity  *prometheus.GaugeVec
}

// NewDaemon are metrics of a daemon that has not begun.
func NewDaemon() *Daemon {
	const namespace, subsystem = "podgate", "sync"
	gauge := func(subsystem, name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}, labels)
	}
	m := &Daemon{
		applies: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "applies_total",
			Help: "Updates of the kernel's state, by result (ok, error).",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "apply_duration_seconds",
			Help:    "Time an update of the kernel's state took.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}),
		repairs: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "repairs_total",
			Help: "Attachments, pins and records that had been lost or left behind and were put right.",
		}),
		revisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "revisions_total",
			Help: "Revisions of the source, by how far they came (received, applied); one that another overtakes is applied with it.",
		}, []string{"step"}),
		synced: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "last_success_timestamp_seconds",
			Help: "When the kernel last had everything the daemon knew; follows the time while all is well.",
		}),
		problems:  gauge(subsystem, "problems", "Standing problems, by the file, policy, pod or part they concern; podgate status has the reasons.", "subject"),
		inventory: gauge(subsystem, "objects", "What the daemon knows, by kind (policy, pod, namespace, endpoint).", "kind"),
		endpoints: gauge("", "endpoints", "Endpoints of the node, by state (closed, open, enforcing).", "state"),
		used:      gauge("", "map_entries", "Entries of a kernel map.", "map"),
		capacity:  gauge("", "map_max_entries", "Most entries of a kernel map.", "map"),
	}
	for _, result := range []string{"ok", "error"} {
		m.applies.WithLabelValues(result)
	}
	for _, step := range []string{"received", "applied"} {
		m.revisions.WithLabelValues(step)
	}
	return m
}

func (m *Daemon) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.applies, m.duration, m.repairs, m.revisions, m.synced, m.problems, m.inventory, m.endpoints, m.used, m.capacity}
}

// Describe implements [prometheus.Collector].
func (m *Daemon) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors() {
		c.Describe(ch)
	}
}

// Collect implements [prometheus.Collector].
func (m *Daemon) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.collectors() {
		c.Collect(ch)
	}
}

// Applied counts an update of the kernel's state.
func (m *Daemon) Applied(took time.Duration, ok bool) {
	result := "ok"
	if !ok {
		result = "error"
	}
	m.applies.WithLabelValues(result).Inc()
	m.duration.Observe(took.Seconds())
}

// Repaired counts what was put right.
func (m *Daemon) Repaired(n int) { m.repairs.Add(float64(n)) }

// RevisionReceived counts a revision of the source.
func (m *Daemon) RevisionReceived() { m.revisions.WithLabelValues("received").Inc() }

// RevisionsApplied counts revisions that the kernel has now.
func (m *Daemon) RevisionsApplied(n int) { m.revisions.WithLabelValues("applied").Add(float64(n)) }

// Report replaces how the daemon is; endpoints counts them by state, and maps
// may be nil for as they were.
func (m *Daemon) Report(s status.Status, endpoints map[string]int, maps []pinning.MapUsage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !s.Synced.IsZero() {
		m.synced.Set(float64(s.Synced.UnixMilli()) / 1000)
	}
	m.problems.Reset()
	for _, p := range s.Problems {
		m.problems.WithLabelValues(p.Subject).Inc()
	}
	for kind, n := range map[string]int{"policy": s.Policies, "pod": s.Pods, "namespace": s.Namespaces, "endpoint": s.Endpoints} {
		m.inventory.WithLabelValues(kind).Set(float64(n))
	}
	for _, state := range []string{"closed", "open", "enforcing"} {
		m.endpoints.WithLabelValues(state).Set(float64(endpoints[state]))
	}
	for _, u := range maps {
		if u.Used >= 0 {
			m.used.WithLabelValues(u.Name).Set(float64(u.Used))
			m.capacity.WithLabelValues(u.Name).Set(float64(u.Max))
		}
	}
}
