// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package observe_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/podgate/podgate/bpf"
	"github.com/podgate/podgate/bpf/flow"
	"github.com/podgate/podgate/bpf/policy"
	"github.com/podgate/podgate/observe/history"
	"github.com/podgate/podgate/observe/hubble"
	"github.com/podgate/podgate/observe/metrics"
	"github.com/podgate/podgate/observe/naming"
	"github.com/podgate/podgate/syncd/manifest"
	"github.com/podgate/podgate/syncd/source"
)

// BenchmarkEvent is what one event costs from the bytes of the kernel's ring to
// history and metrics, among a thousand peers. 1000 ns are a tenth of a CPU at
// 100,000 events a second.
func BenchmarkEvent(b *testing.B) {
	const pods, batch = 1000, 1024
	names := naming.NewTable(naming.Options{Node: "n1", Cluster: "default"})
	var objects source.Batch
	var records [pods][]byte
	for i := range pods {
		addr := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		name := fmt.Sprintf("pod-%d", i)
		objects.Set = append(objects.Set, manifest.Object{
			Key: manifest.Key{Kind: manifest.KindPod, Namespace: "shop", Name: name}, Node: "n2",
			Pod:      &policy.Pod{Namespace: "shop", Name: name, Labels: map[string]string{"app": "web"}, Addresses: []netip.Addr{addr}},
			Workload: manifest.Workload{Kind: "Deployment", Name: fmt.Sprintf("app-%d", i%50)},
		})
		var err error
		if records[i], err = binary.Append(nil, binary.NativeEndian, bpf.DatapathEvent{
			Endpoint: 1, Local: bpf.DatapathAddress{Bytes: netip.MustParseAddr("10.1.0.1").As16()}, Peer: bpf.DatapathAddress{Bytes: addr.As16()},
			LocalPort: 80, PeerPort: uint16(i), Ethertype: 0x0800, Protocol: 6, Verdict: 1, Reason: 1, Type: 1, Length: 74,
		}); err != nil {
			b.Fatal(err)
		}
	}
	names.Apply(objects)
	ring := history.New(4095)
	server, traffic := hubble.NewServer(ring, names, hubble.Options{Node: "n1", Cluster: "default"}), metrics.NewTraffic(10000)
	clock, err := flow.NewClock()
	if err != nil {
		b.Fatal(err)
	}
	flows, named, out := make([]flow.Flow, batch), make([]naming.Names, batch), make([]history.Record, batch)
	b.ReportAllocs()
	for done := 0; b.Loop(); done++ {
		i := done % batch
		if flows[i], err = flow.Decode(records[done%pods], clock); err != nil {
			b.Fatal(err)
		}
		if i < batch-1 {
			continue
		}
		if err := names.Name(time.Now(), flows, named); err != nil {
			b.Fatal(err)
		}
		for i := range flows {
			out[i] = history.Record{Event: flows[i], Names: named[i]}
		}
		ring.Append(out...)
		server.Saw(out)
		traffic.Saw(out)
	}
}
