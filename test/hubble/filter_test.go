// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package hubble

import (
	"log/slog"
	"math/rand/v2"
	"testing"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	v1 "github.com/cilium/cilium/pkg/hubble/api/v1"
	"github.com/cilium/cilium/pkg/hubble/filters"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/podgate/podgate/observe/filter"
)

// dice draws flows and filters from few values, so that they often match.
type dice struct{ *rand.Rand }

func one[T any](d dice, of ...T) T { return of[d.IntN(len(of))] }

// some draws up to two of the values, often none.
func some[T any](d dice, of ...T) (out []T) {
	for range max(0, d.IntN(8)-5) {
		out = append(out, one(d, of...))
	}
	return out
}

func (d dice) endpoint() *flowpb.Endpoint {
	if d.IntN(8) == 0 {
		return &flowpb.Endpoint{Identity: 2, Labels: []string{"reserved:world"}}
	}
	return &flowpb.Endpoint{
		Namespace: one(d, "shop", "default", "a"), PodName: one(d, "web-1", "web-2", "db", ""), ClusterName: one(d, "", "prod"),
		Identity: one(d, uint32(1), 2, 300),
		Labels:   one(d, nil, []string{"k8s:app=web"}, []string{"k8s:app=db", "k8s:tier="}, []string{"container:app=web", "k8s:a.b/c=d"}),
		Workloads: one(d, nil, []*flowpb.Workload{{Kind: "Deployment", Name: "web"}},
			[]*flowpb.Workload{{Kind: "Job", Name: "db"}}),
	}
}

func (d dice) flow() *flowpb.Flow {
	f := &flowpb.Flow{
		Uuid: one(d, "u", "v"), NodeName: one(d, "", "n1", "prod/n1", "prod/n2.x"), NodeLabels: one(d, nil, []string{"k8s:zone=a"}),
		Verdict:          one(d, flowpb.Verdict_FORWARDED, flowpb.Verdict_DROPPED, flowpb.Verdict_AUDIT),
		DropReasonDesc:   one(d, flowpb.DropReason_POLICY_DENIED, flowpb.DropReason_DROP_REASON_UNKNOWN),
		TrafficDirection: one(d, flowpb.TrafficDirection_INGRESS, flowpb.TrafficDirection_EGRESS),
		IsReply:          one(d, nil, wrapperspb.Bool(true), wrapperspb.Bool(false)),
		EventType:        one(d, nil, &flowpb.CiliumEventType{Type: 1, SubType: 133}, &flowpb.CiliumEventType{Type: 4}, &flowpb.CiliumEventType{Type: 4, SubType: 5}),
		Source:           d.endpoint(), Destination: d.endpoint(),
		SourceService:      one(d, nil, &flowpb.Service{Namespace: "shop", Name: "web"}),
		DestinationService: one(d, nil, &flowpb.Service{Namespace: "default", Name: "db"}),
		SourceNames:        one(d, nil, []string{"a.example.com"}),
		DestinationNames:   one(d, nil, []string{"a.example.com", "example.org"}),
		Interface:          one(d, nil, &flowpb.NetworkInterface{Index: 7, Name: "veth7"}),
		IP: one(d, nil, &flowpb.IP{Source: "10.0.0.1", Destination: "10.0.1.2", IpVersion: flowpb.IPVersion_IPv4},
			&flowpb.IP{Source: "fd00::1", Destination: "fd00::2", SourceXlated: "fd00::3", IpVersion: flowpb.IPVersion_IPv6, Encrypted: true}),
	}
	flags := &flowpb.TCPFlags{SYN: d.IntN(2) > 0, ACK: d.IntN(2) > 0, RST: d.IntN(2) > 0}
	f.L4 = one(d, nil,
		&flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{SourcePort: 80, DestinationPort: 443, Flags: flags}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_UDP{UDP: &flowpb.UDP{SourcePort: 53, DestinationPort: 80}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_SCTP{SCTP: &flowpb.SCTP{SourcePort: 80, DestinationPort: 53}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv4{ICMPv4: &flowpb.ICMPv4{Type: 8}}},
		&flowpb.Layer4{Protocol: &flowpb.Layer4_ICMPv6{ICMPv6: &flowpb.ICMPv6{Type: 128}}})
	if d.IntN(8) == 0 {
		f.L7 = &flowpb.Layer7{Record: &flowpb.Layer7_Dns{Dns: &flowpb.DNS{Query: "a.example.com."}}}
	}
	return f
}

func (d dice) filter() *flowpb.FlowFilter {
	ips := []string{"10.0.0.1", "10.0.1.0/24", "fd00::2", "fd00::/64", "0.0.0.0/0", "web", "10.0.0.0/33"}
	names := []string{"shop/", "shop/web", "web", "/db", "/", "shop/web-1", "", "a/b/c"}
	fqdns := []string{"a.example.com", "*.com", "EXAMPLE.org.", "*", "", "a b", "x.."}
	labels := []string{"app=web", "k8s:app=web", "!app", "app in (web, db),tier", "any:app!=web", "reserved:world", "a.b/c=d", "tier=", "app in web", " app = db "}
	ports := []string{"80", "443", "53", "65536", "http"}
	workloads := []*flowpb.Workload{{Name: "web"}, {Kind: "Job"}, {Kind: "Job", Name: "db"}, {}}
	return &flowpb.FlowFilter{
		Uuid: some(d, "u", "w"), SourceIp: some(d, ips...), DestinationIp: some(d, ips...), SourceIpXlated: some(d, ips...),
		SourcePod: some(d, names...), DestinationPod: some(d, names...), SourceService: some(d, names...), DestinationService: some(d, names...),
		SourceFqdn: some(d, fqdns...), DestinationFqdn: some(d, fqdns...), SourceLabel: some(d, labels...), DestinationLabel: some(d, labels...),
		SourcePort: some(d, ports...), DestinationPort: some(d, ports...), SourceWorkload: some(d, workloads...), DestinationWorkload: some(d, workloads...),
		SourceClusterName: some(d, "prod", "test", ""), DestinationClusterName: some(d, "prod", "test", ""),
		SourceIdentity: some(d, uint32(1), 2, 3), DestinationIdentity: some(d, uint32(1), 2, 3),
		TrafficDirection: some(d, flowpb.TrafficDirection_INGRESS, flowpb.TrafficDirection_EGRESS),
		Verdict:          some(d, flowpb.Verdict_FORWARDED, flowpb.Verdict_DROPPED),
		DropReasonDesc:   some(d, flowpb.DropReason_POLICY_DENIED, flowpb.DropReason_POLICY_DENY),
		Interface:        some(d, &flowpb.NetworkInterface{Index: 7}, &flowpb.NetworkInterface{Name: "veth7"}, &flowpb.NetworkInterface{Index: 7, Name: "x"}),
		EventType:        some(d, &flowpb.EventTypeFilter{Type: 1}, &flowpb.EventTypeFilter{Type: 129}, &flowpb.EventTypeFilter{Type: 4, MatchSubType: true}, &flowpb.EventTypeFilter{}),
		Protocol:         some(d, "tcp", "UDP", "icmp", "icmpv6", "sctp", "dns", "http", "vrrp", "quic"),
		Reply:            some(d, true, false), Encrypted: some(d, true, false), DnsQuery: some(d, "example", "^b", "("),
		TcpFlags: some(d, &flowpb.TCPFlags{SYN: true}, &flowpb.TCPFlags{SYN: true, ACK: true}, &flowpb.TCPFlags{PSH: true}, &flowpb.TCPFlags{}),
		NodeName: some(d, "n1", "prod/", "prod/n*", "*", "default/n1", "a/b/c", ""), NodeLabels: some(d, labels...),
		IpVersion: some(d, flowpb.IPVersion_IPv4, flowpb.IPVersion_IPv6), HttpMethod: some(d, "GET"),
		HttpPath: some(d, "/a", "("), HttpStatusCode: some(d, "200", "4+", "40+", "6+", "4000"),
		TraceId: some(d, "", "x"), IpTraceId: some(d, uint64(0), 1),
	}
}

// thin leaves a few fields of a filter, since hardly a flow matches all.
func (d dice) thin() *flowpb.FlowFilter {
	full, out := d.filter().ProtoReflect(), &flowpb.FlowFilter{}
	fields := full.Descriptor().Fields()
	for range 1 + d.IntN(4) {
		field := fields.Get(d.IntN(fields.Len()))
		if full.Has(field) {
			out.ProtoReflect().Set(field, full.Get(field))
		}
	}
	return out
}

// Podgate's filters and Hubble's own give the same answer, and refuse the same
// requests.
func TestFilters(t *testing.T) {
	d := dice{rand.New(rand.NewPCG(1, 2))}
	flows := make([]*flowpb.Flow, 200)
	for i := range flows {
		flows[i] = d.flow()
	}
	var matched, refused int
	for range 20000 {
		var lists [2][]*flowpb.FlowFilter
		for i := range lists {
			for range d.IntN(3) {
				lists[i] = append(lists[i], d.thin())
			}
		}
		ours, err := filter.New(lists[0], lists[1])
		var theirs [2]filters.FilterFuncs
		var theirErr error
		for i := range theirs {
			var err error
			if theirs[i], err = filters.BuildFilterList(t.Context(), lists[i], filters.DefaultFilters(slog.New(slog.DiscardHandler))); err != nil {
				theirErr = err
			}
		}
		if (err != nil) != (theirErr != nil) {
			t.Fatalf("%v: error %v, Hubble's %v", lists, err, theirErr)
		}
		if err != nil {
			refused++
			continue
		}
		for _, f := range flows[d.IntN(len(flows)-20):][:20] {
			want := filters.Apply(theirs[0], theirs[1], &v1.Event{Event: f})
			if got := ours(f); got != want {
				t.Fatalf("%v\nof %v: %t, Hubble's %t", lists, f, got, want)
			}
			if want {
				matched++
			}
		}
	}
	if matched < 10000 || refused < 1000 {
		t.Errorf("%d flows matched and %d filters were refused: too few to tell", matched, refused)
	}
}
