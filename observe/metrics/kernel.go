// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/pinning"
)

// State is what [Kernel] reads of the pinned maps; a [pinning.State].
type State interface {
	Endpoints() iter.Seq2[pinning.Endpoint, error]
	Counters(gate uint32) (pinning.EndpointCounters, error)
	DropCounters() ([]pinning.DropCounter, error)
	Rules() iter.Seq2[pinning.Rule, error]
	ScanFlows(took func(pinning.FlowEntry)) error
	Close() error
}

// Kernel tells what the kernel counts, each packet of it; a
// [prometheus.Collector]. The maps are opened for each scrape, since another
// instance may have taken their place.
type Kernel struct {
	open  func(context.Context) (State, error)
	names *naming.Table
	limit int

	mu    sync.Mutex
	tcp   *prometheus.HistogramVec
	reset *prometheus.CounterVec
	// scanned is up to when flows were looked at, by CLOCK_MONOTONIC.
	scanned time.Duration
	resets  map[connection]struct{}
	known   map[workload]struct{}
}

// connection is one flow, among all that ever had its key.
type connection struct {
	endpoint    uint32
	local, peer uint16
	created     time.Duration
}

var (
	endpointLabels = []string{"namespace", "workload_kind", "workload", "direction", "verdict"}
	packetsDesc    = prometheus.NewDesc("podgate_packets_total",
		"Packets of the pods of this node, by direction as the pod sees it, and verdict (allowed, denied).", endpointLabels, nil)
	bytesDesc = prometheus.NewDesc("podgate_bytes_total", "Bytes of these packets.", endpointLabels, nil)

	dropLabels  = []string{"reason", "direction"}
	dropsDesc   = prometheus.NewDesc("podgate_dropped_packets_total", "Packets dropped, by reason.", dropLabels, nil)
	droppedDesc = prometheus.NewDesc("podgate_dropped_bytes_total", "Bytes of packets dropped, by reason.", dropLabels, nil)

	policyDesc = prometheus.NewDesc("podgate_policy_packets_total",
		"Packets that a policy decided on, by what its rules did (allow, deny); what its isolation denied counts for one of the policies that isolate.",
		[]string{"kind", "namespace", "policy", "direction", "action"}, nil)
	failedDesc = prometheus.NewDesc("podgate_observe_up", "1 if the kernel's maps could be read for this scrape.", nil, nil)
)

// NewKernel reads what open opens, and names it by a table.
func NewKernel(open func(context.Context) (State, error), names *naming.Table, limit int) *Kernel {
	labels := []string{"namespace", "workload_kind", "workload", "direction"}
	return &Kernel{
		open: open, names: names, limit: limit,
		resets: make(map[connection]struct{}), known: make(map[workload]struct{}),
		tcp: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "podgate_tcp_handshake_seconds",
			Help: "Round-trip time of TCP handshakes as the pod's interface saw it: how long its peer took to answer for egress, the pod for ingress.",
			// From 16 us, which is a pod of the same node, to 4 s, which is a SYN sent again.
			Buckets: prometheus.ExponentialBuckets(16e-6, 4, 10),
		}, labels),
		reset: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "podgate_tcp_resets_total", Help: "TCP connections that ended with a RST.",
		}, labels),
	}
}

// Describe implements [prometheus.Collector].
func (k *Kernel) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{packetsDesc, bytesDesc, dropsDesc, droppedDesc, policyDesc, failedDesc} {
		ch <- d
	}
	k.tcp.Describe(ch)
	k.reset.Describe(ch)
}

// Collect implements [prometheus.Collector].
func (k *Kernel) Collect(ch chan<- prometheus.Metric) {
	k.mu.Lock()
	defer k.mu.Unlock()
	up := 1.0
	if err := k.read(ch); err != nil {
		up = 0
	}
	ch <- prometheus.MustNewConstMetric(failedDesc, prometheus.GaugeValue, up)
	k.tcp.Collect(ch)
	k.reset.Collect(ch)
}

func (k *Kernel) read(ch chan<- prometheus.Metric) (err error) {
	state, err := k.open(context.Background())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	return errors.Join(k.endpoints(state, ch), k.drops(state, ch), k.policies(state, ch))
}

// traffic is packets and bytes of a workload.
type traffic struct{ packets, bytes uint64 }

// endpoints adds up what the endpoints of a workload counted. Those that go take
// their counts with them, which Prometheus takes for a counter that was reset.
func (k *Kernel) endpoints(state State, ch chan<- prometheus.Metric) error {
	type key struct {
		workload
		direction policy.Direction
		verdict   string
	}
	sums := make(map[key]traffic)
	var errs []error
	for ep, err := range state.Endpoints() {
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c, err := state.Counters(ep.Gate)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		w := workloadOf(k.names.Endpoint(&ep))
		for d := range policy.Direction(2) {
			for verdict, n := range map[string]traffic{
				"allowed": {c.AllowedPackets[d], c.AllowedBytes[d]}, "denied": {c.DroppedPackets[d], c.DroppedBytes[d]},
			} {
				at := key{w, d, verdict}
				if _, ok := sums[at]; !ok && len(sums) >= k.limit {
					at.workload = workload{name: other}
				}
				sums[at] = traffic{sums[at].packets + n.packets, sums[at].bytes + n.bytes}
			}
		}
	}
	for at, n := range sums {
		labels := []string{at.namespace, at.kind, at.name, at.direction.String(), at.verdict}
		ch <- prometheus.MustNewConstMetric(packetsDesc, prometheus.CounterValue, float64(n.packets), labels...)
		ch <- prometheus.MustNewConstMetric(bytesDesc, prometheus.CounterValue, float64(n.bytes), labels...)
	}
	return errors.Join(errs...)
}

func (*Kernel) drops(state State, ch chan<- prometheus.Metric) error {
	drops, err := state.DropCounters()
	for _, c := range drops {
		labels := []string{c.Reason.String(), c.Direction.String()}
		ch <- prometheus.MustNewConstMetric(dropsDesc, prometheus.CounterValue, float64(c.Packets), labels...)
		ch <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(c.Bytes), labels...)
	}
	return err
}

func (k *Kernel) policies(state State, ch chan<- prometheus.Metric) error {
	type key struct {
		kind, namespace, name string
		direction             policy.Direction
		action                policy.Action
	}
	sums := make(map[key]uint64)
	var errs []error
	for r, err := range state.Rules() {
		if err != nil {
			errs = append(errs, err)
			continue
		}
		at := key{r.Policy.Kind, r.Policy.Namespace, r.Policy.Name, r.Direction, r.Action}
		if _, ok := sums[at]; !ok && len(sums) >= k.limit {
			at.kind, at.namespace, at.name = "", "", other
		}
		sums[at] += r.Counter.Packets
	}
	for at, n := range sums {
		ch <- prometheus.MustNewConstMetric(policyDesc, prometheus.CounterValue, float64(n),
			at.kind, at.namespace, at.name, at.direction.String(), at.action.String())
	}
	return errors.Join(errs...)
}

// settle is how old a flow is before its handshake counts: it has been answered
// by then, or takes the longest of times.
const settle = 5 * time.Second

// Scan looks at the flows that are new since the last time, and at those that
// were reset. What the kernel has forgotten in between is not counted.
func (k *Kernel) Scan(ctx context.Context) (err error) {
	state, err := k.open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	before, first := time.Duration(now.Nano())-settle, k.scanned == 0
	handshakes, resets := make(map[connection]pinning.FlowEntry), make(map[connection]pinning.FlowEntry)
	if err := state.ScanFlows(func(f pinning.FlowEntry) {
		if f.Protocol != policy.TCP {
			return
		}
		c := connection{f.Endpoint, f.Local.Port(), f.Peer.Port(), f.Created}
		if f.RTT > 0 && f.Created < before && f.Created >= k.scanned {
			handshakes[c] = f
		}
		if f.Reset {
			resets[c] = f
		}
	}); err != nil {
		return err
	}
	if !first { // what was there before nobody can say when
		for _, f := range handshakes {
			k.tcp.WithLabelValues(k.labels(&f)...).Observe(f.RTT.Seconds())
		}
		for c, f := range resets {
			if _, counted := k.resets[c]; !counted {
				k.reset.WithLabelValues(k.labels(&f)...).Inc()
			}
		}
	}
	k.scanned, k.resets = before, make(map[connection]struct{}, len(resets))
	for c := range resets {
		k.resets[c] = struct{}{}
	}
	return nil
}

// labels of a flow; workloads beyond the limit are one.
func (k *Kernel) labels(f *pinning.FlowEntry) []string {
	w := workloadOf(k.names.ByID(f.Endpoint))
	if _, known := k.known[w]; !known {
		if len(k.known) >= k.limit {
			w = workload{name: other}
		}
		k.known[w] = struct{}{}
	}
	return []string{w.namespace, w.kind, w.name, f.Direction.String()}
}
