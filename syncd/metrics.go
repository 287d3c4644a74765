// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package syncd

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/podgate/podgate/syncd/status"
)

// Metrics of the daemon; a [prometheus.Collector].
type Metrics struct {
	mu        sync.Mutex // a scrape sees all problems of a report or none
	applies   *prometheus.CounterVec
	duration  prometheus.Histogram
	repairs   prometheus.Counter
	synced    prometheus.Gauge
	problems  *prometheus.GaugeVec
	inventory *prometheus.GaugeVec
}

// NewMetrics are metrics of a daemon that has not begun.
func NewMetrics() *Metrics {
	const namespace, subsystem = "podgate", "sync"
	m := &Metrics{
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
		synced: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "last_success_timestamp_seconds",
			Help: "When the kernel last had everything the daemon knew; follows the time while all is well.",
		}),
		problems: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "problems",
			Help: "Standing problems, by the file, policy, pod or part they concern; podgate status has the reasons.",
		}, []string{"subject"}),
		inventory: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "objects",
			Help: "What the daemon knows, by kind (policy, pod, namespace, endpoint).",
		}, []string{"kind"}),
	}
	m.applies.WithLabelValues("ok")
	m.applies.WithLabelValues("error")
	return m
}

func (m *Metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.applies, m.duration, m.repairs, m.synced, m.problems, m.inventory}
}

// Describe implements [prometheus.Collector].
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range m.collectors() {
		c.Describe(ch)
	}
}

// Collect implements [prometheus.Collector].
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.collectors() {
		c.Collect(ch)
	}
}

func (m *Metrics) applied(took time.Duration, ok bool) {
	result := "ok"
	if !ok {
		result = "error"
	}
	m.applies.WithLabelValues(result).Inc()
	m.duration.Observe(took.Seconds())
}

func (m *Metrics) repaired(n int) { m.repairs.Add(float64(n)) }

func (m *Metrics) reported(s status.Status) {
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
}
