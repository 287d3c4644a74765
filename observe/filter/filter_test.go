// Copyright The podgate Authors
// SPDX-License-Identifier: Apache-2.0

package filter_test

import (
	"errors"
	"strings"
	"testing"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/podgate/podgate/observe/filter"
)

func sample() *flowpb.Flow {
	return &flowpb.Flow{
		Uuid: "u", Verdict: flowpb.Verdict_FORWARDED, NodeName: "prod/n1", NodeLabels: []string{"k8s:zone=a"},
		TrafficDirection: flowpb.TrafficDirection_EGRESS, IsReply: wrapperspb.Bool(false),
		EventType: &flowpb.CiliumEventType{Type: 4, SubType: 5},
		IP:        &flowpb.IP{Source: "10.0.0.1", Destination: "fd00::2", IpVersion: flowpb.IPVersion_IPv6},
		L4: &flowpb.Layer4{Protocol: &flowpb.Layer4_TCP{TCP: &flowpb.TCP{
			SourcePort: 40000, DestinationPort: 80, Flags: &flowpb.TCPFlags{SYN: true, ACK: true},
		}}},
		Source: &flowpb.Endpoint{Namespace: "shop", PodName: "web-1", Identity: 300, ClusterName: "prod",
			Labels: []string{"k8s:app=web", "k8s:tier="}, Workloads: []*flowpb.Workload{{Kind: "Deployment", Name: "web"}}},
		Destination:        &flowpb.Endpoint{Identity: 2, Labels: []string{"reserved:world"}},
		DestinationService: &flowpb.Service{Namespace: "shop", Name: "db"},
		DestinationNames:   []string{"api.example.com"},
		Interface:          &flowpb.NetworkInterface{Index: 7, Name: "veth7"},
	}
}

func TestFilter(t *testing.T) {
	for _, test := range []struct {
		filter *flowpb.FlowFilter
		not    string
	}{
		{filter: &flowpb.FlowFilter{}},
		{filter: &flowpb.FlowFilter{Uuid: []string{"x", "u"}}},
		{filter: &flowpb.FlowFilter{Uuid: []string{"x"}}, not: "another"},
		{filter: &flowpb.FlowFilter{Verdict: []flowpb.Verdict{flowpb.Verdict_DROPPED}}, not: "forwarded"},
		{filter: &flowpb.FlowFilter{SourcePod: []string{"shop/"}}},
		{filter: &flowpb.FlowFilter{SourcePod: []string{"shop/web"}}},
		{filter: &flowpb.FlowFilter{SourcePod: []string{"/web"}}},
		{filter: &flowpb.FlowFilter{SourcePod: []string{"web"}}, not: "in default"},
		{filter: &flowpb.FlowFilter{DestinationPod: []string{"/"}}, not: "no pod"},
		{filter: &flowpb.FlowFilter{DestinationService: []string{"shop/d"}}},
		{filter: &flowpb.FlowFilter{SourceIp: []string{"10.0.0.0/30"}, DestinationIp: []string{"fd00::2"}}},
		{filter: &flowpb.FlowFilter{SourceIp: []string{"10.0.1.0/24"}}, not: "outside"},
		{filter: &flowpb.FlowFilter{SourceLabel: []string{"app=web"}}},
		{filter: &flowpb.FlowFilter{SourceLabel: []string{"k8s:app in (web, api), tier"}}},
		{filter: &flowpb.FlowFilter{SourceLabel: []string{"!app", "container:app=web"}}, not: "has it, of another source"},
		{filter: &flowpb.FlowFilter{DestinationLabel: []string{"reserved:world"}}},
		{filter: &flowpb.FlowFilter{NodeLabels: []string{"zone=a"}}},
		{filter: &flowpb.FlowFilter{DestinationPort: []string{"443", "80"}, Protocol: []string{"TCP"}}},
		{filter: &flowpb.FlowFilter{SourcePort: []string{"80"}}, not: "the other end"},
		{filter: &flowpb.FlowFilter{Protocol: []string{"udp", "icmp", "dns", "http"}}, not: "TCP"},
		{filter: &flowpb.FlowFilter{TcpFlags: []*flowpb.TCPFlags{{RST: true}, {SYN: true}}}},
		{filter: &flowpb.FlowFilter{TcpFlags: []*flowpb.TCPFlags{{SYN: true, RST: true}}}, not: "one of two"},
		{filter: &flowpb.FlowFilter{Reply: []bool{false}}},
		{filter: &flowpb.FlowFilter{Reply: []bool{true}}, not: "no reply"},
		{filter: &flowpb.FlowFilter{EventType: []*flowpb.EventTypeFilter{{Type: 4, MatchSubType: true, SubType: 5}}}},
		{filter: &flowpb.FlowFilter{EventType: []*flowpb.EventTypeFilter{{Type: 4, MatchSubType: true}}}, not: "another point"},
		{filter: &flowpb.FlowFilter{NodeName: []string{"n1"}}},
		{filter: &flowpb.FlowFilter{NodeName: []string{"prod/"}}},
		{filter: &flowpb.FlowFilter{NodeName: []string{"test/n*"}}, not: "another cluster"},
		{filter: &flowpb.FlowFilter{DestinationFqdn: []string{"*.example.com."}}},
		{filter: &flowpb.FlowFilter{DestinationFqdn: []string{"example.com"}}, not: "a name in it"},
		{filter: &flowpb.FlowFilter{SourceWorkload: []*flowpb.Workload{{Name: "web"}}}},
		{filter: &flowpb.FlowFilter{SourceWorkload: []*flowpb.Workload{{Kind: "Job", Name: "web"}}}, not: "a Deployment"},
		{filter: &flowpb.FlowFilter{DestinationIdentity: []uint32{1, 2}, SourceClusterName: []string{"prod"}}},
		{filter: &flowpb.FlowFilter{Interface: []*flowpb.NetworkInterface{{Name: "veth7"}}}},
		{filter: &flowpb.FlowFilter{HttpMethod: []string{"GET"}}, not: "no requests"},
		{filter: &flowpb.FlowFilter{DropReasonDesc: []flowpb.DropReason{flowpb.DropReason_DROP_REASON_UNKNOWN}}, not: "not dropped"},
	} {
		for _, deny := range []bool{false, true} {
			lists := [2][]*flowpb.FlowFilter{{test.filter}, nil}
			if deny {
				lists[0], lists[1] = lists[1], lists[0]
			}
			wants, err := filter.New(lists[0], lists[1])
			if err != nil {
				t.Errorf("%v: %v", test.filter, err)
				continue
			}
			if got := wants(sample()); got != (test.not == "") != deny {
				t.Errorf("%v matches: %t, denying %t", test.filter, got, deny)
			}
		}
	}
}

func TestFilterErrors(t *testing.T) {
	for name, f := range map[string]*flowpb.FlowFilter{
		"source_ip":                   {SourceIp: []string{"web"}},
		"destination_ip":              {DestinationIp: []string{"10.0.0.0/33"}},
		"source_pod":                  {SourcePod: []string{""}},
		"destination_port":            {DestinationPort: []string{"65536"}},
		"source_label":                {SourceLabel: []string{"a in b"}},
		"destination_cluster_name":    {DestinationClusterName: []string{""}},
		"protocol":                    {Protocol: []string{"quic"}},
		"dns_query":                   {DnsQuery: []string{"("}},
		"destination_fqdn":            {DestinationFqdn: []string{"a b"}},
		"node_name":                   {NodeName: []string{"a/b/c"}},
		"experimental.cel_expression": {Experimental: &flowpb.FlowFilter_Experimental{CelExpression: []string{"true"}}},
	} {
		_, err := filter.New(nil, []*flowpb.FlowFilter{{}, f})
		if err == nil || !strings.Contains(err.Error(), "blacklist[1]: "+name+": ") {
			t.Errorf("%s: error is %v", name, err)
		}
		if unsupported := errors.Is(err, filter.ErrUnsupported); unsupported != strings.HasPrefix(name, "experimental") {
			t.Errorf("%s: unsupported is %t", name, unsupported)
		}
	}
}

// FuzzFilter: any text is a filter that decides, or an error.
func FuzzFilter(f *testing.F) {
	f.Add("k8s:app in (web,api),!tier", "*.example.com", "prod/n*", "shop/web")
	f.Add("", "", "", "")
	f.Fuzz(func(_ *testing.T, label, name, node, pod string) {
		for _, ff := range []*flowpb.FlowFilter{
			{SourceLabel: []string{label}}, {DestinationFqdn: []string{name}}, {NodeName: []string{node}}, {SourcePod: []string{pod}},
		} {
			if wants, err := filter.New([]*flowpb.FlowFilter{ff}, nil); err == nil {
				wants(sample())
			}
		}
	})
}
